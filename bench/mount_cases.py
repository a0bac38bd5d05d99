"""What ``bench/mounts.py`` does on a mount, and what the figures should be."""

import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GOALS", "SEQUENCES", "CaseSequence", "ClientFailed", "Goal", "Step"]

_SECONDS = 600
_FIND = "find ."
_STAT_WALK = r"find . -printf '%y %m %U %G %s %p\n'"  # %t and %u cost the client more than all
_LONG_LIST = "ls -lR"
_READ_ALL = "find . -type f -exec cat {} +"
_TAR = "sh -c 'tar -cf - . | cat'"  # tar does not read files if it writes to /dev/null


class ClientFailed(Exception):  # noqa: N818 - an event of the contest, not an error of ours
    """A program that uses the mount failed or hung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One program, or several at once, on a mount.

    Attributes:
        case: what is reported.
        command: as for a shell, without redirections; ``{reads}`` is the helper of that name,
            which prints its own seconds.
        processes: how many of them, at once.
    """

    case: str
    command: str
    processes: int = 1

    def run(self, mountpoint: Path, reads: Path, *, may_fail: bool) -> float:
        """Return the seconds until the last of them has ended.

        Args:
            mountpoint: their working directory.
            reads: the helper.
            may_fail: do not look at the status: composefs-rs 0.9 cannot open empty files.

        Raises:
            ClientFailed: with what it wrote.
        """
        words = [str(reads) if word == "{reads}" else word for word in shlex.split(self.command)]
        is_helper = "{reads}" in self.command
        start = time.perf_counter()
        clients = [
            subprocess.Popen(  # noqa: S603 - a command from below
                words,
                cwd=mountpoint,
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if is_helper else subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if may_fail else subprocess.PIPE,
            )
            for _ in range(self.processes)
        ]
        texts = [_finish(client, self.case) for client in clients]
        seconds = time.perf_counter() - start
        failed = any(client.returncode for client in clients)
        if failed and (is_helper or not may_fail):
            lines = [error for _, error in texts if error]
            raise ClientFailed(f"{self.case}: {lines[0].splitlines()[0] if lines else 'failed'}")
        return float(texts[0][0]) if is_helper else seconds


def _finish(client: "subprocess.Popen[bytes]", case: str) -> tuple[str, str]:
    try:
        out, error = client.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        client.kill()
        raise ClientFailed(f"{case}: not done after {_SECONDS} s") from None
    return (out or b"").decode(), (error or b"").decode(errors="replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseSequence:
    """Steps on one fresh mount, in this order."""

    name: str
    image: str
    steps: Sequence[Step]


def _twice(name: str, what: str, command: str) -> CaseSequence:
    steps = [Step(case=f"{what}, {time_}", command=command) for time_ in ("first", "second")]
    return CaseSequence(name=name, image="tree", steps=steps)


def _at_once(name: str, what: str, command: str, processes: int) -> CaseSequence:
    case = f"{what}, first, {processes} processes"
    steps = [Step(case=case, command=command, processes=processes)]
    return CaseSequence(name=f"{name}-{processes}", image="tree", steps=steps)


def _random(processes: int) -> CaseSequence:
    case = f"random 4 KiB reads, {processes} process{'es' if processes > 1 else ''}"
    steps = [Step(case=case, command=f"{{reads}} random big {processes}")]
    return CaseSequence(name=f"random-{processes}", image="big", steps=steps)


SEQUENCES = (
    CaseSequence(
        name="names",
        image="tree",
        steps=[
            Step(case="find, names only, first", command=_FIND),
            Step(case="find -printf after names only", command=_STAT_WALK),
        ],
    ),
    _twice("printf", "find -printf", _STAT_WALK),
    _twice("ls", "ls -lR", _LONG_LIST),
    _twice("read", "read all files", _READ_ALL),
    _twice("tar", "tar", _TAR),
    _at_once("ls", "ls -lR", _LONG_LIST, 2),
    _at_once("ls", "ls -lR", _LONG_LIST, 8),
    _at_once("read", "read all files", _READ_ALL, 2),
    _at_once("read", "read all files", _READ_ALL, 8),
    CaseSequence(
        name="seq",
        image="big",
        steps=[
            Step(case=f"read 1 GiB, {time_}", command="{reads} seq big 1")
            for time_ in ("first", "second")
        ],
    ),
    _random(1),
    _random(2),
    _random(8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a case should take, as ratio to the kernel's seconds in the same run.

    Attributes:
        case: of a step.
        contestant: whose ratio it is.
        idle: at most this, on an idle machine.
        busy: at most this, with one processor kept busy.
        is_throughput: the text gives the inverse.
    """

    case: str
    contestant: str = "cfs"
    idle: float
    busy: float
    is_throughput: bool = False


def _throughput(case: str, share: float) -> Goal:
    limit = 1 / share
    return Goal(case=case, contestant="cfs-passthrough", idle=limit, busy=limit, is_throughput=True)


GOALS = (
    Goal(case="find, names only, first", idle=4.0, busy=2.0),
    Goal(case="find -printf, first", idle=1.0, busy=1.0),
    Goal(case="find -printf, second", idle=0.9, busy=0.9),
    Goal(case="ls -lR, first", idle=0.8, busy=0.8),
    Goal(case="ls -lR, second", idle=0.6, busy=0.6),
    Goal(case="read all files, first", idle=1.5, busy=1.5),
    Goal(case="read all files, second", idle=1.0, busy=1.0),
    Goal(case="tar, first", idle=1.3, busy=1.3),
    Goal(case="tar, second", idle=1.0, busy=1.0),
    _throughput("read 1 GiB, first", 0.95),
    _throughput("random 4 KiB reads, 1 process", 0.65),
)
