"""Splitting a tar into inline data and objects (spec repository 6.2).

The thread that imports reads headers and writes the stream; a few others compute digests and
write objects.  Memory is bounded whatever the archive says: contents wait for those others in a
few batches, large ones are written as they come, inline data goes to the stream piece by piece.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from cfs.errors import FormatError
from cfs.fsverity import compute_digest
from cfs.objectdir import Method
from cfs.oci.statistics import Statistics
from cfs.oci.tar import padded, read_entry

if TYPE_CHECKING:
    from cfs.digest import Digest
    from cfs.objectdir import ObjectDirectory
    from cfs.repository.splitstream_writer import SplitStreamWriter

__all__ = ["import_tar"]

_MAX_WRITERS = 4
_MAX_BATCHES = 4  # that wait
_BATCH_SIZE = 1 << 20  # bytes of contents and of the inline data between them
_BATCH_LENGTH = 64  # objects
_LARGE_SIZE = 8 << 20  # larger contents are never in memory as a whole
_PIECE_SIZE = 1 << 20

_Contents = bytes | memoryview


def import_tar(
    objects: "ObjectDirectory", writer: "SplitStreamWriter", pieces: Iterator[bytes]
) -> Statistics:
    """Store the objects of a tar, and write its stream.

    Args:
        objects: gets the contents of regular files of more than 64 bytes.
        writer: gets everything else, and the references.
        pieces: the archive, in pieces that are not empty; read to its end.

    Raises:
        FormatError: the archive is broken.
        UnsupportedError: there are sparse files in it.
        OSError: writing failed.
    """
    statistics = Statistics()
    pool = ThreadPoolExecutor(min(_MAX_WRITERS, len(os.sched_getaffinity(0))))
    try:
        _Importer(objects, writer, _Input(pieces), statistics, pool).run()
    finally:
        pool.shutdown(cancel_futures=True)
    return statistics


class _Input:
    """The archive, cut as it is asked for."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._data = b""
        self._off = 0

    def read(self, size: int) -> bytes:
        """Return the next bytes; fewer at the end only."""
        data = self._data[self._off : self._off + size]
        self._off += len(data)
        if len(data) == size:
            return data
        parts: list[bytes | memoryview] = [data]
        missing = size - len(data)
        while missing and (part := self.read_some(missing)):
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def read_contents(self, size: int) -> _Contents:
        """Return the next bytes, not copied where they are in one piece; fewer at the end only."""
        if self._off + size <= len(self._data):
            return self.read_some(size)
        return self.read(size)

    def read_some(self, size: int) -> memoryview:
        """Return some of the next bytes; none at the end."""
        if self._off == len(self._data):
            self._data, self._off = next(self._pieces, b""), 0
        data = memoryview(self._data)[self._off : self._off + size]
        self._off += len(data)
        return data


class _Importer:
    """One import.  All but :func:`_put_all` runs in the thread of the caller."""

    def __init__(
        self,
        objects: "ObjectDirectory",
        writer: "SplitStreamWriter",
        source: _Input,
        statistics: Statistics,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._objects = objects
        self._writer = writer
        self._source = source
        self._statistics = statistics
        self._pool = pool
        self._inline: list[bytes] = []  # behind the last object of the batch
        self._inline_size = 0
        self._batch: list[tuple[bytes, _Contents]] = []  # inline data, and the object behind it
        self._batch_size = 0
        self._waiting: deque[
            tuple[list[tuple[bytes, _Contents]], Future[list[tuple[Digest, bool]]]]
        ] = deque()

    def run(self) -> None:
        """Import the archive."""
        while entry := read_entry(self._read_inline):
            padding = padded(entry.size) - entry.size
            if entry.is_external:
                self._take_object(entry.size)
                self._take_inline(padding)
            else:
                self._take_inline(entry.size + padding)
        while self._read_inline(_PIECE_SIZE):
            pass
        self._settle()

    def _read_inline(self, size: int) -> bytes:
        """Return the next bytes, which stay inline; fewer at the end only."""
        data = self._source.read(size)
        self._inline.append(data)
        self._inline_size += len(data)
        if self._inline_size > _PIECE_SIZE:
            self._settle()
        return data

    def _take_inline(self, size: int) -> None:
        while size:
            part = min(size, _PIECE_SIZE)
            _check_size(part, len(self._read_inline(part)))
            size -= part

    def _take_object(self, size: int) -> None:
        if size > _LARGE_SIZE:
            self._take_large(size)
            return
        contents = self._source.read_contents(size)
        _check_size(size, len(contents))
        inline = self._pop_inline()
        self._batch.append((inline, contents))
        self._batch_size += len(inline) + size
        if self._batch_size >= _BATCH_SIZE or len(self._batch) >= _BATCH_LENGTH:
            self._submit()

    def _take_large(self, size: int) -> None:
        self._settle()
        with self._objects.create() as writer:
            missing = size
            while missing:
                data = self._source.read_some(missing)
                _check_size(1, len(data))
                writer.write(data)
                missing -= len(data)
            digest, is_new = writer.commit()
        self._write_object(digest, size, is_new=is_new)

    def _pop_inline(self) -> bytes:
        data = b"".join(self._inline)
        self._inline, self._inline_size = [], 0
        return data

    def _submit(self) -> None:
        """Have the batch stored."""
        contents = [contents for _, contents in self._batch]
        self._waiting.append((self._batch, self._pool.submit(_put_all, self._objects, contents)))
        self._batch, self._batch_size = [], 0
        if len(self._waiting) > _MAX_BATCHES:
            self._finish_batch()

    def _finish_batch(self) -> None:
        """Wait for the first batch, and write its part of the stream."""
        batch, stored = self._waiting.popleft()
        for (inline, contents), (digest, is_new) in zip(batch, stored.result(), strict=True):
            self._write_inline(inline)
            self._write_object(digest, len(contents), is_new=is_new)

    def _settle(self) -> None:
        """Write the stream up to here."""
        if self._batch:
            self._submit()
        while self._waiting:
            self._finish_batch()
        self._write_inline(self._pop_inline())

    def _write_inline(self, data: bytes) -> None:
        self._writer.write_inline(data)
        self._statistics.inlined_size += len(data)

    def _write_object(self, digest: "Digest", size: int, *, is_new: bool) -> None:
        self._writer.write_object(digest, size)
        self._statistics.count(Method.COPIED if is_new else Method.PRESENT, size)


def _put_all(
    objects: "ObjectDirectory", contents: Sequence[_Contents]
) -> list[tuple["Digest", bool]]:
    """Store objects; return their digests, and whether they were new."""
    digests = [compute_digest(data, objects.algorithm) for data in contents]
    return [
        (digest, objects.put_contents(data, digest))
        for digest, data in zip(digests, contents, strict=True)
    ]


def _check_size(expected: int, found: int) -> None:
    if found < expected:
        msg = "tar: unexpected end of the archive in the contents of an entry"
        raise FormatError(msg)
