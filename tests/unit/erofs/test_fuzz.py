"""Damaged images: a vector that can be walked in full, or a FormatError, nothing else.

``CFS_FUZZ_IMAGES`` sets the number of images (default 1500), ``CFS_FUZZ_SEED`` the seed.
tests/data/corpus keeps images that went wrong once, here or in a peer; they are replayed.
"""

import os
import struct
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

from cfs.erofs import mount_view, read_image, tree_view
from cfs.errors import CfsError
from cfs.inodes import NO_OBJECT, Ino, InodeVector
from tests.paths import DATA
from tests.unit.erofs.images import load_zst, seeds
from tests.unit.reference.slow_reader import SlowInode, SlowReader

NR_IMAGES = int(os.environ.get("CFS_FUZZ_IMAGES", "1500"))
SEED = int(os.environ.get("CFS_FUZZ_SEED", "1"))
NR_PARTS = 8
CORPUS = sorted((DATA / "corpus").glob("*.cfs.zst"))
# (offset, size) of fields
SUPERBLOCK_FIELDS = [(0, 4), (8, 4), (12, 1), (14, 2), (24, 8), (36, 4), (40, 4), (44, 4), (80, 4)]
COMPACT_FIELDS = [(0, 2), (2, 2), (4, 2), (6, 2), (8, 4), (16, 4), (24, 2)]
EXTENDED_FIELDS = [(0, 2), (2, 2), (4, 2), (8, 8), (16, 4), (24, 4), (32, 8), (40, 4), (44, 4)]
EDGES = [0, 1, 2, 3, 4, 5, 11, 12, 13, 24, 31, 32, 46, 47, 255, 256, 4095, 4096, 4097, 0x7F, 0x80]


@cache
def targets(number: int) -> tuple[list[tuple[int, int]], list[SlowInode]]:
    """(offset, size) of everything that the reader looks at in a seed, and its inodes."""
    image = seeds()[number]
    reader = SlowReader(image)
    inodes = reader.breadth_first()
    found = [(12, 4)] + [(1024 + off, size) for off, size in SUPERBLOCK_FIELDS]
    for inode in inodes:
        found += inode_targets(image, inode)
    found += [(off, 4) for off in range(reader.xattr_off, reader.xattr_off + 4096, 4)]
    return [(off, size) for off, size in found if off + size <= len(image)], inodes


def inode_targets(image: bytes, inode: SlowInode) -> Iterator[tuple[int, int]]:
    off = 32 * inode.nid
    i_format, icount = struct.unpack_from("<HH", image, off)
    i_u = struct.unpack_from("<I", image, off + 16)[0]
    for field, size in EXTENDED_FIELDS if i_format & 1 else COMPACT_FIELDS:
        yield off + field, size
    off += 64 if i_format & 1 else 32
    if icount:
        yield off + 4, 1
        for word in range(12, 12 + 4 * min(icount - 1, 20), 4):
            yield off + word, 4
        off += 8 + 4 * icount
    if inode.entries:
        starts = [4096 * (i_u + block) for block in range(inode.size // 4096)]
        for start in [*starts, off] if inode.size % 4096 else starts:
            yield from directory_targets(image, start)
    elif inode.content:
        yield off, 8


def directory_targets(image: bytes, start: int) -> Iterator[tuple[int, int]]:
    nr_entries = struct.unpack_from("<H", image, start + 8)[0] // 12
    for entry in range(start, start + 12 * nr_entries, 12):
        yield from ((entry, 2), (entry, 8), (entry + 8, 2), (entry + 10, 1))
    names = struct.unpack_from("<H", image, start + 8)[0]
    yield start + names, 200


def mutate(rng: np.random.Generator, number: int) -> bytes:
    """A seed with one to four fields changed, now and then cut."""
    image = bytearray(seeds()[number])
    places, inodes = targets(number)
    for _ in range(rng.integers(1, 5)):
        off, size = places[rng.integers(len(places))]
        if rng.random() < 0.2:
            image[off + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
            continue
        size = min(size, 8)
        old = int.from_bytes(image[off : off + size], "little")
        other, _ = places[rng.integers(len(places))]
        values = (
            old + int(rng.integers(-3, 4)) * int(rng.choice([1, 2, 4, 12, 32])),
            int(rng.choice(EDGES)),
            -1 - int(rng.integers(3)),
            inodes[rng.integers(len(inodes))].nid,
            int.from_bytes(image[other : other + size], "little"),
        )
        value = values[rng.integers(len(values))]
        image[off : off + size] = (value % 256**size).to_bytes(size, "little")
    if rng.random() < 0.05:
        del image[int(rng.integers(len(image))) :]
    return bytes(image)


def check_ranges(vector: InodeVector) -> None:
    """Every range lies in the pool or in extra, every row exists."""
    border, end = len(vector.pool), len(vector.pool) + len(vector.extra)
    for off, size in (
        (vector.dirent_name_off, vector.dirent_name_size),
        (vector.xattr_name_off, vector.xattr_name_size),
        (vector.xattr_value_off, vector.xattr_value_size),
        (vector.inline_off, vector.inline_size),
        (vector.object_path_off, vector.object_path_size),
    ):
        wide = off.astype(np.int64)
        ends = wide + size
        assert np.all(ends <= end)
        assert np.all((wide >= border) | (ends <= border))
    assert np.all(vector.dirent_ino < len(vector))
    assert np.all(vector.dirent_ino > 1)
    assert np.all((vector.object == NO_OBJECT) | (vector.object < len(vector.object_path_off)))
    for start, column in (
        (vector.dirent_start, vector.dirent_ino),
        (vector.xattr_start, vector.xattr_name_off),
    ):
        assert len(start) == len(vector) + 1
        assert start[0] == 0
        assert start[-1] == len(column)
        assert np.all(np.diff(start.astype(np.int64)) >= 0)


def walk_in_full(vector: InodeVector) -> None:
    """Look at everything, in time and memory bounded by the size of the vector."""
    check_ranges(vector)
    visited = 0
    stack = [Ino(1)]
    while stack:
        ino = stack.pop()
        vector.content(ino)
        vector.object_path(ino)
        vector.digest(ino)
        names = list(vector.xattrs(ino))
        assert len(names) == int(vector.xattr_start[ino + 1] - vector.xattr_start[ino])
        entries = list(vector.entries(ino))
        visited += len(entries)
        assert [name for name, _ in entries] == sorted({name for name, _ in entries})
        stack += [child for _, child in entries if vector.is_directory(child)]
    assert visited == int(vector.dirent_start[-1])


def survive(image: bytes) -> bool:
    """Whether the image gives a vector; anything but a CfsError fails the test."""
    try:
        vector = read_image(np.frombuffer(image, np.uint8))
    except CfsError:
        return False
    size = sum(column.nbytes for column in vars_of(vector))
    assert size <= 64 * len(image)
    for view in (vector, mount_view(vector), tree_view(vector)):
        walk_in_full(view)
    return True


def vars_of(vector: InodeVector) -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    for name in InodeVector.__dataclass_fields__:
        column = getattr(vector, name)
        if isinstance(column, np.ndarray):
            yield column


def test_seeds_are_valid() -> None:
    for image in seeds():
        assert survive(image)


@pytest.mark.parametrize("part", range(NR_PARTS))
def test_damaged_images(part: int) -> None:
    rng = np.random.default_rng([SEED, part])
    outcomes = set()
    for _ in range(-(-NR_IMAGES // NR_PARTS)):
        # the large seed costs more than the small ones together
        number = int(rng.integers(len(seeds()) - 1)) if rng.random() < 0.98 else -1
        state = rng.bit_generator.state
        image = mutate(rng, number % len(seeds()))
        try:
            outcomes.add(survive(image))
        except Exception as error:
            error.add_note(f"seed image {number}, generator {state}")
            raise
    assert outcomes == {True, False}


@pytest.mark.parametrize("name", [path.name for path in CORPUS])
def test_corpus(name: str) -> None:
    survive(load_zst(f"../corpus/{name}"))
