"""``cfsctl fuse-serve`` as a user starts it, on real mounts."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.stores import make_image
from tests.integration.waiting import start_server
from tests.paths import CHECKOUT

pytestmark = pytest.mark.usefixtures("fuse")

CFSCTL = [sys.executable, "-m", "cfs.cli.main"]
BIG = os.urandom(70_000)
DEADLINE = 60


@pytest.fixture
def image(tmp_path: Path, objects: Path) -> Path:
    """An image of a small tree, its objects below ``objects``."""
    return make_image(tmp_path, objects, {"big": BIG, "small": b"text"})


@pytest.fixture
def command(image: Path, objects: Path, mnt: Path) -> Iterator[list[str]]:
    """The command line without options; afterwards nothing is mounted."""
    yield [*CFSCTL, "--no-repo", "fuse-serve", "--basedir", str(objects), str(image), str(mnt)]
    unmount(mnt)


def unmount(mnt: Path) -> None:
    if os.path.ismount(mnt):
        tool = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
        subprocess.run([*tool, str(mnt)], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_foreground_serves_until_a_signal(
    command: list[str], mnt: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with start_server(command, tmp_path, CHECKOUT) as server:
        assert (mnt / "big").read_bytes() == BIG
        server.send_signal(number)
        assert server.wait(DEADLINE) == 0
        assert not os.path.ismount(mnt)


def test_outside_unmount_ends_the_server_with_0(
    command: list[str], mnt: Path, tmp_path: Path
) -> None:
    with start_server(command, tmp_path, CHECKOUT) as server:
        assert (mnt / "small").read_text() == "text"
        unmount(mnt)
        assert server.wait(DEADLINE) == 0


def test_background_returns_when_it_serves(command: list[str], image: Path, mnt: Path) -> None:
    # both pipes end although the server lives on
    done = subprocess.run(
        [*command, "--background"], cwd=CHECKOUT, capture_output=True, check=True, timeout=DEADLINE
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    assert (mnt / "big").read_bytes() == BIG
    found = subprocess.run(["findmnt", "-J", str(mnt)], capture_output=True, check=True)
    (mount,) = json.loads(found.stdout)["filesystems"]
    assert mount["fstype"] == "fuse.composefs"
    assert mount["source"] == f"composefs:{image}"
    assert {"ro", "default_permissions"} <= set(mount["options"].split(","))
    assert "allow_other" not in mount["options"]


def test_allow_other_only_when_asked(command: list[str], mnt: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: user_allow_other may not be set in fuse.conf")
    subprocess.run(
        [*command, "--background", "-o", "allow-other"], cwd=CHECKOUT, check=True, timeout=DEADLINE
    )
    found = subprocess.run(
        ["findmnt", "-no", "OPTIONS", str(mnt)], capture_output=True, check=True, text=True
    )
    assert "allow_other" in found.stdout


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["-o", "workers=x"], 2, "workers"),
        (["-o", "nonsense"], 2, "nonsense"),
        (["--grace", "nan"], 2, "nan"),
        (["--grace", "-1"], 2, "-1"),
        (["-o", "workers=17"], 2, "workers"),
        (["-o", "passthrough,mode=overlay"], 2, "passthrough"),
        (["-o", "mode=overlay,verify=open"], 2, "verify=open"),
        (["-o", "workers=0,passthrough"], 2, "workers=0"),
        (["--upperdir", "u", "--workdir", "w"], 2, "mode=overlay"),
        (["-o", "mode=overlay", "--upperdir", "u"], 2, "work directory"),
        (["--basedir", "/nonexistent"], 1, "/nonexistent"),
    ],
)
@pytest.mark.parametrize("background", [True, False])
def test_what_cannot_be_done_is_one_clear_error(
    command: list[str], mnt: Path, words: list[str], status: int, text: str, *, background: bool
) -> None:
    options = [*words, "--background"] if background else words
    done = subprocess.run(
        [*command, *options], cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not os.path.ismount(mnt)


def test_missing_mount_point_and_image(image: Path, tmp_path: Path) -> None:
    for arguments in ([image, tmp_path / "nowhere"], [tmp_path / "nothing", tmp_path]):
        done = subprocess.run(
            [*CFSCTL, "--no-repo", "fuse-serve", *map(str, arguments)],
            cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=DEADLINE,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1


def test_statistics_on_demand_and_at_the_end(command: list[str], mnt: Path, tmp_path: Path) -> None:
    pytest.importorskip("cfs.fuse._worker", reason="the data plane is not built")
    with start_server([*command, "--stats"], tmp_path, CHECKOUT) as server:
        assert server.stderr
        (mnt / "small").read_bytes()
        server.send_signal(signal.SIGUSR1)
        lines = iter(server.stderr.readline, b"restarts: 0\n")
        assert b"requests read: 1\n" in list(lines)
        (mnt / "big").read_bytes()
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=DEADLINE)
        assert server.returncode == 0
    assert b"read bytes: %d\n" % (len(BIG) + len("text")) in err


def test_statistics_of_what_goes_into_the_background_are_refused(command: list[str]) -> None:
    done = subprocess.run(
        [*command, "--stats", "--background"], cwd=CHECKOUT, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"SIGUSR1" in done.stderr
