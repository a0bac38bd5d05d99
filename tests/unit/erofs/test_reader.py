"""The image reader: against a slow reader, against C's dump, and what it refuses."""

import re
import stat
from pathlib import Path

import numpy as np
import pytest

import cfs.erofs
from cfs.dumpfile import parse_dumpfile
from cfs.erofs import View, mount_view, open_image, read_image, tree_view
from cfs.erofs.writer import write_image
from cfs.errors import FormatError
from cfs.inodes import ROOT, Ino, InodeVector
from cfs.tree import Directory
from tests.unit.erofs.images import load_zst, seeds
from tests.unit.reference.slow_dump import slow_dump
from tests.unit.reference.slow_reader import SlowReader


@pytest.fixture(scope="module")
def kinds() -> bytes:
    """An image with every kind of inode, format 0."""
    return load_zst("kinds.cfs.zst")


@pytest.fixture(scope="module")
def raw(kinds: bytes) -> InodeVector:
    return read(kinds)


def read(image: bytes | bytearray) -> InodeVector:
    return read_image(np.frombuffer(bytes(image), np.uint8))


def assert_same(vector: InodeVector, image: bytes) -> None:
    """All columns mean what the slow reader says."""
    inodes = SlowReader(image).breadth_first()
    assert len(vector) == len(inodes) + 1
    row_of = {inode.nid: row for row, inode in enumerate(inodes, start=1)}
    parents = {row_of[inodes[0].nid]: ROOT}
    for row, inode in enumerate(inodes, start=1):
        ino = Ino(row)
        for column in ("nid", "mode", "nlink", "uid", "gid", "size", "rdev"):
            assert int(getattr(vector, column)[ino]) == getattr(inode, column)
        assert (int(vector.mtime_sec[ino]), int(vector.mtime_nsec[ino])) == inode.mtime
        assert list(vector.xattrs(ino).items()) == inode.xattrs
        is_directory = stat.S_ISDIR(inode.mode)
        assert vector.content(ino) == (b"" if is_directory else inode.content or b"")
        entries = [(name, row_of[nid]) for name, nid, _ in inode.entries]
        assert list(vector.entries(ino)) == [e for e in entries if e[0] not in (b".", b"..")]
        for _, child in vector.entries(ino):
            parents.setdefault(child, ino)
    assert vector.parent[1:].tolist() == [parents[Ino(row)] for row in range(1, len(vector))]


def test_columns_are_those_of_the_slow_reader(kinds: bytes, raw: InodeVector) -> None:
    assert_same(raw, kinds)


def test_tree_view_is_what_c_dumps(raw: InodeVector) -> None:
    assert slow_dump(tree_view(raw)) == load_zst("kinds.dump.zst")


def test_objects_are_redirect_and_metacopy(raw: InodeVector) -> None:
    for row in range(1, len(raw)):
        ino = Ino(row)
        xattrs = raw.xattrs(ino) if stat.S_ISREG(int(raw.mode[ino])) else {}
        redirect = xattrs.get(b"trusted.overlay.redirect", b"").lstrip(b"/")
        assert (raw.object_path(ino) or b"") == redirect
        digest = raw.digest(ino)
        assert (digest.value if digest else b"") == xattrs.get(b"trusted.overlay.metacopy", b"")[4:]


def slow_mount_xattrs(xattrs: dict[bytes, bytes]) -> dict[bytes, bytes]:
    prefix, escape = b"trusted.overlay.", b"trusted.overlay.overlay."
    return {
        prefix + name.removeprefix(escape) if name.startswith(escape) else name: value
        for name, value in xattrs.items()
        if name.startswith(escape) or not name.startswith(prefix)
    }


def test_mount_view_takes_one_escape_from_names_and_hides_devices(raw: InodeVector) -> None:
    view = mount_view(raw)
    for row in range(1, len(raw)):
        ino = Ino(row)
        assert view.xattrs(ino) == slow_mount_xattrs(raw.xattrs(ino))
        kept = [
            (name, child)
            for name, child in raw.entries(ino)
            if not (stat.S_ISCHR(int(raw.mode[child])) and raw.rdev[child] == 0)
        ]
        assert list(view.entries(ino)) == kept


def test_views_of_a_file(tmp_path: Path, kinds: bytes, raw: InodeVector) -> None:
    path = tmp_path / "kinds.cfs"
    path.write_bytes(kinds)
    assert open_image(path, view=View.RAW).dirent_ino.tolist() == raw.dirent_ino.tolist()
    assert slow_dump(open_image(path, view=View.TREE)) == slow_dump(tree_view(raw))
    assert slow_dump(open_image(path)) == slow_dump(mount_view(raw))


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.cfs"
    path.write_bytes(b"\0" * 4096)
    with pytest.raises(FormatError, match=f"^{re.escape(str(path))}: composefs header: magic is 0"):
        open_image(path)


def test_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cfs.erofs.nothing  # noqa: B018 - the access is the test


def test_bytes_behind_the_blocks_are_ignored(kinds: bytes, raw: InodeVector) -> None:
    vector = read(kinds + b"x" * 100)
    assert vector.pool.tobytes() == raw.pool.tobytes()


def test_columns_are_read_only(raw: InodeVector) -> None:
    with pytest.raises(ValueError, match="read-only"):
        raw.mode[1] = 0


@pytest.mark.parametrize("number", range(6))
def test_formats_are_those_of_the_slow_reader(number: int) -> None:
    image = seeds()[number]
    vector = read(image)
    assert vector.version == number // 2
    assert vector.has_acl
    assert_same(vector, image)


def chain(depth: int) -> bytes:
    """An image with directories nested to a depth below the root."""
    root = top = Directory(mode=0o40755)
    for _ in range(depth):
        below = Directory(mode=0o40755)
        top.children[b"d"] = below
        top = below
    return bytes(write_image(root, min_version=1, max_version=1))


def test_depth_is_limited() -> None:
    assert len(read(chain(2048))) == 2048 + 256 + 2
    with pytest.raises(FormatError, match="depth is 2049: expected at most 2048"):
        read(chain(2049))


def test_whiteouts_in_the_views() -> None:
    dump = b"/ 0 40755 2 0 0 0 0.0 - - -\n/gone 0 20600 1 0 0 0 0.0 - - - user.a=b\n"
    for version, in_tree, in_mount in ((0, True, True), (1, True, True), (2, True, False)):
        image = write_image(parse_dumpfile(dump), min_version=version, max_version=version)
        raw = read(image)
        tree, mount = tree_view(raw), mount_view(raw)
        assert [name for name, _ in tree.entries(ROOT)] == [b"gone"] * in_tree
        assert [name for name, _ in mount.entries(ROOT)] == [b"gone"] * in_mount
        gone = tree.resolve("gone")
        assert (int(tree.mode[gone]), int(tree.size[gone])) == (0o20600, 0)
        assert tree.xattrs(gone) == {b"user.a": b"b"}
        assert stat.S_ISREG(int(mount.mode[gone])) is (version < 2)


def test_payload_keeps_its_own_slashes_in_the_tree_view() -> None:
    dump = b"/ 0 40755 2 0 0 0 0.0 - - -\n/f 9 100644 1 0 0 0 0.0 //a/b - -\n"
    raw = read(write_image(parse_dumpfile(dump), min_version=0, max_version=0))
    assert raw.object_path(raw.resolve("f")) == b"a/b"
    assert tree_view(raw).object_path(raw.resolve("f")) == b"//a/b"


def test_empty_xattr_value_at_the_end_is_found() -> None:
    raw = read(seeds()[0])
    link = raw.resolve("dir/link")
    assert raw.xattrs(link) == {b"system.posix_acl_access": b""}
