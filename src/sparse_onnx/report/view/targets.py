"""Time by input shape."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_onnx.report.view.words import Row

__all__ = ["target_rows", "targets_answer"]


def target_rows(targets: Sequence[Row]) -> list[Row]:
    """A row for each set of input shapes; none if there is only one, which the figures above are of."""
    if len(targets) < 2:
        return []
    return [
        {
            **target,
            "name": ", ".join(f"{name} {shape}" for name, shape in target["input_shapes"].items()),
            "interval": "-"
            if target["speedup"] is None
            else f"{target['speedup']:.2f}× ({target['speedup_low']:.2f} to {target['speedup_high']:.2f})",
        }
        for target in targets
    ]


def targets_answer(targets: Sequence[Row]) -> str:
    """The heading of the table."""
    speedups = [target["speedup"] for target in targets if target["speedup"] is not None]
    if not speedups:
        return f"{len(targets)} input shapes were decided for"
    return f"{min(speedups):.2f}× to {max(speedups):.2f}× the speed at {len(targets)} input shapes"
