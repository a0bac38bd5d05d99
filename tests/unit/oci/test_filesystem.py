"""From layers to a tree: what the golden layers do not show."""

import io
import stat
import tarfile
from typing import Any

import pytest

from cfs.digest import Digest
from cfs.errors import CfsError, FormatError
from cfs.oci.filesystem import TreeBuilder, build_tree, read_layer
from cfs.oci.tar import Entry, Kind
from cfs.repository.repository import Repository
from cfs.repository.splitstream_format import ContentType
from cfs.repository.splitstream_writer import SplitStreamWriter
from cfs.tree import Directory, Link, Regular, inode_of, walk
from tests.oci_cases import store_layer


def make_entry(path: bytes, kind: Kind = Kind.DIRECTORY, **fields: object) -> Entry:
    values: dict[str, object] = {
        "flag": b"5",
        "target": b"",
        "mode": 0o755,
        "uid": 0,
        "gid": 0,
        "rdev": 0,
        "size": 0,
        "mtime_sec": 0,
        "mtime_nsec": 0,
        "xattrs": {},
    }
    return Entry(kind=kind, path=path, **(values | fields))  # type: ignore[arg-type] # any field


def make_member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return header, contents and padding of a member."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    data = member.tobuf(tarfile.USTAR_FORMAT)
    return data + bytes(size + -size % 512)


def build(*entries: Entry) -> Directory:
    builder = TreeBuilder()
    for entry in entries:
        builder.add(entry, b"")
    return builder.root


def paths(root: Directory) -> set[bytes]:
    return {path for path, _ in walk(root)}


def store_stream(
    repository: Repository, *chunks: bytes | Digest, content_type: bytes = ContentType.LAYER
) -> Digest:
    with SplitStreamWriter(repository, content_type) as writer:
        for chunk in chunks:
            if isinstance(chunk, bytes):
                writer.write_inline(chunk)
            else:
                writer.write_object(chunk, 100)
        return writer.finish()


def test_directories_can_be_nested_deeper_than_python_recurses() -> None:
    entries = [make_entry(b"/".join([b"d"] * level)) for level in range(1, 2049)]
    root = build(*entries)
    assert len(paths(root)) == 2049
    with pytest.raises(FormatError, match="2049 directories deep"):
        build(*entries, make_entry(b"d/" * 2049))


def test_a_hard_link_keeps_the_contents_of_a_name_that_is_gone() -> None:
    root = build(
        make_entry(b"a", Kind.REGULAR, mode=0o640),
        make_entry(b"b", Kind.HARDLINK, target=b"a", mode=0o777),
        make_entry(b".wh.a"),
    )
    link = root.children[b"b"]
    assert isinstance(link, Link)
    assert stat.S_IMODE(inode_of(link).mode) == 0o640
    assert set(root.children) == {b"b"}


def test_a_hard_link_may_replace_the_directory_its_target_is_in() -> None:
    root = build(
        make_entry(b"d"),
        make_entry(b"d/f", Kind.REGULAR),
        make_entry(b"d", Kind.HARDLINK, target=b"/d/f/"),
    )
    assert isinstance(inode_of(root.children[b"d"]), Regular)


def test_a_directory_keeps_its_children_when_it_comes_again() -> None:
    root = build(
        make_entry(b"d", xattrs={b"user.old": b"1"}),
        make_entry(b"d/f", Kind.REGULAR),
        make_entry(b"./d//", mode=0o700, uid=3, xattrs={b"user.new": b"2"}),
    )
    found = root.children[b"d"]
    assert isinstance(found, Directory)
    assert (found.mode, found.uid, set(found.children)) == (0o40700, 3, {b"f"})
    assert found.xattrs == {b"user.new": b"2"}


def test_an_opaque_mark_removes_what_the_same_layer_has_put_there() -> None:
    root = build(
        make_entry(b"d", mode=0o711),
        make_entry(b"d/sub"),
        make_entry(b"d/.wh..wh..opq", Kind.REGULAR),
    )
    assert paths(root) == {b"/", b"/d"}
    assert stat.S_IMODE(inode_of(root.children[b"d"]).mode) == 0o711


@pytest.mark.parametrize(
    ("path", "kind", "target", "message"),
    [
        (b"a/b", Kind.REGULAR, b"", "layer entry '/a/b': '/a' does not exist"),
        (b"f/b", Kind.REGULAR, b"", "layer entry '/f/b': '/f' is not a directory"),
        (b"../x", Kind.REGULAR, b"", "'..' is not allowed"),
        (b"/d/../x", Kind.REGULAR, b"", "'..' is not allowed"),
        (b"/d/..", Kind.REGULAR, b"", "expected a directory as root"),
        (b"/", Kind.SYMLINK, b"x", "expected a directory as root"),
        (b"l", Kind.HARDLINK, b"d", "hard link to '/d', which is a directory"),
        (b"l", Kind.HARDLINK, b"/../f", "'..' is not allowed"),
        (b"l", Kind.HARDLINK, b"/", "invalid target '/' of a hard link"),
        (b"l", Kind.HARDLINK, b"nope", "'/nope' does not exist"),
        (b"d/.wh.x", Kind.HARDLINK, b"nope", "'/nope' does not exist"),
        (b"no/.wh.x", Kind.REGULAR, b"", "'/no' does not exist"),
        (b"\xff\n\x1b/" * 1000 + b"x", Kind.REGULAR, b"", "does not exist"),
    ],
)
def test_what_has_no_place_in_the_tree(
    path: bytes, kind: Kind, target: bytes, message: str
) -> None:
    with pytest.raises(FormatError) as caught:
        build(
            make_entry(b"d"), make_entry(b"f", Kind.REGULAR), make_entry(path, kind, target=target)
        )
    text = str(caught.value)
    assert message in text
    assert len(text) < 1000
    assert text.isprintable()


@pytest.mark.parametrize(
    "fields",
    [
        {"path": b"x" * 5000},
        {"target": b"x" * 5000, "kind": Kind.SYMLINK},
        {"xattrs": {b"user.x": b"x" * 5000}},
        {"xattrs": {b"user.%05000d" % 1: b""}},
        {"xattrs": {b"%d" % number: b"" for number in range(40)}},
    ],
    ids=["path", "target", "value", "name", "xattrs"],
)
def test_entries_cannot_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr("cfs.oci.filesystem._MEMORY_MAX", 20_000)
    builder = TreeBuilder()
    for _ in range(3):
        builder.add(make_entry(**({"path": b"x"} | fields)), b"")
    with pytest.raises(FormatError, match="take more than 20000 bytes of memory"):
        builder.add(make_entry(**({"path": b"x"} | fields)), b"")


def test_many_small_entries_cannot_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfs.oci.filesystem._MEMORY_MAX", 1 << 20)
    with pytest.raises(FormatError, match="memory"):
        build(*[make_entry(b"x")] * 1100)


def test_a_layer_gives_objects_and_small_contents(repository: Repository) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for size in (0, 1, 64, 65, 5000):
            member = tarfile.TarInfo(f"f{size}")
            member.size = size
            tar.addfile(member, io.BytesIO(b"x" * size))
    found = list(read_layer(repository, store_layer(repository, target.getvalue())))
    assert [(entry.path, entry.size) for entry, _ in found] == [
        (b"f%d" % size, size) for size in (0, 1, 64, 65, 5000)
    ]
    assert [content for _, content in found[:3]] == [b"", b"x", b"x" * 64]
    for _, content in found[3:]:
        assert isinstance(content, Digest)
        assert repository.objects.has(content)


def test_contents_of_what_has_none_are_skipped_in_pieces(repository: Repository) -> None:
    layer = make_member("dir", 3 << 20, tarfile.DIRTYPE) + make_member("f")
    stream = store_stream(repository, layer, bytes(1024))
    assert [(entry.path, content) for entry, content in read_layer(repository, stream)] == [
        (b"dir/", b""),
        (b"f", b""),
    ]


OBJECT = Digest(bytes(32))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ((make_member("f", 100), bytes(1024)), "expected an object"),
        ((make_member("f", 64)[:512], OBJECT, bytes(448 + 1024)), "expected inline data"),
        ((make_member("f", 100)[:512], OBJECT, bytes(100)), "unexpected end"),
        ((make_member("f", 100)[:512],), "expected an object"),
        ((make_member("f", 64)[:600],), "unexpected end"),
        ((make_member("f")[:500], OBJECT), "expected inline data"),
        ((make_member("d", 600, tarfile.DIRTYPE)[:1000],), "unexpected end"),
        ((make_member("d", 600, tarfile.DIRTYPE)[:1000], OBJECT), "expected inline data"),
        ((OBJECT,), "expected inline data"),
        ((make_member("f"),), "'/f': the layer ends behind its header"),
        ((make_member("f", 0, b"V"), bytes(1024)), "unsupported type"),
    ],
)
def test_broken_layers(
    repository: Repository, chunks: tuple[bytes | Digest, ...], message: str
) -> None:
    stream = store_stream(repository, make_member("good", 1), *chunks)
    entries = read_layer(repository, stream)
    assert next(entries)[0].path == b"good"
    with pytest.raises(CfsError, match=message):
        list(entries)


def test_a_stream_of_something_else_is_no_layer(repository: Repository) -> None:
    stream = store_stream(repository, bytes(1024), content_type=ContentType.BLOB)
    with pytest.raises(FormatError, match="Invalid splitstream content type"):
        build_tree(repository, [stream])
