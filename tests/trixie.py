"""Debian 13 in a directory: where our package is built and installed, and where varlinkctl is.

Made once for each list of packages and kept in the cache; what runs in it changes a layer of
memory above it.  ``python -m tests.trixie`` makes the usual two ahead; ``scripts/setup`` calls it.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.paths import CHECKOUT
from tests.vm.cache import CACHE, Unavailable, made_once
from tests.vm.kernel import debian_sites, last_line, source_line

SUITE = "trixie"
# what our package depends on, and systemd with what it needs to care for users
SYSTEM = (
    "dbus",
    "fuse3",
    "init-system-helpers",
    "libc6",
    "libfsverity0",
    "libpam-systemd",
    "mount",
    "python3",
    "python3-cffi-backend",
    "python3-click",
    "python3-isal",
    "python3-numpy",
    "python3-pyfuse3",
    "python3-varlink",
    "python3-xxhash",
    "python3-zstandard",
    "systemd",
)
_SECONDS = 900
_OPTIONS = ("--variant=apt", "--aptopt=Acquire::Retries 2", "--aptopt=Acquire::http::Timeout 30")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# arguments: base, scratch directory, number of bind mounts, their sources and targets, the command
_ENTER = """
set -eu
base=$1 scratch=$2 count=$3
shift 3
mount -t tmpfs -o mode=755 none "$scratch"
mkdir "$scratch/upper" "$scratch/work" "$scratch/system"
mount -t overlay -o "lowerdir=$base,upperdir=$scratch/upper,workdir=$scratch/work" none \
    "$scratch/system"
while [ "$count" -gt 0 ]; do
    mkdir -p "$scratch/system$2"
    mount --bind "$1" "$scratch/system$2"
    shift 2
    count=$((count - 1))
done
mount --rbind /dev "$scratch/system/dev"
mount -t proc proc "$scratch/system/proc"
exec chroot "$scratch/system" /bin/sh -euc "$1"
"""


_failures: dict[str, str] = {}


def get_trixie(packages: Iterable[str]) -> Path:
    """Return the root directory of a minimal system with these packages; not to be written to.

    Raises:
        Unavailable: programs, rights or network are missing.
    """
    names = sorted({"ca-certificates", *packages})
    key = hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]
    if key in _failures:  # it may have taken minutes
        raise Unavailable(_failures[key])
    try:
        return made_once(CACHE / f"{SUITE}-{key}", lambda target: _make(target, names)) / "root"
    except Unavailable as error:
        _failures[key] = str(error)
        raise


def build_dependencies() -> list[str]:
    """Return what our package is built with."""
    control = (CHECKOUT / "packaging" / "debian" / "control").read_text()
    text = control.partition("\nBuild-Depends:")[2].partition("\n\n")[0]
    names = re.findall(r"^ ([a-z0-9.+-]+)", text, re.MULTILINE)
    virtual = {"debhelper-compat": "debhelper", "dh-sequence-python3": "dh-python"}
    return ["build-essential", *(virtual.get(name, name) for name in names)]


def _make(target: Path, names: list[str]) -> None:
    if not shutil.which("mmdebstrap"):
        raise Unavailable("mmdebstrap not installed")
    if os.geteuid() != 0:
        raise Unavailable("a Debian system is made by root")
    complaint = "no Debian sources"
    for site in debian_sites() if shutil.which("apt-get") else ():
        root = target / "root"
        command = ["mmdebstrap", "--quiet", *_OPTIONS]
        try:
            subprocess.run(
                [*command, f"--include={','.join(names)}", SUITE, root, source_line(site, SUITE)],
                capture_output=True,
                text=True,
                check=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            complaint = f"not done after {_SECONDS} s"
        except subprocess.CalledProcessError as error:
            complaint = last_line(error.stderr)
        else:
            return
        shutil.rmtree(root, ignore_errors=True)
    raise Unavailable(f"mmdebstrap: {complaint}")


def run_in(
    root: Path, scratch: Path, script: str, binds: Mapping[Path, str]
) -> subprocess.CompletedProcess[str]:
    """Run a shell script in such a system; nothing of it stays, but what it wrote to ``binds``.

    Args:
        root: of the system.
        scratch: empty directory.
        script: for ``sh -eu``.
        binds: directories that the script sees, and where.
    """
    pairs = [str(part) for pair in binds.items() for part in pair]
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"]
    words = ["sh", str(root), str(scratch), str(len(binds)), *pairs, script]
    return subprocess.run(
        [*namespaces, "/bin/sh", "-c", _ENTER, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
        env={"PATH": _PATH, "HOME": "/tmp", "LANG": "C.UTF-8"},
    )


def main() -> None:
    """Make the roots that tests need ahead."""
    try:
        get_trixie(SYSTEM)
        get_trixie(build_dependencies())
    except Unavailable as error:
        sys.exit(f"tests.trixie: {error}")


if __name__ == "__main__":
    main()
