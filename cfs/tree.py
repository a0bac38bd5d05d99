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
    "inode_of",
    "settle_links",
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


def settle_links(root: Directory) -> None:
    """Let each leaf stand at its first name, with links from the others, and count its names.

    For trees from which names were taken away: the name that a leaf stood at may be gone.
    """
    seen: set[int] = set()
    stack = [(root, name) for name in sorted(root.children, reverse=True)]
    while stack:
        parent, name = stack.pop()
        inode = inode_of(parent.children[name])
        if isinstance(inode, Directory):
            stack.extend((inode, below) for below in sorted(inode.children, reverse=True))
        elif id(inode) in seen:
            parent.children[name] = Link(inode)
            inode.nlink += 1
        else:
            seen.add(id(inode))
            parent.children[name] = inode
            inode.nlink = 1
