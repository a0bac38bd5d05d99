import pytest

from cfs.digest import Algorithm, Digest
from cfs.errors import FormatError, InvalidRequestError


def test_digest_parses_either_case_and_prints_lower() -> None:
    digest = Digest.parse("AB" * 32)
    assert str(digest) == "ab" * 32
    assert digest.algorithm is Algorithm.SHA256
    assert Digest.parse("0f" * 64).algorithm is Algorithm.SHA512


def test_object_path_is_first_byte_slash_rest() -> None:
    assert Digest(bytes(range(32))).object_path == b"00/" + bytes(range(1, 32)).hex().encode()


@pytest.mark.parametrize("text", ["", "ab", "zz" * 32, "ab " * 32, "ab" * 33, " " + "ab" * 32])
def test_bad_digest_text_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="expected 64 or 128 hex digits"):
        Digest.parse(text)


def test_unknown_algorithm_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="md5"):
        Algorithm.parse("md5")
