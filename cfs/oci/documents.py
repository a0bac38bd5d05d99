"""Manifests and configs of a store (spec repository 5.2, 5.5).

Each is a stream whose contents are the document and whose named references say what it needs:
a manifest its config and layers, a config the layers and the images made of them.  References
are ids of streams, so a config that gets another image is another stream, and all manifests that
name it have to be written again.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from cfs.digest import Digest
from cfs.errors import CfsError, FormatError, IntegrityError, NotFoundError
from cfs.oci.document_streams import (
    config_key,
    config_name,
    open_document,
    read_document,
    write_document,
)
from cfs.oci.manifest import Config, Manifest
from cfs.oci.reference import Reference, check_content
from cfs.oci.tags import find_manifest_stream, manifest_name, resolve_tag
from cfs.repository.refs import STREAMS, entries
from cfs.repository.repository import Repository
from cfs.repository.splitstream_format import ContentType
from cfs.repository.streams import find_stream, open_stream
from cfs.transform.oci import XattrMode

__all__ = [
    "StoredConfig",
    "StoredManifest",
    "config_of",
    "find_manifest",
    "image_key",
    "linked_image",
    "load_config",
    "load_manifest",
    "replace_images",
    "update_config",
    "write_config",
    "write_manifest",
]

_IMAGE = "composefs.image"
_BOOT_IMAGE = "composefs.image.boot"


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
    key = (_BOOT_IMAGE if boot else _IMAGE) + ("" if version > 1 else ".v1")
    return key if mode is XattrMode.ALLOWLIST_ONLY else f"{key}.xattrs={mode.value}"


@dataclass(frozen=True, kw_only=True)
class StoredManifest:
    """A manifest of the store.

    Attributes:
        digest: of the document.
        stream: id of its stream.
        data: the document, byte for byte.
        config_stream: id of the stream of its config.
        layers: ids of the streams of layers, by diff id, or by digest if it is an artifact.
    """

    digest: str
    stream: Digest
    data: bytes
    config_stream: Digest
    layers: Mapping[str, Digest]

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest as a value.

        Raises:
            FormatError: it is none.
        """
        return Manifest.parse(self.data)


@dataclass(frozen=True, kw_only=True)
class StoredConfig:
    """A config of the store; that of an artifact may be any data.

    Attributes:
        digest: of the document.
        stream: id of its stream.
        data: the document, byte for byte.
        layers: ids of the streams of layers, by diff id, or by digest if it is an artifact's.
        images: digests of the images made of it, by :func:`image_key`.
    """

    digest: str
    stream: Digest
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
        images=_images_among(references),
    )


def _images_among(references: Mapping[str, Digest]) -> dict[str, Digest]:
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


def write_config(
    repository: Repository,
    digest: str,
    data: bytes,
    layers: Sequence[tuple[str, Digest]],
    images: Mapping[str, Digest] | None = None,
) -> Digest:
    """Store a config and register it; return the id of its stream.

    Args:
        repository: the store.
        digest: of the document.
        data: the document.
        layers: ids of the streams of layers, by diff id, or by digest if it is an artifact's;
            in the order of the document.
        images: digests of the images made of it, by :func:`image_key`.

    Raises:
        IntegrityError: the data does not have this digest.
        OSError: the store cannot be written to.
    """
    check_content(data, digest, "Config")
    keys = sorted(images or {}, key=lambda key: (key.startswith(_BOOT_IMAGE), key))
    references = [*layers, *((key, (images or {})[key]) for key in keys)]
    return write_document(repository, config_name(digest), ContentType.CONFIG, data, references)


def write_manifest(
    repository: Repository,
    digest: str,
    data: bytes,
    config: tuple[str, Digest],
    layers: Sequence[tuple[str, Digest]],
) -> Digest:
    """Store a manifest and register it; return the id of its stream.

    Args:
        repository: the store.
        digest: of the document.
        data: the document.
        config: its digest and the id of its stream.
        layers: as :func:`write_config`.

    Raises:
        IntegrityError: the data does not have this digest.
        OSError: the store cannot be written to.
    """
    check_content(data, digest, "Manifest")
    references = [(config_key(config[0]), config[1]), *layers]
    return write_document(repository, manifest_name(digest), ContentType.MANIFEST, data, references)


def replace_images(
    repository: Repository, config: StoredConfig, images: Mapping[str, Digest]
) -> StoredConfig:
    """Let a config refer to images; return it as it is stored now.

    Those that it referred to under other keys stay; see :func:`update_config`.

    Raises:
        As :func:`update_config`.
    """
    layers = _in_order(config.layers, config.config.diff_ids)
    with repository.updating():
        return update_config(repository, config.digest, config.data, layers, images)


def update_config(
    repository: Repository,
    digest: str,
    data: bytes,
    layers: Sequence[tuple[str, Digest]],
    images: Mapping[str, Digest],
) -> StoredConfig:
    """Store a config and write all manifests that name it again.

    Images that it has under other keys stay as long as they are there, those of which only one
    of the manifests knows as well (composefs-rs leaves manifests behind).  To be called within
    :meth:`Repository.updating`, because others may be adding images.

    Args:
        repository: the store.
        digest: of the document.
        data: the document.
        layers: as for :func:`write_config`.
        images: what to add, by :func:`image_key`.

    Raises:
        IntegrityError: the data does not have this digest.
        OSError: the store cannot be written to.
    """
    manifests = _manifests_of(repository, digest)
    known: dict[str, Digest] = {}
    for stream in dict.fromkeys(stored.config_stream for stored in manifests):
        known |= _images_of(repository, digest, stream)
    with suppress(NotFoundError, FormatError):
        known |= _images_of(repository, digest, find_stream(repository, config_name(digest)))
    images = {
        **{key: image for key, image in known.items() if repository.objects.has(image)},
        **images,
    }
    config = StoredConfig(
        digest=digest,
        stream=write_config(repository, digest, data, layers, images),
        data=data,
        layers=dict(layers),
        images=images,
    )
    for stored in manifests:
        if stored.config_stream != config.stream:
            named = (digest, config.stream)
            write_manifest(
                repository, stored.digest, stored.data, named, _layers_of(stored, config)
            )
    return config


def _layers_of(stored: StoredManifest, config: StoredConfig) -> list[tuple[str, Digest]]:
    """Return the layers that a manifest is to name from now on, in order."""
    if stored.manifest.is_container:
        return list({**config.layers, **stored.layers, **config.layers}.items())
    # an artifact may have the same document for a config
    digests = dict.fromkeys(layer.digest for layer in stored.manifest.layers)
    return [(digest, stored.layers[digest]) for digest in digests if digest in stored.layers]


def _images_of(repository: Repository, digest: str, stream: Digest) -> dict[str, Digest]:
    """Return what a config's stream refers to, whose document may be damaged."""
    with suppress(NotFoundError, FormatError, IntegrityError):
        content_id = config_name(digest)
        with open_document(
            repository, stream, content_id, ContentType.CONFIG, verify=True
        ) as opened:
            return _images_among(opened.named_refs)
    return {}


def _in_order(layers: Mapping[str, Digest], names: Sequence[str]) -> list[tuple[str, Digest]]:
    """Return layers in the order of the document, then those that it does not name."""
    ordered = [name for name in dict.fromkeys(names) if name in layers]
    return [(name, layers[name]) for name in dict.fromkeys([*ordered, *layers])]


def _manifests_of(repository: Repository, config_digest: str) -> list[StoredManifest]:
    """Return the manifests that refer to a config.

    What cannot be read is left out: it belongs to no image that could be used.
    """
    found = []
    prefix = manifest_name("").encode()
    for entry in entries(repository.fd, STREAMS):
        if entry.target is None or not entry.name.startswith(prefix):
            continue
        name = entry.name.decode(errors="backslashreplace")
        with suppress(CfsError):
            with open_stream(repository, name) as stream:
                is_one = config_key(config_digest) in stream.named_refs
            if is_one:
                digest = name.removeprefix(manifest_name(""))
                found.append(load_manifest(repository, digest, verify=True))
    return found


def linked_image(
    repository: Repository, config: StoredConfig, *, boot: bool = False
) -> Digest | None:
    """Return the image of a config in the format of the store; None if none was made."""
    return config.images.get(image_key(repository.formats.default, boot=boot))
