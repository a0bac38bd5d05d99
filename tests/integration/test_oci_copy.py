"""``cfsctl oci copy``: images from store to store."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cfs.cli.cfsctl import run
from tests.oci_layouts import TAR, Layout, digest_of, make_tar

HASHES = ["sha256", "sha512"]
BIG = bytes(range(256)) * 300
TARS = [
    make_tar({"usr": None, "usr/big": BIG, "usr/small": b"small", "usr/middle": b"m" * 100}),
    make_tar({"usr/small": b"other", "etc": None, "etc/.wh.none": b""}),
]
ARCHIVE = make_tar({"chart": None, "chart/values": b"v" * 500})


class Result(NamedTuple):
    status: int
    stdout: str
    stderr: str

    @property
    def values(self) -> dict[str, str]:
        """What was printed after a label."""
        pairs = (line.split(":", 1) for line in self.stdout.splitlines() if ": " in line)
        return {label: value.strip() for label, value in pairs}


Cfsctl = Callable[..., Result]
Damage = Callable[[Path, bytes], None]


@pytest.fixture
def cfsctl(capsys: pytest.CaptureFixture[str]) -> Cfsctl:
    """Run a command in this process."""

    def call(store: Path, *arguments: str, status: int = 0) -> Result:
        result = Result(run(["--repo", str(store), *arguments]), *capsys.readouterr())
        assert result.status == status, result.stderr
        assert len(result.stderr.splitlines()) == (1 if status == 1 else 0) or status == 2
        return result

    return call


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "layout")
    layout.add_image("app", TARS)
    layout.add_artifact(
        "chart", [layout.add_blob(gzip_of(layout), f"{TAR}+gzip"),
                  layout.add_blob(b"short", "text/plain"), layout.add_blob(BIG, "text/plain")],
    )  # fmt: skip
    return layout


def gzip_of(layout: Layout) -> bytes:
    """Return the blob of an image's only layer."""
    (layer,) = layout.add_image("archive", [ARCHIVE])["layers"]
    return layout.blob(layer["digest"]).read_bytes()


class Stores:
    """Makes stores; those with images have all of the layout."""

    def __init__(self, directory: Path, layout: Layout, cfsctl: Cfsctl) -> None:
        self._directory = directory
        self._layout = layout
        self.cfsctl = cfsctl

    def empty(self, name: str, hash_name: str = "sha256") -> Path:
        path = self._directory / name
        self.cfsctl(path, "init", "--insecure", "--algorithm", f"fsverity-{hash_name}-12")
        return path

    def pulled(self, name: str, hash_name: str = "sha256") -> Path:
        path = self.empty(name, hash_name)
        for tag in ("app", "chart"):
            self.cfsctl(path, "oci", "pull", "-q", f"oci:{self._layout.path}:{tag}", tag)
        return path


@pytest.fixture
def stores(tmp_path: Path, layout: Layout, cfsctl: Cfsctl) -> Stores:
    return Stores(tmp_path, layout, cfsctl)


def names_of(store: Path) -> set[str]:
    """Names of streams and images, those of users too."""
    return {
        str(path.relative_to(store)) for word in ("streams", "images")
        for path in (store / word).rglob("*") if path.is_symlink()
    }  # fmt: skip


def objects_of(store: Path) -> dict[str, Path]:
    objects = store / "objects"
    return {str(path.relative_to(objects)): path for path in objects.rglob("*") if path.is_file()}


def inspect(cfsctl: Cfsctl, store: Path, image: str) -> dict[str, Any]:
    inspected: dict[str, Any] = json.loads(cfsctl(store, "oci", "inspect", image).stdout)
    return inspected


@pytest.mark.parametrize("to_hash", HASHES)
@pytest.mark.parametrize("from_hash", HASHES)
def test_copies_are_what_a_pull_would_have_given(
    from_hash: str, to_hash: str, stores: Stores, cfsctl: Cfsctl
) -> None:
    source, target = stores.pulled("source", from_hash), stores.empty("target", to_hash)
    manifest = digest_of(inspect(cfsctl, source, "app")["manifest"].encode())
    copied = cfsctl(target, "oci", "copy", "app", "--from", str(source), "--name", "mine")
    assert copied.stdout.startswith(
        f"Copied image app from {source} to destination repo, tagged as mine\n"
        f"Manifest digest: {manifest}\nManifest verity: "
    )
    again = cfsctl(target, "oci", "copy", f"@{manifest}", "--from", str(source))
    assert again.stdout == copied.stdout.replace("image app", f"image @{manifest}").replace(
        ", tagged as mine", ""
    )
    cfsctl(target, "oci", "copy", "chart", "--from", str(source), "--name", "chart")
    pulled = stores.pulled("pulled", to_hash)
    assert inspect(cfsctl, target, "mine") == inspect(cfsctl, pulled, "app")
    assert inspect(cfsctl, target, "chart") == inspect(cfsctl, pulled, "chart")
    assert names_of(target) ^ names_of(pulled) == {"streams/refs/oci/mine", "streams/refs/oci/app"}
    cfsctl(target, "oci", "fsck")
    before = objects_of(target).keys()
    cfsctl(target, "gc")
    cfsctl(pulled, "gc")
    assert objects_of(target).keys() == objects_of(pulled).keys()
    assert before >= objects_of(target).keys()


def test_copy_without_a_name_is_collected(stores: Stores, cfsctl: Cfsctl) -> None:
    source, target = stores.pulled("source"), stores.empty("target")
    cfsctl(target, "oci", "copy", "app", "--from", str(source))
    assert json.loads(cfsctl(target, "oci", "images", "--json").stdout) == {"images": []}
    cfsctl(target, "gc")
    assert objects_of(target) == {}


def test_layers_that_are_there_are_not_copied(
    stores: Stores, cfsctl: Cfsctl, layout: Layout
) -> None:
    source, target = stores.pulled("source"), stores.pulled("target")
    layout.add_image("more", [*TARS, make_tar({"usr/new": b"n" * 500})])
    cfsctl(source, "oci", "pull", "-q", f"oci:{layout.path}:more", "more")
    # a source that lacks their objects is good enough
    (path,) = [path for path in objects_of(source).values() if path.read_bytes() == BIG]
    path.unlink()
    before = objects_of(target).keys()
    cfsctl(target, "oci", "copy", "more", "--from", str(source), "--name", "more")
    new = objects_of(target).keys() - before
    assert any(objects_of(target)[name].read_bytes() == b"n" * 500 for name in new)
    cfsctl(target, "oci", "fsck")


def test_boot_image_is_left_out(stores: Stores, cfsctl: Cfsctl, layout: Layout) -> None:
    layout.add_image(
        "boot", [make_tar({"boot": None, "boot/x": b"x", "sysroot": None, "usr": None})]
    )
    source, target = stores.empty("source"), stores.empty("target")
    cfsctl(source, "oci", "pull", "-q", "--bootable", f"oci:{layout.path}:boot", "boot")
    cfsctl(target, "oci", "copy", "boot", "--from", str(source), "--name", "boot")
    theirs, ours = (inspect(cfsctl, store, "boot") for store in (source, target))
    assert theirs["composefs_boot_erofs"] is not None
    assert ours == {**theirs, "composefs_boot_erofs": None}


def test_zerocopy_shares_objects_or_fails(
    stores: Stores, cfsctl: Cfsctl, other_device: Path
) -> None:
    source, near = stores.pulled("source"), stores.empty("near")
    far = Stores(other_device, Layout(other_device / "none"), cfsctl).empty("far")
    words = ["oci", "copy", "app", "--from", str(source), "--name", "app", "--zerocopy"]
    refused = cfsctl(far, *words, status=1)
    assert "neither reflink nor hard link is possible" in refused.stderr
    assert names_of(far) == set()
    if run(["--repo", str(near), *words]) == 0:  # not on every file system, nor for every user
        cfsctl(near, "oci", "fsck")
    else:
        assert names_of(near) == set()


def test_copies_share_no_file_unless_that_was_said(stores: Stores, cfsctl: Cfsctl) -> None:
    """Else who may write to the other store may write to this one."""
    source, target = stores.pulled("source"), stores.empty("target")
    cfsctl(target, "oci", "copy", "app", "--from", str(source), "--name", "app")
    assert objects_of(target).keys() & objects_of(source).keys()
    assert {path.stat().st_nlink for path in objects_of(target).values()} == {1}


@pytest.fixture
def other_device(tmp_path: Path) -> Iterator[Path]:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to write to")
    directory = shared / f"cfs-copy-{os.getpid()}"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def test_zerocopy_between_hashes_is_refused(stores: Stores, cfsctl: Cfsctl) -> None:
    source, target = stores.pulled("source", "sha512"), stores.empty("target", "sha256")
    words = ["oci", "copy", "app", "--from", str(source), "--zerocopy"]
    message = cfsctl(target, *words, status=1).stderr
    assert "zerocopy" in message
    assert "hash algorithm" in message
    assert names_of(target) == set()


def test_usage_and_names(stores: Stores, cfsctl: Cfsctl, tmp_path: Path) -> None:
    source, target = stores.pulled("source"), stores.empty("target")
    origin = ["--from", str(source)]
    for words, status, message in (
        (["app"], 2, "--from"),
        (["@sha256:00", *origin], 2, "sha256:00"),
        (["nope", *origin], 1, "nope"),
        ([f"@sha256:{'0' * 64}", *origin], 1, "0" * 64),
        (["app", "--from", str(tmp_path / "none")], 1, f"opening source repository {tmp_path}"),
        (["app", *origin, "--name", "@x"], 1, "@x"),
        (["app", *origin, "--name", ""], 1, "invalid tag ''"),
        (["app", *origin, "--name", ".."], 1, "invalid tag '..'"),
        (["app", *origin, "--name", "x" * 256], 1, "256 bytes"),
    ):
        result = cfsctl(target, "oci", "copy", *words, status=status)
        assert message in result.stderr, words
        assert names_of(target) == set(), words
    assert "opening repository" in cfsctl(
        tmp_path / "none", "oci", "copy", "app", *origin, status=1
    ).stderr  # fmt: skip


def damage_object(store: Path, content: bytes) -> None:
    (path,) = [path for path in objects_of(store).values() if path.read_bytes() == content]
    path.write_bytes(content[:-1] + b"?")


def remove_object(store: Path, content: bytes) -> None:
    (path,) = [path for path in objects_of(store).values() if path.read_bytes() == content]
    path.unlink()


def exchange_layers(store: Path, _: bytes) -> None:
    """Let the stream of each layer be that of the other; the manifest refers to what it did."""
    links = [store / f"streams/oci-layer-{digest_of(tar)}" for tar in TARS]
    objects = [link.resolve() for link in links]
    first, second = (path.read_bytes() for path in objects)
    objects[0].write_bytes(second)
    objects[1].write_bytes(first)


@pytest.mark.parametrize("to_hash", HASHES)
@pytest.mark.parametrize(
    ("image", "content", "damage"),
    [
        ("app", b"m" * 100, damage_object),
        ("app", b"m" * 100, remove_object),
        ("app", b"", exchange_layers),
        ("chart", b"v" * 500, damage_object),
        ("chart", b"v" * 500, remove_object),
    ],
    ids=["damaged", "missing", "exchanged", "artifact damaged", "artifact missing"],
)
def test_damaged_source_gives_no_image(
    image: str, content: bytes, damage: Damage, to_hash: str, stores: Stores
) -> None:
    source, target = stores.pulled("source"), stores.empty("target", to_hash)
    damage(source, content)
    words = ["oci", "copy", image, "--name", "copied", "--from"]
    stores.cfsctl(target, *words, str(source), status=1)
    assert not [name for name in names_of(target) if "manifest" in name or "refs" in name]
    stores.cfsctl(target, *words, str(stores.pulled("sound")))
    stores.cfsctl(target, "oci", "fsck")


@pytest.mark.parametrize("document", ["manifest", "config"])
def test_damaged_documents_of_the_source(document: str, stores: Stores, cfsctl: Cfsctl) -> None:
    source, target = stores.pulled("source"), stores.empty("target")
    content = inspect(cfsctl, source, "app")[document].encode()
    (path,) = [path for path in objects_of(source).values() if path.read_bytes() == content]
    path.write_bytes(content.replace(b"linux", b"Linux") + b" ")
    cfsctl(target, "oci", "copy", "app", "--from", str(source), "--name", "x", status=1)
    assert names_of(target) == set()


def test_copy_into_the_same_store_gives_a_second_name(stores: Stores, cfsctl: Cfsctl) -> None:
    store = stores.pulled("source")
    cfsctl(store, "oci", "copy", "app", "--from", str(store), "--name", "again")
    assert inspect(cfsctl, store, "again") == inspect(cfsctl, store, "app")


def test_store_that_must_not_be_written_gets_nothing(stores: Stores, cfsctl: Cfsctl) -> None:
    source, target = stores.pulled("source"), stores.empty("target")
    metadata = json.loads((target / "meta.json").read_bytes())
    metadata["features"]["read-only-compatible"].append("of the future")
    (target / "meta.json").write_text(json.dumps(metadata))
    before = sorted(target.rglob("*"))
    for command in (["copy", "--from", str(source), "app"], ["pull", "oci:/nowhere", "app"]):
        assert "of the future" in cfsctl(target, "oci", *command, status=1).stderr
    assert sorted(target.rglob("*")) == before
