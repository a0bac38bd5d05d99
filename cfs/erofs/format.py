"""On-disk structures, numbers and limits of a composefs image.

Specification: erofs-image, sections 1 to 4 and 7.5; field names are those of the kernel's
``fs/erofs/erofs_fs.h``.  All integers are little-endian.
"""

import stat
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

__all__ = [
    "BLOCK_BITS",
    "BLOCK_SIZE",
    "CFS_HEADER",
    "CFS_HEADER_VERSION",
    "CFS_MAGIC",
    "CHUNK_BITS_MAX",
    "CHUNK_FORMAT_BITS",
    "CHUNK_FORMAT_V2",
    "CHUNK_HOLE",
    "CHUNK_SIZE",
    "COMPACT_ID_MAX",
    "COMPACT_INODE",
    "COMPACT_SIZE_MAX",
    "CONTENT_SIZE_MAX",
    "DIRENT",
    "EROFS_MAGIC",
    "EXTENDED_INODE",
    "EXTERNAL_SIZE_MAX",
    "FEATURE_COMPAT",
    "FIRST_INODE_OFF",
    "INLINE_TAIL_MAX",
    "NAME_SIZE_MAX",
    "SHARED_XATTRS_MAX",
    "SLOT_SIZE",
    "SUPERBLOCK",
    "SUPERBLOCK_OFF",
    "SYMLINK_SIZE_MAX",
    "V2_CONTENT_SIZE_MAX",
    "V2_SYMLINK_SIZE_MAX",
    "XATTRS_SIZE_MAX",
    "XATTR_ENTRY",
    "XATTR_FILTER_SEED",
    "XATTR_HEADER",
    "XATTR_NAME_SIZE_MAX",
    "XATTR_PREFIXES",
    "XATTR_REFERENCE",
    "CfsFlag",
    "DataLayout",
    "FileType",
    "ImageVersion",
]


class ImageVersion(IntEnum):
    """``composefs_version`` of the composefs header (1.4)."""

    V0 = 0
    V1 = 1
    V2 = 2


class CfsFlag(IntFlag):
    """``flags`` of the composefs header."""

    HAS_ACL = 1


class DataLayout(IntEnum):
    """Bits 1 to 3 of ``i_format``: where the data of an inode is (2.5)."""

    FLAT_PLAIN = 0
    FLAT_INLINE = 2
    CHUNK_BASED = 4


class FileType(IntEnum):
    """``file_type`` of a dirent; EROFS's own codes, not ``DT_*``."""

    REGULAR = 1
    DIRECTORY = 2
    CHARACTER_DEVICE = 3
    BLOCK_DEVICE = 4
    FIFO = 5
    SOCKET = 6
    SYMLINK = 7

    @classmethod
    def of_mode(cls, mode: int) -> "FileType | None":
        """Return the code of an ``st_mode``, None if its type is not valid."""
        return _FILE_TYPES.get(stat.S_IFMT(mode))


_FILE_TYPES: Final = {
    stat.S_IFREG: FileType.REGULAR,
    stat.S_IFDIR: FileType.DIRECTORY,
    stat.S_IFCHR: FileType.CHARACTER_DEVICE,
    stat.S_IFBLK: FileType.BLOCK_DEVICE,
    stat.S_IFIFO: FileType.FIFO,
    stat.S_IFSOCK: FileType.SOCKET,
    stat.S_IFLNK: FileType.SYMLINK,
}


# The regions of an image (1.1)
BLOCK_BITS: Final = 12
BLOCK_SIZE: Final = 1 << BLOCK_BITS
SLOT_SIZE: Final = 32
SUPERBLOCK_OFF: Final = 1024
FIRST_INODE_OFF: Final = 1152

# magic, version, flags, composefs_version, unused
CFS_HEADER: Final = Struct("<IIII16x")
CFS_MAGIC: Final = 0xD078629A
CFS_HEADER_VERSION: Final = 1

# magic, checksum, feature_compat, blkszbits, sb_extslots, root_nid, inos, build_time,
# build_time_nsec, blocks, meta_blkaddr, xattr_blkaddr; everything after that is zero
SUPERBLOCK: Final = Struct("<IIIBBHQqIIII80x")
EROFS_MAGIC: Final = 0xE0F5E1E2
FEATURE_COMPAT: Final = 6  # mtime (2), xattr name filter (4)

# i_format, i_xattr_icount, i_mode, i_nlink, i_size, i_u, i_ino, i_uid, i_gid
COMPACT_INODE: Final = Struct("<HHHHI4xIIHH4x")
# i_format, i_xattr_icount, i_mode, i_size, i_u, i_ino, i_uid, i_gid, i_mtime, i_mtime_nsec, i_nlink
EXTENDED_INODE: Final = Struct("<HHH2xQIIIIqII16x")
COMPACT_ID_MAX: Final = 0xFFFF  # of i_nlink, i_uid, i_gid
COMPACT_SIZE_MAX: Final = 0xFFFFFFFF

# nid, nameoff, file_type
DIRENT: Final = Struct("<QHBx")

# Chunk maps (2.6)
CHUNK_SIZE: Final = 4  # of one entry of the map
CHUNK_HOLE: Final = b"\xff" * CHUNK_SIZE
CHUNK_BITS_MAX: Final = BLOCK_BITS + 31
CHUNK_FORMAT_BITS: Final = 0xFFFF  # of i_u
CHUNK_FORMAT_V2: Final = 31

# Xattrs (section 4); the header is name_filter, shared_count; the entry name_len, name_index,
# value_size
XATTR_HEADER: Final = Struct("<IB7x")
XATTR_ENTRY: Final = Struct("<BBH")
XATTR_REFERENCE: Final = Struct("<I")
XATTR_FILTER_SEED: Final = 0x25BBE08F
XATTR_PREFIXES: Final = (
    b"",
    b"user.",
    b"system.posix_acl_access",
    b"system.posix_acl_default",
    b"trusted.",
    b"lustre.",
    b"security.",
)

# Limits of the writers (5.1, 6, 7.5)
NAME_SIZE_MAX: Final = 255
SYMLINK_SIZE_MAX: Final = 4095  # also of a payload
CONTENT_SIZE_MAX: Final = 5000
EXTERNAL_SIZE_MAX: Final = 1 << 53
INLINE_TAIL_MAX: Final = 2048  # of directories and contents; more goes into a block
SHARED_XATTRS_MAX: Final = 128  # of one inode, as C writes it
XATTR_NAME_SIZE_MAX: Final = 255
XATTRS_SIZE_MAX: Final = 32767  # of one inode: 12 + sum(7 + name + value)
V2_SYMLINK_SIZE_MAX: Final = 1024
V2_CONTENT_SIZE_MAX: Final = 512
