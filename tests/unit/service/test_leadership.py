"""Who serves what: short calls in turn, what lasts beside them, and no thread for nothing."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.compat import override
from cfs.linux.credentials import Credentials
from cfs.service.call import Call
from cfs.service.dispatch import SHORT_METHODS, Dispatcher
from cfs.service.idl import load_interfaces
from cfs.service.leadership import Leadership
from cfs.service.rights import as_peer
from cfs.service.server import Server
from tests.unit.service.direct import SOMEBODY
from tests.unit.service.transport import REPOSITORY, FakeRepository
from tests.varlink_client import SECONDS, RawClient, serving

CLOSE = f"{REPOSITORY}.CloseRepository"
OBJECTS = f"{REPOSITORY}.ImageObjects"
WATCH = f"{REPOSITORY}.WatchMount"
MOUNT = f"{REPOSITORY}.Mount"
NR_CLIENTS = 30
STALLS = 100  # handle of the call that does not come back


class Stalling(FakeRepository):
    """One of the short methods waits, as if for a file system that does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()
        self.stalled = threading.Semaphore(0)

    @override
    def CloseRepository(self, call: Call, *, handle: int) -> None:  # noqa: N802 - as in the IDL
        if handle == STALLS:
            self.stalled.release()
            assert self.answers.wait(SECONDS)
        super().CloseRepository(call, handle=handle)


@pytest.fixture
def fake() -> Iterator[Stalling]:
    fake = Stalling()
    yield fake
    fake.answers.set()


@pytest.fixture
def address(tmp_path: Path, fake: Stalling) -> Iterator[str]:
    threads = threading.active_count()
    with serving(Dispatcher({REPOSITORY: fake}), tmp_path / "sock"):
        yield str(tmp_path / "sock")
        fake.answers.set()
    assert threading.active_count() == threads


def connect(address: str, count: int) -> list[RawClient]:
    return [RawClient.connect(address) for _ in range(count)]


def service_threads() -> int:
    return sum(thread.name == "service" for thread in threading.enumerate())


def nr_switches() -> int:
    """Return how often threads of this process have gone to sleep, the calling one aside."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != threading.get_native_id():
            status = (task / "status").read_text()
            total += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return total


def test_short_methods_exist() -> None:
    known = {
        f"{name}.{member}"
        for name, interface in load_interfaces().items()
        for member in interface.members
    }
    assert {name for name in SHORT_METHODS if not name.startswith("org.varlink.")} <= known


def test_others_do_not_wait_for_stalled_calls(address: str, fake: Stalling) -> None:
    """Not even for several, one after the other."""
    stuck = connect(address, 5)
    (other,) = connect(address, 1)
    for client in stuck:
        client.send(CLOSE, parameters={"handle": STALLS})
        client.send(OBJECTS, parameters={"handle": 1, "name": "after"})
        assert fake.stalled.acquire(timeout=SECONDS)
        assert other.call(CLOSE, handle=3) == {"continues": False}
    assert fake.seen == [(3, False, False)] * len(stuck)
    fake.answers.set()
    for client in stuck:  # in order
        replies = [client.receive() for _ in range(2)]
        found = [reply.members.get("parameters") for reply in replies if reply is not None]
        assert found == [None, {"objects": ["after"]}]
        assert client.call(CLOSE, handle=3) == {"continues": False}
        client.close()
    other.close()


def test_calls_that_last_have_threads_of_their_own(address: str) -> None:
    clients = connect(address, NR_CLIENTS)
    for client in clients:
        client.send(WATCH, parameters={"mount_id": 0}, more=True)
    with RawClient.connect(address) as other:
        for _ in range(NR_CLIENTS):
            assert other.call(MOUNT, handle=0, name="x", options={})["continues"] is False
        assert service_threads() > NR_CLIENTS
        for client in clients:
            client.close()
        deadline = time.monotonic() + SECONDS
        while service_threads() > NR_CLIENTS // 5:
            assert time.monotonic() < deadline, "threads stay"
            assert other.call(CLOSE, handle=3) == {"continues": False}


def test_others_do_not_wait_for_incomplete_messages(address: str) -> None:
    clients = connect(address, NR_CLIENTS)
    (other,) = connect(address, 1)
    frame = b'{"method": "%s", "parameters": {"handle": 3}}\0' % CLOSE.encode()
    for size in (1, 20, len(frame)):
        for client in clients:
            client.send_raw(frame[:size])
        frame = frame[size:]
        assert other.call(CLOSE, handle=3) == {"continues": False}
    for client in clients:
        reply = client.receive()
        assert reply is not None
        assert reply.members == {"continues": False}
        client.close()
    other.close()


def test_others_do_not_wait_for_readers(address: str) -> None:
    clients = connect(address, 5)
    for client in clients:
        for _ in range(3):
            client.send(OBJECTS, parameters={"handle": 1 << 20, "name": "x"})
    with RawClient.connect(address) as other:
        assert other.call(CLOSE, handle=3) == {"continues": False}
    for client in clients:
        for _ in range(3):
            reply = client.receive()
            assert reply is not None
            assert len(reply.members["parameters"]["objects"][0]) == 1 << 20
        client.close()


def test_nobody_wakes_up_for_nothing(address: str) -> None:
    with RawClient.connect(address) as client:
        for _ in range(10):
            assert client.call(CLOSE, handle=3) == {"continues": False}
        deadline = time.monotonic() + SECONDS
        before = -1
        while (now := nr_switches()) != before:
            assert time.monotonic() < deadline, "threads wake up all the time"
            before = now
            threading.Event().wait(0.2)  # many times what the guard waits


@pytest.mark.parametrize("nr_threads", [1, 2])
def test_without_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nr_threads: int) -> None:
    """Those that there are do everything, one after the other."""
    start = threading.Thread.start
    nr_started = 0

    def start_some(thread: threading.Thread) -> None:
        nonlocal nr_started
        if thread.name == "service":
            if nr_started == nr_threads:
                raise RuntimeError("can't start new thread")
            nr_started += 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    fake = FakeRepository()
    with serving(Dispatcher({REPOSITORY: fake}), tmp_path / "sock"):
        clients = connect(str(tmp_path / "sock"), NR_CLIENTS)
        for client in clients:
            client.send(WATCH, parameters={"mount_id": 2}, more=True)
            client.send(CLOSE, parameters={"handle": 3})
        for client in clients:
            replies = [client.receive() for _ in range(3)]
            assert [reply and reply.members["continues"] for reply in replies] == [
                True, False, False
            ]  # fmt: skip
            client.close()
    assert nr_started == nr_threads


@pytest.mark.parametrize("name", ["service", "watcher"])
def test_without_any_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    def fail(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", fail)
    channel = socket.socket(socket.AF_UNIX)
    channel.bind(str(tmp_path / "sock"))
    channel.listen()
    with pytest.raises(OSError, match="thread"):
        Server(Dispatcher({REPOSITORY: FakeRepository()}), channel).serve()
    assert channel.fileno() == -1


@pytest.mark.usefixtures("root")
def test_no_thread_keeps_the_rights_of_a_peer() -> None:
    """A thread that is made while another one acts for a peer serves everybody later."""
    seen: list[Credentials] = []
    ended = threading.Event()

    def serve(_item: socket.socket) -> bool:
        seen.append(Credentials.current())
        return False

    def end(item: socket.socket) -> None:
        item.close()
        ended.set()

    leadership = Leadership(serve, end)
    ours, theirs = socket.socketpair()
    with theirs:
        leadership.add(ours)
        with as_peer(SOMEBODY):
            leadership.start()
        theirs.send(b"x")
        assert ended.wait(SECONDS)
    leadership.stop()
    leadership.join(SECONDS)
    assert seen == [Credentials.current()]
