"""The picture of docs/performance.md: bars of ratios to the kernel mount, as SVG."""

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

__all__ = ["draw"]

_COLOURS = {
    "cfs": "#1a5fb4", "cfs-1": "#62a0ea", "cfs-0": "#c0c8d2", "cfs-passthrough": "#26a269",
    "cfs-overlay": "#8ff0a4", "c-fuse": "#e66100", "rs": "#a51d2d", "rs-overlay": "#f08a8a",
}  # fmt: skip
_LABEL, _PANEL, _GAP = 190, 320, 50  # widths
_BAR, _GROUP, _TOP = 8, 10, 64  # heights: of a bar, between groups, above the panels
_LEAST, _MOST = 1 / 4, 16  # of the logarithmic scale


def draw(ratios: Mapping[str, Mapping[str, Mapping[str, float]]], names: Sequence[str]) -> str:
    """Return the picture.

    Args:
        ratios: by title of the panel, case and contestant.
        names: of the contestants, in the order of their bars.
    """
    cases = list(dict.fromkeys(case for panel in ratios.values() for case in panel))
    height = len(cases) * (len(names) * _BAR + _GROUP)
    width = _LABEL + len(ratios) * (_PANEL + _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_TOP + height + 24}">',
        f'<rect width="{width}" height="{_TOP + height + 24}" fill="#ffffff"/>',
        _text(8, 16, "Time as multiple of the kernel mount's: to the left is faster", size=13),
        *_legend(names),
    ]
    for nr, (title, panel) in enumerate(ratios.items()):
        left = _LABEL + nr * (_PANEL + _GAP)
        lines += _axis(left, height, title)
        lines += _bars(left, panel, cases, names)
    for nr, case in enumerate(cases):
        y = _TOP + nr * (len(names) * _BAR + _GROUP) + len(names) * _BAR / 2 + 4
        lines.append(_text(_LABEL - 8, y, case, anchor="end"))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {where} font-family="sans-serif" fill="#222222">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {where} fill="{colour}"/>'


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = 8
    for name in names:
        yield _box(x, 26, 10, 10, _COLOURS[name])
        yield _text(x + 14, 35, name)
        x += 34 + 7 * len(name)


def _place(ratio: float) -> float:
    """Return how far right in a panel a ratio lies."""
    share = math.log(min(max(ratio, _LEAST), _MOST) / _LEAST) / math.log(_MOST / _LEAST)
    return share * _PANEL


def _axis(left: float, height: float, title: str) -> Iterator[str]:
    yield _text(left, _TOP - 12, title, size=12)
    for power in range(-2, 5):
        x = left + _place(2.0**power)
        colour = "#222222" if power == 0 else "#dddddd"
        yield f'<path d="M{x:.1f} {_TOP - 6}V{_TOP + height}" stroke="{colour}"/>'
        yield _text(x, _TOP + height + 14, f"{2.0**power:g}", anchor="middle", size=10)


def _bars(
    left: float,
    panel: Mapping[str, Mapping[str, float]],
    cases: Sequence[str],
    names: Sequence[str],
) -> Iterator[str]:
    y = _TOP
    for case in cases:
        for name in names:
            ratio = panel.get(case, {}).get(name)
            if ratio is not None:
                ends = sorted((_place(1), _place(ratio)))
                yield _box(left + ends[0], y, ends[1] - ends[0], _BAR - 1, _COLOURS[name])
                yield _text(left + ends[1] + 3, y + _BAR - 1, f"{ratio:.2f}", size=8)
            y += _BAR
        y += _GROUP
