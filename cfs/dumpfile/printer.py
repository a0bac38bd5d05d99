"""Vectors and trees to dumpfile text (spec erofs-image 7.7 and 7.8).

Vectors are in the tree view.  Every function yields whole lines, depth-first, children in name
order; nothing recurses.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from cfs.dumpfile.escapes import escape, escape_field, escape_path, escape_xattr
from cfs.errors import FormatError, InvalidRequestError, NotFoundError
from cfs.tree import Directory, Inode, Regular, Special, Symlink, inode_of, walk

if TYPE_CHECKING:
    from cfs.inodes import Ino, InodeVector

__all__ = [
    "format_backing_path",
    "format_file",
    "format_inode",
    "format_link",
    "format_listing",
    "format_tree",
    "format_vector",
    "object_paths",
]

# composefs-rs shows them on no inode, as its writer adds them to directories with whiteouts
_HIDDEN = (b"trusted.overlay.opaque", b"user.overlay.opaque")


def format_vector(vector: "InodeVector", *, filters: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Yield the lines of C's ``composefs-info dump``.

    Args:
        vector: tree view of an image.
        filters: entries of the root to keep, with all below them; none: all.
    """
    sizes, modes, links = vector.size.tolist(), vector.mode.tolist(), vector.nlink.tolist()
    uids, gids, devices = vector.uid.tolist(), vector.gid.tolist(), vector.rdev.tolist()
    secs, nsecs = vector.mtime_sec.tolist(), vector.mtime_nsec.tolist()
    first_names: dict[int, bytes] = {}
    for path, ino in _walk(vector, filters, escape):
        mode = modes[ino]
        payload, content, digest = _contents(vector, ino, mode)
        first_name = path if stat.S_ISDIR(mode) else first_names.setdefault(ino, path)
        mark = b""
        if first_name is not path:
            mark, payload = b"@", first_name
        line = b"%s %d %s%o %d %d %d %d %d.%d %s %s %s" % (
            path,
            sizes[ino],
            mark,
            mode,
            links[ino],
            uids[ino],
            gids[ino],
            devices[ino],
            secs[ino],
            nsecs[ino],
            payload,
            content,
            digest,
        )
        yield line + _format_xattrs(vector.xattrs(ino).items()) + b"\n"


def _contents(vector: "InodeVector", ino: "Ino", mode: int) -> tuple[bytes, bytes, bytes]:
    """Return the fields PAYLOAD, CONTENT and DIGEST of a row."""
    if stat.S_ISLNK(mode):
        return escape_field(vector.content(ino)), b"-", b"-"
    if not stat.S_ISREG(mode):
        return b"-", b"-", b"-"
    digest = vector.digest(ino)
    return (
        escape_field(vector.object_path(ino)),
        escape_field(vector.content(ino)),
        b"-" if digest is None else digest.value.hex().encode(),
    )


def _walk(
    vector: "InodeVector", filters: Sequence[bytes], escape_name: Callable[[bytes], bytes]
) -> Iterator[tuple[bytes, "Ino"]]:
    """Yield escaped path and row of every name that the filters keep, the root first."""
    from cfs.inodes import ROOT  # noqa: PLC0415 - numpy, only where a vector exists

    yield b"/", ROOT
    below = [
        (b"/" + escape_name(name), ino)
        for name, ino in vector.entries(ROOT)
        if not filters or name in filters
    ]
    stack = below[::-1]
    while stack:
        path, ino = stack.pop()
        yield path, ino
        if vector.is_directory(ino):
            prefix = path + b"/"
            below = [(prefix + escape_name(name), child) for name, child in vector.entries(ino)]
            stack.extend(reversed(below))


def _format_xattrs(xattrs: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join(
        [b" %s=%s" % (escape_xattr(name), escape_xattr(value)) for name, value in xattrs]
    )


def format_listing(vector: "InodeVector", *, filters: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Yield the lines of ``composefs-info ls``; arguments as for :func:`format_vector`."""
    seen: set[int] = set()
    names = _walk(vector, filters, escape_path)
    next(names)  # the root is not listed
    for path, ino in names:
        mode = int(vector.mode[ino])
        if stat.S_ISDIR(mode):
            yield path + b"/\t\n"
            continue
        target = b""
        if ino not in seen:
            seen.add(ino)
            payload = _contents(vector, ino, mode)[0]
            if stat.S_ISLNK(mode):
                target = b"\t-> " + payload
            elif payload != b"-":
                target = b"\t@ " + payload
        yield path + target + b"\n"


def object_paths(vectors: Iterable["InodeVector"], *, filters: Sequence[bytes] = ()) -> list[bytes]:
    """Return the object paths of all vectors together, each once, sorted as bytes."""
    paths: set[bytes] = set()
    for vector in vectors:
        for _, ino in _walk(vector, filters, bytes):
            path = vector.object_path(ino)
            if path is not None:
                paths.add(path)
    return sorted(paths)


def format_file(vector: "InodeVector", path: bytes) -> Iterator[bytes]:
    """Yield the lines of composefs-rs's ``cfsctl dump-files`` for one path.

    A directory is followed by all that is below it.  Paths are printed as given.

    Args:
        vector: tree view of an image.
        path: from the root, with or without a slash before it.

    Raises:
        NotFoundError: there is no such file.
        FormatError: the path leads through something that is no directory.
        InvalidRequestError: it has ``..``.
    """
    first_names: dict[int, bytes] = {}
    stack = [(path, _find(vector, path))]
    while stack:
        path, ino = stack.pop()
        if vector.is_directory(ino):
            prefix = path.rstrip(b"/") + b"/"
            below = [(prefix + name, child) for name, child in vector.entries(ino)]
            stack.extend(reversed(below))
        elif first_names.setdefault(ino, path) is not path:
            yield format_link(escape(path), escape(first_names[ino]))
            continue
        yield _format_row(vector, ino, escape(path))


def format_backing_path(vector: "InodeVector", path: bytes) -> bytes:
    """Return a line that says where the content of a file is: ``inline`` or an object path.

    Arguments and errors as for :func:`format_file`; a directory is an ``InvalidRequestError``.
    """
    ino = _find(vector, path)
    if vector.is_directory(ino):
        msg = f"{os.fsdecode(path)} is a directory"
        raise InvalidRequestError(msg)
    return b"%s %s\n" % (path, vector.object_path(ino) or b"inline")


def _find(vector: "InodeVector", path: bytes) -> "Ino":
    names = [name for name in path.split(b"/") if name not in (b"", b".")]
    if b".." in names:
        msg = f"invalid path {os.fsdecode(path)!r}: '..' is not allowed"
        raise InvalidRequestError(msg)
    from cfs.inodes import ROOT  # noqa: PLC0415 - numpy, only where a vector exists

    ino = ROOT
    for depth, name in enumerate(names):
        if not vector.is_directory(ino):
            msg = f"{os.fsdecode(path)}: {os.fsdecode(names[depth - 1])} is not a directory"
            raise FormatError(msg)
        try:
            ino = vector.lookup(ino, name)
        except NotFoundError:
            msg = f"{os.fsdecode(path)} not found: {os.fsdecode(name)} does not exist"
            raise NotFoundError(msg) from None
    return ino


def _format_row(vector: "InodeVector", ino: "Ino", path: bytes) -> bytes:
    mode = int(vector.mode[ino])
    has_size = stat.S_ISREG(mode) or stat.S_ISLNK(mode)
    line = b"%s %d %o %d %d %d %d %d.%d %s %s %s" % (
        path,
        vector.size[ino] if has_size else 0,
        mode,
        vector.nlink[ino],
        vector.uid[ino],
        vector.gid[ino],
        vector.rdev[ino],
        vector.mtime_sec[ino],
        vector.mtime_nsec[ino],
        *_contents(vector, ino, mode),
    )
    xattrs = sorted(each for each in vector.xattrs(ino).items() if each[0] not in _HIDDEN)
    return line + _format_xattrs(xattrs) + b"\n"


def format_link(path: bytes, first_name: bytes) -> bytes:
    """Return the line of a further name of a leaf; both paths are escaped."""
    return b"%s 0 @120000 - - - - 0.0 %s - -\n" % (path, first_name)


def format_tree(root: Directory) -> Iterator[bytes]:
    """Yield the lines of composefs-rs's ``cfsctl create-dumpfile`` for a tree.

    Directories have size 0, links of leaves are counted, xattrs are sorted, and a further name
    of a leaf says nothing but where the first one is.
    """
    names: dict[int, int] = {}
    for _, child in walk(root):
        if not isinstance(child, Directory):
            leaf = inode_of(child)
            names[id(leaf)] = names.get(id(leaf), 0) + 1
    first_names: dict[int, bytes] = {}
    for raw_path, child in walk(root):
        inode, path = inode_of(child), escape(raw_path)
        if isinstance(inode, Directory):
            subdirectories = sum(isinstance(entry, Directory) for entry in inode.children.values())
            yield format_inode(path, inode, 2 + subdirectories)
            continue
        first_name = first_names.setdefault(id(inode), path)
        if first_name is path:
            yield format_inode(path, inode, names[id(inode)])
        else:
            yield format_link(path, first_name)


def format_inode(path: bytes, inode: Inode, nlink: int) -> bytes:
    """Return the line of an inode whose path is escaped, in the form of :func:`format_tree`."""
    payload, content, digest = None, None, b"-"
    size = inode.size if isinstance(inode, Regular) else 0
    if isinstance(inode, Symlink):
        payload, size = inode.target, len(inode.target)
    elif isinstance(inode, Regular):
        payload, content = inode.payload, inode.content
        if inode.digest is not None:
            payload, digest = inode.digest.object_path, inode.digest.value.hex().encode()
    line = b"%s %d %o %d %d %d %d %d.%d %s %s %s" % (
        path,
        size,
        inode.mode,
        nlink,
        inode.uid,
        inode.gid,
        inode.rdev if isinstance(inode, Special) else 0,
        inode.mtime_sec,
        inode.mtime_nsec,
        escape_field(payload),
        escape_field(content),
        digest,
    )
    return line + _format_xattrs(sorted(inode.xattrs.items())) + b"\n"
