"""What the bytes of an image mean: the tree that was put in, and what a mount shows.

Specification: erofs-image section 10.  Both views are made from the vector of ``read_image``,
share its pool, and keep its rows; entries that are hidden leave unreachable rows behind.

Whiteout devices: the mount view hides all of them.  The tree view hides them in versions 0 and
1, where they can only be stubs, as C does; in version 2 it keeps them, for they are what was
put in, although C's ``composefs-info dump`` leaves them out there as well (spec 10.1).
"""

import stat
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cfs.erofs.arrays import Bools, Bytes, Ints, ranges, starts_of
from cfs.erofs.format import ImageVersion
from cfs.erofs.objects import REDIRECT
from cfs.erofs.xattrs import ESCAPED_PREFIX, NameTable
from cfs.inodes import NO_OBJECT, InodeVector

__all__ = ["mount_view", "tree_view"]

_OVERLAY = b"trusted.overlay."
_WHITEOUT = ESCAPED_PREFIX + b"whiteout"
_HIDDEN = (ESCAPED_PREFIX + b"whiteouts", b"user.overlay.whiteout", b"user.overlay.whiteouts")
_UNESCAPED_AT = len(_OVERLAY)
_ESCAPE_SIZE = len(b"overlay.")


def mount_view(vector: InodeVector) -> InodeVector:
    """Return what the kernel shows of an image under overlayfs (spec 10.2, 10.3).

    Args:
        vector: as ``read_image`` returns it.
    """
    names, name = _names(vector)
    hidden, renamed = _overlay_names(names)
    view = _hide_entries(vector, _is_whiteout(vector))
    return _with_xattrs(view, names, name, keep=~hidden[name], renamed=renamed)


def tree_view(vector: InodeVector) -> InodeVector:
    """Return the tree that an image was made from (spec 10.1, 10.2).

    Object paths are the redirect without its first slash only, as dumpfiles have them.

    Args:
        vector: as ``read_image`` returns it.
    """
    names, name = _names(vector)
    hidden, renamed = _overlay_names(names)
    for text in _HIDDEN:
        hidden |= names.equal(text)
    start = vector.xattr_start.astype(np.int64)
    owner = np.repeat(np.arange(len(vector)), start[1:] - start[:-1])
    is_regular = (vector.mode & stat.S_IFMT(0xFFFF)) == stat.S_IFREG
    is_escape = names.equal(_WHITEOUT)[name] & is_regular[owner]
    view = vector
    if vector.version != ImageVersion.V2:
        view = _hide_entries(view, _is_whiteout(vector))
    view = _with_full_paths(view, np.flatnonzero(names.equal(REDIRECT)[name]), owner)
    view = _unescape_whiteouts(view, owner[is_escape])
    return _with_xattrs(view, names, name, keep=~hidden[name] & ~is_escape, renamed=renamed)


def _names(vector: InodeVector) -> tuple[NameTable, Ints]:
    """Return the distinct xattr names, and the name of each xattr.

    ``read_image`` keeps each name once, at the start of ``extra``.
    """
    off = vector.xattr_name_off.astype(np.int64) - len(vector.pool)
    size_at = np.zeros(len(vector.extra) + 1, np.int64)
    size_at[off] = vector.xattr_name_size
    starts = np.flatnonzero(size_at)
    sizes = size_at[starts]
    number = np.zeros(len(size_at), np.int64)
    number[starts] = np.arange(len(starts))
    data = vector.extra[ranges(starts, sizes)]
    return NameTable(data, starts_of(sizes)), number[off]


def _overlay_names(names: NameTable) -> tuple[Bools, Bools]:
    """Return which names overlayfs consumes, and which lose one ``overlay.``."""
    renamed = names.starts_with(ESCAPED_PREFIX)
    return names.starts_with(_OVERLAY) & ~renamed, renamed


def _is_whiteout(vector: InodeVector) -> Bools:
    is_device = (vector.mode & stat.S_IFMT(0xFFFF)) == stat.S_IFCHR
    result: Bools = is_device & (vector.rdev == 0)
    return result


def _hide_entries(vector: InodeVector, hidden: Bools) -> InodeVector:
    keep = ~hidden[vector.dirent_ino]
    return replace(
        vector,
        dirent_start=_thin(vector.dirent_start, keep),
        dirent_name_off=vector.dirent_name_off[keep],
        dirent_name_size=vector.dirent_name_size[keep],
        dirent_ino=vector.dirent_ino[keep],
    )


def _thin(start: NDArray[np.uint64], keep: Bools) -> NDArray[np.uint64]:
    """Return the slices that are left when only the rows to keep are."""
    return starts_of(keep.astype(np.int64))[start.astype(np.int64)].astype(np.uint64)


def _with_xattrs(
    vector: InodeVector, names: NameTable, name: Ints, *, keep: Bools, renamed: Bools
) -> InodeVector:
    """Return the vector with only some xattrs, some names without their escape."""
    which = np.flatnonzero(renamed)
    sizes = names.size[which] - _ESCAPE_SIZE
    within = ranges(np.zeros_like(sizes), sizes)
    escape = np.where(within >= _UNESCAPED_AT, _ESCAPE_SIZE, 0)
    texts: Bytes = names.data[ranges(names.start[which], sizes) + escape]
    new_off = np.zeros(len(renamed), np.uint64)
    new_off[which] = len(vector.pool) + len(vector.extra) + starts_of(sizes)[:-1]
    kept = name[keep]
    is_new = renamed[kept]
    return replace(
        vector,
        xattr_start=_thin(vector.xattr_start, keep),
        xattr_name_off=np.where(is_new, new_off[kept], vector.xattr_name_off[keep]),
        xattr_name_size=(names.size[kept] - _ESCAPE_SIZE * is_new).astype(np.uint32),
        xattr_value_off=vector.xattr_value_off[keep],
        xattr_value_size=vector.xattr_value_size[keep],
        extra=np.concatenate([vector.extra, texts]),
    )


def _with_full_paths(vector: InodeVector, redirects: Ints, owner: Ints) -> InodeVector:
    """Return the vector with all but the first slash of each redirect in the object paths."""
    has_path = vector.object[owner[redirects]] != NO_OBJECT
    redirects = redirects[has_path]
    row = vector.object[owner[redirects]]
    off, size = vector.xattr_value_off[redirects], vector.xattr_value_size[redirects]
    has_slash = (size > 0) & (vector.pool[np.where(size > 0, off, 0)] == ord("/"))
    path_off, path_size = vector.object_path_off.copy(), vector.object_path_size.copy()
    path_off[row] = off + has_slash
    path_size[row] = size - has_slash
    return replace(vector, object_path_off=path_off, object_path_size=path_size)


def _unescape_whiteouts(vector: InodeVector, rows: Ints) -> InodeVector:
    """Return the vector with some regular files turned into devices 0:0 of size 0."""
    mode, size, inline_size = vector.mode.copy(), vector.size.copy(), vector.inline_size.copy()
    objects = vector.object.copy()
    mode[rows] = mode[rows] & 0o7777 | stat.S_IFCHR
    size[rows] = 0
    inline_size[rows] = 0
    objects[rows] = NO_OBJECT
    return replace(vector, mode=mode, size=size, inline_size=inline_size, object=objects)
