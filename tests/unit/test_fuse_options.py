"""The grammar of ``fuse-serve -o``."""

import os

import pytest

from cfs.cli.fuse_options import parse_items
from cfs.errors import InvalidRequestError
from cfs.fuse.options import Mode, Passthrough, ServeOptions, Verify


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ServeOptions()),
        (["mode=plain"], ServeOptions()),
        (["workers=0,allow-other"], ServeOptions(workers=0, allow_other=True)),
        (["workers=4", "mode=overlay"], ServeOptions(workers=4, mode=Mode.OVERLAY)),
        (["passthrough"], ServeOptions(passthrough=Passthrough.ON)),
        (["passthrough=auto"], ServeOptions(passthrough=Passthrough.AUTO)),
        (["workers=0,passthrough=auto"], ServeOptions(workers=0, passthrough=Passthrough.AUTO)),
        (["workers=0,verify=open"], ServeOptions(workers=0, verify=Verify.OPEN)),
        (["supervise=off"], ServeOptions(supervise=False)),
        (["supervise", "verify=require"], ServeOptions(verify=Verify.REQUIRE)),
        (["allow-other=off"], ServeOptions()),
    ],
)
def test_items(words: list[str], expected: ServeOptions) -> None:
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
        ["workers=17"],
        ["mode"],
        ["verify"],
        ["verify=on"],
        ["passthrough=yes"],
        ["allow-other,allow-other"],
        ["allow-other=off,allow-other"],
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
    "word",
    [
        "mode=overlay,passthrough",
        "mode=overlay,verify=open",
        "workers=0,passthrough=on",
    ],
)
def test_contradictions(word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word.replace(",", " and ").split("=")[0]):
        parse_items([word])


@pytest.mark.parametrize(
    ("word", "others"),
    [
        ("mode=overlay", {"upperdir": "u"}),
        ("mode=overlay", {"workdir": "w"}),
        ("mode=overlay", {"read_write": True}),
        ("mode=plain", {"upperdir": "u", "workdir": "w"}),
    ],
)
def test_upper_directories_need_each_other_and_an_overlay(
    word: str, others: dict[str, str | bool | None]
) -> None:
    with pytest.raises(InvalidRequestError):
        parse_items([word], **others)
    parse_items(["mode=overlay"], upperdir="u", workdir="w", read_write=True)


def test_workers_by_default() -> None:
    assert ServeOptions().nr_workers == min(16, len(os.sched_getaffinity(0)))
    assert ServeOptions(workers=16).nr_workers == 16
