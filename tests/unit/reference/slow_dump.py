"""A slow, obvious printer of the tree view, as C's ``composefs-info dump`` (spec 7.7)."""

import stat

from cfs.inodes import Ino, InodeVector

_NAMED = {ord("\\"): b"\\\\", ord("\n"): b"\\n", ord("\r"): b"\\r", ord("\t"): b"\\t"}


def _escape(text: bytes, also: bytes = b"") -> bytes:
    return b"".join(
        _NAMED.get(byte)
        or (bytes([byte]) if 0x21 <= byte <= 0x7E and byte not in also else b"\\x%02x" % byte)
        for byte in text
    )


def _field(text: bytes | None) -> bytes:
    if not text:
        return b"-"
    return rb"\x2d" if text == b"-" else _escape(text)


def slow_dump(vector: InodeVector) -> bytes:
    first: dict[Ino, bytes] = {}
    lines = []
    for path, ino in vector.walk():
        mode = int(vector.mode[ino])
        payload, content, link = vector.object_path(ino), None, b""
        if stat.S_ISLNK(mode):
            payload = vector.content(ino)
        elif stat.S_ISREG(mode):
            content = vector.content(ino)
        if not stat.S_ISDIR(mode) and ino in first:
            payload, link = first[ino], b"@"
        first.setdefault(ino, path)
        digest = vector.digest(ino)
        fields = [
            _escape(path),
            b"%d" % vector.size[ino],
            link + b"%o" % mode,
            b"%d %d %d %d"
            % (vector.nlink[ino], vector.uid[ino], vector.gid[ino], vector.rdev[ino]),
            b"%d.%d" % (vector.mtime_sec[ino], vector.mtime_nsec[ino]),
            _field(payload),
            _field(content),
            str(digest).encode() if digest else b"-",
        ]
        fields += [
            _escape(name, b"=") + b"=" + _escape(value, b"=")
            for name, value in vector.xattrs(ino).items()
        ]
        lines.append(b" ".join(fields) + b"\n")
    return b"".join(lines)
