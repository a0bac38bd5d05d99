"""The options of ``fuse-serve -o`` (spec cli-and-varlink c.6 and c.7)."""

from collections.abc import Sequence
from dataclasses import dataclass

from cfs.errors import InvalidRequestError, UnsupportedError

__all__ = ["FuseOptions", "check_supported", "parse_items"]

_ON_OFF = ("on", "off")
_VALUES = {
    "mode": ("plain", "overlay"),
    "passthrough": ("on", "off", "auto"),
    "allow-other": _ON_OFF,
    "supervise": _ON_OFF,
    "verify": ("open", "require", "off"),
}
_FLAGS = ("passthrough", "allow-other", "supervise")
_KEYS = ("workers", *_VALUES)


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseOptions:
    """What the items say; None: not said.

    Attributes:
        mode: ``plain`` or ``overlay``.
        workers: number of C workers, 0: pyfuse3 alone.
        passthrough: ``on``, ``off`` or ``auto``.
        allow_other: let other users in.
        supervise: keep a supervisor above the session.
        verify: ``open``, ``require`` or ``off``.
    """

    mode: str = "plain"
    workers: int | None = None
    passthrough: str | None = None
    allow_other: bool = False
    supervise: bool | None = None
    verify: str | None = None


def parse_items(words: Sequence[str]) -> FuseOptions:
    """Parse lists of items, each separated by commas; all lists count as one.

    Raises:
        InvalidRequestError: an item is empty, unknown, said twice or has a wrong value.
    """
    said: dict[str, str] = {}
    for item in ",".join(words).split(",") if words else ():
        key, value = _parse_item(item)
        if key in said:
            msg = f"fuse option {key!r} is given twice"
            raise InvalidRequestError(msg)
        said[key] = value
    workers = said.get("workers")
    return FuseOptions(
        mode=said.get("mode", "plain"),
        workers=None if workers is None else int(workers),
        passthrough=said.get("passthrough"),
        allow_other=said.get("allow-other") == "on",
        supervise=said["supervise"] == "on" if "supervise" in said else None,
        verify=said.get("verify"),
    )


def _parse_item(item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if key not in _KEYS:
        msg = f"unknown fuse option {item!r}: expected one of {', '.join(_KEYS)}"
        raise InvalidRequestError(msg)
    if not equals and key in _FLAGS:
        return key, "on"
    if key == "workers":
        is_valid = value.isascii() and value.isdigit() and len(value) <= 4  # noqa: PLR2004 - enough
        expected = "a number"
    else:
        is_valid = value in _VALUES[key]
        expected = " or ".join(_VALUES[key])
    if not is_valid:
        msg = f"fuse option {item!r}: expected {key}={expected}"
        raise InvalidRequestError(msg)
    return key, value


def check_supported(options: FuseOptions) -> None:
    """Refuse what the FUSE server cannot do yet.

    Raises:
        UnsupportedError: naming the option.
    """
    lacking = {
        "mode=overlay": options.mode == "overlay",
        "passthrough=on": options.passthrough == "on",
        "supervise=on": options.supervise is True,
        f"verify={options.verify}": options.verify in ("open", "require"),
        f"workers={options.workers}": bool(options.workers),
    }
    for name, is_wanted in lacking.items():
        if is_wanted:
            msg = f"fuse option {name} is not supported yet"
            raise UnsupportedError(msg)
