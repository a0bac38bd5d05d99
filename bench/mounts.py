"""Time mounts of one real tree beside the kernel's own and those of the peers, in one run.

Usage: python bench/mounts.py [--quick] [--only CASES[,CONTESTANT]]... [--write] ...

The tree is a Debian root file system, made with mmdebstrap unless ``--work`` names a directory
of an earlier run.  Everybody mounts the same image over the same objects, whose pages are in
memory; contestants take turns, case by case.  Each round is done twice: on an idle machine, and
with one processor kept busy.  Root only.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from contestants import Contestant, Ground, MountFailed, adopt_orphans, all_contestants
from mount_cases import SEQUENCES, CaseSequence, ClientFailed
from mount_report import REFERENCE, Results, print_report, write_report
from side_by_side import time_command

_PACKAGES = (
    "build-essential,cmake,git,locales,manpages-dev,perl,perl-doc,python3-dev,python3-pip,vim"
)
_STATES = ("idle", "busy")
_BIG_BYTES = 1 << 30


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time mounts, ours and others")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument(
        "--only", action="append", default=[], metavar="CASES[,CONTESTANT]",
        help="of: " + " ".join(each.name for each in SEQUENCES) + "; repeatable",
    )  # fmt: skip
    parser.add_argument("--state", choices=_STATES, action="append", help="only this one")
    parser.add_argument("--work", type=Path, metavar="DIR", help="tree and images, kept there")
    parser.add_argument("--tree", type=Path, metavar="DIR", help="the tree, instead of Debian's")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md and .svg")
    for name in ("cfs", "composefs-fuse", "mount.composefs", "cfsctl"):
        whose = "ours" if name == "cfs" else "composefs-rs's" if name == "cfsctl" else "C's"
        parser.add_argument(f"--{name}", metavar="PATH", help=f"program of that name, {whose}")
    return parser.parse_args()


def main() -> None:
    """Prepare, measure, report."""
    arguments = _parse_arguments()
    if os.geteuid() != 0:
        sys.exit("mounts.py: only root can compare with the kernel's mounts")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing stays mounted
    adopt_orphans()
    names = ("cfs", "composefs-fuse", "mount.composefs", "cfsctl")
    tools = {name: path for name in names if (path := vars(arguments)[name.replace("-", "_")])}
    with tempfile.TemporaryDirectory(prefix="mounts-") as scratch:
        ground = Ground((arguments.work or Path(scratch)).absolute(), tools)
        _prepare(ground, arguments.tree)
        results = Results.empty(ground)
        rounds = 2 if arguments.quick else arguments.rounds
        _Contest(ground, results, arguments.only).run(rounds, arguments.state or _STATES)
    print_report(results)
    if arguments.write:
        write_report(results, Path(__file__).parents[1] / "docs")


def _prepare(ground: Ground, tree: Path | None) -> None:
    """Make what is not there: tree, images, objects, the repository of composefs-rs."""
    ground.mountpoint.mkdir(parents=True, exist_ok=True)
    big, root = ground.path / "big", tree or ground.path / "root"
    if not ground.image("tree").exists():
        if not root.exists():
            options = ["--variant=minbase", f"--include={_PACKAGES}", "--quiet"]
            _run("mmdebstrap", *options, "bookworm", root)
        _run(_own("mkcomposefs"), f"--digest-store={ground.objects}", root, ground.image("tree"))
    if not ground.image("big").exists():
        big.mkdir(exist_ok=True)
        numbers = random.Random(1)  # noqa: S311 - no secret
        with (big / "big").open("wb") as file:
            for _ in range(_BIG_BYTES >> 20):
                file.write(numbers.randbytes(1 << 20))
        _run(_own("mkcomposefs"), f"--digest-store={ground.objects}", big, ground.image("big"))
        shutil.rmtree(big)
    for name in ("tree", "big"):
        digest = _run(_own("composefs-info"), "measure-file", ground.image(name))
        (ground.path / f"{name}.digest").write_text(digest)
    _run("cc", "-O2", "-o", ground.path / "reads", Path(__file__).with_name("reads.c"))
    if (program := ground.tool("cfsctl")) and not ground.repository.exists():
        _run(program, "init", "--algorithm", "fsverity-sha256-12", "--insecure", ground.repository)
        shutil.rmtree(ground.repository / "objects", ignore_errors=True)
        (ground.repository / "objects").symlink_to("../objects")
        for name in ("tree", "big"):
            with ground.image(name).open("rb") as image:
                words = [program, "--repo", str(ground.repository), "--insecure", "import-image"]
                subprocess.run([*words, name], stdin=image, stdout=subprocess.DEVNULL, check=True)  # noqa: S603
    for path in ground.objects.glob("*/*"):  # from now on their pages are in memory
        with path.open("rb") as pages:
            while pages.read(1 << 20):
                pass


def _own(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _run(*words: str | Path) -> str:
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE)  # noqa: S603 - our own words
    return done.stdout.decode()


class _Contest:
    """Everybody's turns."""

    def __init__(self, ground: Ground, results: Results, only: Sequence[str]) -> None:
        self.ground = ground
        self.results = results
        self.cases = {word.partition(",")[0] for word in only} - {""}
        self.names = {word.partition(",")[2] for word in only} - {""}
        self.contestants = [each for each in all_contestants(ground) if self._takes_part(each)]
        results.contestants = {each.name: each.title for each in self.contestants}
        for name in sorted(self.cases - {each.name for each in SEQUENCES}):
            sys.exit(f"mounts.py: no such case: {name}")
        for name in sorted(self.names - set(results.contestants)):
            sys.exit(f"mounts.py: no such contestant: {name}")

    def _takes_part(self, contestant: Contestant) -> bool:
        return not self.names or contestant.name in {"kernel", *self.names}

    def run(self, rounds: int, states: Sequence[str]) -> None:
        """Measure; a contestant that fails is left out from then on."""
        for contestant in self.contestants:
            self._try_out(contestant)
        sequences = [each for each in SEQUENCES if not self.cases or each.name in self.cases]
        for nr in range(rounds):
            for state in states:
                with _busy_processor() if state == "busy" else nullcontext():
                    self._run_round(nr, state, sequences)

    def _run_round(self, nr: int, state: str, sequences: Sequence[CaseSequence]) -> None:
        command = [sys.executable, "-c", "import click, numpy"]
        for sequence in sequences:
            self.results.add(state, REFERENCE, "kernel", time_command(command))
            able = [each for each in self.contestants if each.name not in self.results.missing]
            turn = nr % max(len(able), 1)
            for contestant in able[turn:] + able[:turn]:
                _show(f"round {nr + 1} {state} {sequence.name} {contestant.name}")
                self._run_sequence(state, sequence, contestant)
        _show("")

    def _try_out(self, contestant: Contestant) -> None:
        reason = contestant.lacking
        if not reason:
            try:
                with contestant.mounted(self.ground, "tree"):
                    pass
            except MountFailed as error:
                reason = str(error)
        if reason:
            self.results.missing[contestant.name] = reason

    def _run_sequence(self, state: str, sequence: CaseSequence, contestant: Contestant) -> None:
        name = contestant.name
        try:
            with contestant.mounted(self.ground, sequence.image) as server:
                before = server.cpu_seconds()
                for step in sequence.steps:
                    may_fail = name.startswith("rs")
                    reads = self.ground.path / "reads"
                    seconds = step.run(server.mountpoint, reads, may_fail=may_fail)
                    self.results.add(state, step.case, name, seconds)
                used = server.cpu_seconds() - before
                peak = server.peak_bytes()
        except (ClientFailed, MountFailed) as error:
            self.results.missing[name] = f"failed: {error}"
            return
        if sequence.image == "tree":
            self.results.add(state, "start to first stat", name, server.start_seconds)
        self.results.add_use(state, sequence.name, name, used, peak)


def _show(progress: str) -> None:
    """Replace the line of progress, if somebody watches."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{progress}")


@contextmanager
def _busy_processor() -> Iterator[None]:
    """Keep the last usable processor busy."""
    last = max(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{last}])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])  # noqa: S603 - a loop
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
