"""What is fused of models as exporters write them: all of it, or what is left has a reason.

Tiny random models of two blocks, exported here by TorchScript and by dynamo, pruned to 10 %, and lowered without
timing. ``-m slow`` runs the whole matrix, which takes the time of some 150 exports.
"""

import dataclasses
import logging
import warnings

import numpy as np
import onnxruntime
import pytest

from sparse_onnx import sparse_ops
from sparse_onnx.model import model_io
from sparse_onnx.passes.base import PassContext, Pipeline
from sparse_onnx.passes.lower.candidates import find_candidates
from sparse_onnx.passes.lower.layers import lower_layers
from sparse_onnx.passes.lower.lowering import Packer
from sparse_onnx.passes.presets import FUSION_PASSES, PREPARATION_PASSES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BLOCKS, WIDTH, HEADS, INNER, TOKENS = 2, 128, 2, 256, 12
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
}
TEXT = {**SIZES, "vocab_size": 100, "max_position_embeddings": 64}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}
T5 = {
    "vocab_size": 100,
    "d_model": WIDTH,
    "d_kv": 64,
    "d_ff": INNER,
    "num_layers": BLOCKS,
    "num_heads": HEADS,
}
T5 |= {"use_cache": False, "is_encoder_decoder": False}
WHISPER = {"vocab_size": 100, "d_model": WIDTH, "encoder_layers": BLOCKS, "encoder_attention_heads": HEADS}
WHISPER |= {"decoder_layers": 1, "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER}
WHISPER |= {"decoder_ffn_dim": INNER, "num_mel_bins": 16, "max_source_positions": 25}
WHISPER |= {"max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 100, "n_positions": 64, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS}
DISTILBERT = {"vocab_size": 100, "dim": WIDTH, "n_layers": BLOCKS, "n_heads": HEADS, "hidden_dim": INNER}


@dataclasses.dataclass(frozen=True)
class Fused:
    """How often each operator is in the result. Two attentions, two MLPs and five normalizations with an addition in
    front of them are all that there are; ``alone`` are normalizations without one, which have no operator of ours:
    ONNX Runtime fuses their steps itself. ``gelus`` stand behind convolutions, which have no such activation."""

    mlp: str = "SparseFeedForwardGelu"
    norm: str = "SkipLayerNormalization"
    norms: int = 5
    alone: int = 0
    gelus: int = 0
    merged: str = "SparseMatMulSplit3"
    declined: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """``of(attention)`` is the model; ``inputs`` are what it is exported with."""

    model: str
    config: dict
    fused: Fused
    inputs: str = "text"
    sdpa: bool = True
    encoder: bool = False


STORED_OTHERWISE = (
    "is stored differently from the other linears of its input"  # 128 outputs of 64 are another block
)
FUSED_ALREADY = "is fused already, as ONNX Attention"
PACKED = Fused("SparseFeedForwardGeluTanh", merged="")  # one linear makes queries, keys and values
GATED = Fused("SparseFeedForwardSiluGate", "SkipRMSNormalization", 4, 1)

MODELS = {
    "bert": Case("Bert", TEXT, Fused()),
    "minilm": Case("Bert", {**TEXT, "num_attention_heads": 4}, Fused(), "types"),
    "distilbert": Case("DistilBert", {**DISTILBERT, "max_position_embeddings": 64}, Fused()),
    "roberta": Case("Roberta", TEXT, Fused()),
    "mpnet": Case("MPNet", TEXT, Fused(), sdpa=False),
    "electra": Case("Electra", {**TEXT, "embedding_size": 64}, Fused()),
    "vit": Case("ViT", IMAGE, Fused(), "image"),
    "deit": Case("DeiT", IMAGE, Fused(), "image"),
    "clip text": Case("CLIPText", {**TEXT, "eos_token_id": 99}, Fused("SparseFeedForwardQuickGelu")),
    "clip vision": Case("CLIPVision", IMAGE, Fused("SparseFeedForwardQuickGelu", norms=4, alone=1), "image"),
    "gpt2": Case("GPT2", {**GPT2, "n_inner": INNER, "use_cache": False}, PACKED),
    "llama": Case("Llama", {**TEXT, "use_cache": False}, GATED),
    "llama, grouped": Case(
        "Llama",
        {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False},
        dataclasses.replace(GATED, merged="SparseMatMulSplit2", declined=(STORED_OTHERWISE,) * 2),
    ),
    "t5": Case(
        "T5Encoder",
        {**T5, "feed_forward_proj": "relu"},
        Fused("SparseFeedForwardRelu", "SkipRMSNormalization", 4, 1),
    ),
    "t5, gated": Case(
        "T5Encoder",
        {**T5, "feed_forward_proj": "gated-gelu"},
        Fused("SparseFeedForwardGeluTanhGate", "SkipRMSNormalization", 4, 1),
    ),
    "whisper": Case("Whisper", WHISPER, Fused(gelus=2), "audio", encoder=True),
}


@dataclasses.dataclass(frozen=True)
class Export:
    opset: int
    dynamic: bool = False
    attention: str = "sdpa"
    folding: bool = True
    dynamo: bool = False
    mask_of: str = "model"  # or "transformers 4": [B, 1, 1, S], computed in front of the model

    @property
    def standard_attention(self):
        """Whether the exporter itself writes the attention as one operator of the standard."""
        return self.dynamo and self.opset >= 23 and self.attention == "sdpa"

    def __str__(self):
        words = ["dynamo" if self.dynamo else "torchscript", str(self.opset)]
        words += ["dynamic" if self.dynamic else "static", self.attention, self.mask_of]
        return " ".join(words + ([] if self.folding else ["unfolded"]))


TORCHSCRIPT = [
    *(Export(opset, dynamic, "eager") for opset in range(11, 18) for dynamic in (False, True)),
    *(Export(opset, dynamic) for opset in (14, 17) for dynamic in (False, True)),
    *(Export(14, dynamic, folding=False) for dynamic in (False, True)),
]
OPTIMUM = [Export(14, True, attention, mask_of="transformers 4") for attention in ("eager", "sdpa")]
DYNAMO = [Export(opset, dynamic, dynamo=True) for opset in (18, 20, 23) for dynamic in (False, True)]
QUICK = [
    ("bert", Export(14)),
    ("bert", Export(14, True)),
    ("minilm", Export(11, True, "eager")),
    ("roberta", Export(13, True, "eager", folding=False)),
    ("vit", Export(14, True)),
    ("clip text", Export(14)),
    ("gpt2", Export(17, True, "eager")),
    ("llama, grouped", Export(14, True)),
    ("t5, gated", Export(14)),
    ("bert", OPTIMUM[1]),
]


def whole_matrix():
    for name, case in MODELS.items():
        for export in [*TORCHSCRIPT, *OPTIMUM, *DYNAMO]:
            if export.attention == "sdpa" and not case.sdpa:
                continue
            if export.mask_of != "model" and (not name.startswith("bert") or case.inputs != "text"):
                continue
            yield name, export


class Positional(torch.nn.Module):
    """Gives the first output of a model whose inputs have these names."""

    def __init__(self, model, names, mask_of):
        super().__init__()
        self.model, self.names, self.mask_of = model, names, mask_of

    def forward(self, *inputs):
        given = dict(zip(self.names, inputs, strict=True))
        if self.mask_of == "transformers 4":
            mask = given["attention_mask"][:, None, None, :].to(torch.float32)
            given["attention_mask"] = (1.0 - mask) * torch.finfo(torch.float32).min
        return self.model(**given)[0]


def inputs_of(kind, batch=1, tokens=TOKENS):
    ids = torch.randint(3, 98, (batch, tokens))
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 :] = 0
    match kind:
        case "image":
            return {"pixel_values": torch.rand(batch, 3, 32, 32)}
        case "audio":
            return {"input_features": torch.rand(batch, 16, 50)}
        case "types":
            return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {"input_ids": ids, "attention_mask": mask}


def pruned_model(case, attention):
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.model.removesuffix('Encoder')}Config")(
        **case.config, attn_implementation=attention
    )
    model = getattr(transformers, f"{case.model}Model")(config).eval()
    if case.encoder:
        model = model.get_encoder()
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            parameter *= torch.rand(parameter.shape, generator=random) > 0.9
        elif parameter.ndim == 1:  # no two alike, as in a trained model
            parameter += 0.1 * torch.rand(parameter.shape, generator=random)
    return model


def exported(case, export, path):
    given = inputs_of(case.inputs, batch=2 if export.dynamo and export.dynamic else 1)
    model = Positional(pruned_model(case, export.attention), list(given), export.mask_of)
    options = {"input_names": list(given), "output_names": ["Y"], "opset_version": export.opset}
    axes = {
        name: {0: "batch", **({1: "tokens"} if "ids" in name or "mask" in name else {})} for name in given
    }
    if export.dynamo:
        free = torch.export.Dim.DYNAMIC
        shapes = (tuple(dict.fromkeys(axes[name], free) for name in given),) if export.dynamic else None
        options |= {"dynamic_shapes": shapes, "external_data": False, "verbose": False}
    else:
        options |= {"dynamic_axes": axes if export.dynamic else None, "do_constant_folding": export.folding}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing
        logging.disable(logging.WARNING)
        try:
            torch.onnx.export(model, tuple(given.values()), path, dynamo=export.dynamo, **options)
        finally:
            logging.disable(logging.NOTSET)


def lowered(path):
    model, context = model_io.load_model(path), PassContext()
    prepared = Pipeline(PREPARATION_PASSES)(model, context)
    fused = Pipeline(FUSION_PASSES)(model, context)
    candidates, left = find_candidates(model)
    result, apart = lower_layers(
        model, [(candidate, candidate.forms[0]) for candidate in candidates], Packer(context), context
    )
    places = [*prepared.declined, *fused.declined, *left, *apart]
    return result, tuple(sorted(place.reason for place in places))


def answer(path, feeds, *, library):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if library:
        sparse_ops.register(options)
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    return session.run(None, {name: array for name, array in feeds.items() if name in names})[0]


def check(name, export, tmp_path):
    case = MODELS[name]
    path = tmp_path / "model.onnx"
    exported(case, export, path)
    result, declined = lowered(path)
    ours = [node.op_type for node in result.graph if node.domain == "sparse_onnx"]
    others = [node.op_type for node in result.graph if node.domain != "sparse_onnx"]
    expected = case.fused
    standard = BLOCKS if export.standard_attention else 0
    assert others.count("Attention") == standard
    assert sum(op_type.startswith("Attention") for op_type in ours) == BLOCKS - standard
    assert "Softmax" not in others
    assert ours.count(expected.mlp) == BLOCKS
    assert sum(op_type.removesuffix("Sum") == expected.norm for op_type in ours) == expected.norms
    spelled_out = others.count("ReduceMean") // (2 if expected.norm == "SkipLayerNormalization" else 1)
    operators = others.count("LayerNormalization") + others.count("RMSNormalization")
    assert spelled_out + operators == expected.alone
    if expected.merged:
        assert ours.count(expected.merged) == BLOCKS
    assert others.count("Erf") + others.count("Gelu") == expected.gelus
    assert not {"Tanh", "Sigmoid", "IsNaN"} & set(others)
    assert declined == tuple(sorted((*expected.declined, *[FUSED_ALREADY] * standard)))
    compiled = model_io.save_model(result, tmp_path / "compiled")
    if name.startswith(("mpnet", "t5")) and export.opset == 11:
        # Where sizes are free they take the Min of int64, which is one of opset 12: ONNX Runtime refuses the file.
        path = model_io.save_model(model_io.load_model(path), tmp_path / "converted")
    # RotaryEmbedding of opset 23 wants the angles of every sequence; the exporter writes those of one.
    other = (1 if name.startswith("llama") and export.standard_attention else 3, 7)
    for batch, tokens in [(1, TOKENS), other][: 2 if export.dynamic else 1]:
        feeds = {key: value.numpy() for key, value in inputs_of(case.inputs, batch, tokens).items()}
        dense = answer(path, feeds, library=False)
        for library in (True, False):
            got = answer(compiled, feeds, library=library)
            assert got.shape == dense.shape
            assert np.abs(got - dense).max() <= 1e-4 * np.abs(dense).max()


@pytest.mark.parametrize(("name", "export"), QUICK, ids=str)
def test_all_is_fused(name, export, tmp_path):
    check(name, export, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "export"), list(whole_matrix()), ids=str)
def test_all_is_fused_in_the_whole_matrix(name, export, tmp_path):
    check(name, export, tmp_path)
