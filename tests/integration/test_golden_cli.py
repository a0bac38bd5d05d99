"""The recorded command lines that work on a store, area by area.

An area is a row of commands on the same stores: one test runs it and tells every difference.
Commands run in this process, but for mounts.  The lines of the C-compatible tools, and those that
only parse, are in ``test_commands.py``.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command_line import (
    CASES,
    Case,
    Done,
    check_case,
    check_text,
    prepare_case,
    run_case,
    run_here,
    run_shell,
    unpack_tree,
)
from tests.integration.test_commands import is_ours as is_elsewhere

LATER = {"ostree", "varlink"}  # with the commands of issue 7
FUSE_BELOW_OVERLAY = "overlay with userxattr and data-only layers"
KERNEL = tuple(int(part) for part in re.findall("[0-9]+", os.uname().release)[:2])
# what "oci dump" gave for the same image
ROOT = "4fcfe04e0368e770735a694f5eb91fe88187a3799545f19780c2e6e189805188"
READ_BY_NAME = "name with blank and accent\n"
DANGLING = f"ln -s ../../oci-manifest-sha256:{'0' * 64} r/streams/refs/oci/dangling"
# where 0.9 is wrong: what ours does (spec cli-and-varlink a.4 to a.6, a.8, c.6; repository 1.3,
# 4.3, 5.3, 8.4)
OURS: dict[str, Case] = {
    "again without --insecure: not compared": {"exit": 1, "stdout": ""},
    "the root cannot be dumped": {"exit": 0, "stdout_sha256": ROOT, "stdout_size": 4016},
    "by name in a store without fs-verity: 0.9 demands fs-verity, external files cannot be read": {
        "check_stdout": READ_BY_NAME
    },
    "tag of something that is not there: accepted by 0.9": {"exit": 1, "stdout": ""},
    "a dangling tag is not listed": {"prepare": DANGLING},
    "a dangling tag stops collection": {
        "stdout": "Dry run (no files deleted):\nObjects: 0 removed (0 bytes)\n",
        "stderr_has": ["streams/refs/oci/dangling"],
    },
    "digest with @": {
        "exit": 0,
        "check": "ls m",
        "check_exit": 0,
        "check_stdout": "boot\netc\nrun\nsysroot\nusr\nvar\n",
        "cleanup": "umount m",
    },
}


def select(*areas: str) -> list[Case]:
    """Return the lines of areas that ours can run, corrected where 0.9 is wrong."""
    return [
        {**case, **OURS.get(case["what"], {})}
        for case in CASES
        if case["area"] in areas
        and not LATER & set(case.get("argv", ()))
        and not (FUSE_BELOW_OVERLAY in case.get("needs", ()) and KERNEL < (6, 16))
    ]


class Recording:
    """Runs lines in one directory and collects what is different."""

    def __init__(self, work: Path, capture: pytest.CaptureFixture[bytes]) -> None:
        self._work = work
        self._capture = capture
        self._differences: list[str] = []

    def check(self, cases: list[Case]) -> None:
        """Run lines; afterwards fail with all differences, if there are any."""
        assert cases
        for case in cases:
            try:
                self._check(case)
            except Exception as error:  # noqa: BLE001 - what a command lets out is a difference
                self._differences.append(f"{case['what']}: {case.get('argv', '')}\n    {error!r}")
        assert not self._differences, "\n".join(["", *self._differences])

    def init(self, *whats: str) -> None:
        """Make the stores that lines of the area "init" make."""
        self.check([case for case in select("init") if case["what"] in whats])

    def _check(self, case: Case) -> None:
        if "argv" in case:
            with self._cleaning_up(case):
                check_case(case, self._run(case))
                if "check" in case:
                    done = run_shell(case["check"], self._work)
                    assert done.returncode == case["check_exit"], done.stderr
                    check_text(done.stdout.decode(), case["check_stdout"])
        elif "content" in case:
            assert (self._work / case["file"]).read_text() == case["content"]
        elif "listing" in case:
            assert sorted(os.listdir(self._work / "k")) == case["listing"]
        elif "files" in case:
            assert self._list("boot[12]", "state") == set(case["files"])
        else:
            prepare_case(case, self._work)

    def _list(self, *patterns: str) -> set[str]:
        """Name the files, and the empty directories with a slash."""
        return {
            f"{path.relative_to(self._work)}{'/' if path.is_dir() else ''}"
            for pattern in patterns
            for top in self._work.glob(pattern)
            for path in top.rglob("*")
            if not path.is_dir() or not any(path.iterdir())
        }

    def _run(self, case: Case) -> Done:
        name, *words = case["argv"]
        if name != "cfsctl" or "needs" in case:
            return run_case(case, self._work)
        prepare_case(case, self._work)
        return run_here(self._capture, *words, stdin=case.get("stdin", os.devnull))

    @contextmanager
    def _cleaning_up(self, case: Case) -> Iterator[None]:
        try:
            yield
        finally:
            if "cleanup" in case:
                run_shell(case["cleanup"], self._work)


@pytest.fixture
def recording(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> Recording:
    """The directory in which the lines were recorded, without any store."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the tree has devices, owners and trusted xattrs")
    unpack_tree(tmp_path)
    for variable, name in (("HOME", "home"), ("XDG_RUNTIME_DIR", "run")):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    return Recording(tmp_path, capfdbinary)


def test_stores_and_opening(recording: Recording) -> None:
    recording.check(select("init", "empty store", "opening"))


def test_tree(recording: Recording) -> None:
    recording.init("new store", "sha256 store, nested path", "ensure creates")
    recording.check(select("tree"))


STORES = ("new store", "sha256 store, nested path", "ensure creates")


def test_images(recording: Recording) -> None:
    recording.init(*STORES)
    recording.check(select("pull", "oci", "boot image", "images"))


def test_layers(recording: Recording) -> None:
    recording.check(select("layers"))


def test_copies(recording: Recording) -> None:
    recording.init(*STORES)
    recording.check(select("pull", "copy"))


def test_findings(recording: Recording) -> None:
    recording.check(select("findings"))


@pytest.mark.usefixtures("overlay", "fuse")
def test_mount(recording: Recording, tmp_path: Path) -> None:
    recording.init(*STORES)
    (tmp_path / "m").mkdir()
    pulls = [case for case in select("pull", "boot image") if "pull" in case["what"]]
    recording.check([*pulls, *select("images")[:1], *select("mount")])


def test_every_line_is_run_or_needs_what_comes_later() -> None:
    here = (
        "init",
        "empty store",
        "opening",
        "pull",
        "oci",
        "boot image",
        "images",
        "tree",
        "layers",
        "copy",
        "findings",
        "mount",
    )
    unused = {
        case["what"]
        for case in CASES
        if case["area"] not in here
        and case.get("argv", [""])[0] == "cfsctl"  # the C tools count, not the copies of them
        and not LATER & set(case["argv"])
        and not is_elsewhere(case)
    }
    assert unused == {
        "fuse without a value",  # ours needs none
        "behind a global option, from a directory: 0.9 panics",  # from a dumpfile it is run
    }
