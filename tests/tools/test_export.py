"""``sparse-onnx export``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from sparse_onnx.data.gradient_file import open_gradients
from sparse_onnx.errors import SparseOnnxError, UsageError
from sparse_onnx.model import model_io
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.prune.gradient import Gradient
from sparse_onnx.tools.export import command

SOURCE = """
import torch

def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3), (torch.ones(2, 4),), {"dynamic_shapes": {"input": {0: "batch"}}}

def plain():
    return torch.nn.Linear(4, 3), (torch.ones(2, 4),)

def renamed():
    return torch.nn.Linear(4, 3), (torch.ones(2, 4),), {"input_names": ["x"]}

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


# Gradients


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A tiny random classifier, eight samples with labels, and the same without."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        num_labels=3,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    arrays = {"input_ids": rng.integers(1, 99, (8, 12)), "attention_mask": np.ones((8, 12), np.int64)}
    arrays["token_type_ids"] = np.zeros_like(arrays["input_ids"])
    np.savez(tmp_path / "samples.npz", **arrays)
    np.savez(tmp_path / "labelled.npz", **arrays, labels=rng.integers(0, 3, 8))
    return tmp_path


def fisher(path: Path, name: str, shape: tuple[int, int]) -> np.ndarray:
    with open_gradients(path) as file:
        return file.read(name, "fisher", shape)


def test_gradients_appear_in_the_folder_and_prune_its_model(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encoder)
    options = ["--gradients", "out/gradients.npz", "--calibration-data", "samples.npz", "--quiet"]
    summary = json.loads(call("model", "-o", "out", *options, "--format", "json").stdout)
    assert summary["gradients"] == {"file": "out/gradients.npz", "weights": 8}
    model = model_io.load_model("out/model.onnx")
    weights = find_weights(model)[0]
    with open_gradients(Path("out/gradients.npz")) as file:
        assert sorted(file.names) == sorted(weight.name for weight in weights)
    result = Gradient(gradients="out/gradients.npz", sparsity=0.5)(model)
    assert result.statistics["sparsity"] == 0.5
    assert not result.declined


def test_labels_of_the_data_and_the_number_of_samples_count(encoder: Path) -> None:
    found = {}
    for data, count in (("samples", 8), ("labelled", 8), ("labelled", 2)):
        path = encoder / f"{data}-{count}.npz"
        call(
            *(str(encoder / "model"), "-o", str(encoder / f"out-{data}-{count}"), "--gradients", str(path)),
            *("--calibration-data", str(encoder / f"{data}.npz"), "--num-calibration-samples", str(count)),
        )
        found[data, count] = fisher(path, "classifier.weight", (32, 3))
    assert len({array.tobytes() for array in found.values()}) == 3


def test_a_function_has_gradients_too(folder: Path) -> None:
    pytest.importorskip("torch")
    np.savez(folder / "samples.npz", input=np.ones((4, 4), np.float32))
    options = ["--gradients", "gradients.npz", "--calibration-data", "samples.npz"]
    result = call(f"{module_of(folder)}:linear", "-o", "out", *options)
    assert "gradients of batches: 4/4 in" in result.stderr
    assert "gradients gradients.npz, 1 weights" in result.stdout
    assert (fisher(folder / "gradients.npz", "weight", (4, 3)) > 0).all()
    with pytest.raises(UsageError, match=r"gradients\.npz exists"):
        call(f"{module_of(folder)}:linear", "-o", "other", *options)
    assert not (folder / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--gradients", "g.npz", "--calibration-data", "a.npz", "--calibration-data", "b.npz"],
            "gradients are of one source, not of 2",
        ),
        (["--gradients", "g.npz"], "--gradients needs --calibration-data"),
        (["--calibration-data", "samples.npz"], "is for --gradients only"),
        (["--tokenizer", "."], "is for --gradients only"),
        (["--num-calibration-samples", "3"], "is for --gradients only"),
        (["--gradients", "g.bin", "--calibration-data", "samples.npz"], r"must end in \.npz"),
        (["--gradients", "samples.npz", "--calibration-data", "samples.npz"], "is the calibration data"),
        (["--gradients", "no/g.npz", "--calibration-data", "samples.npz"], "no is no folder"),
        (["--gradients", "g.npz", "--calibration-data", "absent.npz"], "absent.npz: no such file"),
        (["--gradients", "g.npz", "--calibration-data", "wrong.npz"], "has no input; it has other"),
    ],
)
def test_wrong_options_for_gradients_write_nothing(folder: Path, options: list[str], message: str) -> None:
    pytest.importorskip("torch")
    np.savez(folder / "samples.npz", input=np.ones((4, 4), np.float32))
    np.savez(folder / "wrong.npz", other=np.ones((4, 4), np.float32))
    with pytest.raises(UsageError, match=message):
        call(f"{module_of(folder)}:linear", "-o", "out", *options)
    assert not (folder / "out").exists()
    assert not (folder / "g.npz").exists()


def test_renamed_inputs_are_refused_for_gradients(folder: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(UsageError, match="renames inputs"):
        call(
            *(f"{module_of(folder)}:renamed", "-o", "out"),
            *("--gradients", "g.npz", "--calibration-data", "samples.npz"),
        )


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
