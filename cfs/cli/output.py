"""Results where the user wants them: files, whole or not at all, and JSON on stdout."""

import os
import secrets
import stat
import sys
from contextlib import suppress

__all__ = ["print_json", "write_output"]

_MODE = 0o666  # the umask takes its part


def print_json(document: object) -> None:
    """Print a document as JSON in UTF-8, whatever the locale (spec cli-and-varlink a.9).

    Raises:
        OSError: stdout does not take it.
    """
    import json

    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    sys.stdout.flush()
    # what is no UTF-8 becomes an escape of JSON, so that it can be parsed and names the same bytes
    sys.stdout.buffer.write(text.encode(errors="backslashreplace"))


def write_output(path: str, data: bytes | bytearray) -> None:
    """Write a file; a regular one is replaced when the new one is complete.

    Symlinks are followed.  Devices, fifos and the like are written to.  After an error
    everything is as before.

    Raises:
        OSError: opening, writing or renaming failed.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        with open(path, "wb", buffering=0) as stream:
            _write_all(stream.fileno(), data)
        return
    target = os.path.realpath(path)
    temporary = os.path.join(os.path.dirname(target), f".cfs-{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    try:
        try:
            _write_all(fd, data)
            if mode is not None:
                os.fchmod(fd, stat.S_IMODE(mode))
        finally:
            os.close(fd)
        os.rename(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _write_all(fd: int, data: bytes | bytearray) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
