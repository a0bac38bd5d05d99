"""Clients that flood, stall or leave: one closed connection each, and others do not notice."""

import json
import os
import random
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from cfs.service import connection, server
from cfs.service.dispatch import Dispatcher
from tests.unit.service.transport import REPOSITORY, FakeRepository, serving_cleanly
from tests.varlink_client import SECONDS, RawClient, serving

CLOSE = f"{REPOSITORY}.CloseRepository"
OBJECTS = f"{REPOSITORY}.ImageObjects"
GOOD = json.dumps({"method": CLOSE, "parameters": {"handle": 3}}).encode() + b"\0"
SHORT = 0.05  # seconds


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "sock")
    with serving_cleanly(FakeRepository(), tmp_path / "sock"):
        yield path
        with RawClient.connect(path) as client:
            assert client.call(CLOSE, handle=3) == {"continues": False}


@pytest.fixture
def client(address: str) -> Iterator[RawClient]:
    with RawClient.connect(address) as client:
        yield client


def test_descriptors_in_many_pieces(client: RawClient) -> None:
    with open(os.devnull) as file:
        try:
            for _ in range(1000):
                client.send_raw(b" ", [file.fileno()] * 100)
        except (BrokenPipeError, ConnectionResetError):
            pass
        else:
            pytest.fail("it takes any number")
    assert client.receive() is None


def test_descriptors_of_a_message_without_end(client: RawClient) -> None:
    with open(os.devnull) as file:
        client.send_raw(b"{", [file.fileno()] * 253)
    client.channel.shutdown(socket.SHUT_WR)
    assert client.receive() is None


def test_all_descriptors_that_a_message_takes(client: RawClient) -> None:
    with open(os.devnull) as file:
        for _ in range(20):
            client.send_raw(GOOD, [file.fileno()] * 253)
    for _ in range(20):
        assert client.receive() is not None


def test_slow_writer(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_PIECE_SECONDS", SHORT)
    with RawClient.connect(address) as client, RawClient.connect(address) as idle:
        client.send_raw(GOOD[:5])
        assert client.receive() is None
        assert idle.call(CLOSE, handle=3) == {"continues": False}  # it may take its time


def test_dead_reader(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_PIECE_SECONDS", SHORT)
    with RawClient.connect(address) as client:
        client.send(OBJECTS, parameters={"handle": 1 << 23, "name": "x"})
        with RawClient.connect(address) as other:
            assert other.call(CLOSE, handle=3) == {"continues": False}
        while client.channel.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            try:
                client.send_raw(b" ")
            except BrokenPipeError:
                break


def test_client_leaves_before_the_reply(address: str) -> None:
    for _ in range(20):
        with RawClient.connect(address) as client:
            client.send(OBJECTS, parameters={"handle": 1 << 22, "name": "x"})


def test_too_many_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_CONNECTIONS_PER_UID", 2)
    path = tmp_path / "sock"
    with (
        serving(Dispatcher({REPOSITORY: FakeRepository()}), path),
        RawClient.connect(str(path)) as first,
        RawClient.connect(str(path)) as second,
    ):
        for client in (first, second):
            assert client.call(CLOSE, handle=3) == {"continues": False}
        with RawClient.connect(str(path)) as third:
            assert third.receive() is None
        assert first.call(CLOSE, handle=3) == {"continues": False}


def test_too_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_MEMORY_PER_UID", 1 << 20)
    monkeypatch.setattr(connection, "_BUDGET_SECONDS", SHORT)
    path = tmp_path / "sock"
    with (
        serving(Dispatcher({REPOSITORY: FakeRepository()}), path),
        RawClient.connect(str(path)) as client,
    ):
        for size, is_accepted in ((1 << 17, True), (1 << 17, True), (1 << 21, False)):
            frame = {"method": CLOSE, "parameters": {"handle": 3, "x": "x" * size}}
            try:
                client.send_raw(json.dumps(frame).encode() + b"\0")
                found = client.receive()
            except (BrokenPipeError, ConnectionResetError):
                found = None
            assert (found is not None) == is_accepted


def test_replies_that_nobody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are as many as there is memory for; whoever asks for more is shown out."""
    monkeypatch.setattr(server, "_MEMORY_PER_UID", 64 << 20)
    path = tmp_path / "sock"
    with serving(Dispatcher({REPOSITORY: FakeRepository()}), path), ExitStack() as stack:
        clients = [stack.enter_context(RawClient.connect(str(path))) for _ in range(10)]
        for client in clients:
            client.send(OBJECTS, parameters={"handle": 15 << 20, "name": "x"})
        poll = select.poll()
        for client in clients:
            poll.register(client.channel, 0)  # its end is always told
        closed: set[int] = set()
        while len(closed) < len(clients) - 2:
            ended = poll.poll(SECONDS * 1000)
            assert ended
            for fd, _ in ended:
                poll.unregister(fd)
                closed.add(fd)
        for client in clients:
            assert (client.receive() is None) == (client.channel.fileno() in closed)


def test_what_is_too_long_to_be_a_name(client: RawClient) -> None:
    """It is refused before any method looks at it, and errors do not repeat it."""
    refusal = {
        "error": "org.varlink.service.InvalidParameter", "parameters": {"parameter": "name"},
    }  # fmt: skip
    for size, is_accepted in ((1 << 16, True), ((1 << 16) + 1, False), (1 << 24, False)):
        found = client.call(OBJECTS, handle=1, name="x" * size)
        assert (found != refusal) == is_accepted
    found = client.call("org.composefs.Repository." + "x" * (1 << 24))
    assert found["error"] == "org.varlink.service.MethodNotFound"
    assert len(found["parameters"]["method"]) == 1024


def test_descriptors_of_messages_that_never_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_FDS_PER_UID", 300)
    path = tmp_path / "sock"
    with (
        serving(Dispatcher({REPOSITORY: FakeRepository()}), path),
        RawClient.connect(str(path)) as first,
        RawClient.connect(str(path)) as second,
        open(os.devnull) as file,
    ):
        first.send_raw(GOOD[:-1], [file.fileno()] * 200)
        with RawClient.connect(str(path)) as other:  # until those are counted
            while other.call(CLOSE, handle=3) and len(os.listdir("/proc/self/fd")) < 200:
                pass
        with suppress(BrokenPipeError):
            second.send_raw(GOOD, [file.fileno()] * 200)
        assert second.receive() is None
        first.send_raw(b"\0")
        assert first.receive() is not None
        first.send_raw(GOOD, [file.fileno()] * 200)
        assert first.receive() is not None


def test_garbage(address: str) -> None:
    random_bytes = random.Random(7)
    for _ in range(200):
        bad = bytearray(GOOD * 2)
        for _ in range(random_bytes.randrange(1, 4)):
            bad[random_bytes.randrange(len(bad))] = random_bytes.randrange(256)
        with RawClient.connect(address) as client:
            client.send_raw(bytes(bad))
            client.channel.shutdown(socket.SHUT_WR)
            for _ in range(10):
                if client.receive() is None:
                    break
            else:
                pytest.fail(f"too many replies to {bytes(bad)!r}")
