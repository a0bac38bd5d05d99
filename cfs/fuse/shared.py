"""Hand an ``InodeVector`` to another process in one sealed memfd.

Layout, little endian: header (magic, image version, has_acl, nr_blocks, number of columns), a
table with byte offset and byte size of each column, then the columns in the order of
``COLUMNS``, each at a multiple of 64; pool and extra come last.  The memfd is sealed against
every change before anyone else sees it, so what was checked is what is served: whatever
happens to the image file later changes nothing.  No shared state.

Publishing uses numpy, attaching does not: sessions must start fast.
"""

import fcntl
import math
import mmap
import os
import struct
from typing import Any, Literal

from cfs.errors import FormatError
from cfs.inodes import InodeVector

__all__ = ["attach", "publish"]

# name and dtype; the second dimension of object_digest is implied
COLUMNS = (
    ("mode", "<u4"), ("nlink", "<u4"), ("uid", "<u4"), ("gid", "<u4"), ("rdev", "<u4"),
    ("size", "<u8"), ("mtime_sec", "<i8"), ("mtime_nsec", "<u4"), ("nid", "<u8"),
    ("parent", "<u4"),
    ("dirent_start", "<u8"), ("dirent_name_off", "<u8"), ("dirent_name_size", "<u4"),
    ("dirent_ino", "<u4"),
    ("xattr_start", "<u8"), ("xattr_name_off", "<u8"), ("xattr_name_size", "<u4"),
    ("xattr_value_off", "<u8"), ("xattr_value_size", "<u4"),
    ("inline_off", "<u8"), ("inline_size", "<u4"),
    ("object", "<u4"), ("object_path_off", "<u8"), ("object_path_size", "<u4"),
    ("object_digest", "u1"), ("object_digest_size", "u1"),
    ("pool", "u1"), ("extra", "u1"),
)  # fmt: skip
_MAGIC = b"cfsinode"
_HEADER = struct.Struct("<8sIIQQ")
_RANGE = struct.Struct("<QQ")
_ALIGNMENT = 64
_FORMATS: dict[str, Literal["I", "Q", "q", "B"]] = {"<u4": "I", "<u8": "Q", "<i8": "q", "u1": "B"}
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def publish(vector: InodeVector) -> int:
    """Copy a vector into a new sealed memfd and return its descriptor, owned by the caller.

    Raises:
        OSError: there is not enough memory.
    """
    import numpy as np  # noqa: PLC0415 - not in sessions

    arrays = [np.ascontiguousarray(getattr(vector, name), dtype) for name, dtype in COLUMNS]
    off = _aligned(_HEADER.size + len(COLUMNS) * _RANGE.size)
    head = bytearray(
        _HEADER.pack(_MAGIC, vector.version, vector.has_acl, vector.nr_blocks, len(COLUMNS))
    )
    starts = []
    for array in arrays:
        starts.append(off)
        head += _RANGE.pack(off, array.nbytes)
        off = _aligned(off + array.nbytes)
    fd = os.memfd_create("cfs-inodes", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, off)
        _write_at(fd, memoryview(head), 0)
        for start, array in zip(starts, arrays, strict=True):
            if array.nbytes:
                _write_at(fd, array.data.cast("B"), start)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write_at(fd: int, data: memoryview, off: int) -> None:
    while data:
        size = os.pwrite(fd, data, off)
        data, off = data[size:], off + size


def attach(fd: int) -> InodeVector:
    """Map a published vector; ``fd`` stays the caller's.

    The columns are memoryviews of the mapping, ``object_digest`` with one dimension.

    Raises:
        FormatError: ``fd`` is not a sealed memfd made by :func:`publish`.
    """
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        msg = "inode vector: memfd is not sealed"
        raise FormatError(msg)
    # private: before Linux 6.7 a write-sealed file cannot be mapped shared, not even to read
    image = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    magic, version, has_acl, nr_blocks, nr_columns = _HEADER.unpack_from(image)
    if magic != _MAGIC or nr_columns != len(COLUMNS):
        msg = f"inode vector: magic {magic!r} with {nr_columns} columns: expected {_MAGIC!r}"
        raise FormatError(msg)
    columns: dict[str, Any] = {}
    whole = memoryview(image)
    for index, (name, dtype) in enumerate(COLUMNS):
        start, size = _RANGE.unpack_from(image, _HEADER.size + index * _RANGE.size)
        columns[name] = whole[start : start + size].cast(_FORMATS[dtype])
    return InodeVector(**columns, version=version, has_acl=bool(has_acl), nr_blocks=nr_blocks)
