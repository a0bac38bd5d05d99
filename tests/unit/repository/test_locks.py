"""Two opens of a directory are two owners of its lock, in one process as well."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cfs.errors import BusyError
from cfs.repository import locks
from cfs.repository.locks import LockedDirectory, lock_soon, open_shared

SECONDS = 30


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "meta.json").touch()
    return tmp_path


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max_workers=16) as executor:
        yield executor


@contextmanager
def opened(store: Path) -> Iterator[LockedDirectory]:
    directory = LockedDirectory.open(str(store))
    try:
        yield directory
    finally:
        directory.close()


def is_free(path: Path, operation: int = fcntl.LOCK_EX) -> bool:
    """Whether somebody else would get a lock."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def test_one_open_for_each_process(store: Path) -> None:
    (store / "link").symlink_to(".")
    first = LockedDirectory.open(str(store))
    second = LockedDirectory.open(str(store / "link"))
    assert second is first
    second.close()
    assert not is_free(store)
    assert is_free(store, fcntl.LOCK_SH)
    first.close()
    assert is_free(store)


def test_another_directory_of_that_name_is_another_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with opened(tmp_path / "a") as old:
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").mkdir()
        with opened(tmp_path / "a") as new:
            assert new is not old
            assert new.fd != old.fd


def test_threads_share_one_open(store: Path, pool: ThreadPoolExecutor) -> None:
    all_opened = list(pool.map(lambda _: LockedDirectory.open(str(store)), range(64)))
    assert len({id(directory) for directory in all_opened}) == 1
    for directory in all_opened:
        directory.close()
    assert is_free(store)


def test_the_slower_one_of_two_threads_closes_its_own(
    store: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2, timeout=SECONDS)

    def open_together(path: str, *, wait: bool) -> int:
        both.wait()
        return open_shared(path, wait=wait)

    monkeypatch.setattr(locks, "open_shared", open_together)
    before = os.listdir("/proc/self/fd")
    first, second = pool.map(LockedDirectory.open, [str(store)] * 2)
    assert first is second
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    first.close()
    second.close()
    assert is_free(store)


def test_who_got_the_descriptor_keeps_the_lock(store: Path) -> None:
    with opened(store) as directory:
        inherited = os.dup(directory.fd)
    assert not is_free(store)
    os.close(inherited)
    assert is_free(store)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        LockedDirectory.open(str(tmp_path / "none"))
    assert caught.value.filename == str(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        open_shared(str(tmp_path / "file"))


def test_exclusive_keeps_others_out_and_is_shared_afterwards(store: Path) -> None:
    with opened(store) as directory:
        with directory.exclusive():
            assert not is_free(store, fcntl.LOCK_SH)
        assert is_free(store, fcntl.LOCK_SH)
        assert not is_free(store)
        with pytest.raises(ZeroDivisionError), directory.exclusive():
            raise ZeroDivisionError
        assert is_free(store, fcntl.LOCK_SH)
    assert is_free(store / "meta.json")


def test_who_does_not_wait_fails_and_keeps_the_shared_lock(store: Path) -> None:
    other = open_shared(str(store))
    with opened(store) as directory:
        with pytest.raises(BusyError, match="in use"), directory.exclusive(wait=False):
            pass
        os.close(other)
        assert not is_free(store)  # flock drops a lock that it fails to convert
        with directory.exclusive(wait=False):
            assert not is_free(store, fcntl.LOCK_SH)


def test_who_gives_up_waiting_keeps_the_shared_lock(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(locks, "_SILENT_S", 0)
    other = open_shared(str(store))
    with opened(store) as directory:
        with pytest.raises(KeyboardInterrupt), directory.exclusive(on_wait=give_up):
            pass
        os.close(other)
        assert not is_free(store)
        assert is_free(store / "meta.json")
        with directory.exclusive(wait=False):
            assert not is_free(store, fcntl.LOCK_SH)


@pytest.mark.parametrize("locked", [".", "meta.json"])
def test_who_does_not_wait_fails_beside_a_collection(store: Path, locked: str) -> None:
    before = os.listdir("/proc/self/fd")
    collector = os.open(store / locked, os.O_RDONLY)
    fcntl.flock(collector, fcntl.LOCK_EX)
    for open_it in (LockedDirectory.open, open_shared):
        with pytest.raises(BusyError, match="in use"):
            open_it(str(store), wait=False)
    os.close(collector)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    LockedDirectory.open(str(store), wait=False).close()


def test_a_lock_that_fails_names_the_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(fcntl, "flock", refuse)
    for open_it in (LockedDirectory.open, open_shared):
        with pytest.raises(OSError, match="locks") as caught:
            open_it(str(store))
        assert caught.value.filename == str(store)
    assert len(os.listdir("/proc/self/fd")) == len(before)


class Clock:
    """Stands in for the module ``time``: only sleeping takes time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.nr_asked = 0

    def monotonic(self) -> float:
        self.nr_asked += 1
        assert self.nr_asked < 100_000
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


def test_the_turnstile_is_open_half_of_the_time(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script within a ``transaction`` opens the store again and again."""
    clock = Clock()
    open_s = [0.0]
    sleep = clock.sleep

    def look(duration_s: float) -> None:
        if is_free(store / "meta.json", fcntl.LOCK_SH):
            open_s[0] += duration_s
        sleep(duration_s)
        if clock.now_s > 1000:
            raise KeyboardInterrupt

    monkeypatch.setattr(clock, "sleep", look)
    monkeypatch.setattr(locks, "time", clock)
    other = open_shared(str(store))
    with opened(store) as directory, pytest.raises(KeyboardInterrupt), directory.exclusive():
        pass
    os.close(other)
    assert 400 < open_s[0] < 600


def test_two_collections_in_one_process(store: Path) -> None:
    with opened(store) as directory, opened(store) as again, directory.exclusive():
        with pytest.raises(BusyError), again.exclusive(wait=False):
            pass
        assert not is_free(store, fcntl.LOCK_SH)


def test_a_store_without_metadata_is_locked_as_well(tmp_path: Path) -> None:
    with opened(tmp_path) as directory, directory.exclusive():
        assert not is_free(tmp_path, fcntl.LOCK_SH)


def collect(store: Path, said: threading.Event, inside: Callable[[], None]) -> None:
    with opened(store) as directory, directory.exclusive(on_wait=said.set):
        inside()


def test_collection_comes_before_those_who_open_later(
    store: Path, pool: ThreadPoolExecutor
) -> None:
    order: list[str] = []
    holder = open_shared(str(store))
    said = threading.Event()
    collection = pool.submit(collect, store, said, lambda: order.append("collection"))
    wait_until(lambda: not is_free(store / "meta.json", fcntl.LOCK_SH))

    def open_late() -> None:
        fd = open_shared(str(store))
        order.append("opener")
        os.close(fd)

    openers = [pool.submit(open_late) for _ in range(3)]
    assert said.wait(SECONDS)
    assert order == []
    os.close(holder)
    for future in (collection, *openers):
        future.result(SECONDS)
    assert order == ["collection", "opener", "opener", "opener"]


def test_a_short_wait_is_silent(store: Path, pool: ThreadPoolExecutor) -> None:
    holder = open_shared(str(store))
    said = threading.Event()
    collection: Future[None] = pool.submit(collect, store, said, lambda: None)
    wait_until(lambda: not is_free(store / "meta.json", fcntl.LOCK_SH))
    os.close(holder)
    collection.result(SECONDS)
    assert not said.is_set()


def test_who_has_to_open_while_collection_waits_gets_in(
    store: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``transaction`` holds the store, and the commands inside it open it."""
    monkeypatch.setattr(locks, "_FIRST_SPAN_S", 0.05)
    transaction = open_shared(str(store))
    said = threading.Event()
    collection = pool.submit(collect, store, said, lambda: None)
    wait_until(lambda: not is_free(store / "meta.json", fcntl.LOCK_SH))
    os.close(pool.submit(open_shared, str(store)).result(SECONDS))
    assert not collection.done()
    os.close(transaction)
    collection.result(SECONDS)


def test_collection_comes_though_the_store_is_always_in_use(
    store: Path, pool: ThreadPoolExecutor
) -> None:
    stop = threading.Event()

    def use_again_and_again() -> None:
        while not stop.is_set():
            fd = open_shared(str(store))
            stop.wait(0.02)
            os.close(fd)

    users = [pool.submit(use_again_and_again) for _ in range(8)]
    wait_until(lambda: not is_free(store))
    collections = [pool.submit(collect, store, threading.Event(), lambda: None) for _ in range(3)]
    try:
        for collection in collections:
            collection.result(SECONDS)
    finally:
        stop.set()
    for user in users:
        user.result(SECONDS)


def test_nobody_waits_for_ever_for_a_short_lock(
    store: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    ours, theirs = (os.open(store, os.O_RDONLY) for _ in range(2))
    fcntl.flock(theirs, fcntl.LOCK_EX)
    waiting = pool.submit(lock_soon, ours)
    fcntl.flock(theirs, fcntl.LOCK_UN)
    waiting.result(SECONDS)
    fcntl.flock(ours, fcntl.LOCK_UN)
    fcntl.flock(theirs, fcntl.LOCK_EX)
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.01)
    with pytest.raises(BusyError):
        lock_soon(ours)
    os.close(ours)
    os.close(theirs)
