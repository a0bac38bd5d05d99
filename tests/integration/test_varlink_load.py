"""Many clients at once, while one pulls and one waits for a mount; nothing here is timed."""

import json
import random
import select
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.stores import Store
from tests.integration.waiting import wait_until
from tests.varlink_client import SECONDS, Json, RawClient
from tests.varlink_process import (
    OCI,
    REPOSITORY,
    ServiceProcess,
    call,
    open_store,
    pulling,
    service_process,
)

NR_CLIENTS, NR_CALLS = 100, 60


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with service_process(tmp_path / "socket", "--insecure") as service:
        yield service


class Talker:
    """A client that sends all of its calls at once, and knows what will come back, in order."""

    def __init__(self, path: Path, store: Path, number: int) -> None:
        self._choice = random.Random(number)
        self.channel = socket.socket(socket.AF_UNIX)
        self.channel.settimeout(SECONDS)
        self.channel.connect(str(path))
        self.expected: deque[str] = deque()
        self._store = store
        self._last_handle = 0
        self._data = b""
        self._base = (number + 1) << 32  # no handle of anybody
        self.request = b"".join(self._requests())

    def _requests(self) -> Iterator[bytes]:
        for number in range(NR_CALLS):
            kind = self._choice.choice(
                ("open", "info", "list", "nothing", "wrong", "wrong", "oneway")
            )
            strange = self._base + number
            method, parameters = {
                "open": (f"{REPOSITORY}.OpenRepository", {"path": str(self._store)}),
                "info": ("org.varlink.service.GetInfo", {}),
                "list": (f"{OCI}.ListImages", {"handle": strange}),
                "nothing": (f"{OCI}.Nothing", {"handle": strange}),
                "wrong": (f"{REPOSITORY}.CloseRepository", {"handle": strange}),
                "oneway": (f"{REPOSITORY}.CloseRepository", {"handle": strange}),
            }[kind]
            if kind != "oneway":
                self.expected.append(f"{strange}" if kind in ("list", "wrong") else kind)
            more = self._choice.random() < 1 / 4  # of no use, and of no harm
            yield json.dumps({
                "method": method, "parameters": parameters, "oneway": kind == "oneway", "more": more
            }).encode() + b"\0"  # fmt: skip

    def receive(self) -> None:
        """Check the replies that are there."""
        data = self.channel.recv(1 << 20)
        assert data, "the service has closed a connection"
        *replies, self._data = (self._data + data).split(b"\0")
        for reply in map(json.loads, replies):
            self._check(self.expected.popleft(), reply)

    def _check(self, expected: str, reply: Json) -> None:
        parameters = reply["parameters"]
        if expected.isdigit():
            assert reply["error"].endswith(".InvalidHandle"), (expected, reply)
            assert parameters["handle"] == int(expected)
        elif expected == "open":
            assert parameters["handle"] > self._last_handle, reply
            self._last_handle = parameters["handle"]
        elif expected == "info":
            assert "interfaces" in parameters, reply
        else:
            assert reply["error"] == "org.varlink.service.MethodNotFound", (expected, reply)


def converse(talkers: list[Talker]) -> None:
    """Read until every call is answered; what is sent may be more than sockets hold."""
    sending = threading.Thread(target=send_all, args=(talkers,))
    sending.start()
    by_fd = {talker.channel.fileno(): talker for talker in talkers}
    with select.epoll() as epoll:
        for fd in by_fd:
            epoll.register(fd, select.EPOLLIN)
        while any(talker.expected for talker in talkers):
            ready = epoll.poll(SECONDS)
            assert ready, "calls were lost"
            for fd, _ in ready:
                by_fd[fd].receive()
    sending.join(SECONDS)
    assert not sending.is_alive()


def send_all(talkers: list[Talker]) -> None:
    for talker in talkers:
        talker.channel.sendall(talker.request)


def pull_often(client: RawClient, directory: Path, layout: Path, has_ended: threading.Event) -> int:
    """Pull into new stores until the others have ended; return how often, at least once."""
    count = 0
    while not count or not has_ended.is_set():
        wish = pulling(open_store(client, directory / f"pulled{count}"), f"oci:{layout}", "x")
        client.send(f"{OCI}.Pull", parameters=wish, more=True)
        while (reply := client.receive()) is not None and reply.members.get("continues"):
            pass
        assert reply is not None
        assert "completed" in reply.members["parameters"], reply
        count += 1
    return count


@pytest.mark.usefixtures("fuse", "root")
def test_no_call_is_lost(service: ServiceProcess, tmp_path: Path, layouts: Path, mnt: Path) -> None:
    """A hundred clients that do not wait for replies, pulls, a mount that somebody waits for."""
    store, has_ended = Store(tmp_path), threading.Event()
    pulls: list[int] = []
    with ExitStack() as stack:
        puller, waiter, other = (stack.enter_context(service.connect()) for _ in range(3))
        parameters = {"handle": open_store(waiter, store.path), "image": "demo", "wait": True}
        waiter.send(f"{REPOSITORY}.FuseServe", parameters={**parameters, "mountpoint": str(mnt)})
        wait_until((mnt / "small").exists, "does not serve")
        thread = threading.Thread(
            target=lambda: pulls.append(
                pull_often(puller, tmp_path, layouts / "fixture", has_ended)
            )
        )
        thread.start()
        try:
            talkers = [Talker(service.path, store.path, number) for number in range(NR_CLIENTS)]
            for talker in talkers:
                stack.enter_context(talker.channel)
            converse(talkers)
        finally:
            has_ended.set()
            thread.join(SECONDS)
        assert pulls
        assert (mnt / "small").exists()  # it still serves, and the call still waits
        (mount,) = call(other, "ListMounts")["mounts"]
        assert "error" not in call(other, "Unmount", mount_id=mount["mount_id"])
        reply = waiter.receive()
        assert reply is not None
        assert reply.members["parameters"]["mount"]["state"] == "Ended"
    wait_until(lambda: service.threads() < NR_CLIENTS // 10, "threads stay")
    assert not service.children()
