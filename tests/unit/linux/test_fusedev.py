"""What needs no mount."""

import os

import pytest

from cfs.errors import MountError
from cfs.linux import fusedev
from cfs.linux.files import is_on_overlay


def test_who_may_not_open_the_device_has_no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        msg = "cannot open /dev/fuse"
        raise MountError(msg)

    monkeypatch.setattr(fusedev, "open_device", refuse)
    assert list(fusedev.clone_device(0, 3)) == []


def test_proc_is_no_overlay() -> None:
    fd = os.open("/proc", os.O_PATH)
    try:
        assert not is_on_overlay(fd)
    finally:
        os.close(fd)
