"""JSON as composefs-rs takes it: UTF-8, no key twice that counts, no values of another type.

Documents come from anywhere, so everything that the parser of the standard library lets through
or fails with otherwise is an error of the format here.  Nothing touches the file system; any
thread may call.
"""

import json
from collections.abc import Collection, Container, Mapping
from typing import Any, NoReturn

from cfs.errors import FormatError

__all__ = [
    "load_json",
    "parse_fields",
    "parse_integer",
    "parse_list",
    "parse_size",
    "parse_string",
    "parse_strings",
]

_SHOWN_SIZE = 40
_SIZES = range(1 << 63)  # loff_t


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs: a key may be twice, which is an error if it is known."""


def load_json(data: bytes, document: str) -> object:
    """Return the value of a text; objects are for :func:`parse_fields` only.

    Args:
        data: the text; the caller has bounded its size.
        document: what it is, for messages.

    Raises:
        FormatError: it is no JSON.
    """
    try:
        return json.loads(data.decode(), object_pairs_hook=_Object, parse_constant=_refuse_constant)
    # ValueError: syntax, encoding or a number of thousands of digits
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deep"
        msg = f"{document} is no JSON: {reason[:1].lower()}{reason[1:]}"
        raise FormatError(msg) from None


def _refuse_constant(name: str) -> NoReturn:
    msg = f"no number of JSON: {name}"
    raise ValueError(msg)


def parse_fields(value: object, where: str, known: Collection[str] | None) -> dict[str, Any]:
    """Return the known keys of an object; with None, all keys, of which the last one counts.

    Raises:
        FormatError: it is no object, or has a known key twice.
    """
    if not isinstance(value, _Object):
        msg = f"{where}: expected an object, found {_show(value)}"
        raise FormatError(msg)
    if known is None:
        return dict(value)
    fields: dict[str, Any] = {}
    for key, field in value:
        if key in fields:
            msg = f"{where}: {key} is there twice"
            raise FormatError(msg)
        if key in known:
            fields[key] = field
    return fields


def parse_integer(fields: Mapping[str, Any], key: str, where: str, values: Container[int]) -> int:
    """Return an integer.

    Args:
        fields: of an object.
        key: of the integer.
        where: the object is, for messages.
        values: that are valid.

    Raises:
        FormatError: it is missing, something else or not among the values.
    """
    value = fields.get(key)
    if type(value) is not int or value not in values:  # True is an int, too
        expected = f"expected one of {values}"
        if isinstance(values, range):
            expected = f"expected an integer from {values[0]} to {values[-1]}"
        msg = f"{where}: {key}: found {_find(fields, key)}, {expected}"
        raise FormatError(msg)
    return value


def parse_size(fields: Mapping[str, Any], key: str, where: str) -> int:
    """Return a size in bytes, one that a file can have.

    Raises:
        FormatError: it is missing or none.
    """
    return parse_integer(fields, key, where, _SIZES)


def parse_string(fields: Mapping[str, Any], key: str, where: str) -> str:
    """Return a string that can be encoded.

    Raises:
        FormatError: it is missing, something else or holds half a surrogate pair.
    """
    value = fields.get(key)
    if not isinstance(value, str) or not _is_encodable(value):
        msg = f"{where}: {key}: expected a string, found {_find(fields, key)}"
        raise FormatError(msg)
    return value


def parse_list(fields: Mapping[str, Any], key: str, where: str) -> list[Any]:
    """Return a list.

    Raises:
        FormatError: it is missing or something else.
    """
    value = fields.get(key)
    if type(value) is not list:
        msg = f"{where}: {key}: expected a list, found {_find(fields, key)}"
        raise FormatError(msg)
    return value


def parse_strings(fields: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Return a list of strings.

    Raises:
        FormatError: it is missing or something else.
    """
    items = parse_list(fields, key, where)
    return tuple(parse_string({key: item}, key, where) for item in items)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _find(fields: Mapping[str, Any], key: str) -> str:
    return _show(fields[key]) if key in fields else "nothing"


def _show(value: object) -> str:
    """Return a value as JSON has it, if it is short, else what kind of value it is."""
    if isinstance(value, _Object):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return json.dumps(value)[:_SHOWN_SIZE]
