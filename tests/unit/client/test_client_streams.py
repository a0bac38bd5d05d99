"""Streams of both clients, calls without a reply, and calls that end before their time."""

import asyncio
import os
import socket
import threading
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest

from cfs.client import AsyncClient, Client
from cfs.client.errors import ConnectionLostError, InternalError
from cfs.client.oci import GetInfo, Inspect, Pull
from cfs.client.repository import Mount
from cfs.errors import InvalidRequestError
from tests.unit.client.peer import TIMEOUT, replying, serving

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
