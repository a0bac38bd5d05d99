"""SELinux's ``file_contexts``: from lines of text to the label of a path.

Specification: repository 6.7, 3 to 6; file_contexts(5) for the files.  The last matching line
wins, as in composefs-rs; libselinux sorts by specificity.  Pure.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from cfs.errors import FormatError
from cfs.transform.pcre import Pattern

__all__ = ["BLANKS", "FileContexts", "parse_substitutions"]

BLANKS = (
    "\t\n\v\f\r \x85\xa0\u1680"
    "\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""White space by Unicode; Python's ``str.split`` takes 0x1C to 0x1F for it as well."""

_BETWEEN_FIELDS = re.compile(f"[{BLANKS}]+")
_TYPES = ("-b", "-c", "-d", "-p", "-l", "-s", "--")
_NO_CONTEXT = "<<none>>"

_COUNT = rb"\{[0-9]+,?[0-9]*\}"
_REPETITION = re.compile(rb"(?:[*+?]|%s)\??" % _COUNT)
# an escaped byte, a class, a repetition, the beginning of a group, any other character
_TOKEN = re.compile(
    rb"\\x(?:[0-9A-Fa-f]{2}|\{[0-9A-Fa-f]+\})|\\.|\[\^?\]?(?:\[:[a-z^]+:\]|\\.|[^\]\\])*\]"
    rb"|(?:[*+?]|%s)\??|\(\?|[\xc2-\xf4][\x80-\xbf]+|." % _COUNT,
    re.DOTALL,
)
_ANCHORS = frozenset((b"^", b"$", rb"\b", rb"\B", rb"\A", rb"\z"))
_SPECIAL = frozenset(bytes([byte]) for byte in rb"^$.|?*+()[]{}\\")
# what no automaton can do: composefs-rs gives these to PCRE2, with its default for the dot
_BEYOND_AUTOMATON = re.compile(rb"\(\?(?:<?[=!]|>)|\\[1-9]")


class FileContexts:
    """The lines of a policy, which give each path its label."""

    def __init__(self) -> None:
        # by the literal bytes that the regular expression begins with: most lines need no look
        self._lines: dict[bytes, list[_Line]] = defaultdict(list)
        self._sizes: list[int] = []
        self._nr_lines = 0

    def add(self, text: str, name: str) -> None:
        """Add the lines of a file, which win over those before.

        Args:
            text: its content.
            name: for messages.

        Raises:
            FormatError: a line is malformed.
            UnsupportedError: PCRE2 is not installed.
        """
        for where, fields in _split_lines(text, name):
            match fields:
                case [regex, context] if not context.startswith("-"):
                    kind = ""
                case [regex, kind, context] if kind in _TYPES:
                    pass
                case _:
                    msg = f"{where}: {' '.join(fields)!r}: expected REGEX [-TYPE] CONTEXT"
                    raise FormatError(msg)
            try:
                line = _Line(self._nr_lines, regex.encode(), kind[1:].encode(), context)
            except FormatError as error:
                msg = f"{where}: {error}"
                raise FormatError(msg) from None
            self._nr_lines += 1
            self._lines[_literal_start(line.expression)].append(line)
        self._sizes = sorted(set(map(len, self._lines)))

    def find(self, path: bytes, kind: bytes) -> bytes | None:
        """Return the label of a path, or None if it is to have none.

        Args:
            path: absolute path.
            kind: one character for the file type, as ``ls -l`` shows it.

        Raises:
            FormatError: a regular expression takes too long.
        """
        candidates = [
            line
            for size in self._sizes
            if size <= len(path)
            for line in self._lines.get(path[:size], ())
            if line.kind in (b"", kind)
        ]
        key = path + kind
        for line in sorted(candidates, key=_number_of, reverse=True):
            if line.pattern.matches(key):
                return line.context
        return None


class _Line:
    """One specification line, compiled."""

    __slots__ = ("context", "expression", "kind", "number", "pattern")

    def __init__(self, number: int, expression: bytes, kind: bytes, context: str) -> None:
        self.number = number
        self.expression = expression
        self.kind = kind
        self.context = None if context == _NO_CONTEXT else context.encode()
        is_plain = _BEYOND_AUTOMATON.search(expression) is None
        if is_plain:
            expression = _group_repetitions(expression)
        self.pattern = Pattern(
            b"^(%s)%s$" % (expression, kind or b"."), dot_matches_newline=is_plain
        )


def _number_of(line: _Line) -> int:
    return line.number


def parse_substitutions(text: str, name: str) -> dict[bytes, bytes]:
    """Return what stands for which alias in a ``file_contexts.subs`` or ``.subs_dist``.

    Raises:
        FormatError: a line is malformed.
    """
    substitutions = {}
    for where, fields in _split_lines(text, name):
        try:
            alias, original = fields
        except ValueError:
            msg = f"{where}: {' '.join(fields)!r}: expected ALIAS ORIGINAL"
            raise FormatError(msg) from None
        substitutions[alias.encode()] = original.encode()
    return substitutions


def _split_lines(text: str, name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield where each line is, and its fields; without empty lines and comments."""
    for number, line in enumerate(text.split("\n"), start=1):
        fields = [field for field in _BETWEEN_FIELDS.split(line) if field]
        if fields and not fields[0].startswith("#"):
            yield f"{name}:{number}", fields


def _literal_start(expression: bytes) -> bytes:
    """Return bytes that all paths begin with which an expression matches."""
    tokens = _TOKEN.findall(expression)
    if _has_alternatives(tokens):
        return b""
    literal: list[bytes] = []
    for token in tokens:
        if token >= b"\x80" or (len(token) == 1 and token not in _SPECIAL):
            literal.append(token)
        elif token[:1] == b"\\" and len(token) == 2 and not token[1:].isalnum():  # noqa: PLR2004
            literal.append(token[1:])
        else:
            if token[:1] in (b"?", b"*", b"+", b"{"):
                del literal[-1:]
            break
    return b"".join(literal)


def _has_alternatives(tokens: Iterable[bytes]) -> bool:
    depth = 0
    for token in tokens:
        depth += (token in (b"(", b"(?")) - (token == b")")
        if token == b"|" and depth <= 0:
            return True
    return False


def _group_repetitions(expression: bytes) -> bytes:
    """Put into groups what is repeated although PCRE2 would not, or in another way.

    To an automaton ``a++`` is ``(a+)+``, an anchor may be repeated like anything else, and a
    character beyond ASCII is repeated as a whole, not its last byte.
    """
    pieces: list[bytes] = []
    groups: list[int] = []  # where the groups begin that are open
    start = 0  # where what a repetition repeats begins
    is_repeated = False  # or an anchor
    for token in _TOKEN.findall(expression):
        if _REPETITION.fullmatch(token):
            if is_repeated:
                pieces.insert(start, b"(?:")
                pieces.append(b")")
            is_repeated = True
        else:
            start = len(pieces)
            is_repeated = token in _ANCHORS
            if token in (b"(", b"(?"):
                groups.append(start)
            elif token == b")" and groups:
                start = groups.pop()
        is_long = token >= b"\x80" and len(token) > 1
        pieces.append(b"(?:%b)" % token if is_long else token)
    return b"".join(pieces)
