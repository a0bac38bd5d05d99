"""Digests of a 1 GiB tree: ``cfs.scan`` beside ``fsverity digest``, and how it scales.

``python bench/digests.py [DIRECTORY]``; the tree is made below DIRECTORY (default: the
directory for temporary files) and removed.  The medians of several interleaved rounds, with the
files in the page cache; ``fsverity digest`` gets all files in one call and uses one core.
"""

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cfs.directory import ScanOptions, scan

ROUNDS = 5
SIZES = [64 << 20] * 8 + [1 << 20] * 256 + [64 << 10] * 3072 + [8 << 10] * 8192


def make_tree(root: Path) -> list[Path]:
    """Write the files of ``SIZES``, 1 GiB in all, from a seeded generator."""
    numbers = random.Random(1)  # noqa: S311 - no secret
    paths = []
    for number, size in enumerate(SIZES):
        directory = root / f"{number % 64:02x}"
        directory.mkdir(exist_ok=True)
        paths.append(directory / str(number))
        block = numbers.randbytes(min(size, 1 << 20))
        paths[-1].write_bytes(block * (size // len(block)))
    return paths


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    cores = len(os.sched_getaffinity(0))
    threads = sorted({1, cores} | {1 << bits for bits in range(1, cores.bit_length() - 1)})
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        root = Path(name)
        paths = make_tree(root)
        work: dict[str, Callable[[], object]] = {
            f"cfs, {count} thread(s)": partial(scan, root, options=ScanOptions(threads=count))
            for count in threads
        }
        tool = shutil.which("fsverity")
        if tool:
            command = [tool, "digest", *map(str, paths)]
            work["fsverity digest"] = lambda: subprocess.run(  # noqa: S603
                command, check=True, stdout=subprocess.DEVNULL
            )
        times: dict[str, list[float]] = {label: [] for label in work}
        for _ in range(ROUNDS):
            for label, call in work.items():
                times[label].append(seconds(call))
    one = statistics.median(times["cfs, 1 thread(s)"])
    print(f"{sum(SIZES) >> 20} MiB in {len(SIZES)} files, {ROUNDS} rounds, medians")  # noqa: T201
    for label, found in times.items():
        median = statistics.median(found)
        ratio = median / statistics.median(times["fsverity digest"]) if tool else float("nan")
        line = (
            f"{label:20} {median:7.3f} s  {ratio:5.2f} x fsverity  {one / median:5.2f} x 1 thread"
        )
        print(line)  # noqa: T201
    if not tool:
        print("fsverity is not on PATH: install the package fsverity to compare")  # noqa: T201


if __name__ == "__main__":
    main()
