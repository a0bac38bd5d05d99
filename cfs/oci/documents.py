"""Manifests and configs of a store (spec repository 5.2, 5.5).

Each is a stream whose contents are the document and whose named references say what it needs:
a manifest its config and layers, a config the layers and the images made of them.  They
are written by :mod:`cfs.oci.document_updates`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from cfs.digest import Digest
from cfs.errors import FormatError, NotFoundError
from cfs.oci.document_streams import (
    config_key,
    config_name,
    open_document,
    read_document,
)
from cfs.oci.manifest import Config, Manifest
from cfs.oci.reference import Reference, check_content
from cfs.oci.tags import find_manifest_stream, manifest_name, resolve_tag
from cfs.repository.repository import Repository
from cfs.repository.splitstream_format import ContentType
from cfs.repository.streams import find_stream
from cfs.transform.oci import XattrMode

__all__ = [
    "BOOT_IMAGE",
    "ConfigDocument",
    "ManifestDocument",
    "StoredConfig",
    "StoredManifest",
    "config_of",
    "find_manifest",
    "image_key",
    "images_among",
    "linked_image",
    "load_config",
    "load_manifest",
]

_IMAGE = "composefs.image"
BOOT_IMAGE = "composefs.image.boot"  # begins the names of references to bootable images


def image_key(
    version: int, *, boot: bool = False, mode: XattrMode = XattrMode.ALLOWLIST_ONLY
) -> str:
    """Return the name of a config's reference to an image (spec repository 5.5).

    Args:
        version: format of the image; 0 counts as 1, of which it differs in nothing that matters
            here.
        boot: whether it is a bootable one.
        mode: of the xattrs in a bootable one.
    """
    key = (BOOT_IMAGE if boot else _IMAGE) + ("" if version > 1 else ".v1")
    return key if mode is XattrMode.ALLOWLIST_ONLY else f"{key}.xattrs={mode.value}"


@dataclass(frozen=True, kw_only=True)
class ManifestDocument:
    """A manifest, and the layers that it is about.

    Attributes:
        digest: of the document.
        data: the document, byte for byte.
        layers: ids of the streams of layers, by diff id, or by digest if it is an artifact; in
            order.
    """

    digest: str
    data: bytes
    layers: Mapping[str, Digest]

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest as a value.

        Raises:
            FormatError: it is none.
        """
        return Manifest.parse(self.data)


@dataclass(frozen=True, kw_only=True)
class StoredManifest(ManifestDocument):
    """A manifest of the store.

    Attributes:
        stream: id of its stream.
        config_stream: id of the stream of its config.
    """

    stream: Digest
    config_stream: Digest


@dataclass(frozen=True, kw_only=True)
class ConfigDocument:
    """A config, and the layers that it is about; that of an artifact may be any data.

    Attributes:
        digest: of the document.
        data: the document, byte for byte.
        layers: ids of the streams of layers, by diff id, or by digest if it is an artifact's.
        images: digests of the images made of it, by :func:`image_key`.
    """

    digest: str
    data: bytes
    layers: Mapping[str, Digest]
    images: Mapping[str, Digest]

    @cached_property
    def config(self) -> Config:
        """The config as a value.

        Raises:
            FormatError: it is none.
        """
        return Config.parse(self.data)


@dataclass(frozen=True, kw_only=True)
class StoredConfig(ConfigDocument):
    """A config of the store.

    Attributes:
        stream: id of its stream.
    """

    stream: Digest


def load_manifest(repository: Repository, digest: str, *, verify: bool = False) -> StoredManifest:
    """Return a manifest of the store.

    Args:
        repository: the store.
        digest: of the manifest.
        verify: whether to compare the document with its digest, and its stream with its id.

    Raises:
        NotFoundError: there is none, or its object is missing.
        FormatError: it is no manifest, or does not say which stream its config is.
        IntegrityError: it is not what the digest says.
        OSError: reading failed.
    """
    stream = find_manifest_stream(repository, digest)
    content_id = manifest_name(digest)
    with open_document(
        repository, stream, content_id, ContentType.MANIFEST, verify=verify
    ) as opened:
        data = read_document(repository, opened)
        layers = dict(opened.named_refs)
    if verify:
        check_content(data, digest, "Manifest")
    config_digest = Manifest.parse(data).config.digest
    config_stream = layers.pop(config_key(config_digest), None)
    if config_stream is None:
        msg = f"manifest {digest}: no reference to the stream of config {config_digest}"
        raise FormatError(msg)
    return StoredManifest(
        digest=digest, stream=stream, data=data, config_stream=config_stream, layers=layers
    )


def find_manifest(repository: Repository, reference: Reference) -> StoredManifest:
    """Return the manifest that a user means; by digest, it is verified.

    Raises:
        InvalidRequestError: no tag can be like that.
        Other errors: as :func:`load_manifest`.
    """
    if reference.digest is not None:
        return load_manifest(repository, reference.digest, verify=True)
    assert reference.tag is not None
    return load_manifest(repository, resolve_tag(repository, reference.tag))


def load_config(
    repository: Repository, digest: str, *, stream: Digest | None = None, verify: bool = False
) -> StoredConfig:
    """Return a config of the store.

    Args:
        repository: the store.
        digest: of the config.
        stream: id of its stream; by default the one that is registered.
        verify: whether to compare the document with its digest, and its stream with its id.

    Raises:
        NotFoundError: there is none, or its object is missing.
        FormatError: it is no stream of a config.
        IntegrityError: it is not what the digest says.
        OSError: reading failed.
    """
    if stream is None:
        try:
            stream = find_stream(repository, config_name(digest))
        except NotFoundError:
            msg = f"Config {digest} not found"
            raise NotFoundError(msg) from None
    content_id = config_name(digest)
    with open_document(repository, stream, content_id, ContentType.CONFIG, verify=verify) as opened:
        data = read_document(repository, opened)
        references = opened.named_refs
    if verify:
        check_content(data, digest, "Config")
    return StoredConfig(
        digest=digest,
        stream=stream,
        data=data,
        layers={key: references[key] for key in references if not key.startswith(_IMAGE)},
        images=images_among(references),
    )


def images_among(references: Mapping[str, Digest]) -> dict[str, Digest]:
    """Return the references of a config that are those to images."""
    return {key: references[key] for key in references if key.startswith(_IMAGE)}


def config_of(
    repository: Repository, stored: StoredManifest, *, verify: bool = False
) -> StoredConfig:
    """Return the config that a manifest refers to, which need not be the registered one.

    Raises:
        As :func:`load_config`.
    """
    digest = stored.manifest.config.digest
    return load_config(repository, digest, stream=stored.config_stream, verify=verify)


def linked_image(
    repository: Repository, config: StoredConfig, *, boot: bool = False
) -> Digest | None:
    """Return the image of a config in the format of the store; None if none was made."""
    return config.images.get(image_key(repository.formats.default, boot=boot))
