"""Objects are whole or absent: concurrent writers, damage, full disks, other file systems."""

import errno
import os
import random
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cfs.digest import Algorithm, Digest
from cfs.errors import IntegrityError, NotFoundError, UnsupportedError
from cfs.fsverity import compute_digest
from cfs.linux import files
from cfs.objectdir import (
    TEMPORARY_PREFIX,
    Method,
    ObjectDirectory,
    Verity,
    imports,
    pending,
    temporary,
)
from cfs.objectdir import verity as verity_module

CONTENT = b"some content " * 1000
LARGE = random.Random(1).randbytes(3 << 20)


@pytest.fixture
def source() -> Iterator[int]:
    fd = os.memfd_create("source")
    os.write(fd, CONTENT)
    yield fd
    os.close(fd)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ObjectDirectory]:
    """An insecure store in ``tmp_path``."""
    fd = os.open(tmp_path, os.O_RDONLY)
    with ObjectDirectory(fd, b"objects", Algorithm.SHA256, Verity.NEVER) as objects:
        yield objects
    os.close(fd)


def digest_of(fd: int) -> tuple[int, Digest]:
    data = os.pread(fd, 1 << 20, 0)
    return len(data), compute_digest(data)


def path_of(tmp_path: Path, digest: Digest) -> Path:
    return tmp_path / "objects" / os.fsdecode(digest.object_path)


def check_objects(directory: Path) -> int:
    """Check that every object is what its name says; return their number."""
    paths = list(directory.glob("*/*"))
    for path in paths:
        digest = Digest.parse(path.parent.name + path.name)
        assert compute_digest(path.read_bytes(), digest.algorithm) == digest
        assert path.stat().st_mode == 0o100644
    return len(paths)


def refuse_unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise UnsupportedError

    monkeypatch.setattr(temporary, "open_unnamed", refuse)


def test_put_makes_an_object_once(tmp_path: Path, source: int) -> None:
    size, digest = digest_of(source)
    with ObjectDirectory.open(tmp_path / "a" / "objects") as objects:
        assert objects.put(source, size, digest)
        assert not objects.put(source, size, digest)
    assert check_objects(tmp_path / "a" / "objects") == 1
    assert [entry.name for entry in (tmp_path / "a" / "objects").iterdir()] == [str(digest)[:2]]
    with ObjectDirectory.open(tmp_path / "a" / "objects") as objects:
        assert not objects.put(source, size, digest)


def test_sha512_object_has_a_longer_name(tmp_path: Path) -> None:
    with ObjectDirectory.open(tmp_path, Algorithm.SHA512) as objects:
        assert objects.put_bytes(CONTENT) == compute_digest(CONTENT, Algorithm.SHA512)
    assert check_objects(tmp_path) == 1


def test_file_with_another_digest_leaves_nothing(tmp_path: Path, source: int) -> None:
    size, _ = digest_of(source)
    with (
        ObjectDirectory.open(tmp_path) as objects,
        pytest.raises(IntegrityError, match="the copy of"),
    ):
        objects.put(source, size, compute_digest(b"other"))
    assert not list(tmp_path.iterdir())


def test_file_that_shrank_leaves_nothing(tmp_path: Path, source: int) -> None:
    size, digest = digest_of(source)
    os.ftruncate(source, 100)
    with ObjectDirectory.open(tmp_path) as objects, pytest.raises(IntegrityError):
        objects.put(source, size, digest)
    assert not list(tmp_path.iterdir())


def test_nothing_is_made_before_the_first_object(tmp_path: Path, store: ObjectDirectory) -> None:
    digest = compute_digest(CONTENT)
    assert not store.has(digest)
    with pytest.raises(NotFoundError, match=f"object not found: {digest}"):
        store.open_object(digest)
    with pytest.raises(FileNotFoundError):
        assert store.fd
    store.flush()
    assert not list(tmp_path.iterdir())


def test_objects_have_no_name_before_they_are_durable(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    paths = [path_of(tmp_path, compute_digest(data)) for data in (CONTENT, LARGE)]

    def sync(_: int) -> None:
        named = sum(path.exists() for path in paths)
        events.append(f"sync with {named} names")

    monkeypatch.setattr(pending, "sync_file_system", sync)
    store.put_bytes(CONTENT)
    store.put_bytes(LARGE)
    assert not any(path.exists() for path in paths)
    store.flush()
    assert events == ["sync with 0 names", "sync with 2 names"]
    assert check_objects(tmp_path / "objects") == 2


def test_flush_syncs_for_objects_that_others_have_named(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # composefs-rs gives names before contents are durable, and our names may not be durable yet
    with ObjectDirectory.open(tmp_path / "objects") as other:
        other.put_bytes(CONTENT)
    syncs: list[int] = []
    monkeypatch.setattr(pending, "sync_file_system", syncs.append)
    store.put_bytes(CONTENT)
    store.flush()
    store.flush()
    assert len(syncs) == 1


def test_large_batch_is_named_without_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "_MIN_BATCH", 10)
    monkeypatch.setattr(pending, "_MAX_BATCH", 10)
    directory = os.open(tmp_path, os.O_RDONLY)
    with ObjectDirectory(directory, b"objects", Algorithm.SHA256, Verity.NEVER) as objects:
        for number in range(25):
            objects.put_bytes(CONTENT + bytes([number]))
        assert check_objects(tmp_path / "objects") == 20
    os.close(directory)
    assert check_objects(tmp_path / "objects") == 20


def test_few_descriptors_are_enough(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        with ObjectDirectory.open(tmp_path) as objects:
            for number in range(500):
                objects.put_bytes(CONTENT + str(number).encode())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert check_objects(tmp_path) == 500


def test_waiting_object_can_be_used(store: ObjectDirectory) -> None:
    digest = store.put_bytes(CONTENT)
    assert store.has(digest)
    fd = store.open_object(digest)
    assert os.read(fd, 1 << 20) == CONTENT
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    os.close(fd)


def test_failed_sync_fails_all_later_ones(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    store.put_bytes(CONTENT)
    with monkeypatch.context() as context:
        context.setattr(pending, "sync_file_system", fail)
        with pytest.raises(OSError, match="Input/output error"):
            store.flush()
    with pytest.raises(OSError, match="Input/output error"):
        store.flush()
    assert not check_objects(tmp_path / "objects")


@pytest.mark.parametrize("data", [b"", b"x", CONTENT, LARGE], ids=len)
def test_writer_gives_what_bytes_give(tmp_path: Path, store: ObjectDirectory, data: bytes) -> None:
    for is_new in (True, False):
        with store.create() as writer:
            for off in range(0, len(data), 100_000):
                writer.write(data[off : off + 100_000])
            assert writer.commit() == (compute_digest(data), is_new)
    store.flush()
    assert path_of(tmp_path, compute_digest(data)).read_bytes() == data


@pytest.mark.parametrize("temporaries", ["unnamed", "named"])
def test_writer_without_commit_leaves_nothing(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch, temporaries: str
) -> None:
    if temporaries == "named":
        refuse_unnamed(monkeypatch)
    with store.create() as writer:
        writer.write(LARGE)
    assert not list((tmp_path / "objects").iterdir())


@pytest.mark.parametrize("source_kind", ["file", "bytes"])
@pytest.mark.parametrize("damage", [b"short", b"", b"fifo", b"link"])
def test_damaged_object_is_replaced(
    tmp_path: Path, store: ObjectDirectory, source: int, damage: bytes, source_kind: str
) -> None:
    size, digest = digest_of(source)
    path = path_of(tmp_path, digest)
    path.parent.mkdir(parents=True)
    if damage == b"fifo":
        os.mkfifo(path)
    elif damage == b"link":
        path.symlink_to("/etc/passwd")
    else:
        path.write_bytes(damage)
    assert not store.has(digest) or damage in (b"short", b"")
    if source_kind == "bytes":
        store.put_bytes(CONTENT)
    else:
        assert store.put(source, size, digest)
    store.flush()
    assert check_objects(tmp_path / "objects") == 1
    assert [entry.name for entry in (tmp_path / "objects").iterdir()] == [path.parent.name]


def test_altered_object_of_the_right_size_is_replaced_by_bytes_only(
    tmp_path: Path, store: ObjectDirectory, source: int
) -> None:
    size, digest = digest_of(source)
    path = path_of(tmp_path, digest)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"X" * size)
    # reading every object would cost as much as writing it; fsck does
    assert not store.put(source, size, digest)
    store.put_bytes(CONTENT)
    store.flush()
    assert check_objects(tmp_path / "objects") == 1


def test_fan_out_directory_that_is_a_link_is_not_followed(
    tmp_path: Path, store: ObjectDirectory
) -> None:
    digest = compute_digest(CONTENT)
    (tmp_path / "objects").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "objects" / str(digest)[:2]).symlink_to("../elsewhere")
    store.put_bytes(CONTENT)
    with pytest.raises(OSError, match="Not a directory") as caught:
        store.flush()
    assert caught.value.filename == digest.object_path.decode()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_directory_of_objects_that_is_a_link_is_not_followed(
    tmp_path: Path, store: ObjectDirectory, source: int
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "objects").symlink_to("elsewhere")
    size, digest = digest_of(source)
    for work in (
        lambda: store.put_bytes(CONTENT),
        lambda: store.put(source, size, digest),
        lambda: store.import_file(source, size),
        lambda: store.open_object(digest),
    ):
        with pytest.raises(OSError, match="Not a directory") as caught:
            work()
        assert caught.value.filename == "objects"
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_what_is_no_regular_file_is_no_object(
    tmp_path: Path, store: ObjectDirectory, kind: str
) -> None:
    digest = compute_digest(CONTENT)
    path = path_of(tmp_path, digest)
    path.parent.mkdir(parents=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        (tmp_path / "content").write_bytes(CONTENT)
        path.symlink_to(tmp_path / "content")
    else:
        path.mkdir()
    assert not store.has(digest)
    with pytest.raises(IntegrityError, match=f"object {digest}: expected a regular file"):
        store.open_object(digest)


def test_file_system_without_unnamed_files(
    tmp_path: Path, store: ObjectDirectory, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_unnamed(monkeypatch)
    size, digest = digest_of(source)
    assert store.put(source, size, digest)
    (name,) = (tmp_path / "objects").iterdir()
    assert name.name.encode().startswith(TEMPORARY_PREFIX)
    assert len(name.name) == len(TEMPORARY_PREFIX) + 12
    with pytest.raises(IntegrityError):
        store.put(source, size, compute_digest(b"other"))
    store.flush()
    assert check_objects(tmp_path / "objects") == 1
    assert [entry.name for entry in (tmp_path / "objects").iterdir()] == [str(digest)[:2]]


def test_file_system_that_cannot_rename_without_replacing(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    refuse_unnamed(monkeypatch)
    monkeypatch.setattr(temporary, "rename_noreplace", refuse)
    store.put_bytes(CONTENT)
    store.flush()
    assert check_objects(tmp_path / "objects") == 1
    assert len(list((tmp_path / "objects").iterdir())) == 1


@pytest.mark.parametrize("temporaries", ["unnamed", "named"])
def test_writers_that_meet_at_the_name(
    tmp_path: Path, source: int, monkeypatch: pytest.MonkeyPatch, temporaries: str
) -> None:
    if temporaries == "named":
        refuse_unnamed(monkeypatch)
    size, digest = digest_of(source)
    with (
        ObjectDirectory.open(tmp_path / "objects") as first,
        ObjectDirectory.open(tmp_path / "objects") as second,
        ObjectDirectory.open(tmp_path / "objects") as third,
    ):
        for objects in (first, second, third):
            assert objects.put(source, size, digest)
        first.flush()
        inode = path_of(tmp_path, digest).stat().st_ino
        second.flush()
        assert path_of(tmp_path, digest).stat().st_ino == inode
        # damaged in the moment between: the next writer sees to it
        path_of(tmp_path, digest).write_bytes(b"X" * size)
        third.flush()
    assert check_objects(tmp_path / "objects") == 1
    assert [entry.name for entry in (tmp_path / "objects").iterdir()] == [str(digest)[:2]]


def test_secure_store_demands_verity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedError("fs-verity is not supported")

    monkeypatch.setattr(verity_module, "enable", refuse)
    fd = os.open(tmp_path, os.O_RDONLY)
    with ObjectDirectory(fd, b"objects", Algorithm.SHA256, Verity.REQUIRE) as objects:
        with pytest.raises(UnsupportedError, match="fs-verity is not supported"):
            objects.put_bytes(CONTENT)
        assert not list((tmp_path / "objects").iterdir())
        digest = compute_digest(CONTENT)
        path = path_of(tmp_path, digest)
        path.parent.mkdir()
        path.write_bytes(CONTENT)
        with pytest.raises(IntegrityError, match="fs-verity is not enabled"):
            objects.open_object(digest)
    os.close(fd)


def test_insecure_store_never_tries_verity(
    store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verity_module, "enable", lambda *_: pytest.fail("enabled"))
    store.put_bytes(CONTENT)
    store.flush()


def test_measured_mismatch_is_an_error_everywhere(
    store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.put_bytes(CONTENT)
    store.flush()
    monkeypatch.setattr("cfs.objectdir.stored.measure", lambda _: compute_digest(b"other"))
    with pytest.raises(IntegrityError, match="its fs-verity digest is"):
        store.open_object(digest)


def test_file_that_stays_open_for_writing_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as if a child that was forked meanwhile kept the descriptor and did not call exec
    busy: list[int] = []

    def enable(fd: int, _: Algorithm) -> None:
        inode = os.fstat(fd).st_ino
        if not busy or inode == busy[0]:
            busy.append(inode)
            raise OSError(errno.ETXTBSY, os.strerror(errno.ETXTBSY))

    monkeypatch.setattr(verity_module, "enable", enable)
    monkeypatch.setattr(verity_module, "measure", lambda _: compute_digest(CONTENT))
    with ObjectDirectory.open(tmp_path) as objects:
        objects.put_bytes(CONTENT)
    assert len(busy) > 1
    assert check_objects(tmp_path) == 1


def import_one(store: ObjectDirectory, path: Path, *, copy: bool = True) -> Method:
    fd = os.open(path, os.O_RDONLY)
    try:
        digest, method = store.import_file(fd, path.stat().st_size, copy=copy)
        assert digest == compute_digest(path.read_bytes())
    finally:
        os.close(fd)
    store.flush()
    return method


def test_import_links_where_it_may(tmp_path: Path, store: ObjectDirectory) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: CAP_DAC_READ_SEARCH")
    path = tmp_path / "file"
    path.write_bytes(LARGE)
    first = import_one(store, path, copy=False)
    assert first in (Method.REFLINKED, Method.HARDLINKED)
    if first is Method.HARDLINKED:
        assert path.samefile(path_of(tmp_path, compute_digest(LARGE)))
    assert import_one(store, path) is Method.PRESENT
    assert [entry.name for entry in (tmp_path / "objects").iterdir()] == [
        str(compute_digest(LARGE))[:2]
    ]


def test_import_copies_what_it_may_not_link(
    tmp_path: Path, store: ObjectDirectory, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, digest = digest_of(source)
    with pytest.raises(OSError, match=r"cross-device|not permitted"):
        store.import_file(source, size, copy=False)
    assert not list((tmp_path / "objects").iterdir())
    assert store.import_file(source, size) == (digest, Method.COPIED)
    monkeypatch.setattr(imports, "has_capability", lambda _: False)
    path = tmp_path / "file"
    path.write_bytes(LARGE)
    assert import_one(store, path) in (Method.REFLINKED, Method.COPIED)
    assert not path.samefile(path_of(tmp_path, compute_digest(LARGE)))


def test_import_copies_what_has_too_many_links(
    tmp_path: Path, store: ObjectDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    monkeypatch.setattr(temporary, "link_unnamed", refuse)
    refuse_unnamed(monkeypatch)
    path = tmp_path / "file"
    path.write_bytes(LARGE)
    assert import_one(store, path) in (Method.REFLINKED, Method.COPIED)


def test_import_asks_for_a_reflink_once_for_each_pair_of_devices(
    store: ObjectDirectory, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refuse(source_fd: int, _: int) -> bool:
        asked.append(source_fd)
        return False

    monkeypatch.setattr(imports, "clone_file", refuse)
    monkeypatch.setattr(files, "clone_file", lambda *_: False)
    store.import_file(source, len(CONTENT))
    os.pwrite(source, b"X", 0)
    store.import_file(source, len(CONTENT))
    assert len(asked) == 1


def test_import_of_another_digest_or_size_leaves_nothing(
    tmp_path: Path, store: ObjectDirectory, source: int
) -> None:
    size, _ = digest_of(source)
    with pytest.raises(IntegrityError, match="has the digest"):
        store.import_file(source, size, digest=compute_digest(b"other"))
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(IntegrityError, match="expected 13001 bytes, found 13000"):
        store.import_file(fd, size + 1)
    os.close(fd)
    assert not list((tmp_path / "objects").iterdir())


def test_copy_where_reflink_is_refused(
    tmp_path: Path, source: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[bool] = []

    def refuse(*_: object) -> bool:
        tried.append(True)
        return False

    monkeypatch.setattr(files, "clone_file", refuse)
    size, digest = digest_of(source)
    with ObjectDirectory.open(tmp_path) as objects:
        assert objects.put(source, size, digest)
    assert tried
    assert check_objects(tmp_path) == 1


@pytest.mark.parametrize("sharing", ["one", "each their own"])
def test_concurrent_writers_of_the_same_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharing: str
) -> None:
    monkeypatch.setattr(pending, "_MIN_BATCH", 7)
    monkeypatch.setattr(pending, "_MAX_BATCH", 7)
    contents = [random.Random(seed).randbytes(10_000) for seed in range(40)]
    start = threading.Barrier(4)

    def put_all(objects: ObjectDirectory) -> None:
        for content in contents:
            assert objects.put_bytes(content) == compute_digest(content)
        objects.flush()
        # whoever has flushed may rely on what it has put, whoever wrote it
        for content in contents:
            digest = compute_digest(content)
            assert (tmp_path / os.fsdecode(digest.object_path)).read_bytes() == content

    def write(shared: ObjectDirectory) -> None:
        start.wait()
        if sharing == "one":
            put_all(shared)
            return
        with ObjectDirectory.open(tmp_path) as objects:
            put_all(objects)

    with ObjectDirectory.open(tmp_path) as shared, ThreadPoolExecutor(4) as executor:
        list(executor.map(write, [shared] * 4))
    assert check_objects(tmp_path) == len(contents)


def test_descriptors_are_closed(tmp_path: Path, source: int) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    with ObjectDirectory.open(tmp_path) as objects:
        for number in range(10):
            objects.put_bytes(bytes([number]) * 100)
        with objects.create() as writer:
            writer.write(LARGE)
        objects.import_file(source, len(CONTENT))
    assert count() == before


def test_what_is_sound_was_read(tmp_path: Path, store: ObjectDirectory) -> None:
    digest = store.put_bytes(CONTENT)
    assert store.is_sound(digest)
    store.flush()
    assert store.is_sound(digest)
    path = path_of(tmp_path, digest)
    for data in (b"x" + CONTENT[1:], CONTENT[:-1], CONTENT + b"x", b""):
        path.write_bytes(data)
        assert store.has(digest)
        assert not store.is_sound(digest)
    path.unlink()
    assert not store.is_sound(digest)
    path.mkdir()
    assert not store.is_sound(digest)


@pytest.mark.parametrize("data", [CONTENT, LARGE], ids=len)
def test_writer_may_be_thorough(tmp_path: Path, store: ObjectDirectory, data: bytes) -> None:
    digest = store.put_bytes(data)
    store.flush()
    for thorough in (False, True):
        path_of(tmp_path, digest).write_bytes(b"x" + data[1:])
        with store.create() as writer:
            writer.write(data)
            assert writer.commit(thorough=thorough) == (digest, thorough)
        store.flush()
        assert store.is_sound(digest) == thorough
