"""A convolutional network that was pruned and then quantized with static scales (QDQ), through all commands: its
convolutions become sparse ones of integers, with the same integers as before."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx import sparse_ops
from sparse_onnx.model import model_io
from sparse_onnx.passes.lower.sparse_int8_conv import LowerSparseInt8Conv

RNG = np.random.default_rng(5)
STEP = 2.0**-5


class Network:
    """Writes layers as quantizers do: integers between all of them."""

    def __init__(self, signed):
        self.nodes, self.constants, self.signed = [], {}, signed
        self.lowest = -128 if signed else 0

    def constant(self, name, array):
        self.constants[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def node(self, op_type, *inputs, **attributes):
        name = f"{op_type}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def rounded(self, value, zero_point, step=STEP):
        """``value`` behind QuantizeLinear and DequantizeLinear."""
        byte = np.int8 if self.signed else np.uint8
        scale = self.constant(f"{value}.scale", np.float32(step))
        zero = self.constant(f"{value}.zero", byte(zero_point + self.lowest))
        integers = self.node("QuantizeLinear", value, scale, zero)
        return self.node("DequantizeLinear", integers, scale, zero)

    def conv(self, x, channels, outputs, kernel=3, stride=1, zeros=0.8, relu=True):
        name = f"conv{len(self.nodes)}"
        kept = RNG.random((outputs, -(-channels // 4), kernel, kernel)) >= zeros
        mask = np.repeat(kept, 4, axis=1)[:, :channels]
        w = np.where(mask, RNG.integers(-127, 128, mask.shape), 0).astype(np.int8)
        scales = (RNG.uniform(0.5, 1.5, outputs) / np.sqrt(channels) / kernel / 60).astype(np.float32)
        bias = RNG.integers(-500, 500, outputs).astype(np.int32)
        weight = self.node(
            "DequantizeLinear", self.constant(f"{name}.w", w), self.constant(f"{name}.s", scales), axis=0
        )
        added = self.node(
            "DequantizeLinear",
            self.constant(f"{name}.b", bias),
            self.constant(f"{name}.bs", scales * np.float32(STEP)),
            axis=0,
        )
        h = self.node(
            "Conv", x, weight, added, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4
        )
        return self.rounded(self.node("Relu", h), 0) if relu else self.rounded(h, 128)

    def save(self, path, y):
        graph = helper.make_graph(
            self.nodes,
            "convnet",
            [helper.make_tensor_value_info("X", TensorProto.FLOAT, [1, 3, 24, 24])],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
            list(self.constants.values()),
        )
        onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)


@pytest.fixture(params=[False, True], ids=["uint8", "int8"])
def convnet(request, tmp_path):
    """A stem, a block with a shortcut of its own and one without; five sparse convolutions."""
    net = Network(request.param)
    x = net.conv(net.rounded("X", 128), 3, 16, stride=2, zeros=0.0)
    y = net.conv(net.conv(x, 16, 16), 16, 32, kernel=1, relu=False)
    shortcut = net.conv(x, 16, 32, kernel=1, relu=False)
    x = net.rounded(net.node("Relu", net.node("Add", y, shortcut)), 0)
    y = net.conv(net.conv(x, 32, 16, kernel=1), 16, 32, relu=False)
    x = net.rounded(net.node("Relu", net.node("Add", y, x)), 0)
    path = tmp_path / "convnet.onnx"
    net.save(path, net.node("GlobalAveragePool", x))
    return path


def answers(path, *, library=False):
    options = onnxruntime.SessionOptions()
    if library:
        sparse_ops.register(options)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((1, 3, 24, 24)).astype(np.float32)
    return session.run(None, {"X": x})[0]


def test_all_of_them_become_sparse_and_keep_their_integers(convnet, tmp_path):
    before = answers(convnet)
    assert np.unique(before).size > 10
    model = model_io.load_model(convnet)
    result = LowerSparseInt8Conv(min_sparsity=0.5)(model)
    assert result.statistics["weights"] == 5
    out = model_io.save_model(model, tmp_path, name="lowered")
    nodes = [node.op_type for node in onnx.load(out).graph.node]
    assert sum(op_type.startswith("SparseInt8Conv") for op_type in nodes) == 5
    assert nodes.count("Conv") == 1  # the first, which is dense
    for library in (False, True):
        np.testing.assert_array_equal(answers(out, library=library), before)


def test_optimize_times_them_without_being_asked(convnet, run_cli, tmp_path):
    """Against the integer kernels of the runtime; what it decides depends on the machine, the answers do not."""
    before, out = answers(convnet), tmp_path / "out"
    ran = run_cli("optimize", convnet, "-o", out, "--threads", "1", "--format", "json")
    assert ran.code in (0, 5), ran.err
    report = ran.json()
    timed = [row for row in report["layers"] if {"dense", "int8-given-quads"} <= row["times"].keys()]
    assert len(timed) == 5
    assert {row["decision"] for row in timed} <= {"dense", "int8-given-quads"}
    assert report["summary"]["relative_error"] == 0
    for library in (False, True):
        np.testing.assert_array_equal(answers(out / "model.onnx", library=library), before)
    assert run_cli("verify", convnet, out).code == 0
    assert run_cli("report", out, "--format", "json").code == 0
