"""Kills ``cfsctl create-image`` at every system call that changes the store; a program.

    killing.py LIBRARY DIRECTORY KIND FIRST STEP

LIBRARY is ``tests/c/killer.c``, DIRECTORY holds a directory ``tree`` and is filled with stores.  A
round for each of the calls FIRST, FIRST + STEP, ... until there are no more of them: a new store,
an import that is killed at that call, fsck, another import, fsck, gc.  Prints as JSON how many
imports were killed, and what was wrong.

All rounds are children of one process that has loaded all modules, since starting Python and
loading them takes longer than a round.
"""

import ctypes
import json
import os
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

from cfs.cli.cfsctl import run
from cfs.errors import UnsupportedError
from cfs.objectdir import pending, temporary
from cfs.repository.fsck import check
from cfs.repository.repository import Repository

BATCH = 4  # objects, so that there are several batches


def run_here(*arguments: str) -> None:
    with open(os.devnull, "w") as null, redirect_stdout(null):
        status = run(arguments)
    assert status == 0


def run_child(*arguments: str, tracer: ctypes.CDLL | None = None, call: int = 0) -> int:
    """Run cfsctl in a child, killed at a system call if that is given; return the wait status."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        if tracer and tracer.cfs_be_traced():
            os._exit(2)
        os._exit(run(arguments))
    if tracer is None:
        return os.waitpid(pid, 0)[1]
    nr_calls, status = ctypes.c_long(), ctypes.c_int()
    failed = tracer.cfs_kill_at(
        pid, ctypes.c_long(call), ctypes.byref(nr_calls), ctypes.byref(status)
    )
    if failed:
        raise OSError(-failed, os.strerror(-failed))
    return status.value


def check_store(path: Path) -> list[str]:
    with Repository.open(str(path)) as repository:
        return check(repository).errors


def list_store(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def prepare(kind: str) -> None:
    """Have small batches, and named temporary files if that is wanted."""
    pending._MIN_BATCH = pending._MAX_BATCH = BATCH
    if kind == "named":

        def refuse(*_: object) -> int:
            raise UnsupportedError("no unnamed files")

        vars(temporary)["open_unnamed"] = refuse


def damage(store: Path) -> None:
    """Leave some objects of the store, all of them truncated."""
    for path in sorted((store / "objects").glob("*/*"))[::2]:
        os.truncate(path, path.stat().st_size - 1)
    for path in sorted((store / "objects").glob("*/*"))[1::2]:
        path.unlink()
    shutil.rmtree(store / "images")


def main() -> None:
    library, directory, kind, first, step = sys.argv[1:]
    tracer = ctypes.CDLL(library)
    base = Path(directory)
    prepare(kind)
    whole, template, store = base / "whole", base / "template", base / "store"
    for path in (whole, template):
        run_here("init", "--insecure", "--algorithm", "fsverity-sha256-12", str(path))
    importing = ("create-image", str(base / "tree"), "name")
    # here, so that the children find all modules loaded: that takes longer than their work
    run_here("--repo", str(whole), *importing)
    run_here("--repo", str(whole), "gc")
    expected = list_store(whole)
    if kind == "damaged":
        shutil.rmtree(template)
        shutil.copytree(whole, template, symlinks=True)
        damage(template)
    call, problems = int(first), []
    while True:
        shutil.copytree(template, store, symlinks=True)
        status = run_child("--repo", str(store), *importing, tracer=tracer, call=call)
        found = [] if kind == "damaged" else check_store(store)
        if run_child("--repo", str(store), *importing):
            found.append("the second import failed")
        found += check_store(store)
        if run_child("--repo", str(store), "gc"):
            found.append("gc failed")
        if list_store(store) != expected:
            found.append(f"left: {set(list_store(store)) ^ set(expected)}")
        shutil.rmtree(store)
        problems += [f"call {call}: {text}" for text in found]
        if not os.WIFSIGNALED(status):
            problems += [] if status == 0 else [f"call {call}: status {status}"]
            break
        call += int(step)
    json.dump({"calls": call, "problems": problems}, sys.stdout)


if __name__ == "__main__":
    main()
