"""The OCI transformation: what makes an image independent of how its layers were unpacked.

Specification: repository 6.5, first list.
"""

from enum import Enum

from cfs.errors import NotFoundError
from cfs.transform.contents import find_directory
from cfs.tree import Directory, inode_of, settle_links, walk

__all__ = ["XattrMode", "apply_oci", "require_directory"]

_CAPABILITY = b"security.capability"
_USER = b"user."


class XattrMode(Enum):
    """Which xattrs stay; the values are those of ``--xattrs``."""

    ALLOWLIST_ONLY = "allowlist-only"
    KEEP_USER_XATTRS = "keep-user-xattrs"


def apply_oci(root: Directory, mode: XattrMode = XattrMode.ALLOWLIST_ONLY) -> None:
    """Give the root what ``/usr`` has, empty ``/run``, and drop most xattrs.

    Raises:
        NotFoundError: there is no ``/usr``.
        FormatError: ``/usr`` or ``/run`` is no directory.
    """
    usr = require_directory(root, b"usr")
    root.mode, root.uid, root.gid = usr.mode, usr.uid, usr.gid
    root.mtime_sec, root.mtime_nsec = usr.mtime_sec, usr.mtime_nsec
    root.xattrs = dict(usr.xattrs)
    run = find_directory(root, (b"run",))
    if run is not None:
        run.mtime_sec, run.mtime_nsec = usr.mtime_sec, usr.mtime_nsec
        run.children = {}
    for _, child in walk(root):
        inode = inode_of(child)
        if inode.xattrs:
            inode.xattrs = {
                name: value
                for name, value in inode.xattrs.items()
                if name == _CAPABILITY
                or (mode is XattrMode.KEEP_USER_XATTRS and name.startswith(_USER))
            }
    settle_links(root)


def require_directory(root: Directory, name: bytes) -> Directory:
    """Return a directory of the root.

    Raises:
        NotFoundError: it is missing.
        FormatError: it is no directory.
    """
    directory = find_directory(root, (name,))
    if directory is None:
        msg = f"/{name.decode()} does not exist"
        raise NotFoundError(msg)
    return directory
