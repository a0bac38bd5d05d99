"""Kills ``cfsctl oci pull`` at random moments; a program.

    pull_killing.py LAYOUT DIRECTORY ROUNDS SEED

LAYOUT has the image ``v1``, DIRECTORY is filled with stores.  A round: a new store, a pull that is
killed, fsck, another pull, ``oci fsck``, gc; those in which the pull was faster do not count.
Prints as JSON how many pulls were killed, how many of these had stored a layer, and what was wrong.

All rounds are children of one process that has loaded all modules, since starting Python and
loading them takes longer than a round; it never had another thread when it forks.
"""

import json
import os
import random
import select
import shutil
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

from cfs.cli.cfsctl import run

_SECONDS = 60  # for a pull
_MIN_LIMIT = 0.001  # seconds


def run_here(*arguments: str) -> int:
    with open(os.devnull, "w") as null, redirect_stdout(null):
        return run(arguments)


def run_child(*arguments: str, seconds: float = _SECONDS) -> int:
    """Run cfsctl in a child, killed after so many seconds; return the wait status."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os._exit(run(arguments))
    process = os.pidfd_open(pid)
    try:
        if not select.select([process], [], [], seconds)[0]:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(process)
    return os.waitpid(pid, 0)[1]


def list_store(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def main() -> None:
    layout, directory, rounds, seed = sys.argv[1:]
    numbers = random.Random(int(seed))
    whole, store = Path(directory, "whole"), Path(directory, "store")
    run_here("init", "--insecure", "--algorithm", "fsverity-sha256-12", str(whole))
    shutil.copytree(whole, empty := Path(directory, "empty"))
    pulling = ("oci", "pull", f"oci:{layout}:v1", "name")
    # the first loads what the second is measured without
    durations = []
    for path in (whole, empty):
        start = time.monotonic()
        assert run_child("--repo", str(path), *pulling) == 0
        durations.append(time.monotonic() - start)
    run_here("--repo", str(whole), "gc")
    expected = list_store(whole)
    nr_killed = nr_resumed = 0
    limit = durations[1]
    problems: list[str] = []
    while nr_killed < int(rounds) and limit > _MIN_LIMIT:
        run_here("init", "--insecure", "--algorithm", "fsverity-sha256-12", str(store))
        seconds = numbers.uniform(0, limit)
        status = run_child("--repo", str(store), *pulling, seconds=seconds)
        if os.WIFSIGNALED(status):
            nr_killed += 1
        else:
            limit *= 0.9
        nr_resumed += any((store / "streams").glob("oci-layer-*"))
        checks = {
            "fsck after the kill": run_child("--repo", str(store), "fsck"),
            "second pull": run_child("--repo", str(store), *pulling),
            "oci fsck": run_child("--repo", str(store), "oci", "fsck"),
            "gc": run_child("--repo", str(store), "gc"),
        }
        found = [what for what, failed in checks.items() if failed]
        if list_store(store) != expected:
            found.append(f"left: {set(list_store(store)) ^ set(expected)}")
        problems += [f"killed after {seconds:.3f} s: {text}" for text in found]
        shutil.rmtree(store)
    json.dump({"killed": nr_killed, "resumed": nr_resumed, "problems": problems}, sys.stdout)


if __name__ == "__main__":
    main()
