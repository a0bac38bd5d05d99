"""The Python plane and the workers get the same raw requests; their replies are compared.

The Python operations define the right answer.  ``Intended`` lists all differences that are meant,
each with its reason; everything else is a bug.  ``CFS_PLANE_TREES`` is the number of random trees
for each version of the format (default 1).
"""

import errno
import os
import random
import socket
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from enum import Enum
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.erofs import open_image
from cfs.erofs.writer import write_image
from cfs.fuse.shared import publish
from cfs.inodes import Ino, InodeVector
from cfs.tree import Directory, Inode, Link, Regular
from tests.integration.fuse_messages import (
    ATTR,
    ATTR_OUT,
    ENTRY,
    Dirent,
    Kernel,
    Opcode,
    Reply,
    getxattr_in,
    parse_listing,
    read_in,
)
from tests.integration.trees import RandomTree
from tests.integration.vectors import make_vector
from tests.paths import CHECKOUT

pytestmark = pytest.mark.usefixtures("fuse")
PLANE = Path(__file__).with_name("plane.py")
FOREVER = 1 << 32  # seconds, or more
BUFFER_SIZE = 4 << 20
NR_SEEDS = int(os.environ.get("CFS_PLANE_TREES", "1"))
SMALLEST = 152 + 256 + 8  # room for any one entry


class Intended(Enum):
    """What differs on purpose."""

    NO_OPEN = (
        "workers answer OPEN and OPENDIR with ENOSYS, so that the kernel never asks again; handles"
        " are 0 then, and errors of an object come with READ instead of OPEN"
    )
    DOTS = "pyfuse3 fills the entries of . and .. in READDIRPLUS; the kernel ignores them"
    NAMES_ONLY = "workers list files without their attributes until somebody looks at files"
    FOREVER = "libfuse's infinity has all nanoseconds, ours has not: as long for the kernel"
    NEGATIVE = "of an entry that is not there the kernel reads node id and timeout only"
    READDIR = "pyfuse3 knows READDIRPLUS only; with it the kernel never sends READDIR"
    FLUSH = "workers answer FLUSH with ENOSYS, which the kernel takes for success, once for all"


class Planes:
    """Both planes on one vector; every call goes to both."""

    def __init__(self, vector: InodeVector, python: Kernel, workers: Kernel) -> None:
        self.vector = vector
        self.python = python
        self.workers = workers
        self.nr_calls = 0
        self.seen: Counter[Intended] = Counter()
        self.differences: list[str] = []

    def note(self, what: str, expected: object, found: object) -> None:
        if expected != found:
            self.differences.append(f"{what}: python {expected!r}, workers {found!r}")

    def both(self, opcode: Opcode, ino: int, argument: bytes = b"", uid: int = 0) -> list[Reply]:
        self.nr_calls += 1
        return [plane.call(opcode, ino, argument, uid=uid) for plane in (self.python, self.workers)]

    def same(self, opcode: Opcode, ino: int, argument: bytes = b"", uid: int = 0) -> None:
        """Nothing may differ."""
        expected, found = self.both(opcode, ino, argument, uid)
        self.note(f"{opcode.name} {ino} {argument[:64]!r} uid {uid}", expected, found)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start_plane(
    stack: ExitStack, name: str, vector: int, objects: int, *more: int
) -> socket.socket:
    """Start a plane; return the kernel's end of its device."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.callback(ours.close)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_SIZE)
    fds = [vector, theirs.fileno(), objects, *more]
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", str(PLANE), name, *map(str, fds)],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            pass_fds=fds,
            stdin=subprocess.PIPE,
        )
    stack.callback(end_plane, process)
    return ours


def end_plane(process: "subprocess.Popen[bytes]") -> None:
    """The workers end by themselves; pyfuse3 on a socket knows no end."""
    assert process.poll() is None
    assert process.stdin
    process.stdin.close()
    if "workers" not in process.args:  # type: ignore[operator] # a list
        process.kill()
        process.wait(60)
    else:
        assert process.wait(60) == 0


def start_planes(stack: ExitStack, vector: InodeVector, objects: Path) -> Planes:
    table = publish(vector)
    stack.callback(os.close, table)
    objects_fd = os.open(objects, os.O_PATH)
    stack.callback(os.close, objects_fd)
    python = Kernel(start_plane(stack, "python", table, objects_fd))
    relay = start_plane(stack, "python", table, objects_fd)
    workers = Kernel(start_plane(stack, "workers", table, objects_fd, relay.fileno()))
    for plane in (python, workers):
        assert plane.start().error == 0
    return Planes(vector, python, workers)


def valid(planes: Planes, seconds: int, nanoseconds: int) -> int | str:
    """A timeout."""
    if seconds < FOREVER:
        return seconds * 1_000_000_000 + nanoseconds
    planes.seen[Intended.FOREVER] += 1
    return "for ever"


def facts_of_entry(planes: Planes, data: bytes) -> dict[str, object]:
    node, generation, entry_s, attr_s, entry_ns, attr_ns = ENTRY.unpack_from(data)
    facts: dict[str, object] = {"node": node, "entry": valid(planes, entry_s, entry_ns)}
    if not node:
        planes.seen[Intended.NEGATIVE] += 1
        return facts
    facts["generation"] = generation
    facts["attr"] = valid(planes, attr_s, attr_ns)
    facts["fields"] = ATTR.unpack(data[ENTRY.size :])
    return facts


def compare_lookup(planes: Planes, directory: int, name: bytes) -> None:
    expected, found = planes.both(Opcode.LOOKUP, directory, name + b"\0")
    what = f"LOOKUP {directory} {name!r}"
    planes.note(what, expected.error, found.error)
    if not expected.error and not found.error:
        facts = [facts_of_entry(planes, reply.data) for reply in (expected, found)]
        planes.note(what, *facts)


def compare_getattr(planes: Planes, ino: int) -> None:
    expected, found = planes.both(Opcode.GETATTR, ino, bytes(16))
    planes.note(f"GETATTR {ino}", expected.error, found.error)
    facts = []
    for _, data in (expected, found):
        seconds, nanoseconds, _ = ATTR_OUT.unpack_from(data)
        fields = ATTR.unpack(data[ATTR_OUT.size :])
        facts.append((valid(planes, seconds, nanoseconds), fields))
    planes.note(f"GETATTR {ino}", *facts)


def compare_listing(planes: Planes, ino: int, fh: int, off: int, size: int) -> list[Dirent]:
    """Compare one reply to READDIRPLUS; return the entries."""
    planes.nr_calls += 1
    expected = planes.python.call(Opcode.READDIRPLUS, ino, read_in(off, size, fh))
    found = planes.workers.call(Opcode.READDIRPLUS, ino, read_in(off, size))
    what = f"READDIRPLUS {ino} from {off}, {size} bytes"
    planes.note(what, (expected.error, len(expected.data)), (found.error, len(found.data)))
    theirs = list(parse_listing(expected.data, is_plus=True))
    ours = list(parse_listing(found.data, is_plus=True))
    planes.note(what, [dirent[:4] for dirent in theirs], [dirent[:4] for dirent in ours])
    for dirent, other in zip(theirs, ours, strict=False):
        compare_entry(planes, f"{what}, {dirent.name!r}", dirent, other)
    return theirs


def compare_names(planes: Planes, ino: int, size: int, expected: list[Dirent]) -> None:
    """Compare READDIR with the entries of READDIRPLUS."""
    planes.seen[Intended.READDIR] += 1
    found: list[Dirent] = []
    off = 0
    while True:
        data = planes.workers.call(Opcode.READDIR, ino, read_in(off, size)).data
        assert len(data) <= size
        dirents = list(parse_listing(data, is_plus=False))
        if not dirents:
            break
        rest = expected[dirents[-1].off :]
        room = size - len(data)
        planes.note("room left", True, not rest or 24 + len(rest[0].name) > room - 7)  # noqa: FBT003 - a value
        found += dirents
        off = dirents[-1].off
    what = f"READDIR {ino}, {size} bytes"
    planes.note(what, [dirent[:4] for dirent in expected], [dirent[:4] for dirent in found])


def compare_entry(planes: Planes, what: str, expected: Dirent, found: Dirent) -> None:
    is_empty = not any(found.entry)
    if expected.name in (b".", b".."):
        planes.seen[Intended.DOTS] += 1
        planes.note(what, True, is_empty)  # noqa: FBT003 - a value
    elif is_empty and found.kind != stat.S_IFDIR >> 12:
        planes.seen[Intended.NAMES_ONLY] += 1
    else:
        facts = [facts_of_entry(planes, entry) for entry in (expected.entry, found.entry)]
        planes.note(what, *facts)


def open_both(planes: Planes, opcode: Opcode, ino: int) -> Reply:
    """Open; return the reply of the Python plane."""
    expected, found = planes.both(opcode, ino, bytes(8))
    planes.note(f"{opcode.name} {ino}", errno.ENOSYS, found.error)
    planes.seen[Intended.NO_OPEN] += 1
    return expected


def compare_directory(planes: Planes, ino: int, rng: random.Random) -> None:
    fh = int.from_bytes(open_both(planes, Opcode.OPENDIR, ino).data[:8], "little")
    nr_entries = 2 + sum(1 for _ in planes.vector.entries(Ino(ino)))
    for size in (SMALLEST, rng.randrange(SMALLEST, 5000), 32768, 1 << 20):
        entries = compare_listing(planes, ino, fh, 0, size)
        while more := compare_listing(planes, ino, fh, entries[-1].off, size):
            entries += more
        planes.note(f"entries of {ino}", nr_entries, len(entries))
        compare_names(planes, ino, size, entries)
    for size in (0, 1, 24, 31, 32, 151, 152, 183, 184):
        compare_listing(planes, ino, fh, 0, size)
    for _ in range(5):
        off = rng.randrange(nr_entries + 2)
        compare_listing(planes, ino, fh, off, rng.randrange(SMALLEST, 10000))
    compare_listing(planes, ino, fh, (1 << 62) - 1, 4096)
    planes.same(Opcode.RELEASEDIR, ino, bytes(24))


def compare_file(planes: Planes, ino: int, rng: random.Random) -> None:
    size = int(planes.vector.size[ino])
    opened = open_both(planes, Opcode.OPEN, ino)
    places = [(0, 4096), (0, size), (0, 1 << 20), (size, 10), (max(0, size - 3), 4096), (0, 0)]
    places += [(size + 1, 1), ((1 << 63) - 1, 4096), (1 << 40, 1)]
    places += [(rng.randrange(size + 10), rng.randrange(1, 150_000)) for _ in range(4)]
    for off, wanted in places:
        what = f"READ {ino} ({size} bytes) from {off}, {wanted} bytes"
        found = planes.workers.call(Opcode.READ, ino, read_in(off, wanted))
        if opened.error:
            is_asked = wanted and off < size
            planes.note(what, opened.error if is_asked else 0, found.error)
            continue
        fh = int.from_bytes(opened.data[:8], "little")
        expected = planes.python.call(Opcode.READ, ino, read_in(off, wanted, fh))
        planes.note(f"{what}: error", expected.error, found.error)
        planes.note(f"{what}: size", len(expected.data), len(found.data))
        planes.note(f"{what}: bytes", True, expected.data == found.data)  # noqa: FBT003
    if not opened.error:
        flushed = planes.both(Opcode.FLUSH, ino, opened.data[:8] + bytes(16))
        planes.note(f"FLUSH {ino}", [0, errno.ENOSYS], [reply.error for reply in flushed])
        planes.seen[Intended.FLUSH] += 1
        planes.same(Opcode.RELEASE, ino, opened.data[:8] + bytes(16))


def compare_xattrs(planes: Planes, ino: int) -> None:
    absent = [b"user.none", b"user.", b"", b"security.selinux", b"security.capability"]
    absent += [b"system.posix_acl_access", b"system.posix_acl_default", b"user." + b"n" * 300]
    xattrs = planes.vector.xattrs(Ino(ino))
    for name in absent:
        planes.same(Opcode.GETXATTR, ino, getxattr_in(100, name))
    for name, value in xattrs.items():
        for size in {0, max(0, len(value) - 1), len(value), 65536}:
            planes.same(Opcode.GETXATTR, ino, getxattr_in(size, name))
    size = sum(len(name) + 1 for name in xattrs)
    for uid in (0, 1000):
        for room in {0, 1, size, max(0, size - 1), 65536}:
            planes.same(Opcode.LISTXATTR, ino, getxattr_in(room), uid)


def compare_everything(planes: Planes, seed: int) -> None:
    rng = random.Random(seed)
    vector = planes.vector
    for ino in range(1, len(vector)):
        compare_getattr(planes, ino)
        compare_xattrs(planes, ino)
        mode = int(vector.mode[ino])
        if stat.S_ISDIR(mode):
            names = [name for name, _ in vector.entries(Ino(ino))]
            cut = [name[:-1] for name in names if len(name) > 1]
            for name in (*names, *cut, b"none", b"n" * 255, b"n" * 256, b"n" * 4000, b"\xff"):
                compare_lookup(planes, ino, name)
            compare_directory(planes, ino, rng)
        elif stat.S_ISREG(mode):
            compare_file(planes, ino, rng)
        elif stat.S_ISLNK(mode):
            planes.same(Opcode.READLINK, ino)
        for mask in (0, 2, 5):
            planes.same(Opcode.ACCESS, ino, mask.to_bytes(4, "little") + bytes(4))
    planes.same(Opcode.STATFS, 1)


RELAYED = {
    Opcode.SETATTR: bytes(88),
    Opcode.SYMLINK: b"new\0target\0",
    Opcode.MKNOD: bytes(16) + b"new\0",
    Opcode.MKDIR: bytes(8) + b"new\0",
    Opcode.UNLINK: b"inline\0",
    Opcode.RMDIR: b"inline\0",
    Opcode.RENAME: bytes(8) + b"inline\0new\0",
    Opcode.RENAME2: bytes(16) + b"inline\0new\0",
    Opcode.LINK: (1).to_bytes(8, "little") + b"new\0",
    Opcode.WRITE: bytes(16) + (4).to_bytes(4, "little") + bytes(20) + b"text",
    Opcode.SETXATTR: (1).to_bytes(4, "little") + bytes(4) + b"user.x\0v",
    Opcode.REMOVEXATTR: b"user.x\0",
    Opcode.CREATE: bytes(16) + b"new\0",
    Opcode.FSYNC: bytes(16),
    Opcode.FSYNCDIR: bytes(16),
    Opcode.BMAP: bytes(16),
    Opcode.IOCTL: bytes(32),
    Opcode.FALLOCATE: bytes(32),
    Opcode.LSEEK: bytes(24),
}


def check(planes: Planes) -> None:
    assert planes.nr_calls > 10
    assert not planes.differences, "\n".join(planes.differences[:20])


@pytest.mark.parametrize("seed", range(NR_SEEDS))
@pytest.mark.parametrize("version", [0, 1, 2])
def test_random_tree(
    version: int, seed: int, tmp_path: Path, objects: Path, stack: ExitStack
) -> None:
    algorithm = list(Algorithm)[seed % len(Algorithm)]
    root = RandomTree(7000 + 10 * version + seed, version, algorithm, objects).make()
    image = tmp_path / "image"
    image.write_bytes(write_image(root, min_version=version, max_version=version))
    planes = start_planes(stack, open_image(image), objects)
    compare_everything(planes, seed)
    check(planes)
    assert set(planes.seen) >= {Intended.NO_OPEN, Intended.DOTS, Intended.FOREVER, Intended.FLUSH}


def test_tree_without_xattrs(objects: Path, stack: ExitStack) -> None:
    file = Regular(mode=0o100644, size=4, content=b"text")
    root = Directory(mode=0o040755, nlink=2, children={b"f": file})
    planes = start_planes(stack, make_vector(root), objects)
    compare_everything(planes, 1)
    check(planes)


def test_limits_of_an_image(objects: Path, stack: ExitStack) -> None:
    """A hostile image may hold any 64-bit seconds and any 32-bit nanoseconds."""
    files: dict[bytes, Inode | Link] = {
        b"%d" % number: Regular(mode=0o100644, mtime_sec=seconds, mtime_nsec=nanoseconds, size=size)
        for number, (seconds, nanoseconds, size) in enumerate(
            [
                (2**63 - 1, 2**32 - 1, 0),
                (2**63 - 1, 0, 0),
                (2**63 - 4, 2**32 - 1, 2**63 - 1),
                (-(2**63), 0, 2**40),
                (-(2**63), 2**32 - 1, 1),
                (-1, 999_999_999, 4095),
                (-1, 1_000_000_000, 4097),
                (0, 2**32 - 1, 1),
            ]
        )
    }
    planes = start_planes(stack, make_vector(Directory(mode=0o040755, children=files)), objects)
    for ino in range(1, len(planes.vector)):
        compare_getattr(planes, ino)
    for name in files:
        compare_lookup(planes, 1, name)
    check(planes)


def test_large_directory(objects: Path, stack: ExitStack) -> None:
    names = [b"%05d" % number + b"x" * (number % 250) for number in range(5000)]
    file = Regular(mode=0o100644, size=1, content=b"x")
    root = Directory(mode=0o040755, children={name: Link(file) for name in names})
    planes = start_planes(stack, make_vector(root), objects)
    compare_directory(planes, 1, random.Random(1))
    check(planes)


def test_what_is_relayed(objects: Path, stack: ExitStack) -> None:
    file = Regular(mode=0o100644, size=4, content=b"text")
    root = Directory(mode=0o040755, nlink=2, children={b"inline": file})
    planes = start_planes(stack, make_vector(root), objects)
    for opcode, argument in RELAYED.items():
        for ino in (1, 2):
            planes.same(opcode, ino, argument)
    check(planes)
