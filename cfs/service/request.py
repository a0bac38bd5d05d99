"""The envelope of varlink: requests in, replies out (spec cli-and-varlink b.5)."""

import json
from dataclasses import dataclass
from typing import Any

from cfs.errors import FormatError
from cfs.messages import decode_object
from cfs.service.errors import ProtocolError

__all__ = ["MAX_VALUES", "Request", "decode_request", "encode_reply"]

MAX_VALUES = 1 << 18  # no call needs more: ten thousand layers are 40,000 strings


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


def decode_request(message: bytes) -> Request:
    """Decode a message without its NUL.

    Raises:
        ProtocolError: it is no request: no JSON object, no ``method``, members of the wrong kind.
    """
    try:
        members = decode_object(message)
    except FormatError as error:
        raise ProtocolError(str(error)) from None
    method, parameters = members.get("method"), members.get("parameters")
    flags = [members.get(name, False) for name in ("more", "oneway", "upgrade")]
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


# made once: json.dumps would make a new one for every call
_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
