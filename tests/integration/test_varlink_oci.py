"""``org.composefs.Oci`` answers as composefs-rs does, or better where that has defects."""

from pathlib import Path

import pytest

from tests.integration.varlink_replay import replay


@pytest.mark.parametrize("name", ["oci", "pull", "layers", "finalize-poison"])
def test_golden(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replay(name, tmp_path, monkeypatch) == []
