"""The kernel's list of mounts."""

import os

from cfs.linux.mountinfo import MountEntry, _parse_line, find_topmost, list_mounts, mounted_at


def test_root_is_listed() -> None:
    (root, *_) = [mount for mount in list_mounts() if mount.mountpoint == b"/proc"]
    assert root.fstype == b"proc"
    assert root.device == os.stat("/proc").st_dev == mounted_at("/proc")


def test_optional_fields_and_escapes() -> None:
    line = rb"36 35 98:0 /mnt1 /a\040b\134 rw,noatime shared:2 master:1 - fuse.x s\011 rw,user_id=0"
    mount = _parse_line(line + b"\n")
    assert (mount.mount_id, mount.parent_id) == (36, 35)
    assert mount.device == os.makedev(98, 0)
    assert mount.mountpoint == b"/a b\\"
    assert (mount.fstype, mount.source) == (b"fuse.x", b"s\t")
    assert mount.options == b"rw,user_id=0"


def test_no_optional_fields_and_a_dash_as_name() -> None:
    mount = _parse_line(b"1 2 0:5 - - rw - tmpfs - rw\n")
    assert (mount.mountpoint, mount.fstype, mount.source) == (b"-", b"tmpfs", b"-")


def at(mount_id: int, parent_id: int, place: bytes = b"/mnt") -> MountEntry:
    return MountEntry(mount_id, parent_id, 5, place, b"tmpfs", b"none", b"rw")


def test_topmost_is_the_one_that_nothing_lies_upon() -> None:
    """The kernel lists them by age, and what was made first may have been attached last."""
    below, above, elsewhere = at(12, 1), at(11, 12), at(13, 11, b"/mnt/in")
    for mounts in ([above, below, elsewhere], [below, elsewhere, above]):
        assert find_topmost(mounts, b"/mnt") == above
    assert find_topmost([at(1, 1, b"/")], b"/") == at(1, 1, b"/")
    assert find_topmost([below], b"/none") is None


def test_mount_below_another_mount_is_hidden() -> None:
    """Something was mounted on the parent since: both are at the same path."""
    hidden, visible = at(11, 1), at(13, 12)
    assert find_topmost([hidden, at(12, 1, b"/"), visible], b"/mnt") == visible
