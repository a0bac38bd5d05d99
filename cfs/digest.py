"""fs-verity digests as values: algorithm, text form, object path.

Format: the kernel's ``struct fsverity_descriptor`` (Documentation/filesystems/fsverity.rst)
and composefs's object paths, first byte in hex, a slash, the rest.  No computation here.
"""

from dataclasses import dataclass
from enum import IntEnum

from cfs.compat import override
from cfs.errors import FormatError, InvalidRequestError

__all__ = ["Algorithm", "Digest"]


class Algorithm(IntEnum):
    """Hash algorithm of an fs-verity digest (``FS_VERITY_HASH_ALG_*`` of the kernel)."""

    SHA256 = 1
    SHA512 = 2

    @property
    def digest_size(self) -> int:
        """Size of a digest in bytes: 32 or 64."""
        return 32 if self is Algorithm.SHA256 else 64

    @classmethod
    def parse(cls, name: str) -> "Algorithm":
        """Return the algorithm called ``sha256`` or ``sha512``.

        Raises:
            InvalidRequestError: there is no such algorithm.
        """
        try:
            return {"sha256": cls.SHA256, "sha512": cls.SHA512}[name]
        except KeyError:
            msg = f"unknown hash algorithm {name!r}: expected sha256 or sha512"
            raise InvalidRequestError(msg) from None


@dataclass(frozen=True, slots=True)
class Digest:
    """The fs-verity digest of a file: 32 bytes are sha256, 64 bytes sha512.

    Raises:
        FormatError: ``value`` has another size.
    """

    value: bytes

    def __post_init__(self) -> None:
        if len(self.value) not in (32, 64):
            msg = f"digest of {len(self.value)} bytes: expected 32 or 64"
            raise FormatError(msg)

    @classmethod
    def parse(cls, text: str) -> "Digest":
        """Return the digest written as 64 or 128 hex digits of either case.

        Raises:
            FormatError: ``text`` is anything else.
        """
        try:
            if not text.isalnum():
                raise ValueError  # noqa: TRY301 - fromhex skips blanks, we do not
            return cls(bytes.fromhex(text))
        except (ValueError, FormatError):
            msg = f"digest {text[:130]!r}: expected 64 or 128 hex digits"
            raise FormatError(msg) from None

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm that gives digests of this size."""
        sha256 = Algorithm.SHA256
        return sha256 if len(self.value) == sha256.digest_size else Algorithm.SHA512

    @property
    def object_path(self) -> bytes:
        """Path of the object below an objects directory: ``xx/rest``."""
        text = self.value.hex().encode()
        return text[:2] + b"/" + text[2:]

    @override
    def __str__(self) -> str:
        """Lower case hex digits, without prefix."""
        return self.value.hex()
