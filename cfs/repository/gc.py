"""Collection: removal of what no name leads to; spec repository 8.

The exclusive lock is held throughout, so nobody else uses the store.  Links go before the
objects they lead to: a crash at any moment leaves objects too many and no link too many.

A damaged name does not stop collection, as it does in composefs-rs.  It is reported and left
alone; only while it is not known what it needs, because an image or a stream cannot be read,
no object is removed.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

from cfs.errors import FormatError
from cfs.linux.files import naming, openat2, owned
from cfs.objectdir import TEMPORARY_PREFIX
from cfs.repository.findings import describe_errno, show
from cfs.repository.fsck_objects import (
    FAN_OUTS,
    check_objects_directory,
    parse_object_name,
)
from cfs.repository.marking import CATEGORIES, Marks, Problem, mark
from cfs.repository.mounted import remove_dead
from cfs.repository.refs import entries, walk_refs
from cfs.repository.repository import Repository

__all__ = ["Collection", "Problem", "collect"]

_TEMPORARIES = (
    (b".", re.compile(rb"(\.symlink-|%b)[0-9A-Za-z]{12}" % re.escape(TEMPORARY_PREFIX))),
    (b"objects", re.compile(re.escape(TEMPORARY_PREFIX) + rb"[0-9A-Za-z]{12}")),
)


@dataclass(slots=True, kw_only=True)
class Collection:
    """What a collection did, or would do.

    Attributes:
        nr_objects: objects removed.
        size: of these, in bytes.
        nr_links: links removed by category, ``images`` and ``streams``; in a dry run only
            those that lead nowhere already, as in composefs-rs.
        problems: what was left alone.
        is_complete: whether it was known what every name needs; if not, no object was removed.
    """

    nr_objects: int = 0
    size: int = 0
    nr_links: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    problems: list[Problem] = field(default_factory=list)
    is_complete: bool = True


def collect(
    repository: Repository,
    roots: Iterable[bytes] = (),
    *,
    dry_run: bool = False,
    remove_broken: bool = False,
    wait: bool = True,
    on_wait: Callable[[], None] | None = None,
) -> Collection:
    """Remove the objects and links that no name and no root needs.

    Args:
        repository: the store, open; its other users in this process keep it open meanwhile.
        roots: names directly in ``images`` and ``streams`` to keep with what they need.
        dry_run: change nothing and lock nothing.
        remove_broken: remove names that lead to nothing or to something damaged, too.
        wait: wait until nobody else uses the store.
        on_wait: called once if that takes longer than a second.

    Raises:
        BusyError: somebody uses the store, and ``wait`` is false.
        OSError: the store cannot be written to, or a directory cannot be read.
    """
    if dry_run:
        return _Collector(repository, frozenset(roots), dry_run=True).run(remove_broken=False)
    repository.check_writable()
    with repository.exclusive(wait=wait, on_wait=on_wait):
        collector = _Collector(repository, frozenset(roots), dry_run=False)
        return collector.run(remove_broken=remove_broken)


class _Collector:
    """One collection; one thread."""

    def __init__(self, repository: Repository, roots: frozenset[bytes], *, dry_run: bool) -> None:
        self._repository = repository
        self._fd = repository.fd
        self._roots = roots
        self._dry_run = dry_run
        self._result = Collection()

    def run(self, *, remove_broken: bool) -> Collection:
        check_objects_directory(self._repository)
        if not self._dry_run:
            remove_dead(self._fd)
            self._remove_temporaries()
        marks = mark(self._repository, self._roots)
        while remove_broken and (links := {each.link for each in marks.problems if each.link}):
            for path in links:
                self._remove_link(path)
            marks = mark(self._repository, self._roots)
        self._result.problems = marks.problems
        self._result.is_complete = marks.is_complete
        if marks.is_complete:
            self._prune_unmarked(marks)
            for fan_out in FAN_OUTS:
                self._sweep(fan_out, marks)
        self._prune_dangling({each.path for each in marks.problems})
        return self._result

    def _prune_unmarked(self, marks: Marks) -> None:
        """Remove the entries whose objects go next."""
        for category in CATEGORIES if not self._dry_run else ():
            for name, digest in marks.entries[category].items():
                if digest not in marks.digests:
                    self._remove_link(os.fsencode(category) + b"/" + name)

    def _sweep(self, fan_out: bytes, marks: Marks) -> None:
        """Remove the objects of a directory ``objects/XX`` that are not marked."""
        path = b"objects/" + fan_out
        with ExitStack() as stack:
            try:
                fd = owned(stack, self._open_directory(path))
            except FileNotFoundError:
                return
            except OSError as error:
                self._complain(path, describe_errno(error))
                return
            for name in sorted(os.listdir(fd)):
                self._sweep_entry(fd, fan_out, os.fsencode(name), marks)

    def _sweep_entry(self, fd: int, fan_out: bytes, name: bytes, marks: Marks) -> None:
        path = b"objects/" + fan_out + b"/" + name
        try:
            digest = parse_object_name(fan_out, name, self._repository.algorithm)
        except FormatError as error:
            self._complain(path, f"is no object: {str(error).lower()}")
            return
        if digest in marks.digests:
            return
        with naming(path):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                self._complain(path, "is no object but a directory")
                return
            try:
                if not self._dry_run:
                    os.unlink(name, dir_fd=fd)
            except PermissionError as error:  # another user's, or immutable
                self._complain(path, describe_errno(error))
                return
        self._result.nr_objects += 1
        self._result.size += status.st_size if stat.S_ISREG(status.st_mode) else 0

    def _prune_dangling(self, spared: set[bytes]) -> None:
        """Remove links that lead nowhere, first the entries, as names may lead to these."""
        for category in CATEGORIES:
            for path in _links(self._fd, category):
                if path not in spared and self._is_dangling(path):
                    self._remove_link(path)

    def _is_dangling(self, path: bytes) -> bool:
        try:
            os.stat(path, dir_fd=self._fd)
        except FileNotFoundError:
            return True
        except OSError as error:
            self._complain(path, describe_errno(error))
        return False

    def _remove_temporaries(self) -> None:
        """Remove what a crash has left: with the lock, nobody else is using it."""
        for directory, pattern in _TEMPORARIES:
            with ExitStack() as stack:
                try:
                    fd = owned(stack, self._open_directory(directory))
                except FileNotFoundError:
                    continue
                for name in map(os.fsencode, os.listdir(fd)):
                    mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
                    if pattern.fullmatch(name) and not stat.S_ISDIR(mode):
                        os.unlink(name, dir_fd=fd)

    def _remove_link(self, path: bytes) -> None:
        if not self._dry_run:
            directory, _, name = path.rpartition(b"/")
            try:
                with ExitStack() as stack, naming(path):
                    os.unlink(name, dir_fd=owned(stack, self._open_directory(directory)))
            except FileNotFoundError:
                return  # a mount has ended: its server removes its link without a lock
        self._result.nr_links[show(path.partition(b"/")[0])] += 1

    def _open_directory(self, path: bytes) -> int:
        """Open a directory of the store: through a link, we would remove what is elsewhere."""
        return openat2(self._fd, path, os.O_RDONLY | os.O_DIRECTORY)

    def _complain(self, path: bytes, reason: str) -> None:
        self._result.problems.append(Problem(path=path, reason=reason))


def _links(repository_fd: int, category: str) -> list[bytes]:
    """Return the paths of all links of a category, names last."""
    top = os.fsencode(category) + b"/"
    return [
        prefix + entry.name
        for prefix, listed in (
            (top, entries(repository_fd, category)),
            (top + b"refs/", walk_refs(repository_fd, category)),
        )
        for entry in listed
        if entry.target is not None
    ]
