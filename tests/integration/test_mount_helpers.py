"""``mount -t composefs`` and ``mount -t fuse.composefs`` through mount(8), and fstab lines.

Mount(8) looks for its helpers in /sbin alone.  In a mount namespace of its own, each test lays a
directory with the helpers over that.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.stores import BIG, Store
from tests.paths import CHECKOUT

pytestmark = pytest.mark.usefixtures("fuse", "overlay", "private_mounts")

BEGIN = """
set -eu
sbin=$(realpath /sbin)
mount -t overlay -o "lowerdir=$helpers:$sbin" none "$sbin"
"""
SECONDS = 60


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def helpers(tmp_path: Path) -> Path:
    """A directory with the helpers, as an installation has them."""
    directory = tmp_path / "helpers"
    directory.mkdir()
    for name in ("mount.composefs", "mount.fuse.composefs"):
        command = [sys.executable, "-P", "-m", "cfs.cli.main", name]
        start = f"PYTHONPATH={shlex.quote(str(CHECKOUT))} exec {shlex.join(command)}"
        script = directory / name
        script.write_text(f'#!/bin/sh\n{start} "$@"\n')
        script.chmod(0o755)
    return directory


def run(
    script: str, helpers: Path, store: Store, mnt: Path, **more: str
) -> "subprocess.CompletedProcess[str]":
    """Run a script for which /sbin has the helpers."""
    image = store.path / "images" / str(store.digest)
    words = {"helpers": helpers, "image": image, "objects": store.path / "objects", "mnt": mnt}
    environment = {**os.environ, **{name: str(word) for name, word in words.items()}, **more}
    return subprocess.run(
        ["unshare", "-m", "/bin/sh", "-c", BEGIN + script],
        env=environment, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip


@pytest.mark.parametrize("fstype", ["composefs", "fuse.composefs"])
def test_mount_and_umount(fstype: str, helpers: Path, store: Store, mnt: Path) -> None:
    script = f"""
mount -t {fstype} -o "basedir=$objects,nosuid" "$image" "$mnt"
grep " $mnt " /proc/self/mountinfo
cat "$mnt/small"
cmp "$mnt/big" "$original"
umount "$mnt"
if grep -q " $mnt " /proc/self/mountinfo; then exit 9; fi
"""
    (mnt.parent / "original").write_bytes(BIG)
    done = run(script, helpers, store, mnt, original=str(mnt.parent / "original"))
    assert (done.returncode, done.stderr) == (0, "")
    line, text = done.stdout.splitlines()
    assert text == "text"
    fields = line.split(" ")
    assert {"ro", "nosuid"} <= set(fields[5].split(","))
    separator = fields.index("-")
    image = os.path.realpath(store.path / "images" / str(store.digest))
    assert fields[separator + 2] == ("composefs" if fstype == "composefs" else f"composefs:{image}")


@pytest.mark.parametrize(
    ("fstype", "options"),
    [
        ("composefs", "defaults"),
        ("composefs", "ro,_netdev,nofail,x-systemd.automount,x-systemd.requires=x.service"),
        ("composefs", "noauto,user,tryverity"),
        ("fuse.composefs", "defaults,mode=plain,workers=1,allow_other"),
        ("fuse.composefs", "ro,_netdev,nofail,passthrough=auto,verify=open,x-systemd.automount"),
        ("fuse.composefs", "noauto,noexec,supervise=off,workers=0"),
    ],
)
def test_line_of_fstab(fstype: str, options: str, helpers: Path, store: Store, mnt: Path) -> None:
    image = store.path / "images" / str(store.digest)
    objects = store.path / "objects"
    table = mnt.parent / "fstab"
    table.write_text(f"{image} {mnt} {fstype} {options},basedir={objects} 0 0\n")
    script = """
mount -T "$table" "$mnt"
cat "$mnt/small"
umount "$mnt"
"""
    done = run(script, helpers, store, mnt, table=str(table))
    assert (done.returncode, done.stdout, done.stderr) == (0, "text", "")


def test_upper_directory_over_fuse(helpers: Path, store: Store, mnt: Path, tmp_path: Path) -> None:
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    script = """
mount -t fuse.composefs -o "basedir=$objects,upperdir=$up/upper,workdir=$up/work" "$image" "$mnt"
echo changed >"$mnt/small"
umount "$mnt"
"""
    done = run(script, helpers, store, mnt, up=str(tmp_path))
    if "Linux 6.16" in done.stderr:
        pytest.skip("needs Linux 6.16")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "upper" / "small").read_text() == "changed\n"


@pytest.mark.parametrize("fstype", ["composefs", "fuse.composefs"])
@pytest.mark.parametrize(
    "options",
    {
        "basedir=/nowhere": "/nowhere: No such file or directory",
        "ro": "No object dirs specified",
        "basedir=/,nosuch": "Unsupported option nosuch",
        "basedir=/,digest=00": "Invalid digest value",
    }.items(),
)
def test_failure_is_told(
    fstype: str, options: tuple[str, str], helpers: Path, store: Store, mnt: Path
) -> None:
    done = run(f'mount -t {fstype} -o {options[0]} "$image" "$mnt"', helpers, store, mnt)
    assert done.returncode != 0
    assert options[1] in done.stderr
    assert "Traceback" not in done.stderr


def test_verity_may_be_said_in_both_ways(helpers: Path, store: Store, mnt: Path) -> None:
    script = """
mount -t fuse.composefs -o "basedir=$objects,verity,verify=require" "$image" "$mnt"
cat "$mnt/small"
if cat "$mnt/big" 2>/dev/null; then exit 9; fi
umount "$mnt"
"""
    done = run(script, helpers, store, mnt)
    assert (done.returncode, done.stdout, done.stderr) == (0, "text", "")


def test_options_of_fuse_that_are_wrong(helpers: Path, store: Store, mnt: Path) -> None:
    for options in ("workers=99", "mode=plain,mode=plain", "mode=overlay,verify=open"):
        script = f'mount -t fuse.composefs -o "basedir=$objects,{options}" "$image" "$mnt"'
        done = run(script, helpers, store, mnt)
        assert done.returncode != 0
        assert "mount.fuse.composefs: " in done.stderr
        assert "Traceback" not in done.stderr


def test_fake_mount_does_nothing(helpers: Path, store: Store, mnt: Path) -> None:
    script = """
mount -f -t fuse.composefs -o "basedir=$objects" "$image" "$mnt"
if grep -q " $mnt " /proc/self/mountinfo; then exit 9; fi
"""
    assert run(script, helpers, store, mnt).returncode == 0
