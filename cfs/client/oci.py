"""Methods of ``org.composefs.Oci``; the interface file tells what they do.

A method is a class, and its fields are the parameters.
"""

from dataclasses import dataclass, field
from enum import Enum

from cfs.client.fuse import FuseParams, Served
from cfs.client.methods import Nothing, OciMethod, Result
from cfs.client.repository import FsckReply, Mounted, MountParams

__all__ = [
    "Check",
    "Checked",
    "Completed",
    "ComputeId",
    "ComputedId",
    "Done",
    "Features",
    "GetInfo",
    "ImageEntry",
    "Images",
    "Inspect",
    "Inspected",
    "ListImages",
    "OciFuseMount",
    "OciMount",
    "Progress",
    "ProgressUnit",
    "Pull",
    "PullReply",
    "Skipped",
    "Started",
    "Tag",
    "Untag",
    "XattrFiltering",
]


class XattrFiltering(Enum):
    """Which extended attributes survive the conversion of an image."""

    ALLOWLIST_ONLY = "AllowlistOnly"
    KEEP_USER_XATTRS = "KeepUserXattrs"


class ProgressUnit(Enum):
    """What numbers of progress count."""

    BYTES = "Bytes"
    ITEMS = "Items"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEntry:
    """A tagged image; ``architecture`` and ``os`` are empty for artifacts."""

    name: str
    manifest_digest: str
    is_container: bool
    architecture: str
    os: str
    created: str | None = None
    layer_count: int
    referrer_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Images(Result):
    """Reply of :class:`ListImages`."""

    images: list[ImageEntry]


@dataclass(frozen=True, slots=True)
class ListImages(OciMethod[Images]):
    """List the tagged images, or those whose names contain ``filter``."""

    handle: int
    filter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked(Result):
    """Reply of :class:`Check`."""

    ok: bool
    images_checked: int
    images_corrupted: int
    errors: list[str]
    repo: FsckReply


@dataclass(frozen=True, slots=True)
class Check(OciMethod[Checked]):
    """Check a store and its tagged images, or the one with the tag ``image``."""

    handle: int
    image: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected(Result):
    """Reply of :class:`Inspect`: the documents as text, and ids of what was made of them."""

    manifest: str
    config: str
    referrers: list[str]
    composefs_erofs: str | None = None
    composefs_boot_erofs: str | None = None


@dataclass(frozen=True, slots=True)
class Inspect(OciMethod[Inspected]):
    """Ask for what the store has of an image: a tag, or @DIGEST of a manifest."""

    handle: int
    image: str


@dataclass(frozen=True, slots=True)
class Tag(OciMethod[Nothing]):
    """Give the image whose manifest has this digest a name."""

    handle: int
    manifest_digest: str
    name: str


@dataclass(frozen=True, slots=True)
class Untag(OciMethod[Nothing]):
    """Remove a name."""

    handle: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedId(Result):
    """Reply of :class:`ComputeId`: a bare digest."""

    image_id: str


@dataclass(frozen=True, slots=True)
class ComputeId(OciMethod[ComputedId]):
    """Ask for the digest of an image's file system: a tag, or @DIGEST of a config."""

    handle: int
    image: str
    verity: str | None = None
    bootable: bool = False
    xattrs: XattrFiltering | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The transfer of a layer begins."""

    id: str
    total: int | None = None
    unit: ProgressUnit


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The transfer of a layer goes on."""

    id: str
    fetched: int
    total: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A layer was there already."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A layer is complete."""

    id: str
    transferred: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """What a pull has stored; ``stats`` is meant for people."""

    manifest_digest: str
    config_digest: str
    manifest_verity: str
    config_verity: str
    stats: str
    boot_image: str | None = None
    boot_image_mode: str | None = None
    boot_image_format_version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReply(Result):
    """Reply of :class:`Pull`: exactly one of these; ``completed`` is the last."""

    started: Started | None = None
    progress: Progress | None = None
    skipped: Skipped | None = None
    done: Done | None = None
    message: str | None = None
    completed: Completed | None = None


@dataclass(frozen=True, slots=True)
class Pull(OciMethod[PullReply]):
    """Fetch an image; as a stream, with its progress."""

    handle: int
    image: str
    name: str | None = None
    local_fetch: str = "disabled"
    storage_root: str | None = None
    bootable: bool = False
    xattrs: XattrFiltering | None = None
    expected_digest: str | None = None


@dataclass(frozen=True, slots=True)
class OciMount(OciMethod[Mounted]):
    """Have the kernel mount an image, a tag or the digest of a manifest."""

    handle: int
    image: str
    bootable: bool = False
    options: MountParams = field(default_factory=MountParams)


@dataclass(frozen=True, slots=True)
class OciFuseMount(OciMethod[Served]):
    """Serve an image over FUSE; ``fds``: upper and work directory for an overlay."""

    handle: int
    image: str
    mountpoint: str | None = None
    bootable: bool = False
    wait: bool = False
    options: FuseParams | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Features(Result):
    """Reply of :class:`GetInfo`."""

    features: list[str]


@dataclass(frozen=True, slots=True)
class GetInfo(OciMethod[Features]):
    """Ask for the optional abilities of the service."""
