"""Manifests and configs, written and written again (spec repository 5.2, 5.5).

References are ids of streams: a config that gets another image is another stream, and all manifests
that name it have to be written again.  Whatever belongs together is stored first, synced once, and
gets its names then.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from cfs.digest import Digest
from cfs.errors import CfsError, FormatError, IntegrityError, NotFoundError
from cfs.oci.document_streams import config_key, config_name, open_document, put_document
from cfs.oci.documents import (
    BOOT_IMAGE,
    ConfigDocument,
    ManifestDocument,
    StoredConfig,
    StoredManifest,
    images_among,
    load_manifest,
)
from cfs.oci.reference import check_content
from cfs.oci.tags import manifest_name
from cfs.repository.images import link_images
from cfs.repository.refs import STREAMS, entries
from cfs.repository.repository import Repository
from cfs.repository.splitstream_format import ContentType
from cfs.repository.streams import find_stream, open_stream, register_streams

__all__ = ["put_config", "put_manifest", "replace_images", "update_config"]


def put_config(repository: Repository, config: ConfigDocument) -> Digest:
    """Store a config, without registering it; return the id of its stream.

    Raises:
        IntegrityError: the document does not have its digest.
        FormatError: it is too large.
        OSError: the store cannot be written to.
    """
    check_content(config.data, config.digest, "Config")
    keys = sorted(config.images, key=lambda key: (key.startswith(BOOT_IMAGE), key))
    references = [*config.layers.items(), *((key, config.images[key]) for key in keys)]
    name = config_name(config.digest)
    return put_document(repository, name, ContentType.CONFIG, config.data, references)


def put_manifest(
    repository: Repository, manifest: ManifestDocument, config: tuple[str, Digest]
) -> Digest:
    """Store a manifest, without registering it; return the id of its stream.

    Args:
        repository: the store.
        manifest: the manifest.
        config: its digest and the id of its stream.

    Raises:
        As :func:`put_config`.
    """
    check_content(manifest.data, manifest.digest, "Manifest")
    references = [(config_key(config[0]), config[1]), *manifest.layers.items()]
    name = manifest_name(manifest.digest)
    return put_document(repository, name, ContentType.MANIFEST, manifest.data, references)


def replace_images(
    repository: Repository, config: StoredConfig, images: Mapping[str, Digest]
) -> StoredConfig:
    """Let a config refer to images; return it as it is stored now.

    Those that it referred to under other keys stay; see :func:`update_config`.

    Raises:
        As :func:`update_config`.
    """
    layers = _in_order(config.layers, config.config.diff_ids)
    document = ConfigDocument(digest=config.digest, data=config.data, layers=layers, images=images)
    with repository.updating():
        return update_config(repository, document)


def update_config(
    repository: Repository, config: ConfigDocument, manifest: ManifestDocument | None = None
) -> StoredConfig:
    """Store a config and write all manifests that name it again; register all of them.

    Images that it has under other keys stay as long as they are there, those of which only one
    of the manifests knows as well (composefs-rs leaves manifests behind).  To be called within
    :meth:`Repository.updating`, because others may be adding images.

    Everything is stored before anything gets its name: images, config and manifests, in this order.

    Args:
        repository: the store.
        config: its layers in the order of the document; its images are those to add, and are
            stored.
        manifest: another one that names it, which is stored as well.

    Raises:
        IntegrityError: a document does not have its digest.
        FormatError: a document is too large.
        OSError: the store cannot be written to.
    """
    manifests = _manifests_of(repository, config.digest)
    known: dict[str, Digest] = {}
    for stream in dict.fromkeys(stored.config_stream for stored in manifests):
        known |= _images_of(repository, config.digest, stream)
    with suppress(NotFoundError, FormatError):
        stream = find_stream(repository, config_name(config.digest))
        known |= _images_of(repository, config.digest, stream)
    there = {key: image for key, image in known.items() if repository.objects.has(image)}
    document = replace(config, images={**there, **config.images})
    updated = StoredConfig(
        digest=config.digest,
        data=config.data,
        layers=config.layers,
        images=document.images,
        stream=put_config(repository, document),
    )
    named = (updated.digest, updated.stream)
    streams = {config_name(updated.digest): updated.stream}
    outdated: dict[str, ManifestDocument] = {
        stored.digest: replace(stored, layers=_layers_of(stored, updated))
        for stored in manifests
        if stored.config_stream != updated.stream
    }
    if manifest is not None:
        outdated[manifest.digest] = manifest
    for stored in outdated.values():
        streams[manifest_name(stored.digest)] = put_manifest(repository, stored, named)
    link_images(repository, list(config.images.values()))
    register_streams(repository, streams)
    return updated


def _layers_of(stored: StoredManifest, config: StoredConfig) -> dict[str, Digest]:
    """Return the layers that a manifest is to name from now on, in order."""
    if stored.manifest.is_container:
        return {**config.layers, **stored.layers, **config.layers}
    # an artifact may have the same document for a config
    names = [layer.digest for layer in stored.manifest.layers]
    return {name: stored.layers[name] for name in names if name in stored.layers}


def _images_of(repository: Repository, digest: str, stream: Digest) -> dict[str, Digest]:
    """Return what a config's stream refers to, whose document may be damaged."""
    with suppress(NotFoundError, FormatError, IntegrityError):
        content_id = config_name(digest)
        with open_document(
            repository, stream, content_id, ContentType.CONFIG, verify=True
        ) as opened:
            return images_among(opened.named_refs)
    return {}


def _in_order(layers: Mapping[str, Digest], names: Sequence[str]) -> dict[str, Digest]:
    """Return layers in the order of the document, then those that it does not name."""
    ordered = [name for name in names if name in layers]
    return {name: layers[name] for name in [*ordered, *layers]}


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
