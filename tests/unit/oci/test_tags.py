"""Tags and referrers: names of manifests."""

import os
from pathlib import Path

import pytest

from cfs.errors import ConflictError, FormatError, InvalidRequestError, NotFoundError
from cfs.oci.tags import (
    Tag,
    find_manifest_stream,
    list_referrers,
    list_tags,
    remove_tag,
    resolve_tag,
    set_tag,
)
from cfs.repository.repository import Repository
from tests.oci_documents import ARTIFACT_TYPE, StoredImage

OTHER = "sha256:" + "0" * 64


def link(store: Path, name: str, target: str) -> None:
    path = store / "streams" / "refs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_a_tag_is_set_moved_and_removed(store: Path, repository: Repository) -> None:
    first, second = StoredImage(repository), StoredImage(repository, note="other")
    set_tag(repository, "a/b:c", first.digest)
    path = store / "streams" / "refs" / "oci" / "a%2Fb:c"
    assert os.readlink(path) == f"../../oci-manifest-{first.digest}"
    set_tag(repository, "a/b:c", second.digest)
    assert resolve_tag(repository, "a/b:c") == second.digest
    assert list_tags(repository) == [Tag("a/b:c", second.digest)]
    remove_tag(repository, "a/b:c")
    assert list_tags(repository) == []
    assert not path.is_symlink()
    for missing in ("a/b:c", "%"):
        with pytest.raises(NotFoundError, match=f"^OCI reference not found: {missing}$"):
            remove_tag(repository, missing)
        with pytest.raises(NotFoundError, match=f"^OCI reference not found: {missing}$"):
            resolve_tag(repository, missing)


def test_only_a_manifest_that_is_there_gets_a_tag(store: Path, repository: Repository) -> None:
    """Otherwise nothing could be collected any more."""
    image = StoredImage(repository)
    repository.sync()
    with pytest.raises(NotFoundError, match=f"^Manifest {OTHER} not found$"):
        set_tag(repository, "a", OTHER)
    stream = find_manifest_stream(repository, image.digest)
    (store / "objects" / os.fsdecode(stream.object_path)).unlink()
    with pytest.raises(NotFoundError, match=f"^Manifest {image.digest} not found: its object"):
        set_tag(repository, "a", image.digest)
    for name in ("", "..", "@a", "a" * 256, "\udc80"):
        with pytest.raises(InvalidRequestError):
            set_tag(repository, name, image.digest)
    assert list_tags(repository) == []
    assert not (store / "streams" / "refs").exists()


def test_what_is_no_tag_is_not_listed(store: Path, repository: Repository) -> None:
    image = StoredImage(repository)
    target = f"../../oci-manifest-{image.digest}"
    link(store, "oci/sub/x", f"../{target}")
    link(store, "oci/@x", target)
    link(store, "oci/x%25%2Fy", f"anywhere/oci-manifest-{OTHER}")
    link(store, "oci/layer", f"../../oci-layer-{OTHER}")
    link(store, "oci/digest", "../../oci-manifest-sha256:zz")
    link(store, os.fsdecode(b"oci/\xff"), target)
    link(store, "oci/way", "../..")  # no path is followed
    link(store, "other", target)
    (store / "streams" / "refs" / "oci" / "file").write_text(target)
    assert list_tags(repository) == [
        Tag("@x", image.digest),
        Tag("sub/x", image.digest),
        Tag("x%/y", OTHER),
    ]
    with pytest.raises(FormatError, match=r"^Invalid manifest reference: oci-layer-sha256:"):
        resolve_tag(repository, "layer")
    with pytest.raises(FormatError, match=r"^Invalid OCI digest in reference: invalid digest "):
        resolve_tag(repository, "digest")
    with pytest.raises(NotFoundError):
        resolve_tag(repository, "sub/x")
    with pytest.raises(NotFoundError):
        resolve_tag(repository, "file")
    with pytest.raises(ConflictError, match="expected a symbolic link"):
        remove_tag(repository, "file")
    with pytest.raises(ConflictError, match="expected a symbolic link"):
        set_tag(repository, "file", image.digest)
    remove_tag(repository, "@x")
    assert "@x" not in [tag.name for tag in list_tags(repository)]


def test_referrers(store: Path, repository: Repository) -> None:
    subject = StoredImage(repository)
    about = [
        StoredImage(repository, (), config_type=ARTIFACT_TYPE, note=note).digest for note in "abc"
    ]
    directory = f"oci-referrers/{subject.digest}"
    target = "../../../oci-manifest-"
    link(store, f"{directory}/{about[0]}", target + about[0])
    link(store, f"{directory}/{about[1]}", target + about[1])
    link(store, f"{directory}/{about[2]}", target + about[0])  # name and target disagree
    link(store, f"{directory}/{OTHER}", target + OTHER)  # not in the store
    link(store, f"{directory}/nothing", "nowhere")
    link(store, f"oci-referrers/{OTHER}/{about[2]}", target + about[2])
    assert list_referrers(repository, subject.digest) == sorted(about[:2])
    assert list_referrers(repository, about[0]) == []


def test_links_on_the_way_are_not_followed(store: Path, repository: Repository) -> None:
    image = StoredImage(repository)
    elsewhere = store.parent / "elsewhere"
    elsewhere.mkdir()
    (store / "streams" / "refs").mkdir()
    (store / "streams" / "refs" / "oci").symlink_to(elsewhere)
    with pytest.raises(ConflictError):
        set_tag(repository, "a", image.digest)
    for attempt in (resolve_tag, remove_tag):
        with pytest.raises(OSError, match="symbolic links"):
            attempt(repository, "a")
    assert list(elsewhere.iterdir()) == []
