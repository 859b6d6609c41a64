"""``quant.embedding``: tables of embeddings as integers of few bits, of which each run unpacks the rows that it reads.

Before::                                     After::

    E = Gather(table, ids)                   E = Lookup4(packed, scale, ids)
                                               rows = Gather(packed, ids)        # bytes
                                               E = (unpacked rows - 8) · Gather(scale, ids)

table [V, D] floats. Integers are symmetric, of 8 or 4 bits; ``group_size`` elements of a row share a scale, 0: the
whole row. A 4-bit byte holds element d and element D/2 + d of a row. Rows are rounded with the scale of the least
squared error. The node is a model-local function of standard operators, as those of
:mod:`sparse_onnx.model.bit_packing`; since ``ids`` differ from run to run, ONNX Runtime cannot fold it: the table stays
small in memory, too. A row of zeros stays zero.

An output head tied to the table reads the same integers; they are stored once, as those of the head [D, V], of which
forms of fewer bits can be made, and a lookup unpacks the columns that it takes::

    E = Gather(table, ids)                   some = Gather<axis = 2>(packed, ids), its scales likewise
    H = Transpose(table)                     E = Reshape(Transpose(Unpack8(some, scales)), [shape of ids, D])
    Y = MatMul(X, H)                         Y = MatMul(X, Unpack8(packed, scale))

or Gemm(X, table) with transB. Such a lookup takes single bytes: of 49 thousand rows of 576, 512 tokens take 6 ms, in a
run of more than a second, and one takes .01 ms.

A table is left alone where anything else reads it, or a caller may replace it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from sparse_onnx.errors import UsageError
from sparse_onnx.model.bit_packing import UNPACK_DOMAIN, UNPACK_VERSION, pack
from sparse_onnx.model.constants import constant_tensor, is_constant
from sparse_onnx.model.graph import (
    Names,
    add_function,
    add_initializer,
    initializers,
    is_standard,
    new_name,
    remove_if_unread,
)
from sparse_onnx.model.model_io import release_mapping
from sparse_onnx.model.weights import Weight
from sparse_onnx.options import require
from sparse_onnx.passes.base import LayerChange, Pass, PassContext, PassResult, Stage
from sparse_onnx.passes.quantize.encode import write_quantized
from sparse_onnx.passes.solvers.clipping import clipped_grid
from sparse_onnx.passes.solvers.grid import GridOptions, QuantizedMatrix, round_to_grid
from sparse_onnx.progress import done_of

__all__ = ["QuantizeEmbeddings"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_ROWS_AT_ONCE = 4096
_ALLOWS_ZERO = 14  # the opset from which on Reshape can make an empty result
_MIN_ROWS = 256  # a smaller table is no vocabulary, and not worth a scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeEmbeddings(Pass):
    """See the module's docstring.

    Attributes:
        bits: 8 or 4.
        group_size: Elements of a row that share a scale, 16 to 256, dividing its length; 0: all.
        scale_type: How scales are stored.
        targets: Names of tables; empty: all of at least 256 rows.
        ignore: Names of tables to leave alone.
    """

    name: ClassVar[str] = "quant.embedding"
    stage: ClassVar[Stage] = Stage.QUANTIZE

    bits: int = 8
    group_size: int = 0
    scale_type: str = "float16"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def check(self) -> None:
        require(self.bits in (4, 8), "bits", self.bits, "4 or 8")
        require(
            self.scale_type in ("float16", "float32"), "scale_type", self.scale_type, "float16 or float32"
        )
        _ = self.grid

    @property
    def grid(self) -> GridOptions:
        return GridOptions(
            self.bits, self.group_size, True, "float32" if self.scale_type == "float32" else "float16"
        )

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        tables = {value.name or "": value for value in initializers(model) if _is_table(value)}
        for name in self.targets:
            if name not in tables:
                known = ", ".join(map(repr, list(tables)[:8])) or "none"
                raise UsageError(
                    f"targets: {name!r} is no table of embeddings; those of the model are {known}"
                )
        declined, chosen = [], []
        for name, value in tables.items():
            reason = self._reason_against(name, value)
            if reason is None:
                chosen.append(value)
            else:
                declined.append(self.declined(name, reason))
        layers: list[LayerChange] = []
        start = time.perf_counter()
        for index, value in enumerate(chosen):
            try:
                layers.append(self._quantize(model, value, context))
            except UsageError as error:  # a scale that is too large for its type
                declined.append(self.declined(value.name or "", str(error)))
            done = done_of(index + 1, len(chosen), start)
            context.progress(f"{value.name}: {self.bits} bits ({done})")
        statistics: dict[str, int | float] = {
            "tables": len(tables),
            "changed": len(layers),
            "bytes": sum(layer.nbytes or 0 for layer in layers),
        }
        return PassResult(model, bool(layers), statistics, tuple(declined), tuple(layers))

    def _reason_against(self, name: str, value: ir.Value) -> str | None:
        tensor = value.const_value
        assert tensor is not None
        rows, length = (int(size) for size in tensor.shape.numpy())
        if self.targets and name not in self.targets:
            return "not among targets"
        if name in self.ignore:
            return "listed in ignore"
        if value.is_graph_input() or value.is_graph_output():
            return "is also an input or output of the graph"
        others = sorted(
            {
                use.node.op_type
                for use in value.uses()
                if not (_looks_up(use.node, use.idx) or _is_head(use.node, use.idx))
            }
        )
        if others:
            return f"is also read by {', '.join(others)}: what is tied to it would be rounded as well"
        if any(use.node.graph is not value.graph for use in value.uses()):
            return "is read inside a branch or loop"
        if rows < _MIN_ROWS and not self.targets:
            return f"has {rows} rows, fewer than {_MIN_ROWS}: name it in targets if it is to be rounded"
        if self.group_size and length % self.group_size:
            return f"its rows of {length} are no multiple of the group size {self.group_size}"
        if self.bits == 4 and length % 2:
            return f"its rows have {length} elements, an odd number"
        finite = bool(np.isfinite(tensor.numpy()).all())
        release_mapping(tensor)
        return None if finite else "holds NaN or Inf"

    def _quantize(self, model: ir.Model, value: ir.Value, context: PassContext) -> LayerChange:
        tensor, name = value.const_value, value.name or "table"
        assert tensor is not None
        table = tensor.numpy()
        quantized = QuantizedMatrix.side_by_side(
            [
                self._rounded(table[first : first + _ROWS_AT_ONCE])
                for first in range(0, len(table), _ROWS_AT_ONCE)
            ]
        )
        zeros = int(table.size - np.count_nonzero(table))
        del table
        release_mapping(tensor)
        if all(_looks_up(use.node, use.idx) for use in value.uses()):
            nbytes = _write_rows(model, value, quantized, tensor.dtype, context)
        else:
            nbytes = _write_tied(model, value, quantized, context)
        return LayerChange(
            name,
            quantized.integers.size,
            zeros,
            int(np.count_nonzero(quantized.integers == 0)),
            bits=self.bits,
            group_size=self.group_size,
            nbytes=nbytes,
        )

    def _rounded(self, rows: np.ndarray) -> QuantizedMatrix:
        """Some rows [V', D], as a weight [D, V']: every row is an output with groups along its elements."""
        matrix = np.ascontiguousarray(rows.T, np.float32)
        return round_to_grid(matrix, clipped_grid(matrix, self.grid))


def _write_rows(
    model: ir.Model, value: ir.Value, quantized: QuantizedMatrix, dtype: ir.DataType, context: PassContext
) -> int:
    """Let lookups unpack rows of the table ``value``, whose columns [D, V] are ``quantized``; the bytes stored."""
    graph, bits, (D, _) = value.graph, quantized.options.bits, quantized.integers.shape
    assert isinstance(graph, ir.Graph)
    stored = (quantized.integers.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    packed = np.ascontiguousarray(pack(stored, bits)[0].T)  # [V, bytes]
    scale = np.ascontiguousarray(quantized.scale.T.astype(quantized.options.scale_type))  # [V, groups]
    scale_name = new_name(model, f"{value.name}.scale")
    scales = add_initializer(graph, scale_name, context.store(scale, scale_name))
    value.const_value = context.store(packed, value.name or "")
    value.type, value.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape(list(packed.shape))
    groups = scale.shape[1]
    for node in [use.node for use in value.uses()]:
        attributes: dict[str, int | list[int]] = {"grid": [groups, D // groups], "row": [D], "to": int(dtype)}
        lookup = ir.node(
            f"Lookup{bits}",
            [value, scales, node.inputs[1]],
            attributes,
            domain=UNPACK_DOMAIN,
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
        _put(graph, node, [lookup])
    add_function(model, lookup_function(bits, max(model.opset_imports.get("", 13), 13)), UNPACK_VERSION)
    return int(packed.nbytes + scale.nbytes)


def _write_tied(model: ir.Model, value: ir.Value, quantized: QuantizedMatrix, context: PassContext) -> int:
    """Let heads read the table ``value`` as a packed weight, and lookups its columns; the bytes stored."""
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    write_quantized(model, Weight(value, (), transposed=True), quantized, "unpack", context.store)
    ((unpack, _),) = value.uses()
    ((rows, _),) = unpack.outputs[0].uses()  # [V, D] again
    for node, index in [(use.node, use.idx) for use in rows.outputs[0].uses()]:
        if is_standard(node, "Transpose"):
            node.outputs[0].replace_all_uses_with(unpack.outputs[0])
            graph.remove(node, safe=True)
        elif _looks_up(node, index):
            _put(graph, node, _column_lookup(model, node, unpack))
    remove_if_unread(rows)
    stored = [constant_tensor(given) for given in unpack.inputs]
    return sum(tensor.nbytes for tensor in stored if tensor is not None)


def _column_lookup(model: ir.Model, node: ir.Node, unpack: ir.Node) -> list[ir.Node]:
    """The nodes that take the columns of a packed table that ``node`` looks up, and ``unpack`` these to rows."""
    ids, (packed, scale) = node.inputs[1], unpack.inputs
    names, made = Names(model), list[ir.Node]()

    def make(
        op_type: str, inputs: Sequence[ir.Value | None], what: str, **given: ir.Attr | int | list[int]
    ) -> ir.Value:
        domain = unpack.domain if op_type == unpack.op_type else ""
        name, properties = names.new(f"{node.name or 'lookup'}.{what}"), dict(node.metadata_props)
        made.append(ir.node(op_type, inputs, given, domain=domain, name=name, metadata_props=properties))
        made[-1].outputs[0].name = name
        return made[-1].outputs[0]

    flat = make("Reshape", [ids, make("Constant", [], "all", value_ints=[-1])], "ids")
    taken = [
        make("Gather", [given, flat], what, axis=2) for given, what in ((packed, "packed"), (scale, "scale"))
    ]
    rows = make(
        "Transpose", [make(unpack.op_type, taken, "columns", **unpack.attributes)], "rows", perm=[1, 0]
    )
    length = make("Constant", [], "row", value_ints=list(unpack.attributes.get_ints("channels", ())))
    shape = make("Concat", [make("Shape", [ids], "shape"), length], "result", axis=0)
    empty = {"allowzero": 1} if model.opset_imports.get("", 13) >= _ALLOWS_ZERO else {}
    make("Reshape", [rows, shape], "embedded", **empty)
    return made


def _put(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node]) -> None:
    """Put ``nodes``, of which the last makes the same, in place of ``node``."""
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string
    new.metadata_props.update(old.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [new])


def lookup_function(bits: int, opset: int) -> onnx.FunctionProto:
    """Rows of a table: ``packed`` [V, bytes] uint8, ``scale`` [V, groups] and ``ids`` [..] give [.., D].

    Attributes ``grid`` [groups, size], ``row`` [D], ``to`` the float type of the result.
    """
    unpacked = ["integers = Identity(bytes)"]
    if bits == 4:
        unpacked = [
            "axis = Constant<value = int64[1] {-2}>()",
            "planes = Unsqueeze(bytes, axis)",
            "shifts = Constant<value = uint8[2,1] {0, 4}>()",
            "modulus = Constant<value = uint8 {16}>()",
            'shifted = BitShift<direction = "RIGHT">(planes, shifts)',
            "integers = Mod(shifted, modulus)",
        ]
    lines = [
        "bytes = Gather(packed, ids)",
        *unpacked,
        "wide = Cast<to = 1>(integers)",
        "ids_shape = Shape(ids)",
        "grid_shape = Constant<value_ints: ints = @grid>()",
        "grouped_shape = Concat<axis = 0>(ids_shape, grid_shape)",
        "grouped = Reshape(wide, grouped_shape)",
        f"zero = Constant<value = float {{{2 ** (bits - 1)}.0}}>()",
        "steps = Sub(grouped, zero)",
        "scales = Gather(scale, ids)",
        "wide_scales = Cast<to = 1>(scales)",
        "last = Constant<value = int64[1] {-1}>()",
        "each = Unsqueeze(wide_scales, last)",
        "values = Mul(steps, each)",
        "row_shape = Constant<value_ints: ints = @row>()",
        "shape = Concat<axis = 0>(ids_shape, row_shape)",
        "rows = Reshape(values, shape)",
        "E = Cast<to: int = @to>(rows)",
    ]
    body = "\n".join(lines)
    head = f'<domain: "{UNPACK_DOMAIN}", opset_import: ["" : {opset}]>'
    proto: onnx.FunctionProto = onnx.parser.parse_function(
        f"{head} Lookup{bits} <grid, row, to> (packed, scale, ids) => (E) {{\n{body}\n}}"
    )
    return proto


def _looks_up(node: ir.Node, index: int) -> bool:
    """Whether ``node`` takes rows of its input ``index``, a table."""
    return is_standard(node, "Gather") and index == 0 and node.attributes.get_int("axis", 0) == 0


def _is_head(node: ir.Node, index: int) -> bool:
    """Whether ``node`` multiplies by its input ``index`` [V, D], transposed, or transposes it for such."""
    if is_standard(node, "Gemm"):
        transposed = node.attributes.get_int("transB", 0) and not node.attributes.get_int("transA", 0)
        return index == 1 and bool(transposed)
    return (
        is_standard(node, "Transpose")
        and not node.outputs[0].is_graph_output()
        and all(is_standard(use.node, "MatMul") and use.idx == 1 for use in node.outputs[0].uses())
    )


def _is_table(value: ir.Value) -> bool:
    """Whether a float matrix is looked up by ids that differ from run to run."""
    tensor = value.const_value
    if tensor is None or tensor.dtype not in _FLOATS or len(tensor.shape) != 2 or 0 in tensor.shape.numpy():
        return False
    return any(_looks_up(use.node, use.idx) and not is_constant(use.node.inputs[1]) for use in value.uses())
