"""Abilities of the machine as fixtures, and a watch over mounts and descriptors.

A test that needs an ability which is missing is skipped with the reason.  The environment
variable ``CFS_ABILITIES`` ("root fuse overlay private_mounts virtual_machine") names those that
must be there: then it fails.
"""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cfs.cli.cfsctl import run
from cfs.fuse import Mount, ServeOptions, serve
from cfs.inodes import InodeVector
from cfs.linux.mounts import detach_mount
from tests.command_line import Done, run_here
from tests.oci_layouts import unpack_layouts
from tests.vm.cache import Unavailable
from tests.vm.machine import prepare

Serve = Callable[..., Mount]
Rust = Callable[..., subprocess.CompletedProcess[bytes]]
_RUST_SECONDS = 60

# a shell lets its background jobs ignore SIGINT, and all that we start would inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _lack(ability: str, reason: str) -> None:
    if ability in os.environ.get("CFS_ABILITIES", "").split():
        pytest.fail(f"{ability} is demanded: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def root() -> None:
    if os.geteuid() != 0:
        _lack("root", "needs root")


@pytest.fixture(scope="session")
def fuse() -> None:
    pytest.importorskip("pyfuse3", reason="pyfuse3 is not installed")
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        _lack("fuse", f"/dev/fuse: {error.strerror}")
    if os.geteuid() == 0:
        namespace = ["unshare", "-m", "--propagation", "unchanged", "true"]
        done = subprocess.run(namespace, capture_output=True, check=False)
        if done.returncode:
            _lack("fuse", f"may not mount: {done.stderr.decode().strip()}")


@pytest.fixture(scope="session")
def private_mounts() -> None:
    """Mount namespaces from which no mount gets out; a plain chroot cannot make them."""
    done = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    if done.returncode:
        _lack("private_mounts", f"no private mount namespace: {done.stderr.decode().strip()}")


@pytest.fixture(scope="session")
def overlay() -> None:
    """Kernel that mounts EROFS from a file, and overlayfs with data-only layers."""
    if os.geteuid() != 0:
        _lack("overlay", "needs root")
    for fstype in ("erofs", "overlay"):
        if modprobe := shutil.which("modprobe"):
            subprocess.run([modprobe, "-q", fstype], check=False, capture_output=True)
        if f"\t{fstype}\n" not in Path("/proc/filesystems").read_text():
            _lack("overlay", f"the kernel has no {fstype}")


@pytest.fixture(scope="session")
def virtual_machine() -> None:
    """QEMU and a kernel with fs-verity for it; ``tests/vm/README.md``."""
    try:
        prepare()
    except Unavailable as error:
        _lack("virtual_machine", f"no virtual machine: {error}")


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    """Fail a test that leaves mounts below ``tmp_path`` or descriptors, and take those away."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    mounts = _mounts_below(str(tmp_path))
    for mountpoint in reversed(mounts):
        detach_mount(mountpoint)
    assert mounts == []
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def _mounts_below(directory: str) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return [point for line in lines if (point := line.split(" ")[4]).startswith(directory + "/")]


@pytest.fixture
def mnt(tmp_path: Path) -> Path:
    """An empty directory to mount on."""
    directory = tmp_path / "mnt"
    directory.mkdir()
    return directory


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    """An empty objects directory."""
    directory = tmp_path / "objects"
    directory.mkdir()
    return directory


@pytest.fixture(params=[0, None], ids=["reference", "workers"])
def workers(request: pytest.FixtureRequest) -> int | None:
    """Which plane serves: pyfuse3 alone, or as many C workers as by default."""
    if request.param is None:
        pytest.importorskip("cfs.fuse._worker", reason="the data plane is not built")
    number: int | None = request.param
    return number


@pytest.fixture
def served(mnt: Path, objects: Path, workers: int | None) -> Iterator[Serve]:
    """Serve a vector on ``mnt`` until the test ends, once by each plane; needs ``fuse``."""
    with ExitStack() as stack:

        def start(vector: InodeVector, **choices: Any) -> Mount:
            options = ServeOptions(workers=workers, **choices)
            return stack.enter_context(serve(vector, mnt, [objects], name="test", options=options))

        yield start


@pytest.fixture(scope="session")
def rust_words() -> list[str]:
    name = os.environ.get("CFS_RUST_CFSCTL")
    if not name:
        pytest.skip("CFS_RUST_CFSCTL does not name the cfsctl of composefs-rs")
    return [name]


@pytest.fixture
def rust(rust_words: list[str], tmp_path: Path) -> Rust:
    """Run composefs-rs."""
    variables = {key: value for key, value in os.environ.items() if key != "RUST_BACKTRACE"}

    def run_rust(*words: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*rust_words, *words],
            cwd=tmp_path,
            env=variables,
            input=stdin,
            capture_output=True,
            check=False,
            timeout=_RUST_SECONDS,
        )

    return run_rust


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden layouts of ``tests/data/oci``."""
    return unpack_layouts(tmp_path_factory.mktemp("layouts"))


@pytest.fixture
def cfs(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., Done]:
    """``cfsctl`` on a new store, in this process."""

    def run_cfs(*words: str | Path) -> Done:
        done = run_here(capfdbinary, "--repo", tmp_path / "store", *words)
        assert b"Traceback" not in done.stderr
        return done

    assert run_cfs("init", "--insecure").returncode == 0
    return run_cfs


@pytest.fixture
def ground() -> Iterator[Path]:
    """A directory in memory if possible: the kernel survives, so syncs only cost time here."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        yield Path(directory)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A new store of sha256."""
    path = tmp_path / "store"
    assert run(["init", "--insecure", "--algorithm", "fsverity-sha256-12", str(path)]) == 0
    return path


@pytest.fixture
def repo(tmp_path: Path, cfsctl: Callable[..., object]) -> Path:
    """A store as upstream's tests make it, with the ``cfsctl`` of a module."""
    path = tmp_path / "repo"
    cfsctl("--repo", path, "init", "--insecure", "--erofs-version", "2")
    return path
