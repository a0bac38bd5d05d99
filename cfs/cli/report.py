"""Errors as one line on stderr (spec cli-and-varlink a.3)."""

import os
import sys
from collections.abc import Callable

from cfs.errors import CfsError

__all__ = ["describe", "fail", "run_reporting"]

_INTERRUPT_STATUS = 130
_STREAMS = (("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_RDWR, "w"))


def run_reporting(prefix: str, action: Callable[[], int]) -> int:
    """Run a command and return its status; print its error, with a prefix.

    If the reader of stdout has gone, nothing is printed.
    """
    _replace_closed_streams()
    try:
        status = action()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPT_STATUS
    except BrokenPipeError:
        _discard_stdout()
        return 1
    except (CfsError, OSError) as error:
        return fail(prefix, describe(error))
    return status


def describe(error: CfsError | OSError) -> str:
    """Return an error in one line, an ``OSError`` as file and reason."""
    if not isinstance(error, OSError):
        text = str(error)
    elif error.filename is None:
        text = error.strerror or str(error)
    else:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    return text.encode(errors="backslashreplace").decode().replace("\n", "\\n")


def fail(prefix: str, message: str) -> int:
    """Print a line on stderr; return the status of a failure."""
    try:
        sys.stdout.flush()
    except OSError:
        _discard_stdout()
    print(f"{prefix}: {message}", file=sys.stderr)
    return 1


def _discard_stdout() -> None:
    """Let the interpreter end without another try to write what stdout did not take."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _replace_closed_streams() -> None:
    """Take the numbers of closed standard streams, so that no other file gets them.

    Reading stdin and writing stdout then fail with EBADF; what goes to stderr vanishes.
    """
    for fd, (name, flags, mode) in enumerate(_STREAMS):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, flags)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
            setattr(sys, name, os.fdopen(fd, mode, encoding="utf-8", closefd=False))
