"""``sparse-onnx generate``: the same tokens whoever generates them, and what is missing is said."""

import json

import pytest

from sparse_onnx.model.model_io import load_model
from sparse_onnx.running.generation import Generator
from sparse_onnx.running.runtime import open_session
from sparse_onnx.tools.benchmarks.make_decoder import SHAPES, write_decoder

TINY = SHAPES["tiny"]
PROMPT = "&'("


def with_tokenizer(folder):
    """Characters from "!" on are the tokens, a space is 94."""
    pytest.importorskip("transformers", reason="text needs transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {chr(33 + index): index for index in range(TINY.vocabulary - 2)}
    letters |= {"\u0120": TINY.vocabulary - 2, "<end>": TINY.vocabulary - 1}
    tool = Tokenizer(models.BPE(letters, []))
    tool.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tool.decoder = decoders.ByteLevel()
    tool.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_type": "gpt2",
        "eos_token": "<end>",
        "unk_token": "<end>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def said(tokens):
    return "".join(" " if token == TINY.vocabulary - 2 else chr(33 + token) for token in tokens)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "decoder"
    write_decoder(made, TINY)
    with_tokenizer(made)
    return made


def expected(folder, count):
    path = folder / "model.onnx"
    generate = Generator(load_model(path), open_session(path, threads=1, library=False))
    return list(generate([5, 6, 7], count).tokens)


OURS = ("--runtime", "onnxruntime", "--threads", "1")


def test_by_onnxruntime(run_cli, folder):
    ran = run_cli("generate", folder, "--prompt", PROMPT, "--new-tokens", "6", *OURS)
    assert ran.code == 0
    assert ran.out.strip() == said(expected(folder, 6)).strip()
    assert "first token" in ran.err
    assert "a second of 3)" in ran.err


def test_as_json(run_cli, folder):
    given = (
        "generate",
        folder / "model.onnx",
        "--prompt",
        PROMPT,
        "--new-tokens",
        "6",
        *OURS,
        "--format",
        "json",
    )
    document = run_cli(*given).json()
    assert document["tokens"] == expected(folder, 6)
    assert document["prompt_tokens"] == 3
    assert document["runtime"] == "onnxruntime"
    assert document["decode_tokens_per_second"] == pytest.approx(1000 / document["token_ms"])
    assert document["prefill_tokens_per_second"] == pytest.approx(3000 / document["first_token_ms"])


def test_one_token_has_no_step(run_cli, folder):
    given = ("generate", folder, "--prompt", PROMPT, "--new-tokens", "1", *OURS, "--format", "json")
    document = run_cli(*given).json()
    assert document["tokens"] == expected(folder, 1)
    assert document["token_ms"] is None


def test_a_tokenizer_elsewhere(run_cli, folder, tmp_path):
    path = write_decoder(tmp_path / "bare", TINY)
    ran = run_cli("generate", path, "--tokenizer", folder, "--prompt", PROMPT, "--new-tokens", "2", *OURS)
    assert ran.out.strip() == said(expected(folder, 2)).strip()


def test_no_tokenizer(run_cli, tmp_path):
    pytest.importorskip("transformers", reason="text needs transformers")
    path = write_decoder(tmp_path / "bare", TINY)
    ran = run_cli("generate", path, "--prompt", PROMPT, *OURS)
    assert ran.code == 2
    assert "name its folder with --tokenizer" in ran.err


def test_a_model_that_generates_nothing(run_cli, folder, dense):
    ran = run_cli("generate", dense, "--tokenizer", folder, "--prompt", PROMPT, *OURS)
    assert ran.code == 2
    assert "no decoder with a cache" in ran.err


def test_genai_needs_its_folder_and_its_package(run_cli, folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    ran = run_cli("generate", folder, "--prompt", PROMPT, "--runtime", "genai")
    assert ran.code == 6
    assert "pip install onnxruntime-genai" in ran.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (folder / "genai_config.json").unlink()
    ran = run_cli("generate", folder, "--prompt", PROMPT, "--runtime", "genai")
    assert ran.code == 2
    assert "--bundle genai" in ran.err


@pytest.mark.slow
def test_by_the_real_package(run_cli, folder):
    pytest.importorskip("onnxruntime_genai")
    given = ("generate", folder, "--prompt", PROMPT, "--new-tokens", "6", "--format", "json")
    document = run_cli(*given).json()
    assert document["runtime"] == "genai"
    assert document["tokens"] == expected(folder, 6)
