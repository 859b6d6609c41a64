"""A causal language model of the kind that is exported with its cache: grouped heads, rotary positions, a tied head."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

import sparse_onnx  # noqa: E402
from sparse_onnx.exporter import export_huggingface  # noqa: E402
from sparse_onnx.model.model_io import save_model  # noqa: E402
from sparse_onnx.running.runtime import open_session  # noqa: E402

TOKENS, LAYERS, PAIRS, SIZE = 512, 2, 2, 16
CACHE = [f"past_key_values.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=PAIRS,
        intermediate_size=128,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # so that layers do more than their residuals
    model.save_pretrained(folder / "hf")
    result = export_huggingface(folder / "hf", task="text-generation-with-past")
    return save_model(result.model, folder / "dense")


def text(samples, length, past=0, seed=0):
    rng = np.random.default_rng(seed)
    feeds = {
        "input_ids": rng.integers(0, TOKENS, (samples, length)),
        "attention_mask": np.ones((samples, past + length), np.int64),
        "position_ids": np.tile(np.arange(past, past + length), (samples, 1)),
    }
    cache = (samples, PAIRS, past, SIZE)
    return feeds | {name: rng.standard_normal(cache).astype(np.float32) for name in CACHE}


@pytest.mark.parametrize(
    ("options", "zeros", "least"),
    [({"bits": 4}, 0.0, 0.9), ({"bits": 4, "method": "auto", "sparsity": 0.5}, 0.5, 0.6)],
)
def test_few_bits_alone_and_with_zeros(exported, tmp_path, options, zeros, least):
    np.savez(tmp_path / "text.npz", **text(24, 32))
    result = sparse_onnx.optimize(
        exported,
        tmp_path / "out",
        calibration_data=tmp_path / "text.npz",
        benchmark=False,
        threads=1,
        **options,
    )
    rows = result.report["quantized"]
    assert len(rows) == 7 * LAYERS  # the tied head stays
    assert {row["bits"] for row in rows} == {4}
    assert all(row["output_error"] is not None for row in rows)  # none was rounded without data
    assert all(row["sparsity"] >= zeros for row in rows)
    before = open_session(exported, threads=1, library=False)
    after = open_session(tmp_path / "out" / "model.onnx", threads=1, library=False)
    step = text(3, 1, past=9, seed=5)  # one token behind nine in the cache
    expected, found = (session.run(["logits"], step)[0].ravel() for session in (before, after))
    assert expected @ found >= least * np.linalg.norm(expected) * np.linalg.norm(found)


def test_a_tied_head_becomes_integers_with_its_table(exported, tmp_path):
    """Rounded once; the head then is a weight of 8 bits as others are."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "version: 1\ntarget: {precision: int8}\nstages:\n  - name: bits\n    modifiers:\n"
        "      - quant.embedding: {}\n      - quant.weight: {method: rtn, bits: 8, group_size: 0}\n"
    )
    result = sparse_onnx.optimize(exported, tmp_path / "out", recipe=recipe, benchmark=False, threads=1)
    rows = {row["name"]: row for row in result.report["quantized"]}
    assert len(rows) == 7 * LAYERS + 1
    (table,) = (row for name, row in rows.items() if "embed_tokens" in name)
    assert (table["bits"], table["elements"], table["bytes"]) == (8, TOKENS * 64, TOKENS * (64 + 2))
    step = text(3, 1, past=9, seed=5)
    before = open_session(exported, threads=1, library=False)
    after = open_session(tmp_path / "out" / "model.onnx", threads=1, library=False)
    expected, found = (session.run(["logits"], step)[0].ravel() for session in (before, after))
    assert expected @ found >= 0.98 * np.linalg.norm(expected) * np.linalg.norm(found)
