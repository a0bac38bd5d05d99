"""Dumpfile to tree (spec erofs-image 7.1 to 7.6, 7.9, 7.10).

One pass over the lines, then one over the hard links, which may come before their targets.
Errors name line and field; where the C tool has words for a mistake they are its words, since
scripts look for them.  Nothing here recurses: depth and chains are bounded by memory only.
"""

import re
import stat
from functools import lru_cache
from typing import NamedTuple

from cfs.digest import Digest
from cfs.dumpfile.escapes import escape, unescape
from cfs.errors import FormatError
from cfs.tree import Directory, Inode, Link, Regular, Special, Symlink

__all__ = ["parse_dumpfile"]

NAME_SIZE_MAX = 255
TARGET_SIZE_MAX = 4095
CONTENT_SIZE_MAX = 5000
EXTERNAL_SIZE_MAX = 1 << 53
XATTR_KEY_SIZE_MAX = 255
XATTR_VALUE_SIZE_MAX = 65535
XATTR_AREA_SIZE_MAX = 32767
XATTR_FIELDS_SIZE_MAX = 65535

_NR_FIELDS = 11  # before the xattrs
_DIGITS_MAX = 32  # far beyond 2^64, within what int() takes
_OCTAL = re.compile(rb"[0-7]{1,32}")
_MTIME = re.compile(rb"(-?[0-9]{1,32})\.([0-9]{1,32})")
_TYPES = frozenset(
    (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFCHR,
        stat.S_IFBLK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
    )
)
_U32_MAX = (1 << 32) - 1
_U64_MAX = (1 << 64) - 1
_DATE_MAX = (1 << 63) - 1
_NSEC_MAX = 999_999_999
_SHOWN_SIZE_MAX = 80


def parse_dumpfile(data: bytes, *, strict: bool = False) -> Directory:
    """Return the tree that a dumpfile describes.

    Args:
        data: the text; nothing is kept of it.
        strict: also refuse what 7.6 and 7.10 of the specification name: a missing final
            newline, device numbers of others than devices, link sizes that are wrong, content
            of others than regular files, paths with missing or repeated slashes.

    Raises:
        FormatError: with line, field and value.
    """
    if not data:
        msg = "No files in dump file"
        raise FormatError(msg)
    nul_off = data.find(b"\0")
    if nul_off >= 0:
        number = data.count(b"\n", 0, nul_off) + 1
        position = nul_off - (data.rfind(b"\n", 0, nul_off) + 1)
        msg = f"line {number}: Invalid embedded NUL character at position {position}"
        raise FormatError(msg)
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    elif strict:
        msg = f"line {len(lines)}: missing final newline"
        raise FormatError(msg)
    parser = _Parser(strict=strict)
    for number, line in enumerate(lines, 1):
        try:
            parser.add_line(line, number)
        except FormatError as error:
            msg = f"line {number}: {error}"
            raise FormatError(msg) from None
    return parser.finish()


def _show(text: bytes) -> str:
    shown = escape(text[:_SHOWN_SIZE_MAX]).decode()
    return shown if len(text) <= _SHOWN_SIZE_MAX else shown + "..."


@lru_cache(maxsize=4096)
def _parse_number(text: bytes, field: str, maximum: int = _U32_MAX) -> int:
    if text.isdigit() and len(text) <= _DIGITS_MAX:
        value = int(text)
        if value <= maximum:
            return value
    msg = f"{field}: Invalid integer {_show(text)}, expected 0 to {maximum}"
    raise FormatError(msg)


@lru_cache(maxsize=4096)
def _parse_mtime(text: bytes) -> tuple[int, int]:
    match = _MTIME.fullmatch(text)
    if match is None:
        msg = f"MTIME: Invalid integer {_show(text)}, expected seconds.nanoseconds"
        raise FormatError(msg)
    sec, nsec = int(match[1]), int(match[2])
    if not -_DATE_MAX - 1 <= sec <= _DATE_MAX or nsec > _NSEC_MAX:
        msg = (
            f"MTIME: Invalid integer {_show(text)}, expected 64 bits of seconds and "
            f"nanoseconds up to {_NSEC_MAX}"
        )
        raise FormatError(msg)
    return sec, nsec


@lru_cache(maxsize=256)
def _parse_mode(text: bytes) -> int:
    """Return the 16 bits of a mode that are kept."""
    mode = int(text, 8) if _OCTAL.fullmatch(text) else 0
    if stat.S_IFMT(mode & 0xFFFF) not in _TYPES or mode > _U32_MAX:
        msg = f"MODE: Invalid mode {_show(text)}"
        raise FormatError(msg)
    return mode & 0xFFFF


def _decode(text: bytes, field: str, *, nul: bool = False) -> bytes:
    """Undo the escapes of a field; a NUL that was escaped is refused unless ``nul``."""
    try:
        value = unescape(text)
    except FormatError as error:
        msg = f"{field}: {error}: {_show(text)}"
        raise FormatError(msg) from None
    if not nul and b"\0" in value:
        msg = f"{field}: Invalid embedded NUL character in {_show(text)}"
        raise FormatError(msg)
    return value


def _decode_optional(text: bytes, field: str) -> bytes | None:
    return None if text in (b"-", b"") else _decode(text, field)


def _normalize(path: bytes) -> bytes:
    return b"/" + b"/".join(name for name in path.split(b"/") if name)


class _PendingLink(NamedTuple):
    line: int
    target: bytes
    parent: Directory
    name: bytes


def _check_strict(file_type: int, *, rdev: int, content: bytes | None) -> None:
    """Refuse what only strict mode refuses: a device number here, content of no file."""
    if rdev:
        msg = f"RDEV: {rdev} on what is no device, expected 0"
        raise FormatError(msg)
    if content and file_type != stat.S_IFREG:
        msg = f"CONTENT: {len(content)} bytes on what is no regular file, expected -"
        raise FormatError(msg)


class _Parser:
    """The state between lines.

    Attributes:
        directories: by path, the root as nothing.
        links: hard links, by path.
        xattrs: decoded xattrs, by their text.
    """

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self.root: Directory | None = None
        self.directories: dict[bytes, Directory] = {}
        self.links: dict[bytes, _PendingLink] = {}
        self.digests: dict[bytes, Digest] = {}
        self.digest_text_size = 0
        self.xattrs: dict[bytes, tuple[bytes, bytes]] = {}

    def add_line(self, line: bytes, number: int) -> None:
        fields = line.split(b" ")
        if len(fields) < _NR_FIELDS:
            fields += [b""] * (_NR_FIELDS - len(fields))
        path = fields[0]
        if b"\\" in path:
            path = _decode(path, "PATH")
        if path == b"/":
            self._add_root(fields)
            return
        if not path.startswith(b"/") or b"//" in path:
            path = self._repair_path(path)
        parent_path, _, name = path.rpartition(b"/")
        parent = self._find_parent(parent_path, path, name)
        if fields[2].startswith(b"@"):
            target = self._parse_link(fields, path)
            self.links[path] = _PendingLink(number, target, parent, name)
            parent.children[name] = Link(parent)  # keeps the place until all lines are read
            return
        inode = self._parse_inode(fields)
        parent.children[name] = inode
        if type(inode) is Directory:
            self.directories[path] = inode

    def _add_root(self, fields: list[bytes]) -> None:
        if self.root is not None:
            msg = "PATH: Can't have multiple roots"
            raise FormatError(msg)
        is_link = fields[2].startswith(b"@")
        root = None if is_link else self._parse_inode(fields)
        if not isinstance(root, Directory):
            msg = f"MODE: Root must be a directory, found {_show(fields[2])}"
            raise FormatError(msg)
        self.root = self.directories[b""] = root

    def _repair_path(self, path: bytes) -> bytes:
        """Return a path with one slash before each name, as C reads it."""
        if not path:
            msg = "PATH: Invalid empty path"
            raise FormatError(msg)
        if self.strict:
            msg = f"PATH: {_show(path)} does not have one slash before each name"
            raise FormatError(msg)
        repaired = _normalize(path)
        return repaired + b"/" if path.endswith(b"/") and repaired != b"/" else repaired

    def _find_parent(self, parent_path: bytes, path: bytes, name: bytes) -> Directory:
        if self.root is None:
            msg = f"PATH: Root node not present, found {_show(path)}"
            raise FormatError(msg)
        parent = self.directories.get(parent_path)
        if parent is None:
            grand_path, _, parent_name = parent_path.rpartition(b"/")
            grand = self.directories.get(grand_path)
            if grand is not None and parent_name in grand.children:
                msg = f"PATH: Parent must be a directory for {_show(path)}"
            else:
                msg = f"PATH: Parent directory missing for {_show(path)}"
            raise FormatError(msg)
        if name in parent.children or not 0 < len(name) <= NAME_SIZE_MAX:
            found = "exists already" if name in parent.children else f"name of {len(name)} bytes"
            msg = f"PATH: Can't add child {_show(path)}: {found}"
            raise FormatError(msg)
        if name in (b".", b".."):
            msg = f"PATH: Invalid . or .. in path: {_show(path)}"
            raise FormatError(msg)
        return parent

    @staticmethod
    def _parse_link(fields: list[bytes], path: bytes) -> bytes:
        """Return the path that a hard-link line points to."""
        if stat.S_ISDIR(_parse_mode(fields[2][1:])):
            msg = f"MODE: Directories can't be hardlinked, found {_show(fields[2])}"
            raise FormatError(msg)
        target = _decode_optional(fields[8], "PAYLOAD")
        if target is None:
            msg = f"PAYLOAD: No target path for the hardlink {_show(path)}"
            raise FormatError(msg)
        target = _normalize(target)
        if target == path:
            msg = f"PAYLOAD: Self-referential hardlink {_show(path)}"
            raise FormatError(msg)
        return target

    def _parse_inode(self, fields: list[bytes]) -> Inode:
        size_text, mode_text, nlink, uid, gid, rdev, mtime, payload, content, digest = fields[1:11]
        mode = _parse_mode(mode_text)
        file_type = stat.S_IFMT(mode)
        sec, nsec = _parse_mtime(mtime)
        size = _parse_number(size_text, "SIZE", _U64_MAX)
        inode = {
            "mode": mode,
            "uid": _parse_number(uid, "UID"),
            "gid": _parse_number(gid, "GID"),
            "nlink": _parse_number(nlink, "NLINK"),
            "mtime_sec": sec,
            "mtime_nsec": nsec,
        }
        device = _parse_number(rdev, "RDEV")
        is_device = file_type in (stat.S_IFCHR, stat.S_IFBLK)
        data = None if content == b"-" else self._parse_content(content, size)
        if self.strict:
            _check_strict(file_type, rdev=0 if is_device else device, content=data)
        path = None if payload == b"-" else self._parse_payload(payload)
        verity = None if digest in (b"-", b"") else self._parse_digest(digest)
        xattrs = self._parse_xattrs(fields) if len(fields) > _NR_FIELDS else {}
        if file_type == stat.S_IFREG:
            if size > EXTERNAL_SIZE_MAX:
                msg = f"SIZE: File too large: {size}, at most {EXTERNAL_SIZE_MAX}"
                raise FormatError(msg)
            return Regular(
                **inode, xattrs=xattrs, size=size, content=data, payload=path, digest=verity
            )
        if file_type == stat.S_IFDIR:
            return Directory(**inode, xattrs=xattrs, children={})
        if file_type == stat.S_IFLNK:
            target = self._check_target(path, size)
            return Symlink(**inode, xattrs=xattrs, size=len(target), target=target)
        return Special(**inode, xattrs=xattrs, size=size, rdev=device if is_device else 0)

    @staticmethod
    def _parse_content(text: bytes, size: int) -> bytes:
        content = _decode(text, "CONTENT", nul=True)
        if len(content) > CONTENT_SIZE_MAX:
            msg = f"CONTENT: Inline content size {len(content)} exceeds maximum {CONTENT_SIZE_MAX}"
            raise FormatError(msg)
        if len(content) != size:
            msg = f"CONTENT: Invalid content size {len(content)}, must match size {size}"
            raise FormatError(msg)
        return content

    @staticmethod
    def _parse_payload(text: bytes) -> bytes | None:
        payload = _decode(text, "PAYLOAD")
        if len(payload) > TARGET_SIZE_MAX:
            msg = (
                f"PAYLOAD: Invalid symlink or payload: {len(payload)} bytes, "
                f"at most {TARGET_SIZE_MAX}"
            )
            raise FormatError(msg)
        return payload or None

    def _check_target(self, target: bytes | None, size: int) -> bytes:
        if target is None:
            msg = "PAYLOAD: Invalid symlink: no target"
            raise FormatError(msg)
        if self.strict and size != len(target):
            msg = f"SIZE: Invalid symlink: size {size}, target of {len(target)} bytes"
            raise FormatError(msg)
        return target

    def _parse_digest(self, text: bytes) -> Digest:
        digest = self.digests.get(text)
        if digest is not None:
            return digest
        try:
            digest = Digest.parse(text.decode("latin-1"))
        except FormatError as error:
            msg = f"DIGEST: {error}"
            raise FormatError(msg) from None
        if len(text) != (self.digest_text_size or len(text)):
            msg = f"DIGEST: {len(text)} hex digits, {self.digest_text_size} in the lines before"
            raise FormatError(msg)
        self.digest_text_size = len(text)
        self.digests[text] = digest
        return digest

    def _parse_xattrs(self, fields: list[bytes]) -> dict[bytes, bytes]:
        texts = fields[_NR_FIELDS:]
        if not texts[-1]:
            texts.pop()  # one blank at the end of a line is harmless
        if sum(map(len, texts)) + len(texts) - 1 > XATTR_FIELDS_SIZE_MAX:
            msg = f"xattrs: Too many xattrs: more than {XATTR_FIELDS_SIZE_MAX} bytes"
            raise FormatError(msg)
        known = self.xattrs
        xattrs = dict([known.get(text) or self._parse_xattr(text) for text in texts])
        area_size = 12 + sum([7 + len(key) + len(value) for key, value in xattrs.items()])
        if area_size > XATTR_AREA_SIZE_MAX:
            msg = f"xattrs: Can't set xattr: {area_size} bytes, at most {XATTR_AREA_SIZE_MAX}"
            raise FormatError(msg)
        return xattrs

    def _parse_xattr(self, text: bytes) -> tuple[bytes, bytes]:
        escaped_key, equals, escaped_value = text.partition(b"=")
        if not equals:
            msg = f"xattrs: Missing = in xattr {_show(text)}"
            raise FormatError(msg)
        key = _decode(escaped_key, "xattrs")
        value = _decode(escaped_value, "xattrs", nul=True)
        if not 0 < len(key) <= XATTR_KEY_SIZE_MAX or len(value) > XATTR_VALUE_SIZE_MAX:
            msg = (
                f"xattrs: Can't set xattr {_show(key)}: key of {len(key)} bytes, expected 1 to "
                f"{XATTR_KEY_SIZE_MAX}, value of {len(value)}, at most {XATTR_VALUE_SIZE_MAX}"
            )
            raise FormatError(msg)
        self.xattrs[text] = key, value
        return key, value

    def finish(self) -> Directory:
        """Resolve the hard links and return the root."""
        if self.root is None:
            msg = "Root node not present"
            raise FormatError(msg)
        resolved: dict[bytes, Inode] = {}
        for path in self.links:
            self._resolve(path, resolved)
        return self.root

    def _resolve(self, path: bytes, resolved: dict[bytes, Inode]) -> None:
        """Give the inode at the end of a chain of links to all links of the chain."""
        chain: dict[bytes, _PendingLink] = {}
        line = 0
        while path in self.links and path not in resolved:
            link = chain[path] = self.links[path]
            line, path = link.line, link.target
            if path in chain:
                msg = f"line {line}: PAYLOAD: Self-referential hardlink {_show(path)}"
                raise FormatError(msg)
        inode = resolved[path] if path in resolved else self._find_target(path, line)
        for name, link in chain.items():
            resolved[name] = inode
            link.parent.children[link.name] = Link(inode)

    def _find_target(self, path: bytes, line: int) -> Inode:
        parent_path, _, name = path.rpartition(b"/")
        parent = self.directories.get(parent_path)
        target = None if parent is None else parent.children.get(name)
        if path == b"/" or isinstance(target, Directory):
            msg = f"line {line}: PAYLOAD: Directories can't be hardlinked: {_show(path)}"
            raise FormatError(msg)
        if not isinstance(target, Inode):
            msg = f"line {line}: PAYLOAD: No target at {_show(path)} for hardlink"
            raise FormatError(msg)
        return target
