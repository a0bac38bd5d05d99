"""Objects that are written and wait for their names.

Nothing gets its name before it is durable.  One fsync for each object would cost most of an
import, so objects wait, unnamed, until there are enough of them; then one syncfs makes all of
them durable, and they get their names (spec repository 2.7 has no such promise: there an object
may have its name and be empty after a crash).
"""

import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from cfs.digest import Digest
from cfs.linux.files import naming, reopen_readonly, sync_file_system
from cfs.objectdir.temporary import Temporary

__all__ = ["Pending"]

# judges an object that has its name already: fan-out directory, rest of the name, digest, size
_IsGood = Callable[[int, bytes, Digest, int], bool]

_MAX_BATCH = 1024
_MIN_BATCH = 32
_OTHER_FILES = 512  # descriptors that the process may need for all else
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Pending:
    """The objects of one directory that wait for their names; any thread may call.

    Each of them holds a descriptor, so a batch is as large as the limit of descriptors allows.

    Two locks: ``_lock`` for the dictionaries, held for moments; ``_publishing`` is held by the one
    thread that syncs and names a batch, or waits until another one has done so.  The second
    is taken first.

    After a failed sync nobody knows which data were lost (fsync(2), NOTES).  So every later sync
    fails as well, whoever asks: an object that one thread has put may have been lost by another
    thread's failure.
    """

    def __init__(self, name: bytes, is_good: _IsGood) -> None:
        """Nothing waits.

        Args:
            name: of the directory, for errors.
            is_good: judges an object that another writer has named meanwhile.
        """
        self._name = name
        self._is_good = is_good
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._waiting: dict[Digest, Temporary] = {}
        self._in_flight: dict[Digest, Temporary] = {}
        self._is_unsynced = False
        self._failure: BaseException | None = None
        # one batch is being filled while another one gets its names
        spare = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OTHER_FILES
        self._batch_files = max(_MIN_BATCH, min(_MAX_BATCH, spare // 2))

    def add(self, digest: Digest, temporary: Temporary) -> bool:
        """Take over a file that is complete; return False if the object waits already.

        Raises:
            OSError: a batch could not be synced or named.
        """
        with self._lock:
            is_new = digest not in self._waiting and digest not in self._in_flight
            if is_new:
                self._waiting[digest] = temporary
            is_full = len(self._waiting) >= self._batch_files
        if not is_new:
            temporary.discard()
            return False
        if is_full:
            with self._publishing:
                if len(self._waiting) >= self._batch_files:
                    self._publish(temporary.directory)
        return True

    def open(self, digest: Digest) -> int | None:
        """Return a read-only descriptor of an object that waits; None if it does not."""
        with self._lock:
            temporary = self._waiting.get(digest) or self._in_flight.get(digest)
            return reopen_readonly(temporary.fd) if temporary else None

    def __contains__(self, digest: Digest) -> bool:
        """Whether an object waits."""
        with self._lock:
            return digest in self._waiting or digest in self._in_flight

    def note_present(self) -> None:
        """Have the next :meth:`flush` sync: somebody else's names may not be durable yet."""
        self._is_unsynced = True

    def flush(self, directory: Callable[[], int]) -> None:
        """Give names to all that wait, and make names durable.

        Args:
            directory: returns the descriptor of the directory of objects.

        Raises:
            OSError: as syncfs(2), linkat(2) and rename(2).
        """
        with self._publishing:
            if self._waiting:
                self._publish(directory())
            self._raise_failure()
            if self._is_unsynced:
                self._is_unsynced = False
                with self._noting_failure():
                    self._sync(directory())

    def discard(self) -> None:
        """Drop all that wait."""
        with self._publishing, self._lock:
            waiting, self._waiting = self._waiting, {}
        for temporary in waiting.values():
            temporary.discard()

    def _publish(self, directory: int) -> None:
        """Sync and name what waits; with ``_publishing`` held."""
        with self._lock:
            self._in_flight, self._waiting = self._waiting, {}
        try:
            self._raise_failure()
            with self._noting_failure():
                self._sync(directory)
                self._is_unsynced = True
                _name_all(directory, self._in_flight, self._is_good)
        finally:
            with self._lock:
                done, self._in_flight = self._in_flight, {}
            for temporary in done.values():
                temporary.discard()

    def _sync(self, directory: int) -> None:
        with naming(self._name):
            sync_file_system(directory)

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._failure = error
            raise

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _name_all(directory: int, objects: dict[Digest, Temporary], is_good: _IsGood) -> None:
    """Give a batch of objects their names, one fan-out directory after the other."""
    fan_out, name = -1, b""
    try:
        for digest in sorted(objects, key=lambda digest: digest.value):
            path = digest.object_path
            with naming(path):
                if path[:2] != name:
                    if fan_out != -1:
                        os.close(fan_out)
                        fan_out = -1
                    name = path[:2]
                    fan_out = _open_fan_out(directory, name)
                _name(objects[digest], fan_out, path[3:], digest, is_good)
    finally:
        if fan_out != -1:
            os.close(fan_out)


def _open_fan_out(directory: int, name: bytes) -> int:
    with suppress(FileNotFoundError):
        return os.open(name, _OPEN_DIRECTORY, dir_fd=directory)
    with suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=directory)
    return os.open(name, _OPEN_DIRECTORY, dir_fd=directory)


def _name(
    temporary: Temporary,
    fan_out: int,
    rest: bytes,
    digest: Digest,
    is_good: _IsGood,
) -> None:
    """Place one object; keep what another writer has placed, unless it is damaged."""
    try:
        temporary.place(fan_out, rest)
    except FileExistsError:
        if not is_good(fan_out, rest, digest, temporary.size()):
            temporary.replace(fan_out, rest)
