"""The whole analysis on small models: what it covers, and size and error against what ``optimize`` makes. Times are not
judged."""

import dataclasses
import json
import re

import numpy as np
import onnx
import onnx.parser
import pytest

import sparse_onnx
from sparse_onnx.analysis.choice import Choice
from sparse_onnx.errors import ModelFileError, UsageError
from sparse_onnx.passes.quantize.by_bits import usual_grid
from sparse_onnx.timing.rounds import Ratio
from sparse_onnx.timing.table import read_table, write_table

WIDTH = 96

MODEL = f"""<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, {WIDTH}] X, float[{WIDTH}, {WIDTH}] W3) => (float[batch, {WIDTH}] Y)
{{ a0 = MatMul(X, W0) b0 = Add(a0, c0) g0 = Gelu(b0) a1 = MatMul(g0, W1) b1 = Add(a1, c1) g1 = Gelu(b1)
   a2 = MatMul(g1, W2) a3 = MatMul(g1, W3) Y = Add(a2, a3) }}"""


def write_model(folder):
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(MODEL)
    for index in range(4):
        weight = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) / np.float32(np.sqrt(WIDTH) / 2)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"W{index}"))
        proto.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.standard_normal(WIDTH).astype(np.float32), f"c{index}")
        )
    folder.mkdir(exist_ok=True)
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


BATCH = 16
OPTIONS = {
    "input_shapes": {"X": (BATCH, WIDTH)},
    "threads": 1,
    "sparsities": (0.5, 0.9),
    "mask_structures": ("unstructured", "2:4", "block:8x1"),
    "bits": (),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(source):
    path = source.parent / "data.npz"
    np.savez(path, X=np.random.default_rng(1).standard_normal((4 * BATCH, WIDTH)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def found(source, data):
    lines = []
    before = source.read_bytes()
    # Every layer counts as faster in sparse form: what is tested here must not depend on timing.
    result = sparse_onnx.analyze(
        source, **OPTIONS, min_speedup=1e-6, calibration_data=data, batch_size=BATCH, progress=lines.append
    )
    assert source.read_bytes() == before
    assert any("this takes about" in line for line in lines)
    return result


def test_layers_and_what_stays(found):
    layers = found.forecast.layers
    assert [layer.name for layer in layers] == ["W0", "W1", "W2"]
    assert layers[0].key == layers[1].key != layers[2].key  # the last has neither bias nor activation
    assert all(
        set(layer.curves) == {("sparse", pattern) for pattern in OPTIONS["mask_structures"]}
        for layer in layers
    )
    assert all(0 < layer.share < 1 for layer in layers)
    assert layers[0].products == BATCH * WIDTH * WIDTH
    assert found.declined == (("W3", "is also a graph input, so a caller may replace it"),)
    (other,) = found.untouched
    assert (other.op_type, other.reason) == ("MatMul", found.declined[0][1])
    assert 0 < other.share < 0.5


def test_anchors_and_predictions(found):
    assert [share for share, _ in found.anchors] == [None, 0.5, 0.7, 0.8, 0.9]
    for share in (0.5, 0.7, 0.9):
        outlook = found.predict(share)
        assert 0 < outlook.low <= outlook.speedup <= outlook.high
        assert (outlook.low < outlook.high) == bool(outlook.forms)  # else the model stays as it is
    assert found.speedup({}) == 1
    assert found.speedup({"W0": (0.9, "unstructured"), "W1": (0.5, "2:4")}) > 0


@pytest.mark.parametrize(
    ("share", "structure"), [(0.5, "unstructured"), (0.8, "unstructured"), (None, "2:4"), (0.9, "block:8x1")]
)
def test_the_size_is_that_of_the_optimized_model(found, source, tmp_path, share, structure, monkeypatch):
    result = sparse_onnx.optimize(
        source,
        tmp_path / "out",
        method="magnitude",
        sparsity=share,
        mask_structure=structure,
        input_shapes=OPTIONS["input_shapes"],
        threads=1,
        min_speedup=1e-6,
        timing_cache=False,
        benchmark=False,
        timing_table=table_of(found, tmp_path),
    )
    assert all(row["decision"] == "sparse" for row in result.report["layers"])
    forecast = found.forecast
    kept = sum(
        forecast.layer_bytes(name, choice) for name, choice in forecast.uniform(share, structure).items()
    )
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("model.onnx*"))
    assert kept + forecast.rest_bytes == pytest.approx(written, abs=1000)  # tensors are aligned in the file


def table_of(found, folder):
    """A table in which the sparse kernels are always much faster."""
    path = folder / "table.json"
    write_table(found.table(), path)
    document = json.loads(path.read_text())
    for kind in document["kinds"]:
        for curve in kind["curves"]["sparse"].values():
            for side in ("times", "low", "high"):
                curve[side] = [0.01] * len(curve[side])
    path.write_text(json.dumps(document))
    assert len(read_table(path).kinds) == 2
    return path


def test_the_error_is_near_that_of_the_method_auto(found, source, data, tmp_path):
    report = sparse_onnx.optimize(
        source,
        tmp_path / "out",
        method="auto",
        sparsity=0.5,
        calibration_data=data,
        batch_size=BATCH,
        input_shapes=OPTIONS["input_shapes"],
        threads=1,
        benchmark=False,
        keep_pruned=True,
    ).report
    # Random weights and inputs leave nothing to make up for: only the order of magnitude is that of a real model.
    measured = report["summary"]["relative_error"]
    half, most = (found.forecast.error(found.forecast.uniform(share)) for share in (0.5, 0.9))
    assert measured / 2 < half < 2 * measured
    assert half < most < 1


def test_only_layers_that_become_sparse_lose_anything(found):
    assert found.predict(0.9).error <= found.forecast.error(found.forecast.uniform(0.9))
    nothing = dataclasses.replace(found.forecast, min_speedup=1e6)
    outlook = nothing.outlook(nothing.uniform(0.9))
    assert (outlook.forms, outlook.error, outlook.speedup) == ({}, 0.0, 1.0)


def test_everything_is_json(found):
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    shares = {(row["mask_structure"], row["sparsity"]) for row in document["predictions"]}
    assert {("unstructured", 0.7), ("2:4", 0.5), ("block:8x1", 0.9)} <= shares
    assert len(document["curves"]) == 9
    assert all(point["speedup"] > 0 for row in document["curves"] for point in row["points"])
    assert document["profile"]["covered"] <= 1
    assert document["layers"][0]["loss"]["gain"] > 0


def test_the_answer_is_one_sentence(found):
    # A dense model so slow that no disturbed measurement gives layers up.
    slow = dataclasses.replace(found.forecast, dense_ms=1e9)
    text = dataclasses.replace(found, forecast=slow).sentence(0.7)
    assert text.startswith("at 70 % unstructured this model would run ")
    assert "x smaller; expected relative error " in text


def test_without_data_and_anchors(source):
    found = sparse_onnx.analyze(source, **OPTIONS, anchors=False, ignore=("W2",))
    assert [share for share, _ in found.anchors] == [None]
    assert found.forecast.times.error > 0.1
    assert found.predict(0.7).error is None
    assert found.sentence(0.7).endswith("give --calibration-data")
    assert [layer.reason for layer in found.forecast.layers] == ["", "", "listed in ignore"]
    assert set(found.forecast.uniform(0.7)) == {"W0", "W1"}


@pytest.mark.parametrize("quiet", [True, False])
def test_other_programs_make_it_rough(source, monkeypatch, quiet):
    monkeypatch.setattr("sparse_onnx.running.machine_load.OtherLoad.spared", lambda _self, _threads: quiet)
    lines = []
    found = sparse_onnx.analyze(source, **OPTIONS, progress=lines.append)
    assert found.quiet is quiet
    assert any("other programs took processors" in line for line in lines) is not quiet
    if not quiet:
        assert found.forecast.times.error >= 0.15


@pytest.mark.parametrize(
    ("quiet", "calls", "used", "whole_ms"),
    [
        ([True] * 3, 3, 3, 10 / 2.1),
        ([False, False, True, True, True], 5, 3, 10 / 4.0),
        ([True, False, True, False, False], 5, 5, 10 / 3.0),
    ],
)
def test_models_are_timed_in_several_sessions(source, monkeypatch, quiet, calls, used, whole_ms):
    """Speedups of 2, 2.1, 3, 4, 5 in the order of the sessions."""
    asked = []

    def time_models(_pair, _feeds, _bench, **_options):
        turn = len(asked) % calls
        asked.append(turn)
        speedup = (2.0, 2.1, 3.0, 4.0, 5.0)[turn]
        return [Ratio(10.0, 10 / speedup, speedup, speedup, speedup, quiet=quiet[turn])]

    monkeypatch.setattr("sparse_onnx.analysis.analyze.time_models", time_models)
    found = sparse_onnx.analyze(source, **OPTIONS, min_speedup=1e-6)
    shares = [share for share, _ in found.anchors]
    assert asked == list(range(calls)) * (len(shares) - 1), "without zeros nothing is changed, and not timed"
    speedups = np.array((2.0, 2.1, 3.0, 4.0, 5.0))[quiet if used < calls else slice(calls)]
    noise = np.log(speedups).std(ddof=1)
    assert found.anchors[0][1].whole_ms == 10
    for _, anchor in found.anchors[1:]:
        assert anchor.whole_ms == pytest.approx(whole_ms)
        assert anchor.spread == pytest.approx(2.2 * noise * np.sqrt(np.pi / 2 / used))
    assert found.forecast.times.error > 2 * noise
    assert found.forecast.dense_ms == 10


def test_a_model_too_large_for_one_session(source, monkeypatch):
    monkeypatch.setattr("sparse_onnx.analysis.analyze.session_budget", lambda _nbytes: 60_000)
    lines = []
    found = sparse_onnx.analyze(source, **OPTIONS, progress=lines.append)
    assert found.profile is None
    assert [share for share, _ in found.anchors] == [None]
    assert any("too large for one session" in line for line in lines)
    assert all(layer.share is None for layer in found.forecast.layers)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_model_without_layers(tmp_path):
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 20]> g (float[4] X) => (float[4] Y) { Y = Relu(X) }'
    )
    onnx.save(proto, tmp_path / "model.onnx")
    found = sparse_onnx.analyze(tmp_path / "model.onnx", threads=1)
    assert found.predict(0.9).speedup == 1
    assert found.sentence(0.9).startswith("at 90 % unstructured no layer of this model would be faster")
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_structures": ("3:2",)}, UsageError, "mask_structure"),
        ({"input_shapes": {"Z": (1, 2)}}, UsageError, "names 'Z'"),
        ({"calibration_data": "none.npz"}, UsageError, "no such file"),
        ({"sparsities": (1.5,)}, UsageError, "sparsities"),
        ({"threads": 0}, UsageError, "threads"),
        ({"bits": (5,)}, UsageError, "bits must be 8, 4, 3 or 2"),
        ({"bits": (8,), "group_size": 8}, UsageError, "group_size must be 16 to 256"),
        ({"min_speedup": 0.0}, UsageError, "min_speedup"),
        ({"targets": ("nothing",)}, UsageError, "matches no weight"),
    ],
)
def test_bad_options_say_what_is_wrong(source, options, error, message):
    with pytest.raises(error, match=message):
        sparse_onnx.analyze(source, **{**OPTIONS, **options})


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ModelFileError):
        sparse_onnx.analyze(tmp_path / "none.onnx")


@pytest.fixture(scope="module")
def plenty(source):
    """Many times as many rows as inputs: what is fitted to them holds for others."""
    path = source.parent / "plenty.npz"
    np.savez(path, X=np.random.default_rng(2).standard_normal((96 * BATCH, WIDTH)).astype(np.float32))
    return path


def real(data):
    return {"calibration_data": data, "num_calibration_samples": None, "batch_size": 16 * BATCH}


@pytest.fixture(scope="module")
def few_bits(source, plenty):
    options = {**OPTIONS, "bits": (8, 4, 3), "mask_structures": ("unstructured",)}
    return sparse_onnx.analyze(source, **options, min_speedup=1e-6, **real(plenty))


def test_layers_have_forms_bytes_and_losses_of_few_bits(few_bits):
    for layer in few_bits.forecast.layers:
        assert {name for name, _ in layer.curves} == {
            *("sparse", "int8-nbits", "int8-dynamic", "int8-token", "int8-quads", "int8-bitmap"),
            *("int4-nbits", "int4-bitmap"),
        }
        assert layer.encoded == {bits: usual_grid(bits).nbytes(layer.shape) for bits in (8, 4, 3)}
        errors = [layer.loss.error(Choice(bits=bits)) for bits in (8, 4, 3)]
        assert 0 < errors[0] < errors[1] < errors[2]
        assert layer.loss.error(Choice(bits=8, activations=8)) > errors[0]
        assert few_bits.forecast.precisions(layer.name) == ((32, 32), (8, 32), (8, 8), (4, 32), (3, 32))
    assert [bits for bits, _ in few_bits.encoded_anchors] == [8, 4], "no form is for 3 bits"
    assert set(few_bits.forecast.times.encoded) == {8, 4}
    assert [share for share, _ in few_bits.anchors] == [None, 0.5, 0.7, 0.8, 0.9]


def fast(found, folder, form):
    """A table in which that form is always much faster, and no other one."""
    path = folder / "table.json"
    write_table(found.table(), path)
    document = json.loads(path.read_text())
    for kind in document["kinds"]:
        for name, curves in kind["curves"].items():
            for curve in curves.values():
                for side in ("times", "low", "high"):
                    curve[side] = [0.01 if name == form else 5.0] * len(curve[side])
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("options", "form", "choice"),
    [
        ({"precision": "int8"}, "int8-dynamic", Choice(bits=8, activations=8)),
        ({"precision": "int8"}, "int8-nbits", Choice(bits=8)),
        ({"precision": "int4"}, "int4-nbits", Choice(bits=4)),
        ({"bits": 4}, "dense", Choice(bits=4)),
        ({"bits": 3}, "dense", Choice(bits=3)),
        (
            {"precision": "int8", "method": "magnitude", "sparsity": 0.5},
            "int8-dynamic",
            Choice(0.5, bits=8, activations=8),
        ),
    ],
)
def test_the_size_in_few_bits_is_that_of_the_optimized_model(
    few_bits, source, tmp_path, options, form, choice
):
    result = sparse_onnx.optimize(
        source,
        tmp_path / "out",
        input_shapes=OPTIONS["input_shapes"],
        threads=1,
        timing_cache=False,
        benchmark=False,
        timing_table=fast(few_bits, tmp_path, form),
        **options,
    )
    assert {row["decision"] for row in result.report["layers"]} == {form}
    layers = few_bits.forecast.layers
    kept = sum(layer.form_bytes(form, choice) for layer in layers)
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("model.onnx*"))
    # Tensors are aligned in the file, and the rest is that of a model with sparse operators, whose bodies are in it.
    assert kept + few_bits.forecast.rest_bytes == pytest.approx(written, abs=6000)


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_the_error_in_few_bits_is_near_that_of_the_method_auto(
    few_bits, source, plenty, tmp_path, precision, bits
):
    form = "int8-dynamic" if bits == 8 else "int4-nbits"
    report = sparse_onnx.optimize(
        source,
        tmp_path / "out",
        precision=precision,
        **real(plenty),
        input_shapes=OPTIONS["input_shapes"],
        threads=1,
        benchmark=False,
        timing_table=fast(few_bits, tmp_path, form),
    ).report
    measured = report["summary"]["relative_error"]
    forecast = few_bits.forecast
    assert measured / 1.5 < forecast.error(forecast.uniform(0.0, bits=bits)) < 1.5 * measured


def test_few_bits_are_told_in_words_and_in_json(few_bits):
    # A dense model so slow that no disturbed measurement gives layers up.
    slow = dataclasses.replace(few_bits, forecast=dataclasses.replace(few_bits.forecast, dense_ms=1e9))
    eight, four, three = slow.bits_sentences()
    number = r"[0-9.e+]+"
    assert re.fullmatch(
        rf"int8: {number}x faster \({number} to {number}\), {number}x smaller, expected error {number}; "
        rf"with 50 % zeros {number}x, {number}x, {number}",
        eight,
    )
    assert four.startswith("int4: ")
    assert three.startswith("int3: ")
    plain = dataclasses.replace(few_bits.forecast, min_speedup=1e6)  # nothing is as fast as that
    three = dataclasses.replace(few_bits, forecast=plain).bits_sentences()[2]
    assert three.startswith("int3: no layer faster, ")
    document = json.loads(json.dumps(few_bits.to_dict(), allow_nan=False))
    rows = {(row["bits"], row["sparsity"]): row for row in document["precisions"]}
    assert set(rows) == {(bits, share) for bits in (8, 4, 3) for share in (0.0, 0.5)}
    assert rows[4, 0.0]["smaller"] > rows[8, 0.0]["smaller"] > 1
    assert rows[8, 0.0]["relative_error"] < rows[4, 0.0]["relative_error"] < rows[3, 0.0]["relative_error"]
    assert set(document["layers"][0]["encoded_bytes"]) == {"8", "4", "3"}
    assert {row.get("bits") for row in document["anchors"]} == {None, 8, 4}
    assert {row["bits"] for row in document["precisions"]}.isdisjoint({32})
    assert all("bits" not in row for row in document["predictions"])


def test_what_is_not_finite_keeps_its_floats(tmp_path):
    proto = onnx.load(write_model(tmp_path / "plain"))
    proto.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.full((WIDTH, WIDTH), np.inf, np.float32), "W0")
    )
    onnx.save(proto, tmp_path / "model.onnx")
    found = sparse_onnx.analyze(tmp_path / "model.onnx", **{**OPTIONS, "bits": (8,)}, anchors=False)
    assert [set(layer.encoded) for layer in found.forecast.layers] == [set(), {8}, {8}]
    assert found.forecast.uniform(0.0, bits=8).keys() >= {"W1", "W2"}


def test_weights_that_can_have_no_bits_are_said(source):
    found = sparse_onnx.analyze(source, **{**OPTIONS, "bits": (4,)}, group_size=128, anchors=False)
    assert found.bits_sentences() == ["int4: no weight of this model can have 4 bits"]
    assert found.to_dict()["precisions"] == []
