"""What a live mount serves is never collected (spec cli-and-varlink c.7)."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.fuse import ServeOptions
from cfs.mounting.serving import serve_image
from cfs.repository.repository import Repository
from tests.integration.stores import (
    BIG,
    CFSCTL,
    SECONDS,
    Store,
    find_served,
    list_served,
    run,
    unmount,
)
from tests.integration.waiting import wait_for_end, wait_until
from tests.paths import CHECKOUT

pytestmark = pytest.mark.usefixtures("fuse")

RUST = os.environ.get("CFS_RUST_CFSCTL", "")
needs_rust = pytest.mark.skipif(not RUST, reason="CFS_RUST_CFSCTL does not name composefs-rs")


@pytest.fixture
def store(tmp_path: Path, mnt: Path) -> Iterator[Store]:
    """A store; what was mounted of it on ``mnt`` is gone afterwards."""
    store = Store(tmp_path)
    yield store
    if os.path.ismount(mnt):
        run("umount", mnt)


def serve(store: Store, mnt: Path, items: str = "mode=plain") -> int:
    """Serve the image in the background; return the process that keeps it."""
    store.run("mount", f"--fuse={items}", "demo", mnt)
    return find_served(mnt).record.pid


def sessions_of(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@pytest.mark.parametrize("items", ["mode=plain", "mode=plain,workers=0", "mode=overlay"])
def test_collection_takes_nothing_from_a_mount(
    store: Store, mnt: Path, items: str, request: pytest.FixtureRequest
) -> None:
    if "overlay" in items:
        request.getfixturevalue("root")
    serve(store, mnt, items)
    before = store.objects()
    store.forget()
    assert store.run("gc", "--no-wait").stdout == "Objects: 0 removed (0 bytes)\n"
    assert (mnt / "big").read_bytes() == BIG
    assert store.objects() == before
    run("umount", mnt)
    assert store.mounted == []
    assert "Objects: 2 removed" in store.run("gc", "--no-wait").stdout
    assert store.objects() == set()


@needs_rust
def test_collection_of_composefs_rs_takes_nothing_from_a_mount(store: Store, mnt: Path) -> None:
    serve(store, mnt)
    store.forget()
    collect = [RUST, "--repo", str(store.path), "gc"]
    environment = {name: value for name, value in os.environ.items() if name != "RUST_BACKTRACE"}
    for number in ("0", "2"):
        done = subprocess.run(
            collect, env=environment, capture_output=True, text=True, check=True, timeout=SECONDS
        )
        assert done.stdout.startswith(f"Objects: {number} removed")
        if number == "0":
            assert (mnt / "big").read_bytes() == BIG
            run("umount", mnt)


def test_link_is_no_image_of_the_user(store: Store, mnt: Path) -> None:
    serve(store, mnt)
    (link,) = store.mounted
    assert os.readlink(store.path / "images/refs/mounted" / link) == f"../../{store.digest}"
    assert link not in store.run("images", "--json").stdout
    assert "ok" in store.run("fsck").stdout


def test_outside_unmount_removes_the_link(store: Store, mnt: Path) -> None:
    pid = serve(store, mnt)
    unmount(mnt)
    wait_for_end(pid)
    assert store.mounted == []


def test_killed_starter_leaves_nothing(store: Store, mnt: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(SECONDS)
        command = [*CFSCTL, "--repo", str(store.path), "mount", "--foreground", "--fuse=mode=plain"]
        environment = dict(os.environ, NOTIFY_SOCKET=str(tmp_path / "notify"))
        starter = subprocess.Popen([*command, "demo", str(mnt)], env=environment, cwd=CHECKOUT)
        assert notified.recv(100) == b"READY=1"
    pid = find_served(mnt).record.pid
    assert len(store.mounted) == 1
    starter.kill()
    starter.wait()
    wait_for_end(pid)
    assert store.mounted == []
    assert not os.path.ismount(mnt)


def test_failed_mount_leaves_nothing(store: Store, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    done = store.run("mount", "--fuse=mode=plain", "demo", missing, status=1)
    assert "missing" in done.stderr
    assert store.mounted == []


def test_restarted_session_and_supervisor_that_is_killed(store: Store, mnt: Path) -> None:
    pid = serve(store, mnt)
    (session,) = sessions_of(pid)
    store.forget()
    os.kill(session, signal.SIGKILL)
    wait_until(lambda: sessions_of(pid) not in ([], [session]), "no session follows")
    assert (mnt / "small").read_text() == "text"
    (session,) = sessions_of(pid)
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    # the session outlives its supervisor, and so does what it serves
    assert "Objects: 0 removed" in store.run("gc", "--no-wait").stdout
    assert (mnt / "big").read_bytes() == BIG
    assert len(list_served(mnt)) == 1
    run("umount", mnt)
    wait_for_end(session)
    assert store.mounted == []
    assert list_served(mnt) == []


def test_server_without_supervisor_removes_its_link(store: Store, mnt: Path) -> None:
    pid = serve(store, mnt, "mode=plain,supervise=off")
    assert len(store.mounted) == 1
    run("umount", mnt)
    wait_for_end(pid)
    assert store.mounted == []


def test_leftovers_go_with_the_next_mount_or_collection(store: Store, mnt: Path) -> None:
    for clear in (lambda: serve(store, mnt), lambda: store.run("gc", "--no-wait")):
        pid = serve(store, mnt, "mode=plain,supervise=off")
        (leftover,) = store.mounted
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
        assert store.mounted == [leftover]
        clear()
        assert leftover not in store.mounted
        run("umount", mnt)


def test_image_outside_holds_the_lock(store: Store, mnt: Path, tmp_path: Path) -> None:
    """A collection cannot know what it needs, so none runs; not even when its supervisor dies."""
    image = tmp_path / "image.cfs"
    image.write_bytes((store.path / "images" / str(store.digest)).read_bytes())
    store.run("fuse-serve", "--background", image, mnt)
    pid = find_served(mnt).record.pid
    (session,) = sessions_of(pid)
    store.forget()
    assert "Error: " in store.run("gc", "--no-wait", status=1).stderr
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    store.run("gc", "--no-wait", status=1)
    assert (mnt / "big").read_bytes() == BIG
    run("umount", mnt)
    wait_for_end(session)
    assert "Objects: 2 removed" in store.run("gc", "--no-wait").stdout


def test_objects_directory_of_a_store_holds_its_lock(store: Store, mnt: Path) -> None:
    image = store.path / "images" / str(store.digest)
    objects = store.path / "objects"
    run("--no-repo", "fuse-serve", "--background", "--basedir", objects, image, mnt)
    pid = find_served(mnt).record.pid
    store.run("gc", "--no-wait", status=1)
    run("umount", mnt)
    wait_for_end(pid)
    store.run("gc", "--no-wait")


def test_link_is_made_before_the_lock_is_given_back(store: Store, mnt: Path) -> None:
    with Repository.open(str(store.path)) as repository:
        options = ServeOptions(verify=None)
        mount = serve_image(repository, "demo", mnt, options, records=None)
        assert len(store.mounted) == 1
    try:
        assert (mnt / "big").read_bytes() == BIG
    finally:
        mount.unmount()
    assert store.mounted == []
