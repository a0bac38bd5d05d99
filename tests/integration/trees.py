"""Random trees with every kind of inode, and the objects that they need."""

import random
import stat
from pathlib import Path
from typing import Any

from cfs.digest import Algorithm
from cfs.fsverity import compute_digest
from cfs.tree import Child, Directory, Inode, Link, Regular, Special, Symlink, settle_links

_ALPHABET = bytes(sorted(set(range(1, 256)) - {ord("/")}))
_ACL = bytes.fromhex(
    "0200000001000600ffffffff02000400feff000004000000ffffffff"
    "10000400ffffffff20000000ffffffff"
)  # fmt: skip
_KINDS = ("inline", "external", "bare", "empty", "link", "device", "whiteout", "again", "lost")
_MAX_DEPTH = 4


class RandomTree:
    """Makes one tree.

    Args:
        seed: same seed, same tree.
        version: of the image; limits what may be in it.
        algorithm: of the digests.
        objects: directory that gets the objects.
    """

    def __init__(self, seed: int, version: int, algorithm: Algorithm, objects: Path) -> None:
        self._rng = random.Random(seed)
        self._version = version
        self._algorithm = algorithm
        self._objects = objects
        self._leaves: list[Inode] = []

    def make(self) -> Directory:
        """Return the tree, link counts included."""
        root = self._directory(0)
        settle_links(root)
        return root

    def _directory(self, depth: int) -> Directory:
        rng = self._rng
        directory = Directory(nlink=2, **self._common(stat.S_IFDIR))
        for _ in range(rng.choice((0, 3, 12, 40)) if depth else 25):
            is_directory = depth < _MAX_DEPTH and rng.random() < 0.15
            child = self._directory(depth + 1) if is_directory else self._leaf()
            directory.children[self._name(directory)] = child
        if depth == 0:  # nothing is left to chance that one tree of each kind should hold
            for kind in _KINDS:
                directory.children[kind.encode()] = self._leaf(kind)
        if rng.random() < 0.3:
            directory.xattrs[b"trusted.overlay.opaque"] = b"y"
        if rng.random() < 0.2:
            directory.xattrs[b"system.posix_acl_default"] = _ACL
        return directory

    def _leaf(self, kind: str | None = None) -> Child:
        kind = kind or self._rng.choice(_KINDS)
        if kind == "again" and self._leaves:
            return Link(self._rng.choice(self._leaves))
        if kind in ("again", "empty"):
            inode: Inode = Regular(**self._common(stat.S_IFREG))
        elif kind == "link":
            inode = self._symlink()
        elif kind == "device":
            inode = self._special()
        elif kind == "whiteout":
            inode = Special(**self._common(stat.S_IFCHR))
        else:
            inode = self._file(kind)
        if not (inode.is_whiteout and self._version == 2):  # their links are refused
            self._leaves.append(inode)
        return inode

    def _file(self, kind: str) -> Regular:
        rng = self._rng
        file = Regular(**self._common(stat.S_IFREG))
        if kind == "inline":
            file.content = rng.randbytes(rng.choice((1, 30, 64, 200, 512)))
            file.size = len(file.content)
            return file
        content = rng.randbytes(rng.choice((65, 4095, 4096, 4097, 30_000, 200_000)))
        digest = compute_digest(content, self._algorithm)
        file.size = len(content)
        file.payload = digest.object_path
        file.digest = None if kind == "bare" else digest
        if kind == "lost":
            return file
        place = self._objects / digest.object_path.decode()
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)
        return file

    def _symlink(self) -> Symlink:
        lengths = (1, 20, 255, 1000) if self._version == 2 else (1, 20, 255, 1000, 4000, 4095)
        target = self._bytes(self._rng.choice(lengths))
        link = Symlink(target=target, **self._common(stat.S_IFLNK))
        link.mode |= 0o777
        link.size = len(target)
        return link

    def _special(self) -> Special:
        kind = self._rng.choice((stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK))
        special = Special(**self._common(kind))
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            special.rdev = self._rng.choice((0x101, 0xFFFFFFFF, 0x12345678))
        return special

    def _common(self, kind: int) -> dict[str, Any]:
        rng = self._rng
        return {
            "mode": kind | rng.choice((0o755, 0o644, 0o000, 0o7777, 0o600)),
            "uid": rng.choice((0, 0, 1000, 65535, 65536, 3_000_000_000)),
            "gid": rng.choice((0, 0, 1000, 65536)),
            "mtime_sec": rng.choice((0, 1, 1_700_000_000, 1_700_000_000, 1 << 33)),
            "mtime_nsec": rng.choice((0, 0, 1, 999_999_999)),
            "xattrs": self._xattrs(kind),
        }

    def _xattrs(self, kind: int) -> dict[bytes, bytes]:
        rng = self._rng
        names = (
            b"user.one", b"user.two", b"user.overlay.whiteout", b"user.overlay.opaque",
            b"trusted.mine", b"trusted.overlay.metacopy", b"trusted.overlay.overlay.deep",
            b"trusted.overlay.origin", b"security.mine", b"security.selinux",
            b"user." + b"n" * 250,
        )  # fmt: skip
        xattrs = {
            name: rng.choice((b"", b"shared", rng.randbytes(5), rng.randbytes(300)))
            for name in rng.sample(names, rng.choice((0, 0, 1, 2, 5)))
        }
        if kind != stat.S_IFLNK and rng.random() < 0.1:
            xattrs[b"system.posix_acl_access"] = _ACL
        return xattrs

    def _name(self, directory: Directory) -> bytes:
        name = b"."
        while name in (b".", b"..") or name in directory.children:
            name = self._bytes(self._rng.choice((1, 3, 8, 8, 30, 255)))
        return name

    def _bytes(self, size: int) -> bytes:
        return bytes(self._rng.choices(_ALPHABET, k=size))
