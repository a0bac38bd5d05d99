"""Methods that work for long: at the same time, broken off, out of room; stores stay sound."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from cfs.linux.framing import close_all
from cfs.linux.fusedev import open_device
from cfs.linux.mounts import attach_mount, detach_mount
from cfs.mount import create_detached
from cfs.service.leadership import MAX_FOLLOWERS
from tests.integration.waiting import wait_until
from tests.oci_layouts import Layout, digest_of, make_tar
from tests.varlink_client import Json, RawClient
from tests.varlink_process import (
    OCI,
    ServiceProcess,
    call,
    open_store,
    pulling,
    service_process,
)

NR_LAYERS = 4
FOREIGN = 54321
SIZE = 1 << 20
GC = {"dry_run": False, "roots": []}


def layers() -> list[bytes]:
    chance = random.Random(7)
    return [
        make_tar(
            {"usr": None, f"usr/{number}": None}
            | {f"usr/{number}/{name}": chance.randbytes(SIZE // 8) for name in range(8)}
        )
        for number in range(NR_LAYERS)
    ]


LAYERS = layers()


@pytest.fixture
def image(tmp_path: Path) -> str:
    layout = Layout(tmp_path / "layout")
    layout.add_image("v1", LAYERS)
    return f"oci:{layout.path}:v1"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with service_process(tmp_path / "sock", "--insecure") as running:
        yield running


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[RawClient]:
    with service.connect() as connected:
        yield connected


def check(client: RawClient, handle: int) -> None:
    found = call(client, "Fsck", handle=handle)
    assert (found["ok"], found["errors"]) == (True, [])


def assert_not_locked(store: Path) -> None:
    """Another process gets the store for itself, but for the service's handles."""
    done = subprocess.run(
        [sys.executable, "-m", "cfs.cli.main", "--repo", str(store), "images"],
        check=False, timeout=60, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.returncode == 0


def pull(service: ServiceProcess, handle: int, image: str, name: str | None) -> Json:
    with service.connect() as client:
        return call(client, f"{OCI}.Pull", **pulling(handle, image, name))


def test_parallel_pulls_of_an_image(
    service: ServiceProcess, client: RawClient, image: str, tmp_path: Path
) -> None:
    handles = [open_store(client, tmp_path / "store") for _ in range(3)]
    with ThreadPoolExecutor(6) as executor:
        names = ["x", "x", "x", "y", "z", None]
        wishes = [
            executor.submit(pull, service, handles[number % 3], image, name)
            for number, name in enumerate(names)
        ]
        done = [wish.result() for wish in wishes]
    assert all("completed" in each for each in done), done
    assert len({each["completed"]["manifest_digest"] for each in done}) == 1
    listed = call(client, f"{OCI}.ListImages", handle=handles[0])["images"]
    assert sorted(found["name"] for found in listed) == ["x", "y", "z"]
    check(client, handles[0])


def test_collections_pulls_and_waits_hold_each_other_up_for_a_while_only(
    service: ServiceProcess, client: RawClient, image: str, tmp_path: Path
) -> None:
    """Whatever runs at the same time, all is answered, and nothing is locked afterwards."""
    handles = [open_store(client, tmp_path / "store") for _ in range(2)]

    def collect(number: int) -> Json:
        with service.connect() as own:
            return call(own, "Gc", handle=handles[number % 2], **GC)

    with ThreadPoolExecutor(8) as executor:
        pulls = [
            executor.submit(pull, service, handles[number % 2], image, f"tag{number}")
            for number in range(3)
        ]
        collections = [executor.submit(collect, number) for number in range(4)]
        for wish in pulls:
            assert "completed" in wish.result(60)
        for wish in collections:
            found = wish.result(60)
            assert "result" in found or found["error"] == "InternalError", found
    assert "result" in collect(0)
    check(client, handles[0])
    assert {each["name"] for each in call(client, f"{OCI}.ListImages", handle=handles[1])["images"]}
    assert_not_locked(tmp_path / "store")
    for handle in handles:
        assert call(client, "CloseRepository", handle=handle) == {}


@pytest.mark.usefixtures("root", "fuse")
def test_a_collection_does_not_wait_for_a_mount(
    service: ServiceProcess, client: RawClient, image: str, tmp_path: Path, mnt: Path
) -> None:
    handle = open_store(client, tmp_path / "store")
    assert "completed" in pull(service, handle, image, "x")
    waiting = {"image": "x", "mountpoint": str(mnt), "bootable": False, "wait": True}
    with service.connect() as waiter:
        waiter.send(f"{OCI}.OciFuseMount", more=True, parameters={"handle": handle, **waiting})
        serving = waiter.receive()
        assert serving is not None
        assert serving.members["parameters"]["mount"]["state"] == "Serving"
        assert call(client, f"{OCI}.Untag", handle=handle, name="x") == {}
        assert "result" in call(client, "Gc", handle=handle, **GC)
        # what is mounted is kept
        assert len((mnt / "usr/0/0").read_bytes()) == SIZE // 8
        assert call(client, "Unmount", mount_id=1) == {}
        ended = waiter.receive()
        assert ended is not None
        assert ended.members["parameters"]["mount"]["state"] == "Ended"
    assert call(client, "Gc", handle=handle, **GC)["result"]["objects_removed"] > 0


@pytest.mark.parametrize("more", [True, False])
def test_pulls_whose_clients_leave(
    service: ServiceProcess, client: RawClient, image: str, tmp_path: Path, *, more: bool
) -> None:
    """At whatever moment: no thread, descriptor or lock stays, and the store is sound."""
    chance = random.Random(11)
    warm = open_store(client, tmp_path / "store0")  # some threads begin with the first pull
    client.send(f"{OCI}.Pull", more=True, parameters=pulling(warm, image))
    while (reply := client.receive()) and reply.members["continues"]:
        pass
    assert call(client, "CloseRepository", handle=warm) == {}
    wait_until(lambda: service.threads() <= 12, "threads stay")
    threads, fds = service.threads(), len(service.descriptors())
    for number in range(12):
        handle = open_store(client, tmp_path / f"store{number % 3}")
        with service.connect() as other:
            wish = pulling(handle, image, f"tag{number}")
            other.send(f"{OCI}.Pull", more=more, parameters=wish)
            other.channel.settimeout(chance.uniform(0, 0.15))
            try:
                for _ in range(chance.randrange(20) if more else 1):
                    other.channel.recv(500)
            except TimeoutError:
                pass
        assert call(client, "CloseRepository", handle=handle) == {}
    wait_until(lambda: not service.children(), "processes stay")
    wait_until(lambda: service.threads() <= threads + MAX_FOLLOWERS, "threads stay")
    wait_until(lambda: len(service.descriptors()) <= fds, "descriptors stay")
    for number in range(3):
        store = tmp_path / f"store{number}"
        handle = open_store(client, store)
        check(client, handle)
        assert "result" in call(client, "Gc", handle=handle, **GC)
        assert "completed" in pull(service, handle, image, "whole")
        check(client, handle)
        assert_not_locked(store)


def test_a_service_that_is_killed_while_it_pulls(image: str, tmp_path: Path) -> None:
    chance = random.Random(13)
    store = tmp_path / "store"
    for _ in range(4):
        with service_process(tmp_path / "sock", "--insecure") as service, service.connect() as one:
            handle = open_store(one, store)
            check(one, handle)
            one.send(f"{OCI}.Pull", more=True, parameters=pulling(handle, image, "x"))
            for _ in range(chance.randrange(1, 14)):
                reply = one.receive()
                assert reply is not None
                if not reply.members["continues"]:
                    break
            service.kill()
    with service_process(tmp_path / "sock", "--insecure") as service, service.connect() as one:
        handle = open_store(one, store)
        assert "completed" in pull(service, handle, image, "x")
        assert "result" in call(one, "Gc", handle=handle, **GC)
        check(one, handle)


@pytest.mark.usefixtures("root")
def test_a_full_disk(
    service: ServiceProcess, client: RawClient, image: str, mnt: Path, tmp_path: Path
) -> None:
    small = Layout(tmp_path / "small")
    small.add_image("v1", [make_tar({"usr": None, "usr/tool": b"tool" * 100})])
    with ExitStack() as stack:
        options = f"size={NR_LAYERS * SIZE // 2}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mnt)], check=True)
        stack.callback(detach_mount, str(mnt))
        handle = open_store(client, mnt / "store")
        for more in (True, False):
            client.send(f"{OCI}.Pull", more=more, parameters=pulling(handle, image, "x"))
            while (reply := client.receive()) and reply.members.get("continues"):
                pass
            assert reply is not None
            assert reply.members["error"] == f"{OCI}.InternalError"
            assert "No space left on device" in reply.members["parameters"]["message"]
        check(client, handle)
        assert call(client, f"{OCI}.ListImages", handle=handle) == {"images": []}
        assert "result" in call(client, "Gc", handle=handle, **GC)
        assert "completed" in pull(service, handle, f"oci:{small.path}:v1", "small")
        check(client, handle)
        call(client, "CloseRepository", handle=handle)


def get_layer(client: RawClient, handle: int, diff_id: str) -> list[int]:
    parameters = {"handle": handle, "params": {"diff_id": diff_id}}
    client.send(f"{OCI}.GetLayer", parameters=parameters)
    reply = client.receive()
    assert reply is not None
    assert reply.fds, reply.members
    return reply.fds


def put_layer(client: RawClient, handle: int, diff_id: str, fds: list[int]) -> Json:
    parameters = {"handle": handle, "diff_id": diff_id, "zerocopy": False}
    client.send(f"{OCI}.PutLayer", fds[:2], parameters=parameters)
    reply = client.receive()
    close_all(fds)
    assert reply is not None
    answer: Json = reply.members["parameters"]
    return answer


def test_layers_in_odd_orders(
    service: ServiceProcess, client: RawClient, image: str, tmp_path: Path
) -> None:
    source = open_store(client, tmp_path / "source")
    assert "completed" in pull(service, source, image, "x")
    document = call(client, f"{OCI}.Inspect", handle=source, image="x")
    target = open_store(client, tmp_path / "target")
    diff_ids = [digest_of(layer) for layer in LAYERS]
    final: Json = {
        "handle": target, "manifest_json": document["manifest"], "name": "x",
        "config_json": document["config"],
    }  # fmt: skip

    def finalize(verities: list[str]) -> Json:
        pairs = [
            {"diff_id": diff_id, "layer_verity": verity}
            for diff_id, verity in zip(diff_ids, verities, strict=True)
        ]
        return call(client, f"{OCI}.FinalizeImage", layers=pairs, **final)

    # the end first, while nothing is there
    assert finalize(["0" * 64] * NR_LAYERS)["error"] == "InternalError"
    assert call(client, f"{OCI}.ListImages", handle=target) == {"images": []}
    verities = {}
    for diff_id in reversed(diff_ids):
        # two receive it at once, and one of them says another name
        with service.connect() as other, ThreadPoolExecutor(2) as executor:
            first = executor.submit(
                put_layer, client, target, diff_id, get_layer(client, source, diff_id)
            )
            wrong = digest_of(b"x" if diff_id == diff_ids[0] else diff_id.encode())
            second = executor.submit(
                put_layer, other, target, wrong, get_layer(other, source, diff_id)
            )
            verities[diff_id] = first.result(60)["layer_verity"]
            assert second.result(60) == {"expected": wrong, "actual": diff_id}
    # in the wrong order, and whole but for one
    swapped = [verities[diff_id] for diff_id in diff_ids[::-1]]
    assert finalize(swapped)["error"] == "InternalError"
    right = [verities[diff_id] for diff_id in diff_ids]
    assert finalize([*right[:-1], "0" * 64])["error"] == "InternalError"
    done = finalize(right)
    assert done["manifest_digest"] == digest_of(document["manifest"].encode())
    assert finalize(right) == done
    # into the store that it comes from
    found = put_layer(client, source, diff_ids[0], get_layer(client, source, diff_ids[0]))
    assert found["already_present"]
    check(client, target)
    for handle in (source, target):
        assert "result" in call(client, "Gc", handle=handle, **GC)


def test_a_layer_that_nobody_fetches_holds_up_no_other(
    service: ServiceProcess, client: RawClient, image: str, tmp_path: Path
) -> None:
    handle = open_store(client, tmp_path / "store")
    assert "completed" in pull(service, handle, image, "x")
    fds = get_layer(client, handle, digest_of(LAYERS[0]))
    started = threading.Event()

    def collect() -> Json:
        with service.connect() as other:
            started.set()
            return call(other, "Gc", handle=handle, **GC)

    with ThreadPoolExecutor(1) as executor:
        collecting = executor.submit(collect)
        assert started.wait(60)
        assert "images" in call(client, f"{OCI}.ListImages", handle=handle)
        close_all(fds)
        assert "result" in collecting.result(60)


@pytest.mark.usefixtures("root")
def test_who_takes_all_handles_takes_them_from_nobody_else(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="cfs-", dir="/var/tmp") as name:
        top = Path(name)
        top.chmod(0o777)
        limit = ["prlimit", f"--nofile={256}"]
        with (
            service_process(top / "sock", "--insecure", prefix=limit) as service,
            service.connect() as root,
            service.connect_as(FOREIGN) as foreign,
        ):
            opened: list[int] = []
            while True:
                path = str(top / f"store{len(opened)}")
                assert call(foreign, "InitRepository", path=path) == {"created": True}
                found = call(foreign, "OpenRepository", path=path)
                if "error" in found:
                    break
                opened.append(found["handle"])
            assert found["error"] == "InternalError"
            assert f"user {FOREIGN} has too many open repositories" in found["message"]
            assert 8 < len(opened) < 128
            # of one store he may have many
            first = str(top / "store0")
            many = [call(foreign, "OpenRepository", path=first)["handle"] for _ in range(300)]
            assert len(set(many)) == 300
            handle = open_store(root, tmp_path / "store")
            assert call(root, "ListImageRefs", handle=handle) == {"images": []}
            for handle in (*opened, *many):
                assert call(foreign, "CloseRepository", handle=handle) == {}
            assert "handle" in call(foreign, "OpenRepository", path=path)


@pytest.mark.usefixtures("root", "fuse")
def test_a_dead_file_system_holds_up_only_who_looks_there(tmp_path: Path, mnt: Path) -> None:
    """Nobody serves a FUSE mount: who opens it waits; the others go on, and so does the end."""
    device = open_device()
    with ExitStack() as stack:
        stack.callback(os.close, device)
        mount_fd = create_detached(device, b"dead", allow_other=True)
        stack.callback(os.close, mount_fd)
        attach_mount(mount_fd, str(mnt))
        stack.callback(detach_mount, str(mnt))
        with service_process(tmp_path / "sock", "--insecure") as service:
            stuck = [service.connect() for _ in range(3)]
            for client in stuck:
                stack.callback(client.close)
            handle = open_store(stuck[2], tmp_path / "store")
            layout = str(mnt / "layout")
            for client, method, parameters in (
                (stuck[0], "org.composefs.Repository.OpenRepository", {"path": str(mnt / "x")}),
                (stuck[1], "org.composefs.Repository.InitRepository", {"path": str(mnt / "x/y")}),
                (stuck[2], f"{OCI}.Pull", pulling(handle, f"oci:{layout}")),
            ):
                client.send(method, more=True, parameters=parameters)
            with service.connect() as other:
                found = open_store(other, tmp_path / "store")
                assert call(other, f"{OCI}.ListImages", handle=found) == {"images": []}
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(40) == 0
