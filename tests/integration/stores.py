"""Stores with an image, and the command line on them, for tests of mounts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cfs
from cfs.cli.runtime import all_records_directories
from cfs.digest import Algorithm
from cfs.mounting.records import ServedMount, find_mounts
from cfs.objectdir import ObjectDirectory
from cfs.repository.images import commit_image
from cfs.repository.repository import Repository, init
from tests.paths import CHECKOUT

CFSCTL = [sys.executable, "-m", "cfs.cli.main"]
BIG = os.urandom(70_000)
SECONDS = 60


def make_image(directory: Path, objects: Path, files: dict[str, bytes]) -> Path:
    """Make an image file below a directory, its objects in another one."""
    source = directory / "source"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    with ObjectDirectory.open(objects) as store:
        tree = cfs.scan(source, options=cfs.ScanOptions(objects=store))
    path = directory / "image.cfs"
    path.write_bytes(cfs.write_image(tree))
    return path


class Store:
    """A store below a directory with the image ``demo`` of two files, ``big`` and ``small``."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "store"
        source = directory / "source"
        source.mkdir()
        (source / "big").write_bytes(BIG)
        (source / "small").write_text("text")
        init(str(self.path), algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
        with Repository.open(str(self.path)) as repository:
            options = cfs.ScanOptions(objects=repository.objects, algorithm=Algorithm.SHA256)
            self.digest = commit_image(repository, cfs.scan(source, options=options), "demo")

    @property
    def mounted(self) -> list[str]:
        """The links of live mounts."""
        return sorted(os.listdir(self.path / "images/refs/mounted"))

    def objects(self) -> set[Path]:
        return {path for path in (self.path / "objects").rglob("*") if path.is_file()}

    def forget(self) -> None:
        """Remove the image's name, so that nothing but mounts keeps it."""
        (self.path / "images/refs/demo").unlink()

    def run(self, *words: str | Path, status: int = 0) -> "subprocess.CompletedProcess[str]":
        """Run a command on the store."""
        return run("--repo", self.path, *words, status=status)


def run(*words: str | Path, status: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run ``cfsctl``; an error is one line."""
    done = subprocess.run(
        [*CFSCTL, *map(str, words)],
        cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def find_served(mountpoint: Path) -> ServedMount:
    """Return the record of what is served on a mount point."""
    mounts = find_mounts(all_records_directories())
    place = os.fsencode(mountpoint)
    (found,) = [mount for mount in mounts if mount.entry.mountpoint == place]
    return found


def list_served(mountpoint: Path) -> list[dict[str, Any]]:
    """Return what ``ps --json`` says of a mount point."""
    mounts = json.loads(run("ps", "--json").stdout)["mounts"]
    return [mount for mount in mounts if mount["mountpoint"] == str(mountpoint)]


def unmount(mountpoint: Path) -> None:
    """Unmount by other means than ours."""
    tool = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    subprocess.run([*tool, str(mountpoint)], check=True)
