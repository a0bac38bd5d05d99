"""What is made once and kept outside the checkout, in ``$XDG_CACHE_HOME/cfs-tests``."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cfs-tests"


class Unavailable(Exception):  # noqa: N818 - no error: a reason to skip
    """What this machine lacks to make something that tests need."""


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return the directory ``target``; ``make`` fills it if it is missing.

    Of several processes one makes it and the others wait; what failed half-way is not seen.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(f"{target}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise Unavailable(f"no cache in {target.parent}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                make(scratch)
                scratch.rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(lock)
    return target


def remove_old(name: str, kept: int) -> None:
    """Remove versions of ``NAME-DIGEST`` but for those made last; what is in use stays that long.

    Nobody asks for them again: they were made of sources that have changed.
    """
    found = sorted(CACHE.glob(f"{name}-*[0-9a-f]"), key=lambda path: -path.stat().st_mtime)
    for old in found[kept:]:
        shutil.rmtree(old, ignore_errors=True)
