"""A small transformer encoder as an ONNX graph, and the same in float64 NumPy with the inputs of its layers."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from sparse_onnx.data.inputs import Feeds, input_specs, split_batches
from sparse_onnx.data.samples import Samples
from sparse_onnx.model.weights import find_weights
from sparse_onnx.passes.calibration import Calibrator, Options

LAYERS, VOCABULARY, WIDTH, HIDDEN = 2, 50, 16, 40

_LAYER = """
q{i} = MatMul(h{i}, Wq{i}) k{i} = MatMul(h{i}, Wk{i}) v{i} = MatMul(h{i}, Wv{i})
kt{i} = Transpose<perm = [0, 2, 1]>(k{i}) s{i} = MatMul(q{i}, kt{i}) z{i} = Mul(s{i}, scale) m{i} = Add(z{i}, bias)
p{i} = Softmax<axis = -1>(m{i}) c{i} = MatMul(p{i}, v{i}) o{i} = MatMul(c{i}, Wo{i}) r{i} = Add(h{i}, o{i})
n{i} = LayerNormalization<axis = -1>(r{i}, gain) u{i} = MatMul(n{i}, Wu{i}) a{i} = Relu(u{i}) d{i} = MatMul(a{i}, Wd{i})
t{i} = Add(n{i}, d{i}) h{j} = LayerNormalization<axis = -1>(t{i}, gain)
"""
_HEAD = """<ir_version: 9, opset_import: ["" : 17]>
encoder (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask)
  => (float[batch, sequence, %d] Y) {
h0 = Gather(table, input_ids) cast = Cast<to = 1>(attention_mask) off = Sub(one, cast) big = Mul(off, far)
bias = Unsqueeze(big, axes)
"""

SHAPES = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH)}
SHAPES |= {"u": (WIDTH, HIDDEN), "d": (HIDDEN, WIDTH)}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The model, and ``inputs(feeds)``: the input of every layer by its weight's name, in float64."""

    model: ir.Model
    weights: Mapping[str, np.ndarray]

    def inputs(self, feeds: Feeds, weights: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        w = {name: array.astype(np.float64) for name, array in (weights or self.weights).items()}
        h = w["table"][feeds["input_ids"]]
        bias = ((1.0 - feeds["attention_mask"]) * -1e4)[:, None, :]
        seen = {}
        for i in range(LAYERS):
            seen |= {f"W{name}{i}": h for name in "qkv"}
            scores = (h @ w[f"Wq{i}"]) @ (h @ w[f"Wk{i}"]).transpose(0, 2, 1) * 0.25 + bias
            p = np.exp(scores - scores.max(-1, keepdims=True))
            c = p / p.sum(-1, keepdims=True) @ (h @ w[f"Wv{i}"])
            n = _norm(h + c @ w[f"Wo{i}"])
            a = np.maximum(n @ w[f"Wu{i}"], 0)
            h = _norm(n + a @ w[f"Wd{i}"])
            seen |= {f"Wo{i}": c, f"Wu{i}": n, f"Wd{i}": a}
        return seen

    def rows(self, feeds: Feeds, weights: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The rows of tokens that are no padding."""
        keep = feeds["attention_mask"] != 0
        return {name: x[keep] for name, x in self.inputs(feeds, weights).items()}


def _norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


@pytest.fixture
def encoder() -> Encoder:
    rng = np.random.default_rng(0)
    weights = {"table": rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)}
    for i in range(LAYERS):
        for name, shape in SHAPES.items():
            weights[f"W{name}{i}"] = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
    text = (
        _HEAD % WIDTH
        + "".join(_LAYER.format(i=i, j=i + 1) for i in range(LAYERS))
        + f"Y = Identity(h{LAYERS}) }}"
    )
    proto = onnx.parser.parse_model(text)
    small = {
        "scale": np.float32(0.25),
        "one": np.float32(1),
        "far": np.float32(-1e4),
        "axes": np.array([1]),
        "gain": np.ones(WIDTH, np.float32),
    }
    for name, array in (weights | small).items():
        proto.graph.initializer.append(ir.serde.serialize_tensor(ir.tensor(np.asarray(array), name=name)))
    onnx.checker.check_model(proto)
    return Encoder(ir.from_proto(proto), weights)


@pytest.fixture
def tokens() -> Feeds:
    """12 samples of up to 9 tokens."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 10, 12)
    return {
        "input_ids": rng.integers(0, VOCABULARY, (12, 9)),
        "attention_mask": (np.arange(9) < lengths[:, None]).astype(np.int64),
    }


@pytest.fixture
def calibrator(tmp_path: Path) -> Callable[..., Calibrator]:
    """A calibrator of all weights of a model, on data cut into batches; said lines go to ``said``."""

    def make(
        model: ir.Model,
        data: Feeds,
        *,
        batch: int = 4,
        said: list[str] | None = None,
        samples: Samples | None = None,
        **options: object,
    ) -> Calibrator:
        weights, _ = find_weights(model)
        specs = input_specs(model)
        samples = samples or Samples.of(split_batches(data, specs, batch, "test"), "test")
        chosen = Options(threads=1, **options)  # type: ignore[arg-type]
        say = (said if said is not None else []).append
        return Calibrator(model, weights, samples, chosen, work=tmp_path, progress=say)

    return make


def _assert_moments(found, rows: np.ndarray, tolerance: float = 1e-5) -> None:
    """``found`` (InputStatistics with a whole Gram) are those of ``rows`` [n, K], to a relative tolerance."""
    gram = rows.T @ rows
    assert found.count == len(rows)
    assert np.abs(found.gram - gram).max() <= tolerance * np.abs(gram).max()
    assert np.abs(found.mean - rows.mean(axis=0)).max() <= tolerance * np.abs(rows).max()


@pytest.fixture
def assert_moments() -> Callable[..., None]:
    return _assert_moments
