"""A Hugging Face model folder to ONNX: text encoders, with or without a head, and causal language models, with or
without their cache. Never touches the network."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparse_onnx.errors import UsageError
from sparse_onnx.exporter._decoder import decoder
from sparse_onnx.exporter._extras import require
from sparse_onnx.exporter._pipeline import ExportResult, export_frozen

__all__ = ["TASKS", "export_huggingface", "load_pretrained"]

TASKS = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "question-answering": "AutoModelForQuestionAnswering",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "text-generation-with-past": "AutoModelForCausalLM",
    "token-classification": "AutoModelForTokenClassification",
}
"""Task names, as Hugging Face uses them, and the class that loads each."""

_HEADS = {
    "ForMaskedLM": "fill-mask",
    "ForQuestionAnswering": "question-answering",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_GENERATION = ("text-generation", "text-generation-with-past")
_AXES = {0: "batch", 1: "sequence"}


def export_huggingface(
    folder: str | os.PathLike[str],
    *,
    task: str | None = None,
    opset: int = 20,
    progress: Callable[[str], None] = lambda _line: None,
) -> ExportResult:
    """Export the text encoder in ``folder`` (``config.json``, weights) as float32 and check it against torch.

    ``task``: one of :data:`TASKS`; by default what the checkpoint's ``architectures`` say. Inputs are
    ``input_ids``, ``attention_mask`` and, if the model tells segments apart, ``token_type_ids``, all int64
    ``[batch, sequence]``; outputs keep their names in transformers, such as ``last_hidden_state`` and
    ``pooler_output`` or ``logits``. Attention is exported in its plain form. The model is compared with torch
    at two shapes with padding. ``progress`` is called with one line of text at every step.

    The tasks ``text-generation`` and ``text-generation-with-past`` are for causal language models and have to be
    asked for. Inputs are ``input_ids``, ``attention_mask`` and, where the model reads them, ``position_ids``; with its
    past also ``past_key_values.0.key`` and so on, [batch, heads, past_sequence, size], and the mask is of all tokens.
    Outputs are ``logits`` and ``present.0.key`` and so on.

    Raises UsageError for a folder, task or architecture that does not fit or weights that are missing,
    HostError when a package is missing, VerificationError when outputs differ by more than 1e-4 of the scale.
    """
    progress(f"reading {folder}")
    module = load_pretrained(Path(folder), task)
    if task in _GENERATION:
        causal = decoder(module, past=task == "text-generation-with-past")
        return export_frozen(
            causal.module,
            causal.cases[0],
            dynamic_shapes=causal.dynamic_shapes,
            input_names=causal.input_names,
            output_names=causal.output_names,
            opset=opset,
            cases=causal.cases,
            progress=progress,
        )
    names = [
        name
        for name in _INPUTS
        if name in inspect.signature(module.forward).parameters
        and (name != "token_type_ids" or getattr(module.config, "type_vocab_size", 0) > 1)
    ]
    longest = _longest(module.config)
    cases = [
        _example(module.config, names, batch, min(length, longest)) for batch, length in ((2, 16), (3, 37))
    ]
    return export_frozen(
        module,
        cases[0],
        dynamic_shapes=dict.fromkeys(names, _AXES),
        input_names=names,
        output_names=_output_names(module, cases[0]),
        opset=opset,
        cases=cases,
        progress=progress,
    )


def load_pretrained(folder: Path, task: str | None) -> Any:
    """The module in ``folder``, float32, in evaluation mode, with attention that any runtime can read."""
    if not (folder / "config.json").is_file():
        reason = (
            "it has no config.json"
            if folder.is_dir()
            else "it is a file"
            if folder.exists()
            else "there is no such folder"
        )
        raise UsageError(
            f"{folder} is no Hugging Face model folder: {reason}. Models are read from the disk only; "
            "download one first, for example with `hf download NAME --local-dir FOLDER`"
        )
    if task is not None and task not in TASKS:
        raise UsageError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    torch, transformers = require("torch"), require("transformers")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(folder, **local)
            _check_kind(folder, config, task)
            task = task or _task(config)
            for name in ("use_cache", "output_hidden_states", "output_attentions"):
                setattr(config, name, False)
            module, info = getattr(transformers, TASKS[task]).from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                **local,
            )
    except UsageError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise UsageError(f"{folder} cannot be loaded for {task or 'its task'}: {error}") from error
    missing = set(info["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        module.pooler = None  # a checkpoint without a pooler: its output would be random
    elif missing:
        raise UsageError(
            f"{folder} has no weights for {', '.join(sorted(missing)[:3])}{' …' if len(missing) > 3 else ''}: "
            f"{task} needs them; choose another task of {', '.join(TASKS)}"
        )
    return module.eval()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and log lines while loading; both are put back as they were."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _check_kind(folder: Path, config: Any, task: str | None) -> None:
    two = getattr(config, "is_encoder_decoder", False)
    text = getattr(config, "vocab_size", None) and getattr(config, "hidden_size", None)
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())
    if task in _GENERATION and causal and text and not two:
        return
    if two or getattr(config, "is_decoder", False) or causal or not text or task in _GENERATION:
        raise UsageError(
            f"{folder} holds a {config.model_type!r} model; text encoders are read from a folder, and causal language "
            f"models for the task {' or '.join(_GENERATION)}, anything else through export_torch() with example inputs"
        )


def _task(config: Any) -> str:
    for name in config.architectures or ():
        for suffix, task in _HEADS.items():
            if name.endswith(suffix):
                return task
    return "feature-extraction"


def _longest(config: Any) -> int:
    """The longest sequence that is safe: position tables may reserve rows up to the padding index."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    return int(positions) - (getattr(config, "pad_token_id", None) or 0) - 1


def _example(config: Any, names: list[str], batch: int, length: int) -> dict[str, Any]:
    """Seeded token ids [batch, length], the last row padded from two thirds on."""
    torch = require("torch")
    generator = torch.Generator().manual_seed(0)
    padding = getattr(config, "pad_token_id", None) or 0
    tokens = torch.randint(config.vocab_size, (batch, length), generator=generator)
    tokens[tokens == padding] = (padding + 1) % config.vocab_size
    mask = torch.ones_like(tokens)
    mask[-1, max(1, 2 * length // 3) :] = 0
    tokens[mask == 0] = padding
    segments = torch.zeros_like(tokens)
    segments[:, length // 2 :] = 1
    values = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": segments}
    return {name: values[name] for name in names}


def _output_names(module: Any, example: dict[str, Any]) -> list[str]:
    torch = require("torch")
    with torch.no_grad():
        outputs = module(**example)
    return [name for name, value in outputs.items() if isinstance(value, torch.Tensor)]
