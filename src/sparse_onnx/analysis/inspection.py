"""What a model file holds: operators, weights and their zeros, and what the compiler can do with them.

Weights are read one at a time and in pieces, so that a model of any size is inspected in little memory.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.analysis.sparsity_metrics import Metrics, measure
from sparse_onnx.model import model_io
from sparse_onnx.model.check import MIN_OPSET
from sparse_onnx.model.decoding import decodes
from sparse_onnx.model.embedded import EmbeddedTensor
from sparse_onnx.model.graph import STANDARD_DOMAINS, initializers
from sparse_onnx.model.integer_operators import integer_operator
from sparse_onnx.model.level_weights import LevelWeight, node_weights
from sparse_onnx.model.metadata_keys import MODULE_KEY
from sparse_onnx.model.opset_conversion import CONVERTED_FROM
from sparse_onnx.model.quantized_weights import QuantizedWeight, quantized_weights
from sparse_onnx.model.work import Untouched, Work, untouched
from sparse_onnx.passes.base import PassContext, Pipeline
from sparse_onnx.passes.clean.cleanup import Constants
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.presets import CLEAN_PASSES
from sparse_onnx.progress import Progress
from sparse_onnx.sparse_ops.domain import DOMAIN
from sparse_onnx.sparse_ops.formats.base import FormatError
from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

__all__ = ["LARGE", "count_values", "inspect_model"]

LARGE = 2 * 10**9
"""Bytes of weights above which a model cannot be one protobuf file, and is said to be large."""

_PIECE = 1 << 22
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_RUNTIME_DOMAINS = ("com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc", "ai.onnx.ml")


def inspect_model(
    path: Path, *, metrics: bool = False, progress: Callable[[str], None] = lambda _line: None
) -> dict[str, Any]:
    """Everything about the model file at ``path`` as one JSON document.

    ``weights`` has a row for each float matrix or tensor of higher rank, for each stored weight of a sparse operator,
    and for each weight of a layer that is quantized; that one also has ``bits``, ``group_size`` and ``encoding``, see
    :class:`.QuantizedWeight`, and its zeros are the elements that stand for 0. Its ``state`` is ``sparse`` (a sparse
    operator already), ``can be sparse``, ``folded`` (not there any more after the clean-up), ``quantized`` or
    ``stays``, and then ``reason`` says why, in the words of ``sparse-onnx optimize``.
    ``layers`` sums weights and zeros up by layer: by the name of the module up to its first number. ``not_counted`` has
    the other constants of rank 2 and more, such as quantized embeddings, in which zero has no fixed meaning.
    ``untouched`` has the operators with matrix-like work that are no layers, with their share of all work where the
    shapes in the model tell it, see :func:`sparse_onnx.model.work.untouched`.

    With ``metrics``, every weight that is or can be sparse, and ``total`` for all of these together, has ``metrics``:
    see :meth:`.sparsity_metrics.Metrics.to_dict`. They are of the weight as the compiler would store it, after the
    clean-up. Each weight lies in memory and is packed for its true size: about 50 s for 10⁹ weights.
    ``progress`` is called with one line of text now and then.

    Raises:
        ModelFileError: The file is missing or cannot be read as a model.
    """
    model = model_io.load_model(path)
    operators = Counter(f"{_domain(node.domain)}::{node.op_type}" for node in model.graph.all_nodes())
    weight_bytes, file_bytes = model_io.weight_bytes(model), model_io.file_bytes(path, model)
    Constants()(model)  # so that weights are found where they are nodes, too
    data = sorted({tensor.path for tensor in _external(model)})
    files = {str(file): Path(str(file)).stat().st_size for file in (path, *data)}
    document: dict[str, Any] = {
        "file": str(path),
        "files": files,
        "file_bytes": file_bytes,
        "weight_bytes": weight_bytes,
        "large": weight_bytes > LARGE,
        "ir_version": model.ir_version,
        "opsets": _opsets(model),
        "read_as_opset": MIN_OPSET if CONVERTED_FROM in model.meta else None,
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "inputs": [
            _describe(value) for value in model.graph.inputs if value.name not in model.graph.initializers
        ],
        "outputs": [_describe(value) for value in model.graph.outputs],
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "functions": [f"{domain}::{name}" for domain, name, _ in model.functions],
        "custom_operators": _custom(model),
    }
    measured: dict[str, Metrics] | None = {} if metrics else None
    progress("counting zeros")
    quantized = quantized_weights(model)
    known = {weight.name for weight in quantized}
    rows = [*_stored(model, measured), *map(_quantized, quantized), *_plain(model, known)]
    progress("finding what can be sparse")
    others = _not_counted(model, known)
    states, places, left_over = _states(model, measured, progress)
    left = {value.name for value in initializers(model)}
    for row in rows:
        if row["state"] is None:
            gone = ("folded", "merged with an equal one or folded by the clean-up")
            stays = ("stays", f"used by {row['op_type']}")
            row["state"], row["reason"] = states.get(row["name"], stays if row["name"] in left else gone)
        row["sparsity"] = _share(row["zeros"], row["size"])
        if measured is not None:
            row["metrics"] = measured[row["name"]].to_dict() if row["name"] in measured else None
    listed = {row["name"] for row in rows}
    size = sum(row["size"] for row in rows)
    together = functools.reduce(operator.add, measured.values()).to_dict() if measured else None
    return {
        **document,
        "weights": rows,
        "layers": _layers(rows),
        "not_counted": others,
        "declined": [{"place": place, "reason": reason} for place, reason in places if place not in listed],
        "untouched": [dataclasses.asdict(row) for row in left_over],
        "total": {
            "weights": size,
            "zeros": sum(row["zeros"] for row in rows),
            "sparsity": _share(sum(row["zeros"] for row in rows), size),
            "nan": sum(row["nan"] for row in rows),
            "inf": sum(row["inf"] for row in rows),
            "can_be_sparse": sum(row["state"] == "can be sparse" for row in rows),
            "sparse": sum(row["state"] == "sparse" for row in rows),
            **({"quantized": len(quantized)} if quantized else {}),
            **({} if measured is None else {"metrics": together}),
        },
    }


def _share(zeros: int, size: int) -> float:
    """Of what may be nothing, in a damaged file."""
    return zeros / size if size else 0.0


def count_values(tensor: ir.TensorProtocol) -> tuple[int, int, int]:
    """(zeros, NaN, Inf) of a float tensor, in pieces; a tensor in a file is unmapped again."""
    flat = tensor.numpy().reshape(-1)
    zeros = nan = inf = 0
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        zeros += int(np.count_nonzero(piece == 0))
        nan += int(np.count_nonzero(np.isnan(piece)))
        inf += int(np.count_nonzero(np.isinf(piece)))
        del piece
    del flat
    model_io.release_mapping(tensor)
    return zeros, nan, inf


def _opsets(model: ir.Model) -> dict[str, int]:
    """Those of the file."""
    imports = {_domain(domain): version for domain, version in sorted(model.opset_imports.items())}
    old = model.meta.get(CONVERTED_FROM)
    return imports if old is None else imports | {_domain(""): old}


def _domain(domain: str) -> str:
    return domain or "ai.onnx"


def _describe(value: ir.Value) -> str:
    shape = "?" if value.shape is None else ", ".join(str(dim) for dim in value.shape)
    return f"{value.name}: {value.dtype.name if value.dtype is not None else '?'}[{shape}]"


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and not isinstance(tensor, EmbeddedTensor):
            yield tensor


def _custom(model: ir.Model) -> list[dict[str, Any]]:
    """Operators outside the standard: how often, and who can run them."""
    counts = Counter(
        (node.domain, node.op_type) for node in model.graph.all_nodes() if node.domain not in STANDARD_DOMAINS
    )
    bodies = {(domain, name) for domain, name, _ in model.functions}
    rows = []
    for (domain, op_type), count in sorted(counts.items()):
        known = domain == DOMAIN and op_type in OP_TYPES
        if known:
            who = "the kernel library"
        elif domain in _RUNTIME_DOMAINS:
            who = "ONNX Runtime"
        elif (domain, op_type) in bodies:
            who = "its function body"
        else:
            who = "unknown: neither the kernel library, ONNX Runtime nor a function body"
        body = (domain, op_type) in bodies
        rows.append(
            {
                "domain": domain,
                "op_type": op_type,
                "count": count,
                "known": known,
                "body": body,
                "run_by": who,
            }
        )
    return rows


def _layers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Weights and zeros by layer, in the order of the rows."""
    layers: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = _layer_name(row["module"] or row["name"])
        layer = layers.setdefault(name, {"name": name, "tensors": 0, "weights": 0, "zeros": 0})
        layer["tensors"] += 1
        layer["weights"] += row["size"]
        layer["zeros"] += row["zeros"]
    return [{**layer, "sparsity": _share(layer["zeros"], layer["weights"])} for layer in layers.values()]


def _layer_name(path: str) -> str:
    """``encoder.layer.3`` of ``encoder.layer.3.attention.query``; all of a path without a number."""
    parts = path.split(".")
    numbers = (index for index, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[: next(numbers, len(parts)) + 1])


def _stored(model: ir.Model, measured: dict[str, Metrics] | None) -> Iterator[dict[str, Any]]:
    """One row for each stored weight of sparse operators; operators may share one. Metrics go to ``measured``."""
    seen = set()
    for weight in (weight for node in model.graph for weight in node_weights(node)):
        first = weight.parts[0]
        if first is None or first.const_value is None or first.name in seen:
            continue
        seen.add(first.name)
        K, N = weight.shape
        nbytes, reason = sum(tensor.nbytes for tensor in weight.tensors), ""
        padding, nan, inf, stored = 0, 0, 0, K * N
        try:
            if isinstance(weight, LevelWeight):
                stored = weight.packed().nonzero()
            else:
                padding, nan, inf = count_values(first.const_value)
                stored = first.const_value.size
            if measured is not None:
                W = weight.unpack()
                measured[weight.name] = measure(W, W.nbytes, nbytes)
                del W
        except FormatError as error:
            reason = f"the stored weight is damaged: {error}"
        for tensor in weight.tensors:
            model_io.release_mapping(tensor)
        yield {
            "name": weight.name,
            "module": weight.node.metadata_props.get(MODULE_KEY, ""),
            "op_type": weight.node.op_type,
            "shape": [K, N],
            "size": K * N,
            "dtype": weight.elements,
            "bytes": nbytes,
            "zeros": K * N - (stored - padding),
            "nan": nan,
            "inf": inf,
            "mask_structure": weight.mask_structure,
            "state": "sparse",
            "reason": reason,
        }


def _quantized(weight: QuantizedWeight) -> dict[str, Any]:
    """The row of a weight that is stored as integers or by a codebook."""
    return {
        "name": weight.name,
        "module": weight.module,
        "op_type": weight.op_type,
        "shape": list(weight.shape),
        "size": weight.size,
        "dtype": f"{weight.bits} bits" + (f" by {weight.group_size}" if weight.group_size else ""),
        "bytes": weight.nbytes,
        "zeros": weight.zeros,
        "nan": weight.nan,
        "inf": weight.inf,
        "mask_structure": "",
        "state": "quantized",
        "reason": weight.reason or f"is quantized: {weight.encoding}",
        "bits": weight.bits,
        "group_size": weight.group_size,
        "encoding": weight.encoding,
    }


def _plain(model: ir.Model, known: Collection[str]) -> Iterator[dict[str, Any]]:
    """One row for each float initializer of rank 2 or more that is not among ``known``, and no scale of integers."""
    for value in initializers(model):
        tensor, uses = value.const_value, value.uses()
        if value.name in known or (uses and all(_scales(use.node, use.idx) for use in uses)):
            continue
        if tensor is None or tensor.dtype not in _FLOATS or len(tensor.shape) < 2 or not tensor.size:
            continue
        users = list(dict.fromkeys(use.node for use in value.uses()))
        zeros, nan, inf = count_values(tensor)
        yield {
            "name": value.name or "?",
            "module": users[0].metadata_props.get(MODULE_KEY, "") if users else "",
            "op_type": ", ".join(dict.fromkeys(user.op_type for user in users)) or "nothing",
            "shape": [int(dim) for dim in tensor.shape.numpy()],
            "size": tensor.size,
            "dtype": tensor.dtype.name,
            "bytes": tensor.nbytes,
            "zeros": zeros,
            "nan": nan,
            "inf": inf,
            "mask_structure": "",
            "state": None,
            "reason": "",
        }


def _scales(node: ir.Node, index: int) -> bool:
    """Whether input ``index`` of ``node`` says what stored integers stand for: it belongs to them, and is no weight."""
    if node.op_type == "MatMulNBits":
        return index > 1
    integers = integer_operator(node)
    if integers is not None:
        return index in (integers.scale, integers.zero_point)
    return index > 0 and decodes(node, 0)


def _not_counted(model: ir.Model, known: Collection[str]) -> list[dict[str, Any]]:
    """One row for each constant of rank 2 or more that is no float tensor, not among ``known``, and no zero point of
    these."""
    rows = []
    for value in initializers(model):
        tensor, uses = value.const_value, value.uses()
        if value.name in known or (uses and all(_scales(use.node, use.idx) for use in uses)):
            continue
        if tensor is None or tensor.dtype in _FLOATS or len(tensor.shape) < 2 or not tensor.size:
            continue
        rows.append(
            {
                "name": value.name or "?",
                "op_type": ", ".join(dict.fromkeys(use.node.op_type for use in value.uses())) or "nothing",
                "shape": [int(dim) for dim in tensor.shape.numpy()],
                "dtype": tensor.dtype.name,
                "bytes": tensor.nbytes,
            }
        )
    return rows


def _states(
    model: ir.Model, measured: dict[str, Metrics] | None, progress: Callable[[str], None]
) -> tuple[dict[str, tuple[str, str]], list[tuple[str, str]], list[Untouched]]:
    """What the compiler would do with each weight, by name, the places that it leaves alone, and the operators that are
    no layers. Metrics go to ``measured``.

    Changes ``model``: the clean-up runs first, as it does in the compiler.
    """
    with tempfile.TemporaryDirectory(prefix="sparse-onnx-") as folder, model_io.Spool(folder) as spool:
        Pipeline(CLEAN_PASSES)(model, PassContext(spool.put))
        candidates, declined = find_candidates(model)
        layers = {name for candidate in candidates for name in candidate.names}
        work = Work(model).count()
        left_over = untouched(work, layers, {place.place: place.reason for place in declined})
        if any(part.products is None for part in work):  # shares of the rest would say nothing
            left_over = [dataclasses.replace(row, share=None) for row in left_over]
        places = [(place.place, place.reason) for place in declined]
        states = {place: ("stays", reason) for place, reason in places}
        measuring = Progress(progress, "measuring metrics: layer", len(candidates))
        for candidate in candidates:
            for part in candidate.parts:
                weight = part.weight
                states[weight.name] = (
                    ("stays", "belongs to a depthwise convolution")
                    if candidate.companion
                    else ("can be sparse", "")
                )
                if measured is not None and not candidate.companion:
                    nbytes = part.pack().nbytes
                    measured[weight.name] = measure(weight.matrix(), weight.tensor.nbytes, nbytes)
                    weight.release()
            measuring.step()
    return states, places, left_over
