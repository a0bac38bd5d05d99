"""Who holds a lock."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from cfs.linux.lock_holders import find_lock_holders

HOLD = (
    "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY);"
    "fcntl.flock(fd, fcntl.LOCK_SH); print('held', flush=True); sys.stdin.read()"
)


def test_holders_of_a_lock_are_other_processes(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        assert find_lock_holders(fd) == []
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout
            assert holder.stdout.readline() == b"held\n"
            assert find_lock_holders(fd) == [holder.pid]
        assert find_lock_holders(fd) == []
    finally:
        os.close(fd)
