"""Layers from store to store: the methods of ``org.composefs.Oci`` (spec b.6, b.7)."""

import errno
import io
import os
import select
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cfs.compat import override
from cfs.digest import Digest
from cfs.errors import FormatError, InvalidRequestError
from cfs.objectdir import Method
from cfs.oci.finalize import finalize_image
from cfs.oci.layers import Statistics, find_sound_layer
from cfs.oci.reference import parse_digest
from cfs.oci.splitdir import File, read_chunks
from cfs.oci.transfer import LayerMismatchError, receive_layer
from cfs.repository.splitstream_format import ContentType
from cfs.service.errors import MethodError
from cfs.service.layer_sender import PATIENCE, LayerSenders

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import BinaryIO

    from _typeshed import WriteableBuffer

    from cfs.digest import Algorithm
    from cfs.repository.repository import Repository
    from cfs.service.call import Call
    from cfs.service.handles import Handles

__all__ = ["LayerMethods"]

_MIN_FDS = 2  # the stream and a directory
_PIPE_SIZE = 1 << 16
_COUNTED = (Method.REFLINKED, Method.HARDLINKED, Method.COPIED, Method.PRESENT)


class LayerMethods:
    """The methods; what is being sent ends with :meth:`stop_sending`."""

    def __init__(self, handles: "Handles") -> None:
        """Share the handles with the other interfaces; nothing is being sent."""
        self._handles = handles
        self._senders = LayerSenders()

    def stop_sending(self) -> None:
        """Break off all layers that are being sent, and wait for their threads."""
        self._senders.close()

    def HasLayer(self, call: "Call", *, handle: int, diff_id: str) -> dict[str, Any]:
        """Tell whether a layer is there and complete."""
        _checked_digest(diff_id)
        with self._handles.get(call, handle) as repository:
            stream = find_sound_layer(repository, diff_id, ContentType.LAYER, ContentType.BLOB)
        return {"present": stream is not None, "layer_verity": stream and str(stream)}

    def GetLayer(self, call: "Call", *, handle: int, params: dict[str, Any]) -> dict[str, Any]:
        """Send a layer; few descriptors are needed, so one reply has room for all."""
        if params["diff_id"] is None:
            message = "diff_id is missing: this service has no containers-storage"
            raise MethodError("InvalidRequest", message=message)
        diff_id = _checked_digest(params["diff_id"])
        fds = self._senders.start(call.peer.uid, lambda: self._handles.get(call, handle), diff_id)
        call.reply_fds(fds)
        return {"dir_count": len(fds) - 2}  # without the stream, and the sign of its end

    def PutLayer(
        self, call: "Call", *, handle: int, diff_id: str, zerocopy: bool
    ) -> dict[str, Any]:
        """Receive a layer; a client that leaves ends it."""
        if len(call.fds) < _MIN_FDS:
            message = (
                f"expected a stream and at least one directory, got {len(call.fds)} descriptors"
            )
            raise MethodError("InvalidRequest", message=message)
        _checked_digest(diff_id)
        with self._handles.get(call, handle) as repository, ExitStack() as stack:
            fds = call.take()
            for fd in fds[1:]:
                stack.callback(os.close, fd)
            stream = stack.enter_context(io.BufferedReader(_Incoming(fds[0], call), _PIPE_SIZE))
            return _receive(repository, diff_id, stream, fds[1:], zerocopy=zerocopy)

    def FinalizeImage(
        self,
        call: "Call",
        *,
        handle: int,
        manifest_json: str,
        config_json: str,
        layers: list[dict[str, Any]],
        name: str | None,
    ) -> dict[str, Any]:
        """Complete an image whose layers are there."""
        with self._handles.get(call, handle) as repository:
            streams = [_parse_layer(layer, repository.algorithm) for layer in layers]
            stored = finalize_image(
                repository, manifest_json.encode(), config_json.encode(), streams, name
            )
        return {
            "manifest_digest": stored.manifest_digest,
            "manifest_verity": str(stored.manifest_stream),
            "config_digest": stored.config_digest,
            "config_verity": str(stored.config_stream),
        }


def _checked_digest(text: str) -> str:
    """Return a digest as it is.

    Raises:
        MethodError: ``InvalidDigest``: it is none.
    """
    try:
        return parse_digest(text)
    except InvalidRequestError as error:
        raise MethodError("InvalidDigest", message=str(error)) from None


def _parse_layer(layer: "Mapping[str, Any]", algorithm: "Algorithm") -> tuple[str, Digest]:
    diff_id = _checked_digest(layer["diff_id"])
    try:
        stream = Digest.parse(layer["layer_verity"])
    except FormatError as error:
        raise MethodError("InvalidDigest", message=f"layer_verity: {error}") from None
    if stream.algorithm is not algorithm:
        message = f"layer_verity {stream}: expected {algorithm.digest_size * 2} hex digits"
        raise MethodError("InvalidDigest", message=message)
    return diff_id, stream


def _receive(
    repository: "Repository",
    diff_id: str,
    stream: "BinaryIO",
    directories: "Sequence[int]",
    *,
    zerocopy: bool,
) -> dict[str, Any]:
    """Store a layer, or read what is there already to its end: the sender waits for that."""
    repository.check_writable()
    present = find_sound_layer(repository, diff_id, ContentType.LAYER, ContentType.BLOB)
    statistics = Statistics()
    if present is None:
        try:
            imported = receive_layer(
                repository, diff_id, read_chunks(stream), directories, zerocopy=zerocopy
            )
        except LayerMismatchError as error:
            raise MethodError(
                "DiffIdMismatch", expected=error.expected, actual=error.found
            ) from None
        verity, statistics = imported.stream, imported.statistics
    else:
        verity = present
        for chunk in read_chunks(stream):
            if isinstance(chunk, File):
                statistics.count(Method.PRESENT, chunk.size)
    counts = {_member(method): statistics.counts[method] for method in _COUNTED}
    return {"layer_verity": str(verity), "already_present": present is not None, **counts}


def _member(method: Method) -> str:
    return "objects_" + method.value.replace(" ", "_")


class _Incoming(io.RawIOBase):
    """What a client writes, until he leaves; owns the descriptor."""

    def __init__(self, fd: int, call: "Call") -> None:
        self._fd = fd
        self._client = call.fileno()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(self._client, 0)  # its end is always told

    @override
    def readable(self) -> bool:
        """Yes."""
        return True

    @override
    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Read some bytes; 0 at the end.

        Raises:
            ConnectionResetError: the client has left.
            TimeoutError: he writes nothing.  Of a pipe that is his own connection, which we hold
                open, nothing else would tell that he left.
            OSError: reading failed.
        """
        while True:
            ready = dict(self._poll.poll(PATIENCE * 1000))
            if not ready:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            if self._client in ready:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            try:
                return os.readv(self._fd, [buffer])
            except BlockingIOError:  # somebody else reads from it as well
                continue

    @override
    def close(self) -> None:
        """Close the descriptor."""
        if not self.closed:
            os.close(self._fd)
        super().close()
