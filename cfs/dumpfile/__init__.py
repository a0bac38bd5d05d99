"""Dumpfiles: one line of text per path (spec erofs-image 7).

Text to tree, and tree view of a vector or tree to text.  Pure: no file is opened.
"""

from cfs.dumpfile.parser import parse_dumpfile
from cfs.dumpfile.printer import (
    format_backing_path,
    format_file,
    format_listing,
    format_tree,
    format_vector,
    object_paths,
)

__all__ = [
    "format_backing_path",
    "format_file",
    "format_listing",
    "format_tree",
    "format_vector",
    "object_paths",
    "parse_dumpfile",
]
