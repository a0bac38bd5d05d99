"""Making a store, and ``init`` on one that is there (spec repository 1.3, 1.6)."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath

from cfs.digest import Algorithm
from cfs.errors import ConflictError, InvalidRequestError, NotFoundError, explaining
from cfs.linux.files import naming, open_path, owned
from cfs.repository.locks import LockedDirectory
from cfs.repository.metadata import Metadata, format_algorithm
from cfs.repository.metafile import NAME, create_metadata, read_metadata
from cfs.repository.oldstores import convert, have_verity, infer_algorithm
from cfs.repository.refs import IMAGES, STREAMS

__all__ = ["InitResult", "Outcome", "init"]

_STORE_MODE = 0o700
_PARENT_MODE = 0o755
_OPEN_PARENT = os.O_PATH | os.O_DIRECTORY


class Outcome(Enum):
    """What :func:`init` found or did."""

    CREATED = "created"
    EXISTED = "existed"
    PRESERVED = "preserved"
    UPGRADED = "upgraded"


@dataclass(frozen=True, slots=True)
class InitResult:
    """What a store is after :func:`init`."""

    outcome: Outcome
    algorithm: Algorithm
    is_secure: bool


def init(
    path: str,
    *,
    algorithm: Algorithm,
    is_secure: bool,
    erofs_version: int,
    ensure: bool = False,
    reset: bool = False,
    wait: bool = True,
) -> InitResult:
    """Make a store, or check that the one that is there is like that.

    Where it fails, nothing that it made is left behind.  Other than composefs-rs, it does not
    take an insecure store for a secure one or the other way round, nor a directory with
    objects of another algorithm for a new store.

    Args:
        path: of the store; missing parents are made.
        algorithm: names all objects.
        is_secure: objects must have fs-verity.
        erofs_version: format of images: 0, 1 or 2.
        ensure: leave a store as it is, if it has that algorithm; convert an old one.
        reset: begin anew: remove all names, whoever uses them; objects stay.
        wait: wait for a collection, as long as it takes.

    Raises:
        InvalidRequestError: ``path`` is empty.
        BusyError: somebody collects or wants to, and ``wait`` is false.
        ConflictError: there is a store, and it is different.
        UnsupportedError: there is no fs-verity, which ``is_secure`` demands.
        FormatError: ``meta.json`` is broken.
        OSError: making, removing or writing failed.
    """
    if not path:
        msg = "the path of the repository is empty"
        raise InvalidRequestError(msg)
    wanted = Metadata.create(algorithm, erofs_version)
    doing = "Ensuring" if ensure else "Initializing"
    begin = _reset if reset else _init
    # PurePath: "store/." and "store//" are "store", and no parent of it
    with _directories(str(PurePath(path))), explaining(f"{doing} repository at {path}"):
        directory = LockedDirectory.open(path, wait=wait)
        try:
            return begin(directory.fd, wanted, is_secure=is_secure, ensure=ensure)
        finally:
            directory.close()


@contextmanager
def _directories(path: str) -> Iterator[None]:
    """Make a directory and its parents; if the block fails, remove those that were made."""
    missing = []
    current = path
    while current and not os.path.isdir(current):
        missing.append(current)
        current = os.path.dirname(current)
    made: list[tuple[int, str]] = []
    with ExitStack() as stack:
        parent = owned(stack, open_path(current or ".", _OPEN_PARENT)) if missing else -1
        try:
            for directory in reversed(missing):
                name = os.path.basename(directory)
                mode = _STORE_MODE if directory == path else _PARENT_MODE
                with naming(directory):
                    with suppress(FileExistsError):
                        os.mkdir(name, mode, dir_fd=parent)
                        made.append((parent, name))
                    parent = owned(stack, open_path(name, _OPEN_PARENT, dir_fd=parent))
            yield
        except BaseException:
            for parent, name in reversed(made):
                with suppress(OSError):
                    os.rmdir(name, dir_fd=parent)
            raise


def _reset(directory_fd: int, wanted: Metadata, *, is_secure: bool, ensure: bool) -> InitResult:
    """Begin anew; what can be foreseen to fail fails before anything is lost."""
    if ensure and _infer(directory_fd, wanted.algorithm) is not None:
        _remove(directory_fd, STREAMS, IMAGES, os.fsdecode(NAME))
        return _convert(directory_fd)
    create_metadata(directory_fd, wanted, is_secure=is_secure, replace=True)
    _remove(directory_fd, STREAMS, IMAGES)
    return InitResult(Outcome.CREATED, wanted.algorithm, is_secure)


def _remove(directory_fd: int, *names: str) -> None:
    for name in names:
        with suppress(FileNotFoundError):
            mode = os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                shutil.rmtree(name, dir_fd=directory_fd)
            else:
                os.unlink(name, dir_fd=directory_fd)


def _convert(directory_fd: int) -> InitResult:
    metadata, has_verity = convert(directory_fd)
    return InitResult(Outcome.UPGRADED, metadata.algorithm, has_verity)


def _init(directory_fd: int, wanted: Metadata, *, is_secure: bool, ensure: bool) -> InitResult:
    found = read_metadata(directory_fd)
    if found is None:
        if _infer(directory_fd, wanted.algorithm) is not None:
            if ensure:
                return _convert(directory_fd)
            if is_secure and not have_verity(directory_fd, wanted.algorithm):
                msg = "the objects that are there already have no fs-verity"
                raise ConflictError(msg)
        try:
            create_metadata(directory_fd, wanted, is_secure=is_secure)
        except FileExistsError:  # somebody else was faster
            return _init(directory_fd, wanted, is_secure=is_secure, ensure=ensure)
        return InitResult(Outcome.CREATED, wanted.algorithm, is_secure)
    metadata, has_verity = found
    if ensure:
        _check_algorithm(metadata.algorithm, wanted.algorithm)
        return InitResult(Outcome.PRESERVED, metadata.algorithm, has_verity)
    _check_equal(metadata, wanted)
    _check_security(has_verity, is_secure)
    return InitResult(Outcome.EXISTED, metadata.algorithm, has_verity)


def _infer(directory_fd: int, expected: Algorithm) -> Algorithm | None:
    """Return the algorithm of objects without metadata, None if there are none."""
    try:
        inferred = infer_algorithm(directory_fd)
    except NotFoundError:
        return None
    if inferred is not expected:
        msg = (
            f"inferred algorithm {format_algorithm(inferred)} is not compatible with this "
            f"repository type (expected {format_algorithm(expected)})"
        )
        raise ConflictError(msg)
    return inferred


def _check_algorithm(found: Algorithm, expected: Algorithm) -> None:
    if found is not expected:
        msg = (
            f"repository algorithm {format_algorithm(found)} does not match expected "
            f"{format_algorithm(expected)}"
        )
        raise ConflictError(msg)


def _check_equal(found: Metadata, wanted: Metadata) -> None:
    if found != wanted:
        msg = (
            f"repository already initialized with different configuration ({_describe(found)}); "
            f"cannot re-initialize with ({_describe(wanted)})"
        )
        raise ConflictError(msg)


def _describe(metadata: Metadata) -> str:
    version = metadata.formats.default
    return f"algorithm: {format_algorithm(metadata.algorithm)}, erofs_version: V{version}"


def _check_security(has_verity: bool, is_secure: bool) -> None:  # noqa: FBT001 - see the name
    if has_verity and not is_secure:
        msg = "repository already initialized with fs-verity; cannot re-initialize as insecure"
        raise ConflictError(msg)
    if is_secure and not has_verity:
        msg = (
            "repository already initialized without fs-verity (insecure); "
            "cannot re-initialize with fs-verity"
        )
        raise ConflictError(msg)
