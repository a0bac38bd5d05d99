"""Every check of composefs-rs's own tests that concerns the store, through the command line.

The list is spec repository 11.2 and 11.3 and cli-and-varlink a.15; each test is named as there.
Not here: OCI and varlink, which ``test_upstream_oci.py`` and ``test_upstream_varlink.py`` have, and
what needs fs-verity, which ``test_verity_vm.py`` has; ostree comes with that command.
"""

import filecmp
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Done, command, environment, run
from tests.integration.waiting import wait_until
from tests.stores import unpack_store

Cfsctl = Callable[..., str]
_BIG = b"of a file that is an object\n" * 100


@pytest.fixture
def cfsctl(tmp_path: Path) -> Cfsctl:
    """Run a command that has to succeed; return what it prints."""

    def run_well(*words: str | Path) -> str:
        done = run("cfsctl", *words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, b""), done.stderr
        return done.stdout.decode()

    return run_well


@pytest.fixture
def failing(tmp_path: Path) -> Cfsctl:
    """Run a command that has to fail; return its one line on stderr."""

    def run_badly(*words: str | Path) -> str:
        done = run("cfsctl", *words, cwd=tmp_path)
        check_failure(done)
        return done.stderr.decode()

    return run_badly


def check_failure(done: Done) -> None:
    assert done.returncode == 1
    assert re.fullmatch(rb"Error: [^\n]+\n", done.stderr), done.stderr


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """A small root file system."""
    path = tmp_path / "rootfs"
    for name in ("usr/bin", "usr/lib", "etc"):
        (path / name).mkdir(parents=True)
    (path / "usr/bin/hello").write_bytes(_BIG)
    (path / "usr/lib/readme.txt").write_text("short")
    (path / "etc/hostname").write_text("host")
    (path / "usr/bin/link").symlink_to("hello")
    return path


def metadata(repo: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((repo / "meta.json").read_text())
    return found


def object_files(repo: Path) -> list[Path]:
    return sorted(path for path in (repo / "objects").rglob("*") if path.is_file())


# --- collection


def test_gc_empty_repo(cfsctl: Cfsctl, repo: Path) -> None:
    assert "Objects: 0 removed" in cfsctl("--insecure", "--repo", repo, "gc")


def test_gc_after_create(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    cfsctl("--insecure", "--repo", repo, "create-image", rootfs)
    printed = cfsctl("--insecure", "--repo", repo, "gc")
    assert re.match(r"Objects: 2 removed \([0-9]+ bytes\)\nPruned symlinks: 1 images", printed)
    assert object_files(repo) == []


def test_gc_dry_run(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    image = cfsctl("--insecure", "--repo", repo, "create-image", rootfs).strip()
    before = object_files(repo)
    assert "Dry run" in cfsctl("--insecure", "--repo", repo, "gc", "--dry-run")
    assert object_files(repo) == before
    assert cfsctl("--insecure", "--repo", repo, "image-objects", image.partition(":")[2])


# --- images


def test_create_image_from_path(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    printed = cfsctl("--insecure", "--repo", repo, "create-image", rootfs)
    assert re.fullmatch(r"sha512:[0-9a-f]{128}\n", printed)


def test_create_image_idempotent(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    words = ("--insecure", "--repo", repo, "create-image", rootfs)
    assert cfsctl(*words) == cfsctl(*words)


def test_create_image_v1_idempotent(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    words = ("--insecure", "--repo", repo, "--erofs-version", "1", "create-image", rootfs)
    first = cfsctl(*words)
    assert first == cfsctl(*words)
    assert first != cfsctl("--insecure", "--repo", repo, "create-image", rootfs)


def test_create_and_list_objects(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    image = cfsctl("--insecure", "--repo", repo, "create-image", rootfs, "my-image").strip()
    by_id = cfsctl("--insecure", "--repo", repo, "image-objects", image.partition(":")[2])
    assert re.fullmatch(r"sha512:[0-9a-f]{128}\n", by_id)
    assert cfsctl("--insecure", "--repo", repo, "image-objects", "refs/my-image") == by_id


def test_compute_image_id(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    words = ("--insecure", "--repo", repo, "compute-id", rootfs)
    assert cfsctl(*words) == cfsctl(*words)
    assert re.fullmatch(r"[0-9a-f]{128}\n", cfsctl(*words))


def test_dump_files(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    cfsctl("--insecure", "--repo", repo, "create-image", rootfs, "i")
    words = ("--insecure", "--repo", repo, "dump-files", "i")
    line = cfsctl(*words, "/usr/bin/hello")
    assert line.startswith(f"/usr/bin/hello {len(_BIG)} 100644 ")
    paths = cfsctl(*words, "--backing-path-only", "/usr/bin/hello", "/etc/hostname").splitlines()
    name, path = paths[0].split()
    assert (name, (repo / "objects" / path).read_bytes()) == ("/usr/bin/hello", _BIG)
    assert paths[1] == "/etc/hostname inline"


# --- init and opening


def test_init_creates_metadata(cfsctl: Cfsctl, tmp_path: Path) -> None:
    printed = cfsctl("init", "--insecure", tmp_path / "r")
    assert "Initialized" in printed
    assert metadata(tmp_path / "r")["version"] == 1
    assert metadata(tmp_path / "r")["algorithm"] == "fsverity-sha512-12"


def test_init_sha256(cfsctl: Cfsctl, tmp_path: Path) -> None:
    printed = cfsctl("init", "--insecure", "--algorithm", "fsverity-sha256-12", tmp_path / "r")
    assert "fsverity-sha256-12" in printed
    assert metadata(tmp_path / "r")["algorithm"] == "fsverity-sha256-12"


def test_init_idempotent(cfsctl: Cfsctl, tmp_path: Path) -> None:
    cfsctl("init", "--insecure", tmp_path / "r")
    before = (tmp_path / "r/meta.json").read_bytes()
    assert "already initialized" in cfsctl("init", "--insecure", tmp_path / "r")
    assert (tmp_path / "r/meta.json").read_bytes() == before


def test_init_conflict(cfsctl: Cfsctl, failing: Cfsctl, tmp_path: Path) -> None:
    cfsctl("init", "--insecure", tmp_path / "r")
    failing("init", "--insecure", "--algorithm", "fsverity-sha256-12", tmp_path / "r")
    assert metadata(tmp_path / "r")["algorithm"] == "fsverity-sha512-12"


def test_init_creates_directory(cfsctl: Cfsctl, tmp_path: Path) -> None:
    cfsctl("init", "--insecure", tmp_path / "a/b/c")
    assert (tmp_path / "a/b/c/meta.json").is_file()


def test_init_insecure(cfsctl: Cfsctl, tmp_path: Path) -> None:
    assert "insecure" in cfsctl("init", "--insecure", tmp_path / "r")
    assert "insecure" in cfsctl("--insecure", "--repo", tmp_path / "s", "init")


def test_init_reset_metadata(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    cfsctl("--insecure", "--repo", repo, "create-image", rootfs, "i")
    (repo / "streams").mkdir(exist_ok=True)
    objects = object_files(repo)
    cfsctl("init", "--insecure", "--reset-metadata", repo)
    assert not (repo / "streams").exists()
    assert not (repo / "images").exists()
    assert object_files(repo) == objects
    assert cfsctl("--repo", repo, "create-image", rootfs)


def test_init_reset_metadata_changes_algorithm(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    algorithm = "fsverity-sha256-12"
    cfsctl("init", "--insecure", "--reset-metadata", "--algorithm", algorithm, repo)
    assert metadata(repo)["algorithm"] == algorithm
    assert cfsctl("--repo", repo, "create-image", rootfs).startswith("sha256:")


def test_hash_mismatch_errors(failing: Cfsctl, repo: Path) -> None:
    assert "sha256" in failing("--repo", repo, "--hash", "sha256", "gc")


def test_hash_match_ok(cfsctl: Cfsctl, repo: Path) -> None:
    cfsctl("--repo", repo, "--hash", "sha512", "gc")


def test_auto_detect_hash_for_operations(cfsctl: Cfsctl, tmp_path: Path, rootfs: Path) -> None:
    repo = tmp_path / "r"
    cfsctl("init", "--insecure", "--algorithm", "fsverity-sha256-12", repo)
    image = cfsctl("--repo", repo, "create-image", rootfs).strip()
    assert re.fullmatch("sha256:[0-9a-f]{64}", image)
    assert cfsctl("--repo", repo, "image-objects", image.partition(":")[2])
    assert cfsctl("--repo", repo, "fsck").endswith("status: ok\n")


def test_no_metadata_errors(failing: Cfsctl, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    failing("--repo", tmp_path / "r", "gc")


def test_missing_metadata_fails(failing: Cfsctl, tmp_path: Path, rootfs: Path) -> None:
    (tmp_path / "r/objects").mkdir(parents=True)
    failing("--repo", tmp_path / "r", "create-image", rootfs)


def test_old_format_repo_gives_migration_hint(
    cfsctl: Cfsctl, failing: Cfsctl, repo: Path, rootfs: Path
) -> None:
    cfsctl("--repo", repo, "create-image", rootfs)
    (repo / "meta.json").unlink()
    message = failing("--repo", repo, "--no-upgrade", "images")
    assert "meta.json" in message
    assert "cfsctl init" in message
    assert not (repo / "meta.json").exists()


@pytest.mark.parametrize("name", ["sha256", "sha512"])
def test_read_old_format_repo(name: str, cfsctl: Cfsctl, failing: Cfsctl, tmp_path: Path) -> None:
    repo = unpack_store(name, tmp_path / "old")
    cfsctl("--repo", repo, "gc")
    (repo / "meta.json").unlink()
    failing("--repo", repo, "--no-upgrade", "images")
    assert "base" in cfsctl("--repo", repo, "images")
    assert metadata(repo)["algorithm"] == f"fsverity-{name}-12"
    assert cfsctl("--repo", repo, "cat", "refs/oci/example%2Fapp:v1")
    assert "Objects: 0 removed" in cfsctl("--repo", repo, "gc")
    assert cfsctl("--repo", repo, "fsck").endswith("status: ok\n")


def test_require_verity_fails_on_insecure_repo(failing: Cfsctl, repo: Path) -> None:
    failing("--require-verity", "--repo", repo, "gc")


def test_init_insecure_skips_verity(cfsctl: Cfsctl, repo: Path) -> None:
    assert "Initialized" not in cfsctl("init", "--insecure", "--erofs-version", "2", repo)
    done = run("composefs-info", "measure-file", repo / "meta.json", cwd=repo)
    assert done.returncode == 0  # whether or not the file system could
    assert json.loads(cfsctl("--repo", repo, "fsck", "--json"))["ok"]


# --- fsck


def fsck(cfsctl: Cfsctl, repo: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(cfsctl("--insecure", "--repo", repo, "fsck", "--json"))
    return report


def test_fsck_empty_repo(cfsctl: Cfsctl, repo: Path) -> None:
    report = fsck(cfsctl, repo)
    assert (report["ok"], report["objects_checked"], report["errors"]) == (True, 0, [])


def test_fsck_healthy_repo(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    cfsctl("--insecure", "--repo", repo, "create-image", rootfs, "i")
    report = fsck(cfsctl, repo)
    assert (report["ok"], report["objects_corrupted"], report["broken_links"]) == (True, 0, 0)
    assert (report["objects_checked"], report["images_checked"]) == (2, 1)


@pytest.fixture
def corrupted(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> Path:
    """The store, of which one object was overwritten."""
    cfsctl("--insecure", "--repo", repo, "create-image", rootfs, "i")
    (path,) = (path for path in object_files(repo) if path.read_bytes() == _BIG)
    path.unlink()
    path.write_text("CORRUPTED")
    return repo


def test_fsck_detects_corrupted_object(cfsctl: Cfsctl, corrupted: Path) -> None:
    report = fsck(cfsctl, corrupted)
    assert (report["ok"], report["objects_corrupted"]) == (False, 1)
    assert report["errors"]


def test_fsck_nonzero_exit_on_corruption(corrupted: Path) -> None:
    done = run("cfsctl", "--insecure", "--repo", corrupted, "fsck", cwd=corrupted)
    check_failure(done)
    assert b"object-digest-mismatch" in done.stdout


def test_fsck_detects_broken_image_ref(cfsctl: Cfsctl, repo: Path, rootfs: Path) -> None:
    cfsctl("--insecure", "--repo", repo, "create-image", rootfs, "i")
    (repo / "images/refs/dangling").symlink_to("../nowhere")
    report = fsck(cfsctl, repo)
    assert (report["ok"], report["broken_links"]) == (False, 1)


# --- without a store


def test_compute_id_no_repo(cfsctl: Cfsctl, rootfs: Path) -> None:
    assert re.fullmatch(r"[0-9a-f]{128}\n", cfsctl("--no-repo", "compute-id", rootfs))


def test_compute_id_no_repo_matches_repo(
    cfsctl: Cfsctl, repo: Path, rootfs: Path, tmp_path: Path
) -> None:
    without = cfsctl("--no-repo", "compute-id", rootfs)
    assert cfsctl("--insecure", "--repo", repo, "compute-id", rootfs) == without
    (tmp_path / "empty").mkdir()
    assert cfsctl("--repo", tmp_path / "empty", "compute-id", rootfs) == without
    image = cfsctl("--repo", repo, "--erofs-version", "1", "create-image", rootfs)
    assert image == f"sha512:{without}"


def test_compute_id_keep_user_xattrs(cfsctl: Cfsctl, rootfs: Path) -> None:
    os.setxattr(rootfs / "usr/bin/hello", "user.test", b"value")
    words = ("--no-repo", "compute-id")
    kept = cfsctl(*words, "--xattrs", "keep-user-xattrs", rootfs)
    assert kept != cfsctl(*words, rootfs)
    assert cfsctl(*words, "--xattrs", "allowlist-only", rootfs) == cfsctl(*words, rootfs)


def test_create_dumpfile_no_repo(cfsctl: Cfsctl, rootfs: Path) -> None:
    assert "/usr/bin/hello " in cfsctl("--no-repo", "create-dumpfile", rootfs)


def test_no_repo_rejects_create_image(failing: Cfsctl, rootfs: Path) -> None:
    assert "--no-repo" in failing("--no-repo", "create-image", rootfs)


# --- formats


def test_erofs_versions(cfsctl: Cfsctl, tmp_path: Path, rootfs: Path) -> None:
    cfsctl("init", "--insecure", tmp_path / "r")
    cfsctl("init", "--insecure", "--erofs-version", "2", tmp_path / "s")
    words = ("create-image", rootfs)
    by_default = cfsctl("--repo", tmp_path / "r", *words)
    assert by_default == cfsctl("--repo", tmp_path / "s", "--erofs-version", "1", *words)
    assert by_default != cfsctl("--repo", tmp_path / "s", *words)
    assert "v1_erofs" in metadata(tmp_path / "r")["features"]["read-only-compatible"]
    assert "v1_erofs" not in metadata(tmp_path / "s")["features"]["read-only-compatible"]


def test_v1_repo_uses_v1_by_default(cfsctl: Cfsctl, tmp_path: Path, rootfs: Path) -> None:
    cfsctl("init", "--insecure", tmp_path / "r")
    image = cfsctl("--repo", tmp_path / "r", "create-image", rootfs).strip()
    header = (tmp_path / "r/images" / image.partition(":")[2]).read_bytes()[:16]
    assert int.from_bytes(header[12:16], "little") == 1


# --- mkcomposefs, and beside the C tool


def mkcomposefs(directory: Path, *words: str | Path) -> bytes:
    done = run("mkcomposefs", *words, cwd=directory)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_mkcomposefs_basic(rootfs: Path, tmp_path: Path) -> None:
    mkcomposefs(tmp_path, rootfs, "image")
    image = (tmp_path / "image").read_bytes()
    assert int.from_bytes(image[:4], "little") == 0xD078629A
    assert int.from_bytes(image[1024:1028], "little") == 0xE0F5E1E2


def test_mkcomposefs_print_digest_only(rootfs: Path, tmp_path: Path) -> None:
    printed = mkcomposefs(tmp_path, "--print-digest-only", rootfs)
    assert re.fullmatch(rb"[0-9a-f]{64}\n", printed)


def test_mkcomposefs_deterministic(rootfs: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        mkcomposefs(tmp_path, rootfs, name)
    assert filecmp.cmp(tmp_path / "one", tmp_path / "two", shallow=False)


def test_mkcomposefs_hardlinks_dedup(rootfs: Path, tmp_path: Path) -> None:
    (rootfs / "usr/again").hardlink_to(rootfs / "usr/bin/hello")
    mkcomposefs(tmp_path, rootfs, "one")
    mkcomposefs(tmp_path, "--hardlinks", rootfs, "two")
    assert not filecmp.cmp(tmp_path / "one", tmp_path / "two", shallow=False)


def test_digest_store_flat_layout(rootfs: Path, tmp_path: Path) -> None:
    mkcomposefs(tmp_path, "--digest-store=store", rootfs, "image")
    (found,) = (path for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert re.fullmatch("[0-9a-f]{2}/[0-9a-f]{62}", str(found.relative_to(tmp_path / "store")))
    assert found.read_bytes() == _BIG


def make_container_rootfs(path: Path) -> None:
    for name in ("dev", "proc", "run", "tmp", "usr/bin", "usr/share/doc", "var/log"):
        (path / name).mkdir(parents=True)
    (path / "usr/bin/sh").write_bytes(os.urandom(20_000))
    (path / "usr/share/doc/empty").touch()
    (path / "bin").symlink_to("usr/bin")
    (path / "tmp").chmod(0o1777)


def make_deep_nesting(path: Path) -> None:
    inner = path.joinpath(*[f"d{depth}" for depth in range(40)])
    inner.mkdir(parents=True)
    (inner / "leaf").write_text("x" * 100)


def make_wide_directory(path: Path) -> None:
    path.mkdir()
    for number in range(1000):
        (path / f"file{number:04}").write_text(f"{number}\n")


def make_symlinks(path: Path) -> None:
    path.mkdir()
    (path / "short").symlink_to("a")
    (path / "dangling").symlink_to("/no/where")
    (path / "long").symlink_to("l" * 3000)


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize(
    "make", [make_container_rootfs, make_deep_nesting, make_wide_directory, make_symlinks]
)
def test_mkcomposefs_vs_c_mkcomposefs(make: Callable[[Path], None], tmp_path: Path) -> None:
    tool = shutil.which("mkcomposefs", path=os.environ.get("CFS_C_TOOLS", ""))
    if tool is None:
        pytest.skip("CFS_C_TOOLS does not name a directory with C mkcomposefs")
    make(tmp_path / "tree")
    mkcomposefs(tmp_path, "--digest-store=ours", "tree", "ours.cfs")
    words = [tool, "--digest-store=theirs", "tree", "theirs.cfs"]
    subprocess.run(words, cwd=tmp_path, check=True, timeout=60)
    assert filecmp.cmp(tmp_path / "ours.cfs", tmp_path / "theirs.cfs", shallow=False)
    assert names(tmp_path / "ours") == names(tmp_path / "theirs")


# --- privileged


@pytest.mark.usefixtures("overlay")
def test_privileged_mount_upper_layer(
    cfsctl: Cfsctl, repo: Path, rootfs: Path, tmp_path: Path, mnt: Path
) -> None:
    image = cfsctl("--repo", repo, "create-image", rootfs).strip().partition(":")[2]
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    layers = ("--upperdir", tmp_path / "upper", "--workdir", tmp_path / "work")
    cfsctl("--repo", repo, "mount", image, mnt, *layers)
    try:
        with pytest.raises(OSError, match="Read-only file system"):
            (mnt / "new").touch()
    finally:
        subprocess.run(["umount", mnt], check=True)
    cfsctl("--repo", repo, "mount", image, mnt, *layers, "--read-write")
    try:
        (mnt / "new").write_text("new")
        assert (tmp_path / "upper/new").read_text() == "new"
        assert (mnt / "usr/bin/hello").read_bytes() == _BIG
    finally:
        subprocess.run(["umount", mnt], check=True)


@pytest.mark.usefixtures("root", "fuse")
def test_privileged_fuse_dumpfile_roundtrip(
    cfsctl: Cfsctl, repo: Path, rootfs: Path, mnt: Path
) -> None:
    plain = "--no-propagate-usr-to-root"
    words = ("--repo", repo, "--erofs-version", "1", "create-image", plain, rootfs)
    image = cfsctl(*words).strip().partition(":")[2]
    dump = cfsctl("--no-repo", "create-dumpfile", plain, rootfs)
    device = mnt.stat().st_dev
    line = [*command("cfsctl"), "--repo", str(repo), "mount", "--fuse=yes", "--foreground"]
    with subprocess.Popen([*line, image, str(mnt)], env=environment()) as server:
        wait_until(lambda: mnt.stat().st_dev != device or server.poll() is not None, "a mount")
        try:
            assert (mnt / "usr/bin/hello").read_bytes() == _BIG
            assert cfsctl("--no-repo", "create-dumpfile", plain, mnt) == dump
        finally:
            subprocess.run(["umount", mnt], check=True)
        assert server.wait(60) == 0


@pytest.mark.usefixtures("root", "private_mounts")
def test_privileged_pull_readonly_repo(
    cfsctl: Cfsctl, repo: Path, rootfs: Path, tmp_path: Path
) -> None:
    cfsctl("--repo", repo, "create-image", rootfs, "i")
    script = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'
    inside = ["unshare", "-m", "sh", "-c", script, "-", str(repo), *command("cfsctl")]
    words = ["--repo", str(repo)]
    images = subprocess.run(
        [*inside, *words, "images"], env=environment(), capture_output=True, check=False
    )
    assert (images.returncode, images.stderr) == (0, b"")
    (rootfs / "etc/new").write_text("new" * 100)
    done = subprocess.run(
        [*inside, *words, "create-image", str(rootfs)],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    check_failure(done)
    assert b"not writable" in done.stderr
