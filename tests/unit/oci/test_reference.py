"""Digests, tags and references as text."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs.errors import FormatError, IntegrityError, InvalidRequestError
from cfs.oci.reference import (
    Reference,
    check_content,
    check_tag,
    decode_tag,
    digest_like,
    digest_of,
    encode_tag,
    new_hash,
    parse_digest,
)

SHA256 = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "text",
    [
        SHA256,
        "sha384:" + "0" * 96,
        "sha512:" + "f" * 128,
        "md5:abc",
        "a+b.c_d-e:AZaz09=_-",
        "multihash+base58:QmRZxt2b1FVZPNqd8hsiykDL3TdBDeTSPX9Kv46HmX4Gx8",
    ],
)
def test_digests(text: str) -> None:
    assert parse_digest(text) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "sha256", "sha256:", ":abc", f"@{SHA256}", f"{SHA256}\n", f" {SHA256}"),
        *(SHA256.upper(), SHA256[:-1], f"{SHA256}0", SHA256.replace("a", "A"), "sha256:zz"),
        *("a++b:c", "+a:c", "a+:c", "A:c", "a:b:c", "a:b/c", "a:..", "sha512:" + "0" * 64),
        *("a:b\0", "a:é", "\udc80:a", "a:" + "b" * 1000),
    ],
)
def test_what_is_no_digest(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^invalid digest '.{,1000}'"):
        parse_digest(text)


def test_contents_are_compared_in_the_algorithm_of_the_digest() -> None:
    assert digest_of(b"x") == f"sha256:{hashlib.sha256(b'x').hexdigest()}"
    for name in ("sha256", "sha384", "sha512"):
        digest = f"{name}:{hashlib.new(name, b'x').hexdigest()}"
        assert digest_like(b"x", digest) == digest
        check_content(b"x", digest, "Thing")
        with pytest.raises(IntegrityError, match=f"^Thing integrity failed: expected {digest}, "):
            check_content(b"y", digest, "Thing")
    assert new_hash("md5:abc") is None
    with pytest.raises(IntegrityError, match="expected md5:abc, got sha256:"):
        check_content(b"x", "md5:abc", "Thing")


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("alpine:latest", b"alpine:latest"),
        ("oci:/a/b:c", b"oci:%2Fa%2Fb:c"),
        ("%", b"%25"),
        ("%2F", b"%252F"),
        ("...", b"..."),
        ("a\nb", b"a\nb"),
        ("é", "é".encode()),
    ],
)
def test_tags_and_their_files(tag: str, name: bytes) -> None:
    check_tag(tag)
    assert encode_tag(tag) == name
    assert decode_tag(name) == tag


@pytest.mark.parametrize(
    ("name", "tag"), [(b"%2f", "%2f"), (b"%2%2F", "%2/"), (b"%", "%"), (b"%252F", "%2F")]
)
def test_decoding_knows_two_escapes(name: bytes, tag: str) -> None:
    assert decode_tag(name) == tag


@settings(deadline=None)  # others use the machine
@given(st.text(st.sampled_from("%2F5/a"), min_size=1, max_size=12))
def test_encoding_is_reversible(tag: str) -> None:
    assert decode_tag(encode_tag(tag)) == tag


@pytest.mark.parametrize("tag", ["", ".", "..", "a\0", "\udc80", "a" * 256, "/" * 86, "é" * 128])
def test_no_file_can_have_such_a_tag(tag: str) -> None:
    with pytest.raises(InvalidRequestError):
        encode_tag(tag)


def test_a_file_name_that_is_no_text() -> None:
    with pytest.raises(FormatError):
        decode_tag(b"\xff")


def test_a_leading_at_sign_is_for_digests() -> None:
    assert encode_tag("@x") == b"@x"  # so that one that is there can be removed
    with pytest.raises(InvalidRequestError, match="a leading @ is reserved"):
        check_tag("@x")


def test_references() -> None:
    assert Reference.parse(f"@{SHA256}") == Reference(None, SHA256)
    assert Reference.parse(SHA256) == Reference(SHA256, None)
    assert Reference.parse_mountable(SHA256) == Reference(None, SHA256)
    assert Reference.parse_mountable(f"@{SHA256}") == Reference(None, SHA256)
    assert Reference.parse_mountable("docker://x@sha256:1") == Reference(
        "docker://x@sha256:1", None
    )
    for text in ("@", "@x", "@sha256:00", f"@@{SHA256}"):
        with pytest.raises(InvalidRequestError, match=r"^invalid digest "):
            Reference.parse(text)
    with pytest.raises(InvalidRequestError, match=r"^invalid digest "):
        Reference.parse_mountable("sha256:00")
