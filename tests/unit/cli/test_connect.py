"""The arguments of ``--connect``."""

import pytest

from cfs.cli.connect import with_address


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--connect", "images"], ["--connect=", "images"]),
        (["--connect", "unix:x", "images"], ["--connect=unix:x", "images"]),
        (["--connect", "./x", "images"], ["--connect=./x", "images"]),
        (["--connect=x", "images"], ["--connect=x", "images"]),
        (["--connect"], ["--connect="]),
        (["--hash", "sha256", "--connect", "ps"], ["--hash", "sha256", "--connect=", "ps"]),
        (["--repo", "--connect", "ps"], ["--repo", "--connect", "ps"]),
        (["ps", "--connect", "x"], ["ps", "--connect", "x"]),
        (["--", "--connect", "x"], ["--", "--connect", "x"]),
        (["--repo"], ["--repo"]),
        ([], []),
    ],
)
def test_only_what_looks_like_an_address_is_the_value(
    words: list[str], expected: list[str]
) -> None:
    assert with_address(words) == expected
