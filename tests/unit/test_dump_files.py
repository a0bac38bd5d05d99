"""Lines of single files of an image, as ``cfsctl dump-files`` prints them."""

import pytest

from cfs.dumpfile import format_backing_path, format_file, parse_dumpfile
from cfs.erofs import View, parse_image
from cfs.erofs.writer import Rules, write_image
from cfs.errors import CfsError, FormatError, InvalidRequestError, NotFoundError
from cfs.fsverity import compute_digest
from cfs.inodes import InodeVector

DIGEST = str(compute_digest(b"x" * 100))
OBJECT = f"{DIGEST[:2]}/{DIGEST[2:]}"
USR = "/usr 0 40755 3 1 2 0 1000.5 - - - user.a=1\n"
DIRECTORY = "/usr/d 0 40700 2 0 0 0 1.0 - - -\n"
FILE = f"/usr/d/f 100 100644 3 0 0 0 7.0 {OBJECT} - {DIGEST}"
ZERO = "/usr/zero 0 20644 1 0 0 259 7.0 - - -\n"
LINK = "/usr/l 4 120777 1 0 0 0 2.0 to/x - -\n"
DUMP = (
    "/ 4096 40755 3 0 0 0 1000.5 - - -\n"
    f"{USR}{DIRECTORY}{FILE} user.b=2 user.a=1\n"
    "/usr/d/same 0 @120000 - - - - 0.0 /usr/d/f - -\n"
    "/usr/inline\\n 3 100644 1 0 0 0 3.000000009 - a\\nb -\n"
    f"{LINK}/usr/z 0 @120000 - - - - 0.0 /usr/d/f - -\n{ZERO}"
)


@pytest.fixture(scope="module", params=[0, 1, 2])
def vector(request: pytest.FixtureRequest) -> InodeVector:
    version = request.param
    root = parse_dumpfile(DUMP.encode())
    image = write_image(root, min_version=version, max_version=version, rules=Rules.RUST)
    return parse_image(bytes(image), "image", view=View.TREE)


def dump(vector: InodeVector, path: bytes) -> str:
    return b"".join(format_file(vector, path)).decode()


def test_kinds_of_files(vector: InodeVector) -> None:
    is_v2 = vector.version == 2  # without fractions of seconds
    assert dump(vector, b"/usr/d/f") == f"{FILE} user.a=1 user.b=2\n"
    assert dump(vector, b"/usr/l") == LINK
    assert dump(vector, b"/usr/zero") == ZERO
    nsec = 0 if is_v2 else 9
    assert dump(vector, b"/usr/inline\n") == (
        f"/usr/inline\\n 3 100644 1 0 0 0 3.{nsec} - a\\nb -\n"
    )


def test_a_further_name_given_by_itself_is_a_full_line(vector: InodeVector) -> None:
    line = dump(vector, b"/usr/z")
    assert line == f"{FILE} user.a=1 user.b=2\n".replace("/usr/d/f", "/usr/z", 1)


def test_a_directory_with_all_that_is_below_it(vector: InodeVector) -> None:
    lines = dump(vector, b"/usr").splitlines()
    assert [line.split()[0] for line in lines] == [
        "/usr", "/usr/d", "/usr/d/f", "/usr/d/same", "/usr/inline\\n", "/usr/l", "/usr/z",
        "/usr/zero",
    ]  # fmt: skip
    assert lines[3] == "/usr/d/same 0 @120000 - - - - 0.0 /usr/d/f - -"
    assert lines[6] == "/usr/z 0 @120000 - - - - 0.0 /usr/d/f - -"


def test_the_root(vector: InodeVector) -> None:
    assert [line.split()[0] for line in dump(vector, b"/").splitlines()[:3]] == [
        "/", "/usr", "/usr/d",
    ]  # fmt: skip


def test_paths_are_printed_as_given(vector: InodeVector) -> None:
    assert dump(vector, b"usr/l").startswith("usr/l 4 ")
    assert dump(vector, b"usr//d/").splitlines()[1].startswith("usr//d/f ")
    assert dump(vector, b"usr/d/").startswith("usr/d/ 0 40700 ")


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        (b"/nope", NotFoundError, "/nope not found"),
        (b"/nope/x", NotFoundError, "/nope/x not found: nope does not exist"),
        (b"/usr/l/x", FormatError, "l is not a directory"),
        (b"/usr/../usr", InvalidRequestError, "'..' is not allowed"),
    ],
)
def test_errors(vector: InodeVector, path: bytes, kind: type[CfsError], words: str) -> None:
    for format_path in (dump, format_backing_path):
        with pytest.raises(kind, match=words):
            format_path(vector, path)


def test_backing_paths(vector: InodeVector) -> None:
    assert format_backing_path(vector, b"usr/z") == f"usr/z {OBJECT}\n".encode()
    for name in (b"l", b"zero", b"inline\n"):
        assert format_backing_path(vector, b"/usr/" + name) == b"/usr/%s inline\n" % name
    with pytest.raises(InvalidRequestError, match="/usr/d is a directory"):
        format_backing_path(vector, b"/usr/d")


def test_marks_of_whiteouts_are_not_shown() -> None:
    """Whoever set them, as in composefs-rs."""
    lines = [
        "/ 4096 40755 3 0 0 0 1.0 - - -",
        "/d 0 40755 2 0 0 0 1.0 - - - trusted.overlay.origin=o",
        "/d/w 0 20644 1 0 0 0 1.0 - - -",
    ]
    root = parse_dumpfile("\n".join([*lines, ""]).encode())
    image = write_image(root, min_version=1, max_version=1, rules=Rules.RUST)
    vector = parse_image(bytes(image), "image", view=View.TREE)
    shown = "/d 0 40755 2 0 0 0 1.0 - - - trusted.overlay.origin=o"
    assert dump(vector, b"/d").splitlines() == [shown, lines[2]]
