"""Layer tars as trees, well enough for those of ``boot.json``: no whiteouts, no replacing."""

import io
import os
import tarfile
from collections.abc import Iterator
from functools import cache

import zstandard

from cfs.digest import Algorithm
from cfs.fsverity import compute_digest
from cfs.tree import Directory, Inode, Link, Regular, Special, Symlink
from tests.paths import DATA

XATTR = "SCHILY.xattr."
TYPES = {tarfile.CHRTYPE: 0o20000, tarfile.BLKTYPE: 0o60000, tarfile.FIFOTYPE: 0o10000}


@cache
def layers() -> dict[str, bytes]:
    packed = (DATA / "oci" / "layers.tar.zst").read_bytes()
    data = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {
            member.name.removeprefix("./"): reader.read()
            for member in archive
            if (reader := archive.extractfile(member)) is not None
        }


def tree_of(case: str, algorithm: Algorithm) -> tuple[Directory, dict[bytes, bytes]]:
    """Return the tree of a case, and its objects by path."""
    root = Directory(mode=0o40755)
    objects: dict[bytes, bytes] = {}
    for member, data in _members(layers()[f"boot-{case}.0.tar"]):
        path = os.fsencode(member.name).split(b"/")
        directory = root
        for name in path[:-1]:
            below = directory.children[name]
            assert isinstance(below, Directory)
            directory = below
        if member.islnk():
            target = os.fsencode(member.linkname).split(b"/")
            directory.children[path[-1]] = Link(_find(root, target))
            continue
        inode = _inode(member)
        if isinstance(inode, Regular) and len(data) > 64:
            inode.digest = compute_digest(data, algorithm)
            inode.payload = inode.digest.object_path
            objects[b"/" + b"/".join(path)] = data
        elif isinstance(inode, Regular):
            inode.content = data or None
        _describe(inode, member)
        directory.children[path[-1]] = inode
    return root, objects


def _members(tar: bytes) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        for member in archive:
            reader = archive.extractfile(member) if member.isreg() else None
            yield member, reader.read() if reader else b""


def _find(root: Directory, path: list[bytes]) -> Inode:
    found: Inode = root
    for name in path:
        assert isinstance(found, Directory)
        child = found.children[name]
        assert not isinstance(child, Link)
        found = child
    return found


def _inode(member: tarfile.TarInfo) -> Inode:
    if member.isdir():
        return Directory(mode=0o40000)
    if member.isreg():
        return Regular(mode=0o100000, size=member.size)
    if member.issym():
        return Symlink(mode=0o120000, target=os.fsencode(member.linkname))
    rdev = os.makedev(member.devmajor, member.devminor) if not member.isfifo() else 0
    return Special(mode=TYPES[member.type], rdev=rdev)


def _describe(inode: Inode, member: tarfile.TarInfo) -> None:
    inode.mode |= member.mode
    inode.uid, inode.gid = member.uid, member.gid
    seconds, _, fraction = member.pax_headers.get("mtime", str(int(member.mtime))).partition(".")
    inode.mtime_sec = int(seconds)
    inode.mtime_nsec = int(fraction.ljust(9, "0"))
    inode.xattrs = {
        os.fsencode(key.removeprefix(XATTR)): os.fsencode(value)
        for key, value in member.pax_headers.items()
        if key.startswith(XATTR)
    }
