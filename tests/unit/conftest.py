"""A new store, and the same open."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cfs.digest import Algorithm
from cfs.repository.repository import Repository, init


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    init(str(path), algorithm=Algorithm.SHA256, is_secure=False, erofs_version=1)
    return path


@pytest.fixture
def repository(store: Path) -> Iterator[Repository]:
    with Repository.open(str(store)) as opened:
        yield opened
