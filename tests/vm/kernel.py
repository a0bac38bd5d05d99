"""The guest's kernel: fetched from Debian by a private apt, unpacked once into the cache.

``python -m tests.vm.kernel`` does that ahead; ``scripts/setup`` calls it.
"""

import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.vm.cache import CACHE, Unavailable, made_once

PACKAGE = "linux-image-cloud-amd64"
SUITES = ("trixie", "bookworm-backports")  # both have Linux 6.12
MODULES = ("virtio_blk", "erofs", "overlay", "loop")
_RELEASES = {"bookworm", "trixie", "oldstable", "stable", "testing", "sid", "unstable"}
_KEYRINGS = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")
_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel to boot; ``modules`` holds files ``NN-NAME.ko`` in the order of their loading."""

    image: Path
    modules: Path


def get_kernel() -> Kernel:
    """Return the kernel, fetched if the cache has none.

    Raises:
        Unavailable: no apt, no network, another machine.
    """
    directory = made_once(CACHE / "kernel", _fetch)
    return Kernel(directory / "vmlinuz", directory / "modules")


def _fetch(target: Path) -> None:
    if platform.machine() != "x86_64":
        raise Unavailable(f"no {PACKAGE} for {platform.machine()}")
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise Unavailable("no apt to fetch a kernel with")
    complaints = []
    for suite in SUITES:
        for site in debian_sites():
            with tempfile.TemporaryDirectory(prefix="cfs-apt-") as scratch:
                try:
                    package = _download(Path(scratch), site, suite)
                except subprocess.CalledProcessError as error:
                    complaints.append(f"{suite}: {last_line(error.stderr)}")
                    continue
                root = Path(scratch) / "root"
                subprocess.run(["dpkg-deb", "-x", package, root], check=True, timeout=_SECONDS)
                _unpack(root, target)
                return
    raise Unavailable(f"cannot fetch {PACKAGE}: {'; '.join(complaints) or 'no Debian sources'}")


def source_line(site: str, suite: str) -> str:
    """Return the line of a ``sources.list``."""
    keyrings = [path for name in _KEYRINGS if (path := Path("/usr/share/keyrings", name)).exists()]
    signed = f"[signed-by={keyrings[0]}] " if keyrings else ""
    return f"deb {signed}{site} {suite} main"


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def debian_sites() -> list[str]:
    """Where this machine's apt gets Debian from."""
    form = "$(SITE) $(RELEASE) $(COMPONENT)"
    command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SECONDS)
    lines = (line.split() for line in done.stdout.splitlines())
    sites = [
        line[0] for line in lines if len(line) == 3 and line[1] in _RELEASES and line[2] == "main"
    ]
    return list(dict.fromkeys(sites))


def _download(scratch: Path, site: str, suite: str) -> Path:
    """Fetch the package with lists, cache and state of our own; needs no rights."""
    for name in ("lists/partial", "archives/partial"):
        (scratch / name).mkdir(parents=True)
    (scratch / "status").touch()
    (scratch / "sources.list").write_text(f"{source_line(site, suite)}\n")
    settings = {
        "Dir::State": scratch,
        "Dir::State::lists": scratch / "lists",
        "Dir::State::status": scratch / "status",
        "Dir::Cache": scratch,
        "Dir::Etc::sourcelist": scratch / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "APT::Architecture": "amd64",
        "APT::Architectures": "amd64",
        "APT::Sandbox::User": "",
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
    }
    (scratch / "apt.conf").write_text(
        "".join(f'{name} "{value}";\n' for name, value in settings.items())
    )

    def apt(*command: str) -> str:
        return subprocess.run(
            command,
            cwd=scratch,
            env={**os.environ, "APT_CONFIG": str(scratch / "apt.conf"), "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=True,
            timeout=_SECONDS,
        ).stdout

    apt("apt-get", "-qq", "update")
    depends = apt("apt-cache", "depends", "--no-recommends", PACKAGE)
    (image,) = re.findall(r"Depends: (linux-image-\S+)", depends)
    apt("apt-get", "-qq", "download", image)
    (package,) = scratch.glob("*.deb")
    return package


def _unpack(root: Path, target: Path) -> None:
    (image,) = root.glob("boot/vmlinuz-*")
    shutil.copyfile(image, target / "vmlinuz")
    found = {path.name.partition(".ko")[0]: path for path in root.rglob("*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in found:  # not found: built in
            return
        content = found[name].read_bytes()
        if found[name].suffix == ".xz":
            content = lzma.decompress(content)
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in depends[1].decode().split(",") if depends else ():
            add(needed)
        ordered[name] = content

    for name in MODULES:
        add(name)
    (target / "modules").mkdir()
    for number, (name, content) in enumerate(ordered.items()):
        (target / "modules" / f"{number:02}-{name}.ko").write_bytes(content)


if __name__ == "__main__":
    try:
        get_kernel()
    except Unavailable as error:
        sys.exit(f"tests.vm: {error}")
