"""``cfsctl ps`` and ``umount`` on real mounts."""

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cfs.cli.runtime import all_records_directories
from cfs.linux.mountinfo import list_mounts, mounted_at
from cfs.linux.mounts import detach_mount
from cfs.mounting.records import find_mounts
from cfs.mounting.unmounting import select_mount, unmount
from tests.integration.stores import BIG, CFSCTL, SECONDS, Store, find_served, list_served, run
from tests.integration.waiting import wait_for_end
from tests.paths import CHECKOUT

pytestmark = pytest.mark.usefixtures("fuse")

RECORDS = Path("/run/cfs")


@pytest.fixture
def store(tmp_path: Path, mnt: Path) -> Iterator[Store]:
    store = Store(tmp_path)
    yield store
    if os.path.ismount(mnt):
        run("umount", mnt)


@pytest.fixture
def served(store: Store, mnt: Path) -> int:
    """The image ``demo`` on ``mnt``; returns the process that keeps it."""
    store.run("mount", "--fuse=mode=plain,workers=1", "demo", mnt)
    return find_served(mnt).record.pid


def row_of(mountpoint: Path) -> list[str]:
    lines = run("ps").stdout.splitlines()
    assert [cell.strip() for cell in lines[1].strip("│").split("┆")] == [
        "IMAGE", "MOUNTPOINT", "MODE", "AGE", "REQUESTS",
    ]  # fmt: skip
    (row,) = [line for line in lines if f" {mountpoint} " in line]
    return [cell.strip() for cell in row.strip("│").split("┆")]


def test_ps_shows_a_mount(served: int, mnt: Path) -> None:
    image, mountpoint, mode, age, requests = row_of(mnt)
    assert (image, mountpoint, mode) == ("demo", str(mnt), "plain")
    assert age[-1] in "sm"
    (mnt / "big").read_bytes()
    assert int(row_of(mnt)[-1]) > int(requests)
    (mount,) = list_served(mnt)
    (entry,) = [entry for entry in list_mounts() if entry.mountpoint == os.fsencode(mnt)]
    started, nr_requests = mount.pop("started"), mount.pop("requests")
    assert mount == {
        "mount_id": entry.mount_id, "image": "demo", "mountpoint": str(mnt), "mode": "Fuse",
        "passthrough": False, "state": "Serving", "owner_uid": os.geteuid(),
        "server_pid": served, "error": None,
    }  # fmt: skip
    assert abs(time.time() - started) < 600
    assert nr_requests > int(requests)


@pytest.mark.usefixtures("root")
def test_ps_shows_an_overlay_once(store: Store, mnt: Path) -> None:
    store.run("mount", "--fuse=mode=overlay", "refs/demo", mnt)
    assert row_of(mnt)[:3] == ["refs/demo", str(mnt), "overlay"]
    (mount,) = list_served(mnt)
    assert mount["mode"] == "FuseOverlay"
    run("umount", mnt)
    assert not os.path.ismount(mnt)


def test_requests_without_workers_are_unknown(store: Store, mnt: Path) -> None:
    store.run("mount", "--fuse=mode=plain,workers=0", "demo", mnt)
    assert row_of(mnt)[-1] == "-"
    (mount,) = list_served(mnt)
    assert mount["requests"] is None


def test_fuse_serve_and_mount_point_with_odd_name(store: Store, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"a b\\c\n\xff")
    odd.mkdir()
    image = store.path / "images" / str(store.digest)
    store.run("fuse-serve", "--background", image, odd)
    try:
        mounts = json.loads(run("ps", "--json").stdout)["mounts"]
        (mount,) = [mount for mount in mounts if mount["image"] == str(image)]
        assert mount["mountpoint"] == str(odd)
        assert "\\n\\udcff" in run("ps").stdout
        run("umount", odd)
        assert not os.path.ismount(odd)
    finally:
        with suppress(OSError):
            detach_mount(str(odd))
    wait_for_end(mount["server_pid"])


def test_unmounted_is_not_shown_and_leaves_no_record(served: int, mnt: Path) -> None:
    before = list(RECORDS.glob(f"{served}-*")) if os.geteuid() == 0 else []
    subprocess.run(["umount", str(mnt)] if before else ["fusermount3", "-u", mnt], check=True)
    wait_for_end(served)
    assert list_served(mnt) == []
    assert list(RECORDS.glob(f"{served}-*")) == []


def test_dead_mount_is_not_shown_but_can_be_unmounted(served: int, mnt: Path) -> None:
    (session,) = Path(f"/proc/{served}/task/{served}/children").read_text().split()
    os.kill(served, signal.SIGSTOP)  # so that it does not see the session go
    os.kill(int(session), signal.SIGKILL)
    os.kill(served, signal.SIGKILL)
    wait_for_end(served)
    with pytest.raises(OSError, match="connect"):
        (mnt / "big").read_bytes()
    assert list_served(mnt) == []
    run("umount", mnt)
    assert mounted_at(str(mnt)) is None
    assert list_served(mnt) == []  # and its record goes
    assert list(RECORDS.glob(f"{served}-*")) == []


def test_umount_of_what_is_busy(served: int, mnt: Path) -> None:
    with (mnt / "big").open("rb") as file:
        done = run("umount", mnt, status=1)
        assert done.stderr.startswith("Error: ")
        assert "busy" in done.stderr
        assert len(list_served(mnt)) == 1
        run("umount", "-l", mnt)
        assert not os.path.ismount(mnt)
        assert file.read() == BIG
    wait_for_end(served)


@pytest.mark.usefixtures("served")
def test_umount_of_what_is_not_ours(tmp_path: Path, mnt: Path) -> None:
    for path in (tmp_path / "missing", Path("/"), "", mnt / "small"):
        done = run("umount", path, status=1)
        assert done.stderr == f"Error: {path}: not a FUSE mount of cfs\n"
    # one that cannot be unmounted is no reason to leave the others
    done = run("umount", "/proc", mnt, status=1)
    assert done.stderr == "Error: /proc: not a FUSE mount of cfs\n"
    assert not os.path.ismount(mnt)


def test_mount_point_has_many_names(served: int, mnt: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mnt)
    (tmp_path / "up").symlink_to(tmp_path)
    mounts = find_mounts(all_records_directories())
    for name in ("link", "link/", "up/mnt", "source/../mnt/.", "mnt//", "./mnt"):
        assert select_mount(mounts, os.path.join(tmp_path, name)).record.pid == served
    assert select_mount(mounts, os.path.relpath(mnt)).record.pid == served


@pytest.mark.usefixtures("root", "served")
def test_umount_takes_what_lies_on_top(mnt: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", str(mnt)], check=True)
    try:
        done = run("umount", mnt, status=1)
        assert "another mount" in done.stderr
    finally:
        subprocess.run(["umount", str(mnt)], check=True)
    assert (mnt / "small").read_text() == "text"


@pytest.mark.usefixtures("root")
def test_copy_that_is_left_is_served_on(
    served: int, mnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    subprocess.run(["mount", "--bind", str(mnt), str(copy)], check=True)
    # and nobody waits for the end of the server
    monkeypatch.setattr("cfs.mounting.unmounting._wait_for_end", None)
    unmount(select_mount(find_mounts(all_records_directories()), str(mnt)))
    assert not os.path.ismount(mnt)
    assert (copy / "big").read_bytes() == BIG
    (mount,) = list_served(copy)
    assert mount["server_pid"] == served
    run("umount", copy)
    wait_for_end(served)


@pytest.mark.parametrize("words", [[], ["--all", "mnt"]])
def test_umount_needs_one_or_the_other(words: list[str]) -> None:
    assert "--all" in run("umount", *words, status=2).stderr


@pytest.mark.usefixtures("root", "private_mounts")
def test_umount_all(store: Store, tmp_path: Path) -> None:
    """With records of its own, for other tests have mounts as well."""
    script = (
        'mount -t tmpfs none /run && mkdir "$D/a" "$D/b" &&'
        'cfsctl() { "$PYTHON" -m cfs.cli.main --repo "$D/store" "$@"; } &&'
        "test \"$(cfsctl ps)\" = 'No mounts found' &&"
        'for name in a b b; do cfsctl mount --fuse=mode=plain demo "$D/$name" || exit; done &&'
        "cfsctl ps --json | grep -c mount_id && cfsctl umount --all && cfsctl ps &&"
        '! grep -q "$D" /proc/self/mountinfo && ls -A /run/cfs'
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        env=dict(os.environ, D=str(tmp_path), PYTHON=CFSCTL[0]), cwd=CHECKOUT,
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("3\nNo mounts found\n", "")
    assert store.mounted == []


@pytest.mark.usefixtures("root", "private_mounts")
def test_another_mount_name_space_shows_its_copy(served: int, mnt: Path) -> None:
    """All mounts have other ids there."""
    done = subprocess.run(
        ["unshare", "-m", *CFSCTL, "ps", "--json"], cwd=CHECKOUT, capture_output=True, check=True
    )
    mounts = json.loads(done.stdout)["mounts"]
    (there,) = [mount for mount in mounts if mount["mountpoint"] == str(mnt)]
    (here,) = list_served(mnt)
    assert there["mount_id"] != here["mount_id"]
    assert there["server_pid"] == here["server_pid"] == served


@pytest.mark.usefixtures("root", "private_mounts")
def test_mount_that_another_name_space_has_is_not_shown(store: Store, mnt: Path) -> None:
    """Nor is its record removed: the other one still needs it."""
    script = (
        '"$0" -m cfs.cli.main --repo "$1" mount --fuse=mode=plain demo "$2" && echo && cat &&'
        '"$0" -m cfs.cli.main umount "$2"'
    )
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script, CFSCTL[0], str(store.path), str(mnt)],
        cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline() == b"\n"
        (link,) = store.mounted
        pid, start = link.split("-")[-2:]
        assert list_served(mnt) == []
        assert (RECORDS / f"{pid}-{start}").exists()
        other.stdin.close()
    wait_for_end(int(pid))
    assert not (RECORDS / f"{pid}-{start}").exists()


class OrdinaryUser:
    """Commands of an ordinary user, in a directory of its own.

    The right to read all files is left: the interpreter may be root's own.
    """

    UID = 65534
    PREFIX = (
        "setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups",
        "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search",
    )  # fmt: skip

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = Store(directory)
        self.mnt = directory / "mnt"
        self.mnt.mkdir()
        (directory / "run").mkdir(mode=0o700)
        subprocess.run(["chown", "-R", f"{self.UID}:{self.UID}", str(directory)], check=True)

    def run(
        self, *words: str, status: int = 0, runtime: str | None = "run"
    ) -> "subprocess.CompletedProcess[str]":
        environment = {key: value for key, value in os.environ.items() if key != "XDG_RUNTIME_DIR"}
        if runtime is not None:
            environment["XDG_RUNTIME_DIR"] = str(self.directory / runtime)
        done = subprocess.run(
            [*self.PREFIX, *CFSCTL, "--repo", str(self.store.path), *words],
            env=environment, cwd=CHECKOUT,
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done

    def unmount(self) -> None:
        """Unmount by other means than ours, and wait for the end of the server."""
        (link,) = self.store.mounted
        subprocess.run([*self.PREFIX, "fusermount3", "-u", str(self.mnt)], check=True)
        wait_for_end(int(link.split("-")[-2]))
        assert self.store.mounted == []


@pytest.fixture
def ordinary(root: None) -> Iterator[OrdinaryUser]:  # noqa: ARG001 - asks for an ability
    for tool in ("fusermount3", "setpriv"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    directory = Path(tempfile.mkdtemp(prefix="cfs-"))  # that of pytest is closed to others
    user = OrdinaryUser(directory)
    yield user
    with suppress(OSError):
        detach_mount(str(user.mnt))
    shutil.rmtree(directory)


@pytest.fixture
def user(ordinary: OrdinaryUser) -> OrdinaryUser:
    if not os.stat("/dev/fuse").st_mode & stat.S_IWOTH:
        pytest.skip("/dev/fuse is not open to ordinary users")
    return ordinary


@pytest.mark.usefixtures("private_mounts")
def test_root_sees_the_mounts_of_all_users(ordinary: OrdinaryUser) -> None:
    script = (
        "mount -t tmpfs none /run && install -d -m 700 -o $U -g $U /run/user/$U &&"
        "mknod -m 666 /run/fuse c 10 229 && mount --bind /run/fuse /dev/fuse &&"
        "export XDG_RUNTIME_DIR=/run/user/$U &&"
        f'{shlex.join(ordinary.PREFIX)} $CFSCTL --repo "$D/store" mount --fuse demo "$D/mnt" &&'
        '$CFSCTL ps --json && $CFSCTL umount "$D/mnt" &&'
        '! grep -c " $D/mnt " /proc/self/mountinfo >&2 && ls -A /run/user/$U/cfs'
    )
    directory = str(ordinary.directory)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        env=dict(os.environ, D=directory, U=str(ordinary.UID), CFSCTL=shlex.join(CFSCTL)),
        cwd=CHECKOUT, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert done.stderr == "0\n"
    (mount,) = json.loads(done.stdout)["mounts"]
    assert (mount["mountpoint"], mount["owner_uid"]) == (f"{directory}/mnt", ordinary.UID)
    assert mount["requests"] > 0


def test_ordinary_user(user: OrdinaryUser) -> None:
    user.run("mount", "--fuse=mode=plain", "demo", str(user.mnt))
    (record,) = (user.directory / "run/cfs").iterdir()
    assert record.stat().st_mode & 0o777 == 0o600
    (mount,) = json.loads(user.run("ps", "--json").stdout)["mounts"]
    assert (mount["mountpoint"], mount["owner_uid"]) == (str(user.mnt), user.UID)
    assert mount["requests"] > 0
    assert list_served(user.mnt) == []  # root's list does not look into any directory
    assert "not a FUSE mount" in run("umount", user.mnt, status=1).stderr
    user.run("umount", str(user.mnt))
    wait_for_end(mount["server_pid"])
    assert json.loads(user.run("ps", "--json").stdout) == {"mounts": []}
    assert user.store.mounted == []


def test_user_without_runtime_directory(user: OrdinaryUser) -> None:
    user.run("mount", "--fuse=mode=plain", "demo", str(user.mnt), runtime=None)
    assert "XDG_RUNTIME_DIR" in user.run("ps", status=1, runtime=None).stderr
    user.unmount()


def test_runtime_directory_that_cannot_be_written(user: OrdinaryUser) -> None:
    user.run("mount", "--fuse=mode=plain", "demo", str(user.mnt), runtime="missing")
    assert user.run("ps", runtime="missing").stdout == "No mounts found\n"
    user.unmount()
