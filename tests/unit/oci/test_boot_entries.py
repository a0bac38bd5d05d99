"""Boot entries: found in an image, written to a boot partition."""

import os
import re
import struct
from pathlib import Path

import pytest

from cfs.digest import Digest
from cfs.errors import CfsError, FormatError, IntegrityError, InvalidRequestError, NotFoundError
from cfs.oci.boot_entries import prepare_boot
from cfs.oci.documents import StoredConfig, linked_image, load_config
from cfs.oci.images import compute_image
from cfs.oci.uki import read_command_line
from cfs.repository.boot_argument import find_digest, format_argument
from cfs.repository.repository import Repository
from tests.oci_cases import store_image
from tests.oci_layouts import make_tar

KERNEL, INITRAMFS = b"kernel" * 100, b"i"
PLAIN: dict[str, bytes | None] = {"usr": None, "boot": None, "sysroot": None}
MODULES = PLAIN | {"usr/lib": None, "usr/lib/modules": None, "usr/lib/modules/6.1-a": None}
WITH_KERNEL = MODULES | {
    "usr/lib/modules/6.1-a/vmlinuz": KERNEL,
    "usr/lib/modules/6.1-a/initramfs.img": INITRAMFS,
}
LOADER = PLAIN | {"boot/loader": None, "boot/loader/entries": None, "boot/k": None}


def store(repository: Repository, files: dict[str, bytes | None]) -> StoredConfig:
    return store_image(repository, [make_tar(files)])


def files_below(path: Path) -> dict[str, bytes]:
    return {
        str(found.relative_to(path)): found.read_bytes()
        for found in path.rglob("*")
        if found.is_file()
    }


def make_uki(command_line: bytes, *, name: bytes = b".cmdline", start: int = 64) -> bytes:
    """Return a PE file with one section."""
    off = start + 24 + 16 + 40
    header = struct.pack("<2s58xI", b"MZ", start).ljust(start, b"\0")
    header += struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, 1, 0, 0, 0, 16, 0) + bytes(16)
    section = struct.pack("<8sIIII16x", name, len(command_line), 0, len(command_line) + 8, off)
    return header + section + command_line + bytes(8)


def test_a_kernel_of_the_image_gets_an_entry(repository: Repository, tmp_path: Path) -> None:
    config = store(repository, WITH_KERNEL)
    image = prepare_boot(repository, config, str(tmp_path / "boot"))
    entry = (
        "# File created by composefs\ntitle todoOS\nversion 0-todo\n"
        "linux /6.1-a/vmlinuz\ninitrd /6.1-a/initramfs.img\n"
        f"options composefs.digest=?v1-sha256-12:{image.digest}\n"
    )
    assert files_below(tmp_path / "boot") == {
        "6.1-a/vmlinuz": KERNEL,
        "6.1-a/initramfs.img": INITRAMFS,
        "loader/entries/6.1-a.conf": entry.encode(),
    }
    stored = load_config(repository, config.digest)
    assert linked_image(repository, stored, boot=True) == image.digest
    assert image.digest == compute_image(repository, config, bootable=True)


def test_the_first_entry_of_the_image_is_taken(repository: Repository, tmp_path: Path) -> None:
    text = (
        b"title x\nlinux  /boot/k/vmlinuz\ninitrd\t/boot/k/a.img\n linux /no\n"
        b'options root=x "a b=c" composefs=old quiet\n\n'
    )
    files = (
        WITH_KERNEL
        | LOADER
        | {
            "boot/k/vmlinuz": KERNEL,
            "boot/k/a.img": INITRAMFS,
            "boot/loader/entries/b.conf": b"linux /no\n",
            "boot/loader/entries/a.conf": text,
        }
    )
    # b.conf is broken, which making the image finds out before anything is written
    with pytest.raises(NotFoundError, match="/no does not exist"):
        prepare_boot(repository, store(repository, files), str(tmp_path / "none"))
    assert files_below(tmp_path / "none") == {}
    del files["boot/loader/entries/b.conf"]
    config = store(repository, files)
    image = prepare_boot(repository, config, str(tmp_path / "boot"), arguments=["quiet", "rw"])
    argument = f"composefs.digest=?v1-sha256-12:{image.digest}"
    options = f'options root=x "a b=c" composefs=old quiet {argument} rw\n\n'
    expected = text.decode().partition("options")[0] + options
    assert files_below(tmp_path / "boot") == {
        "boot/k/vmlinuz": KERNEL,
        "boot/k/a.img": INITRAMFS,
        "loader/entries/a.conf": expected.encode(),
    }


def test_an_entry_is_moved(repository: Repository, tmp_path: Path) -> None:
    text = b"linux /boot/k/vmlinuz\ninitrd top.img\n"
    files = LOADER | {"boot/k/vmlinuz": KERNEL, "top.img": b"t"}
    config = store(repository, files | {"boot/loader/entries/a.conf": text})
    prepare_boot(repository, config, str(tmp_path / "boot"), entry_id="new")
    found = files_below(tmp_path / "boot")
    entry = found.pop("loader/entries/new.conf")
    assert entry.startswith(b"linux /new/vmlinuz\ninitrd top.img\noptions composefs.digest=")
    assert found == {"new/vmlinuz": KERNEL, "top.img": b"t"}


def test_two_files_of_a_moved_entry_cannot_share_a_name(
    repository: Repository, tmp_path: Path
) -> None:
    text = b"initrd /boot/k/i\ninitrd /boot/i\n"
    files = LOADER | {"boot/k/i": b"1", "boot/i": b"2", "boot/loader/entries/a.conf": text}
    with pytest.raises(CfsError, match="two files would become /new/i"):
        prepare_boot(repository, store(repository, files), str(tmp_path / "boot"), entry_id="new")
    assert not (tmp_path / "boot").exists()


@pytest.mark.parametrize(
    ("old", "argument", "new"),
    [
        ("options a=1 b=2", "a=3", "options a=3 b=2"),
        ("options aa=1 ro", "a=3", "options aa=1 ro a=3"),
        ("options rw=1", "rw", "options rw=1 rw"),
        ('options "a=1 b=2" a=4', "a=3", 'options "a=1 b=2" a=3'),
        ("optionsx a=1", "a=3", "optionsx a=1\noptions a=3"),
        ("options a=1\noptions a=2", "a=3", "options a=3\noptions a=2"),
    ],
)
def test_arguments_replace_those_of_the_entry(
    repository: Repository, tmp_path: Path, old: str, argument: str, new: str
) -> None:
    files = LOADER | {"boot/loader/entries/a.conf": old.encode()}
    prepare_boot(repository, store(repository, files), str(tmp_path), arguments=[argument])
    found = (tmp_path / "loader" / "entries" / "a.conf").read_text()
    assert re.sub(r" composefs\.digest=\S+", "", found) == new + "\n"


def test_a_unified_kernel_image_is_copied(repository: Repository, tmp_path: Path) -> None:
    plain = PLAIN | {"boot/EFI": None, "boot/EFI/Linux": None, "boot/EFI/Linux/d": None}
    expected = compute_image(repository, store(repository, PLAIN), bootable=True)
    argument = format_argument(expected, 1, is_secure=True)
    uki = make_uki(f"quiet {argument}\n".encode())
    files = plain | {"boot/EFI/Linux/a.addon.efi": b"x", "boot/EFI/Linux/d/os.efi": uki}
    config = store(repository, files)
    image = prepare_boot(repository, config, str(tmp_path / "boot"))
    assert image.digest == expected
    assert files_below(tmp_path / "boot") == {"EFI/Linux/d/os.efi": uki}
    prepare_boot(repository, config, str(tmp_path / "moved"), entry_id="x")
    assert files_below(tmp_path / "moved") == {"EFI/Linux/d/x.efi": uki}
    with pytest.raises(InvalidRequestError, match="cannot get more arguments"):
        prepare_boot(repository, config, str(tmp_path / "none"), arguments=["quiet"])


@pytest.mark.parametrize(
    ("uki", "message"),
    [
        (b"x" * 100, "/os.efi: kernel image: "),
        (b"x", "^/usr/lib/modules/6.1-a/os.efi: no kernel image"),
        (make_uki(b"quiet"), "/os.efi: its command line names no composefs image"),
        (make_uki(b"composefs=" + b"0" * 64), "matched expected digest 0{64}"),
        (make_uki(b"composefs=12"), "/os.efi: digest '12'"),
        (make_uki(b"composefs.digest=" + b"0" * 64), "/os.efi: kernel argument"),
        (make_uki(b"\xff"), "/os.efi: kernel image: command line is not UTF-8"),
        (make_uki(b"quiet", name=b".osrel"), "/os.efi: kernel image: no command line in it"),
        (make_uki(b"quiet")[:-20], "/os.efi: kernel image: "),
        (make_uki(bytes(100_000)), "/os.efi: kernel image: command line of 100000 bytes"),
        (struct.pack("<2s58xI", b"MZ", 0xFFFFFFFF) + bytes(64), "/os.efi: kernel image: 0 bytes"),
    ],
)
def test_kernel_images_that_boot_something_else(
    repository: Repository, tmp_path: Path, uki: bytes, message: str
) -> None:
    files = MODULES | {"usr/lib/modules/6.1-a/os.efi": uki}
    with pytest.raises(CfsError, match=message) as caught:
        prepare_boot(repository, store(repository, files), str(tmp_path / "boot"))
    assert isinstance(caught.value, FormatError | IntegrityError)
    assert not (tmp_path / "boot").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (PLAIN, "No boot entries!"),
        (MODULES, "No boot entries!"),
        (
            MODULES | {"usr/lib/modules/6.1-a/vmlinuz": KERNEL},
            "kernel 6.1-a has no initramfs.img in /usr/lib/modules/6.1-a",
        ),
        (LOADER | {"boot/loader/entries/a.conf": b"linux /../etc/shadow\n"}, r"'\.\.'"),
        (LOADER | {"boot/loader/entries/a.conf": b"linux \n"}, "invalid path ''"),
        (LOADER | {"boot/loader/entries/a.conf": b"linux /boot/k\n"}, "not a regular file"),
        (LOADER | {"boot/loader/entries/a.conf": b"\xff"}, "not UTF-8"),
        (
            PLAIN
            | {"usr/lib": None, "usr/lib/modules": None, "usr/lib/modules/a\nlinux b": None}
            | {"usr/lib/modules/a\nlinux b/vmlinuz": KERNEL},
            "expected a version of a kernel",
        ),
        ({"usr": None}, "No boot entries!"),
    ],
)
def test_images_without_a_sound_entry(
    repository: Repository, tmp_path: Path, files: dict[str, bytes | None], message: str
) -> None:
    config = store(repository, files)
    with pytest.raises(CfsError, match=message):
        prepare_boot(repository, config, str(tmp_path / "boot"))
    assert not (tmp_path / "boot").exists()
    assert load_config(repository, config.digest).images == {}


@pytest.mark.parametrize("entry_id", ["", ".", "..", "a/b", "a b", "a\n"])
def test_entry_identifiers_are_names(repository: Repository, tmp_path: Path, entry_id: str) -> None:
    config = store(repository, WITH_KERNEL)
    with pytest.raises(InvalidRequestError, match="entry identifier"):
        prepare_boot(repository, config, str(tmp_path / "boot"), entry_id=entry_id)


@pytest.mark.parametrize(
    "argument", ["", " ", "a\nlinux /x", "composefs=x", "quiet composefs.digest=v1-sha256-12:00"]
)
def test_arguments_are_words(repository: Repository, tmp_path: Path, argument: str) -> None:
    config = store(repository, WITH_KERNEL)
    with pytest.raises(InvalidRequestError, match="kernel argument"):
        prepare_boot(repository, config, str(tmp_path / "boot"), arguments=[argument])


def test_nothing_half_written_stays(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "boot" / "6.1-a" / "vmlinuz").mkdir(parents=True)
    (tmp_path / "boot" / "6.1-a" / "vmlinuz" / "x").touch()
    with pytest.raises(OSError, match="vmlinuz"):
        prepare_boot(repository, store(repository, WITH_KERNEL), str(tmp_path / "boot"))
    assert set(files_below(tmp_path / "boot")) == {"6.1-a/vmlinuz/x"}


def test_the_argument_says_format_and_trust() -> None:
    digest = Digest(bytes(64))
    hex_digits = "0" * 128
    assert format_argument(digest, 2, is_secure=True) == f"composefs={hex_digits}"
    assert format_argument(digest, 2, is_secure=False) == f"composefs=?{hex_digits}"
    described = f"composefs.digest=v1-sha512-12:{hex_digits}"
    assert format_argument(digest, 1, is_secure=True) == described
    assert format_argument(digest, 0, is_secure=True) == described
    for version in (1, 2):
        for is_secure in (True, False):
            argument = format_argument(digest, version, is_secure=is_secure)
            assert find_digest(["quiet", argument]) == digest
    assert find_digest(["quiet", "xcomposefs=1"]) is None


def test_a_command_line_ends_before_its_padding(tmp_path: Path) -> None:
    path = tmp_path / "uki"
    path.write_bytes(make_uki(b"a b\0\0", start=200))
    fd = os.open(path, os.O_RDONLY)
    try:
        assert read_command_line(fd) == "a b"
    finally:
        os.close(fd)
