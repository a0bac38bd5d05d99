"""Containers whose root is a mounted image: pull, ``oci mount --fuse``, crun."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.integration.crun import (
    BIG,
    crun_script,
    make_layout,
    write_bundle,
)
from tests.integration.rootless import rootless
from tests.integration.stores import CFSCTL, run, unmount

pytestmark = pytest.mark.usefixtures("fuse", "private_mounts")

CHANGE = """
    findmnt -J /
    cd /etc
    echo changed >> big
    chmod 0700 small
    mv moved renamed
    echo something > empty
    echo new > new
    rm /bin/findmnt
    wc -c < big
"""


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    return make_layout(tmp_path / "layout").path


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("fuse", ["--fuse", "--fuse=mode=plain"])
def test_command_runs_on_the_mount(fuse: str, layout: Path, mnt: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run("--repo", store, "init", "--insecure")
    run("--repo", store, "oci", "pull", "-q", f"oci:{layout}:v1", "app")
    image = json.loads(run("--repo", store, "oci", "inspect", "app").stdout)["composefs_erofs"]
    run("--repo", store, "oci", "mount", fuse, "app", mnt)
    try:
        write_bundle(tmp_path / "seen", mnt, ["/bin/findmnt", "-J", "/"], writable=False)
        done = subprocess.run(
            ["unshare", "-mC", "/bin/sh", "-ec", crun_script(tmp_path / "seen")],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    finally:
        unmount(mnt)
    assert done.returncode == 0, done.stderr
    (root,) = json.loads(done.stdout)["filesystems"]
    assert root["target"] == "/"
    assert root["source"] == f"composefs:{image}"
    assert root["fstype"] in ("overlay", "fuse.composefs")
    if "plain" in fuse:
        assert root["fstype"] == "fuse.composefs"
    assert "ro" in root["options"].split(",")


def test_rootless_container_writes_to_an_overlay() -> None:
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if release is None or tuple(map(int, release.groups())) < (6, 16):
        pytest.skip("needs Linux 6.16")
    with rootless("-UrmC") as user:
        home = user.home
        make_layout(home / "layout")
        for name in ("upper", "below", "mnt"):
            (home / name).mkdir()
        words = ["/bin/sh", "-ec", CHANGE]
        write_bundle(home / "bundle", home / "mnt", words, writable=True)
        cfsctl = " ".join([*CFSCTL, "--repo", f"{home}/store"])
        # the server would outlive a script that fails
        clean_up = f"trap 'umount {home}/mnt; rm -rf {home}/below/work' EXIT"
        done = user.run(f"""
            {cfsctl} init --insecure > /dev/null
            {cfsctl} oci pull -q oci:{home}/layout:v1 app > /dev/null
            {cfsctl} oci mount --fuse --upperdir {home}/upper --workdir {home}/below --read-write \\
                app {home}/mnt
            {clean_up}
            {crun_script(home / "bundle")}
        """)
        assert (done.returncode, done.stderr) == (0, "")
        check_seen(done.stdout)
        check_changed(home / "upper")


def check_seen(text: str) -> None:
    filesystems, size = text.rsplit("\n", 2)[:2]
    (root,) = json.loads(filesystems)["filesystems"]
    assert (root["target"], root["fstype"]) == ("/", "overlay")
    assert root["source"].startswith("composefs:")
    assert "rw" in root["options"].split(",")
    assert int(size) == len(BIG + b"changed\n")


def check_changed(upper: Path) -> None:
    assert (upper / "etc/big").read_bytes() == BIG + b"changed\n"
    assert (upper / "etc/small").read_text() == "small\n"
    assert (upper / "etc/small").stat().st_mode & 0o7777 == 0o700
    assert (upper / "etc/renamed").read_bytes() == BIG[1:]
    assert (upper / "etc/empty").read_text() == "something\n"
    assert (upper / "etc/new").read_text() == "new\n"
    for removed in ("etc/moved", "bin/findmnt"):
        assert (upper / removed).is_char_device()
