"""Recorded exchanges of ``tests/data/varlink`` against the service in this process.

``tests/data/varlink/README.md`` says what the files mean.
"""

import hashlib
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cfs.cli.cfsctl import run as run_cfsctl
from cfs.linux.framing import close_all
from cfs.service.assemble import assembled
from cfs.service.dispatch import Dispatcher
from cfs.service.fuse_registry import FuseMounts
from cfs.service.handles import StoreOptions
from cfs.service.idl import load_interfaces
from tests.command_line import run_shell, unpack_tree
from tests.idl_kinds import wrong_kinds
from tests.paths import DATA
from tests.varlink_client import SECONDS, Json, RawClient, Reply, serving

CLOSED = "the connection was closed"
_GET_INFO = "org.varlink.service.GetInfo"


@contextmanager
def whole_service(options: StoreOptions) -> Iterator[Dispatcher]:
    with assembled(options, FuseMounts()) as dispatcher:
        yield dispatcher


@contextmanager
def serve_ours(options: StoreOptions, path: Path) -> Iterator[None]:
    with whole_service(options) as dispatcher, serving(dispatcher, path):
        yield


def wanted_of_us(exchange: Json) -> Json:
    """Return the exchange with what is wanted of us in the place of what 0.9 does."""
    if "defect" not in exchange:
        return exchange
    kept: Json = {
        key: exchange[key] for key in ("what", "send", "fds_out", "order") if key in exchange
    }
    own = exchange.get("own")
    if own is None:
        return {**kept, "any": True}
    if isinstance(own, list):
        return {**kept, "answers": own}
    if own.keys() <= {"closed", "silent"}:
        return {**kept, **own, "receive": []}
    return {**kept, "receive": [own]}


class Setting(NamedTuple):
    """How a file is replayed.

    Attributes:
        serve: starts the service on a socket file.
        connect: makes a client.
        wanted: tells what is wanted in the place of a recorded exchange.
    """

    serve: Callable[[StoreOptions, Path], AbstractContextManager[None]] = serve_ours
    connect: Callable[[str], RawClient] = RawClient.connect
    wanted: Callable[[Json], Json] = wanted_of_us


def replay(name: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replay a file with our service; return all differences."""
    return [
        f"{number} {exchange['what']}: {difference}"
        for number, exchange, differences in play(name, work, monkeypatch, Setting())
        for difference in differences
    ]


def play(
    name: str, work: Path, monkeypatch: pytest.MonkeyPatch, setting: Setting
) -> Iterator[tuple[int, Json, list[str]]]:
    """Replay a file; yield after each line its number, the line and the differences.

    Args:
        name: of the file, without its end.
        work: empty directory, which becomes the current one.
        monkeypatch: of pytest.
        setting: how.
    """
    lines = (DATA / "varlink" / f"{name}.jsonl").read_text().replace("${DIR}", str(work))
    first, *exchanges = [json.loads(line) for line in lines.splitlines()]
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work / "home"))
    unpack_tree(work)
    for command in first["setup"]:
        _run_here(command)
    options = StoreOptions(insecure="--insecure" in first["service"])
    with setting.serve(options, work / "sock"):
        player = _Player(work, setting.connect)
        try:
            for number, exchange in enumerate(exchanges, 2):
                yield number, exchange, list(player.play(exchange, setting.wanted(exchange)))
            yield 0, {"what": "nothing follows"}, list(player.finish())
        finally:
            player.close()


def _run_here(command: str) -> None:
    """Run a command of a set-up, ``cfsctl`` in this process."""
    words = shlex.split(command)
    if words[0] != "cfsctl":
        done = run_shell(command, Path.cwd())
        assert done.returncode == 0, done.stderr
        return
    source = os.devnull
    if "<" in words:
        source = words[words.index("<") + 1]
        del words[words.index("<") :]
    before = sys.stdin
    with open(source) as file:
        sys.stdin = file
        try:
            assert run_cfsctl(words[1:]) == 0, command
        finally:
            sys.stdin = before


class _Player:
    """The connections of a file, by name, each opened when it is used."""

    def __init__(self, work: Path, connect: Callable[[str], RawClient]) -> None:
        self._work = work
        self._connect = connect
        self._clients: dict[str, RawClient] = {}

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def play(self, exchange: Json, wanted: Json) -> Iterator[str]:
        """Run an exchange and tell differences."""
        if "shell" in exchange:
            subprocess.run(
                ["/bin/sh", "-c", exchange["shell"]], cwd=self._work, check=True, timeout=SECONDS
            )
            return
        name = exchange.get("conn", "a")
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = self._connect(str(self._work / "sock"))
        with _sent_fds(exchange, self._work) as fds:
            client.send_raw(_encode(exchange), fds)
        differences = list(compare(client, wanted))
        yield from differences
        if is_closed(wanted) or CLOSED in differences:
            del self._clients[name]
            client.close()

    def finish(self) -> Iterator[str]:
        """Tell what the connections have beside the replies that were wanted."""
        for client in self._clients.values():
            yield from compare(client, {"receive": [], "silent": True})


class _ClosedError(Exception):
    """The service closed the connection."""


def _encode(exchange: Json) -> bytes:
    if "raw" in exchange:
        raw: str = exchange["raw"]
        return raw.encode("latin-1")
    return json.dumps(exchange["send"], ensure_ascii=False).encode() + b"\0"


def is_closed(wanted: Json) -> bool:
    """Tell whether the connection is to be closed after an exchange."""
    return bool(wanted.get("closed")) or "closed" in wanted.get("answers", ())


def compare(client: RawClient, wanted: Json) -> Iterator[str]:
    """Read what follows a message and tell differences from what is wanted."""
    try:
        yield from _compare(client, wanted)
        if is_closed(wanted):
            yield f"not closed, but {_receive(client).members}"
    except _ClosedError:
        if not is_closed(wanted):
            yield CLOSED


def _compare(client: RawClient, wanted: Json) -> Iterator[str]:
    if "any" in wanted:
        yield from _compare_kinds(_receive_all(client), wanted["send"]["method"])
    elif "answers" in wanted:
        yield from _compare_answers(client, wanted["answers"])
    elif wanted.get("order") == "layer":
        yield from _compare_layer(_receive_all(client), wanted)
    elif wanted.get("order") == "progress":
        replies = _receive_all(client)
        for reply in replies[:-1]:
            names = list(reply.members["parameters"])
            if len(names) != 1 or names == ["completed"] or reply.fds:
                yield f"not one member: {reply.members}"
        yield from _compare_kinds(replies, wanted["send"]["method"])
        yield from _differences(replies[-1].members, wanted["receive"][-1], "")
    else:
        yield from _compare_replies(client, wanted)


def _compare_kinds(replies: list[Reply], method: str) -> Iterator[str]:
    """Tell what the interface does not allow a method to reply."""
    interface = load_interfaces()[method.rpartition(".")[0]]
    for reply in replies:
        close_all(reply.fds)
        error = reply.members.get("error")
        if error is None:
            kind = interface.members[method.rpartition(".")[2]].out_type
        else:
            owner, _, name = error.rpartition(".")
            if owner != interface.name or name not in interface.members:
                yield f"undeclared: {error}"
                continue
            kind = interface.members[name].type
        yield from wrong_kinds(interface, kind, reply.members.get("parameters", {}), "")


def _compare_replies(client: RawClient, wanted: Json) -> Iterator[str]:
    expected = wanted["receive"]
    counts = wanted.get("fds_out", [0] * len(expected))
    for members, count in zip(expected, counts, strict=True):
        reply = _receive(client)
        if len(reply.fds) != count:
            yield f"{len(reply.fds)} descriptors, not {count}"
        close_all(reply.fds)
        paths = wanted.get("order", ())
        yield from _differences(_sort(reply.members, paths), _sort(members, paths), "")
    if wanted.get("silent"):
        client.send(_GET_INFO)
        reply = _receive(client)
        if "interfaces" not in reply.members.get("parameters", {}):
            yield f"not silent: {reply.members}"


def _compare_answers(client: RawClient, answers: list[Any]) -> Iterator[str]:
    for answer in answers:
        if answer not in ("closed", "nothing"):
            members = _receive(client).members
            names = members.get("error") or sorted(members["parameters"])
            if names != answer:
                yield f"{names}, not {answer}"


def _compare_layer(replies: list[Reply], wanted: Json) -> Iterator[str]:
    counts = {reply.members.get("parameters", {}).get("dir_count") for reply in replies}
    fds = [fd for reply in replies for fd in reply.fds]
    try:
        if len(counts) != 1 or None in counts:
            yield f"replies {[reply.members for reply in replies]}"
            return
        with os.fdopen(os.dup(fds[0]), "rb") as pipe:
            layer = b"".join(read_layer(pipe, fds[1:]))
        if f"sha256:{hashlib.sha256(layer).hexdigest()}" != wanted["layer"]:
            yield "another layer"
    finally:
        close_all(fds)


def read_layer(pipe: Any, slots: list[int]) -> Iterator[bytes]:
    """Yield the pieces of the tar that a splitdirfdstream stands for."""
    while kind := pipe.read(1):
        if kind in (b"\0", b"\1"):
            yield pipe.read(*struct.unpack("<I", pipe.read(4)))
            continue
        assert kind == b"\2"
        size, slot, length = struct.unpack("<QII", pipe.read(16))
        fd = os.open(pipe.read(length), os.O_RDONLY, dir_fd=slots[slot])
        with os.fdopen(fd, "rb") as file:
            yield file.read(size)


def _receive(client: RawClient) -> Reply:
    reply = client.receive()
    if reply is None:
        raise _ClosedError
    return reply


def _receive_all(client: RawClient) -> list[Reply]:
    replies = [_receive(client)]
    while replies[-1].members.get("continues"):
        replies.append(_receive(client))
    return replies


@contextmanager
def _sent_fds(exchange: Json, work: Path) -> Iterator[list[int]]:
    """Open the descriptors that go with a message; write into the pipe from a thread."""
    fds: list[int] = []
    try:
        for kind in exchange.get("fd_kinds", []):
            if kind == "pipe":
                fds.append(_start_pipe(_make_stream(exchange.get("stream"), work)))
            else:
                fds.append(os.open(work / kind, os.O_RDONLY | os.O_DIRECTORY))
        yield fds
    finally:
        close_all(fds)


def _start_pipe(stream: bytes) -> int:
    reading, writing = os.pipe()

    def write() -> None:
        with suppress(BrokenPipeError), os.fdopen(writing, "wb") as file:
            file.write(stream)

    threading.Thread(target=write, name="stream", daemon=True).start()
    return reading


def _make_stream(stream: Json | None, work: Path) -> bytes:
    if stream is None:
        return b""
    if "hex" in stream:
        return bytes.fromhex(stream["hex"])
    made = b""
    with open(work / stream["tar"], "rb") as tar:
        for kind, *rest in stream["chunks"]:
            if kind == "inline":
                made += b"\0" + struct.pack("<I", rest[0]) + tar.read(rest[0])
            else:
                slot, size, name = rest
                made += b"\2" + struct.pack("<QII", size, slot, len(name)) + name.encode()
                tar.seek(size, os.SEEK_CUR)
    return made


def _sort(members: Json, paths: list[str]) -> Json:
    """Return a reply with the lists sorted that have no order."""
    copy: Json = json.loads(json.dumps(members))
    for path in paths:
        *above, name = path.split(".")
        parent: Any = copy
        for step in above:
            parent = parent.get(step, {})
        if isinstance(parent.get(name), list):
            parent[name].sort(key=json.dumps)
    return copy


def _differences(found: Any, expected: Any, where: str) -> Iterator[str]:
    """Tell where a reply is not the expected one."""
    if isinstance(expected, dict) and "$" in expected:
        if not _matches(found, expected):
            yield f"{where}: {found!r} is no {expected['$']}"
    elif isinstance(expected, dict) and isinstance(found, dict):
        if list(found) != list(expected):
            yield f"{where}: {found} has not the members of {expected}, in this order"
            return
        for name, value in expected.items():
            yield from _differences(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        for index, value in enumerate(expected):
            yield from _differences(found[index], value, f"{where}[{index}]")
    elif type(found) is not type(expected) or found != expected:
        yield f"{where}: {found!r}, not {expected!r}"


def _matches(found: Any, placeholder: Json) -> bool:
    match placeholder["$"]:
        case "int":
            return type(found) is int
        case "string":
            return isinstance(found, str) and bool(found)
        case "hex128":
            return isinstance(found, str) and bool(re.fullmatch("[0-9a-f]{128}", found))
        case "list":
            return isinstance(found, list) and all(has in found for has in placeholder["has"])
    return False
