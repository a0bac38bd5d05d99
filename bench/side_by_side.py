"""The C tools that a benchmark compares with, and how it prints the comparison."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

__all__ = ["c_tool", "print_rows", "time_command"]


def c_tool(name: str) -> str | None:
    """Return the path of a C tool; our own commands of the same name do not count."""
    path = os.environ.get("CFS_C_TOOLS") or os.environ.get("PATH")
    found = shutil.which(name, path=path)
    if found is None:
        return None
    with open(found, "rb") as file:
        return found if file.read(4) == b"\x7fELF" else None


def time_command(command: Sequence[str]) -> float:
    """Return the seconds that a command takes."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - a known tool
    return time.perf_counter() - start


def print_rows(rows: Mapping[str, float], tool: str, c_seconds: float | None) -> None:
    """Print our seconds, each with its ratio to the C tool's if there is one."""
    for what, seconds in rows.items():
        ratio = "" if c_seconds is None else f"{seconds / c_seconds:8.2f} times C"
        sys.stdout.write(f"{what:24}{seconds:8.3f} s{ratio}\n")
    shown = "not found" if c_seconds is None else f"{c_seconds:8.3f} s"
    sys.stdout.write(f"{'C ' + tool:24}{shown}\n")
