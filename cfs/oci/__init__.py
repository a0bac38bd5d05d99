"""OCI images in a store: pulled, listed, checked, made into images (spec repository 5, 6).

Names are loaded on first use.  Pulling is :func:`cfs.oci.pull.pull`: the module has that name.
"""

from typing import TYPE_CHECKING

from cfs.lazy import load_lazily

if TYPE_CHECKING:
    from cfs.oci.copy import copy_image
    from cfs.oci.documents import config_of, find_manifest
    from cfs.oci.fsck import check_images
    from cfs.oci.images import tree_of
    from cfs.oci.mountable import find_mountable
    from cfs.oci.reference import Reference
    from cfs.oci.sources import LocalFetch, SourceOptions
    from cfs.oci.tags import list_tags, remove_tag, set_tag

__all__ = [
    "LocalFetch",
    "Reference",
    "SourceOptions",
    "check_images",
    "config_of",
    "copy_image",
    "find_manifest",
    "find_mountable",
    "list_tags",
    "remove_tag",
    "set_tag",
    "tree_of",
]

__getattr__ = load_lazily(
    __name__,
    {
        "copy": ["copy_image"],
        "documents": ["config_of", "find_manifest"],
        "fsck": ["check_images"],
        "images": ["tree_of"],
        "mountable": ["find_mountable"],
        "reference": ["Reference"],
        "sources": ["LocalFetch", "SourceOptions"],
        "tags": ["list_tags", "remove_tag", "set_tag"],
    },
)
