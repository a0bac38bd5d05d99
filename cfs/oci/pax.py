"""Extended headers of tar: records ``LEN KEY=VALUE`` (spec repository 6.1)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from cfs.errors import FormatError, UnsupportedError

__all__ = ["Extended", "parse_extended"]

_U64 = (1 << 64) - 1
# int() takes blanks and underscores as well, and refuses very long numbers
_DECIMAL = re.compile(rb"\+?0*([0-9]{1,20})")
_FRACTION_DIGITS = 9
_NR_VERSION_PARTS = 2  # composefs-rs looks no further

_XATTR = b"SCHILY.xattr."
_SPARSE_MAP = b"GNU.sparse.map"
_SPARSE_NAME = b"GNU.sparse.name"
_SPARSE_MAJOR, _SPARSE_MINOR = b"GNU.sparse.major", b"GNU.sparse.minor"
_SPARSE_OFFSET, _SPARSE_NUMBYTES = b"GNU.sparse.offset", b"GNU.sparse.numbytes"
_STRINGS = (b"path", b"linkpath", _SPARSE_NAME)
_NUMBERS = (
    b"size",
    b"uid",
    b"gid",
    _SPARSE_OFFSET,
    _SPARSE_NUMBYTES,
    b"GNU.sparse.realsize",
    b"GNU.sparse.size",
)


@dataclass(slots=True, kw_only=True)
class Extended:
    """What an extended header says; None where it says nothing.

    Numbers have at most 64 bits and no sign.
    """

    path: bytes | None = None
    target: bytes | None = None
    size: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime_sec: int | None = None
    mtime_nsec: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


def parse_extended(data: bytes) -> Extended:
    """Parse the records; the last one of equal keys counts, and unknown ones are ignored.

    Raises:
        FormatError: a record is broken, or is no number where one has to be.
        UnsupportedError: they describe a sparse file.
    """
    strings: dict[bytes, bytes] = {}
    numbers: dict[bytes, int] = {}
    version: dict[bytes, int] = {}
    xattrs: dict[bytes, bytes] = {}
    mtimes: list[tuple[int, int]] = []
    for key, value in _records(data):
        if key.startswith(_XATTR):
            xattrs[key[len(_XATTR) :]] = value
        elif key == b"mtime":
            mtimes.append(_parse_time(value))
        elif key in _STRINGS:
            strings[key] = value
        elif key in _NUMBERS:
            _check_not_sparse(is_sparse=key == _SPARSE_NUMBYTES and _SPARSE_OFFSET in numbers)
            numbers[key] = _parse_number(key, value)
        elif key in (_SPARSE_MAJOR, _SPARSE_MINOR) and len(version) < _NR_VERSION_PARTS:
            version[key] = _parse_number(key, value)
        else:
            _check_not_sparse(is_sparse=key == _SPARSE_MAP)
    _check_not_sparse(is_sparse=version == {_SPARSE_MAJOR: 1, _SPARSE_MINOR: 0})
    return Extended(
        path=strings.get(_SPARSE_NAME, strings.get(b"path")),
        target=strings.get(b"linkpath"),
        size=numbers.get(b"size"),
        uid=numbers.get(b"uid"),
        gid=numbers.get(b"gid"),
        # seconds of the last record, nanoseconds of the first: so does composefs-rs
        mtime_sec=mtimes[-1][0] if mtimes else None,
        mtime_nsec=mtimes[0][1] if mtimes else 0,
        xattrs=xattrs,
    )


def _check_not_sparse(*, is_sparse: bool) -> None:
    if is_sparse:
        msg = "tar: sparse entries are not supported"
        raise UnsupportedError(msg)


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    start = 0
    while start < len(data):
        blank = data.find(b" ", start)
        size = None if blank < 0 else _parse_decimal(data[start:blank])
        if size is None:
            return  # padding, with NULs for instance
        end = start + size
        record = data[blank + 1 : end]
        key, equals, value = record.partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            msg = f"tar: malformed record of an extended header: {data[start:][:80]!r}"
            raise FormatError(msg)
        if not key.isascii():
            _check_text(key)
        yield key, value[:-1]
        start = end


def _check_text(data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError:
        msg = f"tar: extended header: {data[:80]!r} is no UTF-8"
        raise FormatError(msg) from None


def _parse_decimal(text: bytes) -> int | None:
    match = _DECIMAL.fullmatch(text)
    number = int(match[1]) if match else _U64 + 1
    return number if number <= _U64 else None


def _parse_number(key: bytes, value: bytes) -> int:
    number = _parse_decimal(value)
    if number is None:
        msg = f"tar: extended header: {key.decode()}: invalid value {value[:80]!r}"
        raise FormatError(msg)
    return number


def _parse_time(value: bytes) -> tuple[int, int]:
    """Return seconds and nanoseconds; a fraction that is no number counts as none."""
    _check_text(value)
    seconds, _, rest = value.partition(b".")
    fraction = rest[:_FRACTION_DIGITS]
    number = _parse_decimal(fraction) or 0
    return _parse_number(b"mtime", seconds), number * 10 ** (_FRACTION_DIGITS - len(fraction))
