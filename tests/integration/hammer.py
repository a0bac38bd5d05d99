"""Use a mount hard, and compare everything seen with a copy of the tree.

``hammer.py WAY MOUNT COPY SEED``, WAY being one of ``WAYS``.  Goes on until standard input ends;
then it prints how many files or trees it has looked at.  Status 1 and one line: an error, or
something wrong was seen.  Standard library only: it is started with ``-S -I``.
"""

import mmap
import os
import random
import select
import signal
import stat
import sys
from collections.abc import Callable

PAGE = 4096


class Tree:
    """The copy, held in memory."""

    def __init__(self, copy: bytes) -> None:
        self.files: dict[bytes, bytes] = {}
        self.links: dict[bytes, bytes] = {}
        self.directories: dict[bytes, dict[bytes, tuple[int, int]]] = {}
        self._load(copy, b"")

    def _load(self, copy: bytes, path: bytes) -> None:
        listing = self.directories[path] = {}
        for name in sorted(os.listdir(copy + path)):
            child = path + b"/" + name
            status = os.lstat(copy + child)
            size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
            listing[name] = (status.st_mode, size)
            if stat.S_ISDIR(status.st_mode):
                self._load(copy, child)
            elif stat.S_ISLNK(status.st_mode):
                self.links[child] = os.readlink(copy + child)
            else:
                with open(copy + child, "rb") as file:
                    self.files[child] = file.read()


def check(what: str, path: bytes, *, is_right: bool) -> None:
    if not is_right:
        msg = f"{what} of {path!r} is wrong"
        raise ValueError(msg)


def pick(tree: Tree, rng: random.Random) -> tuple[bytes, bytes]:
    path = rng.choice(list(tree.files))
    return path, tree.files[path]


def read_buffered(tree: Tree, top: bytes, rng: random.Random) -> None:
    path, expected = pick(tree, rng)
    fd = os.open(top + path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for _ in range(3):
            off = rng.randrange(len(expected) + 1)
            size = rng.randrange(1, 300_000)
            found = os.pread(fd, size, off)
            check("content", path, is_right=found == expected[off : off + size])
    finally:
        os.close(fd)


def read_mapped(tree: Tree, top: bytes, rng: random.Random) -> None:
    path, expected = pick(tree, rng)
    fd = os.open(top + path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(fd, len(expected), prot=mmap.PROT_READ) as mapping:
            for _ in range(10):
                off = rng.randrange(len(expected))
                found = mapping[off : off + 5000]
                check("mapping", path, is_right=found == expected[off : off + 5000])
    finally:
        os.close(fd)


def read_direct(tree: Tree, top: bytes, rng: random.Random) -> None:
    path, expected = pick(tree, rng)
    fd = os.open(top + path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 64 * PAGE) as buffer:  # as aligned as O_DIRECT wants it
            for _ in range(3):
                off = rng.randrange(len(expected) // PAGE + 1) * PAGE
                size = os.preadv(fd, [buffer], off)
                found = buffer[:size]
                check("direct read", path, is_right=found == expected[off : off + len(buffer)])
    finally:
        os.close(fd)


def walk(tree: Tree, top: bytes, rng: random.Random) -> None:
    """The whole tree, directories in any order."""
    paths = list(tree.directories)
    rng.shuffle(paths)
    for path in paths:
        found = {}
        with os.scandir(top + path) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
                found[entry.name] = (status.st_mode, size)
        check("listing", path, is_right=found == tree.directories[path])
        for name in found:
            child = path + b"/" + name
            if child in tree.links:
                check("link", child, is_right=os.readlink(top + child) == tree.links[child])


def copy(tree: Tree, top: bytes, rng: random.Random) -> None:
    """Like tar: list a directory, then read its files; the server may push them meanwhile."""
    directory = rng.choice(list(tree.directories))
    for name in os.listdir(top + directory):
        path = directory + b"/" + name
        status = os.lstat(top + path)
        if stat.S_ISREG(status.st_mode):
            fd = os.open(top + path, os.O_RDONLY)
            try:
                found = os.read(fd, status.st_size + 1)
            finally:
                os.close(fd)
            check("content", path, is_right=found == tree.files[path])


def look(tree: Tree, top: bytes, rng: random.Random) -> None:
    """Single things: stat, listing, link, xattrs, a name that is not there."""
    directory = rng.choice(list(tree.directories))
    listing = tree.directories[directory]
    check("names", directory, is_right=set(os.listdir(top + directory)) == set(listing))
    for name, (mode, size) in rng.sample(sorted(listing.items()), min(3, len(listing))):
        path = directory + b"/" + name
        status = os.lstat(top + path)
        check("mode", path, is_right=status.st_mode == mode)
        check("size", path, is_right=stat.S_ISDIR(mode) or status.st_size == size)
        if path in tree.links:
            check("link", path, is_right=os.readlink(top + path) == tree.links[path])
        elif path in tree.files:
            value = os.getxattr(top + path, b"user.name")
            check("xattr", path, is_right=value == name)
    check("absence", directory, is_right=not os.path.lexists(top + directory + b"/none"))


def anything(tree: Tree, top: bytes, rng: random.Random) -> None:
    rng.choice((read_buffered, read_mapped, read_direct, look, look, look))(tree, top, rng)


WAYS: dict[str, Callable[[Tree, bytes, random.Random], None]] = {
    "buffered": read_buffered,
    "mapped": read_mapped,
    "direct": read_direct,
    "walk": walk,
    "copy": copy,
    "anything": anything,
    "interrupted": anything,
}


def main() -> int:
    way, top, copy, seed = sys.argv[1:]
    rng = random.Random(seed)
    tree = Tree(os.fsencode(copy))
    poll = select.poll()
    poll.register(0, select.POLLIN)
    print("ready", flush=True)  # noqa: T201 - to who started us
    if way == "interrupted":
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0013)
    count = 0
    try:
        while not poll.poll(0):
            WAYS[way](tree, os.fsencode(top), rng)
            count += 1
    except (OSError, ValueError) as error:
        print(f"{way}: {error!r} after {count}", flush=True)  # noqa: T201
        return 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # Python forgets its handlers before it ends
    print(count, flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
