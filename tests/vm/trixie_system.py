"""Debian 13 with systemd and our package, as a machine boots it.

The disk is the package installed into :func:`tests.trixie.get_trixie`; what is written goes to
memory.  It boots to ``test.target``: the sockets, a bus, logind and the agent, and as little else
as possible, for emulated each unit takes its time.
"""

import tempfile
from pathlib import Path

from tests.debian_package import get_package
from tests.trixie import SYSTEM, get_trixie, run_in
from tests.vm.cache import Unavailable
from tests.vm.disks import cached, get_initramfs, make_erofs
from tests.vm.kernel import get_kernel
from tests.vm.machine import System

__all__ = ["USER", "get_system"]

USER = 1000
_HERE = Path(__file__).parent
# /dev/fuse is open to everybody on any machine with udev
_INIT = """#!/bin/busybox sh
export PATH=/bin
busybox mount -t devtmpfs none /dev
exec </dev/console >/dev/console 2>&1
for module in /modules/*; do busybox insmod $module; done
busybox chmod 666 /dev/fuse
busybox mkdir /memory /disk
busybox mount -t tmpfs none /memory
busybox mkdir /memory/upper /memory/work
busybox mount -t erofs /dev/vda /disk
busybox mount -t overlay -o lowerdir=/disk,upperdir=/memory/upper,workdir=/memory/work none /new
busybox mount --move /dev /new/dev
exec busybox switch_root /new /usr/lib/systemd/systemd
"""
# The stores are made here, where nothing is emulated.
_INSTALL = f"""
dpkg --install /package/cfs_*.deb
useradd --create-home --home-dir /srv/user --uid {USER} user
mkdir -p /tree/usr /sysroot /var/lib/systemd/linger
echo hello >/tree/usr/small
head -c 300000 /dev/urandom >/tree/usr/big
make_store() {{
    cfsctl --repo "$1" init --insecure
    cfsctl --repo "$1" create-image --no-propagate-usr-to-root /tree demo
}}
make_store /sysroot/composefs
mkdir -p /srv/user/.var/lib
make_store /srv/user/.var/lib/composefs
chown -R user:user /srv/user
touch /var/lib/systemd/linger/user
cp /helpers/agent.py /usr/lib/agent.py
cat >/etc/systemd/system/agent.service <<'END'
[Unit]
Description=runs the commands of the tests
[Service]
ExecStart=/bin/sh -c 'exec python3 /usr/lib/agent.py /dev/vport*'
Environment=LC_ALL=C.UTF-8 OPENBLAS_NUM_THREADS=1 HOME=/root
END
cat >/etc/systemd/system/test.target <<'END'
[Unit]
Requires=basic.target agent.service systemd-logind.service
After=basic.target
END
ln -sf test.target /etc/systemd/system/default.target
systemctl mask systemd-pcrphase-sysinit.service systemd-random-seed.service \\
    systemd-update-done.service systemd-journal-flush.service systemd-firstboot.service \\
    systemd-sysusers.service ldconfig.service systemd-journal-catalog-update.service \\
    systemd-machine-id-commit.service systemd-networkd-wait-online.service getty.target \\
    systemd-modules-load.service systemd-hostnamed.socket systemd-creds.socket \\
    systemd-sysext.socket systemd-initctl.socket fstrim.timer apt-daily.timer \\
    apt-daily-upgrade.timer dpkg-db-backup.timer systemd-tmpfiles-clean.timer \\
    systemd-binfmt.service proc-sys-fs-binfmt_misc.automount dev-hugepages.mount \\
    dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount modprobe@.service
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
rm -rf /usr/share/doc /usr/share/man /usr/share/locale /var/lib/apt /var/cache/apt
mount --bind / /mnt
cp -a /mnt /out/root
"""


def get_system() -> System:
    """Return what to boot.

    Raises:
        Unavailable: programs, rights or network are missing.
    """
    package = get_package()
    system = get_trixie(SYSTEM)
    agent = _HERE / "agent.py"

    def make(target: Path) -> None:
        binds = {package.parent: "/package", _HERE: "/helpers", target: "/out"}
        with tempfile.TemporaryDirectory() as scratch:
            done = run_in(system, Path(scratch), _INSTALL, binds)
        if done.returncode:
            raise Unavailable((done.stdout + done.stderr)[-2000:])
        for name in ("proc", "sys", "dev", "run", "package", "helpers", "out"):
            (target / "root" / name).mkdir(exist_ok=True)
        make_erofs(target / "root", target / "trixie-system")

    inputs = [package, system, _INSTALL, agent.read_bytes()]
    disk = cached("trixie-system", inputs, make, kept=2)
    return System(get_initramfs(get_kernel(), _INIT), [disk], "systemd.show_status=no")
