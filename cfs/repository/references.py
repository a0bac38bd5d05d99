"""Which objects an image refers to; spec repository 4.2, 8.2.  No state; any thread."""

import re

import numpy as np
from numpy.typing import NDArray

from cfs.digest import Algorithm, Digest
from cfs.erofs.images import View, load_image
from cfs.inodes import InodeVector

__all__ = ["find_references", "load_references"]

# in either case, whatever stands before it
_PATH = re.compile(rb"(?:.*/)?([0-9a-f]{2})/([0-9a-f]{62}|[0-9a-f]{126})", re.DOTALL | re.I)


def load_references(fd: int, name: str) -> set[Digest]:
    """Return the objects that an image needs, itself not among them.

    Args:
        fd: the image, open for reading; borrowed.
        name: of the image, for messages.

    Raises:
        FormatError: it is no valid image.
        OSError: it cannot be read.
    """
    return find_references(load_image(fd, name, view=View.RAW))


def find_references(vector: InodeVector) -> set[Digest]:
    """Return the objects that an image needs, given its raw view."""
    found = {
        Digest(row.tobytes())
        for algorithm in Algorithm
        for row in _unique_digests(vector, algorithm.digest_size)
    }
    return found | _digests_of_paths(vector)


def _unique_digests(vector: InodeVector, digest_size: int) -> NDArray[np.void]:
    """Return the distinct digests of a size, each as one item."""
    rows = vector.object_digest[vector.object_digest_size == digest_size, :digest_size]
    return np.unique(np.ascontiguousarray(rows).view(f"V{digest_size}").ravel())


def _digests_of_paths(vector: InodeVector) -> set[Digest]:
    """Return the objects that are known by their path only, as images of the C tools may have."""
    found = set()
    for row in np.flatnonzero(vector.object_digest_size == 0):
        path = vector.read(int(vector.object_path_off[row]), int(vector.object_path_size[row]))
        if match := _PATH.fullmatch(path):
            found.add(Digest(bytes.fromhex((match[1] + match[2]).decode())))
    return found
