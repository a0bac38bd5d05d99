"""Socket files, and sockets that are passed."""

import os
import socket
import stat
from pathlib import Path

import pytest

from cfs.errors import BusyError, InvalidRequestError
from cfs.service.activation import Passed, find_socket, is_activated
from cfs.service.listening import listening
from tests.varlink_client import RawClient


@pytest.mark.parametrize("length", [4, 200])
@pytest.mark.parametrize("scheme", ["", "unix:"])
def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, scheme: str) -> None:
    # by its name, somebody could exchange the file for a link meanwhile
    monkeypatch.setattr(os, "chmod", lambda *_: pytest.fail("a mode is changed by name"))
    path = tmp_path / ("d" * length) / "sock"
    path.parent.mkdir()
    with listening(f"{scheme}{path}", 0o640):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        RawClient.connect(str(path)).close()
        with pytest.raises(BusyError), listening(str(path)):
            pass
    assert not path.exists()


def test_name_that_no_address_holds(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="File name too long"), listening(f"{tmp_path}/{'n' * 200}"):
        pass


def test_stale_file_is_replaced_and_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with listening(str(path)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.unlink()
        path.touch()
    assert path.exists()  # it is not ours
    with pytest.raises(BusyError, match="binding varlink socket at"), listening(str(path)):
        pass


@pytest.mark.parametrize(
    "address", ["", "unix:", "unix:@name", "unix:@", "a\0b", "unix:a;mode=0666", "tcp:x"]
)
def test_no_address(address: str) -> None:
    with pytest.raises(InvalidRequestError), listening(address):
        pass


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("@x", "./a:b", "a;b"):
        with listening(name):
            assert (tmp_path / name).is_socket()


def test_activation_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = str(os.getpid()), "1"
    for pid, count, expected in ((own, "1", True), (own, "0", False), (other, "x", False)):
        monkeypatch.setenv("LISTEN_PID", pid)
        monkeypatch.setenv("LISTEN_FDS", count)
        assert is_activated() == expected
    monkeypatch.setenv("LISTEN_PID", own)
    for count in ("x", "-1", "²", ""):
        monkeypatch.setenv("LISTEN_FDS", count)
        with pytest.raises(InvalidRequestError):
            is_activated()


def test_passed_descriptors() -> None:
    assert find_socket([Passed("cfs-mount.1.channel", 0)]) is None
    with open(os.devnull) as file, pytest.raises(InvalidRequestError):
        find_socket([Passed("varlink", file.fileno())])
    with socket.socket() as tcp, pytest.raises(InvalidRequestError):
        find_socket([Passed("varlink", tcp.fileno())])
    with socket.socket(socket.AF_UNIX) as unix:
        found = find_socket([Passed("cfs-mount.1.state", 0), Passed("", os.dup(unix.fileno()))])
        assert found is not None
        found.close()
