"""Mounts by the kernel alone, through ``mount.composefs`` and its library.

Older kernels are played by refusing what they refuse; the virtual machine has a real one.
"""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from cfs.errors import MountError
from cfs.linux.files import is_on_overlay, owned
from cfs.linux.loop import _LOOP_CTL_GET_FREE, open_loop_device
from cfs.linux.mountinfo import list_mounts
from cfs.linux.mounts import Option, create_mount
from cfs.mounting import kernel
from cfs.mounting.kernel import mount_in_kernel
from cfs.overlaymount import OverlayLayers, OverlayVerity
from tests.command_line import Done, run
from tests.integration.oracle_walk import walk
from tests.integration.stores import make_image
from tests.integration.waiting import wait_until

pytestmark = pytest.mark.usefixtures("overlay")

BIG = os.urandom(70_000)
OTHER = os.urandom(50_000)
Layers = Callable[..., OverlayLayers]


@pytest.fixture
def image(tmp_path: Path, objects: Path) -> Path:
    """An image of a small tree, its objects below ``objects``."""
    return make_image(tmp_path, objects, {"big": BIG, "other": OTHER, "small": b"text"})


@pytest.fixture
def changes(tmp_path: Path) -> str:
    """Upper and work directory, as options."""
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    return f"upperdir={tmp_path}/upper,workdir={tmp_path}/work"


@pytest.fixture
def mnt(mnt: Path) -> Iterator[Path]:
    """The mount point; afterwards nothing is mounted."""
    yield mnt
    if os.path.ismount(mnt):
        subprocess.run(["umount", str(mnt)], check=True)


@pytest.fixture
def loop() -> None:
    """Loop devices."""
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("no /dev/loop-control")
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        try:
            os.close(open_loop_device(file.fileno()))
        except OSError as error:
            pytest.skip(f"no loop device: {error.strerror}")


def mount(*words: str | Path, status: int = 0) -> Done:
    done = run("mount.composefs", *words, cwd=Path("/"))
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stderr
    return done


def refused(*words: str | Path) -> str:
    """Return the one line that tells why, without the prefix."""
    done = mount(*words, status=1)
    (line,) = done.stderr.decode().splitlines()
    return line.removeprefix("mount.composefs: ")


def loop_files() -> list[str]:
    """Return the files behind loop devices."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            found.append(path.read_text().strip())
    return found


def test_mount_shows_the_tree(image: Path, objects: Path, mnt: Path) -> None:
    mount("-o", f"basedir={objects}", image, mnt)
    assert {path.name: path.read_bytes() for path in mnt.iterdir()} == {
        "big": BIG, "other": OTHER, "small": b"text",
    }  # fmt: skip
    (entry,) = [entry for entry in list_mounts() if entry.mountpoint == os.fsencode(mnt)]
    assert (entry.fstype, entry.source) == (b"overlay", b"composefs")
    with pytest.raises(OSError, match="Read-only"):
        (mnt / "new").touch()


def test_objects_in_several_directories(
    image: Path, objects: Path, mnt: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more, and not a list"
    paths = sorted(path for path in objects.rglob("*") if path.is_file())
    assert len(paths) == 2
    moved = more / paths[0].relative_to(objects)
    moved.parent.mkdir(parents=True)
    paths[0].rename(moved)
    escaped = str(more).replace(",", "\\,")
    mount("-o", f"basedir={objects}:{escaped}", image, mnt)
    assert (mnt / "big").read_bytes() == BIG
    assert (mnt / "other").read_bytes() == OTHER


@pytest.mark.parametrize("options", ["", ",rw", ",ro,rw"])
def test_upper_directory_gets_the_changes(
    image: Path, objects: Path, mnt: Path, changes: str, options: str
) -> None:
    upper = image.parent / "upper"
    (upper / "mine").write_text("mine")
    mount("-o", f"basedir={objects},{changes}{options}", image, mnt)
    assert (mnt / "mine").read_text() == "mine"
    with (mnt / "big").open("ab") as file:
        file.write(b"more")
    (mnt / "small").unlink()
    assert (upper / "big").read_bytes() == BIG + b"more"
    assert sorted(path.name for path in mnt.iterdir()) == ["big", "mine", "other"]


def test_upper_directory_may_be_read_only(
    image: Path, objects: Path, mnt: Path, changes: str
) -> None:
    (image.parent / "upper" / "mine").write_text("mine")
    mount("-o", f"basedir={objects},{changes},ro", image, mnt)
    assert (mnt / "mine").read_text() == "mine"
    with pytest.raises(OSError, match="Read-only"):
        (mnt / "new").touch()


def test_options_of_every_mount(image: Path, objects: Path, mnt: Path) -> None:
    mount("-o", f"basedir={objects},nosuid,nodev,noexec,_netdev,x-unit=1", image, mnt)
    given = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
    assert os.statvfs(mnt).f_flag & given == given


def test_owners_are_mapped(image: Path, objects: Path, mnt: Path) -> None:
    holder = subprocess.Popen(
        ["unshare", "--user", sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder:
        if not holder.stdout.readline():
            pytest.skip("no user namespaces")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{holder.pid}/{name}").write_text("0 4321 1000")
        namespace = f"/proc/{holder.pid}/ns/user"
        mount("-o", f"basedir={objects},idmap={namespace}", image, mnt)
        holder.stdin.close()
    status = (mnt / "big").stat()
    assert (status.st_uid, status.st_gid) == (4321, 4321)
    assert (mnt / "big").read_bytes() == BIG


def test_namespace_that_cannot_map_is_refused(image: Path, objects: Path, mnt: Path) -> None:
    where = f"Failed to mount composefs {image}: cannot map the ids of the mount: "
    options = f"basedir={objects},idmap="
    assert refused("-o", f"{options}{image}", image, mnt) == f"{where}Invalid argument"
    assert refused("-o", f"{options}/proc/self/ns/user", image, mnt).startswith(where)
    message = refused("-o", f"{options}/nowhere", image, mnt)
    assert message == "Failed to open userns /nowhere: No such file or directory"
    assert not os.path.ismount(mnt)


def test_files_without_verity_are_refused_if_it_is_demanded(
    image: Path, objects: Path, mnt: Path
) -> None:
    mount("-o", f"basedir={objects},verity", image, mnt)
    with pytest.raises(OSError, match="Input/output error"):
        (mnt / "big").read_bytes()
    assert (mnt / "small").read_text() == "text"


def test_verity_is_demanded_if_the_kernel_can(
    image: Path, mnt: Path, layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_without_verity(
        fstype: str, options: Sequence[Option], attributes: Any, *, optional: Sequence[str] = ()
    ) -> int:
        old = {"verity": "no_such_option"}
        named = [(old.get(key, key), value) for key, value in options]
        left_out = [old.get(key, key) for key in optional]
        return create_mount(fstype, named, attributes, optional=left_out)

    monkeypatch.setattr(kernel, "create_mount", create_without_verity)
    with pytest.raises(MountError, match="no_such_option"):
        mount_file(image, mnt, layers(verity=OverlayVerity.REQUIRE))
    mount_file(image, mnt, layers(verity=OverlayVerity.TRY))
    assert (mnt / "big").read_bytes() == BIG


def test_image_must_have_the_digest(image: Path, objects: Path, mnt: Path) -> None:
    message = refused("-o", f"basedir={objects},digest={'0' * 64}", image, mnt)
    assert message == f"Failed to mount composefs {image}: Image has no fs-verity"
    message = refused("-o", f"basedir={objects},digest=0", image, mnt)
    assert "Invalid digest value" in message
    assert not os.path.ismount(mnt)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("objects image.cfs mnt/none", "mount point TMP/mnt/none: No such file or directory"),
        ("objects image.cfs image.cfs", "mount point TMP/image.cfs: not a directory"),
        ("objects/none image.cfs mnt", "TMP/objects/none: No such file or directory"),
        ("image.cfs image.cfs mnt", "TMP/image.cfs: Not a directory"),
        ("objects source/big mnt", "TMP/source/big: not a composefs image"),
        ("objects source mnt", "Failed to open TMP/source: not a file"),
        ("objects none mnt", "Failed to open TMP/none: No such file or directory"),
    ],
)
def test_refusals(image: Path, mnt: Path, words: str, message: str) -> None:
    directory = image.parent
    objects, file, place = (directory / word for word in words.split(" "))
    found = refused("-o", f"basedir={objects}", file, place)
    assert found.endswith(message.replace("TMP", str(directory)))
    assert not os.path.ismount(mnt)


def test_missing_work_directory(image: Path, objects: Path, mnt: Path, changes: str) -> None:
    found = refused("-o", f"basedir={objects},{changes}x", image, mnt)
    assert found.endswith(f"{image.parent}/workx: No such file or directory")
    assert not os.path.ismount(mnt)


def test_message_of_the_kernel_is_shown(
    image: Path, objects: Path, mnt: Path, tmp_path: Path, changes: str
) -> None:
    if not os.access("/dev/kmsg", os.R_OK):
        pytest.skip("/dev/kmsg is not readable: these reasons are told nowhere else")
    broken = tmp_path / "broken"
    broken.write_bytes(image.read_bytes()[:1024] + bytes(64) + image.read_bytes()[1088:])
    assert "cannot find valid erofs superblock" in refused("-o", f"basedir={objects}", broken, mnt)
    same = changes.replace("/work", "/upper")
    message = refused("-o", f"basedir={objects},{same}", image, mnt)
    assert "workdir and upperdir must be separate subtrees" in message


def test_refusal_that_is_not_about_files_is_told_as_it_is(
    image: Path, mnt: Path, layers: Layers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOENT, "no loop devices")

    monkeypatch.setattr(kernel, "open_loop_device", refuse)
    broken = tmp_path / "broken"
    broken.write_bytes(image.read_bytes()[:1024] + bytes(64) + image.read_bytes()[1088:])
    with pytest.raises(MountError, match="type erofs: "):
        mount_file(broken, mnt, layers())

    def forbid(*_: object, **more: object) -> int:
        msg = f"forbidden{more or ''}"
        raise MountError(msg, errno.EPERM)

    monkeypatch.setattr(kernel, "create_mount", forbid)
    with pytest.raises(MountError, match="forbidden"):
        mount_file(image, mnt, layers())


def test_truncated_image_does_no_harm(
    image: Path, objects: Path, mnt: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    for size in (0, 31, 32, 1024, 1100):
        short.write_bytes(image.read_bytes()[:size])
        refused("-o", f"basedir={objects}", short, mnt)
        assert not os.path.ismount(mnt)


def test_fake_mounts_nothing(image: Path, objects: Path, mnt: Path) -> None:
    mount("-f", "-o", f"basedir={objects}", image, mnt)
    assert not os.path.ismount(mnt)


def test_help_goes_to_stderr() -> None:
    done = mount("-h")
    assert done.stdout == b""
    assert b"basedir=DIR" in done.stderr


@pytest.mark.usefixtures("private_mounts")
def test_ordinary_user_is_told_why_not(image: Path, objects: Path, mnt: Path) -> None:
    words = ["mount.composefs", "-o", f"basedir={objects}", str(image), str(mnt)]
    done = subprocess.run(
        ["unshare", "-Urm", sys.executable, "-P", "-m", "cfs.cli.main", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespaces: {done.stderr}")
    assert done.returncode == 1
    assert "type erofs: Operation not permitted" in done.stderr


def test_c_tool_shows_the_same(image: Path, objects: Path, mnt: Path) -> None:
    tool = shutil.which("mount.composefs", path=os.environ.get("CFS_C_TOOLS", ""))
    if tool is None:
        pytest.skip("CFS_C_TOOLS does not name a directory with C mount.composefs")
    found = []
    ours = [sys.executable, "-P", "-m", "cfs.cli.main", "mount.composefs"]
    for command in ([tool], ours):
        words = [*command, "-o", f"basedir={objects}", str(image), str(mnt)]
        subprocess.run(words, check=True)
        found.append(list(walk(os.fsencode(mnt))))
        subprocess.run(["umount", str(mnt)], check=True)
    assert found[0] == found[1]


class OlderKernel:
    """Refuses what kernels before 6.15 refuse.

    Attributes:
        scratch: where temporary directories go.
        takes_files: whether EROFS takes files.
        nr_attached: how many mounts lay in ``scratch`` whenever an overlay was made.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.takes_files = True
        self.nr_attached: list[int] = []

    def create_mount(
        self, fstype: str, options: Sequence[Option], attributes: Any, **more: Any
    ) -> int:
        given = dict(options)
        if fstype == "erofs" and not self.takes_files:
            path = os.readlink(str(given["source"]))
            if not path.startswith("/dev/loop"):
                msg = "cannot make a mount of type erofs: Block device required"
                raise MountError(msg, errno.ENOTBLK)
        if fstype == "overlay":
            if any(isinstance(value, int) for value in given.values()):
                msg = "cannot make a mount of type overlay: Bad value for 'lowerdir+'"
                raise MountError(msg, errno.EINVAL)
            places = [os.fsencode(path) for path in self.scratch.iterdir()]
            self.nr_attached.append(sum(entry.mountpoint in places for entry in list_mounts()))
        return create_mount(fstype, options, attributes, **more)


@pytest.fixture
def layers(objects: Path) -> Iterator[Layers]:
    """What lies around an image, by default its objects."""
    with ExitStack() as stack:
        fd = owned(stack, os.open(objects, os.O_RDONLY | os.O_DIRECTORY))
        yield lambda **more: OverlayLayers(objects=[fd], **more)


def mount_file(image: Path, mnt: Path, layers: OverlayLayers) -> None:
    with image.open("rb") as file:
        mount_in_kernel(file.fileno(), str(mnt), layers, source=b"test")


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OlderKernel:
    """An older kernel for the rest of the test."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    older = OlderKernel(scratch)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(kernel, "create_mount", older.create_mount)
    return older


def test_kernel_that_takes_layers_by_path_only(
    image: Path, mnt: Path, layers: Layers, older: OlderKernel
) -> None:
    mount_file(image, mnt, layers())
    assert (mnt / "big").read_bytes() == BIG
    assert older.nr_attached == [1]
    assert list(older.scratch.iterdir()) == []


@pytest.mark.usefixtures("older")
def test_kernel_that_takes_upper_directories_by_path_only(
    image: Path, mnt: Path, layers: Layers, changes: str
) -> None:
    upper, work = [item.partition("=")[2] for item in changes.split(",")]
    mount_file(image, mnt, layers(upperdir=upper, workdir=work, read_write=True))
    assert (mnt / "big").read_bytes() == BIG
    (mnt / "new").touch()
    assert Path(upper, "new").exists()


def test_refusal_by_an_older_kernel_leaves_nothing(
    image: Path, mnt: Path, layers: Layers, older: OlderKernel
) -> None:
    upper = str(image.parent / "source")
    with pytest.raises(MountError, match="type overlay: "):
        mount_file(image, mnt, layers(upperdir=upper, workdir=upper))
    assert older.nr_attached == [1]
    assert list(older.scratch.iterdir()) == []


def test_refusal_is_told_where_there_is_no_temporary_directory(
    image: Path, mnt: Path, layers: Layers, older: OlderKernel
) -> None:
    older.scratch.rmdir()
    with pytest.raises(MountError, match="Bad value for 'lowerdir"):
        mount_file(image, mnt, layers())


@pytest.mark.usefixtures("loop")
def test_kernel_that_takes_no_files_gets_a_loop_device(
    image: Path, mnt: Path, layers: Layers, older: OlderKernel
) -> None:
    older.takes_files = False
    mount_file(image, mnt, layers())
    assert (mnt / "big").read_bytes() == BIG
    assert loop_files().count(str(image)) == 1
    subprocess.run(["umount", str(mnt)], check=True)
    wait_until(lambda: str(image) not in loop_files(), "the loop device goes with the mount")


@pytest.mark.usefixtures("loop")
def test_image_on_an_overlay(image: Path, objects: Path, mnt: Path, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    try:
        if is_on_overlay(fd):
            pytest.skip("this is an overlay already: two more are too many")
    finally:
        os.close(fd)
    place, lower, empty = (tmp_path / name for name in ("overlay", "lower", "empty"))
    for directory in (place, lower, empty):
        directory.mkdir()
    image.rename(lower / "image")
    objects.rename(lower / "objects")
    layers = f"lowerdir={empty}:{lower}"
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "none", str(place)], check=True)
    try:
        mount("-o", f"basedir={place}/objects", place / "image", mnt)
        assert (mnt / "big").read_bytes() == BIG
        subprocess.run(["umount", str(mnt)], check=True)
    finally:
        # lazily: the loop device keeps the image open for a moment
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.usefixtures("loop")
def test_many_loop_devices_at_once(image: Path) -> None:
    with ExitStack() as stack:
        file = stack.enter_context(image.open("rb"))
        devices = [owned(stack, open_loop_device(file.fileno())) for _ in range(4)]
        assert len({os.fstat(device).st_rdev for device in devices}) == 4
        for device in devices:
            assert os.pread(device, 4096, 0) == image.read_bytes()[:4096]
    wait_until(lambda: str(image) not in loop_files(), "loop devices go when they are closed")


@pytest.mark.usefixtures("loop")
def test_loop_device_that_somebody_took_first(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        file = stack.enter_context(image.open("rb"))
        taken = owned(stack, open_loop_device(file.fileno()))
        free = [os.minor(os.fstat(taken).st_rdev)]
        ioctl = fcntl.ioctl

        def answer(fd: int, request: int, argument: Any = 0) -> object:
            if request == _LOOP_CTL_GET_FREE and free:
                return free.pop()
            return ioctl(fd, request, argument)

        monkeypatch.setattr(fcntl, "ioctl", answer)
        device = owned(stack, open_loop_device(file.fileno()))
        assert os.fstat(device).st_rdev != os.fstat(taken).st_rdev
    wait_until(lambda: str(image) not in loop_files(), "loop devices go when they are closed")
