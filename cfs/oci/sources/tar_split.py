"""Tar layers of containers/storage: *tar-split*, the headers without the contents (spec 5.8).

One JSON object a line, compressed: either raw bytes of the tar, or a member whose contents are in
a file.  The lines come from the file system, so nothing in them is trusted.
"""

import base64
import binascii
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from cfs.errors import FormatError
from cfs.oci.compression import decompress
from cfs.oci.manifest import Compression
from cfs.repository.strict_json import (
    load_json,
    parse_fields,
    parse_integer,
    parse_size,
    parse_string,
)

__all__ = ["Member", "compute_checksum", "read_tar_split"]

_WHERE = "tar-split"
_KEYS = ("type", "name", "name_raw", "size", "payload")
_MEMBER, _RAW = 1, 2
_MAX_LINE_SIZE = 16 << 20  # raw bytes come in pieces of 1 MiB at most, in base64
_CHECKSUM_SIZE = 8
# CRC-64 of ISO 3309, reflected, as in Go's hash/crc64
_POLYNOMIAL = 0xD800000000000000
_ALL_ONES = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the layer that has contents.

    Attributes:
        name: as in the tar.
        size: in bytes, more than none.
        checksum: see :func:`compute_checksum`.
    """

    name: bytes
    size: int
    checksum: bytes


def read_tar_split(compressed: BinaryIO) -> Iterator[bytes | Member]:
    """Yield what the tar consists of, in order: raw bytes, or a member instead of its contents.

    Raises:
        FormatError: it is no tar-split; what comes before was given.
        OSError: it cannot be read.
    """
    for line in _split_lines(decompress(compressed, Compression.GZIP)):
        fields = parse_fields(load_json(line, _WHERE), _WHERE, _KEYS)
        if parse_integer(fields, "type", _WHERE, (_MEMBER, _RAW)) == _RAW:
            data = _decode(fields, "payload")
            if data:
                yield data
        elif fields.get("size"):
            yield _parse_member(fields)


def compute_checksum(pieces: Iterable[bytes]) -> bytes:
    """Return the checksum of contents, 8 bytes.

    Slow: the digest of a layer tells whether it is right, this tells which file is wrong.
    """
    crc = _ALL_ONES
    table = _make_table()
    for data in pieces:
        for byte in data:
            crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return (crc ^ _ALL_ONES).to_bytes(_CHECKSUM_SIZE)


def _make_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)  # noqa: PLW2901
        table.append(crc)
    return table


def _parse_member(fields: Mapping[str, Any]) -> Member:
    if fields.get("name_raw"):
        name = _decode(fields, "name_raw")
    else:
        name = parse_string(fields, "name", _WHERE).encode()
    size = parse_size(fields, "size", _WHERE)
    return Member(name, size, _decode(fields, "payload"))


def _decode(fields: Mapping[str, Any], key: str) -> bytes:
    text = parse_string(fields, key, _WHERE)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        msg = f"{_WHERE}: {key}: expected base64"
        raise FormatError(msg) from None


def _split_lines(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > _MAX_LINE_SIZE:
            msg = f"{_WHERE}: a line of more than {_MAX_LINE_SIZE} bytes"
            raise FormatError(msg)
        yield from filter(None, lines)
    if rest:
        yield rest
