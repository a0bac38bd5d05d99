"""Images of a store: written, named, listed, opened."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cfs.digest import Algorithm, Digest
from cfs.dumpfile import parse_dumpfile
from cfs.erofs.writer import Rules, write_image
from cfs.errors import ConflictError, FormatError, InvalidRequestError, NotFoundError
from cfs.fsverity import compute_digest
from cfs.repository.images import (
    NamedImage,
    commit_image,
    image_objects,
    import_image,
    list_images,
    open_image,
)
from cfs.repository.refs import set_link
from cfs.repository.repository import Repository
from cfs.tree import Directory, Link, Regular, Special

CONTENT = b"x" * 100


def make_tree(repository: Repository) -> Directory:
    digest = repository.objects.put_bytes(CONTENT)
    file = Regular(mode=stat.S_IFREG, size=100, digest=digest, payload=digest.object_path)
    root = Directory(mode=stat.S_IFDIR | 0o755)
    root.children = {b"a": file, b"b": Link(file)}
    return root


def deep(nr_levels: int) -> Directory:
    directory = Directory(mode=stat.S_IFDIR)
    for _ in range(nr_levels):
        directory = Directory(mode=stat.S_IFDIR, children={b"d": directory})
    return directory


def encode(root: Directory, version: int) -> bytes:
    return bytes(write_image(root, min_version=version, max_version=version, rules=Rules.RUST))


def links(store: Path) -> dict[str, str]:
    images = store / "images"
    return {
        str(path.relative_to(images)): os.readlink(path)
        for path in images.rglob("*")
        if path.is_symlink()
    }


@pytest.mark.parametrize(
    "child",
    [
        # gets a marker of that name beside its own, as composefs-rs does it
        Directory(
            mode=stat.S_IFDIR,
            xattrs={b"trusted.overlay.opaque": b"y"},
            children={b"w": Special(mode=stat.S_IFCHR)},
        ),
        deep(5000),
    ],
    ids=["name twice", "depth"],
)
def test_commit_of_what_could_not_be_read(
    child: Directory, repository: Repository, store: Path
) -> None:
    root = Directory(mode=stat.S_IFDIR, children={b"d": child})
    with pytest.raises(FormatError, match="image of format 1: inode"):
        commit_image(repository, root, "new")
    assert not (store / "images").exists()


def test_commit_links_the_image_and_its_name(repository: Repository, store: Path) -> None:
    root = make_tree(repository)
    digest = commit_image(repository, root, "deep/er")
    assert digest == compute_digest(encode(root, 1))
    assert links(store) == {
        str(digest): f"../objects/{digest.object_path.decode()}",
        "refs/deep/er": f"../../{digest}",
    }
    assert (store / "images" / str(digest)).read_bytes() == encode(root, 1)
    assert commit_image(repository, root) == digest
    assert len(links(store)) == 2


def test_extra_formats_are_written_but_not_named(store: Path) -> None:
    path = store / "meta.json"
    text = path.read_text().replace('"default": 1', '"default": 1, "extra": [0, 1, 2]')
    path.write_text(text)
    with Repository.open(str(store)) as repository:
        root = make_tree(repository)
        digest = commit_image(repository, root, "name")
    expected = {str(compute_digest(encode(root, version))) for version in range(3)}
    assert links(store).keys() == expected | {"refs/name"}
    assert links(store)["refs/name"] == f"../{digest}"
    assert digest == compute_digest(encode(root, 1))


def test_objects_are_durable_before_the_image_is_linked(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def note(name: str, function: Callable[..., None]) -> Callable[..., None]:
        def noting(*arguments: object) -> None:
            calls.append(name)
            function(*arguments)

        return noting

    monkeypatch.setattr(repository, "sync", note("sync", repository.sync))
    monkeypatch.setattr("cfs.repository.images.set_link", note("link", set_link))
    commit_image(repository, make_tree(repository), "name")
    assert calls == ["sync", "link", "link"]


@pytest.mark.parametrize("name", ["", "/a", "a//b", "../x", "a/..", "mounted/x", "mounted"])
def test_bad_names_are_refused_before_anything_is_stored(
    repository: Repository, store: Path, name: str
) -> None:
    root = Directory(mode=stat.S_IFDIR)
    with pytest.raises(InvalidRequestError):
        commit_image(repository, root, name)
    with pytest.raises(InvalidRequestError):
        import_image(repository, encode(root, 1), name)
    assert os.listdir(store) == ["meta.json"]


def test_a_name_that_is_a_directory_is_refused(repository: Repository) -> None:
    root = Directory(mode=stat.S_IFDIR)
    commit_image(repository, root, "a/b")
    for name in ("a", "a/b/c"):
        with pytest.raises(ConflictError):
            commit_image(repository, root, name)
    assert [image.name for image in list_images(repository)] == ["a/b"]


def test_a_whiteout_has_one_name(repository: Repository, store: Path) -> None:
    whiteout = Special(mode=stat.S_IFCHR)
    root = Directory(mode=stat.S_IFDIR)
    root.children = {b"a": whiteout}
    commit_image(repository, root)
    root.children[b"b"] = Link(whiteout)
    before = links(store)
    with pytest.raises(FormatError, match="whiteout inode has nlink > 1: /b"):
        commit_image(repository, root)
    assert links(store) == before


def test_a_tree_without_a_form_leaves_no_link(repository: Repository, store: Path) -> None:
    root = Directory(mode=stat.S_IFDIR)
    root.children = {b"n" * 256: Regular(mode=stat.S_IFREG)}
    with pytest.raises(FormatError, match="name of 256 bytes"):
        commit_image(repository, root, "name")
    assert not (store / "images").exists()


def test_import(repository: Repository, store: Path) -> None:
    root = make_tree(repository)
    digest = import_image(repository, encode(root, 2), "n")
    assert digest == compute_digest(encode(root, 2))
    assert links(store)["refs/n"] == f"../{digest}"


@pytest.mark.parametrize("data", [b"", b"x" * 5000, b"\0" * 4096])
def test_import_refuses_what_is_no_image(repository: Repository, store: Path, data: bytes) -> None:
    with pytest.raises(FormatError, match="image: "):
        import_image(repository, data, "n")
    assert os.listdir(store) == ["meta.json"]


def test_import_refuses_objects_of_another_algorithm(repository: Repository) -> None:
    digest = compute_digest(CONTENT, Algorithm.SHA512)
    path = digest.object_path.decode()
    text = f"/ 0 40755 2 0 0 0 0.0 - - -\n/a 100 100644 1 0 0 0 0.0 {path} - {digest}\n"
    with pytest.raises(FormatError, match="is named by sha512: expected sha256"):
        import_image(repository, encode(parse_dumpfile(text.encode()), 1), "n")


def test_list(repository: Repository, store: Path) -> None:
    assert list_images(repository) == []
    root = Directory(mode=stat.S_IFDIR)
    digest = str(commit_image(repository, root, "b"))
    commit_image(repository, root, "a/c")
    refs = store / "images" / "refs"
    (refs / "dangling").symlink_to("../nowhere/at-all")
    (refs / "file").touch()
    os.symlink("x", os.fsencode(refs / "latin") + b"\xff")
    os.symlink(b"../\xff", refs / "target")
    (refs / "mounted").mkdir()
    (refs / "mounted" / "x").symlink_to(f"../../{digest}")
    assert list_images(repository) == [
        NamedImage("a/c", digest),
        NamedImage("b", digest),
        NamedImage("dangling", "at-all"),
    ]


def test_list_shows_an_image_that_is_called_as_the_directory_of_mounts(
    repository: Repository, store: Path
) -> None:
    """Composefs-rs gives any name."""
    digest = str(commit_image(repository, Directory(mode=stat.S_IFDIR)))
    (store / "images" / "refs").mkdir()
    (store / "images" / "refs" / "mounted").symlink_to(f"../{digest}")
    assert list_images(repository) == [NamedImage("mounted", digest)]


def test_open_and_objects(repository: Repository) -> None:
    root = make_tree(repository)
    digest = commit_image(repository, root, "d/name")
    for name in (str(digest), "refs/d/name"):
        with open_image(repository, name) as image:
            assert os.pread(image.fd, 1 << 20, 0) == encode(root, 1)
            assert (image.digest, image.name) == (digest, name)
            fd = image.fd
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        assert image_objects(repository, name) == [compute_digest(CONTENT)]
    for name in ("d/name", "name", str(digest).upper(), f"sha256:{digest}", "refs", "refs/d"):
        with pytest.raises(NotFoundError, match="image not found"), open_image(repository, name):
            pass
    for name in ("", "../objects/" + digest.object_path.decode(), "refs/../" + str(digest)):
        with pytest.raises(InvalidRequestError), open_image(repository, name):
            pass


def test_objects_that_are_known_by_their_path_only(repository: Repository) -> None:
    """As in images of C; what stands before the last two components means nothing."""
    names = ["ab" * 32, "cd" * 32, "ef" * 32]
    root = Directory(mode=stat.S_IFDIR | 0o755)
    for number, name in enumerate(names):
        path = (f"{name[:2]}/{name[2:]}", f"a/b/{name[:2]}/{name[2:].upper()}", f"{name}")[number]
        file = Regular(mode=stat.S_IFREG, size=100, payload=path.encode())
        root.children[name.encode()] = file
    data = bytes(write_image(root, min_version=0, max_version=0, rules=Rules.C))
    import_image(repository, data, "n")
    assert list(map(str, image_objects(repository, "n"))) == names[:2]


def test_what_is_opened_is_what_the_name_says(repository: Repository, store: Path) -> None:
    """In a store without fs-verity composefs-rs follows ``images/A`` to image B."""
    first = commit_image(repository, Directory(mode=stat.S_IFDIR))
    second = commit_image(repository, make_tree(repository))
    entry = store / "images" / str(first)
    entry.unlink()
    entry.symlink_to(f"../objects/{second.object_path.decode()}")
    with open_image(repository, str(first)) as image:
        assert image.digest == first
        assert Digest(compute_digest(os.pread(image.fd, 1 << 20, 0)).value) == first


def test_a_damaged_image_is_no_image(repository: Repository, store: Path) -> None:
    digest = commit_image(repository, make_tree(repository), "n")
    path = store / "objects" / digest.object_path.decode()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(FormatError, match=r"^n: "):
        image_objects(repository, "n")
