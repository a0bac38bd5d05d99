"""Damaged images: a vector that can be walked in full, or a FormatError, nothing else.

``CFS_FUZZ_IMAGES`` sets the number of images (default 1500), ``CFS_FUZZ_SEED`` the seed.
Every image that once went wrong is kept in tests/data/corpus and replayed.
"""

import os
import struct
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

from cfs.dumpfile import parse_dumpfile
from cfs.erofs import mount_view, read_image, tree_view
from cfs.erofs.writer import write_image
from cfs.errors import CfsError
from cfs.inodes import NO_OBJECT, Ino, InodeVector
from tests.paths import DATA
from tests.unit.erofs.images import load_zst
from tests.unit.reference.slow_reader import SlowInode, SlowReader

NR_IMAGES = int(os.environ.get("CFS_FUZZ_IMAGES", "1500"))
SEED = int(os.environ.get("CFS_FUZZ_SEED", "1"))
NR_PARTS = 8
CORPUS = sorted((DATA / "corpus").glob("*.cfs.zst"))
DIGEST = "35d02f81325122d77ec1d11baba655bc9bf8a891ab26119a41c50fa03ddfb408"
DUMP = f"""/ 0 40755 2 0 0 0 0.0 - - - security.selinux=label
/big 4500 100644 1 0 0 0 7.5 - {"x" * 4500} - user.a=1
/dir 0 40755 2 70000 1 0 1.0 - - - trusted.overlay.opaque=y user.overlay.whiteouts=
/dir/deep 0 40755 2 0 0 0 1.0 - - - security.selinux=label
/dir/deep/er 0 40755 2 0 0 0 1.0 - - - security.selinux=label
/dir/deep/er/file 5 100644 1 0 0 0 1.0 - hello - user.name=value user.other=value
/dir/link 5 120777 1 0 0 0 1.0 ../up - - system.posix_acl_access=
/dir/long {4090} 120777 1 0 0 0 1.0 {"t" * 4090} - -
/external 100000 100644 2 0 0 0 7.0 {DIGEST[:2]}/{DIGEST[2:]} - {DIGEST} security.selinux=label
/fifo 0 10644 1 0 0 0 7.0 - - - trusted.a=b lustre.b=c
/same 0 @100644 1 0 0 0 0.0 /external - -
/sparse 70000 100644 1 0 0 0 7.0 - - -
/zero 0 20644 1 0 0 259 7.0 - - - security.selinux=label
"""
MANY = "".join(f"/many/{n:03}-name 0 100644 1 0 0 0 0.0 - - -\n" for n in range(400))
WHITEOUT = "/wh 0 40755 2 0 0 0 0.0 - - -\n/wh/gone 0 20644 1 0 0 0 0.0 - - -\n"


@cache
def seeds() -> list[bytes]:
    """Valid images to start from, small ones of all formats first."""
    directory = "/many 0 40755 2 0 0 0 0.0 - - -\n" + MANY
    in_v2 = "\n".join(
        line for line in DUMP.splitlines() if not line.startswith(("/big ", "/dir/long "))
    )
    images = []
    for version in range(3):
        text = DUMP if version < 2 else in_v2 + "\n"
        for dump in (text + WHITEOUT, text + directory):
            tree = parse_dumpfile(dump.encode())
            images.append(bytes(write_image(tree, min_version=version, max_version=version)))
    return [*images, load_zst("kinds.cfs.zst")]


@cache
def targets(number: int) -> tuple[list[tuple[int, int]], list[SlowInode]]:
    """(offset, size) of everything that the reader looks at in a seed, and its inodes."""
    image = seeds()[number]
    reader = SlowReader(image)
    found = [(12, 4)] + [(1024 + off, size) for off, size in SUPERBLOCK_FIELDS]
    inodes = reader.breadth_first()
    for inode in inodes:
        off = 32 * inode.nid
        is_extended = image[off] & 1
        fields = EXTENDED_FIELDS if is_extended else COMPACT_FIELDS
        found += [(off + field, size) for field, size in fields]
        off += 64 if is_extended else 32
        icount = struct.unpack_from("<H", image, 32 * inode.nid + 2)[0]
        if icount:
            found += [(off + 4, 1), (off + 12, 4 * (icount - 1))]
            found += [(off + word, 4) for word in range(12, 12 + 4 * min(icount - 1, 20), 4)]
            off += 8 + 4 * icount
        i_u = struct.unpack_from("<I", image, 32 * inode.nid + 16)[0]
        if inode.entries:
            size = inode.size
            starts = [4096 * (i_u + k) for k in range(size // 4096)]
            starts += [off] if size % 4096 else []
            for start in starts:
                count = min(struct.unpack_from("<H", image, start + 8)[0] // 12, 300)
                for entry in range(count):
                    base = start + 12 * entry
                    found += [(base, 2), (base, 8), (base + 8, 2), (base + 10, 1)]
                found.append((start + 12 * count, 200))
        elif inode.content:
            found.append((off, 8))
    shared = reader.xattr_off
    found += [(off, 4) for off in range(shared, min(shared + 4096, len(image) - 4), 4)]
    return [(off, size) for off, size in found if off + size <= len(image) and size], inodes


SUPERBLOCK_FIELDS = [(0, 4), (8, 4), (12, 1), (14, 2), (24, 8), (36, 4), (40, 4), (44, 4), (80, 4)]
COMPACT_FIELDS = [(0, 2), (2, 2), (4, 2), (6, 2), (8, 4), (16, 4), (24, 2)]
EXTENDED_FIELDS = [(0, 2), (2, 2), (4, 2), (8, 8), (16, 4), (24, 4), (32, 8), (40, 4), (44, 4)]
EDGES = [0, 1, 2, 3, 4, 5, 11, 12, 13, 24, 31, 32, 46, 47, 255, 256, 4095, 4096, 4097, 0x7F, 0x80]


def mutate(rng: np.random.Generator, number: int) -> bytes:
    """A seed with one to four fields changed, now and then cut."""
    image = bytearray(seeds()[number])
    places, inodes = targets(number)
    for _ in range(rng.integers(1, 5)):
        off, size = places[rng.integers(len(places))]
        kind = rng.integers(6)
        field = min(size, 8)
        old = int.from_bytes(image[off : off + field], "little")
        if kind == 0:
            off += int(rng.integers(size))
            image[off] ^= 1 << int(rng.integers(8))
            continue
        if kind == 1:
            value = old + int(rng.integers(-3, 4)) * int(rng.choice([1, 2, 4, 12, 32]))
        elif kind == 2:
            value = int(rng.choice(EDGES))
        elif kind == 3:
            value = -1 - int(rng.integers(3))
        elif kind == 4:
            value = inodes[rng.integers(len(inodes))].nid
        else:
            other, _ = places[rng.integers(len(places))]
            value = int.from_bytes(image[other : other + field], "little")
        image[off : off + field] = (value % 256**field).to_bytes(field, "little")
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
    except CfsError as error:
        assert str(error)
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
