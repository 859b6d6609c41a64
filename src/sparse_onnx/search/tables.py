"""Tables of embeddings in few bits: what they would save, and what the outputs lose by it.

Their time hardly changes, so they matter where a size is asked for; of small models they are the largest tensors. What
is lost is measured: the model is run with one table rounded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.quantize.embedding import QuantizeEmbeddings
from sparse_onnx.running.runtime import open_runner
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.verification.comparison import compare

__all__ = ["Table", "measure_tables", "rounding_of"]

_GROUPS = (64, 32, 16)
_FEW_BITS = 4


@dataclasses.dataclass(frozen=True)
class Table:
    """Of one table in floats: the ``length`` of a row, ``saved`` bytes and the ``loss``, a square of the relative error
    of the worst output, by bits."""

    length: int
    saved: Mapping[int, int]
    loss: Mapping[int, float]


def rounding_of(bits: int, tables: Mapping[str, int]) -> tuple[QuantizeEmbeddings, ...]:
    """Passes that round ``tables``, the lengths of their rows by name, to ``bits``: a row has one scale with 8, one for
    64 elements with 4, or for as many as divide it."""
    groups: dict[int, list[str]] = {}
    for name, length in tables.items():
        fitting = [size for size in _GROUPS if length % size == 0] if bits <= _FEW_BITS else []
        groups.setdefault(next(iter(fitting), 0), []).append(name)
    return tuple(
        QuantizeEmbeddings(bits=bits, group_size=size, targets=tuple(names)) for size, names in groups.items()
    )


def measure_tables(
    model: ir.Model, bits: Collection[int], batches: Sequence[Feeds], bench: Workbench
) -> dict[str, Table]:
    """The tables of ``model``, cleaned up and in floats, that may have ``bits``, by name, run on ``batches``; not those
    that a head is tied to, since that is a layer whose bits and form are chosen by its time as well."""
    found = QuantizeEmbeddings()(model.clone(), PassContext()).layers
    lengths = {
        layer.name: _length(model, layer.name)
        for layer in found
        if all(use.node.op_type == "Gather" for use in model.graph.initializers[layer.name].uses())
    }
    if not lengths:
        return {}
    with open_runner(model, bench.quietly(), library=False) as runner:
        reference = [runner.run(feeds) for feeds in batches]
    tables = {}
    for name, length in lengths.items():
        bench.progress(f"loss of tables: {name}")
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        saved, loss = {}, {}
        for own in bits:
            rounded = model.clone()
            (step,) = rounding_of(own, {name: length})
            layers = step(rounded, PassContext()).layers
            if not layers:
                continue
            with open_runner(rounded, bench.quietly(), library=False) as runner:
                error = compare(reference, [runner.run(feeds) for feeds in batches]).relative_error
            if math.isfinite(error):
                saved[own], loss[own] = int(tensor.nbytes) - (layers[0].nbytes or 0), error**2
        tables[name] = Table(length, saved, loss)
    return tables


def _length(model: ir.Model, name: str) -> int:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return int(tensor.shape.numpy()[1])
