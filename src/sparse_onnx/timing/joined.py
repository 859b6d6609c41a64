"""Whether operators of ours are faster as one, on this machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.model.byte_weights import byte_weight
from sparse_onnx.passes.lower.guard import Guard
from sparse_onnx.timing.choose import Bench
from sparse_onnx.timing.layers import cut_layer, time_pair
from sparse_onnx.timing.rounds import Ratio, overall, repeat

__all__ = ["JoinGuard"]

_ROUNDS, _ROUNDS_SECONDS, _SECONDS = 9, 0.3, 3.0


@dataclasses.dataclass(frozen=True)
class JoinGuard(Guard):
    """Times operators apart and as one, both with the library, at the shapes that they have in the model.

    Attributes:
        bench: How; equal ones are timed once.
        targets: The shapes of the layers' inputs, by the name of the value, for each target.
        weights: A number for each target; None: the worst one decides.
    """

    bench: Bench
    targets: Sequence[Mapping[str, tuple[int, ...]]]
    weights: Sequence[float] | None = None

    def __call__(
        self,
        model: ir.Model,
        nodes: Sequence[ir.Node],
        outputs: Sequence[ir.Value],
        join: Callable[[ir.Model], object],
    ) -> str:
        """Why ``nodes``, which make ``outputs`` of one input and constants, stay apart; empty if they do not. ``join``
        makes one operator of them in a model that has nothing else.

        What cannot be timed, because its input is none of a layer, is not held back.
        """
        x = nodes[0].inputs[0]
        inside = {value for node in nodes for value in node.outputs}
        read = {
            value
            for node in nodes
            for value in node.inputs
            if value is not None and value.const_value is None
        }
        if x is None or read - inside != {x} or any(x.name not in shapes for shapes in self.targets):
            return ""
        name = x.name or ""
        timings = [self._timed(model, nodes, outputs, x, shapes[name], join) for shapes in self.targets]
        if not timings:
            return ""
        found, _ = overall(timings, self.weights)
        if found.high >= 1:
            return ""
        return f"is slower as one operator: {found.median:.2f}x ({found.low:.2f} to {found.high:.2f})"

    def _timed(
        self,
        model: ir.Model,
        nodes: Sequence[ir.Node],
        outputs: Sequence[ir.Value],
        x: ir.Value,
        shape: tuple[int, ...],
        join: Callable[[ir.Model], object],
    ) -> Ratio:
        key = {"joined": [_kind(node) for node in nodes], "input": shape} | self.bench.environment
        if (known := self.bench.cache.get(key)) is not None:
            return known
        bench = self.bench.workbench
        bench.progress(f"timing {outputs[0].name} as one operator")
        apart, feeds = cut_layer(model, [x], outputs, [shape])
        joined = apart.clone()
        join(joined)

        def once() -> dict[str, Ratio]:
            pair = time_pair(
                [apart, joined],
                [True, True],
                feeds,
                threads=bench.threads,
                work=bench.work,
                rounds=_ROUNDS,
                seconds=_ROUNDS_SECONDS,
            )
            return {"": pair}

        timing = repeat(once, close=lambda found: found[""].close_to(1), seconds=_SECONDS)[""]
        self.bench.cache.put(key, timing)
        return timing


def _kind(node: ir.Node) -> list[object]:
    """What the time of a node depends on."""
    weight = byte_weight(node)
    kept = 1.0 if weight is None else weight.tensors[0].size / math.prod(weight.shape)
    attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
    return [node.op_type, attributes, f"{kept:.2f}"]
