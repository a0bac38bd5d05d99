"""Who holds an ``flock``: proc_locks(5).  Any thread may call."""

import os
from pathlib import Path

__all__ = ["find_lock_holders"]

_NR_FIELDS = 8


def find_lock_holders(fd: int) -> list[int]:
    """Return the processes that took the flocks on a file, except this one; best effort.

    A lock may have been inherited from a process that is gone, or belong to another pid
    namespace, and on file systems with device numbers of their own (btrfs) nothing is found.

    Args:
        fd: any descriptor of the file; borrowed.
    """
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    # 1: FLOCK  ADVISORY  READ 4711 fe:00:42 0 EOF; waiting ones have an arrow in front
    fields = [line.split() for line in lines]
    pids = {
        int(pid)
        for _, kind, _, _, pid, file, *_ in (each for each in fields if len(each) == _NR_FIELDS)
        if kind == "FLOCK" and file == device
    }
    return sorted(pid for pid in pids if pid not in (0, -1, os.getpid()))
