"""The JSON of a request: decoded strictly, and not before it is known what that costs."""

import json
import re
from dataclasses import dataclass
from typing import Any

from cfs.service.errors import ProtocolError

__all__ = ["Request", "decode_request", "decoding_cost", "encode_reply"]

_MAX_VALUES = 1 << 18  # no call needs more: ten thousand layers are 40,000 strings
_SMALL_SIZE = 1 << 16  # bytes; what decodes to little, however it is nested
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_VALUE_COST = 100  # bytes of a small object of Python
_ASCII_FACTOR, _WIDE_FACTOR = 2, 8  # decoded text and the strings in it: 1 or 4 bytes each


@dataclass(frozen=True, slots=True)
class Request:
    """A request.

    Attributes:
        method: with its interface.
        parameters: as sent; empty if there were none.
        more: several replies are welcome.
        oneway: no reply is wanted.
    """

    method: str
    parameters: dict[str, Any]
    more: bool
    oneway: bool


def decoding_cost(message: bytes) -> int:
    """Return how many bytes of memory decoding a message may take at most.

    Raises:
        ProtocolError: it has more values than any call needs.
    """
    if len(message) <= _SMALL_SIZE:
        return 0
    bare = message.replace(rb"\\", b"").replace(rb"\"", b"")
    quotes = bare.count(b'"')
    if quotes > 2 * _MAX_VALUES:
        msg = "too many strings in a message"
        raise ProtocolError(msg)
    outside = b"".join(bare.split(b'"')[::2])
    values = sum(outside.count(mark) for mark in (b",", b"[", b"{"))
    if values > _MAX_VALUES:
        msg = "too many values in a message"
        raise ProtocolError(msg)
    is_narrow = message.isascii() and rb"\u" not in message
    return len(message) * (_ASCII_FACTOR if is_narrow else _WIDE_FACTOR) + values * _VALUE_COST


def decode_request(message: bytes) -> Request:
    """Decode a message without its NUL.

    Raises:
        ProtocolError: it is no request: broken JSON or UTF-8, a member that occurs twice, no
            ``method``, members of the wrong kind.
    """
    try:
        decoded = _decoder.decode(message.decode())
        if _SURROGATE.search(message):
            _encoder.encode(decoded).encode()  # lone ones cannot be encoded
    except (ValueError, RecursionError) as error:
        msg = f"broken JSON: {type(error).__name__}"
        raise ProtocolError(msg) from None
    if not isinstance(decoded, dict):
        msg = "a request is no object"
        raise ProtocolError(msg)
    return _read_envelope(decoded)


def _read_envelope(members: dict[str, Any]) -> Request:
    parameters = members.get("parameters")
    flags = [members.get(name, False) for name in ("more", "oneway", "upgrade")]
    method = members.get("method")
    if (
        not isinstance(method, str)
        or not all(isinstance(flag, bool) for flag in flags)
        or not isinstance(parameters, dict | None)
    ):
        msg = "a request has no method, or members of the wrong kind"
        raise ProtocolError(msg)
    return Request(method, parameters or {}, flags[0], flags[1])


def encode_reply(members: dict[str, Any]) -> bytes:
    """Encode a reply.  Names of files that are not UTF-8 lose the bytes that are not."""
    return _encoder.encode(members).encode(errors="replace")


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


def _refuse_constant(text: str) -> None:
    """Refuse NaN and the infinities, which are not JSON.

    Raises:
        ValueError: always.
    """
    msg = f"{text} is not JSON"
    raise ValueError(msg)


# made once: json.loads and json.dumps would make new ones for every call
_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
