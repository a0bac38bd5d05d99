"""Completing an image whose layers are in the store (spec repository 5.2, 5.4, 5.10).

The image made of it, configuration and manifest are stored, synced once and named in this order,
then tagged: what has a name is complete.  Spec cli-and-varlink b.6 ``FinalizeImage`` says what is
checked before anything is written, because what composefs-rs stores unchecked keeps the right
image out.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from cfs.digest import Digest
from cfs.errors import (
    FormatError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
)
from cfs.oci.document_updates import put_manifest, update_config
from cfs.oci.documents import (
    ConfigDocument,
    ManifestDocument,
    StoredConfig,
    load_config,
    load_manifest,
)
from cfs.oci.images import make_images
from cfs.oci.layers import find_layer, layer_name
from cfs.oci.manifest import Manifest, diff_ids_of, layer_compression
from cfs.oci.reference import check_content, check_tag, digest_of
from cfs.oci.tags import manifest_name, set_tag
from cfs.repository.repository import Repository
from cfs.repository.splitstream_format import ContentType
from cfs.repository.splitstream_writer import SplitStreamWriter
from cfs.repository.streams import open_stored_stream, register_stream

__all__ = ["StoredImage", "finalize_image", "layer_types", "store_image"]

Layers = Sequence[tuple[str, Digest]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """A complete image, with the ids that its streams have at the end.

    Attributes:
        manifest_digest: of the manifest, ``sha256:...``.
        manifest_stream: its stream.
        config_digest: of the configuration.
        config_stream: its stream.
    """

    manifest_digest: str
    manifest_stream: Digest
    config_digest: str
    config_stream: Digest


def finalize_image(
    repository: Repository,
    manifest: bytes,
    config: bytes,
    layers: Layers,
    name: str | None = None,
    *,
    digest: str | None = None,
) -> StoredImage:
    """Complete an image that somebody else describes; may be repeated.

    Args:
        repository: the store.
        manifest: the exact bytes.
        config: the exact bytes.
        layers: for each layer its diff id, or the digest of an artifact's blob, and the digest of
            its stream, in the order of the image; one that comes twice may be left out then.
        name: tag that it gets, or None.
        digest: of the manifest, if it is to be named by another one than sha256.

    Raises:
        InvalidRequestError: the name cannot be one.
        NotFoundError: a layer is missing or has another digest.
        FormatError: a document is broken, or they do not fit together.
        IntegrityError: a document has another digest than it should have.
        OSError: reading or writing failed.
    """
    if name is not None:
        check_tag(name)
    repository.check_writable()
    digest = digest or digest_of(manifest)
    check_content(manifest, digest, "Manifest")
    document = Manifest.parse(manifest)
    check_content(config, document.config.digest, "Config")
    types = layer_types(document, config)
    streams = _check_layers(repository, types, layers)
    return store_image(repository, digest, manifest, config, streams, name=name)


def layer_types(manifest: Manifest, config: bytes) -> dict[str, bytes]:
    """Return the layers of an image in order, with the content types of their streams.

    They are named by diff ids, those of an artifact by the digests of their blobs.

    Raises:
        FormatError: the configuration is broken, or tells another number of layers.
    """
    if manifest.is_container:
        return dict.fromkeys(diff_ids_of(manifest, config), ContentType.LAYER)
    types: dict[str, bytes] = {}
    for layer in manifest.layers:
        is_tar = layer_compression(layer.media_type) is not None
        # the first one counts, as in a pull
        types.setdefault(layer.digest, ContentType.LAYER if is_tar else ContentType.BLOB)
    return types


def _check_layers(
    repository: Repository, types: Mapping[str, bytes], layers: Layers
) -> list[tuple[str, Digest]]:
    """Compare the layers with those of the image; return the streams, of the right types."""
    streams = dict(layers)
    if list(streams) != list(types) or not set(layers) <= set(streams.items()):
        msg = f"the layers given are not the {len(types)} of the image"
        raise InvalidRequestError(msg)
    wrong = [
        digest
        for digest, stream in streams.items()
        if not _has_type(repository, digest, stream, types[digest])
    ]
    # only now: nothing is written for an image that lacks a layer
    for digest in wrong:
        streams[digest] = _store_as_blob(repository, digest, streams[digest])
    return list(streams.items())


def _has_type(repository: Repository, digest: str, stream: Digest, content_type: bytes) -> bool:
    """Tell whether a layer, which must be there, has the right type or is to be made a blob.

    Those who receive layers cannot know which are mere blobs, so that is put right here.
    """
    if find_layer(repository, digest) != stream:
        msg = f"layer {digest} is not there as {stream}"
        raise NotFoundError(msg)
    with open_stored_stream(repository, stream) as layer:
        found = layer.content_type
    if found != content_type and (found, content_type) != (ContentType.LAYER, ContentType.BLOB):
        msg = f"layer {digest}: invalid splitstream content type"
        raise FormatError(msg)
    return found == content_type


def _store_as_blob(repository: Repository, digest: str, stream: Digest) -> Digest:
    """Store the contents of a stream as one object, as those of blobs are; register it."""
    with open_stored_stream(repository, stream) as source:
        with repository.objects.create() as contents:
            for piece in source.contents(repository.objects):
                contents.write(piece)
            content, _ = contents.commit()
        with SplitStreamWriter(repository, ContentType.BLOB) as writer:
            writer.write_object(content, source.total_size)
            blob = writer.finish()
    register_stream(repository, layer_name(digest), blob)
    return blob


def store_image(
    repository: Repository,
    digest: str,
    manifest: bytes,
    config: bytes,
    layers: Layers,
    *,
    name: str | None,
) -> StoredImage:
    """Make the images of an image's tree, store its documents, tag it.

    If no image can be made, nothing is stored.

    Args:
        repository: the store.
        digest: of the manifest.
        manifest: the exact bytes.
        config: the exact bytes; they are known to be those that the manifest names.
        layers: their digests and streams, in order; all are in the store.
        name: tag that it gets, or None.

    Raises:
        FormatError: a document is broken, or no image can be made of the layers.
        OSError: reading or writing failed.
    """
    document = ManifestDocument(digest=digest, data=manifest, layers=dict(layers))
    wanted = ConfigDocument(
        digest=document.manifest.config.digest, data=config, layers=dict(layers), images={}
    )
    images: Mapping[str, Digest] = {}
    if document.manifest.is_container:
        # before anything of it is registered: perhaps none can be made
        images = make_images(repository, _find_config(repository, wanted, document) or wanted)
    with repository.updating():
        stored = None if images else _find_config(repository, wanted, document)
        if stored is None:
            update_config(repository, replace(wanted, images=images), document)
        elif not _has_manifest(repository, document, stored):
            stream = put_manifest(repository, document, (stored.digest, stored.stream))
            register_stream(repository, manifest_name(digest), stream)
    if name is not None:
        set_tag(repository, name, digest)
    final = load_manifest(repository, digest)
    return StoredImage(
        manifest_digest=digest,
        manifest_stream=final.stream,
        config_digest=wanted.digest,
        config_stream=final.config_stream,
    )


def _find_config(
    repository: Repository, wanted: ConfigDocument, manifest: ManifestDocument
) -> StoredConfig | None:
    """Return the configuration if it is there and can be referred to as it is.

    An artifact shares its configuration with others, "{}" mostly.  Did that name the layers of
    all, it would keep them from collection.  Their manifests do; the configuration has those of
    the first, which is enough for composefs-rs to pull that one again.
    """
    with suppress(NotFoundError, FormatError, IntegrityError):
        stored = load_config(repository, wanted.digest, verify=True)
        # they differ if some were lost, or if an artifact has the same document
        is_same = not manifest.manifest.is_container or stored.layers == wanted.layers
        if is_same and all(map(repository.objects.has, stored.images.values())):
            return stored
    return None


def _has_manifest(repository: Repository, manifest: ManifestDocument, config: StoredConfig) -> bool:
    """Whether the manifest is there and refers to just that."""
    with suppress(NotFoundError, FormatError, IntegrityError):
        stored = load_manifest(repository, manifest.digest, verify=True)
        return stored.config_stream == config.stream and stored.layers == manifest.layers
    return False
