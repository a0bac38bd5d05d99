"""The escapes of dumpfiles, both ways (spec erofs-image 7.2 and 7.7)."""

import re

from cfs.errors import FormatError

__all__ = ["escape", "escape_field", "escape_path", "escape_xattr", "unescape"]

_NAMED = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r", b"\t": b"\\t"}
_ESCAPED = {bytes([byte]): b"\\x%02x" % byte for byte in range(256)} | _NAMED
_NOT_PLAIN = re.compile(rb"[^\x21-\x5b\x5d-\x7e]")
_NOT_PLAIN_XATTR = re.compile(rb"[^\x21-\x3c\x3e-\x5b\x5d-\x7e]")
_NOT_PLAIN_PATH = re.compile(rb"[^\x20-\x5b\x5d-\x7e]")

_ESCAPE = re.compile(rb"\\(?:x[0-9a-fA-F]{2}|x|.|$)", re.DOTALL)
_UNNAMED = {escaped: byte for byte, escaped in _NAMED.items()}
_HEX_ESCAPE_SIZE = len(rb"\xHH")


def escape(text: bytes) -> bytes:
    """Escape a path of a dump."""
    return _NOT_PLAIN.sub(_escape_byte, text)


def escape_field(text: bytes | None) -> bytes:
    """Escape a payload, target or content of a dump; ``-`` if there is none or it is empty."""
    if not text:
        return b"-"
    return rb"\x2d" if text == b"-" else _NOT_PLAIN.sub(_escape_byte, text)


def escape_xattr(text: bytes) -> bytes:
    """Escape a key or value of an xattr."""
    return _NOT_PLAIN_XATTR.sub(_escape_byte, text)


def escape_path(text: bytes) -> bytes:
    """Escape a path of a listing, where blanks stay."""
    return _NOT_PLAIN_PATH.sub(_escape_byte, text)


def _escape_byte(match: re.Match[bytes]) -> bytes:
    return _ESCAPED[match[0]]


def unescape(text: bytes) -> bytes:
    """Return the bytes that an escaped field stands for.

    Raises:
        FormatError: an escape is unknown or cut short.
    """
    return _ESCAPE.sub(_unescape_one, text) if b"\\" in text else text


def _unescape_one(match: re.Match[bytes]) -> bytes:
    found = match[0]
    if len(found) == _HEX_ESCAPE_SIZE:
        return bytes.fromhex(found[2:].decode())
    if found in _UNNAMED:
        return _UNNAMED[found]
    if found == b"\\":
        problem = "No character after escape"
    elif found != rb"\x":
        problem = f"Unsupported escape type {escape(found[1:]).decode()}"
    elif match.end() == len(match.string):
        problem = "No hex characters after hex escape"
    else:
        problem = "Invalid hex characters after hex escape"
    msg = f"{problem} at position {match.start()}"
    raise FormatError(msg)
