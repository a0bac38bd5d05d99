"""The service as a process of its own, and clients of other users."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cfs
from cfs.linux.sockets import receive_fds
from tests.integration.waiting import wait_until
from tests.varlink_client import SECONDS, Json, RawClient

REPOSITORY, OCI = "org.composefs.Repository", "org.composefs.Oci"
_CONNECT = """
import os, socket, sys
uid, gid = map(int, sys.argv[3:])
os.setgroups([])
os.setresgid(gid, gid, gid)
os.setresuid(uid, uid, uid)
channel = socket.socket(socket.AF_UNIX)
channel.connect(sys.argv[2])
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"x"], [channel.fileno()])
"""


def connect_as(path: Path, uid: int) -> RawClient:
    """Connect in a process of another user, and a group of that number; so it stays his."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = [str(theirs.fileno()), str(path), str(uid), str(uid)]
        command = [sys.executable, "-ISc", _CONNECT, *words]
        subprocess.run(command, pass_fds=[theirs.fileno()], check=True, timeout=SECONDS)
        _, (fd,) = receive_fds(ours, 1, 1)
    channel = socket.socket(fileno=fd)
    channel.settimeout(SECONDS)
    return RawClient(channel)


class ServiceProcess(NamedTuple):
    """A service that runs."""

    path: Path
    process: "subprocess.Popen[bytes]"

    def connect(self) -> RawClient:
        return RawClient.connect(str(self.path))

    def connect_as(self, uid: int) -> RawClient:
        return connect_as(self.path, uid)

    def descriptors(self) -> list[str]:
        """Return the numbers of its descriptors."""
        return os.listdir(f"/proc/{self.process.pid}/fd")

    def descriptors_below(self, directory: Path) -> list[str]:
        """Return the numbers of those that lead into a directory."""
        where = Path(f"/proc/{self.process.pid}/fd")
        return [
            name for name in self.descriptors() if directory in (where / name).readlink().parents
        ]

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def children(self) -> str:
        """Return the numbers of its processes."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return "".join(path.read_text() for path in tasks.glob("*/children"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(SECONDS)


def is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as channel:
        return channel.connect_ex(str(path)) == 0


@contextmanager
def service_process(
    path: Path,
    *options: str,
    prefix: Sequence[str] = (),
    cwd: Path | None = None,
    is_killed: Callable[[], bool] = lambda: False,
) -> Iterator[ServiceProcess]:
    """Run a service for everybody; at the end it is to end in order, unless it was killed.

    Args:
        path: of the socket.
        options: of ``cfsctl``.
        prefix: command that runs it.
        cwd: its working directory.
        is_killed: whether a test has killed it.
    """
    command = [*prefix, sys.executable, "-m", "cfs.cli.main", *options, "varlink"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cfs.__file__).parent.parent)}
    process = subprocess.Popen(
        [*command, "--address", str(path), "--socket-mode", "0666"], cwd=cwd, env=environment
    )
    try:
        wait_until(
            lambda: process.poll() is not None or is_listening(path), "the service does not start"
        )
        yield ServiceProcess(path, process)
        if not is_killed() and process.poll() is None:
            process.terminate()
            assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait(SECONDS)


def call(client: RawClient, method: str, **parameters: object) -> Json:
    """Call a method of the repository interface, or of the other one with its prefix.

    Returns:
        The parameters of the reply, with ``error`` for an error's last part.
    """
    interface, _, name = method.rpartition(".")
    reply = client.call(f"{interface or REPOSITORY}.{name}", **parameters)
    answer: Json = reply.get("parameters", {})
    if "error" in reply:
        return {"error": reply["error"].rpartition(".")[2], **answer}
    return answer


def open_store(client: RawClient, path: Path) -> int:
    """Make a store if there is none, and open it; return its handle."""
    made = call(client, "EnsureRepository", path=str(path), algorithm="fsverity-sha256-12")
    assert "error" not in made, made
    handle: int = call(client, "OpenRepository", path=str(path))["handle"]
    return handle


def pulling(handle: int, image: str, name: str | None = None, **more: object) -> Json:
    """Return the parameters of ``Pull``."""
    return {
        "handle": handle, "image": image, "name": name, "local_fetch": "disabled",
        "bootable": False, **more,
    }  # fmt: skip
