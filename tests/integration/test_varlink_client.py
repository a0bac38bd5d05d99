"""The client against the service, ours and that of composefs-rs."""

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.cli.cfsctl import run as run_cfsctl
from cfs.client import AsyncClient, Client
from cfs.client import oci as varlink
from cfs.client.errors import (
    ConnectionLostError,
    InvalidHandleError,
    NoSuchLayerError,
    NoSuchRefError,
)
from cfs.client.layers import (
    FinalizeImage,
    GetLayer,
    GetLayerParams,
    HasLayer,
    LayerRef,
    PutLayer,
)
from cfs.client.repository import (
    Fsck,
    Gc,
    ImageObjects,
    InitRepository,
    ListImageRefs,
    ListMounts,
)
from cfs.client.service import GetInfo, GetInterfaceDescription
from cfs.linux.framing import close_all
from tests.command_line import unpack_tree
from tests.integration.varlink_stores import STORE, app_service
from tests.integration.waiting import wait_until


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with app_service(tmp_path, monkeypatch) as found:
        yield found


def test_methods_without_a_store(address: str, tmp_path: Path) -> None:
    with Client(address) as client:
        assert client.call(GetInfo()).interfaces == [
            "org.composefs.Repository", "org.composefs.Oci", "org.varlink.service",
        ]  # fmt: skip
        described = client.call(GetInterfaceDescription("org.composefs.Oci")).description
        assert "method OciFuseMount" in described
        assert "splitdirfdstream-v0" in client.call(varlink.GetInfo()).features
        place = str(tmp_path / "new")
        assert client.call(InitRepository(place, insecure=True)).created
        assert not client.call(InitRepository(place)).created
        assert client.call(ListMounts()).mounts == []


def test_methods_of_a_store(address: str) -> None:
    _use_all_methods(address)


def test_methods_of_composefs_rs(
    rust_words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    unpack_tree(tmp_path)
    assert run_cfsctl(["init", "--insecure", STORE]) == 0
    assert run_cfsctl(["--repo", STORE, "oci", "pull", "-q", "oci:layout:v1", "app"]) == 0
    with subprocess.Popen([*rust_words, "varlink", "--address", "sock"]) as service:
        try:
            wait_until(lambda: _answers("sock") or service.poll() is not None, "it listens")
            _use_all_methods("sock")
        finally:
            service.kill()


def _answers(path: str) -> bool:
    try:
        Client(path).close()
    except ConnectionLostError:
        return False
    return True


def _use_all_methods(address: str) -> None:
    """Use the methods that 0.9 has as well."""
    with Client(address) as client, client.opened(STORE) as store:
        assert client.call(GetInfo()).vendor == "org.composefs"
        assert client.call(varlink.GetInfo()).features
        assert client.call(Fsck(store.handle)).ok
        assert client.call(ListImageRefs(store.handle)).images == []
        assert client.call(Gc(store.handle, dry_run=True)).dry_run
        with pytest.raises(NoSuchRefError):
            client.call(ImageObjects(store.handle, "refs/none"))
        (image,) = client.call(varlink.ListImages(store.handle)).images
        assert (image.name, image.layer_count, image.os) == ("app", 2, "linux")
        client.call(varlink.Tag(store.handle, image.manifest_digest, "again"))
        client.call(varlink.Untag(store.handle, "app"))
        found = client.call(varlink.Inspect(store.handle, "again"))
        assert json.loads(found.manifest)["schemaVersion"] == 2
        assert client.call(varlink.Check(store.handle)).images_checked == 1
        assert found.composefs_erofs == (
            client.call(varlink.ComputeId(store.handle, "again")).image_id
        )
        call = varlink.Pull(store.handle, f"oci:{os.getcwd()}/layout:v1", "app")
        *_, last = client.stream(call)
        assert last.completed is not None
        assert last.completed.manifest_digest == image.manifest_digest
        client.call(varlink.Untag(store.handle, "app"))
        client.send(varlink.Untag(store.handle, "again"))
        assert client.call(varlink.ListImages(store.handle)).images == []
        with pytest.raises(InvalidHandleError):
            client.call(Fsck(999))


def test_an_image_goes_to_another_store(address: str) -> None:
    assert run_cfsctl(["init", "--insecure", "--algorithm", "fsverity-sha256-12", "other"]) == 0
    with (
        Client(address) as client,
        Client(address) as second,
        client.opened(STORE) as source,
        second.opened("other") as target,
    ):
        image = client.call(varlink.Inspect(source.handle, "app"))
        layers = []
        for diff_id in json.loads(image.config)["rootfs"]["diff_ids"]:
            assert not client.call(HasLayer(target.handle, diff_id)).present
            fds: list[int] = []
            for reply in client.stream(GetLayer(source.handle, GetLayerParams(diff_id=diff_id))):
                fds += [reply.descriptors.take(index) for index in range(len(reply.descriptors))]
            sent = second.call(PutLayer(target.handle, diff_id, fds=fds[: reply.dir_count + 1]))
            close_all(fds)
            layers.append(LayerRef(diff_id=diff_id, layer_verity=sent.layer_verity))
        call = FinalizeImage(target.handle, image.manifest, image.config, layers, "copied")
        second.call(call)
        assert second.call(varlink.Check(target.handle, "copied")).ok
        missing = GetLayerParams(diff_id="sha256:" + "0" * 64)
        with pytest.raises(NoSuchLayerError):
            list(client.stream(GetLayer(source.handle, missing)))


def test_pulls_report_progress(address: str) -> None:
    async def run() -> list[varlink.PullReply]:
        async with AsyncClient(address) as client, client.opened(STORE) as store:
            call = varlink.Pull(store.handle, "oci:layout:v1", "second")
            return [reply async for reply in client.stream(call)]

    replies = asyncio.run(run())
    assert all(reply.completed is None for reply in replies[:-1])
    assert replies[-1].completed is not None
