"""What shells are told about the end of a line."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cfs import Algorithm, repository, tree
from cfs.cli import completion, completion_names
from cfs.cli.completion import complete
from cfs.cli.completion_names import Candidates
from cfs.oci import SourceOptions
from cfs.oci.pull import pull
from cfs.oci.tags import set_tag
from tests.paths import DATA

MANIFEST = "sha256:c33b0626be461148711e797df21d06fb54771836a2c1125ae499e11d22f28355"
NAMES = ["one", "two words", "$(touch x)", "group/member:1", "line\nfeed"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with named images and tags."""
    directory = tmp_path_factory.mktemp("completion")
    subprocess.run(["tar", "-xf", DATA / "cli/oci.tar"], cwd=directory, check=True)
    path = str(directory / "store")
    repository.init(path, algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    with repository.Repository.open(path) as opened:
        for name in NAMES:
            repository.commit_image(opened, tree.Directory(mode=0o40755), name)
        pull(opened, f"oci:{directory}/layout:v1", SourceOptions(), name="app:1")
        set_tag(opened, "app:2", MANIFEST)
    return path


def words(*line: str) -> list[str]:
    return [word for word, _ in complete(line).words]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([""], ["init", "fuse-serve", "oci"]),
        (["creat"], ["create-image", "create-dumpfile"]),
        (["oci", "comp"], ["compute-id"]),
        (["--repo", "oci", "oci", "unt"], ["untag"]),
        (["help", "oci", "in"], ["inspect"]),
        (["help", "mount", "x"], []),
        (["help", "in"], ["init"]),
        (["oci", "help", "in"], ["inspect"]),
        (["--re"], ["--repo", "--require-verity"]),
        (["oci", "images", "--"], ["--json"]),
        (["--hash", ""], ["sha256", "sha512"]),
        (["--hash=sha5"], ["--hash=sha512"]),
        (["oci", "pull", "--local-fetch", "z"], ["zerocopy"]),
        (["oci", "pull", "--tls-verify=f"], ["--tls-verify=false"]),
        (["mount", "--fuse=y"], ["--fuse=yes"]),
        (["mount", "--fuse=yes,mode=p"], ["--fuse=yes,mode=plain"]),
        (["fuse-serve", "-o", "mode=plain,verify=r"], ["mode=plain,verify=require"]),
        (["unknown", ""], None),
        (["mount", "--", "-"], []),
        (["mkcomposefs", "--print"], ["--print-digest", "--print-digest-only"]),
        (["mkcomposefs", "--dig"], ["--digest-store="]),
        (["composefs-info", ""], ["ls", "dump", "objects", "missing-objects", "measure-file"]),
        (["composefs-info", "--"], ["--basedir=", "--filter="]),
        (["mount.composefs", "image", "dir", "-o", "ro,up"], ["ro,upperdir="]),
        (["mount.composefs", "-o", "r"], ["ro", "rw"]),
        (["mount.fuse.composefs", "-o", "ver"], ["verity"]),
    ],
)
def test_words_of_the_command_line(line: list[str], expected: list[str] | None) -> None:
    found = words(*line)
    if expected is None:
        assert "init" in found
    elif line[-1]:
        assert found[: len(expected)] == expected
        assert bool(found) == bool(expected)
    else:
        assert set(expected) <= set(found)


def test_hidden_options_and_commands_are_not_offered() -> None:
    assert words("--insec") == []
    assert words("ostr") == []


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (["--repo", ""], "directories"),
        (["create-image", ""], "directories"),
        (["mount", "image", ""], "directories"),
        (["oci", "pull", "--authfile", ""], "files"),
        (["oci", "pull", "oci:"], "files"),
        (["fuse-serve", ""], "files"),
        (["fuse-serve", "--basedir", ""], "directories"),
        (["init", "path", ""], "nothing"),
        (["--connect="], "files"),
        (["mkcomposefs", ""], "files"),
        (["mkcomposefs", "--digest-store=/"], "files"),
        (["composefs-info", "ls", ""], "files"),
        (["mount.composefs", "/"], "files"),
        (["mount.composefs", "-o", "ro", "image", "/"], "directories"),
    ],
)
def test_what_the_shell_completes_itself(line: list[str], kind: str) -> None:
    assert complete(line) == Candidates(kind, [])


def test_addresses_of_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"unix:{tmp_path}/composefs/composefs.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert address not in words("--connect", "")
    (tmp_path / "composefs").mkdir()
    (tmp_path / "composefs/composefs.sock").touch()
    assert {address, "images"} <= set(words("--connect", ""))
    assert words("--connect", "unix:/" + str(tmp_path)[1:]) == [address]
    assert words("--connect=unix:/" + str(tmp_path)[1:]) == [f"--connect={address}"]
    assert words("--connect", address, "imag") == ["images", "image-objects"]
    assert complete(["--connect", "./s"]) == Candidates("files", [])


def test_names_of_images(store: str) -> None:
    expected = ["$(touch x)", "refs/group/member:1", "one", "two words"]
    for command in ("mount", "image-objects", "dump-files"):
        assert sorted(words("--repo", store, command, "")) == sorted(expected)
    assert words(f"--repo={store}", "mount", "--foreground", "--fuse", "t") == ["two words"]


def test_tags_and_digests(store: str) -> None:
    for command in ("inspect", "mount", "untag", "dump", "compute-id", "prepare-boot", "fsck"):
        assert words("--repo", store, "oci", command, "app:") == ["app:1", "app:2"]
    assert words("oci", "copy", "--from", store, "app:1") == ["app:1"]
    assert words("--repo", store, "oci", "tag", "")[0] == MANIFEST
    layers = words("--repo", store, "oci", "layer", "")
    assert len(layers) == 2
    assert words("--repo", store, "oci", "layer", layers[0][:12]) == [layers[0]]


def test_a_store_that_is_not_there_has_no_names(tmp_path: Path) -> None:
    assert words("--repo", str(tmp_path / "none"), "mount", "") == []


AskBash = Callable[[str, str], list[str]]


@pytest.fixture
def ask_bash(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> AskBash:
    """What ``complete -C`` gets for a line and the word that it replaces."""

    def ask(line: str, word: str) -> list[str]:
        monkeypatch.setenv("COMPLETE", "bash")
        monkeypatch.setenv("COMP_LINE", f"{line} behind the cursor")
        monkeypatch.setenv("COMP_POINT", str(len(line.encode())))
        assert completion.run(["cfsctl", word, "before"]) == 0
        return capfd.readouterr().out.splitlines()

    return ask


@pytest.mark.parametrize(
    ("rest", "word", "expected"),
    [
        ("mount o", "o", ["one"]),
        ("mount two", "two", ["'two words'"]),
        ("mount '$", "'$", []),
        ('mount "t', '"t', ["two words"]),
        ("mount $", "$", ["'$(touch x)'"]),
        ("oci inspect app:", "", ["1", "2"]),
        ("oci inspect app:1", "1", ["1"]),
        ("mount --fuse=n", "n", ["no"]),
    ],
)
def test_bash_replaces_what_follows_a_colon_and_runs_no_name(
    ask_bash: AskBash, store: str, rest: str, word: str, expected: list[str]
) -> None:
    assert ask_bash(f"cfsctl --repo {store} {rest}", word) == expected


def test_an_unknown_shell_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPLETE", "csh")
    assert completion.run([]) == 2
    assert capfd.readouterr().err.startswith("error: COMPLETE=csh: expected one of bash")


def test_every_table_entry_is_an_argument() -> None:
    for key in completion_names._NAMES:
        *path, name = key.split()
        line = completion._Line()
        for word in path:
            line.add(word)
        assert line.path.split() == path
        assert name in [param.name for param in line.command.params]
