"""Eight processes that do everything at random, interrupted by signals.

``CFS_LOAD_SECONDS`` is how long (default 30).
"""

import errno
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cfs.fuse import Mount, Passthrough, ServeOptions, start
from tests.integration.hammers import Hammers, dropping_caches, hammering, make_tree

pytestmark = pytest.mark.usefixtures("fuse", "root")
pytest.importorskip("cfs.fuse._worker", reason="the data plane is not built")
NR_SECONDS = float(os.environ.get("CFS_LOAD_SECONDS", "30"))
NR_PROCESSES = 8
DEADLINE = 60
END_SECONDS = 2.0
SLACK_KB = 3000
Load = Callable[[ServeOptions], tuple[Mount, Hammers]]


@pytest.fixture
def load(mnt: Path, objects: Path, tmp_path: Path) -> Iterator[Load]:
    """Serve the tree and let the processes loose on it."""
    with ExitStack() as stack:

        def load(options: ServeOptions) -> tuple[Mount, Hammers]:
            copy = tmp_path / "copy"
            vector = make_tree(objects, copy)
            mount = start(vector, mnt, [objects], name="load", options=options)
            stack.callback(mount.unmount, 0.2)
            ways = ["interrupted"] * (NR_PROCESSES - 2) + ["copy"] * 2  # whose files are pushed
            hammers = stack.enter_context(hammering(ways, mnt, copy))
            stack.enter_context(dropping_caches(mnt, 0.1))
            return mount, hammers

        yield load


def memory_kb(pid: int) -> int:
    """Memory of its own; what is mapped from the image is shared."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["RssAnon"].split()[0])


def measure(pid: int) -> tuple[int, int]:
    return memory_kb(pid), len(os.listdir(f"/proc/{pid}/fd"))


def watch(pid: int, hammers: Hammers, seconds: float) -> tuple[int, int]:
    """Return the most memory and descriptors that it had within some time."""
    ended = os.pidfd_open(pid)
    most_memory = most_fds = 0
    try:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            assert not select.select([ended], [], [], min(left, 0.2))[0]
            assert hammers.all_run()
            memory, fds = measure(pid)
            most_memory, most_fds = max(memory, most_memory), max(fds, most_fds)
    finally:
        os.close(ended)
    return most_memory, most_fds


@pytest.mark.parametrize("passthrough", [Passthrough.OFF, Passthrough.ON])
def test_contents_are_right_and_nothing_grows(passthrough: Passthrough, load: Load) -> None:
    mount, hammers = load(ServeOptions(passthrough=passthrough))
    session = mount.statistics().session_pid
    watch(session, hammers, NR_SECONDS / 2)  # until all objects have been seen
    memory, fds = watch(session, hammers, NR_SECONDS / 4)
    memory_later, fds_later = watch(session, hammers, NR_SECONDS / 4)
    said = hammers.finish()
    assert all(text.isdigit() and int(text) > 10 for text in said), said
    assert memory_later <= memory + SLACK_KB
    assert fds_later <= fds + 8
    assert mount.statistics().sessions == 1


def end_by_signal(mount: Mount, scratch: Path) -> None:
    del scratch
    os.kill(mount.pid, signal.SIGTERM)


def end_by_unmount(mount: Mount, scratch: Path) -> None:
    """From outside: the mount ends when its last user has gone.

    A mount namespace made by another test meanwhile is a user as well, so nothing is said of when.
    """
    del scratch
    subprocess.run(["umount", "-l", mount.mountpoint], check=True)


def end_by_abort(mount: Mount, scratch: Path) -> None:
    """What an administrator does who sees a mount hang."""
    connections = scratch / "connections"
    connections.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "fusectl", connections], check=True)
    try:
        (connections / str(os.minor(mount.device)) / "abort").write_text("1")
    finally:
        subprocess.run(["umount", connections], check=True)


def end_by_starter(mount: Mount, scratch: Path) -> None:
    del scratch
    mount.unmount()


@pytest.mark.parametrize("passthrough", [Passthrough.OFF, Passthrough.ON])
@pytest.mark.parametrize("end", [end_by_signal, end_by_unmount, end_by_abort, end_by_starter])
def test_ends_under_load(
    end: Callable[[Mount, Path], None], passthrough: Passthrough, load: Load, tmp_path: Path
) -> None:
    mount, hammers = load(ServeOptions(passthrough=passthrough))
    session = mount.statistics().session_pid
    watch(session, hammers, 1.0)
    begun = time.monotonic()
    end(mount, tmp_path)
    assert mount.wait(DEADLINE) == 0
    assert time.monotonic() - begun < END_SECONDS or end is end_by_unmount
    assert not os.path.ismount(mount.mountpoint)
    said = hammers.wait(END_SECONDS)
    assert all("Error" in text for text in said), said
    with pytest.raises(OSError, match=os.strerror(errno.ESRCH)):
        os.kill(session, 0)
