"""Start a session process, wait until it serves, stop it.

Runs in the command or the service; imports neither pyfuse3 nor trio.  A ``Mount`` belongs to
the thread that started it.  The session takes its mount down when its starter goes, however
that ends, unless :meth:`Mount.leave` was called.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from cfs.errors import MountError
from cfs.fuse.shared import publish
from cfs.inodes import InodeVector
from cfs.linux.fusedev import abort_connection
from cfs.mount import FuseMount, detach, prepare_mountpoint

__all__ = ["Mount", "serve", "serve_foreground", "start"]

StrPath = str | os.PathLike[str]
_START_SECONDS = 60
_GRACE_SECONDS = 1.0
_MESSAGE_SIZE = 256


class Mount:
    """A mount that serves, and its session process.

    Attributes:
        mountpoint: without symlinks.
        device: device number, ``st_dev`` of everything in it.
        pid: of the session process, a child of this one.
    """

    def __init__(
        self,
        mountpoint: str,
        device: int,
        process: "subprocess.Popen[bytes]",
        channel: socket.socket,
    ) -> None:
        self.mountpoint = mountpoint
        self.device = device
        self.pid = process.pid
        self._process = process
        self._channel = channel

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the session has ended; return its status, 0 after any unmount.

        Raises:
            TimeoutError: it still serves after ``timeout`` seconds.
        """
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            msg = f"{self.mountpoint} still serves after {timeout} s"
            raise TimeoutError(msg) from None
        self._channel.close()
        return status

    def unmount(self, grace: float = _GRACE_SECONDS) -> None:
        """Take the mount out of the tree at once, and end the session.

        Idempotent; does nothing more when the mount was unmounted from outside.

        Args:
            grace: seconds that those who still use it have; then they get errors.

        Raises:
            MountError: it cannot be unmounted.
        """
        if self._process.poll() is None:
            detach(self.mountpoint, self.device)
        try:
            self.wait(grace)
        except TimeoutError:
            self._abort()

    def _abort(self) -> None:
        """End the connection: by the session if it still listens, else by the kernel."""
        with suppress(OSError):
            self._channel.send(b"end")
        try:
            self.wait(_GRACE_SECONDS)
        except TimeoutError:
            with suppress(OSError):  # fusectl is not mounted everywhere
                abort_connection(self.device)
            self._process.kill()
            self.wait()

    def leave(self) -> None:
        """Let the session serve on when this process ends."""
        self._channel.send(b"stay")
        self._channel.close()


def start(
    vector: InodeVector,
    mountpoint: StrPath,
    basedirs: Sequence[StrPath],
    *,
    name: str,
    allow_other: bool = False,
    background: bool = False,
    grace: float = _GRACE_SECONDS,
) -> Mount:
    """Mount a vector and return when it serves.

    Args:
        vector: mount view of an image.
        mountpoint: existing directory.
        basedirs: objects directories, searched in this order.
        name: of the image, shown as mount source ``composefs:NAME``.
        allow_other: let other users in.
        background: give the session no standard streams.
        grace: seconds for those who use the mount when the session is told to end.

    Raises:
        MountError: the mount point, the kernel, fusermount3 or the session failed.
        OSError: an objects directory cannot be opened.
    """
    target = prepare_mountpoint(os.fspath(mountpoint))
    with ExitStack() as stack:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        objects = [_owned(stack, os.open(directory, flags)) for directory in basedirs]
        memfd = _owned(stack, publish(vector))
        mount = stack.enter_context(closing(FuseMount(target, name, allow_other=allow_other)))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = None
        try:
            with theirs:
                fds = {"vector": memfd, "device": mount.device_fd, "status": theirs.fileno()}
                settings = {**fds, "objects": objects, "mountpoint": target, "grace": grace}
                process = _spawn(settings, [*fds.values(), *objects], background=background)
            _wait_until_serving(ours)
            device = mount.attach()
            ours.send(f"mounted {device}".encode())
        except BaseException:
            ours.close()
            mount.discard()
            if process is not None:
                process.kill()
                process.wait()
            raise
    return Mount(target, device, process, ours)


def _owned(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _spawn(
    settings: dict[str, object], fds: Sequence[int], *, background: bool
) -> "subprocess.Popen[bytes]":
    """Execute the session with the descriptors that ``settings`` names, away from the terminal."""
    # -P: a cfs directory where we happen to stand must not be imported
    command = [sys.executable, "-P", "-m", "cfs.fuse.session", json.dumps(settings)]
    here = str(Path(__file__).parents[2])
    paths = [here, os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [here]
    return subprocess.Popen(  # noqa: S603 - our own program
        command,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths)),
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if background else None,
        start_new_session=True,
    )


def _wait_until_serving(channel: socket.socket) -> None:
    """Wait for the session's word; its death is a failure too."""
    channel.settimeout(_START_SECONDS)
    try:
        message = channel.recv(_MESSAGE_SIZE)
    except TimeoutError:
        message = f"failed: did not serve within {_START_SECONDS} s".encode()
    channel.settimeout(None)
    if message != b"serving":
        reason = message.decode(errors="replace").removeprefix("failed: ")
        msg = f"FUSE session: {reason or 'ended before it served'}"
        raise MountError(msg)


@contextmanager
def serve(
    vector: InodeVector,
    mountpoint: StrPath,
    basedirs: Sequence[StrPath],
    *,
    name: str,
    allow_other: bool = False,
    grace: float = _GRACE_SECONDS,
) -> Iterator[Mount]:
    """Serve a vector while the block runs; arguments and errors as for :func:`start`."""
    mount = start(vector, mountpoint, basedirs, name=name, allow_other=allow_other, grace=grace)
    try:
        yield mount
    finally:
        mount.unmount(grace)


def serve_foreground(
    mount: Mount, *, grace: float = _GRACE_SECONDS, notify_socket: str | None = None
) -> int:
    """Serve until SIGINT, SIGTERM or an outside unmount; return the exit status.

    Main thread only, because of the signals.

    Args:
        mount: what :func:`start` gave.
        grace: as for :meth:`Mount.unmount`.
        notify_socket: where to send ``READY=1`` (systemd's ``NOTIFY_SOCKET``).
    """
    with _signal_pipe() as signals, ExitStack() as stack:
        ended = _owned(stack, os.pidfd_open(mount.pid))
        if notify_socket:
            _notify(notify_socket, b"READY=1")
        readable, _, _ = select.select([signals, ended], [], [])
        if ended not in readable:
            mount.unmount(grace)
            return 0
    return 0 if mount.wait() == 0 else 1


@contextmanager
def _signal_pipe() -> Iterator[int]:
    """Make SIGINT and SIGTERM readable instead of deadly."""
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.settimeout(0)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        handlers = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield reader.fileno()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)


def _notify(path: str, message: bytes) -> None:
    """Tell systemd; sd_notify(3)."""
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(message, address)
