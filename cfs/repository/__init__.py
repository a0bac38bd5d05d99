"""The repository: objects, streams, images and their names; spec repository 1 to 4, 8, 9.

Names are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_MODULES = {
    "Repository": "repository",
    "check": "fsck",
    "collect": "gc",
    "init": "repository",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'images')}"), name)
