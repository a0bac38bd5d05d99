"""Layers: from a blob to a stream of the store (spec repository 5.2, 6.2).

Nothing is registered before all of a blob was read and found to be what was promised.
"""

import io
import os
import select
import stat
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from cfs.errors import FormatError, IntegrityError, NotFoundError, UnsupportedError
from cfs.objectdir import Method
from cfs.oci.compression import decompress
from cfs.oci.manifest import Compression
from cfs.oci.reference import digest_from, require_hash
from cfs.oci.statistics import Statistics
from cfs.oci.tar_import import import_tar
from cfs.repository.splitstream_format import ContentType
from cfs.repository.splitstream_writer import SplitStreamWriter
from cfs.repository.streams import find_stream, open_stored_stream, register_stream

if TYPE_CHECKING:
    from hashlib import _Hash

    from cfs.digest import Digest
    from cfs.repository.repository import Repository

__all__ = [
    "ImportedLayer",
    "Progress",
    "Statistics",
    "find_layer",
    "find_sound_layer",
    "import_blob",
    "import_layer",
    "layer_name",
]

Progress = Callable[[int], None]
"""Gets the number of bytes of a blob that were read, in whatever thread reads it."""

_PREFIX = "oci-layer-"
_NR_AHEAD = 4  # pieces of one MiB


@dataclass(frozen=True)
class ImportedLayer:
    """A layer in the store.

    Attributes:
        stream: its splitstream.
        statistics: of its contents.
    """

    stream: "Digest"
    statistics: Statistics


def layer_name(diff_id: str) -> str:
    """Return the content identifier of a layer."""
    return _PREFIX + diff_id


def find_layer(repository: "Repository", diff_id: str) -> "Digest | None":
    """Return the stream of a layer; None if it is not in the store.

    Raises:
        FormatError: its name leads to something else than an object.
    """
    try:
        return find_stream(repository, layer_name(diff_id))
    except NotFoundError:
        return None


def find_sound_layer(
    repository: "Repository", digest: str, *content_types: bytes
) -> "Digest | None":
    """Return the stream of a layer or blob if it has one of these types and nothing is missing.

    The blob of an artifact may have the digest that is the diff id of a layer.  The stream is
    read and its objects are looked for, so that storing it again brings back what was lost or
    damaged; what is in the objects is left to fsck.

    Raises:
        OSError: reading failed.
    """
    with suppress(NotFoundError, FormatError, IntegrityError):
        stream = find_layer(repository, digest)
        if stream is not None and repository.objects.is_sound(stream):
            with open_stored_stream(repository, stream, *content_types) as layer:
                if all(map(repository.objects.has, layer.object_refs)):
                    return stream
    return None


def import_layer(
    repository: "Repository",
    blob: BinaryIO,
    *,
    compression: Compression,
    diff_id: str | None,
    progress: Progress | None = None,
) -> ImportedLayer:
    """Store a layer that is a tar, and register it.

    Args:
        repository: open for writing; several threads may import to it.
        blob: the layer as it is in the image; borrowed, read to its end in another thread.
        compression: of the blob.
        diff_id: digest of the tar; None if nobody knows it (layers of artifacts): then the layer
            is not registered.
        progress: is told what was read of the blob; what it raises ends the import.

    Raises:
        FormatError: compression or tar are broken.
        IntegrityError: the tar has another digest, or the blob is not the right one.
        UnsupportedError: there are sparse files in it, or the digest cannot be checked.
        OSError: reading or writing failed.
    """
    digesting = None if diff_id is None else require_hash(diff_id, "layer")
    with (
        closing(_Watched(blob, progress)) as watched,
        SplitStreamWriter(repository, ContentType.LAYER) as writer,
        closing(_read_ahead(watched, compression, digesting)) as ahead,
    ):
        with _naming(diff_id):
            statistics = import_tar(repository.objects, writer, ahead)
        if diff_id is not None and digesting is not None:
            _check_digest(diff_id, digesting)
        stream = writer.finish()
    if diff_id is not None:
        register_stream(repository, layer_name(diff_id), stream)
    return ImportedLayer(stream, statistics)


def import_blob(
    repository: "Repository", blob: BinaryIO, digest: str, progress: Progress | None = None
) -> ImportedLayer:
    """Store a layer that is no tar, as it is, and register it.

    Args:
        repository: open for writing.
        blob: of the artifact; borrowed, read to its end.
        digest: of the blob.
        progress: as in :func:`import_layer`.

    Raises:
        IntegrityError: the blob has another digest.
        UnsupportedError: the digest cannot be checked.
        OSError: reading or writing failed.
    """
    digesting = require_hash(digest, "layer")
    statistics = Statistics()
    with (
        closing(_Watched(blob, progress)) as watched,
        SplitStreamWriter(repository, ContentType.BLOB) as writer,
        repository.objects.create() as contents,
    ):
        size = 0
        for piece in _hashed(decompress(watched, Compression.NONE), digesting):
            contents.write(piece)
            size += len(piece)
        _check_digest(digest, digesting)
        stored, is_new = contents.commit()
        statistics.count(Method.COPIED if is_new else Method.PRESENT, size)
        writer.write_object(stored, size)
        stream = writer.finish()
    register_stream(repository, layer_name(digest), stream)
    return ImportedLayer(stream, statistics)


def _check_digest(expected: str, digesting: "_Hash") -> None:
    found = digest_from(digesting)
    if found != expected:
        msg = f"layer integrity failed: expected {expected}, got {found}"
        raise IntegrityError(msg)


@contextmanager
def _naming(diff_id: str | None) -> Iterator[None]:
    """Say in an error of a block which layer it is, if that is known."""
    try:
        yield
    except (FormatError, UnsupportedError) as error:
        if diff_id is None:
            raise
        msg = f"layer {diff_id}: {error}"
        raise type(error)(msg) from None


class _Watched:
    """A blob that tells how much of it was read, and whose reader need not wait for ever."""

    def __init__(self, blob: BinaryIO, progress: Progress | None) -> None:
        # with a buffer, poll would not see all, and reading would wait for more than there is
        self._read = blob.read1 if isinstance(blob, io.BufferedReader) else blob.read
        self._progress = progress
        self._poll = select.poll() if _may_block(blob) else None
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        if self._poll is not None:
            self._poll.register(blob, select.POLLIN)
            self._poll.register(self._stop_fd, select.POLLIN)

    def read(self, size: int) -> bytes:
        """Return the next bytes; none at the end, or once this was stopped."""
        if self._poll is not None and self._stop_fd in dict(self._poll.poll()):
            return b""
        data = self._read(size)
        if data and self._progress is not None:
            self._progress(len(data))
        return data

    def stop(self) -> None:
        """Have a reader in another thread end, even if it waits for a pipe."""
        os.eventfd_write(self._stop_fd, 1)

    def close(self) -> None:
        """Close what belongs to this; the blob does not."""
        os.close(self._stop_fd)


def _may_block(blob: BinaryIO) -> bool:
    """Whether reading may wait for another process, as it does at a pipe."""
    try:
        mode = os.fstat(blob.fileno()).st_mode
    except io.UnsupportedOperation:  # no file of its own
        return False
    return not stat.S_ISREG(mode)


def _hashed(pieces: Iterator[bytes], digesting: "_Hash | None") -> Iterator[bytes]:
    for piece in pieces:
        if digesting is not None:
            digesting.update(piece)
        yield piece


def _read_ahead(
    blob: _Watched, compression: Compression, digesting: "_Hash | None"
) -> Generator[bytes, None, None]:
    """Yield the tar, read by another thread; once this is closed, that thread has ended."""
    pieces = _hashed(decompress(blob, compression), digesting)
    reader = ThreadPoolExecutor(1)
    try:
        ahead = deque(reader.submit(next, pieces, b"") for _ in range(_NR_AHEAD))
        while piece := ahead.popleft().result():
            ahead.append(reader.submit(next, pieces, b""))
            yield piece
    finally:
        blob.stop()
        reader.shutdown(cancel_futures=True)
