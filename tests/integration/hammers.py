"""Processes that use a mount hard, and what they need: the tree and its copy."""

import ctypes
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cfs.inodes import InodeVector
from cfs.tree import Directory, Regular, Symlink
from tests.integration.vectors import make_vector

__all__ = ["Hammers", "dropping_caches", "hammering", "make_tree"]

HAMMER = Path(__file__).with_name("hammer.py")
DEADLINE = 60
_MS_RDONLY = 1
_MS_REMOUNT = 32
_FILES_PER_DIRECTORY = 20
_NR_DIRECTORIES = 15
_SIZES = (1, 100, 4096, 5000, 70_000, 300_000, 1_500_000)


def make_tree(objects: Path, copy: Path) -> InodeVector:
    """Make a tree with inline and external files; put the objects and a copy to compare with."""
    rng = random.Random(5)
    root = Directory(mode=0o040755, nlink=2 + _NR_DIRECTORIES)
    copy.mkdir()
    (objects / "aa").mkdir()
    for number in range(_NR_DIRECTORIES):
        directory = Directory(mode=0o040755, nlink=2)
        name = f"directory{number}"
        (copy / name).mkdir()
        root.children[name.encode()] = directory
        for index in range(_FILES_PER_DIRECTORY):
            _add_file(directory, f"{number}-{index}", objects, copy / name, rng)
        target = b"../somewhere"
        directory.children[b"link"] = Symlink(mode=0o120777, size=len(target), target=target)
        (copy / name / "link").symlink_to(os.fsdecode(target))
    return make_vector(root)


def _add_file(
    directory: Directory, name: str, objects: Path, copy: Path, rng: random.Random
) -> None:
    size = rng.choice(_SIZES)
    content = rng.randbytes(size)
    file = Regular(mode=0o100644, size=size, xattrs={b"user.name": name.encode()})
    if size <= 100:
        file.content = content
    else:
        file.payload = f"aa/{name}".encode()
        (objects / "aa" / name).write_bytes(content)
    directory.children[name.encode()] = file
    (copy / name).write_bytes(content)
    (copy / name).chmod(0o644)


class Hammers:
    """Processes of ``hammer.py``, one for each way; they run when this is made."""

    def __init__(self, ways: Sequence[str], mnt: Path, copy: Path) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-S", "-I", str(HAMMER), way, str(mnt), str(copy), str(seed)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for seed, way in enumerate(ways)
        ]  # fmt: skip
        for process in self._processes:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"

    def all_run(self) -> bool:
        """Whether none has ended, which it would with an error."""
        return all(process.poll() is None for process in self._processes)

    def finish(self) -> list[str]:
        """Tell them to stop; return what each said."""
        for process in self._processes:
            assert process.stdin
            with suppress(BrokenPipeError):
                process.stdin.close()
        return self.wait()

    def wait(self, seconds: float = DEADLINE) -> list[str]:
        """Wait until all have ended; return what each said."""
        said = []
        for process in self._processes:
            status = process.wait(seconds)
            assert process.stdout
            text = process.stdout.read().strip()
            # an error under a mapping is SIGBUS
            said.append(f"Error: signal {-status}" if status < 0 else text)
            process.stdout.close()
        return said

    def kill(self) -> None:
        """End those that are left."""
        for process in self._processes:
            process.kill()
            process.wait(DEADLINE)
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    stream.close()  # type: ignore[union-attr] # they are pipes


@contextmanager
def hammering(ways: Sequence[str], mnt: Path, copy: Path) -> Iterator[Hammers]:
    hammers = Hammers(ways, mnt, copy)
    try:
        yield hammers
    finally:
        hammers.kill()


@contextmanager
def dropping_caches(mnt: Path, interval: float) -> Iterator[None]:
    """Let the kernel forget the tree again and again, so that it has to ask.

    A remount drops the cached names of one mount, unused inodes with them; other mounts of the
    machine notice nothing.  Needs root.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    is_over = threading.Event()

    def drop() -> None:
        while not is_over.wait(interval):
            libc.mount(None, os.fsencode(mnt), None, _MS_REMOUNT | _MS_RDONLY, None)

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
