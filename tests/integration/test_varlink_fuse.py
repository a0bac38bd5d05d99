"""``FuseServe``, ``OciFuseMount``, ``ListMounts``, ``Unmount``, ``WatchMount`` on real mounts."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cfs.linux.mountinfo import mounted_at
from cfs.linux.mounts import attach_mount, unmount
from cfs.service.fuse_registry import FuseMounts
from tests.command_line import unpack_tree
from tests.integration.fuse_service import (
    PLAIN,
    REPOSITORY,
    Service,
    call,
    fail,
    listed,
    receive,
    serve,
    service_at,
)
from tests.integration.stores import BIG, CFSCTL, Store
from tests.integration.waiting import wait_for_end, wait_until
from tests.paths import CHECKOUT
from tests.varlink_client import SECONDS, RawClient

pytestmark = pytest.mark.usefixtures("fuse")

NOBODY = 65534
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CHECKOUT)}


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


def begin(client: RawClient, *, more: bool = False, **parameters: Any) -> None:
    """Send a ``FuseServe`` that waits."""
    parameters = {"handle": 1, "image": "demo", "wait": True, "options": PLAIN, **parameters}
    client.send(REPOSITORY + "FuseServe", parameters=parameters, more=more)


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


def test_a_covered_mount_is_busy(client: RawClient, mnt: Path) -> None:
    """It cannot be reached by its path; saying that it is gone would be wrong."""
    below, above = serve(client, mnt), serve(client, mnt)
    for detach in (False, True):
        assert fail(client, "Unmount", mount_id=below["mount_id"], detach=detach) == "MountBusy"
    assert [mount["state"] for mount in listed(client)] == ["Serving", "Serving"]
    for mount in (above, below):
        assert call(client, "Unmount", mount_id=mount["mount_id"], detach=True) == {}
    assert mounted_at(str(mnt)) is None


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
