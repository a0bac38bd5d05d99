"""Streams that hold a document: a manifest or a config (spec repository 5.2).

The document is the only object of the stream; what it needs are named references.
"""

from collections.abc import Sequence
from contextlib import ExitStack

from cfs.digest import Digest
from cfs.errors import FormatError, IntegrityError, explaining
from cfs.oci.manifest import MAX_DOCUMENT_SIZE
from cfs.repository.repository import Repository
from cfs.repository.splitstream import SplitStream
from cfs.repository.splitstream_writer import SplitStreamWriter
from cfs.repository.streams import open_stored_stream

__all__ = ["config_key", "config_name", "open_document", "put_document", "read_document"]


def config_name(digest: str) -> str:
    """Return the content identifier of the stream of a config."""
    return f"oci-config-{digest}"


def config_key(digest: str) -> str:
    """Return the name of a manifest's reference to its config."""
    return f"config:{digest}"


def open_document(
    repository: Repository,
    stream: Digest,
    content_id: str,
    content_type: bytes,
    *,
    verify: bool = False,
) -> SplitStream:
    """Open the stream of a manifest or a config.

    Args:
        repository: the store.
        stream: id of the stream.
        content_id: what it is registered as, for messages.
        content_type: it has to have.
        verify: whether to compare the stream with its id.

    Raises:
        NotFoundError: the stream is missing.
        FormatError: it is broken or holds something else.
        IntegrityError: it is not what its name says.
        OSError: reading failed.
    """
    with explaining(f"Opening stream '{content_id}'"), ExitStack() as stack:
        opened = stack.enter_context(open_stored_stream(repository, stream))
        if verify and not repository.objects.is_sound(stream):
            msg = f"object {stream}: its contents have another digest"
            raise IntegrityError(msg)
        opened.require_type(content_type)
        stack.pop_all()
        return opened


def read_document(repository: Repository, opened: SplitStream) -> bytes:
    """Return the document in a stream: its only object, as composefs-rs has it.

    Raises:
        NotFoundError: the object is missing.
        FormatError: there is another number of objects, or it is too large for a document.
        IntegrityError: the object is not what its name says.
        OSError: reading failed.
    """
    nr_objects = len(opened.object_refs)
    if nr_objects != 1:
        msg = f"Expected exactly 1 external object in splitstream, got {nr_objects}"
        raise FormatError(msg)
    digest = opened.object_refs[0]
    with explaining(f"Reading object {repository.algorithm.name.lower()}:{digest} into memory"):
        with open(repository.objects.open_object(digest), "rb") as file:
            data = file.read(MAX_DOCUMENT_SIZE + 1)
        if len(data) > MAX_DOCUMENT_SIZE:
            msg = f"more than {MAX_DOCUMENT_SIZE} bytes, which no document has"
            raise FormatError(msg)
        return data


def put_document(
    repository: Repository,
    content_id: str,
    content_type: bytes,
    data: bytes,
    references: Sequence[tuple[str, Digest]],
) -> Digest:
    """Store a document with what it needs; return the id of the stream.

    Args:
        repository: the store.
        content_id: what it will be registered as, for messages.
        content_type: of the stream.
        data: the document.
        references: name and id of each stream or image that it needs, in order.

    Raises:
        FormatError: it is too large for a document.
        OSError: the store cannot be written to.
    """
    if len(data) > MAX_DOCUMENT_SIZE:
        msg = f"{content_id}: {len(data)} bytes: expected at most {MAX_DOCUMENT_SIZE}"
        raise FormatError(msg)
    with SplitStreamWriter(repository, content_type) as writer:
        for name, digest in references:
            writer.add_named(name, digest)
        # an object whatever its size: composefs-rs reads no other documents
        writer.write_object(repository.objects.put_bytes(data), len(data))
        return writer.finish()
