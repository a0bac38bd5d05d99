"""The format of splitstreams (spec repository 3.1 to 3.4); all integers are little-endian."""

import struct
from typing import Final

__all__ = [
    "BLOCK_BITS",
    "CHUNK",
    "COPY_SIZE",
    "HEADER",
    "INFO",
    "MAGIC",
    "OLD_HEADER",
    "VERSION",
    "ContentType",
    "is_splitstream",
]

MAGIC = b"SplitStream"
VERSION = 0
BLOCK_BITS = 12

# magic, version, flags, hash, block bits, start and end of the info block
HEADER = struct.Struct("<11sBHBBQQ")
# the same in another order: stores of bootc up to 1.15
OLD_HEADER = struct.Struct("<QQH11sBBB")
_OLD_MAGIC_OFF = struct.calcsize("<QQH")
# ranges of stream references, object references, contents and names; content type, total size
INFO = struct.Struct("<QQQQQQQQ8sQ")
# -n: n bytes of inline data follow; k: object reference k
CHUNK = struct.Struct("<q")

COPY_SIZE = 1 << 16  # no part of the format: bytes read or written at once


class ContentType:
    """Eight bytes that say what a stream holds; any others may come."""

    LAYER: Final = b"ocilayer"
    CONFIG: Final = b"ociconfg"
    MANIFEST: Final = b"ocimanif"
    BLOB: Final = b"oci_blob"


def is_splitstream(head: bytes) -> bool:
    """Whether a file that begins like that is meant to be a splitstream; it may be damaged."""
    return head.startswith(MAGIC) or head.startswith(MAGIC, _OLD_MAGIC_OFF)
