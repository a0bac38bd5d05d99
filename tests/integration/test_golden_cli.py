"""The recorded command lines that work on a store, area by area.

An area is a row of commands on the same stores: one test runs it and tells every difference.
The lines of the C-compatible tools, and those that only parse, are in ``test_commands.py``.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command_line import (
    CASES,
    Case,
    check_case,
    check_text,
    run_case,
    run_shell,
    unpack_tree,
)
from tests.integration.pulled_store import PulledStore
from tests.integration.test_commands import is_ours as is_elsewhere

LATER = {"oci", "ostree", "varlink"}  # with the commands of issue 6 and 7
FUSE_BELOW_OVERLAY = "overlay with userxattr and data-only layers"
KERNEL = tuple(int(part) for part in re.findall("[0-9]+", os.uname().release)[:2])
# what "oci dump" gave for the same image
ROOT = "4fcfe04e0368e770735a694f5eb91fe88187a3799545f19780c2e6e189805188"
READ_BY_NAME = "name with blank and accent\n"
# where 0.9 is wrong: what ours does (spec cli-and-varlink a.5, a.8, c.6; repository 1.3, 4.3, 8.4)
OURS: dict[str, Case] = {
    "again without --insecure: not compared": {"exit": 1, "stdout": ""},
    "the root cannot be dumped": {"exit": 0, "stdout_sha256": ROOT, "stdout_size": 4016},
    "by name in a store without fs-verity: 0.9 demands fs-verity, external files cannot be read": {
        "check_stdout": READ_BY_NAME
    },
    "a dangling tag stops collection": {
        "stdout": "Dry run (no files deleted):\nObjects: 0 removed (0 bytes)\n",
        "stderr_has": ["streams/refs/oci/dangling"],
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


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The directory in which the lines were recorded, without any store."""
    if os.geteuid() != 0:
        pytest.skip("needs root: the tree has devices, owners and trusted xattrs")
    unpack_tree(tmp_path)
    for name in ("home", "run"):
        (tmp_path / name).mkdir()
    return tmp_path


class Recording:
    """Runs lines in one directory and collects what is different."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._environment = {
            "HOME": str(work / "home"),
            "XDG_RUNTIME_DIR": str(work / "run"),
        }
        self._differences: list[str] = []

    def check(self, cases: list[Case]) -> None:
        """Run lines; afterwards fail with all differences, if there are any."""
        assert cases
        for case in cases:
            try:
                self._check(case)
            except (AssertionError, OSError, subprocess.SubprocessError) as error:
                self._differences.append(f"{case['what']}: {case.get('argv', '')}\n    {error}")
        assert not self._differences, "\n".join(["", *self._differences])

    def _check(self, case: Case) -> None:
        if "argv" in case:
            with self._cleaning_up(case):
                check_case(case, run_case(case, self._work, **self._environment))
                if "check" in case:
                    done = run_shell(case["check"], self._work)
                    assert done.returncode == case["check_exit"], done.stderr
                    check_text(done.stdout.decode(), case["check_stdout"])
        elif "file" in case:
            assert (self._work / case["file"]).read_text() == case["content"]
        elif case["what"] == "what reset leaves":
            assert sorted(os.listdir(self._work / "k")) == case["listing"]
        else:
            msg = "nobody knows what this line shows"
            raise AssertionError(msg)

    @contextmanager
    def _cleaning_up(self, case: Case) -> Iterator[None]:
        try:
            yield
        finally:
            if "cleanup" in case:
                run_shell(case["cleanup"], self._work)


def init(work: Path, *whats: str) -> Recording:
    """Make the stores that lines of the area "init" make."""
    recording = Recording(work)
    recording.check([case for case in select("init") if case["what"] in whats])
    return recording


def test_stores_and_opening(work: Path) -> None:
    Recording(work).check(select("init", "empty store", "opening"))


def test_tree(work: Path) -> None:
    recording = init(work, "new store", "sha256 store, nested path", "ensure creates")
    recording.check(select("tree"))


def test_images(work: Path) -> None:
    recording = init(work, "new store")
    pulled = PulledStore(work / "r", work)
    pulled.pull_container(bootable=True)
    pulled.pull_artifact()
    recording.check(select("images"))


def test_streams(work: Path) -> None:
    recording = init(work, "new store")
    pulled = PulledStore(work / "r", work)
    config = pulled.pull_container()
    assert str(config).startswith("75372f531dce4def4e69fbf9d3e22642"), "not what was recorded"
    pulled.pull_artifact()
    cases = select("oci")
    recording.check([case for case in cases if "dangling" not in case["what"]])
    (work / "r/streams/refs/oci/dangling").symlink_to(f"../../oci-manifest-sha256:{'0' * 64}")
    recording.check([case for case in cases if "dangling" in case["what"]])


def test_layers(work: Path) -> None:
    recording = init(work, "new store")
    (work / "r").rename(work / "i")
    layers = PulledStore(work / "i", work)
    layers.add_layer("base.tar")
    layers.add_layer("top.tar", "nm")
    recording.check(select("layers"))


def test_findings(work: Path) -> None:
    recording = init(work, "new store")
    (work / "r").rename(work / "k0")
    PulledStore(work / "k0", work).pull_container()
    (image,) = (path.name for path in (work / "k0/images").iterdir())
    (work / "k0/images/refs").mkdir()
    (work / "k0/images/refs/one").symlink_to(f"../{image}")
    subprocess.run(["tar", "-C", "k0", "-cf", "healthy.tar", "."], cwd=work, check=True)
    recording.check(
        [c for c in select("findings") if c["what"] != "how the store of this area is made"]
    )


@pytest.mark.usefixtures("overlay", "fuse")
def test_mount(work: Path) -> None:
    recording = init(work, "new store")
    PulledStore(work / "r", work).pull_container()
    (work / "m").mkdir()
    recording.check([*select("images")[:1], *select("mount")])


def test_every_line_is_run_or_needs_what_comes_later() -> None:
    here = (
        "init",
        "empty store",
        "opening",
        "tree",
        "images",
        "oci",
        "layers",
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
