"""Greedy generation with a cache gives the tokens that the whole sequence without a cache gives."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sparse_onnx.errors import UsageError
from sparse_onnx.model.model_io import load_model
from sparse_onnx.running.generation import Generator
from sparse_onnx.running.runtime import open_session, run_session
from sparse_onnx.tools.benchmarks.make_decoder import SHAPES, write_decoder

TINY = SHAPES["tiny"]


def opened(path):
    session = open_session(path, threads=1, library=False)
    return Generator(load_model(path), session), session


def whole(session, tokens):
    """The likeliest token behind ``tokens``, all of them in one run."""
    empty = np.zeros((1, TINY.pairs, 0, TINY.head_size), np.float32)
    feeds = {
        "input_ids": np.array([tokens]),
        "attention_mask": np.ones((1, len(tokens)), np.int64),
        **{f"past_key_values.{n}.{part}": empty for n in range(TINY.layers) for part in ("key", "value")},
    }
    return int(run_session(session, feeds)["logits"][0, -1].argmax())


@pytest.mark.parametrize("bits", [32, 4])
def test_as_without_a_cache(tmp_path, bits):
    generate, session = opened(write_decoder(tmp_path, TINY, bits=bits))
    tokens = [5, 6, 7]
    found = generate(tokens, 12)
    assert len(found.tokens) == len(found.milliseconds) == 12
    assert min(found.milliseconds) > 0
    expected = list(tokens)
    for _ in range(12):
        expected.append(whole(session, expected))
    assert list(found.tokens) == expected[3:]
    assert generate(tokens, 12).tokens == found.tokens  # nothing is left of the first


def test_it_stops_at_the_end(tmp_path):
    generate, _ = opened(write_decoder(tmp_path, TINY))
    tokens = generate([5, 6, 7], 12).tokens
    stop = tokens[4]
    found = generate([5, 6, 7], 12, {stop}).tokens
    assert found == tokens[: tokens.index(stop) + 1]
    assert len(generate([5], 1).tokens) == 1


def test_a_prompt_has_tokens(tmp_path):
    generate, _ = opened(write_decoder(tmp_path, TINY))
    with pytest.raises(UsageError, match="one token or more"):
        generate([], 4)


def echo(path, names, outputs):
    """A model with these inputs, whose outputs are copies of some."""
    values = [helper.make_tensor_value_info(name, kind, dims) for name, kind, dims in names]
    nodes = [helper.make_node("Identity", [source], [name]) for name, source in outputs.items()]
    kinds = {name: kind for name, kind, _ in names}
    made = [helper.make_tensor_value_info(name, kinds[source], None) for name, source in outputs.items()]
    graph = helper.make_graph(nodes, "g", values, made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


IDS = ("input_ids", TensorProto.INT64, ["b", "sequence_length"])
KEY = ("past_key_values.0.key", TensorProto.FLOAT, ["b", 2, "past_sequence_length", 4])
LOGITS = {"logits": "past_key_values.0.key"}


@pytest.mark.parametrize(
    ("names", "outputs", "message"),
    [
        ([IDS], {"logits": "input_ids"}, "no decoder with a cache"),
        ([IDS, KEY], {"present.0.key": "past_key_values.0.key"}, "no decoder with a cache"),
        ([IDS, KEY], LOGITS, "no output present"),
    ],
)
def test_what_is_no_decoder(tmp_path, names, outputs, message):
    with pytest.raises(UsageError, match=message):
        opened(echo(tmp_path / "m.onnx", names, outputs))


def test_an_input_of_which_nothing_is_known(tmp_path):
    strange = ("pixel_values", TensorProto.FLOAT, ["b", 3, 8, 8])
    outputs = LOGITS | {"present.0.key": "past_key_values.0.key"}
    generate, _ = opened(echo(tmp_path / "m.onnx", [IDS, KEY, strange], outputs))
    with pytest.raises(UsageError, match="knows nothing of the input pixel_values"):
        generate([1], 1)
