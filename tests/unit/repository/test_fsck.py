"""What fsck finds: in streams, in ``meta.json``, and where composefs-rs hangs or sees nothing."""

import base64
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from cfs.digest import Algorithm
from cfs.fsverity import compute_digest
from cfs.repository.fsck import check
from cfs.repository.refs import Entry
from cfs.repository.repository import Repository
from tests.stores import ALGORITHMS, copy_store, load, unpack_store

Case = dict[str, Any]

STREAMS = [(name, case) for name in ALGORITHMS for case in load(name, "splitstreams.json")]
STREAM_IDS = [f"{name}-{case['name']}" for name, case in STREAMS]
METADATA = [(name, case) for name in ALGORITHMS for case in load(name, "metadata-findings.json")]
METADATA_IDS = [f"{name}-{case['name']}" for name, case in METADATA]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("stores")
    return {name: unpack_store(name, top / name) for name in ALGORITHMS}


@pytest.fixture
def store(stores: dict[str, Path], tmp_path: Path) -> Path:
    return copy_store(stores["sha256"], tmp_path / "store")


def put(store: Path, algorithm: str, data: bytes) -> str:
    """Write an object by hand; return its path."""
    digest = compute_digest(data, Algorithm.parse(algorithm))
    path = store / "objects" / os.fsdecode(digest.object_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return f"objects/{os.fsdecode(digest.object_path)}"


def test_names_that_vanish_meanwhile(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server of a mount removes its link at the end, whoever reads the store."""
    gone = Entry(b"mounted/gone", b"../../image", stat.S_IFLNK)
    monkeypatch.setattr("cfs.repository.fsck_links.walk_refs", lambda *_: [gone])
    assert check(repository, metadata_only=True).is_ok


@pytest.mark.parametrize(("algorithm", "case"), STREAMS, ids=STREAM_IDS)
def test_streams(stores: dict[str, Path], algorithm: str, case: Case, tmp_path: Path) -> None:
    """Of an enormous range, at which composefs-rs aborts, ours says what it says of others."""
    store = copy_store(stores[algorithm], tmp_path / "store")
    path = put(store, algorithm, base64.b64decode(case["data"]))
    (store / "streams" / "under-test").symlink_to(f"../{path}")
    expected = case["fsck"]
    if isinstance(expected, dict):
        detail = "streams/under-test: Opening stream 'under-test'"
        expected = [f"fsck: stream-open-failed: {detail}"]
    with Repository.open(str(store)) as repository:
        assert sorted(check(repository, metadata_only=True).errors) == expected


@pytest.mark.parametrize(("algorithm", "case"), METADATA, ids=METADATA_IDS)
def test_metadata_that_changes_while_the_store_is_open(
    stores: dict[str, Path], algorithm: str, case: Case, tmp_path: Path
) -> None:
    store = copy_store(stores[algorithm], tmp_path / "store")
    with Repository.open(str(store)) as repository:
        (store / "meta.json").unlink()
        if case["meta.json"] is not None:
            (store / "meta.json").write_text(case["meta.json"])
        report = check(repository, metadata_only=True)
    expected = case["reply"]
    if case["name"] == "not JSON":  # what follows are the words of each parser
        beginning = "fsck: metadata-parse-failed: meta.json: Reading repository metadata: "
        (error,) = report.errors
        assert error.startswith(beginning)
        assert expected["errors"][0].startswith(beginning)
        report.errors = expected["errors"]
    assert report.as_dict() == expected


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFLNK])
def test_nothing_is_waited_for_or_followed(
    store: Path, repository: Repository, kind: int, tmp_path: Path
) -> None:
    """A fifo among the objects hangs composefs-rs; a link to the right content passes there."""
    name = "4e515a6fa59dc7ce346522d2f39125ac3e826716d40cb5e4649e42a61e1a8b49"
    path = store / "objects" / name[:2] / name[2:]
    aside = path.rename(tmp_path / "aside")
    if kind == stat.S_IFLNK:
        path.symlink_to(aside)
    else:
        os.mknod(path, kind | 0o644)
    report = check(repository)
    assert report.objects_corrupted == 1
    assert {error.split(": ")[1] for error in report.errors} == {
        "object-open-failed",
        "object-check-failed",
    }


def test_device_is_not_opened(store: Path, repository: Repository) -> None:
    """Opening a device may do anything; the null device among the objects is just wrong."""
    try:
        path = store / "objects" / "4e" / ("ab" * 31)
        os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("needs the right to make devices")
    report = check(repository)
    expected = "No such device or address (os error 6)"
    assert report.errors == [
        f"fsck: object-open-failed: {path.relative_to(store)}: {expected}",
    ]


def test_image_link_to_outside_of_the_objects(store: Path, repository: Repository) -> None:
    image = next((store / "images").glob("9476*"))
    (store / "elsewhere").write_bytes(image.read_bytes())
    (store / "images" / "copy").symlink_to("../elsewhere")
    report = check(repository)
    (error,) = report.errors
    assert error.startswith("fsck: image-invalid: images/copy: link to '../elsewhere': expected")
    assert report.images_corrupted == 1


def test_image_under_the_id_of_another_one(store: Path, repository: Repository) -> None:
    """Where nothing is measured, that is what would be mounted."""
    one, two = sorted((store / "images").glob("[0-9a-f]*"))[:2]
    target = os.readlink(two)
    one.unlink()
    one.symlink_to(target)
    report = check(repository)
    assert report.errors == [f"fsck: image-invalid: images/{one.name}: leads to {two.name}"]


def test_names_that_are_not_utf8(store: Path, repository: Repository) -> None:
    directory = os.fsencode(store / "images" / "refs")
    os.symlink(b"../nothing", directory + b"/bad\xff\n")
    report = check(repository)
    assert report.errors == ["fsck: broken-symlink: images/refs/bad\\xff\n"]


def test_one_unreadable_object_among_many(store: Path, repository: Repository) -> None:
    """A file that cannot be digested does not spoil those that are digested with it."""
    for number in range(100):
        put(store, "sha256", f"content {number}".encode())
    fan_out = next(path for path in (store / "objects").iterdir() if len(list(path.iterdir())) > 1)
    (fan_out / ("00" * 31)).mkdir()
    (fan_out / ("ff" * 31)).write_text("x")
    report = check(repository)
    assert report.objects_corrupted == 2
    assert report.objects_checked == len(list((store / "objects").glob("??/*")))


def test_fsck_changes_nothing(store: Path, repository: Repository) -> None:
    before = {path: path.lstat().st_ctime_ns for path in store.rglob("*")}
    check(repository)
    assert {path: path.lstat().st_ctime_ns for path in store.rglob("*")} == before
