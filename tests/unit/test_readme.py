"""The examples of the README run as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import CHECKOUT

EXAMPLES = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)


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


def test_serving_an_image(tmp_path: Path) -> None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"FUSE is missing: {error}")
    run("".join(EXAMPLES), tmp_path)
    assert not (tmp_path / "mnt").is_mount()
