"""Batches with tokens that the data does not show: which are changed, and how."""

import numpy as np
import pytest

from sparse_onnx.data.samples import Samples
from sparse_onnx.passes.base import CalibrationData, PassContext
from sparse_onnx.passes.calibration.unseen import with_unseen_tokens
from sparse_onnx.passes.patterns.tokens import TokenInput
from sparse_onnx.passes.prune.oneshot_methods import Auto, SparseGPT
from sparse_onnx.passes.quantize.weight import QuantizeWeights

FIRST, LAST, LENGTH, ROWS = 1, 2, 40, 30000
TOKENS = TokenInput("ids", ROWS)


def batch(seed, dtype=np.int64):
    """Two samples of the words 10 to 29 between marks; the second one is padded with zeros."""
    ids = np.random.default_rng(seed).integers(10, 30, (2, LENGTH)).astype(dtype)
    mask = np.ones_like(ids)
    ids[:, 0] = FIRST
    ids[0, -1] = ids[1, 29] = LAST
    ids[1, 30:] = 0
    mask[1, 30:] = 0
    return {"ids": ids, "mask": mask, "other": np.arange(2.0)}


def samples(count=8, **options):
    return Samples.of([batch(seed, **options) for seed in range(count)], "data")


def changed(given, result):
    """The batches that differ from all given ones."""
    known = [feeds["ids"].tobytes() for feeds in given]
    return [feeds for feeds in result if feeds["ids"].tobytes() not in known]


@pytest.mark.parametrize(("share", "count"), [(0.25, 2), (0.5, 4), (0.01, 1), (1, 8)])
def test_so_many_batches_come_on_top(share, count):
    given = samples()
    result = with_unseen_tokens(given, TOKENS, share, "mask")
    assert len(result) == 8 + count
    assert len(changed(given, result)) == count
    originals = [
        feeds["ids"].tobytes()
        for feeds in result
        if feeds["ids"].tobytes() in {x["ids"].tobytes() for x in given}
    ]
    assert originals == [feeds["ids"].tobytes() for feeds in given]


def test_a_share_of_nothing_changes_nothing():
    given = samples()
    assert with_unseen_tokens(given, TOKENS, 0, "mask") is given


def test_half_of_the_tokens_are_drawn_from_the_whole_vocabulary():
    given = samples()
    found = changed(given, with_unseen_tokens(given, TOKENS, 1, "mask"))
    before = np.stack([feeds["ids"] for feeds in given])
    after = np.stack([feeds["ids"] for feeds in found])
    words = before >= 10
    other = after != before
    assert 0.45 < other[words].mean() < 0.55
    drawn = after[other]
    assert drawn.min() >= 0
    assert drawn.max() < ROWS
    assert 0.45 * ROWS < drawn.mean() < 0.55 * ROWS


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_marks_padding_and_other_inputs_stay(dtype):
    given = samples(dtype=dtype)
    found = changed(given, with_unseen_tokens(given, TOKENS, 1, "mask"))
    for feeds in found:
        assert feeds["ids"].dtype == dtype
        assert (feeds["ids"][:, 0] == FIRST).all()
        assert feeds["ids"][0, -1] == feeds["ids"][1, 29] == LAST
        assert (feeds["ids"][1, 30:] == 0).all()
        np.testing.assert_array_equal(feeds["other"], np.arange(2.0))


def test_without_a_mask_padding_is_a_token_like_others():
    given = samples()
    found = changed(given, with_unseen_tokens(given, TOKENS, 1, None))
    assert any((feeds["ids"][1, 30:] != 0).any() for feeds in found)


def test_equal_data_gives_equal_tokens_and_weights_go_along():
    one, two = (with_unseen_tokens(samples().counting(0.5), TOKENS, 0.25, "mask") for _ in range(2))
    assert one.digest() == two.digest()
    assert one.weights == (0.5,) * 10


def test_source_batches_stay_as_they_are():
    given = samples()
    before = given.digest()
    list(with_unseen_tokens(given, TOKENS, 1, "mask"))
    assert given.digest() == before


@pytest.mark.parametrize(("rows", "fires"), [(30, False), (46, False), (47, True), (1000, True)])
def test_a_vocabulary_that_the_data_shows_is_not_drawn_from(rows, fires):
    given = samples()  # 20 words, two marks and padding: 23 tokens
    result = with_unseen_tokens(given, TokenInput("ids", rows), 0.5, "mask")
    assert (len(result) > len(given)) is fires
    assert (result is given) is not fires


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (Auto(sparsity=0.5), True),
        (Auto(sparsity=0.5, unseen_tokens=0.0), False),
        (SparseGPT(sparsity=0.5), False),
        (QuantizeWeights(method="auto", group_size=0), True),
        (QuantizeWeights(method="auto", group_size=0, unseen_tokens=0.0), False),
        (QuantizeWeights(method="gptq", group_size=0), False),
        (QuantizeWeights(method="gptq", group_size=0, unseen_tokens=0.25), True),
    ],
    ids=lambda value: repr(value) if isinstance(value, bool) else value.name,
)
def test_auto_draws_tokens_for_models_that_read_them(from_text, tmp_path, step, told):
    lines = []
    rng = np.random.default_rng(0)
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]> g (int64[B, S] ids) => (float[B, S, 16] Y)
        { X = Gather(table, ids) Y = MatMul(X, W) }""",
        table=rng.standard_normal((200, 32)).astype(np.float32),
        W=rng.standard_normal((32, 16)).astype(np.float32),
    )
    data = CalibrationData(Samples.of([{"ids": batch(seed)["ids"]} for seed in range(4)], "data"), tmp_path)
    step(model, PassContext(progress=lines.append, calibration=data))
    assert any("batches once more, tokens of ids drawn" in line for line in lines) == told
