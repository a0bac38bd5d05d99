"""What the kernel says of our capabilities."""

import shutil
import subprocess
import sys

import pytest

from cfs.linux.capabilities import Capability, has_capability
from tests.paths import CHECKOUT

PROGRAM = (
    "from cfs.linux.capabilities import Capability, has_capability;"
    "print(has_capability(Capability.DAC_READ_SEARCH))"
)


def test_capability_that_was_given_up() -> None:
    if not has_capability(Capability.DAC_READ_SEARCH) or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv (util-linux)")
    for option, expected in (("", "True"), ("--bounding-set=-dac_read_search", "False")):
        words = ["setpriv", option] if option else []
        done = subprocess.run(
            [*words, sys.executable, "-c", PROGRAM],
            cwd=CHECKOUT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == expected
