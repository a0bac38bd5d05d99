"""The service answers as composefs-rs does, or better where that has defects."""

from pathlib import Path

import pytest

from tests.integration.varlink_replay import replay


@pytest.mark.parametrize(
    "name",
    ["service", "init", "repository", "oci", "pull", "layers", "finalize-poison"],
)
def test_recorded_exchanges(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replay(name, tmp_path, monkeypatch) == []


@pytest.mark.usefixtures("overlay")
def test_recorded_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replay("mount", tmp_path, monkeypatch) == []
