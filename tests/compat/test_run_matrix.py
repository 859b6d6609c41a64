"""The compatibility matrix on the ONNX Runtime that is installed, and on a version that does not exist."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime

SCRIPT = Path(__file__).with_name("run_matrix.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_installed_version_passes():
    folders = {str(Path(module.__file__).parents[1]) for module in (onnxruntime, np)}
    result = run(":".join(sorted(folders)))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"ONNX Runtime {onnxruntime.__version__}, 30 checks, 0 failed" in result.stdout


def test_broken_runtime_is_a_failure(tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('broken on purpose')\n")
    result = run(str(tmp_path))
    assert result.returncode == 1
    assert "broken on purpose" in result.stdout
