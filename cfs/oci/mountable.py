"""Which image of a store is mounted for an OCI image (spec repository 5.11)."""

from cfs.digest import Digest
from cfs.errors import NotFoundError
from cfs.oci.documents import StoredManifest, config_of, find_manifest, linked_image
from cfs.oci.reference import Reference
from cfs.repository.repository import Repository

__all__ = ["find_mountable", "linked_mountable"]


def find_mountable(repository: Repository, image: str, *, boot: bool = False) -> Digest:
    """Return the image that was made of an OCI image, in the format of the store.

    Args:
        repository: the store.
        image: tag, or digest of the manifest, with or without ``@``.
        boot: the bootable one.

    Raises:
        InvalidRequestError: ``image`` cannot be like that.
        NotFoundError: there is no such OCI image, or no image was made of it.
        FormatError: its documents are broken.
        IntegrityError: they are not what their names say.
    """
    manifest = find_manifest(repository, Reference.parse_mountable(image))
    return linked_mountable(repository, manifest, boot=boot)


def linked_mountable(
    repository: Repository, manifest: StoredManifest, *, boot: bool = False
) -> Digest:
    """Return the image that was made of the OCI image of a manifest.

    Raises:
        NotFoundError: none was made of it, or its config is missing.
        Other errors: as :func:`find_mountable`.
    """
    digest = linked_image(repository, config_of(repository, manifest), boot=boot)
    if digest is None:
        kind, remedy = ("boot", "pulling with --bootable") if boot else ("composefs", "re-pulling")
        target = "" if boot else " the image"
        msg = f"No {kind} EROFS image linked — try {remedy}{target}"
        raise NotFoundError(msg)
    return digest
