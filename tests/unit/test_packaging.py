"""Units, the Debian package and completion scripts: what can be seen without installing them."""

import configparser
import re
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

import pytest

from tests.paths import CHECKOUT

PACKAGING = CHECKOUT / "packaging"
UNITS = sorted((PACKAGING / "systemd").glob("*/*"))
# systemd.exec(5): these make a mount name space, or hide devices
SECLUDING = re.compile(
    r"(Protect(?!Hostname)\w+|Private\w+|ReadWritePaths|ReadOnlyPaths|InaccessiblePaths|ExecPaths"
    r"|NoExecPaths|TemporaryFileSystem|BindPaths|BindReadOnlyPaths|MountFlags|MountImages"
    r"|ExtensionImages|ExtensionDirectories|RootDirectory|RootImage|MountAPIVFS|DynamicUser"
    r"|DeviceAllow|DevicePolicy|LogNamespace|\w+Directory|NetworkNamespacePath|JoinsNamespaceOf)="
)
# in a user's unit these imply NoNewPrivileges=, see there
NO_NEW_PRIVILEGES = re.compile(
    r"(NoNewPrivileges|SystemCall\w+|Restrict\w+|MemoryDenyWriteExecute|LockPersonality"
    r"|CapabilityBoundingSet|AmbientCapabilities|SecureBits|ProtectHostname)="
)


def settings(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if re.match(r"\w+=", line)]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: "-".join(path.parts[-2:]))
def test_units_seclude_no_mount(unit: Path) -> None:
    lines = settings(unit)
    assert [line for line in lines if SECLUDING.match(line) and "DirectoryMode=" not in line] == []
    if unit.parent.name == "user":
        assert [line for line in lines if NO_NEW_PRIVILEGES.match(line)] == []


def test_both_services_keep_mounts_over_a_restart() -> None:
    for scope in ("system", "user"):
        lines = settings(PACKAGING / "systemd" / scope / "composefs.service")
        wanted = {"Type=notify", "KillMode=process", "FileDescriptorStoreMax=4096"}
        assert wanted <= set(lines)
        assert "ExecStart=/usr/bin/cfsctl varlink" in lines


def test_sockets_are_where_clients_look() -> None:
    for scope, path in (("system", "/run"), ("user", "%t")):
        lines = settings(PACKAGING / "systemd" / scope / "composefs.socket")
        assert f"ListenStream={path}/composefs/composefs.sock" in lines
        assert "SocketMode=0600" in lines


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is missing")
@pytest.mark.parametrize("scope", ["system", "user"])
def test_systemd_understands_the_units(scope: str, tmp_path: Path) -> None:
    for unit in (PACKAGING / "systemd" / scope).iterdir():
        text = unit.read_text().replace("/usr/bin/cfsctl", "/bin/true")  # may not be installed
        text = re.sub("^Documentation=.*\n", "", text, flags=re.MULTILINE)
        (tmp_path / unit.name).write_text(text)
    command = ["systemd-analyze", f"--{scope}", "--man=no", "verify"]
    with tempfile.TemporaryDirectory(dir="/tmp") as runtime:  # sockets there need a short name
        done = subprocess.run(
            [*command, *sorted(map(str, tmp_path.iterdir()))],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": runtime, "HOME": str(tmp_path)},
        )
    complaints = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert complaints == [], done.stderr


def debian_control() -> dict[str, set[str]]:
    """Names of packages by field, of both paragraphs."""
    found: dict[str, set[str]] = {}
    text = (PACKAGING / "debian" / "control").read_text()
    for paragraph in text.split("\n\n"):
        parser = configparser.RawConfigParser(delimiters=(":",), strict=True)
        parser.read_string("[x]\n" + paragraph)
        for field, value in parser["x"].items():
            found.setdefault(field, set()).update(re.findall(r"^\s*([a-z0-9.+-]+)", value, re.M))
    return found


def test_the_debian_package_builds_with_what_the_library_needs() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    names = {re.split("[<>=]", name)[0] for name in project["dependencies"]}
    control = debian_control()
    assert {f"python3-{name}" for name in names} <= control["build-depends"]
    assert {"python3-pyfuse3", "python3-varlink", "fuse3"} <= control["depends"]
    assert control["conflicts"] == control["replaces"] == {"composefs"}


def test_versions_are_the_same() -> None:
    version = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    assert f"cfs ({version})" in (PACKAGING / "debian" / "changelog").read_text()


def test_what_the_debian_package_installs_exists() -> None:
    for name in ("cfs.install", "cfs.docs"):
        for line in (PACKAGING / "debian" / name).read_text().splitlines():
            assert list(CHECKOUT.glob(line.split()[0])), line


@pytest.mark.parametrize(
    ("shell", "script"), [("bash", "cfsctl.bash"), ("zsh", "_cfsctl"), ("fish", "cfsctl.fish")]
)
def test_shells_can_parse_their_scripts(shell: str, script: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is missing")
    subprocess.run([shell, "-n", str(PACKAGING / "completion" / script)], check=True)
