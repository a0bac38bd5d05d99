"""The grammar of ``fuse-serve -o`` and of ``--fuse``."""

import os

import click
import pytest

from cfs.cli.fuse_options import FuseCommand, parse_items, parse_wish
from cfs.errors import InvalidRequestError
from cfs.fuse.options import Mode, Passthrough, ServeChoices, ServeOptions, Verify
from cfs.mounting.choice import FuseWish


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


@pytest.mark.parametrize(
    ("text", "wish", "choices"),
    [
        (None, FuseWish.AUTO, {}),
        ("auto", FuseWish.AUTO, {}),
        ("yes", FuseWish.YES, {}),
        ("no", FuseWish.NO, {}),
        (
            "passthrough,workers=4",
            FuseWish.YES,
            {"passthrough": Passthrough.ON, "workers": 4},
        ),
        ("auto,workers=4", FuseWish.AUTO, {"workers": 4}),
        ("workers=4,auto", FuseWish.AUTO, {"workers": 4}),
        ("mode=overlay", FuseWish.YES, {"mode": Mode.OVERLAY}),
        ("mode=plain", FuseWish.YES, {"mode": Mode.PLAIN}),
        (
            "yes,verify=open,supervise=off",
            FuseWish.YES,
            {"verify": Verify.OPEN, "supervise": False},
        ),
    ],
)
def test_wish(text: str | None, wish: FuseWish, choices: ServeChoices) -> None:
    assert parse_wish(text) == (wish, choices)


@pytest.mark.parametrize(
    "text",
    ["", "no,workers=4", "yes,no", "auto,auto", "maybe", "yes,", ",yes", "workers=4,workers=4",
     "workers=-1", "Yes", "yes=1"],
)  # fmt: skip
def test_wrong_wish(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="fuse option"):
        parse_wish(text)


def test_an_unknown_word_is_told_with_modes_and_keys() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_wish("maybe")
    assert str(caught.value) == (
        "unknown fuse option 'maybe': expected one of auto, yes, no, workers, mode, passthrough, "
        "allow-other, supervise, verify"
    )


@pytest.mark.parametrize(
    ("words", "fuse", "arguments"),
    [
        (["i", "d"], None, ("i", "d")),
        (["--fuse", "i", "d"], "yes", ("i", "d")),
        (["--fuse", "yes", "i", "d"], "yes", ("i", "d")),
        (["--fuse", "no", "i", "d"], "no", ("i", "d")),
        (["--fuse", "auto", "d", "e"], "auto", ("d", "e")),
        (["--fuse=yes", "auto", "d"], "yes", ("auto", "d")),
        (["--fuse=workers=4", "i", "d"], "workers=4", ("i", "d")),
        (["--fuse", "--foreground", "i", "d"], "yes", ("i", "d")),
        (["i", "d", "--fuse"], "yes", ("i", "d")),
        (["i", "--fuse", "no", "d"], "no", ("i", "d")),
        (["--fuse", "--", "auto", "d"], "yes", ("auto", "d")),
        (["--", "--fuse", "no"], None, ("--fuse", "no")),
    ],
)
def test_value_of_the_option_may_be_missing(
    words: list[str], fuse: str | None, arguments: tuple[str, str]
) -> None:
    @click.command(cls=FuseCommand)
    @click.option("--fuse")
    @click.option("--foreground", is_flag=True)
    @click.argument("image")
    @click.argument("mountpoint")
    def command(**found: str | bool | None) -> tuple[object, object, object]:
        return found["fuse"], found["image"], found["mountpoint"]

    assert command.main(words, standalone_mode=False) == (fuse, *arguments)


@pytest.mark.parametrize(
    "words", [["--fuse", "--fuse", "i", "d"], ["--fuse", "no", "--fuse=yes", "i", "d"]]
)
def test_option_may_not_be_given_twice(words: list[str]) -> None:
    @click.command(cls=FuseCommand)
    @click.option("--fuse")
    @click.argument("rest", nargs=-1)
    def command(**_: object) -> None: ...

    with pytest.raises(click.UsageError, match="--fuse cannot be given twice"):
        command.main(words, standalone_mode=False)
