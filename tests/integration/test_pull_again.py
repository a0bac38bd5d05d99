"""Pulls of what is in the store already, whole or not, and several pulls at once."""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfs.cli.cfsctl import run
from cfs.linux.files import sync_file_system
from cfs.objectdir import pending
from cfs.oci.document_updates import update_config
from cfs.oci.documents import ConfigDocument, load_config
from cfs.oci.pull import Pulled, link_boot, pull
from cfs.oci.sources import SourceOptions
from cfs.repository.locks import lock_soon
from cfs.repository.repository import Repository
from tests.oci_layouts import TAR, Layout, make_tar

BASE = make_tar({"usr": None, "usr/a": b"a" * 100, "boot": None, "boot/k": b"k", "sysroot": None})
TOP = make_tar({"usr/b": b"b" * 5000, "usr/small": b"s"})
BLOB = b"blob" * 100
SPLITSTREAM = b"SplitStream"
EROFS = b"\xe2\xe1\xf5\xe0"

Cfsctl = Callable[..., str]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """The same image with layers of two types, and an artifact."""
    layout = Layout(tmp_path / "layout")
    for suffix in ("gzip", "zstd"):
        layout.add_image(suffix, [BASE, TOP], f"{TAR}+{suffix}")
    layout.add_artifact("artifact", [layout.add_blob(BLOB, "text/plain")])
    return layout


@pytest.fixture
def cfsctl(capsys: pytest.CaptureFixture[str], store: Path) -> Cfsctl:
    """Run a command in this process, which has to succeed without a warning."""
    capsys.readouterr()

    def call(*arguments: str) -> str:
        status = run(["--repo", str(store), *arguments])
        stdout, stderr = capsys.readouterr()
        assert (status, stderr) == (0, ""), arguments
        return stdout

    return call


def pull_all(cfsctl: Cfsctl, layout: Layout) -> None:
    for tag in ("gzip", "zstd", "artifact"):
        options = () if tag == "artifact" else ("--bootable",)
        cfsctl("oci", "pull", *options, f"oci:{layout.path}:{tag}", tag)


def inspect(cfsctl: Cfsctl, tag: str, version: int = 1) -> dict[str, Any]:
    found = json.loads(cfsctl("--erofs-version", str(version), "oci", "inspect", tag))
    return {key: found[key] for key in ("composefs_erofs", "composefs_boot_erofs")}


def contents_of(store: Path) -> dict[str, bytes | str]:
    """Return all files and links of a store."""
    return {
        str(path.relative_to(store)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in store.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def flip(data: bytes, off: int) -> bytes:
    return data[:off] + bytes([data[off] ^ 1]) + data[off + 1 :]


def damages_of(data: bytes) -> list[bytes | None]:
    """Return what may become of an object, None if it is gone, that a pull notices."""
    is_file = not (data.startswith((SPLITSTREAM, b"{")) or data[1024:1028] == EROFS)
    # what is in files is for fsck to read
    return [None] if is_file else [None, data[: len(data) // 3], flip(data, len(data) // 2), b""]


def test_another_pull_mends_what_was_lost(
    cfsctl: Cfsctl, layout: Layout, store: Path, tmp_path: Path
) -> None:
    pull_all(cfsctl, layout)
    cfsctl("gc")
    whole = contents_of(store)
    aside = tmp_path / "aside"
    shutil.copytree(store, aside, symlinks=True)
    objects = [name for name in whole if name.startswith("objects/")]
    kinds = {SPLITSTREAM: 0, b"{": 0}
    for name in objects:
        data = whole[name]
        assert isinstance(data, bytes)
        for start in kinds:
            kinds[start] += data.startswith(start)
        for damage in damages_of(data):
            (store / name).unlink()
            if damage is not None:
                (store / name).write_bytes(damage)
            pull_all(cfsctl, layout)
            cfsctl("gc")
            assert contents_of(store) == whole, (name, damage)
            cfsctl("oci", "fsck")
            shutil.rmtree(store)
            shutil.copytree(aside, store, symlinks=True)
    assert kinds == {SPLITSTREAM: 3 + 2 + 3, b"{": 5}


def test_names_come_in_order_after_one_sync(
    layout: Layout, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has a name is complete and durable; syncs may take long, so all wait for one."""
    steps: list[str] = []

    def note_sync(fd: int) -> None:
        steps.append("sync")
        sync_file_system(fd)

    def note_link(target: bytes, name: bytes, *, dir_fd: int) -> None:
        steps.append(re.sub(r"(-?sha256:)?[0-9a-f]{64}", "", os.fsdecode(name)) or "image")
        symlink(target, name, dir_fd=dir_fd)

    symlink = os.symlink
    monkeypatch.setattr(pending, "sync_file_system", note_sync)
    monkeypatch.setattr(os, "symlink", note_link)
    with Repository.open(str(store)) as repository:
        pull(repository, f"oci:{layout.path}:gzip", SourceOptions(), name="tag")
    synced = ["sync", "sync"]  # contents, then the names of objects
    layers = steps[: steps.index("image") - 2]
    assert sorted(layers) == ["oci-layer", "oci-layer", *["sync"] * layers.count("sync")]
    assert steps[len(layers) :] == [*synced, "image", "oci-config", "oci-manifest", "tag"]


def test_a_lost_boot_image_is_forgotten(cfsctl: Cfsctl, layout: Layout, store: Path) -> None:
    """Otherwise collection complains of it until it is made again."""
    cfsctl("oci", "pull", "--bootable", f"oci:{layout.path}:gzip", "gzip")
    found = inspect(cfsctl, "gzip")
    boot = found["composefs_boot_erofs"]
    assert boot != found["composefs_erofs"]
    (store / "objects" / boot[:2] / boot[2:]).unlink()
    cfsctl("oci", "pull", f"oci:{layout.path}:gzip", "gzip")
    cfsctl("gc")
    cfsctl("oci", "fsck")
    assert inspect(cfsctl, "gzip") == {**found, "composefs_boot_erofs": None}
    cfsctl("oci", "pull", "--bootable", f"oci:{layout.path}:gzip", "gzip")
    assert inspect(cfsctl, "gzip") == found


def test_a_damaged_manifest_does_not_stop_others(
    cfsctl: Cfsctl, layout: Layout, store: Path
) -> None:
    """It names the same config, so it would be written again."""
    cfsctl("oci", "pull", f"oci:{layout.path}:gzip", "gzip")
    manifest = cfsctl("oci", "inspect", "--manifest", "gzip").removesuffix("\n").encode()
    (path,) = (path for path in store.glob("objects/*/*") if path.read_bytes() == manifest)
    path.write_bytes(flip(manifest, 20))
    cfsctl("oci", "pull", "--bootable", f"oci:{layout.path}:zstd", "zstd")
    assert inspect(cfsctl, "zstd")["composefs_boot_erofs"]
    cfsctl("oci", "pull", f"oci:{layout.path}:gzip", "gzip")
    assert inspect(cfsctl, "gzip") == inspect(cfsctl, "zstd")
    cfsctl("oci", "fsck")


@pytest.mark.parametrize("what", ["pull", "boot image"])
def test_images_that_others_add_meanwhile_are_kept(
    store: Path, layout: Layout, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they refer to is read, changed and written again: one at a time."""
    waits = threading.Event()

    def lock_soon_and_tell(fd: int) -> None:
        waits.set()
        lock_soon(fd)

    with Repository.open(str(store)) as first, Repository.open(str(store)) as second:

        def fetch(repository: Repository, tag: str) -> Pulled:
            image = f"oci:{layout.path}:{tag}"
            return pull(repository, image, SourceOptions(), name=tag)

        pulled = fetch(first, "gzip")
        other = first.objects.put_bytes(b"image of another format" * 10)
        config = load_config(first, pulled.config_digest)
        work = {
            "pull": lambda: fetch(second, "zstd"),
            "boot image": lambda: link_boot(second, pulled),
        }
        thread = threading.Thread(target=work[what])
        with first.updating():
            monkeypatch.setattr("cfs.repository.repository.lock_soon", lock_soon_and_tell)
            thread.start()
            assert waits.wait(60), "nobody waits for the lock"
            document = ConfigDocument(
                digest=config.digest,
                data=config.data,
                layers=config.layers,
                images={"composefs.image": other},
            )
            update_config(first, document)
        thread.join()
        images = load_config(first, config.digest).images
        expected = {**config.images, "composefs.image": other}
        assert {key: images[key] for key in expected} == expected
        assert set(images) - set(expected) == (
            {"composefs.image.boot.v1"} if what == "boot image" else set()
        )


def test_pulls_at_once(cfsctl: Cfsctl, store: Path, layout: Layout) -> None:
    failures: list[BaseException] = []

    def work(tag: str, *, bootable: bool) -> None:
        image = f"oci:{layout.path}:{tag}"
        try:
            with Repository.open(str(store)) as repository:
                pulled = pull(repository, image, SourceOptions(), name=tag, bootable=bootable)
                if bootable:
                    link_boot(repository, pulled)
        except BaseException as error:  # noqa: BLE001 - for the thread of the test
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(tag,), kwargs={"bootable": bootable})
        for tag, bootable in [("gzip", False), ("gzip", True), ("zstd", False), ("artifact", False)]
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    cfsctl("gc")
    cfsctl("oci", "fsck")
    found = inspect(cfsctl, "gzip")
    assert found == inspect(cfsctl, "zstd")
    assert all(found.values())
