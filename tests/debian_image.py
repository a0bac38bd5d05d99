"""A real image: Debian's essential packages, and layers that change what is below them.

``python -m tests.debian_image`` makes it ahead; ``scripts/setup`` calls it.  It is kept in the
cache, so tests must not write to it.
"""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.vm.cache import CACHE, Unavailable, made_once
from tests.vm.kernel import debian_sites, last_line, source_line

TAG = "debian"
SUITE = "bookworm"
_RECIPE = 1  # counts up when what is made here changes
_SECONDS = 900
_EXCLUDED = ("doc", "info", "locale", "man")
_TIME = 1700000000
_CAP_NET_RAW = "\1\0\0\2\0\x20\0\0" + "\0" * 12  # struct vfs_cap_data, revision 2, effective
_LONG = "/".join(["a-name-of-some-length"] * 9)  # no header of a tar has room for it


def get_debian_image() -> Path:
    """Return an OCI layout with one image, ``TAG``, made if the cache has none.

    Raises:
        Unavailable: programs, rights or network are missing.
    """
    return made_once(CACHE / f"debian-image-{_RECIPE}", _make) / "layout"


def _make(target: Path) -> None:
    missing = [name for name in ("mmdebstrap", "umoci") if not shutil.which(name)]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} not installed")
    if os.geteuid() != 0:
        raise Unavailable("the Debian image is made by root")
    with tempfile.TemporaryDirectory(prefix="cfs-debian-") as name:
        scratch = Path(name)
        _bootstrap(scratch / "root.tar")
        _write_additions(scratch / "additions.tar")
        _write_removals(scratch / "removals.tar")
        image = f"--image={target / 'layout'}:{TAG}"
        try:
            _run("umoci", "init", f"--layout={target / 'layout'}")
            _run("umoci", "new", image)
            for layer in ("root", "additions", "removals"):
                _run("umoci", "raw", "add-layer", image, str(scratch / f"{layer}.tar"))
            _run("umoci", "unpack", image, str(scratch / "bundle"))
            _change(scratch / "bundle" / "rootfs" / "opt" / "app")
            _run("umoci", "repack", image, str(scratch / "bundle"))
            _run("umoci", "gc", f"--layout={target / 'layout'}")
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"umoci: {last_line(error.stderr)}") from error


def _bootstrap(archive: Path) -> None:
    complaint = "no Debian sources"
    for site in debian_sites() if shutil.which("apt-get") else ():
        options = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _EXCLUDED]
        try:
            _run(
                "mmdebstrap", "--quiet", "--variant=essential", *options,
                SUITE, str(archive), source_line(site, SUITE),
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            complaint = last_line(error.stderr)
        else:
            return
    raise Unavailable(f"mmdebstrap: {complaint}")


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)


def _change(app: Path) -> None:
    """Make what umoci makes a layer of; ``umoci insert`` cannot, its tars have no end."""
    (app / "file-20").unlink()
    (app / "by-umoci").write_text("by umoci\n" * 10)
    os.link(app / "by-umoci", app / "by-umoci-too")
    os.setxattr(app / "file-21", "security.capability", _CAP_NET_RAW.encode())
    (app / "file-22").chmod(0o4711)


class _Layer:
    """A tar whose entries are named in order."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive

    def add(
        self,
        path: str,
        content: bytes = b"",
        *,
        kind: bytes = tarfile.REGTYPE,
        mode: int = 0o644,
        owner: tuple[int, int] = (0, 0),
        target: str = "",
        device: tuple[int, int] = (0, 0),
        pax: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        entry = tarfile.TarInfo(path)
        entry.type, entry.mode, entry.mtime, entry.linkname = kind, mode, _TIME, target
        entry.uid, entry.gid = owner
        entry.devmajor, entry.devminor = device
        entry.size = len(content)
        entry.pax_headers = dict(pax)
        self._archive.addfile(entry, io.BytesIO(content))

    def add_directory(self, path: str, mode: int = 0o755) -> None:
        self.add(path, kind=tarfile.DIRTYPE, mode=mode)

    def link(self, path: str, target: str, *, hard: bool = False) -> None:
        self.add(path, kind=tarfile.LNKTYPE if hard else tarfile.SYMTYPE, mode=0o777, target=target)


def _write_additions(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        layer = _Layer(archive)
        layer.add_directory("opt")
        layer.add_directory("opt/app")
        for number in range(40):
            layer.add(f"opt/app/file-{number}", f"{number}\n".encode() * number * number)
        layer.add("opt/app/ping", b"#!/bin/sh\n" * 20, mode=0o755,
                  pax={"SCHILY.xattr.security.capability": _CAP_NET_RAW})  # fmt: skip
        extended = {"mtime": f"{_TIME}.123456789", "SCHILY.xattr.user.mark": "of a user"}
        layer.add("opt/app/marked", b"small", owner=(1000, 100_000), pax=extended)
        layer.add("opt/app/setuid", b"x" * 100, mode=0o4755)
        layer.add("opt/app/empty", mode=0)
        layer.link("opt/app/ping-too", "opt/app/ping", hard=True)
        layer.link("opt/app/os-release", "usr/lib/os-release", hard=True)  # of the layer below
        layer.link("opt/app/nowhere", "not/there/" + _LONG)
        layer.add("opt/app/fifo", kind=tarfile.FIFOTYPE)
        layer.add("opt/app/null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3))
        layer.add("opt/app/größe", b"a name that is no ASCII")
        long = "opt/app"
        for part in _LONG.split("/"):
            long += f"/{part}"
            layer.add_directory(long)
        layer.add(f"{long}/deep", b"deep" * 1000)
        for name in ("removed", "opaque", "becomes-a-file"):
            layer.add_directory(f"opt/app/{name}")
            layer.add_directory(f"opt/app/{name}/inner")
            layer.add(f"opt/app/{name}/inner/file", name.encode() * 100)
        layer.add("opt/app/becomes-a-directory", b"a file")
        layer.add_directory("run")
        layer.add("run/left-behind", b"no image keeps this")


def _write_removals(path: Path) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        layer = _Layer(archive)
        for removed in ("file-3", "file-30", "removed", "becomes-a-file", "becomes-a-directory"):
            layer.add(f"opt/app/.wh.{removed}", mode=0)
        layer.add("usr/bin/.wh.yes", mode=0)
        layer.add("opt/app/opaque/.wh..wh..opq", mode=0)
        layer.add_directory("opt/app/opaque", mode=0o700)
        layer.add("opt/app/opaque/new", b"n" * 65)
        layer.add("opt/app/becomes-a-file", b"now a file")
        layer.add_directory("opt/app/becomes-a-directory", mode=0o1777)
        layer.add("opt/app/file-7", b"another content, and the capability is gone" * 9, mode=0o600)
        layer.link("opt/app/file-8", "file-7")
        layer.link("opt/app/file-9", "opt/app/file-10", hard=True)


if __name__ == "__main__":
    try:
        get_debian_image()
    except Unavailable as unavailable:
        sys.exit(f"tests.debian_image: {unavailable}")
