"""What holds for all tests."""

import pytest


@pytest.fixture(autouse=True)
def _quick_timing(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the timings in the user's cache folder, or repeats a measurement until it is sure."""
    monkeypatch.setenv("SPARSE_ONNX_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("sparse_onnx.passes.guard._SECONDS", 0.0)
