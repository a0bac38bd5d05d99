"""The format splitdirfdstream: round trips, and whatever else may come."""

import io
import struct
from collections.abc import Iterable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs.errors import FormatError
from cfs.oci.splitdir import Chunk, Contents, File, Inline, format_chunk, read_chunks

NAMES = st.builds(
    b"/".join, st.lists(st.binary(min_size=1, max_size=20).filter(lambda part: (
        b"/" not in part and b"\0" not in part and part != b"..")), min_size=1, max_size=4)
)  # fmt: skip
FILES = st.builds(File, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), NAMES)
CHUNKS = st.lists(st.one_of(st.builds(Inline, st.binary(min_size=1, max_size=300)), FILES))


def read(data: bytes) -> list[Chunk]:
    return list(read_chunks(io.BytesIO(data)))


@settings(deadline=None)  # others use the machine
@given(CHUNKS)
def test_what_was_written_is_read(chunks: list[Inline | File]) -> None:
    assert read(b"".join(map(format_chunk, chunks))) == chunks


def test_format() -> None:
    assert format_chunk(Inline(b"abc")) == b"\0\3\0\0\0abc"
    assert format_chunk(File(5, 7, b"xx/y")) == (b"\2\5\0\0\0\0\0\0\0\7\0\0\0\4\0\0\0xx/y")


@pytest.mark.parametrize("kind", [b"\0", b"\1"])
def test_streams_of_nothing_have_an_end(kind: bytes) -> None:
    empty = kind + bytes(4)
    for data in (empty * (1 << 16), (empty * 60_000 + format_chunk(Inline(b"a"))) * 2):
        assert len(read(data)) > 0 or kind == b"\0"
    with pytest.raises(FormatError, match="empty chunks"):
        read(empty * ((1 << 16) + 1))


def test_long_inline_data_comes_in_pieces() -> None:
    data = bytes(range(256)) * 1000
    chunks = read(format_chunk(Inline(data)))
    assert len(chunks) > 1
    assert b"".join(chunk.data for chunk in chunks if isinstance(chunk, Inline)) == data


@pytest.mark.parametrize("size", [0, 1, 65, 200_000])
@pytest.mark.parametrize("takes", [True, False])
def test_contents_that_come_along(size: int, takes: bool) -> None:  # noqa: FBT001 - parametrised
    data = b"\1" + struct.pack("<I", size) + b"x" * size + format_chunk(Inline(b"behind"))
    chunks = read_chunks(io.BytesIO(data))
    first = next(chunks)
    assert isinstance(first, Contents)
    assert first.size == size
    if takes:
        assert b"".join(first.pieces) == b"x" * size
    assert list(chunks) == [Inline(b"behind")]


def name_of(size: int) -> bytes:
    return struct.pack("<BQII", 2, 1, 0, size)


BROKEN: dict[str, tuple[bytes, str]] = {
    "unknown type": (b"\3", "chunk type 3"),
    "head of inline data": (b"\0\1\0", "2 bytes are missing"),
    "inline data": (b"\0\3\0\0\0ab", "1 bytes are missing"),
    "inline data that is too long": (b"\0\1\0\0\x10", "chunk of 268435457 bytes"),
    "contents": (b"\1\3\0\0\0ab", "1 bytes are missing"),
    "contents that are too long": (b"\1\xff\xff\xff\xff", "chunk of 4294967295 bytes"),
    "head of a file": (b"\2\1\0", "14 bytes are missing"),
    "name": (name_of(4) + b"ab", "2 bytes are missing"),
    "name that is too long": (name_of(4097) + b"a" * 4097, "name of 4097 bytes"),
    "empty name": (name_of(0), "relative path"),
    "absolute name": (name_of(2) + b"/a", "relative path"),
    "name that leads out": (name_of(7) + b"a/../..", "relative path"),
    "name with a zero byte": (name_of(3) + b"a\0b", "relative path"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_streams(what: str) -> None:
    data, message = BROKEN[what]
    with pytest.raises(FormatError, match=message):
        consume(read_chunks(io.BytesIO(data)))


@settings(deadline=None)  # others use the machine
@given(st.binary(max_size=100))
def test_any_bytes_give_chunks_or_an_error(data: bytes) -> None:
    with suppress(FormatError):
        consume(read_chunks(io.BytesIO(data)))


def consume(chunks: Iterable[Chunk]) -> None:
    for chunk in chunks:
        if isinstance(chunk, Contents):
            assert sum(map(len, chunk.pieces)) == chunk.size
