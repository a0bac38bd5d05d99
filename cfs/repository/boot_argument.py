"""The kernel argument that names the image to boot (spec repository 5.12, 10.6)."""

import re
from collections.abc import Iterable

from cfs.digest import Digest
from cfs.errors import FormatError

__all__ = ["find_digest", "format_argument", "names_image"]

_FORMAT_2 = 2
_DIGEST_KEY = "composefs.digest="
_KEY = "composefs="
_DESCRIBED = re.compile(r"v[0-9]+-sha(?:256|512)-12:")


def format_argument(digest: Digest, version: int, *, is_secure: bool) -> str:
    """Return the argument that boots an image.

    Args:
        digest: of the image.
        version: its format.
        is_secure: whether fs-verity is required.
    """
    mark = "" if is_secure else "?"
    if version == _FORMAT_2:
        return f"{_KEY}{mark}{digest}"
    return f"{_DIGEST_KEY}{mark}v1-{digest.algorithm.name.lower()}-12:{digest}"


def names_image(argument: str) -> bool:
    """Whether a kernel argument says which image to boot."""
    return argument.startswith((_DIGEST_KEY, _KEY))


def find_digest(arguments: Iterable[str]) -> Digest | None:
    """Return the digest of the image that a kernel command line boots; None: it names none.

    Raises:
        FormatError: it is malformed.
    """
    words = list(arguments)
    for key in (_DIGEST_KEY, _KEY):
        for word in words:
            if word.startswith(key):
                value = word.removeprefix(key).removeprefix("?")
                if key == _DIGEST_KEY:
                    match = _DESCRIBED.match(value)
                    if match is None:
                        msg = f"kernel argument {word[:200]!r}: expected v1-sha512-12:DIGEST"
                        raise FormatError(msg)
                    value = value[match.end() :]
                return Digest.parse(value)
    return None
