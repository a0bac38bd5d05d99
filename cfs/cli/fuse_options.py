"""The options of ``fuse-serve -o`` (spec cli-and-varlink c.6 and c.7)."""

from collections.abc import Sequence

from cfs.errors import InvalidRequestError
from cfs.fuse.options import MAX_WORKERS, Mode, Passthrough, ServeOptions, Verify

__all__ = ["parse_items"]

_ON_OFF = {"on": True, "off": False}
_VALUES: dict[str, dict[str, object]] = {
    "workers": {str(number): number for number in range(MAX_WORKERS + 1)},
    "mode": {"plain": Mode.PLAIN, "overlay": Mode.OVERLAY},
    "passthrough": {"on": Passthrough.ON, "off": Passthrough.OFF, "auto": Passthrough.AUTO},
    "allow-other": dict(_ON_OFF),
    "supervise": dict(_ON_OFF),
    "verify": {"open": Verify.OPEN, "require": Verify.REQUIRE, "off": Verify.OFF},
}
_FLAGS = ("passthrough", "allow-other", "supervise")


def parse_items(words: Sequence[str], **others: str | bool | None) -> ServeOptions:
    """Parse lists of items, each separated by commas; all lists count as one.

    Args:
        words: the lists.
        others: attributes of :class:`ServeOptions` that have options of their own.

    Raises:
        InvalidRequestError: an item is empty, unknown, said twice, has a wrong value or
            contradicts another.
    """
    said: dict[str, object] = {}
    for item in ",".join(words).split(",") if words else ():
        key, value = _parse_item(item)
        if key in said:
            msg = f"fuse option {item.partition('=')[0]!r} is given twice"
            raise InvalidRequestError(msg)
        said[key] = value
    return ServeOptions(**said, **others)  # type: ignore[arg-type] # the tables above have the types


def _parse_item(item: str) -> tuple[str, object]:
    """Return attribute and value."""
    key, equals, text = item.partition("=")
    values = _VALUES.get(key)
    if values is None:
        msg = f"unknown fuse option {item!r}: expected one of {', '.join(_VALUES)}"
        raise InvalidRequestError(msg)
    if not equals and key in _FLAGS:
        text = "on"
    if text not in values:
        expected = f"0 to {MAX_WORKERS}" if key == "workers" else " or ".join(values)
        msg = f"fuse option {item!r}: expected {key}={expected}"
        raise InvalidRequestError(msg)
    return key.replace("-", "_"), values[text]
