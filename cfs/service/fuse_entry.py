"""One FUSE mount of the service, as clients see it (spec cli-and-varlink c.4)."""

import os
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cfs.errors import UnsupportedError
from cfs.fuse.mounts import Mount
from cfs.fuse.options import Mode
from cfs.linux.mountinfo import MountEntry
from cfs.service.rights import trusted_uids

__all__ = ["MODE_NAMES", "FuseEntry", "FuseState"]

MODE_NAMES = {Mode.PLAIN: "Fuse", Mode.OVERLAY: "FuseOverlay"}
"""``FuseMode`` of the IDL."""


class FuseState(Enum):
    """``FuseState`` of the IDL."""

    STARTING = "Starting"
    SERVING = "Serving"
    ENDED = "Ended"
    FAILED = "Failed"

    @property
    def is_final(self) -> bool:
        """Whether nothing follows."""
        return self in (FuseState.ENDED, FuseState.FAILED)


@dataclass(slots=True, kw_only=True)
class FuseEntry:
    """A FUSE mount of the service; changed by :class:`FuseMounts` alone.

    Attributes:
        number: ``mount_id``.
        image: as the client named it.
        owner_uid: of that client.
        mountpoint: where it is attached, or None.
        mode: ``FuseMode`` of the IDL.
        wants_passthrough: the kernel reads objects.
        state: where its life is.
        mount: itself, from state Serving on.
        started: when it became visible, in seconds since the epoch.
        error: why it failed.
        is_ending: we told it to end.
        pidfd: of the supervisor, while that lives; else -1.
        watchers: sockets that get a byte at each change.
        untie: lets it live on when its client goes; None if it does anyway.
        end_time: when it ended, on the monotonic clock.
        lock: guards the descriptors of ``mount``, which its end closes.
    """

    number: int
    image: str
    owner_uid: int
    mountpoint: str | None
    mode: str
    wants_passthrough: bool
    state: FuseState = FuseState.STARTING
    mount: Mount | None = None
    started: int | None = None
    error: str | None = None
    is_ending: bool = False
    pidfd: int = -1
    watchers: list[socket.socket] = field(default_factory=list)
    untie: Callable[[], None] | None = None
    end_time: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def is_mounted_as(self, mounted: MountEntry) -> bool:
        """Whether something in the kernel's list is this mount, at any place.

        The number of a device is soon used again.  We learn late that a mount has gone whose user
        has stopped his session, so for foreign users it takes more than the number: else they had
        us end, or show, mounts of others.
        """
        if self.mount is None or mounted.device != self.mount.device:
            return False
        if self.owner_uid in trusted_uids():
            return True
        if mounted.fstype == b"overlay":  # tells no owner: only where he had it made
            return mounted.mountpoint == os.fsencode(self.mount.mountpoint)
        owner = b"user_id=%d" % self.owner_uid
        return mounted.fstype.startswith(b"fuse.") and owner in mounted.options.split(b",")

    def find_place(self, mounts: Iterable[MountEntry]) -> str | None:
        """Return where it is, as JSON can hold it; others may have moved it, or attached it."""
        found = [mounted.mountpoint for mounted in mounts if self.is_mounted_as(mounted)]
        if not found or (self.mountpoint and os.fsencode(self.mountpoint) in found):
            return self.mountpoint if found else None
        return found[0].decode(errors="replace")

    def describe(self) -> dict[str, Any]:
        """Return it as ``FuseMount`` of the IDL."""
        requests, passthrough = None, self.wants_passthrough
        if self.mount is not None:
            with suppress(UnsupportedError, OSError), self.lock:
                statistics = self.mount.statistics()
                requests = sum(statistics.requests.values())
                passthrough = statistics.use_passthrough
        return {
            "mount_id": self.number,
            "image": self.image,
            "mountpoint": self.mountpoint,
            "mode": self.mode,
            "passthrough": passthrough,
            "state": self.state.value,
            "owner_uid": self.owner_uid,
            "server_pid": 0 if self.mount is None else self.mount.pid,
            "started": self.started,
            "requests": requests,
            "error": self.error,
        }
