"""``gc`` and ``fsck`` on golden stores and on damaged copies, beside what composefs-rs said."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Result, run_text
from tests.stores import ALGORITHMS, STORES, copy_store, damage, list_paths, load, unpack_store

Case = dict[str, Any]

BROKEN = [(name, case) for name in ALGORITHMS for case in load(name, "broken.json")]
BROKEN_IDS = [f"{name}-{case['name']}" for name, case in BROKEN]
# where composefs-rs says "ok" of what is not
FOUND_BY_US = {
    "not found: image name leads to another image": {"image-invalid"},
    "not found: object is a link to its content": {"object-open-failed", "object-check-failed"},
}


Cfsctl = Callable[..., Result]


@pytest.fixture
def cfsctl(capsys: pytest.CaptureFixture[str]) -> Cfsctl:
    """Run a command in this process."""

    def call(store: Path, *arguments: str) -> Result:
        return run_text(capsys, "--repo", store, *arguments)

    return call


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("stores")
    return {name: unpack_store(name, top / name) for name in ALGORITHMS}


@pytest.fixture
def store(stores: dict[str, Path], algorithm: str, tmp_path: Path) -> Path:
    return copy_store(stores[algorithm], tmp_path / "store")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fsck_of_a_sound_store(store: Path, algorithm: str, cfsctl: Cfsctl) -> None:
    assert cfsctl(store, "fsck") == (0, (STORES / algorithm / "fsck.txt").read_text(), "")
    for arguments, name in ((), "fsck.json"), (("--metadata-only",), "fsck-metadata-only.json"):
        expected = json.dumps(load(algorithm, name), indent=2) + "\n"
        assert cfsctl(store, "fsck", "--json", *arguments) == (0, expected, "")


@pytest.mark.parametrize(("algorithm", "case"), BROKEN, ids=BROKEN_IDS)
def test_fsck_of_a_damaged_store(store: Path, case: Case, cfsctl: Cfsctl) -> None:
    damage(store, case["do"])
    status, stdout, stderr = cfsctl(store, "fsck", "--json")
    expected = case["fsck"]
    assert status == expected["rc"]
    if status:
        assert stdout == ""
        assert re.fullmatch(r"Error: .*: Not a directory\n", stderr)
        return
    report = json.loads(stdout)
    check_text(cfsctl(store, "fsck"), report["errors"])
    report["errors"].sort()
    if kinds := FOUND_BY_US.get(case["name"]):
        assert {error.split(": ")[1] for error in report["errors"]} == kinds
        assert not report["ok"]
    else:
        assert report == expected["json"]


def check_text(result: Result, errors: list[str]) -> None:
    """Compare the text with the same findings."""
    status, stdout, stderr = result
    if not errors:
        assert (status, stderr) == (0, "")
        assert stdout.endswith("\nstatus: ok\n")
        return
    assert (status, stderr) == (1, "Error: repository integrity check failed\n")
    assert f"\nstatus: {len(errors)} error(s)\n  - " in stdout
    assert sorted(re.findall(r"^  - (.*)$", stdout, re.MULTILINE)) == sorted(errors)


@pytest.mark.parametrize(("algorithm", "case"), BROKEN, ids=BROKEN_IDS)
def test_collection_in_a_damaged_store(store: Path, case: Case, cfsctl: Cfsctl) -> None:
    """What was sound is sound afterwards, and what is broken can be removed."""
    damage(store, case["do"])
    before = list_paths(store)
    check_dry_run(cfsctl(store, "gc", "--dry-run"), case)
    assert list_paths(store) - {"meta.json"} == before - {"meta.json"}
    found = cfsctl(store, "fsck", "--json")
    cfsctl(store, "gc")
    if found.status == 0:
        errors = set(json.loads(cfsctl(store, "fsck", "--json").stdout)["errors"])
        assert errors <= set(json.loads(found.stdout)["errors"])
    cfsctl(store, "gc", "--remove-broken")
    assert list_paths(store) <= before | {"meta.json"}
    again = cfsctl(store, "gc", "--remove-broken")
    assert again.stdout in ("", "Objects: 0 removed (0 bytes)\n")
    assert again.status == (1 if again.stderr else 0)
    assert "Hint: " not in again.stderr


def check_dry_run(result: Result, case: Case) -> None:
    if "gc_dry_run" not in case:  # composefs-rs counts a directory as an object
        return
    assert result.status == case["gc_dry_run"]["rc"]
    if result.status:
        assert re.fullmatch(r"(Error: [^\n]+: [^\n]+\n)+(Hint: [^\n]+\n)?", result.stderr)
    else:
        assert result == (0, case["gc_dry_run"]["stdout"], "")


@pytest.mark.parametrize(
    ("algorithm", "case"), [(name, case) for name in ALGORITHMS for case in load(name, "gc.json")]
)
def test_collection(store: Path, case: Case, cfsctl: Cfsctl) -> None:
    before = list_paths(store)
    arguments = case["arguments"]
    dry_run = cfsctl(store, "gc", "--dry-run", *arguments)
    assert dry_run == (case["dry_run"]["rc"], case["dry_run"]["stdout"], "")
    assert list_paths(store) == before
    real = cfsctl(store, "gc", *arguments)
    assert real == (case["real"]["rc"], case["real"]["stdout"], "")
    gone = {re.sub(r"^link |^file \d+ | \d+ [0-9a-f]{64}$", "", line) for line in case["gone"]}
    assert before - list_paths(store) == gone
    assert list_paths(store) <= before
    again = cfsctl(store, "gc", *arguments)
    assert again == (case["again"]["rc"], case["again"]["stdout"], "")
    assert cfsctl(store, "fsck").status == 0


@pytest.mark.parametrize("algorithm", ["sha256"])
def test_names_with_line_feeds_stay_in_their_line(store: Path, cfsctl: Cfsctl) -> None:
    (store / "images" / "refs" / "two\nlines").symlink_to("../nothing")
    text = "images/refs/two\\nlines"
    assert f"\n  - fsck: broken-symlink: {text}\n" in cfsctl(store, "fsck").stdout
    (error,) = json.loads(cfsctl(store, "fsck", "--json").stdout)["errors"]
    assert error == "fsck: broken-symlink: images/refs/two\nlines"
    assert cfsctl(store, "gc").stderr.startswith(f"Error: {text}: leads to nothing, ")


@pytest.mark.parametrize("algorithm", ["sha256"])
def test_dry_run_removes_no_names(store: Path, cfsctl: Cfsctl) -> None:
    before = list_paths(store)
    status, stdout, stderr = cfsctl(store, "gc", "--dry-run", "--remove-broken")
    assert (status, stdout) == (2, "")
    assert stderr.startswith("error: --remove-broken cannot be used with --dry-run\n")
    assert list_paths(store) == before
