"""System calls of cfs.linux.files on the real kernel."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.linux import files


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"content")
    (tmp_path / "below" / "link").symlink_to("file")
    (tmp_path / "up").symlink_to("..")
    fd = os.open(tmp_path / "below", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_openat2_opens_below_close_on_exec(directory: int) -> None:
    fd = files.openat2(directory, b"file", os.O_RDONLY)
    assert not os.get_inheritable(fd)
    assert os.read(fd, 100) == b"content"
    os.close(fd)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (b"link", errno.ELOOP),
        (b"../up", errno.EXDEV),
        (b"/etc/passwd", errno.EXDEV),
        (b"missing", errno.ENOENT),
        (b"file\0x", errno.ENOENT),
        (b"", errno.ENOENT),
    ],
)
def test_openat2_refuses(directory: int, path: bytes, reason: int) -> None:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        files.openat2(directory, path, os.O_RDONLY)
    assert caught.value.errno == reason
    assert caught.value.filename == os.fsdecode(path)


def test_openat2_follows_symlinks_when_allowed(directory: int) -> None:
    fd = files.openat2(directory, b"link", os.O_RDONLY, resolve=files.Resolve.BENEATH)
    os.close(fd)


def test_unnamed_file_gets_a_name_once(directory: int) -> None:
    fd = files.open_unnamed(directory, 0o600)
    os.write(fd, b"new")
    reader = files.reopen_readonly(fd)
    os.close(fd)
    files.link_unnamed(reader, directory, b"named")
    with pytest.raises(FileExistsError):
        files.link_unnamed(reader, directory, b"file")
    assert os.pread(reader, 10, 0) == b"new"
    os.close(reader)
    assert sorted(os.listdir(directory)) == ["file", "link", "named"]


def test_naming_fills_in_the_path() -> None:
    with pytest.raises(OSError, match=r"'a/b'$"), files.naming(b"a/b"):
        os.close(-1)


@pytest.mark.parametrize("by_hand", [False, True])
def test_copy_keeps_bytes_and_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, by_hand: bool
) -> None:
    if by_hand:

        def refuse(*_: object) -> int:
            raise OSError(errno.EXDEV, "refused")

        monkeypatch.setattr(os, "copy_file_range", refuse)
        monkeypatch.setattr(files, "clone_file", lambda *_: False)
    size = (64 << 20) + 5
    with (tmp_path / "source").open("wb+") as source:
        source.seek(1 << 20)
        source.write(b"a" * 5000)
        source.seek(32 << 20)
        source.write(os.urandom(3 << 20))
        source.truncate(size)
        source.flush()
        with (tmp_path / "target").open("wb+") as target:
            files.copy_contents(source.fileno(), target.fileno(), size)
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
    assert (tmp_path / "target").stat().st_blocks * 512 < 16 << 20


def test_rename_without_replacing(tmp_path: Path, directory: int) -> None:
    other = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    files.rename_noreplace(directory, b"file", other, b"moved")
    assert (tmp_path / "moved").read_bytes() == b"content"
    (tmp_path / "below" / "taken").write_bytes(b"taken")
    with pytest.raises(FileExistsError, match="taken"):
        files.rename_noreplace(other, b"moved", directory, b"taken")
    assert (tmp_path / "below" / "taken").read_bytes() == b"taken"
    os.close(other)


def test_sync_of_a_file_system(directory: int) -> None:
    files.sync_file_system(directory)
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.sync_file_system(-1)


def test_no_terminal_becomes_ours() -> None:
    """Else whoever has its other end could send signals to the process."""
    script = """
import os, pty
from cfs.linux.files import Resolve, open_path, openat2
name = os.ttyname(pty.openpty()[1])
directory = os.open("/", os.O_PATH)
open_path(name, os.O_RDONLY)
openat2(directory, os.fsencode(name[1:]), os.O_RDONLY, resolve=Resolve.NO_MAGICLINKS)
print(open("/proc/self/stat").read().rpartition(")")[2].split()[4])
"""
    words = [sys.executable, "-c", script]
    assert subprocess.check_output(words, start_new_session=True, text=True) == "0\n"
