"""What composefs-rs does to a tree before it becomes an image (spec repository 6.5 to 6.7).

The transformations decide the image id, so they follow composefs-rs wherever it gives a result.
They change the tree in place, whatever it was made from; files that have to be read are read
through a callback, since only the caller knows where contents are.

Names are loaded on first use.
"""

from typing import TYPE_CHECKING

from cfs.lazy import load_lazily

if TYPE_CHECKING:
    from cfs.transform.boot import apply_boot, check_boot_resources
    from cfs.transform.contents import ReadContent
    from cfs.transform.oci import XattrMode, apply_oci

__all__ = ["ReadContent", "XattrMode", "apply_boot", "apply_oci", "check_boot_resources"]

__getattr__ = load_lazily(
    __name__,
    {
        "boot": ["apply_boot", "check_boot_resources"],
        "contents": ["ReadContent"],
        "oci": ["XattrMode", "apply_oci"],
    },
)
