"""When each node is run if the layers of a model are solved step by step, and which values wait for later steps.

Every node that depends on the data is run once: in the part before the first step that wants something behind it. What
later parts read of it is kept. A node behind a layer that is not solved yet would go stale: it is run again
when it is wanted again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.model.graph import is_standard, read_values

__all__ = ["Order", "Part"]

_CONSTANT, _DATA = -2, -1  # in place of a step: no input of the model is behind a value, or no layer

_NO_ARRAYS = (
    "Optional",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceMap",
    "SplitToSequence",
)  # their results are no tensors


@dataclasses.dataclass(frozen=True)
class Part:
    """What is run of a model before one step, by the names of values of the main graph.

    ``inputs`` are inputs of the model and values that earlier parts have kept; ``outputs`` what is computed.
    ``kept`` are those outputs that later parts read, and ``needed`` all values that later parts read.
    ``weight_bytes`` are the bytes of the initializers.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    kept: frozenset[str]
    needed: frozenset[str]
    weight_bytes: int


class Order:
    """``solved`` has the step of every layer by the id of its node in the main graph of ``model``.

    Nodes are taken in the order in which they stand, which ONNX wants to be topological.
    """

    def __init__(self, model: ir.Model, solved: Mapping[int, int]) -> None:
        graph = model.graph
        self._inputs = {id(value) for value in graph.inputs if value.name not in graph.initializers}
        self._values = {value.name or "": value for value in graph.inputs}
        self._step = dict.fromkeys(self._inputs, _DATA)  # the last one that is behind a value, by its id
        self._nodes: set[int] = set()
        for node in graph:
            behind = max((self._behind(value) for value in read_values(node)), default=_CONSTANT)
            step = max(behind, solved.get(id(node), _CONSTANT))
            self._nodes.add(id(node))
            for value in node.outputs:
                self._step[id(value)] = step
                self._values[value.name or ""] = value

    def _behind(self, value: ir.Value) -> int:
        return self._step.get(id(value), _CONSTANT)

    def is_final(self, value: ir.Value, step: int) -> bool:
        """Whether ``value`` depends on the data, and on no layer of ``step`` or a later one."""
        return _CONSTANT < self._behind(value) < step

    def parts(self, wanted: Sequence[Collection[str]], *, changing: bool) -> list[Part]:
        """The part before each step, after which the values ``wanted`` by it are known.

        ``changing`` says that the layers of a step get other weights behind it, so that values go stale.
        """
        runs: list[_Run] = []
        ready: set[int] = set()  # nodes whose outputs are known, if they are kept
        for step, names in enumerate(wanted):
            run = _Run()
            self._walk(run, names, ready)
            runs.append(run)
            ready |= {
                key
                for key, node in run.nodes.items()
                if self.is_final(node.outputs[0], step if changing else len(wanted))
            }
        read_later: set[str] = set()
        parts: list[Part] = []
        for names, run in zip(reversed(wanted), reversed(runs), strict=True):
            made = {v.name or "" for node in run.nodes.values() for v in node.outputs if v.name}
            kept = frozenset(made & read_later)
            outputs = tuple(sorted(kept | (set(names) & made)))
            inputs = tuple(sorted(run.kept | run.given))
            weight_bytes = sum(run.constants.values())
            parts.append(Part(inputs, outputs, kept, frozenset(read_later), weight_bytes))
            read_later = (read_later - kept) | run.kept
        return parts[::-1]

    def _walk(self, run: _Run, names: Collection[str], ready: Collection[int]) -> None:
        """Fill ``run`` with what computes the values ``names`` where the nodes ``ready`` have been run."""
        waiting = [self._values[name] for name in names]
        while waiting:
            value = waiting.pop()
            node = value.producer()
            if id(value) in self._inputs:
                run.given.add(value.name or "")
            elif value.is_initializer() and value.const_value is not None:
                run.constants[id(value)] = value.const_value.nbytes
            elif node is None or id(node) not in self._nodes:
                continue  # inside a subgraph, whose node reads what it takes from outside
            elif id(node) in ready and _can_be_kept(value, node):
                run.kept.add(value.name or "")
            elif id(node) not in run.nodes:
                run.nodes[id(node)] = node
                waiting += read_values(node)


@dataclasses.dataclass
class _Run:
    """One part: its nodes, the bytes of their constants, and the names of the model's inputs and of kept values."""

    nodes: dict[int, ir.Node] = dataclasses.field(default_factory=dict)
    constants: dict[int, int] = dataclasses.field(default_factory=dict)
    given: set[str] = dataclasses.field(default_factory=set)
    kept: set[str] = dataclasses.field(default_factory=set)


def _can_be_kept(value: ir.Value, node: ir.Node) -> bool:
    """Whether the value is an array of numbers that NumPy knows, as far as the graph tells."""
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return False
    if is_standard(node, *_NO_ARRAYS):
        return False
    dtype = value.dtype
    if is_standard(node, "Cast"):
        dtype = ir.DataType(node.attributes.get_int("to", ir.DataType.UNDEFINED))
    return dtype in (None, ir.DataType.UNDEFINED) or _is_plain(dtype)


def _is_plain(dtype: ir.DataType) -> bool:
    return dtype != ir.DataType.STRING and dtype.bitwidth >= 8 and dtype.numpy().isbuiltin == 1
