"""Mount an image of a store: the use case of ``cfsctl mount`` and of the service."""

from typing import TYPE_CHECKING

from cfs.fuse.options import Verify
from cfs.mount import mount_source
from cfs.mounting.choice import MountRequest, choose
from cfs.overlaymount import OverlayLayers, OverlayVerity

if TYPE_CHECKING:
    from cfs.fuse import Mount
    from cfs.repository.repository import Repository

__all__ = ["create_stored_mount", "mount_image"]


def mount_image(
    repository: "Repository",
    name: str,
    mountpoint: str,
    request: MountRequest,
    *,
    records: str | None = None,
    background: bool = True,
) -> "Mount | None":
    """Mount an image of a store on a directory.

    Args:
        repository: the store; file data must have fs-verity if it is secure or the request says
            so.
        name: id, ``refs/NAME`` or NAME; also shown as mount source ``composefs:NAME``.
        mountpoint: existing directory; symlinks are followed.
        request: how.
        records: directory of the records of FUSE mounts, or None to keep none.
        background: give a FUSE server no standard streams.

    Returns:
        The mount if it is served over FUSE; it ends with us unless it is left.  None if it is
        all the kernel's.

    Raises:
        NotFoundError: there is no such image.
        IntegrityError: the image is not what its name says.
        FormatError: it is no image.
        InvalidRequestError: the request contradicts itself.
        MountError: mount point or kernel refused.
        OSError: upper or work directory cannot be opened.
    """
    options = choose(request)
    if options is None:
        _mount_in_kernel(repository, name, mountpoint, request)
        return None
    from cfs.mounting.serving import serve_image  # noqa: PLC0415 - loads numpy

    return serve_image(
        repository, name, mountpoint, options, records=records, background=background
    )


def _mount_in_kernel(
    repository: "Repository", name: str, mountpoint: str, request: MountRequest
) -> None:
    from cfs.mounting.kernel import mount_in_kernel  # noqa: PLC0415 - FUSE needs none of it
    from cfs.repository.images import open_image  # noqa: PLC0415

    with open_image(repository, name) as image:
        layers = _layers(repository, request)
        mount_in_kernel(image.fd, mountpoint, layers, source=mount_source(name))


def create_stored_mount(repository: "Repository", name: str, request: MountRequest) -> int:
    """Make the kernel's mount of an image, attached nowhere; return its descriptor.

    Arguments and errors as for :func:`mount_image`.
    """
    from cfs.mounting.kernel import create_image_mount  # noqa: PLC0415 - as above
    from cfs.repository.images import open_image  # noqa: PLC0415

    with open_image(repository, name) as image:
        layers = _layers(repository, request)
        return create_image_mount(image.fd, layers, source=mount_source(name))


def _layers(repository: "Repository", request: MountRequest) -> OverlayLayers:
    is_required = repository.is_secure or request.choices.get("verify") is Verify.REQUIRE
    return OverlayLayers(
        objects=[repository.objects.fd],  # there is one: the image
        upperdir=request.upperdir,
        workdir=request.workdir,
        read_write=request.read_write,
        attributes=request.attributes,
        verity=OverlayVerity.REQUIRE if is_required else OverlayVerity.OFF,
    )
