"""Folders of onnxruntime-genai are read with care, and written as its package wants them."""

import json

import pytest

from sparse_onnx.errors import ModelFileError, UsageError
from sparse_onnx.model import genai
from sparse_onnx.model.model_io import load_model
from sparse_onnx.tools.benchmarks.make_decoder import SHAPES, write_decoder

TINY = SHAPES["tiny"]
SIZES = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "vocab_size": 96,
    "max_position_embeddings": 2048,
    "eos_token_id": [2, 3],
    "bos_token_id": None,
}


def test_where_a_folder_is(tmp_path):
    path = write_decoder(tmp_path / "a", TINY)
    assert genai.genai_folder(path) == path.parent
    assert genai.genai_folder(path.parent) == path.parent
    assert genai.genai_folder(tmp_path) is None
    assert genai.decoder_file(path.parent) == path


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"model": 3}',
        '{"model": {"decoder": []}}',
        "{" * 5000,
        "\x00",
        '{"model": {"type": "whisper"}}',
    ],
)
def test_what_is_no_configuration(tmp_path, text):
    (tmp_path / genai.CONFIG).write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"genai_config\.json"):
        genai.read_config(tmp_path)


@pytest.mark.parametrize(
    "name", [None, 3, "", ".", "..", "../other.onnx", "sub/model.onnx", "gone.onnx", "/etc/passwd"]
)
def test_the_file_lies_in_the_folder(tmp_path, name):
    folder = tmp_path / "a"
    write_decoder(folder, TINY)
    (tmp_path / "other.onnx").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "sub" / "model.onnx").write_bytes(b"")
    config = genai.read_config(folder)
    config["model"]["decoder"]["filename"] = name
    (folder / genai.CONFIG).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelFileError, match="no file in that folder"):
        genai.decoder_file(folder)


def test_the_library_is_named_where_it_is_needed(tmp_path):
    write_decoder(tmp_path, TINY)
    config = genai.read_config(tmp_path)
    config["model"]["decoder"]["session_options"] = {"log_id": "x"}
    ours = genai.with_decoder(config, "m.onnx", "ours.so")
    assert ours["model"]["decoder"]["session_options"] == {"log_id": "x", "custom_ops_library": "ours.so"}
    assert ours["model"]["decoder"]["filename"] == "m.onnx"
    assert "custom_ops_library" not in config["model"]["decoder"]["session_options"]
    without = genai.with_decoder(ours, "m.onnx", None)
    assert without["model"]["decoder"]["session_options"] == {"log_id": "x"}
    assert genai.with_decoder(ours, "m.onnx", "ours.so") == ours
    with pytest.raises(UsageError, match=r"names the library 'ours\.so'"):
        genai.with_decoder(ours, "m.onnx", "other.so")


@pytest.mark.parametrize("more", [{"vision": {"filename": "v.onnx"}}, {"decoder": {"pipeline": []}}])
def test_more_models_than_a_decoder(tmp_path, more):
    config = {"model": {"decoder": {"filename": "m.onnx"}} | more}
    with pytest.raises(UsageError, match="more models than a decoder"):
        genai.check_only_decoder(config, tmp_path)


def test_one_decoder_alone_is_fine(tmp_path):
    write_decoder(tmp_path, TINY)
    genai.check_only_decoder(genai.read_config(tmp_path), tmp_path)


def test_files_of_the_tokenizer(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt",
                 "model.onnx", "model.onnx.data", "config.json", "report.json", "notes.txt"):  # fmt: skip
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in genai.tokenizer_files(tmp_path)] == [
        "chat_template.jinja", "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip


def test_a_configuration_is_made(tmp_path):
    model = load_model(write_decoder(tmp_path, TINY))
    made = genai.made_config(model, SIZES, tmp_path)["model"]
    assert made["eos_token_id"] == [2, 3]
    assert made["pad_token_id"] == 2
    assert "bos_token_id" not in made
    decoder, written = made["decoder"], genai.read_config(tmp_path)["model"]["decoder"]
    assert {key: decoder[key] for key in written} == written
    assert genai.made_config(model, SIZES | {"head_dim": 8}, tmp_path)["model"]["decoder"]["head_size"] == 8


@pytest.mark.parametrize(
    "name", ["num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings"]
)
@pytest.mark.parametrize("value", [None, 0, -4, "4"])
def test_sizes_that_are_missing(tmp_path, name, value):
    model = load_model(write_decoder(tmp_path, TINY))
    with pytest.raises(UsageError, match=name):
        genai.made_config(model, SIZES | {name: value}, tmp_path)


def test_a_decoder_without_a_cache(from_text, tmp_path):
    text = '<ir_version: 9, opset_import: ["" : 17]> g (int64[B, S] input_ids) => (int64[B, S] logits) {'
    with pytest.raises(UsageError, match="with a cache"):
        genai.made_config(from_text(text + "logits = Identity(input_ids) }"), SIZES, tmp_path)
