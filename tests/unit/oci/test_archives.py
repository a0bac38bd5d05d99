"""``oci-archive:`` and ``docker-archive:``: images in tar files."""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs.errors import (
    CfsError,
    FormatError,
    IntegrityError,
    InvalidRequestError,
    NotFoundError,
    UnsupportedError,
)
from cfs.oci.manifest import Manifest
from cfs.oci.reference import digest_of
from cfs.oci.sources import SourceOptions, archives, docker_archive, open_source
from tests.oci_layouts import Layout, make_tar

Members = list[tuple[tarfile.TarInfo, bytes]]

FIRST = make_tar({"usr": None, "usr/file": b"x" * 100})
SECOND = make_tar({"usr/other": b"y" * 1000})
CONFIG = json.dumps(
    {
        "architecture": "s390x",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(FIRST), digest_of(SECOND)]},
    }
).encode()
IMAGE = {"Config": "c.json", "RepoTags": ["busybox:latest"], "Layers": ["1.tar", "2/layer.tar"]}


def member(name: str, data: bytes = b"", **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def docker_members(*images: Any, **files: bytes) -> Members:
    listed = json.dumps(images or [IMAGE]).encode()
    known = {"manifest.json": listed, "c.json": CONFIG, "1.tar": FIRST, "2/layer.tar": SECOND}
    return [member(name, data) for name, data in {**known, **files}.items()]


def read_all(image: str) -> tuple[Manifest, bytes, list[bytes]]:
    with open_source(image, SourceOptions()) as source:
        digest, data = source.read_manifest()
        assert digest_of(data) == digest
        manifest = Manifest.parse(data)
        layers = []
        for index, layer in enumerate(source.layers(manifest)):
            with source.open_layer(index) as blob:
                layers.append(blob.read())
            assert digest_of(layers[-1]) == layer.digest
        return manifest, source.read_config(manifest), layers


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "layout")
    made.add_image("v1", [FIRST, SECOND])
    return made


def pack_layout(layout: Layout, path: Path, prefix: str = "") -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(layout.path, prefix or ".")
    return path


@pytest.mark.parametrize("prefix", ["", "/"])
def test_a_layout_in_a_tar(layout: Layout, tmp_path: Path, prefix: str) -> None:
    path = pack_layout(layout, tmp_path / "image.tar", prefix)
    expected = read_all(f"oci:{layout.path}")
    assert read_all(f"oci-archive:{path}") == expected
    assert read_all(f"oci-archive:{path}:v1") == expected
    with pytest.raises(NotFoundError, match="Tag 'a:b/c' not found"):
        read_all(f"oci-archive:{path}:a:b/c")


def test_blobs_of_archives_are_verified(layout: Layout, tmp_path: Path) -> None:
    manifest = read_all(f"oci:{layout.path}")[0]
    blob = layout.blob(manifest.layers[0].digest)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    path = pack_layout(layout, tmp_path / "image.tar")
    with pytest.raises(IntegrityError, match=manifest.layers[0].digest):
        read_all(f"oci-archive:{path}")


def pack_zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("pack", [gzip.compress, pack_zstd])
def test_an_archive_may_be_compressed(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = write_tar(tmp_path / "image.tar", docker_members())
    expected = read_all(f"docker-archive:{path}")
    packed = pack(path.read_bytes())
    path.write_bytes(packed)
    assert read_all(f"docker-archive:{path}") == expected
    path.write_bytes(packed[:-20])
    with pytest.raises(FormatError):
        read_all(f"docker-archive:{path}")


def test_a_docker_archive(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "image.tar", docker_members())
    manifest, config, layers = read_all(f"docker-archive:{path}")
    assert config == CONFIG
    assert layers == [FIRST, SECOND]
    assert manifest.is_container
    # the same for everybody who has the image, so it must not change with our version
    assert manifest.config.digest == digest_of(CONFIG)
    assert [layer.media_type for layer in manifest.layers] == [
        "application/vnd.oci.image.layer.v1.tar"
    ] * 2


def test_layers_of_a_docker_archive_may_be_compressed(tmp_path: Path) -> None:
    packed = {"1.tar": gzip.compress(FIRST, mtime=0), "2/layer.tar": pack_zstd(SECOND)}
    path = write_tar(tmp_path / "image.tar", docker_members(**packed))
    manifest, _, layers = read_all(f"docker-archive:{path}")
    assert layers == list(packed.values())
    assert [layer.media_type.rpartition("+")[2] for layer in manifest.layers] == ["gzip", "zstd"]


def test_links_lead_to_other_members(tmp_path: Path) -> None:
    members = docker_members()[:2]
    members += [
        member("blobs/first", FIRST),
        member("second.tar", SECOND),
        member("1.tar", type=tarfile.LNKTYPE, linkname="./blobs/first"),
        member("2/layer.tar", type=tarfile.SYMTYPE, linkname="../old"),
        member("old", type=tarfile.SYMTYPE, linkname="/../../second.tar"),
    ]
    path = write_tar(tmp_path / "image.tar", members)
    assert read_all(f"docker-archive:{path}")[2] == [FIRST, SECOND]


def test_the_last_member_of_a_name_counts(tmp_path: Path) -> None:
    members = [
        member("1.tar", SECOND),
        member("2/layer.tar", type=tarfile.SYMTYPE, linkname="1.tar"),
        *docker_members(),
        member("./c.json/", CONFIG),
    ]
    path = write_tar(tmp_path / "image.tar", members)
    assert read_all(f"docker-archive:{path}")[2] == [FIRST, SECOND]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("busybox", 0),
        ("busybox:latest", 0),
        ("docker.io/library/busybox", 0),
        ("library/busybox", 0),
        ("localhost/a/b:v1", 1),
        ("host:5000/x", 2),
        ("user/y", 2),
        ("@0", 0),
        ("@2", 2),
        ("busybox:v1", None),
        ("a/b:v1", None),
        ("@3", None),
        ("@" + "9" * 5000, None),
    ],
)
def test_names_of_images(tmp_path: Path, name: str, number: int | None) -> None:
    tags = [["busybox"], ["localhost/a/b:v1"], ["host:5000/x:latest", "docker.io/user/y"]]
    images = [IMAGE | {"RepoTags": some, "Config": f"{index}"} for index, some in enumerate(tags)]
    configs = {str(index): CONFIG + b" " * index for index in range(3)}
    path = write_tar(tmp_path / "image.tar", docker_members(*images, **configs))
    if number is None:
        with pytest.raises(NotFoundError, match="no image"):
            read_all(f"docker-archive:{path}:{name}")
    else:
        assert read_all(f"docker-archive:{path}:{name}")[1] == configs[str(number)]


def test_one_of_several_images_has_to_be_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "image.tar", docker_members(IMAGE, IMAGE))
    with pytest.raises(InvalidRequestError, match="the archive holds 2 images"):
        read_all(f"docker-archive:{path}")
    with pytest.raises(InvalidRequestError, match="expected @ and the number"):
        read_all(f"docker-archive:{path}:@x")


def test_a_layer_that_is_another_one_is_refused(tmp_path: Path) -> None:
    other = {"1.tar": FIRST[:-1] + b"?"}
    path = write_tar(tmp_path / "image.tar", docker_members(**other))
    with pytest.raises(IntegrityError, match=digest_of(FIRST)):
        read_all(f"docker-archive:{path}")


def test_a_compressed_layer_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nr = 100
    config = json.loads(CONFIG)
    config["rootfs"]["diff_ids"] = [digest_of(FIRST)] * nr
    image = IMAGE | {"Layers": ["1.tar"] * nr}
    files = {"c.json": json.dumps(config).encode(), "1.tar": gzip.compress(FIRST, mtime=0)}
    path = write_tar(tmp_path / "image.tar", docker_members(image, **files))
    hashed: list[str] = []

    def count(file: io.RawIOBase) -> str:
        hashed.append(digest_of(file.readall()))
        return hashed[-1]

    monkeypatch.setattr(docker_archive, "_hash", count)
    assert len(read_all(f"docker-archive:{path}")[2]) == nr
    assert hashed == [digest_of(gzip.compress(FIRST, mtime=0))]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"manifest.json": b"[]"}, "holds 0 images"),
        ({"manifest.json": b"{}"}, "expected a list"),
        ({"manifest.json": b"[" * 100_000}, "nested too deep"),
        ({"manifest.json": b'[{"Config":"c.json"}]'}, "Layers"),
        ({"manifest.json": b'[{"Config":"no","Layers":[]}]'}, "not in the archive: no"),
        ({"manifest.json": b'[{"Config":"c.json","Layers":["1.tar"]}]'}, "diff ids"),
        ({"manifest.json": b'[{"Config":"c.json","Layers":["1.tar","3"]}]'}, "archive: 3"),
        ({"manifest.json": b'[{"Config":"../c.json/x","Layers":[]}]'}, "not in the archive"),
        ({"manifest.json": bytes(5 << 20)}, "manifest.json: 5242880 bytes"),
        ({"c.json": bytes(5 << 20)}, "c.json: 5242880 bytes"),
        ({"c.json": b"{}"}, "config"),
    ],
)
def test_documents_that_are_none(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    path = write_tar(tmp_path / "image.tar", docker_members(**files))
    with pytest.raises(CfsError, match=message):
        read_all(f"docker-archive:{path}")


def test_files_that_are_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", "/dev/null"):
        with pytest.raises(InvalidRequestError, match="expected a regular file"):
            read_all(f"oci-archive:{path}")
    for path in (tmp_path / "none", tmp_path / "fifo/none"):
        with pytest.raises(NotFoundError, match="Opening archive"):
            read_all(f"oci-archive:{path}")
    with pytest.raises(InvalidRequestError, match="empty name in docker-archive:"):
        read_all("docker-archive::x")
    text = tmp_path / "text"
    text.write_bytes(b"no tar" * 1000)
    with pytest.raises(FormatError, match=f"archive {text}: tar: "):
        read_all(f"oci-archive:{text}")
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(NotFoundError, match="not in the archive: manifest"):
        read_all(f"docker-archive:{empty}")
    path = write_tar(tmp_path / "image.tar", docker_members())
    monkeypatch.setattr(archives, "_MAX_MEMBERS", 3)
    with pytest.raises(FormatError, match="more than 3 members"):
        read_all(f"docker-archive:{path}")


@pytest.mark.parametrize(
    ("odd", "error"),
    [
        (member("1.tar", type=tarfile.SYMTYPE, linkname="1.tar"), NotFoundError),
        (member("1.tar", type=tarfile.LNKTYPE, linkname="none"), NotFoundError),
        (member("1.tar", type=tarfile.FIFOTYPE), NotFoundError),
        (member("1.tar", type=tarfile.DIRTYPE), NotFoundError),
        (member("1.tar", type=tarfile.GNUTYPE_SPARSE), UnsupportedError),
        (member("x" * 5000), FormatError),
    ],
)
def test_odd_members(
    tmp_path: Path, odd: tuple[tarfile.TarInfo, bytes], error: type[Exception]
) -> None:
    path = write_tar(tmp_path / "image.tar", [*docker_members(), odd])
    with pytest.raises(error):
        read_all(f"docker-archive:{path}")


def test_an_archive_that_ends_early(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "image.tar", docker_members())
    data = path.read_bytes()
    end = data.index(SECOND) + len(SECOND) - 1
    path.write_bytes(data[:end])
    with pytest.raises(FormatError, match="unexpected end of the archive"):
        read_all(f"docker-archive:{path}")


def test_a_huge_member_is_not_believed(tmp_path: Path) -> None:
    huge = member("huge")
    huge[0].size = 1 << 50
    path = tmp_path / "image.tar"
    path.write_bytes(huge[0].tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(FormatError, match="unexpected end of the archive"):
        read_all(f"docker-archive:{path}")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "image.tar", docker_members())
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    before = os.listdir("/proc/self/fd")
    read_all(f"docker-archive:{path}")
    read_all(f"docker-archive:{packed}")
    with pytest.raises(NotFoundError):
        read_all(f"oci-archive:{packed}")
    assert os.listdir("/proc/self/fd") == before


@settings(deadline=None)  # others use the machine
@given(
    st.lists(st.tuples(st.integers(0, 12_000), st.binary(min_size=1, max_size=20)), max_size=4),
    st.none() | st.integers(0, 14_000),
)
def test_a_damaged_archive_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]], size: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged-{os.getpid()}.tar"
    data = bytearray(write_tar(path, docker_members()).read_bytes())
    for pos, change in changes:
        data[pos : pos + len(change)] = change
    path.write_bytes(data[:size])
    with suppress(CfsError):
        assert read_all(f"docker-archive:{path}")[2] == [FIRST, SECOND]
