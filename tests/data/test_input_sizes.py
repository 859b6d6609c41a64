"""Sizes that must agree: solved before anything is guessed."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_onnx.data.input_sizes import is_cache_length, other_shapes, solve_shapes
from sparse_onnx.data.inputs import InputSpec, resolve_shapes
from sparse_onnx.errors import UsageError


def spec(name, *shape, dtype=np.int64, **more):
    return InputSpec(name, np.dtype(dtype), shape, None, **more)


def decoder(mask="past_sequence_length + sequence_length", past="past_sequence_length"):
    return (
        spec("input_ids", "batch_size", "sequence_length"),
        spec("attention_mask", "batch_size", mask),
        spec("past", "batch_size", 4, past, 16, dtype=np.float32),
    )


MASKS = ("past_sequence_length + sequence_length", "past_sequence_length + 1", "past_sequence_length+1",
         "total_sequence_length", "attention_mask_sequence_length")  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
def test_a_decoder_prefills(mask):
    shapes, guessed = resolve_shapes(decoder(mask), {})
    assert shapes == {"input_ids": (1, 128), "attention_mask": (1, 128), "past": (1, 4, 0, 16)}
    assert guessed == {"past_sequence_length": 0, "batch_size": 1, "sequence_length": 128}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ({"input_ids": (2, 5)}, (2, 5, 5, 0)),
        ({"past": (2, 4, 7, 16)}, (2, 128, 135, 7)),
        ({"past": (2, 4, 7, 16), "input_ids": (2, 1)}, (2, 1, 8, 7)),
        ({"attention_mask": (3, 9)}, (3, 9, 9, 0)),
        ({"attention_mask": (3, 9), "input_ids": (3, 2)}, (3, 2, 9, 7)),
        ({"attention_mask": (3, 9), "past": (3, 4, 8, 16)}, (3, 1, 9, 8)),
    ],
)
def test_the_rest_follows_in_every_direction(mask, given, sizes):
    batch, new, total, past = sizes
    shapes, guessed = resolve_shapes(decoder(mask), given)
    assert shapes == {
        "input_ids": (batch, new),
        "attention_mask": (batch, total),
        "past": (batch, 4, past, 16),
    }
    assert set(guessed) <= {"past_sequence_length", "sequence_length"}


@given(st.integers(1, 9), st.integers(1, 99), st.integers(0, 99), st.integers(1, 3))
def test_two_of_three_give_the_third(batch, new, past, left_out):
    whole = {"input_ids": (batch, new), "attention_mask": (batch, past + new), "past": (batch, 4, past, 16)}
    given = dict(whole)
    del given[list(whole)[left_out - 1]]
    assert resolve_shapes(decoder(), given) == (whole, {})


def test_what_is_given_may_break_a_convention_but_no_expression():
    given = {"input_ids": (1, 5), "attention_mask": (1, 100), "past": (1, 4, 0, 16)}
    for mask in MASKS[1:]:
        assert resolve_shapes(decoder(mask), given) == (given, {})
    with pytest.raises(UsageError, match=r"past_sequence_length \+ sequence_length both 5 and 100"):
        resolve_shapes(decoder(), given)


def test_sizes_that_cannot_be():
    with pytest.raises(
        UsageError, match=r"makes dimension past_\S+ \+ \S+ 3, which no size of past_sequence_length"
    ):
        resolve_shapes(decoder(), {"input_ids": (1, 5), "attention_mask": (1, 3)})
    with pytest.raises(UsageError, match=r"makes dimension 2\*n 3, which no size of n gives"):
        resolve_shapes([spec("x", "2*n")], {"x": (3,)})
    with pytest.raises(
        UsageError, match=r"dimension n - 500 of x becomes -372 with n = 128: say --input-shape x:DIM"
    ):
        resolve_shapes([spec("x", 1, "n - 500"), spec("y", 1, "n")], {})


def test_products():
    specs = [spec("ids", "batch_size", "s"), spec("past", "batch_size*heads", "past_s", 8, dtype=np.float32)]
    assert resolve_shapes(specs, {"ids": (2, 3), "past": (8, 1, 8)})[0]["past"] == (8, 1, 8)
    sizes = solve_shapes(specs, {"ids": (2, 3)}, [("heads", 4)])
    assert sizes.shapes["past"] == (8, 0, 8)
    with pytest.raises(UsageError, match=r"batch_size\*heads 7, which no size of heads gives"):
        resolve_shapes(specs, {"ids": (2, 3), "past": (7, 1, 8)})


def test_facts_come_before_guesses_and_after_what_is_given():
    specs = [spec("x", "n", "k"), spec("z", None, "m")]
    facts = [("k", 64), ("k", 32), ("z.0", 7), ("n", 3), ("stranger", 5)]
    sizes = solve_shapes(specs, {"x": (4, 48)}, facts)
    assert sizes.shapes == {"x": (4, 48), "z": (7, 128)}
    assert solve_shapes(specs, {}, facts).shapes == {"x": (3, 64), "z": (7, 128)}
    assert solve_shapes(specs, {}, facts).guessed == {"m": 128}


def test_unknown_dimensions_are_independent():
    image = [spec("x", None, 3, None, None, dtype=np.float32)]
    assert resolve_shapes(image, {"x": (1, 3, 48, 192)}) == ({"x": (1, 3, 48, 192)}, {})


def test_a_number_for_a_name_is_a_guess():
    assert resolve_shapes([spec("x", "3", "batch-size")], {}) == ({"x": (3, 1)}, {"3": 3, "batch-size": 1})
    assert resolve_shapes([spec("x", "3", "n")], {"x": (4, 2)})[0] == {"x": (4, 2)}


def test_values_give_shapes():
    specs = [
        spec("flags", "n", value=(1, 0)),
        spec("x", "n", "k"),
        spec("rate", value=8000),
        spec("f", "n", value=1),
    ]
    assert resolve_shapes(specs, {})[0] == {"flags": (2,), "x": (2, 128), "rate": (), "f": (2,)}
    with pytest.raises(
        UsageError, match=r"--input-shape flags:3 is not the shape of the value that is given for it"
    ):
        resolve_shapes(specs, {"flags": (3,)})


def test_an_unknown_rank_must_be_given():
    specs = [InputSpec("x", np.dtype(np.float32), None, None), spec("y", "n")]
    with pytest.raises(UsageError, match="how many dimensions x has: give --input-shape x:DIM"):
        resolve_shapes(specs, {})
    assert resolve_shapes(specs, {"x": (2, 3, 4)})[0] == {"x": (2, 3, 4), "y": (1,)}


@pytest.mark.parametrize(
    ("name", "is_length"),
    [
        ("past_sequence_length", True),
        ("cache_len", True),
        ("kv_cache_dim", False),
        ("cache_heads", False),
        ("n", False),
    ],
)
def test_lengths_of_caches(name, is_length):
    assert is_cache_length(name) == is_length


@pytest.mark.parametrize("mask", MASKS)
def test_other_shapes_agree_as_well(mask):
    specs = (*decoder(mask), spec("state", 2, "batch_size", 8))
    given = {"past": (1, 4, 6, 16)}
    assert other_shapes(specs, solve_shapes(specs, given), (), 17) == {
        "input_ids": (2, 17),
        "attention_mask": (2, 23),
        "past": (2, 4, 6, 16),
        "state": (2, 2, 8),
    }


def test_other_shapes_keep_what_is_known():
    specs = (spec("x", "n", "k"), spec("flags", "f", value=(1, 0)), spec("y", "f", 3))
    sizes = solve_shapes(specs, {}, [("k", 64)])
    assert other_shapes(specs, sizes, [("k", 64)], 17) == {"x": (2, 64), "flags": (2,), "y": (2, 3)}


def test_other_shapes_keep_what_is_equal():
    specs = (spec("x", None, None), spec("state", 2, None, 8))
    facts = [("state.1", "x.0")]
    sizes = solve_shapes(specs, {}, facts)
    assert sizes.shapes == {"x": (1, 128), "state": (2, 1, 8)}
    assert other_shapes(specs, sizes, facts, 17) == {"x": (2, 17), "state": (2, 2, 8)}
    given = solve_shapes(specs, {"x": (3, 5), "state": (2, 4, 8)}, facts)  # whoever says so knows better
    assert given.shapes == {"x": (3, 5), "state": (2, 4, 8)}
    assert other_shapes(specs, given, facts, 17) == {"x": (3, 5), "state": (2, 4, 8)}


def test_names_that_are_no_words():
    """Odd names are names like others, also where a convention would take them apart."""
    names = (
        "a b",
        "past_a b",
        "total_a b",
        "past_a b + 1",
        "attention_mask_a b",
        "x/2",
        "past_x/2 + 1",
        "past_x/2",
    )
    specs = [spec(f"i{index}", "batch", name) for index, name in enumerate(names)]
    shapes, _ = resolve_shapes(specs, {"i0": (1, 7), "i1": (1, 3)})
    assert [shapes[f"i{index}"][1] for index in range(5)] == [7, 3, 10, 10, 10]
    sizes = solve_shapes(specs, {"i0": (1, 77), "i1": (1, 3)})
    assert [shape[1] for shape in other_shapes(specs, sizes, (), 17).values()][:5] == [17, 3, 20, 20, 20]


@given(st.lists(st.text(max_size=12), min_size=1, max_size=6), st.integers(1, 9))
def test_any_names_get_sizes(names, size):
    specs = [spec(f"i{index}", name, f"past_{name}", f"{name} + 1") for index, name in enumerate(names)]
    try:
        shapes = resolve_shapes(specs, {})[0]
    except UsageError:  # one name is what another one subtracts
        return
    assert all(min(shape) >= 0 for shape in shapes.values())


def test_many_inputs_without_names_take_no_time():
    caches = [
        spec(f"past_key_values.{index}.key", None, None, None, None, dtype=np.float32) for index in range(128)
    ]
    facts = [(f"past_key_values.{index}.key.{axis}", 16) for index in range(128) for axis in (1, 3)]
    start = time.process_time()
    sizes = solve_shapes([spec("input_ids", None, None), *caches], {}, facts)
    assert time.process_time() - start < 10
    assert sizes.shapes["past_key_values.127.key"] == (1, 16, 0, 16)
