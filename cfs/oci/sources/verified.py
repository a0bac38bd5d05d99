"""Blobs that are verified while they are read: size and digest (spec repository 5.6, own).

Nothing is trusted: neither the size that a descriptor claims, nor that a file keeps its size while
it is read.  A reader belongs to one thread at a time.
"""

import io
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self, cast

from cfs.compat import override
from cfs.errors import FormatError, IntegrityError
from cfs.oci.manifest import MAX_DOCUMENT_SIZE
from cfs.oci.reference import digest_from, require_hash

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from cfs.oci.manifest import Descriptor

__all__ = ["VerifyingReader", "open_verified", "read_document"]


class VerifyingReader(io.RawIOBase):
    """Hands on what another stream gives, and fails at its end unless it was the right blob.

    As a context manager it insists on that end: who leaves the block before without an exception
    gets one, because nobody has verified what was read.
    """

    def __init__(self, raw: io.RawIOBase, digest: str, size: int) -> None:
        """Own ``raw`` from now on.

        Args:
            raw: gives the blob; it must not return None.
            digest: that the blob should have.
            size: that the blob should have, in bytes.

        Raises:
            UnsupportedError: nobody here can compute digests of that kind.
        """
        self._raw = raw
        self._digest = digest
        self._expected_size = size
        self._read_size = 0
        self._is_verified = False
        self._hash = require_hash(digest, "blob")

    @override
    def readable(self) -> bool:
        """Yes."""
        return True

    @override
    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Read some bytes, as many as the stream below gives; 0 at the verified end.

        Raises:
            IntegrityError: the blob is too long, or at its end: too short, or another one.
            OSError: as the stream below.
        """
        with memoryview(buffer) as view:
            size: int = self._raw.readinto(view)
            is_end = not size and len(view) > 0
            self._hash.update(view[:size])
        self._read_size += size
        if self._read_size > self._expected_size:
            raise self._wrong_size(f"at least {self._read_size}")
        if is_end:
            self._verify()
        return size

    @override
    def close(self) -> None:
        """Close the stream below too."""
        self._raw.close()
        super().close()

    @override
    def __enter__(self) -> Self:
        return self

    @override
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            # whoever read all bytes may not have asked for more
            if kind is None and not self._is_verified and self.read(1):
                msg = f"blob {self._digest}: not read to its end"
                raise IntegrityError(msg)
        finally:
            self.close()

    def _verify(self) -> None:
        if self._read_size < self._expected_size:
            raise self._wrong_size(str(self._read_size))
        found = digest_from(self._hash)
        if found != self._digest:
            msg = f"blob {self._digest}: what is there has the digest {found}"
            raise IntegrityError(msg)
        self._is_verified = True

    def _wrong_size(self, found: str) -> IntegrityError:
        msg = f"blob {self._digest}: Expected size {self._expected_size} but found {found}"
        return IntegrityError(msg)


def open_verified(raw: io.RawIOBase, descriptor: "Descriptor") -> BinaryIO:
    """Return a :class:`VerifyingReader` for the blob of a descriptor; it owns ``raw``."""
    try:
        reader = VerifyingReader(raw, descriptor.digest, descriptor.size)
    except BaseException:
        raw.close()
        raise
    # all that BinaryIO has and a raw stream lacks is for writers
    return cast("BinaryIO", reader)


def read_document(raw: io.RawIOBase, descriptor: "Descriptor") -> bytes:
    """Return the bytes of a manifest, an index or a config, verified; ``raw`` is closed.

    Raises:
        FormatError: it claims to be larger than documents are.
        IntegrityError: size or digest are wrong.
        OSError: as reading.
    """
    with raw:
        if descriptor.size > MAX_DOCUMENT_SIZE:
            msg = (
                f"blob {descriptor.digest}: {descriptor.size} bytes, "
                f"expected at most {MAX_DOCUMENT_SIZE} for a document"
            )
            raise FormatError(msg)
        with VerifyingReader(raw, descriptor.digest, descriptor.size) as reader:
            return reader.read()
