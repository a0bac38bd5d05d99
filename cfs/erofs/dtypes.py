"""On-disk structures of an EROFS image as the reader gathers them.

Specification: erofs-image 1.2, 1.3, 2.2, 2.3, 3.1, 4.1.  An extended inode is read as two
slots of 32 bytes, so that both forms come out of the same array of slots.
"""

import numpy as np

__all__ = ["CFS_HEADER", "COMPACT", "DIRENT", "EXTENDED", "EXTENDED_REST", "SUPERBLOCK"]

CFS_HEADER = np.dtype(
    [
        ("magic", "<u4"),  # 0
        ("version", "<u4"),  # 4
        ("flags", "<u4"),  # 8
        ("composefs_version", "<u4"),  # 12
        ("unused", "V16"),  # 16
    ]
)
assert CFS_HEADER.itemsize == 32

SUPERBLOCK = np.dtype(
    [
        ("magic", "<u4"),  # 0
        ("checksum", "<u4"),  # 4
        ("feature_compat", "<u4"),  # 8
        ("blkszbits", "u1"),  # 12
        ("sb_extslots", "u1"),  # 13
        ("root_nid", "<u2"),  # 14
        ("inos", "<u8"),  # 16
        ("build_time", "<i8"),  # 24
        ("build_time_nsec", "<u4"),  # 32
        ("blocks", "<u4"),  # 36
        ("meta_blkaddr", "<u4"),  # 40
        ("xattr_blkaddr", "<u4"),  # 44
        ("uuid", "V16"),  # 48
        ("volume_name", "V16"),  # 64
        ("feature_incompat", "<u4"),  # 80
        ("available_compr_algs", "<u2"),  # 84
        ("extra_devices", "<u2"),  # 86
        ("devt_slotoff", "<u2"),  # 88
        ("dirblkbits", "u1"),  # 90
        ("xattr_prefix_count", "u1"),  # 91
        ("xattr_prefix_start", "<u4"),  # 92
        ("packed_nid", "<u8"),  # 96
        ("xattr_filter_reserved", "u1"),  # 104
        ("reserved", "V23"),  # 105
    ]
)
assert SUPERBLOCK.itemsize == 128

COMPACT = np.dtype(
    [
        ("i_format", "<u2"),  # 0
        ("i_xattr_icount", "<u2"),  # 2
        ("i_mode", "<u2"),  # 4
        ("i_nlink", "<u2"),  # 6
        ("i_size", "<u4"),  # 8
        ("i_mtime", "<u4"),  # 12
        ("i_u", "<u4"),  # 16
        ("i_ino", "<u4"),  # 20
        ("i_uid", "<u2"),  # 24
        ("i_gid", "<u2"),  # 26
        ("i_reserved", "<u4"),  # 28
    ]
)
assert COMPACT.itemsize == 32

EXTENDED = np.dtype(
    [
        ("i_format", "<u2"),  # 0
        ("i_xattr_icount", "<u2"),  # 2
        ("i_mode", "<u2"),  # 4
        ("i_reserved", "<u2"),  # 6
        ("i_size", "<u8"),  # 8
        ("i_u", "<u4"),  # 16
        ("i_ino", "<u4"),  # 20
        ("i_uid", "<u4"),  # 24
        ("i_gid", "<u4"),  # 28
    ]
)
assert EXTENDED.itemsize == 32

EXTENDED_REST = np.dtype(
    [
        ("i_mtime", "<i8"),  # 32
        ("i_mtime_nsec", "<u4"),  # 40
        ("i_nlink", "<u4"),  # 44
        ("i_reserved2", "V16"),  # 48
    ]
)
assert EXTENDED_REST.itemsize == 32

DIRENT = np.dtype(
    [
        ("nid", "<u8"),  # 0
        ("nameoff", "<u2"),  # 8
        ("file_type", "u1"),  # 10
        ("reserved", "u1"),  # 11
    ]
)
assert DIRENT.itemsize == 12
