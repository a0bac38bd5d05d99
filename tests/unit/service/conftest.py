"""What tests of methods without a connection have in common."""

import os
from collections.abc import Iterator

import pytest

from cfs.service.handles import Handles, StoreOptions


@pytest.fixture
def handles() -> Iterator[Handles]:
    opened = Handles(StoreOptions())
    yield opened
    opened.close_all()


@pytest.fixture
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: only root may act as somebody else")
