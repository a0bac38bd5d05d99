"""What a tree must be like to be made bootable; results are those of composefs-rs 0.9."""

import stat
from typing import NamedTuple

import pytest

from cfs.errors import CfsError, FormatError, IntegrityError, NotFoundError
from cfs.fsverity import compute_digest
from cfs.transform import apply_boot, check_boot_resources
from cfs.tree import Directory, Inode, Link, Regular, Symlink

ENTRY = "boot/loader/entries/a.conf"


class To(NamedTuple):
    """A symlink to be made."""

    target: bytes


Files = dict[str, bytes | To]


def make_tree(files: Files) -> Directory:
    root = Directory(mode=stat.S_IFDIR | 0o755)
    for name in ("usr", "boot", "sysroot"):
        root.children[name.encode()] = Directory(mode=stat.S_IFDIR | 0o700, mtime_nsec=5)
    for path, content in files.items():
        *parents, leaf = path.encode("latin-1").split(b"/")
        directory = root
        for parent in parents:
            below = directory.children.setdefault(parent, Directory(mode=stat.S_IFDIR))
            assert isinstance(below, Directory)
            directory = below
        inode: Inode
        if isinstance(content, To):
            inode = Symlink(mode=stat.S_IFLNK, target=content.target)
        else:
            inode = Regular(mode=stat.S_IFREG, size=len(content), content=content)
        directory.children[leaf] = inode
    return root


def read_nothing(path: bytes, file: Regular) -> bytes:
    raise AssertionError(path, file)


def check(files: Files) -> None:
    check_boot_resources(make_tree({"boot/vmlinuz": b"k", **files}), read_nothing)


@pytest.mark.parametrize(
    "line",
    [
        b"linux   /boot/vmlinuz\n",
        b"linux boot/vmlinuz\n",
        b"linux \t /boot/./vmlinuz\n",
        b"linux /boot//vmlinuz/\n",
        "linux \xa0/boot/vmlinuz".encode(),
        b"linux\x0b/nope\n",
        b"devicetree /nope\nlinux\nLINUX /nope\n linux /nope\n",
        b"title x\0\nlinux /boot/vmlinuz\n",
    ],
)
def test_good_entries(line: bytes) -> None:
    check({ENTRY: line})


@pytest.mark.parametrize(
    "line",
    [
        b"linux /boot/vmlinuz\r\n",
        b"linux /boot/vmlinuz \n",
        b"initrd /boot/vmlinuz /nope\n",
        b"efi /nope",
        b"initrd /nope",
        b"linux /boot/vmlinuz\0\n",
    ],
)
def test_entries_that_name_a_missing_file(line: bytes) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        check({ENTRY: line})


@pytest.mark.parametrize(
    "line",
    [
        b"linux /boot/../boot/vmlinuz\n",
        b"linux ./boot/vmlinuz\n",
        b"linux ../boot/vmlinuz\n",
        b"linux /\n",
        b"linux .\n",
        b"linux \n",
        b"linux /boot\n",
        b"linux /boot/vmlinuz/x\n",
        b"\xff",
    ],
)
def test_malformed_entries(line: bytes) -> None:
    with pytest.raises(FormatError):
        check({ENTRY: line})


@pytest.mark.parametrize(
    "files",
    [
        {"boot/loader/entries/b.CONF": b"linux /nope\n"},
        {"boot/loader/entries/sub/b.conf": b"linux /nope\n"},
        {"boot/EFI/Linux/x.efi/y": b""},
        {"boot/EFI/Linux/x.EFI": To(b"q")},
        {"usr/lib/modules/1/vmlinuz": To(b"q")},
        {"usr/lib/modules/1/vmlinuz/x": b""},
        {"usr/lib/modules/\xff/vmlinuz": To(b"q")},
        {"usr/lib/modules/\xff/x.efi": b""},
        {"usr/lib/modules/1/\xff.efi": b""},
        {"usr/lib/modules/x": To(b"q")},
        {"usr/lib/modules/x.efi": To(b"q")},
    ],
)
def test_what_does_not_matter(files: Files) -> None:
    check(files)


@pytest.mark.parametrize(
    "files",
    [
        {"boot/loader/entries/.conf": b"linux /nope\n"},
        {"boot/EFI/Linux/x.efi/y.efi": To(b"q")},
        {"boot/EFI/Linux/.efi": To(b"q")},
        {"usr/lib/modules/1/a/b/c.efi": To(b"q")},
        {"usr/lib/modules/\xff/vmlinuz": b""},
        {"boot/loader/addons/a.efi": To(b"q")},
        {"boot/EFI/Linux": To(b"q")},
        {"boot/EFI": b""},
        {"boot/loader/addons": b""},
        {"boot/loader": To(b"q")},
        {"usr/lib/modules": b""},
        {"usr/lib": To(b"lib64")},
    ],
)
def test_what_is_refused(files: Files) -> None:
    with pytest.raises(CfsError):
        check(files)


def test_depth_has_no_limit() -> None:
    check({"boot/EFI/Linux/" + "d/" * 3000 + "a.efi": b""})


def test_boot_and_sysroot_are_emptied_and_hard_links_stay() -> None:
    root = make_tree({"boot/vmlinuz": b"k", "sysroot/x": b""})
    boot = root.children[b"boot"]
    assert isinstance(boot, Directory)
    kernel = boot.children[b"vmlinuz"]
    assert isinstance(kernel, Regular)
    kernel.nlink = 2
    root.children[b"also"] = Link(kernel)
    usr = root.children[b"usr"]
    assert isinstance(usr, Directory)
    usr.mtime_sec, usr.mtime_nsec = 7, 8
    apply_boot(root, read_nothing)
    assert root.children[b"also"] is kernel
    assert kernel.nlink == 1
    for name in (b"boot", b"sysroot"):
        directory = root.children[name]
        assert isinstance(directory, Directory)
        assert not directory.children
        assert (directory.mtime_sec, directory.mtime_nsec) == (7, 5)


@pytest.mark.parametrize("name", [b"usr", b"boot", b"sysroot"])
def test_the_three_directories_must_be_there(name: bytes) -> None:
    root = make_tree({})
    del root.children[name]
    with pytest.raises(NotFoundError, match=f"/{name.decode()} does not exist"):
        apply_boot(root, read_nothing)


def external_entry(content: bytes) -> Directory:
    root = make_tree({"boot/vmlinuz": b"k", ENTRY: b""})
    path = [b"boot", b"loader", b"entries"]
    directory = root
    for name in path:
        below = directory.children[name]
        assert isinstance(below, Directory)
        directory = below
    digest = compute_digest(content)
    file = Regular(mode=stat.S_IFREG, size=len(content), digest=digest, payload=digest.object_path)
    directory.children[b"a.conf"] = file
    return root


def test_contents_come_through_the_callback_and_are_checked() -> None:
    content = b"linux /boot/vmlinuz\n" + b"#" * 100
    asked = []

    def read_content(path: bytes, file: Regular) -> bytes:
        asked.append((path, file.size))
        return content

    check_boot_resources(external_entry(content), read_content)
    assert asked == [(b"/boot/loader/entries/a.conf", 120)]
    with pytest.raises(IntegrityError, match=r"/boot/loader/entries/a\.conf: digest is"):
        check_boot_resources(external_entry(content), lambda *_: b"linux /boot/vmlinuz\n")


def test_a_huge_file_is_not_read() -> None:
    root = external_entry(b"x")
    directory = root
    for name in (b"boot", b"loader", b"entries"):
        below = directory.children[name]
        assert isinstance(below, Directory)
        directory = below
    file = directory.children[b"a.conf"]
    assert isinstance(file, Regular)
    file.size = 1 << 40
    with pytest.raises(FormatError, match="expected at most"):
        check_boot_resources(root, read_nothing)
