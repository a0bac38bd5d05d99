"""Which objects a store's names need; spec repository 8.1, 8.2.

Only names lead to what is kept: an image with the objects it refers to, a stream with its
objects and with the streams it refers to by name.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from cfs.compat import override
from cfs.digest import Digest
from cfs.errors import CfsError, FormatError, IntegrityError, NotFoundError
from cfs.linux.files import owned
from cfs.objectdir.stored import open_stored
from cfs.repository.findings import describe_errno, show
from cfs.repository.fsck_objects import type_name
from cfs.repository.mounted import is_alive, is_reserved
from cfs.repository.references import load_references
from cfs.repository.refs import IMAGES, STREAMS, Entry, entries, object_of_target, walk_refs
from cfs.repository.repository import Repository
from cfs.repository.splitstream import SplitStream
from cfs.repository.splitstream_format import HEADER, is_splitstream

__all__ = ["CATEGORIES", "Marks", "Problem", "mark"]

CATEGORIES = (IMAGES, STREAMS)
# what removing a name cures; not a lack of permission, for instance
_GONE = (NotFoundError, FileNotFoundError, NotADirectoryError)
_DAMAGE = (FormatError, IntegrityError, *_GONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something in a store that collection leaves alone.

    Attributes:
        path: from the store.
        reason: what is wrong with it.
        link: the link that is no use as it is, and may be removed; None: there is none.
    """

    path: bytes
    reason: str
    link: bytes | None = None

    @override
    def __str__(self) -> str:
        return f"{show(self.path)}: {self.reason}"


@dataclass(slots=True)
class Marks:
    """What is needed, and what is there.

    Attributes:
        digests: of the objects that are needed.
        entries: by category, what the links directly in it lead to, by name.
        problems: names that need nothing, or nobody knows what.
        is_complete: whether it is known what every name needs.
    """

    digests: set[Digest] = field(default_factory=set)
    entries: dict[str, dict[bytes, Digest]] = field(
        default_factory=lambda: {category: {} for category in CATEGORIES}
    )
    problems: list[Problem] = field(default_factory=list)
    is_complete: bool = True


def mark(repository: Repository, roots: frozenset[bytes]) -> Marks:
    """Find out what is needed; nothing is changed.

    Args:
        repository: the store.
        roots: names directly in ``images`` and ``streams`` that count, too.

    Raises:
        OSError: ``images``, ``streams`` or what is below ``refs`` cannot be listed.
    """
    return _Marking(repository).run(roots)


class _Marking:
    """One run; one thread."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._marks = Marks()
        self._streams: set[Digest] = set()  # that have an entry
        self._named: set[Digest] = set()  # what streams refer to by name
        self._useless: set[bytes] = set()  # entries that lead to no object
        self._seen: set[Digest] = set()
        self._has_gaps = False

    def run(self, roots: frozenset[bytes]) -> Marks:
        for category in CATEGORIES:
            for entry in entries(self._repository.fd, category):
                self._read_entry(category, entry)
        self._streams = set(self._marks.entries[STREAMS].values())
        for category in CATEGORIES:
            for ref in self._refs(category):
                self._mark_ref(category, ref)
            for name in sorted(roots & self._marks.entries[category].keys()):
                path = os.fsencode(category) + b"/" + name
                self._mark(category, self._marks.entries[category][name], path, None)
        if self._has_gaps:
            self._mark_named_images()
        return self._marks

    def _mark_named_images(self) -> None:
        """Mark what images need that streams refer to: their layers, which keep it, are gone."""
        for name, digest in self._marks.entries[IMAGES].items():
            if digest in self._named and self._repository.objects.has(digest):
                self._mark(IMAGES, digest, b"images/" + name, None)

    def _read_entry(self, category: str, entry: Entry) -> None:
        path = os.fsencode(category) + b"/" + entry.name
        if entry.target is None:
            self._complain_of_file(path, entry)
            return
        try:
            digest = object_of_target(entry.target)
        except FormatError as error:
            self._complain_of_entry(path, str(error))
            return
        if digest.algorithm is self._repository.algorithm:
            self._marks.entries[category][entry.name] = digest
        else:
            self._complain_of_entry(path, "leads to an object of another algorithm")

    def _complain_of_entry(self, path: bytes, reason: str) -> None:
        """Note an entry whose object is not known; if it leads anywhere, so is what it needs."""
        self._complain(path, reason, link=path)
        self._useless.add(path)
        try:
            os.stat(path, dir_fd=self._repository.fd)
        except FileNotFoundError:
            return
        except OSError:
            pass  # an object's path with something behind it, for instance
        self._marks.is_complete = False

    def _complain_of_file(self, path: bytes, entry: Entry) -> None:
        """Note what is no link; in a copy made without links, it stands for one."""
        self._complain(path, f"is no link but a {type_name(entry.mode)}")
        if stat.S_ISREG(entry.mode):
            found = os.stat(path, dir_fd=self._repository.fd, follow_symlinks=False)
            self._marks.is_complete &= found.st_size == 0

    def _refs(self, category: str) -> Iterator[Entry]:
        """Yield the refs that count."""
        for ref in walk_refs(self._repository.fd, category):
            is_mount = category == IMAGES and is_reserved(ref.name)
            if not is_mount or is_alive(self._repository.fd, ref.name):
                yield ref

    def _mark_ref(self, category: str, ref: Entry) -> None:
        path = os.fsencode(category) + b"/refs/" + ref.name
        if ref.target is None:
            self._complain_of_file(path, ref)
            return
        name = _last_component(ref.target)
        if name in (b"", b".."):
            return  # names nothing, as composefs-rs sees it
        digest = self._marks.entries[category].get(name)
        if digest is not None:
            self._mark(category, digest, path, path)
            return
        is_there = os.fsencode(category) + b"/" + name in self._useless
        what = "which leads to no object" if is_there else f"which is not in {category}"
        self._complain(path, f"leads to {show(name)}, {what}", link=path)
        if category == IMAGES:
            self._rescue(name, path)

    def _rescue(self, name: bytes, path: bytes) -> None:
        """Keep an image whose entry is gone while the name ``path`` leads to it."""
        try:
            digest = Digest.parse(name.decode(errors="replace"))
        except FormatError:
            return
        try:
            self._marks.digests |= {digest, *self._image_references(digest)}
        except _GONE:
            return  # there is nothing to keep
        except (CfsError, OSError) as error:
            self._give_up(digest, error, path, path)

    def _mark(self, category: str, digest: Digest, path: bytes, link: bytes | None) -> None:
        """Mark an image or a stream with what it needs, on behalf of the name ``path``."""
        waiting = [digest]
        while waiting:
            digest = waiting.pop()
            self._marks.digests.add(digest)
            if digest in self._seen:
                continue
            try:
                if category == IMAGES:
                    self._marks.digests |= self._image_references(digest)
                else:
                    waiting += self._streams_of(self._mark_stream(digest), path, link)
                self._seen.add(digest)
            except (CfsError, OSError) as error:
                self._give_up(digest, error, path, link)

    def _image_references(self, digest: Digest) -> set[Digest]:
        with ExitStack() as stack:
            fd = owned(stack, self._repository.objects.open_object(digest))
            return load_references(fd, f"image {digest}")

    def _mark_stream(self, digest: Digest) -> set[Digest]:
        """Mark what a stream refers to; return what it refers to by name: streams, images."""
        with SplitStream(self._open(digest), self._repository.algorithm) as stream:
            named = set(stream.named_refs.values())
            self._marks.digests.update(stream.object_refs, named)
        self._named |= named
        return named

    def _streams_of(self, named: set[Digest], path: bytes, link: bytes | None) -> set[Digest]:
        """Return which of what a stream names are streams, and note what is gone.

        One without an entry counts, too, unlike in composefs-rs: its entry may be damaged.
        """
        found = named & self._streams
        for digest in named - found:
            try:
                with os.fdopen(self._open(digest), "rb") as file:
                    if is_splitstream(file.read(HEADER.size)):
                        found.add(digest)
            except (CfsError, OSError) as error:
                self._give_up(digest, error, path, link)
        return found

    def _open(self, digest: Digest) -> int:
        return open_stored(self._repository.objects.fd, digest.object_path, digest)

    def _give_up(
        self, digest: Digest, error: CfsError | OSError, path: bytes, link: bytes | None
    ) -> None:
        """Note that it is not known what an image or a stream needs.

        Of what is gone nobody will ever know, so collection goes on.
        """
        is_gone = isinstance(error, _GONE)
        self._has_gaps |= is_gone
        self._marks.is_complete &= is_gone
        text = describe_errno(error) if isinstance(error, OSError) else str(error)
        reason = text if str(digest) in text else f"object {digest}: {text}"
        self._complain(path, reason, link=link if isinstance(error, _DAMAGE) else None)

    def _complain(self, path: bytes, reason: str, link: bytes | None = None) -> None:
        self._marks.problems.append(Problem(path=path, reason=reason, link=link))


def _last_component(target: bytes) -> bytes:
    """Return the last component of a link's text; ``.`` at its end is none."""
    components = [each for each in target.split(b"/") if each not in (b"", b".")]
    return components[-1] if components else b""
