"""A complete folder for onnxruntime-genai around a compiled decoder: configuration, tokenizer, and our library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.model.genai import (
    CONFIG,
    check_only_decoder,
    genai_folder,
    made_config,
    read_config,
    tokenizer_files,
    with_decoder,
)
from sparse_onnx.model.probe import uses_library
from sparse_onnx.sparse_ops import library_path

__all__ = ["GENAI", "bundle_genai", "check_bundle"]

GENAI = "genai"


def check_bundle(bundle: str | None, source: Path) -> bool:
    """Whether the result is to be a GenAI folder: it is asked for, or ``source`` is one.

    Raises UsageError for another ``bundle``, and for a folder with more models than a decoder.
    """
    if bundle not in (None, GENAI):
        raise UsageError(f"bundle is {bundle!r}, not {GENAI!r}: folders are made for onnxruntime-genai alone")
    origin = genai_folder(source)
    if origin is not None:
        check_only_decoder(read_config(origin), origin)
    return origin is not None or bundle == GENAI


def bundle_genai(
    folder: Path,
    source: Path,
    others: Sequence[Path] = (),
    progress: Callable[[str], None] = lambda _line: None,
) -> None:
    """Make of ``folder``, which holds a compiled ``model.onnx``, a GenAI folder.

    What is not known of the model comes from the GenAI folder that ``source`` is or lies in; else the configuration is
    made from the ``config.json`` of Hugging Face that lies beside it or in one of the ``others``.
    """
    model = model_io.load_model(folder / "model.onnx")
    origin = genai_folder(source)
    if origin is not None:
        config = read_config(origin)
    else:
        near = [source if source.is_dir() else source.parent, *others]
        origin = next((place for place in near if (place / "config.json").is_file()), None)
        if origin is None:
            raise UsageError(
                "a GenAI folder needs the model's sizes and tokenizer: put the config.json and the tokenizer of "
                f"Hugging Face beside {source}, or name their folder with --tokenizer"
            )
        try:
            known = json.loads((origin / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{origin / 'config.json'}: cannot be read as JSON: {error}") from error
        config = made_config(model, known if isinstance(known, dict) else {}, origin)
    library = library_path() if uses_library(model) else None
    made = with_decoder(config, "model.onnx", None if library is None else library.name)
    (folder / CONFIG).write_text(json.dumps(made, indent=4) + "\n", encoding="utf-8")
    if library is not None:
        shutil.copyfile(library, folder / library.name)
    files = tokenizer_files(origin)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if not files:
        progress(f"warning: no tokenizer beside {origin / CONFIG}: the folder generates from tokens alone")
