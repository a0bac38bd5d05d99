"""Who takes part in ``bench/mounts.py``: how each mount starts, what its server costs, its end."""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from side_by_side import c_tool

from cfs.linux.mounts import detach_mount

__all__ = ["Contestant", "Ground", "MountFailed", "Server", "adopt_orphans", "all_contestants"]

_PR_SET_CHILD_SUBREAPER = 36
_SECONDS = 60  # to start or to end
_TICKS = os.sysconf("SC_CLK_TCK")


class MountFailed(Exception):  # noqa: N818 - an event of the contest, not an error of ours
    """A contestant does not start, or not any more."""


@dataclass(frozen=True, slots=True)
class Ground:
    """Directory in which the contest takes place.

    Attributes:
        path: holds ``objects``, images ``NAME.cfs``, ``repository`` and the mount point ``mnt``.
        tools: paths given for names of tools.
    """

    path: Path
    tools: Mapping[str, str] = field(default_factory=dict)

    @property
    def objects(self) -> Path:
        """The objects directory."""
        return self.path / "objects"

    @property
    def mountpoint(self) -> Path:
        """Where everybody mounts, one after the other."""
        return self.path / "mnt"

    @property
    def repository(self) -> Path:
        """Repository of composefs-rs with the same objects."""
        return self.path / "repository"

    def image(self, name: str) -> Path:
        """Return the path of an image file."""
        return self.path / f"{name}.cfs"

    def digest(self, name: str) -> str:
        """Return the digest of an image, by which composefs-rs knows it."""
        return self.path.joinpath(f"{name}.digest").read_text().strip()

    def tool(self, name: str) -> str | None:
        """Return the path of a peer's program: as given, else as found."""
        return self.tools.get(name) or c_tool(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One way to mount an image.

    Attributes:
        name: short, without blanks.
        title: what it is, for the legend.
        command: mounts ``{image}``, the path, or ``{digest}`` at ``{mountpoint}`` and returns.
        environment: more variables for it.
        lacking: why it cannot take part; empty: it can.
    """

    name: str
    title: str
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    lacking: str = ""

    @contextmanager
    def mounted(self, ground: Ground, image: str) -> "Iterator[Server]":
        """Mount while the block runs.

        Raises:
            MountFailed: with the last line that the command wrote.
        """
        words = {
            "image": ground.image(image),
            "digest": ground.digest(image),
            "mountpoint": ground.mountpoint,
        }
        command = [word.format_map(words) for word in self.command]
        before = _descendants()
        try:
            seconds = _start(command, {**os.environ, **self.environment}, ground.mountpoint)
            server = Server(ground.mountpoint, seconds, sorted(_descendants() - before))
        except BaseException:
            _unmount(ground.mountpoint)
            _end(_descendants() - before)
            raise
        try:
            yield server
        finally:
            _unmount(ground.mountpoint)
            _end(server.pids)


@dataclass(frozen=True, slots=True)
class Server:
    """A mount that serves.

    Attributes:
        mountpoint: where.
        start_seconds: from exec of the command to the first stat that succeeded.
        pids: processes that serve it; none for the kernel's own mounts.
    """

    mountpoint: Path
    start_seconds: float
    pids: Sequence[int]

    def cpu_seconds(self) -> float:
        """Return what the server's processes have used so far."""
        ticks = 0
        for pid in self.pids:
            with suppress(FileNotFoundError):  # a helper of the start, ended since
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / _TICKS

    def peak_bytes(self) -> int:
        """Return the sum of the largest resident sizes, shared pages included."""
        lines: list[str] = []
        for pid in self.pids:
            with suppress(FileNotFoundError):
                lines += Path(f"/proc/{pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def adopt_orphans() -> None:
    """Let servers that leave their starter become children of this process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _descendants() -> set[int]:
    """Return all processes below this one, however they were started."""
    parents = {}
    for entry in os.listdir("/proc"):
        with suppress(OSError, ValueError):
            text = Path("/proc", str(int(entry)), "stat").read_text()
            state, parent = text.rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry)] = int(parent)
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return ours - {os.getpid()}


def _start(command: Sequence[str], environment: Mapping[str, str], mountpoint: Path) -> float:
    """Run the command; return the seconds until something else is seen at the mount point."""
    before = os.stat(mountpoint).st_dev
    start = time.perf_counter()
    with open(mountpoint.with_name("messages"), "w+b") as messages:
        process = subprocess.Popen(  # noqa: S603 - one of the contestants
            command, env=environment, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages
        )
        seconds = 0.0
        while not seconds:
            status = process.poll()
            if os.stat(mountpoint).st_dev != before:
                seconds = time.perf_counter() - start
            elif status is not None or time.perf_counter() - start > _SECONDS:
                break
            else:
                time.sleep(0.0005)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS)
        if process.returncode != 0 or not seconds:
            process.kill()
            process.wait()
            messages.seek(0)
            lines = messages.read().decode(errors="replace").splitlines()
            raise MountFailed(lines[-1] if lines else f"status {process.returncode}, no mount")
    return seconds


def _unmount(mountpoint: Path) -> None:
    """Take away whatever is mounted there."""
    while os.path.ismount(mountpoint):
        detach_mount(str(mountpoint))


def _end(pids: Sequence[int] | set[int]) -> None:
    """Wait until servers have ended; kill those that do not."""
    for pid in pids:
        with suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
            try:
                if not select.select([process], [], [], _SECONDS)[0]:
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    select.select([process], [], [], _SECONDS)
            finally:
                os.close(process)
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def all_contestants(ground: Ground) -> list[Contestant]:
    """Return everybody, those that lack a program too; the kernel first."""
    return [_kernel(ground), *_ours(ground), _c_fuse(ground), *_rust(ground)]


def _ours(ground: Ground) -> Iterator[Contestant]:
    own = Path(sys.executable).with_name("cfsctl")
    program = ground.tools.get("cfs") or (str(own) if own.exists() else shutil.which("cfsctl"))
    every = f"workers={min(len(os.sched_getaffinity(0)), 16)}"  # said, so that none is an error
    ways = {
        "cfs": ("ours, a worker for each processor: the default", every),
        "cfs-1": ("ours, one worker", "workers=1"),
        "cfs-0": ("ours, pyfuse3 alone", "workers=0"),
        "cfs-passthrough": ("ours, passthrough", f"passthrough,{every}"),
        "cfs-overlay": ("ours, metadata only, under overlayfs", f"mode=overlay,{every}"),
    }
    for name, (title, items) in ways.items():
        command = [program or "", "--no-repo", "fuse-serve", "-o", items]
        command += ["--background", "--basedir", str(ground.objects), "{image}", "{mountpoint}"]
        lacking = "" if program else "cfsctl is not installed"
        yield Contestant(name=name, title=title, command=command, lacking=lacking)


def _kernel(ground: Ground) -> Contestant:
    """Return EROFS from the file and overlayfs, as C's ``mount.composefs`` makes them."""
    tool = ground.tool("mount.composefs")
    return Contestant(
        name="kernel",
        title="the kernel's EROFS and overlayfs, by C `mount.composefs`",
        command=[tool or "", "{image}", "{mountpoint}", "-o", f"basedir={ground.objects}"],
        lacking="" if tool else "mount.composefs not found",
    )


def _c_fuse(ground: Ground) -> Contestant:
    tool = ground.tool("composefs-fuse")
    return Contestant(
        name="c-fuse",
        title="C `composefs-fuse`",
        command=[tool or "", "-o", f"source={{image}},basedir={ground.objects}", "{mountpoint}"],
        lacking="" if tool else "composefs-fuse not found",
    )


def _rust(ground: Ground) -> Iterator[Contestant]:
    """Yield composefs-rs's two ways; it takes overlay where it finds that a probe succeeds."""
    tool = ground.tool("cfsctl")
    command = [tool or "", "--repo", str(ground.repository), "--insecure", "mount", "--fuse", "yes"]
    command += ["{digest}", "{mountpoint}"]
    lacking = "" if tool else "composefs-rs's cfsctl not found"
    yield Contestant(
        name="rs",
        title="composefs-rs `cfsctl mount --fuse yes`, plain",
        command=command,
        environment={"TMPDIR": "/dev/null"},  # the probe for overlay mode needs a directory there
        lacking=lacking,
    )
    yield Contestant(
        name="rs-overlay",
        title="composefs-rs, metadata only, under overlayfs: its default for root",
        command=command,
        lacking=lacking,
    )
