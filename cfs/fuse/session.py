"""Session process: serves one mount (pyfuse3 knows one session per process).

It gets descriptors only, from ``handover``, and opens no path; the mount point is named only to
take the mount down at the end.  Status 0: the mount has ended, or its starter has gone; 1: failed.

With workers the threads of the data plane answer the kernel; pyfuse3, on a socket to them, gets
what is left, and is imported when there is something.  Without, pyfuse3 reads the device itself.
Signals are blocked until the trio loop of :mod:`cfs.fuse.control` takes them, so in the threads
of the data plane they stay blocked for ever.
"""

import importlib
import importlib.util
import os
import resource
import select
import signal
import socket
import threading
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from cfs.errors import MountError, UnsupportedError
from cfs.fuse.handover import MESSAGE_SIZE, SIGNALS, Handover, receive

if TYPE_CHECKING:
    from cfs.fuse.dataplane import DataPlane

__all__ = ["main"]

_RELAY_BUFFER_SIZE = 4 << 20  # a message has to fit; what root may have others get less of


def main(channel_fd: int, user: str, *, has_workers: bool) -> int:
    """Serve until the mount ends; return the exit status.

    Args:
        channel_fd: to the supervisor, or without one to the starter.
        user: in whose name, as :meth:`cfs.fuse.program.User.encode` wrote it.
        has_workers: False: pyfuse3 alone.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with socket.socket(fileno=channel_fd) as channel:
        try:
            _raise_descriptor_limit()
            # what takes its time is loaded while the starter still reads the image
            importlib.import_module("cfs.fuse.standby" if has_workers else "cfs.fuse.control")
            if user:
                _become(user)
            handover = receive(channel)
            if handover is None:
                return 0
            if has_workers:
                _serve_with_workers(handover, channel)
            else:
                _control(handover, channel, handover.devices[0], None)
        except Exception as error:  # noqa: BLE001 - whoever started us prints it
            reason: BaseException = error
            while isinstance(reason, BaseExceptionGroup):
                reason = reason.exceptions[0]
            text = f"{type(reason).__name__}: " if not str(reason) else ""
            with suppress(OSError):
                channel.send(f"failed: {text}{reason}".encode(errors="replace")[:MESSAGE_SIZE])
            return 1
    return 0


def _become(user: str) -> None:
    """Become another user, who may not reach the modules that are needed later."""
    from cfs.fuse.program import User  # noqa: PLC0415 - rarely

    importlib.import_module("cfs.fuse.control")
    whom = User.parse(user)
    assert whom is not None
    whom.become()


def _raise_descriptor_limit() -> None:
    """Take as many descriptors as we may: one for each object that is open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _control(
    handover: Handover, channel: socket.socket, device_fd: int, plane: "DataPlane | None"
) -> None:
    from cfs.fuse.control import run  # noqa: PLC0415 - pyfuse3 and trio take 0.2 s

    run(handover, channel, device_fd, plane)


def _serve_with_workers(handover: Handover, channel: socket.socket) -> None:
    # not if workers=0
    from cfs.fuse.dataplane import DataPlane, read_statistics  # noqa: PLC0415
    from cfs.fuse.standby import wait_for_work  # noqa: PLC0415

    if importlib.util.find_spec("pyfuse3") is None:
        msg = "pyfuse3 is not installed"
        raise UnsupportedError(msg)
    relay, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with relay, control:
        for end in (relay, control):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _RELAY_BUFFER_SIZE)
        plane = DataPlane(
            table=handover.vector,
            state=handover.state,
            relay=relay.fileno(),
            devices=handover.devices,
            objects=handover.objects,
            masked_flags=handover.masked_flags,
            passthrough=handover.passthrough,
            stack_depth=handover.stack_depth,
            verify=handover.verify,
            is_metadata_only=handover.is_metadata_only,
        )
        with closing(plane):
            if handover.is_supervised:
                _name_witness(channel)
            else:
                plane.end_pushes()
            plane.start()
            if _is_serving(plane, channel, handover):
                if not read_statistics(handover.state).can_resend:
                    plane.end_pushes()
                with suppress(BrokenPipeError):
                    channel.send(b"serving")
                needed: Handover | None = handover
                if handover.is_supervised:
                    needed = wait_for_work(plane, channel, control, handover)
                if needed is not None:
                    _control(needed, channel, os.dup(control.fileno()), plane)


def _name_witness(channel: socket.socket) -> None:
    """Tell a thread that never touches the device.

    One that pushes waits, deaf to SIGKILL, for the answer to a request.  If we are killed, only
    another session can give it, and until then our process does not end (spec fuse-data-plane 8).
    """
    witness = threading.Thread(target=threading.Event().wait, daemon=True)
    witness.start()
    with suppress(BrokenPipeError):
        channel.send(f"witness {witness.native_id}".encode())


def _is_serving(plane: "DataPlane", channel: socket.socket, handover: Handover) -> bool:
    """Wait until the data plane serves; False if the mount has ended, or nobody waits for it."""
    from cfs.fuse.dataplane import Event  # noqa: PLC0415 - see above

    poll = select.poll()
    poll.register(plane.event_fd, select.POLLIN)
    poll.register(channel, 0)  # the end of the starter is told unasked
    while True:
        ready = dict(poll.poll())
        if channel.fileno() in ready:
            if handover.device is None:
                return False
            poll.unregister(channel)
        events = plane.events()
        if events & Event.FAILED:
            raise MountError(plane.failure())
        if events & (Event.SERVING | Event.ENDED):
            return not events & Event.ENDED
