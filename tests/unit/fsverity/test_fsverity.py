"""Digests against the vectors of spec erofs-image 8, a slow version, and the kernel."""

import hashlib
import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.digest import Algorithm, Digest
from cfs.errors import IntegrityError, UnsupportedError
from cfs.fsverity import (
    compute_digest,
    compute_file_digest,
    compute_file_digests,
    enable,
    measure,
    read_files,
)

EMPTY_SHA512 = (
    "ccf9e5aea1c2a64efa2f2354a6024b90dffde6bbc017825045dce374474e13d1"
    "0adb9dadcc6ca8e17a3c075fbd31336e8f266ae6fa93a6c3bed66f9e784e5abf"
)
VECTORS = [
    (b"", "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95"),
    (b"hello world", "1e2eaa4202d750a41174ee454970b92c1bc2f925b1e35076d8c7d5f56362ba64"),
    (b"hello world\n", "37061ef2ac4c21bec68489b56138c5780306a4ad7fe6676236ecdf2c9027cd92"),
    (b"foo bar baz\n", "91e7d88cb7bc9cf6d8db3b0ecf89af4abf204bef5b3ade5113d5b62ef374e70b"),
    (b"", EMPTY_SHA512),
]
SIZES = [1, 64, 4095, 4096, 4097, 65535, 65536, 65537, 128 * 4096, 128 * 4096 + 1, 3_000_001]


def slow_digest(data: bytes, algorithm: Algorithm) -> Digest:
    """What the specification says, word for word."""
    name = algorithm.name.lower()

    def blocks(level: bytes) -> list[bytes]:
        return [
            hashlib.new(name, level[off : off + 4096].ljust(4096, b"\0")).digest()
            for off in range(0, len(level), 4096)
        ]

    level = blocks(data)
    while len(level) > 1:
        level = blocks(b"".join(level))
    root_hash = level[0] if level else b""
    descriptor = struct.pack(
        "<BBBBIQ64s32s144s", 1, algorithm, 12, 0, 0, len(data), root_hash, b"", b""
    )
    return Digest(hashlib.new(name, descriptor).digest())


@pytest.fixture
def memory_file() -> Iterator[int]:
    fd = os.memfd_create("data")
    yield fd
    os.close(fd)


@pytest.mark.parametrize(("data", "text"), VECTORS)
def test_vectors_of_the_specification(data: bytes, text: str, memory_file: int) -> None:
    expected = Digest.parse(text)
    os.write(memory_file, data)
    assert compute_digest(data, expected.algorithm) == expected
    assert compute_file_digest(memory_file, len(data), expected.algorithm) == expected
    assert slow_digest(data, expected.algorithm) == expected


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_block_and_level_borders(
    size: int, algorithm: Algorithm, memory_file: int
) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    os.write(memory_file, data)
    expected = slow_digest(data, algorithm)
    assert compute_digest(data, algorithm) == expected
    assert compute_digest(memoryview(bytearray(data)), algorithm) == expected
    assert compute_file_digest(memory_file, size, algorithm) == expected


def test_buffer_of_wide_items_counts_bytes() -> None:
    data = memoryview(b"hello world\n").cast("I")
    assert compute_digest(data) == compute_digest(b"hello world\n")


@pytest.mark.parametrize("size", [0, 11, 13, 70_000])
def test_file_of_another_size_is_an_integrity_error(size: int, memory_file: int) -> None:
    os.write(memory_file, b"hello world\n")
    with pytest.raises(IntegrityError, match=f"expected {size} bytes, found 12"):
        compute_file_digest(memory_file, size)


def test_digests_of_several_files_come_until_the_wrong_one(memory_file: int) -> None:
    os.write(memory_file, b"hello world\n")
    digests = compute_file_digests([memory_file] * 4, [12, 12, 13, 12])
    assert [next(digests), next(digests)] == [compute_digest(b"hello world\n")] * 2
    with pytest.raises(IntegrityError, match="expected 13 bytes"):
        next(digests)
    assert list(compute_file_digests([], [])) == []


def test_files_are_read_and_digested_until_the_wrong_one(tmp_path: Path) -> None:
    contents = [b"", b"first", os.urandom(70_000), b"longer than its size", b"last"]
    sizes = [len(content) for content in contents]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    fds = [os.open(tmp_path / str(number), os.O_RDONLY) for number in range(len(contents))]
    for algorithm in Algorithm:
        assert [(bytes(data), digest) for data, digest in read_files(fds, sizes, algorithm)] == [
            (content, compute_digest(content, algorithm)) for content in contents
        ]
    for wrong in (-1, 1):
        found = read_files(fds, [*sizes[:3], sizes[3] + wrong, sizes[4]])
        assert [bytes(next(found)[0]) for _ in range(3)] == contents[:3]
        with pytest.raises(IntegrityError, match=f"expected {sizes[3] + wrong} bytes, found 20"):
            next(found)
    assert list(read_files([], [])) == []
    for fd in fds:
        os.close(fd)


def test_unreadable_descriptor_is_an_os_error(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            compute_file_digest(fd, 1)
    finally:
        os.close(fd)


def test_interpreter_runs_while_another_thread_digests() -> None:
    data = bytes(64 << 20)
    digests: list[Digest] = []
    thread = threading.Thread(target=lambda: digests.append(compute_digest(data)))
    thread.start()
    steps = 0
    while thread.is_alive():
        steps += 1
    thread.join()
    # with the lock held there would be a handful, one for each switch
    assert steps > 1000
    assert digests


def test_measure_without_verity_is_none(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    path.write_bytes(b"hello")
    fd = os.open(path, os.O_RDONLY)
    try:
        assert measure(fd) is None
    finally:
        os.close(fd)


@pytest.fixture
def verity_file(tmp_path: Path) -> Iterator[Path]:
    """A file on a file system where fs-verity works."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount an ext4 image with fs-verity")
    image, mountpoint = tmp_path / "image", tmp_path / "mnt"
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-O", "verity", "-b", "4096", image], check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs mkfs.ext4 with fs-verity")
    done = subprocess.run(
        ["mount", "-o", "loop", image, mountpoint], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount ext4 with fs-verity: {done.stderr.strip()}")
    path = mountpoint / "file"
    path.write_bytes(b"hello world\n" * 1000)
    try:
        yield path
    finally:
        subprocess.run(["umount", mountpoint], check=True)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_kernel_measures_what_was_computed(verity_file: Path, algorithm: Algorithm) -> None:
    fd = os.open(verity_file, os.O_RDONLY)
    try:
        try:
            enable(fd, algorithm)
        except UnsupportedError as error:
            pytest.skip(str(error))
        enable(fd, algorithm)
        assert measure(fd) == compute_digest(verity_file.read_bytes(), algorithm)
    finally:
        os.close(fd)


def test_enable_where_there_is_no_verity_is_unsupported() -> None:
    fd = os.memfd_create("data")
    try:
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)
    try:
        with pytest.raises(UnsupportedError, match="fs-verity is not supported"):
            enable(reader)
    finally:
        os.close(reader)
