"""Containers: a root file system with what tests run in it, and crun to run it."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.oci_layouts import Layout, make_tar

_DIRECTORIES = ("bin", "dev", "etc", "lib", "lib64", "proc", "tmp", "usr")
_PROGRAMS = ("sh", "chmod", "mv", "rm", "wc", "findmnt")
BIG = bytes(range(256)) * 300


def make_layout(directory: Path) -> Layout:
    """Make an image of two layers with programs of this machine and a few files to change.

    Skips the test if one of the programs is missing.
    """
    files: dict[str, bytes | None] = dict.fromkeys(_DIRECTORIES)
    for name in _PROGRAMS:
        program = shutil.which(name)
        if program is None:
            pytest.skip(f"{name} is not installed")
        files[f"bin/{name}"] = Path(program).read_bytes()
        files.update(_libraries_of(program))
    layout = Layout(directory)
    changed: dict[str, bytes | None] = {
        "etc/big": BIG, "etc/moved": BIG[1:], "etc/small": b"small\n", "etc/empty": b"",
    }  # fmt: skip
    layout.add_image("v1", [make_tar(files), make_tar(changed)])
    return layout


def _libraries_of(program: str) -> dict[str, bytes | None]:
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    words = [word for word in done.stdout.split() if word.startswith("/")]
    files: dict[str, bytes | None] = {}
    for word in words:
        path = Path(word.removesuffix(":"))
        for parent in reversed(path.parents[:-1]):
            files[str(parent)[1:]] = None
        files[str(path)[1:]] = path.read_bytes()
    return files


def write_bundle(directory: Path, root: Path, words: Sequence[str], *, writable: bool) -> None:
    """Write what crun needs to run a command on a mounted root file system."""
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
    ]
    config: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": list(words), "env": ["PATH=/bin"], "cwd": "/",
        },
        "root": {"path": str(root), "readonly": not writable},
        "mounts": mounts,
        "linux": {"namespaces": [{"type": name} for name in ("pid", "mount", "ipc", "uts")]},
    }  # fmt: skip
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))


def crun_script(bundle: Path) -> str:
    """Return shell commands that run a bundle; in name spaces of mounts and cgroups of their own.

    crun wants the second version of cgroups in their place, though it shall not use them.
    Skips the test without crun.
    """
    if shutil.which("crun") is None:
        pytest.skip("crun is not installed")
    return f"""
        grep -q ' /sys/fs/cgroup .* - cgroup2 ' /proc/self/mountinfo ||
            mount -t cgroup2 none /sys/fs/cgroup
        crun --root {bundle}/state --cgroup-manager=disabled run --bundle {bundle} {bundle.name}
    """
