"""A session before it needs pyfuse3, which is for most of them always.

Nearly everything that programs do with a mount the workers answer.  So pyfuse3 and trio, 0.15 s and
13 MB for each mount, are loaded only when something comes that is theirs to handle; it waits for
them in a socket.  Runs in the session process, with signals blocked.
"""

import select
import socket
from typing import TYPE_CHECKING

from cfs.errors import MountError
from cfs.fuse.dataplane import Event, read_statistics
from cfs.fuse.handover import MESSAGE_SIZE, Handover
from cfs.fuse.unservable import ServeError, format_line, print_line

if TYPE_CHECKING:
    from cfs.fuse.dataplane import DataPlane

__all__ = ["has_ended", "wait_for_work"]

_MOUNTED = b"mounted "


def wait_for_work(
    plane: "DataPlane", channel: socket.socket, relay: socket.socket, handover: Handover
) -> Handover | None:
    """Wait until pyfuse3 is needed: for a request, or because the supervisor has gone.

    Args:
        plane: serves.
        channel: to the supervisor; nothing but its word that the mount is visible is read.
        relay: pyfuse3's end; nothing is read.
        handover: settings.

    Returns:
        The settings, with the device number if the supervisor told it; None: the mount has ended.

    Raises:
        MountError: the data plane failed.
    """
    with select.epoll() as epoll:
        epoll.register(plane.event_fd, select.EPOLLIN)
        epoll.register(channel, select.EPOLLIN)
        # the plane's own INIT lies there from the start, so only what comes after it tells us
        epoll.register(relay, select.EPOLLIN | select.EPOLLET)
        while not has_ended(plane):
            if read_statistics(handover.state).counters["relayed"]:
                return handover
            ready = {fd for fd, _ in epoll.poll()}
            if channel.fileno() in ready:
                if not _next_word(channel).startswith(_MOUNTED):
                    plane.end_pushes()  # at once: nobody follows us now
                    return handover
                device = int(channel.recv(MESSAGE_SIZE).removeprefix(_MOUNTED))
                handover = handover._replace(device=device)
    return None


def _next_word(channel: socket.socket) -> bytes:
    """Return what will be received next, empty if nothing ever will."""
    try:
        return channel.recv(MESSAGE_SIZE, socket.MSG_PEEK)
    except ConnectionResetError:  # the supervisor went without having heard us
        return b""


def has_ended(plane: "DataPlane") -> bool:
    """Print what the data plane logs; return whether the mount has ended.

    Raises:
        MountError: the data plane failed.
    """
    events = plane.events()
    for entry in plane.log_entries():
        error = ServeError(entry.reason.name, entry.object, entry.error, entry.value)
        print_line(format_line(entry.nid, error))
    if events & Event.FAILED:
        raise MountError(plane.failure())
    return bool(events & Event.ENDED)
