"""Hand a process of a mount what it serves, and talk to it.

Supervisor and session are started before it is known what they serve; they get that later in one
message over a ``SOCK_SEQPACKET`` pair: settings as JSON, descriptors beside them.

After that the starter says ``mounted DEVICE`` when the mount is visible, ``stay`` if it may
outlive its starter, ``end`` to end at once, whoever uses the mount.  The process says ``serving``
or ``failed: why``, and at last ``ended`` if it is a supervisor and all went well.  A session says
``witness TID`` to its supervisor before that: a thread that ends when the session is killed, even
if another one is stuck in the kernel.
"""

import json
import signal
import socket
from collections.abc import Sequence
from typing import NamedTuple

from cfs.linux.sockets import receive_fds
from cfs.linux.traces import Trace

__all__ = ["MESSAGE_SIZE", "SIGNALS", "Handover", "channel_pair", "last_word", "receive", "send"]

MESSAGE_SIZE = 1024
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # end; print the statistics
_SETTINGS_SIZE = 64 * 1024
_MAX_FDS = 250  # in one message; the kernel takes 253
_DESCRIPTORS = ("vector", "state", "devices", "objects", "traces")


class Handover(NamedTuple):
    """What supervisor and session get.

    Attributes:
        vector: sealed memfd of the inode vector.
        state: memfd of what survives sessions.
        devices: the mount's FUSE device and its clones, one for each worker; with
            ``workers=0`` one alone.
        objects: objects directories, searched in this order.
        traces: what others see while the mount is served; the names are removed at the end.
        mountpoint: without symlinks, named only to take the mount down.
        device: device number of the mount, None before it is visible.
        grace: seconds for those who use the mount when it is told to end.
        has_workers: False: pyfuse3 alone.
        is_metadata_only: an overlay above reads the objects.
        passthrough: ``cfs.fuse.options.Passthrough``.
        stack_depth: with passthrough 1, or 2 if objects lie on a stacked file system.
        verify: ``cfs.fuse.options.Verify``.
        masked_flags: INIT flags not to use.
        is_supervised: if the session dies, another one follows; and only the supervisor takes the
            mount down, while it lives.
    """

    vector: int
    state: int
    devices: Sequence[int]
    objects: Sequence[int]
    traces: Sequence[Trace]
    mountpoint: str
    grace: float
    has_workers: bool
    is_metadata_only: bool
    passthrough: int
    stack_depth: int
    verify: int
    masked_flags: int
    device: int | None = None
    is_supervised: bool = False


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a new channel."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def last_word(channel: socket.socket) -> str:
    """Return what the process has said since it serves, at most one message, and leave it there.

    Empty if there is nothing.
    """
    try:
        flags = socket.MSG_DONTWAIT | socket.MSG_PEEK
        return channel.recv(MESSAGE_SIZE, flags).decode(errors="replace")
    except OSError:
        return ""


def send(channel: socket.socket, handover: Handover) -> None:
    """Send settings and descriptors, which stay the caller's.

    Raises:
        OSError: the process has gone.
    """
    fds = [handover.vector, handover.state, *handover.devices, *handover.objects]
    fds += [trace.fd for trace in handover.traces]
    settings = handover._asdict()
    for name in _DESCRIPTORS:
        del settings[name]
    counts = [len(handover.devices), len(handover.objects)]
    names = [trace.name for trace in handover.traces]
    message = json.dumps([counts, names, settings]).encode()
    socket.send_fds(channel, [message], fds[:_MAX_FDS])
    for start in range(_MAX_FDS, len(fds), _MAX_FDS):
        socket.send_fds(channel, [b"more"], fds[start : start + _MAX_FDS])


def receive(channel: socket.socket) -> Handover | None:
    """Wait for settings and descriptors, owned by this process from now on; None: no starter."""
    message, fds = receive_fds(channel, _SETTINGS_SIZE, _MAX_FDS)
    if not message:
        return None
    (nr_devices, nr_objects), names, settings = json.loads(message)
    while len(fds) < 2 + nr_devices + nr_objects + len(names):
        _, more = receive_fds(channel, MESSAGE_SIZE, _MAX_FDS)
        if not more:
            return None
        fds += more
    vector, state, *others = fds
    return Handover(
        vector=vector, state=state, devices=others[:nr_devices],
        objects=others[nr_devices : nr_devices + nr_objects],
        traces=list(map(Trace, others[nr_devices + nr_objects :], names)), **settings,
    )  # fmt: skip
