"""The kernel's log, for reasons that a file system tells nowhere else.

Linux Documentation/ABI/testing/dev-kmsg.  Whoever may not read it learns nothing.
"""

import os
from contextlib import ExitStack, suppress
from typing import Self

from cfs.linux.files import owned

__all__ = ["KernelLog"]

_RECORD_SIZE = 8192  # no record is longer
_LEVEL_MASK = 7  # the rest is the facility
_LOG_WARNING = 4


class KernelLog:
    """What the kernel logs while the block runs.

    Used as context manager; belongs to one thread.
    """

    _fd = -1

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with suppress(OSError):
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
            self._fd = owned(self._stack, os.open("/dev/kmsg", flags))
            os.lseek(self._fd, 0, os.SEEK_END)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, word: str) -> str:
        """Return the warnings and errors that start with a word, each once, as one line.

        Others may cause messages at the same time; the kernel does not tell whose they are.
        """
        found: dict[str, None] = {}
        with suppress(OSError):  # BlockingIOError: that was the last; EPIPE: some were dropped
            while self._fd >= 0:
                record = os.read(self._fd, _RECORD_SIZE).decode(errors="replace")
                prefix, _, text = record.partition("\n")[0].partition(";")
                level = int(prefix.partition(",")[0]) & _LEVEL_MASK
                if level <= _LOG_WARNING and text.startswith(word):
                    found[text] = None
        return "; ".join(found)
