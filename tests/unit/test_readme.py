"""The examples of the README and of docs/oci.md run as they are printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import command
from tests.paths import CHECKOUT, DATA

README = (CHECKOUT / "README.md").read_text()
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXAMPLES = PYTHON.findall(README)


def run(source: str, directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_making_reading_and_keeping_an_image(tmp_path: Path) -> None:
    *making, _ = EXAMPLES
    run("".join(making), tmp_path)


@pytest.fixture
def fuse() -> None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"FUSE is missing: {error}")


@pytest.fixture
def layout(tmp_path: Path) -> None:
    """An OCI layout with an image ``v1``, below the current directory."""
    subprocess.run(["tar", "-xf", DATA / "cli/oci.tar"], cwd=tmp_path, check=True)


@pytest.mark.usefixtures("layout")
def test_pulling_from_python(tmp_path: Path) -> None:
    (example,) = PYTHON.findall((CHECKOUT / "docs/oci.md").read_text())
    run(example, tmp_path)


@pytest.mark.usefixtures("layout", "fuse")
def test_pulling_and_mounting(tmp_path: Path) -> None:
    """The first example, with another image: this one takes no network."""
    first = re.search(r"(?:^    .*\n)+", README, re.MULTILINE)
    assert first is not None
    script = re.sub("docker://[^ ]+", "oci:layout:v1", first[0])
    assert script.count("cfsctl") == 4
    (tmp_path / "MOUNTPOINT").mkdir()
    start = f'set -e; cfsctl() {{ {shlex.join(command("cfsctl"))} "$@"; }}\n'
    done = subprocess.run(
        ["/bin/sh", "-c", start + script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search("^drwx.* usr$", done.stdout, re.MULTILINE)
    assert not (tmp_path / "MOUNTPOINT").is_mount()


@pytest.mark.usefixtures("fuse")
def test_serving_an_image(tmp_path: Path) -> None:
    run("".join(EXAMPLES), tmp_path)
    assert not (tmp_path / "mnt").is_mount()
