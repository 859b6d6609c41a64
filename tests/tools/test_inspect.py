"""``sparse-onnx inspect``: the document, and the text made from it."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest

from sparse_onnx.analysis import inspection
from sparse_onnx.model import model_io
from sparse_onnx.passes.quantize.weight import QuantizeWeights


def rows_by_name(document):
    return {row["name"]: row for row in document["weights"]}


def save(folder, text, **arrays):
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def test_dense_model(run_cli, dense):
    ran = run_cli("inspect", dense, "--format", "json")
    assert ran.code == 0
    document = ran.json()
    assert document["file"] == str(dense)
    assert document["file_bytes"] == dense.stat().st_size
    assert document["weight_bytes"] == 4 * (64 * 96 + 96 + 96 * 48 + 48)
    assert document["large"] is False
    assert document["ir_version"] == 9
    assert document["opsets"] == {"ai.onnx": 20}
    assert document["inputs"] == ["X: FLOAT[batch, sequence, 64]"]
    assert document["outputs"] == ["Y: FLOAT[batch, sequence, 48]"]
    assert document["operators"] == {"ai.onnx::Add": 2, "ai.onnx::MatMul": 2, "ai.onnx::Gelu": 1}
    assert document["custom_operators"] == []
    rows = rows_by_name(document)
    assert list(rows) == ["W0", "W1"]
    assert rows["W0"]["module"] == "layers.0"
    assert rows["W0"]["shape"] == [64, 96]
    assert rows["W0"]["dtype"] == "FLOAT"
    assert rows["W0"]["bytes"] == 4 * 64 * 96
    assert rows["W0"]["zeros"] == 0
    assert rows["W0"]["state"] == "can be sparse"
    assert document["total"]["weights"] == 64 * 96 + 96 * 48
    assert document["total"]["can_be_sparse"] == 2
    assert document["declined"] == []


def test_what_is_not_looked_at_is_said(run_cli, tmp_path):
    """Integers of no layer are no rows, as their zeros mean nothing; operators without a sparse kernel are listed."""
    path = save(
        tmp_path,
        """<ir_version: 8, opset_import: ["" : 17]> g (uint8[4, 32] x) => (float[4, 48] y, int8[32, 64] n) {
        i = MatMulInteger(x, q) n = Neg(q) f = Cast<to = 1>(i) y = MatMul(f, w) }""",
        q=np.ones((32, 64), np.int8),
        w=np.zeros((64, 48), np.float32),
    )
    document = run_cli("inspect", path, "--format", "json").json()
    assert list(rows_by_name(document)) == ["w"]
    assert document["not_counted"] == [
        {"name": "q", "op_type": "MatMulInteger, Neg", "shape": [32, 64], "dtype": "INT8", "bytes": 2048}
    ]
    reason = "no sparse kernel takes the weights of MatMulInteger (INT8): also used by Neg"
    assert document["declined"] == [{"place": "q", "reason": reason}]
    share = 32 * 64 / (32 * 64 + 64 * 48)
    assert document["untouched"] == [
        {"op_type": "MatMulInteger", "count": 1, "share": share, "reason": reason}
    ]
    text = run_cli("inspect", path).out
    assert "no sparse kernel for (share of work): MatMulInteger 40%" in text
    assert "1 tensors (INT8) of 2.0 kB" in text


def test_how_weights_are_encoded_is_said(run_cli, tmp_path):
    """Where layers have weights that are no floats, with their share of the work."""
    path = save(
        tmp_path,
        """<ir_version: 8, opset_import: ["" : 17]> g (float[4, 32] x) => (float[4, 16] y) {
        d = DequantizeLinear<axis = 1>(q, s) a = MatMul(x, d)
        i = Cast<to = 6>(p) e = Gather(book, i) b = MatMul(a, e) y = MatMul(b, w) }""",
        q=np.tile(np.array([0, 1], np.int8), (32, 32)),
        s=np.ones(64, np.float32),
        p=np.ones((64, 48), np.uint8),
        book=np.arange(16, dtype=np.float32),
        w=np.zeros((48, 16), np.float32),
    )
    document = run_cli("inspect", path, "--format", "json").json()
    assert not document["not_counted"]
    rows = rows_by_name(document)
    assert {
        name: (row["shape"], row["bits"], row["bytes"], row["zeros"], row["state"])
        for name, row in rows.items()
        if name != "w"
    } == {"q": ([32, 64], 8, 2048, 1024, "quantized"), "p": ([64, 48], 4, 3072, 0, "quantized")}
    assert document["total"]["sparsity"] == (1024 + 48 * 16) / (32 * 64 + 64 * 48 + 48 * 16)
    reasons = {
        "q": "is quantized: INT8 with a scale for each index of axis 1",
        "p": "is quantized: indices into a codebook of 16 values",
    }
    assert {name: rows[name]["reason"] for name in reasons} == reasons
    assert document["untouched"] == [], "with enough zeros all of them can be sparse"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("storage", ["unpack", "dequantize"])
def test_scales_and_zero_points_belong_to_their_integers(run_cli, tmp_path, storage, symmetric):
    """A matrix of scales is no weight of its own; one that a layer reads is."""
    rng = np.random.default_rng(0)
    path = save(
        tmp_path,
        """<ir_version: 10, opset_import: ["" : 21]> g (float[4, 64] x) => (float[4, 32] y) {
        a = MatMul(x, w) y = Mul(a, factors) }""",
        w=rng.standard_normal((64, 32)).astype(np.float32),
        factors=rng.standard_normal((4, 32)).astype(np.float32),
    )
    model = model_io.load_model(path)
    QuantizeWeights(method="rtn", group_size=16, symmetric=symmetric, storage=storage)(model)
    path = model_io.save_model(model, tmp_path / "out")
    document = run_cli("inspect", path, "--format", "json").json()
    assert {row["name"]: (row["shape"], row["state"]) for row in document["weights"]} == {
        "w": ([64, 32], "quantized"),
        "factors": ([4, 32], "stays"),
    }
    assert not document["not_counted"]
    assert document["total"]["weights"] == 64 * 32 + 4 * 32


def test_scales_of_matmul_nbits_belong_to_their_integers(run_cli, tmp_path):
    path = save(
        tmp_path,
        """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[4, 64] x) => (float[4, 32] y) {
        y = com.microsoft.MatMulNBits<K = 64, N = 32, bits = 4, block_size = 32>(x, q, s, z) }""",
        q=np.full((32, 2, 16), 0x88, np.uint8),
        s=np.ones((32, 2), np.float32),
        z=np.full((32, 1), 0x88, np.uint8),
    )
    document = run_cli("inspect", path, "--format", "json").json()
    assert [row["name"] for row in document["weights"]] == ["q"]
    assert not document["not_counted"]


def test_no_shares_where_shapes_are_not_known(run_cli, tmp_path):
    path = save(
        tmp_path,
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 32] x, float[4, 32] z) => (float[n, 64] y, float[4, 4] s) {
        y = MatMul(x, w) t = Transpose(z) s = MatMul(z, t) }""",
        w=np.ones((32, 64), np.float32),
    )
    (row,) = run_cli("inspect", path, "--format", "json").json()["untouched"]
    assert (row["op_type"], row["share"]) == ("MatMul", None)


def test_weights_in_constant_nodes_are_found(run_cli, tmp_path):
    weight = onnx.numpy_helper.from_array(np.eye(32, dtype=np.float32))
    node = onnx.helper.make_node("Constant", [], ["w"], value=weight)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 32] x) => (float[n, 32] y) { y = MatMul(x, w) }'
    )
    proto.graph.node.insert(0, node)
    onnx.save(proto, tmp_path / "model.onnx")
    document = run_cli("inspect", tmp_path / "model.onnx", "--format", "json").json()
    assert document["operators"] == {"ai.onnx::Constant": 1, "ai.onnx::MatMul": 1}
    assert document["weight_bytes"] == 4096
    assert document["file_bytes"] == (tmp_path / "model.onnx").stat().st_size
    (row,) = document["weights"]
    assert (row["name"], row["zeros"], row["state"]) == ("w", 32 * 31, "can be sparse")


def test_zeros_are_counted_exactly(run_cli, pruned):
    document = run_cli("inspect", pruned, "--format", "json").json()
    proto = onnx.load(pruned)
    expected = {t.name: int((onnx.numpy_helper.to_array(t) == 0).sum()) for t in proto.graph.initializer}
    assert {row["name"]: row["zeros"] for row in document["weights"]} == {
        "W0": expected["W0"],
        "W1": expected["W1"],
    }
    assert document["total"]["sparsity"] == pytest.approx(0.9, abs=1e-3)


def test_compiled_model(run_cli, pruned, compiled):
    document = run_cli("inspect", compiled, "--format", "json").json()
    assert set(document["files"]) == {str(compiled / name) for name in ("model.onnx", "model.onnx.data")}
    custom = {row["op_type"]: row for row in document["custom_operators"]}
    assert custom.keys() == {"SparseMatMul", "SparseMatMulGelu"}
    for row in custom.values():
        assert row["domain"] == "sparse_onnx"
        assert row["count"] == 1
        assert row["known"]
        assert row["body"]
        assert row["run_by"] == "the kernel library"
    before = rows_by_name(run_cli("inspect", pruned, "--format", "json").json())
    after = rows_by_name(document)
    assert after.keys() == before.keys()
    for name, row in after.items():
        assert row["state"] == "sparse"
        assert row["zeros"] == before[name]["zeros"]
        assert row["shape"] == before[name]["shape"]
        assert row["bytes"] < before[name]["bytes"]
    assert after["W0"]["op_type"] == "SparseMatMulGelu"
    assert after["W0"]["mask_structure"] == "unstructured"
    assert document["total"]["sparse"] == 2
    assert document["declined"] == [], "the bodies of our own operators are no layers"


def test_empty_segments_are_not_taken_for_weights(run_cli, tmp_path, save_chain):
    """At 99.9 % zeros most stored values are the explicit zeros of empty segments."""
    from sparse_onnx.model import model_io
    from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul

    source = save_chain("sparser", sparsity=0.999)
    model = model_io.load_model(source)
    LowerSparseMatMul(min_sparsity=0.5)(model)
    model_io.save_model(model, tmp_path / "sparser")
    dense, sparse = (
        run_cli("inspect", path, "--format", "json").json() for path in (source, tmp_path / "sparser")
    )
    assert sparse["total"]["zeros"] == dense["total"]["zeros"] > 0.99 * dense["total"]["weights"]


def test_nan_and_inf_are_counted_and_warned_of(run_cli, save_chain):
    path = save_chain("broken", nan=True)
    total = run_cli("inspect", path, "--format", "json").json()["total"]
    assert (total["nan"], total["inf"]) == (1, 1)
    assert "Warning: 1 NaN and 1 Inf values, in W1" in run_cli("inspect", path).out


def test_what_stays_and_why(run_cli, tmp_path):
    path = save(
        tmp_path,
        """<ir_version: 9, opset_import: ["" : 20, "other" : 1, "com.microsoft" : 1]>
        g (int64[n] ids, float[8, 8] given) => (float[n, 8] Y, float[n, 8] Z)
        {
            e = Gather(table, ids)
            a = MatMul(e, half)
            h = Cast<to = 10>(e)
            b = MatMul(e, given)
            Y = MatMul(b, plain)
            m = Mul(plain2, mask)
            c = MatMul(e, m)
            d = com.microsoft.Gelu(c)
            Z = other.Thing(d, a)
        }""",
        table=np.ones((5, 8), np.float32),
        half=np.ones((8, 8), np.float64),
        plain=np.eye(8, dtype=np.float32),
        plain2=np.full((8, 8), 2, np.float32),
        mask=np.eye(8, dtype=np.float32),
    )
    document = run_cli("inspect", path, "--format", "json").json()
    rows = rows_by_name(document)
    assert rows["table"]["state"] == "stays"
    assert rows["table"]["reason"] == "used by Gather"
    assert rows["half"]["state"] == "stays"
    assert "dtype DOUBLE" in rows["half"]["reason"]
    assert rows["plain"]["state"] == "can be sparse"
    assert rows["plain"]["zeros"] == 56
    assert rows["plain2"]["state"] == "can be sparse", "the mask is folded into it, as optimize does"
    custom = {row["op_type"]: row["run_by"] for row in document["custom_operators"]}
    assert custom["Gelu"] == "ONNX Runtime"
    assert custom["Thing"].startswith("unknown")
    text = run_cli("inspect", path).out
    assert "1 left as they are: used by Gather" in text
    assert "1 other::Thing, run by unknown" in text


def test_function_body_counts_as_known(run_cli, tmp_path):
    path = save(
        tmp_path,
        """<ir_version: 9, opset_import: ["" : 20, "mine" : 1]>
        g (float[n] X) => (float[n] Y) { Y = mine.Twice(X) }
        <opset_import: ["" : 20], domain: "mine"> Twice (x) => (y) { y = Add(x, x) }""",
    )
    document = run_cli("inspect", path, "--format", "json").json()
    assert document["functions"] == ["mine::Twice"]
    (row,) = document["custom_operators"]
    assert row["run_by"] == "its function body"
    assert not row["known"]


def test_subgraphs_are_seen(run_cli, tmp_path):
    path = save(
        tmp_path,
        """<ir_version: 9, opset_import: ["" : 20]>
        g (bool c, float[n, 4] X) => (float[n, 4] Y)
        {
            Y = If (c) <
                then_branch = t () => (float[n, 4] A) { A = MatMul(X, W) },
                else_branch = f () => (float[n, 4] B) { B = Neg(X) }
            >
        }""",
        W=np.eye(4, dtype=np.float32),
    )
    document = run_cli("inspect", path, "--format", "json").json()
    assert document["operators"] == {"ai.onnx::If": 1, "ai.onnx::MatMul": 1, "ai.onnx::Neg": 1}
    (row,) = document["weights"]
    assert row["state"] == "stays"
    assert "If, Loop or Scan" in row["reason"]


def test_model_without_weights(run_cli, tmp_path):
    path = save(
        tmp_path, '<ir_version: 9, opset_import: ["" : 20]> g (float[n] X) => (float[n] Y) { Y = Relu(X) }'
    )
    ran = run_cli("inspect", path)
    assert ran.code == 0
    assert "0 weights in 0 tensors, 0.0% zeros; 0 can be sparse, 0 are" in ran.out
    document = run_cli("inspect", path, "--format", "json").json()
    assert document["weights"] == []
    assert document["total"]["sparsity"] == 0


def test_equal_weights_that_the_clean_up_merges(run_cli, tmp_path):
    weight = np.arange(256, dtype=np.float32).reshape(16, 16)
    path = save(
        tmp_path,
        """<ir_version: 9, opset_import: ["" : 20]> g (float[n, 16] X) => (float[n, 16] Y)
        { a = MatMul(X, A) Y = MatMul(a, B) }""",
        A=weight,
        B=weight,
    )
    states = {
        row["name"]: row["state"] for row in run_cli("inspect", path, "--format", "json").json()["weights"]
    }
    assert sorted(states.values()) == ["can be sparse", "folded"]


def many(folder, count):
    steps, arrays, last = [], {}, "X"
    for index in range(count):
        out = "Y" if index == count - 1 else f"h{index}"
        steps.append(f"{out} = MatMul({last}, W{index})")
        arrays[f"W{index}"] = np.full((4, 4), index, np.float32)
        last = out
    text = '<ir_version: 9, opset_import: ["" : 20]> g (float[n, 4] X) => (float[n, 4] Y)'
    return save(folder, f"{text} {{ {' '.join(steps)} }}", **arrays)


def test_text_is_bounded_unless_all_is_asked_for(run_cli, tmp_path):
    path = many(tmp_path, 60)
    short, long = run_cli("inspect", path).out, run_cli("inspect", path, "--all").out
    assert sum(line.startswith("W") for line in short.splitlines()) == 10
    assert "50 more weights are not shown; --all shows them" in short
    assert sum(line.startswith("W") for line in long.splitlines()) == 60
    assert "not shown" not in long


def test_operator_list_is_bounded_unless_all_is_asked_for(run_cli, tmp_path):
    kinds = [
        "Abs",
        "Ceil",
        "Cos",
        "Erf",
        "Exp",
        "Floor",
        "Neg",
        "Relu",
        "Round",
        "Sigmoid",
        "Sign",
        "Sin",
        "Tanh",
    ]
    steps = [f"v{i + 1} = {kind}(v{i})" for i, kind in enumerate(kinds)]
    text = '<ir_version: 9, opset_import: ["" : 20]> g (float[n] v0) => (float[n] v13)'
    path = save(tmp_path, f"{text} {{ {' '.join(steps)} }}")
    assert "and 1 other kinds" in run_cli("inspect", path).out
    assert "1 Tanh" in run_cli("inspect", path, "--all").out


def test_large_models_are_said_to_be_large(run_cli, dense, monkeypatch):
    monkeypatch.setattr(inspection, "LARGE", 1000)
    assert run_cli("inspect", dense, "--format", "json").json()["large"] is True
    assert "more than 2 GB" in run_cli("inspect", dense).out


def test_weights_larger_than_a_piece_are_counted_whole(run_cli, pruned, monkeypatch):
    whole = run_cli("inspect", pruned, "--format", "json").out
    monkeypatch.setattr(inspection, "_PIECE", 7)
    assert run_cli("inspect", pruned, "--format", "json").out == whole


def test_file_is_not_changed(run_cli, compiled):
    before = {path.name: path.read_bytes() for path in compiled.iterdir()}
    run_cli("inspect", compiled)
    assert {path.name: path.read_bytes() for path in compiled.iterdir()} == before


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types(run_cli, tmp_path, dtype):
    name = "float16" if dtype == np.float16 else "double"
    path = save(
        tmp_path,
        f'<ir_version: 9, opset_import: ["" : 20]> g ({name}[n, 4] X) => ({name}[n, 4] Y) {{ Y = MatMul(X, W) }}',
        W=np.diag([1, 2, 3, np.nan]).astype(dtype),
    )
    (row,) = run_cli("inspect", path, "--format", "json").json()["weights"]
    assert (row["zeros"], row["nan"]) == (12, 1)
    assert row["state"] == "stays"


def test_missing_and_damaged_files_are_exit_2(run_cli, tmp_path):
    (tmp_path / "junk.onnx").write_bytes(b"not a model")
    for path in (tmp_path / "nosuch.onnx", tmp_path / "junk.onnx", tmp_path):
        ran = run_cli("inspect", path, "--format", "json")
        assert ran.code == 2
        assert json.loads(ran.out)["exit_code"] == 2
        assert str(path) in ran.err


def test_bfloat16_values_are_counted():
    import ml_dtypes
    import onnx_ir as ir

    values = np.array([0.0, -0.0, 1.0, np.nan, np.inf], ml_dtypes.bfloat16)
    assert inspection.count_values(ir.tensor(values)) == (2, 1, 1)


def test_metrics_of_dense_and_compiled_models_agree(run_cli, pruned, compiled):
    before, after = (run_cli("inspect", path, "--format", "json").json() for path in (pruned, compiled))
    compared = rows_by_name(after)
    for name, row in rows_by_name(before).items():
        assert row["metrics"] == compared[name]["metrics"]
        assert row["metrics"]["sparsity"] == pytest.approx(row["sparsity"])
        assert row["metrics"]["sparse_bytes"] == compared[name]["bytes"], (
            "what was promised is what is stored"
        )
        assert row["metrics"]["dense_bytes"] == row["bytes"]
        assert row["metrics"]["bits_per_weight"] == pytest.approx(8 * compared[name]["bytes"] / row["size"])
        assert 0 < row["metrics"]["blocks"]["1x4"]["fill"] < 1
    total = before["total"]["metrics"]
    assert total == after["total"]["metrics"]
    assert total["sparsity"] == pytest.approx(before["total"]["sparsity"])
    assert total["sparse_bytes"] == after["total"]["metrics"]["sparse_bytes"]


def test_metrics_of_known_weights(run_cli, tmp_path):
    """The inputs of a Gemm with transB and the taps of a convolution are the rows of W [K, N]."""
    columns = np.zeros((8, 8), np.float32)
    columns[2] = 1  # one output channel keeps all of its inputs
    path = save(
        tmp_path,
        """<ir_version: 9, opset_import: ["" : 20]>
        g (float[n, 8] X, float[n, 2, 5, 5] I) => (float[n, 8] Y, float[n, 8, a, b] Z)
        { Y = Gemm<transB = 1>(X, W) Z = Conv(I, F) }""",
        W=columns,
        F=np.ones((8, 2, 3, 3), np.float32),
    )
    rows = rows_by_name(run_cli("inspect", path, "--format", "json").json())
    metrics = rows["W"]["metrics"]
    assert metrics["sparsity"] == 7 / 8
    assert metrics["row_variation"] == pytest.approx(np.sqrt(7))
    assert metrics["clustering_index"] == pytest.approx(14 / 8)
    assert metrics["blocks"]["1x4"] == {"occupancy": 1 / 8, "fill": 1}
    assert metrics["blocks"]["4x1"] == {"occupancy": 1 / 2, "fill": 1 / 4}
    assert rows["F"]["metrics"]["sparsity"] == 0
    assert rows["F"]["metrics"]["blocks"]["4x4"] == {"occupancy": 1, "fill": 1}


def test_masks_are_folded_before_zeros_are_measured(run_cli, tmp_path):
    path = save(
        tmp_path,
        """<ir_version: 9, opset_import: ["" : 20]> g (float[n, 8] X) => (float[n, 8] Y)
        { m = Mul(W, mask) Y = MatMul(X, m) }""",
        W=np.ones((8, 8), np.float32),
        mask=np.eye(8, dtype=np.float32),
    )
    row = rows_by_name(run_cli("inspect", path, "--format", "json").json())["W"]
    assert row["sparsity"] == 0
    assert row["metrics"]["sparsity"] == 7 / 8


def test_what_cannot_be_sparse_has_no_metrics(run_cli, tmp_path):
    path = save(
        tmp_path,
        """<ir_version: 9, opset_import: ["" : 20]> g (int64[n] ids) => (float[n, 4] Y) { Y = Gather(table, ids) }""",
        table=np.ones((5, 4), np.float32),
    )
    document = run_cli("inspect", path, "--format", "json").json()
    assert [row["metrics"] for row in document["weights"]] == [None]
    assert document["total"]["metrics"] is None
    assert "bits/weight" not in run_cli("inspect", path, "--metrics").out


def test_metrics_are_text_if_they_are_asked_for(run_cli, pruned):
    short, long = run_cli("inspect", pruned).out, run_cli("inspect", pruned, "--metrics").out
    assert "bits/weight" not in short
    assert "bits/weight" in long
    header = next(line for line in long.splitlines() if line.startswith("zeros of"))
    for size in ("1x4", "4x1", "8x1", "4x4"):
        assert f"{size} in use" in header
    assert [line for line in long.splitlines() if line.startswith("all of them")]


def test_damaged_stored_weight_is_named(run_cli, compiled):
    model = onnx.load(compiled / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "W0.offsets":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[0] = 255
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, compiled / "model.onnx")
    rows = rows_by_name(run_cli("inspect", compiled, "--format", "json").json())
    assert rows["W0"]["metrics"] is None
    assert "is damaged: an offset reaches past its chunk" in rows["W0"]["reason"]
    assert rows["W1"]["metrics"]["sparsity"] > 0.8


def test_zeros_are_summed_up_by_layer():
    names = [("encoder.layer.1.attention.q", 4, 1), ("encoder.layer.1.mlp", 12, 3), ("head", 4, 4)]
    rows = [{"module": module, "name": "w", "size": size, "zeros": zeros} for module, size, zeros in names]
    assert inspection._layers(rows) == [
        {"name": "encoder.layer.1", "tensors": 2, "weights": 16, "zeros": 4, "sparsity": 0.25},
        {"name": "head", "tensors": 1, "weights": 4, "zeros": 4, "sparsity": 1},
    ]
