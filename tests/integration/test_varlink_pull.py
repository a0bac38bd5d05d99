"""``Pull`` of the service from registries that do not answer, and clients that do not wait."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.repository.repository import init
from cfs.service.handles import StoreOptions
from tests.integration.registry import HostileRegistry, hostile_registry, need
from tests.integration.varlink_replay import whole_service
from tests.integration.waiting import wait_until
from tests.varlink_client import Json, RawClient, serving
from tests.varlink_process import service_process

OCI, REPOSITORY = "org.composefs.Oci", "org.composefs.Repository"


@pytest.fixture
def hostile(
    layouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HostileRegistry]:
    need("skopeo")
    with hostile_registry() as registry:
        registry.load(layouts / "fixture")
        address = registry.image.removeprefix("docker://").partition("/")[0]
        configuration = tmp_path / ".config" / "containers" / "registries.conf"
        configuration.parent.mkdir(parents=True)
        configuration.write_text(f'[[registry]]\nlocation = "{address}"\ninsecure = true\n')
        monkeypatch.setenv("HOME", str(tmp_path))
        yield registry


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    init(str(tmp_path / "store"), algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    with whole_service(StoreOptions()) as dispatcher, serving(dispatcher, tmp_path / "sock"):
        yield str(tmp_path / "sock")


def children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            found.update(map(int, task.read_text().split()))
    return found


def busy_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("pull", "layer", "skopeo"))]


def wish(hostile: HostileRegistry, client: RawClient, store: Path) -> Json:
    opened = client.call(f"{REPOSITORY}.OpenRepository", path=str(store))
    return {
        "handle": opened["parameters"]["handle"], "image": hostile.image, "name": "x",
        "local_fetch": "disabled", "bootable": False,
    }  # fmt: skip


def test_pull(hostile: HostileRegistry, address: str, tmp_path: Path) -> None:
    with RawClient.connect(address) as client:
        pulling = wish(hostile, client, tmp_path / "store")
        assert "completed" in client.call(f"{OCI}.Pull", **pulling)["parameters"]
        listed = client.call(f"{OCI}.ListImages", handle=pulling["handle"])["parameters"]
        assert [image["name"] for image in listed["images"]] == ["x"]


@pytest.mark.parametrize("what", ["manifest", "blobs"])
@pytest.mark.parametrize("how", ["leaves", "is cut off"])
def test_nobody_waits_for_a_registry(
    what: str, how: str, hostile: HostileRegistry, address: str, tmp_path: Path
) -> None:
    """When the client has gone, so has skopeo, and there is no tag."""
    before = children()
    hostile.is_open.clear()
    for blob in hostile.blobs.values() if what == "blobs" else [hostile.manifest]:
        blob.is_stuck = True
    with RawClient.connect(address) as client:
        client.send(f"{OCI}.Pull", more=True, parameters=wish(hostile, client, tmp_path / "store"))
        wait_until(hostile.is_asked.is_set, "nobody asks")
        assert children() > before
        if how == "is cut off":
            client.channel.close()
        with RawClient.connect(address) as other:  # nobody else waits
            assert "parameters" in other.call(f"{OCI}.GetInfo")
    wait_until(lambda: children() == before, "skopeo stays")
    hostile.is_open.set()
    wait_until(lambda: not busy_threads(), "a thread stays")
    assert not os.path.lexists(tmp_path / "store" / "streams" / "refs" / "oci" / "x")


def test_the_service_ends_while_a_registry_is_waited_for(
    hostile: HostileRegistry, tmp_path: Path
) -> None:
    init(str(tmp_path / "store"), algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    before = children()
    hostile.is_open.clear()
    hostile.manifest.is_stuck = True
    with whole_service(StoreOptions()) as dispatcher:
        with serving(dispatcher, tmp_path / "sock"):
            client = RawClient.connect(str(tmp_path / "sock"))
            pulling = wish(hostile, client, tmp_path / "store")
            client.send(f"{OCI}.Pull", parameters=pulling)
            wait_until(hostile.is_asked.is_set, "nobody asks")
        client.close()
        assert children() == before
    hostile.is_open.set()


def test_a_pull_ends_with_a_service_that_is_killed(
    hostile: HostileRegistry, tmp_path: Path
) -> None:
    hostile.is_open.clear()
    hostile.manifest.is_stuck = True
    init(str(tmp_path / "store"), algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    is_killed = threading.Event()
    with (
        service_process(tmp_path / "sock", is_killed=is_killed.is_set) as service,
        service.connect() as client,
    ):
        client.send(f"{OCI}.Pull", parameters=wish(hostile, client, tmp_path / "store"))
        wait_until(hostile.is_asked.is_set, "nobody asks")
        (puller,) = service.children().split()
        is_killed.set()
        service.kill()
        wait_until(lambda: not is_running_as(puller), "the process of the pull stays")
    hostile.is_open.set()


def test_a_killed_pull_is_an_error(hostile: HostileRegistry, tmp_path: Path) -> None:
    hostile.is_open.clear()
    hostile.manifest.is_stuck = True
    init(str(tmp_path / "store"), algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    with service_process(tmp_path / "sock") as service, service.connect() as client:
        client.send(f"{OCI}.Pull", parameters=wish(hostile, client, tmp_path / "store"))
        wait_until(hostile.is_asked.is_set, "nobody asks")
        os.kill(int(service.children()), signal.SIGKILL)
        reply = client.receive()
        assert reply is not None
        assert reply.members["error"] == f"{OCI}.InternalError"
        assert reply.members["parameters"] == {"message": "the pull ended before its time"}
        assert "parameters" in client.call(f"{OCI}.GetInfo")
        hostile.is_open.set()


def is_running_as(pid: str) -> bool:
    """Tell whether a process with modules of ours has this number."""
    try:
        return b"pull_process" in Path("/proc", pid, "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
