"""In recipes: by name, before everything that only sets weights to zero, and with that after it."""

import numpy as np
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.base import Pipeline, Stage
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.registry import PASSES, pass_by_name
from sparse_onnx.passes.structured.ffn import Ffn


def model_of(from_text):
    rng = np.random.default_rng(0)
    return from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (float[B, 8] X) => (float[B, 8] Y)
           { A = MatMul(X, u) H = Relu(A) Y = MatMul(H, w) }""",
        u=rng.standard_normal((8, 32)).astype(np.float32),
        w=rng.standard_normal((32, 8)).astype(np.float32),
    )


def feeds():
    return [{"X": np.random.default_rng(1).standard_normal((200, 8)).astype(np.float32)}]


@pytest.mark.parametrize(
    "cls", [cls for cls in PASSES if cls.stage is Stage.STRUCTURE], ids=lambda cls: cls.name
)
def test_recipes_know_them(cls):
    assert pass_by_name(cls.name) is cls
    assert cls(sparsity=0.25).options()["sparsity"] == 0.25


def test_zeros_come_after(from_text, run, remove):
    model = model_of(from_text)
    result = remove(Pipeline((Ffn(sparsity=0.25), Magnitude(sparsity=0.5))), model, feeds())
    assert result.statistics["prune.ffn.removed"] == 8
    assert result.statistics["prune.magnitude.elements"] == 2 * 8 * 24
    assert result.statistics["prune.magnitude.sparsity"] == 0.5
    assert run(model, feeds()[0])["Y"].shape == (200, 8)


def test_zeros_do_not_come_before():
    with pytest.raises(UsageError, match=r"prune\.ffn \(structure\) cannot run after prune\.magnitude"):
        Pipeline((Magnitude(sparsity=0.5), Ffn(sparsity=0.25)))


def test_progress_tells_what_is_left_and_the_error(from_text, remove):
    said = []
    remove(Ffn(sparsity=0.25), model_of(from_text), feeds(), said)
    assert any(line.startswith("w: 24 of 32 neurons left, error 0.") for line in said)
