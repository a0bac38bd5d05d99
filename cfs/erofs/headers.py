"""Composefs header, superblock and inode headers as checked columns.

Specification: erofs-image 1.2, 1.3, section 2; checks of 9.1 and 9.2.  What comes out of
here may be used to index the image without further checks.
"""

import stat
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfs.erofs import dtypes
from cfs.erofs.arrays import Bytes, Ints, check
from cfs.erofs.format import (
    BLOCK_SIZE,
    CFS_HEADER_VERSION,
    CFS_MAGIC,
    CONTENT_SIZE_MAX,
    EROFS_MAGIC,
    FEATURE_COMPAT,
    FIRST_INODE_OFF,
    SLOT_SIZE,
    SUPERBLOCK_OFF,
    SYMLINK_SIZE_MAX,
    DataLayout,
    FileType,
    ImageVersion,
)
from cfs.errors import FormatError

__all__ = ["FIRST_NID", "MAX_IMAGE_SIZE", "Image", "Inodes", "load_image", "load_inodes"]

MAX_IMAGE_SIZE = 1 << 30
CHUNKED_FILE = 4  # of feature_incompat
FILE_SIZE_MAX = (1 << 63) - 1  # loff_t
MIN_DIRECTORY_SIZE = 27  # "." and "..": two entries of 12 bytes, three of names
FIRST_NID = FIRST_INODE_OFF // SLOT_SIZE
_IS_TYPE = np.array([FileType.of_mode(nibble << 12) is not None for nibble in range(16)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Image:
    """An image with a checked superblock.

    Attributes:
        data: ``uint8[blocks * 4096]``.
        words: the same as ``uint32``.
        slots: the same as slots of 32 bytes, ``dtypes.COMPACT``.
        version: format version: 0, 1 or 2.
        root_nid: address of the root, unchecked.
        build_time, build_time_nsec: mtime of compact inodes.
        xattr_off: where references to shared xattrs count from.
    """

    data: Bytes
    words: NDArray[np.uint32]
    slots: NDArray[Any]
    version: int
    root_nid: int
    build_time: int
    build_time_nsec: int
    xattr_off: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inodes:
    """Checked inode headers, one row per inode; all ranges lie inside the image.

    Attributes:
        nid: address of the inode in slots.
        layout: a ``DataLayout``.
        mode, nlink, uid, gid, i_u: as stored.
        size: ``uint64``; for flat layouts at most the size of the image.
        mtime_sec, mtime_nsec: of compact inodes the build time.
        xattr_off, xattr_size: the xattr area, header included; size 0: none.
        body_off: right behind the xattr area.
    """

    nid: Ints
    layout: NDArray[np.uint16]
    mode: NDArray[np.uint32]
    nlink: NDArray[np.uint32]
    uid: NDArray[np.uint32]
    gid: NDArray[np.uint32]
    size: NDArray[np.uint64]
    i_u: NDArray[np.uint32]
    mtime_sec: Ints
    mtime_nsec: NDArray[np.uint32]
    xattr_off: Ints
    xattr_size: Ints
    body_off: Ints

    @property
    def type(self) -> NDArray[np.uint32]:
        """Type bits of the mode."""
        return self.mode & np.uint32(stat.S_IFMT(0xFFFF))

    @property
    def flat_size(self) -> Ints:
        """Bytes of data in the image: the size, or 0 for chunk based inodes."""
        return np.where(self.layout == DataLayout.CHUNK_BASED, 0, self.size).astype(np.int64)

    @property
    def tail_size(self) -> Ints:
        """Bytes of data right behind the xattrs."""
        return np.where(self.layout == DataLayout.FLAT_INLINE, self.flat_size % BLOCK_SIZE, 0)

    @property
    def nr_blocks(self) -> Ints:
        """Number of data blocks at block ``i_u``, the last one filled or not."""
        return (self.flat_size - self.tail_size + BLOCK_SIZE - 1) // BLOCK_SIZE


def _expect(record: Any, where: str, **expected: int) -> None:
    for field, value in expected.items():
        found = record[field].item()
        if found != value:
            msg = f"{where}: {field} is {found:#x}: expected {value:#x}"
            raise FormatError(msg)


def load_image(data: Bytes) -> Image:
    """Check composefs header and superblock (spec 9.1).

    Bytes behind the blocks that the superblock counts are ignored.

    Raises:
        FormatError: a check failed.
    """
    if not BLOCK_SIZE <= len(data) <= MAX_IMAGE_SIZE:
        msg = f"image: size is {len(data)}: expected {BLOCK_SIZE} to {MAX_IMAGE_SIZE}"
        raise FormatError(msg)
    data = np.ascontiguousarray(data, np.uint8)
    header = data[:32].view(dtypes.CFS_HEADER)[0]
    _expect(header, "composefs header", magic=CFS_MAGIC, version=CFS_HEADER_VERSION)
    version = header["composefs_version"].item()
    if version > max(ImageVersion):
        msg = f"composefs header: composefs_version is {version}: expected 0, 1 or 2"
        raise FormatError(msg)
    sb = data[SUPERBLOCK_OFF:FIRST_INODE_OFF].view(dtypes.SUPERBLOCK)[0]
    _expect(sb, "superblock", magic=EROFS_MAGIC, blkszbits=12, sb_extslots=0, dirblkbits=0)
    _expect(sb, "superblock", extra_devices=0, available_compr_algs=0, packed_nid=0)
    _expect(sb, "superblock", xattr_prefix_count=0, meta_blkaddr=0)
    # mtime and xattr filter; a checksum is set by nobody.  Chunked files
    for field, allowed in (("feature_compat", FEATURE_COMPAT), ("feature_incompat", CHUNKED_FILE)):
        if sb[field].item() & ~allowed:
            msg = f"superblock: {field} is {sb[field].item():#x}: expected no bits but {allowed:#x}"
            raise FormatError(msg)
    for field, limit in (
        ("blocks", len(data) // BLOCK_SIZE),
        ("xattr_blkaddr", (len(data) - 1) // BLOCK_SIZE),
    ):
        if sb[field].item() > limit:
            msg = f"superblock: {field} is {sb[field].item()}: expected at most {limit}"
            raise FormatError(msg)
    if not sb["blocks"]:
        msg = "superblock: blocks is 0: expected at least 1"
        raise FormatError(msg)
    data = data[: sb["blocks"].item() * BLOCK_SIZE]
    return Image(
        data=data,
        words=data.view("<u4"),
        slots=data.view(dtypes.COMPACT),
        version=version,
        root_nid=sb["root_nid"].item(),
        build_time=sb["build_time"].item(),
        build_time_nsec=sb["build_time_nsec"].item(),
        xattr_off=sb["xattr_blkaddr"].item() * BLOCK_SIZE,
    )


def load_inodes(image: Image, nid: Ints) -> Inodes:
    """Gather the headers of inodes and check them (spec 9.2).

    Args:
        image: the image.
        nid: ``int64[k]``, each from 36 to the last slot of the image.

    Raises:
        FormatError: a check failed; the message names nid and field.
    """
    compact = image.slots[nid]
    i_format = compact["i_format"]
    layout = i_format >> np.uint16(1)
    check(
        np.isin(i_format, (0, 1, 4, 5, 8, 9)),
        nid,
        "i_format",
        "layout 0, 2 or 4 and no bits above 3",
        i_format,
    )
    is_extended = (i_format & 1).astype(np.bool_)
    check(~is_extended | (nid + 2 <= len(image.slots)), nid, "nid", "header inside the image", nid)
    extended = compact.view(dtypes.EXTENDED)
    rest = image.slots[np.minimum(nid + 1, len(image.slots) - 1)].view(dtypes.EXTENDED_REST)

    def pick(wide: NDArray[Any], narrow: NDArray[Any] | int) -> NDArray[Any]:
        return np.where(is_extended, wide, narrow).astype(wide.dtype)

    icount = compact["i_xattr_icount"].astype(np.int64)
    xattr_off = SLOT_SIZE * nid + np.where(is_extended, 2 * SLOT_SIZE, SLOT_SIZE)
    xattr_size = np.where(icount == 0, 0, 4 * icount + 8)
    inodes = Inodes(
        nid=nid,
        layout=layout,
        mode=compact["i_mode"].astype(np.uint32),
        nlink=pick(rest["i_nlink"], compact["i_nlink"]),
        uid=pick(extended["i_uid"], compact["i_uid"]),
        gid=pick(extended["i_gid"], compact["i_gid"]),
        size=pick(extended["i_size"], compact["i_size"]),
        i_u=compact["i_u"],
        mtime_sec=pick(rest["i_mtime"], image.build_time),
        mtime_nsec=pick(rest["i_mtime_nsec"], image.build_time_nsec),
        xattr_off=xattr_off,
        xattr_size=xattr_size,
        body_off=xattr_off + xattr_size,
    )
    _check_types(inodes)
    _check_ranges(image, inodes)
    return inodes


def _check_types(inodes: Inodes) -> None:
    nid, kind, size = inodes.nid, inodes.type, inodes.size
    check(_IS_TYPE[kind >> 12], nid, "i_mode", "a valid file type", inodes.mode)
    is_regular = kind == stat.S_IFREG
    is_chunked = inodes.layout == DataLayout.CHUNK_BASED
    check(
        ~is_chunked | is_regular, nid, "layout", "0 or 2 for all but regular files", inodes.layout
    )
    is_directory = kind == stat.S_IFDIR
    is_link = kind == stat.S_IFLNK
    check(
        ~is_directory | (size >= MIN_DIRECTORY_SIZE),
        nid,
        "i_size",
        f"at least {MIN_DIRECTORY_SIZE} for a directory",
        size,
    )
    check(
        ~is_link | ((size >= 1) & (size <= SYMLINK_SIZE_MAX)),
        nid,
        "i_size",
        f"1 to {SYMLINK_SIZE_MAX} for a link",
        size,
    )
    check(
        ~is_regular | is_chunked | (size <= CONTENT_SIZE_MAX),
        nid,
        "i_size",
        f"at most {CONTENT_SIZE_MAX} for content in the image",
        size,
    )
    check(
        is_regular | is_directory | is_link | (size == 0),
        nid,
        "i_size",
        "0 for a special file",
        size,
    )
    check(
        ~is_chunked | (size <= FILE_SIZE_MAX),
        nid,
        "i_size",
        f"at most {FILE_SIZE_MAX} for a file",
        size,
    )
    is_whiteout = (kind == stat.S_IFCHR) & (inodes.i_u == 0)
    check(~is_whiteout | (inodes.nlink <= 1), nid, "i_nlink", "1 for a whiteout", inodes.nlink)


def _check_ranges(image: Image, inodes: Inodes) -> None:
    nid, limit = inodes.nid, len(image.data)
    check(
        inodes.body_off <= limit,
        nid,
        "i_xattr_icount",
        "xattrs inside the image",
        inodes.xattr_size,
    )
    is_flat = inodes.layout != DataLayout.CHUNK_BASED
    check(~is_flat | (inodes.size <= limit), nid, "i_size", f"at most {limit}", inodes.size)
    tail_end = inodes.body_off + inodes.tail_size
    check(tail_end <= limit, nid, "end of the inline tail", f"at most {limit}", tail_end)
    # the last block of a flat plain inode may be filled in part
    size = inodes.flat_size - inodes.tail_size
    end = inodes.i_u.astype(np.int64) * BLOCK_SIZE + size
    check((size == 0) | (end <= limit), nid, "end of the data blocks", f"at most {limit}", end)
