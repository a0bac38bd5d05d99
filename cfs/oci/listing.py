"""What the images of a store are: for lists and for looking into one (spec repository 5.11)."""

from dataclasses import dataclass

from cfs.errors import CfsError
from cfs.oci.documents import config_of, find_manifest, linked_image, load_manifest
from cfs.oci.reference import Reference
from cfs.oci.tags import Tag, list_referrers, list_tags
from cfs.repository.repository import Repository

__all__ = ["ImageInfo", "Inspection", "Listing", "inspect_image", "list_images"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """A tagged image, in the order of the reply of varlink's ``ListImages``.

    Attributes:
        name: the tag.
        manifest_digest: of the manifest.
        is_container: whether it can be mounted.
        architecture: of its config; empty for artifacts.
        os: of its config; empty for artifacts.
        created: of its config, if it says.
        layer_count: layers of the manifest.
        referrer_count: artifacts in the store that are about it.
    """

    name: str
    manifest_digest: str
    is_container: bool
    architecture: str
    os: str
    created: str | None
    layer_count: int
    referrer_count: int


@dataclass(frozen=True, slots=True)
class Listing:
    """The images of a store.

    Attributes:
        images: sorted by name.
        problems: tag and reason for each that is left out.
    """

    images: list[ImageInfo]
    problems: list[tuple[str, CfsError | OSError]]


def list_images(repository: Repository) -> Listing:
    """Return all tagged images; the content of each manifest is compared with its digest.

    Raises:
        OSError: the tags cannot be listed.
    """
    listing = Listing([], [])
    for tag in list_tags(repository):
        try:
            listing.images.append(_describe(repository, tag))
        except (CfsError, OSError) as error:
            listing.problems.append((tag.name, error))
    return listing


def _describe(repository: Repository, tag: Tag) -> ImageInfo:
    stored = load_manifest(repository, tag.digest, verify=True)
    manifest = stored.manifest
    # that of an artifact is any data, but has to be there
    stored_config = config_of(repository, stored)
    config = stored_config.config if manifest.is_container else None
    return ImageInfo(
        name=tag.name,
        manifest_digest=tag.digest,
        is_container=manifest.is_container,
        architecture="" if config is None else config.architecture,
        os="" if config is None else config.os,
        created=None if config is None else config.created,
        layer_count=len(manifest.layers),
        referrer_count=len(list_referrers(repository, tag.digest)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """An image, looked into.

    Attributes:
        manifest: byte for byte.
        config: byte for byte.
        referrers: digests of the manifests of artifacts about it.
        image: id of the image in the format of the store, if it was made.
        boot_image: likewise of the bootable one.
    """

    manifest: bytes
    config: bytes
    referrers: list[str]
    image: str | None
    boot_image: str | None

    def as_dict(self) -> dict[str, object]:
        """Return the reply of varlink's ``Inspect``; bytes that are no UTF-8 are escaped."""
        return {
            "manifest": self.manifest.decode(errors="surrogateescape"),
            "config": self.config.decode(errors="surrogateescape"),
            "referrers": self.referrers,
            "composefs_erofs": self.image,
            "composefs_boot_erofs": self.boot_image,
        }


def inspect_image(repository: Repository, reference: Reference) -> Inspection:
    """Return what the store has of an image.

    Raises:
        InvalidRequestError: no tag can be like that.
        NotFoundError: there is no such image, or a part of it is missing.
        FormatError: a part of it is broken.
        IntegrityError: a part is not what its digest says.
        OSError: reading failed.
    """
    stored = find_manifest(repository, reference)
    config = config_of(repository, stored)
    if stored.manifest.is_container:
        config.config  # noqa: B018 - what cannot be parsed is no image
    image = linked_image(repository, config)
    boot_image = linked_image(repository, config, boot=True)
    return Inspection(
        manifest=stored.data,
        config=config.data,
        referrers=list_referrers(repository, stored.digest),
        image=None if image is None else str(image),
        boot_image=None if boot_image is None else str(boot_image),
    )
