"""``--connect`` with a service that does not answer: Ctrl-C, and its end."""

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.command_line import command, environment
from tests.integration.waiting import wait_until
from tests.varlink_client import SECONDS


class Silent:
    """A service that opens a store, answers nothing else, and remembers the calls."""

    def __init__(self, path: Path) -> None:
        self.calls: list[str] = []
        self.nr_ended = 0
        self._channels: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
        self._listener.close()

    def hang_up(self) -> None:
        for channel in self._channels:
            with suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                channel, _ = self._listener.accept()
                self._channels.append(channel)
                self._threads.append(threading.Thread(target=self._serve, args=(channel,)))
                self._threads[-1].start()

    def _serve(self, channel: socket.socket) -> None:
        reader = channel.makefile("rb")
        with channel, reader:
            data = b""
            while piece := reader.read1():
                data += piece
                while b"\0" in data:
                    message, _, data = data.partition(b"\0")
                    call = json.loads(message)
                    self.calls.append(call["method"].rpartition(".")[2])
                    if self.calls[-1] == "OpenRepository":
                        channel.sendall(b'{"parameters":{"handle":7}}\0')
        self.nr_ended += 1


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Silent]:
    service = Silent(tmp_path / "silent")
    yield service
    service.close()


@contextmanager
def running(words: Sequence[str], directory: Path) -> "Iterator[subprocess.Popen[str]]":
    """Run ``cfsctl`` within a block; its stdin is a pipe that stays open."""
    with subprocess.Popen(
        [*command("cfsctl"), *words],
        cwd=directory,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (["fsck"], "Fsck"),
        (["oci", "pull", "-q", "oci:/x"], "Pull"),
        (["mount", "--fuse", "--foreground", "x", "."], "FuseServe"),
        (["oci", "import-layer", f"sha256:{0:064}"], "HasLayer"),
        (["ps"], "ListMounts"),
    ],
    ids=" ".join,
)
def test_ctrl_c_ends_the_call_and_leaves_no_store_open(
    tmp_path: Path, silent: Silent, words: list[str], method: str
) -> None:
    with running(["--connect", "./silent", *words], tmp_path) as process:
        wait_until(lambda: method in silent.calls or process.poll() is not None, "it calls")
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=SECONDS)
    assert (process.returncode, *output) == (130, "", "\n")  # so that the prompt has a line
    expected = ["OpenRepository", method, "CloseRepository"] if method != "ListMounts" else [method]
    nr_connections = 1 + (method != "ListMounts")
    wait_until(lambda: silent.nr_ended == nr_connections, "it has gone")
    assert silent.calls == expected


def test_a_service_that_dies_is_an_error(tmp_path: Path, silent: Silent) -> None:
    with running(["--connect", "./silent", "fsck"], tmp_path) as process:
        wait_until(lambda: "Fsck" in silent.calls, "it calls")
        silent.hang_up()
        output = process.communicate(timeout=SECONDS)
    message = "Error: the service has closed the connection\n"
    assert (process.returncode, *output) == (1, "", message)
