"""Blobs are what they were announced as, or reading them fails."""

import hashlib
import io

import pytest

from cfs.compat import override
from cfs.errors import FormatError, IntegrityError, UnsupportedError
from cfs.oci.manifest import MAX_DOCUMENT_SIZE, Descriptor
from cfs.oci.sources.verified import VerifyingReader, open_verified, read_document

DATA = b"0123456789" * 20_000
DIGEST = f"sha256:{hashlib.sha256(DATA).hexdigest()}"


class Pipe(io.RawIOBase):
    """Gives its bytes a few at a time, as pipes do."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        self.nr_given = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        size = self._data.readinto(memoryview(buffer)[:1000])
        self.nr_given += size
        return size


def reader(data: bytes = DATA, digest: str = DIGEST, size: int = len(DATA)) -> VerifyingReader:
    return VerifyingReader(Pipe(data), digest, size)


def descriptor(digest: str = DIGEST, size: int = len(DATA)) -> Descriptor:
    return Descriptor(
        media_type="", digest=digest, size=size, annotations={}, platform=None, artifact_type=None
    )


def test_the_right_blob_is_given_whole() -> None:
    raw = Pipe(DATA)
    with open_verified(raw, descriptor()) as blob:
        assert blob.read() == DATA
    assert raw.closed


@pytest.mark.parametrize("name", ["sha384", "sha512"])
def test_other_digests_are_verified_too(name: str) -> None:
    digest = f"{name}:{hashlib.new(name, DATA).hexdigest()}"
    with reader(digest=digest) as blob:
        assert blob.read() == DATA
    with pytest.raises(IntegrityError), reader(DATA[:-1] + b"x", digest=digest) as blob:
        blob.read()


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        (DATA[:-1] + b"x", len(DATA), "what is there has the digest sha256:"),
        (DATA[:-1], len(DATA), f"Expected size {len(DATA)} but found {len(DATA) - 1}"),
        (DATA + b"x", len(DATA), f"Expected size {len(DATA)} but found at least {len(DATA) + 1}"),
        (DATA, 1 << 60, f"Expected size {1 << 60} but found {len(DATA)}"),
        (b"", len(DATA), f"Expected size {len(DATA)} but found 0"),
    ],
)
def test_another_blob_is_refused(data: bytes, size: int, message: str) -> None:
    with pytest.raises(IntegrityError, match=message), reader(data, size=size) as blob:
        blob.read()


def test_what_is_too_long_is_not_read_to_its_end() -> None:
    pipe = Pipe(DATA)
    with pytest.raises(IntegrityError), VerifyingReader(pipe, DIGEST, 10) as blob:
        blob.read()
    assert pipe.closed
    assert pipe.nr_given == 1000


def test_leaving_before_the_end_is_an_error() -> None:
    with pytest.raises(IntegrityError, match="not read to its end"), reader() as blob:
        blob.read(10)


def test_whoever_has_all_bytes_need_not_ask_for_more() -> None:
    with reader() as blob:
        assert len(io.BufferedReader(blob).read(len(DATA))) == len(DATA)


def test_the_last_bytes_are_verified_when_the_block_is_left() -> None:
    with pytest.raises(IntegrityError), VerifyingReader(Pipe(b"x"), DIGEST, 1) as blob:
        blob.read(1)


def test_an_error_on_its_way_is_not_replaced() -> None:
    raw = Pipe(DATA)
    with pytest.raises(KeyError), VerifyingReader(raw, DIGEST, len(DATA)):
        raise KeyError
    assert raw.closed


def test_an_empty_buffer_is_not_the_end() -> None:
    with reader() as blob:
        assert blob.readinto(bytearray()) == 0
        assert blob.read() == DATA


def test_digests_that_nobody_can_compute_are_refused() -> None:
    raw = Pipe(DATA)
    with pytest.raises(UnsupportedError, match="md5:00"):
        open_verified(raw, descriptor("md5:00"))
    assert raw.closed


def test_documents_are_small() -> None:
    assert read_document(Pipe(DATA), descriptor()) == DATA
    raw = Pipe(DATA)
    with pytest.raises(FormatError, match="for a document"):
        read_document(raw, descriptor(size=MAX_DOCUMENT_SIZE + 1))
    assert raw.closed
