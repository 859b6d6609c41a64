"""``sparse-onnx demo``: what ships, and what the command says about it."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
import tokenize
from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from sparse_onnx.errors import SparseOnnxError, UsageError
from sparse_onnx.tools.demo import command
from sparse_onnx.tools.demo_model.highlighting import CLASSES, WINDOW, is_held_out, label

ASSETS = resources.files("sparse_onnx.tools") / "demo_model"


def named(source: str) -> list[tuple[str, str]]:
    """The source cut where the class changes: (text, class)."""
    classes = label(source.encode())
    edges = [0, *(np.flatnonzero(np.diff(classes)) + 1), len(source)]
    return [(source[a:b], CLASSES[classes[a]]) for a, b in pairwise(edges)]


# What ships


def test_the_assets_are_small() -> None:
    names = ("model.onnx.xz", "held_out.npz", "results.json")
    assert sum(len((ASSETS / name).read_bytes()) for name in names) < 4_000_000


def test_the_shipped_model_has_the_zeros_that_its_results_claim() -> None:
    model = onnx.load_from_string(lzma.decompress((ASSETS / "model.onnx.xz").read_bytes()))
    results = json.loads((ASSETS / "results.json").read_text())
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name.startswith("layers.") and len(tensor.dims) == 2
    }
    assert sum(weight.size for weight in weights.values()) == results["prunable_weights"]
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert zeros / results["prunable_weights"] == pytest.approx(results["sparsity"])
    assert 0.85 <= results["sparsity"] <= 0.95
    assert results["pruned_accuracy"] > results["most_frequent_class"] + 0.5


def test_the_held_out_data_is_labelled_text() -> None:
    with resources.as_file(ASSETS / "held_out.npz") as path, np.load(path) as file:
        text, classes = file["text"], file["classes"]
    results = json.loads((ASSETS / "results.json").read_text())
    assert text.shape == classes.shape == (results["held_out_bytes"] // WINDOW, WINDOW)
    assert text.max() < 128
    assert set(np.unique(classes)) <= set(range(len(CLASSES)))


# The labels


def test_labels_of_a_function() -> None:
    source = 'def area(r):\n    "Of a disk."\n    return pi * r ** 2  # flat\n'
    solid = [(text, name) for text, name in named(source) if name != "space"]
    assert solid == [
        ("def", "keyword"),
        ("area", "defined name"),
        ("(", "operator"),
        ("r", "name"),
        ("):", "operator"),
        ('"Of a disk."', "docstring"),
        ("return", "keyword"),
        ("pi", "name"),
        ("*", "operator"),
        ("r", "name"),
        ("**", "operator"),
        ("2", "number"),
        ("# flat", "comment"),
    ]


@pytest.mark.parametrize(
    ("source", "text", "name"),
    [
        ("f(x)\n", "f", "called name"),
        ("class C(B): pass\n", "C", "defined name"),
        ("a.b\n", "b", "attribute"),
        ("a.b()\n", "b", "called name"),
        ("f(key=1)\n", "key", "argument name"),
        ("key = 1\n", "key", "name"),
        ("x = 'text'\n", "'text'", "string"),
        ("f('text')\n", "'text'", "string"),
        ("(\n'text')\n", "'text'", "string"),
        ("'text'\n", "'text'", "docstring"),
        ("# remark\n", "# remark", "comment"),
        ("if True: pass\n", "True", "keyword"),
    ],
)
def test_label_of_a_token(source: str, text: str, name: str) -> None:
    assert (text, name) in named(source)


def test_a_string_over_lines_is_labelled_whole() -> None:
    source = "x = '''one\ntwo\n'''\ny\n"
    assert ("'''one\ntwo\n'''", "string") in named(source)


def test_broken_source_is_an_error() -> None:
    with pytest.raises((SyntaxError, tokenize.TokenError)):
        label(b"x = (1\n")


def test_about_one_module_in_twelve_is_held_out() -> None:
    names = [f"package/module{index}.py" for index in range(600)]
    held_out = [name for name in names if is_held_out(name)]
    assert 20 < len(held_out) < 80


# The command


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(command, arguments)
    if isinstance(result.exception, SparseOnnxError):
        raise result.exception
    return result


@pytest.mark.slow
def test_demo_keeps_the_accuracy_and_its_results(tmp_path: Path) -> None:
    result = call("-o", str(tmp_path / "out"), "--format", "json", "--quiet")
    summary = json.loads(result.stdout)
    results = json.loads((ASSETS / "results.json").read_text())
    accuracy = summary["accuracy"]
    assert accuracy["before"] == pytest.approx(results["pruned_accuracy"], abs=2e-4)
    assert accuracy["after"] == pytest.approx(accuracy["before"], abs=2e-4)
    assert summary["exit_code"] in (0, 5)
    assert {"model.onnx", "original.onnx", "report.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    text = call("-o", str(tmp_path / "out"), "--overwrite", "--quiet").stdout
    assert len(text.splitlines()) <= 15
    assert f"{accuracy['after']:.2%}" in text


def test_demo_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UsageError):
        call("-o", str(tmp_path), "--quiet")
    assert (tmp_path / "kept.txt").read_text() == "mine"


def test_help_is_light() -> None:
    code = (
        "import sys; from sparse_onnx.tools.demo import command\n"
        "try: command(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'onnx', 'numpy', 'onnxruntime'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "syntax highlighter" in done.stdout
