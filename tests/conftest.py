"""What holds for all tests."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_timing_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the timings in the user's cache folder; each begins with none."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SPARSE_ONNX_CACHE", str(folder))
    return folder
