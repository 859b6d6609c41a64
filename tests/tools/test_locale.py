"""Names of files need not fit the locale: in it, in results, and on the terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

LOCALES = {
    "UTF-8": {"LC_ALL": "C.UTF-8"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
NAMES = {"UTF-8": "Mod\u00e8le \u6a21\u578b".encode(), "Latin-1": b"Mod\xe8le"}


def write(folder: bytes) -> bytes:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.9] = 0
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    os.mkdir(folder)
    path = folder + b"/" + os.path.basename(folder) + b".onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with open(path, "wb") as file:
        file.write(model.SerializeToString())
    with open(folder + b"/data.npz", "wb") as file:
        np.savez(file, x=rng.standard_normal((4, 64)).astype(np.float32))
    return path


def run(locale: str, *arguments: bytes | str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sparse_onnx", *arguments],
        capture_output=True,
        env={**os.environ, **LOCALES[locale]},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-600:]
    return done.stdout.decode("utf-8", "surrogateescape")


@pytest.mark.parametrize(("locale", "name"), [("C", "UTF-8"), ("UTF-8", "Latin-1")])
def test_every_command_takes_any_name(tmp_path: Path, locale: str, name: str) -> None:
    folder = os.fsencode(tmp_path) + b"/" + NAMES[name]
    path, out = write(folder), folder + b"/out"
    shown = NAMES[name].decode("utf-8", "replace")
    said = run(locale, "optimize", path, "-o", out, "--no-benchmark", "--threads", "1",
               "--calibration-data", folder + b"/data.npz", "--format", "json")  # fmt: skip
    assert json.loads(said)["source"] == f"{shown}.onnx"
    with open(out + b"/report.json", encoding="utf-8") as file:
        report = json.load(file)
    assert report["source"] == f"{shown}.onnx"
    assert report["verification"]["inputs"].endswith(f"{shown}/data.npz")
    with open(out + b"/recipe.yaml", encoding="utf-8") as file:
        assert shown in str(yaml.safe_load(file))
    with open(out + b"/report.html", encoding="utf-8") as file:
        assert f"{shown}.onnx" in file.read()
    model = out + b"/model.onnx"
    run(locale, "inspect", path)
    run(locale, "verify", path, model, "--threads", "1")
    timed = json.loads(run(locale, "bench", path, model, "--rounds", "2", "--format", "json"))
    assert shown in timed["models"][0]["model"]
