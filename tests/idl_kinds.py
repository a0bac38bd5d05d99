"""Whether replies are what the IDL says."""

from collections.abc import Iterator
from typing import Any

import varlink.scanner  # type: ignore[import-untyped]


def wrong_kinds(interface: Any, kind: Any, value: Any, where: str) -> Iterator[str]:
    """Tell where a value is not of a kind of the IDL; members that may be null may be missing."""
    scanner = varlink.scanner
    while isinstance(kind, scanner._CustomType):
        kind = interface.members[kind.name].type
    if isinstance(kind, scanner._Maybe):
        if value is not None:
            yield from wrong_kinds(interface, kind.element_type, value, where)
    elif isinstance(kind, scanner._Array) and isinstance(value, list):
        for index, element in enumerate(value):
            yield from wrong_kinds(interface, kind.element_type, element, f"{where}[{index}]")
    elif isinstance(kind, scanner._Struct) and isinstance(value, dict):
        if unknown := value.keys() - kind.fields.keys():
            yield f"{where}: undeclared {unknown}"
        for name, member in kind.fields.items():
            yield from wrong_kinds(interface, member, value.get(name), f"{where}.{name}")
    elif value not in kind.fields if isinstance(kind, scanner._Enum) else not _is_like(value, kind):
        yield f"{where}: {value!r} is of the wrong kind"


def _is_like(value: Any, example: Any) -> bool:
    """Tell whether a value is of the kind that the parser of the IDL gives an example of."""
    return type(value) is type(example) and isinstance(value, bool | int | str)
