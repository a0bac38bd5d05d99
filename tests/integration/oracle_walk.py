"""Mount an image with the kernel, and say where another mount of it differs.

``oracle_walk.py IMAGE OBJECTS OTHER SCRATCH``, as root in a private mount namespace, which takes
the mounts away when it ends.  Prints one line per difference.  A program of its own, standard
library only: it starts once per image.

Differences that overlayfs causes, and what is done about them:

- a whiteout (format 2) is listed in every directory but the root, though lookup says ENOENT:
  such names are taken out of the kernel's listing;
- a file with a size but neither content nor object: overlayfs gives EIO on lookup already, we
  on open (spec erofs-image 10.3): only that is checked;
- link count of directories: overlayfs says 1;
- inode and device numbers are its own; which names share an inode is compared;
- ``st_blocks`` is the object's in overlayfs.
"""

import errno
import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

Facts = dict[str, Any]


def walk(top: bytes) -> Iterator[tuple[bytes, Facts]]:
    """Yield path and facts of everything below ``top``."""
    first_names: dict[int, bytes] = {}
    stack = [b""]
    while stack:
        path = stack.pop()
        facts = look(top + path)
        if facts.get("error") == "ENOENT":
            continue  # a whiteout, listed but not there
        if "ino" in facts:
            facts["same inode as"] = first_names.setdefault(facts.pop("ino"), path)
        names = facts.pop("names", [])
        yield path, facts
        stack.extend(path + b"/" + name for name in sorted(names, reverse=True))


def look(path: bytes) -> Facts:
    """Return what can be seen of one path."""
    try:
        status = os.lstat(path)
    except OSError as error:
        return {"error": errno.errorcode[error.errno or 0]}
    facts: Facts = {
        "mode": oct(status.st_mode),
        "ids": (status.st_uid, status.st_gid),
        "size": status.st_size,
        "mtime": status.st_mtime_ns,
        "rdev": status.st_rdev,
        "xattrs": xattrs(path),
    }
    if stat.S_ISDIR(status.st_mode):
        facts["names"] = os.listdir(path)
        return facts
    facts["nlink"] = status.st_nlink
    facts["ino"] = status.st_ino
    if stat.S_ISLNK(status.st_mode):
        facts["target"] = os.readlink(path)
    if stat.S_ISREG(status.st_mode):
        facts["content"] = content(path)
    return facts


def xattrs(path: bytes) -> dict[str, object]:
    """Return names with values; a value that is refused is the name of the error."""
    found: dict[str, object] = {}
    for name in os.listxattr(path, follow_symlinks=False):
        try:
            found[name] = os.getxattr(path, name, follow_symlinks=False)
        except OSError as error:
            found[name] = errno.errorcode[error.errno or 0]
    return found


def content(path: bytes) -> str:
    """Return size and digest of the bytes that reading gives, or the error."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}"


def differences(kernel: dict[bytes, Facts], ours: dict[bytes, Facts]) -> Iterator[str]:
    """Yield a line for every path and fact that differs."""
    for path in sorted(kernel.keys() | ours.keys()):
        theirs, facts = kernel.get(path), ours.get(path)
        if theirs == facts:
            continue
        if theirs is None or facts is None:
            yield f"{path!r}: only in the {'FUSE' if theirs is None else 'kernel'} mount"
        elif theirs == {"error": "EIO"}:
            if facts.get("content") != "EIO":
                yield f"{path!r}: kernel EIO, FUSE {facts}"
        else:
            for key in sorted(theirs.keys() | facts.keys()):
                if theirs.get(key) != facts.get(key):
                    yield f"{path!r}: {key}: kernel {theirs.get(key)!r}, FUSE {facts.get(key)!r}"


def mount_kernel(image: str, objects: str, scratch: str) -> str:
    """Mount image and overlay below ``scratch``; return the place."""
    lower, top = scratch + "/erofs", scratch + "/overlay"
    for place in (lower, top):
        os.makedirs(place, exist_ok=True)
    subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", image, lower], check=True)
    options = f"ro,metacopy=on,redirect_dir=follow,lowerdir={lower}::{objects}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", top], check=True)
    return top


def main() -> None:
    """Compare, print."""
    image, objects, other, scratch = sys.argv[1:]
    kernel = dict(walk(os.fsencode(mount_kernel(image, objects, scratch))))
    ours = dict(walk(os.fsencode(other)))
    sys.stdout.write(f"{len(kernel)} paths\n")
    for line in differences(kernel, ours):
        sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
