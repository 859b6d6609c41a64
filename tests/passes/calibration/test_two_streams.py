"""The pruned model beside the dense one: what layers see and what they are aimed at, against float64 NumPy."""

import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import HostError
from sparse_onnx.passes.calibration import Calibrator, Layout, Step

WIDTH, HIDDEN, VOCABULARY, LAYERS = 16, 24, 40, 2

Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Network:
    """A transformer of two layers; ``values(weights, feeds)`` has what ONNX calls by the same names, in float64.

    ``layers`` has (input, aimed sum, residual or None) of each weight, ``{i}`` and ``{j}`` the layer and the next one.
    """

    text: str
    shapes: Mapping[str, tuple[int, ...]]
    values: Callable[[Mapping[str, np.ndarray], Feeds], Values]
    layers: Mapping[str, tuple[str, str, str | None]]


_BERT = """<ir_version: 9, opset_import: ["" : 17]>
bert (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask)
  => (float[batch, sequence, 16] Y) {
h0 = Gather(table, input_ids) cast = Cast<to = 1>(attention_mask) off = Sub(one, cast) big = Mul(off, far)
mask = Unsqueeze(big, axes)
LAYERS
Y = Identity(h2) }"""
_BERT_LAYER = """
qm{i} = MatMul(h{i}, Wq{i}) q{i} = Add(qm{i}, bq{i}) km{i} = MatMul(h{i}, Wk{i}) k{i} = Add(bk{i}, km{i})
vm{i} = MatMul(h{i}, Wv{i}) v{i} = Add(vm{i}, bv{i}) kt{i} = Transpose<perm = [0, 2, 1]>(k{i})
s{i} = MatMul(q{i}, kt{i}) z{i} = Mul(s{i}, scale) m{i} = Add(z{i}, mask) p{i} = Softmax<axis = -1>(m{i})
c{i} = MatMul(p{i}, v{i}) om{i} = MatMul(c{i}, Wo{i}) o{i} = Add(om{i}, bo{i}) r{i} = Add(o{i}, h{i})
n{i} = LayerNormalization<axis = -1>(r{i}, gain) um{i} = MatMul(n{i}, Wu{i}) u{i} = Add(um{i}, bu{i}) a{i} = Relu(u{i})
dm{i} = MatMul(a{i}, Wd{i}) d{i} = Add(dm{i}, bd{i}) t{i} = Add(n{i}, d{i})
h{j} = LayerNormalization<axis = -1>(t{i}, gain)
"""
_LLAMA = _BERT.replace("bert", "llama").replace("Y = Identity(h2)", "Y = Mul(h2, scale)")
_LLAMA_LAYER = """
sq{i} = Mul(h{i}, h{i}) ms{i} = ReduceMean<axes = [-1]>(sq{i}) me{i} = Add(ms{i}, eps) rt{i} = Sqrt(me{i})
x{i} = Div(h{i}, rt{i}) q{i} = MatMul(x{i}, Wq{i}) k{i} = MatMul(x{i}, Wk{i}) v{i} = MatMul(x{i}, Wv{i})
kt{i} = Transpose<perm = [0, 2, 1]>(k{i}) s{i} = MatMul(q{i}, kt{i}) z{i} = Mul(s{i}, scale) m{i} = Add(z{i}, mask)
p{i} = Softmax<axis = -1>(m{i}) c{i} = MatMul(p{i}, v{i}) o{i} = MatMul(c{i}, Wo{i}) r{i} = Add(h{i}, o{i})
sr{i} = Mul(r{i}, r{i}) mr{i} = ReduceMean<axes = [-1]>(sr{i}) er{i} = Add(mr{i}, eps) tr{i} = Sqrt(er{i})
n{i} = Div(r{i}, tr{i}) g{i} = MatMul(n{i}, Wg{i}) u{i} = MatMul(n{i}, Wu{i}) sg{i} = Sigmoid(g{i})
w{i} = Mul(g{i}, sg{i}) a{i} = Mul(w{i}, u{i}) d{i} = MatMul(a{i}, Wd{i}) h{j} = Add(r{i}, d{i})
"""


def _attend(values: Values, i: int, mask: np.ndarray) -> np.ndarray:
    scores = values[f"q{i}"] @ values[f"k{i}"].transpose(0, 2, 1) * 0.25 + mask
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(p / p.sum(-1, keepdims=True) @ values[f"v{i}"])


def _norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5))


def _start(w: Mapping[str, np.ndarray], feeds: Feeds) -> tuple[Values, np.ndarray]:
    return {"h0": w["table"][feeds["input_ids"]]}, ((1.0 - feeds["attention_mask"]) * -1e4)[:, None, :]


def _bert(w: Mapping[str, np.ndarray], feeds: Feeds) -> Values:
    v, mask = _start(w, feeds)
    for i in range(LAYERS):
        for name in "qkv":
            v[f"{name}{i}"] = v[f"h{i}"] @ w[f"W{name}{i}"] + w[f"b{name}{i}"]
        v[f"c{i}"] = _attend(v, i, mask)
        v[f"r{i}"] = v[f"h{i}"] + v[f"c{i}"] @ w[f"Wo{i}"] + w[f"bo{i}"]
        v[f"n{i}"] = _norm(v[f"r{i}"])
        v[f"u{i}"] = v[f"n{i}"] @ w[f"Wu{i}"] + w[f"bu{i}"]
        v[f"a{i}"] = np.maximum(v[f"u{i}"], 0)
        v[f"t{i}"] = v[f"n{i}"] + v[f"a{i}"] @ w[f"Wd{i}"] + w[f"bd{i}"]
        v[f"h{i + 1}"] = _norm(v[f"t{i}"])
    return v | {"Y": v["h2"]}


def _llama(w: Mapping[str, np.ndarray], feeds: Feeds) -> Values:
    v, mask = _start(w, feeds)
    for i in range(LAYERS):
        v[f"x{i}"] = v[f"h{i}"] / np.sqrt((v[f"h{i}"] ** 2).mean(-1, keepdims=True) + 1e-5)
        for name in "qkv":
            v[f"{name}{i}"] = v[f"x{i}"] @ w[f"W{name}{i}"]
        v[f"c{i}"] = _attend(v, i, mask)
        v[f"r{i}"] = v[f"h{i}"] + v[f"c{i}"] @ w[f"Wo{i}"]
        v[f"n{i}"] = v[f"r{i}"] / np.sqrt((v[f"r{i}"] ** 2).mean(-1, keepdims=True) + 1e-5)
        v[f"g{i}"], v[f"u{i}"] = v[f"n{i}"] @ w[f"Wg{i}"], v[f"n{i}"] @ w[f"Wu{i}"]
        v[f"a{i}"] = v[f"g{i}"] / (1 + np.exp(-v[f"g{i}"])) * v[f"u{i}"]
        v[f"h{i + 1}"] = v[f"r{i}"] + v[f"a{i}"] @ w[f"Wd{i}"]
    return v | {"Y": v["h2"] * 0.25}


_SQUARE = {f"W{name}": (WIDTH, WIDTH) for name in "qkvo"} | {"Wu": (WIDTH, HIDDEN), "Wd": (HIDDEN, WIDTH)}
NETWORKS = {
    "bert": Network(
        _BERT.replace("LAYERS", "".join(_BERT_LAYER.format(i=i, j=i + 1) for i in range(LAYERS))),
        _SQUARE | {f"b{name[1]}": shape[1:] for name, shape in _SQUARE.items()},
        _bert,
        {f"W{name}": ("h{i}", f"{name}{{i}}", None) for name in "qkv"}
        | {"Wo": ("c{i}", "r{i}", "h{i}"), "Wu": ("n{i}", "u{i}", None), "Wd": ("a{i}", "t{i}", "n{i}")},
    ),
    "llama": Network(
        _LLAMA.replace("LAYERS", "".join(_LLAMA_LAYER.format(i=i, j=i + 1) for i in range(LAYERS))),
        _SQUARE | {"Wg": (WIDTH, HIDDEN)},
        _llama,
        {f"W{name}": ("x{i}", f"{name}{{i}}", None) for name in "qkv"}
        | {f"W{name}": ("n{i}", f"{name}{{i}}", None) for name in "gu"}
        | {"Wo": ("c{i}", "r{i}", "h{i}"), "Wd": ("a{i}", "h{j}", "r{i}")},
    ),
}


@pytest.fixture(params=NETWORKS)
def network(request) -> Network:
    return NETWORKS[request.param]


def _arrays(network: Network) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20)
    arrays = {"table": rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)}
    for i in range(LAYERS):
        for name, shape in network.shapes.items():
            scale = math.sqrt(shape[0]) if len(shape) == 2 else 1
            arrays[f"{name}{i}"] = (rng.standard_normal(shape) / scale).astype(np.float32)
    return arrays


def _build(network: Network, from_text: Callable[..., ir.Model]) -> ir.Model:
    small = {"scale": np.float32(0.25), "one": np.float32(1), "far": np.float32(-1e4), "axes": np.array([1])}
    small |= {"gain": np.ones(WIDTH, np.float32), "eps": np.float32(1e-5)}
    used = {name: np.asarray(array) for name, array in small.items() if name in network.text}
    return from_text(network.text, **_arrays(network), **used)


def _data(samples: int = 10, length: int = 8) -> Feeds:
    rng = np.random.default_rng(21)
    lengths = rng.integers(2, length + 1, samples)
    return {
        "input_ids": rng.integers(0, VOCABULARY, (samples, length)),
        "attention_mask": (np.arange(length) < lengths[:, None]).astype(np.int64),
    }


def _places(network: Network, name: str) -> tuple[str, str, str | None]:
    x, output, residual = network.layers[name[:-1]]
    i = int(name[-1])
    return x.format(i=i), output.format(i=i, j=i + 1), residual and residual.format(i=i)


def _halved(name: str, array: np.ndarray) -> np.ndarray:
    keep = np.random.default_rng(sum(name.encode())).random(array.shape) < 0.5
    return np.asarray(array * keep.astype(array.dtype))


def _put(weight, matrix: np.ndarray) -> None:
    stored = weight.stored(matrix).astype(weight.tensor.dtype.numpy())
    weight.value.const_value = ir.tensor(stored, name=weight.name)


def _close(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)


def _prune(step: Step, now: dict[str, np.ndarray]) -> None:
    for weight in step.weights:
        now[weight.name] = _halved(weight.name, now[weight.name])
        _put(weight, now[weight.name])


def test_the_reference_is_the_model(network, from_text, run):
    feeds = _data()
    _close(
        run(_build(network, from_text), feeds)["Y"].astype(np.float64),
        network.values(_arrays(network), feeds)["Y"],
    )


def test_inputs_and_aims_of_transformers(network, from_text, calibrator, run, assert_moments):
    model, feeds = _build(network, from_text), _data()
    keep = feeds["attention_mask"] != 0
    now = {name: array.astype(np.float64) for name, array in _arrays(network).items()}
    dense = network.values(now, feeds)
    names = []
    for step in calibrator(model, feeds).steps():
        pruned = network.values(now, feeds)
        for weight in step.weights:
            names.append(weight.name)
            tensor, output, residual = _places(network, weight.name)
            x = pruned[tensor][keep]
            y = (dense[output] - (pruned[residual] if residual else 0))[keep]
            (inputs,) = step.inputs
            assert_moments(inputs, x, 2e-5)
            aim = step.aims[weight.name]
            assert (aim.target.residual.name if aim.target.residual else None) == residual
            _close(aim.pull, x.T @ y)
            _close(aim.mean, y.mean(axis=0))
            if "bo0" in now:
                assert aim.target.bias.name == f"b{weight.name[1:]}"
        _prune(step, now)
    attention = ["Wq", "Wk", "Wv", "Wo"]
    mlp = [name for name in ("Wg", "Wu", "Wd") if name in network.layers]
    assert names == [f"{name}{i}" for i in range(LAYERS) for name in attention + mlp]
    assert step.index == step.total - 1 == 4 * LAYERS - 1
    _close(run(model, feeds)["Y"].astype(np.float64), network.values(now, feeds)["Y"])


def test_nothing_changed_means_the_layers_own_output(network, from_text, calibrator):
    arrays = _arrays(network)
    for step in calibrator(_build(network, from_text), _data(), batch=3).steps():
        for weight in step.weights:
            (inputs,) = step.inputs
            bias = arrays.get(f"b{weight.name[1:]}", np.zeros(weight.shape[1])).astype(np.float64)
            aim = step.aims[weight.name]
            own = inputs.gram @ weight.matrix() + np.outer(inputs.mean, bias) * inputs.count
            _close(aim.pull, own)
            _close(aim.mean, inputs.mean @ weight.matrix() + bias)


def test_solving_for_the_aims_brings_back_the_dense_residual_stream(network, from_text, calibrator, run):
    model, feeds = _build(network, from_text), _data(2, 6)  # fewer tokens than channels: the aims can be met
    keep = feeds["attention_mask"] != 0
    assert keep.sum() <= WIDTH
    expected = network.values(_arrays(network), feeds)["Y"][keep]
    lost = {}
    for aimed in (False, True):
        model = _build(network, from_text)
        for step in calibrator(model, feeds).steps():
            for weight in step.weights:
                (inputs,) = step.inputs
                matrix = _halved(weight.name, weight.matrix()).astype(np.float64)
                if aimed and weight.name[:-1] in ("Wo", "Wd"):
                    aim = step.aims[weight.name]
                    bias = np.zeros(weight.shape[1])
                    if aim.target.bias is not None:
                        bias = aim.target.bias.const_value.numpy().astype(np.float64)
                    pull = aim.pull - inputs.count * np.outer(inputs.mean, bias)
                    matrix += np.linalg.pinv(inputs.gram, rcond=1e-7, hermitian=True) @ (
                        pull - inputs.gram @ matrix
                    )
                _put(weight, matrix)
        lost[aimed] = np.abs(run(model, feeds)["Y"][keep] - expected).max()
    assert lost[True] < 1e-2 < 0.1 < lost[False]


def test_padding_that_is_flattened_is_left_out_of_both_sides(from_text, calibrator):
    rng = np.random.default_rng(22)
    w = rng.standard_normal((6, 4)).astype(np.float32)
    model = from_text(
        """<ir_version: 9, opset_import: ["" : 17]>
        flat (float[b, s, 6] X, int64[b, s] attention_mask) => (float[n, 4] Y)
        { f = Reshape(X, shape) Y = Gemm<transB = 1>(f, W, bias) }""",
        W=np.ascontiguousarray(w.T),
        bias=np.arange(4, dtype=np.float32),
        shape=np.array([-1, 6]),
    )
    x = rng.standard_normal((4, 5, 6)).astype(np.float32)
    mask = (np.arange(5) < np.array([5, 2, 1, 4])[:, None]).astype(np.int64)
    (step,) = calibrator(model, {"X": x, "attention_mask": mask}, batch=2).steps()
    rows = x[mask != 0].astype(np.float64)
    _close(step.aims["W"].pull, rows.T @ (rows @ w + np.arange(4)))
    assert step.aims["W"].target.bias.name == "bias"


# -- graphs of other shapes


_PREFIX = '<ir_version: 9, opset_import: ["" : 17]> g '


def _square(*names: str, size: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(23)
    return {name: rng.standard_normal((size, size)).astype(np.float32) for name in names}


def _rows(count: int = 30, size: int = 5) -> np.ndarray:
    return np.random.default_rng(24).standard_normal((count, size)).astype(np.float32)


def _by_name(steps) -> dict[str, Step]:
    """All steps by weight, each weight halved at its turn."""
    found = {}
    for step in steps:
        found |= {weight.name: step for weight in step.weights}
        for weight in step.weights:
            _put(weight, _halved(weight.name, weight.matrix()))
    return found


def test_parallel_branches_count_as_residual_only_when_they_are_solved(from_text, calibrator):
    w = _square("A", "M", "P")
    model = from_text(
        f"""{_PREFIX} (float[n, 5] X) => (float[n, 5] Y) {{
        a = MatMul(X, A) m = MatMul(X, M) b = Add(X, a) c = Add(b, m) r = Relu(c) p = MatMul(r, P) Y = Add(p, c) }}""",
        **w,
    )
    x = _rows()
    found = _by_name(calibrator(model, {"X": x}).steps())
    assert found["A"] is found["M"]
    residual = {name: step.aims[name].target.residual for name, step in found.items()}
    assert residual["A"].name == "X"
    assert residual["M"] is None  # b is behind A, which changes in the same step
    assert residual["P"].name == "c"
    wide = x.astype(np.float64)
    _close(found["A"].aims["A"].pull, wide.T @ (wide @ w["A"]))
    _close(found["M"].aims["M"].pull, wide.T @ (wide @ w["M"]))
    c = wide + wide @ w["A"] + wide @ w["M"]
    now = wide + wide @ _halved("A", w["A"]) + wide @ _halved("M", w["M"])
    r = np.maximum(now, 0)
    _close(found["P"].aims["P"].pull, r.T @ (c + np.maximum(c, 0) @ w["P"] - now))


def test_a_sum_of_two_unsolved_layers_aims_the_second_at_the_sum(from_text, calibrator):
    w = _square("A", "M")
    model = from_text(
        f"""{_PREFIX} (float[n, 5] X) => (float[n, 5] Y)
        {{ r = Relu(X) a = MatMul(X, A) m = MatMul(r, M) Y = Add(m, a) }}""",
        **w,
    )
    found = _by_name(calibrator(model, {"X": _rows()}).steps())
    assert found["A"].aims["A"].target.residual is None
    assert found["M"].aims["M"].target.residual.name == "a"


def test_a_weight_used_on_two_values_sees_the_pruned_model_before_its_step(
    from_text, calibrator, assert_moments
):
    w = _square("V", "W", "U")
    model = from_text(
        f"""{_PREFIX} (float[n, 5] X) => (float[n, 5] Y)
        {{ a = MatMul(X, V) r = Relu(a) b = MatMul(r, W) s = Relu(b)
        c = MatMul(s, W) t = Relu(c) Y = MatMul(t, U) }}""",
        **w,
    )
    x = _rows().astype(np.float64)
    found = _by_name(calibrator(model, {"X": x.astype(np.float32)}).steps())
    assert found["W"].aims == {}
    r = np.maximum(x @ _halved("V", w["V"]), 0)
    assert_moments(found["W"].inputs[0], np.concatenate([r, np.maximum(r @ w["W"], 0)]))
    new = _halved("W", w["W"])
    t = np.maximum(np.maximum(r @ new, 0) @ new, 0)
    assert_moments(found["U"].inputs[0], t)  # nothing of the time before W's step is left
    dense = np.maximum(x @ w["V"], 0)
    dense = np.maximum(np.maximum(dense @ w["W"], 0) @ w["W"], 0) @ w["U"]
    _close(found["U"].aims["U"].pull, t.T @ dense)


def test_a_weight_used_twice_on_one_value_counts_it_once(from_text, calibrator, assert_moments):
    model = from_text(
        f"""{_PREFIX} (float[n, 5] X) => (float[n, 5] Y) {{ a = MatMul(X, W) b = MatMul(X, W) Y = Mul(a, b) }}""",
        **_square("W"),
    )
    (step,) = calibrator(model, {"X": _rows()}).steps()
    assert_moments(step.inputs[0], _rows().astype(np.float64))
    assert step.aims == {}


def test_outputs_of_the_graph_in_the_middle(from_text, calibrator):
    w = _square("A", "B")
    model = from_text(
        f"""{_PREFIX} (float[n, 5] X) => (float[n, 5] a, float[n, 5] s, float[n, 5] Y)
        {{ a = MatMul(X, A) s = Add(a, X) b = MatMul(s, B) Y = Add(b, s) }}""",
        **w,
    )
    found = _by_name(calibrator(model, {"X": _rows()}).steps())
    assert found["A"].aims["A"].target.residual is None  # a is read by the caller too
    assert found["A"].aims["A"].target.output.name == "a"
    assert found["B"].aims["B"].target.residual.name == "s"


def test_what_a_branch_takes_from_outside_is_run_and_kept(from_text, calibrator):
    w = _square("A", "B", "C")
    model = from_text(
        f"""{_PREFIX} (bool q, float[n, 5] X) => (float[n, 5] Y) {{
        a = MatMul(X, A) r = Relu(a) b = MatMul(r, B)
        i = If(q) <then_branch = t () => (float[n, 5] y) {{ y = Add(a, b) }},
                   else_branch = e () => (float[n, 5] z) {{ z = Identity(X) }}>
        c = MatMul(i, C) Y = Add(c, i) }}""",
        **w,
    )
    batches = [{"q": np.array(flag), "X": _rows() * scale} for flag, scale in ((True, 1), (False, 2))]
    batches = [{k: np.asarray(v) for k, v in feeds.items()} for feeds in batches]
    found = _by_name(calibrator(model, {}, samples=Samples.of(batches, "test")).steps())
    expected = np.zeros((5, 5))
    for feeds in batches:
        x = feeds["X"].astype(np.float64)
        old = x @ w["A"] + np.maximum(x @ w["A"], 0) @ w["B"] if feeds["q"] else x
        half = _halved("A", w["A"])
        new = x @ half + np.maximum(x @ half, 0) @ _halved("B", w["B"]) if feeds["q"] else x
        expected += new.T @ (old @ w["C"] + old - new)
    assert found["C"].aims["C"].target.residual.name == "i"
    _close(found["C"].aims["C"].pull, expected)


def test_an_initializer_that_is_an_input_too_keeps_its_value(from_text, calibrator):
    model = from_text(
        f"""{_PREFIX} (float[n, 5] X, float[5] shift) => (float[n, 5] Y)
        {{ a = Add(X, shift) b = MatMul(a, A) Y = MatMul(b, B) }}""",
        shift=np.full(5, 2, np.float32),
        **_square("A", "B"),
    )
    found = _by_name(calibrator(model, {"X": np.ones((30, 5), np.float32)}).steps())
    np.testing.assert_allclose(found["A"].inputs[0].mean, 3)


def test_a_residual_that_is_repeated_for_every_row_is_subtracted(from_text, calibrator):
    model = from_text(
        f"""{_PREFIX} (float[b, s, 5] X) => (float[b, s, 5] Y)
        {{ g = ReduceMax<axes = [1], keepdims = 1>(X) a = MatMul(X, A) Y = Add(a, g) }}""",
        **_square("A"),
    )
    x = _rows(24).reshape(4, 6, 5)
    (step,) = calibrator(model, {"X": x}, batch=2).steps()
    rows = x.reshape(-1, 5).astype(np.float64)
    assert step.aims["A"].target.residual.name == "g"
    _close(step.aims["A"].pull, rows.T @ (rows @ _square("A")["A"]))


def test_a_residual_that_repeats_the_layer_is_no_aim_and_that_is_said(from_text, calibrator):
    model = from_text(
        f"""{_PREFIX} (float[b, s, 5] X) => (float[b, s, 5] Y)
        {{ g = ReduceMax<axes = [1], keepdims = 1>(X) a = MatMul(g, A) Y = Add(X, a) }}""",
        **_square("A"),
    )
    said: list[str] = []
    (step,) = calibrator(model, {"X": _rows(24).reshape(4, 6, 5)}, said=said).steps()
    assert step.inputs[0].count == 4
    assert step.aims == {}
    assert any("A: its result is broadcast" in line for line in said)


def test_an_aim_that_is_not_finite_is_given_up(from_text, calibrator):
    model = from_text(
        f"""{_PREFIX} (float[n, 5] X) => (float[n, 5] Y)
        {{ z = Sub(X, X) i = Log(z) a = MatMul(X, A) Y = Add(a, i) }}""",
        **_square("A"),
    )
    said: list[str] = []
    (step,) = calibrator(model, {"X": _rows()}, said=said).steps()
    assert step.aims == {}
    assert any("not finite" in line for line in said)


def test_values_of_half_precision(from_text, calibrator, assert_moments):
    w = (_square("A")["A"] * 20).astype(np.float16)
    model = from_text(
        f"""{_PREFIX} (float16[n, 5] X) => (float16[n, 5] Y) {{ a = MatMul(X, A) Y = Add(a, X) }}""", A=w
    )
    x = (_rows(300) * 100).astype(np.float16)  # products overflow float16
    (step,) = calibrator(model, {"X": x}, batch=100).steps()
    rows = x.astype(np.float64)
    assert_moments(step.inputs[0], rows)
    assert np.abs(step.aims["A"].pull).max() > np.finfo(np.float16).max
    _close(step.aims["A"].pull, rows.T @ (rows @ w.astype(np.float64)), 2e-3)  # the model rounds its result


def test_a_difference_beyond_half_precision_is_an_aim_all_the_same(from_text, calibrator):
    eye = np.eye(2, dtype=np.float16)
    model = from_text(
        f"""{_PREFIX} (float16[n, 2] X) => (float16[n, 2] Y)
        {{ b = MatMul(X, B) r = Relu(X) a = MatMul(r, A) Y = Add(a, b) }}""",
        A=eye,
        B=eye * np.float16(4e4),
    )
    steps = calibrator(model, {"X": np.ones((20, 2), np.float16)}).steps()
    for weight in next(steps).weights:
        _put(weight, -weight.matrix())
    aim = next(steps).aims["A"]
    assert aim.target.residual.name == "b"
    np.testing.assert_allclose(aim.mean, 8e4, rtol=1e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(from_text, calibrator, run, assert_moments, groups):
    rng = np.random.default_rng(25)
    arrays = {
        "A": rng.standard_normal((4, 4 // groups, 3, 3)).astype(np.float32) / 6,
        "B": rng.standard_normal((4, 4 // groups, 3, 3)).astype(np.float32) / 6,
        "bias": rng.standard_normal(4).astype(np.float32),
    }
    model = from_text(
        f"""{_PREFIX} (float[n, 4, 6, 5] X) => (float[n, 4, 6, 5] Y) {{
        a = Conv<group = {groups}, pads = [1, 1, 1, 1]>(X, A) r = Relu(a)
        b = Conv<group = {groups}, pads = [1, 1, 1, 1]>(r, B, bias) Y = Add(X, b) }}""",
        **arrays,
    )
    x = rng.standard_normal((5, 4, 6, 5)).astype(np.float32)
    dense = run(model, {"X": x})["Y"]
    found = _by_name(calibrator(model, {"X": x}, batch=2).steps())
    for name, steps in found.items():
        assert len(steps.inputs) == groups, name
    aim = found["B"].aims["B"]
    assert (aim.target.residual.name, aim.target.bias.name) == ("X", "bias")
    columns = np.moveaxis(dense - x, 1, -1).reshape(-1, 4).astype(np.float64)
    _close(aim.mean, columns.mean(axis=0))
    # What the pruned convolution does must follow from its statistics: X'X W' + count · mean x bias'.
    after = np.moveaxis(run(model, {"X": x})["Y"] - x, 1, -1).reshape(-1, 4).astype(np.float64)
    (weight,) = found["B"].weights
    for index, inputs in enumerate(found["B"].inputs):
        part = slice(index * 4 // groups, (index + 1) * 4 // groups)
        own = weight.matrix().astype(np.float64)[:, part]
        _close(inputs.mean @ own + arrays["bias"][part], after[:, part].mean(axis=0), 1e-4)
    again = next(iter(calibrator(_restored(model, arrays), {"X": x}).steps()))
    for index, inputs in enumerate(again.inputs):
        part = slice(index * 4 // groups, (index + 1) * 4 // groups)
        own = again.weights[0].matrix().astype(np.float64)[:, part]
        _close(again.aims["A"].pull[:, part], inputs.gram @ own)


def _restored(model: ir.Model, arrays: Mapping[str, np.ndarray]) -> ir.Model:
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return model


# -- memory, files and messages


def test_memory_is_announced_and_few_tokens_are_warned_of(from_text, calibrator):
    network, said = NETWORKS["bert"], list[str]()
    tool: Calibrator = calibrator(_build(network, from_text), _data(), said=said)
    for step in tool.steps():
        assert step.aims.keys() == {weight.name for weight in step.weights}
    assert "calibration: 8 steps of 3 batches" in said[0]
    assert "memory about" in said[0]
    assert sum("warning" in line for line in said) == 8


@pytest.mark.parametrize(
    ("budget", "layout"), [(80 << 20, Layout.FULL), (30 << 20, Layout.BLOCKS), (1 << 20, Layout.DIAGONAL)]
)
def test_sums_that_do_not_fit_are_cut_down_and_then_there_is_no_aim(from_text, calibrator, budget, layout):
    model = from_text(
        f"{_PREFIX} (float[n, 2100] X) => (float[n, 2] Y) {{ Y = MatMul(X, W) }}",
        W=np.ones((2100, 2), np.float32),
    )
    said: list[str] = []
    x = _rows(6, 2100)
    (step,) = calibrator(model, {"X": x}, batch=2, memory_budget=budget, said=said).steps()
    assert bool(step.aims) == (layout is Layout.FULL)
    assert [line for line in said if "statistics instead" in line] == [
        line for line in said if f"{layout} statistics instead" in line
    ]
    assert any("statistics instead" in line for line in said) == (layout is not Layout.FULL)
    np.testing.assert_allclose(step.inputs[0].diagonal, (x.astype(np.float64) ** 2).sum(axis=0), rtol=1e-5)


def test_too_little_memory_is_one_message(from_text, calibrator):
    model = from_text(
        f"{_PREFIX} (float[n, 2100] X) => (float[n, 2] Y) {{ Y = MatMul(X, W) }}",
        W=np.ones((2100, 2), np.float32),
    )
    with pytest.raises(HostError, match="too little memory for X"):
        calibrator(model, {"X": _rows(6, 2100)}, memory_budget=20_000).steps()


def test_scratch_files_go_when_no_later_step_reads_them(network, from_text, calibrator, tmp_path):
    counts = []
    for step in calibrator(_build(network, from_text), _data(), batch=10).steps():
        counts.append(len(list(tmp_path.glob("streams-*/*.npy"))))
        assert step.weights
    assert max(counts) <= 12
    assert counts[-1] == 0
    assert list(tmp_path.iterdir()) == []
    steps = calibrator(_build(network, from_text), _data()).steps()
    next(steps)
    assert list(tmp_path.iterdir()) != []
    del steps  # given up
    assert list(tmp_path.iterdir()) == []


def test_nothing_holds_the_sums_of_a_step_that_the_caller_has_dropped(from_text, calibrator):
    model = _build(NETWORKS["bert"], from_text)
    steps = calibrator(model, _data()).steps()
    for _ in range(3):
        step = next(steps)
        sums = [weakref.ref(step.inputs[0]), *map(weakref.ref, step.aims.values())]
        del step
        assert [reference() for reference in sums] == [None] * len(sums)


def test_the_dense_model_is_that_of_the_call(from_text, calibrator):
    w = _square("A", "B")
    model = from_text(
        f"{_PREFIX} (float[n, 5] X) => (float[n, 5] Y) {{ a = MatMul(X, A) Y = MatMul(a, B) }}", **w
    )
    x = _rows().astype(np.float64)
    steps = calibrator(model, {"X": x.astype(np.float32)}).steps()
    model.graph.initializers["A"].const_value = ir.tensor(_halved("A", w["A"]), name="A")
    first, second = steps
    _close(first.aims["A"].pull, x.T @ x @ w["A"])
    a = x @ _halved("A", w["A"])
    _close(second.aims["B"].pull, a.T @ (x @ w["A"] @ w["B"]))


def test_a_model_without_linears_has_no_steps(from_text, calibrator):
    model = from_text(f"{_PREFIX} (float[n, 5] X) => (float[n, 5] Y) {{ Y = Relu(X) }}")
    assert list(calibrator(model, {"X": _rows()}).steps()) == []
