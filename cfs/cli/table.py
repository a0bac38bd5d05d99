"""Tables as composefs-rs prints them (spec cli-and-varlink a.9)."""

import unicodedata
from collections.abc import Sequence

from cfs.cli.report import escape

__all__ = ["format_table"]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with a frame; it ends with a line feed.

    Args:
        header: titles of the columns.
        rows: as many cells each.
    """
    cells = [[escape(cell) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(header, *cells, strict=True)]
    lines = [
        _rule(widths, *"┌─┬┐"),
        _line(header, widths),
        _rule(widths, *"╞═╪╡"),
    ]
    for number, row in enumerate(cells):
        if number:
            lines.append(_rule(widths, *"├╌┼┤"))
        lines.append(_line(row, widths))
    lines.append(_rule(widths, *"└─┴┘"))
    return "\n".join(lines) + "\n"


def _rule(widths: Sequence[int], left: str, dash: str, cross: str, right: str) -> str:
    return left + cross.join(dash * (width + 2) for width in widths) + right


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        f" {cell}{' ' * (width - _width(cell))} " for cell, width in zip(cells, widths, strict=True)
    )
    return "│" + "┆".join(padded) + "│"


def _width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )
