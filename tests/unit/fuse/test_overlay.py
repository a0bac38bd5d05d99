"""The metadata for overlay mode, against the slow and obvious way."""

import stat
from pathlib import Path

import pytest

from cfs.digest import Algorithm, Digest
from cfs.erofs import open_image
from cfs.erofs.writer import write_image
from cfs.fuse import overlay
from cfs.fuse.options import Verify
from cfs.fuse.overlay import metadata_vector
from cfs.inodes import Ino, InodeVector
from cfs.tree import Directory, Inode, Regular, Symlink
from tests.integration.trees import RandomTree
from tests.integration.vectors import make_vector

MODES = (Verify.OFF, Verify.REQUIRE)


def expected_xattrs(
    vector: InodeVector, ino: Ino, verify: Verify, left_out: tuple[bytes, ...]
) -> list[tuple[bytes, bytes]]:
    xattrs: list[tuple[bytes, bytes]] = []
    path, digest = vector.object_path(ino), vector.digest(ino)
    if path is not None and vector.inline_size[ino] != vector.size[ino]:
        record = b""
        if verify is Verify.REQUIRE and digest is not None:
            size = 4 + len(digest.value)
            record = bytes((0, size, 0, digest.algorithm)) + digest.value
        xattrs = [(b"user.overlay.metacopy", record), (b"user.overlay.redirect", b"/" + path)]
    has_user = stat.S_IFMT(int(vector.mode[ino])) in (stat.S_IFREG, stat.S_IFDIR)
    for name, value in vector.xattrs(ino).items():
        if (name.startswith(b"user.") and not has_user) or name.startswith(left_out):
            continue
        new_name = name
        if name.startswith(b"user.overlay."):
            new_name = name.replace(b"user.overlay.", b"user.overlay.overlay.", 1)
        if len(new_name) <= 255 or name == new_name:
            xattrs.append((new_name, value))
    return xattrs


def check(vector: InodeVector, verify: Verify, *left_out: bytes) -> None:
    metadata = metadata_vector(vector, verify=verify)
    for row in range(1, len(vector)):
        expected = expected_xattrs(vector, Ino(row), verify, left_out)
        assert list(metadata.xattrs(Ino(row)).items()) == expected
    assert not metadata.xattrs(Ino(0))
    assert list(metadata.walk()) == list(vector.walk())


@pytest.mark.parametrize("verify", MODES)
@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_random_trees(version: int, algorithm: Algorithm, verify: Verify, tmp_path: Path) -> None:
    root = RandomTree(17 + version, version, algorithm, tmp_path).make()
    image = tmp_path / "image"
    image.write_bytes(write_image(root, min_version=version, max_version=version))
    check(open_image(image), verify)


def file(payload: bytes | None = b"aa/1", **xattrs: bytes) -> Regular:
    names = {name.replace("_", ".").encode(): value for name, value in xattrs.items()}
    return Regular(mode=0o100644, size=5, payload=payload, xattrs=names)


@pytest.mark.parametrize("verify", MODES)
def test_a_vector_from_elsewhere_without_slashes_before_its_paths(verify: Verify) -> None:
    children: dict[bytes, Inode] = {
        b"a": file(),
        b"b": file(b"bb/2", user_overlay_redirect=b"/etc/passwd"),
        b"sparse": file(None, user_overlay_metacopy=b""),
        b"link": Symlink(mode=0o120777, size=1, target=b"a", xattrs={b"user.overlay.x": b"1"}),
    }
    root = Directory(mode=0o040755, nlink=2, children={**children})
    check(make_vector(root), verify)


def test_trusted_xattrs_are_left_out_in_a_user_namespace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(overlay, "is_initial_user_namespace", lambda: False)
    vector = make_vector(RandomTree(5, 1, Algorithm.SHA256, tmp_path).make())
    check(vector, Verify.OFF, b"trusted.")


@pytest.mark.parametrize("verify", MODES)
def test_a_tree_without_xattrs_or_objects_stays_as_it_is(verify: Verify) -> None:
    check(make_vector(Directory(mode=0o040755, nlink=2)), verify)


def test_names_too_long_to_escape_are_left_out() -> None:
    prefix = b"user.overlay."
    names = [prefix + b"x" * size for size in (233, 234, 235, 242)]
    root = Directory(mode=0o040755, nlink=2, xattrs=dict.fromkeys(names, b"v"))
    metadata = metadata_vector(make_vector(root), verify=Verify.OFF)
    found = list(metadata.xattrs(Ino(1)))
    assert found == [prefix + b"overlay." + b"x" * size for size in (233, 234)]
    assert len(found[-1]) == 255


def test_a_name_shared_by_many_is_written_once(tmp_path: Path) -> None:
    name = b"user.overlay." + b"n" * 200
    children = {b"%d" % n: Regular(mode=0o100644, xattrs={name: b"v"}) for n in range(500)}
    image = tmp_path / "image"
    image.write_bytes(write_image(Directory(mode=0o040755, nlink=2, children={**children})))
    vector = open_image(image)
    metadata = metadata_vector(vector, verify=Verify.OFF)
    assert len(metadata.extra) - len(vector.extra) < 300


def test_the_digest_record_is_the_one_of_the_image(tmp_path: Path) -> None:
    digest = Digest(bytes(range(32)))
    one = Regular(mode=0o100644, size=5, payload=digest.object_path, digest=digest)
    image = tmp_path / "image"
    image.write_bytes(write_image(Directory(mode=0o040755, nlink=2, children={b"f": one})))
    vector = open_image(image)
    metadata = metadata_vector(vector, verify=Verify.REQUIRE)
    record = metadata.xattrs(vector.resolve("/f"))[b"user.overlay.metacopy"]
    assert record in image.read_bytes()
