"""The repository: an open store (spec repository 1).

A store is a directory with ``meta.json``, ``objects``, ``images`` and ``streams``; all but the
first appear when they are first needed.  A :class:`Repository` holds the store's lock shared,
from its making until it is closed.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Self

from cfs.digest import Algorithm
from cfs.errors import CfsError, FormatError, InvalidRequestError, NotFoundError, UnsupportedError
from cfs.linux.files import naming
from cfs.objectdir import ObjectDirectory, Verity
from cfs.repository.creation import InitResult, Outcome, init
from cfs.repository.locks import LockedDirectory, lock_soon
from cfs.repository.metadata import Formats, Metadata, format_algorithm
from cfs.repository.metafile import read_metadata
from cfs.repository.oldstores import convert, infer_algorithm
from cfs.repository.refs import STREAMS, ensure_directory

__all__ = [
    "InitResult",
    "Outcome",
    "Repository",
    "default_path",
    "init",
    "probe_algorithm",
]

_OBJECTS = b"objects"
_SYSTEM_PATH = "/sysroot/composefs"
_USER_PATH = ".var/lib/composefs"


class Repository:
    """An open store; a context manager that closes it.

    Threads may share it.

    Attributes:
        path: as given.
        fd: the store's directory, for reading; borrowed.
        metadata: what ``meta.json`` says.
        algorithm: names all objects.
        formats: which images are written in; those of the store or one of the caller's choice.
        is_secure: whether objects must have fs-verity.
        objects: where all contents are.
    """

    def __init__(
        self,
        path: str,
        directory: LockedDirectory,
        metadata: Metadata,
        *,
        verity: Verity,
        erofs_version: int | None,
    ) -> None:
        """Own one use of the directory; only for :meth:`open`."""
        self.path = path
        self.metadata = metadata
        self.algorithm = metadata.algorithm
        self.formats = metadata.formats if erofs_version is None else Formats(erofs_version)
        self.is_secure = verity is Verity.REQUIRE
        self._directory = directory
        self._is_open = True
        self.objects = ObjectDirectory(self.fd, _OBJECTS, self.algorithm, verity)

    @classmethod
    def open(
        cls,
        path: str,
        *,
        algorithm: Algorithm | None = None,
        upgrade: bool = True,
        require_verity: bool = False,
        insecure: bool = False,
        erofs_version: int | None = None,
        wait: bool = True,
    ) -> Self:
        """Open a store, once no collection keeps others out.

        Args:
            path: of the store.
            algorithm: insist on it.
            upgrade: convert a store from before ``meta.json``.
            require_verity: fail unless the store is secure.
            insecure: do without fs-verity where it is missing.
            erofs_version: format of images, in place of what the store says.
            wait: wait for a collection, as long as it takes.

        Raises:
            BusyError: somebody collects or wants to, and ``wait`` is false.
            NotFoundError: there is no store.
            FormatError: ``meta.json`` is broken.
            UnsupportedError: the store is too new, or has no fs-verity though required.
            InvalidRequestError: the store has another algorithm.
            IntegrityError: ``meta.json`` has fs-verity of another hash.
            OSError: whatever else went wrong.
        """
        try:
            directory = LockedDirectory.open(path, wait=wait)
        except (FileNotFoundError, NotADirectoryError) as error:
            msg = f"opening repository {path}: {error.strerror}"
            raise NotFoundError(msg) from None
        try:
            metadata, is_secure = _load(path, directory.fd, upgrade=upgrade)
            _check(metadata, algorithm)
            # who does not insist still keeps a secure store that way, where that is possible
            demanded = Verity.TRY if insecure else Verity.REQUIRE
            verity = demanded if is_secure else Verity.NEVER
            if require_verity:
                _check_secure(verity)
            return cls(path, directory, metadata, verity=verity, erofs_version=erofs_version)
        except BaseException:
            directory.close()
            raise

    @classmethod
    def adopt(cls, path: str, fd: int, metadata: Metadata, verity: Verity) -> Self:
        """Return a store that another process has opened, with its lock; owns the descriptor.

        Args:
            path: as given there.
            fd: the store's directory.
            metadata: what was read there.
            verity: of :attr:`objects` there.

        Raises:
            OSError: as fstat(2).
        """
        return cls(path, LockedDirectory.adopt(fd), metadata, verity=verity, erofs_version=None)

    def share(self) -> Self:
        """Return another use of the same open store, with nothing to flush; closed by itself.

        For whoever must not be hurt by a failure of the others: a failed sync is final.
        """
        verity = self.objects.verity
        directory = self._directory.share()
        other = type(self)(self.path, directory, self.metadata, verity=verity, erofs_version=None)
        other.formats = self.formats
        return other

    @property
    def fd(self) -> int:
        """The store's directory."""
        return self._directory.fd

    def check_writable(self) -> None:
        """Refuse to write before anything is done (spec repository 2.2).

        Raises:
            UnsupportedError: the store has features that we do not know.
            OSError: ``EROFS`` or ``EACCES``.
        """
        self.metadata.check_writable()
        if os.fstatvfs(self.fd).f_flag & os.ST_RDONLY:
            msg = "Repository is not writable: read-only file system"
            raise OSError(errno.EROFS, msg)
        if not os.access(".", os.W_OK, dir_fd=self.fd, effective_ids=True):
            msg = "Repository is not writable: Permission denied"
            raise OSError(errno.EACCES, msg)

    def sync(self) -> None:
        """Make everything stored so far durable; call before it gets a name in the store.

        Raises:
            OSError: ``ENOSPC``, ``EIO`` and the like: it is not durable.
        """
        self.objects.flush()

    def exclusive(
        self, *, wait: bool = True, on_wait: Callable[[], None] | None = None
    ) -> AbstractContextManager[None]:
        """Keep other processes out for the duration of a block.

        See :meth:`cfs.repository.locks.LockedDirectory.exclusive`.
        """
        return self._directory.exclusive(wait=wait, on_wait=on_wait)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Keep other such blocks out, those of other threads and processes.

        For what is read, changed and written again under the same name, where another one's change
        would be lost.  Blocks do not nest and are short; composefs-rs knows nothing of them.

        Raises:
            BusyError: another process is in such a block for far too long.
            OSError: as mkdir(2), open(2) and flock(2) on the directory of streams.
        """
        with naming(STREAMS):
            directory = ensure_directory(self.fd, [STREAMS.encode()])
        try:
            lock_soon(directory)
            try:
                yield
            finally:
                # a child of another thread may have inherited the descriptor
                fcntl.flock(directory, fcntl.LOCK_UN)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Discard what was not flushed; the lock goes with the last use in this process."""
        if self._is_open:
            self._is_open = False
            self.objects.close()
            self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _load(path: str, directory_fd: int, *, upgrade: bool) -> tuple[Metadata, bool]:
    try:
        found = read_metadata(directory_fd)
    except FormatError as error:
        msg = f"Reading repository algorithm: {error}"
        raise FormatError(msg) from None
    if found is not None:
        return found
    if not upgrade:
        msg = (
            f"meta.json not found in {path}; this repository must be initialized with `cfsctl init`"
        )
        raise NotFoundError(msg)
    try:
        return convert(directory_fd)
    except NotFoundError as error:
        msg = f"no meta.json in {path}; tried to infer algorithm from objects: {error}"
        raise NotFoundError(msg) from None


def _check(metadata: Metadata, algorithm: Algorithm | None) -> None:
    metadata.check_readable()
    if algorithm is not None and algorithm is not metadata.algorithm:
        msg = (
            f"repository is configured for {format_algorithm(metadata.algorithm)} "
            f"(from meta.json) but --hash {algorithm.name.lower()} was specified"
        )
        raise InvalidRequestError(msg)


def _check_secure(verity: Verity) -> None:
    if verity is not Verity.REQUIRE:
        msg = (
            "repository was not initialized with fs-verity "
            "(hint: re-create with `cfsctl init` on a verity-capable filesystem)"
        )
        raise UnsupportedError(msg)


def default_path(*, user: bool = False, system: bool = False, home: str | None = None) -> str:
    """Return where the store of the user or of the system is (spec repository 1.7).

    With neither, that is the system's for root and the user's for everybody else.

    Args:
        user: that of the user.
        system: that of the system.
        home: directory of the user, in place of ``HOME``.

    Raises:
        InvalidRequestError: ``HOME`` is not set.
    """
    if system or (not user and os.getuid() == 0):
        return _SYSTEM_PATH
    home = home or os.environ.get("HOME")
    if not home:
        msg = "HOME is not set: cannot tell where the store of the user is"
        raise InvalidRequestError(msg)
    return os.path.join(home, _USER_PATH)


def probe_algorithm(path: str) -> Algorithm | None:
    """Return the algorithm of a store without opening it; None after any trouble."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = read_metadata(fd)
        return infer_algorithm(fd) if found is None else found[0].algorithm
    except (CfsError, OSError):
        return None
    finally:
        os.close(fd)
