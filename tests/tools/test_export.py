"""``sparse-onnx export``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sparse_onnx.errors import SparseOnnxError, UsageError
from sparse_onnx.tools.export import command

SOURCE = """
import torch

def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3), (torch.ones(2, 4),), {"dynamic_shapes": {"input": {0: "batch"}}}

def plain():
    return torch.nn.Linear(4, 3), (torch.ones(2, 4),)

def module_only():
    return torch.nn.Linear(4, 3)

def wrong_option():
    return torch.nn.Linear(4, 3), (torch.ones(2, 4),), {"axes": 1}

def wrong_options():
    return torch.nn.Linear(4, 3), (torch.ones(2, 4),), ["dynamic_shapes"]

def fails():
    return 1 / 0

number = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module of its own name, so that no test imports another's."""
    name = f"to_export_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def module_of(folder: Path) -> str:
    return next(folder.glob("to_export_*.py")).stem


def call(*arguments: str) -> Result:
    """Run the command; its own errors come out as exceptions, which the entry point maps to exit codes."""
    result = CliRunner().invoke(command, arguments)
    if isinstance(result.exception, SparseOnnxError):
        raise result.exception
    return result


def test_a_function_is_exported_and_checked(folder: Path) -> None:
    pytest.importorskip("torch")
    result = call(f"{module_of(folder)}:linear", "-o", "out", "--format", "json")
    summary = json.loads(result.stdout)
    assert summary["inputs"] == {"input": ["batch", "4"]}
    assert summary["opset"] == 20
    assert 0 <= summary["max_abs_difference"] < 1e-5
    assert summary["compared_shapes"] == [{"input": [2, 4]}, {"input": [4, 4]}]
    assert sorted(path.name for path in (folder / "out").iterdir())[0] == "model.onnx"


def test_text_says_where_and_how_close(folder: Path) -> None:
    pytest.importorskip("torch")
    result = call(f"{module_of(folder)}:plain", "-o", "out", "--opset", "18")
    assert "out/model.onnx" in result.stdout
    assert "opset 18" in result.stdout
    assert "largest difference from torch" in result.stdout


def test_an_existing_folder_stays_without_overwrite(folder: Path) -> None:
    pytest.importorskip("torch")
    source = f"{module_of(folder)}:plain"
    call(source, "-o", "out")
    before = (folder / "out" / "model.onnx").stat().st_mtime_ns
    with pytest.raises(UsageError, match="--overwrite"):
        call(source, "-o", "out")
    assert (folder / "out" / "model.onnx").stat().st_mtime_ns == before
    call(source, "-o", "out", "--overwrite")
    assert (folder / "out" / "model.onnx").stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{module}:absent", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        (":f", "cannot be imported"),
        ("{module}:number", "is no function"),
        ("{module}:module_only", r"must return \(module, example_inputs\)"),
        ("{module}:wrong_option", r"the options \['axes'\]; known: dynamic_shapes"),
        ("{module}:wrong_options", "returns list for its options"),
        ("{module}:fails", "failed: ZeroDivisionError"),
        ("hub/name", "is no Hugging Face model folder"),
        (".", "is no Hugging Face model folder"),
    ],
)
def test_wrong_sources_say_what_is_wrong_and_write_nothing(folder: Path, source: str, message: str) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UsageError, match=message):
        call(source.format(module=module_of(folder)), "-o", "out")
    assert not (folder / "out").exists()


def test_task_is_for_folders_only(folder: Path) -> None:
    with pytest.raises(UsageError, match="--task is for Hugging Face folders"):
        call(f"{module_of(folder)}:plain", "-o", "out", "--task", "fill-mask")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from sparse_onnx.tools.export import command\n"
        "try: command(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SOURCE is a Hugging Face model folder" in done.stdout
