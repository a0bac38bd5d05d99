"""Check of a whole store; spec repository 9.1.  Nothing is changed.

Objects are checked by threads, one for each usable CPU, while the caller's thread goes through
streams, images and names.  A store may be in use meanwhile: what is being written has no name
yet.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from cfs.errors import CfsError, UnsupportedError
from cfs.repository.findings import Report, describe_errno
from cfs.repository.fsck_links import LinkCheck
from cfs.repository.fsck_objects import FAN_OUTS, check_fan_out, check_objects_directory
from cfs.repository.metadata import format_algorithm
from cfs.repository.metafile import read_metadata
from cfs.repository.repository import Repository

__all__ = ["Report", "check"]

_MAX_THREADS = 16  # each has a batch of files open


def check(repository: Repository, *, metadata_only: bool = False) -> Report:
    """Return what is wrong with a store.

    Args:
        repository: the store, open.
        metadata_only: leave out the objects themselves; streams and images are checked.

    Raises:
        OSError: ``objects``, ``objects/XX``, ``streams``, ``images`` or their ``refs`` are no
            directories, or cannot be read.
    """
    check_objects_directory(repository)
    report = Report()
    _check_metadata(repository, report)
    with _objects_checked(repository, () if metadata_only else FAN_OUTS) as fan_outs:
        links = LinkCheck(repository)
        links.check_streams()
        links.check_images()
        for fan_out in fan_outs:
            report.add(fan_out.result())
    report.add(links.report)
    return report


@contextmanager
def _objects_checked(
    repository: Repository, fan_outs: tuple[bytes, ...]
) -> Iterator[list[Future[Report]]]:
    """Run the check of the objects beside the block; drop what is left of it at the end."""
    algorithm, is_secure = repository.algorithm, repository.is_secure
    nr_threads = min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    pool = ThreadPoolExecutor(nr_threads, thread_name_prefix="cfs-fsck")
    try:
        yield [
            pool.submit(check_fan_out, repository.fd, fan_out, algorithm, is_secure=is_secure)
            for fan_out in fan_outs
        ]
    finally:
        pool.shutdown(cancel_futures=True)


def _check_metadata(repository: Repository, report: Report) -> None:
    """Read ``meta.json`` again: it may have changed since the store was opened."""
    try:
        found = read_metadata(repository.fd)
    except (CfsError, OSError) as error:
        reason = describe_errno(error) if isinstance(error, OSError) else str(error)
        report.lose_metadata(f"Reading repository metadata: parsing meta.json: {reason}")
        return
    if found is None:
        report.lose_metadata(
            "meta.json not found; expected because repository was opened successfully"
        )
        return
    metadata, _ = found
    try:
        metadata.check_readable()
    except UnsupportedError:
        is_usable = False
    else:
        is_usable = metadata.algorithm is repository.algorithm
    if not is_usable:
        stored, ours = format_algorithm(metadata.algorithm), repository.algorithm.name.lower()
        mismatch = f"expected {stored}, repository opened as {ours}"
        report.find("metadata-algorithm-mismatch", "meta.json", mismatch)
