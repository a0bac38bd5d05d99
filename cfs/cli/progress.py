"""How far a long command is: one line on stderr, only if that is a terminal."""

import shutil
import sys
import threading
import time
from typing import Self

__all__ = ["Progress"]

_INTERVAL = 0.1  # seconds
_BAR_WIDTH = 30
_CLEAR_LINE = "\r\x1b[K"
_MEGABYTE = 1_000_000


class Progress:
    """The line, while the context lasts; any thread may call :meth:`advance`."""

    def __init__(self, title: str, total_size: int | None = None) -> None:
        """Show nothing yet.

        Args:
            title: what is going on.
            total_size: bytes in all, if that is known: then there is a bar.
        """
        self._title = title
        self._total_size = total_size
        self._size = 0
        self._nr_files = 0
        self._shown = 0.0
        self._lock = threading.Lock()
        # python gives no stderr at all if it was closed
        self._is_on = sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._write(_CLEAR_LINE)

    def advance(self, size: int) -> None:
        """Count a file, or a part of one, of so many bytes."""
        if not self._is_on:
            return
        with self._lock:
            self._size += size
            self._nr_files += 1
            now = time.monotonic()
            if now - self._shown >= _INTERVAL:
                self._shown = now
                columns = shutil.get_terminal_size().columns - 1
                self._write(_CLEAR_LINE + self._format()[:columns])

    def _format(self) -> str:
        if not self._total_size:
            return f"{self._title}: {self._nr_files} files, {self._size / _MEGABYTE:.1f} MB"
        share = min(self._size / self._total_size, 1)
        bar = "#" * int(share * _BAR_WIDTH)
        return (
            f"{self._title}: [{bar:.<{_BAR_WIDTH}}] {share:4.0%} "
            f"of {self._total_size / _MEGABYTE:.1f} MB"
        )

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:  # the terminal has gone: the command goes on
            self._is_on = False
