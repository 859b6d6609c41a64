"""How far rounding alone moves the outputs of a dense model: what a compiled one may differ by, whatever the threshold.

Two float32 programs that compute the same differ by rounding, and where a value is what cancellation left, or the far
tail of a sigmoid, by much of it. So an error above the threshold is held against what stock ONNX Runtime makes of the
dense model itself:

- without its graph optimizations, which sum and fuse in another order;
- with the rounding of every layer drawn anew (Parker 1997, Monte Carlo arithmetic): each weight w of a layer becomes
  w (1 ± ε), each layer's output y becomes y (1 ± ε), and the output of a bounded activation y ± ε, of a gated one
  y ± ε x, since these are computed to that absolute precision, however near to zero they come. ε is that of float32.

Weights of a layer stand in the same relation to each other before and after compiling, so a wrong one shows as soon as
it moves an output by more than a few times its rounding.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.document import Level
from sparse_onnx.errors import UsageError, VerificationError
from sparse_onnx.model import model_io
from sparse_onnx.model.graph import add_initializer, value_names
from sparse_onnx.running.recording import record
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.verification.comparison import Difference, compare

__all__ = ["MARGIN", "Rounding", "exceeding", "measure_rounding", "perturbed"]

MARGIN = 8
"""A compiled model may differ from the dense one by so many times what that differs from itself by: other kernels sum
in another order and approximate activations by other polynomials."""

_EPSILON = float(np.finfo(np.float32).eps)
_ABSOLUTE = _EPSILON / 4  # what values around 1/2, near which such functions are evaluated, are rounded to
_SEEDS = (0, 1, 2)

_LINEAR = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_NORMS = ("LayerNormalization", "RMSNormalization", "BatchNormalization", "InstanceNormalization", "Softmax")
_BOUNDED = ("Sigmoid", "Tanh", "Erf", "HardSigmoid", "Softsign")
_GATED = ("Gelu", "FastGelu", "QuickGelu", "Silu", "Swish", "HardSwish", "Mish", "BiasGelu")


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What rounding moves one output by: ``relative`` is ‖moved − reference‖ / ‖reference‖, ``absolute`` the largest
    difference of an element."""

    relative: float
    absolute: float

    def allows(self, found: Difference, threshold: float) -> bool:
        """Whether ``found`` is at most ``threshold`` or explained by rounding. Of a reference that is zero, where no
        error is relative to anything, by the largest difference."""
        if not np.isfinite(found.max_abs):
            return False
        if np.isinf(self.relative):
            return found.relative_error <= threshold or found.max_abs <= MARGIN * self.absolute
        return found.relative_error <= max(threshold, MARGIN * self.relative)


_NONE = Rounding(0.0, 0.0)


def exceeding(found: Difference, threshold: float, rounding: Mapping[str, Rounding]) -> list[Difference]:
    """The outputs whose error is above ``threshold`` and not explained by ``rounding``, the largest error first."""
    beyond = [
        output
        for output in found.outputs
        if not rounding.get(output.worst_output, _NONE).allows(output, threshold)
    ]
    return sorted(beyond, key=lambda output: -output.relative_error)


def measure_rounding(
    dense: ir.Model,
    batches: Sequence[Feeds],
    bench: Workbench,
) -> dict[str, Rounding]:
    """What rounding moves every output of ``dense`` by, on ``batches``; see the module's docstring.

    A model that ONNX Runtime cannot run in one of these ways is not run in it.
    """
    bench.progress("running the dense model against itself: what rounding makes of the outputs")
    folder, quiet = bench.work / "rounding", bench.quietly()
    folder.mkdir()
    found: dict[str, Rounding] = {}
    try:
        reference, _ = record(dense, None, batches, folder / "reference", quiet, library=False)
        with model_io.Spool(folder) as spool:
            ways: list[tuple[ir.Model, Level]] = [
                (dense, "disabled"),
                *((perturbed(dense, spool.put, seed), "all") for seed in _SEEDS),
            ]
            for number, (model, level) in enumerate(ways):
                try:
                    moved, _ = record(
                        model, None, batches, folder / str(number), quiet, library=False, level=level
                    )
                    outputs = compare(reference, moved).outputs
                except (UsageError, VerificationError) as error:
                    bench.progress(f"the dense model cannot be run against itself in one way: {error}")
                    continue
                for output in outputs:
                    before = found.get(output.worst_output, _NONE)
                    if np.isfinite(output.max_abs):  # else NaN came and went, which is no measure
                        found[output.worst_output] = Rounding(
                            max(before.relative, output.relative_error), max(before.absolute, output.max_abs)
                        )
                del moved
        del reference
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def perturbed(
    dense: ir.Model, store: Callable[[np.ndarray, str], ir.TensorProtocol], seed: int = 0
) -> ir.Model:
    """A copy of ``dense`` with the rounding of every layer drawn anew; see the module's docstring. Values keep their
    names. ``store`` takes each new weight with its name, see :class:`sparse_onnx.model.storage.Spool`."""
    return _Perturbed(dense, store, np.random.default_rng(seed)).model


class _Perturbed:
    """The copy while it is made."""

    def __init__(
        self,
        dense: ir.Model,
        store: Callable[[np.ndarray, str], ir.TensorProtocol],
        rng: np.random.Generator,
    ) -> None:
        self.model, self._store, self._rng = dense.clone(), store, rng
        self._taken = value_names(self.model)
        weights: dict[str, ir.Value] = {}
        for node in list(self.model.graph):
            layer = node.op_type in _LINEAR or node.domain.startswith(DOMAIN)
            if layer:
                weights |= {v.name or "": v for v in node.inputs if v is not None and v.is_initializer()}
            if layer or node.op_type in (*_NORMS, *_BOUNDED, *_GATED):
                self._move_output(node)
        for value in weights.values():
            self._move_weight(value)

    def _move_weight(self, value: ir.Value) -> None:
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            return
        array = tensor.numpy()
        signs = self._rng.integers(0, 2, array.shape, np.int8).astype(np.float32) * 2 - 1
        with np.errstate(over="ignore", invalid="ignore"):
            moved = array * (1 + np.float32(_EPSILON) * signs)
        del array
        model_io.release_mapping(tensor)
        value.const_value = self._store(moved, value.name or "")

    def _move_output(self, node: ir.Node) -> None:
        """y (1 ± ε), and what is added to it, in the place of y, the first output of ``node``."""
        y = node.outputs[0]
        if y.dtype not in (None, ir.DataType.FLOAT) or not y.name:
            return
        name, y.name = y.name, self._name(f"{y.name}.exact")
        first = self._insert("Mul", y, self._scalar(1 + self._drawn()), node)
        moved = first.outputs[0]
        if node.op_type in _BOUNDED:
            moved = self._insert("Add", moved, self._scalar(self._drawn(_ABSOLUTE)), first).outputs[0]
        elif node.op_type in _GATED and node.inputs[0] is not None:
            part = self._insert("Mul", node.inputs[0], self._scalar(self._drawn(_ABSOLUTE)), first)
            moved = self._insert("Add", moved, part.outputs[0], part).outputs[0]
        for use in list(y.uses()):
            if use.node is not first:
                use.node.replace_input_with(use.idx, moved)
        for index, output in enumerate(self.model.graph.outputs):
            if output is y:
                self.model.graph.outputs[index] = moved
        moved.name, moved.shape, moved.type = name, y.shape, y.type

    def _drawn(self, size: float = _EPSILON) -> float:
        return size * float(self._rng.choice((-1, 1)))

    def _insert(self, op_type: str, a: ir.Value, b: ir.Value, behind: ir.Node) -> ir.Node:
        node = ir.node(op_type, [a, b])
        node.outputs[0].name = self._name("sparse_onnx.moved")
        self.model.graph.insert_after(behind, node)
        return node

    def _scalar(self, number: float) -> ir.Value:
        name = self._name("sparse_onnx.rounding")
        return add_initializer(self.model.graph, name, ir.tensor(np.array(number, np.float32), name=name))

    def _name(self, wanted: str) -> str:
        name, count = wanted, len(self._taken)
        while name in self._taken:
            name, count = f"{wanted}.{count}", count + 1
        self._taken.add(name)
        return name
