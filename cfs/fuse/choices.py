"""The choices of :mod:`cfs.fuse.options` that have names.

Apart from it, because a session starts faster without :mod:`dataclasses`.
"""

from enum import IntEnum

__all__ = ["Mode", "Passthrough", "Verify"]


class Mode(IntEnum):
    """Who reads the objects: the FUSE server, or the kernel's overlayfs above it."""

    PLAIN = 0
    OVERLAY = 1


class Passthrough(IntEnum):
    """Whether the kernel reads objects itself; ``enum cfs_passthrough`` of worker/worker.h."""

    OFF = 0
    ON = 1
    AUTO = 2


class Verify(IntEnum):
    """Which digest of an object counts; ``enum cfs_verify`` of worker/worker.h."""

    OFF = 0
    OPEN = 1
    REQUIRE = 2
