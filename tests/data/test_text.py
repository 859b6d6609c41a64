"""Text as calibration data: passages, tokens, what a model wants beside them, and what does not fit."""

import sys
from pathlib import Path

import numpy as np
import pytest

from sparse_onnx.data.inputs import InputSpec
from sparse_onnx.data.samples import open_samples
from sparse_onnx.data.text import read_passages
from sparse_onnx.errors import DataError, HostError, UsageError

TEXT = "One line\nand   another\n\n  \nThe last paragraph\n"
IDS = InputSpec("input_ids", np.dtype(np.int64), ("batch", "sequence"), None)
MASK = InputSpec("attention_mask", np.dtype(np.int64), ("batch", "sequence"), None)
IMAGE = InputSpec("pixels", np.dtype(np.float32), ("batch", 3), None)


def test_passages_are_lines_or_paragraphs(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert list(read_passages(path)) == ["One line", "and another", "The last paragraph"]
    assert list(read_passages(path, paragraphs=True)) == ["One line and another", "The last paragraph"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "one", "line", "and", "another", "the", "last", "paragraph"]
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    tool = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tool.normalizer = normalizers.Lowercase()
    tool.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tool, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    return folder


def test_text_becomes_padded_batches(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text(TEXT)
    first, second = open_samples(tmp_path / "text.txt", (IDS, MASK), tokenizer=tokenizer, batch=2)
    assert first["input_ids"].tolist() == [[2, 3], [4, 5]]
    assert second["input_ids"].tolist() == [[6, 7, 8]]
    (all_,) = open_samples(tmp_path / "text.txt", (IDS, MASK), tokenizer=tokenizer)
    assert all_["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    (cut,) = open_samples(tmp_path / "text.txt", (IDS, MASK), tokenizer=tokenizer, limit=1, max_length=1)
    assert cut["input_ids"].tolist() == [[2]]


def test_inputs_that_a_tokenizer_does_not_give_are_completed(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text(TEXT)
    specs = (
        IDS,
        InputSpec("position_ids", np.dtype(np.int64), ("batch", "sequence"), None),
        InputSpec("token_type_ids", np.dtype(np.int32), ("batch", "sequence"), None),
        InputSpec("past_key_values.0.key", np.dtype(np.float32), ("batch", 2, "past_sequence", 4), None),
    )
    (feeds,) = open_samples(tmp_path / "text.txt", specs, tokenizer=tokenizer)
    assert feeds["position_ids"].tolist() == [[0, 1, 2]] * 3
    assert not feeds["token_type_ids"].any()
    assert feeds["past_key_values.0.key"].shape == (3, 2, 0, 4)


def test_a_fixed_length_is_padded_to(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text(TEXT)
    specs = (InputSpec("input_ids", np.dtype(np.int64), (1, 6), None),)
    batches = list(open_samples(tmp_path / "text.txt", specs, tokenizer=tokenizer))
    assert [feeds["input_ids"].shape for feeds in batches] == [(1, 6)] * 3


def test_text_that_does_not_fit(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    with pytest.raises(DataError, match="text needs a model with the input input_ids; this one has pixels"):
        open_samples(path, (IMAGE,), tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"gives no pixels: float32\[batch, 3\]; give the inputs as an \.npz"):
        open_samples(path, (IDS, IMAGE), tokenizer=tokenizer)
    with pytest.raises(UsageError, match="no such folder; give the tokenizer's folder"):
        open_samples(path, (IDS,), tokenizer=tmp_path / "nowhere")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UsageError, match="no tokenizer can be loaded from it"):
        open_samples(path, (IDS,), tokenizer=tmp_path / "hollow")
    with pytest.raises(DataError, match=r"none\.txt: no such file; give a text file"):
        open_samples(tmp_path / "none.txt", (IDS,), tokenizer=tokenizer)
    path.write_text(" \n\n")
    with pytest.raises(DataError, match="holds no text"):
        open_samples(path, (IDS,), tokenizer=tokenizer)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is no UTF-8 text"):
        open_samples(path, (IDS,), tokenizer=tokenizer)


def test_without_transformers_text_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        HostError, match=r"pip install 'sparse-onnx\[export\]', or give the inputs as an \.npz"
    ):
        open_samples(tmp_path / "text.txt", (IDS,), tokenizer=tmp_path)


def test_text_has_no_labels(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text("a b\n")
    with pytest.raises(DataError, match="text holds no labels 'y'"):
        open_samples(tmp_path / "text.txt", (IDS, MASK), tokenizer=tokenizer, labels="y")
