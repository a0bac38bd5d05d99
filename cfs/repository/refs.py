"""Names in a store: symbolic links below ``images`` and ``streams`` (spec repository 1.2).

``images/ID`` and ``streams/CONTENT-ID`` lead to objects, ``images/refs/NAME`` and
``streams/refs/NAME`` lead to those.  What is found in a store was written by somebody else: no
path is followed through a symbolic link, and link texts are parsed, never resolved.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from cfs.digest import Algorithm, Digest
from cfs.errors import ConflictError, FormatError, InvalidRequestError, NotFoundError
from cfs.linux.files import naming, openat2

__all__ = [
    "IMAGES",
    "REFS",
    "STREAMS",
    "Entry",
    "check_name",
    "ensure_directory",
    "entries",
    "object_of_target",
    "read_link",
    "remove_link",
    "resolve_image",
    "set_link",
    "walk_refs",
]

IMAGES = "images"
STREAMS = "streams"
REFS = b"refs"
_DIRECTORY_MODE = 0o755
_MAX_COMPONENT_SIZE = 255  # NAME_MAX
_MAX_NAME_SIZE = 3840  # a path is below 4096 with what stands before the name
_NR_TRIES = 16
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY


class Store(Protocol):
    """What is needed of a repository to look up a name."""

    @property
    def fd(self) -> int:
        """The store's directory."""

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm of its objects."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What has a name in ``images``, ``streams`` or their ``refs``.

    Attributes:
        name: path below the directory that was listed.
        target: text of the symbolic link; None if it is none.
        mode: ``st_mode``.
    """

    name: bytes
    target: bytes | None
    mode: int


def check_name(name: str) -> bytes:
    """Return a name to be created or looked up, as path below ``refs``.

    Raises:
        InvalidRequestError: it is empty, absolute or too long, or has an empty, ``.`` or ``..``
            component.
    """
    try:
        path = name.encode()
    except UnicodeEncodeError:
        msg = f"name {name!r}: expected UTF-8"
        raise InvalidRequestError(msg) from None
    components = path.split(b"/")
    if any(component in (b"", b".", b"..") for component in components) or b"\0" in path:
        msg = f"invalid name {name!r}: empty, '.' and '..' components are not allowed"
        raise InvalidRequestError(msg)
    if max(map(len, components)) > _MAX_COMPONENT_SIZE or len(path) > _MAX_NAME_SIZE:
        msg = (
            f"name of {len(path)} bytes: expected at most {_MAX_NAME_SIZE}, "
            f"and {_MAX_COMPONENT_SIZE} in each component"
        )
        raise InvalidRequestError(msg)
    return path


def set_link(repository_fd: int, path: bytes, target: bytes) -> None:
    """Make a symbolic link or change the one that is there, atomically.

    Args:
        repository_fd: the store.
        path: of the link, from the store; missing directories on the way are made.
        target: what it leads to, from the store.

    Raises:
        ConflictError: something else than a link has the name, or a link is on the way.
        OSError: as symlink(2), ``ENOSPC`` for instance.
    """
    *parents, name = path.split(b"/")
    text = _relative(parents, target.split(b"/"))
    with naming(path):
        directory = ensure_directory(repository_fd, parents)
        try:
            with suppress(FileExistsError):
                os.symlink(text, name, dir_fd=directory)
                return
            found = _look_at(directory, name)
            if found is not None and found.target is None:
                msg = f"{os.fsdecode(path)}: expected a symbolic link, found something else"
                raise ConflictError(msg)
            if found is None or found.target != text:  # None: removed meanwhile
                _replace_link(repository_fd, directory, name, text)
        finally:
            os.close(directory)


def _relative(parents: list[bytes], target: list[bytes]) -> bytes:
    nr_common = 0
    for ours, theirs in zip(parents, target[:-1], strict=False):
        if ours != theirs:
            break
        nr_common += 1
    return b"/".join([b".."] * (len(parents) - nr_common) + target[nr_common:])


def ensure_directory(repository_fd: int, components: list[bytes]) -> int:
    """Open a directory of the store, made if missing; the caller closes it.

    Raises:
        ConflictError: something else than a directory is on the way.
        OSError: as mkdir(2).
    """
    current = os.dup(repository_fd)
    for component in components:
        try:
            with suppress(FileExistsError):
                os.mkdir(component, _DIRECTORY_MODE, dir_fd=current)
            flags = _DIRECTORY_FLAGS | os.O_NOFOLLOW | os.O_CLOEXEC
            following = os.open(component, flags, dir_fd=current)
        except NotADirectoryError:  # a symbolic link, too
            path = b"/".join(components).decode(errors="backslashreplace")
            found = component.decode(errors="backslashreplace")
            msg = f"{path}: {found} is no directory"
            raise ConflictError(msg) from None
        finally:
            os.close(current)
        current = following
    return current


def _replace_link(repository_fd: int, directory: int, name: bytes, text: bytes) -> None:
    for _ in range(_NR_TRIES):
        temporary = b".symlink-" + secrets.token_hex(6).encode()
        try:
            os.symlink(text, temporary, dir_fd=repository_fd)
        except FileExistsError:
            continue
        try:
            os.rename(temporary, name, src_dir_fd=repository_fd, dst_dir_fd=directory)
        except BaseException:
            os.unlink(temporary, dir_fd=repository_fd)
            raise
        return
    msg = f"{_NR_TRIES} random names were all taken"
    raise ConflictError(msg)


def remove_link(repository_fd: int, path: bytes) -> None:
    """Remove a symbolic link.

    Args:
        repository_fd: the store.
        path: of the link, from the store.

    Raises:
        ConflictError: something else than a link has the name.
        OSError: as openat2(2) and unlink(2), ``ENOENT`` for instance.
    """
    parent, _, name = path.rpartition(b"/")
    with naming(path):
        directory = openat2(repository_fd, parent, _DIRECTORY_FLAGS)
        try:
            found = _look_at(directory, name)
            if found is not None and found.target is None:
                msg = f"{os.fsdecode(path)}: expected a symbolic link, found something else"
                raise ConflictError(msg)
            os.unlink(name, dir_fd=directory)
        finally:
            os.close(directory)


def entries(repository_fd: int, category: str) -> Iterator[Entry]:
    """Yield what is directly in ``images`` or ``streams``, without ``refs``; sorted by name.

    Raises:
        OSError: reading the directory failed; if it is missing, it is empty.
    """
    for entry in _list(repository_fd, category.encode()):
        if entry.name != REFS or not stat.S_ISDIR(entry.mode):
            yield entry


def walk_refs(repository_fd: int, category: str, below: bytes = b"") -> Iterator[Entry]:
    """Yield everything but directories below ``refs`` of a category, sorted by name.

    Args:
        repository_fd: the store.
        category: ``images`` or ``streams``.
        below: only what is in this directory, with a slash at its end; names hold it.

    Raises:
        OSError: reading a directory failed; if it is missing, it is empty.
    """
    top = category.encode() + b"/" + REFS
    found = []
    waiting = [below]
    while waiting:
        parent = waiting.pop()
        for entry in _list(repository_fd, top + b"/" + parent):
            name = parent + entry.name
            if stat.S_ISDIR(entry.mode):
                waiting.append(name + b"/")
            else:
                found.append(Entry(name, entry.target, entry.mode))
    yield from sorted(found, key=lambda entry: entry.name)


def _list(repository_fd: int, path: bytes) -> list[Entry]:
    try:
        fd = openat2(repository_fd, path, _DIRECTORY_FLAGS)
    except FileNotFoundError:
        return []
    try:
        with naming(path):
            names = sorted(os.fsencode(name) for name in os.listdir(fd))
            return [entry for name in names if (entry := _look_at(fd, name)) is not None]
    finally:
        os.close(fd)


def _look_at(dir_fd: int, name: bytes) -> Entry | None:
    """Return an entry; None if it is gone meanwhile."""
    try:
        mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
        target = os.readlink(name, dir_fd=dir_fd) if stat.S_ISLNK(mode) else None
    except FileNotFoundError:
        return None
    return Entry(name, target, mode)


def object_of_target(target: bytes) -> Digest:
    """Return the digest in the last two components of a link's text, ``XX/REST``.

    Raises:
        FormatError: there is none.
    """
    components = target.split(b"/")[-2:]
    if len(components[0]) == 2:  # noqa: PLR2004
        with suppress(FormatError, UnicodeDecodeError):
            return Digest.parse(b"".join(components).decode("ascii"))
    msg = f"link to {target.decode(errors='backslashreplace')!r}: expected objects/XX/REST"
    raise FormatError(msg)


def read_link(repository_fd: int, path: bytes) -> bytes | None:
    """Return the text of a symbolic link; None if there is none of that name, or cannot be.

    Raises:
        OSError: a directory on the way cannot be read or is itself a link.
    """
    try:
        fd = openat2(repository_fd, path, os.O_PATH | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        return None
    try:
        return os.readlink(b"", dir_fd=fd) if stat.S_ISLNK(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)


def resolve_image(repository: Store, name: str) -> Digest:
    """Return the digest of an image.

    A ref is resolved to the digest in its link, so that what is opened can be verified: this
    is stricter than composefs-rs, and the same for whatever that tool has written.

    Args:
        repository: the store.
        name: digest in lower case hex, ``refs/NAME``, or ``NAME`` if it holds no slash.

    Raises:
        InvalidRequestError: no name can be like that.
        NotFoundError: there is no such image.
    """
    path = check_name(name)
    digest = _find_image(repository, path)
    if digest is None and b"/" not in path:
        digest = _find_image(repository, REFS + b"/" + path)
    if digest is None:
        msg = f"image not found: {name}"
        raise NotFoundError(msg)
    return digest


def _find_image(repository: Store, path: bytes) -> Digest | None:
    """Look up a path below ``images``: ``ID``, or ``refs/NAME`` and then its ID."""
    target = read_link(repository.fd, IMAGES.encode() + b"/" + path)
    if target is None:
        return None
    if path.startswith(REFS + b"/"):
        path = target.rpartition(b"/")[2]
        if read_link(repository.fd, IMAGES.encode() + b"/" + path) is None:
            return None
    try:
        digest = Digest.parse(path.decode("ascii"))
    except (FormatError, UnicodeDecodeError):
        return None
    is_image = str(digest).encode() == path and digest.algorithm is repository.algorithm
    return digest if is_image else None
