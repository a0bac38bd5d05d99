"""Handles belong to users, outlive connections, and let a collection have the store alone."""

import fcntl
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.errors import BusyError, CfsError
from cfs.repository.repository import init
from cfs.service import handles as module
from cfs.service.call import Peer
from cfs.service.errors import MethodError
from cfs.service.handles import Handles, StoreOptions
from tests.unit.service.direct import OWN, SOMEBODY, SOMEBODY_ELSE, calling

SECONDS = 30


def make_store(path: Path) -> Path:
    init(str(path), algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store")


def open_as(handles: Handles, path: Path, peer: Peer = OWN) -> int:
    with calling(peer) as (call, _):
        return handles.open_store(call, str(path)).handle


def nr_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def refusal(error: pytest.ExceptionInfo[MethodError]) -> tuple[str, object]:
    return error.value.name, error.value.parameters.get("handle")


def test_handles_count_up_and_are_not_reused(handles: Handles, store: Path) -> None:
    with calling() as (call, _):
        assert [open_as(handles, store) for _ in range(3)] == [1, 2, 3]
        handles.close(call, 3)
        assert open_as(handles, store) == 4
        for handle in (0, 3, 5, 2**64 - 1):
            with pytest.raises(MethodError) as error, handles.get(call, handle):
                pass
            assert refusal(error) == ("InvalidHandle", handle)


def test_a_failed_open_uses_up_no_handle(handles: Handles, tmp_path: Path, store: Path) -> None:
    before = nr_fds()
    with pytest.raises(CfsError):
        open_as(handles, tmp_path / "none")
    assert nr_fds() == before
    assert open_as(handles, store) == 1


def test_many_handles_of_a_store_cost_one_descriptor(handles: Handles, store: Path) -> None:
    before = nr_fds()
    for _ in range(100):
        open_as(handles, store)
    assert nr_fds() == before + 1
    handles.close_all()
    assert nr_fds() == before


def test_a_handle_is_its_users_alone(handles: Handles, store: Path) -> None:
    handle = open_as(handles, store)
    with calling(SOMEBODY) as (call, _):
        for method in (handles.get, handles.exclusive):
            with pytest.raises(MethodError) as error, method(call, handle):
                pass
            assert refusal(error) == ("InvalidHandle", handle)
        with pytest.raises(MethodError) as error:
            handles.close(call, handle)
        assert refusal(error) == ("InvalidHandle", handle)


def test_uses_go_on_when_the_handle_is_closed(handles: Handles, store: Path) -> None:
    before = nr_fds()
    handle = open_as(handles, store)
    with calling() as (call, _), handles.get(call, handle) as repository:
        handles.close(call, handle)
        repository.objects.put_bytes(b"x" * 100)
        repository.sync()
    assert nr_fds() == before


def test_a_failed_sync_is_that_uses_alone(handles: Handles, store: Path) -> None:
    handle = open_as(handles, store)
    with calling() as (call, _), handles.get(call, handle) as other:
        with handles.get(call, handle) as repository:
            repository.objects.put_bytes(b"lost" * 100)
        other.objects.put_bytes(b"kept" * 100)
        other.sync()
    assert len([path for path in store.glob("objects/*/*") if path.is_file()]) == 1


def test_exclusive_waits_for_other_uses_and_keeps_new_ones_out(
    handles: Handles, store: Path
) -> None:
    handle = open_as(handles, store)
    order = []
    started, late = threading.Event(), threading.Event()
    with calling() as (call, _), ThreadPoolExecutor(2) as pool:

        def collect() -> None:
            with handles.exclusive(call, handle):
                order.append("exclusive")
                started.set()
                assert not late.wait(0.1)
                order.append("done")

        def enter() -> None:
            with handles.get(call, handle):
                order.append("late")
            late.set()

        with handles.get(call, handle):
            collecting = pool.submit(collect)
            order.append("use")
        assert started.wait(SECONDS)
        pool.submit(enter).result(SECONDS)
        collecting.result(SECONDS)
    assert order == ["use", "exclusive", "done", "late"]


def test_exclusive_gets_its_turn_among_many_short_uses(handles: Handles, store: Path) -> None:
    handle = open_as(handles, store)
    done = threading.Event()
    nr_uses = []

    def use() -> None:
        with calling() as (call, _):
            while not done.is_set():
                with handles.get(call, handle):
                    nr_uses.append(1)
                    done.wait(0.001)

    with ThreadPoolExecutor(8) as pool, calling() as (call, _):
        users = [pool.submit(use) for _ in range(8)]
        for _ in range(5):
            with handles.exclusive(call, handle):
                before = len(nr_uses)
                threading.Event().wait(0.01)
                assert len(nr_uses) == before
        done.set()
        for user in users:
            user.result(SECONDS)


def test_exclusive_gives_up(handles: Handles, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EXCLUSIVE_WAIT_S", 0)
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    handle = open_as(handles, store)
    with calling() as (call, _):
        with (
            handles.get(call, handle),
            pytest.raises(MethodError, match="in use"),
            handles.exclusive(call, handle),
        ):
            pass
        with handles.exclusive(call, handle):
            pass


def test_who_waits_notices_that_the_client_left(handles: Handles, store: Path) -> None:
    handle = open_as(handles, store)
    with calling() as (call, client), handles.get(call, handle):
        client.close()
        with pytest.raises(MethodError, match="left"), handles.exclusive(call, handle):
            pass


def test_opening_waits_for_a_collection_but_not_for_ever(
    handles: Handles, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = os.open(store, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with calling() as (call, _), ThreadPoolExecutor(1) as pool:
        opening = pool.submit(handles.open_store, call, str(store))
        assert not opening.done()
        os.close(fd)
        assert opening.result(SECONDS).handle == 1
        handles.close(call, 1)
    fd = os.open(store, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    monkeypatch.setattr(module, "_OPEN_WAIT_S", 0)
    with pytest.raises(BusyError):
        open_as(handles, store)
    os.close(fd)


def test_users_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [make_store(tmp_path / str(number)) for number in range(2)]
    monkeypatch.setattr(module, "_HANDLES_PER_UID", 2)
    handles = Handles(StoreOptions())
    before = nr_fds()
    assert [open_as(handles, stores[0]) for _ in range(2)] == [1, 2]
    with pytest.raises(MethodError, match="too many"):
        open_as(handles, stores[0])
    with calling() as (call, _):
        handles.close(call, 1)
    assert open_as(handles, stores[1]) == 3
    handles.close_all()
    assert nr_fds() == before


def test_users_have_limits_of_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [make_store(tmp_path / str(number)) for number in range(2)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
    handles = Handles(StoreOptions())
    before = nr_fds()
    assert [open_as(handles, stores[0]) for _ in range(2)] == [1, 2]
    with pytest.raises(MethodError, match="too many"):
        open_as(handles, stores[1])
    with calling() as (call, _):
        handles.close(call, 1)
        with pytest.raises(MethodError, match="too many"):
            open_as(handles, stores[1])
        handles.close(call, 2)
    assert open_as(handles, stores[1]) == 3
    handles.close_all()
    assert nr_fds() == before


@pytest.mark.usefixtures("root")
def test_others_open_only_what_they_may_read(handles: Handles, store: Path) -> None:
    open_public(store)
    store.chmod(0o700)
    with pytest.raises(PermissionError):
        open_as(handles, store, SOMEBODY)
    open_as(handles, store)  # now the process has it open
    store.chmod(0o711)
    with pytest.raises(PermissionError):
        open_as(handles, store, SOMEBODY)
    store.chmod(0o755)
    handle = open_as(handles, store, SOMEBODY)
    with (
        calling(SOMEBODY_ELSE) as (call, _),
        pytest.raises(MethodError, match="InvalidHandle"),
        handles.get(call, handle),
    ):
        pass


@pytest.mark.usefixtures("root")
def test_others_use_a_store_with_their_own_rights(handles: Handles, store: Path) -> None:
    open_public(store)
    store.chmod(0o755)
    handle = open_as(handles, store, SOMEBODY)
    with calling(SOMEBODY) as (call, _):
        with handles.get(call, handle) as repository, pytest.raises(PermissionError):
            repository.objects.put_bytes(b"x" * 100)
        os.chown(store, SOMEBODY.uid, SOMEBODY.gid)
        with handles.get(call, handle) as repository:
            repository.objects.put_bytes(b"x" * 100)
            repository.sync()
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in store.glob("objects/**/*")}
    assert owners == {(SOMEBODY.uid, SOMEBODY.gid)}


def open_public(path: Path) -> None:
    """Let everybody come as far as a path."""
    for parent in path.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
