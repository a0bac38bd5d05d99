"""``cfsctl varlink`` as a process: addresses, passed sockets, signals."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command_line import Done, command, environment, run
from tests.varlink_client import SECONDS, RawClient

GET_INFO = "org.varlink.service.GetInfo"
# takes the place of systemd: descriptors from 3 on, LISTEN_PID is the program's own number
START = """
import os, sys
fd, fds, names, *words = sys.argv[1:]
os.dup2(int(fd), 3)
os.environ |= {"LISTEN_FDS": fds, "LISTEN_FDNAMES": names, "LISTEN_PID": str(os.getpid())}
os.execv(words[0], words)
"""


@contextmanager
def activated(
    channel: socket.socket, *arguments: str, fds: str = "1", names: str = "varlink"
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start ``cfsctl`` with a socket as descriptor 3."""
    fd = channel.fileno()
    words = [sys.executable, "-c", START, str(fd), fds, names, *command("cfsctl"), *arguments]
    with subprocess.Popen(
        words,
        pass_fds=[fd],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def listener(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as channel:
        channel.bind(str(path))
        channel.listen()
        yield channel


def check_end(process: "subprocess.Popen[bytes]") -> None:
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out, err) == (0, b"", b"")


@pytest.mark.parametrize("arguments", [[], ["varlink"], ["oci", "varlink", "--address", "x"]])
def test_listening_socket(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with listener(path) as channel, activated(channel, *arguments) as process:
        for _ in range(2):
            with RawClient.connect(str(path)) as client:
                assert "interfaces" in client.call(GET_INFO)["parameters"]
        process.send_signal(signal.SIGTERM)
        check_end(process)
    assert path.exists()  # it is not ours


def test_connected_socket_ends_with_its_peer() -> None:
    ours, theirs = socket.socketpair()
    with theirs, activated(theirs) as process:
        theirs.close()
        with RawClient(ours) as client:
            assert "interfaces" in client.call(GET_INFO)["parameters"]
        check_end(process)


def test_only_the_first_socket_counts(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with listener(path) as channel, activated(channel, fds="2", names="a:b") as process:
        _, err = process.communicate(timeout=SECONDS)
        assert process.returncode == 1  # the second one is not open
        assert err == b"Error: Bad file descriptor\n"


def start(tmp_path: Path, *arguments: str) -> Done:
    return run("cfsctl", *arguments, cwd=tmp_path, LISTEN_PID="1", LISTEN_FDS="1")


def test_not_activated(tmp_path: Path) -> None:
    done = start(tmp_path, "varlink")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"Error: no --address given and not socket-activated\n"
    assert start(tmp_path).returncode == 2


def test_address_and_signals(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(
            [*command("cfsctl"), "varlink", "--address", f"unix:{path}", "--socket-mode", "0666"],
            env=environment(NOTIFY_SOCKET=str(tmp_path / "notify")),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:  # fmt: skip
            notify.bind(str(tmp_path / "notify"))
            notify.settimeout(SECONDS)
            assert b"READY=1" in notify.recv(1000)
            with RawClient.connect(str(path)) as idle:
                assert "interfaces" in idle.call(GET_INFO)["parameters"]
                process.send_signal(number)
                check_end(process)
            (tmp_path / "notify").unlink()
        assert not path.exists()
