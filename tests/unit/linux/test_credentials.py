"""A thread takes over the rights of a user, and only that thread."""

import errno
import os
import threading
from pathlib import Path

import pytest

from cfs.linux.credentials import Credentials, acting_as
from cfs.linux.files import open_path

SOMEBODY = Credentials(uid=54321, gid=54322, groups=frozenset({54323, 54324}))


@pytest.fixture(autouse=True)
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: only root may act as somebody else")


def in_thread(action: object) -> object:
    assert callable(action)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(action()))
    thread.start()
    thread.join()
    return found[0]


def test_rights_are_those_of_the_user_and_come_back(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    before = Credentials.current()
    with acting_as(SOMEBODY):
        assert Credentials.current() == SOMEBODY
        with pytest.raises(PermissionError):
            secret.read_bytes()
    assert Credentials.current() == before
    assert secret.read_bytes() == b""


def test_files_that_are_made_are_the_users(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    directory = os.open(tmp_path, os.O_PATH)
    with acting_as(SOMEBODY):
        os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)
    found = (tmp_path / "new").stat()
    assert (found.st_uid, found.st_gid) == (SOMEBODY.uid, SOMEBODY.gid)


def test_other_threads_keep_theirs() -> None:
    ready, done = threading.Event(), threading.Event()
    seen = []

    def watch() -> None:
        ready.wait(30)
        seen.append(Credentials.current())
        done.set()

    thread = threading.Thread(target=watch)
    thread.start()
    before = Credentials.current()
    with acting_as(SOMEBODY):
        ready.set()
        done.wait(30)
    thread.join()
    assert seen == [before]


def test_threads_made_meanwhile_inherit_them() -> None:
    with acting_as(SOMEBODY):
        assert in_thread(Credentials.current) == SOMEBODY


def test_blocks_nest_and_may_lead_back() -> None:
    before = Credentials.current()
    with acting_as(SOMEBODY):
        with acting_as(SOMEBODY):
            assert Credentials.current() == SOMEBODY
        with acting_as(before):
            assert Credentials.current() == before
        assert Credentials.current() == SOMEBODY
    assert Credentials.current() == before


def test_an_error_restores_them() -> None:
    before = Credentials.current()
    with pytest.raises(ZeroDivisionError), acting_as(SOMEBODY):
        raise ZeroDivisionError
    assert Credentials.current() == before


def test_an_ordinary_process_may_not() -> None:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setresgid(54321, 54321, 54321)
            os.setresuid(54321, 54321, 54321)
            before = Credentials.current()
            try:
                with acting_as(Credentials(54399, 54321, before.groups)):
                    pass
            except PermissionError:
                status = 0 if Credentials.current() == before else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_the_process_has_open_is_out_of_reach(tmp_path: Path) -> None:
    """The directory itself is open to all, but the way to it is not."""
    hidden = tmp_path / "closed" / "hidden"
    hidden.mkdir(parents=True)
    (hidden / "file").touch()
    (tmp_path / "closed").chmod(0o700)
    tmp_path.chmod(0o755)
    fd = os.open(hidden, os.O_PATH)
    link = tmp_path / "link"
    link.symlink_to(f"/proc/self/fd/{fd}")
    ways = [f"/proc/self/fd/{fd}/file", f"/dev/fd/{fd}/file"]
    for way in (*ways, f"{link}/file"):
        os.close(open_path(way, os.O_RDONLY))
    os.close(open_path("/usr/../usr", os.O_PATH))
    reached = os.open(tmp_path, os.O_PATH)
    with acting_as(SOMEBODY):
        for way in ways:
            with pytest.raises(OSError, match="symbolic links") as caught:
                open_path(way, os.O_RDONLY)
            assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, way)
        with pytest.raises(OSError, match="symbolic links"):
            open_path(b"link/file", os.O_RDONLY, dir_fd=reached)
        with pytest.raises(PermissionError):
            open_path(".", os.O_PATH)
        with pytest.raises(PermissionError):
            open_path(str(hidden / "file"), os.O_RDONLY)
        with pytest.raises(PermissionError):  # open to all, but /proc/sys asks for another user
            open_path("/proc/version", os.O_RDONLY)
        with pytest.raises(FileNotFoundError):
            open_path("", os.O_RDONLY)
        os.close(open_path("/usr", os.O_RDONLY | os.O_DIRECTORY))
        os.close(open_path("file", os.O_RDONLY, dir_fd=fd))  # opened for him on purpose
    os.close(fd)
    os.close(reached)
