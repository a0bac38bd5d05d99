"""composefs for Python: read, write and serve composefs images.

Everything is loaded when it is first used; ``import cfs`` alone loads neither numpy nor pyfuse3.
"""

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

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

_MODULES = {
    "Algorithm": "cfs.digest",
    "Digest": "cfs.digest",
    "InodeVector": "cfs.inodes",
    "ScanOptions": "cfs.directory",
    "ServeOptions": "cfs.fuse.options",
    "format_tree": "cfs.dumpfile",
    "format_vector": "cfs.dumpfile",
    "open_image": "cfs.erofs",
    "parse_dumpfile": "cfs.dumpfile",
    "scan": "cfs.directory",
    "write_image": "cfs.erofs.writer",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    module = importlib.import_module(_MODULES.get(name, "cfs.errors"))
    value = globals()[name] = getattr(module, name)
    return value


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
