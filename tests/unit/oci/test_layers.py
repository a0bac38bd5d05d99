"""Importing layers: bounded memory, nothing left after errors, and what becomes of contents."""

import gzip
import hashlib
import io
import os
import random
import signal
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from cfs.compat import override
from cfs.errors import FormatError, IntegrityError, UnsupportedError
from cfs.fsverity import compute_digest
from cfs.objectdir import Method
from cfs.oci.filesystem import read_layer
from cfs.oci.layers import find_layer, import_blob, import_layer, layer_name
from cfs.oci.manifest import Compression
from cfs.oci.reference import digest_of
from cfs.oci.statistics import Statistics
from cfs.oci.tar import BLOCK_SIZE
from cfs.repository.repository import Repository
from cfs.repository.splitstream_format import ContentType
from cfs.repository.streams import open_stream
from tests.oci_cases import case_layers
from tests.oci_layouts import make_tar
from tests.unit.oci.test_tar import header, mend, read_all

NOISE = random.Random(6)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path for path in tmp_path.glob("store/objects/*") if len(path.name) != 2]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    for thread in left:  # a second interrupt may come while the first one ends the thread
        thread.join(10)
    assert not any(thread.is_alive() for thread in left)


def contents(repository: Repository, diff_id: str) -> bytes:
    with open_stream(repository, layer_name(diff_id)) as stream:
        assert stream.content_type == ContentType.LAYER
        return b"".join(stream.contents(repository.objects))


def test_sizes_of_contents(repository: Repository) -> None:
    sizes = [0, 1, 63, 64, 65, 511, 512, 513, 4096, MIB - 1, MIB, MIB + 1, 8 * MIB, 8 * MIB + 1, 65]
    files = [NOISE.randbytes(size) for size in sizes]
    tar = make_tar({f"file{number}": data for number, data in enumerate(files)})
    read: list[int] = []
    layer = import_layer(
        repository,
        io.BytesIO(gzip.compress(tar, 1)),
        compression=Compression.GZIP,
        diff_id=digest_of(tar),
        progress=read.append,
    )
    assert contents(repository, digest_of(tar)) == tar
    assert sum(read) == len(gzip.compress(tar, 1))
    external = [data for data in files if len(data) > 64]
    inline = len(tar) - sum(map(len, external))
    counts = {Method.COPIED: len(external)}
    assert (layer.statistics.counts, layer.statistics.inlined_size) == (counts, inline)
    found = [content for _, content in read_layer(repository, layer.stream)]
    assert found == [compute_digest(data) if len(data) > 64 else data for data in files]
    again = import_layer(repository, io.BytesIO(tar), compression=Compression.NONE, diff_id=None)
    assert again.stream == layer.stream
    assert again.statistics.counts == {Method.PRESENT: len(external)}


def test_contents_that_occur_twice(repository: Repository) -> None:
    tar = make_tar(dict.fromkeys(map(str, range(200)), b"x" * 100))
    layer = import_layer(
        repository, io.BytesIO(tar), compression=Compression.NONE, diff_id=digest_of(tar)
    )
    assert layer.statistics.counts == {Method.COPIED: 1, Method.PRESENT: 199}
    assert contents(repository, digest_of(tar)) == tar


def test_layers_at_the_same_time(repository: Repository) -> None:
    shared = {str(number): NOISE.randbytes(100_000) for number in range(50)}
    tars = [make_tar({**shared, "own": NOISE.randbytes(100 + number)}) for number in range(4)]

    def store(tar: bytes) -> None:
        blob = io.BytesIO(tar)
        import_layer(repository, blob, compression=Compression.NONE, diff_id=digest_of(tar))

    with ThreadPoolExecutor() as pool:
        list(pool.map(store, tars))
    assert [contents(repository, digest_of(tar)) for tar in tars] == tars


@pytest.mark.parametrize("data", [b"x" * BLOCK_SIZE, header(flag=b"S", magic=b"ustar  \0")])
def test_errors_say_which_layer(repository: Repository, data: bytes) -> None:
    for diff_id, start in ((digest_of(data), f"layer {digest_of(data)}: tar: "), (None, "tar: ")):
        blob = io.BytesIO(data)
        with pytest.raises((FormatError, UnsupportedError), match=f"^{start}"):
            import_layer(repository, blob, compression=Compression.NONE, diff_id=diff_id)


def test_layer_without_diff_id_is_not_registered(repository: Repository) -> None:
    tar = make_tar({"file": b"x"})
    layer = import_layer(repository, io.BytesIO(tar), compression=Compression.NONE, diff_id=None)
    assert repository.objects.has(layer.stream)
    assert find_layer(repository, digest_of(tar)) is None


@pytest.mark.parametrize("algorithm", ["sha384", "sha512"])
def test_other_digests(repository: Repository, algorithm: str) -> None:
    tar = make_tar({"file": b"x"})
    diff_id = f"{algorithm}:{hashlib.new(algorithm, tar).hexdigest()}"
    import_layer(repository, io.BytesIO(tar), compression=Compression.NONE, diff_id=diff_id)
    assert contents(repository, diff_id) == tar
    wrong = f"{algorithm}:{hashlib.new(algorithm, b'').hexdigest()}"
    with pytest.raises(IntegrityError, match="layer integrity failed"):
        import_layer(repository, io.BytesIO(tar), compression=Compression.NONE, diff_id=wrong)
    assert find_layer(repository, wrong) is None


def test_digest_that_cannot_be_checked(repository: Repository) -> None:
    with pytest.raises(UnsupportedError, match="md5:00: digests of this algorithm"):
        import_layer(repository, io.BytesIO(), compression=Compression.NONE, diff_id="md5:00")
    with pytest.raises(UnsupportedError, match="md5:00: digests of this algorithm"):
        import_blob(repository, io.BytesIO(), "md5:00")


class Failing(io.BytesIO):
    """A blob whose source breaks down after a while."""

    @override
    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() >= 3 * MIB:
            msg = "the source broke down"
            raise IntegrityError(msg)
        return super().read(min(size or 0, MIB // 2))


@pytest.mark.parametrize("size", [100_000, 20 * MIB])
@pytest.mark.parametrize("compression", [Compression.NONE, Compression.GZIP])
def test_source_that_fails(repository: Repository, compression: Compression, size: int) -> None:
    tar = make_tar({str(number): NOISE.randbytes(size) for number in range(20 * MIB // size + 1)})
    blob = gzip.compress(tar, 1) if compression is Compression.GZIP else tar
    with pytest.raises(IntegrityError, match="broke down"):
        import_layer(repository, Failing(blob), compression=compression, diff_id=digest_of(tar))
    assert find_layer(repository, digest_of(tar)) is None


def test_progress_that_fails_ends_the_import(repository: Repository) -> None:
    def stop(_: int) -> None:
        raise InterruptedError

    tar = make_tar({"file": b"x" * 100})
    with pytest.raises(InterruptedError):
        import_layer(
            repository,
            io.BytesIO(tar),
            compression=Compression.NONE,
            diff_id=digest_of(tar),
            progress=stop,
        )
    with pytest.raises(InterruptedError):
        import_blob(repository, io.BytesIO(tar), digest_of(tar), stop)
    assert find_layer(repository, digest_of(tar)) is None


def test_store_that_fails(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository.objects, "put_contents", fail)
    tar = make_tar({str(number): NOISE.randbytes(MIB) for number in range(40)})
    with pytest.raises(OSError, match="No space left"):
        import_layer(
            repository, io.BytesIO(tar), compression=Compression.NONE, diff_id=digest_of(tar)
        )
    assert find_layer(repository, digest_of(tar)) is None


def test_blob(repository: Repository) -> None:
    data = NOISE.randbytes(3 * MIB)
    layer = import_blob(repository, io.BytesIO(data), digest_of(data))
    assert layer.statistics.counts == {Method.COPIED: 1}
    assert find_layer(repository, digest_of(data)) == layer.stream
    with open_stream(repository, layer_name(digest_of(data))) as stream:
        assert stream.content_type == ContentType.BLOB
        assert list(stream.chunks()) == [compute_digest(data)]
    with pytest.raises(IntegrityError, match="layer integrity failed"):
        import_blob(repository, io.BytesIO(data), digest_of(b"x"))
    assert find_layer(repository, digest_of(b"x")) is None


def test_empty_blob_and_small_ones_are_one_object(repository: Repository) -> None:
    for data in b"", b"x":
        import_blob(repository, io.BytesIO(data), digest_of(data))
        with open_stream(repository, layer_name(digest_of(data))) as stream:
            assert list(stream.chunks()) == [compute_digest(data)]


class Zeros(io.RawIOBase):
    """A tar that begins somehow and goes on with zeros, or repeats itself."""

    def __init__(self, start: bytes, size: int, part: bytes = bytes(MIB)) -> None:
        self._start, self._size, self._part = start, size, part

    @override
    def read(self, size: int = -1, /) -> bytes:
        data, self._start = self._start or self._part[: min(size, self._size)], b""
        self._size -= len(data)
        return data


BIG = 48 * MIB
SIZE = b"%011o\0" % BIG
GLOBAL = header(flag=b"g", size=b"%011o\0" % (MIB - BLOCK_SIZE)) + bytes(MIB - BLOCK_SIZE)


SMALL = header(size=b"%011o\0" % 3500) + bytes(7 * BLOCK_SIZE)
# much that is inline between small objects
COMMENTED = (
    header(flag=b"x", size=b"%011o\0" % (MIB - 3 * BLOCK_SIZE))
    + bytes(MIB - 3 * BLOCK_SIZE)
    + header(size=b"00000000101\0")
    + bytes(BLOCK_SIZE)
)


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (header(size=SIZE), bytes(MIB)),  # a file
        (header(size=SIZE, flag=b"2"), bytes(MIB)),  # contents that mean nothing
        (header(size=SIZE, flag=b"Q"), bytes(MIB)),
        (header() + bytes(2 * BLOCK_SIZE), bytes(MIB)),  # what is behind the end
        (header(), GLOBAL),
        (header(), header(flag=b"5") * (MIB // BLOCK_SIZE)),
        (header(), SMALL * (MIB // len(SMALL))),
        (header(), COMMENTED),
    ],
    ids=["file", "symlink", "unknown", "end", "global", "directories", "small", "comments"],
)
def test_memory_is_bounded(repository: Repository, start: bytes, part: bytes) -> None:
    blob = cast("BinaryIO", Zeros(start, BIG + len(start), part))
    tracemalloc.start()
    try:
        import_layer(repository, blob, compression=Compression.NONE, diff_id=None)
        assert tracemalloc.get_traced_memory()[1] < BIG // 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("start", "error"),
    [(header()[:100], KeyboardInterrupt), (b"x" * BLOCK_SIZE, FormatError)],
    ids=["interrupt", "no tar"],
)
def test_pipe_that_stays_open(
    repository: Repository, start: bytes, error: type[BaseException]
) -> None:
    """Neither an interrupt nor an error waits for who should go on writing."""
    read_fd, write_fd = os.pipe()

    def interrupt(_: int) -> None:
        if error is KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)

    with open(read_fd, "rb") as blob, open(write_fd, "wb", buffering=0) as writer:
        writer.write(start)
        with pytest.raises(error):
            import_layer(
                repository, blob, compression=Compression.NONE, diff_id=None, progress=interrupt
            )


def test_damaged_layers_are_judged_alike(repository: Repository) -> None:
    """What is imported can be exported, and read as what it was; both refuse the same."""
    draw = random.Random(int(os.environ.get("CFS_FUZZ_SEED", "6")))
    layers = [layer for layer in case_layers().values() if 0 < len(layer) < 1 << 15]
    for _ in range(int(os.environ.get("CFS_FUZZ_LAYERS", "300"))):
        layer = bytearray(draw.choice(layers))
        off = draw.randrange(len(layer))
        layer[off] = draw.choice((0, 0x20, 0x37, 0x80, 0xFF, draw.randrange(256)))
        if draw.random() < 0.8:
            mend(layer, off // BLOCK_SIZE * BLOCK_SIZE)
        check_layer(repository, bytes(layer))


def check_layer(repository: Repository, layer: bytes) -> None:
    diff_id = digest_of(layer)
    blob = io.BytesIO(layer)
    try:
        entries = read_all(layer)
    except (FormatError, UnsupportedError) as error:
        with pytest.raises(type(error)):
            import_layer(repository, blob, compression=Compression.NONE, diff_id=diff_id)
        assert find_layer(repository, diff_id) is None
        return
    import_layer(repository, blob, compression=Compression.NONE, diff_id=diff_id)
    assert contents(repository, diff_id) == layer
    found = []
    stream = find_layer(repository, diff_id)
    assert stream is not None
    try:
        for entry, content in read_layer(repository, stream):
            found.append(entry)
            assert content in (
                entries[len(found) - 1][1],
                compute_digest(entries[len(found) - 1][1]),
                b"",
            )
    except FormatError:
        assert len(found) < len(entries)
    else:
        assert len(found) == len(entries)
    assert found == [entry for entry, _ in entries[: len(found)]]


@pytest.mark.parametrize(
    ("copied", "present", "linked", "text"),
    [
        ([], 0, [], "0 new + 0 already present objects; 0 B stored, 1023 B inlined"),
        ([1024, 512], 3, [], "2 new + 3 already present objects; 1.50 KiB stored, 1023 B inlined"),
        (
            [5 << 20],
            1,
            [Method.REFLINKED],
            (
                "1 reflinked + 1 copied + 1 already present objects; "
                "1.00 GiB reflinked, 5.00 MiB copied, 1023 B inlined"
            ),
        ),
        (
            [],
            0,
            [Method.HARDLINKED, Method.REFLINKED],
            (
                "1 reflinked + 1 hardlinked + 0 copied + 0 already present objects; "
                "1.00 GiB reflinked, 1.00 GiB hardlinked, 0 B copied, 1023 B inlined"
            ),
        ),
    ],
)
def test_statistics(copied: list[int], present: int, linked: list[Method], text: str) -> None:
    statistics, other = Statistics(inlined_size=1000), Statistics(inlined_size=23)
    for size in copied:
        statistics.count(Method.COPIED, size)
    for method in linked:
        other.count(method, 1 << 30)
    for _ in range(present):
        other.count(Method.PRESENT, 7)
    statistics.merge(other)
    assert statistics.format() == text
