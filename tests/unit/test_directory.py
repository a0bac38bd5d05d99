"""What a directory on disk becomes, option by option; descriptors, races, depth."""

import importlib
import os
import random
import resource
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.directory import ScanOptions, scan
from cfs.errors import IntegrityError, InvalidRequestError
from cfs.fsverity import compute_digest
from cfs.linux.files import reopen_readonly
from cfs.objectdir import ObjectDirectory
from cfs.tree import Directory, Link, Regular, Special, Symlink, walk

# the module, which the function of that name hides in the package
scan_module = importlib.import_module("cfs.directory")


@pytest.fixture(autouse=True)
def _no_leaked_descriptors() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    (root / "dir").mkdir(parents=True)
    (root / "empty").touch()
    (root / "small").write_bytes(b"x" * 64)
    (root / "large").write_bytes(b"x" * 65)
    (root / "link").symlink_to("where/ever")
    os.mkfifo(root / "dir" / "fifo", 0o640)
    os.utime(root / "small", ns=(0, -1_500_000_000))
    return root


def regular(tree: Directory, name: bytes) -> Regular:
    node = tree.children[name]
    assert isinstance(node, Regular)
    return node


def test_kinds_of_inodes(source: Path) -> None:
    tree = scan(source)
    assert list(tree.children) == [b"dir", b"empty", b"large", b"link", b"small"]
    assert stat.S_ISDIR(tree.mode)
    empty, small, large = (regular(tree, name) for name in (b"empty", b"small", b"large"))
    assert (empty.size, empty.content, empty.digest) == (0, None, None)
    assert (small.size, small.content, small.digest) == (64, b"x" * 64, None)
    digest = compute_digest(b"x" * 65)
    assert (large.size, large.content, large.digest) == (65, None, digest)
    assert large.payload == digest.object_path
    assert (small.mtime_sec, small.mtime_nsec) == (-2, 500_000_000)
    link = tree.children[b"link"]
    assert isinstance(link, Symlink)
    assert (link.target, link.size) == (b"where/ever", 10)
    below = tree.children[b"dir"]
    assert isinstance(below, Directory)
    fifo = below.children[b"fifo"]
    assert isinstance(fifo, Special)
    assert stat.S_ISFIFO(fifo.mode)
    status = (source / "large").stat()
    assert (large.mode, large.uid, large.gid) == (status.st_mode, status.st_uid, status.st_gid)


def test_use_epoch_makes_all_times_zero(source: Path) -> None:
    for _, child in walk(scan(source, options=ScanOptions(use_epoch=True))):
        assert not isinstance(child, Link)
        assert (child.mtime_sec, child.mtime_nsec) == (0, 0)


def test_sha512(source: Path) -> None:
    tree = scan(source, options=ScanOptions(algorithm=Algorithm.SHA512))
    assert regular(tree, b"large").digest == compute_digest(b"x" * 65, Algorithm.SHA512)


def test_names_and_targets_are_bytes(source: Path) -> None:
    name = b"\xff\n\xe2\x82"
    os.symlink(b"\xfe", os.fsencode(source) + b"/" + name)
    link = scan(os.fsencode(source)).children[name]
    assert isinstance(link, Symlink)
    assert link.target == b"\xfe"


def test_socket(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        node = scan(source).children[b"socket"]
    assert isinstance(node, Special)
    assert stat.S_ISSOCK(node.mode)


def test_devices_and_skip_devices(source: Path) -> None:
    number = os.makedev(420, 170 + (3 << 8))
    try:
        os.mknod(source / "char", 0o600 | stat.S_IFCHR, number)
        os.mknod(source / "block", 0o600 | stat.S_IFBLK, 0)
    except PermissionError:
        pytest.skip("needs the right to make device nodes")
    tree = scan(source)
    char, block = tree.children[b"char"], tree.children[b"block"]
    assert isinstance(char, Special)
    assert isinstance(block, Special)
    assert (char.rdev, block.rdev) == (107690 + (3 << 20), 0)
    assert scan(source, options=ScanOptions(skip_devices=True)).children.keys() == (
        tree.children.keys() - {b"char", b"block"}
    )


def test_xattrs_of_every_kind(source: Path) -> None:
    try:
        os.setxattr(source / "large", b"user.empty", b"")
        os.setxattr(source / "dir", "user.dir", b"1")
        os.setxattr(source / "link", "trusted.link", b"\0\1", follow_symlinks=False)
        os.setxattr(source / "empty", "trusted.x", b"2")
    except OSError as error:
        pytest.skip(f"cannot set user.* and trusted.* xattrs: {error}")

    def found(options: ScanOptions) -> dict[bytes, dict[bytes, bytes]]:
        nodes = scan(source, options=options).children.items()
        return {
            name: node.xattrs for name, node in nodes if not isinstance(node, Link) and node.xattrs
        }

    user = {b"dir": {b"user.dir": b"1"}, b"large": {b"user.empty": b""}}
    trusted = {b"link": {b"trusted.link": b"\0\1"}, b"empty": {b"trusted.x": b"2"}}
    assert found(ScanOptions()) == user | trusted
    assert found(ScanOptions(user_xattrs=True)) == user
    assert found(ScanOptions(skip_xattrs=True)) == {}


def test_hard_links_share_the_node_of_the_first_name(source: Path) -> None:
    os.link(source / "large", source / "dir" / "z")
    os.link(source / "large", source / "a")
    os.link(source / "link", source / "dir" / "l", follow_symlinks=False)
    os.link(source / "small", source.parent / "outside")
    tree = scan(source, options=ScanOptions(hardlinks=True))
    below = tree.children[b"dir"]
    assert isinstance(below, Directory)
    first = regular(tree, b"a")
    for name in (tree.children[b"large"], below.children[b"z"]):
        assert isinstance(name, Link)
        assert name.inode is first
    assert (first.nlink, first.digest) == (3, compute_digest(b"x" * 65))
    link = tree.children[b"link"]
    assert isinstance(link, Link)
    assert link.inode is below.children[b"l"]
    assert regular(tree, b"small").nlink == 1


def test_without_hardlinks_each_name_is_an_inode(source: Path) -> None:
    os.link(source / "large", source / "a")
    tree = scan(source)
    first, second = regular(tree, b"a"), regular(tree, b"large")
    assert first is not second
    assert (first.nlink, second.nlink, first.digest) == (1, 1, second.digest)


def test_sparse_file_is_digested_and_stored(source: Path, tmp_path: Path) -> None:
    with (source / "sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"end")
        file.truncate(8 << 20)
    with ObjectDirectory.open(tmp_path / "objects") as objects:
        tree = scan(source, options=ScanOptions(objects=objects))
    node = regular(tree, b"sparse")
    assert node.payload
    stored = tmp_path / "objects" / os.fsdecode(node.payload)
    assert stored.read_bytes() == (source / "sparse").read_bytes()
    assert stored.stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("threads", [1, 3, 1000])
def test_many_files_with_any_number_of_threads(tmp_path: Path, threads: int) -> None:
    numbers = random.Random(threads)
    root = tmp_path / "source"
    contents: dict[bytes, bytes] = {}
    for directory in range(10):
        (root / str(directory)).mkdir(parents=True)
        for file in range(60):
            content = numbers.randbytes(numbers.choice([65, 4096, 70_000]))
            (root / str(directory) / str(file)).write_bytes(content)
            contents[f"/{directory}/{file}".encode()] = content
    with ObjectDirectory.open(tmp_path / "objects") as objects:
        tree = scan(root, options=ScanOptions(threads=threads, objects=objects))
    nodes = {path: child for path, child in walk(tree) if isinstance(child, Regular)}
    assert nodes.keys() == contents.keys()
    for path, node in nodes.items():
        assert node.digest == compute_digest(contents[path])
        assert node.payload
        assert (tmp_path / "objects" / os.fsdecode(node.payload)).read_bytes() == contents[path]


def test_deep_tree_with_few_descriptors(tmp_path: Path) -> None:
    # deeper than descriptors, its paths longer than PATH_MAX
    depth, name = 300, "d" * 40
    fds = [os.open(tmp_path, os.O_RDONLY)]
    for _ in range(depth):
        os.mkdir(name, dir_fd=fds[-1])
        os.symlink("x", "z", dir_fd=fds[-1])
        fds.append(os.open(name, os.O_RDONLY, dir_fd=fds[-1]))
        os.close(fds.pop(0))
    os.close(fds.pop())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        tree = scan(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found = 0
    while name.encode() in tree.children:
        assert b"z" in tree.children
        below = tree.children[name.encode()]
        assert isinstance(below, Directory)
        tree = below
        found += 1
    assert found == depth


def test_missing_and_wrong_source(source: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        scan(source / "missing")
    with pytest.raises(NotADirectoryError, match="small"):
        scan(source / "small")


def test_unreadable_file_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_reading(fd: int) -> int:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)

    monkeypatch.setattr(scan_module, "reopen_readonly", without_reading)
    (source / "small").unlink()
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        scan(source)
    assert caught.value.filename == str(source / "large")


def test_vanished_file_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listdir = os.listdir

    def too_many(fd: int) -> list[str]:
        return [*listdir(fd), "vanished"]

    monkeypatch.setattr(os, "listdir", too_many)
    with pytest.raises(FileNotFoundError) as caught:
        scan(source)
    monkeypatch.undo()
    assert caught.value.filename == str(source / "dir" / "vanished")


@pytest.mark.parametrize(("name", "size"), [("small", 63), ("large", 64), ("large", 70_000)])
def test_file_that_changes_its_size_is_named(
    source: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    def change(fd: int) -> int:
        reader = reopen_readonly(fd)
        if os.readlink(f"/proc/self/fd/{fd}").endswith(name):
            os.truncate(source / name, size)
        return reader

    monkeypatch.setattr(scan_module, "reopen_readonly", change)
    with pytest.raises(IntegrityError, match=f"{name}: file changed.*found {size}"):
        scan(source)


def test_directory_moved_while_deep_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_MAX_OPEN_DIRECTORIES", 1)
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "z").touch()
    listdir = os.listdir

    def move(fd: int) -> list[str]:
        names = listdir(fd)
        if not names and (tmp_path / "a" / "b").exists():
            os.rename(tmp_path / "a" / "b", tmp_path / "moved")
        return names

    monkeypatch.setattr(os, "listdir", move)
    with pytest.raises(IntegrityError, match="moved while it was scanned"):
        scan(tmp_path / "a")
    monkeypatch.undo()


def test_contradicting_options() -> None:
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        ScanOptions(skip_xattrs=True, user_xattrs=True)
    with pytest.raises(InvalidRequestError, match="invalid number of threads 0"):
        ScanOptions(threads=0)
