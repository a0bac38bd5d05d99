"""What a tree must be like to fit into an image.

Specification: erofs-image 5.1 and 7.5.  Checked once, before anything is laid out; what does
not fit is refused with the path of the first offender.
"""

import stat
from dataclasses import dataclass
from typing import NoReturn

from cfs.erofs.format import (
    CONTENT_SIZE_MAX,
    EXTERNAL_SIZE_MAX,
    NAME_SIZE_MAX,
    SYMLINK_SIZE_MAX,
    XATTR_NAME_SIZE_MAX,
    XATTRS_SIZE_MAX,
)
from cfs.errors import CfsError, FormatError, InvalidRequestError
from cfs.tree import Child, Directory, Inode, Link, Regular, Special, Symlink

__all__ = ["Survey", "check_xattrs", "path_of", "survey"]

_CLASSES: dict[int, type[Inode]] = {
    stat.S_IFREG: Regular,
    stat.S_IFDIR: Directory,
    stat.S_IFLNK: Symlink,
    stat.S_IFCHR: Special,
    stat.S_IFBLK: Special,
    stat.S_IFIFO: Special,
    stat.S_IFSOCK: Special,
}
_TYPE_BITS = 0o170000


@dataclass(slots=True)
class Survey:
    """What a look at all names of a tree shows.

    Attributes:
        has_whiteouts: some inode is a whiteout; further names of it do not count.
        has_links: some leaf has more than one name.
    """

    has_whiteouts: bool = False
    has_links: bool = False


def path_of(root: Directory, wanted: Child) -> str:
    """Return the path of ``wanted`` for a message; the tree may be malformed."""
    if wanted is root:
        return "/"
    seen: set[int] = set()
    stack = [(b"", root)]
    while stack:
        prefix, directory = stack.pop()
        seen.add(id(directory))
        for name, child in directory.children.items():
            path = prefix + b"/" + name
            if child is wanted:
                return path.decode(errors="backslashreplace")
            if isinstance(child, Directory) and id(child) not in seen:
                stack.append((path, child))
    return "inode outside of the tree"


def survey(root: Directory) -> Survey:
    """Check every name and every inode of the tree, but for xattrs.

    Raises:
        FormatError: something has no place in an image.
        InvalidRequestError: the objects do not form a tree.
    """
    result = Survey()
    links: list[Link] = []
    seen = {id(root)}
    directories = [root]
    current: Child = root
    try:
        _check_inode(root, Directory)
        while directories:
            current = directory = directories.pop()
            _check_names(directory.children)
            for current in directory.children.values():
                if isinstance(current, Link):
                    links.append(current)
                    continue
                _check_inode(current)
                _check_first_visit(current, seen)
                if isinstance(current, Directory):
                    directories.append(current)
                elif current.rdev == 0 and current.is_whiteout:
                    result.has_whiteouts = True
        for current in links:
            _check_link(current, seen)
    except CfsError as error:
        raise type(error)(f"{path_of(root, current)}: {error}") from None
    result.has_links = bool(links)
    return result


def check_xattrs(xattrs: dict[bytes, bytes]) -> None:
    """Check the xattrs of one inode, under their own names.

    Raises:
        FormatError: a name is empty or too long, or all together are too large.
    """
    for name in xattrs:
        if not 1 <= len(name) <= XATTR_NAME_SIZE_MAX:
            msg = f"xattr name of {len(name)} bytes: expected 1 to {XATTR_NAME_SIZE_MAX}"
            raise FormatError(msg)
        if b"\0" in name:
            msg = f"xattr name {name!r}: expected no nul in it"
            raise FormatError(msg)
    size = 12 + sum(7 + len(name) + len(value) for name, value in xattrs.items())
    if size > XATTRS_SIZE_MAX:
        msg = f"xattrs of {size} bytes together: expected at most {XATTRS_SIZE_MAX}"
        raise FormatError(msg)


def _check_names(children: dict[bytes, Child]) -> None:
    joined = b"/".join(children)
    if joined.count(b"/") != max(len(children) - 1, 0) or b"\0" in joined:
        name = next(name for name in children if b"/" in name or b"\0" in name)
        msg = f"name {name!r}: expected neither slash nor nul in it"
        raise FormatError(msg)
    for reserved in (b"", b".", b".."):
        if reserved in children:
            msg = f"name {reserved!r}: expected another, it is reserved"
            raise FormatError(msg)
    longest = max(map(len, children), default=0)
    if longest > NAME_SIZE_MAX:
        msg = f"name of {longest} bytes: expected at most {NAME_SIZE_MAX}"
        raise FormatError(msg)


def _check_inode(inode: Inode, expected: type[Inode] = Inode) -> None:
    of_mode = _CLASSES.get(inode.mode & _TYPE_BITS)
    if of_mode is None:
        raise FormatError(f"mode {inode.mode:o}: expected a valid file type")
    if not isinstance(inode, of_mode) or not issubclass(of_mode, expected):
        msg = f"{type(inode).__name__} of mode {inode.mode:o}: expected {of_mode.__name__}"
        raise InvalidRequestError(msg)
    # one look at all: a number that is negative or too large leaves bits above the 32nd
    numbers = inode.uid | inode.gid | inode.nlink | inode.rdev | inode.mtime_nsec
    if numbers >> 32 or inode.mtime_sec >> 63 not in (0, -1):
        _refuse_numbers(inode)
    if isinstance(inode, Regular):
        _check_regular(inode)
    elif isinstance(inode, Symlink):
        if not 1 <= len(inode.target) <= SYMLINK_SIZE_MAX:
            msg = f"target of {len(inode.target)} bytes: expected 1 to {SYMLINK_SIZE_MAX}"
            raise FormatError(msg)
        if b"\0" in inode.target:
            msg = f"target {inode.target!r}: expected no nul in it"
            raise FormatError(msg)


def _refuse_numbers(inode: Inode) -> NoReturn:
    for name in ("uid", "gid", "nlink", "rdev", "mtime_nsec"):
        number = getattr(inode, name)
        if number >> 32:
            raise FormatError(f"{name} {number}: expected 32 bits, unsigned")
    raise FormatError(f"mtime_sec {inode.mtime_sec}: expected 64 bits, signed")


def _check_regular(file: Regular) -> None:
    if not 0 <= file.size <= EXTERNAL_SIZE_MAX:
        raise FormatError(f"size {file.size}: expected 0 to {EXTERNAL_SIZE_MAX}")
    if file.content is not None:
        if len(file.content) != file.size:
            msg = f"content of {len(file.content)} bytes: expected its size {file.size}"
            raise FormatError(msg)
        if file.size > CONTENT_SIZE_MAX:
            msg = f"content of {file.size} bytes: expected at most {CONTENT_SIZE_MAX}"
            raise FormatError(msg)
    if file.payload is not None and len(file.payload) > SYMLINK_SIZE_MAX:
        msg = f"payload of {len(file.payload)} bytes: expected at most {SYMLINK_SIZE_MAX}"
        raise FormatError(msg)


def _check_first_visit(inode: Inode, seen: set[int]) -> None:
    if id(inode) in seen:
        msg = "stands in the tree twice: expected a Link for each further name"
        raise InvalidRequestError(msg)
    seen.add(id(inode))


def _check_link(link: Link, seen: set[int]) -> None:
    if isinstance(link.inode, Directory):
        raise FormatError("hard link to a directory: expected a leaf")
    if id(link.inode) not in seen:
        raise InvalidRequestError("hard link out of the tree: expected a leaf of the tree")
