"""Every check of composefs-rs's own tests that concerns OCI images, through the command line.

The list is spec repository 11.2 and 11.3 and cli-and-varlink a.15; each test is named as there.
Not here: what needs a public registry, reflinks or a virtual machine, and varlink.  The layouts
are those of ``tests/data/oci``, made as 11.1 says.
"""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import run_here
from tests.paths import DATA

Cfsctl = Callable[..., str]

MANIFEST = "sha256:62b5cd278c87c43380733a3297917fb04498fe03abfab88bc8ff97a85f7ed241"
CONFIG = "sha256:e09ec0ce8b2f9caae1bd95e251b13cf8bebe71ce7d82130aa9deebd9717453dd"
LAYER = "sha256:b76cf369e13665e7dd1afd2a4c075b87d3f62deb92af2b9983959641bfb017e0"
# pinned upstream (spec repository 11.1)
FORMAT_1 = (
    "d06f1f6a73f62ed48e05ce9442ff045cdf2a9f5ba1ec623795de3d6177a253d9"
    "1076459795d94f55d8c3d71dab458bb3fc0071255a50c0a4896d86ffdc870b9a"
)
FORMAT_2 = (
    "f7684c21050615c02cec250e0c7d4118fb0ff6340af5039e06f2f372a7614fff"
    "25dfd38cf7f28ad67d8b86e86371b7deafa9ae4bf543630322aee6196417de92"
)
BOOTABLE = (
    "bc0367c455dde5e5ceb694ea62a0dc2fe0470e641f5a12e48b79a0e4212954f0"
    "9ce8049c5bea8d5074e2c39374a5c87e8059c16fa30423f3430cde3100b8f701"
)


@pytest.fixture
def cfsctl(capfdbinary: pytest.CaptureFixture[bytes]) -> Cfsctl:
    """Run a command that has to succeed; return what it prints."""

    def run_well(*words: str | Path, stdin: str | Path = os.devnull) -> str:
        done = run_here(capfdbinary, *words, stdin=stdin)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr
        return done.stdout.decode()

    return run_well


@pytest.fixture
def failing(capfdbinary: pytest.CaptureFixture[bytes]) -> Cfsctl:
    """Run a command that has to fail; return its one line on stderr."""

    def run_badly(*words: str | Path) -> str:
        done = run_here(capfdbinary, *words)
        assert done.returncode == 1
        assert re.fullmatch(rb"Error: [^\n]+\n", done.stderr), done.stderr
        return done.stderr.decode()

    return run_badly


@pytest.fixture
def pulled(repo: Path, layouts: Path, cfsctl: Cfsctl) -> Path:
    """The store with the fixture as ``test``."""
    cfsctl("--insecure", "--repo", repo, "oci", "pull", f"oci:{layouts / 'fixture'}", "test")
    return repo


def listed(cfsctl: Cfsctl, repo: Path) -> list[str]:
    found = json.loads(cfsctl("--repo", repo, "oci", "images", "--json"))
    return sorted(image["name"] for image in found["images"])


def check(cfsctl: Cfsctl, repo: Path, *words: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(cfsctl("--repo", repo, "oci", "fsck", *words, "--json"))
    return report


def objects(repo: Path) -> list[Path]:
    return sorted(path for path in (repo / "objects").rglob("*") if path.is_file())


def links(repo: Path) -> dict[str, str]:
    """Return the links of a store that name no stream with changing references, with targets."""
    return {
        str(path.relative_to(repo)): os.readlink(path)
        for directory in ("streams", "images")
        for path in (repo / directory).rglob("*")
        if path.is_symlink()
    }


# --- images, pull


def test_oci_images_empty_repo(cfsctl: Cfsctl, repo: Path) -> None:
    assert cfsctl("--insecure", "--repo", repo, "oci", "images") == "No images found\n"


def test_oci_images_json_empty_repo(cfsctl: Cfsctl, repo: Path) -> None:
    assert listed(cfsctl, repo) == []


def test_oci_pull_and_inspect(cfsctl: Cfsctl, repo: Path, layouts: Path) -> None:
    words = ("--insecure", "--repo", repo, "oci")
    printed = cfsctl(*words, "pull", f"oci:{layouts / 'fixture'}", "test")
    assert f"manifest {MANIFEST}\n" in printed
    assert "tagged   test\n" in printed
    assert "test" in cfsctl(*words, "images")
    inspected = json.loads(cfsctl(*words, "inspect", "test"))
    manifest = cfsctl(*words, "inspect", "test", "--manifest")
    config = cfsctl(*words, "inspect", f"@{MANIFEST}", "--config")
    assert (inspected["manifest"] + "\n", inspected["config"] + "\n") == (manifest, config)
    assert json.loads(manifest)["config"]["digest"] == CONFIG
    assert json.loads(config)["rootfs"]["diff_ids"] == [LAYER]
    assert (inspected["composefs_erofs"], inspected["referrers"]) == (FORMAT_2, [])


def test_oci_compute_id_by_ref(cfsctl: Cfsctl, pulled: Path) -> None:
    words = ("--insecure", "--repo", pulled, "oci", "compute-id")
    assert cfsctl(*words, "test") == f"{FORMAT_2}\n"
    assert cfsctl(*words, f"@{CONFIG}") == f"{FORMAT_2}\n"


def test_oci_pull_v1_digest_stability(cfsctl: Cfsctl, tmp_path: Path, layouts: Path) -> None:
    cfsctl("init", "--insecure", tmp_path / "r")
    cfsctl("--repo", tmp_path / "r", "oci", "pull", f"oci:{layouts / 'fixture'}", "test")
    assert cfsctl("--repo", tmp_path / "r", "oci", "compute-id", "test") == f"{FORMAT_1}\n"
    assert os.listdir(tmp_path / "r/images") == [FORMAT_1]


# --- layers


def test_oci_layer_inspect(cfsctl: Cfsctl, pulled: Path) -> None:
    words = ("--insecure", "--repo", pulled, "oci", "layer", LAYER)
    found = json.loads(cfsctl(*words, "--json"))
    assert (found["diffId"], found["size"], found["entryCount"]) == (LAYER, 3072, 3)
    assert found["splitstream"] == {"externalObjects": 0, "externalSize": 0, "inlineSize": 3072}
    assert re.fullmatch("[0-9a-f]{128}", found["verity"])
    assert cfsctl(*words, "--dumpfile").splitlines() == [
        "/usr 0 40755 1 0 0 0 1234567890.0 - - -",
        "/hello.txt 22 100644 1 0 0 0 1234567890.0 - hello\\x20from\\x20test\\x20layer\\n -",
        "/hello-link.txt 0 @120000 - - - - 0.0 /hello.txt - -",
    ]


def test_layer_tar_roundtrip(cfsctl: Cfsctl, pulled: Path, tmp_path: Path) -> None:
    words = ("--insecure", "--repo")
    layer = cfsctl(*words, pulled, "oci", "layer", LAYER).encode()
    with tarfile.open(fileobj=io.BytesIO(layer)) as members:
        assert members.getnames() == ["usr", "hello.txt", "hello-link.txt"]
        file = members.extractfile("hello.txt")
        assert file is not None
        assert file.read() == b"hello from test layer\n"
    (tmp_path / "tar").write_bytes(layer)
    cfsctl("init", "--insecure", tmp_path / "again")
    imported = cfsctl(
        *words, tmp_path / "again", "oci", "import-layer", LAYER, stdin=tmp_path / "tar"
    )
    found = json.loads(cfsctl(*words, pulled, "oci", "layer", LAYER, "--json"))
    assert imported == f"sha512:{found['verity']}\n"


# --- tags and collection


def test_oci_tag_and_untag(cfsctl: Cfsctl, pulled: Path) -> None:
    words = ("--insecure", "--repo", pulled, "oci")
    assert listed(cfsctl, pulled) == ["test"]
    cfsctl(*words, "tag", MANIFEST, "again")
    assert listed(cfsctl, pulled) == ["again", "test"]
    cfsctl(*words, "untag", "test")
    assert listed(cfsctl, pulled) == ["again"]
    assert cfsctl(*words, "compute-id", "again") == f"{FORMAT_2}\n"


def test_oci_gc_removes_untagged(cfsctl: Cfsctl, pulled: Path) -> None:
    cfsctl("--repo", pulled, "gc")
    assert len(objects(pulled)) == 6  # manifest and config, each with its stream; layer; image
    cfsctl("--insecure", "--repo", pulled, "oci", "untag", "test")
    cfsctl("--insecure", "--repo", pulled, "gc")
    assert (objects(pulled), links(pulled)) == ([], {})


# --- fsck


def test_oci_fsck_healthy(cfsctl: Cfsctl, pulled: Path) -> None:
    report = check(cfsctl, pulled)
    assert (report["ok"], report["images_checked"], report["images_corrupted"]) == (True, 1, 0)
    assert report["repo"]["ok"]


def test_oci_fsck_single_image(cfsctl: Cfsctl, pulled: Path) -> None:
    cfsctl("--repo", pulled, "oci", "tag", MANIFEST, "other")
    assert check(cfsctl, pulled)["images_checked"] == 2
    report = check(cfsctl, pulled, "test")
    assert (report["ok"], report["images_checked"]) == (True, 1)


def test_oci_fsck_detects_corrupted_manifest(cfsctl: Cfsctl, failing: Cfsctl, pulled: Path) -> None:
    path = (pulled / f"streams/oci-manifest-{MANIFEST}").resolve()
    path.unlink()
    path.write_text("CORRUPTED")
    report = check(cfsctl, pulled)
    assert (report["ok"], report["images_corrupted"]) == (False, 1)
    assert "OCI integrity check failed" in failing("--repo", pulled, "oci", "fsck")


# --- boot images


def test_oci_pull_bootable_expected_digest_recovers(
    cfsctl: Cfsctl, repo: Path, layouts: Path
) -> None:
    words = ("--repo", repo, "oci", "pull", "--bootable", "--expected-digest", BOOTABLE)
    printed = cfsctl(*words, f"oci:{layouts / 'fixture-boot'}", "boot")
    assert f"Boot image: {BOOTABLE} (xattr-mode=allowlist-only, format-version=V1)\n" in printed


def test_oci_pull_bootable_expected_digest_not_found(
    failing: Cfsctl, cfsctl: Cfsctl, repo: Path, layouts: Path
) -> None:
    words = ("--repo", repo, "oci", "pull", "--bootable", "--expected-digest", "0" * 128)
    message = failing(*words, f"oci:{layouts / 'fixture-boot'}", "boot")
    assert "(tried 4 mode/version combinations)" in message
    assert listed(cfsctl, repo) == ["boot"]


def test_oci_pull_expected_digest_requires_bootable(
    capfdbinary: pytest.CaptureFixture[bytes], repo: Path, layouts: Path
) -> None:
    words = ("--repo", repo, "oci", "pull", "--expected-digest", BOOTABLE)
    done = run_here(capfdbinary, *words, f"oci:{layouts / 'fixture-boot'}")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"bootable" in done.stderr


# --- copies


def test_copy_image_correctness(cfsctl: Cfsctl, pulled: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    cfsctl("init", "--insecure", "--erofs-version", "2", other)
    cfsctl("--repo", other, "oci", "copy", "test", "--from", pulled, "--name", "copied")
    assert listed(cfsctl, other) == ["copied"]
    for words in (["inspect"], ["dump"], ["compute-id"]):
        mine = cfsctl("--repo", pulled, "oci", *words, "test")
        assert cfsctl("--repo", other, "oci", *words, "copied") == mine
    cfsctl("--repo", pulled, "gc")
    cfsctl("--repo", other, "gc")
    assert links(other) == {
        name.replace("oci/test", "oci/copied"): target for name, target in links(pulled).items()
    }
    assert check(cfsctl, other)["ok"]


@pytest.mark.parametrize("zerocopy", [False, True])
def test_copy_image_cross_algorithm_cli(
    cfsctl: Cfsctl, failing: Cfsctl, layouts: Path, tmp_path: Path, *, zerocopy: bool
) -> None:
    stores = {name: tmp_path / name for name in ("sha256", "sha512")}
    for name, store in stores.items():
        cfsctl("init", "--insecure", "--algorithm", f"fsverity-{name}-12", store)
    image = f"oci:{layouts / 'fixture'}"
    cfsctl("--repo", stores["sha256"], "oci", "pull", image, "test")
    words = ("--repo", stores["sha512"], "oci", "copy", "test", "--from", stores["sha256"])
    if zerocopy:  # test_copy_image_zerocopy_algo_mismatch
        message = failing(*words, "--zerocopy")
        assert "zerocopy" in message
        assert "hash algorithm" in message
        assert objects(stores["sha512"]) == []
        return
    cfsctl(*words, "--name", "test")
    assert cfsctl("--repo", stores["sha512"], "oci", "compute-id", "test") == f"{FORMAT_1}\n"
    assert check(cfsctl, stores["sha512"])["ok"]


def test_copy_artifact(cfsctl: Cfsctl, repo: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "-xf", str(DATA / "cli/oci.tar")], cwd=tmp_path, check=True)
    cfsctl("--repo", repo, "oci", "pull", f"oci:{tmp_path / 'layout'}:sig", "sig")
    other = tmp_path / "other"
    cfsctl("init", "--insecure", "--erofs-version", "2", other)
    cfsctl("--repo", other, "oci", "copy", "sig", "--from", repo, "--name", "sig")
    words = ("oci", "inspect", "sig")
    assert cfsctl("--repo", other, *words) == cfsctl("--repo", repo, *words)
    blob = json.loads(cfsctl("--repo", repo, *words, "--manifest"))["layers"][0]["digest"]
    content = cfsctl("--repo", repo, "cat", f"oci-layer-{blob}")
    assert cfsctl("--repo", other, "cat", f"oci-layer-{blob}") == content
    assert check(cfsctl, other)["ok"]


# --- containers-storage


@pytest.fixture
def storage(
    layouts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    root: None,  # noqa: ARG001
) -> Iterator[str]:
    """A storage with the fixture, as skopeo writes it; its name there."""
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    place = tmp_path / "storage"
    name = f"containers-storage:[overlay@{place}+{tmp_path / 'run'}]localhost/test:latest"
    words = ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{layouts / 'fixture-boot'}", name]
    done = subprocess.run(words, capture_output=True, check=False, timeout=60)
    try:
        if done.returncode:
            pytest.skip(f"skopeo cannot write containers-storage: {done.stderr.decode().strip()}")
        monkeypatch.setenv("CONTAINERS_STORAGE_ROOT", str(place))
        yield "containers-storage:localhost/test:latest"
    finally:  # it mounts this on itself, and leaves that
        subprocess.run(["umount", "-q", place / "overlay"], capture_output=True, check=False)


def test_cstor_vs_skopeo_equivalence(
    storage: str, cfsctl: Cfsctl, repo: Path, layouts: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    cfsctl("init", "--insecure", "--erofs-version", "2", other)
    cfsctl("--repo", repo, "oci", "pull", "--local-fetch", "auto", storage, "test")
    cfsctl("--repo", other, "oci", "pull", f"oci:{layouts / 'fixture-boot'}", "test")
    for store in (repo, other):
        cfsctl("--repo", store, "gc")
    layers = [
        {name: target for name, target in links(store).items() if "oci-layer-" in name}
        for store in (repo, other)
    ]
    assert layers[0] == layers[1] != {}
    for words in (["compute-id"], ["inspect", "--config"]):
        mine = cfsctl("--repo", repo, "oci", *words, "test")
        assert cfsctl("--repo", other, "oci", *words, "test") == mine


def test_cstor_idempotent_import_with_reference(storage: str, cfsctl: Cfsctl, repo: Path) -> None:
    words = ("--repo", repo, "oci", "pull", "--local-fetch", "auto", storage)
    cfsctl(*words, "test")
    cfsctl("--repo", repo, "gc")
    before = links(repo)
    assert "0 new" in cfsctl(*words, "test")
    cfsctl("--repo", repo, "gc")
    assert links(repo) == before
    cfsctl(*words, "again")
    assert listed(cfsctl, repo) == ["again", "test"]


def test_cstor_bootable(storage: str, cfsctl: Cfsctl, tmp_path: Path) -> None:
    cfsctl("init", "--insecure", tmp_path / "r")
    words = ("--repo", tmp_path / "r", "oci", "pull", "--bootable", "--local-fetch", "auto")
    assert f"Boot image: {BOOTABLE}\n" in cfsctl(*words, storage, "test")


def test_cstor_additional_image_store(
    storage: str, cfsctl: Cfsctl, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTAINERS_STORAGE_ROOT", str(tmp_path / "none"))
    monkeypatch.setenv("STORAGE_OPTS", f"additionalimagestore={tmp_path / 'storage'}")
    cfsctl("--repo", repo, "oci", "pull", "--local-fetch", "auto", storage, "test")
    assert listed(cfsctl, repo) == ["test"]


# --- privileged


@pytest.mark.usefixtures("overlay")
def test_privileged_oci_pull_mount(cfsctl: Cfsctl, pulled: Path, mnt: Path) -> None:
    cfsctl("--repo", pulled, "oci", "mount", "test", mnt)
    try:
        assert sorted(os.listdir(mnt)) == ["hello-link.txt", "hello.txt", "usr"]
        assert (mnt / "hello.txt").read_text() == "hello from test layer\n"
        assert (mnt / "hello.txt").stat().st_ino == (mnt / "hello-link.txt").stat().st_ino
    finally:
        subprocess.run(["umount", mnt], check=True)


@pytest.mark.usefixtures("overlay")
def test_privileged_oci_bootable_mount(
    cfsctl: Cfsctl, failing: Cfsctl, repo: Path, layouts: Path, mnt: Path
) -> None:
    words = ("--repo", repo, "oci")
    image = f"oci:{layouts / 'fixture-boot'}"
    cfsctl(*words, "pull", image, "boot")
    message = failing(*words, "mount", "--bootable", "boot", mnt)
    assert "No boot EROFS image linked" in message
    cfsctl(*words, "pull", "--bootable", image, "boot")
    cfsctl(*words, "mount", "--bootable", "boot", mnt)
    try:
        assert sorted(os.listdir(mnt)) == ["boot", "hello-link.txt", "hello.txt", "sysroot", "usr"]
        assert os.listdir(mnt / "boot") == []
    finally:
        subprocess.run(["umount", mnt], check=True)
