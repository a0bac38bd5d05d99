"""``org.composefs.Oci`` without FUSE: images and their kernel mounts (spec b.6)."""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cfs.digest import Digest
from cfs.errors import InvalidRequestError, MountError, NotFoundError
from cfs.linux.fusedev import open_device
from cfs.oci.documents import find_manifest
from cfs.oci.fsck import check_images
from cfs.oci.images import compute_image, find_config
from cfs.oci.listing import inspect_image, list_images
from cfs.oci.mountable import linked_mountable
from cfs.oci.reference import Reference, parse_digest
from cfs.oci.tags import remove_tag, resolve_tag, set_tag
from cfs.service.errors import MethodError, internal_error
from cfs.service.kernel_mounts import find_wrong_fds, reply_mount
from cfs.service.oci_layers import LayerMethods
from cfs.service.oci_pull import XATTR_MODES, PullMethods
from cfs.service.rights import refuse_foreign

if TYPE_CHECKING:
    from cfs.repository.repository import Repository
    from cfs.service.call import Call
    from cfs.service.handles import Handles

__all__ = ["OciMethods", "find_image"]

_FEATURES = ["splitdirfdstream-v0"]
_FUSE = "fuse-v0"  # OciFuseMount, where there is a FUSE device


class OciMethods(PullMethods, LayerMethods):
    """The methods; parameters are named, and checked, as the IDL says.

    Raises:
        MethodError: as the IDL says; for all else ``InternalError``, of which any error of cfs and
            any ``OSError`` stands as well.
    """

    def __init__(self, handles: "Handles") -> None:
        """Share the handles with the other interfaces."""
        PullMethods.__init__(self, handles)
        LayerMethods.__init__(self, handles)

    def close(self) -> None:
        """End what goes on: pulls fail, layers break off; for when no more calls come."""
        self.stop_pulls()
        self.stop_sending()

    def ListImages(
        self, call: "Call", *, handle: int, filter: str | None  # noqa: A002 - the name on the wire
    ) -> dict[str, Any]:  # fmt: skip
        """Return the tagged images; those that are damaged are left out."""
        with self._handles.get(call, handle) as repository:
            listing = list_images(repository)
        images = [image for image in listing.images if filter is None or filter in image.name]
        return {"images": [asdict(image) for image in images]}

    def Check(self, call: "Call", *, handle: int, image: str | None) -> dict[str, Any]:
        """Verify images and the store beneath."""
        with self._handles.get(call, handle) as repository:
            return check_images(repository, image).as_dict()

    def Inspect(self, call: "Call", *, handle: int, image: str) -> dict[str, Any]:
        """Return what the store has of an image."""
        with self._handles.get(call, handle) as repository:
            reference = Reference.parse(image)
            if reference.tag is not None:
                try:
                    resolve_tag(repository, reference.tag)
                except NotFoundError:
                    raise MethodError("NoSuchImage", image=image) from None
            found = inspect_image(repository, reference)
        # JSON has no place for the bytes that a config of an artifact may hold
        return found.as_dict() | {
            "manifest": found.manifest.decode(errors="replace"),
            "config": found.config.decode(errors="replace"),
        }

    def Tag(self, call: "Call", *, handle: int, manifest_digest: str, name: str) -> None:
        """Give a manifest a name."""
        with self._handles.get(call, handle) as repository:
            set_tag(repository, name, parse_digest(manifest_digest))

    def Untag(self, call: "Call", *, handle: int, name: str) -> None:
        """Drop a name."""
        with self._handles.get(call, handle) as repository:
            remove_tag(repository, name)

    def ComputeId(
        self,
        call: "Call",
        *,
        handle: int,
        image: str,
        verity: str | None,
        bootable: bool,
        xattrs: str | None,
    ) -> dict[str, Any]:
        """Return the digest of the image that an OCI image gives; ``@`` names the config."""
        with self._handles.get(call, handle) as repository:
            reference = Reference.parse(image)
            stream = None if verity is None else Digest.parse(verity)
            config, verify = find_config(repository, reference, stream)
            mode = XATTR_MODES[xattrs]
            digest = compute_image(repository, config, bootable=bootable, mode=mode, verify=verify)
        return {"image_id": str(digest)}

    def OciMount(
        self, call: "Call", *, handle: int, image: str, bootable: bool, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Make a mount of the kernel, attached nowhere."""
        with self._handles.get(call, handle) as repository:
            # root would mount what he has made, with set-user-ID files
            refuse_foreign(call.peer)
            digest = find_image(repository, image, bootable=bootable)
            wrong = find_wrong_fds(call, options)
            if wrong is not None:
                raise internal_error(wrong)
            return reply_mount(call, repository, str(digest), options)

    def GetInfo(self, call: "Call") -> dict[str, Any]:  # noqa: ARG002 - all callers are the same
        """Return optional abilities."""
        return {"features": _FEATURES + ([_FUSE] if _has_fuse() else [])}


def _has_fuse() -> bool:
    try:
        os.close(open_device())
    except MountError:
        return False
    return True


def find_image(repository: "Repository", image: str, *, bootable: bool) -> Digest:
    """Return the image to mount for an OCI image.

    Args:
        repository: the store.
        image: tag, or digest of the manifest, with or without ``@``.
        bootable: the bootable one.

    Raises:
        MethodError: ``NoSuchImage``: there is no such OCI image; ``InternalError``: it cannot be
            called like that, or no image was made of it.
        CfsError: its documents are broken.
    """
    try:
        manifest = find_manifest(repository, Reference.parse_mountable(image))
    except NotFoundError as error:
        raise MethodError("NoSuchImage", image=f"{image}: {error}") from None
    except InvalidRequestError as error:
        raise internal_error(str(error)) from None
    return linked_mountable(repository, manifest, boot=bootable)
