"""What a peer may do (spec cli-and-varlink c.2, row ``mountpoint``, and d.4).

The service's own user and root use the service with all of its rights.  For any other user, who
is foreign, the thread that serves a call takes over the user's rights in the file system and
gives up all capabilities: so he gets no more than his own rights.  Threads that are made meanwhile
inherit that.  Programs that are started do not, which is why none may be started then.

Any thread may call; what they do concerns the calling thread.
"""

import functools
import importlib
import os
import pkgutil
import pwd
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from cfs.errors import InvalidRequestError, UnsupportedError
from cfs.linux.capabilities import Capability
from cfs.linux.credentials import Credentials, acting_as
from cfs.linux.files import file_system, naming, open_path, owned
from cfs.repository.repository import default_path
from cfs.service.errors import PermissionDenied

if TYPE_CHECKING:
    from cfs.service.call import Peer

__all__ = [
    "as_peer",
    "as_service",
    "is_foreign",
    "load_modules",
    "open_mountpoint",
    "refuse_foreign",
    "store_path",
    "trusted_uids",
]

_ROOT_UID = 0
_CONTROL_GROUPS = (0x27E0EB, 0x63677270)  # magic numbers of cgroup and cgroup2, linux/magic.h
# they import some modules only when they need them
_LAZY_PACKAGES = ("cfs.erofs", "cfs.mounting", "cfs.oci", "cfs.repository", "cfs.transform")
# of the thread that loads this module, before anybody is served
_SERVICE = Credentials.current()


def trusted_uids() -> frozenset[int]:
    """Return who uses the service with all of its rights: root and its own user."""
    return frozenset({_ROOT_UID, os.geteuid()})


def is_foreign(peer: "Peer") -> bool:
    """Whether a peer is neither root nor the service's own user."""
    return peer.uid not in trusted_uids()


def refuse_foreign(peer: "Peer") -> None:
    """Refuse what only root and the service's own user may do.

    Raises:
        PermissionDenied: he is foreign.
    """
    if is_foreign(peer):
        raise PermissionDenied


@contextmanager
def as_peer(peer: "Peer", *, may_mount: bool = False) -> Iterator[None]:
    """Act with the rights of a foreign peer for the duration of a block; blocks may nest.

    For other peers nothing changes.

    Args:
        peer: who.
        may_mount: leave the one capability that mounting takes.

    Raises:
        PermissionDenied: the service cannot act as somebody else.
    """
    if not is_foreign(peer):
        yield
        return
    load_modules()
    capabilities = _SERVICE.capabilities & 1 << Capability.SYS_ADMIN if may_mount else 0
    acting = acting_as(Credentials(peer.uid, peer.gid, frozenset(peer.groups), capabilities))
    try:
        acting.__enter__()
    except (OSError, UnsupportedError):
        raise PermissionDenied from None
    try:
        yield
    finally:
        acting.__exit__(None, None, None)


@functools.cache
def load_modules() -> None:
    """Import everything that methods may need, once.

    A foreign user may not be able to read our modules, and what the interpreter fails to find in
    his name, it does not look for again in anybody's.
    """
    for name in _LAZY_PACKAGES:
        package = importlib.import_module(name)
        for found in pkgutil.walk_packages(package.__path__, f"{name}."):
            with suppress(ImportError):  # whoever needs it tells
                importlib.import_module(found.name)


def as_service() -> AbstractContextManager[None]:
    """Act with the service's own rights for the duration of a block within :func:`as_peer`."""
    return acting_as(_SERVICE)


def store_path(peer: "Peer", *, user: bool) -> str:
    """Return where the store of the system is, or that of the user who asks.

    Raises:
        InvalidRequestError: nobody knows the user's home directory.
    """
    if not user or not is_foreign(peer):
        return default_path(user=user, system=not user)
    try:
        home = pwd.getpwuid(peer.uid).pw_dir
    except KeyError:
        msg = f"user {peer.uid} has no home directory"
        raise InvalidRequestError(msg) from None
    return default_path(user=True, home=home)


def open_mountpoint(peer: "Peer", path: str) -> int:
    """Open a directory that a peer wants to mount on; with ``O_PATH``, the caller's.

    A foreign peer must own it and be able to write there, as fusermount3 demands; a control group
    that is his, which systemd looks into, he must not cover.

    Raises:
        PermissionDenied: it is not his.
        OSError: as open(2).
    """
    with as_peer(peer), naming(path), ExitStack() as stack:
        fd = owned(stack, open_path(path, os.O_PATH | os.O_DIRECTORY))
        if is_foreign(peer):
            place = f"/proc/self/fd/{fd}"
            is_writable = os.access(place, os.W_OK | os.X_OK, effective_ids=True)
            is_his = os.fstat(fd).st_uid == peer.uid and is_writable
            if not is_his or file_system(fd) in _CONTROL_GROUPS:
                raise PermissionDenied
        stack.pop_all()
        return fd
