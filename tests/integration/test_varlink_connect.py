"""``--connect``: a service does what the command does here, and the command says the same."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from cfs.cli.cfsctl import cfsctl
from cfs.cli.cfsctl import run as run_cfsctl
from cfs.cli.connect import REMOTES
from cfs.cli.group import LazyGroup
from cfs.linux.mounts import unmount
from cfs.oci.mountable import find_mountable
from cfs.repository.repository import Repository
from tests.command_line import run as run_program
from tests.integration.varlink_stores import STORE, app_service, make_store

MANIFEST = "sha256:c33b0626be461148711e797df21d06fb54771836a2c1125ae499e11d22f28355"
NOBODY = "sha256:" + "0" * 64
Words = list[str]


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with app_service(tmp_path, monkeypatch) as found:
        yield found


class Output(NamedTuple):
    status: int
    out: str
    error: str


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> Output:
    capfd.readouterr()
    status = run_cfsctl(arguments)
    return Output(status, *capfd.readouterr())


SAME: list[Words] = [
    ["fsck"], ["fsck", "--json"], ["fsck", "--metadata-only"],
    ["images"], ["images", "--json"], ["images", "--no-trunc"], ["list-images"],
    ["image-objects", "one"], ["image-objects", "refs/one"],
    ["image-objects", "none"], ["image-objects", "a/b"], ["image-objects", "0" * 128],
    ["image-objects", ""],
    ["oci", "images"], ["oci", "images", "--json"],
    ["oci", "inspect", "app"], ["oci", "inspect", "@" + MANIFEST],
    ["oci", "inspect", "--manifest", "app"], ["oci", "inspect", "--config", "app"],
    ["oci", "inspect", "@" + NOBODY], ["oci", "inspect", "@x"], ["oci", "inspect", ""],
    ["oci", "inspect", "--manifest", "--config", "app"],
    ["oci", "fsck"], ["oci", "fsck", "app"], ["oci", "fsck", "--json", "app"],
    ["oci", "fsck", "none"], ["oci", "fsck", "--json", "none"],
    ["oci", "compute-id", "app"], ["oci", "compute-id", "none"], ["oci", "compute-id", "app", "x"],
    ["oci", "compute-id", "--bootable", "--xattrs", "keep-user-xattrs", "app"],
    ["oci", "compute-id", "@" + MANIFEST],
    ["oci", "tag", MANIFEST, "two"], ["oci", "tag", MANIFEST, "two"], ["oci", "tag", "x", "two"],
    ["oci", "tag", NOBODY, "lost"], ["oci", "tag", MANIFEST, ""], ["oci", "tag", MANIFEST, "@a"],
    ["oci", "untag", "two"], ["oci", "untag", "two"], ["oci", "untag", "../x"],
    ["oci", "pull", "oci:layout:v1", "more"], ["oci", "pull", "-q", "oci:layout:v1"],
    ["oci", "pull", "--local-fetch", "auto", "oci:layout:v1"],
    ["oci", "pull", "--bootable", "oci:layout:v1", "boot"], ["oci", "pull", "oci:layout:none"],
    ["oci", "pull", "blah"], ["oci", "pull", "foo:bar"], ["oci", "pull", "oci:layout:v1", "@x"],
    ["oci", "pull", "--expected-digest", "0", "oci:layout:v1"],
    ["oci", "layer", NOBODY], ["oci", "layer", "x"],
    ["oci", "copy", "--from", "third", "--name", "copied", "other"],
    ["oci", "copy", "--from", "third", "@" + MANIFEST],
    ["oci", "copy", "--from", "none", "app"], ["oci", "copy", "--from", "third", "none"],
    ["--hash", "sha512", "images"],
    ["mount", "--fuse=no,workers=1", "one", "."], ["mount", "--fuse=bad", "one", "."],
    ["mount", "--upperdir", "x", "one", "."], ["mount", "one"],
    ["mount", "--fuse=no", "none", "."], ["mount", "--fuse=no", "one", "none"],
    ["fuse-serve", "none", "."], ["fuse-serve", "-o", "bad", "x", "y"],
    ["ps"], ["ps", "--json"], ["umount"], ["umount", "--all", "x"], ["umount", "--all"],
    ["gc", "-n"], ["gc", "-n", "-r", "one"], ["oci", "untag", "app"], ["gc"], ["gc"],
    ["oci", "images"], ["fsck"],
]  # fmt: skip
# what the service cannot know, or the interface says otherwise: (words, here, there)
DIFFERENT: list[tuple[Words, str, str]] = [
    (["oci", "inspect", "none"], "OCI reference not found: none", "no such image: none"),
    (
        ["oci", "mount", "--fuse=no", "none", "."],
        "OCI reference not found: none",
        "no such image: none: OCI reference not found: none",
    ),
    (["--hash", "sha256", "images"], " (from meta.json)", ""),
    (
        ["oci", "pull", "--bootable", "--expected-digest", "zz", "oci:layout:v1"],
        "Parsing --expected-digest:",
        "expected_digest:",
    ),
    (
        ["image-objects", "../x"],
        "invalid name '../x': empty, '.' and '..' components are not allowed",
        "image not found: ../x",
    ),
    (["oci", "pull", "oci:none"], "directory none:", "directory {cwd}/none:"),
    (["umount", "none"], "of cfs", "of the service"),
]  # fmt: skip
FUSE_DIFFERENT: list[tuple[Words, str, str]] = [
    (["mount", "--fuse", "none", "."], "", ""),
    (["mount", "--fuse", "--upperdir", "x", "--workdir", "y", "one", "."], "", ""),
    (["mount", "--fuse", "one", "none"], "point none:", "point {cwd}/none:"),
    (["oci", "mount", "--fuse", "--bootable", "app", "none"], "", ""),
]
MOUNTS: list[Words] = [
    ["mount", "--fuse=mode=plain,workers=1", "one"],
    ["mount", "--fuse", "one"],
    ["mount", "--fuse=workers=1,mode=plain,verify=open,allow-other", "refs/one"],
    ["oci", "mount", "--fuse=mode=plain,workers=1", "app"],
    ["oci", "mount", "--fuse", "--upperdir", "upper", "--workdir", "work", "--read-write", "app"],
    ["fuse-serve", "-o", "workers=1", "--background", "image"],
]


def make_near() -> str:
    """Make a store that is like the one of the service; return the id of its image."""
    make_store("near")
    make_store("third", "other")
    with Repository.open("near") as store:
        image = str(find_mountable(store, "app", boot=False))
    for path in ("near", STORE):
        refs = Path(path, "images/refs")
        refs.mkdir(exist_ok=True)
        (refs / "one").symlink_to(f"../{image}")
    return image


def find_differences(
    capfd: pytest.CaptureFixture[str], address: str, table: list[tuple[Words, str, str]]
) -> list[tuple[Words, Output, Output]]:
    """Run commands both ways; return those that do not differ as they should."""
    differences = []
    for words, text, other in table:
        here = run(capfd, "--repo", "near", *words)
        there = run(capfd, "--connect", address, *words)
        expected = here.error.replace(text, other.format(cwd=os.getcwd()))
        if text not in here.error or here._replace(error=expected) != there:
            differences.append((words, here, there))
    return differences


def test_commands_say_the_same(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The same command lines, on two stores that are alike."""
    make_near()
    same = [(words, "", "") for words in SAME]
    assert find_differences(capfd, address, same) == []
    assert find_differences(capfd, address, DIFFERENT) == []


@pytest.mark.usefixtures("fuse")
def test_mounts_are_the_same(address: str, capfd: pytest.CaptureFixture[str], mnt: Path) -> None:
    Path("image").write_bytes(Path("near/images", make_near()).read_bytes())
    assert find_differences(capfd, address, FUSE_DIFFERENT) == []
    differences = []
    for words in MOUNTS:
        remake("upper", "work")
        done = run_program("cfsctl", "--repo", "near", *words, mnt, cwd=Path.cwd())
        here = Output(done.returncode, done.stdout.decode(), done.stderr.decode())
        mounted = describe_mount(mnt)
        unmount(str(mnt))
        remake("upper", "work")
        there = run(capfd, "--connect", address, *words, str(mnt))
        if (here, mounted) != (there, describe_mount(mnt)):
            differences.append((words, here, mounted, there, describe_mount(mnt)))
        assert run(capfd, "--connect", address, "umount", str(mnt)) == (0, "", "")
    assert differences == []


def remake(*names: str) -> None:
    for name in names:
        shutil.rmtree(name, ignore_errors=True)
        os.mkdir(name)


def describe_mount(path: Path) -> tuple[str, ...] | None:
    """Return file system, source, flags and tree of what is mounted there."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == str(path):
            names = sorted(str(each) for each in path.rglob("*"))
            return (*fields[fields.index("-") + 1 :][:2], fields[5], *names)
    return None


ELSEWHERE = {"init", "oci import-layer"}  # below


def test_all_commands_with_a_method_are_compared() -> None:
    compared = [*SAME, *MOUNTS, *(words for words, _, _ in DIFFERENT)]
    rests = [words[2:] if words[0] == "--hash" else words for words in compared]
    names = {" ".join(rest[: 1 + (rest[0] == "oci")]) for rest in rests}
    assert names | ELSEWHERE == set(REMOTES)


def test_layers_pass_as_tars(
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    capfdbinary.readouterr()
    assert run_cfsctl(["--repo", STORE, "oci", "inspect", "--config", "app"]) == 0
    diff_ids = json.loads(capfdbinary.readouterr().out)
    assert run_cfsctl(["init", "--insecure", "--algorithm", "fsverity-sha256-12", "other"]) == 0
    for diff_id in diff_ids["rootfs"]["diff_ids"]:
        capfdbinary.readouterr()
        assert run_cfsctl(["--connect", address, "oci", "layer", diff_id]) == 0
        tar = capfdbinary.readouterr().out
        assert f"sha256:{hashlib.sha256(tar).hexdigest()}" == diff_id
        (tmp_path / "tar").write_bytes(tar)
        with (tmp_path / "tar").open() as file:
            monkeypatch.setattr("sys.stdin", file)
            monkeypatch.setattr("cfs.repository.repository._SYSTEM_PATH", str(tmp_path / "other"))
            assert run_cfsctl(["--connect", address, "oci", "import-layer", diff_id]) == 0
            there = capfdbinary.readouterr().out
            file.seek(0)
            assert run_cfsctl(["init", "--insecure", "--algorithm", "fsverity-sha256-12", "x"]) == 0
            capfdbinary.readouterr()
            assert run_cfsctl(["--repo", "x", "oci", "import-layer", diff_id]) == 0
        assert capfdbinary.readouterr().out == there
        monkeypatch.setattr("cfs.repository.repository._SYSTEM_PATH", str(tmp_path / STORE))


@pytest.mark.parametrize("more", [[], ["--zerocopy"]], ids=["copied", "shared"])
def test_an_image_of_ours_is_copied_into_the_store_of_the_service(
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    more: Words,
) -> None:
    for store in ("near", "far"):
        assert run_cfsctl(["init", "--insecure", store]) == 0
    monkeypatch.setattr("cfs.repository.repository._SYSTEM_PATH", str(tmp_path / "far"))
    words = ["oci", "copy", *more, "--from", STORE, "--name", "copied", "app"]
    here = run(capfd, "--repo", "near", *words)
    there = run(capfd, "--connect", address, *words)
    assert here == there
    assert here[0] == 0
    assert run(capfd, "--repo", "far", "oci", "fsck", "copied")[0] == 0


@pytest.mark.parametrize("content", [b"x" * 600, bytes(1024)])
def test_a_tar_that_is_none_is_refused(
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    content: bytes,
) -> None:
    (tmp_path / "tar").write_bytes(content)
    capfdbinary.readouterr()
    with (tmp_path / "tar").open() as file:
        monkeypatch.setattr("sys.stdin", file)
        status = run_cfsctl(["--connect", address, "oci", "import-layer", "sha256:" + "0" * 64])
    found = capfdbinary.readouterr()
    assert (status, found.out, found.err.count(b"\n")) == (1, b"", 1)
    assert found.err.startswith((b"Error: tar: ", b"Error: layer integrity failed: "))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--repo", "x", "images"], ["--user", "images"], ["--system", "images"],
        ["--erofs-version", "2", "images"], ["--insecure", "images"], ["--no-upgrade", "images"],
        ["oci", "layer", "--json", "sha256:" + "0" * 64],
        ["oci", "import-layer", "sha256:" + "0" * 64, "name"],
        ["init"], ["init", "--reset-metadata", "x"], ["gc", "--remove-broken"],
        ["gc", "--no-wait"], ["oci", "pull", "--arch", "arm64", "oci:x"], ["umount"],
        ["oci", "pull", "--tls-verify=false", "oci:x"], ["fuse-serve", "--stats", "x", "y"],
        ["fuse-serve", "--basedir", "x", "y", "z"], ["fuse-serve", "--grace", "1", "x", "y"],
        ["mount", "--fuse=passthrough=auto", "x", "y"],
        ["oci", "inspect", "--manifest", "--config", "x"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_a_method_has_no_parameter_for_is_a_usage_error(
    address: str, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    status, out, error = run(capfd, "--connect", address, *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("error: ")


def leaves(group: LazyGroup, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """Yield all commands, hidden ones too, but not those that print help."""
    for word in group._entries:
        found = group.get_command(click.Context(group), word)
        assert found is not None
        if isinstance(found, LazyGroup):
            yield from leaves(found, f"{name}{word} ")
        elif word != "help":
            yield f"{name}{word}", found


def test_what_no_method_does_is_a_usage_error(
    address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(cfsctl, LazyGroup)
    others = [each for each in leaves(cfsctl) if each[0] not in REMOTES]
    assert len(others) > 12
    for name, leaf in others:
        words = [NOBODY for each in leaf.params if isinstance(each, click.Argument)]
        status, out, error = run(capfd, "--connect", address, *name.split(), *words)
        assert (status, out) == (2, ""), name
        message = f"error: {name} cannot be used with --connect: no varlink method does it\n"
        assert error.startswith(message)


def test_stores_are_made_where_the_caller_says(
    address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    here = run(capfd, "init", "--insecure", "a")
    there = run(capfd, "--connect", address, "init", "--insecure", "b")
    assert there == (0, here[1].replace("at a", "at b"), "")
    assert Path("b/meta.json").read_text() == Path("a/meta.json").read_text()
    here = run(capfd, "init", "--insecure", "a")
    there = run(capfd, "--connect", address, "init", "--insecure", "b")
    assert there == (0, here[1].replace("at a", "at b"), "")
    again = run(capfd, "--connect", address, "init", "--ensure", "b")
    assert again[1] == "Repository already initialized at b (existing configuration preserved)\n"


def test_without_an_address_the_unit_of_the_user_is_asked(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = tmp_path / "run"
    (runtime / "composefs").mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    nobody = run(capfd, "--connect", "images")
    assert (nobody.status, nobody.error.count("\n")) == (1, 1)
    assert nobody.error.startswith("Error: cannot connect to unix:/")
    assert nobody.error.count("cannot connect to unix:") == 2
    (runtime / "composefs" / "composefs.sock").symlink_to(tmp_path / "sock")
    assert run(capfd, "--connect", "images") == (0, "No images found\n", "")
    assert run(capfd, "--connect=", "images")[0] == 0
    assert address
