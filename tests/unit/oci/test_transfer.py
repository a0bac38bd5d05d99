"""Layers and images between stores: what is sent, what is taken, and what is refused."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cfs.digest import Algorithm, Digest
from cfs.errors import (
    CfsError,
    FormatError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    UnsupportedError,
)
from cfs.objectdir import Method
from cfs.oci.documents import config_of, load_manifest
from cfs.oci.finalize import finalize_image
from cfs.oci.layers import find_layer
from cfs.oci.pull import pull
from cfs.oci.sources import SourceOptions
from cfs.oci.splitdir import Chunk, Contents, File, Inline, format_chunk, read_chunks
from cfs.oci.tags import list_tags
from cfs.oci.transfer import receive_layer, send_layer
from cfs.repository.repository import Repository, init
from cfs.repository.splitstream import SplitStream
from cfs.repository.splitstream_format import ContentType
from tests.oci_layouts import TAR, Layout, digest_of, make_tar

TARS = [
    make_tar(
        {"usr": None, "usr/small": b"s" * 64, "usr/big": b"b" * 65, "usr/huge": b"h" * 70_000}
    ),
    make_tar({"usr/small": b"other", "usr/same": b"b" * 65}),
]
DIFF_ID = digest_of(TARS[0])


def make_store(path: Path, algorithm: Algorithm = Algorithm.SHA256) -> Repository:
    init(str(path), algorithm=algorithm, is_secure=False, erofs_version=1)
    return Repository.open(str(path))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "layout")
    layout.add_image("v1", TARS)
    return layout


@pytest.fixture
def source(tmp_path: Path, layout: Layout) -> Iterator[Repository]:
    with make_store(tmp_path / "source") as store:
        pull_into(store, layout, "v1")
        yield store


@pytest.fixture(params=list(Algorithm), ids=lambda algorithm: algorithm.name)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repository]:
    with make_store(tmp_path / "target", request.param) as store:
        yield store


def pull_into(store: Repository, layout: Layout, tag: str) -> str:
    image = f"oci:{layout.path}:{tag}"
    return pull(store, image, SourceOptions(), name=tag, report=lambda _: None).manifest_digest


def layer_of(store: Repository, digest: str) -> Digest:
    stream = find_layer(store, digest)
    assert stream is not None
    return stream


def names_of(store: Repository) -> set[str]:
    """All names of streams and images, those of users too."""
    top = Path(store.path)
    return {
        str(path) for word in ("streams", "images") for path in (top / word).rglob("*")
        if path.is_symlink()
    }  # fmt: skip


def contents_of(store: Repository, stream: Digest) -> bytes:
    with SplitStream(store.objects.open_object(stream), store.algorithm) as opened:
        return b"".join(opened.contents(store.objects))


def test_layer_goes_through_a_pipe(
    source: Repository, target: Repository, layout: Layout, tmp_path: Path
) -> None:
    sent = list(send_layer(source, layer_of(source, DIFF_ID)))
    assert [chunk.size for chunk in sent if isinstance(chunk, File)] == [65, 70_000]
    wire = b"".join(map(format_chunk, sent))
    received = receive_layer(
        target, DIFF_ID, read_chunks(io.BytesIO(wire)), [source.objects.fd]
    )  # fmt: skip
    assert received.stream == layer_of(target, DIFF_ID)
    assert contents_of(target, received.stream) == TARS[0]
    assert sum(received.statistics.counts.values()) == 2
    assert received.statistics.inlined_size == len(TARS[0]) - 65 - 70_000
    with make_store(tmp_path / "pulled", target.algorithm) as pulled:
        pull_into(pulled, layout, "v1")
        assert layer_of(pulled, DIFF_ID) == received.stream
    again = receive_layer(target, DIFF_ID, sent, [source.objects.fd])
    assert again.stream == received.stream
    assert again.statistics.counts == {Method.PRESENT: 2}


def test_contents_that_come_along_are_taken(target: Repository) -> None:
    for size in (0, 64, 65, 100_000):
        data = os.urandom(size)
        chunks: list[Chunk] = [
            Inline(b"head"), Contents(size, iter([data[:10], data[10:]])), Inline(b"tail"),
        ]  # fmt: skip
        digest = digest_of(b"head" + data + b"tail")
        received = receive_layer(target, digest, chunks, [])
        assert contents_of(target, received.stream) == b"head" + data + b"tail"
        assert received.statistics.counts == ({Method.COPIED: 1} if size > 64 else {})


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """A directory with a file of 100 bytes, and what is none."""
    top = tmp_path / "directory"
    (top / "below").mkdir(parents=True)
    (top / "file").write_bytes(b"f" * 100)
    (tmp_path / "outside").write_bytes(b"o" * 100)
    (top / "link").symlink_to("file")
    (top / "below/up").symlink_to("..")
    os.mkfifo(top / "fifo")
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


REFUSED: dict[str, tuple[Sequence[Chunk], type[Exception]]] = {
    "no such directory": ([File(100, 1, b"file")], FormatError),
    "no such file": ([File(100, 0, b"none")], FileNotFoundError),
    "larger": ([File(101, 0, b"file")], IntegrityError),
    "smaller": ([File(99, 0, b"file")], IntegrityError),
    "small, but not that small": ([File(10, 0, b"file")], IntegrityError),
    "symlink": ([File(100, 0, b"link")], OSError),
    "symlink on the way": ([File(100, 0, b"below/up/file")], OSError),
    "outside": ([File(100, 0, b"../outside")], OSError),
    "absolute": ([File(100, 0, b"/etc/passwd")], OSError),
    "fifo": ([File(100, 0, b"fifo")], IntegrityError),
    "fifo, which has no size": ([File(0, 0, b"fifo")], IntegrityError),
    "directory": ([File(100, 0, b"below")], IntegrityError),
    "something else": ([Inline(b"x"), File(100, 0, b"file")], IntegrityError),
    "nothing": ([], IntegrityError),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_layers_leave_no_name(what: str, tmp_path: Path, directory: int) -> None:
    chunks, error = REFUSED[what]
    digest = digest_of(b"f" * 100)
    with make_store(tmp_path / "store") as store:
        with pytest.raises(error):
            receive_layer(store, digest, chunks, [directory])
        assert names_of(store) == set()
        receive_layer(store, digest, [File(100, 0, b"file")], [directory])
        assert find_layer(store, digest) is not None


def test_zerocopy_copies_nothing(source: Repository, tmp_path: Path) -> None:
    sent = list(send_layer(source, layer_of(source, DIFF_ID)))
    with make_store(tmp_path / "target") as target:
        try:
            received = receive_layer(target, DIFF_ID, sent, [source.objects.fd], zerocopy=True)
        except UnsupportedError as error:
            pytest.skip(str(error))
        methods = received.statistics.counts
        assert methods in ({Method.REFLINKED: 2}, {Method.HARDLINKED: 2})
        with SplitStream(target.objects.open_object(received.stream), target.algorithm) as layer:
            paths = [os.fsdecode(digest.object_path) for digest in layer.object_refs]
    for path in paths:
        files = (Path(store.path, "objects", path) for store in (source, target))
        assert os.path.samefile(*files) == (Method.HARDLINKED in methods)


def test_digest_that_cannot_be_computed(tmp_path: Path) -> None:
    with make_store(tmp_path / "store") as store, pytest.raises(UnsupportedError, match="md5:00"):
        receive_layer(store, "md5:00", [Inline(b"x")], [])


def test_digest_of_another_algorithm(tmp_path: Path) -> None:
    import hashlib  # noqa: PLC0415 - only here

    digest = f"sha512:{hashlib.sha512(b'x').hexdigest()}"
    with make_store(tmp_path / "store") as store:
        receive_layer(store, digest, [Inline(b"x")], [])
        with pytest.raises(IntegrityError):
            receive_layer(store, digest, [Inline(b"y")], [])


def test_object_that_was_changed_is_not_sent_unchecked(source: Repository) -> None:
    """To those who have no digest of the whole."""
    stream = layer_of(source, DIFF_ID)
    with SplitStream(source.objects.open_object(stream), source.algorithm) as layer:
        path = Path(source.path, "objects", os.fsdecode(layer.object_refs[0].object_path))
    path.write_bytes(b"B" * 65)
    assert len(list(send_layer(source, stream))) > 1
    with pytest.raises(IntegrityError, match=path.parent.name + path.name):
        list(send_layer(source, stream, verify=True))
    path.unlink()
    with pytest.raises(NotFoundError):
        list(send_layer(source, stream))


# --- finalize ---


class Described:
    """An image as a client describes it, its layers in a store."""

    def __init__(self, source: Repository, target: Repository) -> None:
        stored = load_manifest(source, list_tags(source)[0].digest)
        self.digest = stored.digest
        self.manifest = stored.data
        self.config = config_of(source, stored).data
        self.layers = []
        for tar in TARS:
            digest = digest_of(tar)
            chunks = send_layer(source, layer_of(source, digest))
            layer = receive_layer(target, digest, chunks, [source.objects.fd])
            self.layers.append((digest, layer.stream))


def test_image_is_completed(
    source: Repository, target: Repository, layout: Layout, tmp_path: Path
) -> None:
    image = Described(source, target)
    first = finalize_image(target, image.manifest, image.config, image.layers, "mine")
    assert first.manifest_digest == image.digest
    assert first.config_digest == digest_of(image.config)
    stored = load_manifest(target, image.digest, verify=True)
    assert (stored.stream, stored.config_stream) == (first.manifest_stream, first.config_stream)
    assert [(tag.name, tag.digest) for tag in list_tags(target)] == [("mine", image.digest)]
    names = names_of(target)
    # without a name, the tag stays as it is
    assert finalize_image(target, image.manifest, image.config, image.layers) == first
    assert names_of(target) == names
    with make_store(tmp_path / "pulled", target.algorithm) as pulled:
        pull_into(pulled, layout, "v1")
        found = load_manifest(pulled, image.digest)
        assert config_of(pulled, found).images == config_of(target, stored).images
        assert (found.stream, found.config_stream) == (stored.stream, stored.config_stream)


def edited(data: bytes, **more: Any) -> bytes:
    return json.dumps({**json.loads(data), **more}).encode()


def test_what_does_not_fit_together_is_refused_and_leaves_nothing(
    source: Repository, tmp_path: Path
) -> None:
    with make_store(tmp_path / "target") as target:
        image = Described(source, target)
        (first, stream), second = image.layers
        names = names_of(target)
        good = (image.manifest, image.config, image.layers, "name")
        other = edited(image.config, author="somebody")
        smaller = json.loads(image.manifest)
        smaller["layers"].pop()
        wrong: dict[str, tuple[tuple[Any, ...], type[CfsError]]] = {
            "manifest is no JSON": ((b"{", *good[1:]), FormatError),
            "manifest is something else": ((b"[]", *good[1:]), FormatError),
            "another config": ((good[0], other, *good[2:]), IntegrityError),
            "config is cut": ((good[0], good[1][:-1], *good[2:]), IntegrityError),
            "fewer layers than diff ids": (
                (json.dumps(smaller).encode(), *good[1:]), FormatError,
            ),
            "no layers": ((*good[:2], [], "name"), InvalidRequestError),
            "one layer": ((*good[:2], image.layers[:1], "name"), InvalidRequestError),
            "another order": ((*good[:2], image.layers[::-1], "name"), InvalidRequestError),
            "one more": (
                (*good[:2], [*image.layers, (digest_of(b""), stream)], "name"), InvalidRequestError,
            ),
            "two ids of one": (
                (*good[:2], [*image.layers, (first, second[1])], "name"), InvalidRequestError,
            ),
            "ids mixed up": (
                (*good[:2], [(first, second[1]), (second[0], stream)], "name"), NotFoundError,
            ),
            "unknown id": (
                (*good[:2], [(first, Digest(bytes(32))), second], "name"), NotFoundError,
            ),
            "empty name": ((*good[:3], ""), InvalidRequestError),
            "name like a digest": ((*good[:3], "@name"), InvalidRequestError),
            "name of a directory": ((*good[:3], ".."), InvalidRequestError),
        }  # fmt: skip
        for what, (arguments, error) in wrong.items():
            with pytest.raises(error):
                finalize_image(target, *arguments)
            assert names_of(target) == names, what
        finalize_image(target, *good)
        assert names < names_of(target)


def test_layer_that_came_twice_may_be_left_out(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "twice")
    layout.add_image("v1", [TARS[0], TARS[1], TARS[0]])
    with make_store(tmp_path / "a") as source, make_store(tmp_path / "b") as target:
        pull_into(source, layout, "v1")
        image = Described(source, target)
        once = finalize_image(target, image.manifest, image.config, image.layers)
        repeated = [*image.layers, image.layers[0]]
        assert finalize_image(target, image.manifest, image.config, repeated) == once


def test_blobs_of_artifacts_become_single_objects(tmp_path: Path, target: Repository) -> None:
    """Those who send layers one by one do not say what they are."""
    layout = Layout(tmp_path / "artifacts")
    blobs = [b"", b"small", b"large" * 100]
    manifest = layout.add_artifact("sig", [layout.add_blob(blob, "text/plain") for blob in blobs])
    data = json.dumps(manifest).encode()
    layers = [
        (digest_of(blob), receive_layer(target, digest_of(blob), [Inline(blob)], []).stream)
        for blob in blobs
    ]
    finalize_image(target, data, b"{}", layers, "sig")
    with make_store(tmp_path / "pulled", target.algorithm) as pulled:
        digest = pull_into(pulled, layout, "sig")
        for blob in blobs:
            stream = layer_of(target, digest_of(blob))
            assert stream == layer_of(pulled, digest_of(blob))
            with SplitStream(target.objects.open_object(stream), target.algorithm) as opened:
                assert opened.content_type == ContentType.BLOB
                (only,) = opened.chunks()
                assert isinstance(only, Digest)
            assert contents_of(target, stream) == blob
        assert load_manifest(target, digest).layers == load_manifest(pulled, digest).layers


def test_blob_is_no_layer(tmp_path: Path, source: Repository) -> None:
    """An artifact may carry, under the diff id of a layer, what is no stream of a tar."""
    layout = Layout(tmp_path / "artifacts")
    layout.add_artifact("tar", [layout.add_blob(TARS[0], "text/plain")])
    with make_store(tmp_path / "target") as target:
        image = Described(source, target)
        pull_into(target, layout, "tar")
        layers = [(digest, layer_of(target, digest)) for digest, _ in image.layers]
        with pytest.raises(FormatError, match="content type"):
            finalize_image(target, image.manifest, image.config, layers)


def test_plain_tar_of_an_artifact_is_a_layer(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "artifacts")
    manifest = layout.add_artifact("tar", [layout.add_blob(TARS[0], TAR)])
    with make_store(tmp_path / "target") as target:
        layers = [(DIFF_ID, receive_layer(target, DIFF_ID, [Inline(TARS[0])], []).stream)]
        finalize_image(target, json.dumps(manifest).encode(), b"{}", layers)
        assert layer_of(target, DIFF_ID) == layers[0][1]
