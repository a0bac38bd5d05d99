"""Varlink clients that we did not write, each behind the same few functions."""

import ast
import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import asyncvarlink
from varlink.client import Client  # type: ignore[import-untyped]
from varlink.error import VarlinkError  # type: ignore[import-untyped]

from tests.paths import CHECKOUT
from tests.trixie import SYSTEM, get_trixie
from tests.varlink_client import SECONDS, Json

_SERVICE = "org.varlink.service"


class Refused(Exception):  # noqa: N818 - an answer of the service
    """An error reply."""

    def __init__(self, name: str, parameters: Json) -> None:
        """Take what the reply has."""
        super().__init__(name, parameters)
        self.name = name
        self.parameters = parameters


class Lost(Exception):  # noqa: N818 - an answer of the service
    """The service closed the connection."""


class ForeignClient(Protocol):
    """What all of them can do."""

    name: str

    def info(self) -> Json:
        """Return what the service tells about itself, numbers of versions and so on as text."""

    def describe(self, interface: str) -> str:
        """Return the IDL of an interface."""

    def call(self, method: str, **parameters: object) -> Json:
        """Return the reply to a call."""

    def more(self, method: str, **parameters: object) -> list[Json]:
        """Return all replies to a call."""


class OnewayClient(ForeignClient, Protocol):
    """One that can ask for no reply."""

    def oneway(self, method: str, **parameters: object) -> None:
        """Send a call that nobody answers."""


def varlinkctl_words() -> list[str]:
    """Return what starts systemd's varlinkctl of Debian 13 outside of that.

    Its own dynamic loader does: no chroot is needed, so ``exec:`` finds our programs.

    Raises:
        Unavailable: there is no such system.
    """
    root = get_trixie(SYSTEM)
    loader, *_ = root.glob("usr/lib*/ld-linux*.so.*")
    systemd, *_ = root.glob("usr/lib/*/systemd/libsystemd-shared-*.so")
    libraries = f"{systemd.parent}:{systemd.parent.parent}"
    return [str(loader), "--library-path", libraries, str(root / "usr/bin/varlinkctl")]


class Varlinkctl:
    """systemd's ``varlinkctl``, a process for each call."""

    name = "varlinkctl"

    def __init__(self, address: str, words: list[str]) -> None:
        """Take the address and what starts the program."""
        self._address = address
        self._words = words

    def run(self, *words: str) -> str:
        """Return what it prints."""
        done = subprocess.run(
            [*self._words, *words], capture_output=True, text=True, check=False, timeout=SECONDS
        )
        if "Connection reset by peer" in done.stderr:
            assert (done.returncode, done.stdout) == (1, "")
            raise Lost
        if refused := re.search(r"(?: failed| varlink call): (\S+)$", done.stderr, re.MULTILINE):
            assert done.returncode == 1
            raise Refused(refused[1], json.loads(done.stdout.rpartition("\x1e")[2] or "{}"))
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def info(self) -> Json:
        found: Json = json.loads(self.run("-j", "info", self._address))
        return found

    def describe(self, interface: str) -> str:
        return self.run("introspect", self._address, interface)

    def call(self, method: str, **parameters: object) -> Json:
        (found,) = self._call([], method, parameters)
        return found

    def more(self, method: str, **parameters: object) -> list[Json]:
        return self._call(["--more"], method, parameters)

    def oneway(self, method: str, **parameters: object) -> None:
        said = self.run("call", "--oneway", self._address, method, json.dumps(parameters))
        assert said == ""

    @contextmanager
    def start(self, method: str, **parameters: object) -> Iterator[Iterator[Json]]:
        """Start a call; yield its replies as they come.  The client is killed afterwards."""
        words = ["-j", "call", "--more", f"--timeout={SECONDS}", self._address, method]
        command = [*self._words, *words, json.dumps(parameters)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                yield (json.loads(line.lstrip("\x1e")) for line in process.stdout)
            finally:
                process.kill()

    def _call(self, options: list[str], method: str, parameters: Json) -> list[Json]:
        words = ["-j", "call", *options, self._address, method, json.dumps(parameters)]
        said = self.run(*words, "--timeout=infinity")
        pieces = said.split("\x1e")[1:] if options else [said]
        return [json.loads(piece or "{}") for piece in pieces]


class PypiCommand:
    """``python -m varlink.cli``, a process for each call; it exits with 0 after errors, too."""

    name = "pypi command"

    def __init__(self, address: str) -> None:
        """Take the address."""
        self._address = f"unix:{address}"

    def run(self, *words: str) -> str:
        """Return what it prints."""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "varlink.cli", *words],
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        said = done.stdout + done.stderr
        assert "Traceback" not in said
        if "Connection closed" in said:
            raise Lost
        return said

    def info(self) -> Json:
        head, _, names = self.run("info", self._address).partition("Interfaces:\n")
        pairs = [line.split(": ", 1) for line in head.splitlines()]
        return {key.lower(): value for key, value in pairs} | {"interfaces": names.split()}

    def describe(self, interface: str) -> str:
        return self.run("help", f"{self._address}/{interface}")

    def call(self, method: str, **parameters: object) -> Json:
        (found,) = self._call([], method, parameters)
        return found

    def more(self, method: str, **parameters: object) -> list[Json]:
        return self._call(["-m"], method, parameters)

    def _call(self, options: list[str], method: str, parameters: Json) -> list[Json]:
        said = self.run("call", *options, f"{self._address}/{method}", json.dumps(parameters))
        found, decoder = [], json.JSONDecoder()
        while said := said.lstrip():
            if said.startswith("{'error'"):
                error = ast.literal_eval(said)
                raise Refused(error["error"], error.get("parameters", {}))
            reply, end = decoder.raw_decode(said)
            found.append(reply)
            said = said[end:]
        return found or [{}]


class PypiLibrary:
    """The Python library of the same package; one connection for each interface."""

    name = "pypi library"

    def __init__(self, address: str) -> None:
        """Take the address."""
        self._client = Client(f"unix:{address}")
        self._opened: dict[str, Any] = {}

    def close(self) -> None:
        """Close all connections."""
        for connection in self._opened.values():
            connection.close()
        self._client.cleanup()

    def info(self) -> Json:
        return dict(self._open(_SERVICE).GetInfo())

    def describe(self, interface: str) -> str:
        with _translated():
            found: str = self._open(_SERVICE).GetInterfaceDescription(interface)["description"]
        return found

    def call(self, method: str, **parameters: object) -> Json:
        with _translated():
            return dict(self._find(method)(**parameters) or {})

    def more(self, method: str, **parameters: object) -> list[Json]:
        with _translated():
            return [dict(reply) for reply in self._find(method)(**parameters, _more=True)]

    def oneway(self, method: str, **parameters: object) -> None:
        assert self._find(method)(**parameters, _oneway=True) is None

    def _open(self, interface: str) -> Any:
        if interface not in self._opened:
            self._opened[interface] = self._client.open(interface)
        return self._opened[interface]

    def _find(self, method: str) -> Callable[..., Any]:
        interface, _, name = method.rpartition(".")
        found: Callable[..., Any] = getattr(self._open(interface), name)
        return found


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except VarlinkError as error:
        raise Refused(error.error(), dict(error.parameters() or {})) from error
    except (BrokenPipeError, ConnectionResetError) as error:
        raise Lost from error


class Asyncvarlink:
    """The low level of ``asyncvarlink``; one connection for all calls."""

    name = "asyncvarlink"

    def __init__(self, address: str) -> None:
        """Take the address."""
        self._address = address
        self._runner = asyncio.Runner()
        self._protocol: asyncvarlink.VarlinkClientProtocol | None = None

    def close(self) -> None:
        """Close the connection."""
        self._runner.run(self._close())
        self._runner.close()

    def info(self) -> Json:
        return self.call(f"{_SERVICE}.GetInfo")

    def describe(self, interface: str) -> str:
        told = self.call(f"{_SERVICE}.GetInterfaceDescription", interface=interface)
        found: str = told["description"]
        return found

    def call(self, method: str, **parameters: object) -> Json:
        return self.call_with([], method, parameters)[0]

    def call_with(
        self, fds: list[int], method: str, parameters: Json, *, upgrade: bool = False
    ) -> tuple[Json, list[int]]:
        """Return a reply and its descriptors, which are the caller's, to a call with some."""
        asked = asyncvarlink.VarlinkMethodCall(method, parameters, upgrade=upgrade)
        return self._runner.run(self._call(asked, fds))

    def more(self, method: str, **parameters: object) -> list[Json]:
        return [reply for reply, _ in self.more_with_fds(method, **parameters)]

    def more_with_fds(self, method: str, **parameters: object) -> list[tuple[Json, list[int]]]:
        """Return all replies with their descriptors, which are the caller's."""
        asked = asyncvarlink.VarlinkMethodCall(method, parameters, more=True)  # type: ignore[arg-type]
        return self._runner.run(self._call_more(asked))

    def oneway(self, method: str, **parameters: object) -> None:
        asked = asyncvarlink.VarlinkMethodCall(method, parameters, oneway=True)  # type: ignore[arg-type]
        self._runner.run(self._send(asked))

    def use(
        self,
        interface: type[asyncvarlink.VarlinkInterface],
        ask: Callable[[Any], Coroutine[Any, Any, None]],
    ) -> None:
        """Have something ask by the typed methods of an interface."""

        async def run() -> None:
            async with self._connected() as protocol:
                await ask(protocol.make_proxy(interface))

        self._runner.run(run())

    async def _connect(self) -> asyncvarlink.VarlinkClientProtocol:
        if self._protocol is None:
            kind = asyncvarlink.VarlinkClientProtocol
            _, self._protocol = await asyncvarlink.connect_unix_varlink(kind, self._address)
        return self._protocol

    async def _close(self) -> None:
        if self._protocol is not None:
            self._protocol.close()
            await asyncio.sleep(0)
            self._protocol = None

    async def _send(self, asked: asyncvarlink.VarlinkMethodCall) -> None:
        await (await self._connect()).call(asked)

    async def _call(
        self, asked: asyncvarlink.VarlinkMethodCall, fds: list[int]
    ) -> tuple[Json, list[int]]:
        done = asyncio.get_running_loop().create_future()
        try:
            async with self._connected() as protocol:
                answer = await protocol.call(asked, fds, done)
                assert answer is not None
                return _unpack(*answer)
        finally:
            done.set_result(None)

    async def _call_more(
        self, asked: asyncvarlink.VarlinkMethodCall
    ) -> list[tuple[Json, list[int]]]:
        async with self._connected() as protocol:
            return [_unpack(*answer) async for answer in protocol.call_more(asked)]

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[asyncvarlink.VarlinkClientProtocol]:
        try:
            yield await self._connect()
        except ConnectionError as error:
            await self._close()
            raise Lost from error


def _unpack(reply: Any, fds: Any) -> tuple[Json, list[int]]:
    if reply.error is not None:
        raise Refused(reply.error, dict(reply.parameters))
    return dict(reply.parameters), [os.dup(fd.fileno()) for fd in fds or ()]


@contextmanager
def foreign_client(name: str, address: Path, varlinkctl: list[str]) -> Iterator[Any]:
    """Yield a client by its name; nothing of it stays."""
    if name == Varlinkctl.name:
        yield Varlinkctl(str(address), varlinkctl)
    elif name == PypiCommand.name:
        yield PypiCommand(str(address))
    else:
        kind = PypiLibrary if name == PypiLibrary.name else Asyncvarlink
        with closing(kind(str(address))) as client:
            yield client
