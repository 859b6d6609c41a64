"""Prefill and decode of a typical request are the targets of a decoder with a cache, where no shapes are given."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sparse_onnx.data.inputs import input_specs
from sparse_onnx.model.model_io import load_model
from sparse_onnx.running.request import Request
from sparse_onnx.running.requests import Phase, choose_targets, phase_of

PAST = ["batch_size", 2, "past_sequence_length", 4]


def model_of(path, **inputs):
    """A model with these inputs (element type and dimensions), each given back."""
    values = [helper.make_tensor_value_info(name, kind, dims) for name, (kind, dims) in inputs.items()]
    nodes = [helper.make_node("Identity", [v.name], [f"{v.name}.out"]) for v in values]
    outputs = [
        helper.make_tensor_value_info(f"{v.name}.out", v.type.tensor_type.elem_type, None) for v in values
    ]
    graph = helper.make_graph(nodes, "g", values, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return load_model(path)


def decoder(tmp_path, ids=("batch_size", "sequence_length"), past=PAST, mask="total_sequence_length", **more):
    return model_of(
        tmp_path / "m.onnx",
        input_ids=(TensorProto.INT64, list(ids)),
        attention_mask=(TensorProto.INT64, ["batch_size", mask]),
        **{
            "past_key_values.0.key": (TensorProto.FLOAT, past),
            "past_key_values.0.value": (TensorProto.FLOAT, past),
        },
        **more,
    )


def targets(model, given=({},), weights=None, request=None, data=(), fixed=None):
    return choose_targets(model, input_specs(model, None, fixed), given, weights, request or Request(), data)


def shapes(found):
    return [
        (choice.shapes["input_ids"], choice.shapes["attention_mask"], choice.shapes["past_key_values.0.key"])
        for choice in found.choices
    ]


def test_a_decoder_has_two(tmp_path):
    found = targets(decoder(tmp_path, position_ids=(TensorProto.INT64, ["batch_size", "sequence_length"])))
    assert shapes(found) == [((1, 128), (1, 128), (1, 2, 0, 4)), ((1, 1), (1, 129), (1, 2, 128, 4))]
    assert found.weights == (4.0, 128.0)
    assert "512 tokens of prompt and 128 new ones" in found.note
    assert "a prefill of 128 counts 4" in found.note
    assert [phase_of(c.specs, c.shapes) for c in found.choices] == [Phase("prefill", 128), Phase("decode", 1)]
    assert found.choices[1].feeds(0)["position_ids"].tolist() == [[128]]


@pytest.mark.parametrize(
    ("prompt", "new", "length", "weights"),
    [(1000, 10, 128, (7.8125, 10)), (32, 64, 32, (1, 64)), (128, 1, 128, (1, 1)), (2, 1, 2, (1, 1))],
)
def test_another_request(tmp_path, prompt, new, length, weights):
    found = targets(decoder(tmp_path), request=Request(prompt, new))
    assert [ids for ids, _, _ in shapes(found)] == [(1, length), (1, 1)]
    assert shapes(found)[1][2] == (1, 2, length, 4)
    assert found.weights == weights


@pytest.mark.parametrize("mask", ["past_sequence_length + sequence_length", "past_sequence_length + 1", "m"])
def test_names_of_other_exporters(tmp_path, mask):
    found = targets(decoder(tmp_path, mask=mask))
    assert shapes(found)[1][::2] == ((1, 1), (1, 2, 128, 4))
    if mask != "m":
        assert shapes(found)[1][1] == (1, 129)


def test_caches_without_names(tmp_path):
    found = targets(decoder(tmp_path, past=[None, 2, None, 4]))
    assert shapes(found)[1][2] == (1, 2, 128, 4)
    assert found.choices[1].shapes["past_key_values.0.value"] == (1, 2, 128, 4)


def test_sizes_of_the_data_are_those_of_the_prefill(tmp_path):
    model = decoder(tmp_path)
    empty = np.zeros((2, 2, 0, 4), np.float32)
    data = [
        {
            "input_ids": np.zeros((2, 40), np.int64),
            "attention_mask": np.ones((2, 40), np.int64),
            "past_key_values.0.key": empty,
            "past_key_values.0.value": empty,
        }
    ]
    found = targets(model, data=data)
    assert [ids[1] for ids, _, _ in shapes(found)] == [40, 1]
    assert shapes(found)[1][2][2] == 40
    assert found.weights == (512 / 40, 128)


def test_given_shapes_are_the_targets(tmp_path):
    model = decoder(tmp_path)
    found = targets(model, [{"input_ids": (1, 8)}])
    assert shapes(found) == [((1, 8), (1, 8), (1, 2, 0, 4))]
    assert found.weights is None
    assert found.note == ""
    found = targets(model, [{"input_ids": (1, 8)}, {"input_ids": (2, 8)}], (1.0, 2.0))
    assert len(found.choices) == 2
    assert found.weights == (1.0, 2.0)


@pytest.mark.parametrize(
    "more",
    [
        {"ids": ("batch_size", 16)},  # a fixed number of tokens
        {"ids": ("batch_size", 1)},
        {"past": ["batch_size", 2, 16, 4]},  # a cache of a fixed length
    ],
)
def test_decoders_without_two_ways(tmp_path, more):
    found = targets(decoder(tmp_path, **more))
    assert len(found.choices) == 1
    assert found.weights is None


def test_without_the_branch_that_reads_the_cache_there_is_no_step(tmp_path):
    model = decoder(tmp_path, use_cache_branch=(TensorProto.BOOL, [1]))
    assert [c.feeds(0)["use_cache_branch"].tolist() for c in targets(model).choices] == [[False], [True]]
    found = targets(model, fixed={"use_cache_branch": False})
    assert len(found.choices) == 1


@pytest.mark.parametrize("name", ["input_ids", "pixels"])
def test_models_without_a_cache_have_one(tmp_path, name):
    model = model_of(
        tmp_path / "m.onnx",
        **{name: (TensorProto.INT64, ["batch", "sequence"])},
        token_type_ids=(TensorProto.INT64, ["batch", "sequence"]),
    )
    found = targets(model)
    assert len(found.choices) == 1
    assert found.note == ""
    assert phase_of(found.choices[0].specs, found.choices[0].shapes) is None
