"""A directory on disk becomes a tree; contents may go to a directory of objects.

The rules are those of C ``mkcomposefs`` without ``--from-file`` (spec erofs-image 5.10).  Every
name is opened once, relative to the descriptor of its directory, without following symlinks,
and all that is recorded comes from that descriptor: what is renamed or replaced meanwhile
cannot lead the scan elsewhere.  A file whose size changes while it is read is an error.

One thread walks, depth-first in name order; others read and digest files.  At most
``_MAX_OPEN_DIRECTORIES`` + ``_MAX_OPEN_FILES`` descriptors and a few more are open at any
depth of the tree.  Needs /proc.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from cfs.digest import Algorithm, Digest
from cfs.errors import IntegrityError, InvalidRequestError
from cfs.fsverity import compute_file_digest, compute_file_digests, read_files
from cfs.linux.files import naming, reopen_readonly
from cfs.objectdir import ObjectDirectory
from cfs.tree import Directory, Inode, Link, Regular, Special, Symlink

__all__ = ["ScanOptions", "scan"]

_CONTENT_LIMIT = 64  # bytes; larger files become objects
_MAX_OPEN_DIRECTORIES = 64
_MAX_OPEN_FILES = 256
_MAX_THREADS = _MAX_OPEN_FILES // 2
_BATCH_FILES = 16
_BATCH_SIZE = 1 << 20
_OPEN_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NO_FD = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanOptions:
    """What a scan records.

    Attributes:
        use_epoch: all times are 0.
        skip_devices: leave out character and block devices.
        skip_xattrs: record no xattrs.
        user_xattrs: record only xattrs whose name starts with ``user.``.
        hardlinks: names of one inode share a node, carried by the first in depth-first name
            order, and ``nlink`` counts the names in the tree; otherwise each name is an inode
            of its own, with ``nlink`` 1, as in C.
        algorithm: of the digests.
        threads: number of threads that digest, by default one for each usable CPU.
        objects: where to put the contents of files above 64 bytes; None: nowhere.
        progress: called by any thread with the size of each file above 64 bytes that is done.

    Raises:
        InvalidRequestError: options contradict each other.
    """

    use_epoch: bool = False
    skip_devices: bool = False
    skip_xattrs: bool = False
    user_xattrs: bool = False
    hardlinks: bool = False
    algorithm: Algorithm = Algorithm.SHA256
    threads: int | None = None
    objects: ObjectDirectory | None = None
    progress: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        if self.skip_xattrs and self.user_xattrs:
            msg = "skip_xattrs and user_xattrs exclude each other"
            raise InvalidRequestError(msg)
        if self.objects and self.objects.algorithm is not self.algorithm:
            msg = f"objects are named by {self.objects.algorithm.name.lower()} digests"
            raise InvalidRequestError(msg)
        if self.threads is not None and self.threads < 1:
            msg = f"invalid number of threads {self.threads}: expected 1 or more"
            raise InvalidRequestError(msg)


_DEFAULTS = ScanOptions()


def scan(
    directory: str | bytes | os.PathLike[str], *, options: ScanOptions = _DEFAULTS
) -> Directory:
    """Return the tree of a directory on disk.

    Args:
        directory: its path; a symlink to a directory is followed here, and only here.
        options: what to record.

    Raises:
        IntegrityError: something changed while it was scanned.
        OSError: something cannot be read; the file name is its path.
    """
    fd = os.open(directory, _OPEN_DIRECTORY)
    with _DigestPool(options) as pool:
        return _Scanner(options, pool).run(fd, os.fsencode(directory))


@dataclass(slots=True)
class _Frame:
    """A directory that is being scanned; ``fd`` is owned, or ``_NO_FD`` while deep below."""

    path: bytes
    node: Directory
    identity: tuple[int, int]
    names: Iterator[bytes]
    fd: int


class _Scanner:
    """The walk: a stack of directories, the root at its bottom.  One thread."""

    def __init__(self, options: ScanOptions, pool: "_DigestPool") -> None:
        self._options = options
        self._pool = pool
        self._stack: list[_Frame] = []
        self._first_names: dict[tuple[int, int], Inode] = {}

    def run(self, fd: int, path: bytes) -> Directory:
        """Scan the directory ``fd``, which is taken over."""
        try:
            root = self._enter(fd, path)
            while self._stack:
                frame = self._stack[-1]
                name = next(frame.names, None)
                if name is None:
                    self._leave()
                else:
                    self._add(frame, name)
        finally:
            for frame in self._stack:
                if frame.fd != _NO_FD:
                    os.close(frame.fd)
        return root

    def _enter(self, fd: int, path: bytes) -> Directory:
        """Put a directory on the stack; its descriptor is taken over in any case."""
        try:
            with naming(path):
                status = os.fstat(fd)
                node = Directory(mode=status.st_mode)
                self._describe(node, status, fd)
                names = sorted(map(os.fsencode, os.listdir(fd)))
        except BaseException:
            os.close(fd)
            raise
        self._stack.append(_Frame(path, node, _identity(status), iter(names), fd))
        if len(self._stack) > _MAX_OPEN_DIRECTORIES:
            above = self._stack[-1 - _MAX_OPEN_DIRECTORIES]
            os.close(above.fd)
            above.fd = _NO_FD
        return node

    def _leave(self) -> None:
        """Go back to the parent, through ``..`` if its descriptor had to be closed."""
        left = self._stack.pop()
        try:
            if self._stack and self._stack[-1].fd == _NO_FD:
                parent = self._stack[-1]
                with naming(parent.path):
                    parent.fd = os.open("..", _OPEN_DIRECTORY, dir_fd=left.fd)
                    identity = _identity(os.fstat(parent.fd))
                if identity != parent.identity:
                    msg = f"{os.fsdecode(left.path)}: directory was moved while it was scanned"
                    raise IntegrityError(msg)
        finally:
            os.close(left.fd)

    def _add(self, frame: _Frame, name: bytes) -> None:
        """Add one name to the directory on top of the stack."""
        path = os.path.join(frame.path, name)
        with naming(path):
            fd = os.open(name, _OPEN_PATH, dir_fd=frame.fd)
            try:
                status = os.fstat(fd)
                if stat.S_ISDIR(status.st_mode):
                    below = os.open(".", _OPEN_DIRECTORY, dir_fd=fd)
                    frame.node.children[name] = self._enter(below, path)
                elif not (self._options.skip_devices and _is_device(status)):
                    frame.node.children[name] = self._leaf(fd, status, path)
            finally:
                os.close(fd)

    def _leaf(self, fd: int, status: os.stat_result, path: bytes) -> Inode | Link:
        """Return the node of a leaf, or the link to the one that its first name has."""
        if self._options.hardlinks and status.st_nlink > 1:
            first = self._first_names.get(_identity(status))
            if first:
                first.nlink += 1
                return Link(first)
        node = self._node(fd, status, path)
        self._describe(node, status, fd)
        if self._options.hardlinks and status.st_nlink > 1:
            self._first_names[_identity(status)] = node
        return node

    def _node(self, fd: int, status: os.stat_result, path: bytes) -> Inode:
        mode = status.st_mode
        if stat.S_ISLNK(mode):
            return Symlink(mode=mode, target=os.readlink(b"", dir_fd=fd))
        if not stat.S_ISREG(mode):
            return Special(mode=mode)
        node = Regular(mode=mode)
        if status.st_size > _CONTENT_LIMIT:
            self._pool.submit(_Job(reopen_readonly(fd), status.st_size, node, path))
        elif status.st_size:
            node.content = _read_content(fd, status.st_size, path)
        return node

    def _describe(self, node: Inode, status: os.stat_result, fd: int) -> None:
        """Fill in what all inodes have."""
        node.uid = status.st_uid
        node.gid = status.st_gid
        node.size = len(node.target) if isinstance(node, Symlink) else status.st_size
        if _is_device(status):
            node.rdev = status.st_rdev & 0xFFFFFFFF  # the kernel's 32-bit form, spec 2.6
        if not self._options.use_epoch:
            node.mtime_sec, node.mtime_nsec = divmod(status.st_mtime_ns, 1_000_000_000)
        if not self._options.skip_xattrs:
            node.xattrs = self._xattrs(fd)

    def _xattrs(self, fd: int) -> dict[bytes, bytes]:
        # through /proc, because O_PATH descriptors are refused by the f*xattr calls
        path = f"/proc/self/fd/{fd}"
        try:
            names = os.listxattr(path)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # FUSE without xattrs
                return {}
            raise
        return {
            os.fsencode(name): os.getxattr(path, name)
            for name in names
            if not self._options.user_xattrs or name.startswith("user.")
        }


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_device(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)


def _read_content(fd: int, size: int, path: bytes) -> bytes:
    reader = reopen_readonly(fd)
    try:
        content = os.pread(reader, _CONTENT_LIMIT + 1, 0)
    finally:
        os.close(reader)
    if len(content) != size:
        msg = (
            f"{os.fsdecode(path)}: file changed while it was read: "
            f"expected {size} bytes, found {len(content)}"
        )
        raise IntegrityError(msg)
    return content


@dataclass(frozen=True, slots=True)
class _Job:
    """A file to digest; ``fd`` is owned.  The worker fills in payload and digest of ``node``."""

    fd: int
    size: int
    node: Regular
    path: bytes


@dataclass(slots=True)
class _Batch:
    jobs: list[_Job] = field(default_factory=list)
    size: int = 0


class _DigestPool:
    """Threads that digest files and put them into the object directory.

    Small files go in batches, since handing one over costs more than digesting it.  Only the
    walking thread calls the methods; a node belongs to the worker from :meth:`submit` until the
    end of the context as far as payload and digest are concerned.  ``_stopped`` only ever
    becomes true, and needs no lock.
    """

    def __init__(self, options: ScanOptions) -> None:
        threads = min(options.threads or len(os.sched_getaffinity(0)), _MAX_THREADS)
        self._options = options
        self._max_running = 2 * threads - 1  # and one batch being filled
        self._batch_files = min(_BATCH_FILES, _MAX_OPEN_FILES // (2 * threads))
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="cfs-digest")
        self._batch = _Batch()
        self._running: set[Future[None]] = set()
        self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for all files, or close them if there is an error; raises the workers' error."""
        self._stopped = error is not None
        try:
            self._flush()
            while self._running and not self._stopped:
                self._reap()
        finally:
            self._stopped = True
            self._executor.shutdown()

    def submit(self, job: _Job) -> None:
        """Take over a file; waits while too many are open; raises the workers' error."""
        self._batch.jobs.append(job)
        self._batch.size += job.size
        if len(self._batch.jobs) >= self._batch_files or self._batch.size >= _BATCH_SIZE:
            self._flush()
            while len(self._running) >= self._max_running:
                self._reap()

    def _flush(self) -> None:
        batch = self._batch
        self._batch = _Batch()
        self._running.add(self._executor.submit(self._run, batch.jobs))

    def _reap(self) -> None:
        done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()

    def _run(self, jobs: list[_Job]) -> None:
        """Digest a batch, in a worker; its files are closed in any case."""
        try:
            if not self._stopped:
                self._digest(jobs)
        finally:
            for job in jobs:
                os.close(job.fd)

    def _digest(self, jobs: list[_Job]) -> None:
        objects = self._options.objects
        if objects:
            digests = _store(jobs, objects)
        else:
            digests = compute_file_digests(
                [job.fd for job in jobs], [job.size for job in jobs], self._options.algorithm
            )
        for job in jobs:
            try:
                digest = next(digests)
            except OSError as error:
                if error.filename is None:
                    error.filename = os.fsdecode(job.path)
                raise
            except IntegrityError as error:
                msg = f"{os.fsdecode(job.path)}: {error}"
                raise IntegrityError(msg) from error
            job.node.payload = digest.object_path
            job.node.digest = digest
            if self._options.progress:
                self._options.progress(job.size)


def _store(jobs: list[_Job], objects: ObjectDirectory) -> Iterator[Digest]:
    """Make objects of files, and yield their digests.

    Small ones are read once, digested and written from memory.
    """
    small = [job for job in jobs if job.size <= _BATCH_SIZE]
    contents = read_files([job.fd for job in small], [job.size for job in small], objects.algorithm)
    for job in jobs:
        if job.size <= _BATCH_SIZE:
            data, digest = next(contents)
            objects.put_contents(data, digest)
        else:
            digest = compute_file_digest(job.fd, job.size, objects.algorithm)
            objects.put(job.fd, job.size, digest)
        yield digest
