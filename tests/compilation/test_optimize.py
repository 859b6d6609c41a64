"""The whole road on small models: decisions, files, reports, exit codes, and nothing left behind on an error."""

import json

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

import sparse_onnx
from sparse_onnx import sparse_ops
from sparse_onnx.compilation import load, write
from sparse_onnx.errors import HostError, ModelFileError, UsageError, VerificationError
from sparse_onnx.passes.patterns.layer import MIN_SPARSITY
from sparse_onnx.sparse_ops.formats.chunked_csc import PackedWeight
from sparse_onnx.timing import choose
from sparse_onnx.timing.rounds import Ratio

WIDTH = 512


def write_model(folder, *, sparsity, width=WIDTH, layers=2, name="model.onnx", opset=20):
    """A chain of MatMul + bias + GELU layers, ``sparsity`` of each weight zero."""
    rng = np.random.default_rng(0)
    steps, arrays = [], {}
    last = "X"
    for i in range(layers):
        weight = rng.standard_normal((width, width)).astype(np.float32) / np.sqrt(width).astype(np.float32)
        weight[rng.random(weight.shape) < sparsity] = 0
        arrays[f"W{i}"], arrays[f"b{i}"] = weight, rng.standard_normal(width).astype(np.float32)
        out = "Y" if i == layers - 1 else f"g{i}"
        steps.append(f"m{i} = MatMul({last}, W{i}) a{i} = Add(m{i}, b{i}) {out} = Gelu(a{i})")
        last = out
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : {opset}]>
        chain (float[batch, {width}] X) => (float[batch, {width}] Y) {{ {" ".join(steps)} }}"""
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    folder.mkdir(exist_ok=True)
    onnx.save(proto, folder / name)
    return folder / name


def outputs(path, x, *, library):
    if library:
        return sparse_onnx.InferenceSession(path).run(None, {"X": x})[0]
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"X": x})[0]


def told(whole):
    """A ``time_whole`` that tells the speedup in ``whole`` for as many sparse operators, with an interval of 2 %."""

    def time_whole(optimized, *_others):
        median = whole[sum(node.domain == "sparse_onnx" for node in optimized.graph)]
        return [Ratio(2.0, 2.0 / median, median, 0.99 * median, 1.01 * median)]

    return time_whole


X = np.random.default_rng(3).standard_normal((128, WIDTH)).astype(np.float32)
SHAPES = {"X": (128, WIDTH)}


def test_given_zeros_become_sparse_and_stay_equal(tmp_path):
    source = write_model(tmp_path / "in", sparsity=0.95)
    before = source.read_bytes()
    result = sparse_onnx.optimize(source, tmp_path / "out", input_shapes=SHAPES, threads=1)
    assert result.exit_code == 0
    assert {path.name for path in result.folder.iterdir()} == {
        "model.onnx", "model.onnx.data", "recipe.yaml", "report.json", "report.html",
    }  # fmt: skip
    assert source.read_bytes() == before
    assert [row["decision"] for row in result.report["layers"]] == ["sparse", "sparse"]
    expected = outputs(source, X, library=False)
    for library in (True, False):
        got = outputs(result.folder / "model.onnx", X, library=library)
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)
    summary = result.report["summary"]
    assert summary["bytes_after"] < 0.2 * summary["bytes_before"]
    assert summary["relative_error"] < 1e-5
    assert json.loads((result.folder / "report.json").read_text()) == result.report
    for side in result.report["profile"].values():
        assert 0 < side["layers_ms"] <= side["wall_ms"]


def test_dense_model_is_exit_5_and_written_as_it_was(tmp_path):
    source = write_model(tmp_path / "in", sparsity=0.0)
    result = sparse_onnx.optimize(source, tmp_path / "out", input_shapes=SHAPES, threads=1)
    assert result.exit_code == 5
    assert all("too few" in row["reason"] for row in result.report["layers"])
    np.testing.assert_array_equal(
        outputs(result.folder / "model.onnx", X, library=False), outputs(source, X, library=False)
    )
    written = onnx.load(result.folder / "model.onnx", load_external_data=False)
    original = onnx.load(source)
    nodes = [[(node.op_type, node.input, node.output) for node in m.graph.node] for m in (written, original)]
    assert nodes[0] == nodes[1]
    summary = result.report["summary"]
    assert summary["bytes_before"] == summary["bytes_after"] == source.stat().st_size


def test_pruning_reports_loss_apart_from_correctness(tmp_path):
    source = write_model(tmp_path / "in", sparsity=0.0)
    np.savez(tmp_path / "data.npz", X=X)
    result = sparse_onnx.optimize(
        source,
        tmp_path / "out",
        method="magnitude",
        sparsity=0.9,
        calibration_data=tmp_path / "data.npz",
        input_shapes=SHAPES,
        threads=1,
    )
    checks = result.report["verification"]
    assert checks["inputs"].endswith("data.npz")
    assert checks["against_pruned_dense"]["relative_error"] < 1e-5
    assert checks["without_library"]["relative_error"] < 1e-5
    assert checks["against_original"]["relative_error"] > 0.05
    for row in result.report["layers"]:
        assert row["sparsity"] == pytest.approx(0.9, abs=1e-5)
        assert 0.1 < row["relative_error"] < 1


def test_goal_missed_is_exit_4_and_still_written(tmp_path):
    source = write_model(tmp_path / "in", sparsity=0.0)
    result = sparse_onnx.optimize(
        source,
        tmp_path / "out",
        method="magnitude",
        sparsity=0.95,
        max_drop=1e-6,
        input_shapes=SHAPES,
        threads=1,
    )
    assert result.exit_code == 4
    assert not result.report["goal"]["met"]
    assert (tmp_path / "out/model.onnx").is_file()


def test_min_speedup_out_of_reach_keeps_everything_dense(tmp_path):
    source = write_model(tmp_path / "in", sparsity=0.9)
    result = sparse_onnx.optimize(source, tmp_path / "out", input_shapes=SHAPES, threads=1, min_speedup=1e6)
    assert result.exit_code == 5
    assert all("below min_speedup" in row["reason"] for row in result.report["layers"])


def twice_as_fast(*_models, **_options):
    return {("dense", "sparse"): Ratio(4.0, 2.0, 2.0, 1.9, 2.1)}


def test_whole_model_slower_gives_layers_up(tmp_path, monkeypatch):
    source = write_model(tmp_path / "in", sparsity=0.9, layers=4)
    whole = {4: 0.5, 2: 0.8, 1: 1.5}  # by layers that are sparse
    monkeypatch.setattr(write, "time_whole", told(whole))
    monkeypatch.setattr(choose, "time_forms", twice_as_fast)
    result = sparse_onnx.optimize(source, tmp_path / "out", input_shapes=SHAPES, threads=1)
    assert result.exit_code == 0
    decisions = [row["decision"] for row in result.report["layers"]]
    assert decisions.count("sparse") == 1  # 4, then 2, then 1
    assert result.speedup == 1.5
    assert sum("the whole model was slower" in row["reason"] for row in result.report["layers"]) == 3
    expected = outputs(source, X, library=False)
    np.testing.assert_allclose(
        outputs(tmp_path / "out/model.onnx", X, library=True), expected, rtol=1e-4, atol=1e-4
    )


def test_no_benchmark_decides_by_the_table_and_says_so(tmp_path):
    source = write_model(tmp_path / "in", sparsity=0.8)
    result = sparse_onnx.optimize(source, tmp_path / "out", benchmark=False, input_shapes=SHAPES)
    assert result.exit_code == 0
    assert result.speedup is None
    assert all(row["reason"].startswith("not timed") for row in result.report["layers"])


def test_dry_run_writes_nothing(tmp_path):
    source = write_model(tmp_path / "in", sparsity=0.0)
    result = sparse_onnx.optimize(source, tmp_path / "out", method="magnitude", sparsity=0.8, dry_run=True)
    assert result.folder is None
    assert [row["sparsity"] for row in result.report["layers"]] == [pytest.approx(0.8, abs=1e-5)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_large_model_runs_in_segments_with_the_same_result(tmp_path, monkeypatch):
    source = write_model(tmp_path / "in", sparsity=0.95, layers=5)
    monkeypatch.setattr(load, "session_budget", lambda nbytes: nbytes // 4)
    monkeypatch.setattr(choose, "time_forms", twice_as_fast)
    measured = []
    real = write.time_whole

    def time_whole(*arguments):
        measured.append(real(*arguments))
        return [Ratio(4.0, 2.0, 2.0, 1.9, 2.1)]

    monkeypatch.setattr(write, "time_whole", time_whole)
    result = sparse_onnx.optimize(source, tmp_path / "out", input_shapes=SHAPES, threads=1)
    assert result.exit_code == 0
    assert all(ratio.median > 0 for ratios in measured for ratio in ratios)
    assert result.report["verification"]["against_pruned_dense"]["relative_error"] < 1e-5
    expected = outputs(source, X, library=False)
    np.testing.assert_allclose(
        outputs(tmp_path / "out/model.onnx", X, library=True), expected, rtol=1e-4, atol=1e-4
    )


def test_wrong_kernel_is_caught_and_nothing_is_written(tmp_path, monkeypatch):
    from sparse_onnx.sparse_ops.formats.chunked_csc import ChunkedCsc

    source = write_model(tmp_path / "in", sparsity=0.9)
    real = ChunkedCsc.pack

    def damaged(*arguments, **options):
        packed = real(*arguments, **options)
        packed.values[0] += 1
        return packed

    monkeypatch.setattr(ChunkedCsc, "pack", damaged)
    with pytest.raises(VerificationError, match="differs from the pruned dense"):
        sparse_onnx.optimize(source, tmp_path / "out", input_shapes=SHAPES, threads=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_stored_weight_that_the_kernel_refuses_is_our_mistake(tmp_path, monkeypatch):
    source = write_model(tmp_path / "in", sparsity=0.95)
    arrays = PackedWeight.arrays

    def damaged(self):
        return {name: array[:-1] if name == "values" else array for name, array in arrays(self).items()}

    monkeypatch.setattr(PackedWeight, "arrays", damaged)
    with pytest.raises(VerificationError, match="though the original does"):
        sparse_onnx.optimize(source, tmp_path / "out", input_shapes=SHAPES, threads=1, benchmark=False)
    assert not (tmp_path / "out").exists()


def test_nan_and_infinity_are_kept_and_reported(tmp_path):
    source = write_model(tmp_path / "in", sparsity=0.9, layers=1)
    proto = onnx.load(source)
    weight = onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight[3, 5], weight[7, 9] = np.nan, np.inf
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "W0"))
    onnx.save(proto, source)
    result = sparse_onnx.optimize(source, tmp_path / "out", input_shapes=SHAPES, benchmark=False)
    assert result.report["layers"][0]["decision"] == "sparse"
    assert result.report["layers"][0]["non_finite"] == 2
    got, expected = (outputs(path, X, library=True) for path in (tmp_path / "out/model.onnx", source))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    assert np.isnan(got[:, 5]).all()


def test_same_input_gives_same_bytes(tmp_path):
    source = write_model(tmp_path / "in", sparsity=0.0)
    options = {"method": "magnitude", "sparsity": 0.8, "benchmark": False, "input_shapes": SHAPES}
    first = sparse_onnx.optimize(source, tmp_path / "a", **options)
    second = sparse_onnx.optimize(source, tmp_path / "b", **options)
    for name in ("model.onnx", "model.onnx.data", "recipe.yaml"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0, "method": "magnitude"}, UsageError, "sparsity"),
        ({"sparsity": -0.1, "method": "magnitude"}, UsageError, "sparsity"),
        ({"mask_structure": "3:2", "method": "magnitude", "sparsity": 0.5}, UsageError, "3:2"),
        ({"method": "magnitud", "sparsity": 0.5}, UsageError, "magnitude"),
        ({"input_shapes": {"Z": (1, 2)}}, UsageError, "Z"),
        ({"input_shapes": {"X": (1, 2)}}, UsageError, "X"),
        ({"calibration_data": "nosuch.npz"}, UsageError, "nosuch.npz"),
        ({"targets": ["nosuch"], "method": "magnitude", "sparsity": 0.5}, UsageError, "nosuch"),
    ],
)
def test_bad_options_write_nothing(tmp_path, options, error, message):
    source = write_model(tmp_path / "in", sparsity=0.0, width=32)
    with pytest.raises(error, match=message):
        sparse_onnx.optimize(source, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_missing_model_and_existing_output(tmp_path):
    with pytest.raises(ModelFileError, match=r"nosuch\.onnx"):
        sparse_onnx.optimize(tmp_path / "nosuch.onnx", tmp_path / "out")
    source = write_model(tmp_path / "in", sparsity=0.0, width=32)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("keep me")
    with pytest.raises(UsageError, match="overwrite"):
        sparse_onnx.optimize(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_missing_library_is_an_environment_error(tmp_path, monkeypatch):
    from sparse_onnx import sparse_ops
    from sparse_onnx.running import runtime

    source = write_model(tmp_path / "in", sparsity=0.9)

    def gone(_options):
        raise HostError("the kernel library is missing: reinstall sparse-onnx")

    monkeypatch.setattr(sparse_ops, "register", gone)
    with pytest.raises(HostError, match="library"):
        sparse_onnx.optimize(source, tmp_path / "out", input_shapes=SHAPES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert runtime.__doc__


def test_decisions_carry_the_measurement(tmp_path):
    source = write_model(tmp_path / "in", sparsity=0.95)
    result = sparse_onnx.optimize(source, tmp_path / "out", input_shapes=SHAPES, threads=1)
    row = result.report["layers"][0]
    assert row["times"]["dense"] > row["times"]["sparse"] > 0
    assert row["speedup_low"] <= row["times"]["dense"] / row["times"]["sparse"] * 1.5
    assert row["sparsity"] > MIN_SPARSITY
    assert row["kernel"] in sparse_ops.info().kernels
    assert row["rows"] == 128
    assert result.report["summary"]["bytes_before"] == source.stat().st_size
    written = sum((result.folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert result.report["summary"]["bytes_after"] == written
