"""Introspection, envelope and framing beside the recorded exchanges."""

from pathlib import Path

import pytest

from tests.integration.varlink_replay import replay


def test_recorded_exchanges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert replay("service", tmp_path, monkeypatch) == []
