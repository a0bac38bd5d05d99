"""Splitstreams, written (spec repository 3).

Memory does not grow with the stream: what cannot be placed yet goes to temporary files.
"""

import itertools
import tempfile
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Protocol, Self

import zstandard

from cfs.digest import Algorithm, Digest
from cfs.errors import InvalidRequestError
from cfs.repository.splitstream_format import (
    BLOCK_BITS,
    CHUNK,
    COPY_SIZE,
    HEADER,
    INFO,
    MAGIC,
    VERSION,
)

if TYPE_CHECKING:
    from cfs.objectdir import ObjectDirectory

__all__ = ["SplitStreamWriter"]

_LEVEL = 3
_SPOOL_SIZE = 1 << 20


class _Store(Protocol):
    """What a writer needs of a repository."""

    @property
    def fd(self) -> int: ...
    @property
    def algorithm(self) -> Algorithm: ...
    @property
    def objects(self) -> "ObjectDirectory": ...


class SplitStreamWriter:
    """Makes a splitstream and stores it; a context manager that discards what is not finished.

    For one thread.
    """

    def __init__(self, store: _Store, content_type: bytes) -> None:
        """Begin an empty stream.

        Args:
            store: the repository; it must stay open.
            content_type: eight bytes, see :class:`~cfs.repository.splitstream_format.ContentType`.
        """
        self._store = store
        self._content_type = content_type
        # not below /tmp, which may be memory
        place = f"/proc/self/fd/{store.fd}"
        self._stack = ExitStack()
        spool = partial(tempfile.SpooledTemporaryFile, _SPOOL_SIZE, dir=place)
        self._inline = self._stack.enter_context(spool())
        self._compressed = self._stack.enter_context(spool())
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
        self._object_refs: dict[Digest, int] = {}
        self._stream_refs: dict[Digest, int] = {}
        self._named_refs: dict[bytes, int] = {}
        self._total_size = 0

    def write_inline(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes; what is adjacent becomes one chunk, as readers of layers demand."""
        self._inline.write(data)
        self._total_size += len(data)

    def write_object(self, digest: Digest, size: int) -> None:
        """Append the contents of an object.

        Args:
            digest: of an object that is stored already.
            size: its size in bytes.
        """
        self._flush_inline()
        index = self._object_refs.setdefault(digest, len(self._object_refs))
        self._compress(CHUNK.pack(index))
        self._total_size += size

    def add_stream(self, digest: Digest) -> int:
        """Refer to another stream or an image; return the number of the reference."""
        return self._stream_refs.setdefault(digest, len(self._stream_refs))

    def add_named(self, name: str, digest: Digest) -> None:
        """Refer to another stream or an image by a name.

        Raises:
            InvalidRequestError: the name holds a zero byte or is no UTF-8.
        """
        try:
            key = name.encode()
        except UnicodeEncodeError:
            msg = f"named reference {name!r}: expected UTF-8"
            raise InvalidRequestError(msg) from None
        if b"\0" in key:
            msg = f"named reference {name!r}: a zero byte is not allowed"
            raise InvalidRequestError(msg)
        self._named_refs[key] = self.add_stream(digest)

    def finish(self) -> Digest:
        """Store the stream and return its digest; nothing more can be added.

        Raises:
            OSError: writing failed.
        """
        self._flush_inline()
        self._compressed.write(self._compressor.flush())
        stream_refs = b"".join(digest.value for digest in self._stream_refs)
        object_refs = b"".join(digest.value for digest in self._object_refs)
        named_refs = self._encode_named_refs()
        sizes = (len(stream_refs), len(object_refs), len(named_refs), self._compressed.tell())
        start = HEADER.size
        ends = list(itertools.accumulate(sizes, initial=start + INFO.size))
        header = HEADER.pack(MAGIC, VERSION, 0, self._store.algorithm, BLOCK_BITS, start, ends[0])
        # the stream comes last in the file and third in the info block
        info = INFO.pack(
            *ends[0:2], *ends[1:3], *ends[3:5], *ends[2:4], self._content_type, self._total_size
        )
        with self._store.objects.create() as writer:
            writer.write(header + info + stream_refs + object_refs + named_refs)
            self._compressed.seek(0)
            while data := self._compressed.read(COPY_SIZE):
                writer.write(data)
            # others find what is in it: one that is damaged must not stay
            return writer.commit(thorough=True)[0]

    def _encode_named_refs(self) -> bytes:
        compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj()
        records = [b"%d:%b\0" % (self._named_refs[name], name) for name in sorted(self._named_refs)]
        return compressor.compress(b"".join(records)) + compressor.flush()

    def _flush_inline(self) -> None:
        size = self._inline.tell()
        if not size:
            return
        self._compress(CHUNK.pack(-size))
        self._inline.seek(0)
        while data := self._inline.read(COPY_SIZE):
            self._compress(data)
        self._inline.seek(0)
        self._inline.truncate()

    def _compress(self, data: bytes) -> None:
        self._compressed.write(self._compressor.compress(data))

    def close(self) -> None:
        """Discard what was not finished."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
