"""Objects are whole or absent: concurrent writers, kills, full disks, other file systems."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cfs import objectdir
from cfs.digest import Algorithm, Digest
from cfs.errors import IntegrityError, UnsupportedError
from cfs.fsverity import compute_digest
from cfs.linux import files
from cfs.objectdir import ObjectDirectory
from tests.paths import CHECKOUT


@pytest.fixture
def source() -> Iterator[int]:
    fd = os.memfd_create("source")
    os.write(fd, b"some content " * 1000)
    yield fd
    os.close(fd)


def digest_of(fd: int) -> tuple[int, Digest]:
    data = os.pread(fd, 1 << 20, 0)
    return len(data), compute_digest(data)


def check_objects(directory: Path) -> int:
    """Check that every object is what its name says; return their number."""
    paths = [path for path in directory.glob("*/*") if path.parent.name != ".tmp"]
    for path in paths:
        digest = Digest.parse(path.parent.name + path.name)
        assert compute_digest(path.read_bytes(), digest.algorithm) == digest
        assert path.stat().st_mode == 0o100644
    return len(paths)


def test_put_makes_an_object_once(tmp_path: Path, source: int) -> None:
    size, digest = digest_of(source)
    with ObjectDirectory.open(tmp_path / "a" / "objects") as objects:
        assert objects.put(source, size, digest)
        assert not objects.put(source, size, digest)
    assert check_objects(tmp_path / "a" / "objects") == 1
    assert [entry.name for entry in (tmp_path / "a" / "objects").iterdir()] == [str(digest)[:2]]


def test_sha512_object_has_a_longer_name(tmp_path: Path, source: int) -> None:
    data = os.pread(source, 1 << 20, 0)
    digest = compute_digest(data, Algorithm.SHA512)
    with ObjectDirectory.open(tmp_path) as objects:
        assert objects.put(source, len(data), digest)
    assert check_objects(tmp_path) == 1


def test_file_with_another_digest_leaves_nothing(tmp_path: Path, source: int) -> None:
    size, _ = digest_of(source)
    with (
        ObjectDirectory.open(tmp_path) as objects,
        pytest.raises(IntegrityError, match="the copy of"),
    ):
        objects.put(source, size, compute_digest(b"other"))
    assert check_objects(tmp_path) == 0


def test_file_that_shrank_leaves_nothing(tmp_path: Path, source: int) -> None:
    size, digest = digest_of(source)
    os.ftruncate(source, 100)
    with ObjectDirectory.open(tmp_path) as objects, pytest.raises(IntegrityError):
        objects.put(source, size, digest)
    assert check_objects(tmp_path) == 0


def test_object_of_another_size_is_an_error(tmp_path: Path, source: int) -> None:
    size, digest = digest_of(source)
    path = tmp_path / os.fsdecode(digest.object_path)
    path.parent.mkdir()
    path.write_bytes(b"short")
    with (
        ObjectDirectory.open(tmp_path) as objects,
        pytest.raises(IntegrityError, match="expected a regular file of 13000 bytes"),
    ):
        objects.put(source, size, digest)


def test_file_system_without_unnamed_files(
    tmp_path: Path, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise UnsupportedError

    monkeypatch.setattr(objectdir, "open_unnamed", refuse)
    size, digest = digest_of(source)
    with ObjectDirectory.open(tmp_path) as objects:
        assert objects.put(source, size, digest)
        with pytest.raises(IntegrityError):
            objects.put(source, size, compute_digest(b"other"))
    assert check_objects(tmp_path) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [str(digest)[:2]]


def test_copy_where_reflink_is_refused(
    tmp_path: Path, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[bool] = []

    def refuse(*_: object) -> bool:
        tried.append(True)
        return False

    monkeypatch.setattr(files, "clone_file", refuse)
    size, digest = digest_of(source)
    with ObjectDirectory.open(tmp_path) as objects:
        assert objects.put(source, size, digest)
    assert tried
    assert check_objects(tmp_path) == 1


def test_concurrent_writers_of_the_same_objects(tmp_path: Path) -> None:
    contents = [random.Random(seed).randbytes(10_000) for seed in range(40)]
    start = threading.Barrier(4)

    def write(_: int) -> int:
        start.wait()
        new = 0
        with ObjectDirectory.open(tmp_path) as objects:
            for content in contents:
                fd = os.memfd_create("content")
                try:
                    os.write(fd, content)
                    new += objects.put(fd, len(content), compute_digest(content))
                finally:
                    os.close(fd)
        return new

    with ThreadPoolExecutor(4) as executor:
        assert sum(executor.map(write, range(4))) == len(contents)
    assert check_objects(tmp_path) == len(contents)


WRITER = """
import os, random, sys
from pathlib import Path
from cfs.fsverity import compute_digest
from cfs import objectdir
from cfs.errors import UnsupportedError
from cfs.objectdir import ObjectDirectory

def refuse(*_):
    raise UnsupportedError

if sys.argv[3] == "named":
    objectdir.open_unnamed = refuse
numbers = random.Random(int(sys.argv[2]))
with ObjectDirectory.open(sys.argv[1]) as objects:
    print("ready", flush=True)
    while True:
        content = numbers.randbytes(200_000)
        fd = os.memfd_create("content")
        os.write(fd, content)
        objects.put(fd, len(content), compute_digest(content))
        os.close(fd)
"""


@pytest.mark.parametrize("kind", ["unnamed", "named"])
def test_killed_writer_leaves_no_wrong_object(tmp_path: Path, kind: str) -> None:
    moments = random.Random(kind)
    for round_ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, str(round_), kind],
            stdout=subprocess.PIPE,
            cwd=CHECKOUT,
        )
        with child:
            assert child.stdout
            assert child.stdout.readline() == b"ready\n"
            # not a wait for anything: the moment of the kill is what is tried out
            time.sleep(moments.uniform(0, 0.08))
            child.send_signal(signal.SIGKILL)
        check_objects(tmp_path)
    assert check_objects(tmp_path) > 0


@pytest.fixture
def tiny_file_system(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    mountpoint = tmp_path / "tiny"
    mountpoint.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", mountpoint],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield mountpoint
    subprocess.run(["umount", mountpoint], check=True)


def test_full_file_system_is_an_error_with_the_object_path(tiny_file_system: Path) -> None:
    content = os.urandom(100_000)
    fd = os.memfd_create("content")
    try:
        os.write(fd, content)
        digest = compute_digest(content)
        with (
            ObjectDirectory.open(tiny_file_system) as objects,
            pytest.raises(OSError, match="No space left on device") as caught,
        ):
            objects.put(fd, len(content), digest)
        assert caught.value.filename == digest.object_path.decode()
    finally:
        os.close(fd)
    assert check_objects(tiny_file_system) == 0
    assert sum(path.stat().st_size for path in tiny_file_system.rglob("*") if path.is_file()) == 0
