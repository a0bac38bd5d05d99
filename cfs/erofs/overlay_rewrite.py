"""What composefs stores for an inode: its data and its xattrs, overlayfs's among them.

Specification: erofs-image 4.5, 5.3, 5.4, 5.6 and section 6; 12.3 for composefs-rs.
"""

import re
import stat
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cfs.digest import Algorithm, Digest
from cfs.erofs.format import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_BITS_MAX,
    CHUNK_FORMAT_V2,
    CHUNK_HOLE,
    INLINE_TAIL_MAX,
    V2_CONTENT_SIZE_MAX,
    V2_SYMLINK_SIZE_MAX,
    XATTR_ENTRY,
    XATTR_PREFIXES,
    DataLayout,
    ImageVersion,
)
from cfs.erofs.layout import Record, measure_directory
from cfs.erofs.shared_xattrs import XattrEncoder
from cfs.erofs.tree_limits import check_xattrs
from cfs.errors import FormatError
from cfs.tree import Child, Directory, Inode, Regular, Special, Symlink

__all__ = ["STUB_NAMES", "OverlayRewriter", "equals_stub", "new_stub", "with_stubs"]

_METACOPY = b"trusted.overlay.metacopy"
_REDIRECT = b"trusted.overlay.redirect"
_OPAQUE = b"trusted.overlay.opaque"
_OVERLAY = b"trusted.overlay."
_LABEL = b"security.selinux"
_WHITEOUT_MARKERS = ((b"trusted.overlay.overlay.whiteout", b""), (b"user.overlay.whiteout", b""))
_HOLDER_MARKERS = ((b"trusted.overlay.overlay.whiteouts", b""), (b"user.overlay.whiteouts", b""))
_HOLDER_MARKERS_V1 = (
    *_HOLDER_MARKERS,
    (b"trusted.overlay.overlay.opaque", b"x"),
    (b"user.overlay.opaque", b"x"),
)
_OBJECT_PATH = re.compile(rb"[0-9a-f]{2}/(?:[0-9a-f]{126}|[0-9a-f]{62})\Z", re.IGNORECASE)

_TRUSTED = XATTR_PREFIXES.index(b"trusted.")
_METACOPY_SUFFIX = b"overlay.metacopy"
_REDIRECT_SUFFIX = b"overlay.redirect"
_METACOPY_HEADS = {  # entry and record up to the digest; both need no padding behind it
    algorithm: XATTR_ENTRY.pack(len(_METACOPY_SUFFIX), _TRUSTED, 4 + algorithm.digest_size)
    + _METACOPY_SUFFIX
    + bytes((0, 4 + algorithm.digest_size, 0, algorithm))
    for algorithm in Algorithm
}
STUB_NAMES = frozenset(b"%02x" % number for number in range(256))


class _XattrSet(NamedTuple):
    """The encoded xattrs of an inode, with the places of metacopy and redirect among them."""

    entries: tuple[bytes, ...]
    before_metacopy: tuple[bytes, ...]
    between: tuple[bytes, ...]
    after_redirect: tuple[bytes, ...]
    name_filter: int
    metacopy_filter: int
    redirect_filter: int


def with_stubs(root: Directory, children: dict[bytes, Child]) -> dict[bytes, Child]:
    """Return ``children`` of the root and a stub for each of ``00`` to ``ff`` not taken."""
    result = dict(children)
    for name in STUB_NAMES:
        if name not in result:
            result[name] = new_stub(root)
    return result


def new_stub(root: Directory) -> Special:
    """Return a whiteout as versions 0 and 1 add them to the root."""
    label = root.xattrs.get(_LABEL)
    return Special(
        mode=stat.S_IFCHR | 0o644,
        uid=root.uid,
        gid=root.gid,
        mtime_sec=root.mtime_sec,
        mtime_nsec=root.mtime_nsec,
        xattrs={} if label is None else {_LABEL: label},
    )


def equals_stub(inode: Inode, stub: Special) -> bool:
    """Whether composefs-rs takes a whiteout ``00`` to ``ff`` of the root for a stub."""
    fields = ("mode", "rdev", "uid", "gid", "mtime_sec", "mtime_nsec", "xattrs")
    return all(getattr(inode, field) == getattr(stub, field) for field in fields)


class OverlayRewriter:
    """Gives records their mode, size, data and xattrs.

    Args:
        version: of the image.
        encoder: where xattrs get their encoded form.
        is_rust: follow composefs-rs where it differs from C; always so in version 2.
        whiteouts: ``id`` of the inodes to escape, with that of the directories that hold them
            and get markers.
    """

    def __init__(
        self,
        version: ImageVersion,
        encoder: XattrEncoder,
        *,
        is_rust: bool,
        whiteouts: Mapping[int, int],
    ) -> None:
        self._version = version
        self._encoder = encoder
        self._is_rust = is_rust
        self._whiteouts = whiteouts
        self._holders = frozenset(whiteouts.values())
        self._holder_markers = _HOLDER_MARKERS_V1 if version == 1 else _HOLDER_MARKERS
        self._sets: dict[tuple[tuple[bytes, bytes], ...], _XattrSet] = {}

    def rewrite(self, record: Record) -> None:
        """Fill in one record.

        Raises:
            FormatError: the image version has no form for it.
        """
        inode = record.inode
        if isinstance(inode, Regular):
            self._rewrite_regular(record, inode)
            return
        if isinstance(inode, Directory):
            self._rewrite_directory(record, inode)
            return
        if isinstance(inode, Symlink):
            if self._version == ImageVersion.V2:
                _check_v2_size("target", inode.target, V2_SYMLINK_SIZE_MAX)
            record.layout = DataLayout.FLAT_INLINE
            record.data = inode.target
            record.size = record.tail_size = len(inode.target)
        elif id(inode) in self._whiteouts:
            record.mode = stat.S_IFREG | stat.S_IMODE(record.mode)
            self._set_marked_xattrs(record, _WHITEOUT_MARKERS)
            return
        elif stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode):
            record.i_u = inode.rdev
        self._set_xattrs(record)

    def _rewrite_directory(self, record: Record, directory: Directory) -> None:
        measure_directory(record)
        markers: tuple[tuple[bytes, bytes], ...] = ()
        if id(directory) in self._holders:
            markers = self._holder_markers
        if record.parent is record and self._version != ImageVersion.V2:
            markers = (*markers, (_OPAQUE, b"y"))
        if markers:
            self._set_marked_xattrs(record, markers)
        else:
            self._set_xattrs(record)

    def _rewrite_regular(self, record: Record, file: Regular) -> None:
        record.size = file.size
        if self._is_rust:
            digest, object_path, is_external = _rust_object(file)
        else:
            is_external = bool(file.size and not file.content)
            digest, object_path = file.digest, file.payload
        if is_external:
            self._set_chunk_map(record, has_digest=digest is not None)
            self._set_external_xattrs(record, digest, object_path)
            return
        if file.content:
            if self._version == ImageVersion.V2:
                _check_v2_size("content", file.content, V2_CONTENT_SIZE_MAX)
            record.data = file.content
            tail_size = file.size
            if self._version != ImageVersion.V2:
                record.nr_blocks, tail_size = divmod(file.size, BLOCK_SIZE)
                if tail_size > INLINE_TAIL_MAX:
                    record.nr_blocks, tail_size = record.nr_blocks + 1, 0
            record.tail_size = tail_size
            record.layout = DataLayout.FLAT_INLINE if tail_size else DataLayout.FLAT_PLAIN
        self._set_xattrs(record)

    def _set_chunk_map(self, record: Record, *, has_digest: bool) -> None:
        record.layout = DataLayout.CHUNK_BASED
        if self._version == ImageVersion.V2:
            record.i_u = CHUNK_FORMAT_V2
            nr_chunks = int(has_digest)
        else:
            chunk_bits = min(max((record.size - 1).bit_length(), BLOCK_BITS), CHUNK_BITS_MAX)
            record.i_u = chunk_bits - BLOCK_BITS
            nr_chunks = -(-record.size >> chunk_bits)
        record.data = CHUNK_HOLE * nr_chunks
        record.tail_size = len(record.data)

    def _set_xattrs(self, record: Record) -> None:
        xattrs = self._xattr_set(record.inode.xattrs)
        record.xattr_entries = xattrs.entries
        record.xattr_filter = xattrs.name_filter

    def _set_external_xattrs(
        self, record: Record, digest: Digest | None, object_path: bytes | None
    ) -> None:
        xattrs = self._xattr_set(record.inode.xattrs)
        if digest is None:
            metacopy = self._encoder.entry(_METACOPY, b"")
        else:
            metacopy = _METACOPY_HEADS[digest.algorithm] + digest.value
        if object_path:
            redirect = _redirect_entry(object_path)
            record.xattr_filter = xattrs.redirect_filter
            record.xattr_entries = (
                *xattrs.before_metacopy,
                metacopy,
                *xattrs.between,
                redirect,
                *xattrs.after_redirect,
            )
        else:
            record.xattr_filter = xattrs.metacopy_filter
            record.xattr_entries = (
                *xattrs.before_metacopy,
                metacopy,
                *xattrs.between,
                *xattrs.after_redirect,
            )

    def _set_marked_xattrs(self, record: Record, markers: Sequence[tuple[bytes, bytes]]) -> None:
        """Add markers; they replace what is there, or in Rust stand beside it."""
        check_xattrs(record.inode.xattrs)
        pairs = [(_escape(name), value) for name, value in record.inode.xattrs.items()]
        if self._is_rust:
            pairs += markers
        else:
            pairs = list(dict([*pairs, *markers]).items())
        pairs.sort()
        record.xattr_entries = tuple(self._encoder.entry(*pair) for pair in pairs)
        record.xattr_filter = self._encoder.filter_of(name for name, _ in pairs)

    def _xattr_set(self, xattrs: dict[bytes, bytes]) -> _XattrSet:
        key = tuple(xattrs.items())
        result = self._sets.get(key)
        if result is None:
            check_xattrs(xattrs)
            result = self._sets[key] = self._encode_set(sorted(key))
        return result

    def _encode_set(self, pairs: Sequence[tuple[bytes, bytes]]) -> _XattrSet:
        escaped = [(_escape(name), value) for name, value in pairs]
        first, last = 0, 0
        if self._version != ImageVersion.V2:
            escaped.sort()
            first = bisect_left(escaped, (_METACOPY,))
            last = bisect_left(escaped, (_REDIRECT,))
        entries = tuple(self._encoder.entry(*pair) for pair in escaped)
        names = [name for name, _ in escaped]
        filter_of = self._encoder.filter_of
        return _XattrSet(
            entries,
            entries[:first],
            entries[first:last],
            entries[last:],
            filter_of(names),
            filter_of([*names, _METACOPY]),
            filter_of([*names, _METACOPY, _REDIRECT]),
        )


def _escape(name: bytes) -> bytes:
    if name.startswith(_OVERLAY):
        return _OVERLAY + b"overlay." + name[len(_OVERLAY) :]
    return name


def _redirect_entry(object_path: bytes) -> bytes:
    value_size = 1 + len(object_path)
    head = XATTR_ENTRY.pack(len(_REDIRECT_SUFFIX), _TRUSTED, value_size) + _REDIRECT_SUFFIX
    return head + b"/" + object_path + bytes(-(len(head) + value_size) % 4)


def _rust_object(file: Regular) -> tuple[Digest | None, bytes | None, bool]:
    """Return digest, object path, and whether the file is external (spec section 6, 5)."""
    if file.payload:
        if file.digest:
            return file.digest, file.digest.object_path, True
        match = _OBJECT_PATH.search(file.payload)
        if not match:
            msg = f"payload {file.payload!r}: expected it to end in an object path, xx/rest"
            raise FormatError(msg)
        return None, match[0].lower(), True
    is_external = bool(file.size and not file.content)
    if is_external and file.digest:
        raise FormatError("digest without payload: expected both or none in this image version")
    return None, None, is_external


def _check_v2_size(what: str, data: bytes, limit: int) -> None:
    if len(data) > limit:
        msg = f"{what} of {len(data)} bytes: expected at most {limit} in image version 2"
        raise FormatError(msg)
