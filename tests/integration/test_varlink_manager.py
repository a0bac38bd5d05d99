"""``cfsctl varlink`` under a service manager that is played here: sd_notify(3), restarts.

As systemd does, it keeps what it is sent until the other end hangs up, hands it over in reverse
order, the socket last, and lets go of all of it at a real stop.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cfs.linux.mountinfo import mounted_at
from cfs.linux.sockets import receive_fds
from tests.command_line import command, environment
from tests.integration.fuse_service import PLAIN, call, listed, serve
from tests.integration.stores import Store
from tests.integration.waiting import wait_for_end, wait_until
from tests.varlink_client import SECONDS, RawClient

pytestmark = pytest.mark.usefixtures("fuse")

# puts the descriptors that it is told into the places that sd_listen_fds(3) wants
START = """
import fcntl, os, sys
fds, names, *words = sys.argv[1:]
copies = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 500) for fd in fds.split(",")]
for place, fd in enumerate(copies, 3):
    os.dup2(fd, place)
os.environ["LISTEN_FDS"] = str(len(copies))
os.environ |= {"LISTEN_FDNAMES": names, "LISTEN_PID": str(os.getpid())}
os.execv(words[0], words)
"""


class Manager:
    """Starts and stops the service.

    Attributes:
        messages: all that it was told, without what came with descriptors.
        stored: its descriptor store.
    """

    def __init__(self, directory: Path) -> None:
        self.messages: list[str] = []
        self.stored: list[tuple[str, int]] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._path = directory / "socket"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._notify_path = str(directory / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._notify_path)
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def start(self, *, fdstore: str = "100") -> RawClient:
        """Start the service and connect."""
        self.messages.clear()
        passed = [*reversed(self._live()), ("varlink", self._listener.fileno())]
        fds, names = [fd for _, fd in passed], [name for name, _ in passed]
        words = [sys.executable, "-c", START, ",".join(map(str, fds)), ":".join(names)]
        self.process = subprocess.Popen(
            [*words, *command("cfsctl"), "varlink"],
            pass_fds=fds,
            env=environment(NOTIFY_SOCKET=self._notify_path, FDSTORE=fdstore),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.wait_for("READY=1")
        return RawClient.connect(str(self._path))

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End the service by a signal, unless it was told; it has nothing to say."""
        assert self.process is not None
        if "STOPPING=1" not in self.messages:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=SECONDS)
        status = 0 if number == signal.SIGTERM else -number
        assert (self.process.returncode, out, err) == (status, b"", b"")
        self.process = None

    def stored_numbers(self) -> set[str]:
        """Return the numbers of the mounts that are kept, and 0 for the last number."""
        with self._changed:
            return {name.split(".")[1] for name, _ in self.stored}

    def release(self) -> None:
        """Empty the store, as at a real stop."""
        with self._changed:
            for _, fd in self.stored:
                os.close(fd)
            self.stored.clear()

    def wait_for(self, message: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: message in self.messages, SECONDS)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(b"", self._notify_path)
        self._thread.join()
        self.release()
        self._socket.close()
        self._listener.close()

    def _live(self) -> list[tuple[str, int]]:
        """Return what is kept, without what has hung up."""
        poll = select.poll()
        for _, fd in self.stored:
            with suppress(OSError):
                poll.register(fd, 0)
        gone = {fd for fd, _ in poll.poll(0)}
        for name, fd in list(self.stored):
            if fd in gone:
                self.stored.remove((name, fd))
                os.close(fd)
        return self.stored

    def _listen(self) -> None:
        while True:
            message, fds = receive_fds(self._socket, 4096, 16)
            text = message.decode()
            fields = dict(line.split("=", 1) for line in text.splitlines())
            name = fields.get("FDNAME", "")
            with self._changed:
                if "FDSTORE" in fields:
                    self.stored.append((name, fds.pop()))
                if "FDSTOREREMOVE" in fields:
                    for entry in [entry for entry in self.stored if entry[0] == name]:
                        self.stored.remove(entry)
                        os.close(entry[1])
                if not name:
                    self.messages.append(text)
                self._changed.notify_all()
            for fd in fds:
                os.close(fd)
            if not message:
                return


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path)
    yield manager
    manager.close()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def is_mounted(path: Path) -> bool:
    return mounted_at(str(path)) is not None


def wait_until_unmounted(path: Path) -> None:
    wait_until(lambda: not is_mounted(path), f"the end of {path}")


def test_restart_kill_and_stop(tmp_path: Path, store: Store, mnt: Path, manager: Manager) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with manager.start() as client:
        call(client, "OpenRepository", path=str(store.path))
        before = [serve(client, mnt), serve(client, other)]
    reader = os.open(mnt / "big", os.O_RDONLY)
    for number in (signal.SIGTERM, signal.SIGKILL):
        manager.end(number)
        assert ("STOPPING=1" in manager.messages) == (number == signal.SIGTERM)
        assert os.pread(reader, 4, 0) == (mnt / "big").read_bytes()[:4]
        with manager.start() as client:
            found = listed(client)
            assert [{**mount, "requests": 0} for mount in found] == [
                {**mount, "requests": 0} for mount in before
            ]
            assert found[0]["requests"] > before[0]["requests"]
    os.close(reader)
    with RawClient.connect(str(tmp_path / "socket")) as client:
        assert call(client, "Unmount", mount_id=2) == {}
        assert not is_mounted(other)
        assert call(client, "OpenRepository", path=str(store.path))["handle"] == 1
        assert serve(client, other)["mount_id"] == 3
        assert call(client, "Unmount", mount_id=3) == {}
    manager.end()
    assert is_mounted(mnt)
    wait_until(lambda: manager.stored_numbers() == {"0", "1"}, "what has ended is not kept")
    manager.release()
    wait_for_end(before[0]["server_pid"])
    assert not is_mounted(mnt)
    with manager.start() as client:
        assert listed(client) == []


def test_the_manager_hears_of_the_end_first(manager: Manager, store: Store, mnt: Path) -> None:
    """Before anything that takes time: here the end of a mount whose supervisor is stopped."""
    with manager.start(fdstore="0") as client:
        call(client, "OpenRepository", path=str(store.path))
        pid = serve(client, mnt)["server_pid"]
        os.kill(pid, signal.SIGSTOP)
        assert manager.process is not None
        manager.process.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1")
        assert is_mounted(mnt)
        os.kill(pid, signal.SIGCONT)
        wait_until_unmounted(mnt)
    manager.end()


def test_without_a_store_mounts_end_with_the_service(
    manager: Manager, store: Store, mnt: Path
) -> None:
    with manager.start(fdstore="0") as client:
        call(client, "OpenRepository", path=str(store.path))
        serve(client, mnt)
    manager.end()
    assert not is_mounted(mnt)


def test_a_mount_of_a_connection_is_not_kept(
    tmp_path: Path, manager: Manager, store: Store, mnt: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with manager.start() as client:
        call(client, "OpenRepository", path=str(store.path))
        serve(client, mnt, options={**PLAIN, "lifetime": "Connection"})
        serve(client, other)
        manager.end()
        assert not is_mounted(mnt)
    manager.release()
    wait_until_unmounted(other)


def test_everything_is_killed(manager: Manager, store: Store, mnt: Path) -> None:
    """Nobody serves the mount any more: the next service says so, and takes it away."""
    with manager.start() as client:
        call(client, "OpenRepository", path=str(store.path))
        pid = serve(client, mnt)["server_pid"]
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    manager.end(signal.SIGKILL)
    for victim in (str(pid), *children):
        os.kill(int(victim), signal.SIGKILL)
        wait_for_end(int(victim))
    with manager.start() as client:
        wait_until_unmounted(mnt)
        assert [mount for mount in listed(client) if mount["state"] == "Serving"] == []
        call(client, "OpenRepository", path=str(store.path))
        assert serve(client, mnt)["mount_id"] == 2
    manager.end()
    manager.release()
    wait_until_unmounted(mnt)
