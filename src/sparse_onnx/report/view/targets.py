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
            "name": _name(target),
            "interval": "-"
            if target["speedup"] is None
            else f"{target['speedup']:.2f}× ({target['speedup_low']:.2f} to {target['speedup_high']:.2f})",
        }
        for target in targets
    ]


def _name(target: Row) -> str:
    """What is run: of a decoder with a cache what it does, of others the shapes."""
    if target.get("phase") is None:
        return ", ".join(f"{name} {shape}" for name, shape in target["input_shapes"].items())
    name = f"{target['tokens']} of prompt" if target["phase"] == "prefill" else "decode"
    if (after := target["optimized_tokens_per_second"]) is None:
        return name
    return f"{name}: {target['dense_tokens_per_second']:.1f} tokens/s, now {after:.1f}"


def targets_answer(targets: Sequence[Row]) -> str:
    """The heading of the table."""
    speedups = [target["speedup"] for target in targets if target["speedup"] is not None]
    if not speedups:
        return f"{len(targets)} input shapes were decided for"
    phases = {target.get("phase"): target["speedup"] for target in targets}
    if len(targets) == 2 and None not in phases and len(phases) == 2:
        return f"First token {phases['prefill']:.2f}× as fast, each behind it {phases['decode']:.2f}×"
    return f"{min(speedups):.2f}× to {max(speedups):.2f}× the speed at {len(targets)} input shapes"
