"""Images from store to store (spec repository 5.10): layers first, then all that names them."""

from cfs.digest import Digest
from cfs.errors import FormatError, InvalidRequestError
from cfs.oci.documents import config_of, find_manifest
from cfs.oci.finalize import StoredImage, finalize_image, layer_types
from cfs.oci.layers import find_sound_layer
from cfs.oci.manifest import Compression, Manifest, layer_compression
from cfs.oci.reference import Reference, check_content, check_tag
from cfs.oci.transfer import receive_layer, send_layer
from cfs.repository.metadata import format_algorithm
from cfs.repository.repository import Repository

__all__ = ["copy_image"]


def copy_image(
    source: Repository,
    target: Repository,
    reference: Reference,
    *,
    name: str | None = None,
    zerocopy: bool = False,
) -> StoredImage:
    """Copy an image with its layers; those that are there already are not copied.

    The image to mount is made anew; a boot image is not made.

    Args:
        source: store that has the image.
        target: store that gets it.
        reference: the image.
        name: tag that it gets, or None.
        zerocopy: share objects with the source, by reflink or hard link, or fail; the stores
            must have the same hash.

    Raises:
        InvalidRequestError: the name cannot be one, or the hashes differ.
        NotFoundError: there is no such image, or part of it is missing.
        FormatError: a document or stream is broken.
        IntegrityError: a part is not what its name says.
        UnsupportedError: an object had to be copied, or a digest cannot be checked.
        OSError: reading or writing failed.
    """
    if name is not None:
        check_tag(name)
    if zerocopy and source.algorithm is not target.algorithm:
        msg = (
            "--zerocopy requires matching hash algorithms: the source uses "
            f"{format_algorithm(source.algorithm)}, the destination "
            f"{format_algorithm(target.algorithm)}"
        )
        raise InvalidRequestError(msg)
    target.check_writable()
    image = find_manifest(source, reference)
    check_content(image.data, image.digest, "Manifest")
    config = config_of(source, image, verify=True)
    manifest = image.manifest
    unsure = _compressed(manifest)
    layers = []
    for digest, content_type in layer_types(manifest, config.data).items():
        stream = image.layers.get(digest)
        if stream is None:
            msg = f"manifest {image.digest}: its stream does not refer to layer {digest}"
            raise FormatError(msg)
        found = find_sound_layer(target, digest, content_type)
        if found is None:
            found = _copy_layer(
                source, target, digest, stream, zerocopy=zerocopy, is_sure=digest not in unsure
            )
        layers.append((digest, found))
    return finalize_image(target, image.data, config.data, layers, name, digest=image.digest)


def _compressed(manifest: Manifest) -> set[str]:
    """Return the layers whose digests are not those of what is stored."""
    if manifest.is_container:
        return set()
    stored_as_they_are = (None, Compression.NONE)
    return {
        layer.digest
        for layer in manifest.layers
        if layer_compression(layer.media_type) not in stored_as_they_are
    }


def _copy_layer(
    source: Repository,
    target: Repository,
    digest: str,
    stream: Digest,
    *,
    zerocopy: bool,
    is_sure: bool,
) -> Digest:
    return receive_layer(
        target,
        digest,
        send_layer(source, stream, verify=not is_sure),
        [source.objects.fd],
        zerocopy=zerocopy,
        covers_contents=is_sure,
    ).stream
