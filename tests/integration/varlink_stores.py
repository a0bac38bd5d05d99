"""A service whose store holds an image."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cfs.cli.cfsctl import run as run_cfsctl
from cfs.service.assemble import assembled
from cfs.service.fuse_registry import FuseMounts
from cfs.service.handles import StoreOptions
from tests.command_line import unpack_tree
from tests.varlink_client import serving

STORE = "home/.var/lib/composefs"


def make_store(path: str, tag: str = "app") -> None:
    """Make a store with the tagged image of ``oci:layout:v1``."""
    assert run_cfsctl(["init", "--insecure", path]) == 0
    assert run_cfsctl(["--repo", path, "oci", "pull", "-q", "oci:layout:v1", tag]) == 0


@contextmanager
def app_service(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Work in a directory whose ``STORE`` is the one of a service there; yield its address."""
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HOME", str(directory / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    monkeypatch.setattr("cfs.repository.repository._SYSTEM_PATH", str(directory / STORE))
    # so that no command sees, or ends, mounts of others
    monkeypatch.setattr("cfs.cli.runtime._SYSTEM", str(directory / "run"))
    monkeypatch.setattr("cfs.cli.runtime._USERS", str(directory / "users"))
    unpack_tree(directory)
    make_store(STORE)
    with (
        assembled(StoreOptions(), FuseMounts()) as dispatcher,
        serving(dispatcher, directory / "sock"),
    ):
        yield f"unix:{directory}/sock"
