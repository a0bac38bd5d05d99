"""``cfsctl mount``: which kind of mount, of which image, and what is refused."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.linux.mountinfo import MountEntry, list_mounts
from tests.integration.stores import BIG, CFSCTL, Store, unmount
from tests.integration.waiting import start_server, wait_until
from tests.paths import CHECKOUT

pytestmark = pytest.mark.usefixtures("root", "fuse", "overlay")

SECONDS = 60
RELEASE = re.match(r"(\d+)\.(\d+)", os.uname().release)
overlay_mode = pytest.mark.skipif(
    RELEASE is None or tuple(map(int, RELEASE.groups())) < (6, 16), reason="needs Linux 6.16"
)


@pytest.fixture
def store(tmp_path: Path, mnt: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    if os.path.ismount(mnt):
        unmount(mnt)
    kept = store.path / "images/refs/mounted"
    wait_until(lambda: not kept.exists() or not store.mounted, "a server goes with its mount")


@pytest.fixture
def changes(tmp_path: Path) -> list[str]:
    """Upper and work directory, as options."""
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    return ["--upperdir", f"{tmp_path}/upper", "--workdir", f"{tmp_path}/work"]


def entry_of(mnt: Path) -> MountEntry:
    (entry,) = [entry for entry in list_mounts() if entry.mountpoint == os.fsencode(mnt)]
    return entry


def kind_of(mnt: Path) -> str:
    if entry_of(mnt).fstype == b"fuse.composefs":
        return "plain"
    return "overlay" if b"userxattr" in entry_of(mnt).options else "kernel"


@overlay_mode
@pytest.mark.parametrize("name", ["demo", "refs/demo", "DIGEST"])
@pytest.mark.parametrize("fuse", ["--fuse=no", "--fuse=mode=plain", "--fuse=mode=overlay"])
def test_image_by_each_of_its_names(name: str, fuse: str, store: Store, mnt: Path) -> None:
    name = name.replace("DIGEST", str(store.digest))
    store.run("mount", name, mnt, fuse)
    assert entry_of(mnt).source == f"composefs:{name}".encode()
    assert (mnt / "big").read_bytes() == BIG
    assert (mnt / "small").read_text() == "text"


@overlay_mode
@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ([], "kernel"),
        (["--fuse", "auto"], "kernel"),
        (["--fuse=auto,workers=1"], "kernel"),
        (["--fuse=no"], "kernel"),
        (["--fuse", "no", "--foreground"], "kernel"),
        (["--fuse"], "overlay"),
        (["--fuse", "yes"], "overlay"),
        (["--fuse=workers=1"], "overlay"),
        (["--fuse=passthrough,workers=1"], "plain"),
        (["--fuse=verify=open"], "plain"),
        (["--fuse=mode=plain"], "plain"),
    ],
)
def test_kind(words: list[str], kind: str, store: Store, mnt: Path) -> None:
    done = store.run("mount", *words, "demo", mnt)
    assert (done.stdout, done.stderr) == ("", "")
    assert kind_of(mnt) == kind
    assert (mnt / "big").read_bytes() == BIG


@overlay_mode
def test_overlay_is_not_chosen_where_we_may_not_mount() -> None:
    drop = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    code = "from cfs.mounting.choice import *; print(choose_serving(MountRequest()).mode.name)"
    found = [
        subprocess.run(
            [*words, sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, check=True
        ).stdout
        for words in ([], drop)
    ]
    assert found == [b"OVERLAY\n", b"PLAIN\n"]


@overlay_mode
def test_option_may_stand_behind_the_arguments(store: Store, mnt: Path) -> None:
    store.run("mount", "demo", mnt, "--fuse")
    assert kind_of(mnt) == "overlay"


def test_mounts_in_plain_fuse_keep_suid_for_root(store: Store, mnt: Path) -> None:
    store.run("mount", "--fuse=mode=plain", "demo", mnt)
    assert not os.statvfs(mnt).f_flag & (os.ST_NOSUID | os.ST_NODEV)


def test_kernel_mount_demands_no_verity_in_an_insecure_store(store: Store, mnt: Path) -> None:
    store.run("mount", "demo", mnt)
    assert b"verity" not in entry_of(mnt).options


def test_kernel_mount_demands_verity_if_that_was_said(store: Store, mnt: Path) -> None:
    store.run("mount", "--fuse=auto,verify=require", "demo", mnt)
    assert kind_of(mnt) == "kernel"
    assert b"verity=require" in entry_of(mnt).options.split(b",")
    with pytest.raises(OSError, match="Input/output error"):
        (mnt / "big").read_bytes()


@overlay_mode
@pytest.mark.parametrize("fuse", ["--fuse=no", "--fuse=yes"])
def test_upper_directory_alone_is_not_writable(
    fuse: str, store: Store, mnt: Path, changes: list[str]
) -> None:
    Path(changes[1], "mine").touch()
    store.run("mount", fuse, "demo", mnt, *changes)
    assert (mnt / "mine").exists()
    with pytest.raises(OSError, match="Read-only"):
        (mnt / "new").touch()


@overlay_mode
@pytest.mark.parametrize("fuse", ["--fuse=no", "--fuse=yes"])
def test_upper_directory_gets_the_changes(
    fuse: str, store: Store, mnt: Path, tmp_path: Path, changes: list[str]
) -> None:
    store.run("mount", fuse, "demo", mnt, *changes, "--read-write")
    with (mnt / "big").open("ab") as file:
        file.write(b"more")
    (mnt / "new").touch()
    assert (tmp_path / "upper/big").read_bytes() == BIG + b"more"
    assert (tmp_path / "upper/new").exists()


@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT", "umount"])
def test_foreground_serves_until_a_signal_or_an_unmount(
    end: str, store: Store, mnt: Path, tmp_path: Path
) -> None:
    words = ["--repo", str(store.path), "mount", "--fuse", "--foreground", "demo", str(mnt)]
    with start_server([*CFSCTL, *words], tmp_path, CHECKOUT) as command:
        assert (mnt / "small").read_text() == "text"
        assert len(store.mounted) == 1
        if end == "umount":
            unmount(mnt)
        else:
            command.send_signal(signal.Signals[end])
        assert command.wait(SECONDS) == 0
    assert not os.path.ismount(mnt)
    assert store.mounted == []


def test_command_returns_though_its_output_is_a_pipe(store: Store, mnt: Path) -> None:
    done = store.run("mount", "--fuse", "demo", mnt)  # reads both pipes to their ends
    assert (done.stdout, done.stderr) == ("", "")
    assert os.path.ismount(mnt)


@pytest.mark.parametrize("fuse", ["--fuse=no", "--fuse=mode=plain"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope", "MNT"], "image not found: nope"),
        (["0" * 64, "MNT"], f"image not found: {'0' * 64}"),
        (["demo", "MNT/none"], "mount point MNT/none: No such file or directory"),
        (["demo", "MNT/../source/big"], "mount point MNT/../source/big: not a directory"),
        (["demo", ""], "mount point is empty"),
        (["../../outside", "MNT"], "../../outside"),
        (["/demo", "MNT"], "/demo"),
        (["refs/../refs/demo", "MNT"], "refs/../refs/demo"),
        (["refs", "MNT"], "refs"),
        (["", "MNT"], "name"),
    ],
)
def test_refusals(fuse: str, words: list[str], message: str, store: Store, mnt: Path) -> None:
    given = [word.replace("MNT", str(mnt)) for word in words]
    done = store.run("mount", fuse, *given, status=1)
    assert message.replace("MNT", str(mnt)) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("Error: ")
    assert not os.path.ismount(mnt)
    kept = store.path / "images/refs/mounted"
    assert not kept.exists() or store.mounted == []


@pytest.mark.parametrize(
    "words",
    [
        ["--fuse=no,workers=4"],
        ["--fuse=yes,no"],
        ["--fuse=workers=1,workers=1"],
        ["--fuse=nope"],
        ["--fuse="],
        ["--fuse=workers=-1"],
        ["--fuse=mode=overlay,passthrough"],
        ["--fuse", "--fuse"],
        ["--upperdir", "x"],
        ["--workdir", "x"],
        ["--read-write"],
        ["--upperdir", "x", "--workdir", "x", "--fuse=mode=plain"],
        ["more"],
    ],
)
def test_usage_errors(words: list[str], store: Store, mnt: Path) -> None:
    done = store.run("mount", "demo", mnt, *words, status=2)
    assert done.stderr.startswith("error: ")
    assert not os.path.ismount(mnt)


@overlay_mode
@pytest.mark.parametrize("fuse", ["--fuse=no", "--fuse=yes"])
def test_missing_work_directory(fuse: str, store: Store, mnt: Path, tmp_path: Path) -> None:
    (tmp_path / "upper").mkdir()
    changes = ["--upperdir", f"{tmp_path}/upper", "--workdir", f"{tmp_path}/none"]
    done = store.run("mount", fuse, "demo", mnt, *changes, status=1)
    assert f"{tmp_path}/none: No such file or directory" in done.stderr
    assert not os.path.ismount(mnt)


@overlay_mode
@pytest.mark.parametrize("mode", ["plain", "overlay"])
def test_image_from_elsewhere_over_an_empty_store(mode: str, mnt: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    source = tmp_path / "little"
    (source / "usr").mkdir(parents=True)
    (source / "small").write_text("little")
    digest = store.run("create-image", source).stdout.strip().rpartition(":")[2]
    image = tmp_path / "image"
    image.write_bytes((store.path / "images" / digest).read_bytes())
    shutil.rmtree(store.path / "objects")
    store.run("fuse-serve", "-o", f"mode={mode}", "--background", image, mnt)
    try:
        assert (mnt / "small").read_text() == "little"
    finally:
        store.run("umount", mnt)


@overlay_mode
@pytest.mark.parametrize("fuse", ["--fuse=no", "--fuse=mode=plain", "--fuse=mode=overlay"])
def test_store_without_objects(fuse: str, store: Store, mnt: Path) -> None:
    source = store.path.parent / "little"
    (source / "usr").mkdir(parents=True)
    (source / "small").write_text("little")
    done = store.run("create-image", source, "little")
    digest = done.stdout.strip().rpartition(":")[2]
    image = store.path / "images" / digest
    content = image.read_bytes()
    image.unlink()  # a link to an object, as long as there are objects
    (store.path / "objects").rename(store.path.parent / "gone")
    (store.path / "objects" / digest[:2]).mkdir(parents=True)
    (store.path / "objects" / digest[:2] / digest[2:]).write_bytes(content)
    image.symlink_to(f"../objects/{digest[:2]}/{digest[2:]}")
    store.run("mount", fuse, "little", mnt)
    assert (mnt / "small").read_text() == "little"


def test_symlink_to_the_mount_point_is_followed(store: Store, mnt: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mnt)
    store.run("mount", "demo", tmp_path / "link")
    assert kind_of(mnt) == "kernel"


def test_mounts_side_by_side(store: Store, tmp_path: Path) -> None:
    places = [tmp_path / f"m{number}" for number in range(4)]
    for place in places:
        place.mkdir()
    running = [
        subprocess.Popen([*CFSCTL, "--repo", str(store.path), "mount", "demo", str(place)],
                         cwd=CHECKOUT)
        for place in places
    ]  # fmt: skip
    assert [command.wait(SECONDS) for command in running] == [0] * len(places)
    for place in places:
        assert (place / "big").read_bytes() == BIG
        unmount(place)


@overlay_mode
@pytest.mark.usefixtures("private_mounts")
def test_root_of_a_user_namespace_gets_fuse(store: Store, mnt: Path) -> None:
    command = [sys.executable, "-m", "cfs.cli.main", "--repo", str(store.path)]
    script = f"""
set -e
{" ".join(command)} mount demo {mnt}
grep " {mnt} " /proc/self/mountinfo
cat {mnt}/small
umount {mnt}
"""
    done = subprocess.run(
        ["unshare", "-Urm", "/bin/sh", "-c", script],
        cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespaces: {done.stderr}")
    assert (done.returncode, done.stderr) == (0, "")
    line, text = done.stdout.splitlines()
    assert "userxattr" in line
    assert text == "text"
