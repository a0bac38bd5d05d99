"""An importer that is killed at any system call leaves a store that is sound (issue 5)."""

import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.command_line import run_forking
from tests.paths import CHECKOUT

WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion", "-Wsign-conversion"]
SIZES = (65, 4096, 5000, 65_536, 3 << 19)  # the last one is copied, the others are written
SHARES = 2
MIN_CALLS = 40
DEADLINE = 300


@pytest.fixture(scope="session")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    library = tmp_path_factory.mktemp("killer") / "killer.so"
    source = CHECKOUT / "tests" / "c" / "killer.c"
    subprocess.run(
        ["gcc", "-std=gnu11", "-O2", *WARNINGS, "-shared", "-fPIC", "-o", library, source],
        check=True,
    )
    return library


def make_tree(path: Path) -> None:
    numbers = random.Random(5)
    (path / "usr" / "bin").mkdir(parents=True)
    (path / "etc").symlink_to("usr/etc")
    for number, size in enumerate(SIZES):
        (path / "usr" / "bin" / f"file {number}").write_bytes(numbers.randbytes(size))
    (path / "usr" / "twice").write_bytes((path / "usr" / "bin" / "file 3").read_bytes())


@pytest.mark.parametrize("kind", ["unnamed", "named", "damaged"])
def test_importer_killed_at_every_change_of_the_store(
    ground: Path, killer: Path, kind: str
) -> None:
    def work(share: int) -> "dict[str, object]":
        directory = ground / str(share)
        make_tree(directory / "tree")
        return run_forking("killing", killer, directory, kind, share, SHARES)

    with ThreadPoolExecutor(SHARES) as executor:
        results = list(executor.map(work, range(1, SHARES + 1)))
    assert [result["problems"] for result in results] == [[]] * SHARES
    assert all(int(str(result["calls"])) > MIN_CALLS for result in results)
