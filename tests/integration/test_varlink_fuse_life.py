"""Mounts come and go with their clients, in rows and in crowds, and nothing stays behind."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import cycle
from pathlib import Path

import pytest

from cfs.errors import MountError
from cfs.linux.mountinfo import mounted_at
from cfs.mount import FuseMount, Place
from cfs.service.fuse_registry import FuseMounts
from tests.integration.fuse_service import (
    PLAIN,
    REPOSITORY,
    Service,
    call,
    check_list,
    listed,
    receive,
    serve,
    service_at,
)
from tests.integration.stores import Store
from tests.integration.waiting import wait_until
from tests.varlink_client import Json, RawClient

pytestmark = pytest.mark.usefixtures("fuse")

IN_A_ROW = 200
AT_ONCE = 50
# of a client whose mount ends with the connection, and of one whose mount does not
WISHES: dict[str, Json] = {
    "wait": {"wait": True, "options": PLAIN},
    "wait-more": {"wait": True, "options": PLAIN},
    "Connection": {"wait": False, "options": {**PLAIN, "lifetime": "Connection"}},
    "Service": {"wait": False, "options": PLAIN},
}
CLIENT = """
import socket, sys
channel = socket.socket(socket.AF_UNIX)
channel.connect(sys.argv[1])
for message in sys.argv[2:]:
    channel.sendall(message.encode() + b"\\0")
print(flush=True)
sys.stdin.read()
"""


def descendants() -> set[int]:
    """Processes of this one, and theirs."""
    found = {os.getpid()}
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(
                Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1]
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


@contextmanager
def nothing_left(store: Store) -> Iterator[None]:
    """Fail if a mount, process, descriptor, thread or link stays behind."""

    def things() -> dict[str, object]:
        return {
            "processes": descendants(),
            "descriptors": len(os.listdir("/proc/self/fd")),
            # some of the service's stay for the next call
            "threads": [thread for thread in threading.enumerate() if thread.name != "service"],
            "mounts": Path("/proc/self/mountinfo").read_bytes().count(bytes(store.path.parent)),
            "links": store.mounted if (store.path / "images/refs/mounted").exists() else [],
        }

    before = things()
    yield
    wait_until(lambda: things() == before, f"{before} became {things()}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def service(tmp_path: Path, store: Store) -> Iterator[Service]:
    with nothing_left(store), service_at(tmp_path, FuseMounts()) as service:
        yield service


@pytest.fixture
def root_client(service: Service, store: Store) -> RawClient:
    client = service.connect()
    assert service.open(client, store.path) == 1
    return client


def wait_for_state(client: RawClient, state: str) -> Json:
    found: list[Json] = []

    def has_it() -> bool:
        found[:] = listed(client)
        return [mount["state"] for mount in found] == [state]

    wait_until(has_it, f"no mount became {state}")
    return found[0]


def wish(mountpoint: Path, name: str) -> Json:
    return {"handle": 1, "image": "demo", "mountpoint": str(mountpoint), **WISHES[name]}


@contextmanager
def client_process(service: Service, *messages: Json) -> Iterator["subprocess.Popen[bytes]"]:
    """A client that sends messages and then waits to be killed."""
    words = [str(service.path), *map(json.dumps, messages)]
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("name", WISHES)
@pytest.mark.parametrize("way", ["closes", "closes while starting", "is killed", "half-closes"])
def test_client_that_goes(
    service: Service, root_client: RawClient, mnt: Path, name: str, way: str
) -> None:
    request = {
        "method": REPOSITORY + "FuseServe",
        "parameters": wish(mnt, name),
        "more": name == "wait-more",
    }
    client = service.connect()
    if way == "is killed":
        with client_process(service, request) as process:
            wait_for_state(root_client, "Serving")
            process.kill()
    else:
        client.send_raw(json.dumps(request).encode() + b"\0")
        if way != "closes while starting":
            wait_for_state(root_client, "Serving")
        if way == "half-closes":
            client.channel.shutdown(socket.SHUT_WR)
        else:
            client.close()
    if name == "Service" or (way == "half-closes" and name != "Connection"):
        wait_for_state(root_client, "Serving")
        assert (mnt / "small").read_text() == "text"
        check_list(root_client, mnt.parent)
        assert call(root_client, "Unmount", mount_id=1) == {}
    wait_for_state(root_client, "Ended")
    assert mounted_at(str(mnt)) is None
    if way == "half-closes" and name != "Connection":
        replies = [receive(client)]
        while replies[-1].get("continues"):
            replies.append(receive(client))
        states = [reply["parameters"]["mount"]["state"] for reply in replies]
        expected = {"wait": ["Ended"], "wait-more": ["Serving", "Ended"], "Service": ["Serving"]}
        assert states == expected[name]


def test_in_a_row(root_client: RawClient, store: Store, tmp_path: Path, mnt: Path) -> None:
    modes = cycle(["Fuse"] if os.geteuid() else ["Fuse", "FuseOverlay"])
    serve(root_client, mnt)  # what is made once is there from now on
    call(root_client, "Unmount", mount_id=1)
    with nothing_left(store):
        for number in range(2, 2 + IN_A_ROW):
            mount = serve(root_client, mnt, options={"mode": next(modes), "workers": 1})
            assert mount["mount_id"] == number
            check_list(root_client, tmp_path)
            assert (mnt / "small").read_text() == "text"
            assert call(root_client, "Unmount", mount_id=number) == {}
            assert mounted_at(str(mnt)) is None
            (ended,) = listed(root_client, number)
            assert (ended["state"], ended["error"]) == ("Ended", None)
        check_list(root_client, tmp_path)


def test_at_once(service: Service, root_client: RawClient, tmp_path: Path) -> None:
    clients = [service.connect() for _ in range(AT_ONCE)]
    places = [tmp_path / f"place{number}" for number in range(AT_ONCE)]
    for place in places:
        place.mkdir()
    for client, place, name in zip(clients, places, cycle(WISHES), strict=False):
        more = name == "wait-more"
        client.send(REPOSITORY + "FuseServe", parameters=wish(place, name), more=more)

    def all_serve() -> bool:
        check = [mount["state"] for mount in listed(root_client)]
        return check == ["Serving"] * AT_ONCE

    wait_until(all_serve, "not all serve")
    check_list(root_client, tmp_path)
    for place in places:
        assert (place / "small").read_text() == "text"
    numbers = {Path(mount["mountpoint"]): mount["mount_id"] for mount in listed(root_client)}
    enders = [service.connect() for _ in range(AT_ONCE)]
    for client, ender, place, name in zip(clients, enders, places, cycle(WISHES), strict=False):
        if name == "Connection":
            client.close()
        else:
            parameters = {"mount_id": numbers[place]}
            ender.send(REPOSITORY + "Unmount", parameters=parameters)
    for ender, name in zip(enders, cycle(WISHES), strict=False):
        if name != "Connection":
            assert receive(ender).get("error") is None
    wait_until(
        lambda: {mount["state"] for mount in listed(root_client)} == {"Ended"}, "not all ended"
    )
    check_list(root_client, tmp_path)


@pytest.mark.usefixtures("root")
def test_serving_means_that_the_root_was_seen(mnt: Path) -> None:
    """What nobody serves, or no more, is never shown."""
    with closing(FuseMount(Place(str(mnt)), "x", allow_other=False)) as mount:
        mount.release_device()
        with pytest.raises(MountError, match="cannot mount on"):
            mount.attach()
    assert mounted_at(str(mnt)) is None
