"""Boot entries of an image, written to a boot partition (spec repository 5.12).

What to boot from stands in the image: an entry of the Boot Loader Specification, a unified kernel
image, or a kernel below ``/usr/lib/modules``; the first one found is taken.  All it names comes
from the image and is checked before anything is written; the entry itself is written last.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cfs.digest import Digest
from cfs.errors import ConflictError, FormatError, InvalidRequestError, NotFoundError
from cfs.linux.files import copy_contents, replacing, sync_file_system, write_all
from cfs.oci.documents import StoredConfig
from cfs.oci.images import BootImage, link_boot_image, read_object, tree_of
from cfs.oci.uki import read_command_line
from cfs.repository.boot_argument import find_digest, format_argument, names_image
from cfs.repository.repository import Repository
from cfs.transform.contents import (
    Path,
    as_regular,
    find_directory,
    find_regular,
    format_path,
    parse_path,
    read_text,
)
from cfs.transform.file_contexts import BLANKS
from cfs.tree import Directory, Inode, Regular, inode_of

__all__ = ["prepare_boot"]

_ENTRIES = (b"boot", b"loader", b"entries")
_UKIS = (b"boot", b"EFI", b"Linux")
_MODULES = (b"usr", b"lib", b"modules")
_KERNEL, _INITRAMFS = b"vmlinuz", b"initramfs.img"
_EFI, _ADDON = b".efi", b".addon.efi"
_FILE_MODE = 0o644
_FILE_LINE = re.compile(r"(linux|initrd|efi)([ \t]+)(.*)", re.DOTALL)
_OPTIONS_LINE = re.compile(r"options[ \t]")
# quotes keep blanks together, as in the kernel
_ARGUMENT = re.compile(r'(?:[^\s"]|"[^"]*"?)+')
_ENTRY_ID = re.compile(r"[\w.+~@:-]+")


@dataclass(slots=True)
class _Entry:
    """What to write.

    Attributes:
        name: of the file with the lines; a unified kernel image needs none.
        lines: of that file.
        files: by path below the boot partition.
        expected: digest of the image that the kernel image boots, if it says so itself.
    """

    name: str = ""
    lines: list[str] = field(default_factory=list)
    files: dict[Path, Regular] = field(default_factory=dict)
    expected: Digest | None = None


def prepare_boot(
    repository: Repository,
    config: StoredConfig,
    bootdir: str,
    *,
    entry_id: str | None = None,
    arguments: Sequence[str] = (),
    verify: bool = False,
) -> BootImage:
    """Make the bootable image, and write its boot entry.

    Args:
        repository: the store; keeps the image from collection as long as it has the config.
        config: of the OCI image.
        bootdir: the boot partition; made if missing.
        entry_id: name of the entry, in place of the one in the image.
        arguments: more for the kernel.
        verify: as :func:`cfs.oci.images.tree_of`.

    Raises:
        NotFoundError: the image has no boot entry, or lacks a file that it names.
        InvalidRequestError: ``entry_id`` or ``arguments`` cannot be like that.
        ConflictError: two files of the entry get the same name.
        IntegrityError: the kernel image is made for another image.
        Other errors: as :func:`cfs.oci.images.link_boot_image`.
        OSError: the boot partition cannot be written to.
    """
    _check_words(entry_id, arguments)
    root = tree_of(repository, config, verify=verify)
    entry = _find_entry(repository, root, entry_id)
    if entry.expected is not None and arguments:
        msg = "a unified kernel image cannot get more arguments"
        raise InvalidRequestError(msg)
    _, image = link_boot_image(repository, config, expected=entry.expected)
    argument = format_argument(image.digest, image.version, is_secure=repository.is_secure)
    if entry.name:
        for word in (argument, *arguments):
            _add_argument(entry.lines, word)
    _write(repository, entry, bootdir)
    return image


def _check_words(entry_id: str | None, arguments: Sequence[str]) -> None:
    if entry_id is not None and (not _ENTRY_ID.fullmatch(entry_id) or entry_id in (".", "..")):
        msg = f"entry identifier {entry_id!r}: expected letters, digits and any of _.+~@:-"
        raise InvalidRequestError(msg)
    for argument in arguments:
        if not argument.strip() or not argument.isprintable():
            msg = f"kernel argument {argument!r}: expected a word without line breaks"
            raise InvalidRequestError(msg)
        if any(map(names_image, _split_arguments(argument))):
            msg = f"kernel argument {argument!r}: the image to boot is the one that was named"
            raise InvalidRequestError(msg)


def _find_entry(repository: Repository, root: Directory, entry_id: str | None) -> _Entry:
    """Return the first boot entry of a tree that was not converted for booting yet."""
    directory = find_directory(root, _ENTRIES)
    for name in sorted(directory.children) if directory is not None else ():
        if name.endswith(b".conf"):
            return _load_entry(repository, root, name, entry_id)
    versions = _list_versions(root)
    for top, place in ((_UKIS, find_directory(root, _UKIS)), *versions):
        for path, file in _find_ukis(top, place):
            return _load_uki(repository, path, len(top), file, entry_id)
    for top, version in versions:
        kernel = version.children.get(_KERNEL)
        if kernel is not None and isinstance(vmlinuz := inode_of(kernel), Regular):
            return _make_entry(top, version, vmlinuz, entry_id)
    msg = "No boot entries!"
    raise NotFoundError(msg)


def _list_versions(root: Directory) -> list[tuple[Path, Directory]]:
    """Return the directories of the kernels, with their paths."""
    modules = find_directory(root, _MODULES)
    children = {} if modules is None else modules.children
    return [
        ((*_MODULES, name), version)
        for name, child in sorted(children.items())
        if isinstance(version := inode_of(child), Directory)
    ]


def _load_entry(
    repository: Repository, root: Directory, name: bytes, entry_id: str | None
) -> _Entry:
    """Return an entry as it stands in the image, moved if it is to have another name."""

    def read_content(_: bytes, file: Regular) -> bytes:
        return read_object(repository, file)

    path = (*_ENTRIES, name)
    text = read_text(find_regular(root, path), path, read_content)
    entry = _Entry(os.fsdecode(name) if entry_id is None else f"{entry_id}.conf")
    for line in text.removesuffix("\n").split("\n"):
        match = _FILE_LINE.match(line)
        if match is None:
            entry.lines.append(line)
            continue
        value = match[3].lstrip(BLANKS)
        source = parse_path(value.encode())
        target = source
        if entry_id is not None and "/" in value:
            target = (entry_id.encode(), source[-1])
            value = f"/{entry_id}/{os.fsdecode(source[-1])}"
        file = find_regular(root, source)
        if entry.files.setdefault(target, file) is not file:
            msg = f"boot entry {path[-1]!r}: two files would become {value}"
            raise ConflictError(msg)
        entry.lines.append(match[1] + match[2] + value)
    return entry


def _find_ukis(top: Path, place: Directory | None) -> Iterator[tuple[Path, Regular]]:
    """Yield the kernel images below a directory; those that only add to one are left out."""
    stack: list[tuple[Path, Inode]] = [(top, place)] if place is not None else []
    while stack:
        path, inode = stack.pop()
        if isinstance(inode, Directory):
            stack.extend(
                ((*path, name), inode_of(inode.children[name]))
                for name in sorted(inode.children, reverse=True)
            )
        elif path[-1].endswith(_EFI) and not path[-1].endswith(_ADDON):
            yield path, as_regular(inode, path)


def _load_uki(
    repository: Repository, path: Path, depth: int, file: Regular, entry_id: str | None
) -> _Entry:
    """Return what to write for a kernel image; ``depth`` is that of the place it was found in."""
    where = format_path(path)
    if file.digest is None:
        msg = f"{where}: no kernel image"
        raise FormatError(msg)
    fd = repository.objects.open_object(file.digest)
    try:
        expected = find_digest(_split_arguments(read_command_line(fd)))
    except FormatError as error:
        msg = f"{where}: {error}"
        raise FormatError(msg) from None
    finally:
        os.close(fd)
    if expected is None:
        msg = f"{where}: its command line names no composefs image"
        raise FormatError(msg)
    if entry_id is not None:
        path = (*path[:-1], entry_id.encode() + _EFI)
    return _Entry(files={(*_UKIS[1:], *path[depth:]): file}, expected=expected)


def _make_entry(path: Path, modules: Directory, kernel: Regular, entry_id: str | None) -> _Entry:
    """Return an entry for a kernel that has none in the image."""
    version = path[-1].decode(errors="replace")
    if not _ENTRY_ID.fullmatch(version):
        msg = f"{format_path(path)}: expected a version of a kernel"
        raise FormatError(msg)
    initramfs = modules.children.get(_INITRAMFS)
    if initramfs is None or not isinstance(file := inode_of(initramfs), Regular):
        msg = f"kernel {version} has no initramfs.img in {format_path(path)}"
        raise NotFoundError(msg)
    place = entry_id or version
    lines = [
        "# File created by composefs",
        "title todoOS",
        "version 0-todo",
        f"linux /{place}/vmlinuz",
        f"initrd /{place}/initramfs.img",
    ]
    directory = place.encode()
    files: dict[Path, Regular] = {(directory, _KERNEL): kernel, (directory, _INITRAMFS): file}
    return _Entry(f"{place}.conf", lines, files)


def _split_arguments(line: str) -> list[str]:
    """Return the arguments of a kernel command line; quotes stay where they are."""
    return _ARGUMENT.findall(line)


def _add_argument(lines: list[str], argument: str) -> None:
    """Add an argument to the options of an entry, in place of the one with its key."""
    key, equals, _ = argument.partition("=")
    for index, line in enumerate(lines):
        if not _OPTIONS_LINE.match(line):
            continue
        for match in _ARGUMENT.finditer(line, len("options")):
            if match[0] == argument or (equals and match[0].startswith(f"{key}=")):
                lines[index] = line[: match.start()] + argument + line[match.end() :]
                return
        lines[index] = f"{line} {argument}"
        return
    lines.append(f"options {argument}")


def _write(repository: Repository, entry: _Entry, bootdir: str) -> None:
    """Write files, then the entry that names them; each is durable before the next step."""
    os.makedirs(bootdir, exist_ok=True)
    top = os.open(bootdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path, file in entry.files.items():
            name = os.path.join(bootdir, *map(os.fsdecode, path))
            os.makedirs(os.path.dirname(name), exist_ok=True)
            with replacing(name, _FILE_MODE) as fd:
                _copy(repository, file, fd)
        sync_file_system(top)
        if entry.name:
            name = os.path.join(bootdir, "loader", "entries", entry.name)
            os.makedirs(os.path.dirname(name), exist_ok=True)
            with replacing(name, _FILE_MODE) as fd:
                write_all(fd, "".join(f"{line}\n" for line in entry.lines).encode())
            sync_file_system(top)
    finally:
        os.close(top)


def _copy(repository: Repository, file: Regular, fd: int) -> None:
    if file.digest is None:
        write_all(fd, file.content or b"")
        return
    source = repository.objects.open_object(file.digest)
    try:
        copy_contents(source, fd, file.size)
    finally:
        os.close(source)
