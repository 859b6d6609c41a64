"""Inputs: shapes from flags, models and guesses; generated values; real ones from a file, checked."""

import re

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from sparse_onnx.data.inputs import (
    InputSpec,
    generate,
    input_specs,
    parse_shape_flags,
    parse_target_flags,
    parse_value_flags,
    read_arrays,
    resolve_shapes,
)
from sparse_onnx.data.samples import open_samples
from sparse_onnx.errors import DataError, UsageError


def model(inputs, body="", outputs="", **arrays):
    """A model of which only the inputs matter."""
    names = re.findall(r"\] (\w+)", inputs)
    body = body or " ".join(f"o{i} = Identity({name})" for i, name in enumerate(names))
    outputs = outputs or ", ".join(f"float[q] o{i}" for i in range(len(names)))
    proto = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    return ir.from_proto(proto)


def spec(name, dtype, *shape, rows=None):
    return InputSpec(name, np.dtype(dtype), shape, rows)


def test_specs_of_a_model():
    source = model("float[batch, 3] A, int64[2] B, bool[1] C")
    source.graph.inputs[2].shape = ir.Shape([])
    found = input_specs(source)
    assert found == (spec("A", np.float32, "batch", 3), spec("B", np.int64, 2), spec("C", np.bool_))
    assert [entry.describe() for entry in found] == ["A: float32[batch, 3]", "B: int64[2]", "C: bool[]"]


def test_unnamed_dimension_is_none():
    source = model("float[n, 3] A")
    source.graph.inputs[0].shape = ir.Shape([None, 3])
    assert input_specs(source) == (spec("A", np.float32, None, 3),)
    assert input_specs(source)[0].describe() == "A: float32[?, 3]"


def test_initializers_among_the_inputs_need_not_be_given():
    source = model(
        "float[2, 2] A, float[2, 2] W", "o = MatMul(A, W)", "float[2, 2] o", W=np.eye(2, dtype=np.float32)
    )
    assert [entry.name for entry in input_specs(source)] == ["A"]


@pytest.mark.parametrize("kind", ["string", "type"])
def test_inputs_that_cannot_be_made(kind):
    source = model("string[n] A" if kind == "string" else "float[n] A")
    if kind == "type":
        source.graph.inputs[0].type = None
    with pytest.raises(UsageError, match="input 'A'"):
        input_specs(source)


def test_rows_of_the_table_that_an_index_looks_up():
    tables = {"small": np.ones((5, 2), np.float32), "large": np.ones((9, 2), np.float32)}
    both = model("int64[n] ids", "a = Gather(large, ids) o = Gather(small, ids)", "float[n, 2] o", **tables)
    assert input_specs(both)[0].rows == 5
    cast = model("int32[n] ids", "c = Cast<to = 7>(ids) o = Gather(large, c)", "float[n, 2] o", **tables)
    assert input_specs(cast)[0].rows == 9
    data = model("float[n, 2] x, int64[k] i", "o = Gather(x, i)", "float[k, 2] o")
    assert [entry.rows for entry in input_specs(data)] == [None, None], (
        "a table of unknown size, and the table itself"
    )


# Shapes


def test_shape_flags():
    assert parse_shape_flags(["a:1,128", "b:7", "c:d:2,3"]) == {"a": (1, 128), "b": (7,), "c:d": (2, 3)}
    assert parse_shape_flags([]) == {}


@pytest.mark.parametrize(
    "flag", ["", "a", "a:", ":1,2", "a:1,,2", "a:x", "a:1.5", "a:0", "a:1,-1", "a=1,2", "a:1 2"]
)
def test_shape_flags_that_are_none(flag):
    with pytest.raises(UsageError, match="NAME:DIM,DIM"):
        parse_shape_flags([flag])


def test_shape_flag_given_twice():
    with pytest.raises(UsageError, match="'a' twice"):
        parse_shape_flags(["a:1", "a:2"])


def test_repeated_shapes_are_targets():
    assert parse_target_flags([]) == ({},)
    assert parse_target_flags(["a:1", "b:2,3"]) == ({"a": (1,), "b": (2, 3)},)
    assert parse_target_flags(["a:1", "b:2,3", "a:4", "a:5"]) == (
        {"a": (1,), "b": (2, 3)},
        {"a": (4,), "b": (2, 3)},
        {"a": (5,), "b": (2, 3)},
    )
    assert parse_target_flags(["a:1", "a:2", "b:3", "b:4"]) == (
        {"a": (1,), "b": (3,)},
        {"a": (2,), "b": (4,)},
    )


def test_repeated_shapes_that_do_not_match():
    with pytest.raises(
        UsageError, match="gives a 2 shapes, b 3 shapes: give every input one shape, or as many"
    ):
        parse_target_flags(["a:1", "a:2", "b:1", "b:2", "b:3", "c:1"])
    with pytest.raises(UsageError, match="NAME:DIM,DIM"):
        parse_target_flags(["a:1", "a:0"])


def test_shapes_of_fixed_inputs_need_no_guess():
    assert resolve_shapes([spec("A", np.float32, 2, 3)], {}) == ({"A": (2, 3)}, {})


def test_guesses_are_told():
    specs = [spec("ids", np.int64, "batch", "sequence"), spec("image", np.float32, "n", 3, "height", "width")]
    shapes, guessed = resolve_shapes(specs, {})
    assert shapes == {"ids": (1, 128), "image": (1, 3, 224, 224)}
    assert guessed == {"batch": 1, "sequence": 128, "n": 1, "height": 224, "width": 224}


def test_unnamed_dimensions_are_guessed_one_by_one():
    shapes, guessed = resolve_shapes([spec("A", np.float32, None, None), spec("B", np.float32, None)], {})
    assert shapes == {"A": (1, 128), "B": (1,)}
    assert guessed == {"A.0": 1, "A.1": 128, "B.0": 1}


def test_a_given_shape_fixes_its_symbols_everywhere():
    specs = [spec("ids", np.int64, "b", "s"), spec("mask", np.int64, "b", "s"), spec("x", np.float32, "s", 4)]
    shapes, guessed = resolve_shapes(specs, {"mask": (2, 9)})
    assert shapes == {"ids": (2, 9), "mask": (2, 9), "x": (9, 4)}
    assert guessed == {}


def test_past_is_empty_unless_given():
    specs = [spec("past", np.float32, "batch", 4, "past_length", 8)]
    assert resolve_shapes(specs, {})[0] == {"past": (1, 4, 0, 8)}
    assert resolve_shapes(specs, {"past": (1, 4, 3, 8)})[0] == {"past": (1, 4, 3, 8)}


def test_unknown_input_is_named_with_the_known_ones():
    with pytest.raises(UsageError, match=r"names 'Z'; the inputs are A: float32\[n\]; B: int64\[2\]"):
        resolve_shapes([spec("A", np.float32, "n"), spec("B", np.int64, 2)], {"Z": (1,)})


@pytest.mark.parametrize("shape", [(1, 4), (3,), (1, 3, 3)])
def test_shape_that_does_not_fit(shape):
    with pytest.raises(UsageError, match=r"does not fit A: float32\[n, 3\]"):
        resolve_shapes([spec("A", np.float32, "n", 3)], {"A": shape})


def test_shapes_that_contradict_each_other():
    specs = [spec("A", np.float32, "n", 3), spec("B", np.float32, "n")]
    with pytest.raises(UsageError, match=r"dimension n .* 2 .* 5"):
        resolve_shapes(specs, {"A": (2, 3), "B": (5,)})


# Values


def test_generated_values():
    specs = [
        spec("ids", np.int64, "b", "s", rows=11),
        spec("attention_mask", np.int64, "b", "s"),
        spec("position_ids", np.int64, "b", "s", rows=300),
        spec("token_type_ids", np.int64, "b", "s", rows=2),
        spec("other", np.int32, "b"),
        spec("flag", np.bool_),
        spec("x", np.float32, "b", 1000),
        spec("h", np.float16, "b"),
    ]
    feeds = generate(specs, resolve_shapes(specs, {"ids": (2, 300)})[0])
    for entry in specs:
        assert feeds[entry.name].dtype == entry.dtype
    assert feeds["ids"].shape == (2, 300)
    assert set(np.unique(feeds["ids"])) == set(range(11))
    assert (feeds["attention_mask"] == 1).all()
    assert (feeds["position_ids"] == np.arange(300)).all()
    assert (feeds["token_type_ids"] == 0).all()
    assert (feeds["other"] == 0).all()
    assert feeds["flag"].shape == ()
    assert feeds["flag"]
    assert abs(float(feeds["x"].mean())) < 0.1
    assert abs(float(feeds["x"].std()) - 1) < 0.1


@pytest.mark.parametrize(
    ("inputs", "body"),
    [
        ("float[S, B, 3] X, int32[B] lens", "Y = GRU<hidden_size = 2>(X, W, R, , lens)"),
        (
            "float[B, S, 3] x, int64[B] lens",
            "X = Transpose<perm = [1, 0, 2]>(x) l = Cast<to = 6>(lens) Y = GRU<hidden_size = 2>(X, W, R, , l)",
        ),
        ("float[9, B, 3] X, int32[B] lens", "Y = GRU<hidden_size = 2>(X, W, R, , lens)"),
    ],
)
def test_generated_sequences_are_of_full_length(inputs, body):
    weights = {"W": np.ones((1, 6, 3), np.float32), "R": np.ones((1, 6, 2), np.float32)}
    specs = input_specs(model(inputs, body, "float[S, 1, B, 2] Y", **weights))
    shapes, _ = resolve_shapes(
        specs, {specs[0].name: tuple({"S": 9, "B": 4}.get(d, d) for d in specs[0].shape)}
    )
    np.testing.assert_array_equal(generate(specs, shapes)["lens"], [9] * 4)


def test_generated_values_follow_the_seed():
    specs = [spec("x", np.float32, 8), spec("ids", np.int64, 8, rows=1000)]
    shapes = {"x": (8,), "ids": (8,)}
    first, again, other = (generate(specs, shapes, seed) for seed in (0, 0, 1))
    for name in shapes:
        assert (first[name] == again[name]).all()
        assert (first[name] != other[name]).any()


def test_empty_inputs_can_be_generated():
    feeds = generate([spec("past", np.float32, 1, "past_length", 4)], {"past": (1, 0, 4)})
    assert feeds["past"].shape == (1, 0, 4)


# Real inputs


IDS, X = spec("ids", np.int64, "b", "s"), spec("x", np.float32, "b", 3)


def write(folder, **arrays):
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def read_samples(path, specs, *, batch=8):
    return list(open_samples(path, specs, batch=batch))


def test_samples_are_cut_into_batches(tmp_path):
    ids, x = np.arange(22).reshape(11, 2), np.arange(33, dtype=np.float32).reshape(11, 3)
    batches = read_samples(write(tmp_path, ids=ids, x=x, unused=np.zeros(4)), [IDS, X])
    assert [len(batch["ids"]) for batch in batches] == [8, 3]
    assert [set(batch) for batch in batches] == [{"ids", "x"}] * 2
    assert (np.concatenate([batch["ids"] for batch in batches]) == ids).all()
    assert (np.concatenate([batch["x"] for batch in batches]) == x).all()
    assert [len(batch["ids"]) for batch in read_samples(tmp_path / "data.npz", [IDS, X], batch=5)] == [
        5,
        5,
        1,
    ]


def test_values_are_cast_where_nothing_but_precision_is_lost(tmp_path):
    path = write(tmp_path, ids=np.ones((2, 2), np.int32), x=np.full((2, 3), 0.1, np.float64))
    (batch,) = read_samples(path, [IDS, X])
    assert batch["ids"].dtype == np.int64
    assert batch["x"].dtype == np.float32
    assert batch["x"][0, 0] == np.float32(0.1)


def test_fixed_batch_of_the_model_is_kept(tmp_path):
    fixed = spec("x", np.float32, 2, 3)
    batches = read_samples(write(tmp_path, x=np.zeros((6, 3), np.float32)), [fixed])
    assert [batch["x"].shape for batch in batches] == [(2, 3)] * 3
    with pytest.raises(DataError, match="5 samples are no multiple of the model's fixed batch of 2"):
        read_samples(write(tmp_path, x=np.zeros((5, 3), np.float32)), [fixed])


def test_fixed_batch_larger_than_ours_is_kept(tmp_path):
    fixed = spec("x", np.float32, 16, 3)
    (batch,) = read_samples(write(tmp_path, x=np.zeros((16, 3), np.float32)), [fixed])
    assert batch["x"].shape == (16, 3)


GOOD = {"ids": np.zeros((4, 2), np.int64), "x": np.zeros((4, 3), np.float32)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": None}, "has no x; it has ids; expected ids: int64.b, s.; x: float32.b, 3."),
        ({"x": np.zeros((4, 3), np.int64)}, None),
        ({"ids": np.zeros((4, 2), np.float32)}, "ids has dtype float32; expected int64"),
        ({"x": np.zeros((4, 3), np.complex64)}, "x has dtype complex64; expected float32"),
        ({"x": np.array([["a"] * 3] * 4)}, "x has dtype <U1; expected float32"),
        ({"x": np.zeros((4, 3, 1), np.float32)}, "x is float32.4, 3, 1.; expected x: float32.b, 3."),
        ({"x": np.zeros((4, 4), np.float32)}, "x is float32.4, 4.; expected x: float32.b, 3."),
        ({"x": np.zeros((0, 3), np.float32)}, "x is float32.0, 3.; expected x: float32.b, 3."),
        ({"x": np.full((4, 3), np.nan, np.float32)}, "x holds NaN, Inf or values beyond float32"),
        ({"x": np.full((4, 3), -np.inf, np.float32)}, "x holds NaN, Inf or values beyond float32"),
        ({"x": np.full((4, 3), 1e300)}, "x holds NaN, Inf or values beyond float32"),
        ({"x": np.zeros((3, 3), np.float32)}, "differ in their number of samples: .'ids': 4, 'x': 3."),
    ],
)
def test_files_that_do_not_fit(tmp_path, changes, said):
    arrays = {name: array for name, array in {**GOOD, **changes}.items() if array is not None}
    path = write(tmp_path, **arrays)
    if said is None:
        assert read_samples(path, [IDS, X])[0]["x"].dtype == np.float32
        return
    with pytest.raises(DataError, match=said) as caught:
        read_samples(path, [IDS, X])
    assert str(path) in str(caught.value)


def test_integers_that_do_not_fit_are_not_wrapped(tmp_path):
    path = write(tmp_path, ids=np.array([[1, 2**40]]))
    with pytest.raises(DataError, match="ids holds values beyond int32"):
        read_samples(path, [spec("ids", np.int32, "b", "s")])


def test_scalar_input_goes_with_every_batch(tmp_path):
    path = write(tmp_path, x=np.zeros((9, 3), np.float32), flag=np.array(True))
    batches = read_samples(path, [X, spec("flag", np.bool_)])
    assert [(len(batch["x"]), batch["flag"].shape) for batch in batches] == [(8, ()), (1, ())]


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 junk", None])
def test_files_that_are_no_npz(tmp_path, content):
    path = tmp_path / "data.npz"
    if content is None:
        np.save(tmp_path / "data.npy", np.zeros(3))
        path = (tmp_path / "data.npy").rename(path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        read_samples(path, [X])


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"no such file; expected an \.npz with x: float32"):
        read_samples(tmp_path / "nosuch.npz", [X])


def test_folder(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        read_arrays(tmp_path, [X])


def test_pickled_objects_are_never_loaded(tmp_path):
    path = write(tmp_path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        read_samples(path, [X])


def test_truncated_file(tmp_path):
    path = write(tmp_path, **GOOD)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        read_samples(path, [IDS, X])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("16000", 16000),
        ("-1.5e-3", -1.5e-3),
        ("true", True),
        ("False", False),
        ("1,0", (1, 0)),
        ("[1, 0]", (1, 0)),
        ("[[1,2],[3,4]]", ((1, 2), (3, 4))),
        ("[1,2],[3,4]", ((1, 2), (3, 4))),
        ("true,false", (True, False)),
    ],
)
def test_values_are_read(text, value):
    assert parse_value_flags([f"a=b={text}"[2:], f"name={text}"]) == {"b": value, "name": value}


@pytest.mark.parametrize(
    "text", ["", "[]", "nan", "NaN", "infinity", "null", '"a"', "{}", "1,", "[1,[]]", "0x10", "[" * 9999]
)
def test_what_is_no_value(text):
    with pytest.raises(UsageError, match="write NAME=VALUE"):
        parse_value_flags([f"name={text}"])


def test_types_that_numpy_borrows():
    """bfloat16 and the like take any finite number."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [2])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    (spec,) = input_specs(model, {"x": (1, 2.5)})
    array = spec.array()
    assert array is not None
    assert array.astype(np.float32).tolist() == [1, 2.5]
    with pytest.raises(UsageError, match="takes a finite number"):
        input_specs(model, {"x": 1e39})


def test_a_long_chain_behind_an_input_is_no_trouble():
    chain = " ".join(f"a{i + 1} = Identity(a{i})" for i in range(3000))
    text = f'<ir_version: 9, opset_import: ["" : 17]> g (int64 a0) => (int64 a3000) {{ {chain} }}'
    (spec,) = input_specs(ir.from_proto(onnx.parser.parse_model(text)))
    assert spec.compared is None
