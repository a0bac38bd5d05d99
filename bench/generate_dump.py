"""Print a dumpfile of an invented system tree; the same arguments give the same bytes.

Most files are external with a digest, some share one object; there are labels, capabilities
and ACLs, symbolic and hard links, small contents, and a few devices.

Usage: python bench/generate_dump.py --lines 64000 --seed 1 > tree.dump
"""

import argparse
import hashlib
import random
import sys
from collections.abc import Iterator

_LABELS = [f"system_u:object_r:{kind}_t:s0" for kind in ("usr", "bin", "lib", "etc", "var", "man")]
_FILES_PER_DIRECTORY = 14
_PARENTS = 400  # only the first directories get others below them
_SHARED_OBJECTS = 500
_CAPABILITY_EVERY = 50
_USER_XATTRS_EVERY = 10
_KINDS = ("file", "shared", "inline", "empty", "symlink", "hardlink", "fifo")
_WEIGHTS = (640, 60, 60, 20, 150, 60, 10)


def _digest(number: int) -> str:
    return hashlib.sha256(number.to_bytes(8, "little")).hexdigest()


def _stat(rng: random.Random, size: int, mode: int, nlink: int = 1) -> str:
    mtime = 1_600_000_000 + rng.randrange(100_000) * 60
    return f"{size} {mode:o} {nlink} 0 0 0 {mtime}.0"


def _xattrs(rng: random.Random) -> str:
    xattrs = f" security.selinux={rng.choice(_LABELS)}\\x00"
    if not rng.randrange(_CAPABILITY_EVERY):
        xattrs += " security.capability=\\x01\\x00\\x00\\x02\\x00\\x20"
    if not rng.randrange(_USER_XATTRS_EVERY):
        xattrs += f" user.origin=package-{rng.randrange(900)} user.mime=application/octet"
    return xattrs


class _Generator:
    """Writes the lines of a tree, parents first."""

    def __init__(self, nr_lines: int, seed: int) -> None:
        self._rng = random.Random(seed)  # noqa: S311 - not for secrets
        self._nr_lines = nr_lines
        self._files: list[str] = []

    def lines(self) -> Iterator[str]:
        """Yield each line with its line feed."""
        rng = self._rng
        directories = ["/"]
        yield f"/ {_stat(rng, 0, 0o40755, 2)} - - -{_xattrs(rng)}\n"
        for number in range(1, self._nr_lines):
            if number % _FILES_PER_DIRECTORY == 1:
                parent = rng.choice(directories[:_PARENTS])
                path = f"{parent.rstrip('/')}/dir-{number:x}"
                directories.append(path)
                yield f"{path} {_stat(rng, 0, 0o40755, 2)} - - -{_xattrs(rng)}\n"
            else:
                path = f"{directories[-1].rstrip('/')}/{self._kind()}-{number:x}"
                yield f"{path} {self._leaf(path, number)}\n"

    def _kind(self) -> str:
        return self._rng.choice(("lib", "module", "page", "icon-name", "x"))

    def _leaf(self, path: str, number: int) -> str:
        rng = self._rng
        (kind,) = rng.choices(_KINDS, _WEIGHTS)
        if kind == "hardlink" and self._files:
            return f"0 @100644 1 0 0 0 0.0 {rng.choice(self._files)} - -"
        if kind == "symlink":
            target = "../" * rng.randrange(4) + f"lib-{rng.randrange(self._nr_lines):x}.so"
            return f"{_stat(rng, len(target), 0o120777)} {target} - -{_xattrs(rng)}"
        if kind == "fifo":
            return f"{_stat(rng, 0, 0o10600)} - - -{_xattrs(rng)}"
        if kind == "empty":
            return f"{_stat(rng, 0, 0o100644)} - - -{_xattrs(rng)}"
        if kind == "inline":
            content = "x" * rng.randrange(1, 64)
            return f"{_stat(rng, len(content), 0o100644)} - {content} -{_xattrs(rng)}"
        self._files.append(path)
        digest = _digest(rng.randrange(_SHARED_OBJECTS) if kind == "shared" else 1_000 + number)
        payload = f"{digest[:2]}/{digest[2:]}"
        size = rng.randrange(65, 1 << rng.randrange(7, 26))
        return f"{_stat(rng, size, 0o100644)} {payload} - {digest}{_xattrs(rng)}"


def generate(nr_lines: int = 64_000, seed: int = 1) -> bytes:
    """Return a whole dumpfile."""
    return "".join(_Generator(nr_lines, seed).lines()).encode()


def main() -> None:
    """Print the dump."""
    parser = argparse.ArgumentParser(description="print an invented dumpfile")
    parser.add_argument("--lines", type=int, default=64_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    arguments = parser.parse_args()
    sys.stdout.buffer.write(generate(arguments.lines, arguments.seed))


if __name__ == "__main__":
    main()
