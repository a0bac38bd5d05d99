"""A file tree as plain Python objects: what images are written from.

Dumpfiles, directories and tar layers are read into a tree.  A tree knows nothing of where it
came from, and nothing of overlayfs: whiteouts are character devices 0:0, xattrs have their own
names.  Names, link targets and xattrs are bytes.  Not thread-safe; a tree has one owner.
"""

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from cfs.digest import Digest

__all__ = [
    "Child",
    "Directory",
    "Inode",
    "Link",
    "Regular",
    "Special",
    "Symlink",
    "count_links",
    "inode_of",
    "walk",
]


@dataclass(slots=True, kw_only=True, eq=False)
class Inode:
    """What all inodes have.

    Attributes:
        mode: type and permission bits, as ``st_mode``.
        size: bytes of a regular file.  Kept but meaningless for others (the C tool lets the
            size that a dumpfile gives to a device decide its header, spec erofs-image 5.6).
        nlink: number of names; the writer ignores it for directories.
        mtime_sec: seconds since 1970, signed.
        xattrs: full name to value.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    nlink: int = 1
    size: int = 0
    rdev: int = 0
    mtime_sec: int = 0
    mtime_nsec: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)

    @property
    def is_whiteout(self) -> bool:
        """Whether overlayfs would take it for a whiteout: character device 0:0."""
        return self.rdev == 0 and stat.S_ISCHR(self.mode)


@dataclass(slots=True, kw_only=True, eq=False)
class Directory(Inode):
    """A directory and its children by name."""

    children: "dict[bytes, Child]" = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, eq=False)
class Regular(Inode):
    """A regular file.

    Attributes:
        content: bytes kept in the image, or None.
        payload: path of the object below the objects directory, or None.
        digest: fs-verity digest of the object, or None.
    """

    content: bytes | None = None
    payload: bytes | None = None
    digest: Digest | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Symlink(Inode):
    """A symbolic link."""

    target: bytes


@dataclass(slots=True, kw_only=True, eq=False)
class Special(Inode):
    """A device, fifo or socket."""


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """One more name of a leaf whose node stands elsewhere in the tree."""

    inode: Inode


Child = Inode | Link


def inode_of(child: Child) -> Inode:
    """Return the inode that a name leads to."""
    return child.inode if isinstance(child, Link) else child


def walk(root: Directory) -> Iterator[tuple[bytes, Child]]:
    """Yield path and child of every name, depth-first, children in name order.

    The root comes first, as ``/``.  Iterative: depth is bounded by memory only.
    """
    stack: list[tuple[bytes, Child]] = [(b"/", root)]
    while stack:
        path, child = stack.pop()
        yield path, child
        if isinstance(child, Directory):
            prefix = path if path == b"/" else path + b"/"
            stack.extend(
                (prefix + name, child.children[name])
                for name in sorted(child.children, reverse=True)
            )


def count_links(root: Directory) -> None:
    """Set ``nlink`` of every leaf to the number of its names in the tree."""
    names: dict[int, int] = {}
    leaves: list[Inode] = []
    for _, child in walk(root):
        inode = inode_of(child)
        if not isinstance(inode, Directory):
            if id(inode) not in names:
                leaves.append(inode)
            names[id(inode)] = names.get(id(inode), 0) + 1
    for inode in leaves:
        inode.nlink = names[id(inode)]
