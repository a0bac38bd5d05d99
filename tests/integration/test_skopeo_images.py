"""Archives and storage as skopeo writes them, pulled natively: what comes is the same as before."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cfs.linux.capabilities import Capability, has_capability
from cfs.linux.mountinfo import mounted_at
from cfs.linux.mounts import detach_mount
from tests.command_line import Done, run_here
from tests.oci_layouts import unpack_layouts

Pull = Callable[..., Done]

SECONDS = 120


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("skopeo"):
        pytest.skip("needs skopeo")
    return unpack_layouts(tmp_path_factory.mktemp("layouts"))


def skopeo_copy(source: str, target: str) -> Done:
    words = ["skopeo", "--insecure-policy", "copy", "-q", source, target]
    return subprocess.run(words, capture_output=True, check=False, timeout=SECONDS)


@pytest.fixture
def pull(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> Pull:
    """Pull an image into a new store, whose name is the tag as well."""

    def pull_image(image: str, name: str, *options: str) -> Done:
        store = ["--repo", str(tmp_path / name)]
        run_here(capfdbinary, *store, "init", "--insecure")
        return run_here(capfdbinary, *store, "oci", "pull", *options, image, name)

    return pull_image


def streams(store: Path, kind: str) -> dict[str, str]:
    """Return names and objects of the streams of a kind."""
    links = sorted((store / "streams").glob(f"oci-{kind}-*"))
    return {link.name: os.readlink(link) for link in links}


def check_same(tmp_path: Path, *names: str) -> None:
    for kind in ("layer", "config"):
        first, *others = (streams(tmp_path / name, kind) for name in names)
        assert first
        for other in others:
            assert other == first


def test_archives(layouts: Path, tmp_path: Path, pull: Pull) -> None:
    expected = pull(f"oci:{layouts}/fixture", "layout")
    assert expected.returncode == 0, expected.stderr
    for transport in ("oci-archive", "docker-archive"):
        image = f"{transport}:{tmp_path}/{transport}.tar:docker.io/user/image:v1"
        done = skopeo_copy(f"oci:{layouts}/fixture", image)
        assert done.returncode == 0, done.stderr
        done = pull(image, transport)
        assert done.returncode == 0, done.stderr
        check_same(tmp_path, "layout", transport)
        done = pull(image + "x", "none")
        assert done.returncode == 1
        assert b"v1x" in done.stderr


@contextmanager
def storage_of_skopeo(layouts: Path, path: Path) -> Iterator[Path]:
    """Copy an image to a new storage; its mount of itself is there in the block only."""
    root = path / "root"
    place = f"[overlay@{root}+{path / 'run'}]localhost/image:v1"
    done = skopeo_copy(f"oci:{layouts}/multi:v1", f"containers-storage:{place}")
    try:
        if done.returncode:
            pytest.skip(f"skopeo can have no storage here: {done.stderr.decode().strip()}")
        yield root
    finally:
        if mounted_at(str(root / "overlay")) is not None:
            detach_mount(str(root / "overlay"))


def spied_skopeo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the words of skopeo written to a file."""
    words = tmp_path / "words"
    program = tmp_path / "programs/skopeo"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{words}\nexec {shutil.which("skopeo")} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return words


@pytest.mark.usefixtures("root")
def test_containers_storage(
    layouts: Path, tmp_path: Path, pull: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = "containers-storage:image:v1"
    expected = pull(f"oci:{layouts}/multi:v1", "layout")
    assert expected.returncode == 0, expected.stderr
    monkeypatch.setenv("CONTAINERS_STORAGE_ROOT", str(tmp_path / "storage/root"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with storage_of_skopeo(layouts, tmp_path / "storage"):
        done = pull(image, "used", "--local-fetch=auto")
        assert done.returncode == 0, done.stderr
        done = pull(image, "linked", "--local-fetch=zerocopy")
        if done.returncode:  # no reflinks, and no hard links from one mount to another
            assert b"root/overlay is a mount of its own" in done.stderr
        place = f"[overlay@{tmp_path}/storage/root+{tmp_path}/storage/run]"
        given = spied_skopeo(tmp_path, monkeypatch)
        monkeypatch.setenv("TMPDIR", str(scratch))
        done = pull(f"containers-storage:{place}localhost/image:v1", "skopeo")
        assert done.returncode == 0, done.stderr
        assert f"--tmpdir={scratch}/cfs-" in given.read_text()  # skopeo leaves every layer there
        assert list(scratch.iterdir()) == []
    check_same(tmp_path, "layout", "used", "skopeo")
    if not has_capability(Capability.DAC_READ_SEARCH):
        pytest.skip("needs CAP_DAC_READ_SEARCH: hard links to the files of others")
    done = pull(image, "zerocopy", "--local-fetch=zerocopy")
    assert done.returncode == 0, done.stderr
    assert b"0 copied + 0 already present" in done.stdout
    check_same(tmp_path, "layout", "zerocopy")
    # the same image: its manifest too
    assert streams(tmp_path / "zerocopy", "manifest").keys() == (
        streams(tmp_path / "layout", "manifest").keys()
    )
