"""The kernel's own mount of the same image as oracle (see ``oracle_walk`` for what differs)."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from cfs.digest import Algorithm
from cfs.erofs import open_image
from cfs.erofs.writer import write_image
from cfs.fuse import serve
from tests.integration.oracle_walk import walk
from tests.integration.trees import RandomTree
from tests.paths import DATA

pytestmark = pytest.mark.usefixtures("fuse", "private_mounts")
NR_TREES = int(os.environ.get("CFS_ORACLE_TREES", "30"))
WALK = Path(__file__).with_name("oracle_walk.py")
CASES = [(version, algorithm) for version in (0, 1, 2) for algorithm in Algorithm]
NR_ROUNDS = -(-NR_TREES // len(CASES))


def compare(image: Path, objects: Path, tmp_path: Path) -> list[str]:
    """Serve an image over FUSE and return where that differs from the kernel's mount."""
    mnt = tmp_path / "fuse"
    mnt.mkdir(exist_ok=True)
    with serve(open_image(image), mnt, [objects], name=image.name):
        done = subprocess.run(
            ["unshare", "-m", "--propagation", "private", sys.executable, "-S", str(WALK),
             str(image), str(objects), str(mnt), str(tmp_path / "scratch")],
            capture_output=True, check=False, text=True, errors="surrogateescape",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, *differences = done.stdout.splitlines()
    assert int(count.split()[0]) > 1
    return differences


@pytest.mark.usefixtures("overlay")
@pytest.mark.parametrize("number", range(NR_ROUNDS))
@pytest.mark.parametrize(("version", "algorithm"), CASES)
def test_random_tree_looks_as_in_the_kernel(
    version: int, algorithm: Algorithm, number: int, tmp_path: Path
) -> None:
    objects = tmp_path / "objects"
    objects.mkdir()
    seed = 1000 * number + 10 * version + algorithm
    root = RandomTree(seed, version, algorithm, objects).make()
    image = tmp_path / "image"
    image.write_bytes(write_image(root, min_version=version, max_version=version))
    assert compare(image, objects, tmp_path) == []


@pytest.fixture
def kinds(tmp_path: Path) -> Path:
    """An image made by the C tool, with its objects in ``kobj`` next to it."""

    def golden(name: str) -> bytes:
        packed = (DATA / "images" / name).read_bytes()
        return zstandard.ZstdDecompressor().stream_reader(packed).read()

    objects = golden("kinds.objects.tar.zst")
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=objects, check=True)
    image = tmp_path / "image"
    image.write_bytes(golden("kinds.cfs.zst"))
    return image


@pytest.mark.usefixtures("overlay")
def test_image_made_by_the_c_tool_looks_as_in_the_kernel(kinds: Path, tmp_path: Path) -> None:
    assert compare(kinds, tmp_path / "kobj", tmp_path) == []


def cut(image: Path) -> None:
    os.truncate(image, 0)


def overwrite(image: Path) -> None:
    size = image.stat().st_size
    with image.open("r+b") as file:
        file.write(b"\xaa" * size)


@pytest.mark.parametrize("spoil", [cut, overwrite])
def test_image_file_spoilt_under_a_live_mount_changes_nothing(
    spoil: Callable[[Path], None], kinds: Path, tmp_path: Path
) -> None:
    spoilt, mnt, reference = (tmp_path / name for name in ("spoilt", "mnt", "reference"))
    shutil.copy(kinds, spoilt)
    mnt.mkdir()
    reference.mkdir()
    objects = [tmp_path / "kobj"]
    with (
        serve(open_image(kinds), reference, objects, name="kinds"),
        serve(open_image(spoilt), mnt, objects, name="spoilt"),
    ):
        spoil(spoilt)  # nothing has been looked at yet, so nothing is in the kernel's caches
        assert dict(walk(os.fsencode(mnt))) == dict(walk(os.fsencode(reference)))
