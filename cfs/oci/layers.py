"""Layers: from a blob to a stream of the store (spec repository 5.2, 6.2).

Nothing is registered before all of a blob was read and found to be what was promised.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

from cfs.errors import FormatError, IntegrityError, NotFoundError, UnsupportedError
from cfs.objectdir import Method
from cfs.oci.compression import decompress
from cfs.oci.manifest import Compression
from cfs.oci.reference import new_hash
from cfs.oci.statistics import Statistics
from cfs.oci.tar_import import import_tar
from cfs.repository.splitstream_format import ContentType
from cfs.repository.splitstream_writer import SplitStreamWriter
from cfs.repository.streams import find_stream, register_stream

if TYPE_CHECKING:
    from hashlib import _Hash

    from cfs.digest import Digest
    from cfs.repository.repository import Repository

__all__ = [
    "ImportedLayer",
    "Progress",
    "Statistics",
    "find_layer",
    "import_blob",
    "import_layer",
    "layer_name",
]

Progress = Callable[[int], None]
"""Gets the number of bytes of a blob that were read, in whatever thread reads it."""

_PREFIX = "oci-layer-"
_READ_SIZE = 1 << 20
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
    digesting = _new_hash(diff_id)
    pieces = decompress(_watched(blob, progress), compression)
    with (
        SplitStreamWriter(repository, ContentType.LAYER) as writer,
        closing(_read_ahead(_hashed(pieces, digesting))) as ahead,
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
    digesting = _new_hash(digest)
    statistics = Statistics()
    with (
        SplitStreamWriter(repository, ContentType.BLOB) as writer,
        repository.objects.create() as contents,
    ):
        size = 0
        pieces = decompress(_watched(blob, progress), Compression.NONE)
        for piece in _hashed(pieces, digesting):
            contents.write(piece)
            size += len(piece)
        if digesting is not None:
            _check_digest(digest, digesting)
        stored, is_new = contents.commit()
        statistics.count(Method.COPIED if is_new else Method.PRESENT, size)
        writer.write_object(stored, size)
        stream = writer.finish()
    register_stream(repository, layer_name(digest), stream)
    return ImportedLayer(stream, statistics)


def _new_hash(digest: str | None) -> "_Hash | None":
    if digest is None:
        return None
    digesting = new_hash(digest)
    if digesting is None:
        msg = f"layer {digest}: digests of this algorithm cannot be checked"
        raise UnsupportedError(msg)
    return digesting


def _check_digest(expected: str, digesting: "_Hash") -> None:
    found = f"{digesting.name}:{digesting.hexdigest()}"
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
    """A blob that tells how much of it was read."""

    def __init__(self, blob: BinaryIO, progress: Progress) -> None:
        self._blob = blob
        self._progress = progress

    def read(self, size: int) -> bytes:
        data = self._blob.read(size)
        if data:
            self._progress(len(data))
        return data


def _watched(blob: BinaryIO, progress: Progress | None) -> BinaryIO:
    # nothing but read() is used of it
    return blob if progress is None else cast("BinaryIO", _Watched(blob, progress))


def _hashed(pieces: Iterator[bytes], digesting: "_Hash | None") -> Iterator[bytes]:
    for piece in pieces:
        if digesting is not None:
            digesting.update(piece)
        yield piece


def _read_ahead(pieces: Iterator[bytes]) -> Generator[bytes, None, None]:
    """Yield the same, made by another thread; once this is closed, that thread has ended."""
    reader = ThreadPoolExecutor(1)
    try:
        ahead = deque(reader.submit(next, pieces, b"") for _ in range(_NR_AHEAD))
        while piece := ahead.popleft().result():
            ahead.append(reader.submit(next, pieces, b""))
            yield piece
    finally:
        reader.shutdown(cancel_futures=True)
