"""Power cuts while a store is written, and what is there when the machine boots again.

What a cut takes is the guest's memory: pages that no sync call has brought to the disk.  With
the sync calls taken out there must be damage, or this test could not see any.
"""

import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.vm.disks import NO_SYNC, made_disk
from tests.vm.machine import Machine, MachineEnded

NR_CUTS = int(os.environ.get("CFS_POWER_CUTS", "5"))
NR_CUTS_WITHOUT_SYNC = 8  # the first one or two are enough, as a rule
DISK_SIZE = 4 << 30
LONGEST_SECONDS = 4.0
COMMIT_SECONDS = 1  # of the file system's journal: names come to the disk as often
DAMAGES = ("mismatch", "invalid", "meta.json is no JSON")
STORE = "/run/data/store"
PYTHON = os.path.realpath(sys.executable)
# One interpreter does everything, because starting it takes longer than the rest: what fsck finds
# goes to a file, then trees are imported, from the number in the first argument on.  The next
# boot begins with the second of them: some of its objects are there, some are not.
PROGRAM = f"""
import contextlib, io, os, pathlib, random, sys
from cfs.cli.cfsctl import run
def cfsctl(*words):
    output = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(output):
        assert run(["--repo", "{STORE}", *words]) == 0, words
    output.seek(0)
    return output.read()
if not os.path.exists("{STORE}/meta.json"):
    cfsctl("init", "--insecure")
findings = cfsctl("fsck", "--json")
pathlib.Path("/run/findings.new").write_text(findings)
os.rename("/run/findings.new", "/run/findings")
first, nr_trees = map(int, sys.argv[1:])
for number in range(first, first + nr_trees):
    tree = pathlib.Path("/run/trees", str(number))
    tree.mkdir(parents=True)
    contents = random.Random(number)
    for name in range(60):
        (tree / str(name)).write_bytes(contents.randbytes(1000 + name * 700))
    cfsctl("create-image", "--no-propagate-usr-to-root", str(tree), f"tree-{{number}}")
print(cfsctl("fsck", "--json"))
"""


@pytest.fixture
def disk(tmp_path: Path, virtual_machine: None) -> Iterator[Path]:  # noqa: ARG001
    path = made_disk(DISK_SIZE, tmp_path / "disk")
    yield path
    path.unlink()


@contextmanager
def booted(disk: Path) -> Iterator[Machine]:
    with Machine(disk.parent, [disk]) as machine:
        machine.shell(f"mount -t ext4 -o commit={COMMIT_SECONDS} /dev/vdc /run/data").check()
        yield machine


def cut_power(disk: Path, number: int, moment: float, env: Mapping[str, str]) -> list[str]:
    """Boot, check the store, import trees until the power is cut; return what the check found."""
    with booted(disk) as machine:
        importer = machine.start(PYTHON, "-c", PROGRAM, str(number), "1000", seconds=600, env=env)
        while machine.run("test", "-e", "/run/findings").status:
            if importer.done():  # not even opened
                return [importer.result().stderr.decode()]
        errors: list[str] = json.loads(machine.shell("cat /run/findings").check())["errors"]
        time.sleep(moment)
        machine.kill()
    assert isinstance(importer.exception(), MachineEnded)
    return errors


def test_every_name_is_intact_after_power_cuts(disk: Path) -> None:
    for number in range(NR_CUTS):
        moment = random.uniform(0, LONGEST_SECONDS)
        assert cut_power(disk, number, moment, {}) == [], f"cut {number}, the next {moment} s"
    with booted(disk) as machine:
        done = machine.run(PYTHON, "-c", PROGRAM, str(NR_CUTS), "2", seconds=300)
        assert json.loads(machine.shell("cat /run/findings").check())["errors"] == []
        report = json.loads(done.check())
        assert report["errors"] == []
        assert report["images_checked"] >= 2


def test_without_sync_calls_power_cuts_do_damage(disk: Path) -> None:
    env = {"LD_PRELOAD": NO_SYNC}
    for number in range(NR_CUTS_WITHOUT_SYNC):
        moment = random.uniform(2 * COMMIT_SECONDS, LONGEST_SECONDS)
        if errors := cut_power(disk, number, moment, env):
            assert any(word in error for error in errors for word in DAMAGES), errors
            return
    pytest.fail("no damage: the machine loses nothing, or sync calls are not what protects")
