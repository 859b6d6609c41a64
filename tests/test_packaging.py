"""The folders, the type checkers' view, and the installed package agree."""

import importlib
import importlib.resources
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import sparse_onnx

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("exporter", "passes", "sparse_ops", "tools")


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_wheel_table_and_typings_agree():
    table = project()["tool"]["scikit-build"]["wheel"]["force-include"]
    assert table == {folder: f"sparse_onnx/{folder}" for folder in FOLDERS}
    shown = {
        link.name: link.resolve() for link in (ROOT / "typings/sparse_onnx").iterdir() if link.name[0] != "."
    }
    shown.pop("__pycache__", None)
    modules = [path for path in (ROOT / "src/sparse_onnx").iterdir() if path.name != "__pycache__"]
    expected = {path.name: path for path in (*modules, *(ROOT / folder for folder in FOLDERS))}
    assert shown == expected


@pytest.mark.parametrize("folder", FOLDERS)
def test_subpackages_import_under_the_package_only(folder):
    assert importlib.import_module(f"sparse_onnx.{folder}").__name__ == f"sparse_onnx.{folder}"
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({folder!r}) is not None)"
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd="/", check=False).returncode == 0


def test_version_is_written_once():
    assert sparse_onnx.__version__ == project()["project"]["version"]


def test_typed_marker_and_library_are_installed():
    assert importlib.resources.files("sparse_onnx").joinpath("py.typed").is_file()
    assert sparse_onnx.library_path().is_file()


def test_no_cpp_source_is_installed():
    installed = [file.name for file in metadata.files("sparse-onnx") or []]
    assert any(name.startswith("libsparse_ops") for name in installed)
    assert not [name for name in installed if name.endswith((".cc", ".h", ".inc", ".map", "CMakeLists.txt"))]


def test_the_whole_package_imports_without_torch():
    code = "import sys, sparse_onnx, sparse_onnx.tools.cli, sparse_onnx.api; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['sparse-onnx', '--help']\n"
        "from sparse_onnx.tools.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
