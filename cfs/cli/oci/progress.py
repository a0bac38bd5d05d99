"""How far a pull is: a line for each layer on stderr, only if that is a terminal."""

import os
import sys
import time
from dataclasses import dataclass
from typing import Self

from cfs.cli.report import escape
from cfs.oci.pull import Done, Event, Message, Progress, Skipped, Started

__all__ = ["PullProgress"]

_INTERVAL = 0.1  # seconds
_BAR_WIDTH = 30
_ID_SIZE = 19  # "sha256:" and twelve digits
_UP_AND_CLEAR = "\x1b[{}A\x1b[J"
_MEGABYTE = 1_000_000


@dataclass(slots=True)
class _Layer:
    size: int
    nr_read: int = 0


class PullProgress:
    """The lines, while the context lasts: layers that are fetched below those that are done.

    Called with the events of a pull, by one thread at a time.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Show nothing yet, and nothing at all if it is to be quiet."""
        # python gives no stderr at all if it was closed
        self._is_on = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._layers: dict[str, _Layer] = {}
        self._nr_shown = 0
        self._shown = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._layers.clear()
        self._draw()

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        if not self._is_on:
            return
        match event:
            case Message(text):
                self._draw(escape(text))
            case Skipped(name):
                self._draw(f"{_show(name)} is there")
            case Started(name, size):
                self._layers[name] = _Layer(size)
                self._draw()
            case Progress(name, size):
                self._layers[name].nr_read = size
                if time.monotonic() - self._shown >= _INTERVAL:
                    self._draw()
            case Done(name):
                layer = self._layers.pop(name)
                self._draw(f"{_show(name)} stored, {layer.size / _MEGABYTE:.1f} MB")

    def _draw(self, line: str | None = None) -> None:
        """Write a line that stays, and those of the layers below it."""
        if not self._is_on:
            return
        # longer ones would be broken, and then there is no way back up
        columns, rows = _terminal_size()
        shown = [_format(name, layer)[: columns - 1] for name, layer in self._layers.items()]
        shown = shown[: max(rows - 1, 0)]
        text = _UP_AND_CLEAR.format(self._nr_shown) if self._nr_shown else ""
        text += "".join(f"{part}\n" for part in ([] if line is None else [line]) + shown)
        self._nr_shown = len(shown)
        self._shown = time.monotonic()
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:  # the terminal has gone: the command goes on
            self._is_on = False


def _terminal_size() -> tuple[int, int]:
    """Return columns and rows; stdout, whose size shutil tells, may be something else."""
    try:
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
    except OSError:
        columns, rows = 0, 0
    return columns or 80, rows or 24  # a serial line knows nothing


def _show(name: str) -> str:
    return escape(name[:_ID_SIZE])


def _format(name: str, layer: _Layer) -> str:
    share = min(layer.nr_read / layer.size, 1) if layer.size else 0
    bar = "#" * int(share * _BAR_WIDTH)
    return f"{_show(name)} [{bar:.<{_BAR_WIDTH}}] {share:4.0%} of {layer.size / _MEGABYTE:.1f} MB"
