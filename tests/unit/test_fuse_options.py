"""The grammar of ``fuse-serve -o``."""

import pytest

from cfs.cli.fuse_options import FuseOptions, check_supported, parse_items
from cfs.errors import InvalidRequestError, UnsupportedError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], FuseOptions()),
        (["mode=plain"], FuseOptions()),
        (["workers=0,allow-other"], FuseOptions(workers=0, allow_other=True)),
        (["workers=4", "mode=overlay"], FuseOptions(workers=4, mode="overlay")),
        (["passthrough"], FuseOptions(passthrough="on")),
        (["passthrough=auto"], FuseOptions(passthrough="auto")),
        (["supervise=off"], FuseOptions(supervise=False)),
        (["supervise", "verify=require"], FuseOptions(supervise=True, verify="require")),
        (["allow-other=off"], FuseOptions()),
    ],
)
def test_items(words: list[str], expected: FuseOptions) -> None:
    assert parse_items(words) == expected


@pytest.mark.parametrize(
    "words",
    [
        [""],
        ["workers=1,"],
        ["nope"],
        ["yes"],
        ["auto"],
        ["mode=yes"],
        ["workers"],
        ["workers="],
        ["workers=-1"],
        ["workers=x"],
        ["mode"],
        ["verify"],
        ["verify=on"],
        ["passthrough=yes"],
        ["allow-other,allow-other"],
        ["mode=plain", "mode=plain"],
    ],
)
def test_wrong_items(words: list[str]) -> None:
    with pytest.raises(InvalidRequestError, match="fuse option"):
        parse_items(words)


def test_an_unknown_item_is_told_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"'nope'.*workers.*verify"):
        parse_items(["nope"])


@pytest.mark.parametrize(
    "word", ["", "workers=0", "passthrough=auto", "supervise=off", "verify=off"]
)
def test_what_can_be_served(word: str) -> None:
    check_supported(parse_items([word] if word else []))


@pytest.mark.parametrize(
    "word", ["mode=overlay", "passthrough", "supervise", "verify=open", "workers=1"]
)
def test_what_cannot_be_served_yet(word: str) -> None:
    with pytest.raises(UnsupportedError, match=word):
        check_supported(parse_items([word]))
