"""Two reports side by side: what counts as a difference, and what is only said with a warning."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from sparse_onnx.report.comparison import compare_reports, comparison_rows, comparison_verdict
from sparse_onnx.report.html import render_comparison

Report = dict[str, Any]
Show = Callable[..., Any]


@pytest.fixture
def other(report: Report) -> Report:
    """The same run again."""
    return copy.deepcopy(report)


def test_equal_reports_do_not_differ(report: Report, other: Report) -> None:
    found = compare_reports(report, other)
    assert [found[key] for key in ("warnings", "decisions", "only_a", "only_b", "recipe", "environment")] == [
        []
    ] * 6
    assert [found[key]["change"] for key in ("speed", "size", "accuracy")] == ["same"] * 3
    verdict = comparison_verdict(found)
    assert (verdict.kind, verdict.word) == ("good", "No difference")
    assert verdict.sentence == (
        "B against A: no difference in speed (intervals overlap), same size, outputs as near to the original's "
        "(cosine 0.9877, was 0.9877)."
    )
    assert json.loads(json.dumps(found)) == found


SLOWER, FASTER = (
    {"speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1},
    {
        "speedup": 3.0,
        "speedup_low": 2.9,
        "speedup_high": 3.1,
    },
)
NEAR = {"speedup": 2.65, "speedup_low": 2.61, "speedup_high": 2.7}  # A's interval ends at 2.62
BEYOND = {"speedup": 2.65, "speedup_low": 2.63, "speedup_high": 2.7}


@pytest.mark.parametrize(
    ("times", "change", "said"),
    [
        (FASTER, "better", "1.20x faster"),
        (SLOWER, "worse", "1.25x slower"),
        (NEAR, "same", "no difference in speed (intervals overlap)"),
        (BEYOND, "better", "1.06x faster"),
        (dict.fromkeys(SLOWER), None, "speed not comparable"),
    ],
)
def test_speed(report: Report, other: Report, times: dict[str, float], change: str | None, said: str) -> None:
    other["summary"].update(times)
    found = compare_reports(report, other)
    assert found["speed"]["change"] == change
    assert found["speed"]["overlap"] == (None if change is None else change == "same")
    assert comparison_rows(found)[1][3] == said


@pytest.mark.parametrize(
    ("size", "change", "said"),
    [
        (55_000_000, "better", "2.00x smaller"),
        (220_000_000, "worse", "2.00x larger"),
        (110_100_000, "same", "same size"),
        (None, None, "size not known"),
    ],
)
def test_size(report: Report, other: Report, size: int | None, change: str | None, said: str) -> None:
    other["summary"]["bytes_after"] = size
    found = compare_reports(report, other)
    assert found["size"]["change"] == change
    assert comparison_rows(found)[2][3] == said


@pytest.mark.parametrize(
    ("cosine", "change", "kind"),
    [(0.999, "better", "good"), (0.9877, "same", "good"), (0.985, "worse", "bad"), (None, "worse", "bad")],
)
def test_accuracy(report: Report, other: Report, cosine: float | None, change: str | None, kind: str) -> None:
    other["summary"]["cosine"] = cosine
    found = compare_reports(report, other)
    assert found["accuracy"]["change"] == change
    assert comparison_verdict(found).kind == kind
    assert (comparison_verdict(found).word == "B loses accuracy") == (cosine is None)


@pytest.mark.parametrize(
    ("cosine", "kind", "word"), [(0.985, "check", "Better and worse"), (0.97, "bad", "B loses accuracy")]
)
def test_faster_but_less_accurate(report: Report, other: Report, cosine: float, kind: str, word: str) -> None:
    other["summary"].update(FASTER, cosine=cosine)
    verdict = comparison_verdict(compare_reports(report, other))
    assert (verdict.kind, verdict.word) == (kind, word)


@pytest.mark.parametrize(("after", "change"), [(0.88, "worse"), (0.9, "same"), (0.95, "better")])
def test_a_metric_counts_for_more_than_the_cosine(
    report: Report, other: Report, after: float, change: str
) -> None:
    metric = {
        "name": "f1",
        "before": 0.91,
        "after": 0.9,
        "drop": 0.01,
        "lower_is_better": False,
        "samples": 9,
    }
    report["summary"]["metric"] = metric
    assert compare_reports(report, other)["accuracy"]["metric"] is None, "only one of them has it"
    other["summary"].update(cosine=0.1, metric={**metric, "after": after, "drop": 0.91 - after})
    found = compare_reports(report, other)
    assert found["accuracy"]["change"] == change
    assert ("f1", "0.9", f"{after:g}", change) in comparison_rows(found)
    assert f"f1 {after:g}, was 0.9." in comparison_verdict(found).sentence


def test_a_goal_that_was_met_before(report: Report, other: Report) -> None:
    gate = {"name": "max_drop", "asked": 0.1, "reached": 0.2, "met": False, "text": "no"}
    other["goal"] = {"met": False, "gates": [gate]}
    found = compare_reports(report, other)
    assert comparison_verdict(found).word == "B misses a goal"
    assert comparison_rows(found)[-1] == ("goals", "-", "missed", "")
    assert comparison_verdict(compare_reports(other, other)).kind == "good", "it was missed before"


@pytest.mark.parametrize(
    ("change", "warning", "comparable"),
    [
        (
            lambda r: r["environment"].update(cpu="Another"),
            "The machines differ (cpu): speeds do not compare.",
            False,
        ),
        (
            lambda r: r["environment"].update(threads=4, isa="avx512"),
            "The machines differ (isa, threads)",
            False,
        ),
        (
            lambda r: r["targets"][0].update(input_shapes={"input_ids": [8, 128]}),
            "The input shapes differ",
            False,
        ),
        (lambda r: r["targets"].append(r["targets"][0]), "The input shapes differ", False),
        (
            lambda r: r["recipe"].update(target={**r["recipe"]["target"], "input_values": {"rate": 8000}}),
            "Inputs that steer the graph have other values: speeds do not compare.",
            False,
        ),
        (lambda r: r.update(source="other.onnx"), "The runs are of different models.", True),
        (lambda r: r["summary"].update(bytes_before=1), "The runs are of different models.", True),
        (lambda r: r["summary"].update(dense_ms=40.0), "The original itself took 30.0 ms and 40.0 ms", True),
        (
            lambda r: r["environment"]["versions"].update(onnxruntime="1.20"),
            "ONNX Runtime differs: 1.31.1 and 1.20.",
            True,
        ),
        (lambda r: r["verification"].update(inputs="other.npz"), "on different inputs", True),
    ],
)
def test_warnings(
    report: Report, other: Report, change: Callable[[Report], None], warning: str, comparable: bool
) -> None:
    change(other)
    found = compare_reports(report, other)
    assert len(found["warnings"]) == 1
    assert warning in found["warnings"][0]
    assert (found["speed"]["ratio"] is not None) == comparable
    verdict = comparison_verdict(found)
    assert verdict.kind == "check"
    assert verdict.notes == tuple(found["warnings"])


def test_other_software_is_listed_without_a_warning(report: Report, other: Report) -> None:
    other["environment"]["versions"].update(numpy="9", jax="1")
    found = compare_reports(report, other)
    assert found["warnings"] == []
    assert found["environment"] == [
        {"key": "versions.numpy", "a": "2.1", "b": "9"},
        {"key": "versions.jax", "a": None, "b": "1"},
    ]


def test_decisions_and_layers(report: Report, other: Report) -> None:
    other["layers"][0].update(decision="dense", reason="0.99x", close=True)
    other["layers"][1]["name"] = "renamed"
    other["layers"][2]["reason"] = "the same for another reason"
    found = compare_reports(report, other)
    assert found["decisions"] == [
        {
            "name": "encoder.layer.0.weight",
            "module": "encoder.layer.0",
            "a": "sparse",
            "b": "dense",
            "reason_a": "4.00x dense (3.90 to 4.20)",
            "reason_b": "0.99x",
            "close": True,
        }
    ]
    assert (found["only_a"], found["only_b"]) == (["encoder.layer.1.weight"], ["renamed"])
    assert (found["layers"]["a"], found["layers"]["b"]) == ({"sparse": 2, "all": 3}, {"sparse": 1, "all": 3})


def test_recipes_are_compared_key_by_key(report: Report, other: Report) -> None:
    report["recipe"] = {
        "stages": [
            {"name": "p", "modifiers": [{"prune.magnitude": {"sparsity": 0.8, "ignore": ["a", "b"]}}]}
        ],
        "target": {"threads": 1},
    }
    other["recipe"] = {
        "stages": [{"name": "p", "modifiers": [{"prune.magnitude": {"sparsity": 0.9, "ignore": []}}]}],
        "goal": {"max_drop": 0.1},
    }
    path = "stages[0].modifiers[0].prune.magnitude"
    assert compare_reports(report, other)["recipe"] == [
        {"key": f"{path}.sparsity", "a": 0.8, "b": 0.9},
        {"key": f"{path}.ignore", "a": ["a", "b"], "b": None},
        {"key": "target.threads", "a": 1, "b": None},
        {"key": "goal.max_drop", "a": None, "b": 0.1},
    ]


def test_plans_compare_too(report: Report, other: Report) -> None:
    for plan in (report, other):
        plan["summary"].update(dict.fromkeys((*SLOWER, "dense_ms", "optimized_ms", "bytes_after", "cosine")))
        plan.update(verification={}, targets=[])
    found = compare_reports(report, other)
    assert found["warnings"] == []
    assert "speed not comparable, size not known, accuracy not known" in comparison_verdict(found).sentence


@pytest.fixture
def page(full_report: Report) -> str:
    other = copy.deepcopy(full_report)
    other["summary"].update(FASTER, cosine=0.985)
    other["environment"]["versions"]["onnxruntime"] = "<img src=x onerror=alert(1)>"
    other["recipe"]["<script>alert(2)</script>"] = ["x" * 200]
    other["layers"][7].update(decision="dense", reason="y" * 200, close=True)
    other["layers"][8]["name"] = "z" * 100
    return render_comparison(compare_reports(full_report, other))


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(360, True), (768, False), (1280, False)])
def test_page_in_a_browser(show: Show, page: str, width: int, dark: bool) -> None:
    browser = show(page, width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.complaints() == []
    assert len(browser.requests()) == 1
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    text = browser.evaluate("document.body.innerText")
    assert "Better and worse" in text
    assert "1 of 36 layers ship otherwise, 1 of them was a close call" in text
    assert "One other value in the recipe" in text
    assert "<script>alert(2)</script>" in text


def test_page_of_equal_runs(report: Report, other: Report) -> None:
    source = render_comparison(compare_reports(report, other))
    for said in ("Every layer ships as before", "The recipes are the same", "the same machine and software"):
        assert said in source
    assert "None" not in source
