"""What the IDL asks of parameters."""

from typing import Any

import pytest

from cfs.service.errors import InvalidParameter, MethodNotFound
from cfs.service.idl import INTERFACE_NAMES, check_parameters, load_interfaces
from tests.paths import CHECKOUT

REPOSITORY, OCI = (load_interfaces()[name] for name in INTERFACE_NAMES)


def test_descriptions_are_the_files() -> None:
    for name, interface in load_interfaces().items():
        path = CHECKOUT / "varlink" / f"{name}.varlink"
        assert interface.name == name
        assert interface.description == path.read_text(encoding="utf-8")


def test_unknown_members_are_dropped_and_optional_ones_filled() -> None:
    found = check_parameters(
        REPOSITORY,
        "Mount",
        {"handle": 1, "name": "n", "options": {"overlay": True, "x": 1}, "y": 2},
    )
    assert found == {"handle": 1, "name": "n", "options": {"overlay": True, "read_write": None}}
    assert check_parameters(OCI, "GetInfo", {"x": 1}) == {}
    layers = [{"diff_id": "a", "layer_verity": "b", "z": []}]
    given = {"handle": 1, "manifest_json": "", "config_json": "", "layers": layers}
    found = check_parameters(OCI, "FinalizeImage", given)
    assert found == {
        **given, "layers": [{"diff_id": "a", "layer_verity": "b"}], "name": None,
    }  # fmt: skip


BAD: list[tuple[Any, str, dict[str, Any], str]] = [
    (REPOSITORY, "CloseRepository", {}, "handle"),
    (REPOSITORY, "CloseRepository", {"handle": None}, "handle"),
    (REPOSITORY, "CloseRepository", {"handle": True}, "handle"),
    (REPOSITORY, "CloseRepository", {"handle": -1}, "handle"),
    (REPOSITORY, "CloseRepository", {"handle": 1 << 64}, "handle"),
    (REPOSITORY, "CloseRepository", {"handle": 1.0}, "handle"),
    (REPOSITORY, "CloseRepository", {"handle": "1"}, "handle"),
    (REPOSITORY, "CloseRepository", {"handle": {}}, "handle"),
    (REPOSITORY, "OpenRepository", {"user": 1}, "user"),
    (REPOSITORY, "Gc", {"handle": 1, "dry_run": True, "roots": "ab"}, "roots"),
    (REPOSITORY, "Gc", {"handle": 1, "dry_run": True, "roots": [None]}, "roots"),
    (REPOSITORY, "Mount", {"handle": 1, "name": "n", "options": []}, "options"),
    (REPOSITORY, "Mount", {"handle": 1, "name": "n", "options": {"overlay": 1}}, "options"),
    (OCI, "ComputeId", {"handle": 1, "image": "", "bootable": True, "xattrs": "None"}, "xattrs"),
    (OCI, "ComputeId", {"handle": 1, "image": "", "bootable": True, "xattrs": []}, "xattrs"),
]


@pytest.mark.parametrize(("interface", "method", "given", "name"), BAD)
def test_bad_parameters(interface: Any, method: str, given: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        check_parameters(interface, method, given)
    assert caught.value.parameters == {"parameter": name}


def test_largest_number() -> None:
    assert check_parameters(REPOSITORY, "CloseRepository", {"handle": (1 << 64) - 1})


@pytest.mark.parametrize("name", ["Nope", "MountParams", "InvalidHandle", "", "__init__"])
def test_no_such_method(name: str) -> None:
    with pytest.raises(MethodNotFound) as caught:
        check_parameters(REPOSITORY, name, {})
    assert caught.value.parameters == {"method": f"org.composefs.Repository.{name}"}
