"""What a store decides of how its images are served."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from cfs.fuse.options import ServeOptions, Verify
from cfs.mounting.serving import _suited

if TYPE_CHECKING:
    from cfs.repository.repository import Repository


@pytest.mark.parametrize(
    ("said", "is_secure", "verify"),
    [
        (None, True, Verify.REQUIRE), (None, False, Verify.OFF), (None, None, Verify.OFF),
        (Verify.OFF, True, Verify.OFF), (Verify.OPEN, True, Verify.OPEN),
        (Verify.REQUIRE, False, Verify.REQUIRE),
    ],
)  # fmt: skip
def test_verify(said: Verify | None, is_secure: bool | None, verify: Verify) -> None:  # noqa: FBT001
    store = None if is_secure is None else SimpleNamespace(is_secure=is_secure)
    options = _suited(ServeOptions(verify=said), cast("Repository | None", store))
    assert options.verify is verify
