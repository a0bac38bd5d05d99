"""Images of a store: writing, listing, opening (spec repository 4).

An image is an object that ``images/ID`` leads to.  It gets this link when it and all objects it
refers to are durable.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cfs.digest import Digest
from cfs.errors import FormatError, InvalidRequestError, UnsupportedError
from cfs.fsverity import measure
from cfs.repository.metadata import Formats
from cfs.repository.mounted import PREFIX, is_reserved
from cfs.repository.refs import IMAGES, REFS, check_name, resolve_image, set_link, walk_refs
from cfs.repository.repository import Repository
from cfs.tree import Directory, inode_of, walk

__all__ = [
    "ImageFile",
    "NamedImage",
    "check_image_name",
    "commit_image",
    "image_objects",
    "import_image",
    "link_images",
    "list_images",
    "open_image",
    "put_images",
]


def check_image_name(name: str) -> bytes:
    """Return a name for an image, as path below ``images/refs``.

    Raises:
        InvalidRequestError: no name can be like that, or it belongs to mounts.
    """
    path = check_name(name)
    if is_reserved(path):
        msg = f"invalid name {name!r}: names below 'mounted' belong to FUSE mounts"
        raise InvalidRequestError(msg)
    return path


def commit_image(repository: Repository, root: Directory, name: str | None = None) -> Digest:
    """Write a tree as an image in all formats of the store.

    Args:
        repository: the store; has the contents of all files.
        root: the tree.
        name: for the image in the default format.

    Returns:
        The digest of the image in the default format.

    Raises:
        InvalidRequestError: the name cannot be one.
        ConflictError: something that is no link has the name.
        FormatError: the tree has no form in one of the formats, or none that can be read.
        OSError: the store cannot be written to.
    """
    path = None if name is None else check_image_name(name)
    digests = list(put_images(repository, root).values())
    link_images(repository, digests, path)
    return digests[0]


def put_images(
    repository: Repository, root: Directory, formats: Formats | None = None
) -> dict[int, Digest]:
    """Store a tree as an image in several formats, without links; return the digests.

    Args:
        repository: as for :func:`commit_image`, and so are the errors.
        root: the tree.
        formats: in place of those of the store.

    Returns:
        The digests by format, the default first.
    """
    from cfs.erofs import View, parse_image  # noqa: PLC0415 - listing does without numpy
    from cfs.erofs.writer import Rules, write_image  # noqa: PLC0415

    repository.check_writable()
    _check_whiteouts(root)
    formats = formats or repository.formats
    versions = [formats.default, *sorted(set(formats.extra) - {formats.default})]
    digests = {}
    for version in versions:
        data = write_image(root, min_version=version, max_version=version, rules=Rules.RUST)
        # composefs-rs writes a few that nothing can read, and we write what it writes
        parse_image(data, f"image of format {version}", view=View.RAW)
        digests[version] = repository.objects.put_bytes(data)
    return digests


def import_image(repository: Repository, data: bytes, name: str) -> Digest:
    """Store an image that is there already, under a name.

    Its objects need not be in the store yet.

    Raises:
        FormatError: it is no image, or its objects have digests of another algorithm.
        InvalidRequestError: the name cannot be one.
        ConflictError: something that is no link has the name.
        OSError: the store cannot be written to.
    """
    from cfs.erofs import View, parse_image  # noqa: PLC0415 - numpy
    from cfs.repository.references import find_references  # noqa: PLC0415 - numpy

    path = check_image_name(name)
    repository.check_writable()
    for digest in find_references(parse_image(data, "image", view=View.RAW)):
        if digest.algorithm is not repository.algorithm:
            msg = (
                f"image: object {digest} is named by {digest.algorithm.name.lower()}: "
                f"expected {repository.algorithm.name.lower()}"
            )
            raise FormatError(msg)
    digest = repository.objects.put_bytes(data)
    link_images(repository, [digest], path)
    return digest


def _check_whiteouts(root: Directory) -> None:
    seen: set[int] = set()
    for path, child in walk(root):
        inode = inode_of(child)
        if inode.is_whiteout:
            if id(inode) in seen:
                where = path.decode(errors="backslashreplace")
                msg = f"invalid composefs filesystem: whiteout inode has nlink > 1: {where}"
                raise FormatError(msg)
            seen.add(id(inode))


def link_images(
    repository: Repository, digests: Sequence[Digest], name: bytes | None = None
) -> None:
    """Make the entries of images that were stored, which are made durable before.

    Args:
        repository: the store.
        digests: of the images.
        name: for the first one, see :func:`check_image_name`.

    Raises:
        ConflictError: something that is no link has the name.
        OSError: syncing or linking failed.
    """
    repository.sync()
    category = IMAGES.encode()
    for digest in digests:
        entry = category + b"/" + str(digest).encode()
        set_link(repository.fd, entry, b"objects/" + digest.object_path)
    if name is not None:
        entry = category + b"/" + str(digests[0]).encode()
        set_link(repository.fd, category + b"/" + REFS + b"/" + name, entry)


@dataclass(frozen=True, slots=True)
class NamedImage:
    """A name of an image, and what it leads to: a digest, unless somebody else made it."""

    name: str
    digest: str


def list_images(repository: Repository) -> list[NamedImage]:
    """Return the names below ``images/refs``, sorted, without those of mounts.

    What is no link or no UTF-8 is left out; what leads nowhere is not.

    Raises:
        OSError: they cannot be listed.
    """
    images = []
    for ref in walk_refs(repository.fd, IMAGES):
        if ref.target is not None and not ref.name.startswith(PREFIX):
            with suppress(UnicodeDecodeError):
                digest = ref.target.rpartition(b"/")[2].decode()
                images.append(NamedImage(ref.name.decode(), digest))
    return images


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An open image.

    Attributes:
        fd: open for reading.
        digest: of the image; the kernel has confirmed it if ``has_verity``.
        name: it was opened by.
        has_verity: whether fs-verity is on for the image itself.
    """

    fd: int
    digest: Digest
    name: str
    has_verity: bool


@contextmanager
def open_image(repository: Repository, name: str) -> Iterator[ImageFile]:
    """Open an image for the duration of a block.

    Args:
        repository: the store.
        name: digest in lower case hex, ``refs/NAME``, or ``NAME`` if it holds no slash.

    Raises:
        InvalidRequestError: no name can be like that.
        NotFoundError: there is no such image.
        IntegrityError: it is not what its name says, or has no fs-verity in a secure store.
        OSError: it cannot be opened.
    """
    digest = resolve_image(repository, name)
    fd = repository.objects.open_object(digest)
    try:
        yield ImageFile(fd, digest, name, _has_verity(fd))
    finally:
        os.close(fd)


def _has_verity(fd: int) -> bool:
    try:
        return measure(fd) is not None
    except UnsupportedError:
        return False


def image_objects(repository: Repository, name: str) -> list[Digest]:
    """Return the objects that an image needs, sorted; the image is not among them.

    Raises:
        FormatError: it is no valid image.
        Other errors: as :func:`open_image`.
    """
    from cfs.repository.references import load_references  # noqa: PLC0415 - numpy

    with open_image(repository, name) as image:
        return sorted(load_references(image.fd, name), key=str)
