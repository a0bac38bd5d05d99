"""Splitstreams, read (spec repository 3).

A splitstream is a byte sequence of which large parts are objects.  Memory does not grow with
it: references are read when they are used, contents are decompressed piece by piece.  Every
number in a file is compared with its size before anything is read or allocated.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self, overload

import zstandard

from cfs.compat import override
from cfs.digest import Algorithm, Digest
from cfs.errors import FormatError
from cfs.repository.splitstream_format import (
    BLOCK_BITS,
    CHUNK,
    COPY_SIZE,
    HEADER,
    INFO,
    MAGIC,
    OLD_HEADER,
    VERSION,
)

if TYPE_CHECKING:
    from cfs.objectdir import ObjectDirectory

__all__ = ["SplitStream"]

_PIECE_SIZE = 256  # what was compressed to that has 8 MiB at most: 128 KiB for every 4 bytes
_MAX_NAMES_SIZE = 1 << 21  # a name has some 80 bytes, an image some 100 layers
_MAX_INDEX_DIGITS = 40  # zeros may lead


class _Range(NamedTuple):
    """Offsets in the file, the end is exclusive."""

    start: int
    end: int


class _Info(NamedTuple):
    """The info block."""

    streams: _Range
    objects: _Range
    contents: _Range
    names: _Range
    content_type: bytes
    total_size: int


class _File:
    """A regular file with a checked ``pread``; owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            msg = "splitstream: expected a regular file"
            raise FormatError(msg)
        self.size = found.st_size

    def check(self, what: str, part: _Range) -> None:
        if part.end < part.start or part.end > self.size:
            msg = (
                f"splitstream: {what} at {part.start} to {part.end}: expected a range within "
                f"the file of {self.size} bytes"
            )
            raise FormatError(msg)

    def read(self, what: str, start: int, size: int) -> bytes:
        self.check(what, _Range(start, start + size))
        data = self.read_some(start, size)
        if len(data) != size:
            msg = f"splitstream: {what}: the file became shorter while it was read"
            raise FormatError(msg)
        return data

    def read_some(self, start: int, size: int) -> bytes:
        return os.pread(self._fd, size, start)

    def close(self) -> None:
        # a number that is closed may be another file's next: who reads later gets EBADF
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _References(Sequence[Digest]):
    """Digests in the file, read when they are asked for."""

    def __init__(self, file: _File, what: str, part: _Range, digest_size: int) -> None:
        file.check(what, part)
        self._file, self._what, self._part, self._size = file, what, part, digest_size
        if (part.end - part.start) % digest_size:
            msg = f"splitstream: {what}: {part.end - part.start} bytes are no whole digests"
            raise FormatError(msg)

    @override
    def __len__(self) -> int:
        return (self._part.end - self._part.start) // self._size

    @overload
    def __getitem__(self, index: int) -> Digest: ...
    @overload
    def __getitem__(self, index: slice) -> list[Digest]: ...
    @override
    def __getitem__(self, index: int | slice) -> Digest | list[Digest]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        start = self._part.start + range(len(self))[index] * self._size
        return Digest(self._file.read(self._what, start, self._size))

    @override
    def __iter__(self) -> Iterator[Digest]:
        # many at once: collection goes through all references of a store
        for start in range(self._part.start, self._part.end, COPY_SIZE):
            size = min(COPY_SIZE, self._part.end - start)
            data = self._file.read(self._what, start, size)
            for off in range(0, size, self._size):
                yield Digest(data[off : off + self._size])


def _decompress(file: _File, part: _Range) -> Iterator[bytes]:
    """Yield the contents of one frame or more, in pieces."""
    decoder = zstandard.ZstdDecompressor()
    pieces = _read_compressed(file, part)
    rest: bytes | memoryview | None = next(pieces, None)
    while True:
        frame = decoder.decompressobj()
        while not frame.eof:
            if rest is None:
                msg = "splitstream: incomplete frame of zstd"
                raise FormatError(msg)
            try:
                data = frame.decompress(rest)
            except zstandard.ZstdError as error:
                msg = f"splitstream: {error}"
                raise FormatError(msg) from None
            rest = frame.unused_data or next(pieces, None)
            if data:
                yield data
        if rest is None:
            return


def _read_compressed(file: _File, part: _Range) -> Iterator[memoryview]:
    """Yield a range of the file up to its end, in pieces that cannot become too large."""
    off = part.start
    while data := file.read_some(off, min(COPY_SIZE, part.end - off)):
        for start in range(0, len(data), _PIECE_SIZE):
            yield memoryview(data)[start : start + _PIECE_SIZE]
        off += len(data)


class _Pieces:
    """What was decompressed, cut as it is asked for."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def some(self, size: int) -> bytes:
        """Return up to ``size`` bytes, none at the end only."""
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        data = bytes(self._rest[:size])
        self._rest = self._rest[size:]
        return data

    def head(self) -> int | None:
        """Return the number that starts a chunk; None at the end."""
        data = b""
        while len(data) < CHUNK.size:
            more = self.some(CHUNK.size - len(data))
            if not more:
                break
            data += more
        if not data:
            return None
        if len(data) < CHUNK.size:
            msg = f"splitstream: head of a chunk ends after {len(data)} bytes"
            raise FormatError(msg)
        number: int = CHUNK.unpack(data)[0]
        return number


class SplitStream:
    """A splitstream that was opened for reading; a context manager that closes it.

    Attributes:
        content_type: eight bytes, see :class:`~cfs.repository.splitstream_format.ContentType`.
        total_size: size of the contents as it was written down, in bytes; nobody checks it.
        stream_refs: other streams, and images.
        object_refs: objects that the contents are made of.
        named_refs: those of ``stream_refs`` that have a name.
    """

    def __init__(self, fd: int, algorithm: Algorithm) -> None:
        """Check and read everything but the contents.

        Args:
            fd: of the file; owned from now on, closed after an error too.
            algorithm: that of the store.

        Raises:
            FormatError: it is no splitstream, a broken one, or one of another algorithm.
        """
        self._file = _File(fd)
        try:
            info = self._read_info(algorithm)
            size = algorithm.digest_size
            self.stream_refs = _References(self._file, "stream references", info.streams, size)
            self.object_refs = _References(self._file, "object references", info.objects, size)
            # a stream that was cut short is found when it is read: its references are good
            if info.contents.end < info.contents.start:
                self._file.check("stream", info.contents)
            self._contents = info.contents
            self._file.check("named references", info.names)
            self.named_refs = self._read_named_refs(info.names)
            self.content_type = info.content_type
            self.total_size = info.total_size
        except BaseException:
            self.close()
            raise

    def _read_info(self, algorithm: Algorithm) -> _Info:
        data = self._file.read("header", 0, HEADER.size)
        if data.startswith(MAGIC):
            magic, version, _, hash_number, block_bits, start, end = HEADER.unpack(data)
        else:
            start, end, _, magic, version, hash_number, block_bits = OLD_HEADER.unpack(data)
        found = (magic, version, hash_number, block_bits)
        expected = (MAGIC, VERSION, algorithm, BLOCK_BITS)
        if found != expected:
            msg = (
                "splitstream: header: expected magic, version, hash and block bits "
                f"{(MAGIC, VERSION, int(algorithm), BLOCK_BITS)}, found {found}"
            )
            raise FormatError(msg)
        self._file.check("info block", _Range(start, end))
        if end - start < INFO.size:
            msg = f"splitstream: info block of {end - start} bytes: expected {INFO.size}"
            raise FormatError(msg)
        fields = INFO.unpack(self._file.read("info block", start, INFO.size))
        streams, objects, contents, names = map(_Range, fields[0:8:2], fields[1:8:2])
        return _Info(streams, objects, contents, names, *fields[8:])

    def _read_named_refs(self, part: _Range) -> dict[str, Digest]:
        data = bytearray()
        for piece in _decompress(self._file, part):
            data += piece
            if len(data) > _MAX_NAMES_SIZE:
                msg = f"splitstream: named references: more than {_MAX_NAMES_SIZE} bytes"
                raise FormatError(msg)
        *records, rest = bytes(data).split(b"\0")
        if rest:
            msg = "splitstream: named references: the last one has no final zero byte"
            raise FormatError(msg)
        indexes = dict(_parse_record(record, len(self.stream_refs)) for record in records)
        return {name: self.stream_refs[index] for name, index in indexes.items()}

    def require_type(self, *content_types: bytes) -> None:
        """Refuse a stream that has none of these content types.

        Raises:
            FormatError: it has another one.
        """
        if self.content_type not in content_types:
            found = self.content_type.decode(errors="backslashreplace")
            expected = " or ".join(repr(content_type.decode()) for content_type in content_types)
            msg = f"Invalid splitstream content type {found!r}: expected {expected}"
            raise FormatError(msg)

    def chunks(self) -> Iterator[bytes | Digest]:
        """Yield the contents: inline data in pieces, objects by their digest.

        Raises:
            FormatError: the stream is broken; what comes before was given.
        """
        self._file.check("stream", self._contents)
        pieces = _Pieces(_decompress(self._file, self._contents))
        while (number := pieces.head()) is not None:
            if number >= len(self.object_refs):
                msg = (
                    f"splitstream: object reference {number} is out of range: "
                    f"there are {len(self.object_refs)}"
                )
                raise FormatError(msg)
            if number >= 0:
                yield self.object_refs[number]
            while number < 0:
                data = pieces.some(min(-number, COPY_SIZE))
                if not data:
                    msg = f"splitstream: inline data: {-number} bytes are missing at the end"
                    raise FormatError(msg)
                number += len(data)
                yield data

    def contents(self, objects: "ObjectDirectory") -> Iterator[bytes]:
        """Yield the bytes that the stream stands for, in pieces.

        Args:
            objects: where the objects are; each is checked when it is opened.

        Raises:
            FormatError: the stream is broken; what comes before was given.
            NotFoundError: an object is missing.
            IntegrityError: an object is not what its name says.
        """
        for chunk in self.chunks():
            if isinstance(chunk, bytes):
                yield chunk
                continue
            fd = objects.open_object(chunk)
            try:
                while data := os.read(fd, COPY_SIZE):
                    yield data
            finally:
                os.close(fd)

    def close(self) -> None:
        """Close the file; references and contents cannot be read any more."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parse_record(record: bytes, nr_references: int) -> tuple[str, int]:
    """Parse ``INDEX:NAME``; the name may hold colons and may be empty."""
    index, colon, name = record.partition(b":")
    # int() would take blanks, underscores and digits of other scripts as well
    digits = index.removeprefix(b"+")
    if not colon or not digits.isdigit() or len(digits) > _MAX_INDEX_DIGITS:
        msg = f"splitstream: named reference {record[:80]!r}: expected INDEX:NAME"
        raise FormatError(msg)
    if int(digits) >= nr_references:
        msg = (
            f"splitstream: named reference to stream {int(digits)} is out of range: "
            f"there are {nr_references}"
        )
        raise FormatError(msg)
    try:
        return name.decode(), int(digits)
    except UnicodeDecodeError:
        msg = f"splitstream: named reference {name[:80]!r}: expected UTF-8"
        raise FormatError(msg) from None
