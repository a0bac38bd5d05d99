"""The client, and ``--connect``, against the service; it is the same store by both ways."""

import asyncio
import hashlib
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
from cfs.service.assemble import assembled
from cfs.service.fuse_registry import FuseMounts
from cfs.service.handles import StoreOptions
from tests.command_line import unpack_tree
from tests.integration.waiting import wait_until
from tests.varlink_client import serving

Capture = pytest.CaptureFixture[bytes]
STORE = "home/.var/lib/composefs"
MANIFEST = "sha256:c33b0626be461148711e797df21d06fb54771836a2c1125ae499e11d22f28355"


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A service whose store, by default, holds the image ``app``, in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("cfs.repository.repository._SYSTEM_PATH", str(tmp_path / STORE))
    unpack_tree(tmp_path)
    assert run_cfsctl(["init", "--insecure", STORE]) == 0
    assert run_cfsctl(["--repo", STORE, "oci", "pull", "-q", "oci:layout:v1", "app"]) == 0
    with (
        assembled(StoreOptions(), FuseMounts()) as dispatcher,
        serving(dispatcher, tmp_path / "sock"),
    ):
        yield f"unix:{tmp_path}/sock"


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


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = run_cfsctl(arguments)
    return status, *capfd.readouterr()


SAME = [
    ["fsck"], ["fsck", "--json"], ["images"], ["images", "--json"], ["gc", "--dry-run"],
    ["image-objects", "one"], ["oci", "images"], ["oci", "images", "--json"],
    ["oci", "inspect", "app"], ["oci", "inspect", "--manifest", "app"], ["oci", "fsck"],
    ["oci", "fsck", "--json", "app"], ["oci", "compute-id", "app"],
    ["oci", "pull", "oci:layout:v1", "more"], ["oci", "pull", "-q", "oci:layout:v1"],
    ["oci", "tag", MANIFEST, "two"], ["gc"],
    ["--hash", "sha512", "images"],
]  # fmt: skip
FAILING = [
    ["image-objects", "none"], ["oci", "inspect", "none"], ["oci", "untag", "none"],
    ["oci", "compute-id", "none"], ["oci", "pull", "oci:none"], ["--hash", "sha256", "images"],
    ["oci", "tag", "sha256:" + "0" * 64, "lost"], ["oci", "fsck", "none"],
]  # fmt: skip


def test_commands_print_the_same_with_and_without_connect(
    address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    image = run(capfd, "--repo", STORE, "oci", "compute-id", "app")[1].strip()
    refs = Path(STORE, "images/refs")
    refs.mkdir(exist_ok=True)
    (refs / "one").symlink_to(f"../{image}")
    differences = []
    for command in SAME:
        here = run(capfd, "--repo", STORE, *command)
        there = run(capfd, "--connect", address, *command)
        if here != there or here[0]:
            differences.append((command, here, there))
    for command in FAILING:
        here = run(capfd, "--repo", STORE, *command)
        there = run(capfd, "--connect", address, *command)
        if (here[0], there[0]) != (1, 1) or here[1] != there[1] or there[2].count("\n") != 1:
            differences.append((command, here, there))
    assert differences == []


def test_layers_pass_as_tars(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Capture
) -> None:
    capfdbinary.readouterr()
    assert run_cfsctl(["--repo", STORE, "oci", "inspect", "--config", "app"]) == 0
    diff_ids = json.loads(capfdbinary.readouterr().out)
    assert run_cfsctl(["init", "--insecure", "--algorithm", "fsverity-sha256-12", "other"]) == 0
    for diff_id in diff_ids["rootfs"]["diff_ids"]:
        capfdbinary.readouterr()
        assert run_cfsctl(["--connect", address, "oci", "layer", diff_id]) == 0
        tar = capfdbinary.readouterr().out
        assert f"sha256:{hashlib.sha256(tar).hexdigest()}" == diff_id
        (tmp_path / "tar").write_bytes(tar)
        with (tmp_path / "tar").open() as file:
            monkeypatch.setattr("sys.stdin", file)
            monkeypatch.setattr("cfs.repository.repository._SYSTEM_PATH", str(tmp_path / "other"))
            assert run_cfsctl(["--connect", address, "oci", "import-layer", diff_id]) == 0
            there = capfdbinary.readouterr().out
            file.seek(0)
            assert run_cfsctl(["init", "--insecure", "--algorithm", "fsverity-sha256-12", "x"]) == 0
            capfdbinary.readouterr()
            assert run_cfsctl(["--repo", "x", "oci", "import-layer", diff_id]) == 0
        assert capfdbinary.readouterr().out == there
        monkeypatch.setattr("cfs.repository.repository._SYSTEM_PATH", str(tmp_path / STORE))


def test_an_image_of_ours_is_copied_into_the_store_of_the_service(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for store in ("near", "far"):
        assert run_cfsctl(["init", "--insecure", store]) == 0
    capfd.readouterr()
    monkeypatch.setattr("cfs.repository.repository._SYSTEM_PATH", str(tmp_path / "far"))
    words = ["oci", "copy", "--from", STORE, "--name", "copied", "app"]
    here = run(capfd, "--repo", "near", *words)
    there = run(capfd, "--connect", address, *words)
    assert here == there
    assert here[0] == 0
    assert run(capfd, "--repo", "far", "oci", "fsck", "copied")[0] == 0


@pytest.mark.parametrize("content", [b"x" * 600, bytes(1024)])
def test_a_tar_that_is_none_is_refused(
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: Capture,
    content: bytes,
) -> None:
    (tmp_path / "tar").write_bytes(content)
    capfdbinary.readouterr()
    with (tmp_path / "tar").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        status = run_cfsctl(["--connect", address, "oci", "import-layer", "sha256:" + "0" * 64])
    found = capfdbinary.readouterr()
    assert (status, found.out, found.err.count(b"\n")) == (1, b"", 1)
    assert found.err.startswith((b"Error: tar: ", b"Error: DiffIdMismatch: "))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--repo", "x", "images"], ["--user", "images"], ["--system", "images"],
        ["--erofs-version", "2", "images"], ["--insecure", "images"], ["--no-upgrade", "images"],
        ["cat", "x"], ["transaction"], ["create-image", "x"], ["dump-files", "x", "y"],
        ["compute-id", "x"], ["oci", "layer", "--json", "sha256:" + "0" * 64], ["oci", "dump", "x"],
        ["oci", "import-layer", "sha256:" + "0" * 64, "name"],
        ["init"], ["init", "--reset-metadata", "x"], ["gc", "--remove-broken"],
        ["gc", "--no-wait"], ["oci", "pull", "--arch", "arm64", "oci:x"], ["umount"],
        ["oci", "pull", "--tls-verify=false", "oci:x"], ["fuse-serve", "--stats", "x", "y"],
        ["fuse-serve", "--basedir", "x", "y", "z"], ["fuse-serve", "--grace", "1", "x", "y"],
        ["mount", "--fuse=passthrough=auto", "x", "y"],
        ["oci", "inspect", "--manifest", "--config", "x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_no_method_does_is_a_usage_error(
    address: str, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    status, out, error = run(capfd, "--connect", address, *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("error: ")


def test_stores_are_made_where_the_caller_says(
    address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    here = run(capfd, "init", "--insecure", "a")
    there = run(capfd, "--connect", address, "init", "--insecure", "b")
    assert there == (0, here[1].replace("at a", "at b"), "")
    assert Path("b/meta.json").read_text() == Path("a/meta.json").read_text()
    here = run(capfd, "init", "--insecure", "a")
    there = run(capfd, "--connect", address, "init", "--insecure", "b")
    assert there == (0, here[1].replace("at a", "at b"), "")
    again = run(capfd, "--connect", address, "init", "--ensure", "b")
    assert again[1] == "Repository already initialized at b (existing configuration preserved)\n"


def test_without_an_address_the_unit_of_the_user_is_asked(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = tmp_path / "run"
    (runtime / "composefs").mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    status, _, error = run(capfd, "--connect", "images")
    assert status == 1
    assert error.startswith("Error: cannot connect to unix:")
    (runtime / "composefs" / "composefs.sock").symlink_to(tmp_path / "sock")
    assert run(capfd, "--connect", "images") == (0, "No images found\n", "")
    assert run(capfd, "--connect=", "images")[0] == 0
    assert address
