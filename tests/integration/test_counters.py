"""What the server is asked, and what not: counters prove the caching, not timings."""

import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cfs.fuse import Mount, Passthrough, ServeOptions, serve
from cfs.tree import Directory, Regular, Symlink
from tests.integration.vectors import make_vector

pytestmark = pytest.mark.usefixtures("fuse")
pytest.importorskip("cfs.fuse._worker", reason="the data plane is not built")
NR_DIRECTORIES = 40
NR_FILES = 12  # in each
NR_SMALL = NR_FILES - 1
LARGE = 200_000
HANDFUL = 8
DEADLINE = 60
Begin = Callable[..., Mount]


def content(name: str) -> bytes:
    size = LARGE if name.endswith("large") else 1000 + 97 * len(name)
    return (name.encode() * size)[:size]


def make_tree(objects: Path, xattrs: dict[bytes, bytes]) -> Directory:
    """External files only, one large one in each directory, and a symlink."""
    root = Directory(mode=0o040755, nlink=2 + NR_DIRECTORIES)
    (objects / "aa").mkdir()
    for number in range(NR_DIRECTORIES):
        directory = Directory(mode=0o040755, nlink=2)
        root.children[b"d%02d" % number] = directory
        for index in [*range(NR_SMALL), "large"]:
            name = f"f{number}-{index}"
            data = content(name)
            (objects / "aa" / name).write_bytes(data)
            directory.children[name.encode()] = Regular(
                mode=0o100644, size=len(data), payload=b"aa/" + name.encode(), xattrs=xattrs
            )
        directory.children[b"link"] = Symlink(mode=0o120777, size=1, target=b"x")
    return root


@pytest.fixture
def begin(mnt: Path, objects: Path) -> Iterator[Begin]:
    """Serve the tree, with any xattrs."""
    with ExitStack() as stack:

        def begin(xattrs: dict[bytes, bytes] | None = None, **choices: Passthrough) -> Mount:
            vector = make_vector(make_tree(objects, xattrs or {}))
            options = ServeOptions(**choices)  # type: ignore[arg-type] # there is one
            return stack.enter_context(serve(vector, mnt, [objects], name="x", options=options))

        yield begin


def asked(mount: Mount) -> dict[str, int]:
    """Count requests so far, by opcode."""
    return mount.statistics().requests


def requests(mount: Mount, *names: str) -> int:
    """Count requests of some opcodes so far."""
    return sum(asked(mount).get(name, 0) for name in names)


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE)
    return done.stdout


def read_file(path: Path) -> bytes:
    """Nothing but open and read; Python's own ``open`` asks whether it is a terminal."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


def read_all(mnt: Path) -> int:
    """Read every file, directory by directory, as tar does; return how many."""
    count = 0
    for directory in sorted(mnt.iterdir()):
        for path in sorted(directory.iterdir()):
            if not path.is_symlink():
                assert read_file(path) == content(path.name)
                count += 1
    assert count == NR_DIRECTORIES * NR_FILES
    return count


def test_second_listing_asks_nothing_without_xattrs(begin: Begin, mnt: Path) -> None:
    mount = begin()
    first = run("ls", "-lR", mnt)
    before = asked(mount)
    assert run("ls", "-lR", mnt) == first
    assert asked(mount) == before


def test_second_listing_asks_a_handful_with_xattrs(begin: Begin, mnt: Path) -> None:
    mount = begin({b"user.name": b"value"})
    first = run("ls", "-lR", mnt)
    before = asked(mount)
    assert run("ls", "-lR", mnt) == first
    assert sum(asked(mount).values()) - sum(before.values()) <= HANDFUL


def test_first_listing_asks_twice_for_each_directory(begin: Begin, mnt: Path) -> None:
    mount = begin()
    run("find", mnt, "-printf", "%s")
    assert requests(mount, "readdir") == 0
    assert requests(mount, "readdirplus") == 2 * (NR_DIRECTORIES + 1)


def test_missing_names_are_asked_for_once(begin: Begin, mnt: Path) -> None:
    mount = begin()
    for _ in range(5):
        assert not (mnt / "none").exists()
    assert requests(mount, "lookup") == 1


def test_links_are_read_once(begin: Begin, mnt: Path) -> None:
    mount = begin()
    for _ in range(5):
        assert os.readlink(mnt / "d00" / "link") == "x"
    assert requests(mount, "readlink") == 1


def test_open_is_asked_once(begin: Begin, mnt: Path) -> None:
    mount = begin()
    read_all(mnt)
    assert requests(mount, "open") == 1
    assert requests(mount, "opendir") == 1
    assert requests(mount, "release", "releasedir") == 0
    assert requests(mount, "flush") <= 1


def test_second_read_asks_nothing(begin: Begin, mnt: Path) -> None:
    mount = begin()
    read_all(mnt)
    before = asked(mount)
    read_all(mnt)
    assert asked(mount) == before


@pytest.mark.usefixtures("root")
def test_with_passthrough_nothing_is_read_here(begin: Begin, mnt: Path) -> None:
    mount = begin(passthrough=Passthrough.ON)
    assert mount.statistics().use_passthrough
    count = read_all(mnt)
    read_all(mnt)
    assert requests(mount, "read") == 0
    counters = mount.statistics().counters
    assert counters["pushes"] == 0
    assert counters["read_bytes"] == 0
    assert counters["backing_opens"] <= count + 1  # and the probe
    assert requests(mount, "open") == 2 * count


def test_small_files_are_pushed_while_files_are_read(begin: Begin, mnt: Path) -> None:
    mount = begin()
    count = read_all(mnt)
    counters = mount.statistics().counters
    assert counters["pushes"] > count // 2
    assert requests(mount, "read") < count


def test_nothing_is_pushed_when_nothing_is_read(begin: Begin, mnt: Path) -> None:
    mount = begin()
    run("find", mnt, "-printf", "%s")
    run("ls", "-lR", mnt)
    assert mount.statistics().counters["pushes"] == 0


def test_names_alone_make_no_inodes(begin: Begin, mnt: Path) -> None:
    """What was only listed is looked up by who looks; what was made is not."""
    mount = begin()
    names = run("find", mnt).splitlines()
    assert len(names) == 1 + NR_DIRECTORIES * (NR_FILES + 2)
    assert requests(mount, "getxattr", "read") == 0
    before = requests(mount, "lookup")
    assert mount.statistics().counters["names_only"] == NR_DIRECTORIES
    os.stat(mnt / "d00" / "f0-0")
    assert requests(mount, "lookup") == before + 1


def test_after_one_look_listings_are_full_again(begin: Begin, mnt: Path) -> None:
    mount = begin()
    run("find", mnt)
    run("find", mnt, "-printf", "%s")
    counters = mount.statistics().counters
    assert counters["invalidations"] >= NR_DIRECTORIES - 1  # whoever looked needs no new listing
    # those of the first directories may be asked for one by one
    assert requests(mount, "lookup") < NR_FILES * NR_DIRECTORIES // 4
    before = asked(mount)
    run("find", mnt, "-printf", "%s")
    assert asked(mount) == {**before, "statfs": before["statfs"] + 1}  # find itself


def test_what_every_python_asks_is_not_relayed(begin: Begin, mnt: Path) -> None:
    mount = begin()
    for directory in mnt.iterdir():
        (directory / f"f{int(directory.name[1:])}-0").open("rb").close()
    assert requests(mount, "ioctl") == NR_DIRECTORIES  # isatty
    assert mount.statistics().counters["relayed"] <= HANDFUL


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # utime, stime


def test_idle_mount_uses_no_cpu(begin: Begin, mnt: Path) -> None:
    """Once everything has started, a second long no process of it uses any."""
    mount = begin()
    read_all(mnt)
    processes = [mount.pid, mount.statistics().session_pid]
    ended = os.pidfd_open(processes[1])
    nr_quiet = 0
    try:
        deadline = time.monotonic() + DEADLINE
        while nr_quiet < 2:
            assert time.monotonic() < deadline
            before = [cpu_ticks(pid) for pid in processes]
            assert select.select([ended], [], [], 1.0)[0] == []
            nr_quiet = nr_quiet + 1 if [cpu_ticks(pid) for pid in processes] == before else 0
    finally:
        os.close(ended)
