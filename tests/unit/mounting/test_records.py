"""Records of mounts: what is in their directory was perhaps written by somebody hostile."""

import dataclasses
import fcntl
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cfs.errors import FormatError
from cfs.linux.mountinfo import MountEntry
from cfs.linux.mounts import MountAttr, attach_mount, create_mount, detach_mount
from cfs.linux.processes import start_time
from cfs.mounting import records
from cfs.mounting.records import Record, find_mounts, new_record

RECORD = Record(
    mount_id=70, device=44, mountpoint="/mnt/\udcff", image="demo", mode="PLAIN",
    passthrough=False, owner_uid=os.geteuid(), pid=os.getpid(), start=5, session_pid=0,
    session_start=0, started=1_700_000_000,
)  # fmt: skip
ENTRY = MountEntry(
    mount_id=70, parent_id=1, device=44, mountpoint=b"/mnt/\xff", fstype=b"fuse.composefs",
    source=b"composefs:demo", options=b"rw,user_id=%d,group_id=0" % os.geteuid(),
)  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "cfs"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[MountEntry]:
    """The kernel's list of mounts."""
    mounts = [ENTRY]
    monkeypatch.setattr(records, "list_mounts", lambda: mounts)
    return mounts


def write(directory: Path, **changes: Any) -> Path:
    path = directory / "1-2"
    path.write_bytes(dataclasses.replace(RECORD, **changes).encode())
    return path


def test_text_and_back() -> None:
    assert Record.parse(RECORD.encode()) == RECORD


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b"1", b"\xff", b"[" * 100_000, RECORD.encode()[:-1],
        json.dumps({**dataclasses.asdict(RECORD), "more": 1}).encode(),
    ],
)  # fmt: skip
def test_no_record(content: bytes) -> None:
    with pytest.raises(FormatError, match="not a record"):
        Record.parse(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pid", "1"), ("pid", -1), ("pid", 1 << 64), ("pid", True), ("pid", 1.0), ("image", None),
        ("mode", "x"), ("mode", ""), ("passthrough", 1), ("mountpoint", 5),
        ("mountpoint", "/mnt/\ud800"), ("image", "\udc00"),
    ],
)  # fmt: skip
def test_wrong_value(name: str, value: object) -> None:
    content = json.dumps({**dataclasses.asdict(RECORD), name: value}).encode()
    with pytest.raises(FormatError, match=name):
        Record.parse(content)


def test_new_record_is_held_until_its_server_goes(
    directory: Path, entries: list[MountEntry]
) -> None:
    with new_record(str(directory), os.getpid()) as record:
        (path,) = directory.iterdir()
        assert path.name == f"{os.getpid()}-{start_time(os.getpid())}"
        assert find_mounts([str(directory)]) == []  # it says nothing yet, and is held
        assert path.exists()
        record.write(RECORD)
        (mount,) = find_mounts([str(directory)])
        assert (mount.record, mount.entry, mount.is_alive) == (RECORD, ENTRY, True)
        server = os.dup(record.traces[1].fd)
    assert [mount.is_alive for mount in find_mounts([str(directory)])] == [True]
    os.close(server)
    # dead, and still in the tree
    assert [mount.is_alive for mount in find_mounts([str(directory)])] == [False]
    entries.clear()
    assert find_mounts([str(directory)]) == []
    assert list(directory.iterdir()) == []


def test_directory_is_made_and_has_to_be_ours(tmp_path: Path) -> None:
    path = tmp_path / "run/cfs"
    with pytest.raises(FileNotFoundError), new_record(str(path), os.getpid()):
        pass
    path.parent.mkdir()
    with new_record(str(path), os.getpid()):
        assert path.stat().st_mode & 0o777 == 0o700
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="link"), new_record(str(link), os.getpid()):
        pass
    if os.geteuid() == 0:
        os.chown(path, 1, 1)
        with pytest.raises(PermissionError), new_record(str(path), os.getpid()):
            pass


def test_server_that_has_ended_gets_no_record(directory: Path) -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    with pytest.raises(ProcessLookupError), new_record(str(directory), child):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {"device": 45},
        {"mount_id": 71, "mountpoint": b"/elsewhere"},
        {"fstype": b"ext4"},
        {"fstype": b"fuse.sshfs"},
        {"source": b"tmpfs"},
        {"options": b"rw,user_id=4242"},
        {"options": b"rw,user_id=0000"},
    ],
)
def test_what_is_not_the_mount_of_the_record(
    directory: Path, entries: list[MountEntry], changes: dict[str, Any]
) -> None:
    """Numbers mean something else by now, or never meant it: it is not shown, and removed."""
    entries[:] = [ENTRY._replace(**changes)]
    path = write(directory)
    assert find_mounts([str(directory)]) == []
    assert not path.exists()


def test_copy_in_another_name_space_is_the_mount(
    directory: Path, entries: list[MountEntry]
) -> None:
    copy = ENTRY._replace(mount_id=99)
    entries[:] = [copy, copy._replace(mountpoint=b"/bind")]
    write(directory)
    (mount,) = find_mounts([str(directory)])
    assert mount.entry == copy


def test_copy_elsewhere_is_the_mount_while_it_is_served(
    directory: Path, entries: list[MountEntry]
) -> None:
    """The mount itself was taken away; the one in the tree has the objects in use."""
    entries[:] = [ENTRY._replace(mount_id=99, mountpoint=b"/bind")]
    path = write(directory)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (mount,) = find_mounts([str(directory)])
        assert mount.entry == entries[0]
    assert find_mounts([str(directory)]) == []


def test_record_that_names_another_user_is_none(directory: Path, entries: list[MountEntry]) -> None:
    path = write(directory, owner_uid=os.geteuid() + 1)
    assert entries
    assert find_mounts([str(directory)]) == []
    assert not path.exists()


def test_directory_on_fuse_is_not_looked_into(directory: Path, entries: list[MountEntry]) -> None:
    """Who serves it may let root wait for ever."""
    write(directory)
    entries.append(ENTRY._replace(mount_id=80, device=80, mountpoint=bytes(directory.parent)))
    assert find_mounts([str(directory)]) == []
    entries[-1] = entries[-1]._replace(fstype=b"tmpfs")
    assert len(find_mounts([str(directory)])) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_file_system_of_another_user_is_not_looked_into(
    directory: Path, entries: list[MountEntry]
) -> None:
    mount = create_mount("tmpfs", [], MountAttr.NONE)
    attach_mount(mount, str(directory))
    os.close(mount)
    try:
        write(directory)
        assert entries
        assert len(find_mounts([str(directory)])) == 1
        os.chown(directory.parent, 1, 1)
        assert find_mounts([str(directory)]) == []
    finally:
        detach_mount(str(directory))


def test_moved_mount_is_shown_where_it_is(directory: Path, entries: list[MountEntry]) -> None:
    moved = ENTRY._replace(mountpoint=b"/moved")
    entries[:] = [ENTRY._replace(mount_id=1), moved]
    write(directory)
    (mount,) = find_mounts([str(directory)])
    assert mount.entry == moved


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_overlay_of_another_user_cannot_be_told(directory: Path, entries: list[MountEntry]) -> None:
    entries[:] = [ENTRY._replace(fstype=b"overlay", options=b"rw")]
    path = write(directory, mode="OVERLAY")
    assert len(find_mounts([str(directory)])) == 1
    for name in (path, directory):
        os.chown(name, 1, 1)
    assert find_mounts([str(directory)]) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.usefixtures("entries")
def test_files_that_are_none_of_ours_stay(directory: Path) -> None:
    write(directory).rename(directory / "notes")
    os.mkfifo(directory / "1-3")
    (directory / "1-4").symlink_to("notes")
    (directory / "1-5").mkdir()
    os.chown(write(directory), 1, 1)
    assert find_mounts([str(directory), str(directory / "missing")]) == []
    assert len(list(directory.iterdir())) == 5


@pytest.mark.usefixtures("entries")
def test_unreadable_record_goes_when_nobody_holds_it(directory: Path) -> None:
    path = directory / "1-2"
    path.write_bytes(b"x" * 100_000)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert find_mounts([str(directory)]) == []
        assert path.exists()
    assert find_mounts([str(directory)]) == []
    assert not path.exists()


def test_oldest_comes_first(directory: Path, entries: list[MountEntry]) -> None:
    entries.append(ENTRY._replace(mount_id=71, device=45, mountpoint=b"/b"))
    write(directory, started=2).rename(directory / "1-1")
    write(directory, started=1, mount_id=71, device=45)
    assert [mount.record.started for mount in find_mounts([str(directory)])] == [1, 2]


@pytest.mark.usefixtures("entries")
def test_dead_mount_whose_numbers_a_living_one_has_is_not_shown(directory: Path) -> None:
    write(directory)
    with new_record(str(directory), os.getpid()) as record:
        record.write(dataclasses.replace(RECORD, started=RECORD.started + 1))
        (mount,) = find_mounts([str(directory)])
        assert mount.is_alive


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("changes", [{"mount_id": 69, "mountpoint": "/gone"}, {"start": 4}])
def test_record_of_a_mount_that_ended(directory: Path, changes: dict[str, Any]) -> None:
    """Its numbers are another mount's by now, and its processes have not ended yet."""
    with ExitStack() as stack:
        for name, record in (("1-4", dataclasses.replace(RECORD, **changes)), ("2-5", RECORD)):
            file = stack.enter_context((directory / name).open("wb", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(record.encode())
        assert [mount.record for mount in find_mounts([str(directory)])] == [RECORD]
