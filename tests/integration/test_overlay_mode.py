"""Overlay mode on real mounts: FUSE tells metadata, overlayfs reads the objects.

Everything runs as root here and once more inside an unprivileged user namespace.  What is seen
through the overlay equals the plain mount and the kernel's own, but for these, all of which
overlayfs causes:

- ``user.*`` of links and special files, which every kernel refuses to read, is not even listed:
  overlayfs could not copy such a file to the upper directory;
- in a user namespace the same holds for ``trusted.*``, as for any file system there;
- ``user.overlay.X`` with X longer than 234 bytes cannot be shown (tests/unit/fuse/test_overlay);
- an object of the wrong size is read as it is, as with the kernel's own mount; plain FUSE
  refuses it;
- directories have their own device number, files that of their layer; plain: one for all;
- a directory cannot be renamed when writable (``EXDEV``, which ``mv`` deals with), and hard links
  part when one of them is changed;
- who may read is decided by the modes of the files; plain FUSE lets nobody else in at all.
"""

import ast
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.erofs import open_image
from cfs.erofs.writer import write_image
from cfs.errors import MountError
from cfs.fuse import Mode, Mount, ServeOptions, Verify, serve, start
from cfs.inodes import InodeVector
from cfs.linux.mounts import is_initial_user_namespace
from cfs.tree import Child, Directory, Link, Regular, Symlink
from tests.integration.oracle_walk import Facts, walk
from tests.integration.trees import RandomTree
from tests.integration.vectors import make_vector
from tests.paths import CHECKOUT

ServeOverlay = Callable[..., Mount]
WALK = Path(__file__).with_name("oracle_walk.py")
DEADLINE = 120
FUSE_NO_OPEN_SUPPORT = 1 << 17
LINE = re.compile(r"b.* xattrs: kernel ({.*}), FUSE ({.*})\Z")
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.fixture(scope="module")
def overlay_mode() -> None:
    """Linux 6.16, and the right to mount."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if release is None or tuple(map(int, release.groups())) < (6, 16):
        pytest.skip("needs Linux 6.16")


pytestmark = pytest.mark.usefixtures("fuse", "overlay_mode")
as_root = pytest.mark.usefixtures("root")


@pytest.fixture(params=[0, None], ids=["pyfuse3", "workers"])
def workers(request: pytest.FixtureRequest) -> int | None:
    """Both planes."""
    count: int | None = request.param
    if count is None:
        pytest.importorskip("cfs.fuse._worker", reason="the extension is not built")
    return count


@pytest.fixture
def overlaid(mnt: Path, objects: Path, workers: int | None) -> Iterator[ServeOverlay]:
    """Serve a vector in overlay mode until the test ends."""
    with ExitStack() as stack:

        def begin(vector: InodeVector, **options: str | int) -> Mount:
            chosen = ServeOptions(mode=Mode.OVERLAY, workers=workers, **options)  # type: ignore[arg-type] # mypy cannot tell the options apart
            return stack.enter_context(serve(vector, mnt, [objects], name="test", options=chosen))

        yield begin


@pytest.fixture
def changes(tmp_path: Path) -> Mapping[str, str]:
    """Upper and work directory, as options."""
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    return {"upperdir": str(tmp_path / "upper"), "workdir": str(tmp_path / "work")}


def directory(children: Mapping[bytes, Child], **xattrs: bytes) -> Directory:
    return Directory(mode=0o040755, nlink=2, children=dict(children), xattrs=named(xattrs))


def named(xattrs: Mapping[str, bytes]) -> dict[bytes, bytes]:
    return {name.replace("_", ".").encode(): value for name, value in xattrs.items()}


def inline(content: bytes, **xattrs: bytes) -> Regular:
    return Regular(mode=0o100644, size=len(content), content=content, xattrs=named(xattrs))


def external(objects: Path, content: bytes, name: str = "aa/1", **xattrs: bytes) -> Regular:
    path = objects / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return Regular(mode=0o100644, size=len(content), payload=name.encode(), xattrs=named(xattrs))


def mount_lines(mountpoint: Path) -> list[list[str]]:
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return [line.split(" ") for line in lines if f" {mountpoint} " in line]


def readable(facts: Facts) -> Facts:
    """Leave out xattrs that are listed but refused."""
    if "xattrs" in facts:
        found = facts["xattrs"].items()
        facts["xattrs"] = {name: value for name, value in found if value != "ENODATA"}
    return facts


def random_tree(seed: int, version: int, objects: Path) -> Directory:
    """Make a tree that root of a user namespace may read: he has no power over other ids."""
    root = RandomTree(seed, version, Algorithm.SHA256, objects).make()
    inodes: list[Child] = [root]
    while inodes:
        inode = inodes.pop()
        if isinstance(inode, Directory):
            inodes += inode.children.values()
        if not isinstance(inode, Link):
            inode.uid = inode.gid = 0
    return root


@as_root
def test_mount_is_one_overlay_named_after_the_image(overlaid: ServeOverlay, mnt: Path) -> None:
    mount = overlaid(make_vector(directory({b"f": inline(b"x")})))
    (line,) = mount_lines(mnt)
    separator = line.index("-")
    assert line[separator + 1 : separator + 3] == ["overlay", "composefs:test"]
    assert {"ro"} <= set(line[5].split(","))
    assert {"ro", "userxattr"} <= set(line[separator + 3].split(","))
    assert os.stat(mnt).st_dev == mount.device
    assert "fuse.composefs composefs:test" not in Path("/proc/self/mountinfo").read_text(
        errors="surrogateescape"
    )


@as_root
@pytest.mark.parametrize("version", [0, 1, 2])
def test_random_tree_looks_as_in_plain_mode(
    version: int, workers: int | None, tmp_path: Path, objects: Path
) -> None:
    root = random_tree(31 + version, version, objects)
    image = tmp_path / "image"
    image.write_bytes(write_image(root, min_version=version, max_version=version))
    found = []
    for mode in Mode:
        place = tmp_path / mode.name
        place.mkdir()
        options = ServeOptions(mode=mode, workers=workers)
        with serve(open_image(image), place, [objects], name="x", options=options):
            found.append({path: readable(facts) for path, facts in walk(os.fsencode(place))})
    assert found[0] == found[1]


@as_root
def test_objects_are_read_by_the_kernel(
    workers: int | None, overlaid: ServeOverlay, mnt: Path, objects: Path
) -> None:
    if workers == 0:
        pytest.skip("pyfuse3 alone keeps no statistics")
    content = os.urandom(300_000)
    children = {b"big": external(objects, content), b"small": inline(b"inline")}
    mount = overlaid(make_vector(directory(children)))
    assert (mnt / "big").read_bytes() == content
    assert "read" not in mount.statistics().requests
    assert (mnt / "small").read_bytes() == b"inline"
    assert mount.statistics().requests["read"] == 1


@as_root
def test_overlay_xattrs_of_an_image_are_shown_and_not_obeyed(
    overlaid: ServeOverlay, mnt: Path, objects: Path
) -> None:
    real = external(objects, b"real", user_overlay_redirect=b"/aa/2", user_overlay_metacopy=b"x")
    external(objects, b"fake", "aa/2")
    redirected = inline(b"mine", user_overlay_redirect=b"/aa/2", user_overlay_metacopy=b"")
    hidden = directory({b"f": inline(b"here", user_overlay_whiteout=b"")}, user_overlay_opaque=b"x")
    overlaid(make_vector(directory({b"real": real, b"redirected": redirected, b"d": hidden})))
    assert (mnt / "real").read_bytes() == b"real"
    assert (mnt / "redirected").read_bytes() == b"mine"
    assert os.getxattr(mnt / "real", "user.overlay.redirect") == b"/aa/2"
    assert sorted(os.listxattr(mnt / "redirected")) == [
        "user.overlay.metacopy",
        "user.overlay.redirect",
    ]
    assert os.listdir(mnt / "d") == ["f"]
    assert (mnt / "d/f").read_bytes() == b"here"
    assert os.getxattr(mnt / "d", "user.overlay.opaque") == b"x"


@as_root
def test_objects_that_cannot_be_read(overlaid: ServeOverlay, mnt: Path, objects: Path) -> None:
    external(objects, b"outside", "../outside")
    external(objects, b"linked", "aa/linked")
    (objects / "file").symlink_to("aa/linked")
    (objects / "directory").symlink_to("aa")
    reasons = {
        "aa/gone": errno.ENOENT,
        "../outside": errno.EXDEV,
        "directory/linked": errno.ELOOP,
        "file": errno.ENOENT,  # overlayfs takes regular files only
        "aa": errno.ENOENT,
        "": errno.EIO,
    }
    files = {
        b"%d" % number: Regular(mode=0o100644, size=6, payload=payload.encode())
        for number, payload in enumerate(reasons)
    }
    overlaid(make_vector(directory(files)))
    for name, reason in zip(map(bytes.decode, files), reasons.values(), strict=True):
        assert (mnt / name).stat().st_size == 6
        with pytest.raises(OSError, match=os.strerror(reason)):
            (mnt / name).read_bytes()


@as_root
def test_without_objects_everything_can_still_be_looked_at(
    mnt: Path, objects: Path, workers: int | None
) -> None:
    vector = make_vector(directory({b"f": external(objects, b"text"), b"i": inline(b"in")}))
    options = ServeOptions(mode=Mode.OVERLAY, workers=workers)
    with serve(vector, mnt, [], name="x", options=options):
        assert (mnt / "f").stat().st_size == 4
        assert (mnt / "i").read_bytes() == b"in"
        with pytest.raises(FileNotFoundError):
            (mnt / "f").read_bytes()


@as_root
def test_objects_come_from_the_first_directory_that_has_them(
    mnt: Path, objects: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    second.mkdir()
    children = {b"both": external(objects, b"one"), b"late": external(second, b"two", "bb/2")}
    external(second, b"not")
    options = ServeOptions(mode=Mode.OVERLAY)
    with serve(make_vector(directory(children)), mnt, [objects, second], name="x", options=options):
        assert (mnt / "both").read_bytes() == b"one"
        assert (mnt / "late").read_bytes() == b"two"


def make_writable_tree(objects: Path) -> InodeVector:
    linked = external(objects, b"linked", "aa/2")
    linked.nlink = 2
    names = (b"written", b"cut", b"moved", b"removed", b"moded", b"kept")
    children: dict[bytes, Child] = {
        name: external(objects, b"content", user_mine=b"1", user_overlay_mine=b"2")
        for name in names
    }
    children |= {
        b"empty": inline(b""),
        b"inline": inline(b"small"),
        b"one": linked,
        b"two": Link(linked),
        b"d": directory({b"deep": external(objects, b"content")}),
        b"link": Symlink(mode=0o120777, size=4, target=b"kept", xattrs={b"user.x": b"1"}),
    }
    if is_initial_user_namespace():
        children[b"trusted"] = external(objects, b"content", trusted_mine=b"3")
    return make_vector(directory(children))


def change(mnt: Path) -> None:
    (mnt / "written").write_bytes(b"new")
    os.truncate(mnt / "cut", 3)
    (mnt / "moved").rename(mnt / "there")
    (mnt / "removed").unlink()
    (mnt / "moded").chmod(0o600)
    with (mnt / "empty").open("ab") as file:
        file.write(b"filled")
    with (mnt / "inline").open("r+b") as file:
        file.write(b"SM")
    (mnt / "one").write_bytes(b"parted")
    (mnt / "two").unlink()
    shutil.rmtree(mnt / "d")
    (mnt / "d").mkdir()
    os.utime(mnt / "link", (1, 1), follow_symlinks=False)
    (mnt / "created").write_bytes(b"created")
    os.setxattr(mnt / "created", "user.overlay.x", b"own")


def check_changes(mnt: Path) -> None:
    contents = {path.name: path.read_bytes() for path in mnt.iterdir() if path.is_file()}
    del contents["link"]
    contents.pop("trusted", None)
    assert contents == {
        "written": b"new", "cut": b"con", "there": b"content", "moded": b"content",
        "kept": b"content", "empty": b"filled", "inline": b"SMall", "one": b"parted",
        "created": b"created",
    }  # fmt: skip
    assert list((mnt / "d").iterdir()) == []
    assert (mnt / "moded").stat().st_mode == 0o100600
    assert os.getxattr(mnt / "moded", "user.mine") == b"1"
    assert os.getxattr(mnt / "moded", "user.overlay.mine") == b"2"
    assert os.getxattr(mnt / "created", "user.overlay.x") == b"own"
    assert os.readlink(mnt / "link") == "kept"
    assert (mnt / "link").lstat().st_mtime == 1


@as_root
def test_changes_go_to_the_upper_directory_and_last(
    overlaid: ServeOverlay, mnt: Path, objects: Path, changes: Mapping[str, str]
) -> None:
    vector = make_writable_tree(objects)
    mount = overlaid(vector, **changes, read_write=True)
    assert "rw" in mount_lines(mnt)[0][5].split(",")
    change(mnt)
    check_changes(mnt)
    if (mnt / "trusted").exists():
        (mnt / "trusted").chmod(0o600)
        assert os.getxattr(mnt / "trusted", "trusted.mine") == b"3"
    mount.unmount()
    assert (objects / "aa/1").read_bytes() == b"content"
    assert (objects / "aa/2").read_bytes() == b"linked"

    overlaid(vector, **changes)
    assert {"ro"} <= set(mount_lines(mnt)[0][5].split(","))
    check_changes(mnt)
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        (mnt / "kept").write_bytes(b"x")


@as_root
def test_a_directory_of_the_image_is_renamed_by_copying_only(
    overlaid: ServeOverlay, mnt: Path, objects: Path, changes: Mapping[str, str]
) -> None:
    overlaid(make_writable_tree(objects), **changes, read_write=True)
    with pytest.raises(OSError, match=os.strerror(errno.EXDEV)):
        (mnt / "d").rename(mnt / "e")
    subprocess.run(["mv", str(mnt / "d"), str(mnt / "e")], check=True)
    assert (mnt / "e/deep").read_bytes() == b"content"
    assert not (mnt / "d").exists()


@as_root
def test_changes_where_the_kernel_asks_for_every_open(
    overlaid: ServeOverlay, mnt: Path, objects: Path, changes: Mapping[str, str]
) -> None:
    """Overlayfs opens a file in FUSE to ask for its flags before it copies it."""
    overlaid(
        make_writable_tree(objects), **changes, read_write=True, masked_flags=FUSE_NO_OPEN_SUPPORT
    )
    change(mnt)
    check_changes(mnt)


@as_root
def test_verity_is_demanded_of_every_object(
    overlaid: ServeOverlay, mnt: Path, objects: Path, tmp_path: Path
) -> None:
    """The objects here have no fs-verity: none may be read, with digest or without."""
    image = tmp_path / "image"
    image.write_bytes(write_image(random_tree(7, 1, objects)))
    overlaid(open_image(image), verify=Verify.REQUIRE)
    assert "verity=require" in mount_lines(mnt)[0][-1].split(",")
    files = {path: facts for path, facts in walk(os.fsencode(mnt)) if "content" in facts}
    assert files[b"/external"]["content"] == files[b"/bare"]["content"] == "EIO"
    assert files[b"/lost"]["content"] == "ENOENT"
    assert len(files) > 20
    for facts in files.values():
        is_inline = facts["content"].startswith(f"{facts['size']} bytes") and facts["size"] <= 512
        assert is_inline or facts["content"] in ("EIO", "ENOENT")


def compare_with_kernel(image: Path, objects: Path, tmp_path: Path) -> list[str]:
    """Return where the overlay differs from the kernel's mount, refused xattrs aside."""
    mnt = tmp_path / "overlay-mode"
    mnt.mkdir()
    options = ServeOptions(mode=Mode.OVERLAY)
    with serve(open_image(image), mnt, [objects], name=image.name, options=options):
        done = subprocess.run(
            ["unshare", "-m", "--propagation", "private", sys.executable, "-S", str(WALK),
             str(image), str(objects), str(mnt), str(tmp_path / "scratch")],
            capture_output=True, check=False, text=True, errors="surrogateescape",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, *differences = done.stdout.splitlines()
    assert int(count.split()[0]) > 1
    return [line for line in differences if not is_refused_xattr(line)]


def is_refused_xattr(line: str) -> bool:
    match = LINE.match(line)
    if match is None:
        return False
    kernel, ours = map(ast.literal_eval, match.groups())
    refused = {name for name, value in kernel.items() if value == "ENODATA"}
    return bool({name: kernel[name] for name in kernel.keys() - refused} == ours)


@pytest.mark.usefixtures("overlay", "private_mounts")
@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_random_tree_looks_as_in_the_kernel(
    version: int, algorithm: Algorithm, tmp_path: Path, objects: Path
) -> None:
    root = RandomTree(500 + version, version, algorithm, objects).make()
    image = tmp_path / "image"
    image.write_bytes(write_image(root, min_version=version, max_version=version))
    assert compare_with_kernel(image, objects, tmp_path) == []


@pytest.mark.usefixtures("overlay", "private_mounts")
def test_object_of_the_wrong_size_is_read_as_in_the_kernel(tmp_path: Path, objects: Path) -> None:
    payload = b"ab/" + b"c" * 62
    file = external(objects, b"a longer text than the image says", payload.decode())
    file.size = 5
    image = tmp_path / "image"
    image.write_bytes(write_image(directory({b"f": file})))
    assert compare_with_kernel(image, objects, tmp_path) == []


@as_root
def test_outside_unmount_ends_the_session(overlaid: ServeOverlay, mnt: Path) -> None:
    mount = overlaid(make_vector(directory({b"f": inline(b"x")})))
    subprocess.run(["umount", str(mnt)], check=True)
    assert mount.wait(DEADLINE) == 0
    assert mount_lines(mnt) == []


@as_root
def test_files_that_are_open_end_with_the_grace_period(
    overlaid: ServeOverlay, mnt: Path, objects: Path
) -> None:
    children = {b"f": external(objects, b"text"), b"d": directory({})}
    mount = overlaid(make_vector(directory(children)))
    with (mnt / "f").open("rb", buffering=0) as file:
        there = os.open(mnt / "d", os.O_RDONLY | os.O_DIRECTORY)
        mount.unmount(grace=0.1)
        assert mount_lines(mnt) == []
        assert file.read() == b"text"  # the kernel has the object itself
        os.close(there)


@as_root
def test_a_new_session_takes_over_below_the_overlay(
    workers: int | None, overlaid: ServeOverlay, mnt: Path, objects: Path
) -> None:
    if workers == 0:
        pytest.skip("pyfuse3 alone is not restarted")
    files = {b"%d" % number: external(objects, b"text", f"aa/{number}") for number in range(20)}
    mount = overlaid(make_vector(directory(files)))
    for number in range(20):
        if number % 5 == 0:
            os.kill(mount.statistics().session_pid, signal.SIGKILL)
        assert (mnt / str(number)).read_bytes() == b"text"
    assert mount.statistics().sessions > 2


@as_root
def test_a_dead_overlay_is_taken_away_by_the_next_mount(
    mnt: Path, objects: Path, workers: int | None
) -> None:
    options = ServeOptions(mode=Mode.OVERLAY, workers=workers, supervise=False)
    vector = make_vector(directory({b"f": external(objects, b"text")}))
    dead = start(vector, mnt, [objects], name="dead", options=options)
    dead._process.kill()
    dead._process.wait()
    dead._close()
    assert len(mount_lines(mnt)) == 1
    with serve(vector, mnt, [objects], name="next", options=options):
        (line,) = mount_lines(mnt)
        assert "composefs:next" in line
        assert (mnt / "f").read_bytes() == b"text"
    assert mount_lines(mnt) == []


@as_root
def test_refusal_of_the_kernel_is_told_and_leaves_nothing(
    mnt: Path, objects: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    vector = make_vector(directory({}))
    options = ServeOptions(
        mode=Mode.OVERLAY, upperdir="/proc/self", workdir=str(work), read_write=True
    )
    with pytest.raises(MountError, match=r"type overlay: .*; Linux before 6\.16"):
        start(vector, mnt, [objects], name="x", options=options)
    missing = ServeOptions(mode=Mode.OVERLAY, upperdir=str(tmp_path / "no"), workdir=str(work))
    with pytest.raises(FileNotFoundError, match="/no'"):
        start(vector, mnt, [objects], name="x", options=missing)
    assert mount_lines(mnt) == []


def run_again(wrapper: list[str], names: str, tmp_path: Path) -> "subprocess.Popen[str]":
    """Start the tests of this file whose names match, in another environment."""
    command = [
        *wrapper, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
        f"--basetemp={tmp_path / 'inside'}", "-k", names, __file__,
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("half", ["workers", "not workers"])
def test_everything_in_a_user_namespace(half: str, tmp_path: Path) -> None:
    """All tests above; the kernel's own mount of an image needs root."""
    namespace = ["unshare", "-Urm"]
    done = subprocess.run([*namespace, "true"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no user namespace: {done.stderr.decode().strip()}")
    names = f"{half} and not in_the_kernel and not namespace and not privilege and not users"
    with run_again(namespace, names, tmp_path) as inside:
        out, _ = inside.communicate(timeout=4 * DEADLINE)
    assert inside.returncode == 0, out
    assert "passed" in out


@as_root
def test_without_privilege_the_error_says_what_is_needed(mnt: Path) -> None:
    """Root without CAP_SYS_ADMIN, which is what most containers have."""
    script = """
        import sys
        from cfs.errors import MountError
        from cfs.mount import Place
        from cfs.overlaymount import OverlayLayers, OverlayMount
        try:
            OverlayMount(Place(sys.argv[1]), "x", OverlayLayers(objects=[]))
        except MountError as error:
            print(error)
    """
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", sys.executable, "-c", textwrap.dedent(script),
         str(mnt)],
        capture_output=True, check=True, text=True, cwd=CHECKOUT,
    )  # fmt: skip
    assert "an overlay needs root, or a user name space of one's own" in done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user reaches; pytest's are closed to others."""
    path = Path(tempfile.mkdtemp(prefix="cfs-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@as_root
@pytest.mark.usefixtures("private_mounts")
def test_other_users_read_what_the_modes_allow(open_directory: Path, objects: Path) -> None:
    mnt = open_directory / "mnt"
    mnt.mkdir()
    private = external(objects, b"private", "aa/2")
    private.mode = 0o100600
    vector = make_vector(directory({b"open": external(objects, b"open"), b"private": private}))
    with serve(vector, mnt, [objects], name="x", options=ServeOptions(mode=Mode.OVERLAY)):
        done = subprocess.run(
            [*NOBODY, "cat", mnt / "open", mnt / "private"], capture_output=True, check=False
        )
    assert done.stdout == b"open"
    assert b"private: Permission denied" in done.stderr
