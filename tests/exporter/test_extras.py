"""The exporter without its optional packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparse_onnx.errors import HostError
from sparse_onnx.exporter import export_huggingface, export_torch

INSTALL = r"pip install 'sparse-onnx\[export\]'"


def test_without_torch_a_module_export_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(HostError, match=f"torch is needed.*{INSTALL}"):
        export_torch(object(), ())


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_without_a_package_a_folder_export_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    if package == "transformers":
        pytest.importorskip("torch")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(HostError, match=f"{package} is needed.*{INSTALL}"):
        export_huggingface(tmp_path)


def test_importing_the_exporter_imports_no_framework() -> None:
    code = "import sys, sparse_onnx.exporter; assert not {'torch', 'transformers', 'onnxscript'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
