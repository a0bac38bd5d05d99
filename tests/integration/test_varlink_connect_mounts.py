"""``mount``, ``oci mount``, ``fuse-serve``, ``ps`` and ``umount`` with ``--connect``."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.cli.cfsctl import run as run_cfsctl
from cfs.client import AsyncClient
from cfs.client.fuse import FuseMode, FuseParams
from cfs.client.repository import FuseServe
from cfs.linux.mountinfo import mounted_at
from cfs.linux.mounts import detach_mount, unmount
from cfs.service.assemble import assembled
from cfs.service.fuse_registry import FuseMounts
from cfs.service.handles import StoreOptions
from tests.integration.stores import BIG, CFSCTL, SECONDS, Store
from tests.integration.waiting import start_server, wait_until
from tests.paths import CHECKOUT
from tests.varlink_client import serving

pytestmark = pytest.mark.usefixtures("fuse")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def address(
    store: Store, tmp_path: Path, mnt: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A service whose store, by default, is ``store``."""
    monkeypatch.setattr("cfs.repository.repository._SYSTEM_PATH", str(store.path))
    monkeypatch.setattr("cfs.repository.repository._USER_PATH", str(store.path))
    with (
        assembled(StoreOptions(), FuseMounts()) as dispatcher,
        serving(dispatcher, tmp_path / "sock"),
    ):
        yield f"unix:{tmp_path}/sock"
    if mounted_at(str(mnt)) is not None:
        detach_mount(str(mnt))


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = run_cfsctl(list(map(str, arguments)))
    return status, *capfd.readouterr()


def test_a_mount_is_listed_and_ended(
    address: str, mnt: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    connect = f"--connect={address}"
    assert run(capfd, connect, "ps") == (0, "No mounts found\n", "")
    assert json.loads(run(capfd, connect, "ps", "--json")[1]) == {"mounts": []}
    mounted = run(capfd, connect, "mount", "--fuse=mode=plain,workers=1", "demo", mnt)
    assert mounted == (0, "", "")
    assert (mnt / "big").read_bytes() == BIG
    (found,) = json.loads(run(capfd, connect, "ps", "--json")[1])["mounts"]
    assert (found["mountpoint"], found["mode"], found["image"]) == (str(mnt), "Fuse", "demo")
    assert found["error"] is None
    assert f" {mnt} " in run(capfd, connect, "ps")[1]
    with (mnt / "big").open("rb"):
        status, _, error = run(capfd, connect, "umount", mnt)
        assert (status, error) == (1, f"Error: {mnt}: mount 1 is in use\n")
    assert run(capfd, connect, "umount", mnt) == (0, "", "")
    assert mounted_at(str(mnt)) is None
    status, _, error = run(capfd, connect, "umount", mnt)
    assert (status, error) == (1, f"Error: {mnt}: not a FUSE mount of the service\n")


def test_all_mounts_are_ended(
    address: str, mnt: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    connect = f"--connect={address}"
    second = tmp_path / "second"
    second.mkdir()
    for place in (mnt, second, mnt):
        assert run(capfd, connect, "mount", "--fuse=mode=plain,workers=1", "demo", place)[0] == 0
    with (second / "big").open("rb"):
        assert run(capfd, connect, "umount", "--lazy", "--all") == (0, "", "")
    assert (mounted_at(str(mnt)), mounted_at(str(second))) == (None, None)


def test_an_image_file_of_ours_is_served(
    address: str, store: Store, mnt: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image"
    image.write_bytes((store.path / "images/refs/demo").read_bytes())
    connect = f"--connect={address}"
    served = run(capfd, connect, "fuse-serve", "-o", "workers=1", "--background", image, mnt)
    assert served == (0, "", "")
    assert (mnt / "big").read_bytes() == BIG
    assert run(capfd, connect, "umount", mnt) == (0, "", "")


@pytest.mark.usefixtures("root")
def test_the_kernel_mounts(address: str, mnt: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(capfd, f"--connect={address}", "mount", "--fuse=no", "demo", mnt) == (0, "", "")
    assert (mnt / "big").read_bytes() == BIG
    detach_mount(str(mnt))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_foreground_mount_ends_with_the_command(
    address: str, mnt: Path, tmp_path: Path, number: signal.Signals
) -> None:
    words = [f"--connect={address}", "mount", "--fuse=mode=plain,workers=1", "--foreground"]
    command = start_server([*CFSCTL, *words, "demo", str(mnt)], tmp_path, CHECKOUT)
    try:
        assert (mnt / "big").read_bytes() == BIG
        command.send_signal(number)
        _, error = command.communicate(timeout=SECONDS)
    finally:
        command.kill()
    assert (command.returncode, error) == (0, b"")
    assert mounted_at(str(mnt)) is None


def test_a_foreground_mount_tells_that_it_serves_and_ends_with_it(
    address: str, mnt: Path, tmp_path: Path
) -> None:
    words = [f"--connect={address}", "mount", "--fuse=mode=plain,workers=1", "--foreground"]
    command = start_server([*CFSCTL, *words, "demo", str(mnt)], tmp_path, CHECKOUT)
    try:
        assert (mnt / "big").read_bytes() == BIG
        unmount(str(mnt))
        _, error = command.communicate(timeout=SECONDS)
    finally:
        command.kill()
    assert (command.returncode, error) == (0, b"")


def test_a_foreground_mount_fails_when_the_service_ends(
    store: Store, mnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cfs.repository.repository._SYSTEM_PATH", str(store.path))
    monkeypatch.setattr("cfs.repository.repository._USER_PATH", str(store.path))
    words = [f"--connect={tmp_path}/sock", "mount", "--fuse=mode=plain,workers=1", "--foreground"]
    with (
        assembled(StoreOptions(), FuseMounts()) as dispatcher,
        serving(dispatcher, tmp_path / "sock"),
    ):
        command = start_server([*CFSCTL, *words, "demo", str(mnt)], tmp_path, CHECKOUT)
    try:
        _, error = command.communicate(timeout=SECONDS)
    finally:
        command.kill()
    assert (command.returncode, error.count(b"\n")) == (1, 1)
    assert error.startswith(b"Error: ")
    assert mounted_at(str(mnt)) is None


def test_a_cancelled_task_ends_the_mount_that_it_waits_for(
    address: str, store: Store, mnt: Path
) -> None:
    async def wait(serves: asyncio.Event) -> None:
        options = FuseParams(mode=FuseMode.FUSE, workers=1)
        async with AsyncClient(address) as client, client.opened(str(store.path)) as opened:
            call = FuseServe(opened.handle, "demo", str(mnt), wait=True, options=options)
            async for reply in client.stream(call):
                reply.close()
                serves.set()

    async def run() -> None:
        serves = asyncio.Event()
        task = asyncio.create_task(wait(serves))
        async with asyncio.timeout(SECONDS):
            await serves.wait()
        assert await asyncio.to_thread((mnt / "big").read_bytes) == BIG
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    wait_until(lambda: mounted_at(str(mnt)) is None, "it is unmounted")


def test_what_cannot_be_mounted(address: str, mnt: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands: list[list[str | Path]] = [
        ["mount", "--fuse", "none", mnt],
        ["mount", "--fuse", "demo", mnt / "none"],
        ["oci", "mount", "--fuse", "none", mnt],
        ["fuse-serve", "/dev/null", mnt],
        ["fuse-serve", "/none", mnt],
    ]
    run(capfd, f"--connect={address}", *commands[0])  # the service opens some for its life
    before = len(os.listdir("/proc/self/fd"))
    for words in commands:
        status, out, error = run(capfd, f"--connect={address}", *words)
        assert (status, out, error.count("\n")) == (1, "", 1), words
        assert error.startswith("Error: ")
    assert mounted_at(str(mnt)) is None
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "descriptors are closed")
