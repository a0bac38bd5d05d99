"""FUSE mounts of users who are not the service's own, and of services that are not root.

Both need a ``/dev/fuse`` that is open to ordinary users.  Where it is not, the tests are run once
more by one of them, in a mount name space of their own where it is.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cfs.linux.mountinfo import mounted_at
from cfs.service import fuse_serving
from cfs.service.call import Peer
from cfs.service.fuse_registry import FuseMounts
from tests.integration.fuse_service import (
    Service,
    call,
    check_list,
    fail,
    listed,
    serve,
    service_at,
)
from tests.integration.stores import CFSCTL, Store
from tests.integration.waiting import children_of, wait_for_end, wait_until
from tests.paths import CHECKOUT
from tests.varlink_client import SECONDS, RawClient
from tests.varlink_process import connect_as, is_listening

pytestmark = pytest.mark.usefixtures("root", "fuse")

NOBODY = 65534
# a device file of one's own: the bind leaves the machine's alone
OPEN_DEVICE = """
mount --make-rprivate /
mount -t tmpfs -o mode=755 none "$1"
mknod -m 666 "$1/fuse" c 10 229
mount --bind "$1/fuse" /dev/fuse
shift
exec "$@"
"""


def is_device_open() -> bool:
    return os.stat("/dev/fuse").st_mode & 0o006 == 0o006


@pytest.fixture
def open_device() -> None:
    if not is_device_open():
        pytest.skip("/dev/fuse is not open to ordinary users; see test_in_a_name_space")


@pytest.mark.usefixtures("private_mounts")
def test_in_a_name_space(tmp_path: Path) -> None:
    if is_device_open():
        pytest.skip("/dev/fuse is open to ordinary users already")
    scratch = tmp_path / "device"
    scratch.mkdir()
    command = [
        *["unshare", "-m", "sh", "-ec", OPEN_DEVICE, "sh", str(scratch)],
        *[sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist"],
        *[f"--basetemp={tmp_path / 'inside'}", str(Path(__file__))],
    ]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")
    }
    done = subprocess.run(
        command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False,
        timeout=4 * SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    reasons = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("already" in reason for reason in reasons), reasons


def as_nobody(*command: str) -> bytes:
    done = subprocess.run(
        command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=True
    )
    return done.stdout


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that others reach, with one of nobody's, ``own``."""
    with tempfile.TemporaryDirectory(prefix="cfs-foreign-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        own_directory(directory / "own")
        yield directory


def own_directory(path: Path) -> Path:
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)
    return path


@pytest.fixture
def store(directory: Path) -> Store:
    store = Store(directory)
    subprocess.run(["chmod", "-R", "a+rX", store.path], check=True)
    return store


@pytest.fixture
def service(directory: Path, store: Store) -> Iterator[Service]:  # noqa: ARG001 - it is served
    with service_at(directory, FuseMounts()) as service:
        service.path.chmod(0o666)
        yield service


@pytest.fixture
def nobody(service: Service, store: Store) -> Iterator[RawClient]:
    with connect_as(service.path, NOBODY) as client:
        assert service.open(client, store.path) == 1
        yield client


def fail_to_serve(client: RawClient, mountpoint: Path | None, **more: Any) -> str:
    parameters = {"handle": 1, "image": "demo", "wait": False, "options": {"workers": 1}, **more}
    if mountpoint is not None:
        parameters["mountpoint"] = str(mountpoint)
    return fail(client, "FuseServe", **parameters)


def test_foreign_mounts_and_places(
    service: Service, store: Store, nobody: RawClient, directory: Path
) -> None:
    own, others = directory / "own", directory / "others"
    others.mkdir()
    root = service.connect()
    handle = service.open(root, store.path)
    serve(root, others, handle=handle)
    assert listed(nobody) == []
    assert fail(nobody, "Unmount", mount_id=1) == "NoSuchMount"
    assert fail(nobody, "WatchMount", mount_id=1) == "NoSuchMount"
    assert fail_to_serve(nobody, others) == "PermissionDenied"
    (directory / "link").symlink_to("others")
    assert fail_to_serve(nobody, directory / "link") == "PermissionDenied"
    image = str(store.path / "images" / str(store.digest))
    assert fail_to_serve(nobody, own, image=image) == "PermissionDenied"
    call(root, "Unmount", mount_id=1)


@pytest.mark.usefixtures("open_device")
def test_what_a_foreign_user_gets(nobody: RawClient, directory: Path, service: Service) -> None:
    own = directory / "own"
    mount = serve(nobody, own, options={"workers": 1})
    assert (mount["owner_uid"], mount["mode"]) == (NOBODY, "Fuse")
    lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    (line,) = [line for line in lines if f" {own} " in line]
    assert {"nosuid", "nodev", "ro"} <= set(line.split()[5].split(","))
    assert f"user_id={NOBODY}" in line
    assert as_nobody("cat", str(own / "small")) == b"text"
    (session,) = children_of(mount["server_pid"])
    assert os.stat(f"/proc/{session}").st_uid == NOBODY
    with service.connect() as root:
        check_list(root, directory)
    assert call(nobody, "Unmount", mount_id=mount["mount_id"]) == {}
    everybody = {"workers": 1, "allow_other": True}
    error = fail_to_serve(nobody, own, options=everybody)
    assert error.startswith("FuseUnavailable allow_other needs user_allow_other")
    error = fail_to_serve(nobody, own, options={"workers": 1, "passthrough": True})
    assert error.startswith("FuseUnavailable"), error
    assert mounted_at(str(own)) is None


@pytest.mark.usefixtures("open_device", "overlay")
def test_foreign_overlay(nobody: RawClient, directory: Path) -> None:
    own = directory / "own"
    upper, work = own_directory(directory / "upper"), own_directory(directory / "work")
    mount = serve(nobody, own, options={"mode": "FuseOverlay"})
    assert as_nobody("cat", str(own / "small")) == b"text"
    assert call(nobody, "Unmount", mount_id=mount["mount_id"]) == {}
    parameters = {
        "handle": 1, "image": "demo", "mountpoint": str(own), "wait": False,
        "options": {"overlay": True, "read_write": True},
    }  # fmt: skip

    def refusal(*changes: Path) -> str:
        fds = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in changes]
        try:
            nobody.send("org.composefs.Repository.FuseServe", fds, parameters=parameters)
        finally:
            for fd in fds:
                os.close(fd)
        reply = nobody.receive()
        assert reply is not None
        error: str = reply.members["error"]
        return error

    not_his = directory / "roots"
    not_his.mkdir()
    assert refusal(not_his, work) == "org.varlink.service.PermissionDenied"
    assert refusal(upper, work) == "org.composefs.Repository.FuseUnavailable"
    assert list(work.iterdir()) == []


@pytest.mark.usefixtures("open_device")
def test_session_stopped_by_its_user(service: Service, nobody: RawClient, directory: Path) -> None:
    """Others can list his mounts and be rid of them all the same."""
    own = directory / "own"
    mount = serve(nobody, own, options={"workers": 1})
    (session,) = children_of(mount["server_pid"])
    os.kill(session, signal.SIGSTOP)
    with service.connect() as root:
        check_list(root, directory)
        assert call(root, "Unmount", mount_id=1, detach=True) == {}
        assert mounted_at(str(own)) is None
        assert call(root, "Unmount", mount_id=1, detach=True) == {}
        assert [each["state"] for each in listed(root)] == ["Ended"]
    wait_for_end(session)


@pytest.mark.usefixtures("open_device", "overlay", "private_mounts")
@pytest.mark.parametrize("mode", ["Fuse", "FuseOverlay"])
def test_number_of_a_device_that_is_another_mount_by_now(
    service: Service, nobody: RawClient, directory: Path, mode: str
) -> None:
    """A user whose mount has gone, while his session cannot tell us, ends no mount of others."""
    own, victim = directory / "own", directory / "victim"
    mount = serve(nobody, own, options={"mode": mode})
    (session,) = children_of(mount["server_pid"])
    os.kill(session, signal.SIGSTOP)
    subprocess.run(["umount", "-l", str(own)], check=True)
    victim.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(victim)], check=True)
    try:
        (entry,) = service.mounts.visible(Peer(1, NOBODY, NOBODY, ()))
        assert entry.mount is not None
        entry.mount.device = victim.stat().st_dev  # as a rule it is already
        assert [each["mountpoint"] for each in listed(nobody)] == [None]
        assert call(nobody, "Unmount", mount_id=1, detach=True) == {}
        assert mounted_at(str(victim)) is not None
        assert [each["state"] for each in listed(nobody)] == ["Ended"]
    finally:
        subprocess.run(["umount", "-l", str(victim)], check=True)
    wait_for_end(session)


@pytest.mark.usefixtures("open_device")
def test_session_stopped_by_its_user_while_it_starts(
    nobody: RawClient, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is not in use for long, and nothing stays."""
    monkeypatch.setattr(fuse_serving, "_FOREIGN_SECONDS", 0.5)
    own, before = directory / "own", set(children_of(os.getpid()))
    parameters = {
        "handle": 1, "image": "demo", "mountpoint": str(own), "wait": False,
        "options": {"workers": 1},
    }  # fmt: skip
    stopped: list[int] = []

    def stop() -> bool:
        """Stop the session as soon as its owner could do that."""
        for supervisor in set(children_of(os.getpid())) - before:
            for session in children_of(supervisor):
                if f"Uid:\t{NOBODY}\t" in Path(f"/proc/{session}/status").read_text():
                    os.kill(session, signal.SIGSTOP)
                    stopped.append(session)
        return bool(stopped)

    nobody.send("org.composefs.Repository.FuseServe", parameters=parameters)
    wait_until(stop, "no session")
    reply = nobody.receive()
    assert reply is not None
    assert reply.members["error"].endswith(".MountFailed"), reply
    assert mounted_at(str(own)) is None
    wait_for_end(stopped[0])
    assert [mount["state"] for mount in listed(nobody)] == ["Failed"]


@pytest.mark.usefixtures("open_device")
def test_service_of_an_ordinary_user(directory: Path) -> None:
    """Its mounts are made by fusermount3."""
    own = directory / "own"
    store = Store(own)
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", own], check=True)
    place = own_directory(own / "mnt")
    # our interpreter may be where only root reads; nothing else is more than an ordinary user has
    capability = "-all,+dac_read_search"
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command += [f"--inh-caps={capability}", f"--ambient-caps={capability}", "--"]
    command += [*CFSCTL, "varlink", "--address", str(own / "socket")]
    os.chmod(own, 0o777)
    with ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(command, cwd=CHECKOUT))
        stack.callback(server.kill)
        wait_until(lambda: is_listening(own / "socket"), "the service")
        client = stack.enter_context(connect_as(own / "socket", NOBODY))
        assert call(client, "OpenRepository", path=str(store.path))["handle"] == 1
        mount = serve(client, place)
        assert as_nobody("cat", str(place / "small")) == b"text"
        assert mount["mode"] == "Fuse"
        check_list(client, directory)
        assert os.stat(f"/proc/{mount['server_pid']}").st_uid == NOBODY
        assert fail_to_serve(client, None).startswith("FuseUnavailable")
        assert call(client, "Unmount", mount_id=1) == {}
        assert mounted_at(str(place)) is None
        pid = serve(client, place)["server_pid"]
        server.terminate()
        assert server.wait(SECONDS) == 0
        wait_for_end(pid)
        assert mounted_at(str(place)) is None
