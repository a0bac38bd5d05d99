"""``oci:PATH[:TAG]``: an image in an OCI layout directory (spec repository 5.6).

The layout may be anybody's: blobs are regular files below ``blobs/ALGORITHM`` or nothing, and
what they hold is verified.
"""

import errno
import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import BinaryIO, Protocol

from cfs.errors import FormatError, IntegrityError, InvalidRequestError, NotFoundError
from cfs.linux.files import Resolve, naming, open_path, openat2
from cfs.oci.manifest import MAX_DOCUMENT_SIZE, Descriptor, Index, Manifest, Platform
from cfs.oci.sources import SourceOptions
from cfs.oci.sources.selection import choose_manifest, load_manifest, wanted_platform
from cfs.oci.sources.verified import open_verified, read_document

__all__ = ["Files", "LayoutSource", "open_layout"]

_INDEX = "index.json"
_OPEN_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


class Files(Protocol):
    """The files of a layout, wherever they are; any thread may call."""

    def open_file(self, path: str) -> tuple[io.RawIOBase, int]:
        """Open a regular file; return it and its size in bytes.

        Raises:
            NotFoundError: there is none.
            FormatError: it is something else, or outside.
            OSError: it cannot be opened.
        """
        ...


class LayoutSource:
    """One image of a layout; a :class:`~cfs.oci.sources.Source`.

    Immutable but for the layers, which :meth:`layers` sets before threads start.
    """

    def __init__(self, files: Files, tag: str | None, platform: Platform) -> None:
        """Choose the manifest.

        Raises:
            NotFoundError: no entry has the tag, or none fits the platform, or a blob is missing.
            FormatError: a document is broken.
            IntegrityError: a blob is another one than its descriptor says.
        """
        self._files = files
        index = Index.parse(_read_index(files))
        self._descriptor = choose_manifest(index, tag, platform, self._read)
        self._layers: Sequence[Descriptor] = ()

    def read_manifest(self) -> tuple[str, bytes]:
        """Return digest and bytes of the manifest; see :class:`~cfs.oci.sources.Source`."""
        return load_manifest(self._descriptor, self._read)

    def read_config(self, manifest: Manifest) -> bytes:
        """Return the bytes of the config; see :class:`~cfs.oci.sources.Source`."""
        return self._read(manifest.config)

    def layers(self, manifest: Manifest) -> Sequence[Descriptor]:
        """Return the layers of the manifest; see :class:`~cfs.oci.sources.Source`."""
        self._layers = manifest.layers
        return self._layers

    def open_layer(self, index: int) -> "AbstractContextManager[BinaryIO]":
        """Open a layer; see :class:`~cfs.oci.sources.Source`."""
        descriptor = self._layers[index]
        return open_verified(self._open(descriptor), descriptor)

    def _read(self, descriptor: Descriptor) -> bytes:
        return read_document(self._open(descriptor), descriptor)

    def _open(self, descriptor: Descriptor) -> io.RawIOBase:
        algorithm, _, encoded = descriptor.digest.partition(":")
        file, size = self._files.open_file(f"blobs/{algorithm}/{encoded}")
        if size != descriptor.size:
            file.close()
            msg = f"blob {descriptor.digest}: Expected size {descriptor.size} but found {size}"
            raise IntegrityError(msg)
        return file


@contextmanager
def open_layout(rest: str, options: SourceOptions) -> Iterator[LayoutSource]:
    """Open the image ``PATH[:TAG]`` for the platform of this machine, or the one of the options.

    The last colon separates a tag if no slash follows it.

    Raises:
        InvalidRequestError: there is no path.
        NotFoundError: there is no such layout, tag or blob, or nothing for the platform.
        FormatError: a document is broken.
        IntegrityError: a blob is another one than its descriptor says.
        OSError: something cannot be read.
    """
    path, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        path, colon, tag = rest, "", ""
    if not path:
        msg = f"Invalid empty name in oci:{rest}"
        raise InvalidRequestError(msg)
    try:
        fd = open_path(path, _OPEN_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError) as error:
        msg = f"Opening OCI layout directory {path}: {error.strerror}"
        raise NotFoundError(msg) from None
    try:
        yield LayoutSource(_Directory(fd), tag if colon else None, wanted_platform(options))
    finally:
        os.close(fd)


def _read_index(files: Files) -> bytes:
    try:
        file, size = files.open_file(_INDEX)
    except NotFoundError:
        msg = "Cannot find the Image Index (index.json)"
        raise NotFoundError(msg) from None
    with file:
        if size > MAX_DOCUMENT_SIZE:
            msg = f"{_INDEX}: {size} bytes, expected at most {MAX_DOCUMENT_SIZE}"
            raise FormatError(msg)
        return file.read(size) or b""


class _Directory:
    """The files of a layout directory; its descriptor is borrowed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def open_file(self, path: str) -> tuple[io.RawIOBase, int]:
        """Open a file; links may lead anywhere in its directory, and no further."""
        try:
            with naming(path):
                fd = self._open(path)
        except (FileNotFoundError, NotADirectoryError):
            msg = f"not in the layout: {path}"
            raise NotFoundError(msg) from None
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.ELOOP, errno.ENXIO):
                msg = f"{path}: expected a regular file in the layout"
                raise FormatError(msg) from None
            raise
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            msg = f"{path}: expected a regular file in the layout"
            raise FormatError(msg)
        return io.FileIO(fd), info.st_size

    def _open(self, path: str) -> int:
        directory, _, name = path.rpartition("/")
        # as composefs-rs: the directories themselves may be links, to blobs that layouts share
        parent = open_path(directory or ".", _OPEN_DIRECTORY, dir_fd=self._fd)
        try:
            resolve = Resolve.BENEATH | Resolve.NO_MAGICLINKS
            return openat2(parent, name.encode(), _OPEN_FILE, resolve=resolve)
        finally:
            os.close(parent)
