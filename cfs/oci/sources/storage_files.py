"""Files of containers/storage, where podman and buildah keep images (spec repository 5.8).

The storage may be anybody's: everything is opened beneath its directory, and has to be a regular
file.
"""

import errno
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO

from cfs.errors import FormatError, IntegrityError, NotFoundError, UnsupportedError
from cfs.linux.files import Resolve, openat2, owned
from cfs.oci.manifest import MAX_DOCUMENT_SIZE
from cfs.oci.sources.tar_split import Member, compute_checksum, read_tar_split
from cfs.oci.splitdir import File, Inline
from cfs.repository.splitstream_format import COPY_SIZE

__all__ = [
    "DATA",
    "LAYERS",
    "OPEN_DIRECTORY",
    "OPEN_FILE",
    "StorageLayer",
    "open_layer",
    "read_file",
]

LAYERS, DATA = "overlay-layers", "overlay"
OPEN_DIRECTORY = os.O_PATH | os.O_DIRECTORY
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_METACOPY = ("trusted.overlay.metacopy", "user.overlay.metacopy")
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class StorageLayer:
    """The files of a layer, made by :func:`open_layer`.  For one thread.

    Attributes:
        directories: where its files are found, as descriptors: that of the layer, and of those
            below it that were looked at.  It grows while :meth:`chunks` is read.
    """

    def __init__(self, root: int, name: bytes, stack: ExitStack) -> None:
        self.directories: list[int] = []
        self._root = root
        self._stack = stack
        self._split = b"%b/%b.tar-split.gz" % (LAYERS.encode(), name)
        base = b"%b/%b/" % (DATA.encode(), name)
        self._add(base + b"diff", Resolve.BENEATH | Resolve.NO_SYMLINKS)
        try:
            self._lower = read_file(root, base + b"lower", MAX_DOCUMENT_SIZE).strip().split(b":")
        except NotFoundError:
            self._lower = []

    def chunks(self) -> Generator[Inline | File, None, None]:
        """Yield the tar for :func:`~cfs.oci.transfer.receive_layer`."""
        with self._open_split() as split:
            for item in read_tar_split(split):
                if isinstance(item, bytes):
                    yield Inline(item)
                else:
                    number, path, fd = self._open_file(item.name)
                    os.close(fd)
                    yield File(item.size, number, path)

    def check(self) -> None:
        """Find the file that was changed since the storage has it.

        Raises:
            IntegrityError: this one.
        """
        with self._open_split() as split:
            for item in read_tar_split(split):
                if isinstance(item, Member):
                    self._check_member(item)

    def _check_member(self, member: Member) -> None:
        with open(self._open_file(member.name)[2], "rb") as file:
            found_size = os.fstat(file.fileno()).st_size
            pieces = iter(lambda: file.read(COPY_SIZE), b"")
            if found_size != member.size or compute_checksum(pieces) != member.checksum:
                raise _changed(member.name)

    def _open_split(self) -> BinaryIO:
        return open(_open_regular(self._root, self._split), "rb")

    def _open_file(self, name: bytes) -> tuple[int, bytes, int]:
        """Return the number of the directory that has a file, its path there, and the file."""
        path = b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))
        for number, directory in enumerate(self._search()):
            try:
                fd = openat2(directory, path, OPEN_FILE)
            except PermissionError as error:
                msg = f"file {error.filename}: {error.strerror} (rootless: `podman unshare` helps)"
                raise UnsupportedError(msg) from None
            except OSError as error:
                if error.errno in _MISSING:
                    continue
                _refuse_outside(error, path)
                if error.errno == errno.ENXIO:  # a socket
                    raise _changed(name) from None
                raise
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise _changed(name)
            if not _is_metacopy(fd):
                return number, path, fd
            os.close(fd)
        msg = f"file {_show(name)}: not in the storage"
        raise NotFoundError(msg)

    def _search(self) -> Iterator[int]:
        """Yield the directories; those of lower layers are opened when they are needed."""
        yield from self.directories
        while self._lower:
            # short names for layers, which are links to their directories
            link = self._lower.pop(0)
            self._add(DATA.encode() + b"/" + link, Resolve.BENEATH | Resolve.NO_MAGICLINKS)
            yield self.directories[-1]

    def _add(self, path: bytes, resolve: Resolve) -> None:
        with _explaining(path):
            fd = openat2(self._root, path, OPEN_DIRECTORY, resolve=resolve)
        self.directories.append(owned(self._stack, fd))


@contextmanager
def open_layer(root: int, name: str) -> Iterator[StorageLayer]:
    """Open the files of a layer.

    Args:
        root: directory of the storage; borrowed.
        name: of the layer, as the storage has it.

    Raises:
        NotFoundError: the storage has no such files.
        OSError: they cannot be opened.
    """
    with ExitStack() as stack:
        yield StorageLayer(root, name.encode(), stack)


def read_file(root: int, path: bytes, max_size: int) -> bytes:
    """Return the contents of a file of the storage.

    Args:
        root: directory of the storage; borrowed.
        path: of the file below it.
        max_size: limit in bytes.

    Raises:
        NotFoundError: there is no such file.
        FormatError: it is larger, or no regular file.
        OSError: it cannot be read.
    """
    with open(_open_regular(root, path), "rb") as file:
        data = file.read(max_size + 1)
    if len(data) > max_size:
        msg = f"{os.fsdecode(path)}: expected at most {max_size} bytes"
        raise FormatError(msg)
    return data


def _open_regular(root: int, path: bytes) -> int:
    with _explaining(path):
        fd = openat2(root, path, OPEN_FILE)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        msg = f"storage: {os.fsdecode(path)}: expected a regular file"
        raise FormatError(msg)
    return fd


@contextmanager
def _explaining(path: bytes) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        msg = f"not in the storage: {os.fsdecode(path)}"
        raise NotFoundError(msg) from None
    except OSError as error:
        _refuse_outside(error, path)
        raise


def _refuse_outside(error: OSError, path: bytes) -> None:
    """Say what the error of the kernel means that a path leads out of its directory."""
    if error.errno == errno.EXDEV:
        msg = f"storage: {os.fsdecode(path)}: leads out of it"
        raise FormatError(msg) from None


def _changed(name: bytes) -> IntegrityError:
    return IntegrityError(f"file {_show(name)}: it was changed in the storage")


def _show(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def _is_metacopy(fd: int) -> bool:
    """Whether a file has no contents of its own."""
    for name in _METACOPY:
        with suppress(OSError):
            os.getxattr(fd, name)
            return True
    return False
