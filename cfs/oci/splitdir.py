"""Splitstreams on their way to another store: the format *splitdirfdstream*.

Spec repository 5.10 and cli-and-varlink b.7; all integers are little-endian.  There is neither a
header nor an end mark.  A reader trusts nothing: what a chunk announces is compared with what
comes, and no memory is set aside for it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import BinaryIO

from cfs.errors import FormatError
from cfs.repository.splitstream_format import COPY_SIZE

__all__ = [
    "MAX_CONTENTS_SIZE",
    "Chunk",
    "Contents",
    "File",
    "Inline",
    "format_chunk",
    "format_contents_head",
    "read_chunks",
]

MAX_CONTENTS_SIZE = 256 << 20
_MAX_NAME_SIZE = 4096
_MAX_EMPTY = 1 << 16  # of empty files and of nothing; /dev/zero has no end
_HEAD = struct.Struct("<BI")
_SIZE = struct.Struct("<I")
_FILE = struct.Struct("<QII")


class _Type(IntEnum):
    INLINE = 0
    CONTENTS = 1
    FILE = 2


@dataclass(frozen=True, slots=True)
class Inline:
    """Bytes of the stream itself, as headers of a tar."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Contents:
    """A whole file that comes along; the pieces have to be read before the next chunk.

    Attributes:
        size: in bytes, 256 MiB at most.
        pieces: all of it.
    """

    size: int
    pieces: Iterator[bytes]


@dataclass(frozen=True, slots=True)
class File:
    """A whole file that the reader has to open.

    Attributes:
        size: in bytes; the file must have it.
        directory: number of the directory that was handed over.
        name: path below it.
    """

    size: int
    directory: int
    name: bytes


Chunk = Inline | Contents | File


def format_chunk(chunk: Inline | File) -> bytes:
    """Return a chunk as it is written."""
    if isinstance(chunk, Inline):
        return _HEAD.pack(_Type.INLINE, len(chunk.data)) + chunk.data
    head = _FILE.pack(chunk.size, chunk.directory, len(chunk.name))
    return bytes([_Type.FILE]) + head + chunk.name


def format_contents_head(size: int) -> bytes:
    """Return what stands before a file of so many bytes that comes along."""
    return _HEAD.pack(_Type.CONTENTS, size)


def read_chunks(stream: BinaryIO) -> Iterator[Chunk]:
    """Yield the chunks of a stream up to its end.

    Args:
        stream: to read from; blocking.

    Raises:
        FormatError: the stream is broken; what comes before was given.
        OSError: it cannot be read.
    """
    nr_empty = 0
    while kind := stream.read(1):
        size = _read_size(stream) if kind[0] in (_Type.INLINE, _Type.CONTENTS) else 1
        nr_empty = 0 if size else nr_empty + 1
        if nr_empty > _MAX_EMPTY:
            msg = f"splitdirfdstream: more than {_MAX_EMPTY} empty chunks in a row"
            raise FormatError(msg)
        if kind[0] == _Type.FILE:
            yield _read_file(stream)
        elif kind[0] == _Type.CONTENTS:
            pieces = _read_pieces(stream, size)
            yield Contents(size, pieces)
            for _ in pieces:  # nobody wanted them
                pass
        elif kind[0] == _Type.INLINE:
            # long ones come as several: the writer of the stream joins them again
            yield from map(Inline, _read_pieces(stream, size))
        else:
            msg = f"splitdirfdstream: chunk type {kind[0]}: expected 0, 1 or 2"
            raise FormatError(msg)


def _read_file(stream: BinaryIO) -> File:
    size, directory, name_size = _FILE.unpack(_read_exactly(stream, _FILE.size))
    if name_size > _MAX_NAME_SIZE:
        msg = f"splitdirfdstream: name of {name_size} bytes: expected up to {_MAX_NAME_SIZE}"
        raise FormatError(msg)
    name = _read_exactly(stream, name_size)
    parts = name.split(b"/")
    if not name or name.startswith(b"/") or b".." in parts or b"\0" in name:
        msg = f"splitdirfdstream: name {name[:80]!r}: expected a relative path without '..'"
        raise FormatError(msg)
    return File(size, directory, name)


def _read_size(stream: BinaryIO) -> int:
    size: int = _SIZE.unpack(_read_exactly(stream, _SIZE.size))[0]
    if size > MAX_CONTENTS_SIZE:
        msg = f"splitdirfdstream: chunk of {size} bytes: expected up to {MAX_CONTENTS_SIZE}"
        raise FormatError(msg)
    return size


def _read_pieces(stream: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        data = stream.read(min(size, COPY_SIZE))
        if not data:
            raise _truncated(size)
        size -= len(data)
        yield data


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    return b"".join(_read_pieces(stream, size))


def _truncated(size: int) -> FormatError:
    return FormatError(f"splitdirfdstream: {size} bytes are missing at the end")
