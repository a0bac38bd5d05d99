"""Writes a tree as an EROFS image.

Specification: erofs-image, sections 5 and 6.  Versions 0 and 1 are bit-identical to what the C
tool ``mkcomposefs`` writes, version 2 to composefs-rs.
"""

from collections.abc import Sequence
from enum import Enum

from cfs.erofs.encoding import RecordError, encode_image
from cfs.erofs.format import ImageVersion
from cfs.erofs.layout import Record, Replacements, at_first_names, breadth_first, depth_first
from cfs.erofs.overlay_rewrite import (
    STUB_NAMES,
    OverlayRewriter,
    equals_stub,
    new_stub,
    with_stubs,
)
from cfs.erofs.shared_xattrs import XattrEncoder
from cfs.erofs.tree_limits import path_of, survey
from cfs.errors import FormatError, InvalidRequestError
from cfs.tree import Directory, Special

__all__ = ["Rules", "choose_version", "write_image"]


class Rules(Enum):
    """Whose reading of versions 0 and 1 to follow where the two programs differ (12.3)."""

    C = "c"
    RUST = "rust"


def write_image(
    root: Directory, *, min_version: int = 0, max_version: int = 1, rules: Rules = Rules.C
) -> bytearray:
    """Return the image of a tree, which is not changed.

    Args:
        root: the tree.
        min_version: lowest image version allowed.
        max_version: highest; a tree with whiteouts gets version 1 rather than 0 if it is 1.
            Version 2 is written if both are 2.
        rules: which program to be bit-identical to; version 2 is always composefs-rs's.

    Raises:
        FormatError: something in the tree has no form in the image version.
        InvalidRequestError: the versions are out of range, or the objects form no tree.
    """
    look = survey(root)
    has_whiteouts = look.has_whiteouts and rules is Rules.C
    version = choose_version(min_version, max_version, has_whiteouts=has_whiteouts)
    is_rust = rules is Rules.RUST or version == ImageVersion.V2
    queue = _number(root, version, is_rust=is_rust, has_links=look.has_links)
    encoder = XattrEncoder(version)
    whiteouts = {}
    if look.has_whiteouts and version != ImageVersion.V2:
        whiteouts = _whiteouts_to_escape(root, queue, is_rust=is_rust)
    rewriter = OverlayRewriter(version, encoder, is_rust=is_rust, whiteouts=whiteouts)
    for record in queue:
        try:
            rewriter.rewrite(record)
        except FormatError as error:
            raise FormatError(f"{path_of(root, record.inode)}: {error}") from None
    try:
        return encode_image(queue, version, encoder, is_rust=is_rust)
    except RecordError as error:
        raise FormatError(f"{path_of(root, error.record.inode)}: {error}") from None


def choose_version(
    min_version: int, max_version: int, *, has_whiteouts: bool = False
) -> ImageVersion:
    """Return the version that ``mkcomposefs`` chooses (1.5).

    Raises:
        InvalidRequestError: a version is out of range.
    """
    if min_version == max_version == ImageVersion.V2:
        return ImageVersion.V2
    for what, number in (("lowest", min_version), ("highest", max_version)):
        if number not in (ImageVersion.V0, ImageVersion.V1):
            msg = f"{what} image version {number}: expected 0 or 1, or 2 for both"
            raise InvalidRequestError(msg)
    if min_version == 0 and max_version == 1 and has_whiteouts:
        return ImageVersion.V1
    return ImageVersion(min_version)


def _number(
    root: Directory, version: ImageVersion, *, is_rust: bool, has_links: bool
) -> list[Record]:
    """Return all inodes in the order of the image, with their dirents and link counts."""
    replacements: Replacements = {}
    nr_names: dict[int, int] = {}
    if is_rust and has_links:
        replacements, nr_names = at_first_names(root)
    if version == ImageVersion.V2:
        queue = depth_first(root, replacements)
    else:
        children = replacements.get(id(root), root.children)
        replacements[id(root)] = with_stubs(root, children)
        queue = breadth_first(root, replacements)
    if is_rust:
        for record in queue:
            if not isinstance(record.inode, Directory):
                record.nlink = nr_names.get(id(record.inode), 1)
    return queue


def _whiteouts_to_escape(
    root: Directory, queue: Sequence[Record], *, is_rust: bool
) -> dict[int, int]:
    """Return the ``id`` of each whiteout but for stubs, with that of its directory."""
    model = new_stub(root)
    stubs = set()
    for name, record in zip(queue[0].names, queue[0].children, strict=True):
        if name not in STUB_NAMES or not isinstance(record.inode, Special):
            continue
        if name not in root.children or (is_rust and equals_stub(record.inode, model)):
            stubs.add(id(record.inode))
    return {
        id(record.inode): id(record.parent.inode)
        for record in queue
        if record.inode.is_whiteout and id(record.inode) not in stubs
    }
