"""Where records of mounts are: ``/run/cfs``, or ``$XDG_RUNTIME_DIR/cfs`` (issue 5, point 7)."""

import os
from contextlib import suppress

from cfs.errors import NotFoundError
from cfs.linux.mounts import is_initial_user_namespace

__all__ = ["all_records_directories", "records_directory"]

_SYSTEM = "/run/cfs"
_USERS = "/run/user"


def records_directory() -> str | None:
    """Return where this user's records are; None: nowhere, so that ``ps`` cannot show mounts.

    Root of a user name space is an ordinary user, unless he has no directory of his own.
    """
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    is_root = os.geteuid() == 0
    if is_root and (is_initial_user_namespace() or not own):
        return _SYSTEM
    return os.path.join(own, "cfs") if os.path.isabs(own) else None


def all_records_directories() -> list[str]:
    """Return where the records are that this user may see: root sees those of all users.

    Raises:
        NotFoundError: nowhere.
    """
    own = records_directory()
    if own is None:
        msg = "XDG_RUNTIME_DIR is not set: without it there are no records of mounts"
        raise NotFoundError(msg)
    users: list[str] = []
    if own == _SYSTEM:
        with suppress(FileNotFoundError):
            users = sorted(os.listdir(_USERS))
    return [own, *(os.path.join(_USERS, user, "cfs") for user in users)]
