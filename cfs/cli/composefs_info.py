"""``composefs-info``: what an image holds, as the C tool (spec cli-and-varlink a.12)."""

import getopt
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from cfs.cli.report import run_reporting
from cfs.dumpfile import format_listing, format_vector, object_paths
from cfs.erofs import View, open_image
from cfs.errors import FormatError, InvalidRequestError, NotFoundError, UnsupportedError
from cfs.fsverity import compute_file_digest, measure
from cfs.inodes import InodeVector
from cfs.linux.files import naming, openat2

__all__ = ["main", "run"]

_USAGE = """\
Usage: composefs-info [--basedir=DIR] [--filter=NAME]... COMMAND IMAGE...
Commands:
  ls               list paths with link targets and object paths
  dump             print the image as a dumpfile
  objects          list the object paths of all images
  missing-objects  list the object paths that are not below --basedir
  measure-file     print the fs-verity digest of each file
"""


def main() -> int:
    """Entry point of the console script."""
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Run the tool and return its status."""
    return run_reporting("composefs-info", lambda: _parse_and_print(arguments))


def _parse_and_print(arguments: Sequence[str]) -> int:
    try:
        options, words = getopt.gnu_getopt(list(arguments), "", ["basedir=", "filter=", "help"])
    except getopt.GetoptError as error:
        print("Def")  # scripts that compare stdout: C does so, for whatever reason
        return _fail_usage(f"composefs-info: {error.msg}")
    if ("--help", "") in options:
        print(_USAGE, end="")
        return 0
    if len(words) < 2:  # noqa: PLR2004 - COMMAND and IMAGE
        missing = "image path" if words else "command"
        return _fail_usage(f"No {missing} specified")
    return _print(words, options)


def _fail_usage(message: str) -> int:
    print(f"{message}\n{_USAGE}", end="", file=sys.stderr)
    return 1


def _print(words: Sequence[str], options: Sequence[tuple[str, str]]) -> int:
    filters = [value for name, value in options if name == "--filter"]
    for name in filters:
        if "/" in name:
            msg = f"Filter must be a single name: {name}"
            raise InvalidRequestError(msg)
    names = [os.fsencode(name) for name in filters]
    sys.stdout.buffer.writelines(_run(words[0], words[1:], dict(options).get("--basedir"), names))
    return 0


def _run(
    command: str, paths: Sequence[str], basedir: str | None, filters: Sequence[bytes]
) -> Iterator[bytes]:
    """Yield the output of a command."""
    match command:
        case "ls":
            for path in paths:
                yield from format_listing(_load(path), filters=filters)
        case "dump":
            for path in paths:
                yield from format_vector(_load(path), filters=filters)
        case "objects" | "missing-objects":
            needed: Iterable[bytes] = object_paths(map(_load, paths), filters=filters)
            if command == "missing-objects" and basedir is not None:
                needed = _select_missing(needed, basedir)
            yield from (path + b"\n" for path in needed)
        case "measure-file":
            for path in paths:
                yield _measure(path)
        case _:
            msg = f"Unknown command '{command}'"
            raise InvalidRequestError(msg)


def _load(path: str) -> InodeVector:
    try:
        return open_image(path, view=View.TREE)
    except OSError as error:
        msg = f"Failed to open '{path}': {error.strerror}"
        raise NotFoundError(msg) from None
    except (FormatError, UnsupportedError) as error:
        msg = f"Failed to load '{path}': Invalid argument: {error}"
        raise FormatError(msg) from None


def _select_missing(paths: Iterable[bytes], basedir: str) -> Iterator[bytes]:
    """Yield the paths that cannot be opened below a directory, or that lead out of it."""
    directory = os.open(basedir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path in paths:
            try:
                os.close(openat2(directory, path, os.O_PATH))
            except OSError:
                yield path
    finally:
        os.close(directory)


def _measure(path: str) -> bytes:
    """Return the digest that the kernel enforces for a file, else the one it would have."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        msg = f"Failed to open '{path}': {error.strerror}"
        raise NotFoundError(msg) from None
    try:
        with naming(path):
            digest = measure(fd) or compute_file_digest(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)
    return f"{digest}\n".encode()


if __name__ == "__main__":
    sys.exit(main())
