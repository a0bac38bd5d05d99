"""Parameters, replies and bytes at random, as the interfaces declare them or not at all."""

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import varlink.scanner  # type: ignore[import-untyped]

from cfs.linux.framing import close_all

Json = dict[str, Any]
_scanner = varlink.scanner
_ENDS = (0, 1, 2, 3, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
_TEXTS = (
    "", "a\0b", "..", ".", "../..", "refs/", "refs/../x", "x" * 255, "x" * 256, "x" * 5000,
    "a/" * 300, "/dev/null", "/dev/zero", "/proc/self/mem", "/proc/self/fd", "@", "@sha256:",
    "sha256:" + "0" * 64, "sha256:" + "g" * 64, "sha512:" + "0" * 128, "md5:00", "0" * 64,
    "0" * 128, "\x1b[2J\x07", "\u202e\U0001f4a9", "a\nb", "%s{0}{name}", "-", "--help", "oci:",
    "oci:/dev/null", "oci:none:x", "oci-archive:/dev/zero", "docker-archive:/dev/null", "dir:.",
    "{}", "[" * 2000, "containers-storage:x", "fsverity-sha256-12", "fsverity-sha256-99999999999",
    "auto", "zerocopy",
)  # fmt: skip
_WRONG: tuple[Any, ...] = (
    None, True, False, -1, 1 << 64, 10**40, 1.0, 1e300, 0.5, "", "7", [], {}, [None], [[[]]],
    {"a": {"b": {}}}, "x" * 70_000, "a/" * 40_000, json.loads("[" * 60 + "]" * 60),
)  # fmt: skip
_RARELY, _OFTEN = 0.03, 0.85


class Draw:
    """A source of values.

    Args:
        seed: from which the same values come again.
        known: by the name of a parameter, values that mean something to the other side.
    """

    def __init__(self, seed: object, known: Mapping[str, Sequence[Any]] | None = None) -> None:
        self.random = random.Random(str(seed))
        self.known = {name: list(values) for name, values in (known or {}).items()}

    def happens(self, probability: float) -> bool:
        return self.random.random() < probability

    def members(self, interface: Any, fields: Mapping[str, Any]) -> Json:
        """Return what a structure has, mostly as declared."""
        members = {
            name: self._member(interface, name, kind)
            for name, kind in fields.items()
            if not self.happens(_RARELY) and not (_is_optional(kind) and self.happens(0.5))
        }
        if self.happens(_RARELY):
            members[self.random.choice(("more", "x", "handle", ""))] = self.random.choice(_WRONG)
        return members

    def _member(self, interface: Any, name: str, kind: Any) -> Any:
        if self.happens(_RARELY):
            return self.random.choice(_WRONG)
        if name in self.known and self.happens(_OFTEN):
            return self.random.choice(self.known[name])
        return self._value(interface, kind)

    def _value(self, interface: Any, kind: Any) -> Any:
        kind = _resolve(interface, kind)
        if isinstance(kind, _scanner._Struct):
            return self.members(interface, kind.fields)
        if isinstance(kind, _scanner._Array):
            many = self.random.choice((0, 1, 2, 5, 300))
            return [self._value(interface, kind.element_type) for _ in range(many)]
        if isinstance(kind, _scanner._Enum):
            return self.random.choice(list(kind.fields))
        return self.random.choice(
            (True, False) if isinstance(kind, bool) else _ENDS if isinstance(kind, int) else _TEXTS
        )

    def spoil(self, data: bytes) -> bytes:
        """Return bytes that have little damage, or much."""
        bad = bytearray(data)
        for _ in range(self.random.choice((1, 1, 1, 2, 5, 50))):
            at, size = self.random.randrange(len(bad) + 1), self.random.choice((0, 1, 1, 4, 40))
            piece = self.random.choice(
                (self.random.randbytes(size), bad[at : at + 9] * 3, b"\0", b"[" * 30, b'{"a":' * 30,
                 b"\\ud800", b'"', b"\\u0000", b"9" * 5000, b"1e999", b"\xef\xbb\xbf", b"null")
            )  # fmt: skip
            bad[at : at + size] = piece
        return bytes(bad)

    @contextmanager
    def fds(self, directory: str) -> Iterator[list[int]]:
        """Yield some descriptors of all kinds, open in the block."""
        fds: list[int] = []
        try:
            many = self.random.choice((0, 0, 0, 1, 2, 2, 3, 5, 253))
            fds.extend(self._fd(directory) for _ in range(many))
            yield fds
        finally:
            close_all(fds)

    def _fd(self, directory: str) -> int:
        ways: list[Callable[[], int]] = [
            lambda: os.open(directory, os.O_RDONLY | os.O_DIRECTORY),
            lambda: os.open(directory, os.O_PATH),
            lambda: os.open(os.devnull, os.O_RDWR),
            lambda: os.open("/dev/zero", os.O_RDWR),
            lambda: os.eventfd(self.random.randrange(2), os.EFD_NONBLOCK),
            self._file,
            self._pipe,
        ]
        return self.random.choice(ways)()

    def _file(self) -> int:
        fd = os.memfd_create("stream")
        os.write(fd, self.stream())
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def _pipe(self) -> int:
        fd, sink = os.pipe()
        os.write(sink, self.stream()[:4000])
        os.close(sink)
        return fd

    def stream(self) -> bytes:
        """Return what looks like the stream of a layer."""
        chunk = self.random.choice(
            (b"\x00\x04\x00\x00\x00abcd", b"\x01\x00\x00\x00\x00", b"\x01\xff\xff\xff\xff",
             b"\x02" + b"\x05" + bytes(7) + bytes(4) + b"\x01\x00\x00\x00a", b"\x00" * 5, b"\x03")
        )  # fmt: skip
        return self.spoil(chunk * self.random.choice((1, 5, 500)))


def find_problem(interface: Any, kind: Any, value: Any, where: str) -> str | None:
    """Tell what of a value is not as declared, None if all is."""
    if value is None and _is_optional(kind):
        return None
    kind = _resolve(interface, kind)
    problem = f"{where}: {str(value)[:200]}"
    if isinstance(kind, _scanner._Struct):
        if not isinstance(value, dict) or not value.keys() <= kind.fields.keys():
            return problem
        parts = [(each, value.get(name), f"{where}.{name}") for name, each in kind.fields.items()]
    elif isinstance(kind, _scanner._Array):
        if not isinstance(value, list):
            return problem
        parts = [(kind.element_type, each, where) for each in value]
    else:
        return None if _is_scalar(kind, value) else problem
    return next(filter(None, (find_problem(interface, *part) for part in parts)), None)


def _is_scalar(kind: Any, value: Any) -> bool:
    if isinstance(kind, _scanner._Enum):
        return value in kind.fields
    return type(value) is type(kind) and (not isinstance(kind, int) or 0 <= value < 1 << 64)


def _is_optional(kind: Any) -> bool:
    return isinstance(kind, _scanner._Maybe)


def _resolve(interface: Any, kind: Any) -> Any:
    """Return what a name, or something optional, stands for."""
    while isinstance(kind, _scanner._CustomType | _scanner._Maybe):
        is_named = isinstance(kind, _scanner._CustomType)
        kind = interface.members[kind.name].type if is_named else kind.element_type
    return kind
