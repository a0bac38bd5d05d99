"""The units of the package under a systemd of their own, in a virtual machine.

The agent that runs our commands is a unit, too, with nothing in common with the service but the
host's mounts; what it sees is what a user sees.
"""

import json
import re
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.vm.machine import Done, Machine, Unavailable
from tests.vm.trixie_system import USER, get_system

if TYPE_CHECKING:
    from concurrent.futures import Future

REPOSITORY = "org.composefs.Repository."
SECONDS = 120  # emulated, the service takes a while to start
MAX_EXPOSURE = 6.5  # as systemd counts; 9.6 without any hardening
FORBIDDEN = (
    "PrivateDevices", "PrivateMounts", "PrivateTmp", "ProtectControlGroups", "ProtectHome",
    "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "ProtectSystem",
)  # fmt: skip
AS_USER = (
    f"cd /; export XDG_RUNTIME_DIR=/run/user/{USER} HOME=/srv/user;"
    f" exec setpriv --reuid={USER} --regid={USER} --init-groups sh -euc "
)
# reads a file again and again until told to stop; any error ends it with that status
READER = """
while [ ! -e {stop} ]; do
    cmp -s {mount}/usr/big {mount}/usr/big
    test "$(cat {mount}/usr/small)" = hello
    touch {began}
    sleep 0.5
done
"""


@pytest.fixture(scope="module")
def machine(
    tmp_path_factory: pytest.TempPathFactory,
    root: None,  # noqa: ARG001
    virtual_machine: None,  # noqa: ARG001
    private_mounts: None,  # noqa: ARG001
    overlay: None,  # noqa: ARG001
) -> Iterator[Machine]:
    try:
        system = get_system()
    except Unavailable as error:
        pytest.skip(f"no Debian with systemd to boot: {error}")
    with Machine(tmp_path_factory.mktemp("vm"), system=system) as machine:
        yield machine


def varlinkctl(address: str, method: str, **parameters: Any) -> str:
    words = ["varlinkctl", "call", "--json=short", "--timeout=infinity"]
    return shlex.join([*words, f"unix:{address}", REPOSITORY + method, json.dumps(parameters)])


class Units(NamedTuple):
    """One of the two pairs of units, and whoever calls it."""

    machine: Machine
    is_user: bool

    @property
    def socket(self) -> str:
        return f"/run{f'/user/{USER}' if self.is_user else ''}/composefs/composefs.sock"

    @property
    def plain(self) -> str:
        return "/srv/user/plain" if self.is_user else "/srv/plain"

    @property
    def other(self) -> str:
        return "/srv/user/other" if self.is_user else "/srv/other"

    def start(self, script: str) -> "Future[Done]":
        """Start a script as the user whose units they are, but outside of them."""
        if self.is_user:
            script = AS_USER + shlex.quote(script)
        return self.machine.start("sh", "-euc", script, seconds=SECONDS)

    def shell(self, script: str) -> str:
        return self.start(script).result().check()

    def systemctl(self, words: str) -> str:
        return self.shell(f"systemctl {'--user' if self.is_user else ''} {words}").strip()

    def show(self, name: str) -> str:
        return self.systemctl(f"show --value --property={name} composefs.service")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.call_at(self.socket, method, **parameters)

    def call_at(self, address: str, method: str, **parameters: Any) -> dict[str, Any]:
        """Call any service."""
        reply: dict[str, Any] = json.loads(
            self.shell(varlinkctl(address, method, **parameters)) or "{}"
        )
        return reply

    @property
    def store(self) -> str:
        return "/srv/user/.var/lib/composefs" if self.is_user else "/sysroot/composefs"

    def open(self) -> int:
        handle: int = self.call("OpenRepository", path=self.store)["handle"]
        return handle

    def serve(self, handle: int, mountpoint: str, **options: object) -> dict[str, Any]:
        reply = self.call(
            "FuseServe",
            handle=handle,
            image="refs/demo",
            mountpoint=mountpoint,
            wait=False,
            options=options,
        )
        mount: dict[str, Any] = reply["mount"]
        assert mount["state"] == "Serving"
        return mount

    def mounts(self) -> list[dict[str, Any]]:
        """Return the mounts that serve, without what changes as they are used."""
        found = [mount for mount in self.call("ListMounts")["mounts"] if not mount["error"]]
        return [{**mount, "requests": 0} for mount in found if mount["state"] == "Serving"]

    def check_served(self, *mountpoints: str) -> None:
        script = 'findmnt --mountpoint {0}; test "$(cat {0}/usr/small)" = hello'
        self.shell("\n".join(script.format(mountpoint) for mountpoint in mountpoints))

    def wait_until_gone(self, mountpoint: str) -> None:
        self.shell(f"while findmnt --mountpoint {mountpoint}; do sleep 0.2; done")


@pytest.mark.parametrize("is_user", [False, True], ids=["system", "user"])
def test_units(machine: Machine, *, is_user: bool) -> None:
    units = Units(machine, is_user)
    machine.shell(f"while ! [ -S {units.socket} ]; do sleep 0.2; done", seconds=SECONDS).check()
    units.shell(f"mkdir {units.plain} {units.other}")
    check_start(units)
    check_restart(units)
    check_stop(units)
    if not is_user:
        check_other_user(units)
        check_killed(units)
    # with the socket the service ends for good
    units.systemctl("stop composefs.socket")
    assert units.show("ActiveState") == "inactive"
    assert units.machine.shell(f"test -e {units.socket}").status != 0
    check_nothing_is_left(machine)


def check_start(units: Units) -> None:
    """The service starts with the first call, and what it mounts is seen from outside."""
    assert units.show("ActiveState") == "inactive"
    handle = units.open()
    assert units.show("ActiveState") == "active"
    units.serve(handle, units.plain, mode="Fuse")
    units.serve(handle, units.other)
    units.check_served(units.plain, units.other)
    assert [mount["mount_id"] for mount in units.mounts()] == [1, 2]
    assert int(units.show("NFileDescriptorStore")) > 0
    if not units.is_user:
        units.shell("mkdir /srv/kernel; cfsctl --connect mount demo /srv/kernel")
        units.check_served("/srv/kernel")
        units.shell("umount /srv/kernel")


def check_restart(units: Units) -> None:
    """Those who read notice neither a restart nor a kill, and the mounts keep their numbers."""
    before, pid = units.mounts(), units.show("MainPID")
    words = {"began": f"/tmp/began-{units.is_user}", "stop": f"/tmp/stop-{units.is_user}"}
    reader = units.start(READER.format(mount=units.plain, **words))
    units.systemctl("restart composefs.service")
    units.check_served(units.plain, units.other)
    assert units.mounts() == before
    assert units.show("MainPID") != pid
    units.systemctl("kill --kill-whom=main --signal=KILL composefs.service")
    assert units.mounts() == before
    units.check_served(units.plain, units.other)
    assert units.show("NRestarts") == "1"
    units.machine.shell(f"test -e {words['began']}; touch {words['stop']}").check()
    assert reader.result(SECONDS).status == 0


def check_stop(units: Units) -> None:
    """One is unmounted by its number, the other one by the stop; the next service knows neither."""
    units.call("Unmount", mount_id=1)
    units.wait_until_gone(units.plain)
    assert [mount["mount_id"] for mount in units.mounts()] == [2]
    units.check_served(units.other)
    units.systemctl("stop composefs.service")
    units.wait_until_gone(units.other)
    assert units.show("NFileDescriptorStore") == "0"
    assert units.show("Result") == "success"
    assert units.mounts() == []


def check_other_user(units: Units) -> None:
    """Who is let in is served with his own rights, which the hardening leaves room for."""
    units.machine.shell(f"chmod 666 {units.socket}").check()
    user = Units(units.machine, is_user=True)
    asked = user.start(varlinkctl(units.socket, "OpenRepository", path="/root")).result()
    assert b"RepoNotFound" in asked.stderr
    handle = user.call_at(units.socket, "OpenRepository", path=user.store)["handle"]
    wish = {"handle": handle, "image": "refs/demo", "mountpoint": user.other, "wait": False}
    user.shell(f"mkdir {user.other}")
    number = user.call_at(units.socket, "FuseServe", **wish)["mount"]["mount_id"]
    user.check_served(user.other)
    assert [mount["owner_uid"] for mount in units.mounts()] == [USER]
    user.call_at(units.socket, "Unmount", mount_id=number)
    user.shell(f"rmdir {user.other}")


def check_killed(units: Units) -> None:
    """When all of the unit is killed nobody serves, and the next service takes the mount away."""
    units.serve(units.open(), units.plain)
    units.systemctl("kill --kill-whom=all --signal=KILL composefs.service")
    assert units.mounts() == []
    units.wait_until_gone(units.plain)


def check_nothing_is_left(machine: Machine) -> None:
    left = machine.shell(
        "pgrep --list-full --full cfs.fuse || true; findmnt -t fuse.composefs || true"
    )
    assert left.check() == ""


def test_hardening(machine: Machine) -> None:
    """The unit is hardened, but by nothing that would keep its mounts from the host."""
    table = machine.shell("systemd-analyze security --no-pager composefs.service || true").check()
    exposure = re.search(r"Overall exposure level for composefs.service: ([0-9.]+)", table)
    assert exposure is not None
    assert float(exposure[1]) <= MAX_EXPOSURE, table
    names = " ".join(f"--property={name}" for name in FORBIDDEN)
    shown = machine.shell(f"systemctl show {names} composefs.service").check()
    assert set(shown.split()) == {f"{name}=no" for name in FORBIDDEN}
