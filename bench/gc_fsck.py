"""Time to check and to collect a store, beside composefs-rs if its ``cfsctl`` is named.

Usage: python bench/gc_fsck.py TREE [--cfsctl PATH] [--work DIR] [--rounds N]

TREE is a directory with ``usr``, a root file system for instance.  It is stored once under a name
and once, changed by its attributes, without: that and a thousand objects are the garbage.  Each
tool works on the same store, all of it in the page cache.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cfs.repository.repository import Repository

NR_GARBAGE = 1000
OURS = (sys.executable, "-P", "-m", "cfs.cli.main")


def make_store(store: Path, tree: Path) -> None:
    """Store the tree, and garbage beside it."""
    create = [*OURS, "--repo", str(store), "create-image", str(tree)]
    for command in (
        [*OURS, "init", "--insecure", str(store)],
        [*create, "root"],
        [*create, "--xattrs", "keep-user-xattrs", "--no-propagate-usr-to-root"],
    ):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - ours
    with Repository.open(str(store)) as repository:
        for number in range(NR_GARBAGE):
            repository.objects.put_bytes(b"garbage %d" % number)
        repository.sync()


def time_on(store: Path, command: list[str], *, copy: bool) -> float:
    """Return the seconds that a command takes, on a copy of the store if it changes it."""
    with tempfile.TemporaryDirectory(dir=store.parent) as directory:
        if copy:
            copied = Path(directory, "store")
            shutil.copytree(store, copied, symlinks=True, copy_function=os.link)
            shutil.copy2(copied / "meta.json", copied / "meta.new")  # the lock is on the inode
            os.replace(copied / "meta.new", copied / "meta.json")
            store = copied
        start = time.perf_counter()
        words = [*command[:-1], "--repo", str(store), *command[-1].split()]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - named by user
        return time.perf_counter() - start


def main() -> None:
    """Print the best time of each command and tool."""
    parser = argparse.ArgumentParser(description="time fsck and gc")
    parser.add_argument("tree", type=Path)
    parser.add_argument("--cfsctl", help="that of composefs-rs")
    parser.add_argument("--work", type=Path, help="directory for the stores")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    tools = {"ours": list(OURS)}
    if arguments.cfsctl:
        tools["composefs-rs"] = [arguments.cfsctl]
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        store = Path(directory, "store")
        make_store(store, arguments.tree)
        objects = [path.lstat().st_size for path in store.glob("objects/??/*")]
        sys.stdout.write(f"{len(objects)} objects, {sum(objects) / 1e6:.0f} MB\n")
        for what in ("fsck", "fsck --metadata-only", "gc --dry-run", "gc"):
            seconds = {
                tool: min(
                    time_on(store, [*command, what], copy=what == "gc")
                    for _ in range(arguments.rounds)
                )
                for tool, command in tools.items()
            }
            ratio = seconds["ours"] / seconds.get("composefs-rs", seconds["ours"])
            shown = "".join(f"{value:10.3f} s" for value in seconds.values())
            sys.stdout.write(f"{what:24}{shown}{ratio:10.2f}\n")


if __name__ == "__main__":
    main()
