"""The transformation for bootable images, and the check of what they boot from.

Specification: repository 6.5, second list, and 6.6.
"""

import re
from collections.abc import Iterator

from cfs.errors import FormatError
from cfs.transform.contents import (
    Path,
    ReadContent,
    as_regular,
    find_directory,
    find_regular,
    format_path,
    parse_path,
    read_text,
)
from cfs.transform.file_contexts import BLANKS
from cfs.transform.oci import require_directory
from cfs.transform.selinux import apply_labels
from cfs.tree import Directory, Regular, inode_of, settle_links

__all__ = ["apply_boot", "check_boot_resources"]

_EMPTIED = (b"boot", b"sysroot")
_ENTRIES = (b"boot", b"loader", b"entries")
_EFI_PLACES = ((b"boot", b"EFI", b"Linux"), (b"boot", b"loader", b"addons"))
_MODULES = (b"usr", b"lib", b"modules")
_FILE_LINE = re.compile(r"(?:linux|initrd|efi)[ \t](.*)", re.DOTALL)


def apply_boot(root: Directory, read_content: ReadContent) -> None:
    """Empty ``/boot`` and ``/sysroot``, and set SELinux labels as the tree's policy says.

    Raises:
        NotFoundError: ``/usr``, ``/boot`` or ``/sysroot`` is missing, or a file of the policy.
        FormatError: one of them is no directory, or the policy is malformed.
        IntegrityError: a file of the policy is not what the tree says.
        OSError: it cannot be read.
    """
    usr = require_directory(root, b"usr")
    for name in _EMPTIED:
        directory = require_directory(root, name)
        directory.children = {}
        directory.mtime_sec = usr.mtime_sec  # not its nanoseconds
    settle_links(root)
    apply_labels(root, read_content)


def check_boot_resources(root: Directory, read_content: ReadContent) -> None:
    """Check boot entries and kernels, which :func:`apply_boot` is about to remove.

    Raises:
        NotFoundError: a boot entry names a file that does not exist.
        FormatError: an entry or a kernel is no regular file, or a name is not UTF-8.
        IntegrityError: an entry is not what the tree says.
        OSError: it cannot be read.
    """
    entries = find_directory(root, _ENTRIES)
    for name in sorted(entries.children) if entries is not None else ():
        if entries is not None and name.endswith(b".conf"):
            path = (*_ENTRIES, name)
            file = as_regular(inode_of(entries.children[name]), path)
            for wanted in _files_of_entry(read_text(file, path, read_content)):
                find_regular(root, parse_path(wanted))
    for place in _EFI_PLACES:
        directory = find_directory(root, place)
        if directory is not None:
            _check_efi_files(directory, place)
    modules = find_directory(root, _MODULES)
    if modules is not None:
        for name in sorted(modules.children):
            version = modules.children[name]
            if isinstance(version, Directory):
                _check_kernel(version, (*_MODULES, name))


def _files_of_entry(text: str) -> Iterator[bytes]:
    for line in text.split("\n"):
        match = _FILE_LINE.match(line)
        if match:
            yield match[1].lstrip(BLANKS).encode()


def _check_efi_files(directory: Directory, path: Path) -> None:
    """Check all ``*.efi`` below a directory; iterative, as depth has no limit."""
    stack = [(directory, path)]
    while stack:
        directory, path = stack.pop()
        for name in sorted(directory.children):
            child = inode_of(directory.children[name])
            if isinstance(child, Directory):
                stack.append((child, (*path, name)))
            elif name.endswith(b".efi"):
                as_regular(child, (*path, name))


def _check_kernel(version: Directory, path: Path) -> None:
    kernel = version.children.get(b"vmlinuz")
    if kernel is not None and isinstance(inode_of(kernel), Regular):
        try:
            path[-1].decode()
        except UnicodeDecodeError:
            msg = f"{format_path(path)}: the version of a kernel is not UTF-8"
            raise FormatError(msg) from None
    _check_efi_files(version, path)
