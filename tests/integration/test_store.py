"""Stores through the command line: opening, locking, ``cat`` and ``transaction``."""

import base64
import fcntl
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cfs.cli.cfsctl import run as run_cfsctl
from cfs.digest import Algorithm
from cfs.fsverity import compute_digest
from tests.command_line import command, environment, run
from tests.integration.waiting import wait_until
from tests.stores import ALGORITHMS, STORES, copy_store, load, unpack_store

Case = dict[str, Any]

CASES = [(name, case) for name in ALGORITHMS for case in load(name, "splitstreams.json")]
META_CASES: list[Case] = json.loads((STORES / "meta-cases.json").read_text())
NAMES = [(name, given) for name in ALGORITHMS for given in load(name, "open.json")["cat"].items()]


class Result(NamedTuple):
    status: int
    stdout: bytes
    stderr: str


Cfsctl = Callable[..., Result]


@pytest.fixture
def cfsctl(capfdbinary: pytest.CaptureFixture[bytes]) -> Cfsctl:
    """Run a command in this process."""

    def call(*arguments: str | Path) -> Result:
        status = run_cfsctl([str(argument) for argument in arguments])
        found = capfdbinary.readouterr()
        return Result(status, found.out, found.err.decode())

    return call


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("golden")
    return {name: unpack_store(name, top / name) for name in ALGORITHMS}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    done = run("cfsctl", "init", "--insecure", path, cwd=tmp_path)
    assert done.returncode == 0
    return path


@contextmanager
def started(*arguments: str | Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command beside the test."""
    process = subprocess.Popen(
        [*command("cfsctl"), *map(str, arguments)], env=environment(), stderr=subprocess.PIPE
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def holds_lock(process: "subprocess.Popen[bytes]", path: Path) -> bool:
    """Whether a process has a lock on a file, as the kernel tells."""
    inode = f":{path.stat().st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    return any(f" {process.pid} " in line and inode in line and "->" not in line for line in lines)


@pytest.mark.parametrize(
    ("name", "given"), NAMES, ids=[f"{name}-{given[0]}" for name, given in NAMES]
)
def test_cat_by_name(
    name: str, given: tuple[str, Case], golden: dict[str, Path], cfsctl: Cfsctl
) -> None:
    stream, expected = given
    found = cfsctl("--repo", golden[name], "cat", stream)
    assert found.status == expected["rc"]
    if found.status:
        assert found.stdout == b""
        assert found.stderr.startswith("Error: ")
        assert found.stderr.count("\n") == 1
    else:
        assert len(found.stdout) == expected["size"]
        assert hashlib.sha256(found.stdout).hexdigest() == expected["sha256"]


@pytest.mark.parametrize(
    ("name", "case"), CASES, ids=[f"{name}-{case['name']}" for name, case in CASES]
)
def test_cat_of_streams_by_somebody_else(
    name: str, case: Case, golden: dict[str, Path], tmp_path: Path, cfsctl: Cfsctl
) -> None:
    store = copy_store(golden[name], tmp_path / "store")
    data = base64.b64decode(case["data"])
    path = os.fsdecode(b"objects/" + compute_digest(data, Algorithm.parse(name)).object_path)
    (store / path).parent.mkdir(parents=True, exist_ok=True)
    (store / path).write_bytes(data)
    (store / "streams/under-test").symlink_to(f"../{path}")
    found = cfsctl("--repo", store, "cat", "under-test")
    # where 0.9 aborts or panics, ours says what is wrong
    assert found.status == bool(case["rc"])
    if found.status:
        assert found.stderr.startswith("Error: ")
        assert found.stderr.count("\n") == 1
    else:
        assert len(found.stdout) == case["content"]["size"]
        assert hashlib.sha256(found.stdout).hexdigest() == case["content"]["sha256"]


def test_a_link_in_place_of_an_object_is_not_followed(
    golden: dict[str, Path], tmp_path: Path, cfsctl: Cfsctl
) -> None:
    store = copy_store(golden["sha256"], tmp_path / "store")
    content_id = next(name for name in os.listdir(store / "streams") if "config" in name)
    target = (store / "streams" / content_id).resolve()
    for replace in (os.mkfifo, lambda path: path.symlink_to("/etc/passwd"), Path.mkdir):
        target.unlink()
        replace(target)
        found = cfsctl("--repo", store, "cat", content_id)
        assert found.status == 1
        assert found.stderr.startswith("Error: ")
        if target.is_dir():
            return


@pytest.mark.parametrize("case", META_CASES, ids=[case["name"] for case in META_CASES])
def test_metadata(case: Case, store: Path, cfsctl: Cfsctl) -> None:
    (store / "meta.json").write_text(case["meta.json"])
    found = cfsctl("--repo", store, "images", "--json")
    expected = case["images"]
    assert found.status == expected["rc"]
    if found.status:
        assert found.stderr.startswith(f"Error: {expected['error']}")
        assert found.stderr.count("\n") == 1
        return
    assert json.loads(found.stdout) == expected["json"]
    tree = store.parent / "tree"
    tree.mkdir()
    created = cfsctl("--repo", store, "create-image", "--no-propagate-usr-to-root", tree)
    # 0.9 writes in spite of it
    is_forbidden = case["name"] == "unknown read-only-compatible feature"
    assert created.status == is_forbidden
    assert (store / "images").exists() != is_forbidden


def test_transaction_keeps_the_store_until_a_signal(store: Path, cfsctl: Cfsctl) -> None:
    for number, status in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)):
        with started("--repo", store, "transaction") as process:
            wait_until(lambda: holds_lock(process, store), "the lock")
            refused = cfsctl("--repo", store, "gc", "--no-wait")
            assert refused.status == 1
            assert "in use" in refused.stderr
            assert cfsctl("--repo", store, "images").status == 0
            process.send_signal(number)
            assert process.wait(30) == status
        assert cfsctl("--repo", store, "gc", "--no-wait").status == 0


def test_collection_waits_and_says_for_what(store: Path) -> None:
    with started("--repo", store, "transaction") as transaction:
        wait_until(lambda: holds_lock(transaction, store), "the lock")
        with started("--repo", store, "gc") as collection:
            assert collection.stderr is not None
            assert f"(pid {transaction.pid})".encode() in collection.stderr.readline()
            assert collection.poll() is None
            transaction.terminate()
            assert collection.wait(30) == 0


def test_who_does_not_wait_fails_beside_a_collection(store: Path, cfsctl: Cfsctl) -> None:
    collection = os.open(store, os.O_RDONLY)
    fcntl.flock(collection, fcntl.LOCK_EX)
    for options in ((), ("--dry-run",)):
        refused = cfsctl("--repo", store, "gc", "--no-wait", *options)
        assert refused.status == 1
        assert refused.stderr == "Error: the repository is in use by another process\n"
    os.close(collection)


def test_a_killed_transaction_holds_nothing(store: Path, cfsctl: Cfsctl) -> None:
    with started("--repo", store, "transaction") as process:
        wait_until(lambda: holds_lock(process, store), "the lock")
        process.kill()
        process.wait(30)
    assert cfsctl("--repo", store, "gc", "--no-wait").status == 0


def test_cat_to_a_reader_that_went_away(golden: dict[str, Path]) -> None:
    line = 'cfs() { "$@"; echo $? >&2; }; cfs "$@" | true'
    words = [*command("cfsctl"), "--repo", str(golden["sha256"]), "cat", "refs/layers/one"]
    done = subprocess.run(
        ["/bin/sh", "-c", line, "sh", *words],
        env=environment(),
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    assert done.stderr in ("1\n", "0\n")  # 0: it was quicker than its reader


def test_options_of_the_store(store: Path, tmp_path: Path) -> None:
    home = tmp_path / "home/.var/lib"
    home.mkdir(parents=True)
    home_store = store.rename(home / "composefs")
    user = str(tmp_path / "home")
    assert run("cfsctl", "--user", "images", cwd=tmp_path, HOME=user).returncode == 0
    for arguments, status, word in (
        (["--user", "--hash", "sha256", "images"], 1, b"--hash sha256"),
        (["--user", "--require-verity", "images"], 1, b"fs-verity"),
        (["--no-repo", "images"], 1, b"--no-repo is only supported for"),
        (["--hash", "sha256", "init", "--insecure", "new"], 1, b"--hash contradicts"),
        (["--repo", "", "init", "--insecure"], 1, b"is empty"),
        (["--user", "cat", "a/../b"], 1, b"invalid name 'a/../b'"),
        (["--repo", str(home_store), "--user", "images"], 2, b"--user"),
    ):
        done = run("cfsctl", *arguments, cwd=tmp_path, HOME=user)
        assert (done.returncode, word in done.stderr) == (status, True)
    done = run("cfsctl", "--user", "images", cwd=tmp_path, HOME="")
    assert done.stderr == b"Error: HOME is not set: cannot tell where the store of the user is\n"


def test_names_that_no_terminal_shows(tmp_path: Path) -> None:
    strict = "utf-8:strict"  # as in most locales
    done = run("cfsctl", "init", "--insecure", b"a\xff\n", cwd=tmp_path, PYTHONIOENCODING=strict)
    assert done.stdout.splitlines()[0].endswith(b" at a\\udcff\\n")
    assert os.listdir(bytes(tmp_path)) == [b"a\xff\n"]
    done = run(
        "cfsctl", "--repo", b"a\xff\n", "cat", b"\xff", cwd=tmp_path, PYTHONIOENCODING=strict
    )
    assert done.stderr == b"Error: name '\\udcff': expected UTF-8\n"
