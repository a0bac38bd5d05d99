"""Redirect and metacopy xattrs to the object columns.

Specification: erofs-image 4.5, 9.6.  Only regular files without content in the image have an
object; a malformed record is refused on every regular file.
"""

import stat
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cfs.digest import Algorithm
from cfs.erofs.arrays import Bools, Bytes, Ints, check, contains
from cfs.erofs.format import DataLayout
from cfs.erofs.headers import Image, Inodes
from cfs.erofs.xattrs import Xattrs
from cfs.inodes import NO_OBJECT

__all__ = ["METACOPY", "REDIRECT", "Objects", "load_objects"]

METACOPY = b"trusted.overlay.metacopy"
REDIRECT = b"trusted.overlay.redirect"
RECORD = 4  # header of a digest record
MAX_REDIRECT_SIZE = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Objects:
    """The object columns of ``InodeVector``; ``object`` has one row per inode."""

    object: NDArray[np.uint32]
    path_off: Ints
    path_size: Ints
    digest: Bytes
    digest_size: NDArray[np.uint8]


def load_objects(image: Image, inodes: Inodes, xattrs: Xattrs) -> Objects:
    """Collect paths and digests of the objects of external files.

    Raises:
        FormatError: a digest record is malformed, or a redirect is no path.
    """
    owner = np.repeat(np.arange(len(inodes.nid)), np.diff(xattrs.start))
    is_regular = (inodes.type == stat.S_IFREG)[owner]
    metacopy = _rows_of(xattrs, METACOPY, is_regular)
    redirect = _rows_of(xattrs, REDIRECT, is_regular)
    digest, digest_size = _load_digests(image.data, xattrs, metacopy, inodes.nid[owner[metacopy]])
    path_off, path_size = _load_paths(image.data, xattrs, redirect, inodes.nid[owner[redirect]])

    found = np.zeros(len(inodes.nid), np.bool_)
    found[owner[metacopy[digest_size > 0]]] = True
    found[owner[redirect[path_size > 0]]] = True
    with_object = np.flatnonzero(found & (inodes.layout == DataLayout.CHUNK_BASED))
    column = np.full(len(inodes.nid), NO_OBJECT, np.uint32)
    column[with_object] = np.arange(len(with_object))

    objects = Objects(
        object=column,
        path_off=np.zeros(len(with_object), np.int64),
        path_size=np.zeros(len(with_object), np.int64),
        digest=np.zeros((len(with_object), 64), np.uint8),
        digest_size=np.zeros(len(with_object), np.uint8),
    )
    to, of = _targets(column, owner[metacopy])
    objects.digest[to] = digest[of]
    objects.digest_size[to] = digest_size[of]
    to, of = _targets(column, owner[redirect])
    objects.path_off[to] = path_off[of]
    objects.path_size[to] = path_size[of]
    return objects


def _rows_of(xattrs: Xattrs, name: bytes, is_regular: Bools) -> Ints:
    return np.flatnonzero(xattrs.names.equal(name)[xattrs.name] & is_regular)


def _targets(column: NDArray[np.uint32], owner: Ints) -> tuple[NDArray[np.uint32], Ints]:
    """Return object rows and the indexes of the owners that have one."""
    of = np.flatnonzero(column[owner] != NO_OBJECT)
    return column[owner[of]], of


def _load_digests(
    data: Bytes, xattrs: Xattrs, metacopy: Ints, nid: Ints
) -> tuple[Bytes, NDArray[np.uint8]]:
    """Return ``uint8[k, 64]`` and sizes: 0 for an empty metacopy."""
    off, size = xattrs.value_off[metacopy], xattrs.value_size[metacopy]
    digest = np.zeros((len(metacopy), 64), np.uint8)
    digest_size = np.zeros(len(metacopy), np.uint8)
    check(np.isin(size, (0, 36, 68)), nid, "size of a digest record", "0, 36 or 68", size)
    for algorithm in Algorithm:
        record_size = RECORD + algorithm.digest_size
        which = np.flatnonzero(size == record_size)
        record = data[off[which, None] + np.arange(record_size)]
        for position, (field, value) in enumerate(
            (("version", 0), ("length", record_size), ("flags", 0), ("algorithm", algorithm))
        ):
            found = record[:, position]
            check(found == value, nid[which], f"{field} of a digest record", f"{value:d}", found)
        digest[which, : algorithm.digest_size] = record[:, RECORD:]
        digest_size[which] = algorithm.digest_size
    return digest, digest_size


def _load_paths(data: Bytes, xattrs: Xattrs, redirect: Ints, nid: Ints) -> tuple[Ints, Ints]:
    """Return offset and size of the redirects without leading slashes."""
    off, size = xattrs.value_off[redirect], xattrs.value_size[redirect]
    check(
        size <= MAX_REDIRECT_SIZE, nid, "size of a redirect", f"at most {MAX_REDIRECT_SIZE}", size
    )
    check(~contains(data, off, size, 0), nid, "offset of a redirect", "a path without nul", off)
    off, size = off.copy(), size.copy()
    # one slash a round; MAX_REDIRECT_SIZE rounds at most
    which = np.flatnonzero(size > 0)
    while which.size:
        which = which[data[off[which]] == ord("/")]
        off[which] += 1
        size[which] -= 1
        which = which[size[which] > 0]
    return off, size
