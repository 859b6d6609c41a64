"""Gradients of a loss with respect to the weights of linears and convolutions: what ``prune.gradient`` ranks by.

The loss has no need of labels. Where they are missing, it is one whose squared gradient, on average over its random
draws, is the curvature of a distance from the model's present outputs. (That distance itself is of no use: it is
smallest at the present weights, so its gradient is zero there; the same holds for the cross entropy against the model's
own soft prediction.)

- Labels among the inputs (``labels``, or ``start_positions`` and ``end_positions``): the model's own ``loss``.
- A causal language model of transformers: its own loss, with the tokens that are no padding as labels.
- Outputs named ``logits``, ``start_logits`` and so on: the cross entropy against labels drawn from the model's own
  prediction. Its squared gradient is the Fisher information, the curvature of the KL divergence (Martens, New Insights
  and Perspectives on the Natural Gradient Method, 2020, section 9).
- ``last_hidden_state``: v · ẑ with ẑ the mean over the tokens that are no padding, normalised, and v ~ N(0, 1). Its
  squared gradient is the diagonal of JᵀJ, J = ∂ẑ/∂w: the curvature of ½ ‖ẑ' − ẑ‖² = 1 − cos(ẑ', ẑ).
- Anything else: v · z with the first output z; the curvature of ½ ‖z' − z‖².
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.data.gradient_file import WeightGradients
from sparse_onnx.errors import UsageError
from sparse_onnx.exporter._extras import require
from sparse_onnx.exporter._inference_copy import inference_copy
from sparse_onnx.exporter.huggingface import load_pretrained

__all__ = ["LABELS", "Loss", "loss_gradients"]

LABELS = ("labels", "start_positions", "end_positions")
"""Inputs by which transformers' models compute a loss of their own."""

Loss = Callable[[Any, Mapping[str, Any]], Any]
"""Takes the outputs of the module and the inputs of the batch, gives a scalar tensor."""

_IGNORED = -100  # a label that transformers leaves out of the loss
_CAUSAL = ("ForCausalLM", "LMHeadModel")


def loss_gradients(
    module: Any,
    batches: Iterable[Mapping[str, Any]],
    loss: Loss | None = None,
    *,
    model: ir.Model | None = None,
    task: str | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, WeightGradients]:
    """Mean |∂L/∂w| and mean (∂L/∂w)² over ``batches``, for every weight of a linear or a convolution.

    Args:
        module: A torch.nn.Module, or a Hugging Face model folder. A module stays as it is and is run in evaluation
            mode, with pruning masks and parametrizations multiplied out.
        batches: Inputs by the names of ``forward``'s parameters, NumPy arrays or tensors. With one sample in each,
            the mean of squares is the diagonal of the Fisher information; the gradients of larger batches are
            averaged before they are squared.
        loss: By default as the module's docstring says.
        model: The export of ``module``. The gradients are then those of its initializers, also where a normalization
            was folded into a convolution (w' = s · w for every output channel, so ∂L/∂w' = ∂L/∂w / s); weights that
            it does not have, or has in another form, are left out.
        task: What the model of a folder is for, as :func:`~sparse_onnx.exporter.export_huggingface` takes it.
        seed: Of the random draws of that default.
        progress: Told after every batch.

    Returns:
        Float32 [K, N] by the names of the parameters, which are those of the initializers of an export; a tied weight
        under each of its names, with the sum over its uses. Weights on which no loss depends are left out.

    Raises UsageError when there is no batch, the module does not run on one, the loss is no finite scalar, or it
    depends on no weight; what export_huggingface() raises for a folder.
    """
    torch = require("torch")
    if isinstance(module, str | os.PathLike):
        module = load_pretrained(Path(module), task)
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"loss_gradients() takes a torch.nn.Module or a folder, not {type(module).__name__}")
    frozen = inference_copy(module)
    names = dict(_layer_weights(frozen))
    tensors = {id(weight): weight for weight, _ in names.values()}
    sums: dict[int, tuple[Any, Any]] = {}
    default = _DefaultLoss(seed)
    count = 0
    for batch in batches:
        inputs = _inputs(frozen, batch)
        for key, gradient in _gradients(frozen, tensors, inputs, loss or default, count).items():
            if key not in sums:
                sums[key] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            sums[key][0].add_(gradient.abs())
            sums[key][1].addcmul_(gradient, gradient)
        count += 1
        if progress is not None:
            progress(f"gradients of {count} batches")
    if not count:
        raise UsageError("no data to compute gradients from: give at least one batch")
    if not sums:
        raise UsageError(
            f"the loss depends on no weight of a linear or convolution of {type(module).__name__}"
        )
    means = {key: tuple((total / count).cpu().numpy() for total in pair) for key, pair in sums.items()}
    found = {
        name: WeightGradients(*(_matrix(array, transposed) for array in means[id(weight)]))
        for name, (weight, transposed) in names.items()
        if id(weight) in means
    }
    if model is None:
        return found
    matrices = {
        name: _matrix(weight.detach().float().cpu().numpy(), transposed)
        for name, (weight, transposed) in names.items()
    }
    fitted = {
        name: fit
        for name, gradients in found.items()
        if (fit := _fitted(gradients, matrices[name], model.graph.initializers.get(name))) is not None
    }
    if not fitted:
        raise UsageError(
            "the model has none of the weights that the loss depends on: is it an export of the module?"
        )
    return fitted


def _layer_weights(module: Any) -> Iterator[tuple[str, tuple[Any, bool]]]:
    """(name of the parameter, (tensor, whether it is [N, K...])) of all linears and convolutions."""
    nn = require("torch.nn")
    for path, layer in module.named_modules(remove_duplicate=False):
        name = f"{path}.weight" if path else "weight"
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            yield name, (layer.weight, True)
        elif type(layer).__name__ == "Conv1D":  # transformers' name for a linear with a weight [K, N]
            yield name, (layer.weight, False)


def _matrix(stored: np.ndarray, transposed: bool) -> np.ndarray:
    return np.ascontiguousarray(stored.reshape(stored.shape[0], -1).T) if transposed else stored


def _fitted(gradients: WeightGradients, W: np.ndarray, value: ir.Value | None) -> WeightGradients | None:
    """The gradients of the initializer ``value``, which holds W [K, N] with its output channels scaled, or None."""
    if value is None or value.const_value is None:
        return None
    stored = value.const_value.numpy().astype(np.float32)
    flat = stored.reshape(stored.shape[0], -1)
    for held in (flat.T, flat) if stored.ndim == 2 else (flat.T,):
        if held.shape != W.shape:
            continue
        scale = _quotient((held * W).sum(0), (W * W).sum(0))
        if np.allclose(held, scale * W, rtol=1e-3, atol=1e-6 * float(np.abs(held).max(initial=0))):
            # A channel that was scaled to zero is zero: whatever its gradient, it goes first.
            inverse = _quotient(np.ones_like(scale), np.abs(scale))
            return WeightGradients(gradients.grad_abs * inverse, gradients.fisher * inverse**2)
    return None


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """``above / below``, 0 where ``below`` is 0."""
    return np.asarray(np.divide(above, below, out=np.zeros_like(above), where=below != 0))


def _inputs(module: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    torch = require("torch")
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    inputs = {
        name: (value if isinstance(value, torch.Tensor) else torch.tensor(np.asarray(value))).to(device)
        for name, value in batch.items()
    }
    if type(module).__name__.endswith(_CAUSAL) and "input_ids" in inputs and "labels" not in inputs:
        labels = inputs["input_ids"]
        if "attention_mask" in inputs:
            labels = labels.masked_fill(inputs["attention_mask"] == 0, _IGNORED)
        inputs["labels"] = labels
    return inputs


def _gradients(
    module: Any, tensors: Mapping[int, Any], inputs: Mapping[str, Any], loss: Loss, index: int
) -> dict[int, Any]:
    """∂L/∂w, float32, by the keys of ``tensors``; without those that have no part in the loss."""
    torch = require("torch")
    call = require("torch.func").functional_call
    # Leaves of their own, so that the caller's parameters get no gradients and need not ask for them.
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in tensors.items()}
    replaced = {
        name: leaves[id(tensor)]
        for name, tensor in module.named_parameters(remove_duplicate=False)
        if id(tensor) in leaves
    }
    try:
        with torch.enable_grad():
            value = loss(call(module, replaced, kwargs=dict(inputs), tie_weights=False), inputs)
            if not isinstance(value, torch.Tensor) or value.ndim or not bool(torch.isfinite(value)):
                raise UsageError(f"the loss of batch {index} is no finite scalar: {value}")
            if not value.requires_grad:
                return {}
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    except UsageError:
        raise
    except Exception as error:  # whatever the module raises
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{type(module).__name__} fails on batch {index}, {', '.join(map(_shape, inputs.items()))}: {reason}"
        ) from error
    gradients = {key: part.float() for key, part in zip(leaves, found, strict=True) if part is not None}
    if not all(bool(torch.isfinite(part).all()) for part in gradients.values()):
        raise UsageError(f"the gradients of batch {index} hold NaN or Inf")
    return gradients


def _shape(item: tuple[str, Any]) -> str:
    return f"{item[0]}{list(item[1].shape)}"


class _DefaultLoss:
    """The loss of the module's docstring; ``seed`` makes its draws repeatable."""

    def __init__(self, seed: int) -> None:
        self._generator = require("torch").Generator().manual_seed(seed)

    def __call__(self, outputs: Any, inputs: Mapping[str, Any]) -> Any:
        named = outputs if isinstance(outputs, Mapping) else {}
        if any(name in inputs for name in LABELS):
            if named.get("loss") is None:
                raise UsageError(f"labels are given, but the outputs {list(named)} have no loss")
            return named["loss"]
        mask = inputs.get("attention_mask")
        logits = [value for name, value in named.items() if name.endswith("logits") and value.shape[-1] > 1]
        if logits:
            return sum(self._own_labels(value, mask) for value in logits)
        if "last_hidden_state" in named:
            return self._projection(_pooled(named["last_hidden_state"], mask))
        return self._projection(_first_tensor(outputs))

    def _own_labels(self, logits: Any, mask: Any) -> Any:
        """Cross entropy of ``logits`` [..., C] against labels drawn from softmax(logits), without padded tokens."""
        torch = require("torch")
        if mask is not None and logits.ndim == mask.ndim + 1 and logits.shape[:-1] == mask.shape:
            rows = logits[mask != 0]
        else:
            rows = logits.reshape(-1, logits.shape[-1])
        shares = rows.detach().double().softmax(-1).cpu()
        labels = torch.multinomial(shares, 1, generator=self._generator)[:, 0]
        return torch.nn.functional.cross_entropy(rows, labels.to(rows.device))

    def _projection(self, output: Any) -> Any:
        torch = require("torch")
        normal = torch.randn(output.shape, generator=self._generator)
        return (output * normal.to(output)).sum()


def _pooled(hidden: Any, mask: Any) -> Any:
    """Mean of ``hidden`` [B, S, d] over the tokens that are no padding, normalised: [B, d]."""
    if mask is None:
        mean = hidden.mean(1)
    else:
        share = mask[:, :, None].to(hidden)
        mean = (hidden * share).sum(1) / share.sum(1).clamp(min=1)
    return require("torch").nn.functional.normalize(mean, dim=-1)


def _first_tensor(outputs: Any) -> Any:
    torch = require("torch")
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    parts = outputs if isinstance(outputs, list | tuple) else [outputs]
    for part in parts:
        if isinstance(part, torch.Tensor) and part.is_floating_point():
            return part
    raise UsageError("no output is a tensor of floats; give a loss")
