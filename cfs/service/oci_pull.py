"""``Pull`` of ``org.composefs.Oci``: progress as replies (spec b.4, b.6)."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cfs.digest import Algorithm, Digest
from cfs.errors import FormatError
from cfs.oci.images import BootMismatchError
from cfs.oci.pull import (
    Done,
    Event,
    Message,
    Progress,
    Pulled,
    Skipped,
    Started,
    link_boot,
)
from cfs.oci.sources import LocalFetch, SourceOptions, Stopper, needs_program
from cfs.service.budget import Budget
from cfs.service.call import Replies
from cfs.service.errors import MethodError, internal_error
from cfs.service.pull_process import Pace, pull
from cfs.service.rights import refuse_foreign, trusted_uids
from cfs.transform.oci import XattrMode

if TYPE_CHECKING:
    from cfs.repository.repository import Repository
    from cfs.service.call import Call
    from cfs.service.handles import Handles

__all__ = ["XATTR_MODES", "Events", "PullMethods"]

XATTR_MODES = {
    None: XattrMode.ALLOWLIST_ONLY,
    "AllowlistOnly": XattrMode.ALLOWLIST_ONLY,
    "KeepUserXattrs": XattrMode.KEEP_USER_XATTRS,
}
_LOCAL_FETCH = {
    "auto": LocalFetch.AUTO,
    "if-possible": LocalFetch.AUTO,
    "zerocopy": LocalFetch.ZEROCOPY,
    "zero-copy": LocalFetch.ZEROCOPY,
}
_PULLS_PER_UID, _PULLS = 32, 64  # a process each, of 80 MB
_MAX_SILENCE = 15.0  # seconds; varlinkctl gives up after 45
_STILL = {"message": "still working"}

Reply = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Wish:
    """What a client wants to have pulled; the members are the parameters of the method."""

    handle: int
    image: str
    name: str | None
    local_fetch: str
    storage_root: str | None
    bootable: bool
    xattrs: str | None
    expected_digest: str | None

    def expected(self, algorithm: Algorithm) -> Digest | None:
        """Return the digest that the boot image is to have.

        Raises:
            MethodError: ``InvalidRequest`` or ``InvalidDigest``.
        """
        if self.expected_digest is None:
            return None
        if not self.bootable:
            raise MethodError("InvalidRequest", message="expected_digest requires bootable")
        if self.xattrs is not None:
            message = "expected_digest excludes xattrs: all modes are tried"
            raise MethodError("InvalidRequest", message=message)
        try:
            digest = Digest.parse(self.expected_digest)
        except FormatError as error:
            raise MethodError("InvalidDigest", message=f"expected_digest: {error}") from None
        if digest.algorithm is not algorithm:
            message = f"expected_digest: expected {algorithm.digest_size * 2} hex digits"
            raise MethodError("InvalidDigest", message=message)
        return digest


class PullMethods:
    """The method; pulls under way end with :meth:`stop_pulls`."""

    def __init__(self, handles: "Handles") -> None:
        """Share the handles with the other interfaces; no pulls are under way."""
        self._handles = handles
        self._pulls_lock = threading.Lock()
        self._pulls: set[Stopper] = set()
        self._budget = Budget(per_uid=_PULLS_PER_UID, total=_PULLS, trusted=trusted_uids())

    def Pull(self, call: "Call", **parameters: Any) -> Reply | Replies:
        """Fetch an image; a client that leaves ends it if it has asked for progress."""
        wish = _Wish(**parameters)
        if call.more and not call.oneway:
            return self._stream(call, wish)
        with self._stoppable(call.peer.uid) as stopper:
            return self._pull(call, wish, stopper, _ignore)

    def stop_pulls(self) -> None:
        """Have all pulls fail soon, and not block."""
        with self._pulls_lock:
            for stopper in self._pulls:
                stopper.stop()

    def _stream(self, call: "Call", wish: _Wish) -> Replies:
        events = Events()
        with (
            self._stoppable(call.peer.uid) as stopper,
            ThreadPoolExecutor(1, "pull") as executor,
        ):
            forget = call.on_disconnect(stopper.stop)
            try:
                outcome = executor.submit(self._pull, call, wish, stopper, events.put)
                outcome.add_done_callback(events.end)
                yield from ((reply, True) for reply in events)
                yield outcome.result(), False
            finally:
                forget()
                stopper.stop()

    @contextmanager
    def _stoppable(self, uid: int) -> Iterator[Stopper]:
        """Count a pull, which is a process; it can be stopped within the block."""
        stopper = Stopper()
        with self._budget.lend(uid, 1) as may_pull:
            if not may_pull:
                raise internal_error("too many images are being pulled")
            with self._pulls_lock:
                self._pulls.add(stopper)
            try:
                yield stopper
            finally:
                with self._pulls_lock:
                    self._pulls.remove(stopper)

    def _pull(
        self, call: "Call", wish: _Wish, stopper: Stopper, report: Callable[[Event], None]
    ) -> Reply:
        """Pull, and return the last reply."""
        options = SourceOptions(
            local_fetch=_LOCAL_FETCH.get(wish.local_fetch, LocalFetch.DISABLED),
            storage_root=wish.storage_root,
            stopper=stopper,
        )
        with self._handles.get(call, wish.handle) as repository:
            expected = wish.expected(repository.algorithm)
            if needs_program(wish.image, options):
                refuse_foreign(call.peer)  # it would have the rights and credentials of the service
            pulled = pull(
                repository, wish.image, options,
                name=wish.name, bootable=wish.bootable, report=report,
            )  # fmt: skip
            if wish.bootable:
                pulled = _link_boot(repository, pulled, expected, XATTR_MODES[wish.xattrs])
        return {"completed": _describe(pulled)}


def _ignore(event: Event) -> None:
    pass


def _link_boot(
    repository: "Repository", pulled: Pulled, expected: Digest | None, mode: XattrMode
) -> Pulled:
    try:
        return link_boot(repository, pulled, expected, mode=mode)
    except BootMismatchError as error:
        raise MethodError(
            "BootImageMismatch", expected=str(error.expected), tried=error.nr_tried
        ) from None


def _describe(pulled: Pulled) -> Reply:
    boot = pulled.boot
    return {
        "manifest_digest": pulled.manifest_digest,
        "config_digest": pulled.config_digest,
        "manifest_verity": str(pulled.manifest_stream),
        "config_verity": str(pulled.config_stream),
        "stats": pulled.statistics.format(),
        "boot_image": None if boot is None else str(boot.digest),
        "boot_image_mode": None if boot is None else boot.mode.value,
        "boot_image_format_version": None if boot is None else f"V{boot.version}",
    }


@dataclass
class Events:
    """What happened and was not told yet, as replies; the pull does not wait for the client.

    Of the progress of a layer only the last is kept, so there are at most some replies per layer.
    ``_changed`` guards the rest.
    """

    _changed: threading.Condition = field(default_factory=threading.Condition)
    _pending: dict[object, Reply] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)
    _pace: Pace = field(default_factory=Pace)
    _has_ended: bool = False

    def put(self, event: Event) -> None:
        """Add an event; in the threads of the pull."""
        with self._changed:
            if self._pace.is_too_soon(event):
                return
            key = event.id if isinstance(event, Progress) else object()
            self._pending[key] = self._reply(event)
            self._changed.notify()

    def end(self, _: object = None) -> None:
        """Let the iteration end once all was told."""
        with self._changed:
            self._has_ended = True
            self._changed.notify()

    def __iter__(self) -> Iterator[Reply]:
        """Yield replies until the end; after a silence one that says nothing."""
        while (reply := self._next()) is not None:
            yield reply

    def _next(self) -> Reply | None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._pending or self._has_ended, _MAX_SILENCE):
                return _STILL
            if not self._pending:
                return None
            return self._pending.pop(next(iter(self._pending)))

    def _reply(self, event: Event) -> Reply:
        match event:
            case Started(name, size):
                self._sizes[name] = size
                return {"started": {"id": name, "total": size, "unit": "Bytes"}}
            case Progress(name, size):
                return {"progress": {"id": name, "fetched": size, "total": self._sizes.get(name)}}
            case Skipped(name):
                return {"skipped": {"id": name}}
            case Done(name):
                return {"done": {"id": name, "transferred": self._sizes.get(name, 0)}}
            case Message(text):
                return {"message": text}
