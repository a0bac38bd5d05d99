"""A directory into a store, empty and full: ours beside C ``mkcomposefs`` and composefs-rs.

``python bench/create_image.py DIRECTORY [WORK]``: DIRECTORY is a root file system, WORK (default:
the directory for temporary files) is where stores are made.  Every contestant in turn, ``ROUNDS``
times, with the directory in the page cache; what the one before left unwritten is synced before the
clock starts.  Prints the fastest round, since syncs wait for whatever else the disk does, and its
processor time.  Stores are removed at the end only: for half a minute ext4 avoids inodes that were
just freed, and the search for others would double the time of whoever comes next.

``CFS_C_TOOLS`` names the directory of the C tools, ``CFS_RUST_CFSCTL`` the cfsctl of composefs-rs.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import c_tool

ROUNDS = 3
KILOBYTE = 1024
PIECE_SIZE = 1 << 20


def warm(source: Path) -> tuple[int, int]:
    """Read all files; return the number of names and of bytes."""
    nr_names = size = 0
    for directory, below, files in os.walk(source):
        nr_names += len(below) + len(files)
        for name in files:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    # in pieces: what this process once used counts as memory of what it starts
                    while data := file.read(PIECE_SIZE):
                        size += len(data)
    return nr_names, size


def run_timed(command: list[str]) -> tuple[float, float, int]:
    """Run a command; return seconds, those of processors, and the peak of its memory in bytes."""
    os.sync()
    start = time.perf_counter()
    pid = os.posix_spawnp(
        command[0],
        command,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - start
    if status:
        msg = f"{command[0]}: status {status}"
        raise SystemExit(msg)
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * KILOBYTE


def contestants(source: str, store: str) -> dict[str, tuple[list[str] | None, list[str]]]:
    """Return by name how a store is prepared, and how it is written to."""
    ours = [sys.executable, "-m", "cfs.cli.main"]
    init = ["init", "--insecure", "--algorithm", "fsverity-sha256-12", store]
    create = ["--repo", store, "create-image", "--no-propagate-usr-to-root", source]
    flat = [f"--digest-store={store}", source, f"{store}.image"]
    found: dict[str, tuple[list[str] | None, list[str]]] = {
        "cfsctl create-image": ([*ours, *init], [*ours, *create]),
        "mkcomposefs": (None, [*ours, "mkcomposefs", *flat]),
    }
    c = c_tool("mkcomposefs")
    if c:
        found["C mkcomposefs"] = (None, [c, *flat])
    rust = os.environ.get("CFS_RUST_CFSCTL")
    if rust:
        found["composefs-rs"] = ([rust, *init], [rust, *create])
    return found


def main() -> None:
    """Measure and print."""
    source = Path(sys.argv[1])
    nr_names, size = warm(source)
    sys.stdout.write(f"{nr_names} names, {size / 1e6:.0f} MB\n")
    results: dict[str, list[tuple[float, ...]]] = {}
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as work:  # noqa: PLR2004
        for number in range(ROUNDS):
            for name in contestants("", ""):
                store = str(Path(work, f"{name} {number}"))
                prepare, command = contestants(str(source), store)[name]
                if prepare:
                    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
                empty, empty_cpu, memory = run_timed(command)
                full, full_cpu, memory_full = run_timed(command)
                results.setdefault(name, []).append(
                    (empty, empty_cpu, full, full_cpu, max(memory, memory_full))
                )
    sys.stdout.write(f"{'':24}{'empty':>10}{'CPU':>10}{'full':>10}{'CPU':>10}{'memory':>10}\n")
    for name, rounds in results.items():
        *seconds, memory = (min(column) for column in zip(*rounds, strict=True))
        times = "".join(f"{number:8.2f} s" for number in seconds)
        sys.stdout.write(f"{name:24}{times}{memory / 1e6:7.0f} MB\n")


if __name__ == "__main__":
    main()
