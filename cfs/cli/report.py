"""Errors as one line on stderr (spec cli-and-varlink a.3)."""

import errno
import io
import os
import sys
from collections.abc import Callable

from cfs.errors import CfsError, describe, escape

__all__ = ["describe", "escape", "fail", "run_reporting"]

_INTERRUPT_STATUS = 130
_STREAMS = (("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_RDWR, "w"))


def run_reporting(prefix: str, action: Callable[[], int]) -> int:
    """Run a command and return its status; print its error, with a prefix.

    If the reader of stdout has gone, nothing is printed.
    """
    _replace_closed_streams()
    _write_utf8()
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
    except MemoryError:
        return fail(prefix, os.strerror(errno.ENOMEM))
    return status


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


def _write_utf8() -> None:
    """Print UTF-8 in every locale, as composefs-rs does, and names as the bytes they are."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


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
