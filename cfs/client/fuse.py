"""Types of FUSE mounts, which both interfaces of composefs share."""

from dataclasses import dataclass
from enum import Enum

from cfs.client.methods import WithDescriptors

__all__ = [
    "FuseLifetime",
    "FuseMode",
    "FuseMount",
    "FuseParams",
    "FuseState",
    "FuseVerify",
    "Served",
]


class FuseMode(Enum):
    """How a FUSE mount is put together."""

    FUSE = "Fuse"
    FUSE_OVERLAY = "FuseOverlay"


class FuseState(Enum):
    """Where a FUSE session is in its life."""

    STARTING = "Starting"
    SERVING = "Serving"
    ENDED = "Ended"
    FAILED = "Failed"

    @property
    def is_final(self) -> bool:
        """Whether nothing follows."""
        return self in (FuseState.ENDED, FuseState.FAILED)


class FuseLifetime(Enum):
    """What closing the connection does to a mount: nothing, or it is unmounted."""

    SERVICE = "Service"
    CONNECTION = "Connection"


class FuseVerify(Enum):
    """When the digests of objects are checked."""

    OFF = "Off"
    OPEN = "Open"
    REQUIRE = "Require"


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseParams:
    """How to serve; the service chooses what is not said.

    Attributes:
        mode: one construction and no other.
        passthrough: let the kernel read objects, or fail.
        workers: threads that answer.
        allow_other: let other users in.
        overlay: two descriptors, upper and work directory, are sent along.
        read_write: make the overlay writable.
        verify: when to check objects.
        lifetime: what closing the connection does.
    """

    mode: FuseMode | None = None
    passthrough: bool | None = None
    workers: int | None = None
    allow_other: bool | None = None
    overlay: bool | None = None
    read_write: bool | None = None
    verify: FuseVerify | None = None
    lifetime: FuseLifetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseMount:
    """A FUSE mount of the service.

    Attributes:
        mount_id: number that the service chose.
        image: as its client named it; empty if it came as a descriptor.
        mountpoint: None for a detached mount.
        mode: how it is put together.
        passthrough: whether the kernel reads objects itself.
        state: of its session.
        owner_uid: user who asked for it.
        server_pid: process that answers.
        started: seconds since the epoch.
        requests: answered so far.
        error: what went wrong, in state ``FAILED``.
    """

    mount_id: int
    image: str
    mountpoint: str | None = None
    mode: FuseMode
    passthrough: bool
    state: FuseState
    owner_uid: int
    server_pid: int
    started: int | None = None
    requests: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served(WithDescriptors):
    """A mount over FUSE.

    Attributes:
        mount: what is known of it.
        fd_index: which descriptor is the detached mount, if it is one.
    """

    mount: FuseMount
    fd_index: int | None = None

    def take_mount(self) -> int:
        """Return the descriptor of the detached mount, for the caller to close.

        Raises:
            InvalidReplyError: it is not detached, or was taken before.
        """
        return self.descriptors.take(-1 if self.fd_index is None else self.fd_index)
