"""Stores with images, sound and broken ones, beside what composefs-rs said of them.

``tests/data/oci/README.md`` says what the files mean.  Every command runs in this process.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import Case, run_here
from tests.oci_layouts import unpack_golden
from tests.paths import DATA

STORES: dict[str, Case] = json.loads((DATA / "oci" / "stores.json").read_text())
# composefs-rs says "serde failed"
FINDINGS = {
    "manifest-not-json": "manifest-parse-failed: t: manifest is no JSON: expecting value",
    "config-unparsable": "config-parse-failed: t: config: rootfs is missing",
}
# of commands that fail here as well, what we say in place of the outermost of several reasons
WORDS = {
    "config-changed": "Config integrity failed: expected sha256:4e86",
    "config-link-gone": "Config sha256:4e86",
    "config-ref-missing": "no reference to the stream of config sha256:4e86",
    "config-unparsable": "config: rootfs is missing",
    "copied-artifact": "tar: unexpected end of the archive",
    "dangling-tag": "streams/refs/oci/dangling: leads to ",
    "file-among-tags": "streams/refs/oci/file: ",
    "file-object-gone": "object not found: 2aa7269baa45",
    "layer-link-nonsense": "stream symlink has incorrect prefix: 'nonsense'",
    "layer-object-gone": "object not found: 1662c8542769",
    "layer-ref-missing": "layer sha256:c6fa00ed38f5",
    "manifest-not-json": "manifest is no JSON",
    "tag-bad-digest": "Invalid OCI digest in reference: invalid digest 'sha256:zz'",
}
# "gc" tells what it would do and fails for the names that it cannot follow
DIFFERENT_OUTPUT = {"dangling-tag": ["gc", "--dry-run"], "file-among-tags": ["gc", "--dry-run"]}

Cfsctl = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_golden("stores", tmp_path_factory.mktemp("stores"))


@pytest.fixture
def cfsctl(stores: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Cfsctl:
    """Run a command on a store by name; nothing changes the stores."""

    def call(name: str, *arguments: str) -> tuple[int, str, str]:
        done = run_here(capfdbinary, "--repo", stores / name, *arguments)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return call


def with_sorted_lists(report: Case) -> Case:
    """Return a report of ``oci fsck`` with findings in an order that does not depend on names."""
    repo = {**report["repo"], "errors": sorted(report["repo"]["errors"])}
    return {**report, "errors": sorted(report["errors"]), "repo": repo}


@pytest.mark.parametrize("name", STORES)
def test_check(name: str, cfsctl: Cfsctl) -> None:
    status, stdout, stderr = cfsctl(name, "oci", "fsck", "--json")
    assert (status, stderr) == (0, "")
    report, expected = json.loads(stdout), STORES[name]["oci_fsck_json"]
    if name in FINDINGS:
        (finding,) = report["errors"]
        assert finding.startswith(f"fsck: {FINDINGS[name]}")
        expected = {**expected, "errors": [finding]}
    assert with_sorted_lists(report) == with_sorted_lists(expected)
    assert list(report) == ["ok", "images_checked", "images_corrupted", "errors", "repo"]
    status, stdout, stderr = cfsctl(name, "oci", "fsck")
    assert status == STORES[name]["oci_fsck_exit"]
    assert stderr == ("" if report["ok"] else "Error: OCI integrity check failed\n")
    nr_sound = report["images_checked"] - report["images_corrupted"]
    _, lines = stdout.split(f"\noci images: {nr_sound}/{report['images_checked']} ok\n")
    findings = "".join(f"  - {error}\n" for error in report["errors"])
    assert lines == (f"oci errors: {len(report['errors'])}\n{findings}" if findings else "")


@pytest.mark.parametrize("name", STORES)
def test_list(name: str, cfsctl: Cfsctl) -> None:
    """Whatever is left out is told: composefs-rs keeps that to itself."""
    status, stdout, stderr = cfsctl(name, "oci", "images", "--json")
    assert status == 0
    assert stdout == json.dumps(STORES[name]["oci_images_json"], indent=2) + "\n"
    listed = [image["name"] for image in json.loads(stdout)["images"]]
    warnings = re.findall(r"^Warning: ([^:]+): .+$", stderr, re.MULTILINE)
    assert len(warnings) == len(stderr.splitlines())
    nr_checked = STORES[name]["oci_fsck_json"]["images_checked"]
    assert len(listed) + len(warnings) == nr_checked
    status, table, again = cfsctl(name, "oci", "images")
    assert (status, again) == (0, stderr)
    if not listed:
        assert table == "No images found\n"
    rows = [row.split()[1] for row in table.splitlines() if row.startswith("│")]
    assert rows[1:] == listed


@pytest.mark.parametrize("name", [name for name in STORES if STORES[name].get("commands")])
def test_commands(name: str, cfsctl: Cfsctl) -> None:
    for case in STORES[name]["commands"]:
        status, stdout, stderr = cfsctl(name, *case["args"])
        assert status == case["exit"], case["args"]
        if case["args"] != DIFFERENT_OUTPUT.get(name):
            assert stdout == case.get("stdout", ""), case["args"]
        if not case["exit"]:
            assert stderr == ""
            continue
        outermost = case["stderr"].partition("\n")[0]
        assert re.match(r"Error: .+\n", stderr)
        assert outermost in stderr or WORDS[name] in stderr, case["args"]
