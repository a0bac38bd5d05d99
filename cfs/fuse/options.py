"""How to serve: what a caller of :func:`cfs.fuse.start` may choose.

Meaning of each choice: spec cli-and-varlink c.6 and c.7.  Values only, no shared state.
"""

import os
from dataclasses import dataclass
from typing import TypedDict

from cfs.errors import InvalidRequestError
from cfs.fuse.choices import Mode, Passthrough, Verify
from cfs.linux.mounts import MountAttr

__all__ = [
    "DEFAULT",
    "MAX_WORKERS",
    "Mode",
    "Passthrough",
    "ServeChoices",
    "ServeOptions",
    "Verify",
]

MAX_WORKERS = 16  # CFS_MAX_THREADS of worker/internal.h


class ServeChoices(TypedDict, total=False):
    """What a user has said of :class:`ServeOptions`; the rest is for us to choose."""

    mode: Mode
    workers: int
    passthrough: Passthrough
    verify: Verify
    supervise: bool
    allow_other: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a vector is served.

    Attributes:
        mode: plain FUSE, or metadata for an overlay.
        workers: number of C threads, at most :data:`MAX_WORKERS`; None: one for each usable
            CPU; 0: pyfuse3 alone, the reference plane.
        passthrough: let the kernel read objects; ``AUTO`` falls back silently.
        verify: check an object's digest at first use; ``REQUIRE`` takes fs-verity only; None:
            whatever suits the store, without one ``OFF``.
        supervise: keep a supervisor, which replaces a session that died; else nothing is pushed.
        allow_other: let other users in.
        upperdir: where an overlay keeps changes; needs ``workdir``.
        workdir: work directory of an overlay, on the file system of ``upperdir``.
        read_write: make the overlay writable.
        attributes: of the mount, as ``nosuid``, besides those that it always has.
        masked_flags: FUSE INIT flags (64 bits) not to use, for tests.

    Raises:
        InvalidRequestError: the choices contradict each other.
    """

    mode: Mode = Mode.PLAIN
    workers: int | None = None
    passthrough: Passthrough = Passthrough.OFF
    verify: Verify | None = None
    supervise: bool = True
    allow_other: bool = False
    upperdir: str | None = None
    workdir: str | None = None
    read_write: bool = False
    attributes: MountAttr = MountAttr.NONE
    masked_flags: int = 0

    def __post_init__(self) -> None:
        if self.workers is not None and not 0 <= self.workers <= MAX_WORKERS:
            msg = f"workers={self.workers}: expected 0 to {MAX_WORKERS}"
            raise InvalidRequestError(msg)
        is_overlay = self.mode is Mode.OVERLAY
        contradictions = {
            "workers=0 and passthrough=on cannot be combined": self.workers == 0
            and self.passthrough is Passthrough.ON,
            "mode=overlay and passthrough=on cannot be combined": is_overlay
            and self.passthrough is Passthrough.ON,
            "mode=overlay and verify=open cannot be combined": is_overlay
            and self.verify is Verify.OPEN,
            "an upper directory needs mode=overlay": not is_overlay
            and (self.upperdir, self.workdir) != (None, None),
            "an upper directory needs a work directory": self.workdir is None
            and self.upperdir is not None,
            "a work directory needs an upper directory": self.upperdir is None
            and self.workdir is not None,
            "read-write needs an upper directory": self.read_write and self.upperdir is None,
        }
        for text, is_true in contradictions.items():
            if is_true:
                raise InvalidRequestError(text)

    @property
    def nr_workers(self) -> int:
        """Number of C threads."""
        if self.workers is not None:
            return self.workers
        return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


DEFAULT = ServeOptions()
