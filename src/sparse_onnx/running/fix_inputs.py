"""Make inputs constants: ``--fix-input``.

An input that steers the graph (a sampling rate, a flag) becomes an initializer with the value that the user gives, what
depends on nothing else is computed, and an ``If`` whose condition is known gives way to the branch that it takes::

    c = Equal(rate, 16000); y = If(c) {a = MatMul(x, W)} else {b = MatMul(x, V)}    ->    y = MatMul(x, W)
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds, InputSpec, Value
from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.model.constants import constant_tensor, is_constant
from sparse_onnx.model.graph import add_initializer, is_standard, new_name, subgraphs
from sparse_onnx.model.metadata_keys import FIXED_INPUTS_KEY
from sparse_onnx.running.runtime import open_session, run_session

__all__ = ["fix_inputs", "fixed_values"]

_LARGEST = 1 << 20
"""Elements of a result that is kept in the model: what is larger is computed at every run, as before."""

_BY_CHANCE = (
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
)


def fix_inputs(model: ir.Model, specs: Sequence[InputSpec]) -> bool:
    """Make the inputs that ``specs`` call fixed constants of ``model``; whether there are any.

    Raises UsageError if a value has no shape yet, or the model cannot be run with it.
    """
    values = {value.name: value for value in model.graph.inputs}
    derived: set[ir.Value] = set()
    for spec in specs:
        if not spec.fixed:
            continue
        array = spec.array()
        if array is None:
            raise UsageError(
                f"--fix-input {spec.name}: the model leaves its size open ({spec.describe()}): write every element, "
                "e.g. 1,0"
            )
        value = values[spec.name]
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=spec.name)
        value.shape = ir.Shape(array.shape)
        model.graph.register_initializer(value)
        derived.add(value)
    if not derived:
        return False
    fixed = {spec.name: spec.value for spec in specs if spec.fixed}
    model.metadata_props[FIXED_INPUTS_KEY] = json.dumps({**fixed_values(model), **fixed})
    while True:
        derived |= _fold(model, derived)
        if not _inline_branches(model):
            return True


def fixed_values(model: ir.Model) -> dict[str, Value]:
    """The inputs of the original that are constants of ``model``, as it says itself."""
    try:
        found = json.loads(model.metadata_props.get(FIXED_INPUTS_KEY, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _fold(model: ir.Model, derived: set[ir.Value]) -> set[ir.Value]:
    """Compute what follows from ``derived`` and constants alone; the initializers that are new."""
    model.graph.sort()
    outputs = set(model.graph.outputs)
    nodes: list[ir.Node] = []
    known = set(derived)
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if (
            known.intersection(inputs)
            and all(value in known or is_constant(value) for value in inputs)
            and is_standard(node, node.op_type)
            and node.op_type not in _BY_CHANCE
            and not any(subgraphs(node))
            and not outputs.intersection(node.outputs)
        ):
            nodes.append(node)
            known.update(node.outputs)
    inside = set(nodes)
    needed = [
        value
        for node in nodes
        for value in node.outputs
        if any(use.node not in inside for use in value.uses())
    ]
    if not needed:
        return set()
    made = set()
    for value, array in zip(needed, _evaluate(model, needed).values(), strict=True):
        if not isinstance(array, np.ndarray) or array.size > _LARGEST:
            continue
        name = new_name(model, f"{value.name}.fixed")
        constant = add_initializer(model.graph, name, ir.tensor(array, name=name))
        ir.convenience.replace_all_uses_with(value, constant)
        made.add(constant)
    for node in reversed(nodes):
        if not any(value.uses() for value in node.outputs):
            model.graph.remove(node, safe=True)
    return made


def _evaluate(model: ir.Model, wanted: Sequence[ir.Value]) -> Feeds:
    """The ``wanted`` values, which depend on no input."""
    copy = model.clone()
    by_name = {value.name: value for node in copy.graph for value in node.outputs}
    outputs = [by_name[value.name] for value in wanted]
    part = ir.Model(ir.convenience.extract(copy.graph, [], outputs), ir_version=model.ir_version)
    part.graph.opset_imports.update(model.opset_imports)
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as folder:
        path = model_io.save_model(part, Path(folder))
        return run_session(open_session(path, threads=1, library=False), {})


def _inline_branches(model: ir.Model) -> bool:
    """Put the branch that is taken in the place of every ``If`` with a known condition; whether there was one."""
    found = next(_known_conditions(model), None)
    if found is None:
        return False
    while found is not None:
        _inline(model, *found)
        found = next(_known_conditions(model), None)
    return True


def _known_conditions(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Graph]]:
    for graph in model.graphs():
        for node in graph:
            if not is_standard(node, "If"):
                continue
            condition = constant_tensor(node.inputs[0])
            if condition is not None and condition.size == 1:
                branch = "then_branch" if condition.numpy().item() else "else_branch"
                yield node, node.attributes[branch].as_graph()


def _inline(model: ir.Model, node: ir.Node, branch: ir.Graph) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    _rename_doubles(model, branch)
    results = list(branch.outputs)
    branch.outputs.clear()
    constants = list(branch.initializers.values())
    branch.initializers.clear()
    for value in constants:
        graph.register_initializer(value)
    nodes = list(branch)
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    names = [value.name for value in node.outputs]
    copies = []
    for result, old, name in zip(results, node.outputs, names, strict=True):
        old.name = f"{name}.branch"  # the name goes over
        copies.append(
            ir.node("Identity", [result], outputs=[ir.Value(name=name, shape=old.shape, type=old.type)])
        )
    graph.insert_before(node, copies)
    new = [copy.outputs[0] for copy in copies]
    ir.convenience.replace_all_uses_with(node.outputs, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    for inner in (inner for other in subgraphs(node) for inner in other.all_nodes()):
        for index in range(len(inner.inputs)):  # or weights would seem to be used
            inner.replace_input_with(index, None)


def _rename_doubles(model: ir.Model, branch: ir.Graph) -> None:
    """Other names for values and nodes of ``branch`` that are there outside of it, too: of two branches, say."""
    values: Counter[str | None] = Counter()
    nodes: Counter[str | None] = Counter()
    for graph in model.graphs():
        values.update(value.name for value in _own_values(graph))
        nodes.update(node.name for node in graph)
    for graph in (branch, *branch.subgraphs()):
        for value in _own_values(graph):
            if values[value.name] > 1:
                values[value.name] -= 1
                value.name = new_name(model, f"{value.name}.taken")
        for node in graph:
            if node.name and nodes[node.name] > 1:
                nodes[node.name] -= 1
                node.name = f"{node.name}.{nodes[node.name]}.taken"


def _own_values(graph: ir.Graph) -> list[ir.Value]:
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    return [
        *inputs,
        *graph.initializers.values(),
        *(value for node in graph for value in node.outputs if value.name),
    ]
