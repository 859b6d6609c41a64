"""Cut a model into blocks that run one after another: where few values pass from the first part to the second.

A cut lies between two nodes in topological order. What passes it is counted without *context*: values that depend on
no calibrated weight and are no layer's input, such as masks, positions and shapes, which every block may read. In a
residual network the sweep finds the residual stream, one value at a time. Where no single value carries all, as under
skip connections, a block with many weights is cut at several values.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import onnx_ir as ir

from sparse_onnx.model.graph import is_standard, read_values, subgraphs
from sparse_onnx.model.weights import Weight

__all__ = ["Block", "Cutter"]

_MANY_WEIGHTS = 16  # in one block: more are cut further, at up to
_MOST_VALUES = 8  # values


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive nodes of a model.

    ``inputs`` are the values that they read from before, inputs of the model included; ``outputs`` those that later
    blocks read, none for the last block. ``weight_bytes`` are the bytes of their initializers.
    """

    weights: tuple[Weight, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_bytes: int


class Cutter:
    """The ways to cut ``model`` into blocks for ``weights``, all of whose nodes lie in the main graph.

    Nodes are taken in the order in which they stand, which ONNX wants to be topological.
    """

    def __init__(self, model: ir.Model, weights: Sequence[Weight]) -> None:
        self._nodes = list(model.graph)
        place = {id(node): index for index, node in enumerate(self._nodes)}
        spans = []
        for weight in weights:
            places = [place[id(node)] for node in weight.nodes]
            spans.append((min(places), max(places), weight))
        self._spans = sorted(spans, key=lambda span: span[:2])
        self._end = max((last for _, last, _ in spans), default=-1) + 1
        self._crossing = self._count_crossing(model.graph.inputs)
        self.cuts = tuple(self._choose(self._candidates()))

    def blocks(self, fits: Callable[[Block], bool] = lambda _block: False) -> list[Block]:
        """The blocks between all cuts, neighbours put together as long as the result ``fits``."""
        bounds = [0, *self.cuts, self._end]
        blocks: list[Block] = []
        start = 0
        for end, following in itertools.zip_longest(bounds[1:], bounds[2:]):
            if following is None or not fits(self._block(start, following)):
                blocks.append(self._block(start, end))
                start = end
        return blocks

    def _count_crossing(self, inputs: Sequence[ir.Value]) -> list[int]:
        """For each position p, how many values that are no context pass from the nodes before p to p and later."""
        weight_nodes = {id(node) for _, _, weight in self._spans for node in weight.nodes}
        # Ids of the values that count: those that depend on a weight, and layers' inputs, lest q and k be parted.
        counted = {id(node.inputs[0]) for _, _, weight in self._spans for node in weight.nodes}
        made = {
            id(value): (0, 1) for value in inputs
        }  # position behind the producer, and what the value counts
        last_use: dict[int, int] = {}
        for index, node in enumerate(self._nodes):
            reads = list(read_values(node))
            last_use.update((id(value), index) for value in reads)
            depends = id(node) in weight_nodes or any(id(value) in counted for value in reads)
            for value in node.outputs:
                tensor = value.type is None or isinstance(value.type, ir.TensorType)
                if not tensor or (depends and not is_standard(node, "Shape", "Size")):
                    counted.add(id(value))
                made[id(value)] = (index + 1, 1 if tensor else _MOST_VALUES + 1)  # sequences cannot pass
        steps = [0] * (len(self._nodes) + 1)
        for key in counted & made.keys() & last_use.keys():
            start, count = made[key]
            steps[start] += count
            steps[last_use[key] + 1] -= count
        return list(itertools.accumulate(steps))

    def _candidates(self) -> Iterator[tuple[int, int]]:
        """(position, values that pass) of the best place between each two neighbouring weights, if there is one.

        The users of one weight stay in one block: its statistics need all of them before it is solved.
        """
        reach = -1
        for (_, last, _), (first, _, _) in itertools.pairwise(self._spans):
            reach = max(reach, last)
            if reach < first:
                yield min(
                    ((position, self._crossing[position]) for position in range(first, reach, -1)),
                    key=lambda candidate: candidate[1],
                )

    def _choose(self, candidates: Iterable[tuple[int, int]]) -> list[int]:
        """Positions where one value passes; between those that are far apart, positions with ever more values."""
        known = list(candidates)
        chosen: set[int] = set()
        for limit in range(1, _MOST_VALUES + 1):
            bounds = [0, *sorted(chosen), self._end]
            for start, end in itertools.pairwise(bounds):
                weights = sum(start <= first < end for first, _, _ in self._spans)
                if limit == 1 or weights > _MANY_WEIGHTS:
                    chosen.update(p for p, count in known if start < p < end and count <= limit)
        return sorted(chosen)

    def _block(self, start: int, end: int) -> Block:
        nodes = self._nodes[start:end]
        made = {id(value) for node in nodes for value in node.outputs}
        inputs: dict[str, None] = {}
        constants: dict[int, int] = {}
        inside = {id(v) for n in nodes for g in subgraphs(n) for i in g.all_nodes() for v in i.outputs}
        for node in nodes:
            own = {
                id(value)
                for graph in _nested(node)
                for value in (*graph.inputs, *graph.initializers.values())
            }
            for value in read_values(node):
                if value.const_value is not None and value.is_initializer():
                    constants[id(value)] = value.const_value.nbytes
                elif id(value) not in made and id(value) not in inside and id(value) not in own:
                    inputs[value.name or ""] = None
        later = {id(value) for node in self._nodes[end : self._end] for value in read_values(node)}
        outputs = [v.name or "" for node in nodes for v in node.outputs if id(v) in later]
        weights = tuple(weight for first, _, weight in self._spans if start <= first < end)
        return Block(weights, tuple(inputs), tuple(outputs), sum(constants.values()))


def _nested(node: ir.Node) -> Iterator[ir.Graph]:
    for graph in subgraphs(node):
        yield graph
        for inner in graph.all_nodes():
            yield from subgraphs(inner)
