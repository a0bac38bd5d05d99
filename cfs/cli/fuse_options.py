"""The options of ``fuse-serve -o`` and of ``--fuse`` (spec cli-and-varlink c.6 and c.7)."""

from collections.abc import Mapping, Sequence
from typing import cast

import click

from cfs.cli.strict import StrictCommand
from cfs.compat import override
from cfs.errors import InvalidRequestError
from cfs.fuse.options import MAX_WORKERS, Mode, Passthrough, ServeChoices, ServeOptions, Verify
from cfs.mounting.choice import FuseWish

__all__ = ["FUSE_KEYS", "FuseCommand", "parse_items", "parse_wish", "read_items"]

_ON_OFF = {"on": True, "off": False}
_VALUES: Mapping[str, Mapping[str, object]] = {
    "workers": {str(number): number for number in range(MAX_WORKERS + 1)},
    "mode": {"plain": Mode.PLAIN, "overlay": Mode.OVERLAY},
    "passthrough": {"on": Passthrough.ON, "off": Passthrough.OFF, "auto": Passthrough.AUTO},
    "allow-other": _ON_OFF,
    "supervise": _ON_OFF,
    "verify": {"open": Verify.OPEN, "require": Verify.REQUIRE, "off": Verify.OFF},
}
FUSE_KEYS = tuple(_VALUES)
_FLAGS = ("passthrough", "allow-other", "supervise")
_WISHES = {wish.value: wish for wish in FuseWish}


class FuseCommand(StrictCommand):
    """A command with the option ``--fuse``, whose value may be missing.

    Click would take the next word for the value, whatever it is.
    """

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, once each ``--fuse`` has a value."""
        return super().parse_args(ctx, _with_values(args))


def _with_values(args: Sequence[str]) -> list[str]:
    rest = list(args)
    words: list[str] = []
    while rest and rest[0] != "--":
        word = rest.pop(0)
        if word == "--fuse":
            word = f"--fuse={rest.pop(0) if rest and rest[0] in _WISHES else 'yes'}"
        words.append(word)
    return words + rest


def parse_wish(text: str | None) -> tuple[FuseWish, ServeChoices]:
    """Parse the value of ``--fuse``; None: it was not given.

    Raises:
        InvalidRequestError: as for :func:`read_items`; there are two modes, or ``no`` has options.
    """
    if text is None:
        return FuseWish.AUTO, {}
    items = text.split(",")
    wishes = [_WISHES[item] for item in items if item in _WISHES]
    if len(wishes) > 1:
        msg = f"fuse option {text!r}: expected one of auto, yes and no"
        raise InvalidRequestError(msg)
    rest = [item for item in items if item not in _WISHES]
    choices = read_items(rest, more=tuple(_WISHES))
    wish = wishes[0] if wishes else FuseWish.YES
    if wish is FuseWish.NO and choices:
        msg = f"fuse option {rest[0]!r} cannot be combined with 'no'"
        raise InvalidRequestError(msg)
    return wish, choices


def parse_items(words: Sequence[str], **others: str | bool | None) -> ServeOptions:
    """Parse as :func:`read_items` does; what was not said has its default.

    Args:
        words: the lists.
        others: attributes of :class:`ServeOptions` that have options of their own.

    Raises:
        InvalidRequestError: as for :func:`read_items`, or items contradict each other.
    """
    return ServeOptions(**read_items(words), **others)  # type: ignore[arg-type] # click has the types


def read_items(words: Sequence[str], *, more: Sequence[str] = ()) -> ServeChoices:
    """Parse lists of items, each separated by commas; all lists count as one.

    Args:
        words: the lists.
        more: other items that the caller takes, for the message.

    Raises:
        InvalidRequestError: an item is empty, unknown, said twice, or has a wrong value.
    """
    said: dict[str, object] = {}
    for item in ",".join(words).split(",") if words else ():
        key, value = _parse_item(item, more)
        if key in said:
            msg = f"fuse option {item.partition('=')[0]!r} is given twice"
            raise InvalidRequestError(msg)
        said[key] = value
    return cast("ServeChoices", said)  # the tables above have the types


def _parse_item(item: str, more: Sequence[str]) -> tuple[str, object]:
    """Return attribute and value."""
    key, equals, text = item.partition("=")
    values = _VALUES.get(key)
    if values is None:
        msg = f"unknown fuse option {item!r}: expected one of {', '.join([*more, *_VALUES])}"
        raise InvalidRequestError(msg)
    if not equals and key in _FLAGS:
        text = "on"
    if text not in values:
        expected = f"0 to {MAX_WORKERS}" if key == "workers" else " or ".join(values)
        msg = f"fuse option {item!r}: expected {key}={expected}"
        raise InvalidRequestError(msg)
    return key.replace("-", "_"), values[text]
