"""Another user gets at nothing through the service that he could not get at himself."""

import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.oci_layouts import Layout, digest_of, make_tar
from tests.varlink_client import Json, RawClient
from tests.varlink_process import (
    OCI,
    ServiceProcess,
    call,
    open_store,
    pulling,
    service_process,
)

OWNER, OTHER = 54321, 54331
SECRET = b"the secret of another user"
TOP = make_tar({"usr": None, "usr/tool": SECRET})
AUTO = {"local_fetch": "auto"}
DIGEST = "sha256:" + "0" * 64

pytestmark = pytest.mark.usefixtures("root")


class World(NamedTuple):
    """A service, a user with secrets, and another user.

    Attributes:
        private: directory that is closed to all but its owner; what is in it is open to all.
        own: directory of the other user.
        handle: of the owner for ``private/store``.
    """

    service: ServiceProcess
    private: Path
    own: Path
    owner: RawClient
    other: RawClient
    handle: int


def give(uid: int, *directories: Path) -> None:
    for directory in directories:
        for path in (directory, *directory.rglob("*")):
            os.chown(path, uid, uid, follow_symlinks=False)


@contextmanager
def made_world(prefix: Sequence[str] = ()) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="cfs-", dir="/var/tmp") as name:
        top = Path(name)
        top.chmod(0o755)
        private, own, below = top / "private", top / "own", top / "private/cwd"
        for path in (private, own, below):
            path.mkdir()
        Layout(private / "layout").add_image("v1", [TOP])
        Layout(own / "layout").add_image("v1", [make_tar({"usr": None})])
        give(OWNER, private)
        give(OTHER, own)
        private.chmod(0o700)
        with (
            service_process(top / "sock", "--insecure", prefix=prefix, cwd=below) as service,
            service.connect_as(OWNER) as owner,
            service.connect_as(OTHER) as other,
        ):
            handle = open_store(owner, private / "store")
            (private / "store").chmod(0o755)
            wish = pulling(handle, f"oci:{private}/layout:v1", "secret")
            assert "completed" in call(owner, f"{OCI}.Pull", **wish)
            yield World(service, private, own, owner, other, handle)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One for all tests that do not need more; what they leave in it harms none of the others."""
    with made_world() as made:
        yield made


@pytest.fixture
def world_with_fuse(tmp_path: Path) -> Iterator[World]:
    """The service's FUSE device is open to all, as on most machines."""
    device = tmp_path / "fuse"
    try:
        os.mknod(device, stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
        device.chmod(0o666)
        os.close(os.open(device, os.O_RDWR))
    except PermissionError:
        pytest.skip("no device nodes can be made here")
    script = f'mount --bind {device} /dev/fuse && exec "$@"'
    with made_world(["unshare", "-m", "sh", "-c", script, "sh"]) as made:
        yield made


def mountpoints(service: ServiceProcess) -> set[str]:
    lines = Path(f"/proc/{service.process.pid}/mountinfo").read_text().splitlines()
    return {line.split()[4] for line in lines}


def everything(handle: int) -> dict[str, Json]:
    """Return a call of each method that uses a store."""
    image = {"image": "secret"}
    return {
        "CloseRepository": {},
        "Fsck": {},
        "Gc": {"dry_run": True, "roots": []},
        "ImageObjects": {"name": "x"},
        "ListImageRefs": {},
        "Mount": {"name": "x", "options": {}},
        "FuseServe": {**image, "mountpoint": "/mnt", "wait": False},
        f"{OCI}.ListImages": {},
        f"{OCI}.Tag": {"manifest_digest": DIGEST, "name": "x"},
        f"{OCI}.Untag": {"name": "secret"},
        f"{OCI}.Check": image,
        f"{OCI}.Inspect": image,
        f"{OCI}.ComputeId": {**image, "bootable": False},
        f"{OCI}.Pull": pulling(handle, "oci:/nowhere"),
        f"{OCI}.OciMount": {**image, "bootable": False, "options": {}},
        f"{OCI}.OciFuseMount": {
            **image, "mountpoint": "/mnt", "bootable": False, "wait": False,
        },
        f"{OCI}.HasLayer": {"diff_id": digest_of(TOP)},
        f"{OCI}.GetLayer": {"params": {"diff_id": digest_of(TOP)}},
        f"{OCI}.FinalizeImage": {"manifest_json": "{}", "config_json": "{}", "layers": []},
    }  # fmt: skip


def test_handles_of_others_do_not_exist(world: World) -> None:
    own = open_store(world.other, world.own / "store")
    for handle in (0, world.handle, own + 1, (1 << 63) - 1):
        refused = {"error": "InvalidHandle", "handle": handle}
        for method, parameters in everything(handle).items():
            assert call(world.other, method, **{**parameters, "handle": handle}) == refused
    put = {"handle": world.handle, "diff_id": digest_of(TOP), "zerocopy": False}
    with open(world.own / "layout/index.json") as file:
        world.other.send(f"{OCI}.PutLayer", [file.fileno(), file.fileno()], parameters=put)
    reply = world.other.receive()
    assert reply is not None
    assert reply.members["error"] == f"{OCI}.InvalidHandle"
    listed = call(world.owner, f"{OCI}.ListImages", handle=world.handle)["images"]
    assert [image["name"] for image in listed] == ["secret"]


def ways_to(world: World, target: str, nr_open: int | None = None) -> Iterator[str]:
    """Yield paths that the service could follow, and the other user not."""
    yield f"{world.private}/{target}"
    yield target  # from the service's working directory
    yield f"../{target}"
    link = world.own / "link"
    numbers = world.service.descriptors_below(world.private)
    assert numbers
    for number in numbers[:nr_open]:
        for directory in ("self", "thread-self", str(world.service.process.pid)):
            yield f"/proc/{directory}/fd/{number}"
            yield f"/proc/{directory}/fd/{number}/../{target}"
        link.unlink(missing_ok=True)
        link.symlink_to(f"/proc/self/fd/{number}")
        yield str(link)
        yield f"{link}/../{target}"
        yield f"/dev/fd/{number}"
    for directory in ("self", "thread-self", f"self/task/{world.service.process.pid}"):
        yield f"/proc/{directory}/cwd/../{target}"
        yield f"/proc/{directory}/root{world.private}/{target}"


def test_no_path_leads_to_stores_of_others(world: World) -> None:
    before = sorted(world.private.rglob("*"))
    for path in ways_to(world, "store"):
        found = call(world.other, "OpenRepository", path=path)
        assert found["error"] == "RepoNotFound", (path, found)
        for method in ("InitRepository", "EnsureRepository"):
            for way in (path, f"{path}/new/store"):
                found = call(world.other, method, path=way)
                assert found.get("error") == "InternalError", (way, found)
    assert sorted(world.private.rglob("*")) == before


def test_no_path_leads_to_images_of_others(world: World) -> None:
    handle = open_store(world.other, world.own / "store")
    images = cycle(("oci:{}:v1", "oci-archive:{}", "docker-archive:{}", "containers-storage:x"))
    for image, path in zip(images, ways_to(world, "layout", 1), strict=False):
        wish = pulling(handle, image.format(path), storage_root=path) | AUTO
        found = call(world.other, f"{OCI}.Pull", **wish)
        assert found["error"] == "InternalError", (image, path, found)
    assert call(world.other, f"{OCI}.ListImages", handle=handle) == {"images": []}


def test_a_crafted_layout_leads_nowhere(world: World) -> None:
    handle = open_store(world.other, world.own / "store")
    for name in ("index.json", "blobs"):
        for target in (world.private / "layout" / name, "/proc/self/cwd/../layout/" + name):
            crafted = world.own / "crafted"
            shutil.copytree(world.own / "layout", crafted)
            give(OTHER, crafted)
            place = crafted / name
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()
            place.symlink_to(target)
            found = call(world.other, f"{OCI}.Pull", **pulling(handle, f"oci:{crafted}:v1"))
            assert found["error"] == "InternalError"
            shutil.rmtree(crafted)


def test_a_crafted_store_tells_nothing(world: World) -> None:
    """Its links lead where the service has something open, or into the secrets."""
    own = world.own / "store"
    handle = open_store(world.other, own)
    (own / "images").mkdir(exist_ok=True)
    secrets = [f"{world.private}/layout/index.json", "/proc/self/maps", "/proc/self/environ"]
    secrets += [f"/proc/self/fd/{number}" for number in world.service.descriptors()]
    for target in secrets:
        for place in (own / "images" / ("0" * 64), own / "streams/x", own / "meta.json"):
            place.parent.mkdir(exist_ok=True)
            before = place.read_bytes() if place.name == "meta.json" else b""
            place.unlink(missing_ok=True)
            place.symlink_to(target)
            answers = [
                call(world.other, "Fsck", handle=handle),
                call(world.other, "ImageObjects", handle=handle, name="0" * 64),
                call(world.other, "Gc", handle=handle, dry_run=True, roots=[]),
                call(world.other, "OpenRepository", path=str(own)),
            ]
            place.unlink()
            if before:
                assert answers[-1]["error"] == "RepoNotFound"
                place.write_bytes(before)
            text = repr(answers)
            for secret in ("schemaVersion", "/usr/lib", "PATH=", "r-xp"):
                assert secret not in text


def test_errors_do_not_tell_what_is_there(world: World) -> None:
    handle = open_store(world.other, world.own / "store")
    texts = {}
    for name in ("store", "absent"):
        path = world.private / name
        answers = [
            call(world.other, "OpenRepository", path=str(path)),
            call(world.other, "InitRepository", path=str(path)),
            call(world.other, f"{OCI}.Pull", **pulling(handle, f"oci:{path}:v1")),
            call(world.other, f"{OCI}.Pull", **pulling(handle, f"oci-archive:{path}")),
            call(
                world.other, "FuseServe", handle=handle, image="x", mountpoint=str(path), wait=False
            ),
        ]
        texts[name] = repr(answers).replace(name, "")
    assert texts["store"] == texts["absent"]


def test_no_program_runs_for_others(world: World) -> None:
    handle = open_store(world.other, world.own / "store")
    for image in ("docker://localhost:1/x", "registry:localhost:1/x", "docker-daemon:x:y",
                  f"dir:{world.private}", "containers-storage:x"):  # fmt: skip
        assert call(world.other, f"{OCI}.Pull", **pulling(handle, image)) == {
            "error": "PermissionDenied"
        }


@contextmanager
def swapping(link: Path, *targets: Path) -> Iterator[None]:
    """Have a link lead now here, now there."""
    stop = threading.Event()
    temporary = link.with_name("temporary")

    def swap() -> None:
        while not stop.is_set():
            for target in targets:
                temporary.symlink_to(target)
                temporary.rename(link)

    thread = threading.Thread(target=swap)
    link.symlink_to(targets[0])
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        link.unlink()


def test_a_race_of_paths_leads_nowhere(world: World) -> None:
    own = world.own / "store"
    open_store(world.other, own)
    link = world.own / "swapped"
    nr_opened = 0
    with swapping(link, own, world.private / "store", Path("/proc/self/cwd/../store")):
        for _ in range(100):
            found = call(world.other, "OpenRepository", path=str(link))
            call(world.other, "InitRepository", path=f"{link}/new")
            if "error" in found:
                continue
            nr_opened += 1
            listed = call(world.other, f"{OCI}.ListImages", handle=found["handle"])
            assert listed == {"images": []}
            call(world.other, "CloseRepository", handle=found["handle"])
    assert nr_opened
    assert not (world.private / "store/new").exists()


@pytest.mark.usefixtures("fuse", "private_mounts")
def test_mounts_of_others_do_not_exist(world_with_fuse: World) -> None:
    world = world_with_fuse
    mnt = world.private / "mnt"
    mnt.mkdir()
    os.chown(mnt, OWNER, OWNER)
    mounting = {"image": "secret", "bootable": False, "wait": False, "options": {"workers": 1}}
    served = call(
        world.owner, f"{OCI}.OciFuseMount", handle=world.handle, mountpoint=str(mnt), **mounting
    )
    number = served["mount"]["mount_id"]
    with world.service.connect() as root:
        try:
            assert call(world.other, "ListMounts") == {"mounts": []}
            refused = {"error": "NoSuchMount", "mount_id": number}
            assert call(world.other, "ListMounts", mount_id=number) == refused
            assert call(world.other, "WatchMount", mount_id=number) == refused
            for detach in (None, True, False):
                found = call(world.other, "Unmount", mount_id=number, detach=detach)
                assert found == refused
            for client in (root, world.owner):
                (seen,) = call(client, "ListMounts")["mounts"]
                assert (seen["state"], seen["owner_uid"]) == ("Serving", OWNER)
        finally:
            assert call(root, "Unmount", mount_id=number) == {}


@pytest.mark.usefixtures("fuse", "private_mounts")
def test_a_race_of_mount_points_mounts_on_own_directories_only(world_with_fuse: World) -> None:
    world = world_with_fuse
    handle = open_store(world.other, world.own / "store")
    pulled = call(
        world.other, f"{OCI}.Pull", **pulling(handle, f"oci:{world.own}/layout:v1", "own")
    )
    assert "completed" in pulled
    mine, others = world.own / "mine", world.own.parent / "others"
    for place, uid in ((mine, OTHER), (others, OWNER)):
        place.mkdir()
        place.chmod(0o777)
        os.chown(place, uid, uid)
    mounting = {"image": "own", "bootable": False, "wait": False, "options": {"workers": 1}}
    outcomes = set()
    link = world.own / "swapped"
    with swapping(link, mine, others):
        for _ in range(12):
            found = call(
                world.other, f"{OCI}.OciFuseMount", handle=handle, mountpoint=str(link), **mounting
            )
            outcomes.add(found.get("error", "served"))
            places = mountpoints(world.service)
            assert str(others) not in places
            if "error" not in found:
                assert str(mine) in places
                number = found["mount"]["mount_id"]
                assert call(world.other, "Unmount", mount_id=number) == {}
    assert outcomes <= {"served", "PermissionDenied"}


def test_owners_stay_as_they_are(world: World) -> None:
    """What he has the service store is his, and nothing else changes hands."""
    handle = open_store(world.other, world.own / "filled")
    assert "completed" in call(
        world.other, f"{OCI}.Pull", **pulling(handle, f"oci:{world.own}/layout:v1", "own")
    )
    assert {path.lstat().st_uid for path in (world.own / "filled").rglob("*")} == {OTHER}
    assert {path.lstat().st_uid for path in world.private.rglob("*")} == {OWNER}
