"""Headers of tar: any bytes give entries or one clear error, and the fast ways are right."""

import io
import random
import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs.errors import FormatError, UnsupportedError
from cfs.oci.pax import parse_extended
from cfs.oci.tar import BLOCK_SIZE, Entry, Kind, make_absolute, padded, read_entry
from tests.oci_cases import case_layers

KINDS = {
    tarfile.REGTYPE: Kind.REGULAR,
    tarfile.LNKTYPE: Kind.HARDLINK,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.CHRTYPE: Kind.CHARACTER,
    tarfile.BLKTYPE: Kind.BLOCK,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.FIFOTYPE: Kind.FIFO,
}
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300)
FORMATS = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)


def read_all(tar: bytes) -> list[tuple[Entry, bytes]]:
    stream = io.BytesIO(tar)
    found = []
    while entry := read_entry(stream.read):
        contents = stream.read(padded(entry.size))
        if len(contents) < padded(entry.size):
            msg = "contents end early"
            raise FormatError(msg)
        found.append((entry, contents[: entry.size]))
    return found


def header(**changes: bytes) -> bytes:
    """Return a ustar header of a file; changes by name of the field."""
    fields = {
        "name": (b"file", 100),
        "mode": (b"0000644\0", 8),
        "uid": (b"0000000\0", 8),
        "gid": (b"0000000\0", 8),
        "size": (b"00000000000\0", 12),
        "mtime": (b"00000000000\0", 12),
        "checksum": (b" " * 8, 8),
        "flag": (b"0", 1),
        "target": (b"", 100),
        "magic": (b"ustar\x0000", 8),
        "names": (b"", 64),
        "major": (b"", 8),
        "minor": (b"", 8),
        "prefix": (b"", 167),
    }
    data = b"".join(
        changes.get(name, value).ljust(size, b"\0") for name, (value, size) in fields.items()
    )
    assert len(data) == BLOCK_SIZE
    return data[:148] + b"%06o\0 " % sum(data) + data[156:]


@settings(deadline=None)  # others use the machine
@given(
    kind=st.sampled_from(list(KINDS)),
    name=NAMES,
    target=NAMES,
    data=st.binary(max_size=2000),
    owner=st.tuples(*[st.integers(0, (1 << 32) - 1)] * 2),
    mode=st.integers(0, 0o7777),
    mtime=st.integers(0, 1 << 40),
    form=st.sampled_from(FORMATS),
)
def test_what_python_writes(
    *,
    kind: bytes,
    name: str,
    target: str,
    data: bytes,
    owner: tuple[int, int],
    mode: int,
    mtime: int,
    form: int,
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.mtime = kind, mode, mtime
    member.uid, member.gid = owner
    if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        member.linkname = target
    if kind == tarfile.REGTYPE:
        member.size = len(data)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, encoding="utf-8") as archive:
        archive.addfile(member, io.BytesIO(data))
    [(entry, contents)] = read_all(stream.getvalue())
    assert (entry.kind, entry.flag) == (KINDS[kind], kind)
    assert entry.path.rstrip(b"/") == name.encode().rstrip(b"/")  # slashes come and go
    assert entry.target == member.linkname.encode()
    assert (entry.mode, entry.uid, entry.gid, entry.mtime_sec) == (mode, *owner, mtime)
    assert contents == (data if kind == tarfile.REGTYPE else b"")


@settings(deadline=None)  # others use the machine
@given(st.binary(min_size=BLOCK_SIZE, max_size=BLOCK_SIZE))
def test_checksum_is_the_sum(block: bytes) -> None:
    """The sum of a header is computed from two Adler-32 checksums."""
    low, high = (zlib.adler32(half) & 0xFFFF for half in (block[:256], block[256:]))
    assert low + high - 2 == sum(block)


def test_checksum_of_the_largest_header() -> None:
    full = b"\xff" * 167
    data = header(prefix=full, name=b"\xff" * 100, target=b"\xff" * 100, names=b"\xff" * 64)
    assert read_all(data + bytes(1024))[0][0].path == b"\xff" * 155 + b"/" + b"\xff" * 100


@pytest.mark.parametrize(
    ("field", "number"),
    [
        (b"0000644\0", 0o644),
        (b"0000644 ", 0o644),
        (b"  644\0xx", 0o644),
        (b"\t+644\v\f\r", 0o644),
        (b"77777777", 0o77777777),
        (b"", 0),
        (b" " * 8, 0),
        (b"\x80" + bytes(5) + b"\1\2", 0x0102),
        (b"\xff" * 8, 0xFFFFFFFF),
    ],
)
def test_numbers(field: bytes, number: int) -> None:
    assert read_all(header(uid=field))[0][0].uid == number


@pytest.mark.parametrize(
    "field", [b"1_0", b"0o10", b"-1", b"8", b"1 1", b"++1", b"+", b"1\xa0", b"x"]
)
def test_what_is_no_number(field: bytes) -> None:
    for name in ("mode", "uid", "gid", "size", "mtime", "major", "minor"):
        with pytest.raises(FormatError, match="is no octal number"):
            read_all(header(**{name: field}))


def test_negative_time() -> None:
    assert read_all(header(mtime=b"\xff" * 12))[0][0].mtime_sec == -1


@pytest.mark.parametrize(
    "size", [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + bytes(3) + b"\x80" + bytes(7)]
)
def test_size_that_no_file_has(size: bytes) -> None:
    with pytest.raises(FormatError, match="invalid size"):
        read_all(header(size=size))


def test_declared_size_is_not_allocated() -> None:
    for flag in b"0", b"x", b"L", b"g":
        with pytest.raises(FormatError):
            read_all(header(size=b"\x80" + bytes(3) + b"\x7f" + bytes(7), flag=flag)[:-1] + b"\0")


def test_sparse_file_is_unsupported() -> None:
    with pytest.raises(UnsupportedError):
        read_all(header(flag=b"S", magic=b"ustar  \0"))
    [(entry, _)] = read_all(header(flag=b"S", magic=b"", major=b"junk"))
    assert (entry.kind, entry.flag, entry.rdev) == (Kind.UNKNOWN, b"S", None)


@pytest.mark.parametrize(
    ("path", "absolute"),
    [
        (b"usr/", b"/usr"),
        (b"/usr", b"/usr"),
        (b"//usr//", b"//usr"),
        (b"./", b"/."),
        (b"/", b""),
        (b"", b""),
        (b"///", b""),
    ],
)
def test_absolute_paths(path: bytes, absolute: bytes) -> None:
    assert make_absolute(path) == absolute


@settings(deadline=None)  # others use the machine
@given(st.binary(max_size=300))
def test_any_extended_header(data: bytes) -> None:
    try:
        parse_extended(data)
    except (FormatError, UnsupportedError):
        return


@settings(deadline=None)  # others use the machine
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [b"path", b"size", b"uid", b"mtime", b"SCHILY.xattr.user.a", b"comment"]
                + [
                    b"GNU.sparse." + key
                    for key in (b"major", b"minor", b"offset", b"numbytes", b"map")
                ]
            ),
            st.sampled_from(
                [b"", b"0", b"1", b"1.5", b"+7", b"99999999999999999999", b"\xff", b"a=b\nc"]
            ),
        )
    ),
    st.binary(max_size=5),
)
def test_records(records: list[tuple[bytes, bytes]], rest: bytes) -> None:
    try:
        found = parse_extended(b"".join(record(*each) for each in records) + rest)
    except (FormatError, UnsupportedError):
        return
    paths = [value for key, value in records if key == b"path"]
    assert found.path == (paths[-1] if paths else None)


def record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    size = rest + len(str(rest))
    size = rest + len(str(size))
    return b"%d %b=%b\n" % (size, key, value)


def test_long_numbers_are_no_trouble() -> None:
    assert parse_extended(record(b"uid", b"0" * 9000 + b"7")).uid == 7
    with pytest.raises(FormatError, match="invalid value"):
        parse_extended(record(b"uid", b"7" * 9000))
    assert parse_extended(b"9" * 9000 + b" path=x\n").path is None


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (b"5", (5, 0)),
        (b"5.", (5, 0)),
        (b"5.5", (5, 500_000_000)),
        (b"5.123456789123", (5, 123_456_789)),
        (b"1.+5", (1, 50_000_000)),
        (b"1.5.5", (1, 0)),
        (b"1.x", (1, 0)),
        (b"18446744073709551615", (18446744073709551615, 0)),
    ],
)
def test_times(time: bytes, expected: tuple[int, int]) -> None:
    found = parse_extended(record(b"mtime", time))
    assert (found.mtime_sec, found.mtime_nsec) == expected


def test_damaged_layers() -> None:
    """Anything comes, but nothing other than our errors."""
    draw = random.Random(6)
    layers = [layer for layer in case_layers().values() if 0 < len(layer) < 1 << 16]
    messages = []
    for _ in range(3000):
        layer = bytearray(draw.choice(layers))
        for _ in range(draw.randint(1, 3)):
            layer[draw.randrange(len(layer))] = draw.choice(
                (0, 0x20, 0x37, 0x80, 0xFF, draw.randrange(256))
            )
        if draw.random() < 0.5:
            mend(layer, draw.randrange(len(layer)) // BLOCK_SIZE * BLOCK_SIZE)
        try:
            read_all(bytes(layer[: draw.choice((len(layer), draw.randrange(len(layer) + 1)))]))
        except (FormatError, UnsupportedError) as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)


def mend(layer: bytearray, off: int) -> None:
    """Make the checksum of a block right, so that what was damaged is looked at."""
    layer[off + 148 : off + 156] = b" " * 8
    layer[off + 148 : off + 156] = b"%06o\0 " % sum(layer[off : off + BLOCK_SIZE])
