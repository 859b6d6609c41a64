"""Whether data looks like the data that a model was calibrated on, by what layers see of it.

A method that prunes with data lets layers be wrong where their inputs never went. How much of other data goes there is
known from second moments alone: with A and B those of both data, inputs scaled so that A has a unit diagonal, it is
tr((A + λI)⁻¹(B + λI)) / K, the mean over all directions of B's energy against A's. A few layers of the dense model
and some of their channels tell enough.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import UsageError
from sparse_onnx.model.weights import RECURRENT, Weight, find_weights
from sparse_onnx.passes.base import Pipeline
from sparse_onnx.passes.calibration import Calibrator, Options
from sparse_onnx.passes.calibration.captures import find_captures
from sparse_onnx.passes.presets import PREPARATION_PASSES
from sparse_onnx.progress import is_lasting

__all__ = ["PROFILE_FILE", "UNLIKE", "Profile", "profile_of", "unlikeness", "warn_of"]

PROFILE_FILE = "calibration.npz"
"""Beside a compiled model: the :class:`Profile` of its calibration data."""

UNLIKE = 1.25
"""From this :func:`unlikeness` on data is called unlike. A sentence encoder calibrated on help topics has .93 on
other help topics and 1.36 on quotations and on glosses, where it loses three times as much."""

_LAYERS, _CHANNELS, _BATCHES = 5, 128, 16
_TOKENS = 20  # a channel, at least: moments of fewer tokens are too rough to be inverted
_SHIFT, _FLOOR = 0.01, 1e-3  # of the mean diagonal: λ, and the power that a channel counts with at least


@dataclasses.dataclass(frozen=True, eq=False)
class Profile:
    """Mean second moments [C, C] of some channels of some layers' inputs, float64, by the name of the layer's weight.

    ``within`` is what one half of the data has against the other half: the noise of so much data.
    """

    moments: Mapping[str, np.ndarray]
    within: float = 1.0

    def save(self, path: Path) -> None:
        """Write an .npz; raises HostError if that fails."""
        arrays = {f"moments.{name}": moments.astype(np.float32) for name, moments in self.moments.items()}
        np.savez(path, within=np.float64(self.within), **arrays)  # type: ignore[arg-type]  # never allow_pickle

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read what :meth:`save` wrote; UsageError if it is something else."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                within = float(file["within"])
                moments = {
                    name.removeprefix("moments."): np.asarray(file[name], np.float64)
                    for name in file.files
                    if name != "within"
                }
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path}: no profile of calibration data ({error}): delete it") from error
        square = all(
            m.ndim == 2 and m.shape[0] == m.shape[1] and np.isfinite(m).all() for m in moments.values()
        )
        if not square or not within > 0:
            raise UsageError(f"{path}: the profile of the calibration data is damaged: delete it")
        return cls(moments, within)


def profile_of(
    model: ir.Model,
    samples: Samples,
    options: Options,
    *,
    work: Path,
    like: Profile | None = None,
    progress: Callable[[str], None] = lambda _message: None,
) -> Profile:
    """What up to five layers of ``model``, a dense model, see of some batches; of the layers and channels of ``like``.

    ``model`` stays as it is. Weights are named as they are after clean-up, by which the compiler names them. Layers
    that see too few tokens, or far fewer than others (a pooler), are left out. Scratch files go to ``work``.
    """
    model = model.clone()
    Pipeline(PREPARATION_PASSES)(model)
    weights = _some_weights(model, None if like is None else like.moments.keys())
    count = min(len(samples), _BATCHES)
    numbers = [index * len(samples) // count for index in range(count)]

    def say(line: str) -> None:
        if not is_lasting(line):  # few tokens are no fault here
            progress(f"likeness of the data: {line}")

    halves = [
        _moments(model, weights, samples.chosen(part), options, work, say)
        for part in (numbers[::2], numbers[1::2])
        if part
    ]
    moments, pairs = {}, []
    most = max((count for half in halves for _, count in half.values()), default=0)
    for weight in weights:
        sums = [half[weight.name] for half in halves if weight.name in half]
        tokens = sum(count for _, count in sums)
        if not sums or 2 * sums[0][1] < most:
            continue
        K = len(sums[0][0])
        width = min(K, _CHANNELS, int(tokens) // _TOKENS) if like is None else len(like.moments[weight.name])
        if not 2 <= width <= K:
            continue
        channels = np.linspace(0, K - 1, width).astype(int)
        cut = [gram[np.ix_(channels, channels)] for gram, _ in sums]
        moments[weight.name] = sum(cut) / tokens
        if len(sums) == 2:
            pairs.append([gram / count for gram, (_, count) in zip(cut, sums, strict=True)])
    if not pairs:
        return Profile(moments)
    energies = [(_energy(one, other) + _energy(other, one)) / 2 for one, other in pairs]
    return Profile(moments, float(np.mean(energies)))


def unlikeness(known: Profile, seen: Profile) -> float | None:
    """How unlike the data of ``seen`` is to that of ``known``: 1 where it is as like as one half of that to the other,
    more where it goes in directions that the other hardly has. None where no layer is in both."""
    both = [name for name in known.moments if name in seen.moments]
    pairs = [(known.moments[name], seen.moments[name]) for name in both]
    energies = [_energy(*pair) for pair in pairs if pair[0].shape == pair[1].shape]
    return float(np.mean(energies) / max(known.within, 1.0)) if energies else None


def warn_of(found: float | None, what: str, progress: Callable[[str], None]) -> None:
    """Tell that ``what`` (some data) is unlike the calibration data, if ``found`` says so."""
    if found is not None and found >= UNLIKE:
        progress(
            f"warning: {what} looks unlike the calibration data ({found:.2f}; alike is 1.0, unlike from {UNLIKE:g} "
            "on): what was pruned for that data loses more here; calibrate on some of this kind, too"
        )


def _energy(A: np.ndarray, B: np.ndarray) -> float:
    """tr((A + λI)⁻¹(B + λI)) / K, inputs scaled to a unit diagonal of A."""
    power = A.diagonal()
    scale = np.sqrt(np.maximum(power, max(_FLOOR * float(power.mean()), np.finfo(np.float64).tiny)))
    shift = _SHIFT * np.eye(len(A))
    first, second = (matrix / scale / scale[:, None] + shift for matrix in (A, B))
    return float(np.trace(np.linalg.solve(first, second)) / len(A))


def _some_weights(model: ir.Model, names: Collection[str] | None) -> list[Weight]:
    """The weights of these names, or of five layers from the first to the last that read different values."""
    weights = [weight for weight in find_weights(model)[0] if weight.nodes[0].op_type not in RECURRENT]
    captures, _ = find_captures(model, weights)
    if names is not None:
        return [weight for weight in weights if weight.name in captures and weight.name in names]
    order = {id(node): index for index, node in enumerate(model.graph)}
    distinct = {captures[weight.name]: weight for weight in reversed(weights) if weight.name in captures}
    every = sorted(distinct.values(), key=lambda weight: min(order[id(node)] for node in weight.nodes))
    count = min(len(every), _LAYERS)
    return [every[round(index)] for index in np.linspace(0, len(every) - 1, count)]


def _moments(
    model: ir.Model,
    weights: Sequence[Weight],
    samples: Samples,
    options: Options,
    work: Path,
    say: Callable[[str], None],
) -> dict[str, tuple[np.ndarray, float]]:
    """X'X of the first group or block of every layer's input, and the number of tokens."""
    statistics = Calibrator(model, weights, samples, options, work=work, progress=say).oneshot()
    found = {}
    for name in statistics:
        first = statistics[name][0]
        gram = first.gram[0] if isinstance(first.gram, tuple) else first.gram
        if gram.ndim == 2:
            found[name] = np.asarray(gram, np.float64), first.count
    return found
