"""The same model, recipe and seed give the same bytes; of the report, only named keys differ."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

VARYING = {"stages[].seconds", "stages[].peak_rss_mb"}
"""What differs without a benchmark; README says so. With one, also what is measured or decided by it."""

FILES = ("model.onnx", "model.onnx.data", "recipe.yaml")


def leaves(value, path=""):
    """Every value of a JSON document with its path; items of lists in their order."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        yield f"{path}[]", len(value)
        for item in value:
            yield from leaves(item, f"{path}[]")
    else:
        yield path, value


def differing(first, second):
    """The paths whose values differ."""
    one, other = list(leaves(first)), list(leaves(second))
    assert [path for path, _ in one] == [path for path, _ in other]
    return {path for (path, a), (_, b) in zip(one, other, strict=True) if a != b}


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, 96] X) => (float[batch, 96] Y)
        { q = MatMul(X, Q) k = MatMul(X, K) s = Add(q, k) g = Gelu(s) o = MatMul(g, O) Y = Add(o, X) }"""
    )
    for name in "QKO":
        array = rng.standard_normal((96, 96)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", X=rng.standard_normal((128, 96)).astype(np.float32))
    return tmp_path / "model.onnx"


def optimize(model: Path, place: Path, hash_seed: int, *options: str) -> Path:
    """A run in a process and a folder of its own: sets are walked through in another order there."""
    place.mkdir()
    command = [
        sys.executable,
        "-m",
        "sparse_onnx",
        "optimize",
        "../model.onnx",
        "-o",
        "out",
        "--quiet",
        *options,
    ]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return place / "out"


CALIBRATED = ("--sparsity", "0.7", "--calibration-data", "../data.npz")


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "magnitude", "--sparsity", "0.8"),
        ("--method", "random", "--sparsity", "0.8", "--seed", "3"),
        ("--method", "auto", *CALIBRATED),
        ("--method", "sparsegpt", "--calibration", "oneshot", *CALIBRATED),
    ],
    ids=lambda options: options[1],
)
def test_same_bytes_whatever_the_order_of_sets(model, tmp_path, options):
    first, second = (
        optimize(model, tmp_path / f"place{seed}", seed, "--no-benchmark", *options) for seed in (1, 2)
    )
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    assert differing(*reports) <= VARYING


def test_the_seed_makes_a_difference(model, tmp_path):
    """So equal bytes above are not those of an option that does nothing."""
    options = ("--no-benchmark", "--method", "random", "--sparsity", "0.8")
    first, second = (
        optimize(model, tmp_path / f"place{seed}", 1, *options, "--seed", str(seed)) for seed in (1, 2)
    )
    assert (first / "model.onnx.data").read_bytes() != (second / "model.onnx.data").read_bytes()


def test_readme_names_what_varies():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for path in VARYING:
        assert f"`{path}`" in text


def test_differences_are_found():
    first = {"a": [{"b": 1, "c": 2.5}], "d": {"e": None}}
    assert differing(first, first) == set()
    assert differing(first, {"a": [{"b": 1, "c": 2.0}], "d": {"e": "x"}}) == {"a[].c", "d.e"}
    assert differing({"a": [1]}, {"a": [2]}) == {"a[]"}
