"""A session that is stuck: a push of it waits in the kernel, and no signal ends that.

The push waits for the answer to a READ, which is stolen here: the session is stopped, the request
taken from its device and never answered; then the session lists and pushes the directory.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cfs.fuse import Mount, ServeOptions, launcher, start
from cfs.fuse.handover import Handover, send
from cfs.tree import Directory, Inode, Link, Regular
from tests.integration.vectors import make_vector
from tests.integration.waiting import wait_until

pytestmark = pytest.mark.usefixtures("fuse", "root")
pytest.importorskip("cfs.fuse._worker", reason="the data plane is not built")
DEADLINE = 30
END_SECONDS = 4  # bounded, on a busy machine too
READ = 15
READER = "import os, sys; print(os.read(os.open(sys.argv[1], 0), 9).decode())"
LISTER = "import os, sys; print(*sorted(os.listdir(sys.argv[1])))"
OTHERS = ("a", "b")
LISTED = "c"
NAMES = [f"file{number}" for number in range(4)]


def states(pid: int) -> set[str]:
    """The states of the threads of a process."""
    stats = [task / "stat" for task in Path(f"/proc/{pid}/task").iterdir()]
    return {stat.read_text().rpartition(") ")[2][0] for stat in stats}


class Stuck:
    """A mount, its stuck session, and the processes that wait for it."""

    def __init__(self, mount: Mount, device: int, stack: ExitStack) -> None:
        self.mount = mount
        self.session = mount.statistics().session_pid
        self.pidfd = os.pidfd_open(self.session)
        stack.callback(os.close, self.pidfd)
        self._top = Path(mount.mountpoint)
        self._get_credit()
        self._reader = self._steal_read(device, stack)
        self._lister = self._spawn(stack, LISTER, self._top / LISTED)
        wait_until(lambda: "D" in states(self.session), "a push that waits", DEADLINE)

    def _get_credit(self) -> None:
        """Make the session believe that whoever lists a directory will read its files."""
        for directory in OTHERS:
            for name in os.listdir(self._top / directory):
                (self._top / directory / name).read_bytes()
        (self._top / LISTED / NAMES[0]).stat()

    def _steal_read(self, device: int, stack: ExitStack) -> "subprocess.Popen[str]":
        os.kill(self.session, signal.SIGSTOP)
        wait_until(lambda: states(self.session) == {"T"}, "a session that stops", DEADLINE)
        reader = self._spawn(stack, READER, self._top / LISTED / NAMES[0])
        assert select.select([device], [], [], DEADLINE)[0]
        request = os.read(device, 1 << 20)
        os.kill(self.session, signal.SIGCONT)
        assert request[4] == READ
        return reader

    def _spawn(self, stack: ExitStack, code: str, path: Path) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, path], stdout=subprocess.PIPE, text=True
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        return process

    def answers(self) -> list[str]:
        return [process.communicate(timeout=DEADLINE)[0] for process in self._clients()]

    def _clients(self) -> tuple["subprocess.Popen[str]", ...]:
        return self._reader, self._lister

    def wait_for_clients(self) -> None:
        for process in self._clients():
            process.wait(DEADLINE)

    def has_ended(self, seconds: float = 0) -> bool:
        return bool(select.select([self.pidfd], [], [], seconds)[0])


def make_files() -> dict[bytes, Inode | Link]:
    return {name.encode(): Regular(mode=0o100644, size=4, content=b"text") for name in NAMES}


@pytest.fixture
def stuck(mnt: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    directories: dict[bytes, Inode | Link] = {
        name.encode(): Directory(mode=0o040755, nlink=2, children=make_files())
        for name in (*OTHERS, LISTED)
    }
    vector = make_vector(Directory(mode=0o040755, nlink=5, children=directories))
    devices: list[int] = []

    def keep_device(channel: socket.socket, handover: Handover) -> None:
        devices.append(os.dup(handover.devices[0]))
        send(channel, handover)

    monkeypatch.setattr(launcher, "send", keep_device)
    # nobody answers the clients before the mount has ended
    with ExitStack() as clients, ExitStack() as stack:
        mount = start(vector, mnt, [], name="stuck", options=ServeOptions(workers=2), grace=0.2)
        stack.callback(mount.unmount, 0.2)
        try:
            if not mount.statistics().can_resend:
                pytest.skip("the kernel cannot resend requests, so nothing is pushed")
            made = Stuck(mount, devices[0], clients)
        finally:
            os.close(devices[0])  # else the connection would live as long as we do
        yield made


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_another_session_follows(stuck: Stuck, number: signal.Signals) -> None:
    os.kill(stuck.session, number)
    assert stuck.answers() == ["text\n", " ".join(NAMES) + "\n"]
    assert stuck.has_ended(DEADLINE)
    assert stuck.mount.statistics().sessions == 2


@pytest.mark.parametrize("way", ["unmount", "sigterm"])
def test_end_does_not_wait(stuck: Stuck, mnt: Path, way: str) -> None:
    begin = time.monotonic()
    if way == "sigterm":
        os.kill(stuck.mount.pid, signal.SIGTERM)
        assert stuck.mount.wait(DEADLINE) == 0
    else:
        stuck.mount.unmount(0.2)
    assert time.monotonic() - begin < END_SECONDS
    assert stuck.has_ended(END_SECONDS)
    assert not os.path.ismount(mnt)
    stuck.wait_for_clients()
