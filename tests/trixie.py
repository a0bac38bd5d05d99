"""Debian 13 in a directory: where our package is built and installed, and where varlinkctl is.

Made once for each list of packages and kept in the cache; what runs in it changes a layer of
memory above it.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.vm.cache import CACHE, Unavailable, made_once
from tests.vm.kernel import debian_sites, last_line, source_line

SUITE = "trixie"
_SECONDS = 900
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


def get_trixie(packages: Iterable[str]) -> Path:
    """Return the root directory of a minimal system with these packages; not to be written to.

    Raises:
        Unavailable: programs, rights or network are missing.
    """
    names = sorted({"ca-certificates", *packages})
    key = hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]
    return made_once(CACHE / f"{SUITE}-{key}", lambda target: _make(target, names)) / "root"


def _make(target: Path, names: list[str]) -> None:
    if not shutil.which("mmdebstrap"):
        raise Unavailable("mmdebstrap not installed")
    if os.geteuid() != 0:
        raise Unavailable("a Debian system is made by root")
    complaint = "no Debian sources"
    for site in debian_sites() if shutil.which("apt-get") else ():
        root = target / "root"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(names)}"]
        done = subprocess.run(
            [*command, SUITE, str(root), source_line(site, SUITE)],
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
        )
        if done.returncode == 0:
            return
        complaint = last_line(done.stderr)
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
