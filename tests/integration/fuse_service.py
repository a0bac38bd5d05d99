"""A service of FUSE mounts in this process, and what its clients say."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from cfs.linux.mountinfo import list_mounts
from cfs.service.assemble import assembled
from cfs.service.fuse_registry import FuseMounts
from cfs.service.handles import StoreOptions
from tests.varlink_client import Json, RawClient, serving

REPOSITORY = "org.composefs.Repository."
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


def receive(client: RawClient) -> Json:
    reply = client.receive()
    assert reply is not None
    assert reply.fds == []
    return reply.members


def serve(client: RawClient, mountpoint: Path, **more: Any) -> Json:
    parameters = {"handle": 1, "image": "demo", "wait": False, "options": PLAIN, **more}
    mount: Json = call(client, "FuseServe", mountpoint=str(mountpoint), **parameters)["mount"]
    return mount


def listed(client: RawClient, number: int | None = None) -> list[Json]:
    mounts: list[Json] = call(client, "ListMounts", mount_id=number)["mounts"]
    return mounts


def check_list(client: RawClient, directory: Path) -> None:
    """What ``ListMounts`` says of places below a directory is what the kernel says."""
    prefix = os.fsencode(directory) + b"/"
    mounts = [entry.mountpoint for entry in list_mounts()]
    ours = sorted(os.fsdecode(place) for place in mounts if place.startswith(prefix))
    served = [mount for mount in listed(client) if mount["state"] == "Serving"]
    assert sorted(mount["mountpoint"] for mount in served) == ours
