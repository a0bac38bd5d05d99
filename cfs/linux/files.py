"""File system calls that Python lacks, or has only in pieces.

Linux man pages openat2(2), open(2) ``O_TMPFILE``, rename(2), ioctl_ficlone(2),
copy_file_range(2), lseek(2) ``SEEK_DATA``, syncfs(2).  Knows nothing of composefs.  Descriptors
given are borrowed; those returned belong to the caller and are close-on-exec.  No shared state:
any thread may call.
"""

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import IntFlag

from cfs.errors import UnsupportedError
from cfs.linux.credentials import is_acting
from cfs.linux.libc import libc

__all__ = [
    "PATH_MAX",
    "Resolve",
    "clone_file",
    "copy_contents",
    "file_system",
    "is_on_overlay",
    "link_unnamed",
    "naming",
    "open_path",
    "open_unnamed",
    "openat2",
    "owned",
    "rename_noreplace",
    "reopen_readonly",
    "replacing",
    "sync_file_system",
    "write_all",
]

PATH_MAX = 4096  # bytes of a path with its NUL; linux/limits.h
FICLONE = 0x40049409
_SYS_OPENAT2 = 437  # the same on every architecture that Debian supports
_NR_RETRIES = 64
_AT_FDCWD = -100
_COPY_SIZE = 1 << 20
_RENAME_NOREPLACE = 1
_STATFS_SIZE = 256  # more than struct statfs of any architecture
_OVERLAYFS_SUPER_MAGIC = 0x794C7630
_PROC_SUPER_MAGIC = 0x9FA0
_OURS = os.O_CLOEXEC | os.O_NOCTTY


class Resolve(IntFlag):
    """``RESOLVE_*`` of openat2."""

    NO_XDEV = 0x01
    NO_MAGICLINKS = 0x02
    NO_SYMLINKS = 0x04
    BENEATH = 0x08
    IN_ROOT = 0x10


class _OpenHow(ctypes.Structure):
    """``struct open_how``, 24 bytes."""

    _fields_ = [
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    ]


def owned(stack: ExitStack, fd: int) -> int:
    """Return a descriptor that the stack closes."""
    stack.callback(os.close, fd)
    return fd


@contextmanager
def naming(path: bytes | str) -> Iterator[None]:
    """Fill ``path`` into every ``OSError`` that leaves the block."""
    try:
        yield
    except OSError as error:
        error.filename = os.fsdecode(path)
        del error.filename2  # None would be printed
        raise


def openat2(
    dir_fd: int,
    path: bytes,
    flags: int,
    *,
    resolve: Resolve = Resolve.BENEATH | Resolve.NO_SYMLINKS,
) -> int:
    """Open a path below a directory and return the descriptor.

    Args:
        dir_fd: the directory.
        path: relative path; may hold anything, it is checked by the kernel.
        flags: ``O_*`` as for open, without ``O_CREAT``; ``O_CLOEXEC`` is added, and ``O_NOCTTY``.
        resolve: restrictions; by default no way out of ``dir_fd`` and no symlinks at all.

    Raises:
        UnsupportedError: the kernel is older than Linux 5.6.
        OSError: ``EXDEV`` if the path leads outside, ``ELOOP`` if it has a symlink, else as
            open(2); the file name is filled in.
    """
    if b"\0" in path:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
    # the kernel refuses what says nothing beside O_PATH
    how = _OpenHow(flags | (os.O_CLOEXEC if flags & os.O_PATH else _OURS), 0, resolve)
    reason = errno.EAGAIN
    for _ in range(_NR_RETRIES):
        fd = libc().syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(dir_fd),
            ctypes.c_char_p(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return int(fd)
        reason = ctypes.get_errno()
        # EAGAIN: something was renamed or mounted while ".." was followed
        if reason not in (errno.EAGAIN, errno.EINTR):
            break
    if reason == errno.ENOSYS:
        msg = "the kernel has no openat2: expected Linux 5.6 or later"
        raise UnsupportedError(msg)
    raise OSError(reason, os.strerror(reason), os.fsdecode(path))


def open_path(path: bytes | str, flags: int, *, dir_fd: int | None = None) -> int:
    """Open a path that somebody gives, or that may have links which somebody has made.

    For a thread that acts as another user, ``/proc/self/fd`` and the like lead nowhere: what this
    process has open or has as its working directory may be where that user could not go.  Nothing
    else in proc(5) can be opened either: ``/proc/sys`` asks for the process's user, not for his.
    No terminal becomes ours, for whoever has the other end could send us signals.

    Args:
        path: what to open.
        flags: as for :func:`openat2`.
        dir_fd: directory that a relative path begins in, in place of the working directory.

    Raises:
        PermissionError: who acts as another user has to give an absolute path, outside of proc(5).
        OSError: ``ELOOP`` for such links, else as open(2).
    """
    if not is_acting():
        return os.open(path, flags | _OURS, dir_fd=dir_fd)
    with naming(path):
        raw = os.fsencode(path)
        if dir_fd is None and raw and not raw.startswith(b"/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        start = _AT_FDCWD if dir_fd is None else dir_fd
        fd = openat2(start, raw, flags, resolve=Resolve.NO_MAGICLINKS)
        if file_system(fd) == _PROC_SUPER_MAGIC:
            os.close(fd)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return fd


def open_unnamed(dir_fd: int, mode: int) -> int:
    """Create a file without a name on the file system of a directory, open for writing.

    It vanishes with its last descriptor, unless :func:`link_unnamed` names it.

    Args:
        dir_fd: the directory.
        mode: permission bits, subject to umask.

    Raises:
        UnsupportedError: the file system cannot.
        OSError: as open(2).
    """
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    except OSError as error:
        # EISDIR: the kernel or file system does not know the flag
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    msg = "the file system has no unnamed files"
    raise UnsupportedError(msg)


def link_unnamed(fd: int, dir_fd: int, path: bytes) -> None:
    """Give a name to a file made by :func:`open_unnamed`; needs /proc.

    Args:
        fd: any descriptor of the file.
        dir_fd: directory that ``path`` is relative to.
        path: the new name.

    Raises:
        FileExistsError: the name is taken; nothing was changed.
        OSError: as linkat(2).
    """
    os.link(f"/proc/self/fd/{fd}", path, dst_dir_fd=dir_fd, follow_symlinks=True)


def reopen_readonly(fd: int) -> int:
    """Open the file of a descriptor (``O_PATH`` too) once more, read-only; needs /proc.

    Raises:
        OSError: as open(2).
    """
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)


def rename_noreplace(source_fd: int, source: bytes, target_fd: int, target: bytes) -> None:
    """Rename a file, unless the new name is taken.

    Args:
        source_fd: directory of the old name.
        source: the old name.
        target_fd: directory of the new name.
        target: the new name.

    Raises:
        FileExistsError: the new name is taken; nothing was changed.
        OSError: as renameat2(2), ``EINVAL`` where the file system does not know the flag.
    """
    if libc().renameat2(source_fd, source, target_fd, target, _RENAME_NOREPLACE):
        reason = ctypes.get_errno()
        raise OSError(reason, os.strerror(reason), os.fsdecode(target))


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of it, however little write(2) takes at a time.

    Raises:
        OSError: as write(2); part of it may have been written.
    """
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


@contextmanager
def replacing(path: str, mode: int) -> Iterator[int]:
    """Give the descriptor of an empty file that gets its name at the end of a block.

    After an error it vanishes, and what had the name stays.

    Args:
        path: of the file; its directory must be there.
        mode: of the file; the umask takes its part.

    Raises:
        OSError: as open(2) and rename(2).
    """
    temporary = os.path.join(os.path.dirname(path), f".cfs-{os.urandom(8).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            yield fd
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def sync_file_system(fd: int) -> None:
    """Wait until all that was written to the file system of ``fd`` is durable.

    Raises:
        OSError: as syncfs(2); what failed to be written since ``fd`` was opened is reported once.
    """
    if libc().syncfs(fd):
        reason = ctypes.get_errno()
        raise OSError(reason, os.strerror(reason))


def is_on_overlay(fd: int) -> bool:
    """Whether a file (``O_PATH`` too) lies on overlayfs.

    Raises:
        OSError: as fstatfs(2).
    """
    return file_system(fd) == _OVERLAYFS_SUPER_MAGIC


def file_system(fd: int) -> int:
    """Return the magic number of the file system that a file (``O_PATH`` too) lies on.

    Raises:
        OSError: as fstatfs(2).
    """
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    if libc().fstatfs(fd, buffer):
        reason = ctypes.get_errno()
        raise OSError(reason, os.strerror(reason))
    # f_type comes first; it is a long or an int, and we are little endian
    return int.from_bytes(buffer.raw[:4], "little")


def clone_file(source_fd: int, target_fd: int) -> bool:
    """Make a file share all blocks of another (reflink); tell whether that was possible.

    Args:
        source_fd: open for reading.
        target_fd: open for writing, on the same file system.

    Raises:
        OSError: as ioctl_ficlone(2), but for the errors that say "not here".
    """
    try:
        fcntl.ioctl(target_fd, FICLONE, source_fd)
    except OSError as error:
        impossible = (
            errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS,
            errno.EPERM, errno.ETXTBSY,
        )  # fmt: skip
        if error.errno in impossible:
            return False
        raise
    return True


def copy_contents(source_fd: int, target_fd: int, size: int) -> None:
    """Copy a whole file into an empty one: as reflink, else in the kernel, else by hand.

    Holes stay holes.  If the source shrinks meanwhile, the target ends there as a hole; the
    caller checks the result.

    Args:
        source_fd: regular file, open for reading; its position moves.
        target_fd: empty file, open for writing.
        size: bytes.

    Raises:
        OSError: ``ENOSPC`` and whatever else reading and writing give.
    """
    if clone_file(source_fd, target_fd):
        return
    for start, end in _data_ranges(source_fd, size):
        _copy_range(source_fd, target_fd, start, end)
    os.ftruncate(target_fd, size)


def _data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of what is no hole; all of it where holes are not known."""
    off = 0
    while off < size:
        try:
            start = os.lseek(fd, off, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            start = off
            end = size
        else:
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < end:
            yield start, end
        off = max(end, start + 1)


def _copy_range(source_fd: int, target_fd: int, start: int, end: int) -> None:
    """Copy bytes; 0 or an error that says "not here" from the kernel means: by hand."""
    while start < end:
        try:
            nr_copied = os.copy_file_range(source_fd, target_fd, end - start, start, start)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            nr_copied = 0
        if not nr_copied:
            break
        start += nr_copied
    while start < end:
        data = os.pread(source_fd, min(end - start, _COPY_SIZE), start)
        if not data:
            return
        start += os.pwrite(target_fd, data, start)
