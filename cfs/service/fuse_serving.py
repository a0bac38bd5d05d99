"""Serve an image over FUSE for a client: checks, rights, life of the mount (spec c.2 and c.3).

What a foreign peer asks for is done with his rights: the calling thread has them while the store
is in use, the session that reads the objects runs as his process, and the mount is his.  Only the
supervisor, which reads nothing, has the service's own.
"""

import errno
import os
import select
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from cfs.errors import (
    CfsError,
    InvalidRequestError,
    MountError,
    MountPointError,
    NotFoundError,
    UnsupportedError,
    describe,
)
from cfs.fuse.options import MAX_WORKERS, Mode, Passthrough, ServeChoices, ServeOptions, Verify
from cfs.fuse.program import User
from cfs.linux.files import PATH_MAX, owned
from cfs.linux.fusedev import open_device
from cfs.mount import Place
from cfs.mounting.choice import MountRequest, choose_serving
from cfs.mounting.serving import Behalf, serve_file, serve_image
from cfs.service.call import Replies, close_fds
from cfs.service.errors import MethodError, PermissionDenied, internal_error
from cfs.service.fuse_entry import MODE_NAMES, FuseEntry, FuseState
from cfs.service.fuse_registry import FuseMounts
from cfs.service.rights import as_peer, as_service, is_foreign, open_mountpoint

if TYPE_CHECKING:
    from cfs.fuse.mounts import Mount
    from cfs.repository.repository import Repository
    from cfs.service.call import Call, Peer
    from cfs.service.handles import Handles

__all__ = ["FuseWish", "serve", "wait_for_change"]

_MAX_WORKERS_WISHED = 256
_MODES = {name: mode for mode, name in MODE_NAMES.items()}
_VERIFY = {"Off": Verify.OFF, "Open": Verify.OPEN, "Require": Verify.REQUIRE}
_UNAVAILABLE = frozenset(
    (errno.EPERM, errno.ENODEV, errno.ENXIO, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES)
)
_FOREIGN_SECONDS = 20.0  # whoever stops his session has the store in use meanwhile
_FUSE_CONF = "/etc/fuse.conf"


@dataclass(frozen=True, slots=True, kw_only=True)
class FuseWish:
    """What a client asks for.

    Attributes:
        handle: of the store.
        image: as the client named it; None: the first descriptor.
        mountpoint: absolute path, or None for a detached mount.
        wait: the call lasts as long as the mount.
        options: ``FuseParams``.
        find: finds the id of the image, or raises the interface's own errors; None: ``image`` is
            a name of the store, or an absolute path.
        invalid: error of the interface for contradictions.
    """

    handle: int
    image: str | None
    mountpoint: str | None
    wait: bool
    options: dict[str, Any]
    find: "Callable[[Repository], str] | None" = None
    invalid: str = "InvalidSpec"

    @property
    def is_path(self) -> bool:
        """Whether the image is a file that the service opens."""
        return self.find is None and self.image is not None and self.image.startswith("/")

    @property
    def ends_with_connection(self) -> bool:
        """Whether the mount must not outlive the connection."""
        return self.wait or self.options.get("lifetime") == "Connection"


def serve(call: "Call", handles: "Handles", mounts: FuseMounts, wish: FuseWish) -> Replies:
    """Serve an image; yield the replies of ``FuseServe`` and ``OciFuseMount``.

    Raises:
        MethodError: those that the two methods declare.
    """
    with handles.get(call, wish.handle) as repository:
        entry = _start(call, repository, mounts, wish)
    assert entry.mount is not None
    fd_index = None
    tree_fd = entry.mount.take_tree()
    if tree_fd >= 0:
        call.reply_fds([tree_fd])
        fd_index = 0
    if wish.ends_with_connection:
        mounts.tie(entry, call)
    is_waiting = wish.wait and not call.oneway
    if call.more or not is_waiting:
        yield {"mount": entry.describe(), "fd_index": fd_index}, is_waiting
    if is_waiting:
        yield from _wait(call, mounts, entry)


def _wait(call: "Call", mounts: FuseMounts, entry: FuseEntry) -> Replies:
    """Wait for the end of a mount, which the end of the connection brings about as well."""
    try:
        with mounts.watching(entry) as changes:
            while not entry.state.is_final:
                wait_for_change(call, changes)
    finally:
        mounts.end(entry)
    if entry.state is FuseState.FAILED:
        raise MethodError("MountFailed", message=entry.error or "the mount broke")
    yield {"mount": entry.describe(), "fd_index": None}, False


def wait_for_change(call: "Call", changes: socket.socket) -> None:
    """Wait for a change of a mount.

    Raises:
        MethodError: the client has gone; nobody will see it.
    """
    poll = select.poll()
    poll.register(call.fileno(), 0)
    poll.register(changes, select.POLLIN)
    ready = {fd for fd, _ in poll.poll()}
    if changes.fileno() in ready:
        changes.recv(16)
    if call.fileno() in ready:
        msg = "the client has left"
        raise internal_error(msg)


def _start(call: "Call", repository: "Repository", mounts: FuseMounts, wish: FuseWish) -> FuseEntry:
    """Check the call, in the order of the specification, and mount."""
    peer = call.peer
    with ExitStack() as stack:
        place = _place(stack, peer, repository, wish)
        fds = call.take()
        stack.callback(close_fds, fds)
        try:
            _check(call, wish, fds)
            request = _request(peer, wish, fds)
        except InvalidRequestError as error:
            raise MethodError(wish.invalid, message=str(error)) from None
        if wish.find is not None:
            image: str | int = wish.find(repository)
        elif wish.is_path:
            image = _open_image(stack, wish)
        else:
            image = fds[0] if wish.image is None else wish.image
        with _fuse_errors(wish):
            options = _options(peer, request, wish)
            entry = mounts.add(peer, wish.image or "", wish.mountpoint, options)
            try:
                mount = _mount(
                    peer,
                    repository,
                    image,
                    place,
                    options=options,
                    records=mounts.records,
                    name=wish.image or "image",
                )
                is_lasting = not wish.ends_with_connection and wish.mountpoint is not None
                with as_service():  # for the thread that it may start as well
                    mounts.serve(entry, mount, is_lasting=is_lasting)
            except (CfsError, OSError) as error:
                mounts.fail(entry, describe(error))
                raise
            except BaseException as error:
                mounts.fail(entry, type(error).__name__)
                raise
    return entry


def _place(
    stack: ExitStack, peer: "Peer", repository: "Repository", wish: FuseWish
) -> str | Place | MountPointError:
    """Return where to mount, or why nothing can be mounted there.

    Raises:
        PermissionDenied: a foreign peer may not do that; this comes before all else.
    """
    owner = (peer.uid, peer.gid) if is_foreign(peer) else None
    if owner is None:
        return Place("") if wish.mountpoint is None else wish.mountpoint
    if wish.is_path:
        raise PermissionDenied
    with suppress(FileNotFoundError):  # no objects yet
        if not os.access(f"/proc/self/fd/{repository.objects.fd}", os.R_OK | os.X_OK,
                         effective_ids=True):  # fmt: skip
            raise PermissionDenied
    if wish.mountpoint is None or not wish.mountpoint.startswith("/"):
        return Place("", owner=owner)
    try:
        fd = owned(stack, open_mountpoint(peer, wish.mountpoint))
    except PermissionError:
        raise PermissionDenied from None
    except OSError as error:
        # found out now, told when its turn comes: mounting on it fails likewise
        msg = f"mount point {wish.mountpoint}: {error.strerror}"
        return MountPointError(msg, error.errno or errno.EIO)
    return Place(os.readlink(f"/proc/self/fd/{fd}"), directory_fd=fd, owner=owner)


def _check(call: "Call", wish: FuseWish, fds: Sequence[int]) -> None:
    """Check what the methods alone know of.

    Raises:
        InvalidRequestError: something contradicts something else.
        PermissionDenied: a foreign peer may not write to the upper or work directory.
    """
    nr_changes = 2 if wish.options.get("overlay") else 0
    nr_expected = nr_changes + (wish.image is None)
    if is_foreign(call.peer) and len(fds) == nr_expected:
        for fd in fds[nr_expected - nr_changes :]:
            is_writable = os.access(f"/proc/self/fd/{fd}", os.W_OK | os.X_OK, effective_ids=True)
            if os.fstat(fd).st_uid != call.peer.uid or not is_writable:
                raise PermissionDenied
    workers = wish.options.get("workers")
    problems = {
        f"expected {nr_expected} descriptors, got {len(fds)}": len(fds) != nr_expected,
        "the mount point has to be an absolute path": wish.mountpoint is not None
        and not wish.mountpoint.startswith("/"),
        "a mount point cannot contain a null character": "\0" in (wish.mountpoint or ""),
        "the image is empty": wish.image == "",
        "the image or the mount point has too long a name": max(  # they are listed for a while
            len(each or "") for each in (wish.image, wish.mountpoint)
        ) >= PATH_MAX,
        f"workers={workers}: expected 0 to {_MAX_WORKERS_WISHED}": workers is not None
        and workers > _MAX_WORKERS_WISHED,
        "without a mount point, wait needs more replies: the first one has the descriptor":
        wish.mountpoint is None and wish.wait and not call.more and not call.oneway,
    }  # fmt: skip
    for text, is_true in problems.items():
        if is_true:
            raise InvalidRequestError(text)
    if wish.image is None and not stat.S_ISREG(os.fstat(fds[0]).st_mode):
        msg = "the image is no regular file"
        raise InvalidRequestError(msg)


def _request(peer: "Peer", wish: FuseWish, fds: Sequence[int]) -> MountRequest:
    """Return the wish as the command line would say it.

    Raises:
        InvalidRequestError: the options contradict each other.
    """
    said = wish.options
    choices: ServeChoices = {"allow_other": bool(said.get("allow_other"))}
    if said.get("mode") is not None:
        choices["mode"] = _MODES[said["mode"]]
    elif is_foreign(peer) and not said.get("overlay"):
        # root's processes do not get stuck in it then, should the peer stop his session
        choices["mode"] = Mode.PLAIN
    if said.get("workers") is not None:
        choices["workers"] = min(said["workers"], MAX_WORKERS)
    if said.get("passthrough"):
        choices["passthrough"] = Passthrough.ON
    if said.get("verify") is not None:
        choices["verify"] = _VERIFY[said["verify"]]
    if not said.get("overlay"):
        return MountRequest(choices=choices)
    upperdir, workdir = (f"/proc/self/fd/{fd}" for fd in fds[-2:])
    return MountRequest(
        choices=choices,
        upperdir=upperdir,
        workdir=workdir,
        read_write=bool(said.get("read_write")),
    )


def _options(peer: "Peer", request: MountRequest, wish: FuseWish) -> ServeOptions:
    """Choose how to serve.

    Raises:
        UnsupportedError: FUSE cannot be used at all, or not so.
        MountError: an overlay cannot.
    """
    if os.geteuid() == 0:  # others have fusermount3, which may do what they may not
        with as_service():
            os.close(open_device())
    if is_foreign(peer) and request.upperdir is not None:
        msg = "an upper directory of another user: overlayfs would need more than his rights"
        raise UnsupportedError(msg)
    needs_leave = is_foreign(peer) or os.geteuid() != 0
    if wish.options.get("allow_other") and needs_leave and not _others_may_be_let_in():
        msg = f"allow_other needs user_allow_other in {_FUSE_CONF}"
        raise UnsupportedError(msg)
    with as_peer(peer, may_mount=True):
        return choose_serving(request)


def _others_may_be_let_in() -> bool:
    """Whether fuse.conf(5) lets users other than root open their mounts to others."""
    try:
        with open(_FUSE_CONF) as lines:
            return any(line.strip() == "user_allow_other" for line in lines)
    except (OSError, UnicodeDecodeError):
        return False


def _open_image(stack: ExitStack, wish: FuseWish) -> int:
    """Open an image by its path: a regular file, which nobody has to wait for."""
    assert wish.image is not None
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = owned(stack, os.open(wish.image, flags))
        is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise MethodError("NoSuchRef", reference=wish.image) from None
    if not is_regular:
        msg = f"{wish.image}: not a regular file"
        raise MethodError(wish.invalid, message=msg)
    return fd


def _mount(
    peer: "Peer",
    repository: "Repository",
    image: str | int,
    place: str | Place | MountPointError,
    *,
    options: ServeOptions,
    records: str | None,
    name: str,
) -> "Mount":
    """Mount, and return when it serves."""
    if isinstance(place, MountPointError):
        raise place
    behalf = Behalf()
    if is_foreign(peer):
        records = None  # they are for mounts of the service's own user
        # an overlay reads the objects itself, with the rights of the thread that makes it
        user = None if options.mode is Mode.OVERLAY else User(peer.uid, peer.gid, peer.groups)
        behalf = Behalf(
            user=user,
            spawning=as_service,
            mounting=partial(as_peer, peer, may_mount=True),
            patience=_FOREIGN_SECONDS,
        )
    if isinstance(image, str):
        return serve_image(
            repository, image, place, options, records=records, background=True, behalf=behalf
        )
    os.lseek(image, 0, os.SEEK_SET)
    return serve_file(
        image,
        place,
        options,
        name=name,
        repository=repository,
        records=records,
        background=True,
        behalf=behalf,
    )


@contextmanager
def _fuse_errors(wish: FuseWish) -> Iterator[None]:
    """Turn errors into those that the methods declare; the rest is ``InternalError`` later."""
    try:
        yield
    except NotFoundError as error:
        if wish.find is not None:
            raise
        raise MethodError("NoSuchRef", reference=wish.image or str(error)) from None
    except InvalidRequestError as error:
        raise MethodError(wish.invalid, message=str(error)) from None
    except UnsupportedError as error:
        raise MethodError("FuseUnavailable", message=str(error)) from None
    except MountPointError as error:
        raise MethodError("MountFailed", message=str(error)) from None
    except MountError as error:
        text = str(error)
        wants_more = bool(wish.options.get("passthrough")) and "passthrough" in text
        is_unavailable = error.errno in _UNAVAILABLE or wants_more
        name = "FuseUnavailable" if is_unavailable else "MountFailed"
        raise MethodError(name, message=text) from None
