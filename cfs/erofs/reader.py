"""An EROFS image to a checked ``InodeVector``, whole columns at a time.

Specification: erofs-image section 9.  Addresses of inodes stand in directory entries only, so
directories are read level by level from the root; everything else is read afterwards, for all
inodes at once.  The input is hostile: whatever it is, the result is a vector or a
``FormatError``, within memory of a constant times the image's size.  To bound that, this
reader also refuses what no writer does: inodes that overlap, data blocks or shared xattrs
used twice.  Pure, no state; any thread.
"""

import stat
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cfs.erofs.arrays import Bools, Bytes, Ints, check, contains, ranges, starts_of
from cfs.erofs.dirents import Dirents, check_names, load_dirents
from cfs.erofs.format import BLOCK_SIZE, SLOT_SIZE, FileType
from cfs.erofs.headers import FIRST_NID, Image, Inodes, load_image, load_inodes
from cfs.erofs.objects import load_objects
from cfs.erofs.xattrs import load_xattrs
from cfs.errors import FormatError
from cfs.inodes import NO_OBJECT, InodeVector

__all__ = ["read_image"]

MAX_DEPTH = 2048
_T = TypeVar("_T", bound=np.generic)
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
# type code of a directory entry by the type nibble of the mode
_FILE_TYPES = np.array([FileType.of_mode(nibble << 12) or 0 for nibble in range(16)], np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class _Tree:
    """What the walk found: nids in row order from row 1 on, row of each slot, all entries."""

    nid: Ints
    row_of: NDArray[np.uint32]
    dirents: Dirents


def read_image(image: NDArray[np.uint8]) -> InodeVector:
    """Return everything that an image holds, as it is stored.

    Rows are in breadth-first order.  Stubs and whiteout devices, escaped names and the xattrs
    of overlayfs are all there; ``cfs.erofs.overlay`` makes views of it.

    Args:
        image: ``uint8[p]``, the whole image; becomes the pool and read-only.

    Raises:
        FormatError: a check of spec 9 failed; the message names nid, field, expected and found.
    """
    checked = load_image(image)
    tree = _walk(checked)
    inodes = load_inodes(checked, tree.nid)
    _check_overlaps(inodes)
    check_names(checked.data, tree.dirents)
    parent = _check_tree(tree, inodes)
    return _assemble(checked, tree, inodes, parent)


def _walk(image: Image) -> _Tree:
    """Find all inodes: one round per level of the tree, since a level's nids are in the last."""
    root = np.array([image.root_nid])
    check(
        (root >= FIRST_NID) & (root < len(image.slots)),
        root,
        "root_nid",
        f"{FIRST_NID} to {len(image.slots) - 1}",
        root,
    )
    mode = image.slots["i_mode"][root]
    check(_is_directory(image, root), root, "i_mode of the root", "a directory", mode)
    row_of = np.zeros(len(image.slots), np.uint32)
    row_of[root] = 1
    level, rows = root, np.array([1])
    nids, parts = [root], list[Dirents]()
    nr_rows, nr_bytes = 1, 0
    while level.size:
        if len(parts) > MAX_DEPTH:
            msg = f"inode {level[0]}: depth is {len(parts)}: expected at most {MAX_DEPTH}"
            raise FormatError(msg)
        directories = load_inodes(image, level)
        nr_bytes = _check_volume(image, directories, nr_bytes)
        dirents = load_dirents(image, directories, rows)
        parts.append(dirents)
        fresh = dirents.nid[row_of[dirents.nid] == 0]
        # of several entries that lead to one inode the first shall give the number
        number = np.arange(len(fresh), dtype=np.uint32) + np.uint32(nr_rows + 1)
        row_of[fresh[::-1]] = number[::-1]
        fresh = fresh[row_of[fresh] == number]
        row_of[fresh] = number[: len(fresh)]
        nids.append(fresh)
        below = np.flatnonzero(_is_directory(image, fresh))
        level, rows = fresh[below], nr_rows + 1 + below
        nr_rows += len(fresh)
    return _Tree(np.concatenate(nids), row_of, Dirents.concatenate(parts))


def _is_directory(image: Image, nid: Ints) -> Bools:
    result: Bools = (image.slots["i_mode"][nid] & stat.S_IFMT(0xFFFF)) == stat.S_IFDIR
    return result


def _check_volume(image: Image, directories: Inodes, before: int) -> int:
    """Check that directories hold no more bytes than the image, lest they share them."""
    total = before + np.cumsum(directories.flat_size)
    check(
        total <= len(image.data),
        directories.nid,
        "size of all directories so far",
        f"at most {len(image.data)}",
        total,
    )
    return int(total[-1])


def _check_overlaps(inodes: Inodes) -> None:
    """Check that no two inodes share header, xattrs, tail or data blocks."""
    order = np.argsort(inodes.nid)
    nid = inodes.nid[order]
    end = (inodes.body_off + inodes.tail_size)[order]
    check(
        end[:-1] <= SLOT_SIZE * nid[1:],
        nid[:-1],
        "end of the inode",
        "before the next inode",
        end[:-1],
    )
    nr_blocks = inodes.nr_blocks
    with_blocks = np.flatnonzero(nr_blocks)
    first = inodes.i_u[with_blocks].astype(np.int64)
    order = np.argsort(first)
    first = first[order]
    which = with_blocks[order]
    last = first + nr_blocks[which]
    check(
        last[:-1] <= first[1:],
        inodes.nid[which[:-1]],
        "end of the data blocks",
        "before those of the next inode",
        last[:-1],
    )


def _check_tree(tree: _Tree, inodes: Inodes) -> NDArray[np.uint32]:
    """Check what spec 9.5 says of the tree and return the column ``parent``, from row 1 on."""
    dirents, nr_rows = tree.dirents, len(tree.nid)
    target = tree.row_of[dirents.nid].astype(np.int64)
    is_directory = inodes.type == stat.S_IFDIR
    expected = _FILE_TYPES[inodes.type[target - 1] >> 12]
    check(
        dirents.file_type == expected,
        dirents.nid,
        "file type of its entry",
        "that of i_mode",
        dirents.file_type,
    )

    named = np.flatnonzero(dirents.dots == 0)
    holder, child = dirents.directory[named], target[named]
    to_directory = np.flatnonzero(is_directory[child - 1])
    nr_names = np.bincount(child[to_directory], minlength=nr_rows + 1)[1:]
    nr_names[0] += 1
    check(~is_directory | (nr_names == 1), tree.nid, "names of the directory", "1", nr_names)
    parent = np.zeros(nr_rows + 1, np.uint32)
    parent[child[::-1]] = holder[::-1]  # the first name found stays
    parent[1] = 1
    parent = parent[1:]

    itself = np.arange(1, nr_rows + 1)
    for dots, field, meaning, own in (
        (1, "entry .", "the directory itself", itself),
        (2, "entry ..", "the parent", parent),
    ):
        which = np.flatnonzero(dirents.dots == dots)
        owner = dirents.directory[which] - 1
        count = np.bincount(owner, minlength=nr_rows)
        check(~is_directory | (count == 1), tree.nid, f"number of {field}", "1", count)
        found = dirents.nid[which]
        check(target[which] == own[owner], tree.nid[owner], f"nid of {field}", meaning, found)

    nlink = 2 + np.bincount(holder[to_directory] - 1, minlength=nr_rows)
    check(
        ~is_directory | (inodes.nlink == nlink),
        tree.nid,
        "i_nlink",
        "2 + subdirectories",
        inodes.nlink,
    )
    return parent


def _assemble(image: Image, tree: _Tree, inodes: Inodes, parent: NDArray[np.uint32]) -> InodeVector:
    kind = inodes.type
    is_link = kind == stat.S_IFLNK
    check(
        ~is_link | ~contains(image.data, *_first_piece(inodes, is_link), 0),
        inodes.nid,
        "i_size",
        "a link target without nul",
        inodes.size,
    )
    xattrs = load_xattrs(image, inodes)
    objects = load_objects(image, inodes, xattrs)
    names = xattrs.names
    border = len(image.data)
    has_content = is_link | (kind == stat.S_IFREG)
    inline_off, _ = _first_piece(inodes, has_content)
    split = np.flatnonzero(has_content & (inodes.nr_blocks > 0) & (inodes.tail_size > 0))
    joined, joined_off = _join(image.data, inodes, split)
    inline_off[split] = border + len(names.data) + joined_off
    is_device = (kind == stat.S_IFCHR) | (kind == stat.S_IFBLK)
    named = np.flatnonzero(tree.dirents.dots == 0)
    holder = tree.dirents.directory[named]
    return InodeVector(
        mode=_column(inodes.mode, np.uint32),
        nlink=_column(inodes.nlink, np.uint32),
        uid=_column(inodes.uid, np.uint32),
        gid=_column(inodes.gid, np.uint32),
        rdev=_column(np.where(is_device, inodes.i_u, 0), np.uint32),
        size=_column(inodes.size, np.uint64),
        mtime_sec=_column(inodes.mtime_sec, np.int64),
        mtime_nsec=_column(inodes.mtime_nsec, np.uint32),
        nid=_column(inodes.nid, np.uint64),
        parent=_column(parent, np.uint32),
        dirent_start=starts_of(np.bincount(holder, minlength=len(kind) + 1)).astype(np.uint64),
        dirent_name_off=tree.dirents.name_off[named].astype(np.uint64),
        dirent_name_size=tree.dirents.name_size[named].astype(np.uint32),
        dirent_ino=tree.row_of[tree.dirents.nid[named]],
        xattr_start=_column(xattrs.start, np.uint64),
        xattr_name_off=(border + names.start[xattrs.name]).astype(np.uint64),
        xattr_name_size=names.size[xattrs.name].astype(np.uint32),
        xattr_value_off=xattrs.value_off.astype(np.uint64),
        xattr_value_size=xattrs.value_size.astype(np.uint32),
        inline_off=_column(inline_off, np.uint64),
        inline_size=_column(np.where(has_content, inodes.flat_size, 0), np.uint32),
        object=_column(objects.object, np.uint32, NO_OBJECT),
        object_path_off=objects.path_off.astype(np.uint64),
        object_path_size=objects.path_size.astype(np.uint32),
        object_digest=objects.digest,
        object_digest_size=objects.digest_size,
        pool=image.data,
        extra=np.concatenate([names.data, joined]),
        nr_blocks=border // BLOCK_SIZE,
        version=image.version,
        has_acl=any(bool(names.equal(name).any()) for name in _ACLS),
    )


def _column(values: NDArray[Any], dtype: type[_T], row_0: int = 0) -> NDArray[_T]:
    """Put the unused row 0 in front."""
    column = np.empty(len(values) + 1, dtype)
    column[0] = row_0
    column[1:] = values
    return column


def _first_piece(inodes: Inodes, which: Bools) -> tuple[Ints, Ints]:
    """Return offset and size of the data in the blocks or, if there are none, of the tail."""
    in_blocks = inodes.nr_blocks > 0
    off = np.where(in_blocks, inodes.i_u.astype(np.int64) * BLOCK_SIZE, inodes.body_off)
    size = np.where(in_blocks, inodes.flat_size - inodes.tail_size, inodes.tail_size)
    return np.where(which & (size > 0), off, 0), np.where(which, size, 0)


def _join(data: Bytes, inodes: Inodes, split: Ints) -> tuple[Bytes, Ints]:
    """Return the contents that lie in blocks and tail, in one piece, and where each starts."""
    tail_size = inodes.tail_size[split]
    block_size = inodes.flat_size[split] - tail_size
    off = np.stack(
        [inodes.i_u[split].astype(np.int64) * BLOCK_SIZE, inodes.body_off[split]], axis=1
    )
    size = np.stack([block_size, tail_size], axis=1)
    return data[ranges(off.ravel(), size.ravel())], starts_of(block_size + tail_size)[:-1]
