"""Both clients against a peer that answers as it is told."""

import asyncio
import json
import os
import socket
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cfs.client import AsyncClient, Client
from cfs.client.errors import (
    ConnectionLostError,
    InternalError,
    InvalidReplyError,
    NoSuchRefError,
    VarlinkError,
)
from cfs.client.fuse import FuseMode, FuseParams
from cfs.client.methods import Method
from cfs.client.oci import GetInfo, Inspect, Pull
from cfs.client.repository import (
    CloseRepository,
    FuseServe,
    Gc,
    ImageObjects,
    Mount,
    OpenRepository,
)
from cfs.errors import InvalidRequestError

Answer = Callable[[socket.socket, dict[str, Any], list[int]], None]
TIMEOUT = 20


class Peer:
    """Accepts connections, one after the other, answers each call, and remembers them."""

    def __init__(self, path: Path, answer: Answer, nr_connections: int) -> None:
        self._nr_connections = nr_connections
        self.calls: list[dict[str, Any]] = []
        self.address = f"unix:{path}"
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(TIMEOUT)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with self._listener:
            for _ in range(self._nr_connections):
                self._answer_all(self._listener.accept()[0])

    def _answer_all(self, channel: socket.socket) -> None:
        with channel:
            channel.settimeout(TIMEOUT)
            data = b""
            while True:
                room = socket.CMSG_SPACE(16)
                try:
                    piece, ancillary, _, _ = channel.recvmsg(1 << 16, room)
                except ConnectionResetError:
                    return
                if not piece:
                    return
                fds = array("i")
                for _, _, content in ancillary:
                    fds.frombytes(content)
                data += piece
                while b"\0" in data:
                    message, _, data = data.partition(b"\0")
                    self.calls.append(json.loads(message))
                    with suppress(BrokenPipeError):
                        self._answer(channel, self.calls[-1], list(fds))
                for fd in fds:
                    os.close(fd)


@contextmanager
def serving(path: Path, answer: Answer, nr_connections: int = 1) -> Iterator[Peer]:
    peer = Peer(path, answer, nr_connections)
    try:
        yield peer
    finally:
        peer.thread.join(TIMEOUT)
        assert not peer.thread.is_alive()


def replying(*messages: object) -> Answer:
    def answer(channel: socket.socket, _: dict[str, Any], __: list[int]) -> None:
        for message in messages:
            data = message if isinstance(message, bytes) else json.dumps(message).encode()
            channel.sendall(data + b"\0")

    return answer


def run_blocking(address: str, methods: list[Method[Any]], **how: Any) -> list[Any]:
    results: list[Any] = []
    with Client(address, **how) as client:
        for method in methods:
            try:
                results.append(client.call(method))
            except VarlinkError as error:
                results.append(error)
    return results


def run_async(address: str, methods: list[Method[Any]], **how: Any) -> list[Any]:
    async def run() -> list[Any]:
        results: list[Any] = []
        async with AsyncClient(address, **how) as client:
            for method in methods:
                try:
                    results.append(await client.call(method))
                except VarlinkError as error:
                    results.append(error)
        return results

    return asyncio.run(run())


Runner = Callable[..., list[Any]]
both = pytest.mark.parametrize("run", [run_blocking, run_async])


@both
def test_what_is_sent(tmp_path: Path, run: Runner) -> None:
    reply = {"parameters": {"features": ["x"], "new": 1}, "continues": False}
    methods: list[Method[Any]] = [
        GetInfo(),
        Gc(3, roots=("ä",)),
        Mount(1, "refs/x"),
        FuseServe(1, None, "/mnt", options=FuseParams(mode=FuseMode.FUSE_OVERLAY, workers=0)),
    ]
    with serving(tmp_path / "s", replying(reply)) as peer:
        assert run(peer.address, methods[:1])[0].features == ["x"]
    for number, method in enumerate(methods[1:]):
        with serving(tmp_path / str(number), replying(reply)) as other:
            with pytest.raises(InvalidReplyError, match="is missing"):
                run(other.address, [method])
            peer.calls += other.calls
    assert peer.calls == [
        {"method": "org.composefs.Oci.GetInfo"},
        {
            "method": "org.composefs.Repository.Gc",
            "parameters": {"handle": 3, "dry_run": False, "roots": ["ä"]},
        },
        {
            "method": "org.composefs.Repository.Mount",
            "parameters": {"handle": 1, "name": "refs/x", "options": {}},
        },
        {
            "method": "org.composefs.Repository.FuseServe",
            "parameters": {
                "handle": 1,
                "mountpoint": "/mnt",
                "wait": False,
                "options": {"mode": "FuseOverlay", "workers": 0},
            },
        },
    ]


@both
def test_errors_leave_the_connection_usable(tmp_path: Path, run: Runner) -> None:
    replies = iter(
        [
            {
                "error": "org.composefs.Repository.NoSuchRef",
                "parameters": {"reference": "refs/a\nb"},
            },
            {"error": "org.composefs.Oci.InternalError", "parameters": {"message": "it broke"}},
            {"error": "com.example.Else"},
            {"continues": False},
        ]
    )
    methods: list[Method[Any]] = [ImageObjects(1, "refs/a\nb"), GetInfo()]
    methods += [GetInfo(), CloseRepository(1)]

    def answer(channel: socket.socket, call: dict[str, Any], fds: list[int]) -> None:
        replying(next(replies))(channel, call, fds)

    with serving(tmp_path / "s", answer) as peer:
        found = run(peer.address, methods)
    assert [type(each) for each in found[:3]] == [NoSuchRefError, InternalError, VarlinkError]
    assert list(map(str, found[:3])) == [
        "image not found: refs/a\nb", "it broke", "Else",
    ]  # fmt: skip
    assert found[0].parameters == {"reference": "refs/a\nb"}


BAD_REPLIES: list[Any] = [
    b"", b"[]", b"{", b"\xff", b"[" * 100_000,
    {"parameters": []},
    {"parameters": {"handle": "1"}},
    {"parameters": {"handle": True}},
    {"parameters": {"handle": -1}},
    {"parameters": {"handle": 1 << 64}},
    {"parameters": {"handle": 1.0}},
    {"parameters": {"handle": 1, "hash_algorithm": 5}},
    {"parameters": {}},
    {"parameters": {"handle": 1}, "continues": True},
]  # fmt: skip


@both
@pytest.mark.parametrize("reply", BAD_REPLIES, ids=lambda reply: str(reply)[:40])
def test_what_is_no_reply_ends_the_connection(tmp_path: Path, run: Runner, reply: object) -> None:
    with (
        serving(tmp_path / "s", replying(reply)) as peer,
        pytest.raises(InvalidReplyError),
    ):
        run(peer.address, [OpenRepository("/x")])


@both
def test_a_service_that_goes_away(tmp_path: Path, run: Runner) -> None:
    def answer(channel: socket.socket, _: dict[str, Any], __: list[int]) -> None:
        channel.sendall(b'{"par')
        channel.shutdown(socket.SHUT_RDWR)

    with (
        serving(tmp_path / "s", answer) as peer,
        pytest.raises(ConnectionLostError, match="closed the connection"),
    ):
        run(peer.address, [GetInfo()])


@both
def test_nobody_there(tmp_path: Path, run: Runner) -> None:
    with pytest.raises(ConnectionLostError, match="cannot connect to"):
        run(f"unix:{tmp_path}/none", [])
    with pytest.raises(InvalidRequestError, match="expected unix:PATH"):
        run("tcp:127.0.0.1:80", [])


@both
def test_a_silent_service(tmp_path: Path, run: Runner) -> None:
    with (
        serving(tmp_path / "s", lambda *_: None) as peer,
        pytest.raises(ConnectionLostError, match="silent"),
    ):
        run(peer.address, [GetInfo()], timeout=0.05)


@both
def test_long_paths_of_sockets(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    monkeypatch.chdir(directory)
    reply: Any = {"parameters": {"features": []}}
    with serving(Path("s"), replying(reply)):
        assert run(f"unix:{directory}/s", [GetInfo()])[0].features == []


@both
def test_descriptors_in_both_directions(tmp_path: Path, run: Runner) -> None:
    def answer(channel: socket.socket, call: dict[str, Any], fds: list[int]) -> None:
        index = 1 if "Mount" in call["method"] else 7
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [*fds, fds[0]]))
        data = json.dumps({"parameters": {"fd_index": index, "features": []}}).encode()
        channel.sendmsg([data + b"\0"], [rights])

    before = len(os.listdir("/proc/self/fd"))
    file = os.open(tmp_path, os.O_RDONLY)
    with serving(tmp_path / "s", answer) as peer:
        mounted, features = run(peer.address, [Mount(1, "x", fds=[file]), GetInfo(fds=[file])])
    assert features.features == []
    with mounted:
        assert len(mounted.descriptors) == 2
        fd = mounted.take_mount()
        with pytest.raises(InvalidReplyError, match="no descriptor 1"):
            mounted.take_mount()
    assert os.path.samestat(os.fstat(fd), os.fstat(file))
    os.close(fd)
    os.close(file)
    assert len(os.listdir("/proc/self/fd")) == before


PULL_REPLIES = [
    {"parameters": {"message": "2 layers"}, "continues": True},
    {"parameters": {"started": {"id": "a", "total": None, "unit": "Bytes"}}, "continues": True},
    {"error": "org.composefs.Oci.InternalError", "parameters": {"message": "no"}},
]


def test_streams(tmp_path: Path) -> None:
    with serving(tmp_path / "s", replying(*PULL_REPLIES)) as peer, Client(peer.address) as client:
        found = []
        with pytest.raises(InternalError):  # noqa: PT012 - what comes before it counts
            for reply in client.stream(Pull(1, "oci:x")):
                found.append(reply)
                with pytest.raises(InvalidRequestError, match="stream is under way"):
                    client.call(GetInfo())
        assert found[0].message == "2 layers"
        assert found[1].started is not None
        assert found[1].started.total is None
        with pytest.raises(InternalError):
            list(client.stream(Pull(1, "oci:x")))
    assert [call["more"] for call in peer.calls] == [True, True]


def test_streams_of_the_asynchronous_client(tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncClient(peer.address) as client:
            found = []
            with pytest.raises(InternalError):  # noqa: PT012 - what comes before it counts
                async for reply in client.stream(Pull(1, "oci:x")):
                    found.append(reply)
                    with pytest.raises(InvalidRequestError, match="stream is under way"):
                        await client.call(GetInfo())
            assert found[0].message == "2 layers"
            async with aclosing(client.stream(Pull(1, "oci:x"))) as replies:
                async for _ in replies:
                    break
            with pytest.raises(ConnectionLostError, match="is closed"):
                await client.call(GetInfo())

    with serving(tmp_path / "s", replying(*PULL_REPLIES)) as peer:
        asyncio.run(run())


def test_leaving_a_stream_closes_the_connection(tmp_path: Path) -> None:
    with serving(tmp_path / "s", replying(*PULL_REPLIES)) as peer, Client(peer.address) as client:
        for _ in client.stream(Pull(1, "oci:x")):
            break
        with pytest.raises(ConnectionLostError, match="is closed"):
            client.call(GetInfo())


def test_calls_without_reply(tmp_path: Path) -> None:
    def answer(channel: socket.socket, call: dict[str, Any], _: list[int]) -> None:
        if not call.get("oneway"):
            channel.sendall(b'{"parameters":{"features":[]}}\0')

    with serving(tmp_path / "s", answer) as peer, Client(peer.address) as client:
        client.send(GetInfo())
        assert client.call(GetInfo()).features == []
        assert client.peer_uid == os.geteuid()
    assert [call.get("oneway", False) for call in peer.calls] == [True, False]


def test_cancelled_and_concurrent_calls(tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncClient(peer.address) as client:
            async with asyncio.TaskGroup() as tasks:
                found = [tasks.create_task(client.call(GetInfo())) for _ in range(5)]
            assert [task.result().features for task in found] == [["y"]] * 5
            waiting = asyncio.create_task(client.call(Inspect(1, "never")))
            await asyncio.to_thread(asked.wait, TIMEOUT)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
            with pytest.raises(ConnectionLostError, match="is closed"):
                await client.call(GetInfo())

    asked = threading.Event()

    def answer(channel: socket.socket, call: dict[str, Any], _: list[int]) -> None:
        if "Inspect" in call["method"]:
            asked.set()
        else:
            channel.sendall(b'{"parameters":{"features":["y"]}}\0')

    with serving(tmp_path / "s", answer) as peer:
        asyncio.run(run())


def test_closing_ends_a_call_of_another_task(tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncClient(peer.address) as client:
            waiting = asyncio.create_task(client.call(Inspect(1, "never")))
            second = asyncio.create_task(client.call(GetInfo()))
            await asyncio.to_thread(asked.wait, TIMEOUT)
            client.close()
            for task in (waiting, second):
                with pytest.raises(ConnectionLostError, match="closed"):
                    await task

    asked = threading.Event()
    with serving(tmp_path / "s", lambda *_: asked.set()) as peer:
        asyncio.run(run())


@pytest.mark.parametrize("end", [asyncio.CancelledError, ConnectionLostError])
def test_a_call_that_ends_within_a_reply_closes_its_descriptors(
    tmp_path: Path, end: type[BaseException]
) -> None:
    def answer(channel: socket.socket, _: dict[str, Any], __: list[int]) -> None:
        socket.send_fds(channel, [b'{"parameters":'], [marked.fileno()] * 3)

    def nr_received() -> int:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(link) and os.path.samefile(link, marked.name) for link in links)

    async def run() -> None:
        async with AsyncClient(peer.address) as client:
            task = asyncio.create_task(client.call(Mount(1, "x")))
            async with asyncio.timeout(TIMEOUT):
                while nr_received() < 4:
                    await asyncio.sleep(0.001)
            if end is asyncio.CancelledError:
                task.cancel()
            else:
                client.close()
            with pytest.raises(end):
                await task

    with (tmp_path / "file").open("w") as marked, serving(tmp_path / "s", answer) as peer:
        asyncio.run(run())
        assert nr_received() == 1


def test_text_of_errors(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(300):
        deep = [deep]
    texts = {
        ("Repository.MountBusy", '{"mount_id": 3}'): "mount 3 is in use",
        ("Repository.MountBusy", '{"number": 3}'): 'MountBusy {"number": 3}',
        ("Repository.MountBusy", "{}"): "MountBusy",
        ("Oci.InternalError", '{"message": ""}'): "InternalError",
        ("Oci.InternalError", json.dumps({"message": "x" * 3000})): "x" * 2048 + "…",
    }
    for number, ((name, parameters), text) in enumerate(texts.items()):
        reply = f'{{"error": "org.composefs.{name}", "parameters": {parameters}}}'.encode()
        with serving(tmp_path / str(number), replying(reply)) as peer:
            assert list(map(str, run_blocking(peer.address, [GetInfo()]))) == [text]
    assert str(InternalError("org.composefs.Oci.InternalError", {"message": deep}))


def test_kinds_of_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reply: Any = {"parameters": {"features": []}}
    for name in ("@x", "a;b"):
        with serving(Path(name), replying(reply)):
            run_blocking(f"./{name}", [GetInfo()])
    with serving(Path("@y"), replying(reply)):
        run_blocking("@y", [GetInfo()])
    with serving(Path("z"), replying(reply)):
        run_blocking("unix:z;mode=0600", [GetInfo()])
    with socket.socket(socket.AF_UNIX) as listener:
        name = f"cfs-test-{os.getpid()}"
        listener.bind(f"\0{name}")
        listener.listen()
        Client(f"unix:@{name}").close()
    for address in ("", "unix:", "unix:@", "unix:;x", "exec:/x", "ssh:x", "a\0b"):
        with pytest.raises(InvalidRequestError, match="expected unix:PATH"):
            Client(address)


def test_opened_gives_the_handle_back_whatever_happens(tmp_path: Path) -> None:
    reply = {"parameters": {"handle": 7, "hash_algorithm": "sha256"}}
    with serving(tmp_path / "s", replying(reply)) as peer, Client(peer.address) as client:
        with pytest.raises(KeyError), client.opened("/x") as store:
            raise KeyError(store.handle)
        with client.opened(system=True):
            client.close()
    assert [call["method"].rpartition(".")[2] for call in peer.calls] == [
        "OpenRepository", "CloseRepository", "OpenRepository",
    ]  # fmt: skip
    assert peer.calls[1]["parameters"] == {"handle": 7}


def test_an_interrupted_call_leaves_no_store_open(tmp_path: Path) -> None:
    """The connection has gone then; the store, which outlives it, is closed by another one."""

    def answer(channel: socket.socket, call: dict[str, Any], _: list[int]) -> None:
        if "OpenRepository" in call["method"]:
            channel.sendall(b'{"parameters":{"handle":7}}\0')
        elif "Inspect" in call["method"]:
            asked.set()

    async def run_cancelled() -> None:
        async def work() -> None:
            async with AsyncClient(address) as client, client.opened("/x") as store:
                await client.call(Inspect(store.handle, "never"))

        task = asyncio.create_task(work())
        await asyncio.to_thread(asked.wait, TIMEOUT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def run_timed_out() -> None:
        with (
            pytest.raises(ConnectionLostError, match="silent"),
            Client(address, timeout=0.05) as client,
            client.opened("/x") as store,
        ):
            client.call(Inspect(store.handle, "never"))

    for number, run in enumerate((lambda: asyncio.run(run_cancelled()), run_timed_out)):
        asked = threading.Event()
        with serving(tmp_path / str(number), answer, nr_connections=2) as peer:
            address = peer.address
            run()
        assert [call["method"].rpartition(".")[2] for call in peer.calls] == [
            "OpenRepository", "Inspect", "CloseRepository",
        ]  # fmt: skip
        assert peer.calls[2]["oneway"]


def test_a_large_call_passes(tmp_path: Path) -> None:
    reply: Any = {"parameters": {"features": []}}
    name = "x" * (4 << 20)
    with (
        serving(tmp_path / "s", replying(reply)) as peer,
        Client(peer.address) as client,
        pytest.raises(InvalidReplyError),
    ):
        client.call(Inspect(1, name))
    assert peer.calls[0]["parameters"]["image"] == name


def test_text_that_is_no_text_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s", replying()) as peer,
        Client(peer.address) as client,
        pytest.raises(InvalidRequestError),
    ):
        client.call(Inspect(1, "\udcff"))
    assert peer.calls == []
