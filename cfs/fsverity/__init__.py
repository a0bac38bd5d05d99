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
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from cfs.digest import Algorithm, Digest
from cfs.errors import IntegrityError, UnsupportedError
from cfs.fsverity import _libfsverity  # type: ignore[attr-defined] # made by _build.py

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "compute_digest",
    "compute_file_digest",
    "compute_file_digests",
    "enable",
    "measure",
    "read_files",
]

FS_IOC_MEASURE_VERITY = 0xC0046686
_FSVERITY_DIGEST = struct.Struct("=HH")  # digest_algorithm, digest_size
_UNSUPPORTED = (errno.ENOTTY, errno.EOPNOTSUPP)


class _Library(Protocol):
    """The functions of ``_build.DECLARATIONS``; codes are 0, ``-errno``, 1 for a changed file."""

    # fds, sizes, nr_files, algorithm, digests, digest_size, result
    cfs_digest_files: Callable[[object, object, int, int, object, int, object], int]
    # fds, sizes, nr_files, algorithm, contents, digests, digest_size, result
    cfs_read_files: Callable[[object, object, int, int, object, object, int, object], int]
    # data, size, algorithm, digest, digest_size
    cfs_digest_buffer: Callable[[object, int, int, object, int], int]
    # fd, algorithm
    cfs_enable: Callable[[int, int], int]


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
    return next(compute_file_digests([fd], [size], algorithm))


def compute_file_digests(
    fds: Sequence[int], sizes: Sequence[int], algorithm: Algorithm = Algorithm.SHA256
) -> Iterator[Digest]:
    """Yield the digests of several files, as :func:`compute_file_digest` for each of them.

    All are computed before the first one comes, without the interpreter lock in between; with
    small files and several threads, taking the lock would cost more than the digests.

    Raises:
        IntegrityError: the next file is longer or shorter than its size.
        OSError: reading the next file failed.
    """
    digests = bytearray(len(fds) * algorithm.digest_size)
    result = array("i", [0])
    nr_digests = _lib.cfs_digest_files(
        _ffi.from_buffer("int[]", array("i", fds)),
        _ffi.from_buffer("uint64_t[]", array("Q", sizes)),
        len(fds),
        algorithm,
        _ffi.from_buffer("uint8_t[]", digests),
        algorithm.digest_size,
        _ffi.from_buffer("int[]", result),
    )
    yield from _split_digests(digests, algorithm, nr_digests)
    _check_file(result[0], fds, sizes, nr_digests)


def read_files(
    fds: Sequence[int], sizes: Sequence[int], algorithm: Algorithm = Algorithm.SHA256
) -> Iterator[tuple[memoryview, Digest]]:
    """Yield contents and digests of several small files, each of which is read once.

    All are read before the first one comes, into one buffer of as many bytes as they have.

    Args:
        fds: readable descriptors, borrowed; their positions are neither used nor moved.
        sizes: their sizes in bytes, as ``fstat`` told them.
        algorithm: sha256 or sha512.

    Raises:
        IntegrityError: the next file is longer or shorter than its size.
        OSError: reading the next file failed.
    """
    contents = bytearray(sum(sizes))
    digests = bytearray(len(fds) * algorithm.digest_size)
    result = array("i", [0])
    nr_files = _lib.cfs_read_files(
        _ffi.from_buffer("int[]", array("i", fds)),
        _ffi.from_buffer("uint64_t[]", array("Q", sizes)),
        len(fds),
        algorithm,
        _ffi.from_buffer("uint8_t[]", contents),
        _ffi.from_buffer("uint8_t[]", digests),
        algorithm.digest_size,
        _ffi.from_buffer("int[]", result),
    )
    off = 0
    view = memoryview(contents)
    for size, digest in zip(sizes, _split_digests(digests, algorithm, nr_files), strict=False):
        yield view[off : off + size], digest
        off += size
    _check_file(result[0], fds, sizes, nr_files)


def _split_digests(digests: bytearray, algorithm: Algorithm, number: int) -> Iterator[Digest]:
    for off in range(0, number * algorithm.digest_size, algorithm.digest_size):
        yield Digest(bytes(digests[off : off + algorithm.digest_size]))


def _check_file(result: int, fds: Sequence[int], sizes: Sequence[int], number: int) -> None:
    """Raise what the C functions say of the file that they stopped at."""
    if result > 0:
        size, found = sizes[number], os.fstat(fds[number]).st_size
        msg = f"file changed while it was read: expected {size} bytes, found {found}"
        raise IntegrityError(msg)
    _check(result)


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
