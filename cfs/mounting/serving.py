"""Serve images over FUSE so that nothing takes their objects away, and ``ps`` finds them.

Spec cli-and-varlink c.7.  Order: the processes are started, the image is read, the link (or
lock) that keeps the objects is made in the name of the process that will keep the mount, the
record likewise, and both go to it with everything else.  All that time the repository is open, so
no collection runs.  What is removed at the end the supervisor removes; a session does so if it
outlives its supervisor or never had one.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cfs.errors import UnsupportedError
from cfs.fuse import Launcher
from cfs.fuse.launcher import START_SECONDS
from cfs.fuse.mounts import GRACE_SECONDS, Mount
from cfs.fuse.options import Passthrough, ServeOptions, Verify
from cfs.fuse.program import User
from cfs.linux.files import owned
from cfs.linux.mountinfo import list_mounts
from cfs.linux.processes import start_time
from cfs.linux.traces import Trace, remove_traces
from cfs.mount import Place
from cfs.mounting.records import NewRecord, Record, new_record
from cfs.repository.locks import open_shared
from cfs.repository.mounted import keep_image, keep_store

if TYPE_CHECKING:
    from cfs.repository.repository import Repository

__all__ = ["Behalf", "serve_file", "serve_image"]

StrPath = str | os.PathLike[str]
Rights = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Behalf:
    """For whom an image is served, if the calling thread acts with another user's rights.

    Attributes:
        user: in whose name objects are read; None: our own.
        spawning: gives the thread the right to start processes.
        mounting: gives it the right to mount.
        patience: seconds until the user's processes have to serve.
    """

    user: User | None = None
    spawning: Rights = nullcontext
    mounting: Rights = nullcontext
    patience: float = START_SECONDS


OURSELVES = Behalf()


def serve_image(
    repository: "Repository",
    name: str,
    mountpoint: StrPath | Place,
    options: ServeOptions,
    *,
    records: str | None,
    background: bool = False,
    grace: float = GRACE_SECONDS,
    behalf: Behalf = OURSELVES,
) -> Mount:
    """Serve an image of a store; return when it is visible.

    Args:
        repository: the store, open until this returns.
        name: id, ``refs/NAME`` or NAME; also shown as mount source ``composefs:NAME``.
        mountpoint: existing directory, or a place.
        options: how; objects are verified by default if the store is secure.
        records: directory of the user's records, or None to keep none.
        background: give the processes no standard streams.
        grace: seconds for those who use the mount when it is told to end.
        behalf: for whom.

    Raises:
        NotFoundError: there is no such image.
        FormatError: it is no image.
        IntegrityError: it is not the image that its name says.
        MountError: the mount point, the kernel, fusermount3 or the session failed.
        OSError: the store cannot be read.
    """
    options = _suited(options, repository)
    with behalf.spawning():
        launcher = Launcher(
            options, background=background, user=behalf.user, patience=behalf.patience
        )
    with launcher, ExitStack() as stack:
        from cfs.erofs import load_image  # noqa: PLC0415 - the server starts while we load numpy
        from cfs.repository.images import open_image  # noqa: PLC0415

        image = stack.enter_context(open_image(repository, name))
        vector = load_image(image.fd, name)
        objects = _objects_of(repository)
        kept = keep_image(repository, image.digest, launcher.pid)
        owned(stack, kept.fd)
        with _recorded(records, launcher.pid, [kept]) as (record, traces), behalf.mounting():
            mount = launcher.start(
                vector, mountpoint, objects, name=name, grace=grace, traces=traces
            )
            _write_record(record, mount, name, options)
    return mount


def serve_file(
    path: str | int,
    mountpoint: StrPath | Place,
    options: ServeOptions,
    *,
    name: str | None = None,
    basedirs: Sequence[StrPath] = (),
    repository: "Repository | None" = None,
    records: str | None,
    background: bool = False,
    grace: float = GRACE_SECONDS,
    behalf: Behalf = OURSELVES,
) -> Mount:
    """Serve an image file; return when it is visible.

    Args:
        path: the image, or a descriptor of it, at its start; borrowed.
        mountpoint: existing directory, or a place.
        options: how; objects are verified by default if they come from a secure store.
        name: shown as mount source ``composefs:NAME``; the path if not given.
        basedirs: objects directories, searched in this order; a store that one of them belongs
            to counts as ``repository`` does.
        repository: store that objects come from as well; nothing is collected from it while the
            mount is served.
        records: directory of the user's records, or None to keep none.
        background: give the processes no standard streams.
        grace: seconds for those who use the mount when it is told to end.
        behalf: for whom.

    Raises:
        FormatError: it is no image.
        MountError: the mount point, the kernel, fusermount3 or the session failed.
        OSError: image or objects cannot be opened.
    """
    options = _suited(options, repository)
    name = str(path) if name is None else name
    with behalf.spawning():
        launcher = Launcher(
            options, background=background, user=behalf.user, patience=behalf.patience
        )
    with launcher, ExitStack() as stack:
        from cfs.erofs import load_image, open_image  # noqa: PLC0415 - see above

        vector = open_image(path) if isinstance(path, str) else load_image(path, name)
        objects: list[StrPath | int] = [*basedirs]
        kept = []
        if repository is not None:
            objects += _objects_of(repository)
            kept.append(keep_store(repository))
            owned(stack, kept[0].fd)
        for basedir in basedirs:
            lock = _lock_store_of(basedir)
            if lock is not None:
                kept.append(Trace(owned(stack, lock)))
        with _recorded(records, launcher.pid, kept) as (record, traces), behalf.mounting():
            mount = launcher.start(
                vector, mountpoint, objects, name=name, grace=grace, traces=traces
            )
            _write_record(record, mount, name, options)
    return mount


def _suited(options: ServeOptions, repository: "Repository | None") -> ServeOptions:
    if options.verify is not None:
        return options
    is_secure = repository is not None and repository.is_secure
    return replace(options, verify=Verify.REQUIRE if is_secure else Verify.OFF)


def _lock_store_of(basedir: StrPath) -> int | None:
    """Lock the store that an objects directory belongs to, if any: its image is not known there."""
    store, name = os.path.split(os.path.realpath(basedir))
    if name != "objects" or not os.path.lexists(os.path.join(store, "meta.json")):
        return None
    try:
        return open_shared(store)
    except OSError:  # not ours to read: then its objects can be served, but not kept
        return None


def _objects_of(repository: "Repository") -> list[int]:
    try:
        return [repository.objects.fd]
    except FileNotFoundError:  # the store has had none yet, and the image comes from elsewhere
        return []


@contextmanager
def _recorded(
    directory: str | None, pid: int, kept: Sequence[Trace]
) -> Iterator[tuple[NewRecord | None, list[Trace]]]:
    """Make a record if possible; if the block fails, remove all names."""
    traces = [*kept]
    with ExitStack() as stack:
        record = None
        with suppress(OSError):  # then the mount is served, but ps cannot show it
            if directory is not None:
                record = stack.enter_context(new_record(directory, pid))
                traces += record.traces
        try:
            yield record, traces
        except BaseException:
            remove_traces(traces)
            raise


def _write_record(record: NewRecord | None, mount: Mount, name: str, options: ServeOptions) -> None:
    if record is None:
        return
    mountpoint = os.fsencode(mount.mountpoint)
    ids = [
        entry.mount_id
        for entry in list_mounts()
        if (entry.device, entry.mountpoint) == (mount.device, mountpoint)
    ]
    start = start_time(mount.pid)
    if not ids or start is None:  # it has ended already
        return
    session = 0
    with suppress(UnsupportedError):
        session = mount.statistics().session_pid
    with suppress(OSError):  # no space: as above
        record.write(
            Record(
                mount_id=ids[-1],
                device=mount.device,
                mountpoint=mount.mountpoint,
                image=name,
                mode=options.mode.name,
                passthrough=options.passthrough is Passthrough.ON,
                owner_uid=os.geteuid(),
                pid=mount.pid,
                start=start,
                session_pid=session,
                session_start=start_time(session) or 0,
                started=int(time.time()),
            )
        )
