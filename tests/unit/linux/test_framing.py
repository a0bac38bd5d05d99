"""Messages and their descriptors on a socket pair."""

import array
import os
import resource
import socket
import tracemalloc
from collections.abc import Iterator

import pytest

from cfs.errors import FormatError
from cfs.linux.framing import MAX_FDS, EndOfMessages, MessageReader, MessageWriter, close_all


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def send_fds(channel: socket.socket, data: bytes, fds: list[int]) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    channel.sendmsg([data], [rights])


def null_fds(count: int) -> list[int]:
    return [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]


def test_messages_sent_at_once_come_one_by_one(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    pair[0].sendall(b"one\0two\0thr")
    reader = MessageReader(pair[1], 100)
    assert reader.read() == (b"one", [])
    assert reader.read() == (b"two", [])
    assert reader.read() is None
    assert reader.size == 3
    pair[0].sendall(b"ee\0")
    assert reader.read() == (b"three", [])


def test_descriptors_belong_to_the_message_they_came_with(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    sent = null_fds(3)
    pair[0].sendall(b"none\0")
    send_fds(pair[0], b"tw", sent[:2])
    pair[0].sendall(b"o\0none\0")
    send_fds(pair[0], b"one\0", sent[2:])
    reader = MessageReader(pair[1], 100)
    found = [reader.read() for _ in range(4)]
    close_all(sent)
    assert [(each.data, len(each.fds)) for each in found if each is not None] == [
        (b"none", 0), (b"two", 2), (b"none", 0), (b"one", 1),
    ]  # fmt: skip
    for each in found:
        assert each is not None
        assert all(not os.get_inheritable(fd) for fd in each.fds)
        close_all(each.fds)


def test_a_long_message_passes_in_pieces(pair: tuple[socket.socket, socket.socket]) -> None:
    data = os.urandom(1 << 20).replace(b"\0", b"0")
    fds = null_fds(1)
    writer, reader = MessageWriter(pair[0]), MessageReader(pair[1], 1 << 21)
    writer.start(data, fds)
    rounds = 0
    while not writer.send():
        assert reader.read() is None
        rounds += 1
    message = reader.read()
    assert rounds > 1
    assert message is not None
    assert message.data == data
    assert len(message.fds) == 1
    close_all(message.fds)
    close_all(fds)


def test_what_was_sent_is_forgotten(pair: tuple[socket.socket, socket.socket]) -> None:
    writer = MessageWriter(pair[0])
    tracemalloc.start()
    writer.start(b"x" * (1 << 20))
    while not writer.send():
        pair[1].recv(1 << 20)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 1 << 19


@pytest.mark.parametrize("data", [b"12345\0", b"123456"])
def test_too_long_messages_are_refused(
    pair: tuple[socket.socket, socket.socket], data: bytes
) -> None:
    pair[0].sendall(b"1234\0" + data)
    reader = MessageReader(pair[1], 5)
    assert reader.read() == (b"1234", [])
    with pytest.raises(FormatError, match="more than 5 bytes"):
        reader.read()


@pytest.mark.parametrize(("data", "is_within"), [(b"", False), (b"a", True)])
def test_the_end(
    pair: tuple[socket.socket, socket.socket], data: bytes, *, is_within: bool
) -> None:
    pair[0].sendall(data)
    pair[0].close()
    reader = MessageReader(pair[1], 10)
    with pytest.raises(EndOfMessages) as found:
        reader.read()
    assert found.value.is_within is is_within


def test_a_message_has_no_more_descriptors_than_one_sendmsg(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    fds = null_fds(1)
    send_fds(pair[0], b"a", fds * MAX_FDS)
    send_fds(pair[0], b"b", fds)
    close_all(fds)
    before = len(os.listdir("/proc/self/fd"))
    reader = MessageReader(pair[1], 10)
    with pytest.raises(FormatError, match="more than 253 descriptors"):
        reader.read()
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FormatError, match="254 descriptors"):
        MessageWriter(pair[0]).start(b"", [0] * (MAX_FDS + 1))


def test_descriptors_that_do_not_fit_are_no_silent_loss(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    fds = null_fds(1)
    send_fds(pair[0], b"a\0", fds * 3)
    close_all(fds)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = MessageReader(pair[1], 10)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        with pytest.raises(FormatError, match="than this process may have"):
            reader.read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    reader.close()
