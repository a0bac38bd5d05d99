"""Decompression: members, frames, what is behind them, damage, and bombs."""

import gzip
import io
import random
import struct
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs.compat import override
from cfs.errors import FormatError
from cfs.oci.compression import decompress
from cfs.oci.manifest import Compression

GZIP, ZSTD, NONE = Compression.GZIP, Compression.ZSTD, Compression.NONE
TEXT = b"".join(b"line %d of a text\n" % number for number in range(20_000))
NOISE = random.Random(6).randbytes(300_000)  # incompressible: raw blocks
SKIPPABLE = struct.pack("<II", 0x184D2A55, 5) + b"12345"
MAX_PIECE = 2 << 20


class Slow(io.BytesIO):
    """A blob that comes in small pieces, as from a network."""

    @override
    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size or 0, 7))


def unpack(blob: bytes, compression: Compression, reader: type[io.BytesIO] = io.BytesIO) -> bytes:
    source = reader(blob)
    pieces = list(decompress(source, compression))
    assert source.tell() == len(blob)
    assert all(0 < len(piece) <= MAX_PIECE for piece in pieces)
    return b"".join(pieces)


def zstd(data: bytes, *, has_checksum: bool = False, has_size: bool = True) -> bytes:
    packer = zstandard.ZstdCompressor(write_checksum=has_checksum, write_content_size=has_size)
    return packer.compress(data)


def with_gzip_name(data: bytes) -> bytes:
    target = io.BytesIO()
    with gzip.GzipFile("layer.tar", "wb", fileobj=target) as stream:
        stream.write(data)
    return target.getvalue()


def streamed_zstd(data: bytes, parameters: zstandard.ZstdCompressionParameters) -> bytes:
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return writer.compress(data) + writer.flush()


PACKERS: dict[str, tuple[Compression, Callable[[bytes], bytes]]] = {
    "plain": (NONE, bytes),
    "gzip": (GZIP, gzip.compress),
    "gzip with a name": (GZIP, with_gzip_name),
    "stored": (GZIP, lambda data: gzip.compress(data, 0)),
    "zstd": (ZSTD, zstd),
    "zstd with a checksum": (ZSTD, lambda data: zstd(data, has_checksum=True)),
    "zstd without its size": (ZSTD, lambda data: zstd(data, has_size=False)),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("data", [b"x", TEXT, NOISE, TEXT + NOISE], ids=len)
def test_round_trip(packer: str, data: bytes) -> None:
    compression, pack = PACKERS[packer]
    assert unpack(pack(data), compression) == data
    assert unpack(pack(data[:5000]), compression, Slow) == data[:5000]


@settings(deadline=None)  # others use the machine
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.sampled_from(list(PACKERS)))
def test_parts_one_after_the_other(parts: list[bytes], packer: str) -> None:
    compression, pack = PACKERS[packer]
    blob = b"".join(map(pack, parts))
    assert unpack(blob, compression, Slow) == b"".join(parts)


def test_shape_of_estargz() -> None:
    parts = [TEXT[off : off + 700] for off in range(0, len(TEXT), 700)]
    assert unpack(b"".join(map(gzip.compress, parts)), GZIP) == TEXT


def test_shape_of_zstd_chunked() -> None:
    parts = [TEXT[off : off + 700] for off in range(0, len(TEXT), 700)]
    footer = SKIPPABLE + SKIPPABLE
    assert unpack(b"".join(map(zstd, parts)) + footer, ZSTD) == TEXT


@pytest.mark.parametrize(
    "blob",
    [
        SKIPPABLE + zstd(TEXT),
        zstd(TEXT) + SKIPPABLE,
        zstd(TEXT[:999]) + SKIPPABLE + SKIPPABLE + zstd(TEXT[999:]),
        zstd(b"") + zstd(TEXT),
        struct.pack("<II", 0x184D2A50, 1 << 20) + bytes(1 << 20) + zstd(TEXT),
    ],
)
def test_skippable_and_empty_frames(blob: bytes) -> None:
    assert unpack(blob, ZSTD) == TEXT


@pytest.mark.parametrize("rest", [bytes(1), bytes(512), b"garbage", b"\x1f", b"\x28\xb5", b"\x50"])
@pytest.mark.parametrize(("compression", "pack"), [(GZIP, gzip.compress), (ZSTD, zstd)])
def test_anything_else_behind_the_end_is_ignored(
    compression: Compression, pack: Callable[[bytes], bytes], rest: bytes
) -> None:
    assert unpack(pack(TEXT) + rest, compression) == TEXT


@pytest.mark.parametrize(("compression", "pack"), [(GZIP, gzip.compress), (ZSTD, zstd)])
def test_every_truncation_is_an_error(
    compression: Compression, pack: Callable[[bytes], bytes]
) -> None:
    blob = pack(TEXT[:300] + NOISE[:100])
    for size in range(len(blob)):
        with pytest.raises(FormatError):
            unpack(blob[:size], compression)
        if size > 3:  # of the second part, once its magic is there
            with pytest.raises(FormatError):
                unpack(blob + blob[:size], compression)


@pytest.mark.parametrize(
    ("compression", "blob"),
    [
        (GZIP, TEXT),
        (GZIP, zstd(TEXT)),
        (ZSTD, gzip.compress(TEXT)),
        (ZSTD, TEXT),
        (ZSTD, bytes(100)),
        (GZIP, bytes(100)),
    ],
)
def test_other_compression_than_promised(compression: Compression, blob: bytes) -> None:
    with pytest.raises(FormatError):
        unpack(blob, compression)


@pytest.mark.parametrize("off", [-8, -5, -4, -1])
def test_checksum_and_length_of_gzip(off: int) -> None:
    blob = bytearray(gzip.compress(TEXT))
    blob[off] ^= 1
    with pytest.raises(FormatError, match="gzip"):
        unpack(bytes(blob), GZIP)


def test_checksum_of_zstd() -> None:
    blob = bytearray(zstd(TEXT, has_checksum=True))
    blob[-1] ^= 1
    with pytest.raises(FormatError, match="zstd"):
        unpack(bytes(blob), ZSTD)


def test_window_of_zstd() -> None:
    for window_log, is_good in ((27, True), (28, False)):
        parameters = zstandard.ZstdCompressionParameters(
            compression_level=1, window_log=window_log, enable_ldm=False
        )
        blob = streamed_zstd(TEXT, parameters)
        if is_good:
            assert unpack(blob, ZSTD) == TEXT
        else:
            with pytest.raises(FormatError, match="memory"):
                unpack(blob, ZSTD)


@settings(deadline=None)  # others use the machine
@given(st.sampled_from([b"", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd"]), st.binary(max_size=200))
def test_any_bytes(magic: bytes, data: bytes) -> None:
    try:
        unpack(magic + data, ZSTD if magic.startswith(b"(") else GZIP, Slow)
    except FormatError:
        return


@settings(deadline=None)  # others use the machine
@given(st.integers(0, 400), st.integers(0, 255), st.sampled_from([GZIP, ZSTD]))
def test_damaged_blobs(off: int, byte: int, compression: Compression) -> None:
    pack = gzip.compress if compression is GZIP else zstd
    blob = bytearray(pack(TEXT[:2000]) + pack(NOISE[:100]))
    blob[off % len(blob)] = byte
    try:
        unpack(bytes(blob), compression)
    except FormatError:
        return


def zstd_bomb(size: int) -> bytes:
    """Return a frame of blocks that stand for 128 KiB each and have four bytes."""
    nr_blocks = size >> 17
    header = (1 << 17) << 3 | 1 << 1
    blocks = (header | (number == nr_blocks - 1) for number in range(nr_blocks))
    parts = [block.to_bytes(3, "little") + b"\0" for block in blocks]
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(parts)


def gzip_bomb(size: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.flush()])


@pytest.mark.parametrize(("compression", "bomb"), [(ZSTD, zstd_bomb), (GZIP, gzip_bomb)])
def test_bombs_come_in_pieces(compression: Compression, bomb: Callable[[int], bytes]) -> None:
    size = 256 << 20
    found = 0
    for piece in decompress(io.BytesIO(bomb(size)), compression):
        assert len(piece) <= MAX_PIECE
        found += len(piece)
    assert found == size
