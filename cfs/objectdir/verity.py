"""What a directory of objects demands of fs-verity, and its enabling (spec repository 1.4, 2.6)."""

import errno
import logging
import time
from enum import Enum

from cfs.digest import Algorithm, Digest
from cfs.errors import UnsupportedError
from cfs.fsverity import enable, measure
from cfs.linux.files import copy_contents
from cfs.objectdir.temporary import Temporary

__all__ = ["Verity", "seal"]

_log = logging.getLogger(__name__)
_NR_TRIES = 4
_NR_COPIES = 8


class Verity(Enum):
    """Whether objects get fs-verity.

    Attributes:
        REQUIRE: all have it, the store is secure.
        TRY: where kernel and file system can, as ``mkcomposefs --digest-store`` of C does.
        NEVER: none gets it.  With some of each kind, an image mounted by its digest demands it
            of all, and reads of the others fail (spec repository 2.4).
    """

    REQUIRE = "require"
    TRY = "try"
    NEVER = "never"


def seal(temporary: Temporary, verity: Verity, algorithm: Algorithm) -> Digest | None:
    """Turn on fs-verity for a file that is written in full.

    Returns:
        The digest that the kernel measures; None if the file has no fs-verity.

    Raises:
        UnsupportedError: it is required, and kernel or file system lack it.
        OSError: it is required, and the kernel refused.
    """
    if verity is Verity.NEVER:
        return None
    temporary.reopen()
    try:
        _enable(temporary, algorithm)
    except (UnsupportedError, OSError) as error:
        if verity is Verity.REQUIRE:
            raise
        _log.debug("object without fs-verity: %s", error)
        return None
    return measure(temporary.fd)


def _enable(temporary: Temporary, algorithm: Algorithm) -> None:
    """Turn on fs-verity.

    A child forked by another thread holds the writer until it calls exec, perhaps for long.  So
    after a few tries the contents go to another file.
    """
    for _ in range(_NR_COPIES):
        for _ in range(_NR_TRIES):
            try:
                enable(temporary.fd, algorithm)
            except OSError as error:
                if error.errno != errno.ETXTBSY:
                    raise
                time.sleep(0.001)
            else:
                return
        copy = Temporary.create(temporary.directory)
        try:
            copy_contents(temporary.fd, copy.fd, temporary.size())
            copy.reopen()
            temporary.swap(copy)
        finally:
            copy.discard()
    enable(temporary.fd, algorithm)
