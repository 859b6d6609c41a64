"""What a pass is: options, a promise that is checked, statistics, and places declined with a reason.

A pass is a frozen dataclass whose fields are its options, validated when it is built. Calling it changes an
``onnx_ir.Model`` in place and returns a :class:`PassResult`. A :class:`Pipeline` is a pass made of passes.

The base class, not the author, checks the types of the options and the promise: the result has the right
type, and ``modified`` is true exactly if the graph or a tensor changed. A failure names the pass, the passes
that ran before it, and the cause.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.errors import PassError, SparseOnnxError, UsageError
from sparse_onnx.model.weights import Selection, Weight
from sparse_onnx.options import check_types

if TYPE_CHECKING:
    from sparse_onnx.data.samples import Samples
    from sparse_onnx.passes.calibration import Options as CalibrationOptions

__all__ = [
    "CalibrationData",
    "Declined",
    "LayerChange",
    "Pass",
    "PassContext",
    "PassResult",
    "Pipeline",
    "Stage",
    "Zeros",
    "fingerprint",
    "in_memory",
]


class Stage(enum.IntEnum):
    """Where in a pipeline a pass belongs. Passes run in this order (design: a later stage would be undone
    or invalidated by an earlier one)."""

    CLEAN = 0
    STRUCTURE = 1
    """Remove whole units: neurons, heads, channels."""
    FACTOR = 2
    """Write a weight as a product of smaller ones; what follows sees the factors."""
    SCALE = 3
    PERMUTE = 4
    PRUNE = 5
    REFIT = 6
    QUANTIZE = 7
    """Give the weights fewer values: on a grid, or of a codebook. The zeros stay."""
    CORRECT = 8
    FUSE = 9
    LOWER = 10


@dataclasses.dataclass(frozen=True)
class Declined:
    """A place that a pass left as it was."""

    pass_name: str
    place: str
    reason: str


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """Zeros of one weight before and after a pass; ``name`` is the initializer's. ``error`` is ‖X(W − W′)‖ / ‖XW‖ on
    calibration data, where that is known. ``bias`` is the initializer that holds the layer's bias now, by name, and
    the tensor that it was, if the pass changed that, too. Of a weight that was quantized: the ``bits`` of an integer,
    the ``group_size`` of inputs that share a scale (0: all), and ``nbytes``, what it takes in the file."""

    name: str
    size: int
    zeros_before: int
    zeros_after: int
    error: float | None = None
    bias: tuple[str, ir.TensorProtocol] | None = None
    bits: int | None = None
    group_size: int | None = None
    nbytes: int | None = None


@dataclasses.dataclass(frozen=True)
class PassResult:
    """``statistics`` counts what was done, by name; ``layers`` lists the weights whose zeros changed."""

    model: ir.Model
    modified: bool
    statistics: dict[str, int | float] = dataclasses.field(default_factory=dict)
    declined: tuple[Declined, ...] = ()
    layers: tuple[LayerChange, ...] = ()
    seconds: float = 0.0
    steps: tuple[tuple[str, PassResult], ...] = ()
    """Of a pipeline: the name and result of every pass in it, in order."""


def in_memory(array: np.ndarray, name: str) -> ir.TensorProtocol:
    """Keep a changed weight in memory: the default store of a :class:`PassContext`."""
    return ir.tensor(array, name=name)


def _silent(_message: str) -> None:
    return None


def _unseen(_name: str, _model: ir.Model) -> None:
    return None


@dataclasses.dataclass(frozen=True)
class CalibrationData:
    """Real inputs of the model, and how to run it on them; scratch files go to ``work``.

    ``statistics`` is a file for what one-shot calibration finds: read if it fits, written if not. ``checkpoint`` is a
    folder for finished layers, from which an interrupted run goes on.
    """

    samples: Samples
    work: Path
    options: CalibrationOptions | None = None
    statistics: Path | None = None
    checkpoint: Path | None = None


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What a pass may use of its surroundings.

    ``store(array, name)`` turns a new weight into a tensor; a store that spools to disk keeps memory bounded.
    ``progress(message)`` tells the user where a long pass is. ``calibration`` is for passes that need real inputs.
    ``spared`` are weights that pruning leaves alone, by name, with the reason. ``dense`` is the model as it was before
    it was pruned, with the same nodes, where what follows may still aim at its outputs. ``after(name, model)`` is
    called behind every pass.
    """

    store: Callable[[np.ndarray, str], ir.TensorProtocol] = in_memory
    progress: Callable[[str], None] = _silent
    calibration: CalibrationData | None = None
    spared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dense: ir.Model | None = None
    after: Callable[[str, ir.Model], None] = _unseen

    def calibration_for(self, pass_name: str) -> CalibrationData:
        """The real inputs that the pass cannot do without; UsageError if there are none."""
        if self.calibration is None:
            raise UsageError(f"{pass_name} needs calibration data: give --calibration-data with real inputs")
        return self.calibration


@dataclasses.dataclass(frozen=True)
class Zeros:
    """What share of a weight will be zero, in [0, 1], None if that is not known beforehand, and in which pattern."""

    share: float | None
    structure: str


class Pass(abc.ABC):
    """Base of all passes; see the module's docstring.

    A subclass is a frozen dataclass, sets ``name`` and ``stage``, and implements :meth:`apply`. What the compiler
    wants to know of a pass it asks the pass itself: the other members have answers that fit most.

    Attributes:
        name: As recipes write it.
        stage: Where in a pipeline it belongs.
        in_recipes: Recipes may name it; the compiler runs the others itself.
        idempotent: A second run changes nothing.
        needs_calibration: The context must have real inputs.
        takes_shares: It can give every weight a share of zeros of its own, see :meth:`with_shares`.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    in_recipes: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = False
    takes_shares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        try:
            check_types(self)
            self.check()
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from error

    def check(self) -> None:  # noqa: B027  # most passes have nothing to add
        """Raise UsageError if an option is out of range or the options do not fit together."""

    @abc.abstractmethod
    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        """Change ``model`` in place and tell what was done."""

    def __call__(self, model: ir.Model, context: PassContext | None = None) -> PassResult:
        context = context or PassContext()
        before = fingerprint(model)
        start = time.perf_counter()
        result = self.apply(model, context)
        seconds = time.perf_counter() - start
        if not isinstance(result, PassResult) or result.model is not model:
            raise PassError(f"pass {self.name}: apply() must return a PassResult with the model it was given")
        if result.modified != (fingerprint(model) != before):
            said = "modified" if result.modified else "not modified"
            raise PassError(f"pass {self.name} reports the model as {said}, which is not true")
        context.after(self.name, model)
        return dataclasses.replace(result, seconds=seconds)

    @property
    def selection(self) -> Selection:
        """The weights that it is for."""
        return Selection((), ())

    @property
    def sees_pruned_inputs(self) -> bool:
        """Whether a layer's inputs are taken for those that it has behind the layers changed before it."""
        return False

    def stand_in(self) -> Pass | None:
        """What takes its place in a plan, which has no real inputs and no time; None: it is left out."""
        return None if self.needs_calibration else self

    def zeros_of(self, weight: Weight) -> Zeros | None:
        """The zeros that it gives ``weight``; None: it gives it none."""
        return None

    def with_shares(
        self, shares: Mapping[str, float], structure: str, sizes: Mapping[str, int]
    ) -> tuple[Pass, ...]:
        """Passes with these options that give each weight, by name, its own of ``shares`` in the pattern ``structure``
        and leave all others alone; ``sizes`` are the elements of the weights. Only where ``takes_shares``."""
        raise PassError(f"{self.name} takes no shares of zeros")

    def options(self) -> dict[str, Any]:
        """The options by name, as a recipe would write them."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
        values = {field.name: getattr(self, field.name) for field in fields}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def declined(self, place: str, reason: str) -> Declined:
        return Declined(self.name, place, reason)


@dataclasses.dataclass(frozen=True)
class Pipeline(Pass):
    """Passes that run one after another, in the order of their stages; itself a pass, so pipelines nest."""

    name: ClassVar[str] = "pipeline"
    stage: ClassVar[Stage] = Stage.CLEAN
    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        ordered = tuple(_flatten(self.passes))
        for first, second in itertools.pairwise(ordered):
            if second.stage < first.stage:
                raise UsageError(
                    f"{second.name} ({second.stage.name.lower()}) cannot run after {first.name} "
                    f"({first.stage.name.lower()}); the order is {', '.join(s.name.lower() for s in Stage)}"
                )

    def apply(self, model: ir.Model, context: PassContext) -> PassResult:
        steps: list[tuple[str, PassResult]] = []
        for step in self.passes:
            try:
                result = step(model, context)
            except SparseOnnxError as error:
                if isinstance(error, PassError) or not steps:
                    raise
                raise type(error)(f"{error} (in pass {step.name}{_after(steps)})") from error
            except Exception as error:  # whatever a pass meets, it is told with the pass's name
                raise PassError(
                    f"pass {step.name} failed{_after(steps)}: {type(error).__name__}: {error}"
                ) from error
            steps.append((step.name, result))
        statistics: dict[str, int | float] = {}
        for name, result in steps:
            statistics.update({f"{name}.{key}": value for key, value in result.statistics.items()})
        return PassResult(
            model,
            any(result.modified for _, result in steps),
            statistics,
            tuple(place for _, result in steps for place in result.declined),
            tuple(layer for _, result in steps for layer in result.layers),
            steps=tuple(steps),
        )


def _after(steps: Sequence[tuple[str, PassResult]]) -> str:
    return f" after {', '.join(name for name, _ in steps)}" if steps else ""


def _flatten(passes: Iterable[Pass]) -> Iterator[Pass]:
    for step in passes:
        if isinstance(step, Pipeline):
            yield from _flatten(step.passes)
        else:
            yield step


class _Identity:
    """Equal only to itself; keeps the object alive, so that its id is not used again."""

    __slots__ = ("thing",)

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def fingerprint(model: ir.Model) -> list[Any]:
    """Changes when a node, edge, attribute, tensor object or a tensor's metadata of the model does."""
    parts: list[Any] = [model.ir_version, sorted(model.opset_imports.items()), list(model.functions)]
    graphs = [model.graph, *model.graph.subgraphs()]
    for function in model.functions.values():
        graphs += [function.graph, *function.subgraphs()]
    for graph in graphs:
        parts.append([value.name for value in graph.inputs])
        parts.append([value.name if value is not None else None for value in graph.outputs])
        for name, value in graph.initializers.items():
            parts.append((name, _Identity(value.const_value), sorted(value.metadata_props.items())))
        for node in graph:
            inputs = [value.name if value is not None else None for value in node.inputs]
            attributes = [(name, _Identity(attribute)) for name, attribute in node.attributes.items()]
            outputs = [value.name for value in node.outputs]
            parts.append((node.domain, node.op_type, node.name, inputs, outputs, attributes))
    return parts
