"""Processes told apart although their numbers are used again.

A number and the time at which the process started name it as long as the machine runs, and with
the boot id for ever: proc_pid_stat(5) field 22, Documentation/admin-guide/sysctl/kernel.rst.  A
process is seen only in its own PID name space and those around it.  No shared state.
"""

import functools

__all__ = ["boot_id", "is_running", "start_time"]

_STATE, _START_TIME = 0, 19  # fields behind the name, which is field 2
_ENDED = (b"Z", b"X")


@functools.cache
def boot_id() -> str:
    """Return what names the time since the machine was started last: a UUID.

    Raises:
        OSError: there is no /proc.
    """
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot.

    None: it has ended, or is hidden from us (proc(5), ``hidepid``).
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # the name may hold anything, parentheses too
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    if not fields or fields[_STATE] in _ENDED:
        return None
    return int(fields[_START_TIME])


def is_running(pid: int, start: int) -> bool:
    """Whether we see that the process of this number that started at ``start`` has not ended."""
    return start_time(pid) == start
