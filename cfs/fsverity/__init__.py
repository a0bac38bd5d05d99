"""fs-verity digests: compute, measure, enable.

Computing and enabling go through libfsverity (:mod:`cfs.fsverity._build`), measuring is one
ioctl.  Parameters are those of composefs: blocks of 4096 bytes, no salt, no signature (spec
erofs-image 8).  The interpreter lock is released while hashing; all functions may be called
by several threads at once, there is no shared state.
"""

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Protocol, cast

from cfs.digest import Algorithm, Digest
from cfs.errors import IntegrityError, UnsupportedError
from cfs.fsverity import _libfsverity  # type: ignore[attr-defined] # made by _build.py

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["compute_digest", "compute_file_digest", "enable", "measure"]

FS_IOC_MEASURE_VERITY = 0xC0046686
_FSVERITY_DIGEST = struct.Struct("=HH")  # digest_algorithm, digest_size
_UNSUPPORTED = (errno.ENOTTY, errno.EOPNOTSUPP)


class _Library(Protocol):
    """The functions of ``_build.DECLARATIONS``: 0, ``-errno``, or 1 for a changed file."""

    def cfs_digest_file(
        self, fd: int, size: int, algorithm: int, digest: object, digest_size: int, /
    ) -> int: ...

    def cfs_digest_buffer(
        self, data: object, size: int, algorithm: int, digest: object, digest_size: int, /
    ) -> int: ...

    def cfs_enable(self, fd: int, algorithm: int, /) -> int: ...


class _Ffi(Protocol):
    """What is used of cffi's ``FFI``."""

    def from_buffer(self, cdecl: str, python_buffer: "ReadableBuffer", /) -> object: ...


_lib = cast("_Library", _libfsverity.lib)
_ffi = cast("_Ffi", _libfsverity.ffi)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def compute_digest(data: "ReadableBuffer", algorithm: Algorithm = Algorithm.SHA256) -> Digest:
    """Return the fs-verity digest of bytes in memory.

    Args:
        data: any contiguous buffer; borrowed, not copied, must not change meanwhile.
        algorithm: sha256 or sha512.
    """
    digest = bytearray(algorithm.digest_size)
    size = memoryview(data).nbytes
    _check(
        _lib.cfs_digest_buffer(
            _ffi.from_buffer("uint8_t[]", data),
            size,
            algorithm,
            _ffi.from_buffer("uint8_t[]", digest),
            len(digest),
        )
    )
    return Digest(bytes(digest))


def compute_file_digest(fd: int, size: int, algorithm: Algorithm = Algorithm.SHA256) -> Digest:
    """Return the fs-verity digest of a file by reading it from its start to its end.

    Args:
        fd: readable descriptor, borrowed; its position is neither used nor moved.
        size: the size of the file in bytes, as ``fstat`` told it.
        algorithm: sha256 or sha512.

    Raises:
        IntegrityError: the file is longer or shorter than ``size``.
        OSError: reading failed.
    """
    digest = bytearray(algorithm.digest_size)
    target = _ffi.from_buffer("uint8_t[]", digest)
    result = _lib.cfs_digest_file(fd, size, algorithm, target, len(digest))
    if result > 0:
        msg = f"file changed while it was read: expected {size} bytes, found {_size(fd)}"
        raise IntegrityError(msg)
    _check(result)
    return Digest(bytes(digest))


def _size(fd: int) -> int:
    return os.fstat(fd).st_size


def measure(fd: int) -> Digest | None:
    """Return the digest that the kernel enforces for a file; None without fs-verity.

    Args:
        fd: readable descriptor, borrowed.

    Raises:
        UnsupportedError: the file has fs-verity with another hash than sha256 and sha512.
        OSError: the kernel refused for another reason than missing fs-verity.
    """
    buffer = bytearray(_FSVERITY_DIGEST.size + 64)
    _FSVERITY_DIGEST.pack_into(buffer, 0, 0, 64)
    try:
        fcntl.ioctl(fd, FS_IOC_MEASURE_VERITY, buffer)
    except OSError as error:
        if error.errno == errno.ENODATA or error.errno in _UNSUPPORTED:
            return None
        raise
    algorithm, size = _FSVERITY_DIGEST.unpack_from(buffer)
    if (algorithm, size) not in ((Algorithm.SHA256, 32), (Algorithm.SHA512, 64)):
        msg = f"fs-verity hash {algorithm} of {size} bytes: expected sha256 or sha512"
        raise UnsupportedError(msg)
    return Digest(bytes(buffer[_FSVERITY_DIGEST.size : _FSVERITY_DIGEST.size + size]))


def enable(fd: int, algorithm: Algorithm = Algorithm.SHA256) -> None:
    """Turn on fs-verity for a file; fine if it is on already.

    Args:
        fd: read-only descriptor, borrowed; nobody may have the file open for writing.
        algorithm: sha256 or sha512.  What is on already may use another one: measure it.

    Raises:
        UnsupportedError: kernel or file system have no fs-verity.
        OSError: ``ETXTBSY`` if the file is open for writing, others as the kernel gave them.
    """
    result = _lib.cfs_enable(fd, algorithm)
    if result == -errno.EEXIST:
        return
    if -result in _UNSUPPORTED:
        msg = "fs-verity is not supported by the kernel or the file system"
        raise UnsupportedError(msg)
    _check(result)
