"""The errors of cfs.

::

    CfsError
     +-- FormatError            an image, dumpfile, ... breaks its format
     +-- UnsupportedError       valid, but an ability we or the kernel lack
     +-- IntegrityError         digest or size is not the promised one
     +-- NotFoundError          no such name, image, object
     +-- ConflictError          exists already, with other settings
     +-- InvalidRequestError    the caller's arguments contradict each other
     +-- BusyError              in use by somebody else
     +-- SourceError            who should give us an image does not
     +-- MountError             the kernel or fusermount3 refused to mount
          +-- MountPointError   not there

Every class carries the errno that a FUSE reply would use for it.  ``OSError`` passes
through cfs untouched.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BusyError",
    "CfsError",
    "ConflictError",
    "FormatError",
    "IntegrityError",
    "InvalidRequestError",
    "MountError",
    "MountPointError",
    "NotFoundError",
    "SourceError",
    "UnsupportedError",
    "describe",
    "escape",
    "explaining",
]

_MAX_MESSAGE_SIZE = 4096  # characters: what an error quotes from a document may have millions


class CfsError(Exception):
    """Root of all errors of cfs; never raised itself."""

    errno: int = errno.EIO


class FormatError(CfsError):
    """An image, dumpfile or other input breaks its format."""

    errno = errno.EUCLEAN


class UnsupportedError(CfsError):
    """The input is valid but needs an ability that cfs or the kernel lacks."""

    errno = errno.EOPNOTSUPP


class IntegrityError(CfsError):
    """A digest or a size is not the promised one."""

    errno = errno.EIO


class NotFoundError(CfsError):
    """There is no such name, image or object."""

    errno = errno.ENOENT


class ConflictError(CfsError):
    """Something of that name exists already, with other settings."""

    errno = errno.EEXIST


class InvalidRequestError(CfsError):
    """The caller's arguments are wrong or contradict each other."""

    errno = errno.EINVAL


class BusyError(CfsError):
    """Somebody else uses it, and nobody wants to wait."""

    errno = errno.EBUSY


class SourceError(CfsError):
    """A registry, or the program that talks to it, does not give what it was asked for."""

    errno = errno.EIO


class MountError(CfsError):
    """The kernel or fusermount3 refused to mount; ``errno`` is its reason."""

    def __init__(self, message: str, reason: int = errno.EIO) -> None:
        super().__init__(message)
        self.errno = reason


class MountPointError(MountError):
    """Nothing can be mounted where it was to go."""


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Put ``what`` and a colon in front of the errors of ours that leave a block."""
    try:
        yield
    except CfsError as error:
        msg = f"{what}: {error}"
        raise type(error)(msg) from None


def describe(error: CfsError | OSError) -> str:
    """Return an error in one line, an ``OSError`` as file and reason."""
    if not isinstance(error, OSError):
        text = str(error)
    elif error.filename is None or isinstance(error.filename, int):  # a descriptor
        text = error.strerror or str(error)
    else:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    if len(text) > _MAX_MESSAGE_SIZE:
        text = text[: _MAX_MESSAGE_SIZE // 2] + "…" + text[-_MAX_MESSAGE_SIZE // 2 :]
    return escape(text)


def escape(text: str) -> str:
    """Return text that stays in its line and moves no cursor, whatever names it holds."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
