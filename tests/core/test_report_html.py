"""The HTML report: what it says in each case, that nothing in it is trusted, and that it stands alone."""

from __future__ import annotations

import copy
import html.parser
from pathlib import Path
from typing import Any

import pytest

from sparse_onnx.report_html import render_html, write_html

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
HOSTILE = "<script>alert('1')</script>\"><img src=x onerror=alert(2)>{{ 7 * 7 }}"


def layer(index: int, **changes: Any) -> dict[str, Any]:
    return {
        "name": f"encoder.layer.{index}.weight",
        "module": f"encoder.layer.{index}",
        "op_type": "MatMul",
        "shape": [768, 3072],
        "rows": 128,
        "activations": ["gelu"],
        "sparsity": 0.9,
        "mask_structure": "unstructured",
        "decision": "sparse",
        "reason": "4.00x dense (3.90 to 4.20)",
        "kernel": "spmm_avx2",
        "dense_ms": 4.0 + index,
        "sparse_ms": 1.0,
        "speedup_low": 3.9,
        "speedup_high": 4.2,
        "relative_error": 0.0,
        **changes,
    }


DIFFERENCE = {
    "max_abs": 2e-6,
    "relative_error": 3.1e-7,
    "cosine": 0.99999,
    "top1_agreement": 1.0,
    "worst_output": "logits",
}


@pytest.fixture
def report() -> dict[str, Any]:
    """A report of an ordinary compilation: two layers sparse, one dense, two places declined."""
    return {
        "schema_version": 1,
        "environment": {
            "cpu": "Test CPU",
            "cores": 2,
            "isa": "avx2",
            "threads": 1,
            "system": "Linux x86_64",
            "python": "3.11.2",
            "versions": {"onnxruntime": "1.31.1", "numpy": "2.1"},
            "seed": 0,
        },
        "source": "bert.onnx",
        "input_shapes": {"input_ids": [1, 128]},
        "summary": {
            "dense_ms": 30.0,
            "optimized_ms": 12.0,
            "speedup": 2.5,
            "speedup_low": 2.41,
            "speedup_high": 2.62,
            "bytes_before": 440_000_000,
            "bytes_after": 110_000_000,
            "sparsity": 0.9,
            "sparse_flops_fraction": 0.75,
            "relative_error": 0.12,
            "cosine": 0.98765,
        },
        "goal": {"max_drop": None, "drop": 0.01235, "met": True},
        "verification": {
            "inputs": "generated",
            "batches": 1,
            "against_pruned_dense": dict(DIFFERENCE),
            "without_library": dict(DIFFERENCE),
            "against_original": {**DIFFERENCE, "relative_error": 0.12, "cosine": 0.98765},
        },
        "layers": [
            layer(0),
            layer(1),
            layer(
                2,
                sparsity=0.1,
                decision="dense",
                reason="10.0% zeros: too few",
                dense_ms=None,
                sparse_ms=None,
            ),
        ],
        "declined": [
            {"pass_name": "lower.sparse-matmul", "place": "head.weight", "reason": "also used by Gather"},
            {"pass_name": "lower.sparse-matmul", "place": "other.weight", "reason": "also used by Gather"},
        ],
        "stages": [
            {"name": "load", "seconds": 0.1, "peak_rss_mb": 90},
            {"name": "decide", "seconds": 2.0, "peak_rss_mb": 140},
        ],
    }


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page; fails where tags are not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "wbr":
            self.words.append(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def test_ordinary_report(report: dict[str, Any]) -> None:
    text = Page(render_html(report)).text
    assert "2.50× faster" in text
    assert "2.41× to 2.62×, with 2 of 3 layers sparse" in text
    assert "12.0 ms was 30.0 ms" in text
    assert "110.0 MB was 440.0 MB, 4.00× smaller" in text
    assert "0.98765 relative error 1.2e-01" in text
    assert "2 × also used by Gather" in text
    assert "head.weight, other.weight" in text
    assert "encoder.layer.1 768 × 3072 90.0% unstructured 5.000 ms 1.000 ms 3.90–4.20×" in text
    assert "10.0% zeros: too few" in text
    assert "Test CPU, 2 cores usable, 1 threads used" in text
    assert "input_ids [1, 128]" in text
    assert "--calibration-data" in text


def test_names_of_weights_are_shown_where_the_module_does_not_say_them(report: dict[str, Any]) -> None:
    report["layers"] = [layer(0, module=""), layer(1, name="val_17")]
    text = Page(render_html(report)).text
    assert "encoder.layer.0.weight 768" in text
    assert "encoder.layer.1 val_17 768" in text


def test_rendering_leaves_the_report_as_it_was(report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    render_html(report)
    assert report == before


def test_equal_reports_give_equal_pages(report: dict[str, Any]) -> None:
    assert render_html(report) == render_html(copy.deepcopy(report))


@pytest.mark.parametrize(("cosine", "warned"), [(0.98, False), (1.0, False), (0.979, True), (None, True)])
def test_lost_accuracy_is_no_good_news(report: dict[str, Any], cosine: float | None, warned: bool) -> None:
    report["summary"]["cosine"] = cosine
    source = render_html(report)
    assert "2.50× faster" in source
    assert ("The outputs are no longer the original&#39;s" in source) == warned
    assert ('class="verdict good"' in source) == (not warned)


def test_plan_without_sparse_layers_does_not_speak_of_a_written_model(report: dict[str, Any]) -> None:
    for row in report["layers"]:
        row["decision"] = "dense"
    report["summary"]["bytes_after"] = None
    text = Page(render_html(report)).text
    assert "Plan only: nothing was written" in text
    assert "The dense model was written" not in text


def test_within_the_noise(report: dict[str, Any]) -> None:
    report["summary"].update(speedup=1.01, speedup_low=0.98, speedup_high=1.05)
    text = Page(render_html(report)).text
    assert "1.01× the speed, within the noise" in text
    assert "faster" not in text.split("Accuracy")[0]


def test_nothing_faster(report: dict[str, Any]) -> None:
    for row in report["layers"]:
        row["decision"] = "dense"
    text = Page(render_html(report)).text
    assert "Nothing was faster in sparse form" in text
    assert "The dense model was written" in text


@pytest.mark.parametrize(("drop", "said"), [(0.5, "0.5000"), (None, "not a number")])
def test_goal_missed(report: dict[str, Any], drop: float | None, said: str) -> None:
    report["goal"] = {"max_drop": 0.01, "drop": drop, "met": False}
    text = Page(render_html(report)).text
    assert "Goal not met" in text
    assert f"1 − cosine is {said}, the goal allows 0.01" in text
    assert "2.50× faster" not in text


def unmeasured(report: dict[str, Any]) -> None:
    for key in ("dense_ms", "optimized_ms", "speedup", "speedup_low", "speedup_high"):
        report["summary"][key] = None
    for row in report["layers"]:
        row.update(dense_ms=None, sparse_ms=None, speedup_low=None, speedup_high=None, rows=None)


def test_without_benchmark(report: dict[str, Any]) -> None:
    unmeasured(report)
    text = Page(render_html(report)).text
    assert "Written, but not timed" in text
    assert "No layer was timed." in text


def test_dry_run(report: dict[str, Any]) -> None:
    unmeasured(report)
    report["summary"].update(bytes_after=None, relative_error=None, cosine=None)
    report.update(verification={}, input_shapes={}, goal={"max_drop": None, "drop": None, "met": True})
    text = Page(render_html(report)).text
    assert "Plan only: nothing was written" in text
    assert "Not verified: nothing was run." in text
    assert "None" not in text


def test_values_that_are_not_finite_are_shown_as_missing(report: dict[str, Any]) -> None:
    for check in ("against_pruned_dense", "without_library", "against_original"):
        report["verification"][check].update(
            max_abs=None, relative_error=None, cosine=None, top1_agreement=None
        )
    report["summary"].update(relative_error=None)
    assert "None" not in Page(render_html(report)).text


def test_empty_model(report: dict[str, Any]) -> None:
    report.update(layers=[], declined=[])
    report["summary"].update(bytes_before=0, bytes_after=0, sparsity=0.0, sparse_flops_fraction=0.0)
    text = Page(render_html(report)).text
    assert "no linear layer that a sparse kernel could take" in text
    assert "Left as it was" not in text


def test_zero_times_do_not_divide(report: dict[str, Any]) -> None:
    for row in report["layers"]:
        row.update(dense_ms=0.0, sparse_ms=0.0)
    for stage in report["stages"]:
        stage["seconds"] = 0.0
    assert "0.000 ms" in Page(render_html(report)).text


def test_many_layers_chart_is_bounded_and_table_is_not(report: dict[str, Any]) -> None:
    report["layers"] = [layer(index) for index in range(300)]
    page = Page(render_html(report))
    assert sum(tag == "svg" and "aria-label" in values for tag, values in page.tags) == 60
    assert "240 faster layers are not drawn" in page.text
    assert page.text.count("unstructured") == 300


def prediction(**changes: Any) -> dict[str, Any]:
    return {
        "output": "logits",
        "rows": 2048,
        "kl_divergence": 0.0123,
        "top1_agreement": 0.915,
        "reference_perplexity": 18.421,
        "candidate_perplexity": 21.537,
        "tokens": 2032,
        **changes,
    }


def test_predictions_of_a_language_model(report: dict[str, Any]) -> None:
    report["verification"]["against_original"]["predictions"] = [prediction()]
    text = Page(render_html(report)).text
    assert "Same first choice as the original 91.5% KL divergence 1.2e-02" in text
    assert "Perplexity 21.54 was 18.42, on 2032 tokens" in text
    assert "logits 2048 1.2e-02 91.5% 18.42 21.54" in text
    assert "perplexity of the next token" in text


def test_predictions_of_a_classifier_have_no_perplexity(report: dict[str, Any]) -> None:
    found = prediction(reference_perplexity=None, candidate_perplexity=None, tokens=0)
    report["verification"]["against_original"]["predictions"] = [found]
    text = Page(render_html(report)).text
    assert "Same first choice as the original 91.5%" in text
    assert "logits 2048 1.2e-02 91.5% - -" in text
    assert "perplexity of" not in text
    assert " was 18" not in text


def test_headline_is_of_the_output_that_changed_most(report: dict[str, Any]) -> None:
    near, far = prediction(output="start_logits"), prediction(output="end_logits", top1_agreement=0.5)
    for divergence in (1.5, None):
        far["kl_divergence"] = divergence
        report["verification"]["against_original"]["predictions"] = [near, far]
        assert "Same first choice as the original 50.0%" in Page(render_html(report)).text


def test_perplexity_beyond_all_bounds(report: dict[str, Any]) -> None:
    found = prediction(candidate_perplexity=None, kl_divergence=None)
    report["verification"]["against_original"]["predictions"] = [found]
    text = Page(render_html(report)).text
    assert "Perplexity infinite was 18.42" in text
    assert "None" not in text


def test_no_predictions(report: dict[str, Any]) -> None:
    for predictions in ([], None):
        if predictions is not None:
            report["verification"]["against_original"]["predictions"] = predictions
        text = Page(render_html(report)).text
        assert "KL divergence" not in text
        assert "erplexity" not in text


def test_errors_of_layers_on_calibration_and_held_out_data(report: dict[str, Any]) -> None:
    report["layers"][0].update(output_error=0.012, output_error_held_out=0.034)
    report["layers"][1].update(output_error=None, output_error_held_out=None)
    text = Page(render_html(report)).text
    assert "Output error, calibration Output error, held out" in text
    assert "3.90–4.20× 0 1.2e-02 3.4e-02 sparse" in text
    assert "3.90–4.20× 0 - - sparse" in text
    assert "None" not in text


@pytest.mark.parametrize("known", [True, False])
def test_columns_without_any_number_are_not_shown(report: dict[str, Any], known: bool) -> None:
    if known:
        for row in report["layers"]:
            row.update(output_error=None, output_error_held_out=None)
    assert "Output error" not in Page(render_html(report)).text


def test_hostile_text_is_only_text(report: dict[str, Any]) -> None:
    harmless = [tag for tag, _ in Page(render_html(report)).tags]
    report["source"] = HOSTILE
    report["environment"]["cpu"] = HOSTILE
    report["environment"]["versions"] = {HOSTILE: HOSTILE}
    report["input_shapes"] = {HOSTILE: [1]}
    report["verification"]["inputs"] = HOSTILE
    report["verification"]["against_original"]["predictions"] = [prediction(output=HOSTILE)]
    for row in report["layers"]:
        row.update(
            name=HOSTILE, module=HOSTILE, reason=HOSTILE, mask_structure=HOSTILE, decision=row["decision"]
        )
    report["declined"] = [{"pass_name": HOSTILE, "place": HOSTILE, "reason": HOSTILE}]
    report["stages"][0]["name"] = HOSTILE
    page = Page(render_html(report))
    assert [tag for tag, _ in page.tags].count("script") == harmless.count("script") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    assert page.text.count("{{ 7 * 7 }}") >= 10
    assert not any(name.startswith("on") for _, values in page.tags for name in values)


def test_page_needs_nothing_from_outside(report: dict[str, Any]) -> None:
    source = render_html(report)
    page = Page(source)
    assert not any({"src", "href"} & values.keys() for _, values in page.tags)
    assert "url(" not in source
    assert "@import" not in source
    policies = [v["content"] or "" for t, v in page.tags if t == "meta" and "http-equiv" in v]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'")


def test_phone_dark_mode_and_print_are_provided_for(report: dict[str, Any]) -> None:
    source = render_html(report)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in source
    for query in ("(prefers-color-scheme: dark)", "@media print", "@media screen and (max-width: 44rem)"):
        assert query in source


def test_write_html_writes_utf8(report: dict[str, Any], tmp_path: Path) -> None:
    report["source"] = "模型.onnx"
    write_html(report, tmp_path / "report.html")
    assert "模型.onnx" in (tmp_path / "report.html").read_bytes().decode("utf-8")
