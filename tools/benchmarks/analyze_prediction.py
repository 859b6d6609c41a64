"""What ``analyze`` predicts against what ``optimize`` then measures, model by model.

    python -m sparse_onnx.tools.benchmarks.analyze_prediction MODEL.onnx .. [--sparsity 0.5 0.7 0.8 0.9]
        [--mask-structure unstructured block:8x1 2:4] [--precision float32 int8 int4] [--threads 1] [--json FILE]

Every model is analyzed once, then pruned by magnitude, compiled and timed at every sparsity (0: not pruned) in every
precision. ``ratio`` is predicted / measured; ``inside`` says whether the measured speedup lies in the predicted
interval.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sparse_onnx
from sparse_onnx.compilation.groups import FLOAT32, INT4, INT8
from sparse_onnx.passes.lower.forms import DENSE, FLOAT_BITS
from sparse_onnx.tools.console import table

__all__ = ["compare_model"]

_TRIES = 3
_BITS = {FLOAT32: FLOAT_BITS, INT8: 8, INT4: 4}

Case = tuple[float | None, str, str]
"""Share of zeros, mask structure, precision."""


def compare_model(model: Path, cases: list[Case], threads: int | None) -> list[dict[str, Any]]:
    """One row a case: speed and size as predicted and as measured."""
    structures = tuple(dict.fromkeys(structure for _, structure, _ in cases))
    bits = tuple(dict.fromkeys(_BITS[precision] for *_, precision in cases if precision != FLOAT32))
    analysis = sparse_onnx.analyze(
        model, mask_structures=structures, bits=bits, threads=threads, progress=_say
    )
    rows = []
    for sparsity, structure, precision in cases:
        expected = analysis.predict(sparsity, structure, _BITS[precision])
        report = _measure(model, sparsity, structure, precision, threads)
        summary = report["summary"]
        measured = summary["speedup"]  # None: every layer stayed dense, and nothing was timed
        rows.append(
            {
                "model": _name(model),
                "mask_structure": structure,
                "sparsity": sparsity,
                "precision": precision,
                "predicted": expected.speedup,
                "low": expected.low,
                "high": expected.high,
                "measured": measured,
                "measured_low": summary["speedup_low"],
                "measured_high": summary["speedup_high"],
                "ratio": None if measured is None else expected.speedup / measured,
                "inside": None if measured is None else expected.low <= measured <= expected.high,
                "bytes_ratio": expected.nbytes / summary["bytes_after"],
                "changed_predicted": len(expected.forms),
                "changed_measured": sum(row["decision"] != DENSE for row in report["layers"]),
                "analyze_seconds": sum(analysis.seconds.values()),
            }
        )
        print(_text(rows[-1:]), flush=True)
    return rows


def _measure(
    model: Path, sparsity: float | None, structure: str, precision: str, threads: int | None
) -> Mapping[str, Any]:
    """The report of ``optimize``, of another try if other programs were in the way."""
    pruning: dict[str, Any] = {"method": "magnitude", "sparsity": sparsity, "mask_structure": structure}
    for _ in range(_TRIES):
        with tempfile.TemporaryDirectory() as folder:
            report = sparse_onnx.optimize(
                model,
                Path(folder) / "out",
                **(pruning if sparsity != 0 else {}),
                precision=precision,
                threads=threads,
                timing_cache=False,
                progress=_say,
            ).report
        if all(target["quiet"] for target in report["targets"]):
            break
    return report


def _name(model: Path) -> str:
    """``resnet-50`` of ``resnet-50/dense/model.onnx``."""
    if model.stem != "model":
        return model.stem
    return model.parent.parent.name if model.parent.name == "dense" else model.parent.name


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _measured_cells(row: Mapping[str, Any]) -> tuple[str, str, str]:
    if row["measured"] is None:
        return "not timed", "-", "-"
    measured = f"{row['measured']:.2f} ({row['measured_low']:.2f}-{row['measured_high']:.2f})"
    return measured, f"{row['ratio']:.3f}", "yes" if row["inside"] else "no"


def _text(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            row["model"],
            row["mask_structure"],
            "-" if row["sparsity"] is None else f"{row['sparsity']:.0%}",
            row["precision"],
            f"{row['predicted']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
            *_measured_cells(row),
            f"{row['bytes_ratio']:.4f}",
            f"{row['changed_predicted']}/{row['changed_measured']}",
        ]
        for row in rows
    ]
    return table(
        cells,
        [
            "model",
            "pattern",
            "zeros",
            "precision",
            "predicted",
            "measured",
            "ratio",
            "inside",
            "bytes",
            "layers changed",
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    parser.add_argument("--mask-structure", nargs="+", default=["unstructured"])
    parser.add_argument("--precision", nargs="+", default=[FLOAT32], choices=list(_BITS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    cases: list[Case] = []
    for structure in arguments.mask_structure:
        implied = ":" in structure and not structure.startswith("block")
        cases += [
            (None if implied else share, structure, precision)
            for share in arguments.sparsity[: 1 if implied else None]
            for precision in arguments.precision
        ]
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        rows += compare_model(model, cases, arguments.threads)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(_text(rows))


if __name__ == "__main__":
    main()
