"""Mount an image in the kernel: EROFS for the metadata, overlayfs above it for the data.

Spec repository 10.1 and 10.2.  EROFS takes the image itself from Linux 6.12 on, before that a
loop device of it.  Overlayfs takes mounts that are attached nowhere from Linux 6.15 on; before
that the EROFS mount lies on a private directory while the overlay is made.  What the kernel
supports is tried, not looked up by its version, because distributions add to old versions.

Needs root of the initial user namespace.  No shared state: any thread may call.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from cfs.erofs.format import CFS_HEADER, CFS_MAGIC
from cfs.errors import FormatError, MountError, MountPointError
from cfs.linux.files import is_on_overlay, owned
from cfs.linux.loop import open_loop_device
from cfs.linux.mounts import (
    MountAttr,
    Option,
    attach_mount,
    create_mount,
    detach_mount,
    map_ids,
)
from cfs.mount import prepare_mountpoint
from cfs.overlaymount import (
    OverlayLayers,
    OverlayVerity,
    empty_layer,
    open_changes,
    overlay_attributes,
    overlay_options,
)

__all__ = ["create_image_mount", "mount_in_kernel"]

_LAYERS = ("lowerdir+", "datadir+")
_TRUSTED: tuple[Option, ...] = (("metacopy", "on"), ("redirect_dir", "on"))


def mount_in_kernel(
    image_fd: int,
    mountpoint: str,
    layers: OverlayLayers,
    *,
    source: bytes,
    namespace_fd: int | None = None,
) -> None:
    """Mount an image on a directory.

    Args:
        image_fd: the image, whose digest was checked as far as it has to be; borrowed.
        mountpoint: existing directory; symlinks are followed.
        layers: objects directories and what lies above the image.
        source: shown in the list of mounts.
        namespace_fd: user namespace that maps the owners of the image, or None.

    Raises:
        FormatError: it is no composefs image.
        MountError: the mount point is none, or the kernel refused; with the kernel's own text.
        OSError: upper or work directory cannot be opened.
    """
    target = prepare_mountpoint(mountpoint)
    with ExitStack() as stack:
        mount = create_image_mount(image_fd, layers, source=source, namespace_fd=namespace_fd)
        owned(stack, mount)
        try:
            attach_mount(mount, target)
        except OSError as error:
            msg = f"cannot mount on {mountpoint}: {error.strerror}"
            raise MountPointError(msg, error.errno or errno.EIO) from None


def create_image_mount(
    image_fd: int, layers: OverlayLayers, *, source: bytes, namespace_fd: int | None = None
) -> int:
    """Make a mount of an image that is attached nowhere yet; return its descriptor.

    Arguments and errors as for :func:`mount_in_kernel`.
    """
    _check_image(image_fd)
    with ExitStack() as stack:
        changes = open_changes(stack, layers)
        if not layers.objects:
            layers = replace(layers, objects=[empty_layer(stack)])
        metadata = owned(stack, _create_erofs(image_fd))
        if namespace_fd is not None:
            map_ids(metadata, namespace_fd)
        options = overlay_options(source, _TRUSTED, layers, changes, metadata)
        return _create_overlay(options, layers, metadata)


def _check_image(fd: int) -> None:
    """Refuse what is no image of ours: the kernel would mount any EROFS."""
    mode = os.fstat(fd).st_mode
    is_readable = stat.S_ISREG(mode) or stat.S_ISBLK(mode)
    header = os.pread(fd, CFS_HEADER.size, 0) if is_readable else b""
    if len(header) < CFS_HEADER.size or CFS_HEADER.unpack(header)[0] != CFS_MAGIC:
        msg = "not a composefs image"
        raise FormatError(msg)


def _create_erofs(image_fd: int) -> int:
    """Mount the metadata, of the file itself or through a loop device.

    Overlayfs counts file systems stacked upon each other.  EROFS upon a file on an overlay would
    be one too many; a loop device ends the count.
    """
    if is_on_overlay(image_fd):
        return _mount_erofs_by_device(image_fd)
    try:
        return _mount_erofs(image_fd)
    except MountError as error:
        # ENOTBLK: no files at all; EINVAL: not files of this file system, or a broken image
        if error.errno not in (errno.ENOTBLK, errno.EINVAL):
            raise
        refused = error
    try:
        return _mount_erofs_by_device(image_fd)
    except MountError:
        if refused.errno == errno.EINVAL:
            raise refused from None
        raise


def _mount_erofs_by_device(image_fd: int) -> int:
    try:
        device = open_loop_device(image_fd)
    except OSError as error:
        msg = f"cannot make a loop device of the image: {error.strerror}"
        raise MountError(msg, error.errno or errno.EIO) from None
    try:
        return _mount_erofs(device)
    finally:
        os.close(device)


def _mount_erofs(fd: int) -> int:
    options: list[Option] = [("source", f"/proc/self/fd/{fd}"), ("ro", None)]
    return create_mount("erofs", options, MountAttr.NONE)


def _create_overlay(options: Sequence[Option], layers: OverlayLayers, metadata: int) -> int:
    optional = {"verity"} if layers.verity is OverlayVerity.TRY else set()
    attributes = overlay_attributes(layers)
    try:
        return create_mount("overlay", options, attributes, optional=optional)
    except MountError as error:
        # EBADF: no descriptors such as these; EINVAL: none at all, none attached nowhere, or
        # another reason, which the second try tells again
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
        refused = error
    try:
        with _attached(metadata):
            return create_mount("overlay", _by_path(options), attributes, optional=optional)
    except OSError:  # no place for it
        raise refused from None


@contextmanager
def _attached(mount_fd: int) -> Iterator[None]:
    """Give a mount a place that only we know while the block runs."""
    import tempfile  # noqa: PLC0415 - new kernels do without

    with tempfile.TemporaryDirectory(prefix="cfs-") as directory:
        place = os.path.realpath(directory)
        attach_mount(mount_fd, place)
        try:
            yield
        finally:
            detach_mount(place)


def _by_path(options: Sequence[Option]) -> list[Option]:
    """Name descriptors by paths, all layers in one option, as every overlayfs takes them."""
    paths: list[Option] = [
        (key, f"/proc/self/fd/{value}" if isinstance(value, int) else value)
        for key, value in options
    ]
    lowers = [str(path) for key, path in paths if key in _LAYERS]
    others = [option for option in paths if option[0] not in _LAYERS]
    return [*others, ("lowerdir", "::".join(lowers))]
