"""The benchmark of pruned language models: its vocabulary, its perplexity and what it writes."""

import json
import math
import sys

import numpy as np
import onnx
import onnx.parser
import pytest

pytest.importorskip("torch")

from sparse_onnx.model import model_io
from sparse_onnx.tools.benchmarks import pruned_language_model
from sparse_onnx.tools.benchmarks.pruned_language_model import (
    calibration_samples,
    cross_entropy,
    perplexity_ratio,
    window_losses,
)
from sparse_onnx.tools.benchmarks.small_language_model import merges, pieces

_TABLE = """<ir_version: 9, opset_import: ["" : 20]>
table (int64[batch, 8] input_ids) => (float[batch, 8, 16] logits)
<float[16, 16] E, float[16, 16] W, float[16, 16] lm_head>
{ e = Gather(E, input_ids) h = MatMul(e, W) logits = MatMul(h, lm_head) }"""


def _table(W):
    """A model whose logits depend on the present token alone."""
    proto = onnx.parser.parse_model(_TABLE)
    for name, array in (("E", np.eye(16)), ("W", W), ("lm_head", np.eye(16))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return proto


@pytest.fixture
def windows():
    return np.random.default_rng(0).integers(0, 16, (40, 9)).astype(np.uint16)


@pytest.fixture
def model(tmp_path):
    W = 3 * np.random.default_rng(1).standard_normal((16, 16))
    onnx.save(_table(W), tmp_path / "table.onnx")
    return model_io.load_model(tmp_path / "table.onnx"), W


def test_the_most_frequent_pair_becomes_a_token_and_takes_part_in_later_ones():
    assert merges("abab abab abab cd", 3) == [(97, 98), (256, 256), (32, 257)]


def test_no_more_tokens_than_there_are_pairs():
    assert merges("ab", 5) == [(97, 98)]
    assert merges("a", 5) == []


def test_repeated_letters_merge_from_the_left():
    assert pieces("aaaaa", {(97, 97): 0}) == (256, 256, 97)


def test_pieces_spell_the_word():
    order = merges("the theme of the thesis then and the other thing", 12)
    spelled = [bytes([index]) for index in range(256)]
    for first, second in order:
        spelled.append(spelled[first] + spelled[second])
    rank = {pair: index for index, pair in enumerate(order)}
    for word in ("the", " the", "theremin", "été", ""):
        assert b"".join(spelled[token] for token in pieces(word, rank)) == word.encode()


def test_cross_entropy_of_even_and_of_huge_logits():
    assert cross_entropy(np.zeros((2, 3, 16), np.float32), np.ones((2, 3))) == pytest.approx(math.log(16))
    assert cross_entropy(np.array([[1e4, 0]], np.float32), np.array([1])) == pytest.approx(1e4)


def test_losses_count_every_token_but_the_first_of_a_window(model, windows):
    loaded, W = model
    expected = cross_entropy(W[windows[:, :-1]], windows[:, 1:]).mean(axis=1)
    assert window_losses(loaded, windows, threads=1) == pytest.approx(expected, rel=1e-5)


def test_the_error_of_a_perplexity_ratio_is_that_of_paired_windows():
    rng = np.random.default_rng(0)
    reference = rng.normal(4, 1, 2000)  # windows differ a lot, models little
    ratio, error = perplexity_ratio(reference + rng.normal(0.1, 0.02, 2000), reference)
    assert ratio == pytest.approx(math.exp(0.1), abs=4 * error)
    assert error == pytest.approx(math.exp(0.1) * 0.02 / math.sqrt(2000), rel=0.1)


def test_calibration_draws_each_window_at_most_once_and_leaves_out_the_last_token(windows):
    drawn = np.concatenate([feeds["input_ids"] for feeds in calibration_samples(windows, 24)])
    assert drawn.shape == (24, 8)
    assert drawn.dtype == np.int64
    rows = {tuple(row) for row in windows[:, :-1].tolist()}
    assert len({tuple(row) for row in drawn.tolist()} & rows) == 24


def test_a_model_that_is_there_is_pruned_and_not_trained(model, windows, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "trained"
    folder.mkdir()
    model_io.save_model(model[0], folder)
    np.save(folder / "train.npy", windows)
    np.save(folder / "held_out.npy", windows)
    output = tmp_path / "out.json"
    methods = ["magnitude", "sparsegpt,scope=row"]
    arguments = [str(folder), "--method", *methods, "--sparsity", "0.5", "2:4", "--json", str(output)]
    monkeypatch.setattr(
        sys, "argv", ["pruned_language_model", *arguments, "--windows", "40", "--threads", "1"]
    )
    pruned_language_model.main()
    results = json.loads(output.read_text(encoding="utf-8"))
    dense = window_losses(model[0], windows, threads=1)
    assert results["dense"] == pytest.approx(np.exp(dense.mean()))
    assert all(results[method][zeros]["perplexity"] > 1 for method in methods for zeros in ("0.5", "2:4"))
    pruned = results["magnitude"]["0.5"]
    assert pruned["ratio"] == pytest.approx(pruned["perplexity"] / results["dense"])
    assert pruned["ratio"] != 1
    assert "sparsegpt,scope=row" in capsys.readouterr().out
