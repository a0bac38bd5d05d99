"""``cfsctl oci mount``: which image, which kind of mount, what can be changed in it."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cfs.cli.cfsctl import run as run_cfsctl
from cfs.linux.mountinfo import list_mounts
from tests.integration import change_all
from tests.integration.rootless import rootless
from tests.integration.stores import CFSCTL, run, unmount
from tests.integration.test_mount_command import kind_of, overlay_mode
from tests.integration.waiting import start_server, wait_until
from tests.oci_layouts import TAR, Layout, digest_of, make_tar
from tests.paths import CHECKOUT

pytestmark = pytest.mark.usefixtures("root", "fuse", "overlay")

CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
CONTENTS = {
    "etc/empty": b"",
    "etc/small": b"small",
    "etc/inline": b"i" * 64,
    "etc/object": b"o" * 65,
    "usr/big": bytes(range(256)) * 300,
    "usr/of others": b"x" * 1000,
    "usr/suid": b"s" * 100,
    "usr/capable": b"c" * 200,
    "usr/linked": b"l" * 300,
}


Done = subprocess.CompletedProcess[str]


class Pulled(NamedTuple):
    """A store with the images ``app`` and ``boot``, and the artifact ``sig``."""

    path: Path
    manifest: str
    image: str

    def run(self, *words: str | Path, status: int = 0) -> Done:
        return run("--repo", self.path, *words, status=status)

    def inspect(self, image: str) -> dict[str, Any]:
        inspected: dict[str, Any] = json.loads(self.run("oci", "inspect", image).stdout)
        return inspected


def make_special_tar() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("etc", "usr", "boot", "sysroot"):
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        for name, data in {**CONTENTS, "boot/kernel": b"k" * 500}.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o4755 if "suid" in name else 0o644
            member.uid = member.gid = 1000 if "others" in name else 0
            if "capable" in name:
                text = CAPABILITY.decode("latin-1")
                member.pax_headers = {"SCHILY.xattr.security.capability": text}
            tar.addfile(member, io.BytesIO(data))
        for name, kind in (("usr/other link", tarfile.LNKTYPE), ("usr/symlink", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "usr/linked"
            tar.addfile(member)
    return target.getvalue()


def make_store(directory: Path) -> Pulled:
    layout = Layout(directory / "layout")
    tars = [make_special_tar(), make_tar({"etc/.wh.gone": b"", "etc/small": CONTENTS["etc/small"]})]
    manifest = layout.add_image("v1", tars, TAR)
    blob = layout.add_blob(b"signature" * 20, "application/x-signature")
    layout.add_artifact("sig", [blob])
    path = directory / "store"
    run("--repo", path, "init", "--insecure")
    run("--repo", path, "oci", "pull", "-q", f"oci:{layout.path}:v1", "app")
    run("--repo", path, "oci", "pull", "-q", f"oci:{layout.path}:sig", "sig")
    digest = digest_of(json.dumps(manifest).encode())
    pulled = Pulled(path, digest, "")
    return pulled._replace(image=pulled.inspect("app")["composefs_erofs"])


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Pulled:
    """One store for all tests, which only mount."""
    return make_store(tmp_path_factory.mktemp("pulled"))


@pytest.fixture
def unmounted(pulled: Pulled, mnt: Path) -> Iterator[None]:
    yield
    if os.path.ismount(mnt):
        unmount(mnt)
    kept = pulled.path / "images/refs/mounted"
    wait_until(lambda: not kept.exists() or not os.listdir(kept), "a server goes with its mount")


def read_all(mnt: Path, suffix: str = "") -> dict[str, bytes]:
    return {name: (mnt / f"{name}{suffix}").read_bytes() for name in CONTENTS}


@overlay_mode
@pytest.mark.usefixtures("unmounted")
@pytest.mark.parametrize(
    ("image", "words", "kind"),
    [
        ("app", [], "kernel"),
        ("MANIFEST", ["--fuse=no"], "kernel"),
        ("@MANIFEST", ["--fuse", "auto"], "kernel"),
        ("app", ["--fuse"], "overlay"),
        ("@MANIFEST", ["--fuse", "yes"], "overlay"),
        ("app", ["--fuse=mode=plain,workers=1"], "plain"),
        ("MANIFEST", ["--fuse=passthrough"], "plain"),
    ],
)
def test_image_by_each_of_its_names(
    image: str, words: list[str], kind: str, pulled: Pulled, mnt: Path
) -> None:
    done = pulled.run("oci", "mount", *words, image.replace("MANIFEST", pulled.manifest), mnt)
    assert (done.stdout, done.stderr) == ("", "")
    assert kind_of(mnt) == kind
    (entry,) = [entry for entry in list_mounts() if entry.mountpoint == os.fsencode(mnt)]
    assert entry.source == f"composefs:{pulled.image}".encode()
    assert read_all(mnt) == CONTENTS
    assert (mnt / "boot/kernel").read_bytes() == b"k" * 500
    assert os.getxattr(mnt / "usr/capable", "security.capability") == CAPABILITY


@pytest.mark.usefixtures("unmounted")
def test_bootable_image(mnt: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    layout = f"oci:{tmp_path}/layout:v1"
    assert "No boot EROFS image linked" in store.run(
        "oci", "mount", "--bootable", "app", mnt, status=1
    ).stderr  # fmt: skip
    store.run("oci", "pull", "-q", "--bootable", layout, "app")
    store.run("oci", "mount", "--bootable", "app", mnt, "--fuse=mode=plain")
    boot = store.inspect("app")["composefs_boot_erofs"]
    (entry,) = [entry for entry in list_mounts() if entry.mountpoint == os.fsencode(mnt)]
    unmounted = os.listdir(mnt / "boot")
    unmount(mnt)
    assert entry.source == f"composefs:{boot}".encode()
    assert unmounted == []


@pytest.mark.usefixtures("unmounted")
def test_foreground_serves_until_a_signal(pulled: Pulled, mnt: Path, tmp_path: Path) -> None:
    words = ["--repo", str(pulled.path), "oci", "mount", "--fuse", "--foreground", "app", str(mnt)]
    with start_server([*CFSCTL, *words], tmp_path, CHECKOUT) as command:
        assert read_all(mnt) == CONTENTS
        command.send_signal(signal.SIGTERM)
        assert command.wait(60) == 0
    assert not os.path.ismount(mnt)


REFUSED = [
    (["nope", "MNT"], "OCI reference not found: nope"),
    (["", "MNT"], "tag"),
    (["sha256:00", "MNT"], "sha256:00"),
    (["@sha256:00", "MNT"], "sha256:00"),
    (["@", "MNT"], "digest"),
    ([f"sha256:{'0' * 64}", "MNT"], f"Manifest sha256:{'0' * 64} not found"),
    (["sig", "MNT"], "No composefs EROFS image linked"),
    (["--bootable", "app", "MNT"], "No boot EROFS image linked — try pulling with --bootable"),
    (["app", "MNT/none"], "mount point MNT/none: No such file or directory"),
    (["--fuse", "app", "MNT/none"], "mount point MNT/none: No such file or directory"),
    (["../../outside", "MNT"], "OCI reference not found"),
]


def test_refusals(pulled: Pulled, mnt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in REFUSED:
        given = [word.replace("MNT", str(mnt)) for word in words]
        status = run_cfsctl(["--repo", str(pulled.path), "oci", "mount", *given])
        out, err = capsys.readouterr()
        assert (status, out) == (1, ""), given
        assert message.replace("MNT", str(mnt)) in err
        assert err.startswith("Error: ")
        assert len(err.splitlines()) == 1
    status = run_cfsctl(
        ["--repo", str(pulled.path), "--erofs-version", "2", "oci", "mount", "app", str(mnt)]
    )
    assert status == 1
    assert "No composefs EROFS image linked — try re-pulling" in capsys.readouterr().err
    assert not os.path.ismount(mnt)


def test_usage_errors(pulled: Pulled, mnt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--fuse=no,workers=4"], ["--fuse=nope"], ["--fuse", "--fuse"], ["--upperdir", "x"],
        ["--workdir", "x"], ["--read-write"], ["--bootable", "--bootable"], ["more"],
    ):  # fmt: skip
        status = run_cfsctl(["--repo", str(pulled.path), "oci", "mount", "app", str(mnt), *words])
        assert status == 2, words
        assert capsys.readouterr().err.startswith("error: ")
    assert not os.path.ismount(mnt)


@overlay_mode
@pytest.mark.usefixtures("unmounted")
@pytest.mark.parametrize("fuse", ["--fuse=no", "--fuse"])
def test_everything_can_be_changed_with_an_upper_directory(
    fuse: str, pulled: Pulled, mnt: Path, tmp_path: Path
) -> None:
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    changes = ["--upperdir", f"{tmp_path}/upper", "--workdir", f"{tmp_path}/work", "--read-write"]
    pulled.run("oci", "mount", fuse, *changes, "app", mnt)
    changed = change_all.change_all(str(mnt))
    assert {*CONTENTS, "usr/symlink", "usr/other link"} <= {*changed}
    check_changed(read_all(mnt, ".renamed"))
    check_changed(read_all(tmp_path / "upper", ".renamed"))
    assert (mnt / "usr/big.renamed").stat().st_mode & 0o7777 == 0o641
    # the store keeps what it has
    unmount(mnt)
    pulled.run("fsck")


def check_changed(found: dict[str, bytes]) -> None:
    """Check contents; hard links part when they are changed, or get both changes."""
    assert found.pop("usr/linked") in (CONTENTS["usr/linked"] + b"more" * n for n in (1, 2))
    assert found == {
        name: data + b"more" for name, data in CONTENTS.items() if name != "usr/linked"
    }


@overlay_mode
def test_everything_can_be_changed_rootless() -> None:
    with rootless("-Urm") as user:
        home = user.home
        make_store(home)
        for name in ("upper", "below", "mnt"):
            (home / name).mkdir()
        # the server would outlive a script that fails
        clean_up = f"trap 'umount {home}/mnt; rm -rf {home}/below/work' EXIT"
        done = user.run(f"""
            {" ".join(CFSCTL)} --repo {home}/store oci mount --fuse --read-write \\
                --upperdir {home}/upper --workdir {home}/below app {home}/mnt
            {clean_up}
            {sys.executable} {change_all.__file__} {home}/mnt
        """)
        assert (done.returncode, done.stderr) == (0, "")
        changed = json.loads(done.stdout)
        ours = {*CONTENTS} - {"usr/of others"}  # who has no number in the namespace
        assert ours <= {*changed}
        for name in ours - {"usr/linked"}:
            assert (home / "upper" / f"{name}.renamed").read_bytes() == CONTENTS[name] + b"more"
