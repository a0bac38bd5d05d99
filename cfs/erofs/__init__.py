"""EROFS images: read, written, and what composefs means by their content.

Names are loaded on first use, so that importing the package does not import numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfs.erofs.images import View, load_image, open_image, parse_image
    from cfs.erofs.overlay import mount_view, tree_view
    from cfs.erofs.reader import read_image

__all__ = [
    "View",
    "load_image",
    "mount_view",
    "open_image",
    "parse_image",
    "read_image",
    "tree_view",
]

_MODULES = {
    "View": "images",
    "load_image": "images",
    "mount_view": "overlay",
    "open_image": "images",
    "parse_image": "images",
    "read_image": "reader",
    "tree_view": "overlay",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
