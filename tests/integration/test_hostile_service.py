"""Both clients, and ``--connect``, with a service that does all it can to break them.

``CFS_VARLINK_FUZZ_SECONDS`` and ``CFS_FUZZ_SEED`` as in ``test_hostile_varlink``.
"""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cfs.client import AsyncClient, Client
from cfs.client.errors import InvalidReplyError, VarlinkError
from cfs.client.layers import FinalizeImage, GetLayer, GetLayerParams, HasLayer, SentLayer
from cfs.client.methods import Method, Result, WithDescriptors
from cfs.client.oci import Check, Inspect, ListImages, OciMount, Pull
from cfs.client.repository import (
    Fsck,
    FuseServe,
    Gc,
    ImageObjects,
    ListMounts,
    OpenRepository,
    WatchMount,
)
from cfs.client.service import GetInfo
from cfs.errors import CfsError
from cfs.linux.framing import EndOfMessages, Message, MessageReader, close_all
from cfs.service.idl import load_interfaces
from tests.command_line import command, environment, run_here
from tests.varlink_client import SECONDS
from tests.varlink_fuzz import Draw

FUZZ_SECONDS = float(os.environ.get("CFS_VARLINK_FUZZ_SECONDS", "60")) / 8
SEED = os.environ.get("CFS_FUZZ_SEED", "1")
DIGEST = "sha256:" + "0" * 64
METHODS: list[Method[Any]] = [
    GetInfo(), OpenRepository("/x"), ListMounts(), Fsck(1), Gc(1), ImageObjects(1, "x"),
    ListImages(1), Inspect(1, "x"), Check(1), OciMount(1, "x"), FuseServe(1, "x", "/x"),
    WatchMount(1), Pull(1, "oci:x"), HasLayer(1, DIGEST), FinalizeImage(1, "", "", []),
    GetLayer(1, GetLayerParams(diff_id=DIGEST)),
]  # fmt: skip
COMMANDS = [
    line.split()
    for line in (
        "fsck", "fsck --json", "gc", "gc --dry-run", "images", "images --json", "image-objects x",
        "ps", "ps --json", "umount --all", "umount x", "init store", "mount x mnt",
        "mount --fuse x mnt", "fuse-serve file mnt", "fuse-serve --background file mnt",
        "oci images", "oci images --json", "oci inspect x", "oci inspect --config x",
        f"oci tag {DIGEST} x", "oci untag x", "oci compute-id x", "oci fsck", "oci fsck --json",
        "oci pull oci:x y", "oci pull -q oci:x", f"oci layer {DIGEST}",
        f"oci import-layer {DIGEST}", "oci mount x mnt",
    )
]  # fmt: skip
Answer = Callable[[socket.socket, Message], None]


@contextmanager
def answering(path: Path, answer: Answer) -> Iterator[str]:
    """Serve connections, one after the other, while the block runs; yield the address."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                channel = listener.accept()[0]
            except OSError:  # shut down: that is all
                return
            with channel, suppress(OSError, EndOfMessages):  # it has gone, or did not wait
                _answer_all(channel, answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"unix:{path}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(SECONDS)
        listener.close()
        path.unlink()
        assert not thread.is_alive()


def _answer_all(channel: socket.socket, answer: Answer) -> None:
    channel.settimeout(SECONDS)
    reader = MessageReader(channel, 1 << 20)
    while channel.recv(1, socket.MSG_PEEK):
        message = reader.read()
        if message is not None:
            try:
                answer(channel, message)
            finally:
                close_all(message.fds)


class Liar:
    """Answers as the interfaces say, or nearly, or not at all."""

    def __init__(self, draw: Draw, directory: Path) -> None:
        self._draw = draw
        self._directory = str(directory)

    def __call__(self, channel: socket.socket, message: Message) -> None:
        call = json.loads(message.data)
        draw = self._draw
        replies = draw.random.randrange(5) if call.get("more") else 0
        leaves = draw.happens(0.1)
        for number in range(replies, -1, -1):
            data = json.dumps(self._reply(call["method"], continues=number > 0)).encode() + b"\0"
            if draw.happens(0.1):
                data = draw.spoil(data)
                leaves = True  # whoever waits for the rest would wait for ever
            with draw.fds(self._directory) as fds:
                sent = socket.send_fds(channel, [data], fds) if fds else 0
                channel.sendall(data[sent:])
        if leaves:
            channel.shutdown(socket.SHUT_RDWR)

    def _reply(self, method: str, *, continues: bool) -> Any:
        draw = self._draw
        name, _, method = method.rpartition(".")
        interface = load_interfaces().get(name)
        if method == "OpenRepository" and not draw.happens(0.1):
            return {"parameters": {"handle": 7, "hash_algorithm": "sha256"}}
        if interface is None or draw.happens(0.05):
            return draw.random.choice(([], None, {}, {"error": 1}, {"error": "x"}))
        if draw.happens(0.1):
            errors = [n for n, m in interface.members.items() if type(m).__name__ == "_Error"]
            error = draw.random.choice(errors)
            kind = interface.members[error].type
            members = draw.members(interface, kind.fields)
            return {"error": f"{name}.{error}", "parameters": members}
        fields = interface.members[method].out_type.fields
        return {"parameters": draw.members(interface, fields), "continues": continues}


def _known(mountpoint: Path) -> dict[str, list[Any]]:
    return {
        "fd_index": [0], "dir_count": [0, 1], "digest": ["0" * 64], "layer_verity": ["0" * 64],
        "mountpoint": [str(mountpoint), "/x"], "state": ["Serving"], "hash_algorithm": ["sha256"],
        "manifest_digest": [DIGEST], "image_id": ["0" * 64],
    }  # fmt: skip


def _rounds(tmp_path: Path, name: str) -> Iterator[tuple[Draw, Liar]]:
    end = time.monotonic() + FUZZ_SECONDS
    number = 0
    while time.monotonic() < end:
        number += 1
        draw = Draw(f"{SEED} {name} {number}", _known(tmp_path / "mnt"))
        try:
            yield draw, Liar(draw, tmp_path)
        except GeneratorExit:  # the round failed
            (tmp_path / "round").write_text(str(number))
            raise


def test_clients(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for draw, liar in _rounds(tmp_path, "clients"):
        methods = [draw.random.choice(METHODS) for _ in range(30)]
        call = draw.random.choice((_call, _call_async))
        with answering(tmp_path / "sock", liar) as address:
            for method in methods:
                with suppress(CfsError):
                    call(address, method, is_stream=draw.happens(0.4))
        assert len(os.listdir("/proc/self/fd")) <= before


def _call(address: str, method: Method[Any], *, is_stream: bool) -> None:
    with Client(address, timeout=SECONDS) as client:
        for reply in client.stream(method) if is_stream else [client.call(method)]:
            _close(reply)


def _call_async(address: str, method: Method[Any], *, is_stream: bool) -> None:
    async def run() -> None:
        async with AsyncClient(address, timeout=SECONDS) as client:
            if not is_stream:
                _close(await client.call(method))
                return
            async with aclosing(client.stream(method)) as replies:
                async for reply in replies:
                    _close(reply)

    asyncio.run(run())


def _close(reply: Result) -> None:
    assert repr(reply)
    if isinstance(reply, WithDescriptors):
        reply.close()


def test_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """One line for an error, whatever the service said, and no line that it made up."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnt").mkdir()
    (tmp_path / "file").touch()
    for draw, liar in _rounds(tmp_path, "commands"):
        with answering(tmp_path / "sock", liar) as address:
            for words in draw.random.sample(COMMANDS, 10):
                done = run_here(capfdbinary, f"--connect={address}", *words)
                assert done.returncode in (0, 1, 2), words
                assert b"\x1b" not in done.stdout + done.stderr or words[:2] == ["oci", "inspect"]
                if done.returncode == 1 and done.stderr:
                    assert done.stderr.count(b"\n") <= 1 + ("umount" in words) * 500, done.stderr


def flooding(channel: socket.socket, message: Message) -> None:
    """Answer for ever."""
    call = json.loads(message.data)
    if call["method"].endswith("OpenRepository"):
        channel.sendall(b'{"parameters":{"handle":1}}\0')
        return
    while True:
        channel.sendall(b'{"parameters":{"message":"x"},"continues":true}\0' * 1000)


def test_a_flood_of_replies_leaves_other_tasks_their_turn(tmp_path: Path) -> None:
    async def read(address: str) -> None:
        async with (
            AsyncClient(address) as client,
            aclosing(client.stream(Pull(1, "oci:x"))) as replies,
        ):
            async for _ in replies:
                pass

    async def run(address: str) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read(address), 0.1)

    with answering(tmp_path / "sock", flooding) as address:
        asyncio.run(run(address))


def _sending(*pieces: bytes) -> Answer:
    def answer(channel: socket.socket, _: Message) -> None:
        for piece in pieces:
            channel.sendall(piece)

    return answer


@pytest.mark.parametrize(
    "reply",
    [
        [b"x" * (1 << 20)] * 101,
        [b'{"parameters":{"x":[', b"[]," * 3_000_000, b"[]]}}\0"],
        [b'{"parameters":{"x":', b"[" * 200_000, b"]" * 200_000, b"}}\0"],
        [b'{"parameters":{"features":["\\ud800"]}}\0'],
        [b'{"parameters":{"features":' + b"[" * 400 + b"]" * 400 + b"}}\0"],
        [b'{"parameters":{"features":["x"],"features":["y"]}}\0'],
        ['{"parameters":{"features":[]}}\0'.encode("utf-16-le")],
    ],
    ids=["endless", "values", "deep", "surrogate", "nested", "twice", "utf-16"],
)
def test_what_is_no_reply(tmp_path: Path, reply: list[bytes]) -> None:
    from cfs.client.oci import GetInfo as Features  # noqa: PLC0415 - of the same name

    with (
        answering(tmp_path / "sock", _sending(*reply)) as address,
        Client(address) as client,
        pytest.raises(InvalidReplyError),
    ):
        client.call(Features())


@pytest.mark.parametrize("depth", [10, 400, 900])
def test_errors_with_nested_parameters(tmp_path: Path, depth: int) -> None:
    value = b"[" * depth + b"]" * depth
    reply = b'{"error":"org.composefs.Oci.NoSuchImage","parameters":{"image":%s,"x":%s}}\0'
    with (
        answering(tmp_path / "sock", _sending(reply % (value, value))) as address,
        Client(address) as client,
        pytest.raises((VarlinkError, InvalidReplyError)) as found,
    ):
        client.call(ListImages(1))
    assert len(str(found.value)) < 5000


def test_more_descriptors_than_there_is_room_for(tmp_path: Path) -> None:
    def answer(channel: socket.socket, _: Message) -> None:
        while True:
            with open(os.devnull) as file:
                data = b'{"parameters":{"dir_count":1},"continues":true}\0'
                socket.send_fds(channel, [data], [file.fileno()] * 250)

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with answering(tmp_path / "sock", answer) as address, Client(address) as client:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, limits[1]))
        kept: list[SentLayer] = []
        try:
            with pytest.raises(InvalidReplyError, match="descriptors"):
                kept.extend(client.stream(GetLayer(1, GetLayerParams(diff_id=DIGEST))))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for reply in kept:
                reply.close()


@pytest.mark.parametrize("words", ["oci images", "oci pull oci:x y", "fsck"])
@pytest.mark.parametrize("is_silent", [True, False])
def test_interrupts_end_commands(tmp_path: Path, words: str, *, is_silent: bool) -> None:
    asked = threading.Event()

    def answer(channel: socket.socket, message: Message) -> None:
        call = json.loads(message.data)
        if call["method"].endswith("OpenRepository"):
            channel.sendall(b'{"parameters":{"handle":1}}\0')
            return
        asked.set()
        if not is_silent:
            while True:  # a message without end, or replies
                flooding(channel, message) if "Pull" in call["method"] else channel.sendall(b" ")

    with answering(tmp_path / "sock", answer) as address:
        line = [*command("cfsctl"), f"--connect={address}", *words.split()]
        process = subprocess.Popen(
            line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert asked.wait(SECONDS)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=SECONDS)
    assert (process.returncode, output[1].strip()) == (130, b"")
