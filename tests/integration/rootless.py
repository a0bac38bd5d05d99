"""An ordinary user with a user namespace of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.paths import CHECKOUT

_NOBODY = 65534
_AS_NOBODY = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
_SECONDS = 180


class Rootless(NamedTuple):
    """A user who is root in a namespace only, and a directory that is the user's."""

    home: Path
    start: list[str]

    def run(self, script: str) -> "subprocess.CompletedProcess[str]":
        """Run a shell script up to the first command that fails."""
        for path in (self.home, *self.home.rglob("*")):
            if self.start[0] != "unshare" and path.lstat().st_uid == 0:
                os.chown(path, _NOBODY, _NOBODY, follow_symlinks=False)
        more = {"PYTHONPATH": str(CHECKOUT), "HOME": str(self.home), "XDG_RUNTIME_DIR": ""}
        return subprocess.run(
            [*self.start, "/bin/sh", "-ec", script],
            cwd=CHECKOUT, env={**os.environ, **more}, capture_output=True, text=True, check=False,
            timeout=_SECONDS,
        )  # fmt: skip


@contextmanager
def rootless(flags: str) -> Iterator[Rootless]:
    """Find a user; skips the test where there are no user namespaces.

    As root that is nobody, whom pytest's own directories are closed to; root itself if nobody
    reaches neither the interpreter nor ``/dev/fuse``.

    Args:
        flags: of unshare.
    """
    users = [_AS_NOBODY, []] if os.geteuid() == 0 else [[]]
    starts = [[*user, "unshare", flags] for user in users]
    start = next(filter(_can_start, starts), None)
    if start is None:
        pytest.skip(f"no user namespace with /dev/fuse: unshare {flags}")
    home = Path(tempfile.mkdtemp(prefix="cfs-rootless-"))
    try:
        yield Rootless(home, start)
    finally:
        shutil.rmtree(home)


def _can_start(start: list[str]) -> bool:
    code = "import os, cfs.cli.main; os.open('/dev/fuse', os.O_RDWR)"
    probe = [*start, sys.executable, "-c", code]
    return subprocess.run(probe, cwd=CHECKOUT, capture_output=True, check=False).returncode == 0
