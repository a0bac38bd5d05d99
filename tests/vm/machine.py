"""A virtual machine that runs commands."""

import base64
import json
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.vm.cache import Unavailable
from tests.vm.disks import find_command, get_initramfs, get_package_disk, get_system_disk
from tests.vm.kernel import get_kernel

__all__ = ["Done", "Machine", "MachineEnded", "System", "Unavailable", "prepare"]

_BOOT_SECONDS = 120
_COMMAND_SECONDS = 60
_MEMORY_MB = 768
_NOTE_SIZE = 1500
# cmpxchg16b, as QEMU 7.2 emulates it, spoils the flags now and then: the kernel must do without
# no_timer_check: on a busy machine the emulated timer comes too late for that check, and it panics
_KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 mitigations=off clearcpuid=cx16 no_timer_check nowatchdog"
)


def prepare() -> None:
    """Make all that is kept in the cache.

    Raises:
        Unavailable: QEMU, the kernel or something else is missing here.
    """
    find_command("qemu-system-x86_64")
    get_initramfs(get_kernel())
    get_system_disk()
    get_package_disk()


class MachineEnded(Exception):  # noqa: N818 - it may well have been killed
    """The machine ended before the command did."""


class Done(NamedTuple):
    """What a command left; its status is negative after a signal, 124 after its deadline."""

    status: int
    stdout: bytes
    stderr: bytes

    def check(self) -> str:
        """Return standard output as text; the command must have succeeded."""
        assert self.status == 0, (self.status, self.stderr.decode(errors="replace"))
        return self.stdout.decode()


class System(NamedTuple):
    """What a machine boots.

    Attributes:
        initramfs: archive.
        disks: read-only, from ``/dev/vda`` on.
        arguments: more of them for the kernel.
    """

    initramfs: Path
    disks: Sequence[Path]
    arguments: str = ""


class Machine:
    """A booted machine; ``/dev/vdc`` and so on are the disks.

    Emulation is slow, so boot one for a whole test module.

    Args:
        directory: for the console's log.
        disks: image files, written to as the guest writes.
        system: what it boots; None: this machine's Python and cfs.

    Raises:
        Unavailable: QEMU, the kernel or something else is missing here.
    """

    def __init__(
        self, directory: Path, disks: Sequence[Path] = (), *, system: System | None = None
    ) -> None:
        kernel = get_kernel()
        system = system or System(get_initramfs(kernel), [get_system_disk(), get_package_disk()])
        self.console = directory / "console.log"
        self._socket, theirs = socket.socketpair()
        drives = [(disk, "on") for disk in system.disks]
        drives += [(disk, "off") for disk in disks]
        command = [
            find_command("qemu-system-x86_64"),
            *("-machine", "pc,accel=tcg", "-cpu", "max"),
            *("-m", str(_MEMORY_MB), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-no-reboot", "-serial", f"file:{self.console}"),
            *("-kernel", str(kernel.image), "-initrd", str(system.initramfs)),
            *("-append", f"{_KERNEL_ARGUMENTS} {system.arguments}"),
            *("-chardev", f"socket,id=agent,fd={theirs.fileno()}"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent"),
        ]
        for number, (image, readonly) in enumerate(drives):
            drive = f"file={image},if=none,id=d{number},format=raw,cache=writeback"
            locking = ",file.locking=off" if readonly == "on" else ""
            command += ["-drive", f"{drive},readonly={readonly}{locking}"]
            command += ["-device", f"virtio-blk-pci,drive=d{number}"]
        with theirs:
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        self._answers: dict[int, Future[Done]] = {}
        self._lock = threading.Lock()  # guards the answers and what is sent
        self._ready: Future[Done] = Future()
        self._answers[0] = self._ready
        self._last_id = 0
        self._reader = threading.Thread(target=self._read_answers, daemon=True)
        self._reader.start()
        try:
            self._ready.result(_BOOT_SECONDS)
        except BaseException as error:
            self.kill()
            error.add_note(self.console.read_text(errors="replace")[-_NOTE_SIZE:])
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(
        self,
        *argv: str | Path,
        stdin: bytes = b"",
        seconds: float = _COMMAND_SECONDS,
        env: Mapping[str, str] | None = None,
    ) -> "Future[Done]":
        """Start a command; several may run at once.  After its deadline it is killed."""
        future: Future[Done] = Future()
        with self._lock:
            self._last_id += 1
            request = {
                "id": self._last_id,
                "argv": [str(word) for word in argv],
                "input": base64.b64encode(stdin).decode(),
                "seconds": seconds,
                "env": dict(env or {}),
            }
            self._answers[self._last_id] = future
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        return future

    def run(
        self,
        *argv: str | Path,
        stdin: bytes = b"",
        seconds: float = _COMMAND_SECONDS,
        env: Mapping[str, str] | None = None,
    ) -> Done:
        """Run a command to its end.

        Raises:
            MachineEnded: killed, or the guest's kernel panicked.
        """
        future = self.start(*argv, stdin=stdin, seconds=seconds, env=env)
        try:
            return future.result(seconds + _COMMAND_SECONDS)
        except FutureTimeoutError as error:
            error.add_note(self.console.read_text(errors="replace")[-_NOTE_SIZE:])
            raise

    def cfsctl(self, *argv: str | Path, **options: Any) -> Done:
        """Run ``cfsctl`` as :meth:`run` does, in an interpreter that has loaded it already."""
        return self.run("@cfs.cli.main", *argv, **options)

    def shell(self, script: str, *, seconds: float = _COMMAND_SECONDS) -> Done:
        """Run a script of the guest's shell."""
        return self.run("sh", "-euc", script, seconds=seconds)

    def kill(self) -> None:
        """Cut the power: what the guest has not written to its disks is lost.  Idempotent."""
        if self._socket.fileno() < 0:
            return
        self._process.kill()
        self._process.wait()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def _read_answers(self) -> None:
        with self._socket.makefile("rb") as lines:
            for line in lines:
                answer = json.loads(line)
                with self._lock:
                    future = self._answers.pop(answer["id"])
                stdout, stderr = (
                    base64.b64decode(answer.get(name, "")) for name in ("stdout", "stderr")
                )
                future.set_result(Done(answer.get("status", 0), stdout, stderr))
        with self._lock:
            for future in self._answers.values():
                future.set_exception(MachineEnded(f"status {self._process.poll()}"))
            self._answers.clear()
