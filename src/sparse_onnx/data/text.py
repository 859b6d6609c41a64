"""Calibration text: passages of a file, and the model inputs that a tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_onnx.data.inputs import Feeds, InputSpec, resolve_shapes
from sparse_onnx.errors import DataError, HostError, UsageError

__all__ = ["complete", "read_passages", "tokenize"]


def read_passages(path: Path, *, paragraphs: bool = False) -> Iterator[str]:
    """The lines of a UTF-8 text file that are not empty, or its paragraphs: lines up to an empty one, joined."""
    try:
        with path.open(encoding="utf-8") as file:
            held: list[str] = []
            for line in file:
                text = " ".join(line.split())
                if text and paragraphs:
                    held.append(text)
                elif text:
                    yield text
                elif held:
                    yield " ".join(held)
                    held = []
            if held:
                yield " ".join(held)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a text file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise HostError(f"{path}: cannot be read: {error.strerror or error}") from error


def tokenize(
    passages: Sequence[str], folder: Path, specs: Sequence[InputSpec], *, batch: int, max_length: int
) -> Iterator[Feeds]:
    """Batches of inputs for a model: what the tokenizer gives, and for the rest positions, zeros for token types and
    empty caches.

    Raises HostError without transformers, UsageError if the folder is no tokenizer, DataError if an input cannot be
    made.
    """
    tokenizer = _load(folder)
    names = [spec.name for spec in specs]
    if "input_ids" not in names:
        raise DataError(f"text needs a model with the input input_ids; this one has {', '.join(names)}")
    ids = next(spec for spec in specs if spec.name == "input_ids")
    fixed = ids.shape[-1] if ids.shape and isinstance(ids.shape[-1], int) else None
    if tokenizer.pad_token is None:  # padded positions are masked out, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    for start in range(0, len(passages), batch):
        encoded = tokenizer(
            list(passages[start : start + batch]),
            truncation=True,
            max_length=fixed or max_length,
            padding="max_length" if fixed else "longest",
            return_tensors="np",
            return_attention_mask=True,
        )
        feeds = {name: np.asarray(value) for name, value in encoded.items() if name in names}
        yield complete(feeds, specs, f"the tokenizer in {folder}")


def _load(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise HostError(
            f"text needs transformers, which cannot be imported ({error}): pip install 'sparse-onnx[export]', "
            "or give the inputs as an .npz"
        ) from error
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the tokenizer's folder")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())
        raise UsageError(f"{folder}: no tokenizer can be loaded from it: {reason[:300]}") from error


def complete(feeds: dict[str, np.ndarray], specs: Sequence[InputSpec], source: str) -> Feeds:
    """``feeds``, which ``source`` gave, with the inputs that follow from input_ids: positions, zeros for token types,
    empty caches. DataError if another one cannot be made."""
    shapes, _ = resolve_shapes(specs, {name: array.shape for name, array in feeds.items()})
    for spec in specs:
        if spec.name in feeds:
            continue
        tokens, given = feeds["input_ids"].shape, spec.array(shapes[spec.name])
        if given is not None:
            feeds[spec.name] = given
            continue
        if "position" in spec.name:
            feeds[spec.name] = np.broadcast_to(np.arange(tokens[-1]), tokens).astype(spec.dtype)
        elif "token_type" in spec.name:
            feeds[spec.name] = np.zeros(tokens, spec.dtype)
        elif "past" in spec.name and 0 in shapes[spec.name]:
            feeds[spec.name] = np.zeros(shapes[spec.name], spec.dtype)
        else:
            raise DataError(f"{source} gives no {spec.describe()}; give the inputs as an .npz")
    return feeds
