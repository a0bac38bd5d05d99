"""Manifests and configs of a store: written, read, and written again for new images."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from cfs.digest import Algorithm, Digest
from cfs.errors import CfsError, FormatError, IntegrityError, NotFoundError
from cfs.oci.document_streams import config_key
from cfs.oci.document_updates import replace_images, update_config
from cfs.oci.documents import (
    ConfigDocument,
    config_of,
    find_manifest,
    image_key,
    linked_image,
    load_config,
    load_manifest,
)
from cfs.oci.manifest import MAX_DOCUMENT_SIZE
from cfs.oci.reference import Reference, digest_of
from cfs.oci.tags import set_tag
from cfs.repository.repository import Repository, init
from cfs.repository.splitstream import SplitStream
from cfs.repository.splitstream_format import ContentType
from cfs.repository.splitstream_writer import SplitStreamWriter
from cfs.repository.streams import find_stream, open_stream, register_stream
from cfs.transform.oci import XattrMode
from tests.oci_documents import ARTIFACT_TYPE, StoredImage, write_config, write_manifest

OTHER = "sha256:" + "0" * 64
OBJECT = Digest(bytes(32))  # that is in no store
KEEP = XattrMode.KEEP_USER_XATTRS


def make_images(repository: Repository, *keys: str) -> dict[str, Digest]:
    return {key: repository.objects.put_bytes(f"image {key}".encode() * 50) for key in keys}


def names_in_order(stream: SplitStream) -> list[str]:
    """Return the named references of a stream in the order of what they refer to."""
    digests = list(stream.stream_refs)
    return sorted(stream.named_refs, key=lambda name: digests.index(stream.named_refs[name]))


def test_names_of_images() -> None:
    assert [image_key(version) for version in (0, 1, 2)] == [
        *("composefs.image.v1", "composefs.image.v1", "composefs.image")
    ]
    assert image_key(1, boot=True) == "composefs.image.boot.v1"
    assert image_key(2, boot=True, mode=KEEP) == "composefs.image.boot.xattrs=keep-user-xattrs"
    key = image_key(1, boot=True, mode=KEEP)
    assert key == "composefs.image.boot.v1.xattrs=keep-user-xattrs"


def test_what_is_written_is_read(repository: Repository) -> None:
    image = StoredImage(repository)
    stored = load_manifest(repository, image.digest, verify=True)
    assert (stored.digest, stored.data) == (image.digest, image.data)
    assert stored.layers == dict(image.layers)
    assert stored.manifest.config.digest == image.config
    for config in (
        load_config(repository, image.config, verify=True),
        config_of(repository, stored, verify=True),
    ):
        assert (config.digest, config.data) == (image.config, image.config_data)
        assert config.stream == stored.config_stream
        assert (config.layers, config.images) == (dict(image.layers), {})
        assert config.config.diff_ids == tuple(name for name, _ in image.layers)
    set_tag(repository, "a", image.digest)
    for reference in (Reference.parse("a"), Reference.parse(f"@{image.digest}")):
        assert find_manifest(repository, reference) == stored


def test_order_and_shape_of_the_streams(repository: Repository) -> None:
    """As composefs-rs writes and reads them: one object whatever its size, references in order."""
    keys = [
        *("composefs.image", "composefs.image.v1"),
        *("composefs.image.boot", "composefs.image.boot.v1"),
    ]
    images = make_images(repository, *reversed(keys))
    image = StoredImage(repository, (b"z", b"a", b"z", b"m"), images=images)
    diff_ids = [digest_of(data) for data in (b"z", b"a", b"m")]
    with open_stream(repository, f"oci-config-{image.config}") as stream:
        assert names_in_order(stream) == [*diff_ids, *keys]
        assert stream.content_type == ContentType.CONFIG
        (chunk,) = stream.chunks()
        assert isinstance(chunk, Digest)
        assert stream.total_size == len(image.config_data)
    with open_stream(repository, f"oci-manifest-{image.digest}") as stream:
        assert names_in_order(stream) == [config_key(image.config), *diff_ids]
        assert stream.content_type == ContentType.MANIFEST


def test_nothing_is_stored_under_a_wrong_digest(repository: Repository) -> None:
    for digest in (OTHER, "md5:abc"):
        with pytest.raises(IntegrityError, match=r"^Config integrity failed: expected "):
            write_config(repository, digest, b"{}", [])
        with pytest.raises(IntegrityError, match=r"^Manifest integrity failed: expected "):
            write_manifest(repository, digest, b"{}", (OTHER, Digest(bytes(32))), [])
        with pytest.raises(NotFoundError):
            load_config(repository, digest)
        with pytest.raises(NotFoundError, match=f"^Manifest {digest} not found$"):
            load_manifest(repository, digest)
    large = b" " * (MAX_DOCUMENT_SIZE + 1)
    with pytest.raises(FormatError, match="expected at most"):
        write_config(repository, digest_of(large), large, [])


def add_stream(
    repository: Repository,
    content_id: str,
    content_type: bytes,
    *chunks: bytes | Digest,
    names: Mapping[str, Digest] | None = None,
) -> None:
    """Register a stream of any shape."""
    with SplitStreamWriter(repository, content_type) as writer:
        for name, digest in (names or {}).items():
            writer.add_named(name, digest)
        for chunk in chunks:
            if isinstance(chunk, bytes):
                writer.write_inline(chunk)
            else:
                writer.write_object(chunk, 1)
        register_stream(repository, content_id, writer.finish())


def test_streams_of_another_shape(repository: Repository) -> None:
    image = StoredImage(repository)
    document = repository.objects.put_bytes(image.config_data)
    large = repository.objects.put_bytes(b" " * (MAX_DOCUMENT_SIZE + 1))
    content_id = f"oci-config-{image.config}"
    opening = f"^Opening stream '{content_id}': "
    shapes: list[tuple[bytes, tuple[bytes | Digest, ...], str]] = [
        (ContentType.MANIFEST, (document,), f"{opening}Invalid splitstream content type 'ociman"),
        (b"\xff" * 8, (document,), f"{opening}Invalid splitstream content type"),
        (ContentType.CONFIG, (), "^Expected exactly 1 external object in splitstream, got 0$"),
        (ContentType.CONFIG, (image.config_data,), "got 0$"),
        (ContentType.CONFIG, (document, large), "got 2$"),
        (ContentType.CONFIG, (large,), "into memory: more than 4194304 bytes"),
        (ContentType.CONFIG, (Digest(bytes(32)),), "^Reading object sha256:0{64} into memory: "),
    ]
    for content_type, chunks, reason in shapes:
        add_stream(repository, content_id, content_type, *chunks)
        with pytest.raises(CfsError, match=reason):
            load_config(repository, image.config)
    register_stream(repository, content_id, Digest(bytes(32)))
    with pytest.raises(NotFoundError, match=f"{opening}object not found: 0000"):
        load_config(repository, image.config)


def test_a_manifest_has_to_name_its_config(repository: Repository) -> None:
    image = StoredImage(repository)
    content_id = f"oci-manifest-{image.digest}"
    document = repository.objects.put_bytes(image.data)
    other = {config_key(OTHER): Digest(bytes(32))}
    add_stream(repository, content_id, ContentType.MANIFEST, document, names=other)
    with pytest.raises(FormatError, match=f"no reference to the stream of config {image.config}$"):
        load_manifest(repository, image.digest)


def test_documents_that_are_not_what_their_digest_says(repository: Repository) -> None:
    image, other = StoredImage(repository), StoredImage(repository, note="other")
    stream = find_stream(repository, f"oci-manifest-{other.digest}")
    register_stream(repository, f"oci-manifest-{image.digest}", stream)
    set_tag(repository, "a", image.digest)
    # a tag is trusted, as in composefs-rs
    assert find_manifest(repository, Reference.parse("a")).data == other.data
    with pytest.raises(IntegrityError, match=r"^Manifest integrity failed: expected sha256:"):
        find_manifest(repository, Reference.parse(f"@{image.digest}"))
    register_stream(
        repository, f"oci-config-{OTHER}", find_stream(repository, f"oci-config-{image.config}")
    )
    with pytest.raises(IntegrityError, match=f"^Config integrity failed: expected {OTHER}, "):
        load_config(repository, OTHER, verify=True)


def test_new_images_reach_all_manifests_of_the_config(repository: Repository) -> None:
    """0.9 leaves all but one of them behind (spec repository 5.2)."""
    images = make_images(repository, "composefs.image.v1", "composefs.image.boot", "x")
    first = StoredImage(repository, note="first")
    second = StoredImage(repository, note="second")
    stranger = StoredImage(repository, (b"three",))
    before = load_manifest(repository, stranger.digest)
    config = load_config(repository, first.config)
    changed = replace_images(repository, config, {"composefs.image.v1": images["x"]})
    assert changed.images == {"composefs.image.v1": images["x"]}
    # what was loaded before is no reason to lose what was added since
    boot = {"composefs.image.boot": images["composefs.image.boot"]}
    assert replace_images(repository, config, boot).images == {**changed.images, **boot}
    normal = {"composefs.image.v1": images["composefs.image.v1"]}
    changed = replace_images(repository, changed, normal)
    for image in (first, second):
        stored = load_manifest(repository, image.digest, verify=True)
        assert stored.config_stream == changed.stream
        assert stored.layers == dict(image.layers)
        found = config_of(repository, stored, verify=True)
        assert found == changed
        assert found.images == {**normal, **boot}
        assert linked_image(repository, found) == images["composefs.image.v1"]
        assert linked_image(repository, found, boot=True) is None
    assert load_config(repository, first.config) == changed
    assert load_manifest(repository, stranger.digest) == before


def test_manifests_that_cannot_be_read_do_not_matter(store: Path, repository: Repository) -> None:
    image = StoredImage(repository)
    repository.sync()
    for name, target in (("gone", "../objects/00/" + "0" * 62), ("odd", "elsewhere")):
        (store / "streams" / f"oci-manifest-md5:{name}").symlink_to(target)
    (store / "streams" / os.fsdecode(b"oci-manifest-\xff")).symlink_to("../objects/00/1")
    (store / "streams" / "oci-manifest-md5:file").write_text("x")
    config = load_config(repository, image.config)
    changed = replace_images(repository, config, make_images(repository, "composefs.image.v1"))
    assert load_manifest(repository, image.digest).config_stream == changed.stream


def test_the_format_of_the_store_decides_which_image_counts(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    init(store, algorithm=Algorithm.SHA256, is_secure=False, erofs_version=2)
    with Repository.open(store) as repository:
        images = make_images(
            repository,
            *("composefs.image", "composefs.image.v1"),
            *("composefs.image.boot", "composefs.image.boot.v1"),
        )
        digest = StoredImage(repository, images=images).config
        config = load_config(repository, digest)
        assert linked_image(repository, config) == images["composefs.image"]
        assert linked_image(repository, config, boot=True) == images["composefs.image.boot"]
    for version in (0, 1):
        with Repository.open(store, erofs_version=version) as repository:
            assert linked_image(repository, config) == images["composefs.image.v1"]
            boot = linked_image(repository, config, boot=True)
            assert boot == images["composefs.image.boot.v1"]


def test_images_that_only_an_old_config_has_are_kept(repository: Repository) -> None:
    """0.9 leaves manifests at a config that is no longer registered, with its images."""
    images = make_images(repository, "old", "both", "new", "gone", "first", "second")
    keys = {name: f"composefs.image.{name}" for name in images}
    image = StoredImage(repository, note="left behind")
    old = {keys["old"]: images["old"], keys["both"]: images["first"], keys["gone"]: OBJECT}
    stream = write_config(repository, image.config, image.config_data, image.layers, old)
    write_manifest(repository, image.digest, image.data, (image.config, stream), image.layers)
    registered = {keys["both"]: images["second"]}
    write_config(repository, image.config, image.config_data, image.layers, registered)
    config = load_config(repository, image.config)
    changed = replace_images(repository, config, {keys["new"]: images["new"]})
    assert changed.images == {
        keys["old"]: images["old"], keys["both"]: images["second"], keys["new"]: images["new"],
    }  # fmt: skip
    assert config_of(repository, load_manifest(repository, image.digest)) == changed


def test_manifests_get_the_layers_of_their_kind(repository: Repository) -> None:
    """An artifact may have the same document for a config, with layers of its own."""
    image = StoredImage(repository, note="container")
    artifact = StoredImage(
        repository, (b"b", b"a", b"b"), config=image.config_data, config_type=ARTIFACT_TYPE
    )
    one, two = (name for name, _ in image.layers)
    layers = {one: OBJECT, two: dict(image.layers)[two]}
    document = ConfigDocument(digest=image.config, data=image.config_data, layers=layers, images={})
    with repository.updating():
        update_config(repository, document)
    assert load_manifest(repository, image.digest).layers == layers
    assert load_manifest(repository, artifact.digest).layers == dict(artifact.layers)
    with open_stream(repository, f"oci-manifest-{artifact.digest}") as stream:
        names = [config_key(image.config), *dict(artifact.layers)]
        assert names_in_order(stream) == names
