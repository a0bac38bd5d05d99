"""Sessions come and go, the mount stays; nothing is left when it ends."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cfs.errors import MountError
from cfs.fuse import Launcher, Mount, ServeOptions, serve, start
from cfs.fuse.handover import channel_pair
from cfs.fuse.program import spawn
from cfs.inodes import InodeVector
from cfs.linux.traces import Trace
from cfs.tree import Directory, Inode, Link, Regular
from tests.integration.vectors import make_vector
from tests.integration.waiting import children_of, wait_for_end, wait_until

pytestmark = pytest.mark.usefixtures("fuse")
DEADLINE = 60
HAS_RESEND = 1 << 39
CONTENT = os.urandom(100_000)


@pytest.fixture(autouse=True)
def extension() -> None:
    pytest.importorskip("cfs.fuse._worker", reason="the data plane is not built")


@pytest.fixture
def vector(objects: Path) -> InodeVector:
    """A hundred files with the same content, in an object each, and one inside the image."""
    (objects / "aa").mkdir()
    children: dict[bytes, Inode | Link] = {
        b"inline": Regular(mode=0o100644, size=4, content=b"text")
    }
    for number in range(100):
        (objects / f"aa/{number}").write_bytes(CONTENT)
        children[b"%d" % number] = Regular(
            mode=0o100644, size=len(CONTENT), payload=b"aa/%d" % number
        )
    return make_vector(Directory(mode=0o040755, nlink=2, children=children))


def check_dead(fd: int) -> None:
    """Close a file of a mount whose connection has ended."""
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.read(fd, 1)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.close(fd)


def kill_session(mount: Mount, number: signal.Signals = signal.SIGKILL) -> None:
    """Kill the session that serves and wait until there is another one."""
    before = mount.statistics()
    os.kill(before.session_pid, number)
    wait_until(lambda: mount.statistics().sessions > before.sessions, "a new session")


def test_readers_do_not_notice_that_sessions_are_killed(
    mnt: Path, objects: Path, vector: InodeVector
) -> None:
    wrong: list[str] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            for number in range(100):
                fd = os.open(mnt / str(number), os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                content = b"".join(iter(lambda: os.read(fd, 1 << 20), b""))  # noqa: B023
                os.close(fd)
                if content != CONTENT:
                    wrong.append(str(number))

    with serve(vector, mnt, [objects], name="x") as mount:
        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for _ in range(10):
            kill_session(mount)
        is_over.set()
        for reader in readers:
            reader.join(DEADLINE)
            assert not reader.is_alive()
        assert wrong == []
        assert mount.statistics().sessions == 11
        assert len(children_of(mount.pid)) == 1


def test_session_killed_again_and_again_while_it_starts(
    mnt: Path, objects: Path, vector: InodeVector
) -> None:
    with Launcher() as launcher:
        # just after its exec a process has no arguments yet
        wait_until(lambda: any(map(is_supervisor, children_of(os.getpid()))), "the supervisor")
        (supervisor,) = [pid for pid in children_of(os.getpid()) if is_supervisor(pid)]
        wait_until(lambda: children_of(supervisor), "the first session")
        killer = threading.Thread(target=kill_children, args=(supervisor, 8))
        killer.start()
        mount = launcher.start(vector, mnt, [objects], name="x")
        killer.join()
        try:
            assert (mnt / "1").read_bytes() == CONTENT
        finally:
            mount.unmount()
    assert not os.path.ismount(mnt)


def is_supervisor(pid: int) -> bool:
    return b"cfs.fuse.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes()


def kill_children(pid: int, times: int) -> None:
    seen: set[int] = set()
    while len(seen) < times:
        for child in set(children_of(pid)) - seen:
            os.kill(child, signal.SIGKILL)
            seen.add(child)


@pytest.mark.parametrize(
    ("number", "deaths"), [(signal.SIGSEGV, 5), (signal.SIGABRT, 5), (signal.SIGKILL, 20)]
)
def test_supervisor_gives_up_with_one_line(  # noqa: PLR0917 - fixtures
    mnt: Path,
    objects: Path,
    vector: InodeVector,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    deaths: int,
) -> None:
    mount = start(vector, mnt, [objects], name="x")
    reader = os.open(mnt / "1", os.O_RDONLY)
    for _ in range(deaths - 1):
        kill_session(mount, number)
    os.kill(mount.statistics().session_pid, number)
    assert mount.wait(DEADLINE) == 1
    assert not os.path.ismount(mnt)
    check_dead(reader)
    lines = [line for line in capfd.readouterr().err.splitlines() if "giving up" in line]
    assert len(lines) == 1
    assert str(mnt) in lines[0]
    assert f"signal {number}" in lines[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (ServeOptions(masked_flags=HAS_RESEND), "cannot resend"),
        (ServeOptions(workers=0), "without workers"),
    ],
)
def test_where_nothing_can_be_resent_a_death_ends_the_mount(  # noqa: PLR0917 - fixtures
    mnt: Path,
    objects: Path,
    vector: InodeVector,
    capfd: pytest.CaptureFixture[str],
    options: ServeOptions,
    reason: str,
) -> None:
    mount = start(vector, mnt, [objects], name="x", options=options)
    assert (mnt / "inline").read_bytes() == b"text"
    (session,) = children_of(mount.pid)
    os.kill(session, signal.SIGKILL)
    assert mount.wait(DEADLINE) == 1
    assert not os.path.ismount(mnt)
    assert reason in capfd.readouterr().err


def test_session_serves_on_without_its_supervisor(
    mnt: Path, objects: Path, vector: InodeVector
) -> None:
    mount = start(vector, mnt, [objects], name="x")
    session = mount.statistics().session_pid
    os.kill(mount.pid, signal.SIGKILL)
    wait_for_end(mount.pid)
    assert (mnt / "1").read_bytes() == CONTENT
    user = os.open(mnt / "2", os.O_RDONLY)
    assert mount.wait(DEADLINE) == -signal.SIGKILL
    assert not os.path.ismount(mnt)
    assert os.read(user, len(CONTENT)) == CONTENT
    os.close(user)
    wait_for_end(session)


@pytest.mark.parametrize("is_used", [False, True])
def test_unmount_without_supervisor_ends_the_session(
    mnt: Path, objects: Path, vector: InodeVector, *, is_used: bool
) -> None:
    mount = start(vector, mnt, [objects], name="x")
    session = mount.statistics().session_pid
    user = os.open(mnt / "2", os.O_RDONLY) if is_used else os.open("/", os.O_RDONLY)
    os.kill(mount.pid, signal.SIGKILL)
    mount.unmount(grace=0.1)
    wait_for_end(session)
    assert not os.path.ismount(mnt)
    check_dead(user) if is_used else os.close(user)


def test_orphaned_session_ends_the_mount_at_sigterm(
    mnt: Path,
    objects: Path,
    vector: InodeVector,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    trace = tmp_path / "trace"
    trace.touch()
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    with Launcher(ServeOptions()) as launcher:
        mount = launcher.start(
            vector, mnt, [objects], name="x", traces=[Trace(directory, trace.name)]
        )
    os.close(directory)
    os.kill(mount.pid, signal.SIGUSR1)  # it hears the starter first, so the session is told as well
    wait_until(lambda: "restarts: 0\n" in capfd.readouterr().err, "statistics")
    session = mount.statistics().session_pid
    os.kill(session, signal.SIGTERM)  # the supervisor's business
    assert (mnt / "1").read_bytes() == CONTENT
    assert mount.statistics().sessions == 1
    os.kill(mount.pid, signal.SIGKILL)
    wait_for_end(mount.pid)
    wait_until(lambda: ends_by_sigterm(session), "the session to see that it is alone")
    assert not os.path.ismount(mnt)
    assert not trace.exists()  # although signals kept coming
    mount.unmount()


def ends_by_sigterm(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return True
    return False


def test_statistics_on_sigusr1(
    mnt: Path, objects: Path, vector: InodeVector, tmp_path: Path
) -> None:
    with (tmp_path / "err").open("w+b") as err:
        saved = os.dup(2)
        os.dup2(err.fileno(), 2)
        try:
            with serve(vector, mnt, [objects], name="x") as mount:
                (mnt / "1").read_bytes()
                os.kill(mount.pid, signal.SIGUSR1)
                text = (tmp_path / "err").read_text
                wait_until(lambda: "restarts: 0\n" in text(), "statistics")
                assert "requests read: 1\n" in text()
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@pytest.mark.parametrize("supervise", [True, False])
def test_sigterm_is_an_orderly_end(
    mnt: Path, objects: Path, vector: InodeVector, *, supervise: bool
) -> None:
    mount = start(
        vector, mnt, [objects], name="x", options=ServeOptions(supervise=supervise), grace=0.2
    )
    user = os.open(mnt / "inline", os.O_RDONLY)
    os.kill(mount.pid, signal.SIGTERM)
    assert mount.wait(DEADLINE) == 0
    assert not os.path.ismount(mnt)
    check_dead(user)


def test_failure_of_the_session_is_told(mnt: Path, objects: Path, vector: InodeVector) -> None:
    (objects / "file").touch()
    for supervise in (True, False):
        options = ServeOptions(supervise=supervise, workers=1)
        with pytest.raises(MountError, match="FUSE session: "):
            start(break_table(vector), mnt, [objects], name="x", options=options)
        assert not os.path.ismount(mnt)


def break_table(vector: InodeVector) -> InodeVector:
    """A vector whose root is no directory, which the data plane refuses."""
    vector.mode.flags.writeable = True
    vector.mode[1] = 0o100644
    return vector


def modules(name: str, plane: str) -> set[str]:
    """What a process of ours has loaded when it waits to be told what to serve."""
    ours, theirs = channel_pair()
    code = (
        f"import sys; sys.path += sys.argv[1:]; from cfs.fuse.{name} import main; "
        f"main({theirs.fileno()}, '', has_workers={plane == 'workers'}); print(*sys.modules)"
    )
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, *filter(None, sys.path)],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
        )
    with process:
        out, _ = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0
    return set(out.decode().split())


def test_modules_of_supervisor_and_session() -> None:
    heavy = {"numpy", "click", "pyfuse3", "trio", "ctypes.util"}
    session = modules("session", "workers")
    assert "cfs.fuse.dataplane" in session
    assert not session & heavy
    assert not modules("supervisor", "workers") & (heavy | {"cfs.fuse.dataplane"})
    assert not modules("session", "reference") & {"numpy", "click", "cfs.fuse.dataplane"}


def test_what_a_session_loads_and_when(mnt: Path, objects: Path, vector: InodeVector) -> None:
    def has_pyfuse3() -> bool:
        return "pyfuse3" in Path(f"/proc/{session}/maps").read_text()

    with serve(vector, mnt, [objects], name="x") as mount:
        session = mount.statistics().session_pid
        assert (mnt / "1").read_bytes() == CONTENT
        assert not has_pyfuse3()
        with (mnt / "inline").open() as file:
            os.fsync(file.fileno())  # none of what workers answer
            assert file.read() == "text"
        wait_until(has_pyfuse3, "pyfuse3")
        kill_session(mount)
        session = mount.statistics().session_pid
        for pid in (session, mount.pid):
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert not re.search(r"numpy", maps)
        assert "pyfuse3" not in Path(f"/proc/{mount.pid}/maps").read_text()


def test_starter_that_goes_before_it_says_anything() -> None:
    for name in ("supervisor", "session"):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = spawn(name, theirs, has_workers=True)
        ours.close()
        assert process.wait(DEADLINE) == 0


@pytest.mark.usefixtures("root")
def test_mount_that_follows_an_unmounted_one_stays(mnt: Path, vector: InodeVector) -> None:
    """Device numbers are used again at once, also by whoever mounts there next."""
    for _ in range(5):
        mount = start(vector, mnt, [], name="x")
        subprocess.run(["umount", str(mnt)], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "next", str(mnt)], check=True)
        assert mount.wait(DEADLINE) == 0
        subprocess.run(["umount", str(mnt)], check=True)  # it is there still
