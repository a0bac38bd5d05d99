"""Methods of ``org.composefs.Repository``; the interface file tells what they do.

A method is a class, and its fields are the parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from cfs.client.fuse import FuseMount, FuseParams, Served
from cfs.client.methods import Nothing, RepositoryMethod, Result, WithDescriptors

__all__ = [
    "CloseRepository",
    "Collected",
    "EnsureRepository",
    "EnsureStatus",
    "Ensured",
    "Fsck",
    "FsckReply",
    "FuseServe",
    "Gc",
    "GcResult",
    "ImageObjects",
    "ImageRefEntry",
    "ImageRefs",
    "InitRepository",
    "Initialized",
    "ListImageRefs",
    "ListMounts",
    "Mount",
    "MountParams",
    "Mounted",
    "Mounts",
    "Objects",
    "OpenRepository",
    "Opened",
    "Unmount",
    "WatchMount",
    "Watched",
]


class EnsureStatus(Enum):
    """What was found or done."""

    OPENED = "Opened"
    CREATED = "Created"
    UPGRADED = "Upgraded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialized(Result):
    """Reply of :class:`InitRepository`."""

    created: bool


@dataclass(frozen=True, slots=True)
class InitRepository(RepositoryMethod[Initialized]):
    """Make a store."""

    path: str
    algorithm: str | None = None
    insecure: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensured(Result):
    """Reply of :class:`EnsureRepository`."""

    status: EnsureStatus


@dataclass(frozen=True, slots=True)
class EnsureRepository(RepositoryMethod[Ensured]):
    """Make a store unless there is one of the same hash."""

    path: str
    algorithm: str | None = None
    insecure: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Result):
    """An open store.

    Attributes:
        handle: for the other methods; give it back with :class:`CloseRepository`.
        hash_algorithm: ``sha256`` or ``sha512``.
        objects_device_id: device number of the objects directory.
    """

    handle: int
    hash_algorithm: str | None = None
    objects_device_id: int | None = None


@dataclass(frozen=True, slots=True)
class OpenRepository(RepositoryMethod[Opened]):
    """Open a store, by exactly one of its fields."""

    path: str | None = None
    user: bool | None = None
    system: bool | None = None


@dataclass(frozen=True, slots=True)
class CloseRepository(RepositoryMethod[Nothing]):
    """Give a handle back."""

    handle: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FsckReply(Result):
    """What a check of a store has found; a line of ``errors`` for each finding."""

    ok: bool
    has_metadata: bool
    objects_checked: int
    objects_corrupted: int
    streams_checked: int
    streams_corrupted: int
    images_checked: int
    images_corrupted: int
    broken_links: int
    missing_objects: int
    errors: list[str]


@dataclass(frozen=True, slots=True)
class Fsck(RepositoryMethod[FsckReply]):
    """Check a store."""

    handle: int
    metadata_only: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GcResult:
    """What a collection removed; ``objects_bytes`` is the size of the objects."""

    objects_removed: int
    objects_bytes: int
    images_pruned: int
    streams_pruned: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected(Result):
    """Reply of :class:`Gc`."""

    result: GcResult
    dry_run: bool


@dataclass(frozen=True, slots=True)
class Gc(RepositoryMethod[Collected]):
    """Remove what neither a name nor one of ``roots`` needs."""

    handle: int
    dry_run: bool = False
    roots: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects(Result):
    """Reply of :class:`ImageObjects`: ``ALGORITHM:HEX``, sorted."""

    object_ids: list[str]


@dataclass(frozen=True, slots=True)
class ImageObjects(RepositoryMethod[Objects]):
    """Ask which objects an image needs."""

    handle: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRefEntry:
    """A named image; ``digest`` is bare."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRefs(Result):
    """Reply of :class:`ListImageRefs`."""

    images: list[ImageRefEntry]


@dataclass(frozen=True, slots=True)
class ListImageRefs(RepositoryMethod[ImageRefs]):
    """List the named images."""

    handle: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MountParams:
    """How the kernel shall mount.

    Attributes:
        overlay: two descriptors, upper and work directory, are sent along.
        read_write: make the overlay writable.
    """

    overlay: bool | None = None
    read_write: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounted(WithDescriptors):
    """A mount that is attached nowhere yet; it ends with its descriptor."""

    fd_index: int

    def take_mount(self) -> int:
        """Return its descriptor, for the caller to close.

        Raises:
            InvalidReplyError: there is none, or it was taken before.
        """
        return self.descriptors.take(self.fd_index)


@dataclass(frozen=True, slots=True)
class Mount(RepositoryMethod[Mounted]):
    """Have the kernel mount an image."""

    handle: int
    name: str
    options: MountParams = MountParams()


@dataclass(frozen=True, slots=True)
class FuseServe(RepositoryMethod[Served]):
    """Serve an image over FUSE.

    ``fds``: the image file if ``image`` is None, then upper and work directory for an overlay.
    """

    handle: int
    image: str | None = None
    mountpoint: str | None = None
    wait: bool = False
    options: FuseParams | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mounts(Result):
    """Reply of :class:`ListMounts`."""

    mounts: list[FuseMount]


@dataclass(frozen=True, slots=True)
class ListMounts(RepositoryMethod[Mounts]):
    """List our FUSE mounts, as root those of all users; or one of them."""

    mount_id: int | None = None


@dataclass(frozen=True, slots=True)
class Unmount(RepositoryMethod[Nothing]):
    """End a FUSE mount; with ``detach`` although it is in use."""

    mount_id: int
    detach: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched(Result):
    """Reply of :class:`WatchMount`."""

    mount: FuseMount


@dataclass(frozen=True, slots=True)
class WatchMount(RepositoryMethod[Watched]):
    """Ask for the state of a mount; as a stream, for each change until its end."""

    mount_id: int
