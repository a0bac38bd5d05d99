"""A slow, obvious reader of EROFS images: one inode at a time, no checks, plain Python values.

Specification: erofs-image sections 1-4.  Only for valid images.
"""

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

PREFIXES = (
    b"",
    b"user.",
    b"system.posix_acl_access",
    b"system.posix_acl_default",
    b"trusted.",
    b"lustre.",
    b"security.",
)


@dataclass
class SlowInode:
    nid: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    rdev: int
    mtime: tuple[int, int]
    content: bytes | None  # file content or link target; None if external
    xattrs: list[tuple[bytes, bytes]]
    entries: list[tuple[bytes, int, int]] = field(default_factory=list)  # name, nid, type code


class SlowReader:
    def __init__(self, image: bytes) -> None:
        self.image = image
        self.version = struct.unpack_from("<I", image, 12)[0]
        self.root_nid = struct.unpack_from("<H", image, 1024 + 14)[0]
        self.build_time = struct.unpack_from("<qI", image, 1024 + 24)
        self.xattr_off = 4096 * struct.unpack_from("<I", image, 1024 + 44)[0]

    def inode(self, nid: int) -> SlowInode:
        off = 32 * nid
        i_format, icount, mode = struct.unpack_from("<HHH", self.image, off)
        if i_format & 1:
            size, i_u, _, uid, gid, sec, nsec, nlink = struct.unpack_from(
                "<QIIIIqII", self.image, off + 8
            )
            mtime, off = (sec, nsec), off + 64
        else:
            nlink, size, _, i_u, _, uid, gid = struct.unpack_from("<HIIIIHH", self.image, off + 6)
            mtime, off = self.build_time, off + 32
        xattrs, off = self._xattrs(off, icount)
        layout = i_format >> 1
        data = None if layout == 4 else self._data(layout, i_u, size, off)
        inode = SlowInode(nid, mode, nlink, uid, gid, size, 0, mtime, data, xattrs)
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            inode.rdev = i_u
        if stat.S_ISDIR(mode):
            assert data is not None
            inode.entries = list(self._entries(data))
        return inode

    def _data(self, layout: int, i_u: int, size: int, tail_off: int) -> bytes:
        if layout == 0:
            return self.image[4096 * i_u : 4096 * i_u + size]
        in_blocks = size // 4096 * 4096
        blocks = self.image[4096 * i_u : 4096 * i_u + in_blocks]
        return blocks + self.image[tail_off : tail_off + size - in_blocks]

    def _xattrs(self, off: int, icount: int) -> tuple[list[tuple[bytes, bytes]], int]:
        if icount == 0:
            return [], off
        end = off + 12 + 4 * (icount - 1)
        nr_shared = self.image[off + 4]
        references = struct.unpack_from(f"<{nr_shared}I", self.image, off + 12)
        found = []
        pos = off + 12 + 4 * nr_shared
        while pos < end:
            xattr, size = self._entry(pos)
            found.append(xattr)
            pos += (size + 3) // 4 * 4
        found += [self._entry(self.xattr_off + 4 * reference)[0] for reference in references]
        return found, end

    def _entry(self, off: int) -> tuple[tuple[bytes, bytes], int]:
        suffix_size, prefix, value_size = struct.unpack_from("<BBH", self.image, off)
        value = off + 4 + suffix_size
        name = PREFIXES[prefix] + self.image[off + 4 : value]
        return (name, self.image[value : value + value_size]), 4 + suffix_size + value_size

    @staticmethod
    def _entries(data: bytes) -> Iterator[tuple[bytes, int, int]]:
        for start in range(0, len(data), 4096):
            block = data[start : start + 4096]
            count = struct.unpack_from("<H", block, 8)[0] // 12
            parsed = [struct.unpack_from("<QHB", block, 12 * k) for k in range(count)]
            ends = [nameoff for _, nameoff, _ in parsed[1:]] + [len(block)]
            for (nid, nameoff, code), end in zip(parsed, ends, strict=True):
                yield block[nameoff:end].split(b"\0")[0], nid, code

    def breadth_first(self) -> list[SlowInode]:
        """All inodes, each at the first name found."""
        found = {self.root_nid: self.inode(self.root_nid)}
        queue = [self.root_nid]
        for nid in queue:
            for name, target, _ in found[nid].entries:
                if name not in (b".", b"..") and target not in found:
                    found[target] = self.inode(target)
                    queue.append(target)
        return [found[nid] for nid in queue]
