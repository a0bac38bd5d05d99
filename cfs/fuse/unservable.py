"""What is logged of a file that cannot be served: one line, once for each inode.

The texts are the same whether a worker found it (``enum cfs_log_reason`` of worker/worker.h,
whose names are the keys) or the reference operations did.
"""

import os
from contextlib import suppress

from cfs.errors import CfsError

__all__ = ["ServeError", "format_line", "print_line"]

_STDERR = 2

_TEXTS = {
    "NO_OBJECT": "file has a size but no object",
    "OPEN": "object {object}: {error}",
    "SIZE": "object {object}: not a regular file of the size that the image tells, has {value}",
    "SHORT": "object {object} was cut while it was served",
    "DIGEST": "object {object} does not have the digest that the image tells",
    "NO_DIGEST": "object {object} cannot be verified: the image tells no digest",
    "NO_VERITY": "object {object} has no fs-verity",
}


class ServeError(CfsError):
    """A file cannot be served; ``errno`` is the answer to who wants it."""

    def __init__(self, reason: str, path: bytes, error: int, value: int = 0) -> None:
        text = _TEXTS[reason].format(
            object=os.fsdecode(path), error=os.strerror(error), value=value
        )
        super().__init__(text.encode(errors="backslashreplace").decode())
        self.errno = error


def format_line(nid: int, error: ServeError) -> str:
    """Return the line for the log, without its end."""
    return f"nid {nid}: {error}".replace("\n", "\\n")


def print_line(text: str) -> None:
    """Print to standard error, unless whoever read that has gone."""
    with suppress(OSError):
        os.write(_STDERR, f"{text}\n".encode(errors="surrogateescape"))
