"""Main of a session process: ``python -m cfs.fuse.session SETTINGS``.

One process serves one mount (pyfuse3 knows one session per process).  It is started with exec,
by ``supervisor``, and gets descriptors only: the vector's memfd, the objects directories, the
FUSE device, a socket to its starter.  SETTINGS is JSON with their numbers.  It opens no path;
the mount point is named only to take the mount down at the end.

Over the socket (``SOCK_SEQPACKET``) it says ``serving`` or ``failed: why``; its starter says
``mounted DEVICE`` when the mount is visible, ``stay`` if it may outlive its starter, ``end`` to
end at once, whoever uses the mount.
Status 0: unmounted, told to end, or the starter has gone; 1: failed.

One trio loop, one thread; only reads that wait for a disk, and unmounting, use others.
"""

import json
import logging
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pyfuse3
import trio

from cfs.errors import MountError
from cfs.fuse.operations import VectorOperations
from cfs.fuse.shared import attach
from cfs.inodes import InodeVector
from cfs.mount import detach

__all__ = ["main"]

_log = logging.getLogger(__name__)
_MESSAGE_SIZE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What the starter gives: numbers of descriptors, and where the mount is."""

    vector: int
    device: int
    objects: list[int]
    status: int
    mountpoint: str
    grace: float


@dataclass(slots=True)
class _State:
    """What the tasks of the loop share."""

    ready: trio.Event
    device: int | None = None
    may_stay: bool = False


def main() -> int:
    """Serve until the mount ends; return the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = _Settings(**json.loads(sys.argv[1]))
    status = socket.socket(fileno=settings.status)
    try:
        _raise_descriptor_limit()
        vector = attach(settings.vector)
        trio.run(_serve, settings, status, vector)
    except Exception as error:  # noqa: BLE001 - the starter prints it
        reason: BaseException = error
        while isinstance(reason, BaseExceptionGroup):
            reason = reason.exceptions[0]
        _log.error("session: %s", reason)
        with status:
            status.send(f"failed: {reason}".encode(errors="replace")[:_MESSAGE_SIZE])
        return 1
    return 0


def _raise_descriptor_limit() -> None:
    """Take as many descriptors as we may: one for each object that is open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(settings: _Settings, status: socket.socket, vector: InodeVector) -> None:
    state = _State(trio.Event())
    operations = VectorOperations(vector, settings.objects, state.ready)
    # libfuse adopts an open descriptor; the mount options are the starter's
    pyfuse3.init(operations, f"/dev/fd/{settings.device}", set())
    try:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                channel = trio.socket.from_stdlib_socket(status)
                nursery.start_soon(_talk_to_starter, settings, state, channel)
                nursery.start_soon(_end_on_signal, settings, state, signals)
                await pyfuse3.main()
                nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)


async def _talk_to_starter(
    settings: _Settings, state: _State, channel: trio.socket.SocketType
) -> None:
    """Say when the mount serves; end it when the starter goes without a word."""
    await state.ready.wait()
    try:
        await channel.send(b"serving")
        while message := await channel.recv(_MESSAGE_SIZE):
            if message.startswith(b"mounted "):
                state.device = int(message.split()[1])
            state.may_stay |= message == b"stay"
            if message == b"end":
                pyfuse3.terminate()
    except OSError as error:
        _log.debug("starter: %s", error)
    if not state.may_stay:
        await _end(settings, state)


async def _end_on_signal(settings: _Settings, state: _State, signals: AsyncIterator[int]) -> None:
    async for _ in signals:
        await _end(settings, state)


async def _end(settings: _Settings, state: _State) -> None:
    """Take the mount down; after the grace period end, which aborts what still uses it."""
    if state.device is not None:
        try:
            await trio.to_thread.run_sync(detach, settings.mountpoint, state.device)
        except MountError as error:
            _log.warning("session: %s", error)
        await trio.sleep(settings.grace)  # cancelled when the last user has gone
    pyfuse3.terminate()


if __name__ == "__main__":
    sys.exit(main())
