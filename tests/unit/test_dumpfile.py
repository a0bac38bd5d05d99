"""Dumpfiles: what is read, what is refused, and that printing and reading agree."""

import contextlib
import gzip
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs.digest import Digest
from cfs.dumpfile import format_tree, format_vector, parse_dumpfile
from cfs.erofs.overlay import tree_view
from cfs.erofs.reader import read_image
from cfs.erofs.writer import write_image
from cfs.errors import FormatError
from cfs.tree import (
    Directory,
    Inode,
    Link,
    Regular,
    Special,
    Symlink,
    settle_links,
    walk,
)
from tests.paths import DATA, PUBLIC_DUMPS

ROOT = b"/ 0 40755 2 0 0 0 0.0 - - -\n"
LAX = {"no-newline", "longlink", "honggfuzz-longlink-unterminated"}
# a whiteout with a size: the size is lost, the escaping leaves opaque markers
NOT_CANONICAL = LAX | {"honggfuzz-chardev-nonzero-size"}
FILE = b"/a 0 100644 1 0 0 0 0.0 - - -"
REFUSED = {
    "big-inline": "Inline content size 5004 exceeds maximum 5000",
    "dir-hardlink": "Directories can't be hardlinked",
    "dot-name": "Invalid . or .. in path: /.",
    "dotdot-name": "Invalid . or .. in path: /..",
    "empty-link-name": "Invalid symlink",
    "empty-name": "Can't add child",
    "empty-xattr-key": "Can't set xattr",
    "honggfuzz-long-xattr": "Can't set xattr",
    "long-link": "Invalid symlink",
    "long-xattr-key": "Too many xattrs",
    "long-xattr-value": "Invalid mode 644",
    "no-ftype": "Invalid mode 0",
    "self-hardlink": "Self-referential hardlink /037blockdev",
    "too-big": "File too large",
}


def public_dumps(pattern: str) -> list[Path]:
    return sorted(PUBLIC_DUMPS.glob(pattern))


def load(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def parse(line: bytes, *, strict: bool = False) -> Inode:
    """Parse a root and one entry, and return that."""
    child = parse_dumpfile(ROOT + line + b"\n", strict=strict).children[b"a"]
    assert isinstance(child, Inode)
    return child


def refuse(data: bytes, words: str, *, strict: bool = False) -> None:
    with pytest.raises(FormatError) as caught:
        parse_dumpfile(data, strict=strict)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def describe(root: Directory) -> list[tuple[object, ...]]:
    """Everything a tree says, in a form that compares."""
    settle_links(root)
    rows: list[tuple[object, ...]] = []
    for path, child in walk(root):
        inode = child.inode if isinstance(child, Link) else child
        is_directory = isinstance(inode, Directory)
        fields = ("mode", "uid", "gid", "rdev", "mtime_sec", "mtime_nsec", "xattrs")
        row: list[object] = [path, *(getattr(inode, name) for name in fields)]
        row.append(0 if is_directory else inode.nlink)
        if isinstance(inode, Regular):
            row += [inode.size, inode.content or b"", inode.payload, inode.digest]
        if isinstance(inode, Symlink):
            row.append(inode.target)
        rows.append(tuple(row))
    return rows


@pytest.mark.skipif(not PUBLIC_DUMPS.is_dir(), reason=f"no public dumps in {PUBLIC_DUMPS}")
def test_public_dumps_are_read() -> None:
    dumps = [path for path in public_dumps("*.dump*") if path.suffix in (".dump", ".gz")]
    good = [path for path in dumps if not path.name.startswith("should-fail-")]
    assert len(good) >= 9
    for path in good:
        data = load(path)
        root = parse_dumpfile(data)
        assert len(list(walk(root))) == len(data.splitlines())
        name = path.name.split(".")[0]
        if name in LAX:
            with pytest.raises(FormatError):
                parse_dumpfile(data, strict=True)
        else:
            parse_dumpfile(data, strict=True)


@pytest.mark.skipif(not PUBLIC_DUMPS.is_dir(), reason=f"no public dumps in {PUBLIC_DUMPS}")
def test_public_bad_dumps_are_refused_in_the_words_of_c() -> None:
    bad = public_dumps("should-fail-*.dump")
    assert len(bad) >= 13
    for path in bad:
        refuse(load(path), REFUSED[path.stem.removeprefix("should-fail-")])


def print_image_of(data: bytes, min_version: int, max_version: int) -> bytes:
    """Return the dump of the image that a dump makes."""
    image = write_image(parse_dumpfile(data), min_version=min_version, max_version=max_version)
    vector = tree_view(read_image(np.frombuffer(image, np.uint8)))
    return b"".join(format_vector(vector))


@pytest.mark.skipif(not PUBLIC_DUMPS.is_dir(), reason=f"no public dumps in {PUBLIC_DUMPS}")
def test_canonical_public_dumps_come_back_as_the_same_text() -> None:
    for path in public_dumps("*.dump*"):
        name = path.name.split(".")[0]
        if path.suffix not in (".dump", ".gz") or name.startswith("should-fail"):
            continue
        if name not in NOT_CANONICAL:
            version = path.with_name(path.name + ".version")
            maximum = int(version.read_text()) if version.exists() else 1
            data = load(path)
            assert print_image_of(data, 0, maximum) == data, path.name


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize(
    "path", sorted((DATA / "dumps2").glob("*.dump")), ids=lambda path: path.stem
)
def test_dumps_reach_a_fixed_point(path: Path, version: int) -> None:
    text = path.read_bytes()
    for _ in range(2):  # a file that its xattr makes a whiteout gets its markers in the second
        text = print_image_of(text, version, version)
    assert print_image_of(text, version, version) == text


def test_all_fields() -> None:
    digest = b"ab" * 32
    inode = parse(
        rb"/a 7 104755 2 1000 4294967295 9 -12.999999999 x/\x20y - "
        + digest
        + rb" user.k=a=\x3d b="
    )
    assert isinstance(inode, Regular)
    assert (inode.mode, inode.size, inode.nlink) == (0o104755, 7, 2)
    assert (inode.uid, inode.gid, inode.rdev) == (1000, 2**32 - 1, 0)
    assert (inode.mtime_sec, inode.mtime_nsec) == (-12, 999_999_999)
    assert (inode.payload, inode.content) == (b"x/ y", None)
    assert inode.digest == Digest(b"\xab" * 32)
    assert inode.xattrs == {b"user.k": b"a==", b"b": b""}


def test_nanoseconds_are_an_integer() -> None:
    assert parse(b"/a 0 100644 1 0 0 0 1.5 - - -").mtime_nsec == 5


def test_escapes() -> None:
    inode = parse(rb"/a 6 100644 1 0 0 0 0.0 - \\\n\r\t\x00\xfF -")
    assert isinstance(inode, Regular)
    assert inode.content == b"\\\n\r\t\x00\xff"


def test_a_lone_dash_is_written_with_an_escape() -> None:
    inode = parse(rb"/a 0 120777 1 0 0 0 0.0 \x2d - -")
    assert isinstance(inode, Symlink)
    assert (inode.target, inode.size) == (b"-", 1)


@pytest.mark.parametrize(
    ("mode", "rdev"), [(b"20644", 1281), (b"60644", 1281), (b"10644", 0), (b"140644", 0)]
)
def test_device_numbers_are_for_devices(mode: bytes, rdev: int) -> None:
    inode = parse(b"/a 5 %s 1 0 0 1281 0.0 - - -" % mode)
    assert isinstance(inode, Special)
    assert (inode.rdev, inode.size) == (rdev, 5)


def test_high_bits_of_the_mode_are_dropped() -> None:
    assert parse(b"/a 0 1100644 1 0 0 0 0.0 - - -").mode == 0o100644


def test_missing_fields_at_the_end_and_one_blank_too_many() -> None:
    inode = parse(b"/a 0 100644 1 0 0 0 0.0 x")
    assert isinstance(inode, Regular)
    assert (inode.payload, inode.content, inode.digest) == (b"x", b"", None)
    assert parse(FILE + b" ").xattrs == {}


def test_the_last_of_repeated_keys_counts() -> None:
    assert parse(FILE + b" k=2 k=1").xattrs == {b"k": b"1"}


def test_paths_without_the_slash_or_with_more() -> None:
    text = b"d 0 40755 2 0 0 0 0.0 - - -\n//d/a 0 100644 1 0 0 0 0.0 - - -\n"
    root = parse_dumpfile(ROOT + text)
    assert [path for path, _ in walk(root)] == [b"/", b"/d", b"/d/a"]
    refuse(ROOT + text, "line 2: PATH", strict=True)


def link(path: bytes, target: bytes, mode: bytes = b"100644") -> bytes:
    return b"%s - @%s - - - - - %s - -\n" % (path, mode, target)


def test_hard_links_before_their_target_and_to_each_other() -> None:
    root = parse_dumpfile(ROOT + link(b"/c", b"/b") + link(b"/b", b"/a") + FILE + b"\n")
    node = root.children[b"a"]
    for name in (b"b", b"c"):
        child = root.children[name]
        assert isinstance(child, Link)
        assert child.inode is node


def test_a_long_chain_of_hard_links() -> None:
    names = range(20_000)
    chain = [link(b"/%d" % name, b"/%d" % (name + 1)) for name in names]
    end = b"/20000 0 100644 1 0 0 0 0.0 - - -\n"
    root = parse_dumpfile(ROOT + b"".join(chain) + end)
    assert all(isinstance(root.children[b"%d" % name], Link) for name in names)


def test_a_deep_tree() -> None:
    paths = [b"/d" * depth for depth in range(1, 1500)]
    lines = [b"%s 0 40755 2 0 0 0 0.0 - - -\n" % path for path in paths]
    text = b"".join([ROOT, *lines])
    assert len(list(format_tree(parse_dumpfile(text)))) == 1500


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (link(b"/a", b"/a"), "line 2: PAYLOAD: Self-referential hardlink /a"),
        (link(b"/a", b"/b") + link(b"/b", b"/a"), "Self-referential hardlink"),
        (
            link(b"/a", b"/b") + link(b"/b", b"/c") + link(b"/c", b"/b"),
            "line 4: PAYLOAD: Self-referential hardlink /b",
        ),
        (link(b"/a", b"/b"), "line 2: PAYLOAD: No target at /b for hardlink"),
        (link(b"/a", b"/b/c"), "No target at /b/c for hardlink"),
        (link(b"/a", b"-"), "No target path for the hardlink /a"),
        (link(b"/a", b""), "No target path for the hardlink /a"),
        (link(b"/a", b"/"), "Directories can't be hardlinked"),
        (link(b"/a", b"/d") + b"/d 0 40755 2 0 0 0 0.0 - - -\n", "Directories can't be hardlinked"),
        (link(b"/a", b"/b", b"40644"), "Directories can't be hardlinked"),
        (link(b"/a", b"/b", b"644"), "Invalid mode 644"),
    ],
)
def test_bad_hard_links(lines: bytes, words: str) -> None:
    refuse(ROOT + lines, words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "No files in dump file"),
        (b"\n", "line 1: PATH: Invalid empty path"),
        (ROOT + b"\n", "line 2: PATH: Invalid empty path"),
        (ROOT + ROOT, "line 2: PATH: Can't have multiple roots"),
        (FILE, "line 1: PATH: Root node not present"),
        (b"/ 0 100755 1 0 0 0 0.0 - - -", "Root must be a directory"),
        (link(b"/", b"/a"), "Root must be a directory"),
        (ROOT + FILE + b"\n" + FILE, "line 3: PATH: Can't add child /a"),
        (ROOT + b"/b/a 0 100644 1 0 0 0 0.0 - - -", "Parent directory missing for /b/a"),
        (ROOT + FILE + b"\n/a/b 0 100644 1", "Parent must be a directory for /a/b"),
        (ROOT + link(b"/a", b"/b") + b"/a/b 0 100644", "Parent must be a directory for /a/b"),
        (ROOT + b"/a/ 0 40755 2 0 0 0 0.0 - - -", "PATH"),
        (ROOT + FILE[:-1] + b"\0", "line 2: Invalid embedded NUL character at position 28"),
    ],
)
def test_bad_structure(data: bytes, words: str) -> None:
    refuse(data, words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"/a", "MODE: Invalid mode"),
        (b"/a x 100644 1 0 0 0 0.0 - - -", "line 2: SIZE: Invalid integer x"),
        (b"/a +5 100644 1 0 0 0 0.0 - - -", "SIZE: Invalid integer +5"),
        (b"/a -5 100644 1 0 0 0 0.0 - - -", "SIZE: Invalid integer -5"),
        (b"/a 18446744073709551616 20644 1 0 0 0 0.0 - - -", "SIZE: Invalid integer"),
        (b"/a " + b"9" * 5000 + b" 20644 1 0 0 0 0.0 - - -", "SIZE: Invalid integer"),
        (b"/a 0 8644 1 0 0 0 0.0 - - -", "MODE: Invalid mode 8644"),
        (b"/a 0 0o100644 1 0 0 0 0.0 - - -", "MODE: Invalid mode 0o100644"),
        (b"/a 0 170644 1 0 0 0 0.0 - - -", "MODE: Invalid mode 170644"),
        (b"/a 0 100644 4294967296 0 0 0 0.0 - - -", "NLINK: Invalid integer 4294967296"),
        (b"/a 0 100644 1 x 0 0 0.0 - - -", "UID: Invalid integer x"),
        (b"/a 0 100644 1 1 x 0 0.0 - - -", "GID: Invalid integer x"),
        (b"/a 0 100644 1 1 0 x 0.0 - - -", "RDEV: Invalid integer x"),
        (b"/a 0 100644 1 0 0 0 0 - - -", "MTIME: Invalid integer 0"),
        (b"/a 0 100644 1 0 0 0 0.1000000000 - - -", "MTIME: Invalid integer 0.1000000000"),
        (b"/a 0 100644 1 0 0 0 0.-1 - - -", "MTIME: Invalid integer 0.-1"),
        (b"/a 0 100644 1 0 0 0 9223372036854775808.0 - - -", "MTIME: Invalid integer"),
        (b"/a 4 100644 1 0 0 0 0.0 - abc -", "Invalid content size 3, must match size 4"),
        (b"/a 4 100644 1 0 0 0 0.0 -", "Invalid content size 0, must match size 4"),
        (b"/a 4 40755 2 0 0 0 0.0 - a -", "Invalid content size 1, must match size 4"),
        (b"/a 0 100644 1 0 0 0 0.0 - - abc", "DIGEST: digest 'abc'"),
        (b"/a 0 100644 1 0 0 0 0.0 - - " + b"zz" * 32, "DIGEST: digest"),
        (b"/a 0 100644 1 0 0 0 0.0 - - " + b"a\t" * 32, "DIGEST: digest"),
        (FILE + b"\r", "DIGEST: digest"),
        (b"/a 0 120777 1 0 0 0 0.0", "Invalid symlink"),
        (FILE + b" key", "Missing = in xattr key"),
        (FILE + b" a=b  c=d", "Missing = in xattr"),
        (FILE + b" =b", "Can't set xattr"),
        (rb"/a\x00b 0 100644 1 0 0 0 0.0 - - -", r"PATH: Invalid embedded NUL character"),
        (rb"/a 0 120777 1 0 0 0 0.0 a\x00 - -", "PAYLOAD: Invalid embedded NUL character"),
        (FILE + rb" k\x00=1", "xattrs: Invalid embedded NUL character"),
        (b"/a 0 100644 1 0 0 0 0.0 a\\ - -", "PAYLOAD: No character after escape"),
        (rb"/a 0 100644 1 0 0 0 0.0 a\x - -", "PAYLOAD: No hex characters after hex escape"),
        (rb"/a 0 100644 1 0 0 0 0.0 a\x1 - -", "Invalid hex characters after hex escape"),
        (rb"/a 0 100644 1 0 0 0 0.0 a\x+f - -", "Invalid hex characters after hex escape"),
        (rb"/a 0 100644 1 0 0 0 0.0 a\q - -", "Unsupported escape type q"),
    ],
)
def test_bad_lines(line: bytes, words: str) -> None:
    refuse(ROOT + line + b"\n", words)


def test_digests_of_one_length() -> None:
    lines = (
        b"/a 9 100644 1 0 0 0 0.0 x - " + b"ab" * 32 + b"\n"
        b"/b 9 100644 1 0 0 0 0.0 x - " + b"ab" * 64 + b"\n"
    )
    refuse(ROOT + lines, "line 3: DIGEST: 128 hex digits, 64 in the lines before")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"/a 0 100644 1 0 0 5 0.0 - - -", "RDEV"),
        (b"/a 5 120777 1 0 0 0 0.0 abc - -", "SIZE"),
        (b"/a 3 120777 1 0 0 0 0.0 abc def -", "CONTENT"),
        (b"/a 3 10644 1 0 0 0 0.0 - def -", "CONTENT"),
    ],
)
def test_strict_mode(line: bytes, words: str) -> None:
    parse(line)
    refuse(ROOT + line + b"\n", f"line 2: {words}: ", strict=True)


def test_strict_mode_wants_the_final_newline() -> None:
    parse_dumpfile(ROOT + FILE)
    refuse(ROOT + FILE, "line 2: missing final newline", strict=True)


def name_of(size: int) -> bytes:
    return b"/%s 0 100644 1 0 0 0 0.0 - - -\n" % (b"n" * size)


def target_of(size: int) -> bytes:
    return b"/a 0 120777 1 0 0 0 0.0 %s - -\n" % (b"n" * size)


def payload_of(size: int) -> bytes:
    return b"/a 9 100644 1 0 0 0 0.0 %s - -\n" % (b"n" * size)


def content_of(size: int) -> bytes:
    return b"/a %d 100644 1 0 0 0 0.0 - %s -\n" % (size, b"n" * size)


def file_of(size: int) -> bytes:
    return b"/a %d 100644 1 0 0 0 0.0 x - -\n" % size


def key_of(size: int) -> bytes:
    return FILE + b" %s=\n" % (b"k" * size)


def value_of(size: int) -> bytes:
    return FILE + b" user.a=%s\n" % (b"v" * size)


def xattr_text_of(size: int) -> bytes:
    """Return xattrs of ``size`` escaped bytes but few plain ones."""
    escapes, rest = divmod(size - len(b"k="), 4)
    return FILE + b" k=%s%s\n" % (rb"\x61" * escapes, b"v" * rest)


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (name_of, 255),
        (target_of, 4095),
        (payload_of, 4095),
        (content_of, 5000),
        (file_of, 2**53),
        (key_of, 255),
        (value_of, 32742),
        (xattr_text_of, 65535),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_limits(make: object, limit: int) -> None:
    assert callable(make)
    parse_dumpfile(ROOT + make(limit), strict=make is not target_of)
    refuse(ROOT + make(limit + 1), "line 2: ")


names = st.binary(min_size=1, max_size=12).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
u32 = st.integers(0, 2**32 - 1)
xattrs = st.dictionaries(
    st.binary(min_size=1, max_size=8).filter(lambda key: b"\0" not in key),
    st.binary(max_size=8),
    max_size=3,
)
digests = st.none() | st.binary(min_size=32, max_size=32).map(Digest)


@st.composite
def inodes(draw: st.DrawFn) -> Inode:
    kind = draw(st.sampled_from([stat.S_IFREG, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO]))
    inode: Inode
    if kind == stat.S_IFLNK:
        target = draw(st.binary(min_size=1, max_size=20).filter(lambda text: b"\0" not in text))
        inode = Symlink(mode=kind, target=target, size=len(target))
    elif kind == stat.S_IFREG:
        content = draw(st.none() | st.binary(min_size=1, max_size=20))
        digest = None if content else draw(digests)
        inode = Regular(
            mode=kind,
            content=content,
            size=len(content) if content else draw(st.integers(0, 2**53)),
            digest=digest,
            payload=digest.object_path if digest else None,
        )
    else:
        inode = Special(mode=kind, rdev=draw(u32) if kind == stat.S_IFCHR else 0)
    return inode


@st.composite
def trees(draw: st.DrawFn) -> Directory:
    root = Directory(mode=stat.S_IFDIR | 0o755)
    directories, leaves = [root], list[Inode]()
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from(directories))
        name = draw(names)
        if name in parent.children:
            continue
        kind = draw(st.sampled_from(["directory", "leaf", "link"]))
        if kind == "link" and leaves:
            parent.children[name] = Link(draw(st.sampled_from(leaves)))
            continue
        inode = Directory(mode=stat.S_IFDIR) if kind == "directory" else draw(inodes())
        inode.mode |= draw(st.integers(0, 0o7777))
        inode.uid, inode.gid, inode.xattrs = draw(u32), draw(u32), draw(xattrs)
        inode.mtime_sec = draw(st.integers(-(2**63), 2**63 - 1))
        inode.mtime_nsec = draw(st.integers(0, 999_999_999))
        parent.children[name] = inode
        if isinstance(inode, Directory):
            directories.append(inode)
        else:
            leaves.append(inode)
    return root


@settings(deadline=None)
@given(trees())
def test_a_printed_tree_is_read_back(root: Directory) -> None:
    text = b"".join(format_tree(root))
    again = parse_dumpfile(text, strict=True)
    assert describe(again) == describe(root)
    assert b"".join(format_tree(again)) == text


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_tree_or_our_error(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        parse_dumpfile(ROOT + data)
