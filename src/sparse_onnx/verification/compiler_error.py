"""Whether a compiled model is what its weights say: the compiler's error, judged against what rounding explains.

An error up to the threshold passes. Above it, the dense model is held against itself (:mod:`.yardstick`), and the
values inside are compared layer by layer, each from the dense model's own inputs (:mod:`.layer_trace`). The compiler is
at fault if an output lies farther off than rounding explains, or a single layer does: that shows a wrong layer also
where the outputs are too small or too noisy to tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from sparse_onnx.data.inputs import Feeds
from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.units import format_number
from sparse_onnx.verification.comparison import Difference
from sparse_onnx.verification.layer_trace import LayerTrace, trace_layers
from sparse_onnx.verification.yardstick import Rounding, exceeding, measure_rounding, perturbed

__all__ = ["CompilerError", "judge"]


@dataclasses.dataclass(frozen=True)
class CompilerError:
    """How far a compiled model lies from the dense one that it stands for, and whether that is a fault.

    Attributes:
        found: The difference of the outputs.
        threshold: What passes without a question.
        rounding: What rounding moves the dense model's outputs by; {} if nothing was above the threshold.
        trace: The values inside, layer by layer; None if nothing was above the threshold, or if that failed.
    """

    found: Difference
    threshold: float
    rounding: Mapping[str, Rounding] = dataclasses.field(default_factory=dict)
    trace: LayerTrace | None = None

    @property
    def exceeding(self) -> list[Difference]:
        """The outputs that are farther off than rounding explains, the largest error first."""
        return exceeding(self.found, self.threshold, self.rounding)

    @property
    def at_fault(self) -> bool:
        """Whether an output or a single layer is farther off than rounding explains."""
        return bool(self.exceeding) or (self.trace is not None and self.trace.jump is not None)

    @property
    def worst(self) -> Difference:
        """The output with the largest error that rounding does not explain, or with the largest of all."""
        return next(iter(self.exceeding), None) or max(self.found.outputs, key=lambda x: x.relative_error)

    def rounding_document(self) -> dict[str, float | None]:
        """For JSON: the relative error of the dense model against itself by output; None where it has no number."""
        return {
            name: own.relative if math.isfinite(own.relative) else None for name, own in self.rounding.items()
        }

    def describe(self) -> str:
        """The worst output, what is allowed, what rounding does, and where it begins."""
        worst = self.worst
        name = worst.worst_output
        text = (
            f"relative error {worst.relative_error:.2e} at output {name}, allowed {self.threshold:g} "
            f"(--max-compiler-error)"
        )
        if name in self.rounding:
            own = format_number(self.rounding[name].relative)
            text += f"; stock ONNX Runtime differs from itself by {own} there"
        if self.trace is not None:
            jump = self.trace.jump
            text += (
                f". It begins at {jump.describe()}: {format_number(jump.own_error)} on its own"
                if jump is not None
                else ". No layer by itself is off by more than rounding explains"
            )
        return text


def judge(
    dense: ir.Model,
    compiled: ir.Model,
    batches: Sequence[Feeds],
    found: Difference,
    bench: Workbench,
    *,
    threshold: float,
    library: bool,
) -> CompilerError:
    """Judge ``found``, the difference of ``compiled`` from ``dense`` on ``batches``.

    ``library`` says whether it was run with the kernel library.
    """
    if not exceeding(found, threshold, {}):
        return CompilerError(found, threshold)
    plain = dense.clone()
    InlinePass()(plain)
    rounding = measure_rounding(plain, batches, bench)
    trace = None
    try:
        with model_io.Spool(bench.work) as spool:
            trace = trace_layers(
                dense,
                compiled,
                batches,
                bench,
                threshold=threshold,
                library=library,
                title="pruned dense model",
                moved=perturbed(plain, spool.put),
            )
    except UsageError as error:  # of a model that runs as it is, but not with its values given out
        bench.progress(f"warning: layers could not be compared: {error}")
    return CompilerError(found, threshold, rounding, trace)
