"""Images of the trees that OCI images describe (spec repository 5.5, 5.11, 6.5).

The configuration's stream names the EROFS images that were made of its layers, and keeps them from
collection.  Layers do not change, so a key that is there stays right; it is made again only if its
image is gone.
"""

from dataclasses import dataclass

from cfs.digest import Digest
from cfs.errors import FormatError, IntegrityError, InvalidRequestError, NotFoundError
from cfs.oci.document_updates import replace_images
from cfs.oci.documents import (
    ConfigDocument,
    StoredConfig,
    config_of,
    find_manifest,
    image_key,
    load_config,
    load_manifest,
)
from cfs.oci.filesystem import build_tree
from cfs.oci.reference import Reference, digest_from, new_hash
from cfs.oci.tags import list_tags
from cfs.repository.images import put_images
from cfs.repository.metadata import Formats
from cfs.repository.refs import resolve_image
from cfs.repository.repository import Repository
from cfs.repository.streams import open_stored_stream
from cfs.transform import XattrMode, apply_boot, apply_oci, check_boot_resources
from cfs.tree import Directory, Regular, inode_of, walk

__all__ = [
    "BootImage",
    "BootMismatchError",
    "compute_image",
    "find_config",
    "link_boot_image",
    "link_image",
    "link_tagged_images",
    "make_images",
    "read_object",
    "tree_of",
]

_EXPECTED_VERSIONS = (1, 2)  # those whose images a boot entry can ask for; in this order


@dataclass(frozen=True, slots=True)
class BootImage:
    """An image that can be booted.

    Attributes:
        digest: of the image.
        mode: which xattrs it has.
        version: its format.
    """

    digest: Digest
    mode: XattrMode
    version: int


class BootMismatchError(IntegrityError):
    """No boot image has the digest that was expected.

    Attributes:
        expected: that digest.
        nr_tried: modes and formats that were tried.
    """

    def __init__(self, expected: Digest, nr_tried: int) -> None:
        self.expected = expected
        self.nr_tried = nr_tried
        super().__init__(
            f"No boot image configuration matched expected digest {expected} "
            f"(tried {nr_tried} mode/version combinations)"
        )


def find_config(
    repository: Repository, reference: Reference, stream: Digest | None = None
) -> tuple[StoredConfig, bool]:
    """Return the config of a container image, and whether to verify its layers.

    What a tag leads to was verified when it was stored.

    Args:
        repository: the store.
        reference: tag of the image, or digest of the config.
        stream: id of the config's stream, which vouches for the layers; ignored with a tag.

    Raises:
        InvalidRequestError: it is an artifact, which has no tree.
        NotFoundError: there is no such image or config.
        FormatError: its documents are broken.
        IntegrityError: they are not what their names say.
        OSError: the store cannot be read.
    """
    if reference.digest is not None:
        config = load_config(repository, reference.digest, stream=stream, verify=True)
        return config, stream is None
    manifest = find_manifest(repository, reference)
    if not manifest.manifest.is_container:
        msg = f"{reference.tag} is an artifact, not a container image: it has no files"
        raise InvalidRequestError(msg)
    return config_of(repository, manifest), False


def tree_of(
    repository: Repository,
    config: ConfigDocument,
    *,
    bootable: bool = False,
    mode: XattrMode = XattrMode.ALLOWLIST_ONLY,
    verify: bool = False,
) -> Directory:
    """Return the tree of an OCI image as its EROFS image has it.

    Args:
        repository: the store.
        config: of the image.
        bootable: convert for booting.
        mode: which xattrs to keep.
        verify: hash the layers and compare with the diff ids.

    Raises:
        FormatError: a layer is broken, or the tree has no form in an image, or cannot be booted.
        NotFoundError: a layer or something that the conversion needs is missing.
        IntegrityError: something is not what its digest says.
        OSError: the store cannot be read.
    """
    layers = _layers_of(config)
    if verify:
        for diff_id, stream in layers.items():
            _verify_layer(repository, diff_id, stream)
    root = build_tree(repository, [layers[diff_id] for diff_id in config.config.diff_ids])
    apply_oci(root, mode)
    if bootable:
        _transform_for_boot(repository, root)
    _check_limits(root)
    return root


def _transform_for_boot(repository: Repository, root: Directory) -> None:
    def read_content(_: bytes, file: Regular) -> bytes:
        return read_object(repository, file)

    check_boot_resources(root, read_content)
    apply_boot(root, read_content)


def read_object(repository: Repository, file: Regular) -> bytes:
    """Return the contents of a file of a tree that was built from the store.

    Raises:
        NotFoundError: its object is missing.
        IntegrityError: it is not what its name says.
        OSError: it cannot be read.
    """
    if file.digest is None:
        return file.content or b""
    with open(repository.objects.open_object(file.digest), "rb") as stream:
        return stream.read(file.size)


def compute_image(
    repository: Repository,
    config: StoredConfig,
    *,
    bootable: bool = False,
    mode: XattrMode = XattrMode.ALLOWLIST_ONLY,
    verify: bool = False,
) -> Digest:
    """Return the digest of the image in the default format; nothing is stored.

    Arguments and errors as for :func:`tree_of`.
    """
    root = tree_of(repository, config, bootable=bootable, mode=mode, verify=verify)
    return _compute(repository, root, repository.formats.default)


def link_image(repository: Repository, config: StoredConfig) -> StoredConfig:
    """Make the images of all formats of the store, unless they are there; return the new config.

    Raises:
        Other errors: as :func:`make_images`.
    """
    images = make_images(repository, config)
    return replace_images(repository, config, images) if images else config


def make_images(
    repository: Repository,
    config: ConfigDocument,
    *,
    bootable: bool = False,
    mode: XattrMode = XattrMode.ALLOWLIST_ONLY,
) -> dict[str, Digest]:
    """Store the images of all formats of the store by key, unless the config knows them.

    They get their links with the config that refers to them.

    Returns:
        What the config has to refer to; nothing if it does.

    Raises:
        Other errors: as :func:`tree_of` and :func:`cfs.repository.images.commit_image`.
    """
    if _has_images(repository, config, bootable=bootable, mode=mode):
        return {}
    root = tree_of(repository, config, bootable=bootable, mode=mode)
    return _put_images(repository, root, repository.formats, bootable=bootable, mode=mode)


def link_tagged_images(repository: Repository) -> list[str]:
    """Make the missing images of all container images with a tag; return the tags that had none.

    For stores whose images were made by older programs, or in other formats (5.5, upgrading).

    Raises:
        Other errors: as :func:`find_config` and :func:`link_image`; images before are made.
    """
    made = []
    for tag in list_tags(repository):
        manifest = load_manifest(repository, tag.digest)
        if manifest.manifest.is_container:
            config = config_of(repository, manifest)
            if link_image(repository, config) is not config:
                made.append(tag.name)
    return made


def link_boot_image(
    repository: Repository,
    config: StoredConfig,
    *,
    expected: Digest | None = None,
    mode: XattrMode = XattrMode.ALLOWLIST_ONLY,
) -> tuple[StoredConfig, BootImage]:
    """Make the bootable images of all formats of the store, or the one that is expected.

    Args:
        repository: the store.
        config: of the OCI image.
        expected: the digest that the image must have: xattrs and format are found out.
        mode: which xattrs it keeps, unless a digest is expected.

    Raises:
        BootMismatchError: no image has the expected digest.
        Other errors: as :func:`link_image`.
    """
    if expected is not None:
        return _link_expected(repository, config, expected)
    version = repository.formats.default
    images = make_images(repository, config, bootable=True, mode=mode)
    if images:
        config = replace_images(repository, config, images)
    digest = config.images[image_key(version, boot=True, mode=mode)]
    return config, BootImage(digest, mode, version)


def _link_expected(
    repository: Repository, config: StoredConfig, expected: Digest
) -> tuple[StoredConfig, BootImage]:
    for mode in XattrMode:
        root = tree_of(repository, config, bootable=True, mode=mode)
        for version in _EXPECTED_VERSIONS:
            if _compute(repository, root, version) == expected:
                images = _put_images(repository, root, Formats(version), bootable=True, mode=mode)
                config = replace_images(repository, config, images)
                return config, BootImage(expected, mode, version)
    raise BootMismatchError(expected, len(XattrMode) * len(_EXPECTED_VERSIONS))


def _compute(repository: Repository, root: Directory, version: int) -> Digest:
    from cfs.erofs.writer import Rules, write_image  # noqa: PLC0415 - numpy
    from cfs.fsverity import compute_digest  # noqa: PLC0415

    image = write_image(root, min_version=version, max_version=version, rules=Rules.RUST)
    return compute_digest(image, repository.algorithm)


def _has_images(
    repository: Repository, config: ConfigDocument, *, bootable: bool, mode: XattrMode
) -> bool:
    """Whether the images of all formats have keys and are there."""
    formats = repository.formats
    for version in (formats.default, *formats.extra):
        digest = config.images.get(image_key(version, boot=bootable, mode=mode))
        if digest is None or not _has_image(repository, digest):
            return False
    return True


def _has_image(repository: Repository, digest: Digest) -> bool:
    try:
        return repository.objects.is_sound(resolve_image(repository, str(digest)))
    except NotFoundError:
        return False


def _put_images(
    repository: Repository, root: Directory, formats: Formats, *, bootable: bool, mode: XattrMode
) -> dict[str, Digest]:
    """Store images by key; where formats 0 and 1 share one, the default format has it."""
    images: dict[str, Digest] = {}
    for version, digest in put_images(repository, root, formats).items():
        images.setdefault(image_key(version, boot=bootable, mode=mode), digest)
    return images


def _layers_of(config: ConfigDocument) -> dict[str, Digest]:
    """Return the streams of the layers by diff id, in the order of the first use of each."""
    layers = {}
    for diff_id in config.config.diff_ids:
        if diff_id not in config.layers:
            msg = f"configuration {config.digest}: layer {diff_id} is missing from its stream"
            raise FormatError(msg)
        layers[diff_id] = config.layers[diff_id]
    return layers


def _verify_layer(repository: Repository, diff_id: str, stream: Digest) -> None:
    state = new_hash(diff_id)
    if state is None:
        return
    with open_stored_stream(repository, stream) as layer:
        for data in layer.contents(repository.objects):
            state.update(data)
    found = digest_from(state)
    if found != diff_id:
        msg = f"Layer has incorrect checksum: expected {diff_id}, found {found}"
        raise IntegrityError(msg)


def _check_limits(root: Directory) -> None:
    """Refuse what no file system could hold, with its path (spec repository 6.8).

    Writing an image does so too; a dump is to say the same.
    """
    from cfs.erofs.tree_limits import check_xattrs, survey  # noqa: PLC0415

    survey(root)
    for path, child in walk(root):
        inode = inode_of(child)
        if inode.xattrs:
            try:
                check_xattrs(inode.xattrs)
            except FormatError as error:
                msg = f"{path.decode(errors='backslashreplace')}: {error}"
                raise FormatError(msg) from None
