"""A third form, made up here: timed in the same rounds as the others, chosen where it is the fastest, reported, shown.

It stores every weight as the sparse operator does, whatever its zeros, so that its answers are right; how fast it is,
is made up as well.
"""

import dataclasses
import json
import re
from typing import ClassVar

import numpy as np
import onnx
import onnx.parser
import pytest

import sparse_onnx
from sparse_onnx.compilation import write
from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower import candidates
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.forms import Form, sparse_form
from sparse_onnx.passes.lower.lowering import Packer
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.report.html import render_html
from sparse_onnx.report.schema import check_report
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.timing import forms
from sparse_onnx.timing.cache import TimingCache
from sparse_onnx.timing.choose import Bench, decide, decide_by_table
from sparse_onnx.timing.curves import Curve, LayerCurves, measure_curves
from sparse_onnx.timing.rounds import Ratio
from sparse_onnx.timing.table import TimingTable, read_table, write_table

WIDTH = 64
SHAPES = {"X": (8, WIDTH), "r": (8, WIDTH)}


@dataclasses.dataclass(frozen=True)
class MadeUpForm(Form):
    def expected_nbytes(self, shape, sparsity, structure, outputs):
        return 2.0 * shape[0] * shape[1]


@dataclasses.dataclass(frozen=True)
class LowerMadeUp(LowerSparseMatMul):
    name: ClassVar[str] = "lower.made-up"
    exact: ClassVar[bool] = True

    @classmethod
    def find_candidates(cls, model):
        found, left = LowerSparseMatMul.find_candidates(model)
        form = MadeUpForm("made-up", cls, cls.exact)
        return [dataclasses.replace(candidate, forms=(form,)) for candidate in found], left


@dataclasses.dataclass(frozen=True)
class LowerRough(LowerMadeUp):
    exact: ClassVar[bool] = False


@pytest.fixture
def with_lowering(monkeypatch):
    def add(lowering):
        monkeypatch.setattr(candidates, "LOWERINGS", (*candidates.LOWERINGS, lowering))

    return add


@pytest.fixture
def timed(monkeypatch):
    """``timed.ms`` by form is what every round measures; ``timed.rounds`` has the models of each."""

    class Timed:
        ms: ClassVar = {"dense": 4.0, "sparse": 2.0, "made-up": 1.0}

        def __init__(self):
            self.rounds = []

        def together(self, models, libraries, _feeds, *, rounds, **_options):
            self.rounds.append(len(models))
            assert libraries == [False] + [True] * (len(models) - 1)
            if len(models) == 2:  # of dense and the one form that fits
                return [[self.ms["dense"]] * rounds, [self.ms[self.alone]] * rounds]
            return [[self.ms[form]] * rounds for form in ("dense", "sparse", "made-up")]

        alone = "made-up"

    timed = Timed()
    monkeypatch.setattr(forms, "time_together", timed.together)
    return timed


@pytest.fixture
def source(tmp_path):
    """A with 80 % zeros, B with none."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, {WIDTH}] X) => (float[batch, {WIDTH}] Y) {{ h = MatMul(X, A) r = Relu(h) Y = MatMul(r, B) }}"""
    )
    rng = np.random.default_rng(0)
    for name, zeros in (("A", 0.8), ("B", 0.0)):
        weight = rng.standard_normal(WIDTH * WIDTH).astype(np.float32)
        weight[: round(zeros * weight.size)] = 0
        rng.shuffle(weight)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight.reshape(WIDTH, WIDTH), name))
    onnx.save(proto, tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def decided(source, tmp_path, *, cache=None, **options):
    model = model_io.load_model(source)
    bench = Bench(Workbench(1, tmp_path), cache or TimingCache())
    packer = Packer(PassContext())
    found = decide(model, find_candidates(model)[0], [SHAPES], packer, bench, **options)
    return {decision.candidate.weight.name: decision for decision in found}


def test_the_fastest_of_three_is_compiled_reported_and_shown(
    source, tmp_path, with_lowering, timed, monkeypatch
):
    with_lowering(LowerMadeUp)
    monkeypatch.setattr(write, "time_whole", lambda *_arguments: [Ratio(4.0, 1.0, 4.0, 3.9, 4.1)])
    result = sparse_onnx.optimize(
        source, tmp_path / "out", input_shapes={"X": SHAPES["X"]}, threads=1, timing_cache=False
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    check_report(report)
    assert report == result.report
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["A"]["decision"] == "made-up"
    assert rows["A"]["times"] == {"dense": 4.0, "sparse": 2.0, "made-up": 1.0}
    assert rows["A"]["reason"] == "4.00x dense (4.00 to 4.00), 2.00x sparse (2.00 to 2.00)"
    assert set(timed.rounds) == {2, 3}, "all forms of a layer in one round"
    page = re.sub(r"\s+", " ", (tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    for shown in (
        '<th scope="col">Dense</th><th scope="col">Sparse</th><th scope="col">Made-up</th>',
        '<td data-label="made-up" data-sort="1.0">1.000 ms</td>',
        '<span class="tag">made-up</span>',
        "2 of 2 layers run made-up",
    ):
        assert shown in page
    X = np.random.default_rng(1).standard_normal(SHAPES["X"]).astype(np.float32)
    runs = [
        sparse_onnx.InferenceSession(path).run(None, {"X": X})[0]
        for path in (source, tmp_path / "out" / "model.onnx")
    ]
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-4, atol=1e-3)


def test_zeros_are_no_ticket(source, tmp_path, with_lowering, timed):
    """B has none: it is timed in the form that asks for none, and in no other."""
    with_lowering(LowerMadeUp)
    decision = decided(source, tmp_path)["B"]
    assert decision.form == "made-up"
    assert decision.times == {"dense": 4.0, "made-up": 1.0}


@pytest.mark.parametrize(
    ("ms", "form", "reason"),
    [
        (
            {"sparse": 1.0, "made-up": 2.0},
            "sparse",
            "4.00x dense (4.00 to 4.00), 2.00x made-up (2.00 to 2.00)",
        ),
        (
            {"sparse": 9.0, "made-up": 2.0},
            "made-up",
            "2.00x dense (2.00 to 2.00), 4.50x sparse (4.50 to 4.50)",
        ),
        (
            {"sparse": 5.0, "made-up": 8.0},
            "dense",
            "sparse 0.80x dense (0.80 to 0.80), below min_speedup 1.02",
        ),
    ],
)
def test_whichever_is_fastest_wins(source, tmp_path, with_lowering, timed, ms, form, reason):
    with_lowering(LowerMadeUp)
    timed.ms = {"dense": 4.0, **ms}
    decision = decided(source, tmp_path)["A"]
    assert (decision.form, decision.reason, decision.close) == (form, reason, False)
    assert decision.times == timed.ms


def test_forms_that_cannot_be_told_apart_are_close(source, tmp_path, with_lowering, timed):
    with_lowering(LowerMadeUp)
    timed.ms = {"dense": 4.0, "sparse": 2.0, "made-up": 2.0}
    decision = decided(source, tmp_path)["A"]
    assert decision.close
    assert decision.reason == "2.00x dense (2.00 to 2.00), 1.00x made-up (1.00 to 1.00) but close"


def test_a_form_that_changes_the_numbers_must_be_allowed(source, tmp_path, with_lowering, timed):
    with_lowering(LowerRough)
    timed.alone = "sparse"
    refused = decided(source, tmp_path)
    assert (refused["A"].form, refused["A"].times) == ("sparse", {"dense": 4.0, "sparse": 2.0})
    assert refused["B"].form == "dense"
    assert refused["B"].reason == (
        "0.0% zeros: too few for any sparse kernel; made-up changes the numbers, which is not allowed"
    )
    timed.alone = "made-up"
    assert {d.form for d in decided(source, tmp_path, allowed=("made-up",)).values()} == {"made-up"}
    other = decided(source, tmp_path, allowed=("another",))
    assert other["B"].form == "dense"


def test_times_of_three_forms_come_back_from_the_cache_together(source, tmp_path, with_lowering, timed):
    file = tmp_path / "timings.jsonl"
    timed.alone = "sparse"
    assert decided(source, tmp_path, cache=TimingCache(file))["A"].form == "sparse"
    with_lowering(LowerMadeUp)
    timed.alone = "made-up"
    timed.rounds.clear()
    first = decided(source, tmp_path, cache=TimingCache(file))
    assert 3 in timed.rounds, "a form more: all are timed again, in the same rounds"
    timed.rounds.clear()
    second = decided(source, tmp_path, cache=TimingCache(file))
    assert timed.rounds == []
    assert second["A"].cached
    assert (second["A"].form, second["A"].times) == (first["A"].form, first["A"].times)


def test_curves_and_tables_go_by_form_and_pattern(source, tmp_path, with_lowering):
    with_lowering(LowerMadeUp)
    model = model_io.load_model(source)
    first, second = find_candidates(model)[0]
    (layer,) = first.layers
    options = {"sparsities": (0.9,), "structures": ("unstructured", "2:4"), "threads": 1, "work": tmp_path}
    measured = measure_curves(model, first, layer, [SHAPES["X"]], **options)
    assert set(measured.curves) == {
        (form, pattern) for form in ("sparse", "made-up") for pattern in ("unstructured", "2:4")
    }
    as_it_is = measure_curves(model, second, second.layers[0], [SHAPES["r"]], **options, prunable=False)
    assert set(as_it_is.curves) == {("made-up", "unstructured")}

    def straight(time):
        return Curve((0.0, 0.9), (time, time), (time, time), (time, time))

    curves = {("sparse", "unstructured"): straight(0.5), ("made-up", "unstructured"): straight(0.25)}
    from sparse_onnx.passes.patterns.layer import layer_kind

    kind = layer_kind(layer, [SHAPES["X"]])
    write_table(TimingTable({}, ((kind, LayerCurves(2.0, curves)),)), tmp_path / "table.json")
    table = read_table(tmp_path / "table.json")
    assert table.find(layer, [SHAPES["X"]]).curves == curves
    decisions = {d.candidate.weight.name: d for d in decide_by_table([first, second], table, [SHAPES])}
    assert decisions["A"].form == "made-up"
    assert decisions["A"].times == {"dense": 2.0, "sparse": 1.0, "made-up": 0.5}
    assert decisions["A"].reason == (
        "4.00x dense (4.00 to 4.00), 2.00x sparse (2.00 to 2.00), by the timing table"
    )
    assert decisions["B"].reason == "not in the timing table: 0.0% zeros, fewer than 65%"


def test_without_times_only_a_form_that_is_sure_is_chosen(source, with_lowering):
    with_lowering(LowerMadeUp)
    decisions = decide_by_table(find_candidates(model_io.load_model(source))[0])
    assert [decision.form for decision in decisions] == ["sparse", "dense"]


def test_a_lowering_whose_layer_ends_elsewhere_is_declined(source, monkeypatch):
    """What is timed side by side must compute the same."""

    @dataclasses.dataclass(frozen=True)
    class Shorter(LowerMadeUp):
        @classmethod
        def find_candidates(cls, model):
            found, left = LowerMadeUp.find_candidates(model)
            cut = [
                dataclasses.replace(
                    c, layers=tuple(dataclasses.replace(x, output=x.nodes[0].outputs[0]) for x in c.layers)
                )
                for c in found
            ]
            return cut, left

    monkeypatch.setattr(candidates, "LOWERINGS", (LowerSparseMatMul, Shorter))
    found, declined = find_candidates(model_io.load_model(source))
    assert [[form.name for form in candidate.forms] for candidate in found] == [
        ["sparse"],
        ["sparse", "made-up"],
    ]
    assert ("A", "its layer ends elsewhere than that of lower.sparse-matmul") in [
        (place.place, place.reason) for place in declined
    ]


@pytest.mark.parametrize("name", ["dense", ""])
def test_no_other_form_is_called_dense(name):
    with pytest.raises(UsageError, match="name"):
        MadeUpForm(name, LowerMadeUp)
    assert sparse_form(LowerSparseMatMul).refusal(0.3) == ""


def test_page_of_curves_in_several_forms(source, tmp_path, with_lowering, timed):
    with_lowering(LowerMadeUp)
    result = sparse_onnx.optimize(
        source, tmp_path / "out", input_shapes={"X": SHAPES["X"]}, threads=1, timing_cache=False
    )
    points = [{"sparsity": share, "speedup": 2 * share} for share in (0.5, 0.9)]
    report = {
        **result.report,
        "curves": [
            {"layer": "A", "form": form, "mask_structure": "unstructured", "points": points, "break_even": 0.5,
             "chosen": None}
            for form in ("sparse", "made-up")
        ],
    }  # fmt: skip
    check_report(report)
    page = render_html(report)
    assert "sparse, unstructured" in page
    assert "made-up, unstructured" in page
