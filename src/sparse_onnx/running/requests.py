"""What a decoder with a cache is run for: a request has a prompt, which a prefill takes in, and new tokens, one a step.

Both are targets by default. The prefill is the one that shapes are chosen for anyway; the step has one token behind as
many as the prefill took. A request of P tokens of prompt and N new ones takes P / tokens prefills and N steps: these
are the weights of the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir

from sparse_onnx.data.inputs import Feeds, InputSpec, cache_axis, history
from sparse_onnx.document import PhaseName
from sparse_onnx.errors import UsageError
from sparse_onnx.running.input_choice import Choice, choose_inputs
from sparse_onnx.running.request import Request

__all__ = ["Phase", "Targets", "choose_targets", "phase_of"]


class Phase(NamedTuple):
    """What a decoder with a cache does in a run, and how many tokens it takes in, of all samples."""

    name: PhaseName
    tokens: int

    def per_second(self, milliseconds: float) -> float:
        """Tokens, where a run takes that long."""
        return 1000 * self.tokens / milliseconds


@dataclasses.dataclass(frozen=True)
class Targets:
    """The inputs of every target, and how much each counts; None: the worst decides. ``note`` says what the request is,
    where they are those of one; "" otherwise."""

    choices: tuple[Choice, ...]
    weights: tuple[float, ...] | None
    note: str = ""


def choose_targets(
    model: ir.Model,
    specs: Sequence[InputSpec],
    given: Sequence[Mapping[str, Sequence[int]]],
    weights: Sequence[float] | None,
    request: Request,
    data: Sequence[Feeds] = (),
) -> Targets:
    """The targets with ``given`` shapes, see :func:`choose_inputs`. Where nothing is given, a decoder with a cache has
    two, those of ``request``."""
    choices = tuple(choose_inputs(model, specs, shapes, data) for shapes in given)
    plain = Targets(choices, None if weights is None else tuple(weights))
    if any(given) or len(choices) > 1:
        return plain
    try:
        prefill = _at_most(model, choices[0], request.prompt, data)
        step = _step(prefill)
        if step is None:
            return plain
        decode = choose_inputs(model, specs, step, data)
    except UsageError:  # sizes of a step that this model does not take
        return plain
    _, tokens = history(prefill.specs, prefill.shapes)
    note = (
        f"decided for a request of {request.prompt} tokens of prompt and {request.new} new ones: a prefill of {tokens} "
        f"counts {request.prompt / tokens:g}, a token behind {tokens} counts {request.new}; say --prompt-tokens and "
        "--new-tokens for another"
    )
    return Targets((prefill, decode), (request.prompt / tokens, float(request.new)), note)


def phase_of(specs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]) -> Phase | None:
    """What a decoder with a cache does with inputs of these ``shapes``; None of any other model."""
    ids = _tokens(specs)
    if ids is None or all(cache_axis(spec) is None for spec in specs):
        return None
    past, _ = history(specs, shapes)
    return Phase("decode" if past else "prefill", math.prod(shapes[ids.name][:2]))


def _tokens(specs: Sequence[InputSpec]) -> InputSpec | None:
    """The input that the tokens come by."""
    return next(
        (
            spec
            for spec in specs
            if spec.name.endswith(("input_ids", "inputs_embeds")) and len(spec.shape or ()) > 1
        ),
        None,
    )


def _at_most(model: ir.Model, choice: Choice, prompt: int, data: Sequence[Feeds]) -> Choice:
    """``choice``, or one of ``prompt`` tokens, where its number of tokens was guessed and is larger."""
    ids = _tokens(choice.specs)
    if ids is None or (ids.shape or ())[1] not in choice.sizes.guessed:
        return choice
    batch, tokens, *others = choice.shapes[ids.name]
    if prompt >= tokens:
        return choice
    return choose_inputs(model, choice.specs, {ids.name: (batch, prompt, *others)}, data)


def _step(prefill: Choice) -> dict[str, tuple[int, ...]] | None:
    """Shapes for one token behind ``prefill``; None if it is none, or no step can follow."""
    ids = _tokens(prefill.specs)
    caches = {
        spec.name: axis
        for spec in prefill.specs
        if (axis := cache_axis(spec)) is not None and not isinstance((spec.shape or ())[axis], int)
    }
    off = any("use_cache" in spec.name.lower() and spec.value is False for spec in prefill.specs)
    if ids is None or isinstance((ids.shape or ())[1], int) or not caches or off:
        return None
    batch, tokens, *others = prefill.shapes[ids.name]
    if tokens < 2 or any(prefill.shapes[name][axis] for name, axis in caches.items()):
        return None
    shapes = {ids.name: (batch, 1, *others)}
    for name, axis in caches.items():
        shape = list(prefill.shapes[name])
        shape[axis] = tokens
        shapes[name] = tuple(shape)
    return shapes
