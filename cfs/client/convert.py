"""Between dataclasses and the JSON of varlink, as the annotations of the fields say.

A field annotated with ``X | None`` may be missing or null, and is not sent while it is None.  What
a reply has besides the fields is ignored, so that newer services can add to it.
"""

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cfs.client.errors import InvalidReplyError
from cfs.errors import FormatError
from cfs.messages import decode_object, decoding_cost

__all__ = ["LOCAL", "decode", "encode", "parse_object", "wire_fields"]

LOCAL = {"local": True}
"""Metadata of a field that is no parameter."""

_MAX_INT = (1 << 64) - 1
_MAX_VALUES = 1 << 21  # the longest list of objects that a message can hold has fewer
_SHOWN_SIZE = 64
_T = TypeVar("_T")


@cache
def wire_fields(kind: Any) -> dict[str, tuple["Field[Any]", Any]]:
    """Return the fields of a dataclass that are parameters, with their types."""
    hints = get_type_hints(kind)
    return {
        field.name: (field, hints[field.name])
        for field in fields(kind)
        if not field.metadata.get("local", False)
    }


def encode(value: object) -> Any:
    """Return a dataclass, or what its fields hold, as JSON takes it."""
    if is_dataclass(value) and not isinstance(value, type):
        parameters = {name: getattr(value, name) for name in wire_fields(type(value))}
        return {name: encode(each) for name, each in parameters.items() if each is not None}
    if isinstance(value, list | tuple):
        return [encode(each) for each in value]
    return value.value if isinstance(value, Enum) else value


def decode(kind: type[_T], value: object, where: str = "reply") -> _T:
    """Return a value of a type.

    Args:
        kind: dataclass, enumeration, str, int, bool, list of these, or one of these or None.
        value: from JSON.
        where: what it is, for the message.

    Raises:
        InvalidReplyError: it is of another kind.
    """
    decoded: _T = _decode(kind, value, where)
    return decoded


def _decode(kind: Any, value: object, where: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        inner = next(each for each in get_args(kind) if each is not types.NoneType)
        return None if value is None else _decode(inner, value, where)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise _wrong(where, "an array", value)
        (inner,) = get_args(kind)
        return [_decode(inner, each, where) for each in value]
    if is_dataclass(kind):
        return _decode_object(kind, value, where)
    if issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            raise _wrong(where, " or ".join(each.value for each in kind), value) from None
    if type(value) is not kind or (type(value) is int and not 0 <= value <= _MAX_INT):
        raise _wrong(where, kind.__name__, value)
    return value


def _decode_object(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(where, "an object", value)
    found = {}
    for name, (field, hint) in wire_fields(kind).items():
        if name in value:
            found[name] = _decode(hint, value[name], f"{where}: {name}")
        elif field.default is MISSING:
            msg = f"{where}: {name} is missing"
            raise InvalidReplyError(msg)
    return kind(**found)


def _wrong(where: str, expected: str, value: object) -> InvalidReplyError:
    """Return the error; what holds other values, however many, is only named."""
    shown = "an object" if isinstance(value, Mapping) else "an array"
    if not isinstance(value, Mapping | list):
        shown = repr(value if isinstance(value, str) else str(value))[:_SHOWN_SIZE]
    return InvalidReplyError(f"{where} is {shown}: expected {expected}")


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a message.

    Raises:
        InvalidReplyError: it is anything else, or has more values than any reply.
    """
    try:
        decoding_cost(data, _MAX_VALUES)
        return decode_object(data)
    except FormatError as error:
        msg = f"the service sent what is no reply: {error}"
        raise InvalidReplyError(msg) from None
