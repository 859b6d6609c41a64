"""A copy of a torch module as it is used for inference: evaluation mode, plain weights.

``torch.nn.utils.prune`` keeps ``weight_orig`` and ``weight_mask`` and multiplies them before every call;
``torch.nn.utils.parametrize`` and the older ``weight_norm`` do the like. An exported graph would show that
arithmetic, or a folded constant without a name. The copy holds the product under the name of the weight.
"""

from __future__ import annotations

import copy
from typing import Any

from sparse_onnx.errors import UsageError
from sparse_onnx.exporter._extras import require

__all__ = ["inference_copy"]

# What the hooks keep beside a weight: `weight_orig`, `weight_mask` and so on.
_PARTS = ("orig", "mask", "g", "v", "u")


def inference_copy(module: Any) -> Any:
    """``module`` (a torch.nn.Module) in evaluation mode, with masks and parametrizations multiplied out.

    The module itself stays as it is; tensors that need no change are shared with it, not copied.
    Raises UsageError when Python cannot copy the module.
    """
    try:
        copied = copy.deepcopy(module, _shared_tensors(module))
    except Exception as error:  # whatever the module's own copying raises
        raise UsageError(f"{type(module).__name__} cannot be copied for the export: {error}") from error
    copied.eval()
    for layer in list(copied.modules()):
        _multiply_hooks_out(layer)
        _multiply_parametrizations_out(layer)
    return copied


def _shared_tensors(module: Any) -> dict[int, Any]:
    """A ``memo`` for deepcopy: the tensors that it need not copy, and those that it cannot copy, detached."""
    torch = require("torch")
    memo = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    for layer in module.modules():
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach()  # deepcopy refuses what autograd computed
    return memo


def _multiply_hooks_out(layer: Any) -> None:
    """Replace what ``prune`` and the old ``weight_norm`` and ``spectral_norm`` recompute before each call."""
    torch = require("torch")
    kinds = (
        require("torch.nn.utils.prune").BasePruningMethod,
        require("torch.nn.utils.weight_norm").WeightNorm,
        require("torch.nn.utils.spectral_norm").SpectralNorm,
    )
    for key, hook in list(layer._forward_pre_hooks.items()):
        if isinstance(hook, kinds):
            name = hook._tensor_name if isinstance(hook, kinds[0]) else hook.name
            with torch.no_grad():
                hook(layer, ())  # sets the attribute `name`
            value = getattr(layer, name).detach()
            del layer._forward_pre_hooks[key]
            for attribute in (name, *(f"{name}_{part}" for part in _PARTS)):
                if hasattr(layer, attribute):
                    delattr(layer, attribute)
            layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))


def _multiply_parametrizations_out(layer: Any) -> None:
    """Replace parametrized tensors by their present values.

    Not by ``remove_parametrizations``: it edits the class, which the copy shares with the original.
    """
    torch = require("torch")
    parametrize = require("torch.nn.utils.parametrize")
    if not parametrize.is_parametrized(layer):
        return
    with torch.no_grad():
        values = {name: getattr(layer, name).detach() for name in layer.parametrizations}
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    for name, value in values.items():
        layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
