"""Sessions that are killed: readers notice nothing, or get errors at once.

``CFS_KILLS`` is how often a session is killed in each mode (default 20).
"""

import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cfs.fuse import Mount, Passthrough, ServeOptions, start
from tests.integration.hammers import Hammers, dropping_caches, hammering, make_tree

pytestmark = pytest.mark.usefixtures("fuse", "root")
pytest.importorskip("cfs.fuse._worker", reason="the data plane is not built")
NR_KILLS = int(os.environ.get("CFS_KILLS", "20"))
DEADLINE = 60
WAYS = ["buffered", "mapped", "direct", "walk", "copy", "copy", "anything"]
PUSHED = ["copy", "copy", "copy", "copy", "buffered", "walk"]
END_SECONDS = 5  # 2 on a machine that does nothing else
HAS_RESEND = 1 << 39
Begin = Callable[[ServeOptions], tuple[Mount, Path]]


@pytest.fixture
def begin(mnt: Path, objects: Path, tmp_path: Path) -> Iterator[Begin]:
    """Serve the tree; gives the mount and the copy of the tree."""
    with ExitStack() as stack:

        def begin(options: ServeOptions) -> tuple[Mount, Path]:
            copy = tmp_path / "copy"
            mount = start(make_tree(objects, copy), mnt, [objects], name="crash", options=options)
            stack.callback(mount.unmount, 0.2)
            return mount, copy

        yield begin


def pause(seconds: float) -> None:
    """Let the others run; when is what these tests vary."""
    select.select([], [], [], seconds)


def kill_and_wait(mount: Mount, number: signal.Signals) -> None:
    """Kill the session, and wait until the next one has begun."""
    session = mount.statistics().session_pid
    os.kill(session, number)
    deadline = time.monotonic() + DEADLINE
    while mount.statistics().session_pid == session:
        assert time.monotonic() < deadline, "no other session"
        pause(0.001)  # the state memfd tells of no changes


def has_resend(mount: Mount) -> bool:
    return bool(mount.statistics().flags & HAS_RESEND)


def kill_at_random_moments(mount: Mount, hammers: Hammers) -> None:
    rng = random.Random(NR_KILLS)
    for _ in range(NR_KILLS):
        pause(rng.choice((0.0, 0.01, 0.1)) * rng.random())
        assert hammers.all_run()
        kill_and_wait(mount, signal.SIGKILL)


@pytest.mark.parametrize("passthrough", [Passthrough.OFF, Passthrough.ON])
def test_readers_notice_no_kill(passthrough: Passthrough, begin: Begin, mnt: Path) -> None:
    mount, copy = begin(ServeOptions(passthrough=passthrough))
    if not has_resend(mount):
        pytest.skip("the kernel cannot resend requests")
    with hammering(WAYS, mnt, copy) as hammers:
        with dropping_caches(mnt, 0.02):
            kill_at_random_moments(mount, hammers)
        said = hammers.finish()
    assert all(text.isdigit() and int(text) > 0 for text in said), said
    assert mount.statistics().sessions == NR_KILLS + 1


def test_kills_while_contents_are_pushed(begin: Begin, mnt: Path) -> None:
    """A push may wait in the kernel for a reader; see test_stuck.py."""
    mount, copy = begin(ServeOptions(workers=4))
    if not has_resend(mount):
        pytest.skip("the kernel cannot resend requests, so nothing is pushed")
    with hammering(PUSHED, mnt, copy) as hammers:
        with dropping_caches(mnt, 0.005):
            kill_at_random_moments(mount, hammers)
        said = hammers.finish()
    assert all(text.isdigit() and int(text) > 0 for text in said), said
    assert mount.statistics().counters["pushes"] > 0
    assert mount.statistics().sessions == NR_KILLS + 1


@pytest.mark.parametrize("way", ["unmount", "sigterm"])
def test_end_under_load(begin: Begin, mnt: Path, way: str) -> None:
    mount, copy = begin(ServeOptions(workers=4))
    session = os.pidfd_open(mount.statistics().session_pid)
    with hammering(PUSHED, mnt, copy) as hammers:
        with dropping_caches(mnt, 0.005):
            pause(0.5)
        assert hammers.all_run()
        begun = time.monotonic()
        if way == "unmount":
            mount.unmount(0.2)
        else:
            os.kill(mount.pid, signal.SIGTERM)
            assert mount.wait(DEADLINE) == 0
        seconds = time.monotonic() - begun
        hammers.wait(DEADLINE)
    assert select.select([session], [], [], 0)[0]
    os.close(session)
    assert seconds < END_SECONDS


def test_without_resend_readers_get_errors_at_once(
    begin: Begin, mnt: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mount, copy = begin(ServeOptions(masked_flags=HAS_RESEND))
    with hammering(WAYS, mnt, copy) as hammers, dropping_caches(mnt, 0.02):
        os.kill(mount.statistics().session_pid, signal.SIGKILL)
        said = hammers.wait(DEADLINE)
    assert all("Error" in text for text in said), said
    assert mount.wait(DEADLINE) == 1
    assert not os.path.ismount(mnt)
    (line,) = capfd.readouterr().err.splitlines()
    assert "cannot resend" in line
    assert str(mnt) in line


def test_gives_up_after_crash_upon_crash(
    begin: Begin, mnt: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mount, copy = begin(ServeOptions())
    if not has_resend(mount):
        pytest.skip("the kernel cannot resend requests")
    with hammering(["buffered", "walk"], mnt, copy) as hammers:
        for _ in range(4):
            kill_and_wait(mount, signal.SIGSEGV)
            assert hammers.all_run()
        os.kill(mount.statistics().session_pid, signal.SIGSEGV)
        said = hammers.wait(DEADLINE)
    assert all("Error" in text for text in said), said
    assert mount.wait(DEADLINE) == 1
    assert not os.path.ismount(mnt)
    (line,) = capfd.readouterr().err.splitlines()
    assert "giving up" in line
    assert str(mnt) in line


def test_session_outlives_its_supervisor(begin: Begin, mnt: Path) -> None:
    mount, copy = begin(ServeOptions())
    session = os.pidfd_open(mount.statistics().session_pid)
    with hammering(["buffered", "walk"], mnt, copy) as hammers:
        os.kill(mount.pid, signal.SIGKILL)
        with dropping_caches(mnt, 0.02):
            pause(0.3)
        said = hammers.finish()
    assert all(text.isdigit() for text in said), said
    mount.unmount(0.2)
    has_ended = select.select([session], [], [], DEADLINE)[0]
    os.close(session)
    assert has_ended
