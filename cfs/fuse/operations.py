"""The FUSE operations over an ``InodeVector``: the reference answers.

Row numbers are FUSE node ids.  Handlers translate only: what the tree looks like was decided
before mounting (spec erofs-image 10, mount view).  Nothing ever changes, so every answer may be
cached for ever.

All of it runs in the trio loop of a session process.  The only state is ``_objects``, owned by
that loop, and what :class:`ObjectFiles` remembers.  Reads ask the page cache first
(``RWF_NOWAIT``), which costs no thread; only what would wait for a disk or for a digest goes to a
thread, so that the loop keeps answering.
"""

import errno
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import pyfuse3
import trio

from cfs.compat import override
from cfs.errors import NotFoundError
from cfs.fuse.choices import Verify
from cfs.fuse.objects import ObjectFiles
from cfs.fuse.unservable import ServeError, format_line
from cfs.inodes import Ino, InodeVector, view

__all__ = ["VectorOperations"]

_log = logging.getLogger(__name__)
_BLOCK_SIZE = 4096
_NAME_MAX = 255
_NR_DOTS = 2  # "." and ".." come first in a listing
_FOREVER = float("inf")
_MTIME_NS_MAX = (1 << 63) * 1_000_000_000 - 1  # an image may hold 2**32-1 ns in the last second
_ACL_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")
_SELINUX_NAME = b"security.selinux"


@dataclass(slots=True)
class _OpenObject:
    """Object of an open file: one descriptor for all who have the inode open."""

    fd: int
    nr_opens: int


class VectorOperations(pyfuse3.Operations):
    """Answers requests from a vector (mount view) and the objects directories.

    Args:
        vector: what to serve.
        objects: descriptors of the objects directories, searched in this order; borrowed.
        ready: set when INIT is being answered.
        verify: which digest of an object counts, checked when it is opened.
    """

    supports_dot_lookup = False

    def __init__(
        self,
        vector: InodeVector,
        objects: Sequence[int],
        ready: trio.Event,
        *,
        verify: Verify = Verify.OFF,
    ) -> None:
        super().__init__()
        self.enable_acl = vector.has_acl
        self._vector = vector
        self._files = ObjectFiles(vector, objects, verify)
        self._may_wait = verify is not Verify.OFF
        self._ready = ready
        self._objects: dict[int, _OpenObject] = {}
        self._reported: set[int] = set()
        self._has_xattrs = len(vector.xattr_name_off) > 0
        self._unsupported = _unsupported_xattrs(vector)
        # memoryviews give Python integers, also of arrays of numpy
        self._mode = view(vector.mode)
        self._nlink = view(vector.nlink)
        self._uid = view(vector.uid)
        self._gid = view(vector.gid)
        self._rdev = view(vector.rdev)
        self._size = view(vector.size)
        self._mtime_sec = view(vector.mtime_sec)
        self._mtime_nsec = view(vector.mtime_nsec)
        self._dirent_start = view(vector.dirent_start)
        self._dirent_ino = view(vector.dirent_ino)

    @override
    def init(self) -> None:
        self._ready.set()

    def _attributes(self, ino: int) -> pyfuse3.EntryAttributes:
        """Fill ``struct stat`` as the kernel's mount shows it."""
        entry = pyfuse3.EntryAttributes()
        entry.entry_timeout = entry.attr_timeout = _FOREVER
        entry.st_ino = ino
        entry.st_mode = mode = self._mode[ino]
        entry.st_nlink = self._nlink[ino]
        entry.st_uid = self._uid[ino]
        entry.st_gid = self._gid[ino]
        entry.st_rdev = self._rdev[ino]
        entry.st_size = size = self._size[ino]
        entry.st_blksize = _BLOCK_SIZE
        if stat.S_ISREG(mode):
            entry.st_blocks = -(-size // _BLOCK_SIZE) * (_BLOCK_SIZE // 512)
        mtime_ns = self._mtime_sec[ino] * 1_000_000_000 + self._mtime_nsec[ino]
        mtime_ns = min(mtime_ns, _MTIME_NS_MAX)
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = mtime_ns
        return entry

    @override
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if len(name) > _NAME_MAX:
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        try:
            return self._attributes(self._vector.lookup(Ino(parent_inode), name))
        except NotFoundError:
            missing = pyfuse3.EntryAttributes()
            missing.st_ino = 0  # negative entry, cached for ever
            missing.entry_timeout = _FOREVER
            return missing

    @override
    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Do nothing: rows live as long as the mount."""

    @override
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    @override
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self._vector.content(Ino(inode))

    @override
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return not mode & os.W_OK  # the rest is default_permissions' work

    @override
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    @override
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        first = self._dirent_start[fh]
        for index in range(start_id, self._dirent_start[fh + 1] - first + _NR_DOTS):
            if index < _NR_DOTS:
                name = (b".", b"..")[index]
                ino = (fh, int(self._vector.parent[fh]))[index]
            else:
                dirent = first + index - _NR_DOTS
                name = self._vector.dirent_name(dirent)
                ino = self._dirent_ino[dirent]
            if not pyfuse3.readdir_reply(token, name, self._attributes(ino), index + 1):
                break

    @override
    async def releasedir(self, fh: int) -> None:
        """Do nothing: a directory handle is its row."""

    @override
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            raise pyfuse3.FUSEError(errno.EROFS)
        if self._vector.inline_size[inode] != self._size[inode]:
            await self._hold_object(Ino(inode))
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def _hold_object(self, ino: Ino) -> None:
        """Open the object of a file, or count one more use of it."""
        if ino not in self._objects:
            try:
                if self._may_wait:  # a digest may have to be computed
                    fd = await trio.to_thread.run_sync(self._files.open, ino)
                else:
                    fd = self._files.open(ino)
            except ServeError as error:
                self._log_once(ino, error)
                raise pyfuse3.FUSEError(error.errno) from None
            if ino in self._objects:  # somebody else was faster
                os.close(fd)
            else:
                self._objects[ino] = _OpenObject(fd, 0)
        self._objects[ino].nr_opens += 1

    def _log_once(self, ino: int, error: ServeError) -> None:
        if ino not in self._reported:
            self._reported.add(ino)
            _log.warning("%s", format_line(int(self._vector.nid[ino]), error))

    @override
    async def read(self, fh: int, off: int, size: int) -> bytes:
        size = max(0, min(size, self._size[fh] - off))
        known = self._objects.get(fh)
        if known is None:
            start = int(self._vector.inline_off[fh]) + off
            return self._vector.read(start, size)
        try:
            data = _read_cached(known.fd, size, off)
            if len(data) < size:
                data = await trio.to_thread.run_sync(os.pread, known.fd, size, off)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        if len(data) < size:  # the object was cut since it was opened
            path = self._vector.object_path(Ino(fh)) or b""
            self._log_once(fh, ServeError("SHORT", path, errno.EIO))
            raise pyfuse3.FUSEError(errno.EIO)
        return data

    @override
    async def flush(self, fh: int) -> None:
        """Do nothing: there is never anything to write."""

    @override
    async def release(self, fh: int) -> None:
        known = self._objects.get(fh)
        if known is None:
            return
        known.nr_opens -= 1
        if not known.nr_opens:
            del self._objects[fh]
            os.close(known.fd)

    @override
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        self._check_has_xattrs()
        if name in self._unsupported:
            raise pyfuse3.FUSEError(errno.EOPNOTSUPP)
        try:
            return self._vector.xattrs(Ino(inode))[name]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ENODATA) from None

    def _check_has_xattrs(self) -> None:
        if not self._has_xattrs:
            raise pyfuse3.FUSEError(errno.ENOSYS)  # the kernel asks no more; callers see EOPNOTSUPP

    @override
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        self._check_has_xattrs()
        names = self._vector.xattrs(Ino(inode))
        # the kernel filters trusted.* in getxattr only
        return [name for name in names if not ctx.uid or not name.startswith(b"trusted.")]

    @override
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Give the image's size, and nothing available.

        With ``f_bfree`` 0 as well, df would call every mount 100 % full; so it prints "-".
        """
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK_SIZE
        data.f_blocks = data.f_bfree = self._vector.nr_blocks
        data.f_namemax = _NAME_MAX
        return data

    async def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise pyfuse3.FUSEError(errno.EROFS)

    setattr = mknod = mkdir = symlink = link = create = _refuse
    unlink = rmdir = rename = write = setxattr = removexattr = _refuse


def _read_cached(fd: int, size: int, off: int) -> bytes:
    """Return what the page cache has from ``off`` on, without waiting; maybe nothing."""
    buffer = bytearray(size)
    try:
        nr_read = os.preadv(fd, [buffer], off, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        nr_read = 0
    return bytes(memoryview(buffer)[:nr_read])


def _unsupported_xattrs(vector: InodeVector) -> frozenset[bytes]:
    """Names that no inode has and that callers ask for on every file.

    After one EOPNOTSUPP they stop asking (spec fuse-data-plane 7).  With ACLs in the image the
    answer would leak into permission checks, so those names are then answered as any other.
    """
    places = set(zip(view(vector.xattr_name_off), view(vector.xattr_name_size), strict=True))
    names = {vector.read(off, size) for off, size in places}
    absent = {_SELINUX_NAME} - names
    return frozenset(absent if vector.has_acl else absent.union(_ACL_NAMES))
