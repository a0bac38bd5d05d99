"""Streams by name (spec repository 3.7): register and find."""

from collections.abc import Mapping
from contextlib import ExitStack

from cfs.digest import Digest
from cfs.errors import FormatError, InvalidRequestError, NotFoundError
from cfs.repository.refs import REFS, STREAMS, check_name, object_of_target, read_link, set_link
from cfs.repository.repository import Repository
from cfs.repository.splitstream import SplitStream

__all__ = [
    "find_stream",
    "has_stream",
    "open_stored_stream",
    "open_stream",
    "register_stream",
    "register_streams",
    "stream_of_target",
]

_TOP = STREAMS.encode() + b"/"
_REFS = REFS + b"/"
_PREFIX = b"../"


def register_stream(
    repository: Repository, content_id: str, digest: Digest, name: str | None = None
) -> None:
    """Give a stream that was stored its content identifier, and a name.

    Everything it needs must have been stored before: it is made durable first, so that
    whatever has a name is complete.

    Raises:
        InvalidRequestError: identifier or name cannot be like that.
        ConflictError: something else than a link has the name.
        OSError: syncing or linking failed.
    """
    ref = None if name is None else check_name(name)
    register_streams(repository, {content_id: digest})
    if ref is not None:
        set_link(repository.fd, _TOP + _REFS + ref, _TOP + check_name(content_id))


def register_streams(repository: Repository, streams: Mapping[str, Digest]) -> None:
    """Give several streams their content identifiers, in this order, after one sync.

    Raises:
        As :func:`register_stream`.
    """
    paths = {_check_content_id(content_id): digest for content_id, digest in streams.items()}
    repository.sync()
    for path, digest in paths.items():
        set_link(repository.fd, _TOP + path, b"objects/" + digest.object_path)


def _check_content_id(content_id: str) -> bytes:
    path = check_name(content_id)
    if b"/" in path or path == REFS:
        msg = f"content identifier {content_id!r}: a slash is not allowed, nor is 'refs'"
        raise InvalidRequestError(msg)
    return path


def has_stream(repository: Repository, content_id: str) -> bool:
    """Whether a stream of that content identifier is registered; its object is not looked at.

    Raises:
        FormatError: what has the name does not lead to an object.
    """
    return _find(repository, check_name(content_id)) is not None


def find_stream(repository: Repository, name: str) -> Digest:
    """Return the digest of the object of a stream.

    Args:
        repository: the store.
        name: content identifier, or ``refs/NAME``.

    Raises:
        InvalidRequestError: no name can be like that.
        NotFoundError: there is no such stream.
        FormatError: the name leads to something else than an object.
    """
    path = check_name(name)
    if path.startswith(_REFS):
        target = read_link(repository.fd, _TOP + path)
        path = b"" if target is None else target.rpartition(b"/")[2]
    digest = _find(repository, path) if path else None
    if digest is None:
        msg = f"stream not found: {name}"
        raise NotFoundError(msg)
    return digest


def stream_of_target(target: bytes) -> Digest:
    """Return the digest in the text of a link directly below ``streams``.

    Raises:
        FormatError: it does not lead to an object.
    """
    if not target.startswith(_PREFIX):
        msg = f"stream symlink has incorrect prefix: {target.decode(errors='backslashreplace')!r}"
        raise FormatError(msg)
    return object_of_target(target)


def open_stream(repository: Repository, name: str) -> SplitStream:
    """Open a stream by content identifier or ``refs/NAME``; the object is verified.

    Raises:
        InvalidRequestError: no name can be like that.
        NotFoundError: there is no such stream, or its object is missing.
        FormatError: it is broken, or the name leads to something else.
        IntegrityError: the object is not what its name says.
    """
    return open_stored_stream(repository, find_stream(repository, name))


def open_stored_stream(
    repository: Repository, digest: Digest, *content_types: bytes
) -> SplitStream:
    """Open a stream by the digest of its object, which is verified where the kernel can.

    Args:
        repository: the store.
        digest: of the stream.
        content_types: of which it must have one; none if any will do.

    Raises:
        NotFoundError: its object is missing.
        FormatError: it is broken or has another type.
        IntegrityError: the object is not what its name says.
        OSError: it cannot be read.
    """
    with ExitStack() as stack:
        fd = repository.objects.open_object(digest)
        stream = stack.enter_context(SplitStream(fd, repository.algorithm))
        if content_types:
            stream.require_type(*content_types)
        stack.pop_all()
        return stream


def _find(repository: Repository, path: bytes) -> Digest | None:
    target = read_link(repository.fd, _TOP + path)
    return None if target is None else stream_of_target(target)
