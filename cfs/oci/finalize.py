"""Completing an image whose layers are in the store (spec repository 5.2, 5.4, 5.10).

Configuration, manifest, the images made of it, the tag, in this order: what has a name is
complete.  Spec cli-and-varlink b.6 ``FinalizeImage`` says what is checked before anything is
written, because what composefs-rs stores unchecked keeps the right image out.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cfs.digest import Digest
from cfs.errors import (
    FormatError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
)
from cfs.oci.documents import (
    StoredConfig,
    load_config,
    load_manifest,
    update_config,
    write_manifest,
)
from cfs.oci.images import link_image
from cfs.oci.layers import find_layer, layer_name
from cfs.oci.manifest import Config, Manifest, layer_compression
from cfs.oci.reference import check_content, check_tag, digest_of
from cfs.oci.tags import set_tag
from cfs.repository.repository import Repository
from cfs.repository.splitstream import SplitStream
from cfs.repository.splitstream_format import ContentType
from cfs.repository.splitstream_writer import SplitStreamWriter
from cfs.repository.streams import register_stream

__all__ = ["StoredImage", "finalize_image", "find_typed_layer", "layer_types", "store_image"]

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
    if not manifest.is_container:
        return {
            layer.digest: (
                ContentType.LAYER if layer_compression(layer.media_type) else ContentType.BLOB
            )
            for layer in manifest.layers
        }
    diff_ids = Config.parse(config).diff_ids
    if len(diff_ids) != len(manifest.layers):
        msg = (
            f"manifest and config disagree: {len(manifest.layers)} layers, but "
            f"{len(diff_ids)} diff ids"
        )
        raise FormatError(msg)
    return dict.fromkeys(diff_ids, ContentType.LAYER)


def find_typed_layer(repository: Repository, digest: str, content_type: bytes) -> Digest | None:
    """Return the stream of a layer, if it is there and can be used as one of that type.

    The blob of an artifact may have the digest that is the diff id of a layer.  The stream is
    read and its objects are looked for, so that storing it again brings back what was lost or
    damaged; what is in the objects is left to fsck.

    Raises:
        OSError: reading failed.
    """
    with suppress(NotFoundError, FormatError, IntegrityError):
        stream = find_layer(repository, digest)
        if stream is not None and repository.objects.is_sound(stream):
            with _open(repository, stream) as layer:
                is_usable = layer.content_type == content_type
                if is_usable and all(map(repository.objects.has, layer.object_refs)):
                    return stream
    return None


def _open(repository: Repository, stream: Digest) -> SplitStream:
    return SplitStream(repository.objects.open_object(stream), repository.algorithm)


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
    with _open(repository, stream) as layer:
        found = layer.content_type
    if found != content_type and (found, content_type) != (ContentType.LAYER, ContentType.BLOB):
        msg = f"layer {digest}: invalid splitstream content type"
        raise FormatError(msg)
    return found == content_type


def _store_as_blob(repository: Repository, digest: str, stream: Digest) -> Digest:
    """Store the contents of a stream as one object, as those of blobs are; register it."""
    with _open(repository, stream) as source:
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
    """Store the documents of an image, make the images of it, tag it.

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
    document = Manifest.parse(manifest)
    with repository.updating():
        stored = _store_config(repository, document, config, layers)
        _store_manifest(repository, digest, manifest, stored, layers)
    if document.is_container:
        link_image(repository, stored)
    if name is not None:
        set_tag(repository, name, digest)
    final = load_manifest(repository, digest)
    return StoredImage(
        manifest_digest=digest,
        manifest_stream=final.stream,
        config_digest=stored.digest,
        config_stream=final.config_stream,
    )


def _store_config(
    repository: Repository, manifest: Manifest, config: bytes, layers: Layers
) -> StoredConfig:
    """Write the configuration, unless it is there and refers to just that.

    An artifact shares its configuration with others, "{}" mostly.  Did that name the layers of
    all, it would keep them from collection.  Their manifests do; the configuration has those of
    the first, which is enough for composefs-rs to pull that one again.
    """
    digest = manifest.config.digest
    with suppress(NotFoundError, FormatError, IntegrityError):
        stored = load_config(repository, digest, verify=True)
        # they differ if some were lost, or if an artifact has the same document
        is_same = not manifest.is_container or stored.layers == dict(layers)
        if is_same and all(map(repository.objects.has, stored.images.values())):
            return stored
    return update_config(repository, digest, config, layers, {})


def _store_manifest(
    repository: Repository, digest: str, data: bytes, config: StoredConfig, layers: Layers
) -> None:
    """Write the manifest, unless it is there and refers to just that."""
    with suppress(NotFoundError, FormatError, IntegrityError):
        stored = load_manifest(repository, digest, verify=True)
        if stored.config_stream == config.stream and dict(stored.layers) == dict(layers):
            return
    write_manifest(repository, digest, data, (config.digest, config.stream), layers)
