"""The golden stores of ``tests/data/repository``, and damage done to copies of them.

``tests/data/repository/README.md`` says what the files mean.
"""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from tests.paths import DATA

ALGORITHMS = ("sha256", "sha512")
STORES = DATA / "repository"


def load(algorithm: str, name: str) -> Any:
    return json.loads((STORES / algorithm / name).read_text())


def unpack_store(algorithm: str, directory: Path) -> Path:
    """Unpack a golden store as ``directory``."""
    packed = (STORES / f"store-{algorithm}.tar.zst").read_bytes()
    data = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    directory.mkdir(parents=True)
    subprocess.run(
        ["tar", "-xpf", "-", "--strip-components=1"], cwd=directory, input=data, check=True
    )
    return directory


def copy_store(store: Path, directory: Path) -> Path:
    return Path(shutil.copytree(store, directory, symlinks=True))


def list_paths(store: Path) -> set[str]:
    """Return everything in a store but directories, links with their text."""
    return {
        f"{path.relative_to(store)} -> {os.readlink(path)}"
        if path.is_symlink()
        else str(path.relative_to(store))
        for path in store.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def damage(store: Path, steps: list[list[Any]]) -> None:
    """Do the steps of a golden case; ``plain`` and ``verity`` need a kernel with fs-verity."""
    for kind, name, *arguments in steps:
        path = store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _STEPS[kind](path, *arguments)


def _patch(path: Path, offset: int, data: str) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes.fromhex(data))


def _link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


_STEPS: dict[str, Callable[..., Any]] = {
    "write": lambda path, text: path.write_text(text),
    "patch": _patch,
    "truncate": os.truncate,
    "remove": os.unlink,
    "remove-tree": shutil.rmtree,
    "mkdir": lambda path: path.mkdir(parents=True),
    "link": _link,
    "mkfifo": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o644),
}
