"""Results where the user wants them: files, whole or not at all, and JSON on stdout."""

import os
import stat
import sys

from cfs.linux.files import replacing, write_all

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
            write_all(stream.fileno(), data)
        return
    target = os.path.realpath(path)
    with replacing(target, _MODE) as fd:
        write_all(fd, data)
        if mode is not None:
            os.fchmod(fd, stat.S_IMODE(mode))
