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
from typing import Any

import pytest

from cfs.cli.cfsctl import run as run_cfsctl
from cfs.linux.framing import close_all
from cfs.service.assemble import assembled
from cfs.service.dispatch import Dispatcher
from cfs.service.fuse_registry import FuseMounts
from cfs.service.handles import StoreOptions
from tests.command_line import run_shell, unpack_tree
from tests.paths import DATA
from tests.varlink_client import SECONDS, Json, RawClient, Reply, serving

_GET_INFO = "org.varlink.service.GetInfo"

Assemble = Callable[[StoreOptions], AbstractContextManager[Dispatcher]]


@contextmanager
def whole_service(options: StoreOptions) -> Iterator[Dispatcher]:
    with assembled(options, FuseMounts()) as dispatcher:
        yield dispatcher


def replay(
    name: str,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    assemble: Assemble = whole_service,
) -> list[str]:
    """Replay a file; return all differences.

    Args:
        name: of the file, without its end.
        work: empty directory, which becomes the current one.
        monkeypatch: of pytest.
        assemble: makes the service.
    """
    lines = (DATA / "varlink" / f"{name}.jsonl").read_text().replace("${DIR}", str(work))
    first, *exchanges = [json.loads(line) for line in lines.splitlines()]
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work / "home"))
    unpack_tree(work)
    for command in first["setup"]:
        _run_here(command)
    options = StoreOptions(insecure="--insecure" in first["service"])
    with assemble(options) as dispatcher, serving(dispatcher, work / "sock"):
        player = _Player(work)
        try:
            return [
                f"{number} {exchange['what']}: {difference}"
                for number, exchange in enumerate(exchanges, 2)
                for difference in player.play(exchange)
            ]
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

    def __init__(self, work: Path) -> None:
        self._work = work
        self._clients: dict[str, RawClient] = {}

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def play(self, exchange: Json) -> Iterator[str]:
        """Run an exchange and tell differences."""
        if "shell" in exchange:
            subprocess.run(
                ["/bin/sh", "-c", exchange["shell"]], cwd=self._work, check=True, timeout=SECONDS
            )
            return
        name = exchange.get("conn", "a")
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = RawClient.connect(str(self._work / "sock"))
        with _sent_fds(exchange, self._work) as fds:
            client.send_raw(_encode(exchange), fds)
        try:
            yield from _compare(client, _wanted(exchange))
        except _ClosedError:
            wanted = _wanted(exchange)
            if not wanted.get("closed") and "closed" not in wanted.get("answers", ()):
                yield "the connection was closed"
            del self._clients[name]
            client.close()


class _ClosedError(Exception):
    """The service closed the connection."""


def _encode(exchange: Json) -> bytes:
    if "raw" in exchange:
        raw: str = exchange["raw"]
        return raw.encode("latin-1")
    return json.dumps(exchange["send"], ensure_ascii=False).encode() + b"\0"


def _wanted(exchange: Json) -> Json:
    """Return the exchange with what is wanted of us in the place of what 0.9 does."""
    if "defect" not in exchange:
        return exchange
    kept: Json = {key: exchange[key] for key in ("what", "fds_out", "order") if key in exchange}
    own = exchange.get("own")
    if own is None:
        return {**kept, "any": True}
    if isinstance(own, list):
        return {**kept, "answers": own}
    if own.keys() <= {"closed", "silent"}:
        return {**kept, **own, "receive": []}
    return {**kept, "receive": [own]}


def _compare(client: RawClient, wanted: Json) -> Iterator[str]:
    """Read what follows and tell differences.

    Raises:
        _ClosedError: the service closed the connection, wanted or not.
    """
    if "any" in wanted:
        close_all(_receive_all(client)[-1].fds)
    elif "answers" in wanted:
        yield from _compare_answers(client, wanted["answers"])
    elif wanted.get("order") == "layer":
        yield from _compare_layer(_receive_all(client), wanted)
    elif wanted.get("order") == "progress":
        *progress, last = _receive_all(client)
        for reply in progress:
            if len(reply.members["parameters"]) != 1:
                yield f"not one member: {reply.members}"
        yield from _differences(last.members, wanted["receive"][-1], "")
    else:
        yield from _compare_replies(client, wanted)


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
    if wanted.get("closed"):
        yield f"not closed, but {_receive(client).members}"
    if wanted.get("silent"):
        client.send(_GET_INFO)
        reply = _receive(client)
        if "interfaces" not in reply.members.get("parameters", {}):
            yield f"not silent: {reply.members}"


def _compare_answers(client: RawClient, answers: list[Any]) -> Iterator[str]:
    for answer in answers:
        if answer == "closed":
            yield f"not closed, but {_receive(client).members}"
        elif answer != "nothing":
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
            layer = b"".join(_read_layer(pipe, fds[1:]))
        if f"sha256:{hashlib.sha256(layer).hexdigest()}" != wanted["layer"]:
            yield "another layer"
    finally:
        close_all(fds)


def _read_layer(pipe: Any, slots: list[int]) -> Iterator[bytes]:
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
        if found.keys() != expected.keys():
            yield f"{where}: {found} has not the members of {expected}"
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
