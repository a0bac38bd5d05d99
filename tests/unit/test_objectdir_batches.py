"""Objects that wait for their names: used, given up, put twice, and lost to an error."""

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.errors import IntegrityError, UnsupportedError
from cfs.fsverity import compute_digest
from cfs.linux import files
from cfs.objectdir import ObjectDirectory, Verity, pending, temporary
from cfs.objectdir import verity as verity_module

CONTENT = b"some content " * 1000
OTHER = b"other content " * 1000
LARGE = bytes(3 << 20)
NR_THREADS = 4


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectDirectory]:
    """An insecure store in ``tmp_path``; nothing is left open at the end."""
    before = nr_descriptors()
    fd = os.open(tmp_path, os.O_RDONLY)
    with ObjectDirectory(fd, b"objects", Algorithm.SHA256, Verity.NEVER) as objects:
        yield objects
    os.close(fd)
    assert nr_descriptors() == before


def nr_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def named(tmp_path: Path) -> int:
    return len(list((tmp_path / "objects").glob("*/*")))


def during_next_sync(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do something while a batch is synced, when it has neither its names nor a place to wait."""
    actions = [action]

    def sync(_: int) -> None:
        if actions:
            actions.pop()()

    monkeypatch.setattr(pending, "sync_file_system", sync)


def test_object_in_flight_can_be_used(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put_bytes(CONTENT)

    def use() -> None:
        assert store.has(digest)
        fd = store.open_object(digest)
        assert os.read(fd, 1 << 20) == CONTENT
        os.close(fd)
        assert not store.put_contents(CONTENT, digest)

    during_next_sync(monkeypatch, use)
    store.flush()
    assert named(tmp_path) == 1


@pytest.mark.parametrize("is_in_flight", [False, True])
def test_object_that_two_write_at_once_waits_once(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch, *, is_in_flight: bool
) -> None:
    digest = store.put_bytes(CONTENT)

    def put_again() -> None:
        with monkeypatch.context() as context:
            # both have looked before either had put anything
            context.setattr(ObjectDirectory, "_is_present", lambda *_, **__: False)
            before = nr_descriptors()
            assert not store.put_contents(CONTENT, digest)
            assert nr_descriptors() == before

    if is_in_flight:
        during_next_sync(monkeypatch, put_again)
    else:
        put_again()
    store.flush()
    assert named(tmp_path) == 1


def test_what_was_not_flushed_leaves_nothing(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise UnsupportedError

    monkeypatch.setattr(temporary, "open_unnamed", refuse)
    store.put_bytes(CONTENT)
    assert len(list((tmp_path / "objects").iterdir())) == 1
    store.close()
    assert not list((tmp_path / "objects").iterdir())


def test_nothing_is_named_after_a_failed_sync(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store.put_bytes(CONTENT)
    during_next_sync(monkeypatch, fail)
    for content in (CONTENT, OTHER):
        store.put_bytes(content)
        with pytest.raises(OSError, match="Input/output error"):
            store.flush()
    assert named(tmp_path) == 0


def test_failure_to_name_an_object_fails_all_who_have_put_one(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "_MIN_BATCH", 8)
    links: list[bytes] = []

    def link(fd: int, directory: int, name: bytes) -> None:
        links.append(name)
        if len(links) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        files.link_unnamed(fd, directory, name)

    monkeypatch.setattr(temporary, "link_unnamed", link)
    start = threading.Barrier(NR_THREADS)

    def put(number: int) -> str | None:
        try:
            for content in range(20):
                store.put_bytes(CONTENT + bytes([number, content]))
            start.wait()
            store.flush()
        except OSError as error:
            start.abort()
            return error.strerror
        except threading.BrokenBarrierError:
            try:
                store.flush()
            except OSError as error:
                return error.strerror
        return None

    with ThreadPoolExecutor(NR_THREADS) as executor:
        reasons = list(executor.map(put, range(NR_THREADS)))
    assert reasons == [os.strerror(errno.ENOSPC)] * NR_THREADS
    assert named(tmp_path) == len(links) - 1


@pytest.mark.parametrize("place", ["object", "fan-out directory"])
def test_name_that_is_taken_by_something_else(
    tmp_path: Path, store: ObjectDirectory, place: str
) -> None:
    digest = compute_digest(CONTENT)
    path = tmp_path / "objects" / os.fsdecode(digest.object_path)
    if place == "object":
        path.mkdir(parents=True)
    else:
        path.parent.parent.mkdir()
        path.parent.touch()

    def put() -> None:
        store.put_bytes(CONTENT)
        store.flush()

    with pytest.raises(OSError, match=r"Is a directory|Not a directory") as caught:
        put()
    assert caught.value.filename == os.fsdecode(digest.object_path)
    assert [found.name for found in (tmp_path / "objects").iterdir()] == [path.parent.name]


def test_what_is_there_already_leaves_nothing_open(tmp_path: Path, store: ObjectDirectory) -> None:
    for _ in range(2):
        store.put_bytes(CONTENT)
        with store.create() as writer:
            writer.write(LARGE)
            writer.commit()
        store.flush()
    assert named(tmp_path) == 2


@pytest.mark.parametrize("measured", [CONTENT, OTHER])
def test_kernel_has_the_last_word_on_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bytes
) -> None:
    def enable(fd: int, _: Algorithm) -> None:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY

    def put() -> None:
        with ObjectDirectory.open(tmp_path / "objects") as objects:
            objects.put_bytes(CONTENT)

    monkeypatch.setattr(verity_module, "enable", enable)
    monkeypatch.setattr(verity_module, "measure", lambda _: compute_digest(measured))
    if measured == CONTENT:
        put()
    else:
        with pytest.raises(IntegrityError, match="has the digest"):
            put()
    assert named(tmp_path) == (measured == CONTENT)


def test_import_leaves_nothing_open(tmp_path: Path, store: ObjectDirectory) -> None:
    path = tmp_path / "file"
    path.write_bytes(LARGE)
    for _ in range(2):
        with path.open("rb") as file:
            store.import_file(file.fileno(), len(LARGE))
        store.flush()
    assert named(tmp_path) == 1


def test_import_checks_the_size_of_what_the_kernel_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    monkeypatch.setattr(verity_module, "enable", lambda *_: None)
    monkeypatch.setattr(verity_module, "measure", lambda _: compute_digest(CONTENT))
    with (
        path.open("rb") as file,
        ObjectDirectory.open(tmp_path / "objects") as objects,
        pytest.raises(IntegrityError, match="expected 12999 bytes, found 13000"),
    ):
        objects.import_file(file.fileno(), len(CONTENT) - 1)
    assert named(tmp_path) == 0


def test_object_of_another_digest_is_closed(
    store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put_bytes(CONTENT)
    store.flush()
    monkeypatch.setattr("cfs.objectdir.stored.measure", lambda _: compute_digest(OTHER))
    before = nr_descriptors()
    with pytest.raises(IntegrityError, match="its fs-verity digest is"):
        store.open_object(digest)
    assert nr_descriptors() == before


def test_close_waits_for_a_batch_that_gets_its_names(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    closer = threading.Thread(target=store.close)

    def close() -> None:
        closer.start()
        closer.join(0.1)
        assert closer.is_alive()

    store.put_bytes(CONTENT)
    during_next_sync(monkeypatch, close)
    store.flush()
    closer.join()
    assert named(tmp_path) == 1
