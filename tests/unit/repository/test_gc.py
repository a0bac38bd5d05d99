"""What a collection keeps, removes and leaves alone."""

import errno
import fcntl
import os
import shutil
import stat
from pathlib import Path

import pytest

from cfs.digest import Digest
from cfs.errors import BusyError
from cfs.repository.fsck import check
from cfs.repository.gc import Collection, collect
from cfs.repository.refs import set_link
from cfs.repository.repository import Repository
from tests.stores import copy_store, list_paths, unpack_store

CONFIG = "sha256:6ff1cf0f448cfc84a9ca8c0d1c6d1d025aa9ac0ba8d26dc371958127a1339cc7"
BASE = "9476ce6857d0bf2ebbf4039e2ccb1a7ab20d90b67d0f5bc679de391e02f1c634"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_store("sha256", tmp_path_factory.mktemp("stores") / "store")


@pytest.fixture
def store(golden: Path, tmp_path: Path) -> Path:
    return copy_store(golden, tmp_path / "store")


def complaints(collection: Collection) -> list[str]:
    return [str(problem) for problem in collection.problems]


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_second_collection_finds_nothing(repository: Repository) -> None:
    first = collect(repository)
    assert (first.nr_objects, first.size) == (8, 27995)
    assert first.nr_links == {"images": 2, "streams": 1}
    assert collect(repository) == Collection()
    assert check(repository).errors == []


def test_leftovers_of_crashes_are_removed(store: Path, repository: Repository) -> None:
    left = [
        ".symlink-abcdefghijkl",
        ".symlink-ABCDEF123456",
        ".tmp-object-0123456789ab",
        "objects/.tmp-object-0123456789ab",
    ]
    (store / left[0]).symlink_to("../nowhere")
    for name in left[1:]:
        (store / name).touch()
    kept = [".symlink-short", "objects/.tmp-object-0123456789abc", "junk", "objects/zz"]
    for name in kept:
        (store / name).touch()
    assert collect(repository, dry_run=True).problems == []
    assert set(left) <= {line.partition(" -> ")[0] for line in list_paths(store)}
    collect(repository)
    paths = list_paths(store)
    assert not {line.partition(" -> ")[0] for line in paths} & set(left)
    assert set(kept) <= paths


def test_what_a_live_mount_serves_is_kept_and_a_dead_one_lets_go(
    store: Path, repository: Repository
) -> None:
    start = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    image = next(path.name for path in (store / "images").glob("c4d2*"))
    alive = f"mounted/{boot_id()}-{os.getpid()}-{start}"
    dead = f"mounted/{boot_id()}-{os.getpid()}-1"
    for name in (alive, dead):
        set_link(repository.fd, f"images/refs/{name}".encode(), f"images/{image}".encode())
    assert collect(repository, dry_run=True).nr_objects == 6
    collect(repository)
    assert (store / "images" / "refs" / alive).is_symlink()
    assert (store / "images" / image).exists()
    assert not (store / "images" / "refs" / dead).is_symlink()
    (store / "images" / "refs" / alive).rename(store / "images" / "refs" / dead)
    assert collect(repository, dry_run=True).nr_objects == 2
    collect(repository)
    assert not (store / "images" / image).is_symlink()
    assert check(repository).errors == []


def test_unreadable_image_keeps_every_object_until_its_name_goes(
    store: Path, repository: Repository
) -> None:
    """What it needs is not known, and may be all there is."""
    with (store / "images" / BASE).open("r+b") as image:
        image.seek(1024)
        image.write(b"\0")
    before = list_paths(store)
    collection = collect(repository)
    (complaint,) = complaints(collection)
    assert complaint.startswith(f"images/refs/base: image {BASE}: ")
    assert not collection.is_complete
    assert list_paths(store) == before
    removed = collect(repository, remove_broken=True)
    assert removed.problems == []
    assert removed.nr_links["images"] == 4
    assert check(repository).errors == []


def test_names_that_lead_nowhere_stay_until_told_otherwise(
    store: Path, repository: Repository
) -> None:
    (store / "images" / "refs" / "gone").symlink_to("../nothing")
    (store / "streams" / "refs" / "layers" / "gone").symlink_to("../../nothing")
    (store / "images" / "odd").symlink_to("nowhere")
    collection = collect(repository)
    assert sorted(complaints(collection)) == [
        "images/odd: link to 'nowhere': expected objects/XX/REST",
        "images/refs/gone: leads to nothing, which is not in images",
        "streams/refs/layers/gone: leads to nothing, which is not in streams",
    ]
    assert collection.nr_objects == 8
    assert (store / "images" / "refs" / "gone").is_symlink()
    removed = collect(repository, remove_broken=True)
    assert removed.nr_links == {"images": 2, "streams": 1}
    assert removed.problems == []
    assert check(repository).errors == []


def test_image_without_entry_is_kept_by_its_name(store: Path, repository: Repository) -> None:
    """The link can be made again as long as the objects are there."""
    (store / "images" / BASE).unlink()
    collection = collect(repository)
    assert len(collection.problems) == 1
    set_link(
        repository.fd, b"images/" + BASE.encode(), b"objects/" + Digest.parse(BASE).object_path
    )
    assert check(repository).errors == []


def test_image_that_is_a_directory(store: Path, repository: Repository) -> None:
    path = store / "objects" / BASE[:2] / BASE[2:]
    path.unlink()
    path.mkdir()
    collection = collect(repository, remove_broken=True)
    assert not (store / "images" / "refs" / "base").is_symlink()
    assert [str(each).partition(": ")[2] for each in collection.problems] == [
        "is no object but a directory"
    ]


def test_stream_that_is_no_file_keeps_every_object(store: Path, repository: Repository) -> None:
    """Composefs-rs then refuses, and nothing but a look at the objects tells why."""
    stream = next((store / "streams").glob("oci-config-*")).resolve()
    stream.unlink()
    stream.symlink_to(stream.name)
    collection = collect(repository)
    digest = stream.parent.name + stream.name
    assert complaints(collection) == [
        f"streams/refs/oci/example%2Fapp:v1: object {digest}: expected a regular file",
        f"streams/oci-config-{CONFIG}: Too many levels of symbolic links (os error 40)",
    ]
    assert (collection.nr_objects, collection.is_complete) == (0, False)
    assert collect(repository, remove_broken=True).is_complete
    assert collect(repository).problems == []


def test_layer_that_is_gone_takes_nothing_else_with_it(store: Path, repository: Repository) -> None:
    """The files of an image live through its layers; without these, through the image."""
    layer = next((store / "streams").glob("oci-layer-sha256:d1d1*")).resolve()
    layer.unlink()
    before = check(repository).errors
    collection = collect(repository)
    assert {each.path for each in collection.problems} == {b"streams/refs/oci/example%2Fapp:v1"}
    assert collection.is_complete
    assert set(check(repository).errors) <= set(before)
    collect(repository, remove_broken=True)
    assert check(repository).errors == []


@pytest.mark.parametrize("target", ["{0}/", "{0}/.", "{0}/../{1}", "../meta.json", "loop"])
def test_entry_that_leads_elsewhere_keeps_every_object(
    store: Path, repository: Repository, target: str
) -> None:
    """Which stream it was is not known, while names lead to it."""
    entry = next((store / "streams").glob("oci-manifest-*"))
    text = os.readlink(entry)
    entry.unlink()
    entry.symlink_to(entry if target == "loop" else target.format(text, text[-62:]))
    before = list_paths(store)
    collection = collect(repository)
    assert (collection.nr_objects, collection.is_complete) == (0, False)
    assert list_paths(store) == before
    name = f"streams/refs/oci/example%2Fapp:v1: leads to {entry.name}, which leads to no object"
    assert complaints(collection)[-1] == name
    assert collect(repository, remove_broken=True).is_complete
    assert check(repository).errors == []


@pytest.mark.parametrize("target", ["", "nowhere"])
def test_layer_that_lost_its_entry_is_kept_by_its_image(
    store: Path, repository: Repository, target: str
) -> None:
    entry = next((store / "streams").glob("oci-layer-sha256:d1d1*"))
    entry.unlink()
    if target:
        entry.symlink_to(target)
    collection = collect(repository)
    assert len(collection.problems) == bool(target)
    assert collection.nr_objects == 8
    collect(repository, remove_broken=True)
    assert check(repository).errors == []


def test_image_that_a_stream_names_is_gone(store: Path, repository: Repository) -> None:
    image = store / "images" / "735e561315168c36f26d472d0e00daf61bf6c2dba757a52af211f6bded9338cf"
    image.resolve().unlink()
    collection = collect(repository)
    assert [each.path for each in collection.problems] == [b"streams/refs/oci/example%2Fapp:v1"]
    assert collection.nr_links["images"] == 3
    assert not image.is_symlink()


def test_copy_made_without_links_loses_nothing(store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "copy")
    before = list_paths(copy)
    with Repository.open(str(copy)) as repository:
        assert not collect(repository, remove_broken=True).is_complete
    assert list_paths(copy) == before


def test_text_of_a_name_may_end_in_a_dot(store: Path, repository: Repository) -> None:
    """As composefs-rs sees it; nothing can be opened through it."""
    name = store / "images" / "refs" / "base"
    name.unlink()
    name.symlink_to(f"../{BASE}/./")
    assert collect(repository).nr_objects == 8
    assert (store / "images" / BASE).exists()


def test_damaged_image_without_entry_keeps_every_object(
    store: Path, repository: Repository
) -> None:
    entry = store / "images" / BASE
    os.truncate(entry.resolve(), 100)
    entry.unlink()
    assert collect(repository).nr_objects == 0
    assert collect(repository, remove_broken=True).problems == []


def test_image_may_be_called_as_the_directory_of_mounts(
    store: Path, repository: Repository
) -> None:
    """Composefs-rs gives any name."""
    (store / "images" / "refs" / "base").rename(store / "images" / "refs" / "mounted")
    assert collect(repository).problems == []
    assert (store / "images" / "refs" / "mounted").resolve().is_file()


def test_link_that_vanishes_meanwhile(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends removes its link without the lock."""
    gone = {"images": [b"images/refs/mounted/gone"], "streams": []}
    monkeypatch.setattr("cfs.repository.gc._links", lambda _, category: gone[category])
    assert collect(repository).nr_links == {"images": 2, "streams": 1}


def test_entry_of_another_algorithm_is_no_use(store: Path, repository: Repository) -> None:
    (store / "images" / ("ab" * 64)).symlink_to("../objects/ab/" + "ab" * 63)
    (complaint,) = complaints(collect(repository))
    assert complaint.endswith(": leads to an object of another algorithm")


def test_directory_with_the_name_of_a_temporary_is_left_alone(
    store: Path, repository: Repository
) -> None:
    (store / ".tmp-object-0123456789ab").mkdir()
    assert collect(repository).nr_objects == 8
    assert (store / ".tmp-object-0123456789ab").is_dir()


def test_object_that_may_not_be_removed(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = os.unlink

    def refuse(path: bytes, *, dir_fd: int) -> None:
        if len(path) == 62:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr("cfs.repository.gc.os.unlink", refuse)
    collection = collect(repository)
    assert collection.nr_objects == 0
    assert len(collection.problems) == 8
    assert complaints(collection)[0].endswith(": Operation not permitted (os error 1)")


def test_foreign_files_are_reported_and_left_alone(store: Path, repository: Repository) -> None:
    (store / "objects" / "4e" / "short").touch()
    (store / "objects" / "fe").touch()
    (store / "images" / "file").touch()
    os.mkfifo(store / "streams" / "refs" / "fifo")
    collection = collect(repository)
    assert sorted(complaints(collection)) == [
        "images/file: is no link but a RegularFile",
        "objects/4e/short: is no object: invalid string length",
        "objects/fe: Not a directory (os error 20)",
        "streams/refs/fifo: is no link but a Fifo",
    ]
    assert collection.nr_objects == 8
    assert (store / "objects" / "4e" / "short").exists()
    assert stat.S_ISFIFO((store / "streams" / "refs" / "fifo").stat().st_mode)


def test_directory_of_objects_is_not_followed(
    store: Path, repository: Repository, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ("ab" * 31)).write_text("precious")
    (store / "objects" / "fe").symlink_to(outside)
    collection = collect(repository)
    assert len(collection.problems) == 1
    assert (outside / ("ab" * 31)).exists()


def test_store_with_the_objects_of_another_one(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(store / "meta.json", other)
    (other / "objects").symlink_to("../store/objects")
    (store / "objects" / ".tmp-object-0123456789ab").touch()
    before = list_paths(store)
    with Repository.open(str(other)) as repository:
        for action in collect, check:
            with pytest.raises(NotADirectoryError, match="'objects'"):
                action(repository)
    assert list_paths(store) == before


def test_directory_of_names_is_not_followed(
    store: Path, repository: Repository, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").symlink_to("nowhere")
    (store / "images" / "refs" / "way").symlink_to(outside)
    collect(repository, remove_broken=True)
    assert (outside / "precious").is_symlink()


def test_names_that_are_not_utf8(store: Path, repository: Repository) -> None:
    name = os.fsencode(store) + b"/images/refs/\xff"
    image = next(path.name for path in (store / "images").glob("c4d2*"))
    os.symlink(f"../{image}".encode(), name)
    collect(repository)
    assert os.path.exists(name)
    assert check(repository).errors == []


def test_roots_may_have_any_name(repository: Repository) -> None:
    assert collect(repository, [b"\xff", b"", b"refs", b"../meta.json"]).nr_objects == 8


def test_links_go_before_the_objects_they_lead_to(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it is killed, no link dangles."""
    unlink = os.unlink
    nr_findings = []

    def check_then_unlink(path: bytes, *, dir_fd: int) -> None:
        nr_findings.append(len(check(repository, metadata_only=True).errors))
        unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr("cfs.repository.gc.os.unlink", check_then_unlink)
    collect(repository)
    assert nr_findings == [0] * 11


def test_store_without_anything(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "meta.json").write_text(
        '{"version": 1, "algorithm": "fsverity-sha256-12"}'
    )
    with Repository.open(str(tmp_path / "store")) as repository:
        assert collect(repository) == Collection()
        assert collect(repository, dry_run=True) == Collection()


def test_waiting_is_announced_and_ends(store: Path, repository: Repository) -> None:
    """A lock of another open counts as that of another process."""
    other = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(BusyError):
            collect(repository, wait=False)
        collection = collect(repository, on_wait=lambda: fcntl.flock(other, fcntl.LOCK_UN))
        assert collection.nr_objects == 8
    finally:
        os.close(other)
