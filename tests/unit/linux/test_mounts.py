"""Mount points that somebody else may move."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cfs.errors import MountError
from cfs.linux.mountinfo import mounted_at
from cfs.linux.mounts import MountAttr, attach_mount, create_mount, detach_mount, unmount


@pytest.fixture
def mounts() -> Iterator[list[int]]:
    """Two mounts that are attached nowhere yet."""
    try:
        found = [create_mount("tmpfs", [], MountAttr.NONE) for _ in range(2)]
    except MountError as error:
        pytest.skip(str(error))
    yield found
    for fd in found:
        os.close(fd)


@pytest.mark.parametrize("take_away", [unmount, detach_mount])
def test_nobody_leads_us_elsewhere(
    take_away: Callable[[str], None], mounts: list[int], tmp_path: Path
) -> None:
    """A directory on the way has become a symlink since the path was found."""
    (tmp_path / "other/mnt").mkdir(parents=True)
    (tmp_path / "home").symlink_to("other")
    there, through_link = str(tmp_path / "other/mnt"), str(tmp_path / "home/mnt")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        attach_mount(mounts[0], through_link)
    assert mounted_at(there) is None
    attach_mount(mounts[0], there)
    os.close(mounts.pop(0))  # it would be in use
    try:
        with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
            take_away(through_link)
        (tmp_path / "link").symlink_to("other/mnt")
        with pytest.raises(OSError, match="Invalid argument"):
            take_away(str(tmp_path / "link"))
        assert mounted_at(there) is not None
        take_away(there)
        assert mounted_at(there) is None
    finally:
        with suppress(OSError):
            detach_mount(there)


@pytest.mark.parametrize("take_away", [unmount, detach_mount])
def test_only_the_mount_that_is_meant(
    take_away: Callable[[str, int], None], mounts: list[int], tmp_path: Path
) -> None:
    """Another mount is at the place by now."""
    ours, others = (os.fstat(fd).st_dev for fd in mounts)
    attach_mount(mounts[1], str(tmp_path))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            take_away(str(tmp_path), ours)
        assert mounted_at(str(tmp_path)) == others
        os.close(mounts.pop())  # it would be in use
        take_away(str(tmp_path), others)
        assert mounted_at(str(tmp_path)) != others
    finally:
        with suppress(OSError):
            detach_mount(str(tmp_path))


def test_order_of_making_does_not_tell_what_lies_on_top(mounts: list[int], tmp_path: Path) -> None:
    first, second = mounts
    attach_mount(second, str(tmp_path))
    attach_mount(first, str(tmp_path))
    try:
        assert mounted_at(str(tmp_path)) == os.fstat(first).st_dev == tmp_path.stat().st_dev
    finally:
        for _ in mounts:
            detach_mount(str(tmp_path))
