"""Objects that are not what the image says are never served, by whichever plane."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import cfs
from cfs.fsverity import measure
from cfs.fuse import Mount, Verify
from cfs.objectdir import ObjectDirectory

Serve = Callable[..., Mount]
pytestmark = pytest.mark.usefixtures("fuse")
GOOD, BAD = os.urandom(70_000), os.urandom(70_000)


@pytest.fixture
def vector(tmp_path: Path, objects: Path) -> cfs.InodeVector:
    """Two files; the object of ``bad`` has the right size and one wrong byte."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "good").write_bytes(GOOD)
    (source / "bad").write_bytes(BAD)
    with ObjectDirectory.open(objects) as store:
        tree = cfs.scan(source, options=cfs.ScanOptions(objects=store))
    image = tmp_path / "image"
    image.write_bytes(cfs.write_image(tree))
    vector = cfs.open_image(image)
    path = vector.object_path(vector.resolve("bad"))
    assert path is not None
    (objects / os.fsdecode(path)).unlink()
    (objects / os.fsdecode(path)).write_bytes(BAD[:-1] + bytes([BAD[-1] ^ 1]))
    return vector


def test_wrong_object_is_an_error_and_logged_once(
    served: Serve, mnt: Path, vector: cfs.InodeVector, capfd: pytest.CaptureFixture[str]
) -> None:
    mount = served(vector, verify=Verify.OPEN)
    assert (mnt / "good").read_bytes() == GOOD
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            (mnt / "bad").read_bytes()
    mount.unmount()
    (line,) = capfd.readouterr().err.splitlines()
    assert "does not have the digest" in line


def test_without_verification_size_is_all_that_counts(
    served: Serve, mnt: Path, vector: cfs.InodeVector
) -> None:
    served(vector)
    assert (mnt / "bad").read_bytes() != BAD
    assert (mnt / "good").read_bytes() == GOOD


def test_require_takes_the_measure_of_the_kernel_only(
    served: Serve, mnt: Path, objects: Path, vector: cfs.InodeVector,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = vector.object_path(vector.resolve("good"))
    assert path is not None
    with (objects / os.fsdecode(path)).open("rb") as file:
        if measure(file.fileno()) is not None:
            pytest.skip("this file system has fs-verity")
    mount = served(vector, verify=Verify.REQUIRE)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        (mnt / "good").read_bytes()
    mount.unmount()
    assert "has no fs-verity" in capfd.readouterr().err
