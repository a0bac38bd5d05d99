"""The OCI transformation."""

import stat

import pytest

from cfs.errors import FormatError, NotFoundError
from cfs.transform import XattrMode, apply_oci
from cfs.tree import Directory, Link, Regular, Symlink

XATTRS = {
    b"security.capability": b"c",
    b"security.selinux": b"s",
    b"trusted.a": b"t",
    b"user.a": b"u",
}


@pytest.fixture
def root() -> Directory:
    usr = Directory(
        mode=stat.S_IFDIR | 0o751, uid=1, gid=2, mtime_sec=3, mtime_nsec=4, xattrs=dict(XATTRS)
    )
    file = Regular(mode=stat.S_IFREG, xattrs=dict(XATTRS), nlink=3)
    run = Directory(mode=stat.S_IFDIR | 0o700, uid=7, xattrs=dict(XATTRS))
    run.children = {b"file": file}
    usr.children = {b"file": Link(file), b"more": Link(file)}
    children: dict[bytes, Directory | Regular | Link] = {b"run": run, b"usr": usr}
    return Directory(mode=stat.S_IFDIR, xattrs={b"user.root": b""}, children=dict(children))


def child(root: Directory, name: bytes) -> Directory:
    found = root.children[name]
    assert isinstance(found, Directory)
    return found


def test_the_root_becomes_like_usr(root: Directory) -> None:
    apply_oci(root)
    assert (root.mode, root.uid, root.gid) == (stat.S_IFDIR | 0o751, 1, 2)
    assert (root.mtime_sec, root.mtime_nsec) == (3, 4)
    assert root.xattrs == {b"security.capability": b"c"}


def test_run_is_emptied_and_what_it_shared_stays(root: Directory) -> None:
    apply_oci(root)
    run, usr = child(root, b"run"), child(root, b"usr")
    assert not run.children
    assert (run.mtime_sec, run.mtime_nsec, run.mode, run.uid) == (3, 4, stat.S_IFDIR | 0o700, 7)
    file = usr.children[b"file"]
    assert isinstance(file, Regular)
    assert file.nlink == 2
    more = usr.children[b"more"]
    assert isinstance(more, Link)
    assert more.inode is file


@pytest.mark.parametrize(
    ("mode", "kept"),
    [
        (XattrMode.ALLOWLIST_ONLY, {b"security.capability"}),
        (XattrMode.KEEP_USER_XATTRS, {b"security.capability", b"user.a"}),
    ],
)
def test_xattrs(root: Directory, mode: XattrMode, kept: set[bytes]) -> None:
    apply_oci(root, mode)
    usr = child(root, b"usr")
    file = usr.children[b"file"]
    assert isinstance(file, Regular)
    for inode in (root, usr, child(root, b"run"), file):
        assert inode.xattrs.keys() == kept


def test_a_tree_needs_usr_but_not_run(root: Directory) -> None:
    del root.children[b"run"]
    apply_oci(root)
    del root.children[b"usr"]
    with pytest.raises(NotFoundError, match="/usr does not exist"):
        apply_oci(root)


@pytest.mark.parametrize("name", [b"usr", b"run"])
def test_neither_may_be_something_else(root: Directory, name: bytes) -> None:
    root.children[name] = Symlink(mode=stat.S_IFLNK, target=b"x")
    with pytest.raises(FormatError, match=f"/{name.decode()} is not a directory"):
        apply_oci(root)
