"""Figures of quality against plain loops and hand-made cases."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.verification.quality import (
    Confusion,
    drop,
    group_recall,
    nearest,
    neighbour_recall,
    predicted_classes,
)

classes = st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 4)), min_size=1, max_size=30)


def count(pairs, cuts=1):
    confusion = Confusion()
    for part in np.array_split(np.array(pairs), cuts):
        confusion.add(part[:, 0], part[:, 1])
    return confusion


def loops(pairs):
    """Accuracy, macro recall and macro F1 as their definitions say, pair by pair."""
    kept = [(p, a) for p, a in pairs if a >= 0]
    recalls, scores = [], []
    for c in range(5):
        right = sum(p == a == c for p, a in kept)
        missed, wrong = sum(a == c != p for p, a in kept), sum(p == c != a for p, a in kept)
        if right + missed:
            recalls.append(right / (right + missed))
        if right + missed + wrong:
            scores.append(right / (right + (missed + wrong) / 2))
    accuracy = sum(p == a for p, a in kept) / len(kept)
    return accuracy, sum(recalls) / len(recalls), sum(scores) / len(scores)


@given(classes, st.integers(1, 4))
@settings(deadline=None)
def test_classification_is_as_defined_however_the_samples_are_cut(pairs, cuts):
    confusion = count(pairs, cuts)
    found = confusion.accuracy(), confusion.recall(), confusion.f1()
    if all(actual < 0 for _, actual in pairs):
        assert all(map(math.isnan, found[:2]))
    else:
        assert found == pytest.approx(loops(pairs))


def test_a_rare_class_counts_as_much_as_a_common_one():
    confusion = count([(0, 0)] * 9 + [(0, 1)])
    assert confusion.accuracy() == 0.9
    assert confusion.recall() == 0.5
    assert confusion.f1() == pytest.approx((18 / 19 + 0) / 2)


def test_nan_predicts_nothing():
    scores = np.array([[0.1, 0.9], [np.nan, 0.2], [-np.inf, 0.0]], np.float32)
    assert predicted_classes(scores).tolist() == [1, -1, 1]
    assert predicted_classes(np.array([3, 2], np.int32)).tolist() == [3, 2]
    assert count([(-1, 0), (0, 0)]).accuracy() == 0.5


def test_neighbours_by_hand():
    embeddings = np.array([[1, 0], [9, 1], [0, 1], [1, 9]], np.float32)  # by direction: 0 with 1, 2 with 3
    assert nearest(embeddings, 1).tolist() == [[1], [0], [3], [2]]
    assert nearest(embeddings, 3).tolist()[0] == [1, 3, 2]


def test_neighbours_are_those_of_a_plain_sort(monkeypatch):
    monkeypatch.setattr("sparse_onnx.verification.quality._ROWS", 7)
    embeddings = np.random.default_rng(0).standard_normal((40, 6))
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    for row, found in enumerate(nearest(embeddings, 5)):
        others = [i for i in range(40) if i != row]
        assert found.tolist() == sorted(others, key=lambda i: -float(unit[row] @ unit[i]))[:5]


def test_a_broken_row_has_no_neighbours_and_is_nobodys():
    embeddings = np.array([[1, 0], [np.nan, 0], [1, 1], [0, 1]], np.float32)
    assert nearest(embeddings, 2).tolist() == [[2, 3], [-1, -1], [0, 3], [2, 0]]


def test_zeros_are_no_error():
    assert nearest(np.zeros((3, 2)), 1).tolist() == [[1], [0], [0]]


@pytest.mark.parametrize("k", [0, 3])
def test_more_neighbours_than_there_are(k):
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.2"):
        nearest(np.ones((3, 2)), k)


def test_neighbour_recall_by_hand():
    expected = np.array([[1, 2], [0, 2], [-1, -1]])
    assert neighbour_recall(expected, expected) == 1
    assert neighbour_recall(expected, np.array([[2, 1], [2, 3], [0, 1]])) == 0.75
    assert neighbour_recall(expected, np.full((3, 2), -1)) == 0


def test_group_recall_by_hand():
    groups = np.array([7, 7, 5, 5, 9, -100, -100])
    found = np.array([[1], [0], [0], [-1], [0], [6], [5]])
    assert group_recall(found, groups) == 0.5  # 9 is alone, -100 says that there is no label
    assert math.isnan(group_recall(found[:2], np.array([1, 2])))


def test_drop_of_a_share_is_absolute_and_of_a_perplexity_relative():
    assert drop(0.9, 0.88, lower_is_better=False) == pytest.approx(0.02)
    assert drop(20.0, 21.0, lower_is_better=True) == pytest.approx(0.05)
    assert drop(0.9, 0.95, lower_is_better=False) < 0
    assert drop(20.0, 19.0, lower_is_better=True) < 0
    assert drop(-2.0, -1.0, lower_is_better=True) == 0.5  # a log-likelihood, say
    assert drop(20.0, math.inf, lower_is_better=True) == math.inf


def test_drop_from_zero():
    assert drop(0.0, 0.0, lower_is_better=True) == 0
    assert drop(0.0, 0.1, lower_is_better=True) == math.inf
    assert drop(0.0, -0.1, lower_is_better=True) == -math.inf
