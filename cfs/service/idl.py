"""The interfaces of ``varlink/`` and what they ask of parameters.

The parser of the PyPI package ``varlink`` reads them.  Its own checks let much pass that
the IDL forbids (spec cli-and-varlink d.2), therefore parameters are checked here.
"""

import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

import varlink.scanner  # type: ignore[import-untyped]

from cfs.service.errors import InvalidParameter, MethodNotFound

__all__ = ["INTERFACE_NAMES", "check_parameters", "find_method", "load_interfaces"]

INTERFACE_NAMES = ("org.composefs.Repository", "org.composefs.Oci")
_INT_END = 1 << 64
_MAX_STRING_SIZE = 1 << 16  # characters; no name or path has as many
_DOCUMENT = "_json"  # end of the names of what may have more
_scanner = varlink.scanner


@functools.cache
def load_interfaces() -> Mapping[str, Any]:
    """Return the parsed interfaces by name, in the order in which GetInfo tells them."""
    folder = resources.files("cfs.service").joinpath("interfaces")
    return {
        name: _scanner.Interface(folder.joinpath(f"{name}.varlink").read_text(encoding="utf-8"))
        for name in INTERFACE_NAMES
    }


def find_method(interface: Any, name: str) -> Any:
    """Return a method of a parsed interface.

    Raises:
        MethodNotFound: it has no such method.
    """
    member = interface.members.get(name)
    if not isinstance(member, _scanner._Method):  # noqa: SLF001 - it has no public name
        raise MethodNotFound(f"{interface.name}.{name}")
    return member


def check_parameters(interface: Any, method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that the IDL names, optional ones that are absent as None.

    Unknown members are dropped at every level.  Numbers are whole and below 2^64, truth
    values are no numbers, enumerations have one of their values.  Strings that are no documents
    have a length that nobody needs to be afraid of.

    Raises:
        InvalidParameter: one is missing or of another kind; names the parameter, also if
            what is wrong is inside of it.
        MethodNotFound: there is no such method.
    """
    checked = {}
    for name, kind in find_method(interface, method).in_type.fields.items():
        try:
            value = parameters.get(name)
            if name.endswith(_DOCUMENT) and isinstance(value, str):
                checked[name] = value
            else:
                checked[name] = _check(interface, kind, value)
        except _WrongKindError:
            raise InvalidParameter(name) from None
    return checked


class _WrongKindError(Exception):
    """A value is not what the IDL asks for."""


def _check(interface: Any, kind: Any, value: object) -> Any:
    """Return a value without what the IDL does not know; absent is the same as None."""
    if isinstance(kind, _scanner._CustomType):  # noqa: SLF001
        return _check(interface, interface.members[kind.name].type, value)
    if isinstance(kind, _scanner._Maybe):  # noqa: SLF001
        return None if value is None else _check(interface, kind.element_type, value)
    if isinstance(kind, _scanner._Struct) and isinstance(value, dict):  # noqa: SLF001
        return {
            name: _check(interface, member, value.get(name)) for name, member in kind.fields.items()
        }
    if isinstance(kind, _scanner._Array) and isinstance(value, list):  # noqa: SLF001
        return [_check(interface, kind.element_type, element) for element in value]
    if _is_scalar(kind, value):
        return value
    raise _WrongKindError


def _is_scalar(kind: Any, value: object) -> bool:
    """Tell whether a value is of a type without members; the parser gives an example of it."""
    if isinstance(kind, _scanner._Enum):  # noqa: SLF001
        return isinstance(value, str) and value in kind.fields
    if isinstance(kind, int) and not isinstance(kind, bool):
        return type(value) is int and 0 <= value < _INT_END
    if isinstance(kind, str):
        return isinstance(value, str) and len(value) <= _MAX_STRING_SIZE
    return isinstance(kind, bool) and isinstance(value, bool)
