"""A tree as an ``InodeVector``, the slow and obvious way, without an image in between."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cfs.inodes import NO_OBJECT, InodeVector
from cfs.tree import Directory, Inode, Link, Regular, Symlink


@dataclass
class _Builder:
    rows: list[Inode] = field(default_factory=list)
    index: dict[int, int] = field(default_factory=dict)
    parent: dict[int, int] = field(default_factory=dict)
    pool: bytearray = field(default_factory=bytearray)

    def add(self, inode: Inode, parent: int) -> int:
        row = self.index.setdefault(id(inode), len(self.rows) + 1)
        if row > len(self.rows):
            self.rows.append(inode)
            self.parent[row] = parent
        return row

    def put(self, data: bytes) -> tuple[int, int]:
        self.pool += data
        return len(self.pool) - len(data), len(data)


def make_vector(root: Directory) -> InodeVector:
    """Return the vector of a tree; regular files need content or payload."""
    builder = _Builder()
    builder.add(root, 1)
    dirents: list[tuple[int, int, int]] = []
    dirent_start, xattr_start = [0, 0], [0, 0]
    xattrs: list[tuple[int, int, int, int]] = []
    inline, objects = [(0, 0)], [NO_OBJECT]
    object_rows: list[tuple[int, int]] = []
    row = 0
    while row < len(builder.rows):
        inode = builder.rows[row]
        row += 1
        children = inode.children if isinstance(inode, Directory) else {}
        for name in sorted(children):
            child = children[name]
            ino = builder.add(child.inode if isinstance(child, Link) else child, row)
            dirents.append((*builder.put(name), ino))
        dirent_start.append(len(dirents))
        xattrs.extend((*builder.put(k), *builder.put(v)) for k, v in inode.xattrs.items())
        xattr_start.append(len(xattrs))
        content = inode.target if isinstance(inode, Symlink) else getattr(inode, "content", None)
        inline.append(builder.put(content or b""))
        payload = inode.payload if isinstance(inode, Regular) else None
        objects.append(len(object_rows) if payload else NO_OBJECT)
        if payload:
            object_rows.append(builder.put(payload))
    rows = [Inode(mode=0, nlink=0), *builder.rows]

    def column(values: list[int], dtype: str) -> Any:
        return np.array(values, dtype)

    return InodeVector(
        **{name: column([getattr(inode, name) for inode in rows], "<u4")
           for name in ("mode", "nlink", "uid", "gid", "rdev", "mtime_nsec")},
        size=column([inode.size for inode in rows], "<u8"),
        mtime_sec=column([inode.mtime_sec for inode in rows], "<i8"),
        nid=column(list(range(36, 36 + len(rows))), "<u8"),
        parent=column([0, *(builder.parent[ino] for ino in range(1, len(rows)))], "<u4"),
        dirent_start=column(dirent_start, "<u8"),
        dirent_name_off=column([d[0] for d in dirents], "<u8"),
        dirent_name_size=column([d[1] for d in dirents], "<u4"),
        dirent_ino=column([d[2] for d in dirents], "<u4"),
        xattr_start=column(xattr_start, "<u8"),
        xattr_name_off=column([x[0] for x in xattrs], "<u8"),
        xattr_name_size=column([x[1] for x in xattrs], "<u4"),
        xattr_value_off=column([x[2] for x in xattrs], "<u8"),
        xattr_value_size=column([x[3] for x in xattrs], "<u4"),
        inline_off=column([i[0] for i in inline], "<u8"),
        inline_size=column([i[1] for i in inline], "<u4"),
        object=column(objects, "<u4"),
        object_path_off=column([o[0] for o in object_rows], "<u8"),
        object_path_size=column([o[1] for o in object_rows], "<u4"),
        object_digest=np.zeros((len(object_rows), 64), "u1"),
        object_digest_size=np.zeros(len(object_rows), "u1"),
        pool=np.frombuffer(bytes(builder.pool), "u1"),
        extra=np.zeros(0, "u1"),
        nr_blocks=100,
        version=1,
        has_acl=any(name.startswith(b"system.posix_acl") for i in rows for name in i.xattrs),
    )  # fmt: skip
