"""The C tests of the worker, by two compilers and with sanitizers, and its fuzzers.

``CFS_FUZZ_SECONDS`` is how long each fuzzer runs (default 60).  It begins with the files in
``tests/data/fuzz``, where inputs are kept that broke it once.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cfs.fuse.shared import publish
from cfs.tree import Directory, Regular, Special, Symlink
from tests.integration.vectors import make_vector
from tests.paths import CHECKOUT, DATA

BUILD = CHECKOUT / "tests" / "c" / "build"
FUZZ_SECONDS = int(os.environ.get("CFS_FUZZ_SECONDS", "60"))
DEADLINE = 300
UNRANDOMISED = ["setarch", "--addr-no-randomize"]  # which TSan needs
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def build(directory: Path, compiler: str, variant: str) -> Path:
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    program = directory / variant
    done = subprocess.run(
        [BUILD, program, compiler, variant], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return program


def run(directory: Path, command: list[str | Path], seconds: float) -> str:
    """Run where it may leave files."""
    done = subprocess.run(
        [*UNRANDOMISED, *command],
        cwd=directory,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("variant", ["plain", "address", "thread"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_worker(compiler: str, variant: str, tmp_path: Path) -> None:
    """Over a socket pair, and where it is possible on a real mount."""
    program = build(tmp_path, compiler, variant)
    objects = tmp_path / "objects"
    objects.mkdir()
    output = run(tmp_path, [program, objects], DEADLINE)
    assert "tests passed" in output
    if may_mount():
        for passthrough in ([], ["passthrough"]):
            use_mount(tmp_path, [program, objects, "serve", tmp_path / "mnt", *passthrough])


def may_mount() -> bool:
    return os.geteuid() == 0 and os.path.exists("/dev/fuse")


def use_mount(directory: Path, command: list[str | Path]) -> None:
    mnt = directory / "mnt"
    mnt.mkdir(exist_ok=True)
    server = subprocess.Popen(
        [*UNRANDOMISED, *command],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with server:
        assert server.stdout
        assert server.stderr
        try:
            if server.stdout.readline() == "serving\n":
                with ThreadPoolExecutor(4) as pool:
                    counts = list(pool.map(read_everything, [mnt] * 4))
                assert counts == [(2000, 4)] * 4
        finally:
            subprocess.run(["umount", "-l", mnt], check=False)
        assert server.wait(DEADLINE) == 0, server.stderr.read()


def read_everything(mnt: Path) -> tuple[int, int]:
    """Return how many files of the large directory are right, and what else can be read."""
    files = list((mnt / "big").iterdir())
    nr_right = sum(path.read_text() == path.name for path in files)
    nr_others = 0
    for name in ("inline", "object", "lost", "short", "sparse", "empty", "link"):
        path = mnt / name
        if path.is_symlink():
            nr_others += os.readlink(path) == "somewhere/else"
        elif path.is_dir():
            nr_others += os.listdir(path) == []
        elif name in ("inline", "object"):
            nr_others += len(path.read_bytes()) == path.stat().st_size
        else:
            with pytest.raises(OSError, match=r"error|No such"), path.open("rb") as file:
                os.pread(file.fileno(), 100, 0)
    return nr_right, nr_others


def make_table_seed(directory: Path) -> None:
    file = Regular(mode=0o100644, size=4, content=b"text", xattrs={b"user.a": b"1"})
    tree = {
        b"device": Special(mode=0o020600, rdev=259),
        b"directory": Directory(mode=0o040755, nlink=2, children={b"file": file}),
        b"link": Symlink(mode=0o120777, size=1, target=b"x"),
        b"object": Regular(mode=0o100644, size=9, payload=b"aa/bb"),
    }
    fd = publish(make_vector(Directory(mode=0o040755, nlink=3, children=dict(tree))))
    with open(fd, "rb") as memfd:
        memfd.seek(0)
        (directory / "seed").write_bytes(memfd.read())


@pytest.mark.parametrize("target", ["requests", "table"])
def test_fuzz(target: str, tmp_path: Path) -> None:
    program = build(tmp_path, "clang", f"fuzz_{target}")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    if target == "table":
        make_table_seed(corpus)
    known = DATA / "fuzz" / target
    options = [f"-max_total_time={FUZZ_SECONDS}", "-timeout=30", f"-artifact_prefix={tmp_path}/"]
    sources = [corpus, known] if known.is_dir() else [corpus]
    output = run(tmp_path, [program, *options, *sources], FUZZ_SECONDS + DEADLINE)
    sys.stderr.write(output[-200:])
    assert "Done " in output
