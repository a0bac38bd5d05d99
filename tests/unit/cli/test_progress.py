"""The line on stderr that tells how far a command is."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cfs.cli import progress
from cfs.cli.progress import Progress
from cfs.compat import override
from cfs.directory import ScanOptions, scan


class Terminal(io.StringIO):
    @override
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    found = Terminal()
    # not sys.stderr itself: pytest sets that anew when the test begins
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=found))
    monkeypatch.setattr(progress, "_INTERVAL", 0)
    monkeypatch.setenv("COLUMNS", "200")
    return found


def lines(terminal: Terminal) -> list[str]:
    return terminal.getvalue().split("\r\x1b[K")[1:]


def test_counts_files_and_bytes_and_leaves_nothing(terminal: Terminal) -> None:
    with Progress("Storing") as shown:
        shown.advance(1_500_000)
        shown.advance(1_000_000)
    assert lines(terminal) == ["Storing: 1 files, 1.5 MB", "Storing: 2 files, 2.5 MB", ""]


def test_bar_where_the_end_is_known(terminal: Terminal) -> None:
    with Progress("Pulling", 4_000_000) as shown:
        shown.advance(1_000_000)
        shown.advance(9_000_000)
    first, second, _ = lines(terminal)
    assert first == "Pulling: [#######.......................]  25% of 4.0 MB"
    assert second == "Pulling: [##############################] 100% of 4.0 MB"


def test_line_is_cut_at_the_width_of_the_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    with Progress("Storing") as shown:
        shown.advance(1)
    assert lines(terminal)[0] == "Storing: "


def test_nothing_without_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    for found in (stderr, None):
        monkeypatch.setattr(sys, "stderr", found)
        with Progress("Storing") as shown:
            shown.advance(1)
    assert stderr.getvalue() == ""


def test_terminal_that_goes_away_is_no_error(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> int:
        raise OSError

    monkeypatch.setattr(terminal, "write", fail)
    with Progress("Storing") as shown:
        shown.advance(1)


def test_scan_tells_its_progress(tmp_path: Path) -> None:
    for size in (10, 65, 5000, 2 << 20):
        (tmp_path / str(size)).write_bytes(bytes(size))
    sizes: list[int] = []
    scan(tmp_path, options=ScanOptions(progress=sizes.append))
    assert sorted(sizes) == [65, 5000, 2 << 20]
