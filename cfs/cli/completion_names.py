"""Names that arguments may have: of images, tags, layers and mounts, for completion.

They come from the store that the options name, or with ``--connect`` from the service.  Nothing is
converted, and nobody is waited for long.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from cfs.cli.connect import default_store
from cfs.errors import CfsError

if TYPE_CHECKING:
    from cfs.client import Client
    from cfs.repository.repository import Repository

__all__ = ["Candidates", "find_names"]

_LAYER = b"oci-layer-"
_SERVICE_SECONDS = 2.0
_SHORT_DIGEST_SIZE = 12

Values = Mapping[str, str]
Names = Iterator[tuple[str, str]]


class Candidates(NamedTuple):
    """What may stand somewhere.

    Attributes:
        kind: ``files``, ``directories`` or ``nothing``: what the shell itself offers besides.
        words: and what each one means.
    """

    kind: str = "nothing"
    words: Sequence[tuple[str, str]] = ()


def find_names(argument: str, values: Values) -> list[tuple[str, str]]:
    """Return the names that an argument may have, and what each one means.

    Args:
        argument: words of the command, and the name of the parameter.
        values: of the options before it, by parameter; of a flag that was given, anything.
    """
    table = _NAMES if "connect" not in values else _SERVICE_NAMES
    find = table.get(argument)
    try:
        return [] if find is None else list(find(values))
    except (CfsError, OSError):  # no store, no rights: nothing to offer
        return []


@contextmanager
def _opened(values: Values, path: str | None = None) -> "Iterator[Repository]":
    """Open a store, by default that of the options."""
    from cfs.repository.repository import Repository, default_path

    if path is None:
        path = values.get("repo")
    if path is None:
        path = default_path(user="user" in values, system="system" in values)
    path = os.path.expanduser(path)  # which the shell has not done yet
    with Repository.open(path, upgrade=False, insecure=True, wait=False) as store:
        yield store


@contextmanager
def _connected(values: Values) -> "Iterator[Client]":
    from cfs.client import Client

    with Client(values["connect"] or None, timeout=_SERVICE_SECONDS) as client:
        yield client


@contextmanager
def _opened_there(values: Values) -> "Iterator[tuple[Client, int]]":
    """Open the store that a service uses without ``--repo``."""
    with _connected(values) as client, default_store(client) as store:
        yield client, store.handle


def _shorten(digest: str) -> str:
    return digest.removeprefix("sha256:")[:_SHORT_DIGEST_SIZE]


def _describe_image(name: str, digest: str) -> tuple[str, str]:
    return f"refs/{name}" if "/" in name else name, _shorten(digest)


def _images(values: Values) -> Names:
    from cfs.repository.images import list_images

    with _opened(values) as store:
        for image in list_images(store):
            yield _describe_image(image.name, image.digest)


def _images_there(values: Values) -> Names:
    from cfs.client.repository import ListImageRefs

    with _opened_there(values) as (client, handle):
        for image in client.call(ListImageRefs(handle)).images:
            yield _describe_image(image.name, image.digest)


def _tags(values: Values, path: str | None = None) -> Names:
    from cfs.oci.tags import list_tags

    with _opened(values, path) as store:
        for tag in list_tags(store):
            yield tag.name, _shorten(tag.digest)


def _tags_there(values: Values) -> Names:
    from cfs.client.oci import ListImages

    with _opened_there(values) as (client, handle):
        for image in client.call(ListImages(handle)).images:
            yield image.name, _shorten(image.manifest_digest)


def _foreign_tags(values: Values) -> Names:
    """Yield the tags of the store to copy from."""
    return _tags(values, values.get("source"))


def _manifests(values: Values) -> Names:
    from cfs.oci.tags import list_tags

    with _opened(values) as store:
        for tag in list_tags(store):
            yield tag.digest, tag.name


def _layers(values: Values) -> Names:
    with _opened(values) as store:
        directory = os.open("streams", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=store.fd)
        try:
            names = sorted(os.fsencode(name) for name in os.listdir(directory))
        finally:
            os.close(directory)
    for name in names:
        if name.startswith(_LAYER):
            yield os.fsdecode(name.removeprefix(_LAYER)), ""


def _mountpoints(_: Values) -> Names:
    from cfs.cli.runtime import all_records_directories
    from cfs.mounting.records import find_mounts

    for mount in find_mounts(all_records_directories()):
        yield os.fsdecode(mount.entry.mountpoint), mount.record.image


def _mountpoints_there(values: Values) -> Names:
    from cfs.client.repository import ListMounts

    with _connected(values) as client:
        for mount in client.call(ListMounts()).mounts:
            if mount.mountpoint is not None:
                yield mount.mountpoint, mount.image


_NAMES: Mapping[str, Callable[[Values], Names]] = {
    "mount image": _images,
    "image-objects name": _images,
    "dump-files image": _images,
    "umount mountpoints": _mountpoints,
    "oci inspect image": _tags,
    "oci mount image": _tags,
    "oci untag name": _tags,
    "oci tag digest": _manifests,
    "oci layer diff_id": _layers,
    "oci dump reference": _tags,
    "oci compute-id reference": _tags,
    "oci prepare-boot reference": _tags,
    "oci copy image": _foreign_tags,
    "oci fsck image": _tags,
}
_SERVICE_NAMES: Mapping[str, Callable[[Values], Names]] = {
    "mount image": _images_there,
    "image-objects name": _images_there,
    "umount mountpoints": _mountpoints_there,
    "oci inspect image": _tags_there,
    "oci mount image": _tags_there,
    "oci untag name": _tags_there,
    "oci compute-id reference": _tags_there,
    "oci fsck image": _tags_there,
}
