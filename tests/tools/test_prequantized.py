"""Models that were pruned and quantized in training, as SparseML exported them: all commands on each layout.

The files are made here by the rules of the operators: a BERT of two layers and a ResNet of two blocks, 80 % of whose
weights are zero, each in the layouts that were exported. These zeros must be seen, kept, and never lead anybody astray;
linears of integers leave them out where that is faster.
"""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.model import model_io
from sparse_onnx.model.nbits import pack_bits
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.lower.q_matmul import LowerQMatMul, LowerSparseQMatMul
from sparse_onnx.running.runtime import open_session

HIDDEN, HEADS, INNER, VOCABULARY, LENGTH = 64, 4, 128, 50, 8
ZEROS = 0.8
X_SCALE, X_ZERO = np.float32(0.08), np.uint8(128)


@dataclasses.dataclass
class Layout:
    """How weights lie: ``form`` of a layer, type of the integers, and whether each output has a scale."""

    form: str
    dtype: type = np.int8
    each: bool = False


class Writer:
    """Nodes and initializers of a graph that is written from front to back."""

    def __init__(self, layout, seed=0):
        self.layout, self.rng = layout, np.random.default_rng(seed)
        self.nodes, self.tensors, self.expected = [], {}, {}

    def constant(self, array, name):
        name = name if name not in self.tensors else f"{name}.{len(self.tensors)}"
        self.tensors[name] = np.asarray(array)
        return name

    def node(self, op_type, *inputs, outputs=1, domain="", **attributes):
        made = [f"{op_type}_{len(self.nodes)}" + f"_{index}" * (index > 0) for index in range(outputs)]
        self.nodes.append(
            helper.make_node(op_type, inputs, made, f"node_{len(self.nodes)}", domain=domain, **attributes)
        )
        return made[0] if outputs == 1 else made

    def integers(self, name, shape, axis=0):
        """(integers of which 80 % are the zero point, scale, zero point); what they stand for is kept by name."""
        layout = self.layout
        outputs = shape[axis]
        zero = 0 if layout.dtype is np.int8 else 128 if layout.each else 117
        steps = np.clip(np.rint(self.rng.standard_normal(shape) * 30), -100, 100)
        steps[steps == 0] = 1
        steps[self.rng.random(shape) < ZEROS] = 0
        scale = self.rng.uniform(0.002, 0.006, outputs if layout.each else ()).astype(np.float32)
        spread = (
            scale.reshape([-1 if index == axis else 1 for index in range(len(shape))])
            if layout.each
            else scale
        )
        matrix = np.moveaxis(steps * spread, axis, 0).reshape(outputs, -1).T
        self.expected[name] = matrix.astype(np.float32)
        zeros = np.full(np.shape(scale), zero, layout.dtype)
        return (steps + zero).astype(layout.dtype), scale, zeros

    def quantize(self, x):
        """(integers of an activation, names of its scale and zero point)."""
        scale, zero = self.constant(X_SCALE, "x_scale"), self.constant(X_ZERO, "x_zero")
        return self.node("QuantizeLinear", x, scale, zero), scale, zero

    def fake(self, x):
        """An activation through QuantizeLinear and DequantizeLinear."""
        q, scale, zero = self.quantize(x)
        return self.node("DequantizeLinear", q, scale, zero)

    def linear(self, x, name, K, N):
        form = self.layout.form
        bias = (0.1 * self.rng.standard_normal(N)).astype(np.float32)
        if form == "nbits":
            return self.packed(x, name, K, N, bias)
        q, scale, zero = self.integers(name, (N, K))
        if form == "integer":
            xq, _, x_zero = self.quantize(x)
            step = (X_SCALE * scale).astype(np.float32)
            y = self.node(
                "MatMulInteger", xq, self.constant(q.T, name), x_zero, self.constant(zero, f"{name}.zero")
            )
            y = self.node("Add", y, self.constant(np.rint(bias / step).astype(np.int32), f"{name}.bias"))
            return self.node(
                "Mul", self.node("Cast", y, to=TensorProto.FLOAT), self.constant(step, f"{name}.scale")
            )
        axis = {"axis": 0} if self.layout.each else {}
        names = [self.constant(scale, f"{name}.scale"), self.constant(zero, f"{name}.zero")]
        if form == "by hand":
            turned = [self.constant(np.reshape(part, (-1, 1)) if self.layout.each else part, f"{name}.{kind}")
                      for part, kind in ((scale, "s"), (zero.astype(np.float32), "z"))]  # fmt: skip
            cast = self.node("Cast", self.constant(q, name), to=TensorProto.FLOAT)
            w = self.node("Mul", self.node("Sub", cast, turned[1]), turned[0])
        elif form == "folded":
            w = self.node("DequantizeLinear", self.constant(q, name), *names, **axis)
        else:  # floats that are rounded in every run
            floats = self.expected[name].T.reshape(q.shape)
            w = self.node("QuantizeLinear", self.constant(floats, name), *names, **axis)
            w = self.node("DequantizeLinear", w, *names, **axis)
        y = self.node("MatMul", self.fake(x), self.node("Transpose", w, perm=[1, 0]))
        return self.node("Add", y, self.constant(bias, f"{name}.bias"))

    def packed(self, x, name, K, N, bias):
        """4 bits in blocks of 32 inputs, zero in the middle or at points of their own."""
        blocks = K // 32
        zero = (
            self.rng.integers(5, 11, (N, blocks)).astype(np.uint8)
            if self.layout.each
            else np.full((N, blocks), 8)
        )
        q = self.rng.integers(0, 16, (N, blocks, 32))
        q = np.where((self.rng.random(q.shape) < ZEROS) | (q == zero[..., None]), zero[..., None], q).astype(
            np.uint8
        )
        scale = self.rng.uniform(0.02, 0.04, (N, blocks)).astype(np.float32)
        self.expected[name] = ((q.astype(np.float32) - zero[..., None]) * scale[..., None]).reshape(N, K).T
        inputs = [x, self.constant(pack_bits(q, 4), name), self.constant(scale.reshape(-1), f"{name}.scale")]
        if self.layout.each:
            inputs.append(self.constant(pack_bits(zero, 4).reshape(-1), f"{name}.zero"))
        y = self.node("MatMulNBits", *inputs, domain="com.microsoft", K=K, N=N, bits=4, block_size=32)
        return self.node("Add", y, self.constant(bias, f"{name}.bias"))

    def conv(self, x, name, C, M):
        q, scale, zero = self.integers(name, (M, C, 3, 3))
        bias = (0.1 * self.rng.standard_normal(M)).astype(np.float32)
        form = self.layout.form
        pads = {"pads": [1, 1, 1, 1]}
        if form == "folded":
            axis = {"axis": 0} if self.layout.each else {}
            names = [self.constant(scale, f"{name}.scale"), self.constant(zero, f"{name}.zero")]
            w = self.node("DequantizeLinear", self.constant(q, name), *names, **axis)
            return self.node("Conv", self.fake(x), w, self.constant(bias, f"{name}.bias"), **pads)
        xq, x_scale, x_zero = self.quantize(x)
        whole = np.rint(bias / (X_SCALE * scale)).astype(np.int32)
        if form == "integer":  # a zero point of one number: the runtime takes no other
            one = zero if zero.ndim == 0 else zero[0]
            y = self.node(
                "ConvInteger", xq, self.constant(q, name), x_zero, self.constant(one, f"{name}.zero"), **pads
            )
            y = self.node("Add", y, self.constant(whole.reshape(1, -1, 1, 1), f"{name}.bias"))
            step = (X_SCALE * scale).astype(np.float32)
            step = step.reshape(1, -1, 1, 1) if self.layout.each else step
            return self.node(
                "Mul", self.node("Cast", y, to=TensorProto.FLOAT), self.constant(step, f"{name}.scale")
            )
        own = [
            self.constant(q, name),
            self.constant(scale, f"{name}.scale"),
            self.constant(zero, f"{name}.zero"),
        ]
        y_scale, y_zero = self.constant(np.float32(0.02), "y_scale"), self.constant(np.uint8(128), "y_zero")
        bias = self.constant(whole, f"{name}.bias")
        y = self.node("QLinearConv", xq, x_scale, x_zero, *own, y_scale, y_zero, bias, **pads)
        return self.node("DequantizeLinear", y, y_scale, y_zero)

    def normalize(self, x):
        ones, none = np.ones(HIDDEN, np.float32), np.zeros(HIDDEN, np.float32)
        return self.node("LayerNormalization", x, self.constant(ones, "gamma"), self.constant(none, "beta"))

    def save(self, path, inputs, result, shape):
        self.nodes[-1].output[0] = "Y"
        assert result == self.nodes[-1].name.replace("node_", f"{self.nodes[-1].op_type}_")
        graph = helper.make_graph(
            self.nodes, "g", inputs, [helper.make_tensor_value_info("Y", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in self.tensors.items()],
        )  # fmt: skip
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=9)
        onnx.checker.check_model(model)
        onnx.save(model, path)


def write_bert(path, layout):
    """Two layers of attention and feed-forward; a quantized embedding before them. Returns its weights by name."""
    writer = Writer(layout)
    table, scale, zero = writer.integers("embedding", (VOCABULARY, HIDDEN), axis=1)
    del writer.expected["embedding"]
    scale, zero = np.float32(0.02), np.array(zero.reshape(-1)[0])
    x = writer.node("Gather", writer.constant(table, "embedding"), "ids")
    x = writer.node(
        "DequantizeLinear",
        x,
        writer.constant(scale, "embedding.scale"),
        writer.constant(zero, "embedding.zero"),
    )
    x = writer.normalize(x)
    split = writer.constant(np.array([0, 0, HEADS, HIDDEN // HEADS]), "split")
    join = writer.constant(np.array([0, 0, HIDDEN]), "join")
    root = writer.constant(np.float32(np.sqrt(HIDDEN // HEADS)), "root")
    for index in range(2):
        parts = [
            writer.linear(x, f"layer.{index}.{part}", HIDDEN, HIDDEN) for part in ("query", "key", "value")
        ]
        q, k, v = (
            writer.node("Transpose", writer.node("Reshape", part, split), perm=[0, 2, *order])
            for part, order in zip(parts, ((1, 3), (3, 1), (1, 3)), strict=True)
        )
        scores = writer.node("Softmax", writer.node("Div", writer.node("MatMul", q, k), root), axis=-1)
        context = writer.node("Transpose", writer.node("MatMul", scores, v), perm=[0, 2, 1, 3])
        out = writer.linear(writer.node("Reshape", context, join), f"layer.{index}.out", HIDDEN, HIDDEN)
        x = writer.normalize(writer.node("Add", out, x))
        inner = writer.node("Relu", writer.linear(x, f"layer.{index}.inner", HIDDEN, INNER))
        x = writer.normalize(
            writer.node("Add", writer.linear(inner, f"layer.{index}.outer", INNER, HIDDEN), x)
        )
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])
    writer.save(path, [ids], x, ["batch", "sequence", HIDDEN])
    return writer.expected


def write_resnet(path, layout):
    """A first convolution and two residual blocks. Returns its weights by name."""
    writer = Writer(layout)
    x = writer.node("Relu", writer.conv("X", "stem", 3, 16))
    for index in range(2):
        y = writer.node("Relu", writer.conv(x, f"block.{index}.first", 16, 16))
        x = writer.node("Relu", writer.node("Add", writer.conv(y, f"block.{index}.second", 16, 16), x))
    y = writer.node("GlobalAveragePool", x)
    images = helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", 3, 12, 12])
    writer.save(path, [images], y, ["batch", 16, 1, 1])
    return writer.expected


MODELS = {
    "bert, rounded in every run": (write_bert, Layout("rounded")),
    "bert, rounded, uint8": (write_bert, Layout("rounded", np.uint8)),
    "bert, integers dequantized": (write_bert, Layout("folded", np.int8, each=True)),
    "bert, MatMulInteger": (write_bert, Layout("integer", np.uint8)),
    "bert, MatMulInteger an output": (write_bert, Layout("integer", np.int8, each=True)),
    "bert, cast by hand": (write_bert, Layout("by hand", np.uint8, each=True)),
    "bert, MatMulNBits": (write_bert, Layout("nbits")),
    "bert, MatMulNBits with zero points": (write_bert, Layout("nbits", each=True)),
    "resnet, integers dequantized": (write_resnet, Layout("folded", np.int8, each=True)),
    "resnet, QLinearConv": (write_resnet, Layout("QLinearConv", np.int8, each=True)),
    "resnet, QLinearConv, uint8": (write_resnet, Layout("QLinearConv", np.uint8)),
    "resnet, ConvInteger": (write_resnet, Layout("integer", np.uint8)),
}


@pytest.fixture(params=MODELS)
def made(request, tmp_path):
    """(path, weights by name) of a model."""
    write, layout = MODELS[request.param]
    return tmp_path / "model.onnx", write(tmp_path / "model.onnx", layout)


def answers(path, seed=3):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    rng = np.random.default_rng(seed)
    if value.name == "ids":
        return session.run(None, {"ids": rng.integers(0, VOCABULARY, (2, LENGTH))})[0]
    return session.run(None, {"X": rng.standard_normal((2, 3, 12, 12)).astype(np.float32)})[0]


def test_every_weight_is_found(made):
    path, expected = made
    assert np.isfinite(answers(path)).all()
    weights, declined = find_weights(model_io.load_model(path), encoded=True)
    assert not declined
    assert {weight.name for weight in weights} == set(expected)
    for weight in weights:
        np.testing.assert_allclose(weight.matrix(), expected[weight.name], rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(weight.matrix() == 0, expected[weight.name] == 0)


def shape_options(path):
    return ("--input-shape", f"ids:2,{LENGTH}") if path_is_bert(path) else ()


def path_is_bert(path):
    return onnx.load(path).graph.input[0].name == "ids"


def zeros_of(expected):
    return {name: int(np.count_nonzero(matrix == 0)) for name, matrix in expected.items()}


def test_inspect_lists_bits_groups_and_zeros(made, run_cli):
    path, expected = made
    ran = run_cli("inspect", path, "--format", "json")
    assert ran.code == 0
    document = ran.json()
    rows = {row["name"]: row for row in document["weights"] if row["state"] == "quantized"}
    packed = any(row["op_type"] == "MatMulNBits" for row in rows.values())
    assert {name: row["zeros"] for name, row in rows.items()} == zeros_of(expected)
    assert {tuple(row["shape"]) for row in rows.values()} == {matrix.shape for matrix in expected.values()}
    assert {(row["bits"], row["group_size"]) for row in rows.values()} == {(4, 32) if packed else (8, 0)}
    assert document["total"]["quantized"] == len(expected)
    assert document["total"]["zeros"] >= sum(zeros_of(expected).values())
    assert not {row["name"] for row in document["not_counted"]} & expected.keys()
    share = sum(zeros_of(expected).values()) / sum(matrix.size for matrix in expected.values())
    kinds = f"{len(expected)} in {4 if packed else 8} bits"
    assert (
        f"{len(expected)} weights are quantized already ({kinds}), with {share:.1%} zeros"
        in run_cli("inspect", path).out
    )


def test_optimize_leaves_them_alone_and_says_so(made, run_cli, tmp_path):
    """Also where pruning is asked for: zeros that nothing computes with would cost accuracy only."""
    path, _ = made
    before = path.read_bytes()
    options = ("--threads", "1", "--no-benchmark", *shape_options(path))
    ran = run_cli(
        "optimize", path, "-o", tmp_path / "out", "--method", "magnitude", "--sparsity", "0.9", *options
    )
    assert ran.code == 5
    assert "weights are quantized already" in ran.out
    assert "layers of 8 bits whose input is rounded, too, have kernels that leave zeros out" in ran.out
    assert path.read_bytes() == before
    np.testing.assert_array_equal(answers(tmp_path / "out" / "model.onnx"), answers(path))
    report = run_cli("report", tmp_path / "out", "--format", "json")
    assert report.code == 0
    assert run_cli("verify", path, tmp_path / "out", *shape_options(path)).code == 0


@pytest.mark.parametrize("name", [name for name in MODELS if "bert" in name and "NBits" not in name])
@pytest.mark.parametrize("lowering", [LowerQMatMul, LowerSparseQMatMul])
def test_linears_of_every_layout_become_products_of_integers(name, lowering, tmp_path):
    write, layout = MODELS[name]
    path = tmp_path / "model.onnx"
    expected = write(path, layout)
    lowered = model_io.load_model(path)
    result = lowering()(lowered)
    assert result.statistics["weights"] == len(expected)
    assert not find_weights(lowered, encoded=True)[0]
    written = model_io.save_model(lowered, tmp_path, name="lowered")
    for library in (True, False):
        session = open_session(written, threads=1, library=library)
        ids = np.random.default_rng(3).integers(0, VOCABULARY, (2, LENGTH))
        # A number between two steps may be rounded to the other one.
        np.testing.assert_allclose(session.run(None, {"ids": ids})[0], answers(path), atol=0.03)


def test_optimize_of_a_pruned_encoder_needs_no_option(run_cli, tmp_path):
    """All forms are timed against the integer kernels of the runtime; the arithmetic is the graph's own."""
    write, layout = MODELS["bert, integers dequantized"]
    path, out = tmp_path / "model.onnx", tmp_path / "out"
    expected = write(path, layout)
    options = ("--threads", "1", *shape_options(path))
    ran = run_cli("optimize", path, "-o", out, "--min-speedup", "0.2", "--format", "json", *options)
    assert ran.code == 0, ran.err
    report = ran.json()
    rows = {row["name"]: row for row in report["layers"]}
    assert rows.keys() == expected.keys()
    assert {row["decision"] for row in rows.values()} <= {"int8-given", "int8-given-quads"}
    assert all({"dense", row["decision"]} <= row["times"].keys() for row in rows.values())
    assert report["summary"]["relative_error"] < 1e-2
    np.testing.assert_allclose(answers(out / "model.onnx"), answers(path), atol=0.03)  # without the library
    assert run_cli("verify", path, out, *shape_options(path)).code == 0
    assert run_cli("report", out, "--format", "json").code == 0


def test_optimize_prunes_them_if_they_shall_keep_their_zeros(made, run_cli, tmp_path):
    path, expected = made
    options = ("--threads", "1", "--no-benchmark", "--keep-pruned", *shape_options(path))
    ran = run_cli(
        "optimize", path, "-o", tmp_path / "out", "--method", "magnitude", "--sparsity", "0.9", *options,
        "--format", "json",
    )  # fmt: skip
    assert ran.code == 5
    rows = {row["name"]: row for row in ran.json()["quantized"]}
    assert {name: (row["pruned"], round(row["sparsity"], 2)) for name, row in rows.items()} == dict.fromkeys(
        expected, (True, 0.9)
    )
    written = tmp_path / "out" / "model.onnx"
    for weight in find_weights(model_io.load_model(written), encoded=True)[0]:
        dense = expected[weight.name]
        keep = np.abs(dense) > np.sort(np.abs(dense), axis=None)[round(0.9 * dense.size) - 1]
        assert np.mean(weight.matrix()[keep] == 0) == 0
        np.testing.assert_allclose(
            weight.matrix(), np.where(weight.matrix() == 0, 0, dense), rtol=1e-5, atol=1e-7
        )
    assert {
        (t.name, t.data_type, tuple(t.dims))
        for t in onnx.load(written).graph.initializer
        if t.name in expected
    } == {
        (t.name, t.data_type, tuple(t.dims)) for t in onnx.load(path).graph.initializer if t.name in expected
    }
    assert np.isfinite(answers(written)).all()
    for least, code in (("0.8", 0), ("0.999999", 3)):
        assert (
            run_cli("verify", path, tmp_path / "out", "--min-cosine", least, *shape_options(path)).code
            == code
        )


@pytest.mark.parametrize("name", ["bert, MatMulInteger", "resnet, QLinearConv"])
def test_analyze_says_that_nothing_can_be_gained(name, run_cli, tmp_path):
    write, layout = MODELS[name]
    path = tmp_path / "model.onnx"
    expected = write(path, layout)
    ran = run_cli("analyze", path, "--threads", "1", "--format", "json", *shape_options(path))
    assert ran.code == 0
    assert {row["name"]: row["zeros"] for row in ran.json()["quantized"]} == zeros_of(expected)
    assert not ran.json()["layers"]
    ran = run_cli("analyze", path, "--threads", "1", *shape_options(path))
    assert "no layer of this model would be faster in sparse form" in ran.out
    assert f"{len(expected)} weights are quantized already" in ran.out


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"K": 2**62}, f"where K = {2**62}, N = 16, 4 bits and block_size 32 need UINT8 of"),
        ({"N": 17}, "where K = 64, N = 17, 4 bits and block_size 32 need UINT8 of (17, 2, 16)"),
        ({"block_size": 0}, "has a block_size of 0"),
        ({"bits": 2**40}, f"has {2**40} bits"),
    ],
)
def test_hostile_sizes_end_in_one_message(attributes, reason, run_cli, tmp_path):
    sizes = {"K": 64, "N": 16, "bits": 4, "block_size": 32} | attributes
    node = helper.make_node("MatMulNBits", ["X", "q", "s"], ["Y"], domain="com.microsoft", **sizes)
    arrays = {"q": np.full((16, 2, 16), 0x88, np.uint8), "s": np.ones(32, np.float32)}
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [4, 64])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [4, 16])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), path)
    ran = run_cli("inspect", path, "--format", "json")
    assert ran.code == 0
    assert not ran.json()["weights"]
    ((place, why),) = ((row["place"], row["reason"]) for row in ran.json()["declined"])
    assert place == "q"
    assert reason in why
    for command in (("optimize", path, "-o", tmp_path / "out"), ("analyze", path)):
        ran = run_cli(*command, "--threads", "1")
        assert ran.code == 2
        assert "Error: ONNX Runtime" in ran.err


def test_analyze_of_weights_in_few_bits(run_cli, tmp_path):
    """Kernels on floats could take them, but what zeros would bring is told of floats only."""
    width = 64
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[8, {width}] X) => (float[8, {width}] Y) {{ h = MatMul(X, A) Y = MatMul(h, B) }}"""
    )
    for name in "AB":
        weight = np.random.default_rng(ord(name)).standard_normal((width, width)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(proto, tmp_path / "in.onnx")
    options = ("--threads", "1")
    assert (
        run_cli(
            "optimize",
            tmp_path / "in.onnx",
            "-o",
            tmp_path / "out",
            "--bits",
            "4",
            "--no-benchmark",
            *options,
        ).code
        == 5
    )
    ran = run_cli("analyze", tmp_path / "out" / "model.onnx", *options)
    assert ran.code == 0
    assert "2 weights are quantized already (2 in 4 bits)" in ran.out
