"""The repository: objects, streams, images and their names; spec repository 1 to 4, 8, 9.

Names are loaded on first use.
"""

from typing import TYPE_CHECKING

from cfs.lazy import load_lazily

if TYPE_CHECKING:
    from cfs.repository.fsck import check
    from cfs.repository.gc import collect
    from cfs.repository.images import (
        commit_image,
        image_objects,
        import_image,
        list_images,
        open_image,
    )
    from cfs.repository.repository import Repository, init

__all__ = [
    "Repository",
    "check",
    "collect",
    "commit_image",
    "image_objects",
    "import_image",
    "init",
    "list_images",
    "open_image",
]

__getattr__ = load_lazily(
    __name__,
    {
        "fsck": ["check"],
        "gc": ["collect"],
        "images": ["commit_image", "image_objects", "import_image", "list_images", "open_image"],
        "repository": ["Repository", "init"],
    },
)
