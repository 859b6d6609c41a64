"""What every registered pass must satisfy, on small models of every kind."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.lower.sparse_matmul import LowerSparseMatMul
from sparse_onnx.passes.prune.gradient import Gradient
from sparse_onnx.passes.prune.magnitude import Magnitude
from sparse_onnx.passes.prune.random import Random
from sparse_onnx.passes.prune.threshold import Threshold
from sparse_onnx.passes.registry import PASSES

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

    def text(self):
        head = f'<ir_version: 9, opset_import: ["" : {self.opset}, "local" : 1]>'
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
        left=("q",),
    ),
    "quantized in blocks": Case(
        "D = DequantizeLinear<axis = 1, block_size = 3>(q, s) W = Transpose(D) Y = MatMul(X, W)",
        {"q": np.arange(32, dtype=np.int8).reshape(4, 8), "s": weight(4, 3)},
        opset=21,
        left=("q",),
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

OPTIONS = {
    "prune.magnitude": [
        Magnitude(sparsity=0.5),
        Magnitude(sparsity=0.5, scope="global"),
        Magnitude(mask_structure="2:4"),
        Magnitude(sparsity=0.5, mask_structure="block:2x2"),
    ],
    "prune.random": [Random(sparsity=0.5), Random(mask_structure="1:2")],
    "prune.threshold": [Threshold(theta=0.5)],
}
# Passes that need data of the very model have tests of their own: test_oneshot.py, test_gradient.py, structured/.
STEPS = [
    step
    for cls in PASSES
    if not cls.needs_calibration and cls is not Gradient
    for step in OPTIONS.get(cls.name) or [cls()]
]
# No modifier of recipes: the compiler runs it, behind the guard.
STEPS.append(LowerSparseMatMul(min_sparsity=0.0))
FEEDS = {
    "X": RNG.standard_normal((8, 8)).astype(np.float32),
    "I": np.array([0, 3, 1], np.int64),
    "C": np.array(True),
}
DTYPES = {"double": np.float64, "half": np.float16}

every_case = pytest.mark.parametrize("case", CASES)
every_step = pytest.mark.parametrize(
    "step",
    STEPS,
    ids=lambda step: f"{step.name}-{step.structure}" if step.name.startswith("prune.") else step.name,
)


@pytest.fixture
def build(from_text):
    """A model whose tensors cannot be written to, as those that are mapped from a file."""

    def build(case):
        model = from_text(CASES[case].text(), **CASES[case].tensors)
        for value in model.graph.initializers.values():
            array = read_only(value.const_value.numpy().copy())
            value.const_value = ir.tensor(array, name=value.name)
        return model

    return build


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


@every_step
@every_case
def test_the_result_is_a_valid_model_with_the_same_border(build, run, step, case):
    model = build(case)
    before = border(model)
    expected = {} if case == "empty" else run(model, feeds(model, case))
    step(model)
    assert border(model) == before
    if case == "empty":  # the runtime does not load a graph without outputs
        assert not model.graph.outputs
        return
    after = run(model, feeds(model, case))
    assert {name: array.shape for name, array in after.items()} == {
        name: array.shape for name, array in expected.items()
    }
    if step.name.startswith("clean."):
        for name, array in expected.items():
            np.testing.assert_array_equal(after[name], array)


@every_step
@every_case
def test_modified_is_true_to_the_bytes(build, step, case):
    model = build(case)
    before = serialized(model)
    result = step(model)
    assert result.modified == (serialized(model) != before)


@every_step
@every_case
def test_the_second_run_changes_nothing_if_so_declared(build, step, case):
    model = build(case)
    step(model)
    first = serialized(model)
    again = step(model)
    assert step.idempotent
    assert not again.modified
    assert serialized(model) == first


@every_step
@every_case
def test_two_runs_give_the_same_bytes(build, step, case):
    one, two = build(case), build(case)
    results = [step(one), step(two)]
    assert serialized(one) == serialized(two)
    same = [dataclasses.replace(result, model=one, seconds=0.0) for result in results]
    assert same[0] == same[1]


@every_step
@every_case
def test_the_given_tensors_are_not_written_to(build, step, case):
    """They are read-only: writing would raise. And nothing keeps them from being compared afterwards."""
    model = build(case)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    step(model, PassContext())
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor.numpy(), CASES[case].tensors[name])


@every_step
@every_case
def test_what_is_left_alone_has_a_place_and_a_reason(build, step, case):
    result = step(build(case))
    for declined in result.declined:
        assert declined.pass_name == step.name
        assert declined.place
        assert declined.reason
    if step.name.startswith("prune."):
        assert {place.place for place in result.declined} == set(CASES[case].left)


@pytest.mark.parametrize("step", [step for step in STEPS if step.name.startswith("prune.")], ids=repr)
@every_case
def test_pruning_reaches_all_it_should_and_nothing_else(build, step, case):
    model = build(case)
    graphs = structure(model)
    before = {
        value.name: value.const_value for graph in model.graphs() for value in graph.initializers.values()
    }
    result = step(model)
    after = {
        value.name: value.const_value for graph in model.graphs() for value in graph.initializers.values()
    }
    assert structure(model) == graphs
    changed = {name for name, tensor in after.items() if tensor is not before[name]}
    assert changed == set(CASES[case].prunable) == {layer.name for layer in result.layers}
    for layer in result.layers:
        array = after[layer.name].numpy()
        assert array.dtype == before[layer.name].numpy().dtype
        assert np.count_nonzero(array == 0) == layer.zeros_after > layer.zeros_before
        assert after[layer.name].name == layer.name


@pytest.mark.parametrize("step", [step for step in STEPS if step.name.startswith("clean.")], ids=repr)
@every_case
def test_clean_up_changes_what_it_should_and_nothing_else(build, step, case):
    must = step.name in CASES[case].cleaned
    assert step(build(case)).modified == must
