"""``mkcomposefs``: a directory or dumpfile to an image, as the C tool (spec cli-and-varlink a.11).

Messages and statuses are C's; unlike C, an image that is there already stays as it is until the
new one is complete.
"""

import errno
import gc
import getopt
import os
import re
import stat
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cfs import __version__
from cfs.cli.output import write_output
from cfs.cli.report import fail, run_reporting
from cfs.directory import ScanOptions, scan
from cfs.dumpfile import parse_dumpfile
from cfs.erofs.writer import write_image
from cfs.errors import InvalidRequestError, NotFoundError
from cfs.fsverity import compute_digest
from cfs.objectdir import ObjectDirectory
from cfs.tree import Directory

__all__ = ["main", "run"]

_USAGE = """\
Usage: mkcomposefs [OPTIONS] SOURCE [IMAGE]
Options:
  --digest-store=PATH   store the contents of files over 64 bytes below PATH
  --use-epoch           make all mtimes zero
  --skip-devices        leave out device nodes
  --skip-xattrs         leave out xattrs
  --user-xattrs         keep xattrs of the user name space only
  --print-digest        print the fs-verity digest of the image
  --print-digest-only   print the digest, write no image
  --from-file           SOURCE is a dumpfile, - for stdin
  --min-version=N       lowest format version of the image, 0 or 1 (default 0)
  --max-version=N       highest format version of the image, 0 or 1 (default 1);
                        format 2 needs both to be 2
  --threads=N           number of threads that read files (default: all CPUs)
  --hardlinks           names of one file share an inode
  --version             print the version
  --help                print this text
"""
_FLAGS = (
    "use-epoch",
    "skip-devices",
    "skip-xattrs",
    "user-xattrs",
    "print-digest",
    "print-digest-only",
    "from-file",
    "hardlinks",
    "version",
    "help",
)
_WITH_VALUE = ("digest-store", "min-version", "max-version", "threads")
_NUMBERS = {"min-version": "min version", "max-version": "max version", "threads": "threads count"}
_NUMBER = re.compile(r"[+-]?[0-9]{1,9}")


class _UsageError(Exception):
    """A message without prefix; the usage text follows if ``usage``."""

    def __init__(self, message: str, *, usage: bool = True) -> None:
        super().__init__(message)
        self.usage = usage


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arguments:
    flags: frozenset[str]
    digest_store: str | None
    versions: tuple[int, int]
    threads: int | None
    source: str
    image: str | None


def main() -> int:
    """Entry point of the console script."""
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Run the tool and return its status."""
    gc.disable()  # all that is made lives to the end; looking for garbage costs a third of the time
    try:
        return run_reporting("mkcomposefs", lambda: _run(arguments))
    except _UsageError as error:
        text = f"{error}\n" if str(error) else ""
        print(text + (_USAGE if error.usage else ""), end="", file=sys.stderr)
        return 1


def _run(words: Sequence[str]) -> int:
    options, positional = _parse_options(words)
    if "help" in options:
        print(_USAGE, end="")
        return 0
    if "version" in options:
        print(f"mkcomposefs {__version__}")
        return 0
    arguments = _check_arguments(options, positional)
    if arguments.image == "-" and sys.stdout.isatty():
        return fail("mkcomposefs", "stdout is a tty.  Refusing to use it")
    image = _build_image(arguments)
    if arguments.image == "-":
        sys.stdout.buffer.write(image)
    elif arguments.image is not None:
        try:
            write_output(arguments.image, image)
        except OSError as error:
            return fail("mkcomposefs", f"failed to open output file: {error.strerror}")
    if arguments.flags & {"print-digest", "print-digest-only"}:
        sys.stdout.buffer.write(f"{compute_digest(image)}\n".encode())
    return 0


def _parse_options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    names = [*_FLAGS, *(f"{name}=" for name in _WITH_VALUE)]
    try:
        options, positional = getopt.gnu_getopt(list(words), "", names)
    except getopt.GetoptError as error:
        if error.msg.endswith("requires argument"):
            msg = "option needs a value"
            raise _UsageError(msg, usage=False) from None
        msg = ""
        raise _UsageError(msg) from None
    return {name[2:]: value for name, value in options}, positional


def _check_arguments(options: dict[str, str], positional: list[str]) -> _Arguments:
    numbers = {}
    for name, title in _NUMBERS.items():
        value = options.get(name)
        if value is None:
            continue
        if not _NUMBER.fullmatch(value) or (name == "threads" and int(value) <= 0):
            msg = f"Invalid {title} {value}"
            raise _UsageError(msg, usage=False)
        numbers[name] = int(value)
    digest_only = "print-digest-only" in options
    problem = ""
    if not positional:
        problem = "No source path specified"
    elif len(positional) > 2:  # noqa: PLR2004 - SOURCE and IMAGE
        problem = "Too many arguments"
    elif digest_only and len(positional) > 1:
        problem = "Cannot specify destination path with --print-digest-only"
    elif not digest_only and len(positional) == 1:
        problem = "No destination path specified"
    if problem:
        raise _UsageError(problem)
    return _Arguments(
        flags=frozenset(name for name in options if name in _FLAGS),
        digest_store=options.get("digest-store"),
        versions=_choose_versions(numbers.get("min-version"), numbers.get("max-version")),
        threads=numbers.get("threads"),
        source=positional[0],
        image=positional[1] if len(positional) > 1 else None,
    )


def _choose_versions(minimum: int | None, maximum: int | None) -> tuple[int, int]:
    """Return lowest and highest format: one option resets the other, as in C."""
    if minimum is None and maximum is None:
        return 0, 1
    lowest = minimum or 0
    highest = max(lowest, maximum or 0)
    if (minimum, maximum) != (2, 2) and not 0 <= lowest <= highest <= 1:
        msg = (
            f"cannot write file: Invalid argument: format versions {lowest} to {highest}, "
            "expected 0 or 1, or 2 for both --min-version and --max-version"
        )
        raise InvalidRequestError(msg)
    return lowest, highest


def _build_image(arguments: _Arguments) -> bytes | bytearray:
    """Read the source and return the image."""
    minimum, maximum = arguments.versions
    if "from-file" in arguments.flags:
        root = parse_dumpfile(
            _read_dumpfile(arguments.source), strict="CFS_PARSE_STRICT" in os.environ
        )
    else:
        root = _scan(arguments)
    return write_image(root, min_version=minimum, max_version=maximum)


def _read_dumpfile(source: str) -> bytes:
    if source == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        msg = f"open `{source}`: {error.strerror}"
        raise NotFoundError(msg) from None


def _scan(arguments: _Arguments) -> Directory:
    """Return the tree of the source directory, its contents stored if asked for."""
    source, flags = arguments.source, arguments.flags
    if not source:
        msg = "Empty source path specified"
        raise InvalidRequestError(msg)
    try:
        mode = Path(source).stat().st_mode
    except OSError as error:
        msg = f"error accessing {source}: {error.strerror}"
        raise NotFoundError(msg) from None
    if not stat.S_ISDIR(mode):
        msg = f"cannot write file: {os.strerror(errno.ENOTDIR)}: {source}"
        raise InvalidRequestError(msg)
    with ExitStack() as stack:
        objects = None
        if arguments.digest_store is not None:
            objects = stack.enter_context(ObjectDirectory.open(arguments.digest_store))
        options = ScanOptions(
            use_epoch="use-epoch" in flags,
            skip_devices="skip-devices" in flags,
            skip_xattrs="skip-xattrs" in flags,
            user_xattrs="user-xattrs" in flags and "skip-xattrs" not in flags,
            hardlinks="hardlinks" in flags,
            threads=arguments.threads,
            objects=objects,
        )
        return scan(source, options=options)


if __name__ == "__main__":
    sys.exit(main())
