"""Imports into a store that is full, read-only or somebody else's: an error, and no damage."""

import itertools
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.command_line import Done, command, environment, run

DISK_SIZE = 24 << 20
FILE_SIZE = 300_000
NR_FILES = 20
MARGIN = 64 << 10  # bytes of directories that stay
NOBODY = 65534


def mount_disk(directory: Path, *mkfs_options: str) -> Path:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a loop device")
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 (e2fsprogs) is not installed")
    image, mountpoint = directory / "disk", directory / "mountpoint"
    with image.open("wb") as file:
        file.truncate(DISK_SIZE)
    mountpoint.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", *mkfs_options, image], check=True)
    done = subprocess.run(
        ["mount", "-o", "loop", image, mountpoint], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a loop device: {done.stderr.strip()}")
    return mountpoint


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    mountpoint = mount_disk(tmp_path)
    yield mountpoint
    subprocess.run(["umount", mountpoint], check=True)


@pytest.fixture
def disk_of_few_inodes(tmp_path: Path) -> Iterator[Path]:
    mountpoint = mount_disk(tmp_path, "-N", "32")
    yield mountpoint
    subprocess.run(["umount", mountpoint], check=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    numbers = random.Random(7)
    directory = tmp_path / "tree" / "usr"
    directory.mkdir(parents=True)
    for number in range(NR_FILES):
        (directory / str(number)).write_bytes(numbers.randbytes(FILE_SIZE))
    (directory / "large").write_bytes(numbers.randbytes(3 << 20))
    return directory.parent


def init(store: Path) -> None:
    done = run("cfsctl", "init", "--insecure", store, cwd=store.parent)
    assert done.returncode == 0, done.stderr


def create_image(store: Path, tree: Path) -> Done:
    return run("cfsctl", "--repo", store, "create-image", tree, "name", cwd=tree)


def check_sound(store: Path) -> None:
    done = run("cfsctl", "--repo", store, "fsck", cwd=store)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(store.rglob(".tmp*"))


def check_one_line(done: Done, text: str) -> None:
    assert done.returncode == 1
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert text in line


def free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bfree * found.f_frsize


def fill(path: Path, room: int) -> None:
    """Leave about so many bytes."""
    with path.open("wb") as file, suppress(OSError):
        for off in itertools.count(step=4096):
            os.posix_fallocate(file.fileno(), off, 4096)
    os.truncate(path, path.stat().st_size - room)


@pytest.mark.parametrize("room", [0, 1 << 20, 6 << 20, 8 << 20])
def test_full_disk(disk: Path, tree: Path, room: int) -> None:
    store = disk / "store"
    init(store)
    fill(disk / "filler", room)
    before = free_bytes(disk)
    check_one_line(create_image(store, tree), "No space left on device")
    assert free_bytes(disk) >= before - MARGIN
    check_sound(store)
    assert not list((store / "images").glob("*"))
    (disk / "filler").unlink()
    assert create_image(store, tree).returncode == 0
    check_sound(store)


def test_disk_without_inodes(disk_of_few_inodes: Path, tree: Path) -> None:
    store = disk_of_few_inodes / "store"
    init(store)
    check_one_line(create_image(store, tree), "No space left on device")
    check_sound(store)
    assert not list((store / "images").glob("*"))


def test_read_only_disk(disk: Path, tree: Path) -> None:
    store = disk / "store"
    init(store)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    check_one_line(create_image(store, tree), "read-only file system")
    check_sound(store)


def test_store_of_somebody_else(tmp_path: Path, tree: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv (util-linux) to give up the rights of root")
    store = tmp_path / "store"
    init(store)
    store.chmod(0o755)
    os.chown(store, NOBODY, NOBODY)
    check_one_line(create_image_without_rights(store, tree), "Repository is not writable")
    check_sound(store)
    # what is in it may be closed although it is ours
    os.chown(store, 0, 0)
    (store / "objects").mkdir(mode=0o755)
    os.chown(store / "objects", NOBODY, NOBODY)
    check_one_line(create_image_without_rights(store, tree), "Permission denied")
    assert not list((store / "objects").iterdir())
    check_sound(store)


def create_image_without_rights(store: Path, tree: Path) -> Done:
    """Import as a root whom modes bind."""
    without = "--bounding-set=-dac_override,-dac_read_search,-fowner"
    arguments = ["--repo", str(store), "create-image", str(tree), "name"]
    return subprocess.run(
        ["setpriv", without, *command("cfsctl"), *arguments],
        cwd=tree,
        env=environment(),
        capture_output=True,
        check=False,
        timeout=60,
    )
