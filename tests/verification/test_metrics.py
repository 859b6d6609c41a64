"""Metrics of models: oracles in plain NumPy, data that does not fit, a user's own functions."""

import itertools
import math
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import onnx
import onnx.parser
import pytest

from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.verification.metrics import open_metric

RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 4)).astype(np.float32)
X = RNG.standard_normal((30, 8)).astype(np.float32)
LABELS = RNG.integers(0, 4, 30)
NOISE = RNG.standard_normal((8, 4)) * 0.7
TOKENS = RNG.integers(0, 6, (5, 7))


def batches(*cuts, **arrays):
    arrays = arrays or {"X": X, "label": LABELS}
    edges = [0, *cuts, len(X)]
    return [{name: a[i:j] for name, a in arrays.items()} for i, j in itertools.pairwise(edges)]


def write(folder, name="model.onnx", weight=W, output="logits"):
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]> g (float[b, 8] X) => (float[b, {weight.shape[1]}] {output})
        {{ {output} = MatMul(X, W) }}"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    onnx.save(proto, folder / name)
    return folder / name


@pytest.fixture
def model(tmp_path):
    return write(tmp_path)


@pytest.fixture
def worse(tmp_path):
    return write(tmp_path, "worse.onnx", (W + NOISE).astype(np.float32))


def weight_of(path):
    return onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0])


def scores(path, x=X):
    return x @ weight_of(path)


def test_accuracy_is_the_share_of_right_classes(model, worse):
    metric = open_metric("accuracy", model, batches(11), labels="label")
    assert metric.before == np.mean(scores(model).argmax(1) == LABELS)
    found = metric.compare(worse)
    assert found.after == np.mean(scores(worse).argmax(1) == LABELS) != found.before
    assert found.drop == found.before - found.after
    assert (found.name, found.samples, found.lower_is_better) == ("accuracy", 30, False)


@pytest.mark.parametrize("name", ["recall", "f1"])
def test_means_over_classes(name, model):
    predicted = scores(model).argmax(1)
    per_class = []
    for c in range(4):
        chosen, actual = predicted == c, np.equal(LABELS, c)
        right = np.sum(chosen & actual)
        found, actual = chosen.sum(), actual.sum()
        per_class.append(right / actual if name == "recall" else 2 * right / (found + actual))
    assert open_metric(name, model, batches(5, 6), labels="label").before == pytest.approx(np.mean(per_class))


def test_labels_below_zero_are_left_out(model):
    labels = np.where(np.arange(30) % 2, LABELS, -100)
    metric = open_metric("accuracy", model, batches(X=X, label=labels), labels="label")
    assert metric.before == np.mean((scores(model).argmax(1) == LABELS)[1::2])
    with pytest.raises(UsageError, match="nothing but values below 0"):
        open_metric("accuracy", model, batches(X=X, label=np.full(30, -100)), labels="label")


def neighbours(path, k):
    unit = scores(path).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    similarity = unit @ unit.T - 9 * np.eye(30)
    return [set(np.argsort(-row)[:k]) for row in similarity]


def test_recall_at_k_against_the_neighbours_of_the_original(model, worse):
    metric = open_metric("recall@3", model, batches(7), output="logits")
    assert metric.before == 1
    expected = np.mean(
        [len(a & b) / 3 for a, b in zip(neighbours(model, 3), neighbours(worse, 3), strict=True)]
    )
    assert metric.evaluate(worse) == pytest.approx(expected)
    assert 0 < expected < 1


def test_recall_at_k_with_labels(model):
    expected = np.mean(
        [any(LABELS[j] == LABELS[i] for j in near) for i, near in enumerate(neighbours(model, 2))]
    )
    assert open_metric("recall@2", model, batches(7), labels="label").before == pytest.approx(expected)


def test_embeddings_of_tokens_are_averaged_without_padding(tmp_path):
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20]>
        g (float[b, s, 3] X, int64[b, s] attention_mask) => (float[b, s, 3] hidden) { hidden = Identity(X) }"""
    )
    onnx.save(proto, tmp_path / "tokens.onnx")
    x = np.zeros((3, 2, 3), np.float32)
    x[:, 0] = [[1, 0, 0], [1, 0.1, 0], [0, 1, 0]]
    x[:, 1] = [[0, 9, 9], [9, 0, 9], [9, 9, 0]]  # padding that would change the neighbours
    mask = np.array([[1, 0]] * 3)
    groups = np.array([1, 1, 2])
    feeds = {"X": x, "attention_mask": mask, "group": groups}
    metric = open_metric("recall@1", tmp_path / "tokens.onnx", [feeds], labels="group")
    assert metric.before == 1
    whole = open_metric(
        "recall@1", tmp_path / "tokens.onnx", [{**feeds, "attention_mask": mask * 0 + 1}], labels="group"
    )
    assert whole.before < 1


def test_agreement_and_cosine_with_the_original(model, worse):
    a, b = scores(model), scores(worse)
    agreement = open_metric("token_agreement", model, batches(4, 20))
    assert agreement.before == 1
    assert agreement.evaluate(worse) == np.mean(a.argmax(1) == b.argmax(1))
    cosine = open_metric("cosine", model, batches(4, 20))
    expected = np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
    assert cosine.before == pytest.approx(1)
    assert cosine.evaluate(worse) == pytest.approx(expected, rel=1e-5)


def language_model(folder, scale=1.0, *, causal=True):
    """The logits at each position are a row of W by the token there, or the sum of all rows."""
    rows = np.random.default_rng(2).standard_normal((6, 6)).astype(np.float32) * np.float32(scale)
    body = "h = Gather(W, input_ids) " + (
        "logits = Identity(h)" if causal else "m = ReduceMean(h, axis) logits = Add(h, m)"
    )
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]> g (int64[b, s] input_ids) => (float[b, s, 6] logits)
        {{ {body} }}"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(rows, "W"))
    if not causal:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "axis"))
    onnx.save(proto, folder / f"lm{scale}.onnx")
    return folder / f"lm{scale}.onnx", rows


def test_perplexity_by_hand(tmp_path):
    path, rows = language_model(tmp_path)
    flat, _ = language_model(tmp_path, 0.0)
    ids = TOKENS
    metric = open_metric("perplexity", path, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}])
    log_p = rows - np.log(np.exp(rows.astype(np.float64)).sum(1, keepdims=True))
    loss = -np.mean([log_p[a, b] for line in ids for a, b in itertools.pairwise(line)])
    assert metric.before == pytest.approx(math.exp(loss), rel=1e-6)
    found = metric.compare(flat)
    assert found.after == pytest.approx(6)
    assert found.lower_is_better
    assert found.drop == pytest.approx(6 / found.before - 1)


def test_infinite_perplexity_is_an_infinite_drop_and_valid_json(tmp_path):
    path, _ = language_model(tmp_path)
    broken, _ = language_model(tmp_path, math.nan)
    found = open_metric("perplexity", path, [{"input_ids": TOKENS}]).compare(broken)
    assert (found.after, found.drop) == (math.inf, math.inf)
    assert found.to_dict()["after"] is found.to_dict()["drop"] is None


def test_perplexity_of_what_is_no_causal_language_model(tmp_path, model):
    path, _ = language_model(tmp_path, causal=False)
    with pytest.raises(UsageError, match="causal language models only"):
        open_metric("perplexity", path, [{"input_ids": TOKENS}])
    with pytest.raises(UsageError, match="causal language models only"):
        open_metric("perplexity", model, batches())


def test_nan_is_a_bad_model_and_no_crash(tmp_path, model):
    broken = write(tmp_path, "broken.onnx", W * np.float32(np.nan))
    for name, options in (
        ("accuracy", {"labels": "label"}),
        ("recall@3", {}),
        ("token_agreement", {}),
        ("cosine", {}),
    ):
        assert open_metric(name, model, batches(9), **options).evaluate(broken) == 0, name


USER = """
import numpy as np
def error_rate(run, batches):
    wrong = [run(feeds)["logits"].argmax(-1) != feeds["label"] for feeds in batches]
    return np.concatenate(wrong).mean()
error_rate.lower_is_better = True
def own_data(run, batches):
    assert len(batches) == 0
    return run({"X": np.ones((1, 8), np.float32)})["logits"][0, 0]
def fails(run, batches):
    raise KeyError("no such column")
def text(run, batches):
    return "good"
def many(run, batches):
    return np.ones(2)
def nan(run, batches):
    return float("nan")
def nothing(run, batches):
    pass
number = 3
"""


@pytest.fixture
def user(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER)
    return path


def test_own_function_that_is_better_where_it_is_lower(user, model, worse):
    metric = open_metric(f"{user}:error_rate", model, batches(3), labels="label")
    assert metric.lower_is_better
    found = metric.compare(worse)
    assert found.before == pytest.approx(np.mean(scores(model).argmax(1) != LABELS))
    assert found.drop == pytest.approx(found.after / found.before - 1)


def test_own_function_with_data_of_its_own(user, model):
    assert open_metric(f"{user}:own_data", model, []).before == pytest.approx(W[:, 0].sum(), rel=1e-5)


def test_own_function_given_as_such(model):
    def first(run, data):
        return len(data) + run(data[0])["logits"].shape[0]

    assert open_metric(first, model, batches(7)).before == 9


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fails", "failed: KeyError: 'no such column'"),
        ("text", "gave str 'good'; expected one number"),
        ("many", "gave ndarray .*; expected one number"),
        ("nan", "gave nan; expected a finite number"),
        ("nothing", "gave NoneType None; expected one number"),
        ("number", "is no function"),
        ("nosuch", "cannot be imported: AttributeError"),
    ],
)
def test_own_function_that_is_wrong(user, model, name, said):
    with pytest.raises(UsageError, match=said):
        open_metric(f"{user}:{name}", model, batches())


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("acuracy", "unknown metric 'acuracy'; the nearest is 'accuracy'"),
        ("recall@0", "unknown metric"),
        ("nosuch.module:f", "cannot be imported: ModuleNotFoundError"),
        ("missing.py:f", "missing.py: no such Python file"),
    ],
)
def test_unknown_metric(model, metric, said):
    with pytest.raises(UsageError, match=said):
        open_metric(metric, model, batches())


@pytest.mark.parametrize(
    ("metric", "options", "said"),
    [
        ("accuracy", {}, "needs labels"),
        (
            "accuracy",
            {"labels": "label", "output": "logit"},
            "unknown output 'logit'; the nearest is 'logits'",
        ),
        ("recall@30", {}, "needs more than 30 samples; the data has 30"),
    ],
)
def test_wrong_options(model, metric, options, said):
    with pytest.raises(UsageError, match=said):
        open_metric(metric, model, batches(), **options)


@pytest.mark.parametrize("metric", ["accuracy", "recall@3", "token_agreement", "cosine", "perplexity"])
def test_built_in_metric_without_data(model, metric):
    with pytest.raises(UsageError, match=f"metric {metric} needs data"):
        open_metric(metric, model, [], labels="label")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.zeros((30, 4), np.int64), r"have shape \[30, 4\], but output 'logits' predicts \[30\]"),
        (np.full(30, 4), r"hold 4, but output 'logits' has the classes 0..3"),
    ],
)
def test_labels_that_do_not_fit(model, labels, said):
    with pytest.raises(UsageError, match=said):
        open_metric("accuracy", model, batches(X=X, label=labels), labels="label")


def test_groups_of_one(model):
    with pytest.raises(UsageError, match="no two samples have equal labels"):
        open_metric("recall@3", model, batches(X=X, label=np.arange(30)), labels="label")


def test_models_in_memory_are_measured_like_files(model, worse):
    metric = open_metric("accuracy", model_io.load_model(model), batches(), labels="label")
    assert metric.evaluate(model_io.load_model(worse), threads=1) == metric.evaluate(worse)


def test_measured_in_another_process(user, model, worse):
    metrics = [
        open_metric("recall@3", model, batches(7)),
        open_metric(f"{user}:error_rate", model, batches(7), labels="label"),
    ]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for metric in metrics:
            assert pool.submit(metric.evaluate, worse, threads=1).result() == metric.evaluate(worse)
            assert pickle.loads(pickle.dumps(metric)).before == metric.before
