"""What a row of a benchmark of zeros and bits names: the passes of ZEROS/WEIGHTS."""

from __future__ import annotations

from typing import Any

import yaml

from sparse_onnx.passes.base import Pass
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.passes.registry import pass_by_name
from sparse_onnx.tools.benchmarks.sparsegpt_joint import SparseGPTJoint

__all__ = ["passes_from", "pruning_from"]

_PASSES = ("dynamic", "static")


def passes_from(text: str, ignore: tuple[str, ...] | None = None, **weights: Any) -> tuple[Pass, ...]:
    """The passes of ZEROS/WEIGHTS: a share or N:M for ``prune.auto``, or METHOD@ZEROS, and a method of ``quant.weight``
    or the name of another pass of quantizing, each with options behind commas.

    ``ignore`` goes to all of them, ``weights`` are further options of ``quant.weight``. SystemExit for what is no pair.
    """
    left, slash, right = text.partition("/")
    if not slash or not (left or right):
        raise SystemExit(f"{text!r} is not ZEROS/WEIGHTS, such as 0.5/auto,bits=4 or /rtn,bits=8")
    common: dict[str, Any] = {} if ignore is None else {"ignore": ignore}
    passes: list[Pass] = []
    if left:
        method, at, zeros = left.rpartition("@")
        passes.append(pruning_from(method if at else "auto", zeros, **common))
    if right:
        method, options = _options(right)
        if method in _PASSES:
            passes.append(pass_by_name(f"quant.{method}")(**common, **options))
        else:
            passes.append(QuantizeWeights(**{"method": method, **common, **weights, **options}))
    return tuple(passes)


def pruning_from(text: str, zeros: str, **options: Any) -> Pass:
    """The pass of a method of pruning with options behind commas, for a share of ``zeros`` or N:M; ``options`` come on
    top."""
    method, own = _options(text)
    own |= options | ({"mask_structure": zeros} if ":" in zeros else {"sparsity": float(zeros)})
    name = f"prune.{method}"
    return SparseGPTJoint(**own) if name == SparseGPTJoint.name else pass_by_name(name)(**own)


def _options(text: str) -> tuple[str, dict[str, Any]]:
    method, *given = text.split(",")
    options: dict[str, Any] = {}
    for part in given:
        name, _, value = part.partition("=")
        parsed = yaml.safe_load(value)
        options[name] = tuple(parsed) if isinstance(parsed, list) else parsed
    return method, options
