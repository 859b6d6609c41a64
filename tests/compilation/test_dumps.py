"""The model after a pass, beside the result."""

import numpy as np
import onnx
import onnx.parser
import pytest

import sparse_onnx
from sparse_onnx.errors import UsageError
from sparse_onnx.sparse_ops.domain import DOMAIN


@pytest.fixture
def model(tmp_path):
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20]> g (float[b, 64] X) => (float[b, 64] Y)
           { i = Identity(X) h = MatMul(i, W) Y = Relu(h) }"""
    )
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def optimize(model, passes, said=None, **options):
    options = {"method": "magnitude", "sparsity": 0.9, "benchmark": False, "threads": 1} | options
    say = (said if said is not None else []).append
    return sparse_onnx.optimize(model, model.parent / "out", dump_after=passes, progress=say, **options)


def zeros(proto):
    (weight,) = (tensor for tensor in proto.graph.initializer if tensor.name == "W")
    return np.mean(onnx.numpy_helper.to_array(weight, "") == 0)


def test_the_model_as_it_was_after_each_pass(model):
    passes = ["clean.identities", "prune.magnitude", "lower.sparse-matmul"]
    folder = optimize(model, passes).folder
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("after")) == [
        f"after-{name}.onnx{end}" for name in sorted(passes) for end in ("", ".data")
    ]
    cleaned, pruned, lowered = (onnx.load(folder / f"after-{name}.onnx") for name in passes)
    assert [node.op_type for node in cleaned.graph.node] == ["MatMul", "Relu"]
    assert zeros(cleaned) == 0
    assert zeros(pruned) == pytest.approx(0.9, abs=1e-3)
    assert [node.domain for node in lowered.graph.node] == [DOMAIN]
    for proto in (cleaned, pruned, lowered):
        onnx.checker.check_model(proto)


def test_dumps_change_nothing_else(model):
    plain = optimize(model, None).folder
    expected = {path.name: path.read_bytes() for path in plain.iterdir() if path.name.startswith("model")}
    assert expected
    dumped = optimize(model, ["prune.magnitude"], overwrite=True).folder
    assert expected == {
        path.name: path.read_bytes() for path in dumped.iterdir() if path.name.startswith("model")
    }
    again = optimize(model, None, overwrite=True).folder  # a folder with dumps is still one of ours
    assert not list(again.glob("after-*"))


def test_a_pass_that_did_not_run_is_told(model):
    said = []
    folder = optimize(model, ["lower.sparse-conv"], said).folder
    assert not list(folder.glob("after-*"))
    assert "note: lower.sparse-conv did not run: there is no model after it" in said


@pytest.mark.parametrize(
    ("passes", "options", "message"),
    [
        (
            ["prune.magnitud"],
            {},
            "dump_after: unknown pass 'prune.magnitud'; the nearest is 'prune.magnitude'",
        ),
        (["prune.magnitude"], {"dry_run": True}, "a dry run writes nothing"),
        (
            ["prune.magnitude"],
            {"sparsity": None, "benchmark": True, "target_speedup": 2},
            "a search compiles many",
        ),
    ],
)
def test_what_cannot_be_dumped(model, passes, options, message):
    with pytest.raises(UsageError, match=message):
        optimize(model, passes, **options)
    assert not (model.parent / "out").exists()
