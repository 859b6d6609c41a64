"""What rounding does to the output of a layer: weights on grids of few bits, alone and behind pruning, and inputs.

Errors are the root of the mean over output channels of ‖XW − Y‖² / ‖XW‖², those without output left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.errors import UsageError
from sparse_onnx.model.graph import Names
from sparse_onnx.model.weights import LINEARS, Weight
from sparse_onnx.passes.calibration.skeleton import PartSession
from sparse_onnx.passes.prune.allocation import pruned_columns
from sparse_onnx.passes.quantize.by_bits import UsualGrid
from sparse_onnx.passes.solvers import InputStatistics, refit
from sparse_onnx.passes.solvers.auto_quantizer import AutoQuantizer
from sparse_onnx.passes.solvers.grid import GridOptions
from sparse_onnx.passes.solvers.quantizer import Rounding, output_errors

__all__ = ["RoundedInputs", "added_by_bits", "rounded_inputs"]

_SWEEPS = 2
"""Of the descent behind error feedback: more of them gain a hundredth."""
_DAMPING = 0.01  # as of quant.weight
_FITTED = 1e-3  # of the right-hand side
_TINY = 1e-30  # instead of a scale of 0


def added_by_bits(
    W: np.ndarray, statistics: InputStatistics, grids: Mapping[int, UsualGrid], sparsities: Sequence[float]
) -> dict[int, tuple[float, ...]]:
    """What ``auto`` on each of ``grids`` adds in squares to the error of W [K, N] without zeros, and then with each of
    ``sparsities``: by the keys of ``grids``, the roots.

    Up to 64 output channels are solved for, those of all sparsities side by side: as behind pruning in one compilation,
    aimed at the weight before it, which what is left was fitted to.
    """
    part, changes = pruned_columns(W, statistics, np.array(sparsities))
    fitted = [
        refit(part, statistics, change != part, damping=_DAMPING, start=part - change, tolerance=_FITTED)
        for change in changes
    ]
    start = np.concatenate([part, *fitted], axis=1)
    aim = np.tile(part, (1, 1 + len(changes)))
    problem = Rounding(aim, start, None, statistics.gram)
    energy = output_errors(problem, np.zeros_like(aim))
    before = output_errors(problem, start)
    found = {}
    for bits, grid in grids.items():
        if grid.group_size > len(W):
            continue
        options = GridOptions(grid.bits, grid.group_size, grid.symmetric, "float16")
        solver = AutoQuantizer(grid=options, damping=_DAMPING, sweeps=_SWEEPS)
        try:
            rounded = solver.solve(start, statistics, target=aim).matrix()
        except UsageError:  # a scale that is too large for its type: quant.weight leaves the weight alone
            continue
        after = output_errors(problem, rounded)
        added = _shares(after - before, energy).reshape(1 + len(changes), -1)
        found[bits] = tuple(map(float, np.sqrt(np.maximum(added.mean(axis=1), 0))))
    return found


def _shares(lost: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """``lost`` / ``energy`` of the channels with energy; a zero where there is none."""
    return np.where(energy > 0, lost / np.where(energy > 0, energy, 1), 0)


@dataclasses.dataclass(frozen=True)
class RoundedInputs:
    """The error of a layer whose input is rounded to 8 bits: with one scale for all of it (``whole``) or for every
    vector (``tokens``), or the inputs of a vector in blocks with a scale each (``blocks``, by their size)."""

    whole: float
    tokens: float
    blocks: Mapping[int, float]


def rounded_inputs(
    model: ir.Model,
    weights: Sequence[Weight],
    batches: Sequence[Feeds],
    sizes: Sequence[int],
    *,
    threads: int,
) -> dict[str, RoundedInputs]:
    """Of every linear of the main graph among ``weights``, by running ``model`` once on ``batches``: beside it is
    computed what rounding the input changes, whole as ONNX Runtime does, by vector, and in blocks of these ``sizes``.
    """
    copy = model.clone()
    probe = _Probe(copy)
    names = {weight.name: probe.watch(weight, sizes) for weight in weights}
    outputs = [name for own in names.values() for name in own]
    inputs = [value.name or "" for value in copy.graph.inputs if value.name in batches[0]]
    sums = dict.fromkeys(outputs, np.zeros(()))
    with PartSession(copy, inputs, outputs, batches[0], threads=threads) as session:
        for feeds in batches:
            for name, values in session.run({name: feeds[name] for name in inputs}).items():
                sums[name] = sums[name] + values.astype(np.float64)
    found = {}
    for name, own in names.items():
        if own:
            energy, *lost = (sums[output] for output in own)
            whole, tokens, *blocks = (float(np.sqrt(_mean_share(each, energy))) for each in lost)
            found[name] = RoundedInputs(whole, tokens, dict(zip(sizes, blocks, strict=True)))
    return found


def _mean_share(lost: np.ndarray, energy: np.ndarray) -> float:
    loud = energy > 0
    return float(np.mean(lost[loud] / energy[loud])) if loud.any() else 0.0


class _Probe:
    """Adds nodes behind those of ``model``."""

    def __init__(self, model: ir.Model) -> None:
        self._graph, self._names = model.graph, Names(model)
        self._moved: dict[tuple[str, int], list[ir.Value]] = {}

    def watch(self, weight: Weight, sizes: Sequence[int]) -> tuple[str, ...]:
        """The names of new outputs [N]: the energy of the product of ``weight``, and of its changes when the input is
        rounded, whole, by vector and in blocks; none for what is no linear of floats."""
        value = self._graph.initializers.get(weight.name)
        uses = [] if value is None else [use.node for use in value.uses() if use.node.op_type in LINEARS]
        if not uses or uses[0].graph is not self._graph or weight.dtype != ir.DataType.FLOAT:
            return ()
        x, (K, N) = uses[0].inputs[0], weight.shape
        assert x is not None
        flat = self._node("Reshape", x, self._ints(-1, K))
        key = x.name or "", K
        if key not in self._moved:
            blocks = [self._change_in_blocks(flat, K, size) for size in (K, *sizes)]
            self._moved[key] = [self._change(flat), *blocks]
        return tuple(self._energy(uses[0], moved, N) for moved in (flat, *self._moved[key]))

    def _change(self, x: ir.Value) -> ir.Value:
        """What is lost of x [rows, K] with one scale, by ONNX Runtime's own operator."""
        integers, scale, zero_point = self._nodes("DynamicQuantizeLinear", [x], 3)
        return self._node("Sub", x, self._node("DequantizeLinear", integers, scale, zero_point))

    def _change_in_blocks(self, x: ir.Value, inputs: int, size: int) -> ir.Value:
        """The same with a scale for every ``size`` inputs of a row, for integers from -127 to 127."""
        rest = -inputs % size
        padded = self._node("Pad", x, self._ints(0, 0, 0, rest)) if rest else x
        blocks = self._node("Reshape", padded, self._ints(-1, (inputs + rest) // size, size))
        largest = self._node("GlobalMaxPool", self._node("Abs", blocks))
        scale = self._node("Div", self._node("Max", largest, self._float(_TINY)), self._float(127.0))
        rounded = self._node("Mul", self._node("Round", self._node("Div", blocks, scale)), scale)
        change = self._node("Reshape", self._node("Sub", blocks, rounded), self._ints(-1, inputs + rest))
        if not rest:
            return change
        return self._node("Slice", change, self._ints(0), self._ints(inputs), self._ints(1))

    def _energy(self, node: ir.Node, x: ir.Value, outputs: int) -> str:
        """‖x w‖² of every output channel of the linear ``node``, without its bias."""
        operand = node.inputs[1]
        assert operand is not None
        product = self._nodes(node.op_type, [x, operand], 1, dict(node.attributes))[0]
        flat = self._node("Reshape", product, self._ints(-1, outputs))
        found = self._nodes(
            "ReduceSum",
            [self._node("Mul", flat, flat), self._ints(0)],
            1,
            {"keepdims": ir.AttrInt64("keepdims", 0)},
        )[0]
        found.type = ir.TensorType(ir.DataType.FLOAT)
        return found.name or ""

    def _node(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        return self._nodes(op_type, inputs, 1)[0]

    def _nodes(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        outputs: int,
        attributes: Mapping[str, ir.Attr] | None = None,
    ) -> Sequence[ir.Value]:
        names = [self._names.new(f"probe.{op_type}") for _ in range(outputs)]
        node = ir.node(
            op_type,
            inputs,
            dict(attributes or {}),
            outputs=[ir.Value(name=name) for name in names],
            name=names[0],
        )
        self._graph.append(node)
        return node.outputs

    def _ints(self, *values: int) -> ir.Value:
        return self._nodes("Constant", [], 1, {"value_ints": ir.AttrInt64s("value_ints", values)})[0]

    def _float(self, value: float) -> ir.Value:
        return self._nodes("Constant", [], 1, {"value_float": ir.AttrFloat32("value_float", value)})[0]
