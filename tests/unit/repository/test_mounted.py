"""Links that keep images of live mounts: made, alive, dead, removed."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cfs.digest import Digest
from cfs.linux.processes import boot_id, start_time
from cfs.linux.traces import Trace, remove_traces
from cfs.repository.mounted import is_alive, is_reserved, keep_image, keep_store, remove_dead
from cfs.repository.repository import Repository
from tests.paths import CHECKOUT

DIGEST = Digest(bytes(range(32)))
OTHER_BOOT = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def links(store: Path) -> Path:
    return store / "images/refs/mounted"


def keep(repository: Repository) -> Trace:
    return keep_image(repository, DIGEST, os.getpid())


def own_name() -> str:
    return f"{boot_id()}-{os.getpid()}-{start_time(os.getpid())}"


def dead_name() -> str:
    """A name as the one of a process whose number is ours now."""
    return f"{boot_id()}-{os.getpid()}-1"


def test_an_image_of_composefs_rs_may_have_the_name_of_the_directory(
    repository: Repository, links: Path
) -> None:
    links.parent.mkdir(parents=True)
    links.symlink_to(f"../{DIGEST}")
    assert remove_dead(repository.fd) == 0
    assert is_alive(repository.fd, b"mounted")
    assert not is_alive(repository.fd, dead_name().encode())


def test_link_is_a_ref_to_the_image(repository: Repository, links: Path) -> None:
    trace = keep(repository)
    assert trace.name == own_name()
    assert os.readlink(links / trace.name) == f"../../{DIGEST}"
    remove_traces([trace])
    assert list(links.iterdir()) == []
    remove_traces([trace])  # somebody else was faster: no error
    os.close(trace.fd)


def test_running_process_is_alive(repository: Repository, links: Path) -> None:
    links.mkdir(parents=True)
    assert is_alive(repository.fd, own_name().encode())
    assert is_alive(repository.fd, b"mounted/" + own_name().encode())
    assert not is_alive(repository.fd, dead_name().encode())
    other = own_name().replace(boot_id(), OTHER_BOOT)
    assert not is_alive(repository.fd, other.encode())


def test_nothing_is_alive_without_directory(repository: Repository) -> None:
    assert not is_alive(repository.fd, own_name().encode())
    assert remove_dead(repository.fd) == 0


def test_lock_outlives_the_process_of_the_name(repository: Repository, links: Path) -> None:
    """A session goes on with the descriptor when its supervisor was killed."""
    child = subprocess.Popen(["sleep", "600"])
    trace = keep_image(repository, DIGEST, child.pid)
    child.kill()
    child.wait()
    assert trace.name
    assert is_alive(repository.fd, trace.name.encode())
    assert remove_dead(repository.fd) == 0
    copy = os.dup(trace.fd)
    os.close(trace.fd)
    assert is_alive(repository.fd, trace.name.encode())
    os.close(copy)
    assert not is_alive(repository.fd, trace.name.encode())
    assert remove_dead(repository.fd) == 1
    assert list(links.iterdir()) == []


def test_next_link_clears_leftovers(repository: Repository, links: Path) -> None:
    links.mkdir(parents=True)
    foreign = "of-somebody-else"
    for name in (dead_name(), f"{OTHER_BOOT}-1-1", foreign):
        (links / name).symlink_to(f"../../{DIGEST}")
    trace = keep(repository)
    assert {path.name for path in links.iterdir()} == {trace.name, foreign}
    os.close(trace.fd)


def test_names_of_users_are_not_reserved() -> None:
    assert is_reserved(b"mounted/x")
    assert is_reserved(b"mounted")
    assert not is_reserved(b"mounted-x")
    assert not is_reserved(b"a/mounted/x")


def test_same_process_again_holds_the_store(repository: Repository) -> None:
    """One process serves one image; should the name be taken, the lock keeps everything."""
    first, second = keep(repository), keep(repository)
    assert first.name is not None
    assert second.name is None
    for trace in (first, second):
        os.close(trace.fd)


@pytest.mark.parametrize("obstacle", ["file", "link", "feature"])
def test_where_no_link_can_be_made_the_lock_is_held(
    store: Path, obstacle: str, tmp_path: Path
) -> None:
    if obstacle == "file":
        (store / "images").write_text("")
    elif obstacle == "link":
        (store / "images").symlink_to(tmp_path)
    else:
        meta = store / "meta.json"
        assert "v1_erofs" in meta.read_text()
        meta.write_text(meta.read_text().replace("v1_erofs", "not_yet_known"))
    with Repository.open(str(store)) as repository:
        trace = keep(repository)
    assert trace.name is None
    assert is_locked(store)
    os.close(trace.fd)
    assert not is_locked(store)
    assert not (tmp_path / "refs").exists()


def test_lock_does_not_end_with_the_repository(store: Path) -> None:
    with Repository.open(str(store)) as repository:
        trace = keep_store(repository)
    assert is_locked(store)
    os.close(trace.fd)
    assert not is_locked(store)


def is_locked(store: Path) -> bool:
    fd = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def test_another_pid_name_space_still_counts(
    repository: Repository, store: Path, links: Path
) -> None:
    """Its numbers mean nothing here, but the lock does."""
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no private PID name space")
    code = (
        "import os, sys\n"
        "from cfs.digest import Digest\n"
        "from cfs.repository.mounted import _make_link\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "_make_link(fd, Digest(bytes(32)), os.getpid())\n"
        "print('made', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [*command, sys.executable, "-c", code, str(store)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT,
    ) as child:  # fmt: skip
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == b"made\n"
        (link,) = links.iterdir()
        assert is_alive(repository.fd, link.name.encode())
        assert remove_dead(repository.fd) == 0
        child.stdin.close()
        assert child.wait(60) == 0
    assert not is_alive(repository.fd, link.name.encode())
