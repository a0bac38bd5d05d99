"""EROFS images: read, written, and what composefs means by their content.

Names are loaded on first use, so that importing the package does not import numpy.
"""

from typing import TYPE_CHECKING

from cfs.lazy import load_lazily

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

__getattr__ = load_lazily(
    __name__,
    {
        "images": ["View", "load_image", "open_image", "parse_image"],
        "overlay": ["mount_view", "tree_view"],
        "reader": ["read_image"],
    },
)
