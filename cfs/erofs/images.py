"""Read an image as a view."""

import os
import stat
from enum import Enum
from pathlib import Path

import numpy as np

from cfs.erofs.headers import MAX_IMAGE_SIZE
from cfs.erofs.overlay import mount_view, tree_view
from cfs.erofs.reader import read_image
from cfs.errors import FormatError
from cfs.inodes import InodeVector

__all__ = ["View", "load_image", "open_image", "parse_image"]


class View(Enum):
    """What to see of an image (spec erofs-image 10.1)."""

    RAW = "raw"
    TREE = "tree"
    MOUNT = "mount"


def open_image(path: str | bytes | os.PathLike[str], *, view: View = View.MOUNT) -> InodeVector:
    """Read and check an image file; as :func:`load_image`, given a path.

    Raises:
        FormatError: it is no valid image; the message starts with the path.
        OSError: the file cannot be read.
    """
    with Path(os.fsdecode(path)).open("rb", buffering=0) as file:
        return load_image(file.fileno(), os.fsdecode(path), view=view)


def load_image(fd: int, name: str, *, view: View = View.MOUNT) -> InodeVector:
    """Read and check an image.

    The file is copied: what happens to it afterwards changes nothing.

    Args:
        fd: open for reading, at its start; borrowed, its position moves.
        name: for messages.
        view: everything as stored, the tree it was made from, or what a mount shows.

    Raises:
        FormatError: it is no valid image.
        OSError: it cannot be read.
    """
    with open(fd, "rb", closefd=False) as file:
        status = os.fstat(fd)
        size = status.st_size if stat.S_ISREG(status.st_mode) else MAX_IMAGE_SIZE  # others hide it
        data = b""
        if size <= MAX_IMAGE_SIZE:
            data = file.read(size + 1)
            size = len(data)
    if size > MAX_IMAGE_SIZE:
        msg = f"{name}: size is {size}: expected at most {MAX_IMAGE_SIZE}"
        raise FormatError(msg)
    return parse_image(data, name, view=view)


def parse_image(data: bytes | bytearray, name: str, *, view: View = View.MOUNT) -> InodeVector:
    """Check an image in memory; as :func:`load_image`.

    Raises:
        FormatError: it is no valid image.
    """
    try:
        vector = read_image(np.frombuffer(data, np.uint8))
    except FormatError as error:
        msg = f"{name}: {error}"
        raise FormatError(msg) from error
    if view is View.RAW:
        return vector
    return tree_view(vector) if view is View.TREE else mount_view(vector)
