"""Tar headers, read as composefs-rs reads them (spec repository 6.1).

Every rule here decides ids of images: Python's ``tarfile`` differs in nearly all of them.  Nothing
is opened or stored here: whoever calls :func:`read_entry` gives it bytes, from a tar that is being
imported or from the splitstream that became of it, so that both are judged alike.
"""

import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from cfs.errors import FormatError, UnsupportedError
from cfs.oci.pax import Extended, parse_extended

__all__ = [
    "BLOCK_SIZE",
    "INLINE_SIZE",
    "Entry",
    "Kind",
    "Read",
    "make_absolute",
    "padded",
    "read_entry",
]

BLOCK_SIZE = 512
INLINE_SIZE = 64  # larger contents of regular files become objects (spec repository 2.1)

Read = Callable[[int], bytes]
"""Returns as many bytes as it is asked for; fewer at the end only, where it returns none."""

_MAX_EXTENSIONS_SIZE = 1 << 20
_MAX_SIZE = (1 << 63) - 1
_U64 = (1 << 64) - 1
_U32 = (1 << 32) - 1
_SIGN = 1 << 63
_IS_BASE_256 = 0x80
_ZEROS = bytes(BLOCK_SIZE)

# name, mode, uid, gid, size, mtime, checksum, type flag, link target, magic and version,
# major, minor, prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_USTAR = b"ustar\x0000"
_GNU = b"ustar  \0"
_CHECKSUM_BLANKS = 8 * ord(" ")

_OCTAL = re.compile(rb"\+?[0-7]+")
_BLANKS = b" \t\n\v\f\r"

_GLOBAL, _EXTENDED, _LONG_NAME, _LONG_TARGET, _SPARSE = b"g", b"x", b"L", b"K", b"S"
_EXTENSIONS = (_EXTENDED, _LONG_NAME, _LONG_TARGET)


class Kind(Enum):
    """What an entry is."""

    REGULAR = "regular file"
    HARDLINK = "hard link"
    SYMLINK = "symlink"
    CHARACTER = "character device"
    BLOCK = "block device"
    DIRECTORY = "directory"
    FIFO = "FIFO"
    UNKNOWN = "unknown"


_KINDS = {
    b"0": Kind.REGULAR,
    b"\0": Kind.REGULAR,
    b"7": Kind.REGULAR,
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER,
    b"4": Kind.BLOCK,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}


@dataclass(slots=True)
class Entry:
    """One entry, with what its extension headers say.

    Attributes:
        kind: of the entry; the tree has none that are unknown.
        flag: the byte that says so.
        path: as in the archive, never empty; it may hold NULs.
        target: of a link, as in the archive; may be empty.
        mode: as in the header, with whatever bits are there beyond 07777.
        rdev: device number as ``makedev`` makes it; None if the header has none.
        size: of the contents in the archive, in bytes, without padding.  Entries other than
            regular files may have contents too; they mean nothing.
        mtime_sec: seconds since 1970, signed.
        xattrs: full name to value.
    """

    kind: Kind
    flag: bytes
    path: bytes
    target: bytes
    mode: int
    uid: int
    gid: int
    rdev: int | None
    size: int
    mtime_sec: int
    mtime_nsec: int
    xattrs: dict[bytes, bytes]

    @property
    def is_external(self) -> bool:
        """Whether the contents are an object of the store, in a splitstream."""
        return self.size > INLINE_SIZE and self.kind is Kind.REGULAR


def padded(size: int) -> int:
    """Return how many bytes contents of that size take in the archive."""
    return size + -size % BLOCK_SIZE


def make_absolute(path: bytes) -> bytes:
    """Return a path or the target of a hard link as an absolute path; that of the root is empty."""
    return (b"/" + path.removeprefix(b"/")).rstrip(b"/")


def read_entry(read: Read) -> Entry | None:
    """Read up to the end of the next header; what ``read`` gives next are the contents.

    Args:
        read: returns the next bytes of the archive.

    Returns:
        The entry; None at the end of the archive, behind its mark if there is one.

    Raises:
        FormatError: the archive is broken.
        UnsupportedError: the entry is a sparse file.
    """
    extensions: dict[bytes, bytes] = {}
    is_after_zeros = False
    while len(block := read(BLOCK_SIZE)) == BLOCK_SIZE:
        if block == _ZEROS:
            if is_after_zeros:
                if extensions:
                    msg = "tar: extension headers without an entry"
                    raise FormatError(msg)
                return None
            is_after_zeros = True
            continue
        is_after_zeros = False
        fields = _HEADER.unpack(block)
        _check_sum(block, fields[6])
        flag = fields[7]
        if flag == _GLOBAL:
            _skip_global(read, fields, extensions)
        elif flag in _EXTENSIONS and _is_extensible(fields):
            _read_extension(read, fields, extensions)
        else:
            return _make_entry(fields, extensions)
    if block or extensions or is_after_zeros:
        msg = "tar: unexpected end of the archive"
        raise FormatError(msg)
    return None


_Fields = tuple[bytes, ...]


def _is_extensible(fields: _Fields) -> bool:
    return fields[9] in (_USTAR, _GNU)


def _check_sum(block: bytes, field: bytes) -> None:
    expected = _parse_octal(field)
    # the low half of an Adler-32 checksum is one more than the sum of the bytes, modulo 65521,
    # which half a header does not reach: five times as fast as sum()
    low = zlib.adler32(block[: BLOCK_SIZE // 2]) & 0xFFFF
    high = zlib.adler32(block[BLOCK_SIZE // 2 :]) & 0xFFFF
    found = low + high - 2 - sum(field) + _CHECKSUM_BLANKS
    if found != expected:
        msg = f"tar: header: checksum mismatch: expected {expected}, found {found}"
        raise FormatError(msg)


@lru_cache(1 << 12)
def _parse_octal(field: bytes) -> int:
    digits = field.partition(b"\0")[0].strip(_BLANKS)
    if not digits:
        return 0
    if not _OCTAL.fullmatch(digits):
        msg = f"tar: header: {field!r} is no octal number"
        raise FormatError(msg)
    return int(digits, 8)


@lru_cache(1 << 12)
def _parse_number(field: bytes) -> int:
    """Return an octal number, or one to the base 256; there are no negative ones."""
    if not field[0] & _IS_BASE_256:
        return _parse_octal(field)
    return int.from_bytes(field) & ~(_IS_BASE_256 << 8 * (len(field) - 1))


def _parse_size(field: bytes) -> int:
    size = _parse_number(field)
    _check_size(size)
    return size


def _check_size(size: int) -> None:
    if size > _MAX_SIZE:
        msg = f"tar: invalid size of an entry: {size}"
        raise FormatError(msg)


def _skip_global(read: Read, fields: _Fields, extensions: dict[bytes, bytes]) -> None:
    # composefs-rs forgets those before it; others do not.  No tool writes them in that order.
    if extensions:
        msg = "tar: a global header between extension headers and their entry"
        raise FormatError(msg)
    _read_data(read, _parse_size(fields[4]), 0)


def _read_extension(read: Read, fields: _Fields, extensions: dict[bytes, bytes]) -> None:
    flag = fields[7]
    if flag in extensions:
        msg = f"tar: two extension headers of type {flag.decode()!r} for one entry"
        raise FormatError(msg)
    total = sum(map(len, extensions.values()))
    extensions[flag] = _read_data(read, _parse_size(fields[4]), total)


def _read_data(read: Read, size: int, total: int) -> bytes:
    """Return the contents of an extension header; ``total`` is the size of those before it."""
    if total + size > _MAX_EXTENSIONS_SIZE:
        msg = f"tar: extension headers of {total + size} bytes: the limit is {_MAX_EXTENSIONS_SIZE}"
        raise FormatError(msg)
    data = read(padded(size))
    if len(data) < padded(size):
        msg = "tar: unexpected end of the archive in an extension header"
        raise FormatError(msg)
    return data[:size]


def _make_entry(fields: _Fields, extensions: dict[bytes, bytes]) -> Entry:
    name, mode, uid, gid, size, mtime, _, flag, target, magic, major, minor, prefix = fields
    is_extensible = magic in (_USTAR, _GNU)
    if flag == _SPARSE and is_extensible:
        msg = "tar: sparse entries are not supported"
        raise UnsupportedError(msg)
    path = name.partition(b"\0")[0]
    if magic == _USTAR and prefix[0]:
        path = prefix.partition(b"\0")[0] + b"/" + path
    entry = Entry(
        _KINDS.get(flag, Kind.UNKNOWN),
        flag,
        path,
        target.partition(b"\0")[0],
        _parse_number(mode) & _U32,
        _parse_number(uid) & _U32,
        _parse_number(gid) & _U32,
        os.makedev(_parse_octal(major), _parse_octal(minor)) if is_extensible else None,
        _parse_size(size),
        _signed(_parse_number(mtime)),
        0,
        {},
    )
    if extensions:
        _extend(entry, extensions)
    if not entry.path:
        msg = "tar: an entry has an empty path"
        raise FormatError(msg)
    return entry


def _signed(number: int) -> int:
    number &= _U64
    return number - (number & _SIGN) * 2


def _extend(entry: Entry, extensions: dict[bytes, bytes]) -> None:
    if _LONG_NAME in extensions:
        entry.path = extensions[_LONG_NAME].removesuffix(b"\0")
    if _LONG_TARGET in extensions:
        entry.target = extensions[_LONG_TARGET].removesuffix(b"\0")
    if _EXTENDED in extensions:
        _apply(entry, parse_extended(extensions[_EXTENDED]))


def _apply(entry: Entry, extended: Extended) -> None:
    if extended.path is not None:
        entry.path = extended.path
    if extended.target is not None:
        entry.target = extended.target
    if extended.size is not None:
        _check_size(extended.size)
        entry.size = extended.size
    if extended.uid is not None:
        entry.uid = extended.uid & _U32
    if extended.gid is not None:
        entry.gid = extended.gid & _U32
    if extended.mtime_sec is not None:
        entry.mtime_sec = _signed(extended.mtime_sec)
    entry.mtime_nsec = extended.mtime_nsec
    entry.xattrs = extended.xattrs
