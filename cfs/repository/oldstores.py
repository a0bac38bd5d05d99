"""Stores from before ``meta.json`` (spec repository 1.6): recognise and convert them."""

import os
from collections.abc import Iterator
from contextlib import suppress

from cfs.digest import Algorithm
from cfs.errors import CfsError, NotFoundError
from cfs.fsverity import measure
from cfs.linux.files import openat2
from cfs.repository.metadata import Metadata
from cfs.repository.metafile import create_metadata, read_metadata
from cfs.repository.refs import STREAMS, entries, object_of_target
from cfs.repository.splitstream import SplitStream

__all__ = ["convert", "have_verity", "infer_algorithm"]

_NAME_SIZES = {2 * algorithm.digest_size - 2: algorithm for algorithm in Algorithm}
_FAN_OUT_SIZE = 2
_CONFIG = b"oci-config-"
_IMAGE_KEY = "composefs.image"
_V1 = "v1"


def infer_algorithm(directory_fd: int) -> Algorithm:
    """Return the algorithm that the name of an object tells.

    Raises:
        NotFoundError: there is no object.
        OSError: reading failed.
    """
    return _NAME_SIZES[len(os.path.basename(next(_walk(directory_fd))))]


def convert(directory_fd: int) -> tuple[Metadata, bool]:
    """Write the ``meta.json`` that an old store lacks; tell also whether it is secure now.

    It is so only if every object has fs-verity, as nothing else could be opened any more, and
    its format is 2 if its images are (composefs-rs looks at one object, and takes format 1).

    Raises:
        NotFoundError: there is no object.
        OSError: reading or writing failed.
    """
    algorithm = infer_algorithm(directory_fd)
    is_secure = have_verity(directory_fd, algorithm)
    version = 2 if _has_images_of_format_2(directory_fd, algorithm) else 1
    while (found := read_metadata(directory_fd)) is None:
        with suppress(FileExistsError):  # somebody else was faster
            create_metadata(directory_fd, Metadata.create(algorithm, version), is_secure=is_secure)
    return found


def have_verity(directory_fd: int, algorithm: Algorithm) -> bool:
    """Whether all objects have fs-verity.

    Raises:
        NotFoundError: there is no object.
        OSError: reading failed.
    """
    return all(_has_verity(directory_fd, path, algorithm) for path in _walk(directory_fd))


def _walk(directory_fd: int) -> Iterator[bytes]:
    """Yield the paths of what is an object by its name; there is one at least."""
    try:
        fan_outs = _list(directory_fd, b"objects")
    except FileNotFoundError as error:
        msg = f"opening objects/ directory: {error.strerror}"
        raise NotFoundError(msg) from None
    nr_found = 0
    for fan_out in fan_outs:
        if len(fan_out) != _FAN_OUT_SIZE:
            continue
        with suppress(NotADirectoryError):
            for name in _list(directory_fd, b"objects/" + fan_out):
                if len(name) in _NAME_SIZES:
                    nr_found += 1
                    yield b"objects/" + fan_out + b"/" + name
    if not nr_found:
        msg = "no objects found in repository — cannot infer metadata"
        raise NotFoundError(msg)


def _list(directory_fd: int, path: bytes) -> list[bytes]:
    fd = openat2(directory_fd, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return [os.fsencode(name) for name in os.listdir(fd)]
    finally:
        os.close(fd)


def _has_verity(directory_fd: int, path: bytes, algorithm: Algorithm) -> bool:
    """Whether a file has fs-verity; no if it is none or cannot be opened."""
    try:
        fd = openat2(directory_fd, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        digest = measure(fd)
    finally:
        os.close(fd)
    return digest is not None and digest.algorithm is algorithm


def _has_images_of_format_2(directory_fd: int, algorithm: Algorithm) -> bool:
    """Whether a config names an image of format 2; a stream that cannot be read says nothing."""
    for entry in entries(directory_fd, STREAMS):
        if entry.target is None or not entry.name.startswith(_CONFIG):
            continue
        with suppress(CfsError, OSError):
            path = b"objects/" + object_of_target(entry.target).object_path
            fd = openat2(directory_fd, path, os.O_RDONLY | os.O_NONBLOCK)
            with SplitStream(fd, algorithm) as stream:
                if any(map(_is_key_of_format_2, stream.named_refs)):
                    return True
    return False


def _is_key_of_format_2(name: str) -> bool:
    return name.startswith(_IMAGE_KEY) and _V1 not in name.split(".")
