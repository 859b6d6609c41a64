"""What a plan is as a recipe: pruning and quantizing passes, and whose inputs may be rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from sparse_onnx.analysis.choice import Choice
from sparse_onnx.analysis.forecast import Plan
from sparse_onnx.compilation.groups import FLOAT32, INT4, INT8
from sparse_onnx.compilation.recipe import Recipe, RecipeStage
from sparse_onnx.model.weights import Selection, Weight
from sparse_onnx.passes.base import Pass, Stage
from sparse_onnx.passes.lower.forms import FLOAT_BITS
from sparse_onnx.passes.quantize.by_bits import usual_grid
from sparse_onnx.passes.quantize.layers import resolved_bits
from sparse_onnx.passes.quantize.weight import QuantizeWeights
from sparse_onnx.search.plans import choices_of
from sparse_onnx.search.tables import rounding_of

__all__ = ["Templates", "bits_of", "mean_bits", "modifiers", "recipe_of", "with_passes"]

_FEW_BITS = 4


@dataclasses.dataclass(frozen=True)
class Templates:
    """The passes that make what is searched for, with their options; their own share of zeros and bits do not count.
    None: it is not searched for."""

    zeros: Pass | None = None
    bits: QuantizeWeights | None = None

    def group_sizes(self, bits: Iterable[int]) -> dict[int, int]:
        """Inputs that share a scale in weights of so many ``bits``, where that is another number than usual."""
        step = self.bits
        if step is None or step.group_size == usual_grid(step.bits).group_size:
            return {}
        few = step.bits <= _FEW_BITS
        return {own: step.group_size for own in bits if not few or own <= _FEW_BITS}

    @property
    def selection(self) -> Selection:
        """The weights that one of them is for, at least."""
        known = [step.selection for step in (self.zeros, self.bits) if step is not None]
        targets = () if any(not own.targets for own in known) else known[0].targets
        ignored = [set(own.ignore) for own in known]
        return Selection(targets, tuple(e for e in known[0].ignore if all(e in own for own in ignored)))

    def choices(
        self, weight: Weight, structures: Iterable[str], bits: Iterable[tuple[int, int]]
    ) -> list[Choice]:
        """What a weight of floats may become: zeros in these patterns, and as many ``bits`` (of its own, and that
        activations are rounded to) as are possible with its shape."""
        zeros = self.zeros is not None and self.zeros.selection.reason_against(weight) is None
        possible = [
            pair
            for pair in bits
            if self.bits is not None
            and dataclasses.replace(self.bits, bits_of={weight.name: pair[0]}).reason_against(weight) is None
        ]
        return choices_of(structures if zeros else (), possible)


def recipe_of(
    plan: Plan,
    recipe: Recipe,
    templates: Templates,
    sizes: Mapping[str, int],
    rows: Mapping[str, int] = MappingProxyType({}),
) -> Recipe:
    """``recipe`` with the passes that ``plan`` is; layers whose inputs it has in floats get no operator that rounds
    them. ``sizes`` are the elements of the weights, ``rows`` the lengths of the rows of tables."""
    tables = {name: choice.bits for name, choice in plan.items() if name in rows}
    plan = {name: choice for name, choice in plan.items() if name not in rows}
    if templates.zeros is not None:
        recipe = with_passes(recipe, Stage.PRUNE, modifiers(plan, templates.zeros, sizes))
    for bits in sorted(set(tables.values())):
        own = {name: rows[name] for name in tables if tables[name] == bits}
        recipe = with_passes(recipe, Stage.QUANTIZE, rounding_of(bits, own))
    few = bits_of(plan)
    if templates.bits is None or not few:
        return dataclasses.replace(recipe, target=dataclasses.replace(recipe.target, precision=FLOAT32))
    floats = tuple(name for name in few if plan[name].activations == FLOAT_BITS)
    target = dataclasses.replace(
        recipe.target,
        precision=INT8 if min(few.values()) > _FEW_BITS else INT4,
        float_inputs=(*recipe.target.float_inputs, *floats),
    )
    quantizing = (templates.bits.with_bits(few),)
    return with_passes(dataclasses.replace(recipe, target=target), Stage.QUANTIZE, quantizing)


def bits_of(plan: Plan) -> dict[str, int]:
    """The bits of every weight that has few, by name: 7 in place of 8 where products of bytes would saturate."""
    return {
        name: resolved_bits(None) if choice.bits == choice.activations == 8 else choice.bits
        for name, choice in plan.items()
        if choice.bits < FLOAT_BITS
    }


def mean_bits(plan: Plan, sizes: Mapping[str, int]) -> float:
    """Of one weight in the mean, by their ``sizes``."""
    total = sum(sizes.values())
    bits = sum(size * (plan[name].bits if name in plan else FLOAT_BITS) for name, size in sizes.items())
    return bits / total if total else float(FLOAT_BITS)


def modifiers(plan: Plan, template: Pass, sizes: Mapping[str, int]) -> tuple[Pass, ...]:
    """The zeros of ``plan`` as pruning passes with the options of ``template``, whose own share does not count.

    ``sizes`` are the elements of the weights. Each pattern is asked of the template on its own.
    """
    zeros = {name: choice for name, choice in plan.items() if choice.sparsity > 0}
    passes: list[Pass] = []
    for structure in dict.fromkeys(choice.structure for choice in zeros.values()):
        shares = {name: choice.sparsity for name, choice in zeros.items() if choice.structure == structure}
        passes += template.with_shares(shares, structure, sizes)
    return tuple(passes)


_WORDS = {Stage.PRUNE: "prune", Stage.QUANTIZE: "quantize"}


def with_passes(recipe: Recipe, stage: Stage, passes: tuple[Pass, ...]) -> Recipe:
    """``recipe`` with these passes of one ``stage`` as a stage of its own: before what has to follow them, behind all
    else."""
    early, late = (
        tuple(
            RecipeStage(kept.name, own)
            for kept in recipe.stages
            if (own := tuple(step for step in kept.modifiers if (step.stage > stage) is follows))
        )
        for follows in (False, True)
    )
    added = (RecipeStage(_WORDS[stage], passes),) if passes else ()
    return dataclasses.replace(recipe, stages=(*early, *added, *late))
