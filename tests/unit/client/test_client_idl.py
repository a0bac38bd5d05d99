"""The classes of the client say what the interface files say, member by member."""

import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, is_dataclass
from enum import Enum
from importlib import import_module
from typing import Any, Union, get_args, get_origin

import pytest
from varlink import scanner

from cfs.client import errors
from cfs.client.convert import wire_fields
from cfs.client.methods import Method, Nothing, result_class
from tests.paths import CHECKOUT

MODULES = ["repository", "oci", "layers", "service"]
NAMES = ["org.composefs.Repository", "org.composefs.Oci"]
SCALARS: dict[Any, str] = {str: "string", int: "int", bool: "bool"}


def load(name: str) -> Any:
    return scanner.Interface((CHECKOUT / "varlink" / f"{name}.varlink").read_text())


def our_methods(name: str) -> dict[str, type[Method[Any]]]:
    return {
        kind.__name__: kind
        for module in MODULES
        for kind in vars(import_module(f"cfs.client.{module}")).values()
        if isinstance(kind, type) and issubclass(kind, Method)
        if kind.__module__ == f"cfs.client.{module}" and name == kind.INTERFACE
    }


def shape_of(hint: Any) -> Any:
    """Return an annotation in the form that :func:`shape_in` gives."""
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = [each for each in get_args(hint) if each is not types.NoneType]
        return "?", shape_of(inner)
    if get_origin(hint) in (list, Sequence):
        return "[]", shape_of(get_args(hint)[0])
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return {name: shape_of(each) for name, (_, each) in wire_fields(hint).items()}
    if issubclass(hint, Enum):
        return [each.value for each in hint]
    return SCALARS[hint]


def shape_in(interface: Any, found: Any) -> Any:
    """Return a type of the varlink package as plain values."""
    if isinstance(found, scanner._Maybe):
        return "?", shape_in(interface, found.element_type)
    if isinstance(found, scanner._Array):
        return "[]", shape_in(interface, found.element_type)
    if isinstance(found, scanner._CustomType):
        return shape_in(interface, interface.members[found.name].type)
    if isinstance(found, scanner._Enum):
        return [*found.fields]
    if isinstance(found, scanner._Struct):
        return {name: shape_in(interface, each) for name, each in found.fields.items()}
    return SCALARS[type(found) if not isinstance(found, type) else found]


def methods_in(interface: Any) -> Iterator[Any]:
    return (each for each in interface.members.values() if isinstance(each, scanner._Method))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_class(name: str) -> None:
    assert sorted(our_methods(name)) == sorted(each.name for each in methods_in(load(name)))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_replies_are_those_of_the_interface(name: str) -> None:
    interface = load(name)
    ours = our_methods(name)
    for each in methods_in(interface):
        kind = ours[each.name]
        assert shape_of(kind) == shape_in(interface, each.in_type), each.name
        result = result_class(kind)
        reply = {} if result is Nothing else shape_of(result)
        assert reply == shape_in(interface, each.out_type), each.name


@pytest.mark.parametrize("name", NAMES)
def test_what_may_be_missing_in_a_reply_has_a_default(name: str) -> None:
    for kind in our_methods(name).values():
        result: Any = result_class(kind)
        for field, hint in wire_fields(result).values():
            if get_origin(hint) in (Union, types.UnionType):
                assert field.default is None, (kind, field.name)
            elif kind.__name__ != "PutLayer":
                assert field.default is MISSING, (kind, field.name)


def test_every_error_has_a_class() -> None:
    declared = {
        member.name
        for name in NAMES
        for member in load(name).members.values()
        if isinstance(member, scanner._Error)
    }
    ours = {kind.kind for kind in errors.VarlinkError.__subclasses__()}
    assert ours - declared == {
        "InterfaceNotFound", "InvalidParameter", "MethodNotFound", "PermissionDenied",
    }  # fmt: skip
    assert declared <= ours
