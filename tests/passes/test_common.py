"""What every registered pass must satisfy, on small models of every kind."""

import dataclasses
import runpy
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.data.gradient_file import WeightGradients, write_gradients
from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import PassError
from sparse_onnx.model.metadata_keys import STRUCTURE_KEY
from sparse_onnx.model.weights import Selection, find_weights
from sparse_onnx.passes.base import CalibrationData, PassContext, Stage
from sparse_onnx.passes.lower.candidates import LOWERINGS
from sparse_onnx.passes.lower.encoded_linear import LowerEncoded
from sparse_onnx.passes.lower.exact_twin import exact_twin
from sparse_onnx.passes.lower.sparse_conv import LowerSparseConv
from sparse_onnx.passes.prune.gradient import Gradient
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.oneshot import OneShot
from sparse_onnx.passes.prune.random import Random
from sparse_onnx.passes.prune.threshold import Threshold
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.registry import PASSES
from sparse_onnx.passes.structured.channels import Channels
from sparse_onnx.passes.structured.ffn import Ffn
from sparse_onnx.passes.structured.heads import Heads

RNG = np.random.default_rng(11)


def weight(*shape, dtype=np.float32):
    """Half of the values are below 0.5, and none is zero."""
    array = RNG.uniform(0.1, 0.9, shape) * RNG.choice([-1, 1], shape)
    return array.astype(dtype)


def with_nan():
    array = weight(8, 4)
    array[1, 2], array[5, 0] = np.nan, -np.inf
    return array


def read_only(array):
    array.flags.writeable = False
    return array


@dataclasses.dataclass(frozen=True)
class Case:
    """``prunable``: names of the weights that pruning must reach; ``left``: what it must name as left alone."""

    body: str
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    inputs: str = "float[B, 8] X"
    outputs: str = "float[B, 4] Y"
    functions: str = ""
    opset: int = 17
    prunable: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    cleaned: tuple[str, ...] = ()
    """Passes of the clean-up that must change the model."""
    changed: tuple[str, ...] = ()
    """Passes of other stages that must."""
    lowered: tuple[type, ...] = ()
    """Lowerings that are applied first, whatever the zeros."""
    structures: dict[str, str] = dataclasses.field(default_factory=dict)
    """The patterns of zeros that tensors were pruned to."""

    def text(self):
        head = f'<ir_version: 9, opset_import: ["" : {self.opset}, "com.microsoft" : 1, "local" : 1]>'
        return f"{head} g ({self.inputs}) => ({self.outputs}) {{ {self.body} }} {self.functions}"


MLP = {
    "body": "A = Gemm(X, u, b) H = Relu(A) Y = Gemm<transB = 1>(H, w)",
    "tensors": {"u": weight(8, 8), "b": weight(8), "w": weight(4, 8)},
    "prunable": ("u", "w"),
}
CASES = {
    "mlp": Case(**MLP),
    "mlp, opset 13": Case(**MLP, opset=13),
    "mlp, opset 21": Case(**MLP, opset=21),
    "matmul and add": Case(
        "M = MatMul(X, w) Y = Add(M, b)", {"w": weight(8, 4), "b": weight(4)}, prunable=("w",)
    ),
    "shared weight": Case(
        "A = MatMul(X, w) B = MatMul(A, w) Y = MatMul(B, u)",
        {"w": weight(8, 8), "u": weight(8, 4)},
        prunable=("w", "u"),
    ),
    "equal weights": Case(
        "A = MatMul(X, u) B = MatMul(X, w) Y = Add(A, B)",
        dict.fromkeys("uw", weight(8, 4)),
        prunable=("u", "w"),
        cleaned=("clean.duplicates",),
    ),
    "tied embedding": Case(
        "E = Gather(w, I) T = Transpose<perm = [1, 0]>(w) Y = MatMul(E, T)",
        {"w": weight(4, 8)},
        inputs="int64[B] I",
    ),
    "weight seen both ways": Case(
        "A = MatMul(X, w) B = Gemm<transB = 1>(A, w) Y = MatMul(B, u)",
        {"w": weight(8, 8), "u": weight(8, 4)},
        prunable=("u",),
        left=("w",),
    ),
    "if": Case(
        """Y = If(C) <then_branch = t () => (float[B, 4] P) { P = MatMul(X, u) },
                      else_branch = e () => (float[B, 4] Q) { I = Identity(X) Q = MatMul(I, w) }>""",
        {"u": weight(8, 4), "w": weight(8, 4)},
        inputs="float[B, 8] X, bool C",
        prunable=("u", "w"),
        cleaned=("clean.identities",),
    ),
    "if with its own weight": Case(
        """Y = If(C) <then_branch = t () => (float[B, 4] P) <float[8, 4] u = {
                0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9,
                0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9}> { P = MatMul(X, u) },
                      else_branch = e () => (float[B, 4] Q) { Z = Neg(X) Q = MatMul(X, w) }>""",
        {"w": weight(8, 4)},
        inputs="float[B, 8] X, bool C",
        prunable=("u", "w"),
        cleaned=("clean.unused",),
    ),
    "loop": Case(
        """n = Constant<value = int64 {3}>() c = Constant<value = bool {1}>()
           H = Loop(n, c, X) <body = b (int64 i, bool d, float[B, 8] s) => (bool e, float[B, 8] r)
                { e = Identity(d) r = MatMul(s, w) }>
           Y = MatMul(H, u)""",
        {"w": weight(8, 8), "u": weight(8, 4)},
        prunable=("w", "u"),
    ),
    "function": Case(
        "F = local.layer(X, w) Y = MatMul(F, u)",
        {"w": weight(8, 8), "u": weight(8, 4)},
        functions="""<domain: "local", opset_import: ["" : 17]>
                     layer (a, m) => (b) { i = Identity(a) b = MatMul(i, m) }""",
        prunable=("u",),
        left=("local::layer",),
        cleaned=("clean.identities",),
    ),
    "double": Case(
        "Y = MatMul(X, w)",
        {"w": weight(8, 4, dtype=np.float64)},
        inputs="double[B, 8] X",
        outputs="double[B, 4] Y",
        prunable=("w",),
    ),
    "half": Case(
        "Y = MatMul(X, w)",
        {"w": weight(8, 4, dtype=np.float16)},
        inputs="float16[B, 8] X",
        outputs="float16[B, 4] Y",
        prunable=("w",),
    ),
    "weight is a graph input": Case(
        "A = MatMul(X, w) Y = MatMul(A, u)",
        {"w": weight(8, 8), "u": weight(8, 4)},
        inputs="float[B, 8] X, float[8, 8] w",
        prunable=("u",),
        left=("w",),
    ),
    "weight is a graph output": Case(
        "Y = MatMul(X, w)", {"w": weight(8, 4)}, outputs="float[B, 4] Y, float[8, 4] w", left=("w",)
    ),
    "nan": Case("Y = MatMul(X, w)", {"w": with_nan()}, prunable=("w",), left=("w",)),
    "mask and transpose": Case(
        "M = Mul(fc_mask, fc_orig) T = Transpose<perm = [1, 0]>(M) Y = MatMul(X, T)",
        {"fc_orig": weight(4, 8), "fc_mask": np.ones((4, 8), np.float32)},
        cleaned=("clean.fold-weights",),
    ),
    "constant node": Case(
        f"w = Constant<value = float[8, 4] {{{', '.join(['0.1', '0.9'] * 16)}}}>() Y = MatMul(X, w)",
        cleaned=("clean.constants", "clean.fold-weights"),
    ),
    "dead ends": Case(
        "A = Neg(X) D = MatMul(A, u) Y = MatMul(X, w)",
        {"w": weight(8, 4), "u": weight(8, 6), "nobody": weight(3)},
        prunable=("w", "u"),
        cleaned=("clean.unused",),
    ),
    "quantized": Case(
        "W = DequantizeLinear(q, s) Y = MatMul(X, W)",
        {"q": np.arange(32, dtype=np.int8).reshape(8, 4), "s": np.float32(0.1)},
        prunable=("q",),
        changed=(
            *("lower.sparse-matmul", "lower.int8-matmul", "lower.sparse-int8-matmul"),
            *("lower.matmul-nbits", "lower.dynamic-int8"),
        ),
    ),
    "bytes": Case(
        """p = QuantizeLinear(X, s, z) x = DequantizeLinear(p, s, z) W = DequantizeLinear(q, s)
           Y = MatMul(x, W)""",
        {
            "q": np.arange(-16, 16, dtype=np.int8).reshape(8, 4),
            "s": np.float32(0.125),
            "z": np.uint8(3),
        },
        prunable=("q",),
        changed=("lower.q-matmul", "lower.sparse-q-matmul"),
    ),
    "images of bytes": Case(
        """p = QuantizeLinear(P, s, z) x = DequantizeLinear(p, s, z) W = DequantizeLinear(q, s) A = Conv(x, W)
           H = Relu(A) y = QuantizeLinear(H, s, z) Y = DequantizeLinear(y, s, z)""",
        {
            "q": np.arange(-8, 8, dtype=np.int8).reshape(4, 4, 1, 1),
            "s": np.float32(0.125),
            "z": np.uint8(3),
        },
        inputs="float[B, 4, 8, 8] P",
        outputs="float[B, 4, 8, 8] Y",
        prunable=("q",),
        changed=("lower.sparse-int8-conv",),
    ),
    "4 bits and zeros": Case(
        "A = Concat<axis = 1>(X, X) W = DequantizeLinear(q, s) Y = MatMul(A, W)",
        {"q": np.diag(range(-8, 8))[:, ::4].astype(ml_dtypes.int4), "s": np.float32(0.125)},
        opset=21,
        structures={"q": "1:16"},
        changed=(
            "lower.sparse-matmul",
            "lower.matmul-nbits",
            "lower.sparse-integers",
            "lower.sparse-positions",
        ),
    ),
    "quantized in blocks": Case(
        "D = DequantizeLinear<axis = 1, block_size = 3>(q, s) W = Transpose(D) Y = MatMul(X, W)",
        {"q": np.arange(32, dtype=np.int8).reshape(4, 8), "s": np.full((4, 3), 0.1, np.float32)},
        opset=21,
        prunable=("q",),
    ),
    "packed blocks": Case(
        "Y = com.microsoft.MatMulNBits<K = 8, N = 4, bits = 4, block_size = 16>(X, q, s)",
        {
            "q": np.arange(32, dtype=np.uint8).reshape(4, 1, 8),
            "s": np.array([0.125, -0.25, 0.25, 0.5], np.float32),
        },
        left=("q",),
        changed=("quant.open-blocks",),
    ),
    "palette": Case(
        "J = Cast<to = 6>(q) W = Gather(p, J) Y = MatMul(X, W)",
        {"q": np.arange(32, dtype=np.uint8).reshape(8, 4), "p": weight(32)},
        left=("q",),
    ),
    "residual and normalization": Case(
        "A = Neg(X) B = Abs(A) S = Add(X, B) N = LayerNormalization(S, g, b) Y = Add(N, S)",
        {"g": weight(8), "b": weight(8)},
        outputs="float[B, 8] Y",
    ),
    "no linears": Case("Y = Relu(X)", outputs="float[B, 8] Y"),
    "attention": Case("T = Transpose(X) Y = MatMul(X, T)", outputs="float[B, B] Y"),
    "identity": Case("Y = Identity(X)", outputs="float[B, 8] Y"),
    "empty": Case("", inputs="", outputs=""),
}

# For what is no step of the clean-up and makes no zeros: one place, at least, for each of these passes. Those that
# several of them find stand here, that of a single pass in its own test.
WIDE = {"u": weight(8, 16), "v": weight(16, 8), "w": weight(8, 16), "b": weight(16), "c": weight(8)}
PLACES = {
    "neurons": Case(
        "A = Gemm(X, u, b) H = Relu(A) Y = Gemm(H, v, c)",
        {name: WIDE[name] for name in "ubvc"},
        outputs="float[B, 8] Y",
        prunable=("u", "v"),
        changed=("prune.ffn", "lower.sparse-matmul"),
    ),
    "images": Case(
        "A = Conv<pads = [1, 1, 1, 1]>(P, k, b) H = Relu(A) Y = Conv(H, l)",
        {"k": weight(16, 4, 3, 3), "b": weight(16), "l": weight(4, 16, 1, 1)},
        inputs="float[B, 4, 8, 8] P",
        outputs="float[B, 4, 8, 8] Y",
        prunable=("k", "l"),
        changed=("prune.channels", "lower.sparse-conv"),
    ),
    "heads": Case(
        """q = MatMul(S, wq) k = MatMul(S, wk) v = MatMul(S, wv)
           qr = Reshape(q, apart) kr = Reshape(k, apart) vr = Reshape(v, apart)
           qh = Transpose<perm = [0, 2, 1, 3]>(qr) kt = Transpose<perm = [0, 2, 3, 1]>(kr)
           vh = Transpose<perm = [0, 2, 1, 3]>(vr)
           scores = MatMul(qh, kt) scaled = Mul(scores, scale) p = Softmax(scaled) mixed = MatMul(p, vh)
           back = Transpose<perm = [0, 2, 1, 3]>(mixed) flat = Reshape(back, together) o = MatMul(flat, wo)
           R = Add(S, o) Y = LayerNormalization(R, g, h)""",
        {f"w{name}": weight(8, 8) for name in "qkvo"}
        | {
            "apart": np.array([0, 0, 4, 2]),
            "together": np.array([0, 0, 8]),
            "scale": np.float32(2**-0.5),
            "g": weight(8),
            "h": weight(8),
        },
        inputs="float[B, 5, 8] S",
        outputs="float[B, 5, 8] Y",
        prunable=("wq", "wk", "wv", "wo"),
        changed=("prune.heads", "fuse.attention", "fuse.skip-layer-norm", "lower.sparse-matmul"),
    ),
    "loud channels": Case(
        "N = LayerNormalization(X, g, h) Y = MatMul(N, w)",
        {"g": weight(8) * np.float32([60, 1, 1, 1, 1, 1, 1, 1]), "h": weight(8), "w": weight(8, 4)},
        prunable=("w",),
        changed=("quant.smooth",),
    ),
    "normalized images": Case(
        "A = Conv(P, k) Y = BatchNormalization(A, g, b, m, v)",
        {"k": weight(4, 4, 1, 1), "g": weight(4), "b": weight(4), "m": weight(4), "v": abs(weight(4))},
        inputs="float[B, 4, 8, 8] P",
        outputs="float[B, 4, 8, 8] Y",
        prunable=("k",),
        changed=("fuse.batch-norm", "lower.sparse-conv"),
    ),
    "sparse images": Case(
        "A = Conv(P, k) Y = Relu(A)",
        {"k": weight(4, 4, 1, 1)},
        inputs="float[B, 4, 8, 8] P",
        outputs="float[B, 4, 8, 8] Y",
        lowered=(LowerSparseConv,),
    ),
}
CASES |= PLACES


def own_places(cls):
    """The cases ``PLACES`` of tests/passes/<stage>/test_<module>.py, where the pass of that module must change the
    model; tensors are given as shapes."""
    *_, stage, module = cls.__module__.split(".")
    test = Path(__file__).parent / stage / f"test_{module}.py"
    for name, place in runpy.run_path(str(test)).get("PLACES", {}).items():
        tensors = {tensor: weight(*shape) for tensor, shape in place["tensors"].items()}
        yield name, Case(**place | {"tensors": tensors, "changed": (cls.name,)})


REBUILDING = [
    cls
    for cls in PASSES
    if cls.stage not in (Stage.CLEAN, Stage.PRUNE, Stage.QUANTIZE) and not cls.needs_calibration
]
for rebuilding in REBUILDING:
    for name, own_place in own_places(rebuilding):
        assert name not in CASES, f"two cases are called {name!r}"
        CASES[name] = own_place

OPTIONS = {
    "prune.magnitude": [
        Magnitude(sparsity=0.5),
        Magnitude(sparsity=0.5, scope="global"),
        Magnitude(mask_structure="2:4"),
        Magnitude(sparsity=0.5, mask_structure="block:2x2"),
    ],
    "prune.random": [Random(sparsity=0.5), Random(mask_structure="1:2")],
    "prune.threshold": [Threshold(theta=0.5)],
    "quant.weight": [
        QuantizeWeights(method="rtn", group_size=0),
        QuantizeWeights(method="hqq", group_size=0, bits=3, symmetric=False, storage="dequantize"),
        QuantizeWeights(method="auto", group_size=0, bits=8),
    ],
    "prune.gradient": [Gradient(sparsity=0.5, gradients="gradients.npz")],
    **{cls.name: [cls(min_sparsity=0.0)] for cls in LOWERINGS},
    **{cls.name: [cls(sparsity=0.5, multiple_of=1)] for cls in (Channels, Ffn, Heads)},
    **{cls.name: [cls(sparsity=0.5)] for cls in PASSES if issubclass(cls, OneShot)},
}
"""Those of passes that cannot do without."""

CALIBRATED_CASES = (
    "mlp",
    "if",
    "nan",
    "no linears",
    "neurons",
    "images",
    "heads",
    "loud channels",
    "recurrent",
)
"""The cases for passes that run the model on data, which takes a while."""


def cases_of(cls):
    if cls is Gradient:  # a file of gradients has one, at least
        return [name for name, case in CASES.items() if case.prunable]
    return CALIBRATED_CASES if cls.needs_calibration else CASES


PAIRS = [
    pytest.param(step, case, id=f"{step.name}-{getattr(step, 'structure', '')}-{case}")
    for cls in PASSES
    for step in OPTIONS.get(cls.name) or [cls()]
    for case in cases_of(cls)
]
FEEDS = {
    "X": RNG.standard_normal((8, 8)).astype(np.float32),
    "I": np.array([0, 3, 1], np.int64),
    "C": np.array(True),
    "P": RNG.standard_normal((8, 4, 8, 8)).astype(np.float32),
    "S": RNG.standard_normal((8, 5, 8)).astype(np.float32),
    "T": RNG.standard_normal((5, 8, 8)).astype(np.float32),
}
DTYPES = {"double": np.float64, "half": np.float16}


@pytest.fixture
def build(from_text):
    """A model whose tensors cannot be written to, as those that are mapped from a file."""

    def build(case):
        model = from_text(CASES[case].text(), **CASES[case].tensors)
        for name, structure in CASES[case].structures.items():
            model.graph.initializers[name].metadata_props[STRUCTURE_KEY] = structure
        for lowering in CASES[case].lowered:
            lowering(min_sparsity=0.0)(model)
        for value in model.graph.initializers.values():
            array = read_only(value.const_value.numpy().copy())
            value.const_value = ir.tensor(array, name=value.name)
        return model

    return build


@pytest.fixture
def apply(tmp_path, monkeypatch):
    """Apply a pass with all that it may ask for: calibration data, or a file of gradients of the very model."""
    monkeypatch.chdir(tmp_path)

    def apply(step, model, case):
        calibration = None
        if step.needs_calibration:
            calibration = CalibrationData(Samples.of([feeds(model, case)], "test"), tmp_path)
        if isinstance(step, Gradient):
            weights = {
                weight.name: np.array(weight.matrix()) for weight in find_weights(model, encoded=True)[0]
            }
            finite = {name: np.where(np.isfinite(w), w, 0).astype(np.float32) for name, w in weights.items()}
            known = {name: WeightGradients(abs(w), w**2) for name, w in finite.items()}
            write_gradients(tmp_path / step.gradients, known)
        return step(model, PassContext(calibration=calibration))

    return apply


def feeds(model, case):
    names = [value.name for value in model.graph.inputs if value.name in FEEDS]
    return {name: FEEDS[name].astype(DTYPES.get(case, FEEDS[name].dtype)) for name in names}


def serialized(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def border(model):
    values = (*model.graph.inputs, *model.graph.outputs)
    return [(value.name, value.type, str(value.shape)) for value in values]


def structure(model):
    """Ops and edges of all graphs, without tensors."""
    graphs = [*model.graphs(), *(function.graph for function in model.functions.values())]
    return [
        [
            (node.op_type, [v and v.name for v in node.inputs], [v.name for v in node.outputs])
            for node in graph
        ]
        for graph in graphs
    ]


KEEPS_ANSWERS = (Stage.CLEAN, Stage.SCALE, Stage.FUSE, Stage.LOWER)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A pass, applied once: the model as it was and as it is."""

    step: object
    case: str
    bytes_before: bytes
    border: list
    graphs: list
    tensors: dict  # of all graphs, as they were given
    contents: dict  # copies of them
    model: ir.Model
    result: object

    @classmethod
    def of(cls, step, case, model, apply):
        tensors = tensors_of(model)
        given = (serialized(model), border(model), structure(model), tensors)
        contents = {name: np.array(tensor.numpy()) for name, tensor in tensors.items()}
        return cls(step, case, *given, contents, model, apply(step, model, case))


def tensors_of(model):
    return {
        value.name: value.const_value for graph in model.graphs() for value in graph.initializers.values()
    }


def the_result_is_a_valid_model_with_the_same_border(trial, expected, run):
    assert border(trial.model) == trial.border
    if trial.case == "empty":  # the runtime does not load a graph without outputs
        assert not trial.model.graph.outputs
        return
    model, stage = trial.model, trial.step.stage
    if isinstance(trial.step, LowerEncoded):  # operators that round activations
        model = exact_twin(model) or model
    after = run(model, feeds(model, trial.case))
    assert {name: array.shape for name, array in after.items()} == {
        name: array.shape for name, array in expected.items()
    }
    for name, array in expected.items():
        if stage is Stage.CLEAN:
            np.testing.assert_array_equal(after[name], array)
        elif stage in KEEPS_ANSWERS:
            np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-4)


def modified_is_true_to_the_bytes(trial):
    assert trial.result.modified == (serialized(trial.model) != trial.bytes_before)


def two_runs_give_the_same_bytes(trial, other):
    assert serialized(trial.model) == serialized(other.model)
    same = [
        dataclasses.replace(
            result,
            model=trial.model,
            seconds=0.0,
            layers=tuple(  # tensors are equal only to themselves
                dataclasses.replace(layer, bias=layer.bias and (layer.bias[0], None))
                for layer in result.layers
            ),
        )
        for result in (trial.result, other.result)
    ]
    assert same[0] == same[1]


def the_given_tensors_are_not_written_to(trial):
    """They are read-only: writing would raise. And nothing keeps them from being compared afterwards."""
    for name, tensor in trial.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), trial.contents[name])
    if not CASES[trial.case].lowered:
        for name in trial.tensors.keys() & CASES[trial.case].tensors.keys():
            np.testing.assert_array_equal(trial.tensors[name].numpy(), CASES[trial.case].tensors[name])


def what_is_left_alone_has_a_place_and_a_reason(trial):
    for declined in trial.result.declined:
        assert declined.pass_name == trial.step.name
        assert declined.place
        assert declined.reason
    if trial.step.stage is Stage.PRUNE and not trial.step.needs_calibration:
        assert {place.place for place in trial.result.declined} == set(CASES[trial.case].left)


def pruning_reaches_all_it_should_and_nothing_else(trial):
    before, after, case = trial.tensors, tensors_of(trial.model), CASES[trial.case]
    changed = {name for name, tensor in after.items() if tensor is not before.get(name)}
    biases = {layer.bias[0] for layer in trial.result.layers if layer.bias is not None}
    if not trial.step.needs_calibration:
        assert not biases
        assert structure(trial.model) == trial.graphs
    finite = (
        {name for name in case.prunable if np.isfinite(case.tensors[name]).all()}
        if trial.step.needs_calibration
        else set(case.prunable)
    )
    assert changed - biases == finite == {layer.name for layer in trial.result.layers}
    for layer in trial.result.layers:
        array = after[layer.name].numpy()
        assert array.dtype == before[layer.name].numpy().dtype
        assert np.count_nonzero(array == 0) == layer.zeros_after > layer.zeros_before
        assert after[layer.name].name == layer.name


def what_rebuilds_the_graph_finds_its_place(trial):
    if trial.step.name in CASES[trial.case].changed:
        assert trial.result.modified
    elif trial.case in ("no linears", "attention", "empty"):
        assert not trial.result.modified


@pytest.mark.parametrize(("step", "case"), PAIRS)
def test_what_every_pass_promises(build, apply, run, step, case):
    """One test for all promises: the pass is applied three times, not once for each."""
    model = build(case)
    expected = {} if case == "empty" else run(model, feeds(model, case))
    trial = Trial.of(step, case, model, apply)
    the_result_is_a_valid_model_with_the_same_border(trial, expected, run)
    modified_is_true_to_the_bytes(trial)
    two_runs_give_the_same_bytes(trial, Trial.of(step, case, build(case), apply))
    the_given_tensors_are_not_written_to(trial)
    what_is_left_alone_has_a_place_and_a_reason(trial)
    if step.stage is Stage.PRUNE:
        pruning_reaches_all_it_should_and_nothing_else(trial)
    if step.stage is Stage.CLEAN:  # it changes what it should and nothing else
        assert trial.result.modified == (step.name in CASES[case].cleaned)
    if type(step) in REBUILDING:
        what_rebuilds_the_graph_finds_its_place(trial)
    if step.idempotent:  # last: from here on the model is that of the second run
        again = Trial.of(step, case, trial.model, apply)
        assert not again.result.modified
        assert serialized(again.model) == again.bytes_before


def test_what_is_not_idempotent_needs_data():
    assert all(cls.idempotent or cls.needs_calibration for cls in PASSES)


# -- what the compiler asks a pass -----------------------------------------------------------------

every_step = pytest.mark.parametrize(
    "step", {repr(pair.values[0]): pair.values[0] for pair in PAIRS}.values(), ids=lambda step: step.name
)


@every_step
def test_a_stand_in_needs_no_data_and_keeps_its_place(step):
    other = step.stand_in()
    if other is None:
        assert step.needs_calibration
    else:
        assert not other.needs_calibration
        assert other.stage is step.stage
        assert (other is step) == (not step.needs_calibration)


@every_step
def test_a_pass_knows_the_zeros_it_makes(build, step):
    weights = find_weights(build("mlp"))[0]
    asked = [step.zeros_of(weight) for weight in weights]
    if step.stage is not Stage.PRUNE:
        assert asked == [None] * len(weights)
        return
    assert all(zeros is not None and zeros.structure == str(step.structure) for zeros in asked)
    ignoring = dataclasses.replace(step, ignore=("u",))
    assert [weight.name for weight in weights if ignoring.zeros_of(weight) is None] == ["u"]
    assert ignoring.selection == Selection((), ("u",))


@every_step
def test_shares_of_single_weights(build, step):
    shares, sizes = {"u": 0.25, "w": 0.75}, {"u": 64, "w": 32}
    if not step.takes_shares:
        with pytest.raises(PassError, match="takes no shares of zeros"):
            step.with_shares(shares, "unstructured", sizes)
        return
    passes = step.with_shares(shares, "unstructured", sizes)
    assert {type(own) for own in passes} == {type(step)}
    weights = find_weights(build("mlp"))[0]
    reached = {weight.name for weight in weights for own in passes if own.zeros_of(weight) is not None}
    assert reached == {"u", "w"}


@pytest.mark.parametrize("cls", REBUILDING, ids=lambda cls: cls.name)
def test_every_pass_that_rebuilds_the_graph_has_a_place(cls):
    assert any(cls.name in case.changed for case in CASES.values())
