"""The metadata that overlayfs reads from the FUSE mount below it in overlay mode.

Specification: fuse-data-plane 11, erofs-image 4.5 and 10; Linux Documentation/filesystems/
overlayfs.rst, "Data-only lower layers" and "Nesting overlayfs mounts".  With ``userxattr``
overlayfs takes ``user.overlay.*`` of the FUSE mount for itself: ``metacopy`` says that a file's
data are elsewhere, ``redirect`` where.  Whatever an image has stored below that prefix must
neither be obeyed nor get lost, so it is escaped, and overlayfs takes the escape out again.
No shared state.
"""

import stat
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cfs.digest import Algorithm
from cfs.fuse.options import Verify
from cfs.inodes import NO_OBJECT, InodeVector
from cfs.linux.mounts import is_initial_user_namespace

__all__ = ["metadata_vector"]

_Ints = NDArray[np.int64]
_Bytes = NDArray[np.uint8]
_Bools = NDArray[np.bool_]
_T = TypeVar("_T", bound=np.generic)

_PREFIX = b"user.overlay."
_ESCAPED = b"user.overlay.overlay."
_METACOPY = np.frombuffer(b"user.overlay.metacopy", np.uint8)
_REDIRECT = np.frombuffer(b"user.overlay.redirect", np.uint8)
_NAME_SIZE_MAX = 255  # XATTR_NAME_MAX: of an escaped name too
_ESCAPABLE_SIZE = _NAME_SIZE_MAX - len(_ESCAPED) + len(_PREFIX)
_NR_OVERLAY = 2  # metacopy and redirect
_RECORD = 4  # bytes of struct overlay_metacopy before the digest


class _Appended:
    """Bytes to be put behind ``extra``, and the offsets that they will have."""

    def __init__(self, vector: InodeVector) -> None:
        self._parts: list[_Bytes] = [vector.extra]
        self._off = len(vector.pool) + len(vector.extra)

    def add(self, data: _Bytes) -> int:
        """Append bytes; return the offset of the first."""
        self._parts.append(data)
        self._off += len(data)
        return self._off - len(data)

    def join(self) -> _Bytes:
        """Return the new ``extra``."""
        return np.concatenate(self._parts)


def metadata_vector(vector: InodeVector, *, verify: Verify) -> InodeVector:
    """Return what FUSE has to serve so that an overlay above shows the vector.

    Each regular file with an object path gets, before its own xattrs, ``user.overlay.metacopy``
    and ``user.overlay.redirect``; each stored ``user.overlay.X`` becomes
    ``user.overlay.overlay.X``, which overlayfs shows as ``user.overlay.X``.

    Left out is what nobody could read through the overlay, because overlayfs cannot copy a file
    to the upper directory if it has an xattr that is listed but refused: ``user.*`` of links and
    special files, ``trusted.*`` if we are in a user name space, whose root may not read it
    either, and ``user.overlay.X`` with X longer than 234 bytes.

    Args:
        vector: mount view of an image.
        verify: with ``REQUIRE`` the kernel shall compare: metacopy holds the digest that the
            image records, or nothing if it records none, and then ``verity=require`` refuses.
    """
    appended = _Appended(vector)
    old_start = vector.xattr_start.astype(np.int64)
    owner = np.repeat(np.arange(len(vector)), old_start[1:] - old_start[:-1])
    name_off, name_size, keep = _escape_names(vector, owner, appended)
    row = _external_files(vector)
    redirect_off, redirect_size = _add_redirects(vector, vector.object[row], appended)
    record_off, record_size = np.zeros((2, len(row)), np.int64)
    if verify is Verify.REQUIRE:
        record_off, record_size = _add_records(vector, vector.object[row], appended)

    owner = owner[keep]
    nr_added = np.zeros(len(vector), np.int64)
    nr_added[row] = _NR_OVERLAY
    start = _starts_of(np.bincount(owner, minlength=len(vector)) + nr_added)
    # a kept xattr moves up by what its own row and those before it got
    kept = np.arange(len(owner)) + np.cumsum(nr_added)[owner]

    def merge(old: NDArray[_T], metacopy: _Ints | int, redirect: _Ints | int) -> NDArray[_T]:
        column = np.empty(start[-1], old.dtype)
        column[kept] = old[keep]
        column[start[row]] = metacopy
        column[start[row] + 1] = redirect
        return column

    names = (appended.add(_METACOPY), appended.add(_REDIRECT))
    return replace(
        vector,
        xattr_start=start.astype(np.uint64),
        xattr_name_off=merge(name_off, *names),
        xattr_name_size=merge(name_size, len(_METACOPY), len(_REDIRECT)),
        xattr_value_off=merge(vector.xattr_value_off, record_off, redirect_off),
        xattr_value_size=merge(vector.xattr_value_size, record_size, redirect_size),
        extra=appended.join(),
    )


def _escape_names(
    vector: InodeVector, owner: _Ints, appended: _Appended
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], _Bools]:
    """Return offset and size of the new name of each xattr, and which to keep."""
    off, size = vector.xattr_name_off.copy(), vector.xattr_name_size.copy()
    kind = vector.mode[owner] & stat.S_IFMT(0xFFFF)
    keep = (kind == stat.S_IFREG) | (kind == stat.S_IFDIR) | ~_has_prefix(vector, b"user.")
    if not is_initial_user_namespace():
        keep &= ~_has_prefix(vector, b"trusted.")
    is_overlay = _has_prefix(vector, _PREFIX)
    keep &= ~is_overlay | (size <= _ESCAPABLE_SIZE)
    which = np.flatnonzero(is_overlay & keep)

    # many xattrs may share a name: each is written once.  Sizes fit a byte, see above
    places, name = np.unique(off[which] << np.uint64(8) | size[which], return_inverse=True)
    old_off = (places >> np.uint64(8)).astype(np.int64) + len(_PREFIX)
    old_size = (places & np.uint64(0xFF)).astype(np.int64) - len(_PREFIX)
    new_size = old_size + len(_ESCAPED)
    starts = _starts_of(new_size)
    text = np.zeros(starts[-1], np.uint8)
    text[starts[:-1, None] + np.arange(len(_ESCAPED))] = np.frombuffer(_ESCAPED, np.uint8)
    text[_ranges(starts[:-1] + len(_ESCAPED), old_size)] = _bytes_at(
        vector, _ranges(old_off, old_size)
    )
    off[which] = (appended.add(text) + starts[:-1])[name]
    size[which] = new_size[name]
    return off, size, keep


def _has_prefix(vector: InodeVector, prefix: bytes) -> _Bools:
    """Tell for each xattr whether its name starts so."""
    result: _Bools = vector.xattr_name_size >= len(prefix)
    at = vector.xattr_name_off[result].astype(np.int64)
    heads = _bytes_at(vector, at[:, None] + np.arange(len(prefix)))
    result[result] = (heads == np.frombuffer(prefix, np.uint8)).all(axis=1)
    return result


def _external_files(vector: InodeVector) -> _Ints:
    """Return the rows of the files whose bytes are an object of known path."""
    row = np.flatnonzero((vector.object != NO_OBJECT) & (vector.inline_size != vector.size))
    return row[vector.object_path_size[vector.object[row]] > 0]


def _add_redirects(
    vector: InodeVector, objects: NDArray[np.uint32], appended: _Appended
) -> tuple[_Ints, _Ints]:
    """Return offset and size of ``/PATH`` of objects; in an image the slash is there already."""
    off = vector.object_path_off[objects].astype(np.int64)
    size = vector.object_path_size[objects].astype(np.int64)
    has_slash = (off > 0) & (off != len(vector.pool))
    has_slash[has_slash] = _bytes_at(vector, off[has_slash] - 1) == ord("/")
    off -= 1
    which = np.flatnonzero(~has_slash)
    starts = _starts_of(size[which] + 1)
    text = np.full(starts[-1], ord("/"), np.uint8)
    text[_ranges(starts[:-1] + 1, size[which])] = _bytes_at(
        vector, _ranges(off[which] + 1, size[which])
    )
    off[which] = appended.add(text) + starts[:-1]
    return off, size + 1


def _add_records(
    vector: InodeVector, objects: NDArray[np.uint32], appended: _Appended
) -> tuple[_Ints, _Ints]:
    """Return offset and size of ``struct overlay_metacopy`` of objects; size 0: no digest."""
    digest_size = vector.object_digest_size[objects].astype(np.int64)
    size = np.where(digest_size > 0, _RECORD + digest_size, 0)
    is_sha256 = digest_size == Algorithm.SHA256.digest_size
    records = np.zeros((len(objects), _RECORD + vector.object_digest.shape[1]), np.uint8)
    records[:, 1] = size  # 0: version, 2: flags
    records[:, 3] = np.where(is_sha256, Algorithm.SHA256, Algorithm.SHA512)
    records[:, _RECORD:] = vector.object_digest[objects]
    off = appended.add(records[np.arange(records.shape[1]) < size[:, None]])
    return off + _starts_of(size)[:-1], size


def _bytes_at(vector: InodeVector, at: _Ints) -> _Bytes:
    """Return the bytes at offsets of the address space of pool and extra."""
    border = len(vector.pool)
    result = np.empty(at.shape, np.uint8)
    in_pool = at < border
    result[in_pool] = vector.pool[at[in_pool]]
    result[~in_pool] = vector.extra[at[~in_pool] - border]
    return result


def _starts_of(counts: _Ints) -> _Ints:
    """Return ``int64[k+1]``: where each of ``k`` runs of ``counts`` elements starts."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _ranges(offsets: _Ints, sizes: _Ints) -> _Ints:
    """Return ``range(offset, offset + size)`` of all pairs, one after the other."""
    starts = _starts_of(sizes)
    return np.repeat(offsets - starts[:-1], sizes) + np.arange(starts[-1])
