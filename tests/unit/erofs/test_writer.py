"""The writer against images of the C tool and of composefs-rs, and what it refuses."""

import copy
import gzip
import hashlib
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from cfs.digest import Digest
from cfs.dumpfile import parse_dumpfile
from cfs.erofs.writer import Rules, choose_version, write_image
from cfs.errors import CfsError, FormatError, InvalidRequestError
from cfs.tree import Child, Directory, Inode, Link, Regular, Special, Symlink, walk
from tests.paths import DATA, PUBLIC_DUMPS

needs_public_dumps = pytest.mark.skipif(
    not PUBLIC_DUMPS.is_dir(), reason="missing: public dumps in ../shared/data/dumps"
)


def sha256_of(
    dump: bytes,
    lowest: int = 0,
    highest: int = 1,
    rules: Rules = Rules.C,
) -> str:
    root = parse_dumpfile(dump)
    image = write_image(root, min_version=lowest, max_version=highest, rules=rules)
    assert len(image) % 4096 == 0
    return hashlib.sha256(image).hexdigest()


def read_dump(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


# public dumps: C's images


@needs_public_dumps
@pytest.mark.parametrize("sums", sorted(PUBLIC_DUMPS.glob("*.sha256")), ids=lambda path: path.stem)
def test_public_dump_gives_the_image_of_c(sums: Path) -> None:
    dump = sums.with_suffix("")
    versions = dump.with_name(dump.name + ".version")
    given = versions.read_text().split() if versions.exists() else ["0", "1"]
    expected = sums.read_text().split()[0]
    assert sha256_of(read_dump(dump), int(given[0]), int(given[-1])) == expected


# dumps2: all versions, both programs


def dumps2_cases() -> list[tuple[str, int, str, str]]:
    cases = []
    for line in (DATA / "dumps2" / "expected.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version, _, _, sha256, _, rust = line.split()
            cases.append((name, int(version), sha256, rust))
    return cases


def rust_cases() -> list[tuple[str, int, str]]:
    return [
        (name, version, sha256 if rust == "same" else rust.removeprefix("differs:"))
        for name, version, sha256, rust in dumps2_cases()
        # the parser keeps the last of several equal keys, as C does, composefs-rs the greatest
        if rust not in ("-", "refuses") and name != "duplicate-keys"
    ]


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        case[:3]
        for case in dumps2_cases()
        if case[2] != "-" and case[:2] != ("duplicate-keys", 2)  # as in rust_cases
    ],
)
def test_dumps2_gives_the_reference_image(name: str, version: int, expected: str) -> None:
    assert sha256_of((DATA / "dumps2" / f"{name}.dump").read_bytes(), version, version) == expected


@pytest.mark.parametrize(("name", "version", "expected"), rust_cases())
def test_rules_of_rust_give_its_image(name: str, version: int, expected: str) -> None:
    dump = (DATA / "dumps2" / f"{name}.dump").read_bytes()
    assert sha256_of(dump, version, version, rules=Rules.RUST).startswith(expected)


@pytest.mark.parametrize("name", ["links-long", "inline-large", "payloads-named"])
def test_version_2_refuses_what_it_cannot_hold(name: str) -> None:
    root = parse_dumpfile((DATA / "dumps2" / f"{name}.dump").read_bytes())
    with pytest.raises(FormatError, match=r"^/[^ ]+: .*image version"):
        write_image(root, min_version=2, max_version=2)


# format2.txt: public dumps in version 2


def without_file_suffix(dump: bytes) -> bytes:
    return dump.replace(b".file - -", b" - -")


def without_large_content(dump: bytes) -> bytes:
    lines = dump.splitlines(keepends=True)
    return b"".join(line for line in lines if not line.startswith(b"/inline-large"))


def without_rdev_of_root(dump: bytes) -> bytes:
    return dump.replace(b" 10 ", b" 0 ", 1)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "(a)": without_file_suffix,
    "(b)": without_large_content,
    "(c)": without_rdev_of_root,
}


def format2_cases() -> list[tuple[str, str, str]]:
    cases = []
    for line in (DATA / "images" / "format2.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, *rest = line.split()
            change = rest.pop(0) if rest[0] in CHANGES else ""
            cases.append((name, change, rest[1]))
    return cases


@needs_public_dumps
@pytest.mark.parametrize(("name", "change", "expected"), format2_cases())
def test_public_dump_gives_the_version_2_image_of_rust(
    name: str, change: str, expected: str
) -> None:
    dump = read_dump(PUBLIC_DUMPS / name)
    if change:
        dump = CHANGES[change](dump)
    assert sha256_of(dump, 2, 2) == expected


# small ones of the specification, 11.2: C's images

ROOT = "/ 0 40755 2 0 0 0 0.0 - - -\n"
EMPTY_FILE = "0 100644 1 0 0 0 0.0 - - -"
OBJECT = "35d02f81325122d77ec1d11baba655bc9bf8a891ab26119a41c50fa03ddfb408"
SHARED_FULL = (
    "security.selinux=l user.a=1 user.a2=\\xee trusted.b={name} "
    "system.posix_acl_access=q lustre.z=1"
)
LATE_NODE = """\
/a 0 40755 2 0 0 0 0.0 - - -
/a/l 0 @100644 1 0 0 0 0.0 /z - -
/z 3 100644 2 0 0 0 0.0 - abc -
"""
MANY_XATTRS = " ".join(f"user.x{number:03}=v" for number in range(130))

SMALL = {
    "empty": ("", "c3dc5b0fc4afb0693a95e017fe5815e1f88f204d485df617541b5ea659aefb8b"),
    "negative": (
        "/a 0 100644 1 0 0 0 -5.1 - - -\n",
        "da2b52d1588bc1d7de85e996f47aa5050109dfd0cac83ac22d521a19f6d63e0f",
    ),
    "whiteout": (
        "/wh 0 20644 1 0 0 0 0.0 - - -\n",
        "d7a36152a27a4b53c3486299824c16021d1c9737edf8109bc20df3adf9d34de5",
    ),
    "late-node": (
        LATE_NODE,
        "fec2d90b1b89f202a5c9f3f070bcdfdf69479dd76203e4eb678c511f28d4d50f",
    ),
    "shared": (
        "".join(f"/{name} {EMPTY_FILE} {SHARED_FULL.format(name=name)}\n" for name in "fg")
        + "".join(f"/{name} {EMPTY_FILE} user.a=22 user.a2=\\x00\\x00\n" for name in "hi"),
        "fbd3ec3e167589e44fe66ce6579f53cfe17cc2b48c61e14f83f82f4d4f9b6d16",
    ),
    "dir-300": (
        "".join(f"/f{number:03} {EMPTY_FILE}\n" for number in range(300)),
        "d4c32ccb1f93ef6345c42b96eb2eb6e28ec117209ae902fabc583626ca44e910",
    ),
    "link-pad": (
        "".join(f"/p{number:02} 0 10644 1 0 0 0 0.0 - - -\n" for number in range(60))
        + f"/s 1000 120777 1 0 0 0 0.0 {'a' * 1000} - -\n",
        "beea37877bd6b998f259aa22e514477a01b92b593a82519cfa865c515e107270",
    ),
    "two-chunks": (
        "/c 8796093022209 100644 1 0 0 0 0.0 - - -\n",
        "1432a8e946ec5a307500f5c0721515003bdd0391a3ae1b62e799d5419b30c75e",
    ),
    "shared-130": (
        f"/a {EMPTY_FILE} {MANY_XATTRS}\n/b {EMPTY_FILE} {MANY_XATTRS}\n",
        "909f43aa772c63399cdfe22c5b2a7cf02b13f9c39bbb83871f4514e5badbc9eb",
    ),
    "tail-pad": (
        "".join(f"/e{number:03} {EMPTY_FILE}\n" for number in range(10))
        + "".join(
            f"/t{number:02} 1500 100644 1 0 0 0 0.0 - {'x' * 1500} -\n" for number in range(8)
        ),
        "667b596e94d4c25932d2eaeccbbb8472b52f902b538207722c24a31e89a3eb99",
    ),
    "external": (
        f"/x 100000 100644 1 0 0 0 7.0 {OBJECT[:2]}/{OBJECT[2:]} - {OBJECT}\n",
        "0d0d19d6cdf2b2c7b2d02313bba5029fe85ab3c83b3dbe21984c35dba2d3fec9",
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_dump_gives_the_image_of_c(name: str) -> None:
    lines, expected = SMALL[name]
    assert sha256_of((ROOT + lines).encode()) == expected


def test_whiteout_in_version_0() -> None:
    dump = (ROOT + SMALL["whiteout"][0]).encode()
    expected = "b5a876f3580486d8db4993b4923178a3c022180389ae84a8cff6c8a3d0b130c8"
    assert sha256_of(dump, 0, 0) == expected


# pinned by composefs-rs, 11.3: fs-verity digests

OBJECT_5A = f"5a/{'5a' * 31} - {'5a' * 32}"
SIMPLE = f"""\
/blkdev 0 60000 1 0 0 123 0.0 - - -
/chrdev 0 20000 1 0 0 123 0.0 - - -
/fifo 0 10000 1 0 0 0 0.0 - - -
/regular-external 1234 100000 1 0 0 0 0.0 {OBJECT_5A}
/regular-inline 4 100000 1 0 0 0 0.0 - hihi -
/socket 0 140000 1 0 0 0 0.0 - - -
/symlink 7 120000 1 0 0 0 0.0 /target - -
"""


def verity_digest(image: bytes) -> str:
    """The sha256 fs-verity digest, by the kernel's documentation."""
    level = image
    while len(level) > 4096:
        blocks = (level[start : start + 4096] for start in range(0, len(level), 4096))
        level = b"".join(hashlib.sha256(block.ljust(4096, b"\0")).digest() for block in blocks)
    root = hashlib.sha256(level.ljust(4096, b"\0")).digest()
    descriptor = struct.pack("<BBBBIQ64s32s144s", 1, 1, 12, 0, 0, len(image), root, b"", b"")
    return hashlib.sha256(descriptor).hexdigest()


@pytest.mark.parametrize(
    ("lines", "version", "expected"),
    [
        ("", 0, "8f589e8f57ecb88823736b0d857ddca1e1068a23e264fad164b28f7038eb3682"),
        ("", 1, "14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63"),
        ("", 2, "086b702a519b57d6ef5aea6f8b3f2be24355cd1fb835cd80fb4e3d388b24d5a5"),
        (SIMPLE, 0, "9f3f5620ee0c54708516467d0d58741e7963047c7106b245d94c298259d0fa01"),
        (SIMPLE, 1, "ad6db6427568a1e4fdc772cbab7b6063f5eb4b33cb62982a740ba9213e5962b5"),
        (SIMPLE, 2, "a8fcd41f8b313bede69f462f2af0a38d64b99a6333f5df884ea9ab4037fac722"),
    ],
)
def test_image_digest_pinned_by_rust(lines: str, version: int, expected: str) -> None:
    root = parse_dumpfile((ROOT + lines).encode())
    image = write_image(root, min_version=version, max_version=version)
    assert verity_digest(bytes(image)) == expected


# choice of the version


@pytest.mark.parametrize(
    ("lowest", "highest", "has_whiteouts", "expected"),
    [
        (0, 1, False, 0),
        (0, 1, True, 1),
        (0, 0, True, 0),
        (1, 1, False, 1),
        (1, 0, False, 1),
        (2, 2, True, 2),
    ],
)
def test_version_choice(lowest: int, highest: int, has_whiteouts: bool, expected: int) -> None:  # noqa: FBT001
    assert choose_version(lowest, highest, has_whiteouts=has_whiteouts) == expected


@pytest.mark.parametrize(("lowest", "highest"), [(0, 2), (1, 2), (2, 1), (-1, 1), (0, -1), (3, 3)])
def test_version_out_of_range_is_refused(lowest: int, highest: int) -> None:
    with pytest.raises(InvalidRequestError, match="image version"):
        write_image(directory(), min_version=lowest, max_version=highest)


# refusals


def directory(**children: Child) -> Directory:
    named = {name.encode(): child for name, child in children.items()}
    return Directory(mode=stat.S_IFDIR | 0o755, children=named)


def regular(size: int = 0, **fields: object) -> Regular:
    return Regular(mode=stat.S_IFREG | 0o644, size=size, **fields)  # type: ignore[arg-type]


def fifo(**fields: object) -> Special:
    return Special(mode=stat.S_IFIFO, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("child", "message"),
    [
        (Special(mode=0o644), "mode 644: expected a valid file type"),
        (Symlink(mode=stat.S_IFLNK, target=b""), "target of 0 bytes"),
        (Symlink(mode=stat.S_IFLNK, target=b"x" * 4096), "target of 4096 bytes"),
        (regular(5001, content=b"x" * 5001), "content of 5001 bytes"),
        (regular(2, content=b"x"), "content of 1 bytes"),
        (regular(1, payload=b"x" * 4096), "payload of 4096 bytes"),
        (regular((1 << 53) + 1), "size 9007199254740993"),
        (Symlink(mode=stat.S_IFLNK, target=b"a\0b"), "target .*: expected no nul"),
        (regular(xattrs={b"": b""}), "xattr name of 0 bytes"),
        (regular(xattrs={b"user.a\0b": b""}), "xattr name .*: expected no nul"),
        (regular(xattrs={b"u" * 256: b""}), "xattr name of 256 bytes"),
        (regular(xattrs={b"user.a": b"x" * 32743}), "xattrs of 32768 bytes"),
        (regular(uid=1 << 32), "uid 4294967296"),
        (regular(gid=-1), "gid -1"),
        (fifo(rdev=1 << 32), "rdev 4294967296"),
        (regular(mtime_sec=1 << 63), "mtime_sec 9223372036854775808"),
    ],
)
def test_inode_without_a_form_is_refused_with_its_path(child: Inode, message: str) -> None:
    with pytest.raises(FormatError, match=f"^/d/x: {message}"):
        write_image(directory(d=directory(x=child)))


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0", b"n" * 256])
def test_name_without_a_form_is_refused(name: bytes) -> None:
    inner = Directory(mode=stat.S_IFDIR, children={name: regular(), b"ok": regular()})
    with pytest.raises(FormatError, match=r"^/d: name"):
        write_image(directory(d=inner))


def test_largest_allowed_xattrs_are_accepted() -> None:
    write_image(directory(x=regular(xattrs={b"user.a": b"x" * 32742})))


def test_class_and_mode_must_agree() -> None:
    with pytest.raises(InvalidRequestError, match=r"^/x: Special of mode"):
        write_image(directory(x=Special(mode=stat.S_IFREG)))


def test_root_must_be_a_directory() -> None:
    with pytest.raises(CfsError, match=r"^/: "):
        write_image(regular())  # type: ignore[arg-type]


def test_inode_standing_twice_is_refused() -> None:
    file = regular()
    with pytest.raises(InvalidRequestError, match="stands in the tree twice"):
        write_image(directory(a=file, b=file))


def test_directory_in_itself_is_refused() -> None:
    inner = directory()
    inner.children[b"again"] = inner
    with pytest.raises(InvalidRequestError, match="stands in the tree twice"):
        write_image(directory(d=inner))


def test_hard_link_to_a_directory_is_refused() -> None:
    inner = directory()
    with pytest.raises(FormatError, match=r"^/l: hard link to a directory"):
        write_image(directory(d=inner, l=Link(inner)))


@pytest.mark.parametrize("version", [0, 1, 2])
def test_hard_link_out_of_the_tree_is_refused(version: int) -> None:
    with pytest.raises(InvalidRequestError, match=r"^/l: hard link out of the tree"):
        write_image(directory(l=Link(regular())), min_version=version, max_version=version)


@pytest.mark.parametrize(("version", "rules"), [(1, Rules.RUST), (2, Rules.C)])
def test_more_references_than_the_count_holds_are_refused(version: int, rules: Rules) -> None:
    xattrs = {b"user.%d" % number: b"" for number in range(256)}
    root = directory(a=regular(xattrs=xattrs), b=regular(xattrs=xattrs))
    with pytest.raises(FormatError, match=r"^/a: 256 shared xattrs"):
        write_image(root, min_version=version, max_version=version, rules=rules)


def test_digest_without_payload_is_refused_in_version_2() -> None:
    root = directory(x=regular(10, digest=Digest(bytes(32))))
    with pytest.raises(FormatError, match=r"^/x: digest without payload"):
        write_image(root, min_version=2, max_version=2)


def test_digest_alone_is_enough_in_version_1() -> None:
    write_image(directory(x=regular(10, digest=Digest(bytes(32)))), min_version=1)


# the rest


def test_root_whiteout_that_looks_like_a_stub() -> None:
    whiteout = Special(mode=stat.S_IFCHR | 0o644)
    assert write_image(
        Directory(mode=stat.S_IFDIR | 0o755, children={b"7f": whiteout}), rules=Rules.RUST
    ) == write_image(directory())
    escaped = write_image(Directory(mode=stat.S_IFDIR | 0o755, children={b"7f": whiteout}))
    assert b"overlay.overlay.whiteout" in escaped


@pytest.mark.parametrize("value", [b"a", b"y"])
def test_marker_beside_one_of_the_same_name_in_the_order_of_values(value: bytes) -> None:
    """As composefs-rs, which keeps both; C replaces the one of the user."""
    root = directory(d=directory(w=Special(mode=stat.S_IFCHR)))
    holder = root.children[b"d"]
    assert isinstance(holder, Directory)
    holder.xattrs = {b"trusted.overlay.opaque": value}
    image = write_image(root, min_version=1, max_version=1, rules=Rules.RUST)
    found = re.findall(rb"overlay\.overlay\.opaque(.)", bytes(image))
    assert found == sorted([value, b"x"])


@pytest.mark.parametrize(("version", "rules"), [(0, Rules.C), (1, Rules.RUST), (2, Rules.C)])
def test_tree_is_not_changed(version: int, rules: Rules) -> None:
    dump = (DATA / "dumps2" / "whiteouts-markers.dump").read_bytes()
    root = parse_dumpfile(dump)
    file = regular(xattrs={b"trusted.overlay.opaque": b"y"})
    root.children[b"zz"] = file
    root.children[b"links"] = directory(a=Link(file), b=Link(file))
    before = [(path, fields_of(child)) for path, child in walk(root)]
    write_image(root, min_version=version, max_version=version, rules=rules)
    assert [(path, fields_of(child)) for path, child in walk(root)] == before


def fields_of(child: Child) -> list[object]:
    if isinstance(child, Link):
        return [id(child.inode)]
    slots = [name for cls in type(child).__mro__ for name in getattr(cls, "__slots__", ())]
    return [
        sorted((key, id(below)) for key, below in child.children.items())
        if name == "children" and isinstance(child, Directory)
        else copy.deepcopy(getattr(child, name))
        for name in slots
    ]


def test_very_deep_tree_does_not_recurse() -> None:
    root = leaf = directory()
    for _ in range(3000):
        below = directory()
        leaf.children[b"d"] = below
        leaf = below
    leaf.children[b"l"] = Link(file := regular())
    leaf.children[b"m"] = file
    for version in (0, 1, 2):
        assert write_image(root, min_version=version, max_version=version)
