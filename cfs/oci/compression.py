"""Decompression of layers (spec repository 5.4).

What comes is hostile: however much a blob stands for, it comes in pieces of at most one MiB or
so, and a decoder's window has at most 128 MiB.  All members of gzip and all frames of zstd count
(eStargz has a member for each file, zstd:chunked a frame); behind the last one anything may come,
which is read and ignored.
"""

import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from cfs.errors import FormatError
from cfs.oci.manifest import Compression

if TYPE_CHECKING:
    import zstandard

__all__ = ["Readable", "decompress", "detect_compression"]

_READ_SIZE = 1 << 18
_PIECE_SIZE = 1 << 20  # of what comes out

_GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952, 2.3.1
_FIRST_PIECE_SIZE = 1 << 12  # what a short member leaves of it is copied: once for each member

# RFC 8878, 3.1
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGIC = b"\x2a\x4d\x18"  # after one byte of 0x50 to 0x5f
_SKIPPABLE_FIRST = range(0x50, 0x60)
_SKIPPABLE_HEADER = struct.Struct("<4xI")
_DICTIONARY_SIZES = (0, 1, 2, 4)
_CONTENT_SIZES = (0, 2, 4, 8)
_SINGLE_SEGMENT, _HAS_CHECKSUM = 0x20, 0x04
_CHECKSUM_SIZE = 4
_BLOCK_HEADER_SIZE = 3
_RLE = 1
_MAX_BLOCK_SIZE = 1 << 17
_MAX_WINDOW_SIZE = 1 << 27


_MAGICS = {Compression.GZIP: _GZIP_MAGIC, Compression.ZSTD: _ZSTD_MAGIC}


class Readable(Protocol):
    """What a blob has to have."""

    def read(self, size: int, /) -> bytes:
        """Return some of the next bytes, at most ``size``; none at the end."""
        ...


def detect_compression(blob: io.RawIOBase) -> Compression:
    """Return what the first bytes of a blob say; they are read."""
    start = blob.read(max(map(len, _MAGICS.values()))) or b""
    for compression, magic in _MAGICS.items():
        if start.startswith(magic):
            return compression
    return Compression.NONE


def decompress(blob: Readable, compression: Compression) -> Iterator[bytes]:
    """Yield what a blob stands for, in pieces; the blob is read to its end.

    Args:
        blob: borrowed; read in whatever thread asks for the next piece.
        compression: of the blob; nothing is guessed.

    Raises:
        FormatError: the blob is damaged, incomplete, or compressed in another way.
    """
    if compression is Compression.NONE:
        while data := blob.read(_PIECE_SIZE):
            yield data
        return
    source = _Input(blob)
    yield from (_gunzip if compression is Compression.GZIP else _unzstd)(source)
    while source.take(_READ_SIZE):
        pass


class _Input:
    """The blob, with a look ahead."""

    def __init__(self, blob: Readable) -> None:
        self._blob = blob
        self._data = b""
        self._off = 0

    def peek(self, size: int) -> bytes:
        """Return the next bytes, fewer at the end; they stay."""
        while len(self._data) - self._off < size:
            more = self._blob.read(_READ_SIZE)
            if not more:
                break
            self._data = self._data[self._off :] + more
            self._off = 0
        return self._data[self._off : self._off + size]

    def take(self, size: int) -> bytes:
        """Return the next bytes, fewer at the end or of those that were read; none at the end."""
        data = self.peek(1) and self._data[self._off : self._off + size]
        self._off += len(data)
        return data

    def take_all(self, size: int) -> bytes:
        """Return as many bytes as were asked for.

        Raises:
            FormatError: there are fewer.
        """
        data = self.peek(size)
        if len(data) < size:
            msg = "zstd: unexpected end of the blob"
            raise FormatError(msg)
        self._off += size
        return data

    def give_back(self, size: int) -> None:
        """Have the last bytes that were taken come once more."""
        self._off -= size


def _gunzip(source: _Input) -> Iterator[bytes]:
    yield from _decompress_member(source)
    while source.peek(len(_GZIP_MAGIC)) == _GZIP_MAGIC:
        yield from _decompress_member(source)


def _decompress_member(source: _Input) -> Iterator[bytes]:
    from isal import igzip_lib  # noqa: PLC0415 - commands that read no layer do without

    decoder = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    size = _FIRST_PIECE_SIZE
    while not decoder.eof:
        compressed = source.take(size) if decoder.needs_input else b""
        if decoder.needs_input and not compressed:
            msg = "gzip: unexpected end of the blob"
            raise FormatError(msg)
        size = min(2 * size, _READ_SIZE)
        try:
            data = decoder.decompress(compressed, _PIECE_SIZE)
        except igzip_lib.IsalError as error:  # type: ignore[misc] # a stub takes it for an object
            msg = f"gzip: {error}"
            raise FormatError(msg) from None
        if data:
            yield data
    source.give_back(len(decoder.unused_data))


def _unzstd(source: _Input) -> Iterator[bytes]:
    import zstandard  # noqa: PLC0415 - as isal

    decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_SIZE)
    is_first = True
    while True:
        magic = source.peek(len(_ZSTD_MAGIC))
        if magic[1:] == _SKIPPABLE_MAGIC and magic[0] in _SKIPPABLE_FIRST:
            _skip_frame(source)
        elif magic == _ZSTD_MAGIC or is_first:
            yield from _decompress_frame(source, decoder)
        else:
            return
        is_first = False


def _skip_frame(source: _Input) -> None:
    size: int = _SKIPPABLE_HEADER.unpack(source.take_all(_SKIPPABLE_HEADER.size))[0]
    while size:
        part = min(size, _READ_SIZE)
        source.take_all(part)
        size -= part


def _decompress_frame(source: _Input, decoder: "zstandard.ZstdDecompressor") -> Iterator[bytes]:
    """Yield the contents of a frame.

    The decoder gives at once all that its input stands for.  So it gets only a few blocks at a
    time, each of which stands for 128 KiB at most.
    """
    import zstandard  # noqa: PLC0415 - as isal

    frame = decoder.decompressobj()
    for compressed in _blocks(source):
        try:
            data = frame.decompress(compressed)
        except zstandard.ZstdError as error:
            msg = f"zstd: {error}"
            raise FormatError(msg) from None
        if data:
            yield data
    if not frame.eof:
        msg = "zstd: a frame does not end where its last block says"
        raise FormatError(msg)


def _blocks(source: _Input) -> Iterator[bytes]:
    """Yield a frame in pieces of whole blocks."""
    header = _take_frame_header(source)
    checksum_size = _CHECKSUM_SIZE if header[len(_ZSTD_MAGIC)] & _HAS_CHECKSUM else 0
    parts = [header]
    is_last = False
    while not is_last:
        block_header = source.take_all(_BLOCK_HEADER_SIZE)
        number = int.from_bytes(block_header, "little")
        is_last, kind, size = bool(number & 1), number >> 1 & 3, number >> 3
        if size > _MAX_BLOCK_SIZE:
            msg = f"zstd: block of {size} bytes: the limit is {_MAX_BLOCK_SIZE}"
            raise FormatError(msg)
        parts += block_header, source.take_all(1 if kind == _RLE else size)
        if not is_last and len(parts) > 2 * _PIECE_SIZE // _MAX_BLOCK_SIZE:
            yield b"".join(parts)
            parts = []
    yield b"".join([*parts, source.take_all(checksum_size)])


def _take_frame_header(source: _Input) -> bytes:
    descriptor_off = len(_ZSTD_MAGIC)
    start = source.peek(descriptor_off + 1)
    if len(start) <= descriptor_off or not start.startswith(_ZSTD_MAGIC):
        msg = f"zstd: the blob begins with {start.hex()}: that is no frame"
        raise FormatError(msg)
    descriptor = start[descriptor_off]
    is_single = bool(descriptor & _SINGLE_SEGMENT)
    content_size = _CONTENT_SIZES[descriptor >> 6] or int(is_single)
    window_size = int(not is_single)
    return source.take_all(
        descriptor_off + 1 + window_size + _DICTIONARY_SIZES[descriptor & 3] + content_size
    )
