"""Figures of ``bench/mounts.py`` as text, as tables in docs/performance.md and as a picture."""

import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from contestants import Ground
from mount_cases import GOALS, SEQUENCES, Goal
from mount_picture import draw

__all__ = ["REFERENCE", "Results", "print_report", "write_report"]

BEGIN = "<!-- written by bench/mounts.py: begin -->"
END = "<!-- written by bench/mounts.py: end -->"
REFERENCE = "python3 -c 'import click, numpy'"  # in the kernel's column
_START = "start to first stat"
_START_LIMIT = 2.0
_PEERS = ("c-fuse", "rs", "rs-overlay")
_FASTER = 1.5
_STATES = {"idle": "Idle machine", "busy": "One processor kept busy"}
_TREE_CASES = [step.case for each in SEQUENCES if each.image == "tree" for step in each.steps]
_CASES = [_START, *(step.case for each in SEQUENCES for step in each.steps)]


@dataclass(slots=True, kw_only=True)
class Results:
    """All that was measured.

    Attributes:
        setting: machine and tree.
        contestants: names and titles, the kernel first.
        missing: contestants that did not take part, or not to the end, and why.
        seconds: by state, case and contestant.
        cpu: processor seconds of the server, by state, name of the sequence and contestant.
        peak: largest memory of the server, by contestant.
    """

    setting: str
    contestants: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    seconds: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    cpu: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    @classmethod
    def empty(cls, ground: Ground) -> "Results":
        """Return no figures, for this machine and the tree of this ground."""
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
        image = ground.image("tree")
        setting = (
            f"Linux {platform.release()}, {os.cpu_count()} processors, {memory} GiB of memory; "
            f"image of {image.stat().st_size / 1e6:.1f} MB"
        )
        return cls(setting=setting)

    def add(self, state: str, case: str, contestant: str, seconds: float) -> None:
        """Keep one time."""
        self.seconds.setdefault((state, case, contestant), []).append(seconds)

    def add_use(self, state: str, sequence: str, contestant: str, cpu: float, peak: int) -> None:
        """Keep what the server used during a sequence."""
        self.cpu.setdefault((state, sequence, contestant), []).append(cpu)
        self.peak[contestant] = max(peak, self.peak.get(contestant, 0))

    def median(self, state: str, case: str, contestant: str) -> float | None:
        """Return the median seconds, if there are any."""
        times = self.seconds.get((state, case, contestant))
        return statistics.median(times) if times else None

    def ratio(self, state: str, case: str, contestant: str, other: str = "kernel") -> float | None:
        """Return the median as multiple of another contestant's."""
        ours, theirs = self.median(state, case, contestant), self.median(state, case, other)
        return ours / theirs if ours is not None and theirs else None

    def states(self) -> list[str]:
        """Return the states of the machine that were measured, in order."""
        seen = {state for state, _, _ in self.seconds}
        return [state for state in _STATES if state in seen]

    def rounds(self) -> int:
        """Return how often a case was measured, at least."""
        return min((len(times) for times in self.seconds.values()), default=0)


def print_report(results: Results) -> None:
    """Print all tables."""
    sys.stdout.write("\n".join(_lines(results)) + "\n")


def write_report(results: Results, docs: Path) -> None:
    """Replace the generated part of performance.md, and the picture."""
    page = docs / "performance.md"
    head, _, rest = page.read_text().partition(BEGIN)
    tail = rest.partition(END)[2]
    page.write_text("\n".join([head + BEGIN, "", *_lines(results), "", END]) + tail)
    ratios = {
        title: {
            goal.case: {
                name: ratio
                for name in results.contestants
                if (ratio := results.ratio(state, goal.case, name)) and name != "kernel"
            }
            for goal in GOALS
        }
        for state, title in _STATES.items()
        if state in results.states()
    }
    (docs / "performance.svg").write_text(draw(ratios, list(results.contestants)[1:]))


def _lines(results: Results) -> Iterator[str]:
    yield f"{results.setting}. Medians of at least {results.rounds()}."
    yield ""
    for name, title in results.contestants.items():
        reason = results.missing.get(name)
        yield f"- `{name}`: {title}" + (f" (missing: {reason})" if reason else "")
    for state in results.states():
        yield from ["", f"### {_STATES[state]}: goals", ""]
        yield from _goal_table(results, state)
        yield from ["", f"### {_STATES[state]}: milliseconds, and ratio to the kernel mount", ""]
        yield from _time_table(results, state)
        yield from ["", f"### {_STATES[state]}: processor seconds of the server", ""]
        yield from _cpu_table(results, state)
    yield from ["", "### Largest memory of the server, MiB", ""]
    names = _names(results)
    yield from _table([names, [f"{results.peak.get(name, 0) / (1 << 20):.0f}" for name in names]])


def _names(results: Results) -> list[str]:
    return [name for name in results.contestants if any(name == key[2] for key in results.seconds)]


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table whose first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for nr, row in enumerate(rows):
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        yield "| " + " | ".join(cells) + " |"
        if nr == 0:
            yield "| " + " | ".join("-" * width for width in widths) + " |"


def _goal_table(results: Results, state: str) -> Iterator[str]:
    peers = [name for name in _PEERS if name in _names(results)]
    goals = {goal.case: goal for goal in GOALS}
    rows = [["case", "whose", "to kernel", "goal", *(f"faster than {name}" for name in peers)]]
    for case in _CASES:
        goal = goals.get(case)
        name = goal.contestant if goal else "cfs"
        if results.median(state, case, name) is None:
            continue
        row = [case, name, *_judge(results, state, case, goal)]
        for peer in peers:
            ratio = results.ratio(state, case, peer, name)
            is_missed = case in _TREE_CASES and ratio is not None and ratio < _FASTER
            row.append("" if ratio is None else f"{ratio:.2f}" + (" missed" if is_missed else ""))
        rows.append(row)
    yield from _table(rows)


def _judge(results: Results, state: str, case: str, goal: Goal | None) -> tuple[str, str]:
    """Return the ratio of a case and what its goal says about it, as texts."""
    if case == _START:
        return _judge_start(results, state)
    ratio = results.ratio(state, case, goal.contestant if goal else "cfs")
    if ratio is None:
        return "", ""
    if goal is None:
        return f"{ratio:.2f}", ""
    limit = goal.idle if state == "idle" else goal.busy
    verdict = "met" if ratio <= limit else "missed"
    if goal.is_throughput:
        return f"{ratio:.2f}", f"throughput {1 / ratio:.2f}, at least {1 / limit:.2f}: {verdict}"
    return f"{ratio:.2f}", f"at most {limit:.1f}: {verdict}"


def _judge_start(results: Results, state: str) -> tuple[str, str]:
    """The start is compared with that of the interpreter instead."""
    ours, base = results.median(state, _START, "cfs"), results.median(state, REFERENCE, "kernel")
    if ours is None or not base:
        return "", ""
    verdict = "met" if ours <= _START_LIMIT * base else "missed"
    return "", f"{ours / base:.2f} times that of Python, at most {_START_LIMIT:.1f}: {verdict}"


def _time_table(results: Results, state: str) -> Iterator[str]:
    names = _names(results)
    rows = [["case", *names]]
    for case in [*_CASES, REFERENCE]:
        row = [case]
        for name in names:
            seconds, ratio = results.median(state, case, name), results.ratio(state, case, name)
            text = "" if seconds is None else f"{seconds * 1000:.0f}"
            row.append(text if ratio is None or name == "kernel" else f"{text} ({ratio:.2f})")
        if any(row[1:]):
            rows.append(row)
    yield from _table(rows)


def _cpu_table(results: Results, state: str) -> Iterator[str]:
    names = [name for name in _names(results) if name != "kernel"]
    rows = [["sequence", *names]]
    for sequence in SEQUENCES:
        times = [results.cpu.get((state, sequence.name, name)) for name in names]
        if any(times):
            rows.append(
                [
                    sequence.name,
                    *(f"{statistics.median(each):.2f}" if each else "" for each in times),
                ]
            )
    yield from _table(rows)
