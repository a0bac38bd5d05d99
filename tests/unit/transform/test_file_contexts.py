"""What a line of ``file_contexts`` matches.

Expectations that are not obvious were taken from composefs-rs 0.9.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from cfs.errors import FormatError
from cfs.transform.file_contexts import FileContexts, parse_substitutions


def contexts(text: str) -> FileContexts:
    result = FileContexts()
    result.add(text, "fc")
    return result


def matches(regex: str, path: bytes) -> bool:
    return contexts(f"{regex} x").find(path, b"-") == b"x"


@pytest.mark.parametrize(
    ("regex", "path"),
    [
        ("/usr/bin/a**b", b"/usr/bin/aab"),
        ("/usr/bin/a*+ab", b"/usr/bin/aab"),  # not possessive: an automaton has no such thing
        ("/usr/bin/[a-z]++b", b"/usr/bin/aab"),
        ("/usr/bin/(x|a)?+ab", b"/usr/bin/aab"),
        ("/usr/bin/a{1,2}+ab", b"/usr/bin/aab"),
        ("/usr/bin/a{1}{2}b", b"/usr/bin/aab"),
        ("/usr/^?", b"/usr/"),
        (r"/usr/\b+bin\B{0}", b"/usr/bin"),
        (r"/usr/bin/\x61++b", b"/usr/bin/aab"),
        (r"/usr/bin/\x{61}{2}b", b"/usr/bin/aab"),
        ("/usr/ä?", b"/usr/"),
        ("/usr/ä+", "/usr/ää".encode()),
        ("^/usr", b"/usr"),
        (r"/usr/lib/\[x\]", b"/usr/lib/[x]"),
        ("/usr/lib/[[]x]", b"/usr/lib/[x]"),
        ("/usr/x.y", b"/usr/x\ny"),
        ("/usr/(?=x)x[^a]y", b"/usr/x\ny"),
        (r"/usr/lib/a\.so|/A/B", b"/A/B"),
        ("(|/A/B)", b"/A/B"),
        ("/A(?i)/b", b"/A/B"),
        ("/usr/bin/[[:alpha:]]+", b"/usr/bin/aab"),
        ("/usr/bin/b?", b"/usr/bin/"),
        ("/usr/bin/b{0,1}", b"/usr/bin/"),
        ("/usr/ä", "/usr/ä".encode()),
        ("/usr/..", "/usr/ä".encode()),
    ],
)
def test_a_line_matches(regex: str, path: bytes) -> None:
    assert matches(regex, path)


@pytest.mark.parametrize(
    ("regex", "path"),
    [
        ("/usr", b"/usr/bin"),
        ("/bin", b"/usr/bin"),
        ("/usr$", b"/usr"),
        ("/usr/b|/usr", b"/usr/bx"),
        (r"/(b)\1", b"/bb"),
        ("/usr/(?=x)x.y", b"/usr/x\ny"),
        ("/usr/(?>a+)ab", b"/usr/aab"),
        ("/USR", b"/usr"),
        ("/usr/.", "/usr/ä".encode()),
        ("/usr/ä*", b"/usr/\xc3"),
    ],
)
def test_a_line_does_not_match(regex: str, path: bytes) -> None:
    assert not matches(regex, path)


def test_the_last_matching_line_wins() -> None:
    found = contexts("/usr/bin a\n/.* b\n/usr(/.*)? c\n/etc d\n")
    assert found.find(b"/usr/bin", b"-") == b"c"
    assert found.find(b"/etc", b"-") == b"d"
    assert found.find(b"/var", b"-") == b"b"


def test_lines_of_a_later_file_win() -> None:
    found = contexts("/usr/bin a\n")
    found.add("/usr.* b\n", "local")
    assert found.find(b"/usr/bin", b"-") == b"b"


def test_a_type_restricts_a_line() -> None:
    found = contexts("/x a\n/x -d b\n/x -- c\n/x -l <<none>>\n")
    assert [found.find(b"/x", kind) for kind in (b"p", b"d", b"-", b"l")] == [
        b"a",
        b"b",
        b"c",
        None,
    ]


def test_no_line_no_label() -> None:
    assert contexts("").find(b"/x", b"-") is None


def test_comments_and_blanks() -> None:
    found = contexts("\n# /x a\n  #\n\t/x\u2003b\r\n")
    assert found.find(b"/x", b"-") == b"b"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/x", "fc:2: '/x': expected REGEX"),
        ("/x\x1cc", "expected REGEX"),
        ("/x -- a b", "expected REGEX"),
        ("/x -q a", "expected REGEX"),
        ("/x - a", "expected REGEX"),
        ("/x --", "expected REGEX"),
        ("/x( a", "missing closing parenthesis"),
    ],
)
def test_malformed_lines(line: str, words: str) -> None:
    with pytest.raises(FormatError, match=words.replace("\\", ".")):
        contexts(f"# first\n{line}\n")


def test_an_expression_that_explodes_is_an_error() -> None:
    with pytest.raises(FormatError, match="limit"):
        matches("/(?:a|aa)+[xyz]", b"/" + b"a" * 60)


def test_threads_may_share_lines() -> None:
    """Each match of PCRE2 takes memory for itself."""
    shared = contexts("/(a|b)*(c|/)*(.*)x c\n")
    path = b"/" + b"ab" * 200 + b"x"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shared.find(path, b"-"), range(200)))
    assert found == [b"c"] * 200


def test_substitutions() -> None:
    assert parse_substitutions("/a /b\n# no\n\n/a /c\n", "subs") == {b"/a": b"/c"}
    for line in ("/a", "/a /b /c"):
        with pytest.raises(FormatError, match=r"subs:1: .* expected ALIAS ORIGINAL"):
            parse_substitutions(line, "subs")
