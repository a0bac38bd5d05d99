import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cfs.digest import Algorithm, Digest
from cfs.errors import ConflictError, FormatError, InvalidRequestError, NotFoundError
from cfs.repository.refs import (
    check_name,
    entries,
    object_of_target,
    read_link,
    remove_link,
    resolve_image,
    set_link,
    walk_refs,
)

DIGEST = Digest(bytes(range(32)))
OBJECT = b"objects/" + DIGEST.object_path
IMAGE = b"images/" + str(DIGEST).encode()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    before = os.listdir("/proc/self/fd")
    yield fd
    assert len(os.listdir("/proc/self/fd")) == len(before)
    os.close(fd)


@pytest.mark.parametrize("name", ["a", "a/b", "refs/a", "..a", "a..", "é", "a" * 255, "a:b@c%2F"])
def test_good_names(name: str) -> None:
    assert check_name(name) == name.encode()


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "/a", "a/", "a//b", ".", "..", "./a", "a/.", "a/..", "../a", "a/../b", "a\0b",
        "a" * 256, "/".join(["a"] * 2000), "\udcff",
    ],
)  # fmt: skip
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        check_name(name)


@pytest.mark.parametrize(
    ("link", "target", "text"),
    [
        (IMAGE, OBJECT, b"../" + OBJECT),
        (b"images/refs/foo", IMAGE, b"../" + str(DIGEST).encode()),
        (b"images/refs/a/b", IMAGE, b"../../" + str(DIGEST).encode()),
        (b"streams/refs/oci/x", b"streams/oci-manifest", b"../../oci-manifest"),
    ],
)
def test_links_are_relative(
    store: int, tmp_path: Path, link: bytes, target: bytes, text: bytes
) -> None:
    set_link(store, link, target)
    assert os.readlink(tmp_path / os.fsdecode(link)) == os.fsdecode(text)
    assert read_link(store, link) == text


def test_a_link_is_replaced(store: int, tmp_path: Path) -> None:
    set_link(store, b"images/refs/a/b", b"images/one")
    set_link(store, b"images/refs/a/b", b"images/two")
    assert read_link(store, b"images/refs/a/b") == b"../../two"
    assert os.listdir(tmp_path) == ["images"]


def test_the_same_link_is_left_alone(store: int, tmp_path: Path) -> None:
    set_link(store, b"images/refs/a", b"images/one")
    before = os.lstat(tmp_path / "images/refs/a")
    set_link(store, b"images/refs/a", b"images/one")
    assert os.lstat(tmp_path / "images/refs/a").st_ino == before.st_ino


def test_what_is_no_link_is_not_replaced(store: int, tmp_path: Path) -> None:
    (tmp_path / "images/refs/a").mkdir(parents=True)
    (tmp_path / "images/refs/b").touch()
    for name in (b"a", b"b"):
        with pytest.raises(ConflictError):
            set_link(store, b"images/refs/" + name, b"images/one")
    assert sorted(os.listdir(tmp_path / "images/refs")) == ["a", "b"]


def test_a_link_that_is_removed_meanwhile_is_made(
    store: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_once(*_: object, **__: object) -> None:
        monkeypatch.undo()
        raise FileExistsError

    monkeypatch.setattr(os, "symlink", refuse_once)
    set_link(store, b"images/refs/a", b"images/one")
    assert read_link(store, b"images/refs/a") == b"../one"


def test_taken_temporary_names(store: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_link(store, b"images/refs/a", b"images/one")
    (tmp_path / ".symlink-taken").touch()
    names = iter(["taken"] * 17 + ["free"])
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(names))
    with pytest.raises(ConflictError, match="16 random names"):
        set_link(store, b"images/refs/a", b"images/two")
    set_link(store, b"images/refs/a", b"images/two")
    assert read_link(store, b"images/refs/a") == b"../two"
    assert sorted(os.listdir(tmp_path)) == [".symlink-taken", "images"]


def test_no_link_is_made_below_a_link(store: int, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "images/refs").mkdir(parents=True)
    (tmp_path / "images/refs/a").symlink_to("../../outside")
    with pytest.raises(ConflictError, match="a is no directory"):
        set_link(store, b"images/refs/a/b", b"images/one")
    assert os.listdir(tmp_path / "outside") == []


def test_failed_replacement_leaves_nothing(
    store: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_link(store, b"images/refs/a", b"images/one")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="No space") as caught:
        set_link(store, b"images/refs/a", b"images/two")
    assert caught.value.filename == "images/refs/a"
    assert os.listdir(tmp_path) == ["images"]
    assert read_link(store, b"images/refs/a") == b"../one"


def test_listings_are_sorted_and_tell_what_is_no_link(store: int, tmp_path: Path) -> None:
    for name in (b"b/z", b"b-", b"b/a/c", b"a"):
        set_link(store, b"images/refs/" + name, b"images/" + name[:1])
    os.mkfifo(tmp_path / "images/refs/fifo")
    (tmp_path / "images/refs/empty").mkdir()
    set_link(store, IMAGE, OBJECT)
    (tmp_path / "images/file").touch()
    (tmp_path / "images/directory").mkdir()
    refs = list(walk_refs(store, "images"))
    assert [ref.name for ref in refs] == [b"a", b"b-", b"b/a/c", b"b/z", b"fifo"]
    assert [ref.target for ref in refs] == [b"../a", b"../b", b"../../../b", b"../../b", None]
    assert stat.S_ISFIFO(refs[-1].mode)
    found = {entry.name: entry.target for entry in entries(store, "images")}
    assert found == {str(DIGEST).encode(): b"../" + OBJECT, b"file": None, b"directory": None}
    (tmp_path / "streams").mkdir()
    (tmp_path / "streams/refs").touch()
    assert [entry.name for entry in entries(store, "streams")] == [b"refs"]


def test_listings_leave_out_what_goes_meanwhile(
    store: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_link(store, IMAGE, OBJECT)
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda fd: [*listdir(fd), "gone"])
    found = list(entries(store, "images"))
    monkeypatch.undo()
    assert [entry.name for entry in found] == [str(DIGEST).encode()]


def test_what_is_missing_is_empty(store: int) -> None:
    assert list(walk_refs(store, "streams")) == []
    assert list(entries(store, "streams")) == []
    assert read_link(store, b"streams/a") is None


def test_listings_do_not_leave_the_store(store: int, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to("/etc")
    for listing in (walk_refs, entries):
        with pytest.raises(OSError, match="symbolic links"):
            list(listing(store, "images"))
    with pytest.raises(OSError, match="symbolic links"):
        read_link(store, b"images/passwd")


def test_object_of_target() -> None:
    assert object_of_target(b"../" + OBJECT) == DIGEST
    assert object_of_target(b"anything/" + DIGEST.object_path.upper()) == DIGEST
    digits = str(DIGEST).encode()
    odd = digits[:3] + b"/" + digits[3:]
    for text in (b"", b"..", b"00", OBJECT + b"/", b"../" + digits, digits, odd, b"00/\xff"):
        with pytest.raises(FormatError):
            object_of_target(text)


def test_resolve_image(store: int) -> None:
    repository = SimpleNamespace(fd=store, algorithm=Algorithm.SHA256)
    set_link(store, IMAGE, OBJECT)
    set_link(store, b"images/refs/a", IMAGE)
    set_link(store, b"images/refs/deep/b", IMAGE)
    for name in (str(DIGEST), "a", "refs/a", "refs/deep/b"):
        assert resolve_image(repository, name) == DIGEST
    for name in ("deep/b", "b", "refs", "refs/deep", str(DIGEST).upper(), f"sha256:{DIGEST}"):
        with pytest.raises(NotFoundError, match=f"image not found: {name}"):
            resolve_image(repository, name)
    for name in ("", "..", "refs/../refs/a", f"../{OBJECT.decode()}"):
        with pytest.raises(InvalidRequestError):
            resolve_image(repository, name)


def test_dangling_and_foreign_names_are_not_found(store: int) -> None:
    repository = SimpleNamespace(fd=store, algorithm=Algorithm.SHA512)
    set_link(store, IMAGE, OBJECT)  # of the other algorithm
    set_link(store, b"images/refs/foreign", IMAGE)
    set_link(store, b"images/refs/dangling", b"images/" + b"0" * 128)
    set_link(store, b"images/refs/object", b"objects/ab/cd")
    set_link(store, b"images/words", OBJECT)
    set_link(store, b"images/refs/words", b"images/words")
    set_link(store, b"images/" + b"A" * 128, OBJECT)
    set_link(store, b"images/refs/upper", b"images/" + b"A" * 128)
    set_link(store, b"images/refs/long", b"images/" + b"0" * 300)
    names = ("foreign", "dangling", "object", "words", "upper", "long", "A" * 128, str(DIGEST))
    for name in names:
        with pytest.raises(NotFoundError):
            resolve_image(repository, name)


def test_refs_below_a_directory(store: int) -> None:
    for name in (b"a", b"b/x", b"b/c/y", b"bx"):
        set_link(store, b"streams/refs/" + name, OBJECT)
    assert [ref.name for ref in walk_refs(store, "streams", b"b/")] == [b"b/c/y", b"b/x"]
    assert list(walk_refs(store, "streams", b"missing/")) == []


def test_only_links_are_removed(store: int, tmp_path: Path) -> None:
    set_link(store, b"streams/refs/a", OBJECT)
    remove_link(store, b"streams/refs/a")
    assert list(walk_refs(store, "streams")) == []
    for missing in (b"streams/refs/a", b"streams/refs/b/c", b"images/refs/a"):
        with pytest.raises(FileNotFoundError) as caught:
            remove_link(store, missing)
        assert os.fsencode(caught.value.filename) == missing
    (tmp_path / "streams" / "refs" / "directory").mkdir()
    (tmp_path / "streams" / "refs" / "file").write_text("x")
    (tmp_path / "streams" / "elsewhere").symlink_to("refs")
    for other in (b"directory", b"file"):
        with pytest.raises(ConflictError, match="expected a symbolic link"):
            remove_link(store, b"streams/refs/" + other)
    with pytest.raises(OSError, match="symbolic links"):
        remove_link(store, b"streams/elsewhere/file")
