"""Images that are made of OCI images, and the keys that keep them."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.digest import Algorithm, Digest
from cfs.errors import CfsError, FormatError, IntegrityError, InvalidRequestError, NotFoundError
from cfs.oci.documents import StoredConfig, linked_image, load_config
from cfs.oci.images import (
    BootImage,
    compute_image,
    find_config,
    link_boot_image,
    link_image,
    link_tagged_images,
    tree_of,
)
from cfs.oci.reference import Reference, digest_of
from cfs.oci.tags import set_tag
from cfs.repository.gc import collect
from cfs.repository.images import open_image
from cfs.repository.metadata import Formats
from cfs.repository.repository import Repository, init
from cfs.transform import XattrMode
from tests.oci_cases import store_config, store_image, store_layer
from tests.oci_documents import write_manifest
from tests.oci_layouts import make_tar

LAYER = make_tar({"usr": None, "boot": None, "sysroot": None, "boot/x": b"x", "f": b"y" * 100})
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
ALLOWED, KEPT = XattrMode.ALLOWLIST_ONLY, XattrMode.KEEP_USER_XATTRS


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = str(tmp_path / "store")
    init(path, algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    return path


@pytest.fixture
def repository(path: str) -> Iterator[Repository]:
    with Repository.open(path, insecure=True) as opened:
        yield opened


@pytest.fixture
def config(repository: Repository) -> StoredConfig:
    return store_image(repository, [LAYER, make_xattr_layer()])


def make_xattr_layer() -> bytes:
    """Return a layer with a file that has an xattr of the user's."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("usr/x")
        member.pax_headers = {"SCHILY.xattr.user.k": "v"}
        tar.addfile(member)
    return target.getvalue()


def open_with(path: str, default: int, *extra: int) -> Repository:
    repository = Repository.open(path, insecure=True, erofs_version=default)
    repository.formats = Formats(default, extra)
    return repository


def test_the_image_has_a_key_and_is_kept(repository: Repository, config: StoredConfig) -> None:
    linked = link_image(repository, config)
    found = compute_image(repository, config)
    assert linked.images == {"composefs.image.v1": found}
    assert linked_image(repository, linked) == found
    with open_image(repository, str(found)):
        pass
    assert load_config(repository, config.digest) == linked


def test_an_image_that_is_there_is_not_made_again(
    repository: Repository, config: StoredConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = link_image(repository, config)
    booted, image = link_boot_image(repository, linked)
    monkeypatch.setattr("cfs.oci.images.build_tree", None)
    assert link_image(repository, booted) is booted
    assert link_boot_image(repository, booted) == (booted, image)


def test_an_image_that_is_gone_is_made_again(path: str, repository: Repository) -> None:
    config = link_image(repository, store_image(repository, [LAYER]))
    (digest,) = config.images.values()
    (Path(path) / "images" / str(digest)).unlink()
    assert link_image(repository, config).images == config.images
    with open_image(repository, str(digest)):
        pass


def test_all_formats_of_the_store_get_keys(path: str) -> None:
    with open_with(path, 2, 1) as repository:
        config = link_image(repository, store_image(repository, [LAYER]))
        assert set(config.images) == {"composefs.image", "composefs.image.v1"}
        found = linked_image(repository, config)
        assert found == config.images["composefs.image"] == compute_image(repository, config)


def test_another_format_later_keeps_the_first_key(path: str) -> None:
    with open_with(path, 1) as repository:
        first = link_image(repository, store_image(repository, [LAYER]))
    with open_with(path, 2) as repository:
        second = link_image(repository, load_config(repository, first.digest))
    assert second.images["composefs.image.v1"] == first.images["composefs.image.v1"]
    assert "composefs.image" in second.images


@pytest.mark.parametrize("extra", [(), (1,)])
def test_format_0_has_the_key_of_format_1(path: str, extra: tuple[int, ...]) -> None:
    with open_with(path, 0, *extra) as repository:
        config = link_image(repository, store_image(repository, [LAYER]))
        assert set(config.images) == {"composefs.image.v1"}
        assert linked_image(repository, config) == compute_image(repository, config)
        assert link_image(repository, config) is config


def test_the_boot_image_is_another_one(repository: Repository, config: StoredConfig) -> None:
    linked = link_image(repository, config)
    booted, image = link_boot_image(repository, linked)
    assert image == BootImage(compute_image(repository, config, bootable=True), ALLOWED, 1)
    assert booted.images == {**linked.images, "composefs.image.boot.v1": image.digest}
    assert image.digest not in linked.images.values()


@pytest.mark.parametrize("mode", [ALLOWED, KEPT])
@pytest.mark.parametrize("version", [1, 2])
def test_an_expected_digest_tells_xattrs_and_format(
    path: str, mode: XattrMode, version: int
) -> None:
    with open_with(path, version) as repository:
        config = store_image(repository, [LAYER, make_xattr_layer()])
        expected = compute_image(repository, config, bootable=True, mode=mode)
    with open_with(path, 1) as repository:
        booted, image = link_boot_image(repository, config, expected=expected)
        suffix = "" if version == 2 else ".v1"
        suffix += "" if mode is ALLOWED else ".xattrs=keep-user-xattrs"
        assert booted.images == {f"composefs.image.boot{suffix}": expected}
        assert image == BootImage(expected, mode, version)
        with open_image(repository, str(expected)):
            pass


def test_an_expected_digest_that_nothing_has(repository: Repository, config: StoredConfig) -> None:
    expected = Digest(bytes(32))
    message = rf"{expected} \(tried 4 mode/version combinations\)"
    with pytest.raises(IntegrityError, match=message):
        link_boot_image(repository, config, expected=expected)
    assert load_config(repository, config.digest) == config


def store_manifest(
    repository: Repository, tag: str, config: StoredConfig, media_type: str = _CONFIG_TYPE
) -> None:
    """Give a config a manifest and that a tag."""
    document = {
        "schemaVersion": 2,
        "config": {"mediaType": media_type, "digest": config.digest, "size": len(config.data)},
        "layers": [],
    }
    data = json.dumps(document).encode()
    named = (config.digest, config.stream)
    write_manifest(repository, digest_of(data), data, named, list(config.layers.items()))
    set_tag(repository, tag, digest_of(data))


def test_collection_keeps_images_of_tagged_configs(
    repository: Repository, config: StoredConfig
) -> None:
    store_manifest(repository, "app", config)
    config, _ = link_boot_image(repository, link_image(repository, config))
    collect(repository)
    for found in config.images.values():
        with open_image(repository, str(found)):
            pass
    assert find_config(repository, Reference.parse("app")) == (config, False)
    assert find_config(repository, Reference.parse(f"@{config.digest}")) == (config, True)


def test_missing_images_of_tags_are_made(repository: Repository, config: StoredConfig) -> None:
    store_manifest(repository, "app", config)
    store_manifest(repository, "sig", store_image(repository, []), "a/b")
    other = link_image(repository, store_image(repository, [LAYER]))
    store_manifest(repository, "other", other)
    assert link_tagged_images(repository) == ["app"]
    found, _ = find_config(repository, Reference.parse("app"))
    assert linked_image(repository, found) == compute_image(repository, config)
    assert link_tagged_images(repository) == []


def test_layers_are_verified_on_demand(repository: Repository) -> None:
    wrong = f"sha256:{'0' * 64}"
    config = store_config(repository, [wrong], {wrong: store_layer(repository, LAYER)})
    assert tree_of(repository, config).children
    message = f"Layer has incorrect checksum: expected {wrong}, found {digest_of(LAYER)}"
    with pytest.raises(IntegrityError, match=message):
        tree_of(repository, config, verify=True)


def test_a_config_whose_stream_lacks_a_layer(repository: Repository) -> None:
    config = store_config(repository, [digest_of(LAYER)], {})
    with pytest.raises(FormatError, match=f"layer {digest_of(LAYER)} is missing"):
        tree_of(repository, config)


def test_a_layer_may_come_several_times(repository: Repository) -> None:
    once = store_image(repository, [LAYER])
    thrice = store_config(repository, [digest_of(LAYER)] * 3, dict(once.layers))
    assert compute_image(repository, once) == compute_image(repository, thrice)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"usr": None}, "/boot does not exist"),
        ({"usr": None, "boot": None}, "/sysroot does not exist"),
        ({"f": b""}, "/usr does not exist"),
    ],
)
def test_what_cannot_be_booted(
    repository: Repository, files: dict[str, bytes | None], message: str
) -> None:
    config = store_image(repository, [make_tar(files)])
    with pytest.raises(CfsError, match=message):
        link_boot_image(repository, config)
    assert load_config(repository, config.digest) == config


def test_nothing_is_left_of_an_image_that_cannot_be_made(path: str, repository: Repository) -> None:
    config = store_image(repository, [make_tar({"usr": None, f"usr/{'n' * 256}": b""})])
    with pytest.raises(FormatError, match="name of 256 bytes"):
        link_image(repository, config)
    assert not list(Path(path).glob("images/*"))


def test_an_artifact_has_no_tree(repository: Repository, config: StoredConfig) -> None:
    store_manifest(repository, "artifact", config, "x/y")
    with pytest.raises(InvalidRequestError, match="artifact is an artifact"):
        find_config(repository, Reference.parse("artifact"))


def test_references_that_lead_nowhere(repository: Repository) -> None:
    with pytest.raises(NotFoundError, match="OCI reference not found: nope"):
        find_config(repository, Reference.parse("nope"))
    digest = digest_of(b"")
    with pytest.raises(NotFoundError, match=digest):
        find_config(repository, Reference.parse(f"@{digest}"))
