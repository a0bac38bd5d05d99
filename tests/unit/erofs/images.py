"""Images for the tests of the reader."""

from functools import cache

import zstandard

from tests.paths import DATA


@cache
def load_zst(name: str) -> bytes:
    """The content of a compressed file in tests/data/images."""
    packed = (DATA / "images" / name).read_bytes()
    return zstandard.ZstdDecompressor().decompressobj().decompress(packed)
