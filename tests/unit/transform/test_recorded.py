"""The 79 trees of ``tests/data/oci/boot.json``: what composefs-rs makes of them for booting."""

import hashlib
import json
from typing import Any

import pytest

from cfs.digest import Algorithm
from cfs.dumpfile import format_tree
from cfs.erofs.writer import Rules, write_image
from cfs.errors import FormatError, NotFoundError
from cfs.fsverity import compute_digest
from cfs.transform import XattrMode, apply_boot, apply_oci, check_boot_resources
from cfs.tree import Directory, Regular
from tests.paths import DATA
from tests.unit.transform.layers import tree_of

CASES: dict[str, Any] = json.loads((DATA / "oci" / "boot.json").read_text())
SOUND = [name for name, case in CASES.items() if case["pull"] == "ok"]
REFUSED = [name for name, case in CASES.items() if case["pull"] != "ok"]


def transform(
    case: str, algorithm: Algorithm, mode: XattrMode = XattrMode.ALLOWLIST_ONLY
) -> Directory:
    root, objects = tree_of(case, algorithm)

    def read_content(path: bytes, file: Regular) -> bytes:
        assert file.digest is not None
        return objects[path]

    apply_oci(root, mode)
    check_boot_resources(root, read_content)
    apply_boot(root, read_content)
    return root


def ids(root: Directory, algorithm: Algorithm) -> dict[str, str]:
    return {
        str(version): str(
            compute_digest(
                write_image(root, min_version=version, max_version=version, rules=Rules.RUST),
                algorithm,
            )
        )
        for version in range(3)
    }


def test_there_are_cases_of_both_kinds() -> None:
    assert len(SOUND) > 30
    assert len(REFUSED) > 30


@pytest.mark.parametrize("name", SOUND)
def test_dump_and_ids(name: str) -> None:
    case = CASES[name]
    root = transform(name, Algorithm.SHA256)
    assert b"".join(format_tree(root)).decode() == case["dump"]
    assert ids(root, Algorithm.SHA256) == case["ids"]["sha256"]


@pytest.mark.parametrize("name", SOUND)
def test_dump_and_ids_with_sha512(name: str) -> None:
    case = CASES[name]
    root = transform(name, Algorithm.SHA512)
    dump = b"".join(format_tree(root))
    assert hashlib.sha256(dump).hexdigest() == case["dump_sha512_digest"]
    assert ids(root, Algorithm.SHA512) == case["ids"]["sha512"]


@pytest.mark.parametrize("name", [name for name in SOUND if "dump_user" in CASES[name]])
def test_dump_and_ids_with_user_xattrs(name: str) -> None:
    case = CASES[name]
    root = transform(name, Algorithm.SHA256, XattrMode.KEEP_USER_XATTRS)
    assert b"".join(format_tree(root)).decode() == case["dump_user"]
    assert ids(root, Algorithm.SHA256) == case["ids_user"]["sha256"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    with pytest.raises((FormatError, NotFoundError)):
        transform(name, Algorithm.SHA256)
