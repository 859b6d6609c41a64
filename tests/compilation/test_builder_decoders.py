"""Decoders in the layout of onnxruntime-genai's model builder compile with no option but what is wanted."""

from collections import Counter

import numpy as np
import pytest

import sparse_onnx
from sparse_onnx.errors import UsageError
from sparse_onnx.model.model_io import load_model
from sparse_onnx.running.runtime import open_session, run_session
from sparse_onnx.tools.benchmarks.make_decoder import SHAPES, write_decoder

TINY = SHAPES["tiny"]


def feeds(batch, past, new, seed=0):
    rng = np.random.default_rng(seed)
    cache = (batch, TINY.pairs, past, TINY.head_size)
    given = {
        "input_ids": rng.integers(0, TINY.vocabulary, (batch, new)),
        "attention_mask": np.ones((batch, past + new), np.int64),
    }
    for layer in range(TINY.layers):
        for part in ("key", "value"):
            given[f"past_key_values.{layer}.{part}"] = rng.standard_normal(cache).astype(np.float32)
    return given


def check_answers(original, written, tolerance):
    """With the library and without it, at several pasts and batches."""
    for batch, past, new in ((1, 0, 16), (2, 0, 5), (3, 7, 1), (1, 128, 1), (1, 4, 3)):
        given = feeds(batch, past, new)
        expected = run_session(open_session(original, threads=1, library=False), given)
        for library in (True, False):
            got = run_session(open_session(written, threads=1, library=library), given)
            for name, value in expected.items():
                np.testing.assert_allclose(got[name], value, atol=tolerance * np.abs(value).max())


def optimize(path, out, **options):
    return sparse_onnx.optimize(path, out, threads=1, benchmark=False, **options)


def ops(path):
    return Counter(node.op_type for node in load_model(path).graph)


@pytest.mark.parametrize("packed", [True, False])
def test_of_floats(tmp_path, packed):
    path = write_decoder(tmp_path / "in", TINY, packed=packed, zeros=0.8)
    said = []
    result = optimize(path, tmp_path / "out", progress=said.append)
    found = ops(tmp_path / "out" / "model.onnx")
    assert found["SparseFeedForwardSiluGate"] == TINY.layers
    assert found["GroupQueryAttention"] == TINY.layers
    assert found["SparseMatMulSplit2"] + found["SparseMatMulSplit3"] == (0 if packed else TINY.layers)
    assert not found["Sigmoid"]
    check_answers(path, tmp_path / "out" / "model.onnx", 1e-4)
    assert any("512 tokens of prompt and 128 new ones" in line for line in said)
    prefill, decode = result.report["targets"]
    assert (prefill["phase"], prefill["tokens"], prefill["weight"]) == ("prefill", 128, 4)
    assert (decode["phase"], decode["tokens"], decode["weight"]) == ("decode", 1, 128)
    assert decode["input_shapes"]["past_key_values.1.value"] == [1, TINY.pairs, 128, TINY.head_size]
    assert prefill["optimized_tokens_per_second"] is None  # not timed
    assert sparse_onnx.verify(path, tmp_path / "out" / "model.onnx", threads=1).passed


@pytest.mark.parametrize("packed", [True, False])
def test_of_four_bits_and_zeros(tmp_path, packed):
    """Opened, pruned on their grid, and merged around GroupQueryAttention."""
    path = write_decoder(tmp_path / "in", TINY, packed=packed, bits=4)
    result = optimize(
        path, tmp_path / "out", method="magnitude", sparsity=0.75, precision="int4", keep_pruned=True
    )
    report = result.report
    assert {row["decision"] for row in report["layers"] if "lm_head" not in row["name"]} == {"sparse"}
    assert all(row["sparsity"] >= 0.75 for row in report["layers"] if "lm_head" not in row["name"])
    found = ops(tmp_path / "out" / "model.onnx")
    assert found["SparseFeedForwardSiluGate"] == TINY.layers
    assert found["GroupQueryAttention"] == TINY.layers
    assert report["verification"]["against_pruned_dense"]["relative_error"] < 1e-4
    assert report["verification"]["without_library"]["relative_error"] < 1e-4


def test_of_four_bits_without_anything_to_gain_it_is_the_original(tmp_path):
    path = write_decoder(tmp_path / "in", TINY, bits=4)
    before = path.read_bytes()
    result = optimize(path, tmp_path / "out", precision="int4")
    assert result.report["summary"]["written"] == "original"
    assert result.report["verification"]["against_original"]["relative_error"] == 0
    assert ops(tmp_path / "out" / "model.onnx") == ops(path)
    assert path.read_bytes() == before


def test_other_bits_are_found_anew(tmp_path):
    """All but the head, which keeps those that it has."""
    path = write_decoder(tmp_path / "in", TINY, bits=4)
    result = optimize(path, tmp_path / "out", precision="int4", bits=8)
    found = ops(tmp_path / "out" / "model.onnx")
    assert found["Unpack8"] == 5 * TINY.layers
    assert found["Unpack4WithZeros"] + found["Unpack4"] == 1
    assert result.report["verification"]["against_original"]["cosine"] > 0.999
    check_answers(path, tmp_path / "out" / "model.onnx", 0.05)


def test_a_timed_run_tells_tokens_per_second(tmp_path):
    path = write_decoder(tmp_path / "in", TINY, bits=4)
    result = sparse_onnx.optimize(
        path,
        tmp_path / "out",
        threads=1,
        precision="int4",
        method="magnitude",
        sparsity=0.5,
        timing_cache=False,
    )
    for row in result.report["targets"]:
        if row["dense_ms"] is not None:
            assert row["dense_tokens_per_second"] == pytest.approx(1000 * row["tokens"] / row["dense_ms"])
    assert sparse_onnx.verify(path, tmp_path / "out" / "model.onnx", threads=1, max_relative_error=2).passed


def test_another_request(tmp_path):
    path = write_decoder(tmp_path / "in", TINY, zeros=0.8)
    report = optimize(path, tmp_path / "out", prompt_tokens=32, new_tokens=5).report
    assert [row["weight"] for row in report["targets"]] == [1, 5]
    assert [row["input_shapes"]["input_ids"] for row in report["targets"]] == [[1, 32], [1, 1]]
    assert report["recipe"]["target"]["prompt_tokens"] == 32
    again = sparse_onnx.optimize(
        path, tmp_path / "again", recipe=tmp_path / "out" / "recipe.yaml", benchmark=False
    )
    assert [row["weight"] for row in again.report["targets"]] == [1, 5]


def test_shapes_and_a_request_are_one_too_many(tmp_path):
    path = write_decoder(tmp_path / "in", TINY)
    with pytest.raises(UsageError, match="prompt_tokens and new_tokens"):
        optimize(path, tmp_path / "out", prompt_tokens=32, input_shapes={"input_ids": (1, 8)})
    with pytest.raises(UsageError, match="new_tokens"):
        optimize(path, tmp_path / "out", new_tokens=0)
