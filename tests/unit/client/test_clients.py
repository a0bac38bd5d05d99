"""Both clients against a peer that answers as it is told."""

import asyncio
import json
import os
import socket
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfs.client import AsyncClient, Client
from cfs.client.address import SYSTEM_ADDRESS, default_addresses
from cfs.client.errors import (
    ConnectionLostError,
    InternalError,
    InvalidReplyError,
    NoSuchRefError,
    VarlinkError,
)
from cfs.client.fuse import FuseMode, FuseParams
from cfs.client.methods import Method
from cfs.client.oci import GetInfo, Inspect
from cfs.client.repository import (
    CloseRepository,
    FuseServe,
    Gc,
    ImageObjects,
    Mount,
    OpenRepository,
)
from cfs.errors import InvalidRequestError
from tests.unit.client.peer import TIMEOUT, replying, serving


def test_a_directory_of_somebody_else_has_no_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """su(1) leaves XDG_RUNTIME_DIR as it was."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert f"unix:{tmp_path}/composefs/composefs.sock" in default_addresses()
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert default_addresses() == [SYSTEM_ADDRESS]
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert default_addresses() == [SYSTEM_ADDRESS]


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
