import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfs.digest import Algorithm
from cfs.errors import CfsError, FormatError, UnsupportedError
from cfs.repository.metadata import Formats, Metadata, format_algorithm, parse_algorithm
from tests.stores import STORES

Case = dict[str, Any]

CASES: list[Case] = json.loads((STORES / "meta-cases.json").read_text())
INIT_CASES: list[Case] = json.loads((STORES / "init-cases.json").read_text())
MINIMAL = b'{"version": 1, "algorithm": "fsverity-sha256-12"'


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_what_composefs_rs_opens_is_opened(case: Case) -> None:
    data = case["meta.json"].encode()
    if case["images"]["rc"]:
        with pytest.raises(CfsError) as caught:
            Metadata.parse(data).check_readable()
        if "unknown" in case["name"] or case["name"] == "version 2":
            assert str(caught.value) == case["images"]["error"]
        return
    metadata = Metadata.parse(data)
    metadata.check_readable()
    assert metadata.formats.default == case["default"]
    assert sorted({metadata.formats.default, *metadata.formats.extra}) == case["written"]


@pytest.mark.parametrize("case", INIT_CASES)
def test_what_composefs_rs_wrote_is_encoded_again(case: Case) -> None:
    data = case["meta.json"].encode()
    metadata = Metadata.parse(data)
    assert metadata.encode() == data
    stored = metadata.stored_formats
    assert stored is not None
    assert Metadata.create(metadata.algorithm, stored.default) == metadata


def test_extra_formats_are_encoded() -> None:
    data = MINIMAL + b', "erofs_formats": {"default": 2, "extra": [1, 0, 1]}}'
    metadata = Metadata.parse(data)
    assert metadata.stored_formats == Formats(2, (0, 1))
    assert Metadata.parse(metadata.encode()) == metadata


def test_unknown_read_only_compatible_feature_forbids_writing_only() -> None:
    data = MINIMAL + b', "features": {"read-only-compatible": ["v1_erofs", "new"]}}'
    metadata = Metadata.parse(data)
    metadata.check_readable()
    with pytest.raises(UnsupportedError, match=r'\["new"\]'):
        metadata.check_writable()


def test_known_features_allow_writing() -> None:
    Metadata.create(Algorithm.SHA512, 1).check_writable()


@pytest.mark.parametrize(
    "rest",
    [
        b', "features": {"compatible": [1]}}',
        b', "features": {"compatible": "new"}}',
        b', "features": []}',
        b', "features": {"compatible": [], "compatible": []}}',
        b', "erofs_formats": {"default": true}}',
        b', "erofs_formats": {"default": 1, "extra": 1}}',
        b', "erofs_formats": {"default": 1, "extra": [3]}}',
        b', "erofs_formats": null}',
        b', "new": NaN}',
        b', "new": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b', "new": ' + b"9" * 5000 + b"}",
        b', "new": "\xff"}',
    ],
)
def test_broken_metadata_is_a_format_error(rest: bytes) -> None:
    with pytest.raises(FormatError, match=r"meta\.json"):
        Metadata.parse(MINIMAL + rest)


@pytest.mark.parametrize("data", [b"[]", b"1", b'"text"', b"null"])
def test_metadata_must_be_an_object(data: bytes) -> None:
    with pytest.raises(FormatError):
        Metadata.parse(data)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_names_of_algorithms(algorithm: Algorithm) -> None:
    assert parse_algorithm(format_algorithm(algorithm)) is algorithm


@pytest.mark.parametrize("name", ["sha256", "sha256-12", "fsverity-sha256", "fsverity-sha256-16"])
def test_other_names_are_no_algorithm(name: str) -> None:
    with pytest.raises(FormatError):
        parse_algorithm(name)


KEYS = st.sampled_from(
    ["version", "algorithm", "features", "compatible", "erofs_formats", "default", "extra", "new"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # others use the machine
@given(value=st.dictionaries(KEYS, JSON), data=st.binary())
def test_any_bytes_are_metadata_or_a_format_error(value: Case, data: bytes) -> None:
    complete = {"version": 1, "algorithm": "fsverity-sha512-12", **value}
    for candidate in (json.dumps(complete).encode(), data):
        try:
            metadata = Metadata.parse(candidate)
        except FormatError:
            continue
        assert Metadata.parse(metadata.encode()) == metadata
