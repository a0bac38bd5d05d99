"""Check of streams, images and names; spec repository 9.1 steps 3 to 6, 9.2."""

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from operator import attrgetter

from cfs.digest import Digest
from cfs.erofs.format import CFS_HEADER, EROFS_MAGIC, SUPERBLOCK, SUPERBLOCK_OFF
from cfs.errors import CfsError, FormatError
from cfs.linux.files import open_path, owned
from cfs.repository.findings import Report, describe_errno, show
from cfs.repository.fsck_objects import open_object_file, type_name
from cfs.repository.references import load_references
from cfs.repository.refs import IMAGES, STREAMS, Entry, entries, object_of_target, walk_refs
from cfs.repository.repository import Repository
from cfs.repository.splitstream import SplitStream

__all__ = ["LinkCheck"]

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WORD_BITS = 64


class LinkCheck:
    """Collects findings in :attr:`report`; one thread."""

    def __init__(self, repository: Repository) -> None:
        self.report = Report()
        self._repository = repository
        self._known: dict[Digest, OSError | None] = {}  # why an object cannot be opened

    def check_streams(self) -> None:
        """Check all streams, then their names.

        Raises:
            OSError: ``streams`` or something below ``refs`` cannot be listed.
        """
        self._check_category(STREAMS, self._check_stream)

    def check_images(self) -> None:
        """Check all images, then their names.

        Raises:
            OSError: ``images`` or something below ``refs`` cannot be listed.
        """
        self._check_category(IMAGES, self._check_image)

    def _check_category(self, category: str, check: Callable[[Entry, str], bool]) -> None:
        for entry in entries(self._repository.fd, category):
            is_sound = self._check_entry(category, entry, check)
            self.report.count_entry(category, is_corrupted=not is_sound)
        for ref in walk_refs(self._repository.fd, category):
            path = f"{category}/refs/{show(ref.name)}"
            if ref.target is None:
                self.report.find("unexpected-file-type", path, type_name(ref.mode))
            else:
                self._resolve(os.fsencode(category) + b"/refs/" + ref.name)

    def _check_entry(
        self, category: str, entry: Entry, check: Callable[[Entry, str], bool]
    ) -> bool:
        """Check a stream or an image; False if it counts as corrupted."""
        path = f"{category}/{show(entry.name)}"
        if entry.target is None:
            self.report.find("entry-not-symlink", path)
            return False
        reason = self._resolve(os.fsencode(category) + b"/" + entry.name)
        if reason is None:
            return check(entry, path)
        return reason != errno.ENOENT

    def _resolve(self, path: bytes) -> int | None:
        """Follow a link; return the errno of what it does not lead to."""
        try:
            os.stat(path, dir_fd=self._repository.fd)
        except FileNotFoundError:
            if not _is_there(path, self._repository.fd):
                return None  # a mount has ended, or a name was removed: it is no finding
            self.report.find("broken-symlink", show(path))
            self.report.broken_links += 1
            return errno.ENOENT
        except OSError as error:
            self.report.find("stat-failed", show(path), describe_errno(error))
            return error.errno
        return None

    def _check_stream(self, entry: Entry, path: str) -> bool:
        try:
            fd = self._open(b"streams/" + entry.name)
            stream = SplitStream(fd, self._repository.algorithm)
        except (CfsError, OSError):
            detail = f"Opening stream '{show(entry.name)}'"
            self.report.find("stream-open-failed", path, detail)
            return False
        with stream:
            self._check_objects(path, stream.object_refs, "missing-object-ref")
            for name, digest in stream.named_refs.items():
                self._check_named(path, name, digest)
        return True

    def _check_named(self, path: str, name: str, digest: Digest) -> None:
        reason = self._find_object(digest)
        if isinstance(reason, FileNotFoundError):
            self.report.find("missing-named-ref", path, f"ref {name}", str(digest))
            self.report.missing_objects += 1
        elif reason is not None:
            detail = f"checking named ref '{name}': {describe_errno(reason)}"
            self.report.find("object-check-failed", path, str(digest), detail)

    def _check_image(self, entry: Entry, path: str) -> bool:
        with ExitStack() as stack:
            try:
                fd = owned(stack, self._open(b"images/" + entry.name))
            except OSError as error:
                is_directory = error.errno == errno.EISDIR
                kind = "image-read-failed" if is_directory else "image-open-failed"
                self.report.find(kind, path, describe_errno(error))
                return False
            try:
                digests = load_references(fd, "image")
            except FormatError as error:
                self.report.find("image-invalid", path, _describe_fault(fd) or str(error))
                return False
            except OSError as error:
                self.report.find("image-read-failed", path, describe_errno(error))
                return False
        self._check_objects(path, digests, "image-missing-object")
        return self._check_target(entry, path)

    def _check_target(self, entry: Entry, path: str) -> bool:
        """Check that an image's name is that of its object; composefs-rs would not notice."""
        try:
            target = object_of_target(entry.target or b"")
        except FormatError as error:
            self.report.find("image-invalid", path, str(error))
            return False
        if str(target).encode() == entry.name:
            return True
        self.report.find("image-invalid", path, f"leads to {target}")
        return False

    def _check_objects(self, path: str, digests: Iterable[Digest], missing: str) -> None:
        for digest in sorted(set(digests), key=attrgetter("value")):
            reason = self._find_object(digest)
            if isinstance(reason, FileNotFoundError):
                self.report.find(missing, path, str(digest))
                self.report.missing_objects += 1
            elif reason is not None:
                self.report.find("object-check-failed", path, str(digest), describe_errno(reason))

    def _find_object(self, digest: Digest) -> OSError | None:
        """Return why an object cannot be opened; each is tried once."""
        if digest not in self._known:
            self._known[digest] = None
            try:
                path = b"objects/" + digest.object_path
                os.close(open_object_file(path, self._repository.fd))
            except OSError as error:
                self._known[digest] = error
        return self._known[digest]

    def _open(self, path: bytes) -> int:
        """Open the regular file that a link leads to; nothing else, devices least of all.

        Raises:
            OSError: as open(2); ``EISDIR``, or ``ENXIO`` as for a socket.
        """
        mode = os.stat(path, dir_fd=self._repository.fd).st_mode
        if not stat.S_ISREG(mode):
            reason = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO
            raise OSError(reason, os.strerror(reason), os.fsdecode(path))
        return open_path(path, _OPEN, dir_fd=self._repository.fd)


def _is_there(path: bytes, dir_fd: int) -> bool:
    try:
        os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _describe_fault(fd: int) -> str | None:
    """Return what composefs-rs says of a file that is no image; None if that depends."""
    size = os.fstat(fd).st_size
    if size < CFS_HEADER.size:
        return "Invalid image: cannot parse header"
    if size < SUPERBLOCK_OFF + SUPERBLOCK.size:
        return "Invalid image: image too small for superblock"
    magic, _, _, blkszbits, _, _, _, _, _, blocks, _, _ = SUPERBLOCK.unpack(
        os.pread(fd, SUPERBLOCK.size, SUPERBLOCK_OFF)
    )
    if blkszbits >= _WORD_BITS:
        return f"Invalid image: blkszbits {blkszbits} >= platform word size {_WORD_BITS}"
    if magic != EROFS_MAGIC:
        return f"Invalid image: bad EROFS magic: expected {EROFS_MAGIC:#x}, got {magic:#x}"
    return "Offset out of bounds" if size < blocks << blkszbits else None
