import base64
import hashlib
import io
import itertools
import os
import struct
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfs.digest import Algorithm, Digest
from cfs.errors import CfsError, FormatError, InvalidRequestError, NotFoundError
from cfs.fsverity import compute_digest
from cfs.repository.repository import Repository
from cfs.repository.splitstream import SplitStream
from cfs.repository.splitstream_format import ContentType, is_splitstream
from cfs.repository.splitstream_writer import SplitStreamWriter
from cfs.repository.streams import (
    find_stream,
    has_stream,
    open_stream,
    register_stream,
    stream_of_target,
)
from tests.stores import ALGORITHMS, copy_store, load, unpack_store

Case = dict[str, Any]

CASES = [(name, case) for name in ALGORITHMS for case in load(name, "splitstreams.json")]
STREAMS = [(name, stream) for name in ALGORITHMS for stream in load(name, "streams.json").items()]
OPENS_IN_09 = "fsck: stream-open-failed"
HAS_SAME_ZSTD = zstandard.ZSTD_VERSION >= (1, 5, 4)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("golden")
    return {name: unpack_store(name, top / name) for name in ALGORITHMS}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_what_can_be_opened_looks_like_a_stream(name: str, case: Case, tmp_path: Path) -> None:
    data = base64.b64decode(case["data"])
    try:
        open_data(data, Algorithm.parse(name), tmp_path).close()
    except FormatError:
        return
    assert is_splitstream(data[:32])


def test_what_does_not_look_like_a_stream() -> None:
    assert not is_splitstream(b"")
    assert not is_splitstream(b" SplitStream" + bytes(20))


def open_data(data: bytes, algorithm: Algorithm, directory: Path) -> SplitStream:
    path = directory / "under-test"
    path.write_bytes(data)
    return SplitStream(os.open(path, os.O_RDONLY), algorithm)


@pytest.mark.parametrize(
    ("name", "case"), CASES, ids=[f"{name}-{case['name']}" for name, case in CASES]
)
def test_golden_streams(name: str, case: Case, golden: dict[str, Path], tmp_path: Path) -> None:
    data = base64.b64decode(case["data"])
    algorithm = Algorithm.parse(name)

    def read() -> bytes:
        with (
            Repository.open(str(golden[name])) as repository,
            open_data(data, algorithm, tmp_path) as stream,
        ):
            return b"".join(stream.contents(repository.objects))

    if case["rc"] == 0:
        content = read()
        assert len(content) == case["content"]["size"]
        assert hashlib.sha256(content).hexdigest() == case["content"]["sha256"]
    else:
        with pytest.raises(CfsError):
            read()
    is_bad = isinstance(case["fsck"], dict) or any(OPENS_IN_09 in line for line in case["fsck"])
    if is_bad:
        with pytest.raises(FormatError):
            open_data(data, algorithm, tmp_path)
    else:
        open_data(data, algorithm, tmp_path).close()


@pytest.mark.skipif(not HAS_SAME_ZSTD, reason="needs libzstd 1.5.4 for the same bytes")
@pytest.mark.parametrize(
    ("name", "stream"), STREAMS, ids=[f"{name}-{stream[0]}" for name, stream in STREAMS]
)
def test_streams_of_composefs_rs_are_read_and_written_again(
    name: str, stream: tuple[str, Case], golden: dict[str, Path], tmp_path: Path
) -> None:
    content_id, expected = stream
    store = copy_store(golden[name], tmp_path / "store")
    with (
        Repository.open(str(store)) as repository,
        open_stream(repository, content_id) as found,
        SplitStreamWriter(repository, found.content_type) as writer,
    ):
        assert found.content_type == expected["content_type"].encode()
        assert found.total_size == expected["total"]
        assert [str(ref) for ref in found.stream_refs] == expected["stream_references"]
        assert [str(ref) for ref in found.object_refs] == expected["object_references"]
        named = {key: str(ref) for key, ref in found.named_refs.items()}
        assert named == expected["named_references"]
        assert describe_chunks(found) == expected["chunks"]
        for chunk in found.chunks():
            if isinstance(chunk, bytes):
                writer.write_inline(chunk)
            else:
                fd = repository.objects.open_object(chunk)
                writer.write_object(chunk, os.fstat(fd).st_size)
                os.close(fd)
        for digest in found.stream_refs:
            writer.add_stream(digest)
        for key, digest in found.named_refs.items():
            writer.add_named(key, digest)
        assert str(writer.finish()) == expected["object"]


def describe_chunks(stream: SplitStream) -> list[Any]:
    chunks: list[Any] = []
    for kind, group in itertools.groupby(stream.chunks(), type):
        if kind is bytes:
            chunks.append({"inline": len(b"".join(cast("tuple[bytes, ...]", tuple(group))))})
        else:
            chunks += [stream.object_refs.index(ref) for ref in group]
    return chunks


PARTS = st.lists(st.binary(max_size=300) | st.integers(0, 3))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(parts=PARTS, names=st.dictionaries(st.text().filter(lambda text: "\0" not in text), PARTS))
def test_round_trip(repository: Repository, parts: list[bytes | int], names: Case) -> None:
    contents = [bytes([number]) * (number * 100 + 65) for number in range(4)]
    digests = [repository.objects.put_bytes(data) for data in contents]
    named = {name: compute_digest(repr(value).encode()) for name, value in names.items()}
    expected = b""
    with SplitStreamWriter(repository, ContentType.LAYER) as writer:
        for part in parts:
            data = contents[part] if isinstance(part, int) else part
            expected += data
            if isinstance(part, int):
                writer.write_object(digests[part], len(data))
            else:
                writer.write_inline(part)
        for name, digest in named.items():
            writer.add_named(name, digest)
        stored = writer.finish()
    with SplitStream(repository.objects.open_object(stored), Algorithm.SHA256) as stream:
        assert b"".join(stream.contents(repository.objects)) == expected
        assert stream.total_size == len(expected)
        assert stream.named_refs == named
        used = [digests[part] for part in parts if isinstance(part, int)]
        assert list(stream.object_refs) == list(dict.fromkeys(used))


def test_many_references(repository: Repository) -> None:
    digests = [compute_digest(b"%d" % number) for number in range(5000)]
    with SplitStreamWriter(repository, ContentType.LAYER) as writer:
        for digest in digests:
            writer.write_object(digest, 1)
            writer.add_stream(digest)
        stored = writer.finish()
    with SplitStream(repository.objects.open_object(stored), Algorithm.SHA256) as stream:
        assert list(stream.object_refs) == list(stream.stream_refs) == digests
        assert stream.object_refs[4999] == stream.object_refs[-1] == digests[-1]
        assert stream.object_refs[10:20:3] == digests[10:20:3]
        with pytest.raises(IndexError):
            stream.object_refs[5000]
        assert list(stream.chunks()) == digests


def test_adjacent_inline_data_is_one_chunk(repository: Repository) -> None:
    with SplitStreamWriter(repository, ContentType.LAYER) as writer:
        for _ in range(3):
            writer.write_inline(b"abc")
        writer.write_inline(b"")
        digest = writer.finish()
    fd = repository.objects.open_object(digest)
    with open(fd, "rb") as file:
        packed = file.read()
    start, end = struct.unpack_from("<QQ", packed, 32 + 32)
    content = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(packed[start:end])).read()
    assert content == struct.pack("<q", -9) + b"abcabcabc"


def test_memory_does_not_grow_with_the_stream(repository: Repository) -> None:
    size, piece_size = 48 << 20, 1 << 16
    tracemalloc.start()
    try:
        with SplitStreamWriter(repository, ContentType.BLOB) as writer:
            for _ in range(size // piece_size // 2):
                writer.write_inline(os.urandom(piece_size))
                writer.write_inline(bytes(piece_size))
            digest = writer.finish()
        repository.sync()
        with SplitStream(repository.objects.open_object(digest), Algorithm.SHA256) as stream:
            assert sum(len(data) for data in stream.contents(repository.objects)) == size
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def write_stream(inline: bytes, named: bytes = b"") -> bytes:
    """Return a stream as somebody hostile would write it."""
    compress = zstandard.ZstdCompressor().compress
    parts = [bytes(32), b"", compress(named), compress(inline)]
    ends = list(itertools.accumulate(map(len, parts), initial=112))
    header = struct.pack("<11sBHBBQQ", b"SplitStream", 0, 0, 1, 12, 32, 112)
    ranges = (*ends[0:2], *ends[1:3], *ends[3:5], *ends[2:4])
    return header + struct.pack("<8Q8sQ", *ranges, ContentType.LAYER, 0) + b"".join(parts)


@pytest.mark.parametrize("number", [-(1 << 63), 1 << 62, 0])
def test_numbers_of_chunks_are_not_believed(number: int, tmp_path: Path) -> None:
    data = write_stream(struct.pack("<q", number) + b"abc")
    with (
        open_data(data, Algorithm.SHA256, tmp_path) as stream,
        pytest.raises(FormatError, match=r"missing at the end|out of range"),
    ):
        list(stream.chunks())


def test_a_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    data = write_stream(b"", named=b"0:a\0" * (8 << 20))
    with pytest.raises(FormatError, match="named references: more than"):
        open_data(data, Algorithm.SHA256, tmp_path)


@pytest.mark.parametrize("offset", range(16, 112, 8))
@pytest.mark.parametrize("value", [0, 1, (1 << 63) - 1, (1 << 64) - 1])
def test_ranges_are_not_believed(offset: int, value: int, tmp_path: Path) -> None:
    data = bytearray(write_stream(struct.pack("<q", -3) + b"abc", named=b""))
    struct.pack_into("<Q", data, offset, value)
    try:
        with open_data(bytes(data), Algorithm.SHA256, tmp_path) as stream:
            list(stream.chunks())
    except FormatError:
        pass


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=400), start=st.sampled_from([b"", write_stream(b"")]))
def test_any_bytes_are_a_stream_or_a_format_error(
    tmp_path: Path, data: bytes, start: bytes
) -> None:
    try:
        with open_data(start + data, Algorithm.SHA256, tmp_path) as stream:
            list(stream.chunks())
    except FormatError:
        pass


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FormatError, match="regular file"):
        SplitStream(os.open(tmp_path, os.O_RDONLY), Algorithm.SHA256)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("name", ["a\0b", "\udcff"])
def test_names_that_cannot_be_written_are_refused(repository: Repository, name: str) -> None:
    with (
        SplitStreamWriter(repository, ContentType.CONFIG) as writer,
        pytest.raises(InvalidRequestError),
    ):
        writer.add_named(name, compute_digest(b""))


def test_a_closed_stream_reads_nobody_elses_file(repository: Repository) -> None:
    with SplitStreamWriter(repository, ContentType.LAYER) as writer:
        writer.write_object(compute_digest(b"content"), 7)
        digest = writer.finish()
    with SplitStream(repository.objects.open_object(digest), Algorithm.SHA256) as stream:
        chunks = stream.chunks()
    with open(os.devnull, "rb"):  # takes the number of the descriptor
        for read in (lambda: list(stream.object_refs), lambda: list(chunks)):
            with pytest.raises(OSError, match="Bad file descriptor"):
                read()
    stream.close()


def test_unfinished_streams_leave_nothing(repository: Repository) -> None:
    before = set(os.listdir(repository.path))
    with SplitStreamWriter(repository, ContentType.LAYER) as writer:
        writer.write_inline(bytes(2 << 20))  # beyond what stays in memory
        assert set(os.listdir(repository.path)) == before
    assert set(os.listdir(repository.path)) == before


def test_register_and_find(repository: Repository) -> None:
    with SplitStreamWriter(repository, ContentType.LAYER) as writer:
        writer.write_inline(b"content")
        digest = writer.finish()
    assert not has_stream(repository, "id")
    with pytest.raises(NotFoundError, match="stream not found: id"):
        find_stream(repository, "id")
    register_stream(repository, "id", digest, "deep/name")
    assert has_stream(repository, "id")
    for name in ("id", "refs/deep/name"):
        assert find_stream(repository, name) == digest
        with closing(open_stream(repository, name)) as stream:
            assert list(stream.chunks()) == [b"content"]
    # whatever has a name is there under its own name, too
    object_path = Path(repository.path, "objects", os.fsdecode(digest.object_path))
    assert compute_digest(object_path.read_bytes()) == digest


@pytest.mark.parametrize("content_id", ["", "refs", "a/b", "..", "refs/a"])
def test_content_identifiers_are_checked_before_anything_is_written(
    repository: Repository, content_id: str
) -> None:
    with pytest.raises(InvalidRequestError):
        register_stream(repository, content_id, Digest(bytes(32)))
    with pytest.raises(InvalidRequestError):
        register_stream(repository, "good", Digest(bytes(32)), "../bad")
    assert os.listdir(repository.path) == ["meta.json"]


def test_targets_of_stream_links() -> None:
    digest = Digest(bytes(32))
    path = b"objects/" + digest.object_path
    assert stream_of_target(b"../" + path) == digest
    for target in (path, b"./../" + path, b"/" + path, b"../objects"):
        with pytest.raises(FormatError):
            stream_of_target(target)
