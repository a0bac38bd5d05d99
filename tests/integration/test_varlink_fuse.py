"""``FuseServe``, ``OciFuseMount``, ``ListMounts``, ``Unmount``, ``WatchMount`` on real mounts."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cfs.linux.mountinfo import mounted_at
from cfs.linux.mounts import attach_mount, unmount
from cfs.linux.sockets import receive_fds
from cfs.service.assemble import assembled
from cfs.service.fdstore import Notifier
from cfs.service.fuse_registry import FuseMounts
from cfs.service.handles import StoreOptions
from tests.command_line import unpack_tree
from tests.integration.stores import BIG, CFSCTL, Store
from tests.integration.waiting import wait_for_end, wait_until
from tests.paths import CHECKOUT
from tests.varlink_client import SECONDS, Json, RawClient, serving

pytestmark = pytest.mark.usefixtures("fuse")

REPOSITORY = "org.composefs.Repository."
NOBODY = 65534
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
PLAIN = {"mode": "Fuse", "workers": 1}


class Service:
    """A service in this process and its clients."""

    def __init__(self, path: Path, mounts: FuseMounts, stack: ExitStack) -> None:
        self.path = path
        self.mounts = mounts
        self._stack = stack

    def connect(self) -> RawClient:
        return self._stack.enter_context(RawClient.connect(str(self.path)))

    def open(self, client: RawClient, store: Path) -> int:
        reply = call(client, "OpenRepository", path=str(store))
        number: int = reply["handle"]
        return number


@contextmanager
def service_at(directory: Path, mounts: FuseMounts) -> Iterator[Service]:
    path = directory / "socket"
    with (
        assembled(StoreOptions(), mounts) as dispatcher,
        serving(dispatcher, path),
        ExitStack() as clients,
    ):
        yield Service(path, mounts, clients)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    threads = threading.active_count()
    with service_at(tmp_path, FuseMounts()) as service:
        yield service
    assert threading.active_count() == threads


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def client(service: Service, store: Store) -> RawClient:
    client = service.connect()
    assert service.open(client, store.path) == 1
    return client


def call(client: RawClient, method: str, **parameters: Any) -> Json:
    """Call a method of the repository interface; return what it returns."""
    reply = client.call(REPOSITORY + method, **parameters)
    assert "error" not in reply, reply
    members: Json = reply.get("parameters", {})
    return members


def fail(client: RawClient, method: str, **parameters: Any) -> str:
    """Call a method that fails; return the error without the interface, and its message."""
    reply = client.call(method if "." in method else REPOSITORY + method, **parameters)
    text = reply["parameters"].get("message", "")
    return f"{reply['error'].rpartition('.')[2]} {text}".strip()


def begin(client: RawClient, *, more: bool = False, **parameters: Any) -> None:
    """Send a ``FuseServe`` that waits."""
    parameters = {"handle": 1, "image": "demo", "wait": True, "options": PLAIN, **parameters}
    client.send(REPOSITORY + "FuseServe", parameters=parameters, more=more)


def receive(client: RawClient) -> Json:
    reply = client.receive()
    assert reply is not None
    assert reply.fds == []
    return reply.members


def serve(client: RawClient, mountpoint: Path, **more: Any) -> Json:
    parameters = {"handle": 1, "image": "demo", "wait": False, "options": PLAIN, **more}
    mount: Json = call(client, "FuseServe", mountpoint=str(mountpoint), **parameters)["mount"]
    return mount


def wait_until_unmounted(mountpoint: Path) -> None:
    wait_until(lambda: mounted_at(str(mountpoint)) is None, "still mounted")


@pytest.mark.parametrize("mode", ["Fuse", "FuseOverlay"])
def test_serve_list_watch_unmount(
    service: Service,
    client: RawClient,
    mnt: Path,
    mode: str,
    request: pytest.FixtureRequest,
) -> None:
    if mode == "FuseOverlay":
        request.getfixturevalue("overlay")
    mount = serve(client, mnt, options={"mode": mode})
    assert (mnt / "big").read_bytes() == BIG
    expected = {
        "mount_id": 1, "image": "demo", "mountpoint": str(mnt), "mode": mode, "passthrough": False,
        "state": "Serving", "owner_uid": os.geteuid(), "error": None,
    }  # fmt: skip
    assert {name: mount[name] for name in expected} == expected
    assert call(service.connect(), "CloseRepository", handle=1) == {}
    (listed,) = call(client, "ListMounts")["mounts"]
    assert listed["server_pid"] == mount["server_pid"]
    assert listed["requests"] > 0
    watcher = service.connect()
    watcher.send(REPOSITORY + "WatchMount", parameters={"mount_id": 1}, more=True)
    assert receive(watcher)["continues"] is True
    with (mnt / "big").open():
        assert client.call(REPOSITORY + "Unmount", mount_id=1) == {
            "error": REPOSITORY + "MountBusy", "parameters": {"mount_id": 1},
        }  # fmt: skip
    assert call(client, "Unmount", mount_id=1) == {}
    assert mounted_at(str(mnt)) is None
    wait_for_end(mount["server_pid"])
    last = receive(watcher)
    assert (last["parameters"]["mount"]["state"], last["continues"]) == ("Ended", False)
    assert call(client, "ListMounts", mount_id=1)["mounts"][0]["state"] == "Ended"
    assert call(client, "WatchMount", mount_id=1)["mount"]["state"] == "Ended"
    assert fail(client, "Unmount", mount_id=2) == "NoSuchMount"


def test_detach_lets_users_finish(client: RawClient, mnt: Path) -> None:
    mount = serve(client, mnt)
    with (mnt / "big").open("rb") as file:
        assert call(client, "Unmount", mount_id=1, detach=True) == {}
        assert mounted_at(str(mnt)) is None
        (listed,) = call(client, "ListMounts")["mounts"]
        assert (listed["state"], listed["mountpoint"]) == ("Serving", None)
        assert file.read() == BIG
    wait_for_end(mount["server_pid"])


def test_outside_unmount(service: Service, client: RawClient, mnt: Path) -> None:
    begin(client, more=True, mountpoint=str(mnt))
    first = receive(client)
    assert first["continues"] is True
    assert first["parameters"]["mount"]["state"] == "Serving"
    assert (mnt / "small").read_text() == "text"
    assert call(service.connect(), "ListMounts")["mounts"] != []
    unmount(str(mnt))
    last = receive(client)
    assert last["continues"] is False
    assert last["parameters"]["mount"]["state"] == "Ended"
    assert call(client, "ListMounts")["mounts"][0]["state"] == "Ended"


def test_wait_without_more_answers_at_the_end(
    service: Service, client: RawClient, mnt: Path
) -> None:
    begin(client, mountpoint=str(mnt))
    other = service.connect()
    wait_until(lambda: mounted_at(str(mnt)), "not mounted")
    wait_until(lambda: call(other, "ListMounts")["mounts"][0]["state"] == "Serving", "not serving")
    assert call(other, "Unmount", mount_id=1) == {}
    assert receive(client)["parameters"]["mount"]["state"] == "Ended"


@pytest.mark.parametrize("lifetime", ["wait", "more", "Connection"])
def test_lost_connection_unmounts(
    service: Service, client: RawClient, mnt: Path, lifetime: str
) -> None:
    if lifetime == "Connection":
        serve(client, mnt, options={**PLAIN, "lifetime": "Connection"})
    else:
        begin(client, more=lifetime == "more", mountpoint=str(mnt))
        wait_until(lambda: mounted_at(str(mnt)), "not mounted")
    other = service.connect()
    client.close()
    wait_until_unmounted(mnt)
    wait_until(lambda: call(other, "ListMounts")["mounts"][0]["state"] == "Ended", "not ended")


def test_half_close_and_lasting_mount(service: Service, client: RawClient, mnt: Path) -> None:
    begin(client, more=True, mountpoint=str(mnt))
    receive(client)
    client.channel.shutdown(socket.SHUT_WR)
    assert (mnt / "small").read_text() == "text"
    other = service.connect()
    assert call(other, "Unmount", mount_id=1) == {}
    assert receive(client)["parameters"]["mount"]["state"] == "Ended"
    service.open(other, Path(service.path.parent / "store"))
    serve(other, mnt, handle=2)
    other.close()
    assert call(service.connect(), "ListMounts", mount_id=2)["mounts"][0]["state"] == "Serving"
    assert (mnt / "small").read_text() == "text"


def test_killed_supervisor_is_a_failure(client: RawClient, mnt: Path) -> None:
    begin(client, more=True, mountpoint=str(mnt))
    pid = receive(client)["parameters"]["mount"]["server_pid"]
    os.kill(pid, signal.SIGKILL)
    assert receive(client)["error"] == REPOSITORY + "MountFailed"
    assert mounted_at(str(mnt)) is None
    assert call(client, "ListMounts")["mounts"][0]["state"] == "Failed"


@pytest.mark.usefixtures("root")
def test_detached_mount(client: RawClient, mnt: Path) -> None:
    parameters = {"handle": 1, "image": "demo", "wait": False, "options": PLAIN}
    client.send(REPOSITORY + "FuseServe", parameters=parameters)
    reply = client.receive()
    assert reply is not None
    assert reply.members["parameters"]["fd_index"] == 0
    (tree,) = reply.fds
    assert reply.members["parameters"]["mount"]["mountpoint"] is None
    assert fail(client, "Unmount", mount_id=1) == "MountBusy"
    attach_mount(tree, str(mnt))
    os.close(tree)
    assert call(client, "ListMounts")["mounts"][0]["mountpoint"] == str(mnt)
    assert (mnt / "big").read_bytes() == BIG
    assert call(client, "Unmount", mount_id=1) == {}
    client.send(REPOSITORY + "FuseServe", parameters=parameters)
    reply = client.receive()
    assert reply is not None
    assert call(client, "Unmount", mount_id=2, detach=True) == {}
    os.close(reply.fds[0])
    wait_for_end(reply.members["parameters"]["mount"]["server_pid"])


def test_image_by_path_and_by_descriptor(client: RawClient, store: Store, mnt: Path) -> None:
    image = store.path / "images" / str(store.digest)
    mount = serve(client, mnt, image=str(image))
    assert mount["image"] == str(image)
    assert (mnt / "big").read_bytes() == BIG
    call(client, "Unmount", mount_id=1)
    with image.open("rb") as file:
        parameters = {"handle": 1, "mountpoint": str(mnt), "wait": False, "options": PLAIN}
        client.send(REPOSITORY + "FuseServe", [file.fileno()], parameters=parameters)
    assert receive(client)["parameters"]["mount"]["image"] == ""
    assert (mnt / "big").read_bytes() == BIG


def test_errors_in_their_order(client: RawClient, mnt: Path, tmp_path: Path) -> None:
    def error(**more: Any) -> str:
        parameters = {"handle": 1, "image": "demo", "mountpoint": str(mnt), "wait": False, **more}
        return fail(client, "FuseServe", **parameters)

    missing = str(tmp_path / "missing")
    overlay_and_plain = {"mode": "FuseOverlay", "passthrough": True}
    assert error(handle=9, image="nobody") == "InvalidHandle"
    assert error(mountpoint="relative", image="nobody").startswith("InvalidSpec")
    assert error(image=None).startswith("InvalidSpec expected 1 descriptors, got 0")
    assert error(options={"overlay": True}).startswith("InvalidSpec expected 2 descriptors")
    assert error(options={"workers": 257}).startswith("InvalidSpec")
    assert error(options=overlay_and_plain, image="nobody").startswith("InvalidSpec")
    assert error(image="nobody", mountpoint=missing) == "NoSuchRef"
    assert error(image=missing) == "NoSuchRef"
    assert error(mountpoint=missing).startswith("MountFailed")
    assert error(mountpoint=None, wait=True).startswith("InvalidSpec")
    states = {mount["state"] for mount in call(client, "ListMounts")["mounts"]}
    assert states == {"Failed"}
    oci = "org.composefs.Oci.OciFuseMount"
    parameters = {"handle": 1, "bootable": False, "wait": False, "mountpoint": str(mnt)}
    assert fail(client, oci, image="nobody", **parameters).startswith("NoSuchImage")
    parameters["mountpoint"] = "relative"
    assert fail(client, oci, image="nobody", **parameters).startswith("InvalidRequest")


def test_oci_image(service: Service, tmp_path: Path, mnt: Path) -> None:
    unpack_tree(tmp_path)
    path = str(tmp_path / "oci")
    for words in (
        ["init", "--insecure", path],
        ["--repo", path, "oci", "pull", "oci:layout:v1", "app"],
    ):
        subprocess.run(
            [*CFSCTL, *words], cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=SECONDS
        )
    client = service.connect()
    parameters = {
        "handle": service.open(client, Path(path)), "image": "app", "mountpoint": str(mnt),
        "wait": False, "bootable": False, "options": PLAIN,
    }  # fmt: skip
    reply = client.call("org.composefs.Oci.OciFuseMount", **parameters)
    assert reply["parameters"]["mount"]["image"] == "app"
    assert (mnt / "usr").is_dir()
    bootable = {**parameters, "bootable": True}
    error = fail(client, "org.composefs.Oci.OciFuseMount", **bootable)
    assert error.startswith("InternalError No boot EROFS image linked")


def test_end_of_the_service_unmounts(tmp_path: Path, store: Store, mnt: Path) -> None:
    with service_at(tmp_path, FuseMounts()) as service:
        client = service.connect()
        service.open(client, store.path)
        mount = serve(client, mnt)
        file = (mnt / "big").open("rb")
    assert mounted_at(str(mnt)) is None
    wait_for_end(mount["server_pid"])
    with suppress(OSError):  # its connection was aborted
        file.close()


def test_many_mounts_leave_nothing(service: Service, client: RawClient, tmp_path: Path) -> None:
    places = [tmp_path / str(number) for number in range(8)]
    for place in places:
        place.mkdir()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        pids = [serve(client, place)["server_pid"] for place in places]
        for mount in call(client, "ListMounts")["mounts"]:
            call(client, "Unmount", mount_id=mount["mount_id"])
        for pid in pids:
            wait_for_end(pid)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    states = [mount["state"] for mount in call(service.connect(), "ListMounts")["mounts"]]
    assert states == ["Ended"] * 16


def test_many_clients_at_once(service: Service, client: RawClient, tmp_path: Path) -> None:
    clients = [service.connect() for _ in range(12)]
    for number, each in enumerate(clients):
        place = tmp_path / str(number)
        place.mkdir()
        begin(
            each,
            more=number % 2 == 0,
            mountpoint=str(place),
            options={"mode": "Fuse", "workers": 1},
        )
    pids = [receive(each)["parameters"]["mount"]["server_pid"] for each in clients[::2]]
    for each in clients:
        each.close()

    def states() -> set[str]:
        return {mount["state"] for mount in call(client, "ListMounts")["mounts"]}

    wait_until(lambda: states() <= {"Ended", "Failed"}, "not ended")
    for pid in pids:
        wait_for_end(pid)


def test_oneway_serves(client: RawClient, mnt: Path) -> None:
    parameters = {
        "handle": 1,
        "image": "demo",
        "mountpoint": str(mnt),
        "wait": True,
        "options": PLAIN,
    }
    client.send(REPOSITORY + "FuseServe", parameters=parameters, oneway=True)
    assert [mount["state"] for mount in call(client, "ListMounts")["mounts"]] == ["Serving"]
    assert (mnt / "small").read_text() == "text"


class Systemd:
    """A descriptor store, as systemd's."""

    def __init__(self, directory: Path) -> None:
        self.stored: dict[str, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(directory / "notify"))
        self.notifier = Notifier(str(directory / "notify"))
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            message, fds = receive_fds(self._socket, 4096, 16)
            fields = dict(line.split("=", 1) for line in message.decode().splitlines())
            name = fields.get("FDNAME", "")
            if "FDSTORE" in fields:
                self.stored[name] = fds.pop()
            if "FDSTOREREMOVE" in fields and name in self.stored:
                os.close(self.stored.pop(name))
            for fd in fds:
                os.close(fd)
            if not message:
                return

    def hand_over(self) -> dict[str, list[int]]:
        return {name: [os.dup(fd)] for name, fd in self.stored.items()}

    def close(self) -> None:
        self.notifier.send("")
        self._thread.join()
        self._socket.close()
        for fd in self.stored.values():
            os.close(fd)
        self.stored.clear()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path)
    yield systemd
    systemd.close()


def reap(mounts: FuseMounts) -> None:
    """Wait for the children of a service that lives in this process and has let go of them."""
    for entry in mounts._entries.values():
        if entry.mount is not None:
            entry.mount.wait()


def test_mount_survives_a_restart(
    tmp_path: Path, store: Store, mnt: Path, systemd: Systemd
) -> None:
    first = FuseMounts(systemd.notifier)
    with service_at(tmp_path, first) as service:
        client = service.connect()
        service.open(client, store.path)
        before = serve(client, mnt)
        other = tmp_path / "other"
        other.mkdir()
        serve(client, other, options={**PLAIN, "lifetime": "Connection"})
    wait_until_unmounted(other)
    assert (mnt / "big").read_bytes() == BIG
    mounts = FuseMounts(systemd.notifier)
    mounts.adopt(systemd.hand_over())
    with service_at(tmp_path, mounts) as service:
        client = service.connect()
        (after,) = call(client, "ListMounts")["mounts"]
        assert after["requests"] > before["requests"]
        after["requests"] = before["requests"]
        assert after == before
        assert service.open(client, store.path) == 1
        assert serve(client, other)["mount_id"] == 3
        assert call(client, "Unmount", mount_id=1) == {}
        assert call(client, "ListMounts", mount_id=1)["mounts"][0]["state"] == "Ended"
        assert call(client, "Unmount", mount_id=3) == {}
        assert mounted_at(str(mnt)) is None
        systemd.notifier.barrier()
        assert list(systemd.stored) == ["cfs-mount.0.last"]
    reap(first)


def test_real_stop_unmounts(tmp_path: Path, store: Store, mnt: Path, systemd: Systemd) -> None:
    mounts = FuseMounts(systemd.notifier)
    with service_at(tmp_path, mounts) as service:
        client = service.connect()
        service.open(client, store.path)
        pid = serve(client, mnt)["server_pid"]
    assert mounted_at(str(mnt)) is not None
    systemd.close()
    wait_for_end(pid)
    assert mounted_at(str(mnt)) is None
    reap(mounts)


CONNECT = """
import os, socket, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
channel = socket.socket(socket.AF_UNIX)
channel.connect(sys.argv[2])
socket.send_fds(socket.socket(fileno=int(sys.argv[1])), [b"x"], [channel.fileno()])
"""


def connect_as_nobody(path: Path) -> RawClient:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-c", CONNECT, str(theirs.fileno()), str(path)]
        subprocess.run(command, pass_fds=[theirs.fileno()], check=True, timeout=SECONDS)
        _, (fd,) = receive_fds(ours, 1, 1)
    channel = socket.socket(fileno=fd)
    channel.settimeout(SECONDS)
    return RawClient(channel)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that others reach."""
    with tempfile.TemporaryDirectory(prefix="cfs-foreign-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


def as_nobody(*command: str) -> bytes:
    done = subprocess.run(
        command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, check=True
    )
    return done.stdout


@pytest.mark.usefixtures("root")
def test_another_user(open_directory: Path) -> None:
    store = Store(open_directory)
    subprocess.run(["chmod", "-R", "a+rX", store.path], check=True)
    own, others = open_directory / "own", open_directory / "others"
    for place in (own, others):
        place.mkdir()
    os.chown(own, NOBODY, NOBODY)
    with service_at(open_directory, FuseMounts()) as service, ExitStack() as stack:
        service.path.chmod(0o666)
        root = service.connect()
        service.open(root, store.path)
        serve(root, others)
        stack.callback(call, root, "Unmount", mount_id=1)
        with connect_as_nobody(service.path) as client:
            handle = service.open(client, store.path)
            parameters = {
                "handle": handle,
                "image": "demo",
                "wait": False,
                "options": {"workers": 1},
            }
            assert call(client, "ListMounts")["mounts"] == []
            assert fail(client, "Unmount", mount_id=1) == "NoSuchMount"
            assert (
                fail(client, "FuseServe", mountpoint=str(others), **parameters)
                == "PermissionDenied"
            )
            path = str(store.path / "images" / str(store.digest))
            by_path = {**parameters, "image": path}
            assert fail(client, "FuseServe", mountpoint=str(own), **by_path) == "PermissionDenied"
            if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
                pytest.skip("/dev/fuse is not open to ordinary users")
            mount = call(client, "FuseServe", mountpoint=str(own), **parameters)["mount"]
            assert mount["owner_uid"] == NOBODY
            (line,) = [
                line for line in Path("/proc/self/mountinfo").read_text().splitlines()
                if f" {own} " in line
            ]  # fmt: skip
            assert {"nosuid", "nodev", "ro"} <= set(line.split()[5].split(","))
            assert f"user_id={NOBODY}" in line
            assert as_nobody("cat", str(own / "small")) == b"text"
            sessions = Path(f"/proc/{mount['server_pid']}/task/{mount['server_pid']}/children")
            (session,) = sessions.read_text().split()
            assert os.stat(f"/proc/{session}").st_uid == NOBODY
            assert call(client, "Unmount", mount_id=mount["mount_id"]) == {}
            overlay = {**parameters, "options": {"mode": "FuseOverlay"}}
            mount = call(client, "FuseServe", mountpoint=str(own), **overlay)["mount"]
            assert as_nobody("cat", str(own / "small")) == b"text"
            assert call(client, "Unmount", mount_id=mount["mount_id"]) == {}
            open_to_all = {**parameters, "options": {"workers": 1, "allow_other": True}}
            error = fail(client, "FuseServe", mountpoint=str(own), **open_to_all)
            assert error.startswith("FuseUnavailable allow_other needs user_allow_other")
        call(root, "Unmount", mount_id=1)
