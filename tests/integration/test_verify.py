"""Objects that are not what the image says are never served, by whichever plane."""

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import cfs
from cfs.fsverity import measure
from cfs.fuse import Mount, Passthrough, ServeOptions, Verify, serve
from cfs.objectdir import ObjectDirectory

Serve = Callable[..., Mount]
pytestmark = pytest.mark.usefixtures("fuse")
DEADLINE = 60
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
    mount.unmount(DEADLINE)  # what it logs may come late
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
    mount.unmount(DEADLINE)  # what it logs may come late
    assert "has no fs-verity" in capfd.readouterr().err


def read_mapped(path: Path) -> bytes:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        return data[:]


def read_direct(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        data = mmap.mmap(-1, 1 << 20)
        return data[: os.readv(fd, [data])]
    finally:
        os.close(fd)


@pytest.mark.usefixtures("root")
def test_passthrough_serves_no_wrong_object(
    mnt: Path, objects: Path, vector: cfs.InodeVector
) -> None:
    options = ServeOptions(verify=Verify.OPEN, passthrough=Passthrough.ON)
    with serve(vector, mnt, [objects], name="x", options=options):
        for read in (Path.read_bytes, read_mapped, read_direct):
            assert read(mnt / "good") == GOOD
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                read(mnt / "bad")


def test_direct_read_of_a_wrong_object_is_an_error(
    served: Serve, mnt: Path, vector: cfs.InodeVector
) -> None:
    served(vector, verify=Verify.OPEN)
    assert read_direct(mnt / "good") == GOOD
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        read_direct(mnt / "bad")


def test_object_altered_after_its_check_is_checked_again(
    served: Serve, mnt: Path, objects: Path, vector: cfs.InodeVector
) -> None:
    served(vector, verify=Verify.OPEN)
    assert read_direct(mnt / "good") == GOOD
    path = vector.object_path(vector.resolve("good"))
    assert path is not None
    with (objects / os.fsdecode(path)).open("r+b") as file:
        file.write(b"altered")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        read_direct(mnt / "good")
