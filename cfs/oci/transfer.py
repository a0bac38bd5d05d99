"""Layers from store to store: what one sends, and what another makes of it (spec 5.10).

The stores may name their objects by different hashes: a layer is known by the digest of its
contents, which the receiver computes of the objects it has made.  Nothing is registered unless
all of it came and is right; objects that came before an error are left to collection.
"""

import os
import stat
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cfs.digest import Digest
from cfs.errors import FormatError, IntegrityError, UnsupportedError
from cfs.fsverity import compute_file_digest
from cfs.linux.files import Resolve, openat2
from cfs.objectdir import Method
from cfs.oci.layers import ImportedLayer, Statistics, layer_name
from cfs.oci.reference import digest_from, require_hash
from cfs.oci.splitdir import Chunk, Contents, File, Inline
from cfs.oci.tar import INLINE_SIZE
from cfs.repository.repository import Repository
from cfs.repository.splitstream_format import COPY_SIZE, ContentType
from cfs.repository.splitstream_writer import SplitStreamWriter
from cfs.repository.streams import open_stored_stream, register_stream

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["LayerMismatchError", "read_sent_layer", "receive_layer", "send_layer"]

_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_WITHIN = Resolve.BENEATH | Resolve.NO_SYMLINKS | Resolve.NO_MAGICLINKS


class LayerMismatchError(IntegrityError):
    """What came is another layer than was announced.

    Attributes:
        expected: the digest that it should have.
        found: the digest of what came.
    """

    def __init__(self, expected: str, found: str) -> None:
        self.expected = expected
        self.found = found
        super().__init__(f"layer {expected}: its contents have the digest {found}")


def send_layer(
    repository: Repository, stream: Digest, *, verify: bool = False
) -> Generator[Inline | File, None, None]:
    """Yield the stream of a layer for another store; directory 0 is that of the objects.

    Args:
        repository: the store.
        stream: of the layer; of an artifact's blob as well.
        verify: compute the digest of every object, for a receiver who cannot check the whole.

    Raises:
        FormatError: the stream is broken; what comes before was given.
        NotFoundError: an object is missing.
        IntegrityError: an object is not what its name says.
    """
    with open_stored_stream(repository, stream) as layer:
        for chunk in layer.chunks():
            if isinstance(chunk, bytes):
                yield Inline(chunk)
            else:
                yield File(_object_size(repository, chunk, verify=verify), 0, chunk.object_path)


def _object_size(repository: Repository, digest: Digest, *, verify: bool) -> int:
    fd = repository.objects.open_object(digest)
    try:
        size = os.fstat(fd).st_size
        if verify and compute_file_digest(fd, size, digest.algorithm) != digest:
            msg = f"object {digest}: its contents have another digest"
            raise IntegrityError(msg)
    finally:
        os.close(fd)
    return size


def receive_layer(
    repository: Repository,
    digest: str,
    chunks: Iterable[Chunk],
    directories: Sequence[int],
    *,
    zerocopy: bool = False,
    covers_contents: bool = True,
) -> ImportedLayer:
    """Store a layer that another store sends, and register it.

    Files up to 64 bytes become part of the stream, larger ones objects: as reflinks where that is
    possible (spec repository 2.5).

    Args:
        repository: the store; its hash need not be that of the other one.
        digest: diff id of the layer, or digest of an artifact's blob.
        chunks: what is sent.
        directories: descriptors that the files are opened below; borrowed.
        zerocopy: take hard links as well, and fail rather than copy a file.
        covers_contents: whether ``digest`` is that of the contents.  It is not for the layers
            of an artifact that were compressed; then the sender has to be sure of them.

    Raises:
        FormatError: the chunks are no such stream.
        LayerMismatchError: the contents have another digest.
        IntegrityError: a file has another size.
        UnsupportedError: we cannot compute such digests, or a file had to be copied.
        OSError: reading or writing failed.
    """
    content_hash = require_hash(digest, "layer")
    with SplitStreamWriter(repository, ContentType.LAYER) as writer:
        receiver = _Receiver(repository, writer, content_hash, directories, zerocopy=zerocopy)
        for chunk in chunks:
            receiver.receive(chunk)
        found = digest_from(content_hash)
        if covers_contents and found != digest:
            raise LayerMismatchError(digest, found)
        stream = writer.finish()
    register_stream(repository, layer_name(digest), stream)
    return ImportedLayer(stream, receiver.statistics)


class _Receiver:
    """Puts chunks into a store, and hashes them.  For one thread."""

    def __init__(
        self,
        repository: Repository,
        writer: SplitStreamWriter,
        content_hash: "_Hash",
        directories: Sequence[int],
        *,
        zerocopy: bool,
    ) -> None:
        self.statistics = Statistics()
        self._objects = repository.objects
        self._writer = writer
        self._hash = content_hash
        self._directories = directories
        self._zerocopy = zerocopy

    def receive(self, chunk: Chunk) -> None:
        if isinstance(chunk, Inline):
            self._inline([chunk.data])
        elif isinstance(chunk, Contents):
            self._contents(chunk)
        else:
            self._file(chunk)

    def _inline(self, pieces: Iterable[bytes]) -> None:
        for data in pieces:
            self._hash.update(data)
            self._writer.write_inline(data)
            self.statistics.inlined_size += len(data)

    def _contents(self, chunk: Contents) -> None:
        if chunk.size <= INLINE_SIZE:
            self._inline(chunk.pieces)
            return
        with self._objects.create() as writer:
            for data in chunk.pieces:
                self._hash.update(data)
                writer.write(data)
            digest, is_new = writer.commit()
        self.statistics.count(Method.COPIED if is_new else Method.PRESENT, chunk.size)
        self._writer.write_object(digest, chunk.size)

    def _file(self, chunk: File) -> None:
        with _opened(chunk, self._directories) as fd:
            if chunk.size <= INLINE_SIZE:
                self._inline([os.pread(fd, chunk.size, 0)])
                return
            digest = self._import(fd, chunk)
        # not the file, which may have changed since: what is in the store now
        fd = self._objects.open_object(digest)
        try:
            while data := os.read(fd, COPY_SIZE):
                self._hash.update(data)
        finally:
            os.close(fd)
        self._writer.write_object(digest, chunk.size)

    def _import(self, fd: int, chunk: File) -> Digest:
        try:
            # composefs-rs links whenever it can: whoever owns the file then owns the object
            digest, method = self._objects.import_file(
                fd, chunk.size, link=self._zerocopy, copy=not self._zerocopy
            )
        except (OSError, UnsupportedError) as error:
            if not self._zerocopy:
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            msg = f"{_show(chunk)}: neither reflink nor hard link is possible: {reason}"
            raise UnsupportedError(msg) from None
        self.statistics.count(method, chunk.size)
        return digest


@contextmanager
def _opened(chunk: File, directories: Sequence[int]) -> Iterator[int]:
    if chunk.directory >= len(directories):
        msg = f"{_show(chunk)}: no directory {chunk.directory} was handed over"
        raise FormatError(msg)
    fd = openat2(directories[chunk.directory], chunk.name, _OPEN_FILE, resolve=_WITHIN)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != chunk.size:
            msg = f"{_show(chunk)}: expected a regular file of {chunk.size} bytes"
            raise IntegrityError(msg)
        yield fd
    finally:
        os.close(fd)


def read_sent_layer(
    digest: str, chunks: Iterable[Chunk], directories: Sequence[int]
) -> Iterator[bytes]:
    """Yield the contents of a layer that another store sends, whose digest is known at the end.

    Args:
        digest: diff id of the layer.
        chunks: what is sent.
        directories: descriptors that the files are opened below; borrowed.

    Raises:
        FormatError: the chunks are no such stream.
        LayerMismatchError: the contents have another digest.
        IntegrityError: a file has another size.
        UnsupportedError: we cannot compute such digests.
        OSError: reading failed.
    """
    content_hash = require_hash(digest, "layer")
    for chunk in chunks:
        for data in _pieces_of(chunk, directories):
            content_hash.update(data)
            yield data
    found = digest_from(content_hash)
    if found != digest:
        raise LayerMismatchError(digest, found)


def _pieces_of(chunk: Chunk, directories: Sequence[int]) -> Iterator[bytes]:
    if isinstance(chunk, Inline):
        yield chunk.data
    elif isinstance(chunk, Contents):
        yield from chunk.pieces
    else:
        with _opened(chunk, directories) as fd:
            missing = chunk.size
            while missing and (data := os.read(fd, min(missing, COPY_SIZE))):
                missing -= len(data)
                yield data


def _show(chunk: File) -> str:
    return f"file {chunk.name.decode(errors='backslashreplace')}"
