"""Both planes on real mounts, and the processes that serve them."""

import ctypes
import errno
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyfuse3
import pytest

from cfs.erofs.writer import write_image
from cfs.errors import MountError
from cfs.fuse import Mount, ServeOptions, serve, start
from cfs.mount import prepare_mountpoint
from cfs.tree import Directory, Inode, Link, Regular, Special, Symlink
from tests.integration.vectors import make_vector
from tests.integration.waiting import wait_for_end
from tests.paths import CHECKOUT

Serve = Callable[..., Mount]
pytestmark = pytest.mark.usefixtures("fuse")
DEADLINE = 60


def directory(children: dict[bytes, Inode | Link], mode: int = 0o755) -> Directory:
    return Directory(mode=0o040000 | mode, nlink=2, children=children)


def inline(content: bytes) -> Regular:
    return Regular(mode=0o100644, size=len(content), content=content)


def external(payload: bytes, size: int) -> Regular:
    return Regular(mode=0o100644, size=size, payload=payload)


def put_object(objects: Path, name: str, content: bytes) -> Regular:
    path = objects / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return external(name.encode(), len(content))


def mount_line(mount: Mount) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return next(line for line in lines if f" {mount.mountpoint} " in line).split(" ")


def test_stat_shows_every_column(served: Serve, mnt: Path) -> None:
    device = Special(
        mode=0o020640, uid=70000, gid=80000, rdev=os.makedev(259, 70000), nlink=3,
        mtime_sec=-7, mtime_nsec=999999999,
    )  # fmt: skip
    served(make_vector(directory({b"dev": device, b"file": inline(b"x" * 4097)})))
    status = os.lstat(mnt / "dev")
    assert (status.st_mode, status.st_nlink) == (0o020640, 3)
    assert (status.st_uid, status.st_gid) == (70000, 80000)
    assert status.st_rdev == os.makedev(259, 70000)
    assert status.st_mtime_ns == status.st_ctime_ns == status.st_atime_ns == -6_000_000_001
    assert os.stat(mnt / "file").st_blocks == 16


def test_hard_links_are_one_inode(served: Serve, mnt: Path) -> None:
    file = inline(b"x")
    file.nlink = 2
    served(make_vector(directory({b"a": file, b"b": Link(file)})))
    assert os.path.samefile(mnt / "a", mnt / "b")


def test_symlinks_and_names_are_bytes(served: Serve, mnt: Path) -> None:
    target = b"\xff" * 4000
    link = Symlink(mode=0o120777, size=len(target), target=target)
    served(make_vector(directory({b"\xfe\n": link, b"n" * 255: inline(b"long")})))
    assert os.readlink(os.fsencode(mnt) + b"/\xfe\n") == target
    assert sorted(os.listdir(os.fsencode(mnt))) == [b"n" * 255, b"\xfe\n"]
    with pytest.raises(OSError, match="too long"):
        os.stat(mnt / ("n" * 256))


def test_missing_names_stay_missing(served: Serve, mnt: Path) -> None:
    served(make_vector(directory({b"a": inline(b"")})))
    for _ in range(3):
        assert not (mnt / "b").exists()


def test_writes_of_any_kind_are_refused(served: Serve, mnt: Path) -> None:
    served(make_vector(directory({b"a": inline(b"x"), b"d": directory({})})))
    attempts: list[Callable[[], object]] = [
        lambda: (mnt / "a").write_bytes(b"y"),
        (mnt / "new").touch,
        (mnt / "a").unlink,
        (mnt / "d").rmdir,
        (mnt / "e").mkdir,
        lambda: (mnt / "a").rename(mnt / "c"),
        lambda: (mnt / "a").chmod(0),
        lambda: os.truncate(mnt / "a", 0),
        lambda: os.link(mnt / "a", mnt / "b"),
        lambda: os.symlink("a", mnt / "l"),
        lambda: os.setxattr(mnt / "a", "user.x", b""),
        lambda: os.removexattr(mnt / "a", "user.x"),
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match="Read-only") as caught:
            attempt()
        assert caught.value.errno == errno.EROFS
    assert not os.access(mnt / "a", os.W_OK)


def test_reads_at_odd_offsets(served: Serve, mnt: Path, objects: Path) -> None:
    rng = random.Random(1)
    content = rng.randbytes(1_000_003)
    served(make_vector(directory({b"f": put_object(objects, "aa/1", content)})))
    with open(mnt / "f", "rb", buffering=0) as file:
        for _ in range(200):
            off, size = rng.randrange(1_100_000), rng.randrange(300_000)
            assert os.pread(file.fileno(), size, off) == content[off : off + size]
    direct = os.open(mnt / "f", os.O_RDONLY | os.O_DIRECT)
    try:
        assert os.pread(direct, 4096, 999_424) == content[999_424:]
    finally:
        os.close(direct)


def test_file_larger_than_4_gib(served: Serve, mnt: Path, objects: Path) -> None:
    size = (5 << 30) + 7
    (objects / "aa").mkdir()
    with (objects / "aa/big").open("wb") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), b"end", size - 3)
        os.pwrite(file.fileno(), b"middle", (4 << 30) - 3)
    served(make_vector(directory({b"big": external(b"aa/big", size)})))
    assert os.stat(mnt / "big").st_size == size
    with open(mnt / "big", "rb") as file:
        assert os.pread(file.fileno(), 100, size - 3) == b"end"
        assert os.pread(file.fileno(), 8, (4 << 30) - 4) == b"\0middle\0"


def test_bad_objects_fail_alone_and_are_logged_once(
    served: Serve, mnt: Path, objects: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (objects / "aa").mkdir()
    (objects / "outside").symlink_to("/etc")
    os.mkfifo(objects / "aa/fifo")
    good = put_object(objects, "aa/good", b"good")
    files = {
        b"gone": (external(b"aa/gone", 5), errno.ENOENT),
        b"sparse": (Regular(mode=0o100644, size=5), errno.EIO),
        b"short": (external(b"aa/good", 5), errno.EIO),
        b"fifo": (external(b"aa/fifo", 5), errno.EIO),
        b"link": (external(b"outside/passwd", 5), errno.ELOOP),
        b"escape": (external(b"../../../../etc/passwd", 5), errno.EXDEV),
    }
    mount = served(make_vector(directory({b"good": good, **{k: v[0] for k, v in files.items()}})))
    for name, (_, reason) in files.items():
        for _ in range(2):
            assert os.stat(os.fsencode(mnt) + b"/" + name).st_size == 5
            with pytest.raises(OSError, match=os.strerror(reason)):
                Path(mnt / name.decode()).read_bytes()  # workers open at the first read
    assert (mnt / "good").read_bytes() == b"good"
    mount.unmount(DEADLINE)
    logged = [line for line in capfd.readouterr().err.splitlines() if line.startswith("nid")]
    assert len(logged) == len(files)


def test_objects_come_from_the_first_directory_that_has_them(tmp_path: Path, mnt: Path) -> None:
    stores = [tmp_path / "one", tmp_path / "two"]
    for number, store in enumerate(stores):
        store.mkdir()
        put_object(store, "aa/both", b"%d" % number)
    put_object(stores[1], "bb/second", b"second")
    tree = directory({b"both": external(b"aa/both", 1), b"second": external(b"bb/second", 6)})
    with serve(make_vector(tree), mnt, stores, name="x"):
        assert (mnt / "both").read_bytes() == b"0"
        assert (mnt / "second").read_bytes() == b"second"


def test_object_cut_while_open_gives_an_error(served: Serve, mnt: Path, objects: Path) -> None:
    served(make_vector(directory({b"f": put_object(objects, "aa/1", b"x" * 100_000)})))
    with open(mnt / "f", "rb", buffering=0) as file:
        os.truncate(objects / "aa/1", 10)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            file.read()


class Libc:
    """readdir with positions, which Python hides."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.opendir.restype = ctypes.c_void_p
        self._libc.readdir.restype = ctypes.c_void_p
        self._libc.telldir.restype = ctypes.c_long

    def open(self, path: Path) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._libc.opendir(os.fsencode(path)))

    def tell(self, stream: ctypes.c_void_p) -> int:
        return int(self._libc.telldir(stream))

    def seek(self, stream: ctypes.c_void_p, position: int) -> None:
        self._libc.seekdir(stream, ctypes.c_long(position))

    def read(self, stream: ctypes.c_void_p) -> bytes | None:
        entry = self._libc.readdir(stream)
        return ctypes.string_at(entry + 19) if entry else None  # d_name

    def close(self, stream: ctypes.c_void_p) -> None:
        self._libc.closedir(stream)


def test_100_000_entries_and_any_position(served: Serve, mnt: Path) -> None:
    names = [b"%06d" % number for number in range(100_000)]
    special = Special(mode=0o010644)
    served(make_vector(directory({name: Link(special) for name in names})))
    assert len(os.listdir(mnt)) == len(names)
    libc = Libc()
    stream = libc.open(mnt)
    try:
        places = []
        position = libc.tell(stream)
        while name := libc.read(stream):
            places.append((position, name))
            position = libc.tell(stream)
        assert sorted(name for _, name in places) == sorted([*names, b".", b".."])
        rng = random.Random(2)
        for position, name in rng.sample(places, 300):
            libc.seek(stream, position)
            assert libc.read(stream) == name
        position, name = places[50_000]
        libc.seek(stream, position)
        assert sum(1 for _ in iter(lambda: libc.read(stream), None)) == len(places) - 50_000
    finally:
        libc.close(stream)


def test_xattrs_follow_the_image(served: Serve, mnt: Path) -> None:
    file = inline(b"x")
    file.xattrs = {b"user.a": b"1" * 60000, b"user.empty": b"", b"security.x": b"\0\xff"}
    served(make_vector(directory({b"f": file, b"bare": inline(b"")})))
    names = sorted(os.listxattr(mnt / "f"))
    assert names == ["security.x", "user.a", "user.empty"]
    assert {name: os.getxattr(mnt / "f", name) for name in names} == {
        name.decode(): value for name, value in file.xattrs.items()
    }
    assert os.listxattr(mnt / "bare") == []
    for name, reason in (
        ("user.none", errno.ENODATA),
        ("security.selinux", errno.EOPNOTSUPP),
        ("system.posix_acl_access", errno.EOPNOTSUPP),
    ):
        with pytest.raises(OSError, match=os.strerror(reason)):
            os.getxattr(mnt / "f", name)


# version 2; user::rw- user:65534:r-- group::--- mask::r-- other::---
ACL = bytes.fromhex(
    "0200000001000600ffffffff02000400feff000004000000ffffffff"
    "10000400ffffffff20000000ffffffff"
)  # fmt: skip


@pytest.mark.usefixtures("root")
def test_posix_acls_are_enforced(served: Serve, mnt: Path) -> None:
    closed, granted = inline(b"x"), inline(b"x")
    closed.mode = 0o100640
    granted.mode = 0o100640
    granted.xattrs = {b"system.posix_acl_access": ACL}
    served(make_vector(directory({b"closed": closed, b"open": granted})), allow_other=True)
    assert os.getxattr(mnt / "open", "system.posix_acl_access") == ACL
    for name, status in (("closed", 1), ("open", 0)):
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat"]
        place = "/proc/self/cwd/" + name  # the way to mnt is closed to him
        done = subprocess.run([*command, place], cwd=mnt, capture_output=True, check=False)
        assert done.returncode == status, done.stderr


def test_mount_says_what_it_is(served: Serve, mnt: Path) -> None:
    mount = served(make_vector(directory({b"f": inline(b"x")})))
    fields = mount_line(mount)
    place = fields.index("-")
    assert fields[place + 1 : place + 3] == ["fuse.composefs", "composefs:test"]
    options = {*fields[5].split(","), *fields[place + 3].split(",")}
    assert {"ro", "default_permissions"} <= options
    assert "allow_other" not in options
    if os.geteuid() == 0:
        assert not {"nosuid", "nodev"} & options
    for command in (["df", str(mnt)], ["df", "-i", str(mnt)]):
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "100%" not in text
    status = os.statvfs(mnt)
    assert (status.f_bsize, status.f_bavail, status.f_namemax) == (4096, 0, 255)
    assert status.f_blocks == 100


def test_several_processes_at_once(served: Serve, mnt: Path, objects: Path) -> None:
    rng = random.Random(3)
    contents = {b"%03d" % i: rng.randbytes(rng.randrange(1, 200_000)) for i in range(40)}
    files: dict[bytes, Inode | Link] = {
        name: put_object(objects, f"aa/{name.decode()}", content)
        for name, content in contents.items()
    }
    served(make_vector(directory(files)))
    script = textwrap.dedent("""
        import hashlib, os, sys
        digest = hashlib.sha256()
        for name in sorted(os.listdir(sys.argv[1])):
            digest.update(open(os.path.join(sys.argv[1], name), "rb").read())
        print(digest.hexdigest())
    """)
    command = [sys.executable, "-S", "-c", script, str(mnt)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(6)]
    assert len({reader.communicate(timeout=DEADLINE)[0] for reader in readers}) == 1
    assert all(reader.returncode == 0 for reader in readers)
    for name, content in contents.items():
        assert (mnt / name.decode()).read_bytes() == content


def test_two_mounts_in_two_threads(tmp_path: Path, objects: Path) -> None:
    def use(number: int) -> bytes:
        mountpoint = tmp_path / f"mnt{number}"
        mountpoint.mkdir()
        vector = make_vector(directory({b"f": inline(b"%d" % number)}))
        with serve(vector, mountpoint, [objects], name="x"):
            return (mountpoint / "f").read_bytes()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(use, range(4))) == [b"0", b"1", b"2", b"3"]


def test_exception_in_the_block_leaves_nothing(mnt: Path, objects: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        serve(make_vector(directory({})), mnt, [objects], name="x") as mount,
    ):
        raise ZeroDivisionError
    assert not os.path.ismount(mnt)
    with pytest.raises(ProcessLookupError):
        os.kill(mount.pid, 0)


def test_empty_mount_point_is_not_the_working_directory() -> None:
    with pytest.raises(MountError, match="mount point is empty"):
        prepare_mountpoint("")


def test_bad_mount_points_are_named(tmp_path: Path, objects: Path) -> None:
    (tmp_path / "file").touch()
    vector = make_vector(directory({}))
    for name, reason in (("none", "No such file"), ("file", "not a directory")):
        with pytest.raises(MountError, match=reason) as caught:
            start(vector, tmp_path / name, [objects], name="x")
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        start(vector, tmp_path, [tmp_path / "nowhere"], name="x")


def test_long_and_odd_names_as_source(mnt: Path) -> None:
    for name in ("a,b\\c d", "x" * 1000 + "end"):
        with serve(make_vector(directory({})), mnt, [], name=name) as mount:
            fields = mount_line(mount)
            source = fields[fields.index("-") + 2]
            shown = source.replace("\\040", " ").replace("\\134", "\\")
            assert shown == "composefs:" + name[-245:]


def test_outside_unmount_ends_the_session(mnt: Path) -> None:
    mount = start(make_vector(directory({})), mnt, [], name="x")
    subprocess.run(["umount", str(mnt)], check=True)
    assert mount.wait(DEADLINE) == 0
    mount.unmount()  # nothing left to do


def test_busy_mount_is_gone_at_once_and_aborted_after_the_grace(mnt: Path) -> None:
    mount = start(make_vector(directory({b"f": inline(b"x")})), mnt, [], name="x")
    user = os.open(mnt / "f", os.O_RDONLY)
    mount.unmount(grace=0.2)
    assert mount.wait(DEADLINE) == 0
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.close(user)
    assert not os.path.ismount(mnt)


def test_stale_mount_is_cleaned_up(mnt: Path) -> None:
    vector = make_vector(directory({b"f": inline(b"x")}))
    dead = start(vector, mnt, [], name="dead", options=ServeOptions(supervise=False))
    os.kill(dead.pid, signal.SIGKILL)
    wait_for_end(dead.pid)
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.listdir(mnt)
    with serve(vector, mnt, [], name="alive"):
        assert dead.wait(DEADLINE) == -signal.SIGKILL
        assert (mnt / "f").read_bytes() == b"x"
    assert not os.path.ismount(mnt)
    assert os.stat(mnt)


def run_script(
    body: str,
    mnt: Path,
    *,
    wrapper: Sequence[str] = (),
    python: str = sys.executable,
    checkout: Path = CHECKOUT,
    **options: Any,
) -> "subprocess.Popen[str]":
    """Run lines of Python that have ``make_vector``, ``cfs.fuse`` and ``mnt`` at hand."""
    head = """
        import os, subprocess, sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        import cfs.fuse
        from cfs.tree import Directory, Regular
        from tests.integration.vectors import make_vector
        mnt = sys.argv[2]
        file = Regular(mode=0o100644, size=4, content=b"text")
        vector = make_vector(Directory(mode=0o040755, nlink=2, children={b"f": file}))
    """
    script = textwrap.dedent(head) + textwrap.dedent(body)
    command = [*wrapper, python, "-W", "error", "-c", script, str(checkout), str(mnt)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, **options)


FOREGROUND = """
    mount = cfs.fuse.start(vector, mnt, [], name="x")
    sys.stdout.write(f"{mount.pid}\\n")
    sys.stdout.flush()
    sys.exit(cfs.fuse.serve_foreground(mount))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_foreground_ends_with_0_on_signals(
    mnt: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(DEADLINE)
        environment = dict(os.environ, NOTIFY_SOCKET=str(tmp_path / "notify"))
        with run_script(FOREGROUND, mnt, env=environment) as server:
            assert notified.recv(100) == b"READY=1"
            assert (mnt / "f").read_bytes() == b"text"
            server.send_signal(number)
            assert server.wait(DEADLINE) == 0
    assert not os.path.ismount(mnt)


def test_foreground_ends_with_0_on_outside_unmount(mnt: Path) -> None:
    with run_script(FOREGROUND, mnt) as server:
        assert server.stdout
        server.stdout.readline()
        subprocess.run(["umount", str(mnt)], check=True)
        assert server.wait(DEADLINE) == 0


@pytest.mark.parametrize("supervise", [True, False])
def test_foreground_ends_with_1_when_its_process_dies(mnt: Path, *, supervise: bool) -> None:
    body = FOREGROUND.replace(
        "name=", f"options=cfs.fuse.ServeOptions(supervise={supervise}), name="
    )
    with run_script(body, mnt) as server:
        assert server.stdout
        os.kill(int(server.stdout.readline()), signal.SIGKILL)
        assert server.wait(DEADLINE) == 1
    assert not os.path.ismount(mnt)


def test_session_takes_the_mount_down_when_its_starter_is_killed(mnt: Path) -> None:
    with run_script(FOREGROUND, mnt) as server:
        assert server.stdout
        session = int(server.stdout.readline())
        server.kill()
        server.wait()
        wait_for_end(session)
    assert not os.path.ismount(mnt)


def test_background_outlives_its_starter_and_lets_pipes_end(mnt: Path) -> None:
    body = """
        mount = cfs.fuse.start(vector, mnt, [], name="x", background=True)
        mount.leave()
        sys.stdout.write(str(mount.pid))
        sys.stdout.flush()
        os._exit(0)
    """
    with run_script(body, mnt, stderr=subprocess.PIPE) as starter:
        out, err = starter.communicate(timeout=DEADLINE)  # needs the end of both pipes
    assert (starter.returncode, err) == (0, "")
    assert (mnt / "f").read_bytes() == b"text"
    os.kill(int(out), signal.SIGTERM)
    wait_for_end(int(out))
    assert not os.path.ismount(mnt)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user reaches; pytest's are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="cfs-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.usefixtures("root", "private_mounts")
def test_unprivileged_user_mounts_through_fusermount3(open_directory: Path) -> None:
    """In a private mount namespace, whatever the machine's own permissions are.

    It has a device node of its own, and interpreter, packages and checkout where he may read.
    """
    if shutil.which("fusermount3") is None:
        pytest.skip("fusermount3 is not installed")
    body = """
        with cfs.fuse.serve(vector, mnt, [], name="a,b") as mount:
            text = Path(mnt, "f").read_text()
            lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
            line = next(line for line in lines if f" {mnt} " in line)
            sys.stdout.write(f"{os.geteuid()} {text} {line}")
        assert not os.path.ismount(mnt)
        options = cfs.fuse.ServeOptions(supervise=False)
        dead = cfs.fuse.start(vector, mnt, [], name="x", options=options)
        os.kill(dead.pid, 9)
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        with cfs.fuse.serve(vector, mnt, [], name="x"):
            assert dead.wait() == -9
        for number in (9, 15):  # nothing but the mount survives its supervisor
            mount = cfs.fuse.start(vector, mnt, [], name="x")
            os.kill(mount.pid, number)
            assert mount.wait() == (-9 if number == 9 else 0)
            assert not os.path.ismount(mnt)
        try:
            cfs.fuse.start(vector, mnt, [], name="x", options=cfs.fuse.ServeOptions(
                workers=2, passthrough=cfs.fuse.Passthrough.ON))
        except (cfs.MountError, ModuleNotFoundError) as error:
            assert "passthrough" in str(error) or "_worker" in str(error), error
        assert not os.path.ismount(mnt)
        words = ["--no-repo", "fuse-serve", "--background", "image.cfs", mnt]
        cli = [sys.executable, "-m", "cfs.cli.main", *words]
        paths = os.pathsep.join((sys.argv[1], os.environ["PYTHONPATH"]))
        subprocess.run(cli, check=True, env=dict(os.environ, PYTHONPATH=paths))
        assert Path(mnt, "own").read_bytes() == b"mine"
        subprocess.run(["fusermount3", "-u", mnt], check=True)
        assert not os.path.ismount(mnt)
    """
    mnt = open_directory / "mnt"
    mnt.mkdir()
    own = Regular(mode=0o100600, uid=65534, gid=65534, size=4, content=b"mine")
    image = open_directory / "image.cfs"
    image.write_bytes(write_image(Directory(mode=0o040755, children={b"own": own})))
    for path in (mnt, image):
        os.chown(path, 65534, 65534)
    image.chmod(0o400)
    places = {
        "python": sys.base_prefix,
        "packages": str(Path(pyfuse3.__file__).parent.parent),
        "checkout": str(CHECKOUT),
    }
    for name in ("dev", *places):
        (open_directory / name).mkdir()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = f"{open_directory}/python/bin/python{version}"
    binds = "\n".join(f"mount --bind {where} {name}" for name, where in places.items())
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    setup = f"""
        {binds}
        mount -t tmpfs tmpfs dev
        mknod -m 666 dev/fuse c 10 229
        mount --bind dev/fuse /dev/fuse
        exec "$@"
    """
    namespace = ["unshare", "-m", "--propagation", "private", "sh", "-ec", setup, "sh"]
    with run_script(
        body,
        mnt,
        wrapper=[*namespace, *user],
        python=python,
        checkout=open_directory / "checkout",
        cwd=open_directory,
        env=dict(
            os.environ,
            PYTHONPATH=f"{open_directory}/packages",
            LD_LIBRARY_PATH=f"{open_directory}/python/lib",
        ),
    ) as server:
        out, _ = server.communicate(timeout=DEADLINE)
    assert server.returncode == 0
    assert out.startswith("65534 text ")
    options = set(re.split(r"[\s,]", out))
    assert {"ro", "nosuid", "nodev", "fuse.composefs", "default_permissions"} <= options
    assert "composefs:a,b" in out


def test_times_and_sizes_at_the_limits_of_an_image(served: Serve, mnt: Path) -> None:
    """A hostile image may hold any 64-bit seconds and any 32-bit nanoseconds."""
    last = Regular(mode=0o100644, mtime_sec=2**63 - 1, mtime_nsec=2**32 - 1)
    first = Regular(mode=0o100644, mtime_sec=-(2**63), size=2**63 - 1)
    served(make_vector(Directory(mode=0o040755, children={b"a": last, b"b": first})))
    assert (mnt / "b").stat().st_size == 2**63 - 1
    for name in ("a", "b"):
        (mnt / name).stat()
    assert sorted(os.listdir(mnt)) == ["a", "b"]
