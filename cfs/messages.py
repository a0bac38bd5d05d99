"""JSON objects from peers that nobody vouches for, as varlink sends them.

They are decoded strictly, and not before it is known what that costs.  Nothing is kept; any thread
may call.
"""

import json
import re
from typing import Any, NoReturn

from cfs.errors import FormatError

__all__ = ["decode_object", "decoding_cost"]

_SMALL_SIZE = 1 << 16  # bytes; what decodes to little, however it is nested
_PIECE_SIZE = 1 << 18  # bytes that are looked at before other threads get their turn
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_VALUE_COST = 100  # bytes of a small object of Python
_ASCII_FACTOR, _WIDE_FACTOR = 2, 8  # decoded text and the strings in it: 1 or 4 bytes each


def decoding_cost(message: bytes, max_values: int) -> int:
    """Return how many bytes of memory decoding a message may take at most.

    Args:
        message: to be decoded.
        max_values: that it may have, strings aside, of which there may be as many.

    Raises:
        FormatError: it has more.
    """
    size = len(message)
    if size <= _SMALL_SIZE:
        return 0
    nr_quotes = nr_values = start = 0
    while start < size:
        piece = message[start : start + _PIECE_SIZE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2 and start + len(piece) < size:
            piece = piece[:-1]  # an escape stays whole
        start += len(piece)
        bare = piece.replace(rb"\\", b"").replace(rb"\"", b"")
        parts = bare.split(b'"')
        outside = b"".join(parts[nr_quotes % 2 :: 2])
        nr_quotes += len(parts) - 1
        nr_values += sum(map(outside.count, (b",", b"[", b"{")))
        if nr_values > max_values or nr_quotes > 2 * max_values:
            msg = f"message of more than {max_values} values"
            raise FormatError(msg)
    is_narrow = message.isascii() and rb"\u" not in message
    return size * (_ASCII_FACTOR if is_narrow else _WIDE_FACTOR) + nr_values * _VALUE_COST


def decode_object(message: bytes) -> dict[str, Any]:
    """Decode a message without its NUL.

    Raises:
        FormatError: it is no JSON, no UTF-8, no object, or has half a surrogate pair or a member
            that occurs twice.
    """
    try:
        decoded = _decoder.decode(message.decode())
        if _SURROGATE.search(message):
            _encoder.encode(decoded).encode()  # lone ones cannot be encoded
    except (ValueError, RecursionError) as error:
        msg = f"broken JSON: {type(error).__name__}"
        raise FormatError(msg) from None
    if not isinstance(decoded, dict):
        msg = "message that is no JSON object"
        raise FormatError(msg)
    return decoded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its members.

    Raises:
        ValueError: one occurs twice.
    """
    members = dict(pairs)
    if len(members) != len(pairs):
        msg = "a member occurs twice"
        raise ValueError(msg)
    return members


def _refuse_constant(text: str) -> NoReturn:
    """Refuse NaN and the infinities, which are not JSON.

    Raises:
        ValueError: always.
    """
    msg = f"{text} is not JSON"
    raise ValueError(msg)


# made once: json.loads and json.dumps would make new ones for every call
_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_encoder = json.JSONEncoder(ensure_ascii=False)
