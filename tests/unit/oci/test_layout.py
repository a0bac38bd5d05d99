"""``oci:`` layouts: which image is taken, and what hostile ones can do (spec repository 5.6).

The recorded layouts are in ``tests/integration/test_golden_layouts.py``.
"""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cfs.errors import CfsError, FormatError, IntegrityError, InvalidRequestError, NotFoundError
from cfs.oci.manifest import MAX_DOCUMENT_SIZE, Manifest, native_platform
from cfs.oci.reference import digest_of
from cfs.oci.sources import SourceOptions, open_source, selection
from tests.oci_layouts import Layout, make_tar

Json = dict[str, Any]

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER = "application/vnd.docker.distribution.manifest"
LAYER = make_tar({"usr": None, "usr/file": b"x" * 100})
NATIVE = native_platform().architecture


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def read_all(
    image: str, *, os: str | None = None, arch: str | None = None, variant: str | None = None
) -> str:
    """Read everything of an image; return the digest of its manifest."""
    with open_source(image, SourceOptions(os=os, arch=arch, variant=variant)) as source:
        digest, data = source.read_manifest()
        assert digest_of(data) == digest
        manifest = Manifest.parse(data)
        assert digest_of(source.read_config(manifest)) == manifest.config.digest
        with ExitStack() as stack:
            blobs = [
                stack.enter_context(source.open_layer(index))
                for index in range(len(source.layers(manifest)))
            ]
            for blob, layer in zip(blobs, manifest.layers, strict=True):
                assert digest_of(blob.read()) == layer.digest
    return digest


def add_manifest(
    layout: Layout, architecture: str = NATIVE, tag: str = "v1", **config: Any
) -> Json:
    """Add an image; return its entry, without a platform."""
    layout.add_image(tag, [LAYER], architecture=architecture, **config)
    entry: Json = json.loads((layout.path / "index.json").read_text())["manifests"][-1]
    del entry["platform"]
    return entry


def write_index(layout: Layout, *entries: Json) -> None:
    text = json.dumps({"schemaVersion": 2, "manifests": entries})
    (layout.path / "index.json").write_text(text)


def add_index(layout: Layout, *entries: Json, media_type: str = INDEX) -> Json:
    data = json.dumps({"schemaVersion": 2, "manifests": entries}).encode()
    return layout.add_blob(data, media_type)


def for_platform(entry: Json, architecture: str, variant: str | None = None) -> Json:
    platform = {"os": "linux", "architecture": architecture}
    return entry | {"platform": platform | ({"variant": variant} if variant else {})}


def test_tags(layout: Layout) -> None:
    first = add_manifest(layout, tag="v1", author="1")["digest"]
    second = add_manifest(layout, tag="a/b", author="2")["digest"]
    empty = add_manifest(layout, tag="", author="3")["digest"]
    path = layout.path
    assert read_all(f"oci:{path}") == first
    assert read_all(f"oci:{path}:v1") == first
    assert read_all(f"oci:{path}:") == empty
    with pytest.raises(NotFoundError, match="Tag 'v2' not found in image index"):
        read_all(f"oci:{path}:v2")
    # the last colon counts, unless a slash follows it
    with pytest.raises(NotFoundError, match="layout:a/b: No such file"):
        read_all(f"oci:{path}:a/b")
    odd = path.rename(path.with_name("od:d"))
    assert read_all(f"oci:{odd}/") == first
    assert read_all(f"oci:{odd}:v1") == first
    assert second != first


def test_references_that_are_none(layout: Layout) -> None:
    with pytest.raises(InvalidRequestError, match="transport: Missing ':' in layout"):
        open_source("layout", SourceOptions())
    with pytest.raises(InvalidRequestError, match="transport: Invalid transport: foo"):
        open_source("foo:bar", SourceOptions())
    with pytest.raises(InvalidRequestError, match="zero byte"):
        open_source("oci:a\0b", SourceOptions())
    for rest in ("", ":", ":tag"):
        with pytest.raises(InvalidRequestError, match="empty name in oci:"):
            read_all(f"oci:{rest}")
    with pytest.raises(NotFoundError, match="none: No such file"):
        read_all(f"oci:{layout.path}/none")
    with pytest.raises(NotFoundError, match="Cannot find the Image Index"):
        read_all(f"oci:{layout.path}")
    (layout.path / "index.json").write_text('{"schemaVersion":2,"manifests":[]}')
    with pytest.raises(NotFoundError, match="Image index contains no manifests"):
        read_all(f"oci:{layout.path}")


def test_the_platform_of_the_descriptor_counts(layout: Layout) -> None:
    image = f"oci:{layout.path}"
    lying = for_platform(add_manifest(layout, author="1"), "riscv64")
    other = for_platform(add_manifest(layout, "s390x", author="2"), NATIVE)
    write_index(layout, lying, other)
    assert read_all(image) == other["digest"]
    assert read_all(image, arch="riscv64") == lying["digest"]
    with pytest.raises(
        NotFoundError,
        match=f"platform linux/s390x; available: linux/{min(NATIVE, 'riscv64')}, linux/",
    ):
        read_all(image, arch="s390x")
    with pytest.raises(NotFoundError, match="platform windows/"):
        read_all(image, os="windows")


def test_the_config_tells_the_platform_if_the_index_does_not(layout: Layout) -> None:
    image = f"oci:{layout.path}"
    other = add_manifest(layout, "s390x")
    fits = add_manifest(layout, NATIVE)
    write_index(layout, other, fits)
    assert read_all(image) == fits["digest"]
    assert read_all(image, arch="s390x") == other["digest"]
    write_index(layout, other)
    with pytest.raises(NotFoundError, match="available: linux/s390x"):
        read_all(image)


def test_variants(layout: Layout) -> None:
    image = f"oci:{layout.path}"
    add = [add_manifest(layout, "arm", author=str(number)) for number in range(4)]
    plain, v6, v7, odd = (
        for_platform(entry, "arm", variant)
        for entry, variant in zip(add, (None, "v6", "v7", "odd"), strict=True)
    )
    write_index(layout, v6, plain, v7, odd)
    wanted = {None: v6, "v8": v7, "v7": v7, "v6": v6, "v5": plain, "odd": odd, "other": plain}
    for variant, entry in wanted.items():
        assert read_all(image, arch="arm", variant=variant) == entry["digest"], variant
    # among those that fit alike, the first
    write_index(layout, v6, for_platform(plain, "arm", "v6"))
    assert read_all(image, arch="arm", variant="v7") == v6["digest"]
    write_index(layout, v7)
    with pytest.raises(NotFoundError, match="linux/arm/v6; available: linux/arm/v7"):
        read_all(image, arch="arm", variant="v6")


def test_an_artifact_is_for_no_platform(layout: Layout) -> None:
    layout.add_artifact("a", [layout.add_blob(b"data", "text/plain")])
    layout.add_artifact("b", [layout.add_blob(b"more", "text/plain")])
    first, second = json.loads((layout.path / "index.json").read_text())["manifests"]
    for entry in first, second:
        del entry["platform"]
    write_index(layout, first, second)
    assert read_all(f"oci:{layout.path}:b") == second["digest"]
    with pytest.raises(NotFoundError, match="no platform info"):
        read_all(f"oci:{layout.path}")
    image = add_manifest(layout)
    write_index(layout, first, image)
    assert read_all(f"oci:{layout.path}") == image["digest"]


def test_nested_indices(layout: Layout) -> None:
    image = f"oci:{layout.path}"
    entry = for_platform(add_manifest(layout), NATIVE)
    nested = add_index(layout, entry)
    write_index(layout, nested)
    assert read_all(image) == entry["digest"]
    write_index(layout, add_index(layout, entry, media_type=f"{DOCKER}.list.v2+json"))
    assert read_all(image) == entry["digest"]
    write_index(layout, add_index(layout, nested))
    with pytest.raises(FormatError, match="Nested image indices are not supported"):
        read_all(image)


def test_entries_of_other_types(layout: Layout) -> None:
    image = f"oci:{layout.path}"
    entry = for_platform(add_manifest(layout), NATIVE)
    odd = layout.add_blob(b"?", "text/plain")
    write_index(layout, entry, odd)
    assert read_all(image) == entry["digest"]
    write_index(layout, odd, entry)
    with pytest.raises(FormatError, match="Unexpected media type text/plain"):
        read_all(image)


def test_docker_manifests_are_converted(layout: Layout) -> None:
    entry = add_manifest(layout)
    document = json.loads(layout.blob(entry["digest"]).read_bytes())
    names = {
        MANIFEST: f"{DOCKER}.v2+json",
        "application/vnd.oci.image.config.v1+json": (
            "application/vnd.docker.container.image.v1+json"
        ),
        "application/vnd.oci.image.layer.v1.tar+gzip": (
            "application/vnd.docker.image.rootfs.diff.tar.gzip"
        ),
    }
    for part in (document, document["config"], *document["layers"]):
        part["mediaType"] = names[part["mediaType"]]
    write_index(layout, layout.add_blob(json.dumps(document).encode(), names[MANIFEST]))
    digest = read_all(f"oci:{layout.path}")
    with open_source(f"oci:{layout.path}", SourceOptions()) as source:
        manifest = Manifest.parse(source.read_manifest()[1])
    assert manifest.is_container
    assert [layer.media_type for layer in manifest.layers] == [
        "application/vnd.oci.image.layer.v1.tar+gzip"
    ]
    # the document that was stored under another digest
    assert digest != json.loads((layout.path / "index.json").read_text())["manifests"][0]["digest"]


def damage(path: Path, kind: str, outside: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        outside.write_bytes(data)
        path.symlink_to(outside)
    elif kind == "dots":
        outside.write_bytes(data)
        path.symlink_to(os.path.relpath(outside, path.parent))
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif kind == "longer":
        path.write_bytes(data + b" ")
    elif kind == "shorter":
        path.write_bytes(data[:-1])


def test_a_blob_of_the_wrong_size_is_not_even_opened(layout: Layout) -> None:
    write_index(layout, add_manifest(layout))
    with open_source(f"oci:{layout.path}", SourceOptions()) as source:
        manifest = Manifest.parse(source.read_manifest()[1])
        (layer,) = source.layers(manifest)
        damage(layout.blob(layer.digest), "longer", layout.path)
        message = f"Expected size {layer.size} but found {layer.size + 1}"
        with pytest.raises(IntegrityError, match=message):
            source.open_layer(0)


DAMAGES = ("missing", "fifo", "directory", "link", "dots", "loop", "device")


@pytest.mark.parametrize("kind", [*DAMAGES, "flipped", "longer", "shorter"])
@pytest.mark.parametrize("which", ["manifest", "config", "layer"])
def test_hostile_blobs(layout: Layout, tmp_path: Path, kind: str, which: str) -> None:
    entry = add_manifest(layout)
    write_index(layout, entry)
    manifest = json.loads(layout.blob(entry["digest"]).read_bytes())
    blobs = {"manifest": entry, "config": manifest["config"], "layer": manifest["layers"][0]}
    damage(layout.blob(blobs[which]["digest"]), kind, tmp_path / "outside")
    expected = {
        "missing": NotFoundError, "flipped": IntegrityError, "longer": IntegrityError,
        "shorter": IntegrityError,
    }.get(kind, FormatError)  # fmt: skip
    with pytest.raises(expected, match=blobs[which]["digest"].removeprefix("sha256:")):
        read_all(f"oci:{layout.path}")


@pytest.mark.parametrize("kind", DAMAGES)
def test_hostile_index(layout: Layout, tmp_path: Path, kind: str) -> None:
    add_manifest(layout)
    damage(layout.path / "index.json", kind, tmp_path / "outside")
    with pytest.raises(CfsError, match=r"index\.json"):
        read_all(f"oci:{layout.path}")


def test_links_within_the_blobs_are_followed(layout: Layout, tmp_path: Path) -> None:
    entry = add_manifest(layout)
    blob = layout.blob(entry["digest"])
    blob.rename(blob.with_name("manifest"))
    blob.symlink_to("manifest")
    # layouts may share their blobs
    shared = (layout.path / "blobs").rename(tmp_path / "shared")
    (layout.path / "blobs").symlink_to(shared)
    assert read_all(f"oci:{layout.path}") == entry["digest"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"schemaVersion":2}',
        '{"schemaVersion":2,"manifests":{}}',
        '{"schemaVersion":2,"manifests":[null]}',
        '{"schemaVersion":2,"manifests":[{"mediaType":"a","digest":"sha256:../../x","size":1}]}',
        '{"schemaVersion":2,"manifests":[{"mediaType":"a","digest":"sha256:00","size":1}]}',
        '{"schemaVersion":%s,"manifests":[]}' % ("9" * 10_000),
        '{"schemaVersion":2,"manifests":[],"x":"\\ud800"',
    ],
)
def test_an_index_that_is_none(layout: Layout, text: str) -> None:
    (layout.path / "index.json").write_text(text)
    with pytest.raises(FormatError):
        read_all(f"oci:{layout.path}")


def test_huge_documents_are_not_read(layout: Layout) -> None:
    entry = add_manifest(layout)
    index = layout.path / "index.json"
    os.truncate(index, 1 << 40)
    with pytest.raises(FormatError, match=r"index\.json"):
        read_all(f"oci:{layout.path}")
    huge = for_platform(entry, NATIVE) | {"size": 1 << 40}
    write_index(layout, huge)
    os.truncate(layout.blob(entry["digest"]), 1 << 40)
    with pytest.raises(FormatError, match=f"expected at most {MAX_DOCUMENT_SIZE}"):
        read_all(f"oci:{layout.path}")


def test_indices_that_repeat_others_are_read_up_to_a_limit(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [for_platform(add_manifest(layout), "s390x")] * 100
    nested = add_index(layout, *entries)
    write_index(layout, *[nested] * 1000)
    monkeypatch.setattr(selection, "_MAX_READ", 1 << 20)
    with pytest.raises(FormatError, match="indices name more than"):
        read_all(f"oci:{layout.path}")


def test_no_descriptor_is_left_open(layout: Layout) -> None:
    entry = add_manifest(layout)
    before = os.listdir("/proc/self/fd")
    read_all(f"oci:{layout.path}")
    layout.blob(entry["digest"]).unlink()
    with pytest.raises(NotFoundError):
        read_all(f"oci:{layout.path}")
    assert os.listdir("/proc/self/fd") == before
