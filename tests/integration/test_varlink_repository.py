"""``org.composefs.Repository``, beside the recorded exchanges."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.cli.cfsctl import run as run_cfsctl
from cfs.linux.mountinfo import list_mounts
from cfs.linux.mounts import attach_mount, detach_mount
from cfs.repository.fsck import Report, check
from cfs.repository.repository import Repository
from cfs.service import handles, repository_interface
from cfs.service.handles import StoreOptions
from tests.integration.varlink_replay import whole_service
from tests.varlink_client import SECONDS, Json, RawClient, serving

INTERFACE = "org.composefs.Repository"


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[Path]:
    """The socket of a service that runs during the test."""
    with (
        whole_service(StoreOptions(insecure=True)) as dispatcher,
        serving(dispatcher, tmp_path / "sock"),
    ):
        yield tmp_path / "sock"


@pytest.fixture
def client(socket_path: Path) -> Iterator[RawClient]:
    with RawClient.connect(str(socket_path)) as connected:
        yield connected


def call(client: RawClient, method: str, **parameters: object) -> Json:
    reply = client.call(f"{INTERFACE}.{method}", **parameters)
    if "error" in reply:
        return {"error": reply["error"].removeprefix(f"{INTERFACE}."), **reply["parameters"]}
    answer: Json = reply.get("parameters", {})
    return answer


def open_new(client: RawClient, path: Path) -> int:
    assert call(client, "InitRepository", path=str(path)) == {"created": True}
    handle: int = call(client, "OpenRepository", path=str(path))["handle"]
    return handle


def test_hostile_paths_and_names(client: RawClient, tmp_path: Path) -> None:
    handle = open_new(client, tmp_path / "store")
    for path in ("a\0b", "x" * 5000, "", str(tmp_path / "store/meta.json/x")):
        assert call(client, "OpenRepository", path=path)["error"] == "RepoNotFound"
        for method in ("InitRepository", "EnsureRepository"):
            assert call(client, method, path=path)["error"] == "InternalError"
    for name in ("a\0b", "..", "refs/..", "/etc/passwd", "refs/../../x", "x" * 5000, "refs/"):
        found = call(client, "ImageObjects", handle=handle, name=name)
        assert found == {"error": "NoSuchRef", "reference": name}
        assert call(client, "Mount", handle=handle, name=name, options={})["error"] == (
            "InternalError"
        )
    assert call(client, "Gc", handle=handle, dry_run=False, roots=["a\0b", "../x", ""]) == {
        "result": dict.fromkeys(
            ("objects_removed", "objects_bytes", "images_pruned", "streams_pruned"), 0
        ),
        "dry_run": False,
    }
    assert sorted(os.listdir(tmp_path)) == ["sock", "store"]


def test_long_calls_keep_nobody_waiting(
    client: RawClient, socket_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def check_slowly(repository: Repository, *, metadata_only: bool) -> Report:
        entered.set()
        assert leave.wait(SECONDS)
        return check(repository, metadata_only=metadata_only)

    monkeypatch.setattr(repository_interface, "check", check_slowly)
    monkeypatch.setattr(handles, "_EXCLUSIVE_WAIT_S", 0)
    handle = open_new(client, tmp_path / "store")
    client.send(f"{INTERFACE}.Fsck", parameters={"handle": handle})
    assert entered.wait(SECONDS)
    with RawClient.connect(str(socket_path)) as other:
        again = call(other, "OpenRepository", path=str(tmp_path / "store"))["handle"]
        assert call(other, "ListImageRefs", handle=again) == {"images": []}
        # it would pull the store from under the check
        assert call(other, "Gc", handle=again, dry_run=False, roots=[])["error"] == "InternalError"
        assert "result" in call(other, "Gc", handle=again, dry_run=True, roots=[])
        assert call(other, "CloseRepository", handle=handle) == {}
    leave.set()
    reply = client.receive()
    assert reply is not None
    assert reply.members["parameters"]["ok"]


def test_checks_at_the_same_time_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository_interface, "_CHECKS_PER_UID", 0)
    monkeypatch.setattr(repository_interface, "_CHECK_WAIT_S", 0)
    with (
        whole_service(StoreOptions(insecure=True)) as dispatcher,
        serving(dispatcher, tmp_path / "sock"),
        RawClient.connect(str(tmp_path / "sock")) as client,
    ):
        handle = open_new(client, tmp_path / "store")
        assert call(client, "Fsck", handle=handle) == {
            "error": "InternalError",
            "message": "too many repositories are being checked",
        }


def test_a_collection_does_not_wait_for_ever_for_other_processes(
    client: RawClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository_interface, "_COLLECT_WAIT_S", 0)
    handle = open_new(client, tmp_path / "store")
    call(client, "OpenRepository", path=str(tmp_path / "store"))
    lock = os.open(tmp_path / "store", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    collecting = {"handle": handle, "dry_run": False, "roots": []}
    found = call(client, "Gc", **collecting)
    assert found == {
        "error": "InternalError",
        "message": "the repository is in use by another process",
    }
    fcntl.flock(lock, fcntl.LOCK_UN)
    assert "result" in call(client, "Gc", **collecting)
    # the shared lock is back
    with pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


def test_nobody_waits_for_ever_for_a_locked_store(
    client: RawClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "_OPEN_WAIT_S", 0)
    store = str(tmp_path / "store")
    call(client, "InitRepository", path=store)
    lock = os.open(store, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    for method, name in (
        ("OpenRepository", "RepoNotFound"),
        ("InitRepository", "InternalError"),
        ("EnsureRepository", "InternalError"),
    ):
        found = call(client, method, path=store)
        assert found["error"] == name
        assert "in use by another process" in found["message"]
    os.close(lock)
    assert call(client, "InitRepository", path=store) == {"created": False}


def test_a_collection_that_cannot_tell_what_is_needed_fails(
    client: RawClient, tmp_path: Path
) -> None:
    handle = open_new(client, tmp_path / "store")
    stored = tmp_path / "store/objects" / ("0" * 2) / ("0" * 126)
    stored.parent.mkdir(parents=True)
    stored.write_bytes(b"no image")
    images = tmp_path / "store/images"
    images.mkdir()
    (images / ("0" * 128)).symlink_to(f"../objects/00/{'0' * 126}")
    (images / "refs").mkdir()
    (images / "refs/bad").symlink_to(f"../{'0' * 128}")
    for dry_run in (True, False):
        found = call(client, "Gc", handle=handle, dry_run=dry_run, roots=[])
        assert found["error"] == "InternalError"
        assert "no object was removed" in found["message"]
    assert stored.exists()
    assert not call(client, "Fsck", handle=handle)["ok"]


def test_findings_fit_into_the_reply(
    client: RawClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = open_new(client, tmp_path / "store")
    (tmp_path / "store/images").mkdir()
    for number in range(20):
        (tmp_path / "store/images" / f"foreign{number}").touch()
    monkeypatch.setattr(repository_interface, "_MAX_FINDINGS_SIZE", 300)
    found = call(client, "Fsck", handle=handle)
    assert found["images_corrupted"] == 20
    *errors, last = found["errors"]
    assert 0 < len(errors) < 20
    assert last == f"fsck: more-findings: {20 - len(errors)}"


@pytest.mark.usefixtures("overlay")
def test_a_mount_can_be_attached_and_read(client: RawClient, tmp_path: Path, mnt: Path) -> None:
    handle = open_new(client, tmp_path / "store")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"content" * 1000)
    words = ["--repo", str(tmp_path / "store"), "create-image", "--no-propagate-usr-to-root"]
    assert run_cfsctl([*words, str(tree), "demo"]) == 0
    client.send(f"{INTERFACE}.Mount", parameters={"handle": handle, "name": "demo", "options": {}})
    reply = client.receive()
    assert reply is not None
    (fd,) = reply.fds
    try:
        attach_mount(fd, str(mnt))
        assert (mnt / "file").read_bytes() == b"content" * 1000
        (line,) = [line for line in list_mounts() if line.mountpoint == os.fsencode(mnt)]
        assert line.source == b"composefs:demo"
    finally:
        os.close(fd)
        detach_mount(str(mnt))


class Foreigner:
    """Calls of another user, each on a connection of its own."""

    UID = 54321
    SCRIPT = """
import json, socket, sys
channel = socket.socket(socket.AF_UNIX)
channel.connect(sys.argv[1])
channel.sendall(sys.argv[2].encode() + b"\\0")
data = b""
while not data.endswith(b"\\0"):
    data += channel.recv(4096) or sys.exit("closed")
print(data[:-1].decode())
"""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.own = directory / "own"
        self.own.mkdir()
        os.chown(self.own, self.UID, self.UID)

    def call(self, method: str, **parameters: object) -> Json:
        message = json.dumps({"method": f"{INTERFACE}.{method}", "parameters": parameters})
        done = subprocess.run(
            ["setpriv", f"--reuid={self.UID}", f"--regid={self.UID}", "--clear-groups",
             "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search",
             sys.executable, "-ISc", self.SCRIPT, str(self.directory / "sock"), message],
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        reply: Json = json.loads(done.stdout)
        name = reply.get("error", "").removeprefix(f"{INTERFACE}.")
        return {**({"error": name} if name else {}), **reply.get("parameters", {})}


@pytest.mark.usefixtures("root")
def test_another_user_has_no_more_than_his_own_rights() -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed")
    with (
        tempfile.TemporaryDirectory(prefix="cfs-") as name,  # that of pytest is closed to others
        whole_service(StoreOptions(insecure=True)) as dispatcher,
        serving(dispatcher, Path(name) / "sock"),
        RawClient.connect(f"{name}/sock") as client,
    ):
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "sock").chmod(0o666)
        foreigner = Foreigner(directory)
        store = directory / "store"
        handle = open_new(client, store)
        assert store.stat().st_mode & 0o777 == 0o700
        refused = {"error": "InvalidHandle", "handle": handle}
        assert foreigner.call("Gc", handle=handle, dry_run=True, roots=[]) == refused
        assert foreigner.call("CloseRepository", handle=handle) == refused
        assert foreigner.call("OpenRepository", path=str(store))["error"] == "RepoNotFound"
        assert foreigner.call("OpenRepository", user=True)["error"] in (
            "RepoNotFound", "InvalidSpec",
        )  # fmt: skip
        made = foreigner.call("InitRepository", path=str(directory / "new"))
        assert made["error"] == "InternalError"
        store.chmod(0o755)
        handle = foreigner.call("OpenRepository", path=str(store))["handle"]
        assert foreigner.call("ListImageRefs", handle=handle) == {"images": []}
        assert foreigner.call("Gc", handle=handle, dry_run=False, roots=[])["error"] == (
            "InternalError"
        )
        own = foreigner.own / "store"
        assert foreigner.call("InitRepository", path=str(own)) == {"created": True}
        owners = {path.stat().st_uid for path in (own, *own.rglob("*"))}
        assert owners == {Foreigner.UID}
        handle = foreigner.call("OpenRepository", path=str(own))["handle"]
        assert foreigner.call("Fsck", handle=handle)["ok"]
        assert foreigner.call("Mount", handle=handle, name="x", options={}) == {
            "error": "org.varlink.service.PermissionDenied"
        }
        assert call(client, "CloseRepository", handle=handle)["error"] == "InvalidHandle"
