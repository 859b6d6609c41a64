"""Where the batch lies in each input: counting, cutting and checking data."""

import numpy as np
import pytest

from sparse_onnx.data.batches import batching, equal_batches
from sparse_onnx.data.inputs import (
    InputSpec,
    check_samples,
    first_samples,
    fixed_batch,
    sample_count,
    split_batches,
)
from sparse_onnx.errors import UsageError


def spec(name, *shape, dtype=np.float32, **more):
    return InputSpec(name, np.dtype(dtype), shape, None, **more)


def rows(*shape):
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


VOICE = (spec("x", "n", 64), spec("state", 2, "n", 8), spec("sr", dtype=np.int64))


def test_a_state_has_its_batch_in_the_second_axis_and_a_rate_has_none():
    arrays = {"x": rows(5, 64), "state": rows(2, 5, 8), "sr": np.array(16000)}
    checked = check_samples(arrays, VOICE, "data")
    assert sample_count(checked, VOICE) == 5
    batches = split_batches(checked, VOICE, 2, "data")
    assert [{name: a.shape for name, a in batch.items()} for batch in batches] == [
        {"x": (2, 64), "state": (2, 2, 8), "sr": ()},
        {"x": (2, 64), "state": (2, 2, 8), "sr": ()},
        {"x": (1, 64), "state": (2, 1, 8), "sr": ()},
    ]
    assert (np.concatenate([batch["state"] for batch in batches], axis=1) == arrays["state"]).all()
    first = first_samples(checked, 3, VOICE)
    assert (first["state"] == arrays["state"][:, :3]).all()
    assert first["sr"] == 16000


def test_states_in_front_do_not_change_the_count():
    specs = (VOICE[1], VOICE[2], VOICE[0], spec("state2", 4, "n", 8))
    arrays = {"x": rows(5, 64), "state": rows(2, 5, 8), "state2": rows(4, 5, 8), "sr": np.array(16000)}
    assert sample_count(check_samples(arrays, specs, "data"), specs) == 5


def test_a_name_that_says_batch_wins():
    specs = (spec("x", "time", "batch_size", 3), spec("h", "layers", "batch_size", 8), spec("w", "time"))
    arrays = {"x": rows(7, 4, 3), "h": rows(2, 4, 8), "w": rows(7)}
    checked = check_samples(arrays, specs, "data")
    assert sample_count(checked, specs) == 4
    assert [b["x"].shape for b in split_batches(checked, specs, 3, "data")] == [(7, 3, 3), (7, 1, 3)]
    assert [b["w"].shape for b in split_batches(checked, specs, 3, "data")] == [(7,), (7,)]


def test_several_rows_a_sample():
    specs = (spec("ids", "batch_size", "s", dtype=np.int64), spec("past", "batch_size*heads", "past", 8))
    arrays = {"ids": np.zeros((3, 5), int), "past": rows(12, 2, 8)}
    checked = check_samples(arrays, specs, "data")
    batches = split_batches(checked, specs, 2, "data")
    assert [batch["past"].shape for batch in batches] == [(8, 2, 8), (4, 2, 8)]
    with pytest.raises(UsageError, match=r"past is \[11, 2, 8\]: axis 0 is no multiple of 3 samples"):
        check_samples({**arrays, "past": rows(11, 2, 8)}, specs, "data")


def test_inputs_of_fixed_size_are_shared():
    specs = (
        spec("x", "batch", 3),
        spec("anchors", 10, 4),
        spec("positions", "length"),
        spec("m", "batch", "length"),
    )
    arrays = {"x": rows(4, 3), "anchors": rows(10, 4), "positions": rows(4), "m": rows(4, 4)}
    batches = split_batches(check_samples(arrays, specs, "data"), specs, 3, "data")
    assert [batch["anchors"].shape for batch in batches] == [(10, 4)] * 2
    assert [batch["positions"].shape for batch in batches] == [(4,)] * 2
    with pytest.raises(UsageError, match=r"anchors is float32\[4, 4\]; expected anchors"):
        check_samples({**arrays, "anchors": rows(4, 4)}, specs, "data")


def test_batches_of_several_names():
    """As tf2onnx names them: every dimension by itself."""
    specs = (spec("a", "unk__1", "unk__2"), spec("b", "unk__3", 2))
    arrays = {"a": rows(5, 3), "b": rows(5, 2)}
    batches = split_batches(check_samples(arrays, specs, "data"), specs, 4, "data")
    assert [batch["b"].shape for batch in batches] == [(4, 2), (1, 2)]


def test_unnamed_batches():
    specs = (spec("a", None, 3), spec("b", None))
    arrays = {"a": rows(5, 3), "b": rows(5)}
    assert [len(batch["b"]) for batch in split_batches(arrays, specs, 4, "data")] == [4, 1]
    with pytest.raises(UsageError, match=r"differ in their number of samples: \{.a.: 5, .b.: 4\}"):
        check_samples({**arrays, "b": rows(4)}, specs, "data")


def test_a_fixed_batch_with_a_state():
    specs = (
        spec("x", 1, 64),
        spec("y", 1),
        spec("state", 2, 1, 8),
        spec("table", 6, 2),
        spec("sr", dtype=np.int64),
    )
    arrays = {
        "x": rows(3, 64),
        "y": rows(3),
        "state": rows(2, 3, 8),
        "table": rows(6, 2),
        "sr": np.array(8000),
    }
    assert fixed_batch(specs) == 1
    checked = check_samples(arrays, specs, "data")
    batches = split_batches(checked, specs, 8, "data")
    assert [{name: a.shape for name, a in batch.items()} for batch in batches] == [
        {"x": (1, 64), "y": (1,), "state": (2, 1, 8), "table": (6, 2), "sr": ()}
    ] * 3
    assert (batches[2]["state"][:, 0] == arrays["state"][:, 2]).all()
    once = check_samples({**arrays, "state": rows(2, 1, 8)}, specs, "data")
    assert split_batches(once, specs, 8, "data")[1]["state"].shape == (2, 1, 8)


def test_unknown_ranks_follow_the_others():
    unknown = InputSpec("z", np.dtype(np.float32), None, None)
    specs = (spec("x", "n", 3), unknown)
    for z, shapes in ((rows(4, 2), [(3, 2), (1, 2)]), (rows(7), [(7,), (7,)])):
        checked = check_samples({"x": rows(4, 3), "z": z}, specs, "data")
        assert [batch["z"].shape for batch in split_batches(checked, specs, 3, "data")] == shapes


def test_labels_are_counted_too():
    arrays = {"x": rows(5, 64), "state": rows(2, 5, 8), "sr": np.array(16000), "label": np.arange(5)}
    checked = check_samples(arrays, VOICE, "data", "label")
    assert [batch["label"].tolist() for batch in split_batches(checked, VOICE, 3, "data")] == [
        [0, 1, 2],
        [3, 4],
    ]
    with pytest.raises(UsageError, match="differ in their number of samples"):
        check_samples({**arrays, "label": np.arange(2)}, VOICE, "data", "label")


def test_a_value_given_stands_for_what_the_data_lacks():
    flags = spec("flags", "n", dtype=np.int64, value=(1, 0))
    specs = (spec("x", "batch", 3), flags, spec("sr", dtype=np.int64, value=16000))
    checked = check_samples({"x": rows(5, 3)}, specs, "data")
    batches = split_batches(checked, specs, 2, "data")
    assert [batch["flags"].tolist() for batch in batches] == [[1, 0]] * 3
    assert batches[0]["sr"] == 16000
    with pytest.raises(UsageError, match=r"has no sr; .* can be given with --input NAME=VALUE"):
        check_samples({"x": rows(5, 3)}, (specs[0], spec("sr", dtype=np.int64)), "data")


def test_what_is_fixed_must_agree_with_the_data():
    fixed = (VOICE[0], spec("sr", dtype=np.int64, value=16000, fixed=True))
    check_samples({"x": rows(2, 64), "sr": np.array(16000)}, fixed, "data")
    with pytest.raises(UsageError, match="sr holds other values than --fix-input sr=16000"):
        check_samples({"x": rows(2, 64), "sr": np.array(8000)}, fixed, "data")


def test_nothing_to_cut():
    assert batching((), {}).samples({}) == 1
    assert batching((spec("sr"),), {"sr": rows()}).cut({"sr": rows()}, 0, 1)["sr"].shape == ()


def test_a_state_without_names():
    """As silero-vad has it: [?, ?], [2, ?, 128] and a rate."""
    specs = (spec("x", None, None), spec("state", 2, None, 8), spec("sr", dtype=np.int64))
    arrays = {"x": rows(5, 64), "state": rows(2, 5, 8), "sr": np.array(16000)}
    batches = split_batches(check_samples(arrays, specs, "data"), specs, 2, "data")
    assert [batch["state"].shape for batch in batches] == [(2, 2, 8), (2, 2, 8), (2, 1, 8)]
    once = check_samples({**arrays, "state": rows(2, 1, 8)}, specs, "data")
    assert [batch["state"].shape for batch in split_batches(once, specs, 4, "data")] == [(2, 1, 8)] * 2


def test_batches_are_equal_whatever_they_are_called():
    x, state = spec("x", None, None), spec("state", 2, None, 8)
    assert equal_batches((state, x)) == [("state.1", "x.0")]
    assert equal_batches((spec("x", "n", "t"), state, spec("y", "m"))) == [("state.1", "n")]
    assert equal_batches((spec("x", "n", "t"), spec("y", "m")), {"x": rows(3, 2), "y": rows(3)}) == [
        ("m", "n")
    ]
    assert equal_batches((spec("x", "n", "t"), spec("y", "m")), {"x": rows(3, 2), "y": rows(4)}) == []
    for others in (
        (spec("x", 1, None), state),
        (x, spec("table", 9, None)),
        (spec("x", "n"), spec("h", 2, "n", None)),
    ):
        assert equal_batches(others) == []
