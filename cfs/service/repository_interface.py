"""``org.composefs.Repository`` but for FUSE: stores, their images, checks and collections.

Specification: cli-and-varlink b.3 and b.6; names and parameters are those of the IDL.  Errors of
cfs and of the system that leave a method become ``InternalError``.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from cfs.errors import (
    BusyError,
    CfsError,
    FormatError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    describe,
    escape,
)
from cfs.linux.files import PATH_MAX, open_path, owned
from cfs.repository.creation import Outcome, init
from cfs.repository.fsck import check
from cfs.repository.gc import Collection, collect
from cfs.repository.images import image_objects, list_images
from cfs.repository.metadata import parse_algorithm
from cfs.repository.metafile import read_metadata
from cfs.service.budget import Budget
from cfs.service.errors import MethodError
from cfs.service.handles import retry_busy
from cfs.service.kernel_mounts import find_wrong_fds, reply_mount
from cfs.service.rights import as_peer, refuse_foreign, store_path, trusted_uids

if TYPE_CHECKING:
    from cfs.service.call import Call
    from cfs.service.handles import Handles

__all__ = ["RepositoryMethods"]

_DEFAULT_ALGORITHM = "fsverity-sha512-12"
_EROFS_VERSION = 1
_COLLECT_WAIT_S = 10.0  # for other processes; a client may have no more patience than 45 s
_COLLECT_PAUSE_S = 0.1
_CHECKS_PER_UID, _CHECKS = 4, 16
_CHECK_WAIT_S = 600.0
_MAX_FINDINGS_SIZE = 2 << 20  # bytes; JSON may make six of one, and a message has 16 MiB
_STATUSES = {
    Outcome.CREATED: "Created",
    Outcome.EXISTED: "Opened",
    Outcome.PRESERVED: "Opened",
    Outcome.UPGRADED: "Upgraded",
}

_Reply = dict[str, Any]
_log = logging.getLogger(__name__)


class RepositoryMethods:
    """The methods.  Any thread may call; state: the handles, and how many checks run."""

    def __init__(self, handles: "Handles") -> None:
        """Share the handles with the other interfaces."""
        self._handles = handles
        self._checks = Budget(per_uid=_CHECKS_PER_UID, total=_CHECKS, trusted=trusted_uids())

    def InitRepository(
        self, call: "Call", *, path: str, algorithm: str | None, insecure: bool | None
    ) -> _Reply:
        """Make a store, or check that the one that is there is the same."""
        outcome = self._init(call, path, algorithm, insecure=insecure, ensure=False)
        return {"created": outcome is Outcome.CREATED}

    def EnsureRepository(
        self, call: "Call", *, path: str, algorithm: str | None, insecure: bool | None
    ) -> _Reply:
        """Make a store, or leave the one that is there, if it has that algorithm."""
        outcome = self._init(call, path, algorithm, insecure=insecure, ensure=True)
        return {"status": _STATUSES[outcome]}

    def _init(
        self, call: "Call", path: str, algorithm: str | None, *, insecure: bool | None, ensure: bool
    ) -> Outcome:
        try:
            wanted = parse_algorithm(_DEFAULT_ALGORITHM if algorithm is None else algorithm)
        except FormatError as error:
            msg = f"invalid algorithm: {error}"
            raise MethodError("InvalidSpec", {"message": msg}) from None
        with as_peer(call.peer):
            _check_path(path)
            is_secure = _is_secure(path)  # varlink does not compare it
            if is_secure is None:
                is_secure = not (self._handles.options.insecure if insecure is None else insecure)
            result = retry_busy(
                call,
                lambda: init(
                    path,
                    algorithm=wanted,
                    is_secure=is_secure,
                    erofs_version=_EROFS_VERSION,
                    ensure=ensure,
                    wait=False,
                ),
            )
            return result.outcome

    def OpenRepository(
        self, call: "Call", *, path: str | None, user: bool | None, system: bool | None
    ) -> _Reply:
        """Open a store."""
        if (path is not None) + bool(user) + bool(system) != 1:
            msg = "exactly one of `path`, `user`, `system` must be set"
            raise MethodError("InvalidSpec", {"message": msg})
        if path is None:
            try:
                path = store_path(call.peer, user=bool(user))
            except InvalidRequestError as error:
                raise MethodError("InvalidSpec", {"message": str(error)}) from None
        try:
            _check_path(path)
            opened = self._handles.open_store(call, path)
        except (CfsError, OSError) as error:
            raise MethodError("RepoNotFound", {"message": describe(error)}) from None
        reply: _Reply = {
            "handle": opened.handle,
            "hash_algorithm": opened.algorithm.name.lower(),
        }
        if opened.objects_device is not None:
            reply["objects_device_id"] = opened.objects_device
        return reply

    def CloseRepository(self, call: "Call", *, handle: int) -> None:
        """Give a handle back."""
        self._handles.close(call, handle)

    def Fsck(self, call: "Call", *, handle: int, metadata_only: bool | None) -> _Reply:
        """Check a store."""
        with self._handles.get(call, handle) as repository, self._checking(call.peer.uid):
            report = check(repository, metadata_only=bool(metadata_only))
        return {**report.as_dict(), "errors": _shorten(report.errors)}

    @contextmanager
    def _checking(self, uid: int) -> Iterator[None]:
        """Bound the checks at the same time: each has as many threads as there are processors."""
        with self._checks.lend(uid, 1, timeout=_CHECK_WAIT_S) as may_check:
            if not may_check:
                msg = "too many repositories are being checked"
                raise BusyError(msg)
            yield

    def Gc(self, call: "Call", *, handle: int, dry_run: bool, roots: list[str]) -> _Reply:
        """Remove what no name needs."""
        kept = [root.encode() for root in roots]
        if dry_run:
            with self._handles.get(call, handle) as repository:
                found = collect(repository, kept, dry_run=True)
        else:
            found = self._collect(call, handle, kept)
        _report_problems(found)
        result = {
            "objects_removed": found.nr_objects,
            "objects_bytes": found.size,
            "images_pruned": found.nr_links["images"],
            "streams_pruned": found.nr_links["streams"],
        }
        return {"result": result, "dry_run": dry_run}

    def _collect(self, call: "Call", handle: int, roots: list[bytes]) -> Collection:
        """Collect as soon as nobody else uses the store.

        Between two tries the other calls on the store get their turn.
        """
        with self._handles.get(call, handle) as repository:
            repository.check_writable()  # who may not collect shall hold nobody up
        deadline_s = time.monotonic() + _COLLECT_WAIT_S
        while True:
            with self._handles.exclusive(call, handle) as repository:
                try:
                    return collect(repository, roots, on_wait=_give_up)
                except BusyError:
                    if time.monotonic() > deadline_s or call.gone():
                        raise
            time.sleep(_COLLECT_PAUSE_S)

    def ImageObjects(self, call: "Call", *, handle: int, name: str) -> _Reply:
        """List the objects that an image needs."""
        with self._handles.get(call, handle) as repository:
            with _unknown_images(name):
                digests = image_objects(repository, name)
            prefix = repository.algorithm.name.lower()
        return {"object_ids": [f"{prefix}:{digest}" for digest in digests]}

    def ListImageRefs(self, call: "Call", *, handle: int) -> _Reply:
        """List the named images."""
        with self._handles.get(call, handle) as repository:
            images = list_images(repository)
        return {"images": [{"name": image.name, "digest": image.digest} for image in images]}

    def Mount(self, call: "Call", *, handle: int, name: str, options: dict[str, Any]) -> _Reply:
        """Make a kernel mount of an image, attached nowhere."""
        with self._handles.get(call, handle) as repository:
            # a made-up image would reach the kernel, with set-user-ID files
            refuse_foreign(call.peer)
            if wrong := find_wrong_fds(call, options):
                raise MethodError("InvalidSpec", {"message": wrong})
            return reply_mount(call, repository, name, options)


def _check_path(path: str) -> None:
    """Refuse what no path can be, before anybody looks for its parents.

    Raises:
        InvalidRequestError: it has a NUL, or too many bytes.
    """
    if "\0" in path or len(path.encode()) >= PATH_MAX:
        msg = "the path of the repository is too long, or has a NUL"
        raise InvalidRequestError(msg)


def _is_secure(path: str) -> bool | None:
    """Return whether the store that is there is secure; None if there is none yet.

    What is broken is left to who uses it next.
    """
    try:
        with ExitStack() as stack:
            directory = owned(stack, open_path(path, os.O_RDONLY | os.O_DIRECTORY))
            found = read_metadata(directory)
    except (CfsError, OSError):
        return None
    return None if found is None else found[1]


@contextmanager
def _unknown_images(name: str) -> Iterator[None]:
    """Make ``NoSuchRef`` of names that lead to nothing, the empty one aside."""
    try:
        yield
    except NotFoundError:
        raise MethodError("NoSuchRef", {"reference": name}) from None
    except InvalidRequestError:
        if not name:
            raise
        raise MethodError("NoSuchRef", {"reference": name}) from None


def _give_up() -> None:
    msg = "the repository is in use by another process"
    raise BusyError(msg)


def _report_problems(collection: Collection) -> None:
    """Log what a collection left alone, for which the reply has no place.

    Raises:
        IntegrityError: because of that it could remove no object.
    """
    if not collection.is_complete:
        first, *others = collection.problems
        more = f" (and {len(others)} more)" if others else ""
        msg = f"no object was removed: what a name needs is not known: {first}{more}"
        raise IntegrityError(msg)
    for problem in collection.problems:
        _log.warning("collection: %s", escape(str(problem)))


def _shorten(errors: list[str]) -> list[str]:
    """Return as many findings as fit into a reply, and how many more there are."""
    size = 0
    for number, error in enumerate(errors):
        size += len(error.encode(errors="replace"))
        if size > _MAX_FINDINGS_SIZE:
            return [*errors[:number], f"fsck: more-findings: {len(errors) - number}"]
    return errors
