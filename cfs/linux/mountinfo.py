"""The kernel's list of mounts: ``/proc/self/mountinfo``, proc_pid_mountinfo(5).

Asks no file system, so it works for dead mounts as well.  No shared state: any thread may call.
"""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["MountEntry", "find_topmost", "list_mounts", "mounted_at"]


class MountEntry(NamedTuple):
    """A mount of this mount name space.

    Attributes:
        mount_id: number of the mount; used again when it has gone.
        parent_id: number of the mount that it lies on.
        device: ``st_dev`` of its file system; used again as well.
        mountpoint: absolute, without symlinks.
        fstype: with subtype, as ``fuse.composefs``.
        source: as given by whoever mounted.
        options: of the file system, separated by commas.
    """

    mount_id: int
    parent_id: int
    device: int
    mountpoint: bytes
    fstype: bytes
    source: bytes
    options: bytes


def list_mounts() -> list[MountEntry]:
    """Return all mounts, in an order that says nothing of which lies upon which.

    Raises:
        OSError: there is no /proc.
    """
    with open("/proc/self/mountinfo", "rb") as lines:
        return [_parse_line(line) for line in lines]


def mounted_at(path: str) -> int | None:
    """Return the device number of the topmost mount at ``path`` (without symlinks), or None."""
    found = find_topmost(list_mounts(), os.fsencode(path))
    return None if found is None else found.device


def find_topmost(mounts: Iterable[MountEntry], place: bytes) -> MountEntry | None:
    """Return the mount at a place that no other one there lies upon, or None."""
    found = [mount for mount in mounts if mount.mountpoint == place]
    # the topmost mount of a name space may have itself for parent
    covered = {mount.parent_id for mount in found if mount.parent_id != mount.mount_id}
    return next((mount for mount in reversed(found) if mount.mount_id not in covered), None)


def _parse_line(line: bytes) -> MountEntry:
    fields = line.rstrip(b"\n").split(b" ")
    major, _, minor = fields[2].partition(b":")
    fstype, source, options = fields[fields.index(b"-", 6) + 1 :][:3]
    return MountEntry(
        mount_id=int(fields[0]),
        parent_id=int(fields[1]),
        device=os.makedev(int(major), int(minor)),
        mountpoint=_unescaped(fields[4]),
        fstype=_unescaped(fstype),
        source=_unescaped(source),
        options=options,
    )


def _unescaped(text: bytes) -> bytes:
    if b"\\" not in text:  # as nearly always
        return text
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), text)
