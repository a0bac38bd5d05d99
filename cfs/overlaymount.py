"""Overlays of the kernel over metadata, with layers below that hold only data.

:func:`overlay_options` is what they have in common.  :class:`OverlayMount` is the one over a FUSE
mount that serves metadata only.  FUSE tells names, attributes and where the objects are
(``cfs.fuse.overlay``); overlayfs reads the objects itself, and keeps changes in an upper
directory.  The FUSE mount never appears in the tree: overlayfs holds the only reference, so that
both end together.  Linux 6.16 or later, Documentation/filesystems/overlayfs.rst; spec
fuse-data-plane 11.

Needs privilege over the mount name space: root, or a user name space of one's own.  No shared
state: any thread may call.
"""

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum

from cfs.compat import override
from cfs.errors import MountError, MountPointError
from cfs.linux.files import owned
from cfs.linux.fusedev import open_device
from cfs.linux.mounts import MountAttr, Option, create_mount
from cfs.mount import FuseMount, Place, create_detached, mount_source

__all__ = [
    "OverlayLayers",
    "OverlayMount",
    "OverlayVerity",
    "empty_layer",
    "open_changes",
    "overlay_attributes",
    "overlay_options",
]


_FOREIGN = MountAttr.NOSUID | MountAttr.NODEV


class OverlayVerity(Enum):
    """Whether file data must have the fs-verity digest that the metadata tell."""

    OFF = "off"
    TRY = "try"  # if the kernel can demand it
    REQUIRE = "require"


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayLayers:
    """What lies below and above the metadata.

    Attributes:
        objects: descriptors of the objects directories, searched in this order; borrowed.
        upperdir: directory that gets the changes, or None; needs ``workdir``.
        workdir: empty directory on the same file system.
        read_write: let changes happen; else the mount is read-only, upper directory or not.
        verity: only read objects whose fs-verity digest is the one that the metadata tell.
        attributes: of the mount, besides those that follow from the rest.
    """

    objects: Sequence[int]
    upperdir: str | None = None
    workdir: str | None = None
    read_write: bool = False
    verity: OverlayVerity = OverlayVerity.OFF
    attributes: MountAttr = MountAttr.NONE


def open_changes(stack: ExitStack, layers: OverlayLayers) -> list[tuple[str, int]]:
    """Open upper and work directory, if there are; as options with descriptors of the stack.

    Raises:
        OSError: one of them cannot be opened.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    return [
        (key, owned(stack, os.open(path, flags)))
        for key, path in (("upperdir", layers.upperdir), ("workdir", layers.workdir))
        if path is not None
    ]


def empty_layer(stack: ExitStack) -> int:
    """Return the descriptor of an empty directory of its own file system.

    Without any layer for data, overlayfs cannot even look at a file that has some.

    Raises:
        MountError: no privilege.
    """
    return owned(stack, create_mount("tmpfs", [], MountAttr.RDONLY))


def overlay_options(
    source: bytes,
    own: Sequence[Option],
    layers: OverlayLayers,
    changes: Sequence[Option],
    metadata_fd: int,
) -> list[Option]:
    """Return the options of an overlay; those for the layers come last, as descriptors.

    Args:
        source: shown in the list of mounts.
        own: where the metadata keep what overlayfs obeys.
        layers: with at least one objects directory.
        changes: from :func:`open_changes`.
        metadata_fd: the mount of the metadata.
    """
    options: list[Option] = [("source", source), *own]
    if layers.verity is not OverlayVerity.OFF:
        options.append(("verity", "require"))
    if not layers.read_write:
        options.append(("ro", None))
    options += [*changes, ("lowerdir+", metadata_fd)]
    return options + [("datadir+", fd) for fd in layers.objects]


def overlay_attributes(layers: OverlayLayers) -> MountAttr:
    """Return the attributes of the mount."""
    attributes = layers.attributes
    if not layers.read_write:
        attributes |= MountAttr.RDONLY
    if os.geteuid() != 0:
        attributes |= _FOREIGN
    return attributes


class OverlayMount(FuseMount):
    """A new overlay, over a FUSE file system that nobody serves yet.

    Used as :class:`cfs.mount.FuseMount` is.  Other users are let in as far as the modes of the
    files allow, as by any mount that the kernel makes itself: overlayfs asks FUSE in the name
    of whoever mounted.

    Args:
        place: where; of its owner only whether it is another user's counts.
        name: shown as source, ``composefs:NAME``.
        layers: the other layers.

    Raises:
        MountError: no privilege, or the kernel refused.
        OSError: upper or work directory cannot be opened.
    """

    def __init__(self, place: Place, name: str, layers: OverlayLayers) -> None:
        self._place = place
        if place.owner is not None:
            layers = replace(layers, attributes=layers.attributes | _FOREIGN)
        self._source = mount_source(name)
        self._layers = layers
        with ExitStack() as stack:
            self._changes = open_changes(stack, layers)
            self.device_fd = owned(stack, open_device())
            self._mount_fd = self._create_fuse()
            stack.pop_all()

    def _create_fuse(self) -> int:
        try:
            return create_detached(self.device_fd, self._source, allow_other=False)
        except MountError as error:
            if error.errno != errno.EPERM:
                raise
            msg = f"{error}: an overlay needs root, or a user name space of one's own"
            raise MountError(msg, errno.EPERM) from None

    @override
    def attach(self) -> int:
        """Make the overlay, which asks FUSE at once, and show it; return its device number.

        Raises:
            MountError: overlayfs refused, or the mount point is gone.
        """
        try:
            # overlayfs copies the root's owner and mode, which FUSE knows only when it was asked
            os.fstat(self._mount_fd)
            overlay_fd = self._create_overlay()
        except OSError as error:
            msg = f"cannot mount on {self._place.path}: {error.strerror}"
            raise MountPointError(msg, error.errno or errno.EIO) from None
        except MountError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF):
                raise
            msg = f"{error}; Linux before 6.16 cannot do it at all"
            raise MountError(msg, errno.EINVAL) from None
        os.close(self._mount_fd)  # from now on FUSE lives as long as the overlay
        self._mount_fd = overlay_fd
        return super().attach()

    def _create_overlay(self) -> int:
        layers = self._layers
        with ExitStack() as stack:
            if not layers.objects:
                layers = replace(layers, objects=[empty_layer(stack)])
            own = [("userxattr", None)]
            options = overlay_options(self._source, own, layers, self._changes, self._mount_fd)
            return create_mount("overlay", options, overlay_attributes(layers))

    @override
    def close(self) -> None:
        """Close our descriptors; a mount that was not attached is gone then."""
        for _, fd in self._changes:
            os.close(fd)
        self._changes = []
        super().close()
