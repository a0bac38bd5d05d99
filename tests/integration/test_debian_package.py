"""The Debian package is built in trixie, and installed where nothing but its dependencies is."""

import subprocess
from pathlib import Path

import pytest

from tests.debian_package import get_package
from tests.trixie import SYSTEM, get_trixie, run_in
from tests.vm.cache import Unavailable

# what a user does first; every line must succeed
CHECKS = """
dpkg --install /old/composefs.deb
dpkg --install /out/cfs_*.deb
test "$(dpkg-query --show --showformat='${db:Status-Status}' composefs)" != installed
test ! -e /usr/bin/of-composefs
test -z "$(dpkg --verify cfs)"
test -L /etc/systemd/system/sockets.target.wants/composefs.socket
test -L /etc/systemd/user/sockets.target.wants/composefs.socket
test -z "$(find /etc/systemd -name composefs.service)"
cfsctl --version
mount.composefs -h
test "$(command -v mount.composefs)" = /usr/sbin/mount.composefs
test "$(command -v mount.fuse.composefs)" = /usr/sbin/mount.fuse.composefs
mkdir -p /tmp/tree/usr /tmp/mountpoint
echo hello >/tmp/tree/usr/hello
head -c 10000 /dev/zero >/tmp/tree/usr/zeroes
mkcomposefs --digest-store=/tmp/objects /tmp/tree /tmp/image
composefs-info ls /tmp/image | grep zeroes
cfsctl --repo /tmp/store init --insecure
cfsctl --repo /tmp/store create-image /tmp/tree tree
COMPLETE=fish cfsctl -- --repo /tmp/store mount '' | grep ^tree
test "$(COMPLETE=bash cfsctl)" = "$(cat /usr/share/bash-completion/completions/cfsctl.bash)"
cfsctl --repo /tmp/store mount --fuse tree /tmp/mountpoint
cmp /tmp/tree/usr/zeroes /tmp/mountpoint/usr/zeroes
cfsctl umount /tmp/mountpoint
varlinkctl validate-idl /usr/share/varlink/org.composefs.Repository.varlink
varlinkctl call exec:/usr/bin/cfsctl org.composefs.Oci.GetInfo '{}' | grep splitdirfdstream-v0
python3 -c 'import sys, cfs; assert sys.version_info[:2] == (3, 13)'
systemd-analyze --man=no verify /usr/lib/systemd/system/composefs.*
XDG_RUNTIME_DIR=/tmp systemd-analyze --man=no --user verify /usr/lib/systemd/user/composefs.*
test -e /usr/share/man/man1/cfsctl-oci-pull.1.gz
grep mkcomposefs /usr/share/bash-completion/completions/mkcomposefs.bash
dpkg --purge cfs
test -z "$(find /etc /usr /var/lib/systemd -name '*composefs*' -o -name cfs -o -name 'cfsctl*')"
"""


def make_old_package(directory: Path) -> None:
    """A package called composefs, with a file that ours has, too."""
    tree = directory / "tree"
    for name in ("mkcomposefs", "of-composefs"):
        (tree / "usr" / "bin").mkdir(parents=True, exist_ok=True)
        (tree / "usr" / "bin" / name).touch()
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: composefs\nVersion: 1.0.8-1\nArchitecture: all\nMaintainer: x <x@example.org>\n"
        "Description: stands for the package of this name\n"
    )
    build = ["dpkg-deb", "--build", "--root-owner-group", str(tree), f"{directory}/composefs.deb"]
    subprocess.run(build, check=True, capture_output=True)


@pytest.mark.usefixtures("root", "fuse", "private_mounts", "overlay")
def test_the_package_is_built_and_works(tmp_path: Path) -> None:
    scratch, old = tmp_path / "scratch", tmp_path / "old"
    for directory in (scratch, old):
        directory.mkdir()
    make_old_package(old)
    try:
        package = get_package()
        clean = get_trixie(SYSTEM)
    except Unavailable as error:
        pytest.skip(str(error))
    done = run_in(clean, scratch, f"set -x\n{CHECKS}", {package.parent: "/out", old: "/old"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
