"""Collection beside those who use the store: ten importers, a transaction; no patience."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cfs.digest import Digest
from cfs.repository.fsck import check
from cfs.repository.gc import collect
from cfs.repository.repository import Repository
from tests.command_line import command, environment, run

IMPORTER = Path(__file__).with_name("gc_importer.py")
NR_IMPORTERS = 10
SECONDS = int(os.environ.get("CFS_GC_SECONDS", "10"))
COLLECTIONS_PER_MINUTE = 20
DEADLINE_SECONDS = 120


def make_store(directory: Path) -> Path:
    done = run("cfsctl", "init", "--insecure", directory, cwd=directory.parent)
    assert done.returncode == 0, done.stderr
    return directory


def wait_for_line(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], DEADLINE_SECONDS)
    assert ready, "the process says nothing"
    return process.stdout.readline()


@contextmanager
def importer(store: Path, work: Path, number: int) -> Iterator["subprocess.Popen[bytes]"]:
    work.mkdir()
    with subprocess.Popen(
        [sys.executable, IMPORTER, store, work, str(number)],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def make_garbage(store: Path, text: bytes) -> Digest:
    with Repository.open(str(store)) as repository:
        digest = repository.objects.put_bytes(text)
        repository.sync()
    return digest


def collect_garbage(store: Path, number: int) -> None:
    """Do what users do one after the other; what was made on purpose has to go."""
    digest = make_garbage(store, b"on purpose %d" % number)
    with Repository.open(str(store)) as repository:
        assert collect(repository).problems == []
        assert not repository.objects.has(digest)


def test_ten_importers_and_a_looping_gc(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with ExitStack() as stack:
        importers = [
            stack.enter_context(importer(store, tmp_path / str(number), number))
            for number in range(NR_IMPORTERS)
        ]
        for process in importers:
            assert wait_for_line(process) == b"round\n"
        end, nr_collections = time.monotonic() + SECONDS, 0
        while time.monotonic() < end:
            collect_garbage(store, nr_collections)
            nr_collections += 1
        for process in importers:
            assert process.stdin
            process.stdin.close()
        for process in importers:
            assert process.stdout
            nr_rounds = process.stdout.read().count(b"round\n")
            assert process.wait(DEADLINE_SECONDS) == 0
            assert nr_rounds >= SECONDS // 10, "an importer starved"
    assert nr_collections >= SECONDS * COLLECTIONS_PER_MINUTE // 60
    with Repository.open(str(store)) as repository:
        assert collect(repository).problems == []
        assert check(repository).errors == []
    names = {str(path.parent.name) for path in store.glob("images/refs/importer-*/*")}
    assert names == {f"importer-{number}" for number in range(NR_IMPORTERS)}


@contextmanager
def transaction(store: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Hold the store open with the command for it, and wait until it does."""
    words = [*command("cfsctl"), "--repo", str(store), "transaction"]
    with subprocess.Popen(words, env=environment()) as process:
        try:
            end = time.monotonic() + DEADLINE_SECONDS
            while run("cfsctl", "--repo", store, "gc", "--no-wait", cwd=store).returncode == 0:
                assert time.monotonic() < end
            yield process
        finally:
            process.kill()


def test_gc_says_what_it_waits_for(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with transaction(store) as holder:
        make_garbage(store, b"garbage")
        done = run("cfsctl", "--repo", store, "gc", "--no-wait", cwd=store)
        assert done.returncode == 1
        assert done.stdout == b""
        assert done.stderr == b"Error: the repository is in use by another process\n"
        words = [*command("cfsctl"), "--repo", str(store), "gc"]
        pipe = subprocess.PIPE
        with subprocess.Popen(words, env=environment(), stdout=pipe, stderr=pipe) as waiting:
            assert waiting.stderr
            ready, _, _ = select.select([waiting.stderr], [], [], DEADLINE_SECONDS)
            assert ready
            line = waiting.stderr.readline().decode()
            assert line.startswith("Waiting until nobody else uses the store: ")
            assert f"(pid {holder.pid})" in line
            assert waiting.poll() is None
            # whoever is inside the transaction still gets in
            assert run("cfsctl", "--repo", store, "images", cwd=store).returncode == 0
            holder.send_signal(signal.SIGTERM)
            stdout, stderr = waiting.communicate(timeout=DEADLINE_SECONDS)
            assert (waiting.returncode, stderr) == (0, b"")
            assert stdout == b"Objects: 1 removed (7 bytes)\n"


def test_dry_run_waits_for_nobody(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with transaction(store):
        make_garbage(store, b"garbage")
        done = run("cfsctl", "--repo", store, "gc", "-n", cwd=store)
        assert done.returncode == 0
        assert done.stdout == b"Dry run (no files deleted):\nObjects: 1 removed (7 bytes)\n"


def test_interrupt_ends_fsck_at_once(tmp_path: Path) -> None:
    """Digesting this object takes days, in a thread that does not look at signals."""
    store = make_store(tmp_path / "store")
    (store / "objects" / "ab").mkdir(parents=True)
    path = store / "objects" / "ab" / ("cd" * 63)
    with path.open("wb") as file:
        os.truncate(file.fileno(), 1 << 42)
    # whoever runs the tests may ignore the signal, and that is inherited
    words = ["env", "--default-signal=INT", *command("cfsctl"), "--repo", str(store), "fsck"]
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE) as process:
        try:
            wait_until_open(process.pid, path)
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_SECONDS) == -signal.SIGINT
        finally:
            process.kill()


def wait_until_open(pid: int, path: Path) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    paths: set[str] = set()
    while str(path) not in paths:
        assert time.monotonic() < end
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                paths.add(os.readlink(link))
