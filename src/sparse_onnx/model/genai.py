"""A folder of onnxruntime-genai: a decoder, ``genai_config.json``, and the files of its tokenizer.

The configuration names the decoder's file, its inputs and outputs, and one library of custom operators, which must lie
in the folder. Of what it says here only that is read and written; everything else stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_onnx.errors import ModelFileError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "CONFIG",
    "check_only_decoder",
    "decoder_file",
    "genai_folder",
    "made_config",
    "read_config",
    "tokenizer_files",
    "with_decoder",
]

CONFIG = "genai_config.json"

_LIBRARY = "custom_ops_library"
_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*"),
    *("generation_config.json", "*.model", "*.tiktoken", "*.jinja", "processor_config.json"),
)
_NAMES = {
    "past_key_values.%d.key": ("past_key_names", "present.%d.key", "present_key_names"),
    "past_key_values.%d.value": ("past_value_names", "present.%d.value", "present_value_names"),
}
_PLAIN = ("input_ids", "attention_mask", "position_ids")


def genai_folder(source: Path) -> Path | None:
    """The GenAI folder that ``source`` is, or that it lies in as a file; None if there is none."""
    folder = source if source.is_dir() else source.parent
    return folder if (folder / CONFIG).is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """What ``folder`` says of its model; ModelFileError if that is no configuration of a decoder."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: cannot be read as JSON: {error}") from error
    for keys in ((), ("model",), ("model", "decoder")):
        part: Any = config
        for key in keys:
            part = part.get(key)
        if not isinstance(part, dict):
            what = ".".join(keys) or "the file"
            raise ModelFileError(
                f"{path}: {what} is no object: give the folder of a decoder, or its .onnx file"
            )
    assert isinstance(config, dict)
    return config


def decoder_file(folder: Path) -> Path:
    """The decoder's file in a GenAI folder; ModelFileError if it names none in it."""
    name = read_config(folder)["model"]["decoder"].get("filename")
    if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
        raise ModelFileError(
            f"{folder / CONFIG}: model.decoder.filename is {name!r}, which is no file in that folder"
        )
    return folder / name


def check_only_decoder(config: Mapping[str, Any], where: Path) -> None:
    """Raise UsageError if there are more models than the decoder (images, speech, several parts)."""
    model = config["model"]
    others = [
        key
        for key, part in model.items()
        if isinstance(part, dict) and "filename" in part and key != "decoder"
    ]
    if "pipeline" in model["decoder"]:
        others.append("decoder.pipeline")
    if others:
        raise UsageError(
            f"{where / CONFIG} has more models than a decoder ({', '.join(sorted(others))}): no GenAI folder can be "
            "made of the decoder alone; compile its .onnx file in another folder"
        )


def with_decoder(config: Mapping[str, Any], filename: str, library: str | None) -> dict[str, Any]:
    """``config`` for another decoder in ``filename``, with its ``library`` of operators; None: it needs none.

    Raises UsageError if it needs another library already.
    """
    made: dict[str, Any] = json.loads(json.dumps(config))
    decoder = made["model"]["decoder"]
    session = decoder.setdefault("session_options", {})
    before = session.pop(_LIBRARY, None)
    if library is not None and before not in (None, library):
        raise UsageError(
            f"{CONFIG} names the library {before!r}; onnxruntime-genai loads one, and ours is needed"
        )
    decoder["filename"] = filename
    if library is not None:
        session[_LIBRARY] = library
    return made


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in ``folder``, by name."""
    found = {path for pattern in _TOKENIZER for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def made_config(model: ir.Model, huggingface: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """A configuration for a decoder whose inputs and outputs have the usual names, by the ``config.json`` of Hugging
    Face in the folder ``where``.

    Raises UsageError if names or sizes are missing.
    """
    inputs = {value.name or "" for value in model.graph.inputs}
    outputs = {value.name or "" for value in model.graph.outputs}
    layers = sum(name.startswith("past_key_values.") and name.endswith(".key") for name in inputs)
    needed = {"input_ids", "attention_mask"} | {
        pattern % layer for pattern in _NAMES for layer in range(layers)
    }
    made = {"logits"} | {present % layer for _, present, _ in _NAMES.values() for layer in range(layers)}
    missing = sorted((needed - inputs) | (made - outputs))
    if not layers or missing:
        raise UsageError(
            f"a GenAI folder needs a decoder with a cache, named as GenAI and Optimum do; there is no "
            f"{', '.join(missing[:3]) or 'past_key_values.0.key'}: export with --task text-generation-with-past"
        )
    if strange := sorted(name for name in inputs - needed if name not in _PLAIN):
        raise UsageError(f"onnxruntime-genai has nothing for the input {strange[0]}")
    heads = _size(huggingface, where, "num_attention_heads", "n_head")
    hidden = _size(huggingface, where, "hidden_size", "n_embd")
    longest = _size(huggingface, where, "max_position_embeddings", "n_positions")
    tokens = {
        f"{kind}_token_id": huggingface[f"{kind}_token_id"]
        for kind in ("bos", "eos", "pad")
        if huggingface.get(f"{kind}_token_id") is not None
    }
    if "eos_token_id" in tokens and "pad_token_id" not in tokens:
        last = tokens["eos_token_id"]
        tokens["pad_token_id"] = last[0] if isinstance(last, list) else last
    return {
        "model": {
            "type": "decoder",
            **tokens,
            "context_length": longest,
            "vocab_size": _size(huggingface, where, "vocab_size"),
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": "model.onnx",
                "head_size": huggingface.get("head_dim") or hidden // heads,
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": huggingface.get("num_key_value_heads") or heads,
                "inputs": {name: name for name in _PLAIN if name in inputs}
                | {past_key: past for past, (past_key, _, _) in _NAMES.items()},
                "outputs": {"logits": "logits"} | {key: present for _, present, key in _NAMES.values()},
            },
        },
        "search": {"do_sample": False, "max_length": longest, "past_present_share_buffer": False},
    }


def _size(config: Mapping[str, Any], where: Path, *names: str) -> int:
    found = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    if found is None or found < 1:
        raise UsageError(f"{where / 'config.json'} has no {' or '.join(names)}, which {CONFIG} needs")
    return int(found)
