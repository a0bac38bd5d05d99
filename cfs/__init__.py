"""composefs for Python: read, write and serve composefs images.

Everything is loaded when it is first used; ``import cfs`` alone loads neither numpy nor pyfuse3.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cfs.lazy import load_lazily

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from cfs.digest import Algorithm, Digest
    from cfs.directory import ScanOptions, scan
    from cfs.dumpfile import format_tree, format_vector, parse_dumpfile
    from cfs.erofs import open_image
    from cfs.erofs.writer import write_image
    from cfs.errors import (
        CfsError,
        ConflictError,
        FormatError,
        IntegrityError,
        InvalidRequestError,
        MountError,
        NotFoundError,
        UnsupportedError,
    )
    from cfs.fuse import Mount, ServeOptions
    from cfs.inodes import InodeVector

__all__ = [
    "Algorithm",
    "CfsError",
    "ConflictError",
    "Digest",
    "FormatError",
    "InodeVector",
    "IntegrityError",
    "InvalidRequestError",
    "MountError",
    "NotFoundError",
    "ScanOptions",
    "ServeOptions",
    "UnsupportedError",
    "format_tree",
    "format_vector",
    "open_image",
    "parse_dumpfile",
    "scan",
    "serve",
    "write_image",
]
__version__ = "0.1.0"

__getattr__ = load_lazily(
    __name__,
    {
        "digest": ["Algorithm", "Digest"],
        "directory": ["ScanOptions", "scan"],
        "dumpfile": ["format_tree", "format_vector", "parse_dumpfile"],
        "erofs": ["open_image"],
        "erofs.writer": ["write_image"],
        "errors": [
            "CfsError", "ConflictError", "FormatError", "IntegrityError", "InvalidRequestError",
            "MountError", "NotFoundError", "UnsupportedError",
        ],
        "fuse.options": ["ServeOptions"],
        "inodes": ["InodeVector"],
    },
)  # fmt: skip


def serve(
    image: "str | os.PathLike[str] | InodeVector",
    mountpoint: str | os.PathLike[str],
    basedirs: Sequence[str | os.PathLike[str]],
    *,
    name: str | None = None,
    options: "ServeOptions | None" = None,
) -> "AbstractContextManager[Mount]":
    """Serve an image over FUSE while the block runs.

    Args:
        image: image file, or the mount view of one.
        mountpoint: existing directory.
        basedirs: objects directories, searched in this order.
        name: shown as mount source ``composefs:NAME``; by default the path of the image.
        options: how to serve; by default plain FUSE with one worker for each CPU.

    Raises:
        FormatError: the image breaks its format.
        MountError: it cannot be mounted.
        OSError: image or objects directory cannot be opened.
    """
    from cfs import erofs, fuse  # noqa: PLC0415 - loaded when used
    from cfs.inodes import InodeVector  # noqa: PLC0415

    if isinstance(image, InodeVector):
        vector = image
    else:
        vector = erofs.open_image(image)
        name = name or os.fspath(image)
    options = options or fuse.ServeOptions()
    return fuse.serve(vector, mountpoint, basedirs, name=name or "", options=options)
