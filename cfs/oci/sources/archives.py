"""Images in tar files: read in place, member by member (containers-transports(5)).

``oci-archive:PATH[:TAG]`` is an OCI layout in a tar; :mod:`cfs.oci.sources.docker_archive` uses
the same files.  An archive that is compressed as a whole is unpacked to a file without a name
first, because its members are wanted in any order.
"""

import io
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from cfs.compat import override
from cfs.errors import (
    FormatError,
    InvalidRequestError,
    NotFoundError,
    explaining,
)
from cfs.linux.files import PATH_MAX, open_path, owned
from cfs.oci.compression import decompress, detect_compression
from cfs.oci.manifest import Compression
from cfs.oci.sources import SourceOptions
from cfs.oci.sources.layout import LayoutSource
from cfs.oci.sources.selection import wanted_platform
from cfs.oci.tar import Entry, Kind, padded, read_entry

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = [
    "TarFiles",
    "open_archive",
    "open_oci_archive",
    "split_archive_reference",
]

_OPEN_ARCHIVE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_TEMPORARY_PLACE = "/var/tmp"  # noqa: S108 - the file has no name; /tmp may be memory
_MAX_MEMBERS = 1 << 16
_MAX_LINKS = 40  # as the kernel


class _Section(io.RawIOBase):
    """Some bytes of a file that is borrowed; each section has a position of its own."""

    def __init__(self, fd: int, off: int, size: int) -> None:
        self._fd = fd
        self._off = off
        self._end_off = off + size

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        with memoryview(buffer) as view, view[: self._end_off - self._off] as wanted:
            size = os.preadv(self._fd, [wanted], self._off)
        self._off += size
        return size


class TarFiles:
    """The regular files of a tar; links in it lead to others of them.

    Immutable: any thread may call.
    """

    def __init__(self, fd: int) -> None:
        """Read the headers.

        Args:
            fd: the tar, a regular file; borrowed for as long as this is used.

        Raises:
            FormatError: it is no tar, or has more members than any image.
            UnsupportedError: it has sparse files.
            OSError: as pread(2).
        """
        self._fd = fd
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        off, end_off = 0, os.fstat(fd).st_size

        def read(size: int) -> bytes:
            nonlocal off
            data = os.pread(fd, size, off)
            off += len(data)
            return data

        for _ in range(_MAX_MEMBERS):
            entry = read_entry(read)
            if entry is None:
                return
            if entry.size > end_off - off:
                msg = "tar: unexpected end of the archive"
                raise FormatError(msg)
            self._add(entry, off)
            off += padded(entry.size)
        msg = f"tar: more than {_MAX_MEMBERS} members, expected the few of an image"
        raise FormatError(msg)

    def _add(self, entry: Entry, off: int) -> None:
        # the last of several members with one name counts
        path = _normalize(entry.path)
        self._files.pop(path, None)
        self._links.pop(path, None)
        if entry.kind is Kind.REGULAR:
            self._files[path] = off, entry.size
        elif entry.kind is Kind.HARDLINK:
            self._links[path] = _normalize(entry.target)
        elif entry.kind is Kind.SYMLINK:
            self._links[path] = _normalize(os.path.join(os.path.dirname(entry.path), entry.target))

    def open_file(self, path: str) -> tuple[io.RawIOBase, int]:
        """Open a file by its path in the tar; return it and its size in bytes.

        Raises:
            NotFoundError: there is no such file, or its link leads to none.
        """
        found = _normalize(os.fsencode(path))
        for _ in range(_MAX_LINKS):
            if found not in self._links:
                break
            found = self._links[found]
        if found not in self._files:
            msg = f"not in the archive: {path}"
            raise NotFoundError(msg)
        off, size = self._files[found]
        return _Section(self._fd, off, size), size


def _normalize(path: bytes) -> str:
    """Return a path without anything that means nothing; one never leaves the archive."""
    if len(path) > PATH_MAX:
        msg = f"tar: a path of {len(path)} bytes: expected at most {PATH_MAX}"
        raise FormatError(msg)
    return os.fsdecode(os.path.normpath(b"/" + path.lstrip(b"/")))


@contextmanager
def open_archive(path: str) -> Iterator[TarFiles]:
    """Open a tar, compressed or not.

    Raises:
        NotFoundError: there is none.
        InvalidRequestError: it is something that cannot be read twice, as a pipe.
        FormatError: it is no tar.
        UnsupportedError: it has sparse files.
        OSError: it cannot be read, or not be unpacked.
    """
    with ExitStack() as stack:
        try:
            fd = owned(stack, open_path(path, _OPEN_ARCHIVE))
        except (FileNotFoundError, NotADirectoryError) as error:
            msg = f"Opening archive {path}: {error.strerror}"
            raise NotFoundError(msg) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            msg = f"Opening archive {path}: expected a regular file"
            raise InvalidRequestError(msg)
        with explaining(f"archive {path}"):
            files = TarFiles(_unpack(fd, stack))
        yield files


def _unpack(fd: int, stack: ExitStack) -> int:
    """Return the tar of an archive: the same file, unless it is compressed."""
    compression = detect_compression(_Section(fd, 0, os.fstat(fd).st_size))
    if compression is Compression.NONE:
        return fd
    unpacked = stack.enter_context(tempfile.TemporaryFile(dir=_TEMPORARY_PLACE))  # noqa: SIM115 - the stack does
    with open(fd, "rb", buffering=0, closefd=False) as compressed:
        for data in decompress(compressed, compression):
            unpacked.write(data)
    unpacked.flush()
    return unpacked.fileno()


def split_archive_reference(rest: str, transport: str) -> tuple[str, str | None]:
    """Return path and name of ``PATH[:NAME]``; unlike names, paths of archives hold no colon.

    Raises:
        InvalidRequestError: there is no path.
    """
    path, _, name = rest.partition(":")
    if not path:
        msg = f"Invalid empty name in {transport}:{rest}"
        raise InvalidRequestError(msg)
    return path, name or None


@contextmanager
def open_oci_archive(rest: str, options: SourceOptions) -> Iterator[LayoutSource]:
    """Open the image ``PATH[:TAG]`` for the platform of this machine, or the one of the options.

    Raises:
        InvalidRequestError: there is no path.
        NotFoundError: there is no such archive, tag or blob, or nothing for the platform.
        FormatError: archive or documents are broken.
        IntegrityError: a blob is another one than its descriptor says.
        OSError: it cannot be read.
    """
    path, tag = split_archive_reference(rest, "oci-archive")
    with open_archive(path) as files:
        yield LayoutSource(files, tag, wanted_platform(options))
