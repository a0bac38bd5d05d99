"""How the starter of a mount learns of its end."""

import subprocess
import sys
from pathlib import Path

import pytest

from cfs.fuse import mounts
from cfs.fuse.handover import channel_pair
from cfs.fuse.mounts import Mount


def test_what_lies_upon_a_broken_mount_is_asked_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a file system of whoever broke it, which never answers."""
    monkeypatch.setattr(mounts, "is_dead", lambda _path: pytest.fail("it was asked"))
    process = subprocess.Popen([sys.executable, "-ISc", "raise SystemExit(1)"])
    channel, theirs = channel_pair()
    theirs.close()
    mount = Mount(str(tmp_path), tmp_path.stat().st_dev, process, channel, -1)
    assert mount.wait(60) == 1
