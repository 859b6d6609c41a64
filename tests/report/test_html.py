"""The HTML report: what it says in each case, that nothing in it is trusted, and that it stands alone."""

from __future__ import annotations

import base64
import copy
import hashlib
import html.parser
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from sparse_onnx.report.html import render_html, write_html

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
HOSTILE = "<script>alert('1')</script>\"><img src=x onerror=alert(2)>{{ 7 * 7 }}"

Report = dict[str, Any]


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page; fails where tags are not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.raw: dict[str, str] = {}
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
        if self.open and self.open[-1] in ("script", "style"):
            self.raw[self.open[-1]] = data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def text_of(report: Report) -> str:
    source = render_html(report)
    assert "None" not in source
    return Page(source).text


def test_what_is_out_of_the_ordinary_is_said(full_report: Report) -> None:
    text = text_of(full_report)
    assert "The model's file is of opset 11: it was converted to 13 inside" in text
    assert "Outputs that are no tensors were not compared: past (a sequence)." in text
    fewer = "it ran with fewer (graph_optimization_level; pruned dense: basic, with library: basic). Run it so, too."
    assert fewer in text


def test_optimizations_that_break_only_what_nobody_runs_are_no_news(full_report: Report) -> None:
    full_report["verification"]["optimization_levels"] = {"pruned_dense": "basic", "with_library": "all"}
    assert "graph_optimization_level" not in text_of(full_report)


def test_ordinary_report(report: Report) -> None:
    text = text_of(report)
    assert (
        "✓ Good bert.onnx is now 2.50× faster (2.41 to 2.62) and 4.00× smaller; "
        "its outputs stay close to the original's (cosine 0.988)." in text
    )
    assert "Latency 12.0 ms was 30.0 ms" in text
    assert "Size 110.0 MB was 440.0 MB" in text
    assert "Cosine to the original 0.98765 relative error 12.0%" in text
    assert "The layers take 2.000 ms instead of 9.000 ms" in text
    assert "2 × encoder.layer.* 9.000 ms 2.000 ms" in text
    assert "Compiling changed the outputs by 3.1e-07, compression by 12.0%" in text
    assert "2 of 3 layers run sparse" in text
    assert (
        "encoder.layer.1 768 × 3072 90.0% 5.000 ms 1.000 ms 3.90–4.20× sparse 4.00x dense (3.90 to 4.20)"
        in text
    )
    assert "dense 10.0% zeros: too few" in text
    assert "2 places were not touched, and why 2 × also used by Gather (lower.sparse-matmul)" in text
    assert "head.weight, other.weight" in text
    assert "Measured on Test CPU, 1 thread " in text
    assert "input_ids [1, 128]" in text
    assert "Command sparse-onnx optimize bert.onnx -o out" in text
    assert "Resolved recipe version: 1 stages: [] target: threads: 1" in text
    assert "Compiling took 2.1 s and at most 140 MiB" in text
    for absent in (
        "None",
        "Break-even",
        "Search",
        "Goals",
        "Time by operator",
        "Time by input shape",
        "Pattern",
    ):
        assert absent not in text.replace("Pattern of the zeros: unstructured", "")


def test_full_report(full_report: Report) -> None:
    text = text_of(full_report)
    assert "✓ Goal met bert.onnx" in text
    assert "All goals are met" in text
    assert "target_speedup ✓ met the speedup is 2.50, asked for are 2" in text
    assert "1.90× to 2.50× the speed at 2 input shapes" in text
    assert "64.0% of the time is in the layers, most of the rest in MultiHeadAttention (2.500 ms)" in text
    assert "Softmax 3.000 ms - " in text
    assert "between operators 1.000 ms 0.500 ms" in text
    assert "bert.encoder.layer.4.attention.query.dense changed most: its output by 3.6%" in text
    assert "13 layers lose less than those shown" in text
    assert "Sparse pays from 39% to 55% zeros on, at the median layer from 46% (unstructured)" in text
    assert "bert.encoder.layer.0.attention.query.dense and 11 like it 55% never 42%" in text
    assert "The budget is met: 2.20× at a loss of 0.016" in text
    assert "5 chosen 2.20× 0.016 60.0% 88.0 MB" in text
    assert "block:4x1" in text


def test_names_of_weights_are_shown_where_the_module_does_not_say_them(report: Report) -> None:
    report["layers"][0]["module"] = ""
    report["layers"][1]["name"] = "val_17"
    text = text_of(report)
    assert "encoder.layer.0.weight 768" in text
    assert "encoder.layer.1 val_17 768" in text


def test_rendering_leaves_the_report_as_it_was(full_report: Report) -> None:
    before = copy.deepcopy(full_report)
    render_html(full_report)
    assert full_report == before


def test_equal_reports_give_equal_pages(full_report: Report) -> None:
    assert render_html(full_report) == render_html(copy.deepcopy(full_report))


def verdict_of(report: Report) -> tuple[str, str]:
    """The verdict's kind, which is its colour, and everything that it says."""
    source = render_html(report)
    (kind,) = re.findall(r'<header class="verdict (\w+)">', source)
    return kind, Page(source).text.split(" Latency ")[0].split(" Size ")[0]


@pytest.mark.parametrize(
    ("cosine", "kind", "said"),
    [
        (1.0, "good", "✓ Good"),
        (0.98, "good", "stay close to the original's (cosine 0.980)"),
        (0.979, "check", "! Look closer"),
        (0.8, "check", "check the accuracy on your task"),
        (0.79, "bad", "✗ Accuracy lost"),
        (None, "bad", "✗ Broken outputs"),
    ],
)
def test_lost_accuracy_is_no_good_news(report: Report, cosine: float | None, kind: str, said: str) -> None:
    report["summary"]["cosine"] = cosine
    found, text = verdict_of(report)
    assert found == kind
    assert said in text
    assert "2.50× faster" in text


def rounded(op_type: str, bits: int, nbytes: int) -> dict[str, Any]:
    """A row of what this run stored in few bits: 1000 elements."""
    return {
        "name": "w",
        "module": "",
        "op_type": op_type,
        "elements": 1000,
        "bits": bits,
        "group_size": 64,
        "encoding": "",
        "bytes": nbytes,
        "sparsity": 0.0,
        "rounded": True,
        "pruned": False,
        "output_error": None,
        "output_error_held_out": None,
    }


def test_the_verdict_says_what_is_in_few_bits(report: Report) -> None:
    report["quantized"] = [rounded("MatMul", 8, 1100), rounded("Gemm", 8, 1100), rounded("", 4, 800)]
    kind, text = verdict_of(report)
    assert kind == "good"
    assert ", with 2 weights in 8 bits, 1 table in 4 bits, is now 2.50× faster" in text
    assert "Weights in few bits 8.0 bits a weight 3.0 kB, as float32 12.0 kB" in text_of(report)


def test_what_had_few_bits_before_is_no_merit_of_this_run(report: Report) -> None:
    report["quantized"] = [{**rounded("MatMul", 8, 1100), "rounded": False}]
    assert "bits" not in verdict_of(report)[1]
    report["quantized"] = [rounded("MatMul", 8, 1100)]
    report["summary"]["written"] = "original"
    assert "bits" not in verdict_of(report)[1]


def test_the_loss_from_rounded_activations_has_its_row(report: Report) -> None:
    assert "rounding them" not in text_of(report)
    checks = report["verification"]
    checks["rounded_activations"] = {**checks["against_original"], "relative_error": 0.0123}
    assert "Result against itself with activations in floats the loss from rounding them 1.2%" in text_of(
        report
    )


METRIC = {
    "name": "accuracy",
    "before": 0.9,
    "after": 0.89,
    "drop": 0.01,
    "lower_is_better": False,
    "samples": 500,
}


@pytest.mark.parametrize(
    ("drop", "kind", "said"),
    [
        (0.01, "good", "its accuracy is 0.89, was 0.9."),
        (-0.2, "good", "✓ Good"),
        (0.021, "check", "check the accuracy on your task"),
        (0.21, "bad", "✗ Accuracy lost"),
        (None, "bad", "✗ Broken outputs"),
    ],
)
def test_a_metric_counts_for_more_than_the_cosine(
    report: Report, drop: float | None, kind: str, said: str
) -> None:
    report["summary"].update(cosine=0.1, metric={**METRIC, "drop": drop})
    found, text = verdict_of(report)
    assert found == kind
    assert said in text
    assert "Accuracy 0.89 was 0.9, on 500 samples" in text_of(report)


def test_a_loss_that_the_goal_allows_is_good(report: Report) -> None:
    report["summary"]["cosine"] = 0.5
    gate = {"name": "max_drop", "asked": 0.6, "reached": 0.5, "met": True, "text": "the drop is 0.5"}
    report["goal"] = {"met": True, "gates": [gate]}
    assert verdict_of(report)[0] == "good"


def test_generated_inputs_are_a_reason_to_look_closer_if_weights_changed(report: Report) -> None:
    checks = report["verification"]
    checks["inputs"] = "generated"
    assert verdict_of(report)[0] == "check"
    assert "--calibration-data" in text_of(report)
    checks["against_original"]["relative_error"] = 6e-7  # the compiler alone: 3.1e-7
    assert verdict_of(report)[0] == "good"
    assert "Compiling changed the outputs by 3.1e-07; nothing else changed them" in text_of(report)


def test_a_disturbed_machine_is_a_reason_to_look_closer(report: Report) -> None:
    report["targets"][0]["quiet"] = False
    kind, text = verdict_of(report)
    assert (kind, "Other programs were running while it was timed" in text) == ("check", True)


def test_within_the_noise(report: Report) -> None:
    report["summary"].update(speedup=1.01, speedup_low=0.98, speedup_high=1.05)
    kind, text = verdict_of(report)
    assert kind == "check"
    assert "bert.onnx is not proven faster, 1.01× (0.98 to 1.05); it is now 4.00× smaller" in text
    assert "within the noise" in text


def test_an_interval_that_ends_at_1_proves_nothing(report: Report) -> None:
    report["summary"].update(speedup=1.01, speedup_low=1.0, speedup_high=1.05)
    kind, text = verdict_of(report)
    assert (kind, "is not proven faster" in text) == ("check", True)


def test_slower_is_said(report: Report) -> None:
    report["summary"].update(speedup=0.9, speedup_low=0.88, speedup_high=0.93)
    kind, text = verdict_of(report)
    assert (kind, "bert.onnx is slower, 0.90× (0.88 to 0.93)" in text) == ("check", True)
    assert "within the noise" not in text


@pytest.mark.parametrize("error", [0.094, None])
def test_outputs_that_are_rounding_noise_are_no_bad_news(report: Report, error: float | None) -> None:
    checks = report["verification"]
    for way in ("against_pruned_dense", "against_original"):
        checks[way]["relative_error"] = error
    report["summary"].update(relative_error=error, cosine=0.5)
    assert verdict_of(report)[0] == "bad"
    checks["rounding"] = {"logits": None if error is None else 0.1}
    assert verdict_of(report)[0] == "good"
    text = text_of(report)
    assert "its outputs are the original's but for rounding." in text
    assert "which rounding explains; nothing else changed them" in text
    checks["against_original"]["relative_error"] = 0.9 if error else 0.0
    if error:
        assert verdict_of(report)[0] == "bad", "that is not the compiler's"


def test_the_dense_model_was_written_only_if_it_was(report: Report) -> None:
    all_dense(report)
    for written, said in (
        ("original", "so the dense model was written"),
        ("pruned", "the pruned model was written, dense"),
        ("compiled", "is now 2.50× faster"),  # structures were removed
    ):
        report["summary"]["written"] = written
        text = verdict_of(report)[1]
        assert said in text
        assert ("dense model was written" in text) == (written == "original")


def all_dense(report: Report) -> None:
    for row in report["layers"]:
        row["decision"] = "dense"


def test_nothing_faster(report: Report) -> None:
    all_dense(report)
    kind, text = verdict_of(report)
    assert kind == "check"
    assert "Nothing in bert.onnx is faster in sparse form, so the dense model was written" in text
    assert "No layer gets faster" in text_of(report)


def test_goal_missed(report: Report) -> None:
    texts = {"max_drop": True, "target_speedup": False, "target_size": False}
    report["goal"] = {
        "met": False,
        "gates": [
            {"name": name, "asked": 1.0, "reached": 2.0, "met": met, "text": f"the {name} is so"}
            for name, met in texts.items()
        ],
    }
    kind, text = verdict_of(report)
    assert kind == "bad"
    assert "✗ Goal not met" in text
    assert "The target_speedup is so; the target_size is so. This is the best so far." in text
    assert "max_drop" not in text
    assert "max_drop ✓ met" in text_of(report)


def unmeasured(report: Report) -> None:
    for times in (report["summary"], *report["targets"]):
        times.update(dict.fromkeys(("dense_ms", "optimized_ms", "speedup", "speedup_low", "speedup_high")))
    for target in report["targets"]:
        target["quiet"] = None
    for row in report["layers"]:
        row.update({**dict.fromkeys(("speedup_low", "speedup_high", "rows")), "times": {}})


def test_without_benchmark(report: Report) -> None:
    unmeasured(report)
    kind, text = verdict_of(report)
    assert kind == "check"
    assert "is now sparse, its speed not measured and 4.00× smaller" in text
    assert "No layer was timed" in text_of(report)


def test_plan(report: Report) -> None:
    unmeasured(report)
    report["summary"].update(bytes_after=None, relative_error=None, cosine=None)
    report.update(verification={}, input_shapes={}, targets=[])
    kind, _ = verdict_of(report)
    text = text_of(report)
    assert kind == "check"
    assert "Plan only A plan for bert.onnx: 2 of 3 layers would become sparse." in text
    assert "Not verified: nothing was run" in text
    all_dense(report)
    assert "The dense model was written" not in text_of(report)


def test_values_that_are_not_finite_are_shown_as_missing(report: Report) -> None:
    for check in ("against_pruned_dense", "without_library", "against_original"):
        report["verification"][check].update(
            max_abs=None, relative_error=None, cosine=None, top1_agreement=None
        )
    report["summary"].update(relative_error=None)
    text_of(report)


def test_empty_model(report: Report) -> None:
    report.update(layers=[], declined=[])
    report["summary"].update(bytes_before=0, bytes_after=0, sparsity=0.0, sparse_flops_fraction=0.0)
    text = text_of(report)
    assert "There is no layer that a sparse kernel could take" in text
    assert "Left as it was" not in text


def test_zero_times_do_not_divide(full_report: Report) -> None:
    for row in full_report["layers"]:
        row["times"] = {"dense": 0.0, "sparse": 0.0}
    for stage in full_report["stages"]:
        stage["seconds"] = 0.0
    for shares in full_report["profile"].values():
        shares.update(wall_ms=1e-9, layers_ms=0.0, others=[])
    for point in full_report["search"]["pareto"]:
        point.update(speedup=0.0, drop=0.0)
    assert "0.000 ms" in text_of(full_report)


def test_a_search_without_a_plan_and_one_with_broken_outputs(full_report: Report) -> None:
    search = full_report["search"]
    search.update(met=False, pareto=search["pareto"][:1])
    search["pareto"][0].update(chosen=True, drop=None, bytes=None)
    text = text_of(full_report)
    assert "The budget was not met; the best is 1.00× at outputs that are no numbers" in text
    assert "1 chosen 1.00× - 0.0%" in text
    search["pareto"] = []
    assert "No plan was found" in text_of(full_report)


def test_profile_of_one_side(full_report: Report) -> None:
    full_report["profile"]["after"] = None
    text = text_of(full_report)
    assert "67.7% of the time is in the layers, most of the rest in Softmax (3.000 ms)" in text
    full_report["profile"]["before"] = None
    assert "Time by operator" not in text_of(full_report)


def test_curve_that_never_pays(full_report: Report) -> None:
    full_report["curves"] = [curve for curve in full_report["curves"] if curve["mask_structure"] == "2:4"]
    assert "Sparse pays at no measured share of zeros (2:4)" in text_of(full_report)


def many_layers(report: Report, count: int) -> None:
    first = report["layers"][0]
    kinds = ("query", "key", "value", "output", "up", "down", "gate")
    report["layers"] = [
        {
            **first,
            "name": f"onnx::MatMul_{1000 + index}",
            "module": f"base_model.encoder.blocks.{index}.self_attention.projections.{kinds[index % 7]}.dense",
            "times": {"dense": 1.0 + index, "sparse": 1.0},
            "shape": [768, 768 + index],
            "relative_error": 0.001 * (index + 1),
            "output_error": 0.1,
            "output_error_held_out": 0.1,
        }
        for index in range(count)
    ]


def test_charts_are_bounded_and_the_table_is_not(report: Report) -> None:
    many_layers(report, 300)
    text = text_of(report)
    assert "280 × other layers" in text
    assert "280 layers lose less than those shown" in text
    assert all(f"onnx::MatMul_{1000 + index} " in text for index in range(300))


def test_pages_of_large_models_stay_small(full_report: Report) -> None:
    many_layers(full_report, 800)
    assert len(render_html(full_report).encode()) < 1_000_000


def prediction_of(report: Report) -> Report:
    found: Report = report["verification"]["against_original"]["predictions"][0]
    return found


def test_predictions_of_a_language_model(full_report: Report) -> None:
    text = text_of(full_report)
    assert "Same first choice 91.5% KL divergence 1.2e‑02" in text
    assert "Perplexity 21.54 was 18.42, on 2032 tokens" in text
    assert "logits 2048 1.2e-02 91.5% 18.42 21.54" in text
    assert "perplexity of the next token" in text


def test_predictions_of_a_classifier_have_no_perplexity(full_report: Report) -> None:
    prediction_of(full_report).update(reference_perplexity=None, candidate_perplexity=None, tokens=0)
    text = text_of(full_report)
    assert "Same first choice 91.5%" in text
    assert "logits 2048 1.2e-02 91.5% " in text
    assert "erplexity" not in text


def test_headline_is_of_the_output_that_changed_most(full_report: Report) -> None:
    near = prediction_of(full_report)
    far = {**near, "output": "end_logits", "top1_agreement": 0.5}
    for divergence in (1.5, None):
        far["kl_divergence"] = divergence
        full_report["verification"]["against_original"]["predictions"] = [near, far]
        assert "Same first choice 50.0%" in text_of(full_report)


def test_perplexity_beyond_all_bounds(full_report: Report) -> None:
    prediction_of(full_report).update(candidate_perplexity=None, kl_divergence=None)
    text = text_of(full_report)
    assert "Perplexity infinite was 18.42" in text


def test_errors_of_layers_on_calibration_and_held_out_data(report: Report) -> None:
    report["layers"][0].update(output_error=0.012, output_error_held_out=0.034)
    text = text_of(report)
    assert "Output error Held out Decision" in text
    assert "3.90–4.20× 1.2% 3.4% sparse" in text
    assert "3.90–4.20× - - sparse" in text


def test_columns_without_any_number_are_not_shown(report: Report) -> None:
    text = text_of(report)
    assert "Output error" not in text
    assert "Weight error" not in text


def hostile(value: Any) -> Any:
    """Every text in ``value`` replaced, keys that are names included."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) and value not in ("sparse", "dense", "generated") else value


def test_hostile_text_is_only_text(full_report: Report) -> None:
    counted = ("script", "style", "img", "header", "section", "a", "iframe", "object", "form", "link")
    harmless = [tag for tag, _ in Page(render_html(full_report)).tags]
    report = hostile(full_report)
    report["environment"]["versions"] = {HOSTILE: HOSTILE}
    report["targets"][0]["input_shapes"] = {HOSTILE: [1]}
    report["recipe"] = {HOSTILE: [HOSTILE]}
    page = Page(render_html(report))
    tags = [tag for tag, _ in page.tags]
    assert {tag: tags.count(tag) for tag in counted} == {tag: harmless.count(tag) for tag in counted}
    assert page.text.count("{{ 7 * 7 }}") >= 10
    assert not any(name.startswith("on") for _, values in page.tags for name in values)


def policy_of(page: Page) -> str:
    (policy,) = [
        values["content"] or "" for tag, values in page.tags if tag == "meta" and "http-equiv" in values
    ]
    return policy


def test_page_needs_nothing_from_outside(full_report: Report) -> None:
    source = render_html(full_report)
    page = Page(source)
    assert not any({"src", "href", "style"} & values.keys() for _, values in page.tags)
    assert "url(" not in source
    assert "@import" not in source


def test_policy_allows_the_own_script_and_style_and_nothing_more(full_report: Report) -> None:
    page = Page(render_html(full_report))

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    directives = dict(part.strip().split(" ", 1) for part in policy_of(page).split(";"))
    assert directives == {
        "default-src": "'none'",
        "style-src": digest(page.raw["style"]),
        "script-src": digest(page.raw["script"]),
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_page_is_accessible(full_report: Report) -> None:
    page = Page(render_html(full_report))
    assert ("html", {"lang": "en"}) in page.tags
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all("scope" in values for tag, values in page.tags if tag == "th")
    pictures = [values for tag, values in page.tags if tag == "svg"]
    assert any(values.get("role") == "img" for values in pictures)
    for values in pictures:
        assert values.get("aria-hidden") == "true" or (
            values.get("role") == "img" and values.get("aria-label")
        )


def test_write_html_writes_utf8(report: Report, tmp_path: Path) -> None:
    report["source"] = "模型.onnx"
    write_html(report, tmp_path / "report.html")
    assert "模型.onnx" in (tmp_path / "report.html").read_bytes().decode("utf-8")


def test_a_curve_of_few_bits_is_named_by_its_form(full_report: Report) -> None:
    layer = full_report["curves"][-1]["layer"]
    once = {"sparsity": 0.0, "speedup": 1.7, "speedup_low": 1.6, "speedup_high": 1.8}
    few = {"layer": layer, "form": "int8-dynamic", "mask_structure": "unstructured", "points": [once]}
    full_report["curves"].append({**few, "break_even": 0.0, "chosen": None})
    text = text_of(full_report)
    assert "int8-dynamic" in text
    assert "int8-dynamic, unstructured" not in text
    assert "sparse, unstructured" in text
    full_report["curves"][-1]["points"].append({**once, "sparsity": 0.5})
    assert "int8-dynamic, unstructured" in text_of(full_report), "over zeros it has a pattern"
