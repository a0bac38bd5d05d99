"""The image proxy of skopeo, a process that gives images (spec repository 5.7).

``skopeo experimental-image-proxy`` answers requests on a socket; contents come through pipes.  It
answers one request after the other, and closes a pipe only when ``FinishPipe`` asks for that, which
it answers when the pipe was filled.  So that is asked at once, and several layers at a time need a
proxy each.
"""

import fcntl
import io
import json
import os
import re
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from cfs.compat import override
from cfs.errors import IntegrityError, SourceError, UnsupportedError
from cfs.linux.sockets import receive_fds
from cfs.repository.strict_json import load_json, parse_fields

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["Pipe", "Proxies", "Proxy"]

_NEEDED = (0, 2, 3)  # version of the protocol
_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,9}")
_MESSAGE_SIZE = 32 << 10  # maxMsgSize of skopeo's proxy.go
_PIPE_SIZE = 1 << 20
_SHOWN_SIZE = 600
_PATIENCE = 1.0  # seconds that a proxy has to clean up
_MAX_PROXIES = 4
# a proxy of this transport fetches the whole image when it opens it
_ONE_PROXY = "docker-daemon"


class Proxies:
    """The proxies of one image; any thread may lease one.

    ``_lock`` guards the lists.  One thread starts and ends them all, because the kernel ends a
    process with the thread that has started it (``PR_SET_PDEATHSIG`` of prctl(2)).
    """

    def __init__(self, image: str, command: Sequence[str]) -> None:
        self._image = image
        self._command = command
        self._lock = threading.Lock()
        self._idle: list[Proxy] = []
        self._all: list[Proxy] = []
        self._is_stopped = False
        self._keeper = ThreadPoolExecutor(1, "skopeo")
        is_costly = image.startswith(f"{_ONE_PROXY}:")
        self._free = threading.BoundedSemaphore(1 if is_costly else _MAX_PROXIES)

    @contextmanager
    def lease(self) -> Iterator["Proxy"]:
        """Own a proxy; it is not used again after an exception, nobody knows what it answers."""
        with self._free:
            with self._lock:
                proxy = self._idle.pop() if self._idle else None
            proxy = proxy or self._start()
            try:
                yield proxy
            except BaseException:
                proxy.close()
                raise
            with self._lock:
                self._idle.append(proxy)

    def stop(self) -> None:
        """Kill them all: whoever waits for one gets an error."""
        with self._lock:
            self._is_stopped = True
            for proxy in self._all:
                proxy.kill()

    def close(self) -> None:
        """End them all; nobody uses one any more."""
        self._keeper.submit(self._close_all).result()
        self._keeper.shutdown()

    def _start(self) -> "Proxy":
        proxy = self._keeper.submit(self._spawn).result()
        try:
            proxy.open(self._image)
        except BaseException:
            proxy.close()
            raise
        return proxy

    def _spawn(self) -> "Proxy":
        proxy = Proxy(self._command)
        with self._lock:
            self._all.append(proxy)
            if self._is_stopped:
                proxy.kill()
        return proxy

    def _close_all(self) -> None:
        for proxy in self._all:
            proxy.close()


class Proxy:
    """A process of skopeo with the image opened; one thread at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._image: object = None
        self._log = os.memfd_create("skopeo", os.MFD_CLOEXEC)  # never full, as a pipe can be
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603 - no shell; values are behind "="
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=self._log
                )
        except BaseException:
            self._channel.close()
            os.close(self._log)
            raise

    def open(self, image: str) -> None:
        """Agree on the protocol and open the image.

        Raises:
            UnsupportedError: skopeo is too old.
            SourceError: skopeo cannot open it.
        """
        try:
            version = self._ask("Initialize")
        except SourceError as error:
            msg = f"the image proxy of skopeo does not start: {error}"
            raise UnsupportedError(msg) from None
        if not isinstance(version, str) or _parse_version(version) < _NEEDED:
            needed = ".".join(map(str, _NEEDED))
            found = _one_line(str(version))
            msg = f"skopeo is too old: its image proxy has version {found}, expected {needed}"
            raise UnsupportedError(msg)
        try:
            self._image = self._ask("OpenImage", image)
        except SourceError as error:
            msg = f"{image}: {error}"
            raise SourceError(msg) from None

    def fetch(
        self, method: str, *arguments: str | int, what: str, is_checked: bool = True
    ) -> tuple["Pipe", object]:
        """Ask for contents of the image.

        Args:
            method: one whose reply comes with a pipe.
            arguments: behind the number of the image.
            what: is fetched, for messages.
            is_checked: whether skopeo's verdict at the end counts.

        Returns:
            The contents, owned by the caller, and the value of the reply.

        Raises:
            SourceError: skopeo cannot fetch it.
        """
        try:
            value, pipe, fd = self._call(method, self._image, *arguments)
        except SourceError as error:
            msg = f"{what}: {error}"
            raise SourceError(msg) from None
        if fd < 0 or not stat.S_ISFIFO(os.fstat(fd).st_mode):
            self._drop(fd)
            msg = f"skopeo gave no pipe for {method}"
            raise SourceError(msg)
        contents = Pipe(self, fd, what, is_checked=is_checked)
        try:
            self._send("FinishPipe", pipe)
        except BaseException:
            contents.close()
            raise
        return contents, value

    def finish(self) -> None:
        """Wait for the answer to ``FinishPipe``, when all contents were read.

        Raises:
            SourceError: skopeo has found that something was wrong.
        """
        self._drop(self._receive()[2])

    def kill(self) -> None:
        """Kill the process; another thread may use it."""
        self._process.kill()

    def close(self) -> None:
        """End the process; more than once, too."""
        if self._log < 0:
            return
        self._channel.close()  # it removes its temporary files then
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:  # it waits for the network
            self._process.kill()
            self._process.wait()
        os.close(self._log)
        self._log = -1

    def _ask(self, method: str, *arguments: object) -> object:
        """Return the value of a reply that comes without a pipe."""
        value, _, fd = self._call(method, *arguments)
        self._drop(fd)
        return value

    @staticmethod
    def _drop(fd: int) -> None:
        if fd >= 0:  # which nobody has asked for
            os.close(fd)

    def _call(self, method: str, *arguments: object) -> tuple[object, object, int]:
        """Return value, number and descriptor (or -1) of the pipe."""
        self._send(method, *arguments)
        return self._receive()

    def _send(self, method: str, *arguments: object) -> None:
        try:
            self._channel.send(json.dumps({"method": method, "args": arguments}).encode())
        except (BrokenPipeError, ConnectionResetError):
            raise self._explain_end() from None

    def _receive(self) -> tuple[object, object, int]:
        try:
            message, fds = receive_fds(self._channel, _MESSAGE_SIZE, 1)
        except ConnectionResetError:
            message, fds = b"", []
        if not message:
            raise self._explain_end()
        try:
            value, pipe = _parse_reply(message)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return value, pipe, fds[0] if fds else -1

    def _explain_end(self) -> SourceError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        status = self._process.returncode
        how = "without a word" if status is None else f"with exit status {status}"
        if status is not None and status < 0:
            how = f"by signal {-status}"  # some have no names
        size = os.fstat(self._log).st_size
        log = os.pread(self._log, _SHOWN_SIZE, max(0, size - _SHOWN_SIZE))
        last = (log.decode(errors="replace").strip().splitlines() or [""])[-1]
        return SourceError(_one_line(f"skopeo ended {how}: {last}").removesuffix(":"))


class Pipe(io.RawIOBase):
    """Contents that a proxy hands over; at their end it tells whether they were right."""

    def __init__(self, proxy: Proxy, fd: int, what: str, *, is_checked: bool) -> None:
        self._proxy = proxy
        self._fd = fd
        self._what = what
        self._is_checked = is_checked
        self._is_finished = False
        with suppress(OSError):  # there is a limit for all pipes of a user
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)

    @override
    def readable(self) -> bool:
        """Yes."""
        return True

    @override
    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Read some bytes; 0 at the end.

        Raises:
            IntegrityError: at the end: skopeo says that something is wrong.
            OSError: reading failed.
        """
        size = os.readv(self._fd, [buffer])
        if size == 0 and not self._is_finished:
            self._is_finished = True
            try:
                self._proxy.finish()
            except SourceError as error:
                if self._is_checked:
                    msg = f"{self._what}: {error}"
                    raise IntegrityError(msg) from None
        return size

    @override
    def close(self) -> None:
        """Close the pipe; the proxy cannot be used again unless its end was read."""
        if not self.closed:
            os.close(self._fd)
        super().close()


def _parse_reply(message: bytes) -> tuple[object, object]:
    """Return value and number of the pipe, unless the request has failed."""
    what = "skopeo's reply"
    reply = parse_fields(load_json(message, what), what, ("success", "value", "pipeid", "error"))
    if reply.get("success") is not True:
        raise SourceError(_one_line(str(reply.get("error") or "skopeo failed")))
    return reply.get("value"), reply.get("pipeid")


def _parse_version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("."))) if _VERSION.fullmatch(text) else ()


def _one_line(text: str) -> str:
    """Return what a registry may have had a hand in, fit for a terminal."""
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else "?" for char in line)[:_SHOWN_SIZE]
