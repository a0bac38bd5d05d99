"""Digests and tags of OCI as text (spec repository 5.1, 5.3; cli-and-varlink a.4).

A digest is a ``str`` that was checked when it came in.  No state; any thread.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cfs.errors import FormatError, IntegrityError, InvalidRequestError, UnsupportedError

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = [
    "Reference",
    "check_content",
    "check_tag",
    "decode_tag",
    "digest_like",
    "digest_of",
    "encode_tag",
    "new_hash",
    "parse_digest",
]

_DIGEST = re.compile(r"([a-z0-9]+(?:[+._-][a-z0-9]+)*):([a-zA-Z0-9=_-]+)", re.ASCII)
_HEX = re.compile(r"[0-9a-f]*")
_HEX_SIZES = {"sha256": 64, "sha384": 96, "sha512": 128}
_MAX_DIGEST_SIZE = 200  # no name of a stream can be longer than NAME_MAX
_MAX_TAG_SIZE = 255  # NAME_MAX
_RESERVED = "@"
_DIGEST_PREFIX = "sha256:"


def parse_digest(text: str) -> str:
    """Return a digest as it is, once it was checked (spec repository 5.1).

    Raises:
        InvalidRequestError: it is none.
    """
    match = _DIGEST.fullmatch(text) if len(text) <= _MAX_DIGEST_SIZE else None
    if match is None:
        msg = f"invalid digest {text[:_MAX_DIGEST_SIZE]!r}: expected ALGORITHM:HEX"
        raise InvalidRequestError(msg)
    algorithm, encoded = match.groups()
    size = _HEX_SIZES.get(algorithm)
    if size is not None and (len(encoded) != size or _HEX.fullmatch(encoded) is None):
        msg = f"invalid digest {text!r}: expected {size} lower case hex digits"
        raise InvalidRequestError(msg)
    return text


def digest_of(data: bytes | memoryview) -> str:
    """Return the digest of data, which is always a sha256."""
    return _DIGEST_PREFIX + hashlib.sha256(data).hexdigest()


def new_hash(digest: str) -> "_Hash | None":
    """Return an empty hash object of a digest's algorithm; None if that is not known."""
    algorithm = digest.partition(":")[0]
    return hashlib.new(algorithm) if algorithm in _HEX_SIZES else None


def require_hash(digest: str, what: str) -> "_Hash":
    """Return an empty hash object of a digest's algorithm.

    Raises:
        UnsupportedError: nobody here can compute digests of that algorithm.
    """
    digesting = new_hash(digest)
    if digesting is None:
        msg = f"{what} {digest}: digests of this algorithm cannot be checked"
        raise UnsupportedError(msg)
    return digesting


def digest_from(digesting: "_Hash") -> str:
    """Return the digest of what a hash object was given."""
    return f"{digesting.name}:{digesting.hexdigest()}"


def digest_like(data: bytes, digest: str) -> str:
    """Return the digest of data in the algorithm of another digest, or a sha256."""
    digesting = new_hash(digest)
    if digesting is None:
        return digest_of(data)
    digesting.update(data)
    return digest_from(digesting)


def check_content(data: bytes, digest: str, what: str) -> None:
    """Refuse data that does not have its digest.

    Raises:
        IntegrityError: it has another one, or one of an algorithm that is not known.
    """
    found = digest_like(data, digest)
    if found != digest:
        msg = f"{what} integrity failed: expected {digest}, got {found}"
        raise IntegrityError(msg)


def encode_tag(name: str) -> bytes:
    """Return the file name of a tag (spec repository 5.3).

    Raises:
        InvalidRequestError: no file can have it: it is empty, ``.`` or ``..``, too long, or no
            text.
    """
    try:
        encoded = name.replace("%", "%25").replace("/", "%2F").encode()
    except UnicodeEncodeError:
        msg = f"invalid tag {name!r}: expected UTF-8"
        raise InvalidRequestError(msg) from None
    if encoded in (b"", b".", b"..") or b"\0" in encoded:
        msg = f"invalid tag {name!r}: empty ones, '.', '..' and zero bytes are not allowed"
        raise InvalidRequestError(msg)
    if len(encoded) > _MAX_TAG_SIZE:
        msg = f"tag of {len(encoded)} bytes, once encoded: expected at most {_MAX_TAG_SIZE}"
        raise InvalidRequestError(msg)
    return encoded


def decode_tag(name: bytes) -> str:
    """Return the tag of a file name.

    Raises:
        FormatError: it is no UTF-8.
    """
    try:
        text = name.decode()
    except UnicodeDecodeError:
        msg = f"tag {name!r}: expected UTF-8"
        raise FormatError(msg) from None
    return text.replace("%2F", "/").replace("%25", "%")


def check_tag(name: str) -> None:
    """Refuse what no image shall be called.

    Raises:
        InvalidRequestError: as :func:`encode_tag`, and for names that begin like a digest.
    """
    encode_tag(name)
    if name.startswith(_RESERVED):
        msg = f"invalid tag {name!r}: a leading @ is reserved for digests"
        raise InvalidRequestError(msg)


@dataclass(frozen=True, slots=True)
class Reference:
    """What a user calls an image, or its config: a tag or a digest, never both."""

    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the reference of ``TAG`` or ``@DIGEST``.

        Raises:
            InvalidRequestError: there is no digest behind the ``@``.
        """
        if text.startswith(_RESERVED):
            return cls(None, parse_digest(text.removeprefix(_RESERVED)))
        return cls(text, None)

    @classmethod
    def parse_mountable(cls, text: str) -> Self:
        """Return the reference of ``TAG``, ``@DIGEST`` or a bare ``sha256:…``.

        Raises:
            InvalidRequestError: it begins like a digest and is none.
        """
        if text.startswith(_DIGEST_PREFIX):
            return cls(None, parse_digest(text))
        return cls.parse(text)
