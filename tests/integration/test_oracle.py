"""The kernel's own mount of the same image as oracle (see ``oracle_walk`` for what differs).

Once for each way to serve; overlay mode has its own in ``test_overlay_mode``, because there
overlayfs adds differences.  ``CFS_ORACLE_TREES`` is the number of random trees for all together.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import zstandard

from cfs.digest import Algorithm
from cfs.erofs import open_image
from cfs.erofs.writer import write_image
from cfs.fuse import Passthrough, ServeOptions, serve
from tests.integration.oracle_walk import walk
from tests.integration.trees import RandomTree
from tests.paths import CHECKOUT, DATA

pytestmark = pytest.mark.usefixtures("fuse", "private_mounts")
NR_TREES = int(os.environ.get("CFS_ORACLE_TREES", "30"))
WALK = Path(__file__).with_name("oracle_walk.py")
CASES = [(version, algorithm) for version in (0, 1, 2) for algorithm in Algorithm]
ALL_FLAGS = (1 << 64) - 1
# image, mount point, objects; gives the place where the mount is seen from here
ServeImage = Callable[[Path, Path, Path], AbstractContextManager[Path]]


def serve_with(options: ServeOptions) -> ServeImage:
    @contextmanager
    def serve_image(image: Path, mnt: Path, objects: Path) -> Iterator[Path]:
        with serve(open_image(image), mnt, [objects], name=image.name, options=options):
            yield mnt

    return serve_image


ROOTLESS = """
import sys
sys.path.insert(0, sys.argv[1])
from cfs.erofs import open_image
from cfs.fuse import serve
with serve(open_image(sys.argv[2]), sys.argv[3], [sys.argv[4]], name="rootless"):
    print("serving", flush=True)
    sys.stdin.read()
"""


@contextmanager
def serve_rootless(image: Path, mnt: Path, objects: Path) -> Iterator[Path]:
    """In a user namespace that knows all users, so that owners can be compared, but no rights.

    The mount is seen through the process that made it, with the eyes of the real root.
    """
    arguments = [CHECKOUT, image, mnt, objects]
    server = subprocess.Popen(
        ["unshare", "-U", "-m", "sh", "-c", 'echo unshared; read go; exec "$@"', "sh",
         sys.executable, "-P", "-c", ROOTLESS, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with server:
        assert server.stdin
        assert server.stdout
        if server.stdout.readline() != "unshared\n":
            pytest.skip("no user namespaces")
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{server.pid}/{kind}").write_text("0 0 4294967295")
        server.stdin.write("go\n")
        server.stdin.flush()
        assert server.stdout.readline() == "serving\n"
        yield Path(f"/proc/{server.pid}/root{mnt}")
        server.stdin.close()
        assert server.wait(60) == 0


WAYS: dict[str, ServeImage] = {
    "reference": serve_with(ServeOptions(workers=0)),
    "workers": serve_with(ServeOptions()),
    "passthrough": serve_with(ServeOptions(passthrough=Passthrough.ON)),
    "masked": serve_with(ServeOptions(masked_flags=ALL_FLAGS)),
    "rootless": serve_rootless,
}
NR_ROUNDS = -(-NR_TREES // (len(CASES) * len(WAYS)))


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> ServeImage:
    """A way to serve."""
    name: str = request.param
    if name != "reference":
        pytest.importorskip("cfs.fuse._worker", reason="the data plane is not built")
    if name in ("passthrough", "rootless") and os.geteuid() != 0:
        pytest.skip("needs root")
    return WAYS[name]


def compare(way: ServeImage, image: Path, objects: Path, tmp_path: Path) -> list[str]:
    """Serve an image over FUSE and return where that differs from the kernel's mount."""
    mnt = tmp_path / "fuse"
    mnt.mkdir(exist_ok=True)
    with way(image, mnt, objects) as place:
        done = subprocess.run(
            ["unshare", "-m", "--propagation", "private", sys.executable, "-S", str(WALK),
             str(image), str(objects), str(place), str(tmp_path / "scratch")],
            capture_output=True, check=False, text=True, errors="surrogateescape",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, *differences = done.stdout.splitlines()
    assert int(count.split()[0]) > 1
    return differences


@pytest.mark.usefixtures("overlay")
@pytest.mark.parametrize("number", range(NR_ROUNDS))
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1].name}")
def test_random_tree_looks_as_in_the_kernel(
    case: tuple[int, Algorithm], number: int, way: ServeImage, tmp_path: Path, objects: Path
) -> None:
    version, algorithm = case
    seed = 1000 * number + 10 * version + algorithm
    root = RandomTree(seed, version, algorithm, objects).make()
    image = tmp_path / "image"
    image.write_bytes(write_image(root, min_version=version, max_version=version))
    assert compare(way, image, objects, tmp_path) == []


@pytest.fixture
def kinds(tmp_path: Path) -> Path:
    """An image made by the C tool, with its objects in ``kobj`` next to it."""

    def golden(name: str) -> bytes:
        packed = (DATA / "images" / name).read_bytes()
        return zstandard.ZstdDecompressor().stream_reader(packed).read()

    objects = golden("kinds.objects.tar.zst")
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=objects, check=True)
    image = tmp_path / "image"
    image.write_bytes(golden("kinds.cfs.zst"))
    return image


@pytest.mark.usefixtures("overlay")
def test_image_made_by_the_c_tool_looks_as_in_the_kernel(
    way: ServeImage, kinds: Path, tmp_path: Path
) -> None:
    assert compare(way, kinds, tmp_path / "kobj", tmp_path) == []


def cut(image: Path) -> None:
    os.truncate(image, 0)


def overwrite(image: Path) -> None:
    size = image.stat().st_size
    with image.open("r+b") as file:
        file.write(b"\xaa" * size)


@pytest.mark.parametrize("workers", [0, None])
@pytest.mark.parametrize("spoil", [cut, overwrite])
def test_image_file_spoilt_under_a_live_mount_changes_nothing(
    spoil: Callable[[Path], None], workers: int | None, kinds: Path, tmp_path: Path
) -> None:
    spoilt, mnt, reference = (tmp_path / name for name in ("spoilt", "mnt", "reference"))
    shutil.copy(kinds, spoilt)
    mnt.mkdir()
    reference.mkdir()
    objects = [tmp_path / "kobj"]
    options = ServeOptions(workers=workers)
    with (
        serve(open_image(kinds), reference, objects, name="kinds"),
        serve(open_image(spoilt), mnt, objects, name="spoilt", options=options),
    ):
        spoil(spoilt)  # nothing has been looked at yet, so nothing is in the kernel's caches
        assert dict(walk(os.fsencode(mnt))) == dict(walk(os.fsencode(reference)))
