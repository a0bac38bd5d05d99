"""From layers to entries, and from those to a tree (spec repository 6.2 to 6.4).

A layer is a tar whose larger files are objects; it is read without them.  Layers are applied in
order, entries in the order of the archive, to one tree.  The rules are those
of composefs-rs, since the id of an image depends on each of them: nothing is created implicitly,
no symlink is followed, and a whiteout removes whatever is there, of the same layer as well.
Nothing recurses, and contents stay in their objects.
"""

import stat
from collections.abc import Iterable, Iterator
from typing import NoReturn

from cfs.digest import Digest
from cfs.errors import FormatError
from cfs.oci.tar import Entry, Kind, padded, read_entry
from cfs.repository.repository import Repository
from cfs.repository.splitstream_format import ContentType
from cfs.repository.streams import open_stored_stream
from cfs.tree import Directory, Inode, Link, Regular, Special, Symlink, inode_of

__all__ = ["TreeBuilder", "build_tree", "make_inode", "read_layer"]

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_SHOWN = 200  # characters of a path in a message: a path may have a MiB
_PERMISSIONS = 0o7777
# bytes that all entries may take in memory, so that a small blob cannot fill it: 4 million of them
_MEMORY_MAX = 1 << 32
_MEMORY_OF_ENTRY = 1 << 10  # without names, targets and xattrs
_MEMORY_OF_XATTR = 1 << 7  # without name and value: an entry may have a hundred thousand
_MAX_DEPTH = 2048  # of a directory: images of more are not read, and paths of all take their time
_AT_END = "layer: unexpected end in the contents of an entry"
_SPECIAL_TYPES = {
    Kind.CHARACTER: stat.S_IFCHR,
    Kind.BLOCK: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
}
_DEVICES = (Kind.CHARACTER, Kind.BLOCK)


def read_layer(repository: Repository, stream: Digest) -> Iterator[tuple[Entry, bytes | Digest]]:
    """Yield the entries of a layer, each with the contents of a regular file.

    Those are bytes up to 64, else the digest of the object that has them.  What other entries have
    for contents means nothing and is left out.

    Args:
        repository: the store.
        stream: digest of the layer's splitstream.

    Raises:
        FormatError: the layer is broken; the entries before that place were given.
        UnsupportedError: likewise, for a sparse file.
        NotFoundError: the stream is missing.
        IntegrityError: it is not what its name says.
        OSError: it cannot be read.
    """
    with open_stored_stream(repository, stream, ContentType.LAYER) as layer:
        reader = _LayerReader(layer.chunks())
        while (entry := read_entry(reader.read)) is not None:
            _check_entry(entry)
            content: bytes | Digest = b""
            if entry.is_external:
                content = reader.take_object()
                reader.skip(padded(entry.size) - entry.size)
            elif entry.kind is Kind.REGULAR and entry.size:
                content = reader.take(padded(entry.size))[: entry.size]
            elif entry.size:
                reader.skip(padded(entry.size))
            elif reader.is_at_end():  # composefs-rs needs an end mark behind such an entry only
                _refuse(entry, "the layer ends behind its header")
            yield entry, content


class _LayerReader:
    """The inline data and the objects of a layer, as they are asked for."""

    def __init__(self, chunks: Iterator[bytes | Digest]) -> None:
        self._chunks = chunks
        self._buffer = b""
        self._off = 0
        self._object: Digest | None = None  # what comes behind the buffer

    def read(self, size: int) -> bytes:
        """Return so many bytes, fewer at the end of the layer; for sizes that memory can hold."""
        end = self._off + size
        if end > len(self._buffer):
            self._fill(size)
            end = self._off + size
        data = self._buffer[self._off : end]
        self._off += len(data)
        return data

    def take(self, size: int) -> bytes:
        """Return so many bytes, which have to be there."""
        data = self.read(size)
        if len(data) < size:
            raise FormatError(_AT_END)
        return data

    def skip(self, size: int) -> None:
        """Drop so many bytes, which have to be there."""
        while size > len(self._buffer) - self._off:
            size -= len(self._buffer) - self._off
            self._off = len(self._buffer)
            self._fill(1)
            if self._off == len(self._buffer):
                raise FormatError(_AT_END)
        self._off += size

    def is_at_end(self) -> bool:
        """Whether nothing is left."""
        if self._off == len(self._buffer) and self._object is None:
            self._fill(1, may_be_object=True)
        return self._off == len(self._buffer) and self._object is None

    def take_object(self) -> Digest:
        """Return the object that comes next."""
        if self._off == len(self._buffer) and self._object is None:
            self._fill(1, may_be_object=True)
        digest, self._object = self._object, None
        if digest is None or self._off != len(self._buffer):
            msg = "layer: expected an object, found inline data or the end"
            raise FormatError(msg)
        return digest

    def _fill(self, size: int, *, may_be_object: bool = False) -> None:
        """Let the buffer begin here and have ``size`` bytes, fewer at the end."""
        parts = [self._buffer[self._off :]]
        missing = size - len(parts[0])
        while missing > 0 and self._object is None:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            if isinstance(chunk, Digest):
                self._object = chunk
                break
            parts.append(chunk)
            missing -= len(chunk)
        if missing > 0 and self._object is not None and not may_be_object:
            msg = "layer: expected inline data, found an object"
            raise FormatError(msg)
        self._buffer, self._off = b"".join(parts), 0


def _check_entry(entry: Entry) -> None:
    """Refuse what importing a layer takes and no tree can have."""
    if entry.kind is Kind.UNKNOWN:
        _refuse(entry, f"unsupported type of entry {entry.flag!r}")
    if entry.rdev is None and entry.kind in _DEVICES:
        _refuse(entry, "device without device numbers")


def build_tree(repository: Repository, layers: Iterable[Digest]) -> Directory:
    """Return what layers make together, before any transformation.

    Args:
        repository: the store.
        layers: their streams, the lowest first.

    Raises:
        FormatError: a layer is broken, or has an entry that has no place in the tree.
        NotFoundError: a stream is missing.
        IntegrityError: a stream is not what its name says.
        OSError: it cannot be read.
    """
    builder = TreeBuilder()
    for layer in layers:
        for entry, content in read_layer(repository, layer):
            builder.add(entry, content)
    return builder.root


class TreeBuilder:
    """A tree that entries of layers are applied to.

    Attributes:
        root: the tree; the root has no metadata of its own until the OCI transformation.
    """

    def __init__(self) -> None:
        """Begin an empty tree."""
        self.root = Directory(mode=stat.S_IFDIR)
        self._memory = 0

    def add(self, entry: Entry, content: bytes | Digest) -> None:
        """Apply an entry (spec repository 6.4).

        Args:
            entry: header and extensions.
            content: of a regular file: its bytes, or the digest of the object that has them.

        Raises:
            FormatError: it has no place in the tree, or there are too many.
        """
        self._count(entry)
        # made for a whiteout and for the root too: composefs-rs refuses their errors as well
        child = self._link(entry) if entry.kind is Kind.HARDLINK else make_inode(entry, content)
        names = _split(entry.path)
        if not names or names[-1] == b"..":
            if not isinstance(child, Directory):
                _refuse(entry, "expected a directory as root")
            return  # the root gets everything from /usr
        if len(names) > _MAX_DEPTH:
            _refuse(entry, f"{len(names)} directories deep: expected at most {_MAX_DEPTH}")
        children = self._parent(entry, entry.path, names).children
        name = names[-1]
        if name.startswith(_WHITEOUT):
            if name == _OPAQUE:
                children.clear()
            else:
                children.pop(name[len(_WHITEOUT) :], None)
            return
        if isinstance(child, Directory):
            old = children.get(name)
            if isinstance(old, Directory):
                child.children = old.children
        children[name] = child

    def _count(self, entry: Entry) -> None:
        # what is removed or replaced later counts as well: few layers have much of that
        self._memory += _MEMORY_OF_ENTRY + len(entry.path) + len(entry.target)
        if entry.xattrs:
            self._memory += _MEMORY_OF_XATTR * len(entry.xattrs)
            self._memory += sum(map(len, entry.xattrs)) + sum(map(len, entry.xattrs.values()))
        if self._memory > _MEMORY_MAX:
            _refuse(entry, f"the entries so far take more than {_MEMORY_MAX} bytes of memory")

    def _link(self, entry: Entry) -> Link:
        """Return one more name of a leaf that is there already."""
        names = _split(entry.target)
        if not names or names[-1] == b"..":
            _refuse(entry, f"invalid target {_show(entry.target)} of a hard link")
        child = self._parent(entry, entry.target, names).children.get(names[-1])
        if child is None:
            _refuse(entry, f"{_show(entry.target)} does not exist")
        inode = inode_of(child)
        if isinstance(inode, Directory):
            _refuse(entry, f"hard link to {_show(entry.target)}, which is a directory")
        return Link(inode)

    def _parent(self, entry: Entry, path: bytes, names: list[bytes]) -> Directory:
        """Return the directory that the last one of the names of a path is in."""
        directory = self.root
        for depth in range(len(names) - 1):
            child = directory.children.get(names[depth])
            if not isinstance(child, Directory):
                if names[depth] == b"..":
                    _refuse(entry, f"invalid path {_show(path)}: '..' is not allowed")
                state = "does not exist" if child is None else "is not a directory"
                _refuse(entry, f"{_show(b'/'.join(names[: depth + 1]))} {state}")
            directory = child
        return directory


def _split(path: bytes) -> list[bytes]:
    """Return the components of a path; empty ones and ``.`` vanish (6.3)."""
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def make_inode(entry: Entry, content: bytes | Digest) -> Inode:
    """Return what an entry of :func:`read_layer` describes, unless it is a hard link."""
    kind, mode = entry.kind, entry.mode & _PERMISSIONS
    inode: Inode
    if kind is Kind.REGULAR:
        inode = Regular(mode=stat.S_IFREG | mode, size=entry.size)
        if isinstance(content, Digest):
            inode.digest, inode.payload = content, content.object_path
        elif content:
            inode.content = content
    elif kind is Kind.DIRECTORY:
        inode = Directory(mode=stat.S_IFDIR | mode)
    elif kind is Kind.SYMLINK:
        inode = Symlink(mode=stat.S_IFLNK | mode, target=entry.target)
    else:
        # a FIFO may have numbers, which mean nothing
        rdev = entry.rdev or 0 if kind in _DEVICES else 0
        inode = Special(mode=_SPECIAL_TYPES[kind] | mode, rdev=rdev)
    inode.uid, inode.gid = entry.uid, entry.gid
    inode.mtime_sec, inode.mtime_nsec = entry.mtime_sec, entry.mtime_nsec
    inode.xattrs = entry.xattrs
    return inode


def _show(path: bytes) -> str:
    text = "/" + path.lstrip(b"/").decode(errors="backslashreplace")
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def _refuse(entry: Entry, reason: str) -> NoReturn:
    msg = f"layer entry {_show(entry.path)}: {reason}"
    raise FormatError(msg)
