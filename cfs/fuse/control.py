"""The control plane: pyfuse3 in a trio loop, in the main thread of a session process.

It answers the FUSE device itself, or what the data plane leaves over.  Beside that it listens to
the starter, to signals and to the data plane.  All state belongs to the loop; only reads that
wait for a disk, and unmounting, use other threads.
"""

import logging
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING

import pyfuse3
import trio

from cfs.errors import MountError
from cfs.fuse.choices import Verify
from cfs.fuse.handover import MESSAGE_SIZE, SIGNALS, Handover
from cfs.fuse.operations import VectorOperations
from cfs.fuse.shared import attach
from cfs.linux.traces import remove_traces
from cfs.mount import detach

if TYPE_CHECKING:
    from cfs.fuse.dataplane import DataPlane

__all__ = ["run"]

_log = logging.getLogger(__name__)


def run(
    handover: Handover, channel: socket.socket, device_fd: int, plane: "DataPlane | None"
) -> None:
    """Serve until the mount ends.

    Args:
        handover: settings.
        channel: to the starter.
        device_fd: the FUSE device, or a socket to the data plane; owned by pyfuse3 from now on.
        plane: the data plane, which serves already, or None.

    Raises:
        OSError: pyfuse3 failed.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    trio.run(_Control(handover, plane).serve, channel, device_fd)


class _Control:
    """What the tasks of the loop share.

    While ``_is_supervised``, taking the mount down, with its traces, is the business of the
    supervisor.
    """

    def __init__(self, handover: Handover, plane: "DataPlane | None") -> None:
        self._handover = handover
        self._plane = plane
        self._ready = trio.Event()
        self._settled = trio.Event()  # the mount is visible, or never will be
        self._device = handover.device
        self._is_supervised = handover.is_supervised
        # nobody could find a session without workers that outlived its supervisor
        self._may_stay = handover.is_supervised and handover.has_workers
        if self._device is not None:
            self._settled.set()

    async def serve(self, channel: socket.socket, device_fd: int) -> None:
        handover = self._handover
        vector, verify = attach(handover.vector), Verify(handover.verify)
        operations = VectorOperations(vector, handover.objects, self._ready, verify=verify)
        # libfuse adopts an open descriptor; the mount options are the starter's
        pyfuse3.init(operations, f"/dev/fd/{device_fd}", set())
        try:
            with trio.open_signal_receiver(*SIGNALS) as signals:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._talk, trio.socket.from_stdlib_socket(channel))
                    nursery.start_soon(self._obey, signals)
                    if self._plane is not None:
                        nursery.start_soon(self._watch, self._plane)
                    await pyfuse3.main()
                    nursery.cancel_scope.cancel()
                # trio sends what nobody has obeyed again, which would kill us before we are done
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        finally:
            pyfuse3.close(unmount=False)
            if not self._is_supervised:
                remove_traces(handover.traces)

    async def _talk(self, channel: trio.socket.SocketType) -> None:
        """Say when the mount serves; end it when the starter goes without a word."""
        with suppress(BrokenPipeError, ConnectionResetError):
            if self._plane is None:
                await self._ready.wait()
                await channel.send(b"serving")
            while message := await channel.recv(MESSAGE_SIZE):
                if message.startswith(b"mounted "):
                    self._device = int(message.split()[1])
                    self._settled.set()
                self._may_stay |= message == b"stay"
                if message == b"end":
                    pyfuse3.terminate()
        self._is_supervised = False
        if self._plane is not None:
            self._plane.end_pushes()
        self._settled.set()
        if not self._may_stay:
            await self._end()

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        """Do what signals say; a supervisor gets them itself."""
        async for number in signals:
            if self._is_supervised:
                continue
            if number != signal.SIGUSR1:
                await self._settled.wait()
                await self._end()
            elif self._plane is not None:
                from cfs.fuse.statistics import describe_state  # noqa: PLC0415 - rarely

                _log.warning("%s", describe_state(self._handover.state))

    async def _end(self) -> None:
        """Take the mount down; after the grace period end, which aborts what still uses it."""
        if self._device is not None:
            try:
                mountpoint = self._handover.mountpoint
                await trio.to_thread.run_sync(detach, mountpoint, self._device)
            except MountError as error:
                _log.warning("session: %s", error)
            await trio.sleep(self._handover.grace)  # cancelled when the last user has gone
        pyfuse3.terminate()

    async def _watch(self, plane: "DataPlane") -> None:
        """Print what the data plane logs; end with it.

        A socket cannot tell pyfuse3 that the mount has ended (spec fuse-data-plane 1).
        """
        from cfs.fuse.standby import has_ended  # noqa: PLC0415 - workers=0 needs no extension

        while not has_ended(plane):
            await trio.lowlevel.wait_readable(plane.event_fd)
        pyfuse3.terminate()
