"""Framing, pipelining, descriptors, errors and ends of connections, over real sockets."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.linux.framing import close_all
from cfs.service.dispatch import Dispatcher
from cfs.service.server import Server
from tests.unit.service.transport import REPOSITORY, FakeRepository, serving_cleanly
from tests.varlink_client import SECONDS, RawClient

LIST = f"{REPOSITORY}.ListImageRefs"
CLOSE = f"{REPOSITORY}.CloseRepository"
MOUNT = f"{REPOSITORY}.Mount"
WATCH = f"{REPOSITORY}.WatchMount"
OBJECTS = f"{REPOSITORY}.ImageObjects"
INTERNAL = f"{REPOSITORY}.InternalError"


@pytest.fixture
def fake() -> FakeRepository:
    return FakeRepository()


@pytest.fixture
def address(tmp_path: Path, fake: FakeRepository) -> Iterator[str]:
    with serving_cleanly(fake, tmp_path / "sock"):
        yield str(tmp_path / "sock")


@pytest.fixture
def client(address: str) -> Iterator[RawClient]:
    with RawClient.connect(address) as client:
        yield client


def names(client: RawClient) -> list[str]:
    reply = client.receive()
    assert reply is not None
    return [image["name"] for image in reply.members["parameters"]["images"]]


def message(method: str, **members: object) -> bytes:
    return json.dumps({"method": method, **members}).encode() + b"\0"


def test_descriptors_belong_to_their_message(client: RawClient, tmp_path: Path) -> None:
    fds, inodes = [], []
    for name in ("a", "b"):
        (tmp_path / name).touch()
        fds.append(os.open(tmp_path / name, os.O_RDONLY))
        inodes.append(str(os.fstat(fds[-1]).st_ino))
    plain = message(LIST, parameters={"handle": 1})
    client.send_raw(plain)
    client.send_raw(plain, fds)
    client.send_raw(plain)
    client.send_raw(plain[:20], fds[:1])  # in two pieces, with some each
    client.send_raw(plain[20:], fds[1:])
    close_all(fds)
    assert [names(client) for _ in range(4)] == [[], inodes, [], inodes]


def test_errors(client: RawClient) -> None:
    assert client.call(CLOSE, handle=0) == {
        "error": f"{REPOSITORY}.InvalidHandle", "parameters": {"handle": 0},
    }  # fmt: skip
    found = client.call(CLOSE, handle=1)
    assert found["error"] == INTERNAL
    assert "\n" not in found["parameters"]["message"]
    assert client.call(CLOSE, handle=2)["error"] == INTERNAL
    assert client.call(CLOSE, handle=3) == {"continues": False}
    assert client.call(f"{REPOSITORY}.Gc", handle=3, dry_run=True, roots=[])["error"] == (
        "org.varlink.service.MethodNotImplemented"
    )


def test_oneway_and_flags(client: RawClient, fake: FakeRepository) -> None:
    client.send(CLOSE, parameters={"handle": 5}, oneway=True)
    client.send(CLOSE, parameters={"handle": 0}, oneway=True)
    client.send(WATCH, parameters={"mount_id": 3}, oneway=True)
    client.send(MOUNT, parameters={"handle": 2, "name": "x", "options": {}}, oneway=True)
    assert client.call(CLOSE, handle=6) == {"continues": False}
    assert fake.seen == [
        (5, False, True), (0, False, True), {"overlay": None, "read_write": None}, (6, False, False)
    ]  # fmt: skip
    assert fake.ended.is_set()


def test_stream(client: RawClient) -> None:
    client.send(WATCH, parameters={"mount_id": 3}, more=True)
    replies = [client.receive() for _ in range(3)]
    found = [reply.members for reply in replies if reply is not None]
    assert [members["continues"] for members in found] == [True, True, False]
    assert found[0]["parameters"]["mount"] == {"error": None, "number": 0}
    assert client.call(WATCH, mount_id=3)["parameters"]["mount"]["number"] == 2


def test_reply_descriptors(client: RawClient) -> None:
    for name, count in (("x", 253), ("fail", 253), ("x", 0)):
        client.send(MOUNT, parameters={"handle": count, "name": name, "options": {}})
        reply = client.receive()
        assert reply is not None
        assert len(reply.fds) == (0 if name == "fail" else count)
        close_all(reply.fds)


def test_reply_too_long(client: RawClient) -> None:
    found = client.call(OBJECTS, handle=1 << 24, name="x")
    assert found["error"] == INTERNAL
    found = client.call(OBJECTS, handle=(1 << 24) - 100, name="x")
    assert len(found["parameters"]["objects"][0]) == (1 << 24) - 100


def test_disconnect_during_call(address: str, fake: FakeRepository) -> None:
    with RawClient.connect(address) as client:
        client.send(WATCH, parameters={"mount_id": 0}, more=True)
        assert fake.started.wait(SECONDS)
        with RawClient.connect(address) as other:
            assert other.call(CLOSE, handle=3) == {"continues": False}
        assert not fake.gone.is_set()
        client.channel.shutdown(socket.SHUT_WR)  # a half close is none
        assert not fake.gone.wait(0.1)
    assert fake.gone.wait(SECONDS)
    assert fake.ended.wait(SECONDS)


def test_half_close_is_answered(client: RawClient) -> None:
    client.send(CLOSE, parameters={"handle": 3})
    client.channel.shutdown(socket.SHUT_WR)
    assert client.receive() is not None
    assert client.receive() is None


@pytest.mark.parametrize(
    "bad",
    [
        b"[" * 60000 + b"\0",
        b'{"method": "a.B", "parameters": [' + b"[]," * 400000 + b"[]]}\0",
        b'{"method": "a.B", "x": "\\ud800"}\0',
        b'{"method": "a.B", "x": NaN}\0',
        b'{"method": "a.B", "x": ' + b"9" * 5000 + b"}\0",
        b'{"method": "a.B", "parameters": "x"}\0',
    ],
    ids=["deep", "many", "surrogate", "constant", "digits", "string"],
)
def test_bad_message_closes(address: str, bad: bytes) -> None:
    with RawClient.connect(address) as client:
        client.send(CLOSE, parameters={"handle": 3})
        client.send_raw(bad)
        assert client.receive() is not None
        assert client.receive() is None
    with RawClient.connect(address) as client:
        assert client.call(CLOSE, handle=3) == {"continues": False}


def test_longest_message(address: str, fake: FakeRepository) -> None:
    limit = 100 << 20
    frame = message(CLOSE, parameters={"handle": 3, "x": ""})
    head, tail = frame[:-4], frame[-4:]
    piece = b"x" * (1 << 20)
    for size, is_accepted in ((limit - 1, True), (limit, False)):
        with RawClient.connect(address) as client:
            client.send_raw(head)
            rest = size - len(frame)
            try:
                while rest:
                    client.send_raw(piece[: min(rest, len(piece))])
                    rest -= min(rest, len(piece))
                client.send_raw(tail)
                found = client.receive()
            except (BrokenPipeError, ConnectionResetError):
                found = None
            assert (found is not None) == is_accepted
    assert len(fake.seen) == 1


def test_slow_reader_does_not_hold_up_others(address: str) -> None:
    with RawClient.connect(address) as slow:
        for _ in range(3):
            slow.send(OBJECTS, parameters={"handle": 1 << 23, "name": "x"})
        with RawClient.connect(address) as other:
            assert other.call(CLOSE, handle=3) == {"continues": False}


def test_many_clients(address: str) -> None:
    clients = [RawClient.connect(address) for _ in range(100)]
    for number in range(3):
        for client in clients:
            client.send(OBJECTS, parameters={"handle": 1, "name": str(number)})
        for client in clients:
            reply = client.receive()
            assert reply is not None
            assert reply.members["parameters"] == {"objects": [str(number)]}
    for client in clients:
        client.close()


def test_connected_socket() -> None:
    ours, theirs = socket.socketpair()
    server = Server(Dispatcher({REPOSITORY: FakeRepository()}), theirs)
    thread = threading.Thread(target=server.serve)
    thread.start()
    with RawClient(ours) as client:
        assert client.call(CLOSE, handle=3) == {"continues": False}
    thread.join(SECONDS)
    assert not thread.is_alive()
