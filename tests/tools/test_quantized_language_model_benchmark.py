"""The benchmark of language models in few bits: its rows, its blocks of text, its peer, and what it writes."""

import json
import sys

import numpy as np
import onnx
import onnx.parser
import pytest

from sparse_onnx.data.inputs import input_specs
from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.oneshot_methods import Auto, SparseGPT
from sparse_onnx.passes.quantize.dynamic import Dynamic
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.solvers import GptqQuantizer, GridOptions, InputStatistics, SparseGPTSolver
from sparse_onnx.passes.solvers.clipping import whole_grid
from sparse_onnx.passes.solvers.grid import round_to_grid
from sparse_onnx.passes.solvers.masks import MaskStructure, obeys
from sparse_onnx.tools.benchmarks import quantized_language_model
from sparse_onnx.tools.benchmarks.pruned_language_model import cross_entropy
from sparse_onnx.tools.benchmarks.quantized_language_model import ROWS, Trial, blocks_of, feeds_of
from sparse_onnx.tools.benchmarks.rows import passes_from
from sparse_onnx.tools.benchmarks.sparsegpt_joint import SparseGPTJoint

_TABLE = """<ir_version: 9, opset_import: ["" : 20]>
table (int64[batch, length] input_ids) => (float[batch, length, 32] logits)
<float[32, 32] E, float[32, 32] W, float[32, 32] lm_head>
{ e = Gather(E, input_ids) h = MatMul(e, W) logits = MatMul(h, lm_head) }"""

_CACHED = """<ir_version: 9, opset_import: ["" : 20]>
cached (int64[batch, length] input_ids, int64[batch, total] attention_mask, int64[batch, length] position_ids,
        float[batch, 2, past, 4] past_key_values_0_key) => (float[batch, 2, total, 4] present_0_key)
{ present_0_key = Identity(past_key_values_0_key) }"""


@pytest.fixture
def table(tmp_path):
    """A decoder whose logits depend on the present token alone, and its W."""
    W = 3 * np.random.default_rng(1).standard_normal((32, 32)).astype(np.float32)
    proto = onnx.parser.parse_model(_TABLE)
    for name, array in (("E", np.eye(32)), ("W", W), ("lm_head", np.eye(32))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(proto, tmp_path / "table.onnx")
    return tmp_path / "table.onnx", W


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("magnitude@0.3/", (Magnitude(sparsity=0.3),)),
        (
            "sparsegpt,calibration=sequential@2:4/",
            (SparseGPT(calibration="sequential", mask_structure="2:4"),),
        ),
        ("2:4/dynamic", (Auto(mask_structure="2:4"), Dynamic())),
        ("sparsegpt-joint,bits=3@0.5/", (SparseGPTJoint(bits=3, sparsity=0.5),)),
        (
            "/rtn,targets=['re:.*[.][0-5][.].*']",
            (QuantizeWeights(method="rtn", targets=("re:.*[.][0-5][.].*",)),),
        ),
        ("/hqq,bits=3", (QuantizeWeights(method="hqq", bits=3),)),
    ],
)
def test_rows(text, passes):
    assert passes_from(text) == passes


def test_options_of_the_caller_give_way_to_those_of_the_row():
    found = passes_from("/rtn,scale_type=float32", storage="float", scale_type="float16")
    assert found == (QuantizeWeights(method="rtn", storage="float", scale_type="float32"),)


@pytest.mark.parametrize("text", ["nothing@0.5/", "0.5/nothing", "half/", "sparsegpt-joint,bits=9@0.5/"])
def test_what_is_no_row(text):
    with pytest.raises((UsageError, ValueError)):
        passes_from(text)


def test_all_rows_that_are_tried_by_themselves_are_rows():
    assert all(passes_from(row, storage="float") for row in ROWS)
    assert len(set(ROWS)) == len(ROWS)


def test_blocks_never_share_a_token():
    first, last = blocks_of(np.arange(103), 10, 4, 6)
    np.testing.assert_array_equal(first, np.arange(40).reshape(4, 10))
    np.testing.assert_array_equal(last, np.arange(40, 100).reshape(6, 10))
    with pytest.raises(SystemExit, match="103 tokens are 10 blocks of 10, not 5 \\+ 6"):
        blocks_of(np.arange(103), 10, 5, 6)


def test_a_decoder_with_a_cache_is_given_an_empty_one(tmp_path):
    onnx.save(onnx.parser.parse_model(_CACHED), tmp_path / "cached.onnx")
    specs = input_specs(model_io.load_model(tmp_path / "cached.onnx"))
    batches = feeds_of(np.arange(15, dtype=np.int32).reshape(3, 5), specs)
    assert [len(feeds["input_ids"]) for feeds in batches] == [2, 1]
    np.testing.assert_array_equal(batches[0]["input_ids"], [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(batches[1]["position_ids"], [[0, 1, 2, 3, 4]])
    assert batches[0]["attention_mask"].all()
    assert batches[0]["past_key_values_0_key"].shape == (2, 2, 0, 4)


def _layer(K=64, N=24):
    rng = np.random.default_rng(5)
    X = rng.standard_normal((8 * K, K)) @ rng.standard_normal((K, K)) / np.sqrt(K)
    return rng.standard_normal((K, N)).astype(np.float32), InputStatistics(X.T @ X, X.mean(axis=0), len(X))


def test_the_peer_without_zeros_is_gptq_and_with_many_bits_sparsegpt():
    W, statistics = _layer()
    grid = GridOptions(bits=4, group_size=32, symmetric=False, scale_type="float16")
    peer = SparseGPTJoint(bits=4, group_size=32, symmetric=False, sparsity=0.0)
    found = peer.solver(damping=0.01).solve(W, statistics, sparsity=0.0)
    gptq = GptqQuantizer(grid=grid, ordered=False).solve(W, statistics).matrix()
    assert np.mean(np.isclose(found, gptq, atol=1e-6)) > 0.999  # a value on the edge may fall to either side
    fine = SparseGPTJoint(bits=8, sparsity=0.5).solver(damping=0.01).solve(W, statistics, sparsity=0.5)
    assert np.mean(fine == 0) == pytest.approx(0.5, abs=0.02)
    pruned = SparseGPTSolver(damping=0.01).solve(W, statistics, sparsity=0.5)
    assert np.mean((fine == 0) == (pruned == 0)) > 0.97
    structure = MaskStructure.parse("2:4")
    assert obeys(peer.solver(damping=0.01).solve(W, statistics, structure), structure)


def test_the_peer_is_on_the_grid_of_the_dense_weight():
    W, statistics = _layer()
    peer = SparseGPTJoint(bits=4, group_size=32, symmetric=False, sparsity=0.5)
    found = peer.solver(damping=0.01).solve(W, statistics, sparsity=0.5)
    grid = whole_grid(W, GridOptions(bits=4, group_size=32, symmetric=False, scale_type="float16"))
    np.testing.assert_allclose(round_to_grid(found, grid).matrix(), found, atol=1e-6)


def test_rows_are_judged_on_what_they_make_and_only_once(table, tmp_path, monkeypatch, capsys):
    path, W = table
    text = {
        kind: np.random.default_rng(seed).integers(0, 32, 400)
        for seed, kind in enumerate(("topics", "glosses"))
    }
    monkeypatch.setattr(quantized_language_model, "_tokens", lambda _folder, kind: text[kind])
    output = tmp_path / "out.json"
    grid = "bits=3,group_size=16"
    rows = [f"/rtn,{grid}", f"0.5/auto,{grid}", f"sparsegpt-joint,{grid}@0.5/", "/dynamic"]
    numbers = ["--blocks", "6", "--length", "32", "--held", "3", "--held-length", "16", "--threads", "1"]
    kinds = ["--calibrate", "topics", "--judge", "topics", "glosses"]
    given = [str(path), "--tokenizer", str(tmp_path), *kinds, *numbers, "--json", str(output), "--rows"]
    monkeypatch.setattr(sys, "argv", ["quantized_language_model", *given, *rows])
    quantized_language_model.main()
    results = json.loads(output.read_text(encoding="utf-8"))
    assert list(results) == ["dense", *rows]
    rounded = round_to_grid(W, whole_grid(W, GridOptions(3, 16, scale_type="float16"))).matrix()
    for kind, tokens in text.items():
        held = tokens[:400].reshape(25, 16)[-3:]
        for name, matrix in (("dense", W), (rows[0], rounded)):
            expected = cross_entropy(matrix[held[:, :-1]], held[:, 1:]).mean(axis=1)
            np.testing.assert_allclose(results[name]["losses"][kind], expected, rtol=1e-5)
        near, far = (np.array(results[name]["losses"][kind]) for name in ("/dynamic", rows[1]))
        dense = np.array(results["dense"]["losses"][kind])
        assert np.abs(near - dense).max() < 0.05 < np.abs(far - dense).max()
    assert f"{np.exp(np.mean(results['dense']['losses']['glosses'])):.3f}" in capsys.readouterr().out
    monkeypatch.setattr(Trial, "after", None)  # nothing may be run again
    quantized_language_model.main()
    assert "/dynamic" in capsys.readouterr().out
