"""Finding and reading files in a tree.

No symlink is followed.  What is read is checked against the tree, so that a file that was
changed or damaged since then cannot decide what becomes of the tree.
"""

import os
from collections.abc import Callable

from cfs.errors import FormatError, IntegrityError, NotFoundError
from cfs.fsverity import compute_digest
from cfs.tree import Directory, Inode, Regular, inode_of

__all__ = [
    "Path",
    "ReadContent",
    "find_directory",
    "find_regular",
    "format_path",
    "parse_path",
    "read_text",
]

Path = tuple[bytes, ...]
"""The components of a path from the root."""

ReadContent = Callable[[bytes, Regular], bytes]
"""Gets the absolute path of a file that has an object and its inode; returns its content."""

_SIZE_MAX = 64 << 20  # bytes; a policy has less than one MiB


def parse_path(text: bytes) -> Path:
    """Return the components of a path; empty ones and ``.`` vanish.

    Raises:
        FormatError: it begins with ``./``, has ``..``, or no component is left.
    """
    components = tuple(name for name in text.split(b"/") if name not in (b"", b"."))
    if not components or b".." in components or text.startswith(b"./"):
        msg = f"invalid path {os.fsdecode(text)!r}: expected names without '.' and '..'"
        raise FormatError(msg)
    return components


def format_path(path: Path) -> str:
    """Return an absolute path for a message."""
    return os.fsdecode(b"/" + b"/".join(path))


def find_directory(root: Directory, path: Path) -> Directory | None:
    """Return a directory, or None if it or one on the way to it is missing.

    Raises:
        FormatError: something on the way, or at its place, is no directory.
    """
    directory = root
    for depth, name in enumerate(path, start=1):
        child = directory.children.get(name)
        if child is None:
            return None
        if not isinstance(child, Directory):
            msg = f"{format_path(path[:depth])} is not a directory"
            raise FormatError(msg)
        directory = child
    return directory


def find_regular(root: Directory, path: Path) -> Regular:
    """Return a regular file.

    Raises:
        NotFoundError: it or a directory on the way is missing.
        FormatError: something else stands there, or on the way.
    """
    directory = find_directory(root, path[:-1])
    if directory is None or path[-1] not in directory.children:
        msg = f"{format_path(path)} does not exist"
        raise NotFoundError(msg)
    return as_regular(inode_of(directory.children[path[-1]]), path)


def as_regular(inode: Inode, path: Path) -> Regular:
    """Return the inode that was found at a path as a regular file.

    Raises:
        FormatError: it is something else.
    """
    if not isinstance(inode, Regular):
        msg = f"{format_path(path)} is not a regular file"
        raise FormatError(msg)
    return inode


def read_text(file: Regular, path: Path, read_content: ReadContent) -> str:
    """Return what a file holds.

    Raises:
        FormatError: it is too large, or no UTF-8.
        IntegrityError: it is not what the tree says.
        OSError: it cannot be read.
    """
    if file.size > _SIZE_MAX:
        msg = f"{format_path(path)}: size is {file.size}: expected at most {_SIZE_MAX}"
        raise FormatError(msg)
    data = file.content or b""
    if file.digest is not None:
        data = read_content(b"/" + b"/".join(path), file)
        found = compute_digest(data, file.digest.algorithm)
        if found != file.digest:
            msg = f"{format_path(path)}: digest is {found}: expected {file.digest}"
            raise IntegrityError(msg)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        msg = f"{format_path(path)}: byte {error.start} is not UTF-8"
        raise FormatError(msg) from None
