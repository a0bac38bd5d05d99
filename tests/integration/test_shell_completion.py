"""The scripts of packaging/completion, in the shells that are there."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cfs import Algorithm, repository, tree
from cfs.cli.completion import complete
from cfs.client import Client
from cfs.repository.repository import default_path
from cfs.service.handles import StoreOptions
from tests.command_line import command, environment
from tests.integration.varlink_replay import whole_service
from tests.paths import CHECKOUT
from tests.varlink_client import serving

SCRIPTS = CHECKOUT / "packaging" / "completion"
# zsh completes in its line editor only: what the script would give it is printed instead
ZSH = """
compdef() { }
_describe() { print -rl -- ${(P)2} }
_files() { print -r -- files $* }
compset() { }
source %s
words=(%s) CURRENT=${#words}
_cfsctl
"""
# bash starts what stands behind -C with the name of the command and the word
BASH = r"""
source %s
action=$(complete -p cfsctl | sed "s/.*-C '\(.*\)' cfsctl/\1/")
COMP_LINE=%s COMP_POINT=1000 bash -c "$action %s %s before"
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A directory with the command ``cfsctl`` and a store."""
    program = tmp_path / "cfsctl"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command("cfsctl"))} "$@"\n')
    program.chmod(0o755)
    path = str(tmp_path / "store")
    repository.init(path, algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    with repository.Repository.open(path) as opened:
        for name in ("one", "two words", "$(touch ran)", "with/slash:x"):
            repository.commit_image(opened, tree.Directory(mode=0o40755), name)
    return tmp_path


def run_shell(shell: str, script: str, directory: Path) -> list[str]:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is missing")
    path = f"{directory}:{environment()['PATH']}"
    done = subprocess.run(
        [shell, *(["-f"] if shell == "zsh" else []), "-c", script],
        cwd=directory,
        env=environment(PATH=path, HOME=str(directory), XDG_CONFIG_HOME=str(directory)),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert not (directory / "ran").exists()
    return done.stdout.splitlines()


def test_fish(store: Path) -> None:
    script = f"source {SCRIPTS}/cfsctl.fish; complete -C 'cfsctl --repo store mount '"
    found = run_shell("fish", script, store)
    words = sorted(line.partition("\t")[0] for line in found)
    assert words == ["$(touch ran)", "one", "refs/with/slash:x", "two words"]
    assert all(line.partition("\t")[2] for line in found)
    script = f"source {SCRIPTS}/cfsctl.fish; complete -C 'cfsctl oci unt'"
    assert run_shell("fish", script, store) == ["untag\tRemove a name"]
    script = f"source {SCRIPTS}/cfsctl.fish; complete -C 'composefs-info l'"
    assert run_shell("fish", script, store) == ["ls\tlist paths with link targets and object paths"]
    script = f"source {SCRIPTS}/cfsctl.fish; complete -C 'cfsctl --repo sto'"
    assert [line.partition("\t")[0] for line in run_shell("fish", script, store)] == ["store/"]
    script = f"source {SCRIPTS}/cfsctl.fish; complete -C 'cfsctl --repo=sto'"
    found = run_shell("fish", script, store)
    assert [line.partition("\t")[0] for line in found] == ["--repo=store/"]
    script = f"source {SCRIPTS}/cfsctl.fish; complete -C 'cfsctl oci pull oci:sto'"
    found = run_shell("fish", script, store)
    assert [line.partition("\t")[0] for line in found] == ["oci:store/"]


def test_zsh(store: Path) -> None:
    script = f"{SCRIPTS}/_cfsctl"
    found = run_shell("zsh", ZSH % (script, "cfsctl --repo store mount ''"), store)
    names = {line.replace(r"\:", "|").partition(":")[0].replace("|", ":") for line in found}
    assert names == {"one", "two words", "$(touch ran)", "refs/with/slash:x"}
    assert run_shell("zsh", ZSH % (script, "/usr/bin/mkcomposefs --hardl"), store) == [
        "--hardlinks:names of one file share an inode"
    ]
    assert run_shell("zsh", ZSH % (script, "cfsctl oci unt"), store) == ["untag:Remove a name"]
    assert run_shell("zsh", ZSH % (script, "cfsctl --repo ''"), store) == ["files -/"]
    assert run_shell("zsh", ZSH % (script, "cfsctl oci pull --authfile ''"), store) == ["files"]


def test_bash(store: Path) -> None:
    def ask(line: str, word: str) -> list[str]:
        start = f"{SCRIPTS}/cfsctl.bash"
        pieces = (start, shlex.quote(line), line.partition(" ")[0], shlex.quote(word))
        return run_shell("bash", BASH % pieces, store)

    assert ask("cfsctl --repo store mount o", "o") == ["one"]
    assert ask("cfsctl --repo store mount $", "$") == ["'$(touch ran)'"]
    assert ask("cfsctl --repo store mount refs/with/slash:", "") == ["x"]
    assert ask("cfsctl mount --fuse=ye", "ye") == ["yes"]
    for program in ("mkcomposefs", "/usr/bin/mkcomposefs"):
        assert ask(f"{program} --hardl", "--hardl") == ["--hardlinks"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_cfsctl_prints_the_scripts(store: Path, shell: str) -> None:
    found = run_shell("bash", f"COMPLETE={shell} cfsctl", store)
    (script,) = (path for path in SCRIPTS.iterdir() if f"{shell} completion" in path.read_text())
    assert found == script.read_text().splitlines()


def test_names_of_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Client, "peer_uid", os.geteuid() or 1)  # of a service that is not root's
    path = default_path(user=True)
    Path(path).parent.mkdir(parents=True)
    repository.init(path, algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    with repository.Repository.open(path) as opened:
        repository.commit_image(opened, tree.Directory(mode=0o40755), "theirs")
    address = f"unix:{tmp_path}/sock"
    with whole_service(StoreOptions()) as dispatcher, serving(dispatcher, tmp_path / "sock"):
        for command_name in ("mount", "image-objects"):
            found = complete(["--connect", address, command_name, ""])
            assert [word for word, _ in found.words] == ["theirs"]
        for line in (["oci", "inspect"], ["umount"], ["dump-files"]):
            assert complete([f"--connect={address}", *line, ""]).words == []
    assert complete(["--connect", address, "mount", ""]).words == []
