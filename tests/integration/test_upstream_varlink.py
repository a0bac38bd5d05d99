"""Every check of composefs-rs's own varlink tests (spec cli-and-varlink b.8), by another client.

Each test is named as there.  Copying between services is in ``test_varlink_peer_layers.py``,
socket activation in ``test_varlink_activation.py``.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cfs.cli.cfsctl import run as run_cfsctl
from cfs.service.handles import StoreOptions
from tests.command_line import run
from tests.foreign_clients import Asyncvarlink, Refused, foreign_client
from tests.integration.varlink_replay import whole_service
from tests.oci_layouts import Layout, digest_of, make_tar
from tests.varlink_client import Json, serving

TAR = make_tar(
    {"boot": None, "sysroot": None, "usr": None, "usr/lib": None, "usr/lib/code": b"code" * 30_000}
)


class Store(NamedTuple):
    """An open store of format 2."""

    client: Asyncvarlink
    path: Path
    handle: int

    def call(self, method: str, **parameters: object) -> Json:
        """Call a method of the store's interface, or ``Oci.`` and one of the other."""
        name = method if "." in method else f"Repository.{method}"
        return self.client.call(f"org.composefs.{name}", handle=self.handle, **parameters)

    def pull(self, name: str) -> list[Json]:
        """Pull an image by this name."""
        layout = self.path.parent / f"layout-{name}"
        Layout(layout).add_image("v1", [TAR])
        return self.client.more("org.composefs.Oci.Pull", handle=self.handle, name=name,
                                image=f"oci:{layout}:v1", local_fetch="disabled",
                                bootable=False)  # fmt: skip


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    options = StoreOptions(insecure=True)
    with (
        whole_service(options) as dispatcher,
        serving(dispatcher, tmp_path / "sock"),
        foreign_client(Asyncvarlink.name, tmp_path / "sock", []) as made,
    ):
        yield made


@pytest.fixture
def store(client: Asyncvarlink, tmp_path: Path) -> Store:
    path = tmp_path / "store"
    assert run_cfsctl(["--repo", str(path), "--erofs-version", "2", "init", "--insecure"]) == 0
    opened = client.call("org.composefs.Repository.OpenRepository", path=str(path))
    return Store(client, path, opened["handle"])


@pytest.fixture
def store_with_image(store: Store, tmp_path: Path) -> Store:
    tree = tmp_path / "tree"
    (tree / "usr").mkdir(parents=True)
    for name in ("a", "b"):
        (tree / name).write_bytes(name.encode() * 10_000)
    assert run_cfsctl(["--repo", str(store.path), "create-image", str(tree), "my-image"]) == 0
    return store


def refused(client: Asyncvarlink, method: str, **parameters: object) -> tuple[str, Json]:
    with pytest.raises(Refused) as caught:
        client.call(f"org.composefs.{method}", **parameters)
    return caught.value.name.removeprefix("org.composefs."), caught.value.parameters


def test_varlink_fsck_empty_repo(store: Store) -> None:
    found = store.call("Fsck")
    assert (found["ok"], found["objects_checked"], found["errors"]) == (True, 0, [])


def test_varlink_fsck_healthy_repo(store_with_image: Store) -> None:
    found = store_with_image.call("Fsck")
    assert (found["ok"], found["objects_corrupted"], found["errors"]) == (True, 0, [])
    assert found["objects_checked"] > 0


def test_varlink_fsck_metadata_only(store_with_image: Store) -> None:
    found = store_with_image.call("Fsck", metadata_only=True)
    assert (found["ok"], found["objects_checked"]) == (True, 0)


def test_varlink_fsck_detects_corruption(store_with_image: Store) -> None:
    damaged = next((store_with_image.path / "objects").glob("*/*"))
    damaged.chmod(0o600)
    damaged.write_bytes(b"other")
    found = store_with_image.call("Fsck")
    assert found["ok"] is False
    assert found["objects_corrupted"] > 0
    assert found["errors"]


def test_varlink_gc_empty_repo(store: Store) -> None:
    found = store.call("Gc", dry_run=False, roots=[])
    assert (found["result"]["objects_removed"], found["result"]["objects_bytes"]) == (0, 0)
    assert found["dry_run"] is False


def test_varlink_gc_dry_run(store_with_image: Store) -> None:
    assert store_with_image.call("Gc", dry_run=True, roots=[])["dry_run"] is True
    assert store_with_image.call("ImageObjects", name="refs/my-image")["object_ids"]


def test_varlink_image_objects(store_with_image: Store) -> None:
    found = store_with_image.call("ImageObjects", name="refs/my-image")["object_ids"]
    assert found
    assert found == sorted(found)
    assert all(":" in name for name in found)


def test_varlink_image_objects_missing(store: Store) -> None:
    asked = {"handle": store.handle, "name": "refs/does-not-exist"}
    found = refused(store.client, "Repository.ImageObjects", **asked)
    assert found == ("Repository.NoSuchRef", {"reference": "refs/does-not-exist"})


def test_varlink_oci_list_images(store: Store) -> None:
    assert store.call("Oci.ListImages") == {"images": []}
    store.pull("test-image")
    (image,) = store.call("Oci.ListImages")["images"]
    assert image["name"] == "test-image"
    assert image["manifest_digest"].startswith("sha256:")
    assert store.call("Oci.ListImages", filter="t-im")["images"] == [image]
    assert store.call("Oci.ListImages", filter="other") == {"images": []}


@pytest.mark.parametrize("asked", [{}, {"image": "test-image"}])
def test_varlink_oci_fsck(store: Store, asked: Json) -> None:
    store.pull("test-image")
    found = store.call("Oci.Check", **asked)
    assert (found["ok"], found["images_checked"], found["repo"]["ok"]) == (True, 1, True)


def test_varlink_oci_inspect(store: Store) -> None:
    store.pull("test-image")
    found = store.call("Oci.Inspect", image="test-image")
    assert json.loads(found["manifest"])["layers"]
    assert json.loads(found["config"])["rootfs"]["diff_ids"] == [digest_of(TAR)]
    asked = {"handle": store.handle, "image": "no-such-image"}
    missing = refused(store.client, "Oci.Inspect", **asked)
    assert missing == ("Oci.NoSuchImage", {"image": "no-such-image"})


def test_varlink_oci_tag_and_untag(store: Store) -> None:
    digest = store.pull("v1")[-1]["completed"]["manifest_digest"]

    def names() -> set[str]:
        return {image["name"] for image in store.call("Oci.ListImages")["images"]}

    assert store.call("Oci.Tag", manifest_digest=digest, name="other") == {}
    assert names() == {"v1", "other"}
    assert store.call("Oci.Untag", name="other") == {}
    assert names() == {"v1"}


def test_varlink_oci_compute_id(store: Store, tmp_path: Path) -> None:
    store.pull("test-image")
    found = store.call("Oci.ComputeId", image="test-image", verity=None, bootable=False)
    said = run("cfsctl", "--repo", store.path, "oci", "compute-id", "test-image", cwd=tmp_path)
    assert said.stdout.decode().strip().rpartition(":")[2] == found["image_id"]


def test_varlink_oci_pull_streaming(store: Store) -> None:
    replies = store.pull("test-image")
    set_members = [[key for key, value in reply.items() if value is not None] for reply in replies]
    assert all(len(members) == 1 for members in set_members)
    assert [members == ["completed"] for members in set_members].count(True) == 1
    assert set_members[-1] == ["completed"]
    digest = replies[-1]["completed"]["manifest_digest"]
    (image,) = store.call("Oci.ListImages")["images"]
    assert (image["name"], image["manifest_digest"]) == ("test-image", digest)
    assert store.call("Oci.Inspect", image="test-image")["composefs_boot_erofs"] is None


def test_varlink_oci_pull_bad_image(store: Store, tmp_path: Path) -> None:
    asked = {"image": f"oci:{tmp_path}/nowhere:v1", "local_fetch": "disabled", "bootable": False}
    name, _ = refused(store.client, "Oci.Pull", handle=store.handle, **asked)
    assert name == "Oci.InternalError"


def test_varlink_oci_pull_bootable(store: Store) -> None:
    store.pull("test-image")
    asked = {"image": f"oci:{store.path.parent}/layout-test-image:v1", "name": "boot",
             "local_fetch": "disabled", "bootable": True}  # fmt: skip
    last = store.client.more("org.composefs.Oci.Pull", handle=store.handle, **asked)[-1]
    assert last["completed"]["boot_image"]


def test_varlink_open_and_close_repository(store: Store) -> None:
    opened = store.client.call("org.composefs.Repository.OpenRepository", path=str(store.path))
    second = store._replace(handle=opened["handle"])
    assert second.handle != store.handle
    assert second.call("Fsck")["ok"] is True
    assert second.call("CloseRepository") == {}
    gone = {"handle": second.handle}
    assert refused(store.client, "Repository.Fsck", **gone) == ("Repository.InvalidHandle", gone)
    assert store.call("Oci.ListImages") == {"images": []}


@pytest.mark.parametrize("asked", [{}, {"path": "/x", "user": True}])
def test_varlink_open_repository_invalid_spec(client: Asyncvarlink, asked: Json) -> None:
    assert refused(client, "Repository.OpenRepository", **asked)[0] == "Repository.InvalidSpec"


@pytest.mark.parametrize(
    "method",
    ["Repository.Fsck", "Oci.ListImages", "Repository.CloseRepository"],
)
def test_varlink_invalid_handle(client: Asyncvarlink, method: str) -> None:
    found = refused(client, method, handle=999)
    assert found == (f"{method.partition('.')[0]}.InvalidHandle", {"handle": 999})


def test_varlink_init_repository(client: Asyncvarlink, tmp_path: Path) -> None:
    asked = {"path": str(tmp_path / "new"), "algorithm": "fsverity-sha256-12", "insecure": True}
    for is_new in (True, False):
        found = client.call("org.composefs.Repository.InitRepository", **asked)
        assert found == {"created": is_new}
    opened = client.call("org.composefs.Repository.OpenRepository", path=asked["path"])
    assert opened["hash_algorithm"] == "sha256"
    wrong = {**asked, "path": str(tmp_path / "other"), "algorithm": "md5"}
    assert refused(client, "Repository.InitRepository", **wrong)[0] == "Repository.InvalidSpec"


def test_varlink_init_repository_still_bails_on_config_mismatch(store: Store) -> None:
    before = (store.path / "meta.json").read_bytes()
    asked = {"path": str(store.path), "insecure": True}
    name, _ = refused(store.client, "Repository.InitRepository", **asked)
    assert name == "Repository.InternalError"
    assert (store.path / "meta.json").read_bytes() == before


def test_varlink_ensure_repository(store: Store, tmp_path: Path) -> None:
    method = "org.composefs.Repository.EnsureRepository"
    new = str(tmp_path / "deep" / "new")
    assert store.client.call(method, path=new, insecure=True) == {"status": "Created"}
    before = (store.path / "meta.json").read_bytes()
    found = store.client.call(method, path=str(store.path), insecure=True)
    assert found == {"status": "Opened"}
    assert (store.path / "meta.json").read_bytes() == before
