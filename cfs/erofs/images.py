"""Open an image file as a view.  Pure but for reading the file."""

import os
from enum import Enum
from pathlib import Path

import numpy as np

from cfs.erofs.headers import MAX_IMAGE_SIZE
from cfs.erofs.overlay import mount_view, tree_view
from cfs.erofs.reader import read_image
from cfs.errors import FormatError
from cfs.inodes import InodeVector

__all__ = ["View", "open_image"]


class View(Enum):
    """What to see of an image (spec erofs-image 10.1)."""

    RAW = "raw"
    TREE = "tree"
    MOUNT = "mount"


def open_image(path: str | bytes | os.PathLike[str], *, view: View = View.MOUNT) -> InodeVector:
    """Read and check an image file.

    The file is copied: what happens to it afterwards changes nothing.

    Args:
        path: the image.
        view: everything as stored, the tree it was made from, or what a mount shows.

    Raises:
        FormatError: it is no valid image; the message starts with the path.
        OSError: the file cannot be read.
    """
    with Path(os.fsdecode(path)).open("rb") as file:
        size = os.fstat(file.fileno()).st_size or MAX_IMAGE_SIZE  # devices do not say
        data = b""
        if size <= MAX_IMAGE_SIZE:
            data = file.read(size + 1)
            size = len(data)
        if size > MAX_IMAGE_SIZE:
            msg = f"{os.fsdecode(path)}: size is {size}: expected at most {MAX_IMAGE_SIZE}"
            raise FormatError(msg)
    try:
        vector = read_image(np.frombuffer(data, np.uint8))
    except FormatError as error:
        msg = f"{os.fsdecode(path)}: {error}"
        raise FormatError(msg) from error
    if view is View.RAW:
        return vector
    return tree_view(vector) if view is View.TREE else mount_view(vector)
