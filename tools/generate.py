"""``sparse-onnx generate``: tokens of a decoder, for a first look at what it says and how fast."""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_onnx.errors import HostError, RunError, UsageError
from sparse_onnx.model.genai import CONFIG
from sparse_onnx.tools.console import format_option, progress, quiet_option, show
from sparse_onnx.tools.model_argument import model_file
from sparse_onnx.units import format_ms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparse_onnx.running.generation import Generated

__all__ = ["command"]

GENAI, ORT = "genai", "onnxruntime"


@click.command(short_help="Let a decoder continue a prompt.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="At most so many.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Its folder.  [default: that of MODEL]")
@click.option(
    "--runtime",
    type=click.Choice([GENAI, ORT]),
    help=f"Who generates.  [default: {GENAI} if it is installed and MODEL is a folder for it, else {ORT}]",
)
@click.option("--threads", type=click.IntRange(1), help="Threads to generate with.  [default: all cores]")
@format_option
@quiet_option
def command(
    model: Path,
    prompt: str,
    new_tokens: int,
    tokenizer: Path | None,
    runtime: str | None,
    threads: int | None,
    output_format: str,
    quiet: bool,
) -> int:
    """Continue a prompt with MODEL: a folder of onnxruntime-genai, an output folder, or an .onnx file.

    Always the likeliest token, so that two models can be compared: the same words mean the same choices.
    """
    from sparse_onnx.running.host import available_cores

    file = model_file(model)
    home = file.parent
    installed = importlib.util.find_spec("onnxruntime_genai") is not None
    is_folder = (home / CONFIG).is_file()
    if runtime is None:
        runtime = GENAI if installed and is_folder and tokenizer is None else ORT
    count = threads or available_cores()
    with progress(quiet) as say:
        say(f"generating with {runtime}")
        if runtime == GENAI:
            if not installed:
                raise HostError(
                    "onnxruntime-genai is not installed: pip install onnxruntime-genai, or --runtime onnxruntime"
                )
            if not is_folder:
                raise UsageError(
                    f"{home} has no {CONFIG}: make a folder with optimize --bundle genai, or --runtime onnxruntime"
                )
            text, asked, found = _by_genai(home, prompt, new_tokens, threads)
        else:
            text, asked, found = _by_onnxruntime(file, tokenizer or home, prompt, new_tokens, count)
    first, *steps = found.milliseconds
    step = statistics.median(steps) if steps else None
    document: dict[str, Any] = {
        "runtime": runtime,
        "threads": count,
        "prompt_tokens": asked,
        "tokens": list(found.tokens),
        "text": text,
        "first_token_ms": first,
        "token_ms": step,
        "prefill_tokens_per_second": 1000 * asked / first,
        "decode_tokens_per_second": None if step is None else 1000 / step,
    }
    if not quiet:
        told = f"first token {format_ms(first)} ({1000 * asked / first:.0f} tokens a second of {asked})"
        if step is not None:
            told += f", then {format_ms(step)} each ({1000 / step:.1f} a second)"
        click.echo(f"{runtime}: {told}", err=True)
    return show(text, document, output_format)


def _by_onnxruntime(
    file: Path, home: Path, prompt: str, new: int, threads: int
) -> tuple[str, int, Generated]:
    from sparse_onnx.model import model_io
    from sparse_onnx.model.probe import uses_library
    from sparse_onnx.running.generation import Generator
    from sparse_onnx.running.runtime import open_session

    words = _Words(home)
    loaded = model_io.load_model(file)
    generate = Generator(loaded, open_session(file, threads=threads, library=uses_library(loaded)))
    tokens = words.encode(prompt)
    found = generate(tokens, new, words.ends)
    return words.decode(found.tokens), len(tokens), found


class _Words:
    """The tokenizer of a folder: ``tokenizer.json``, by transformers if that is installed."""

    def __init__(self, home: Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise HostError(
                f"text needs transformers, which cannot be imported ({error}): pip install 'sparse-onnx[export]', or "
                "generate with onnxruntime-genai"
            ) from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(home), local_files_only=True)
        except Exception as error:  # transformers raises many kinds
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{home}: no tokenizer can be loaded from it; name its folder with --tokenizer: {reason[:300]}"
            ) from error
        end = self._tokenizer.eos_token_id
        self.ends = frozenset() if end is None else frozenset([int(end)])

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer(text)["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


def _by_genai(home: Path, prompt: str, new: int, threads: int | None) -> tuple[str, int, Generated]:
    import onnxruntime_genai as genai

    from sparse_onnx.running.generation import Generated

    try:
        config = genai.Config(str(home))
        if threads is not None:
            config.overlay(
                f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}'
            )
        model = genai.Model(config)
        words = genai.Tokenizer(model)
        tokens = words.encode(prompt)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(tokens) + new)
        generator = genai.Generator(model, parameters)
        times, start = [], time.perf_counter()
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
            times.append(1000 * (time.perf_counter() - start))
            start = time.perf_counter()
        made = [int(token) for token in generator.get_sequence(0)[len(tokens) :]]
        return str(words.decode(made)), len(tokens), Generated(tuple(made), tuple(times))
    except (RuntimeError, ValueError, TypeError) as error:
        raise RunError(f"{home}: onnxruntime-genai cannot generate from it: {error}") from error
