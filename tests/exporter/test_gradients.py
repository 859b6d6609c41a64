"""loss_gradients(): against autograd by hand, the losses that need no labels, names of an export, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

import torch.nn.functional as F  # noqa: E402
import torch.nn.utils.prune as prune  # noqa: E402
from torch import nn  # noqa: E402

from sparse_onnx.errors import UsageError  # noqa: E402
from sparse_onnx.exporter import export_huggingface, export_torch  # noqa: E402
from sparse_onnx.exporter.gradients import loss_gradients  # noqa: E402
from sparse_onnx.model.weights import find_weights  # noqa: E402

RNG = np.random.default_rng(3)
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
}


class Tiny(nn.Module):
    """A convolution with groups, a linear, dropout, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, (2, 3), groups=2)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(6, 5)
        self.unused = nn.Linear(5, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(torch.tanh(self.conv(image)).mean((2, 3))))


def images(count: int, size: int = 1) -> list[dict[str, np.ndarray]]:
    return [{"image": RNG.standard_normal((size, 4, 5, 6)).astype(np.float32)} for _ in range(count)]


def seeded(module_type: type[nn.Module], *arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return module_type(*arguments)


def squared(outputs: torch.Tensor, _inputs: object) -> torch.Tensor:
    return (outputs**2).sum()


def encoder(architecture: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model_type = getattr(transformers, architecture)
    return model_type(model_type.config_class(**SMALL, **options)).eval()


def token_batches(count: int, length: int = 12, padding: int = 0) -> list[dict[str, np.ndarray]]:
    batches = []
    for _ in range(count):
        mask = np.ones((1, length), np.int64)
        mask[:, length - padding :] = 0
        batches.append({"input_ids": RNG.integers(1, 99, (1, length)) * mask, "attention_mask": mask})
    return batches


def same(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(
        np.array_equal(one[name].grad_abs, other[name].grad_abs)
        and np.array_equal(one[name].fisher, other[name].fisher)
        for name in one
    )


# The numbers


def test_means_over_batches_are_those_of_autograd() -> None:
    module, batches = seeded(Tiny), images(3, size=2)
    module.train()
    found = loss_gradients(module, batches, squared)
    assert list(found) == ["conv.weight", "linear.weight"]
    reference = copy.deepcopy(module).eval()
    expected: dict[str, list[np.ndarray]] = {"conv.weight": [], "linear.weight": []}
    for batch in batches:
        reference.zero_grad()
        (reference(torch.tensor(batch["image"])) ** 2).sum().backward()
        for name, gradients in expected.items():
            stored = reference.get_parameter(name).grad.numpy().copy()
            gradients.append(stored.reshape(len(stored), -1).T)
    for name, gradients in expected.items():
        assert found[name].grad_abs.dtype == found[name].fisher.dtype == np.float32
        np.testing.assert_allclose(found[name].grad_abs, np.mean(np.abs(gradients), 0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name].fisher, np.mean(np.square(gradients), 0), rtol=1e-5, atol=1e-6)
    assert found["conv.weight"].fisher.shape == (12, 6)


def test_the_module_stays_as_it_is() -> None:
    module = seeded(Tiny).train()
    module.linear.weight.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    assert "linear.weight" in loss_gradients(module, images(1), squared)
    assert module.training
    assert not module.linear.weight.requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_no_gradient_mode_of_the_caller_does_not_matter() -> None:
    batches = images(2)
    with torch.no_grad():
        inside = loss_gradients(seeded(Tiny), batches, squared)
    assert same(inside, loss_gradients(seeded(Tiny), batches, squared))


def test_a_tied_weight_has_the_sum_over_its_uses_under_each_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.tanh(self.one(x)))

    module, x = seeded(Twice), RNG.standard_normal((1, 4)).astype(np.float32)
    found = loss_gradients(module, [{"x": x}], squared)
    (module(torch.tensor(x)) ** 2).sum().backward()
    expected = np.abs(module.one.weight.grad.numpy().T)
    for name in ("one.weight", "two.weight"):
        np.testing.assert_allclose(found[name].grad_abs, expected, rtol=1e-5, atol=1e-6)


def test_masks_are_multiplied_out_and_the_gradient_is_that_of_the_product() -> None:
    module, batches = seeded(Tiny), images(1)
    prune.l1_unstructured(module.linear, "weight", 0.5)
    plain = seeded(Tiny)
    with torch.no_grad():
        plain.linear.weight.copy_(module.linear.weight)
    assert same(loss_gradients(module, batches, squared), loss_gradients(plain, batches, squared))


def test_half_precision_is_summed_in_float32() -> None:
    found = loss_gradients(
        seeded(Tiny).to(torch.bfloat16), [{"image": torch.ones(1, 4, 5, 6).bfloat16()}], squared
    )
    assert {part.fisher.dtype for part in found.values()} == {np.dtype(np.float32)}


# Losses that need no labels


def test_the_projection_of_any_output_has_the_curvature_of_its_squared_change() -> None:
    """For z = xW it is known: diag(JᵀJ) of w_ij is x_i², however many outputs there are."""
    module = seeded(nn.Linear, 3, 4)
    x = np.array([[1.0, -2.0, 0.5]], np.float32)
    fisher = loss_gradients(module, [{"input": x}] * 500)["weight"].fisher
    # The mean of 500 squares of normal draws: sqrt(2 / 500) is one standard deviation.
    np.testing.assert_allclose(fisher, np.repeat(x.T**2, 4, axis=1), rtol=4 * np.sqrt(2 / 500))


def test_labels_drawn_from_the_prediction_give_the_fisher_information() -> None:
    """For logits z = xW it is known: E (p_j - y_j)² x_i² = p_j (1 - p_j) x_i²."""

    class Classifier(nn.Linear):
        def forward(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": super().forward(input)}

    module = seeded(Classifier, 3, 4)
    x = np.array([[1.0, -2.0, 0.5]], np.float32)
    fisher = loss_gradients(module, [{"input": x}] * 500)["weight"].fisher
    share = module(torch.tensor(x))["logits"].softmax(-1).detach().numpy()
    # (p - y)² takes the values p² and (1 - p)², so a mean of 500 has a deviation of at most 1 / (2 sqrt(500)).
    np.testing.assert_allclose(fisher / x.T**2, share * (1 - share) + 0 * x.T, atol=4 / (2 * np.sqrt(500)))


def test_encoders_are_judged_by_their_pooled_embedding_without_padding() -> None:
    module = encoder("BertModel")
    long = token_batches(3, length=12, padding=4)
    short = [{name: array[:, :8] for name, array in batch.items()} for batch in long]
    one, other = loss_gradients(module, long), loss_gradients(module, short)
    assert "pooler.dense.weight" not in one  # it has no part in the mean over the tokens
    assert len(one) == 12
    for name in one:
        np.testing.assert_allclose(one[name].fisher, other[name].fisher, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForQuestionAnswering"])
def test_heads_need_no_labels(architecture: str) -> None:
    found = loss_gradients(encoder(architecture), token_batches(2, padding=3))
    assert any(not name.startswith("bert.") for name in found)
    assert all(part.fisher.max() > 0 for part in found.values())


def test_labels_lead_to_the_models_own_loss() -> None:
    module = encoder("BertForSequenceClassification", num_labels=3)
    batch = {**token_batches(1)[0], "labels": np.array([2])}
    found = loss_gradients(module, [batch])["classifier.weight"].grad_abs
    inputs = {name: torch.tensor(array) for name, array in batch.items()}
    F.cross_entropy(module(**inputs).logits, torch.tensor([2])).backward()
    np.testing.assert_allclose(found, module.classifier.weight.grad.abs().numpy().T, rtol=1e-4, atol=1e-7)


def test_a_causal_model_predicts_its_tokens_but_no_padding() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=99, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    module = transformers.GPT2LMHeadModel(config).eval()
    batch = token_batches(1, padding=3)[0]
    labels = np.where(batch["attention_mask"] == 0, -100, batch["input_ids"])
    found = loss_gradients(module, [batch])
    assert same(found, loss_gradients(module, [{**batch, "labels": labels}]))
    assert not same(found, loss_gradients(module, [{**batch, "labels": batch["input_ids"]}]))
    assert found["transformer.h.0.mlp.c_fc.weight"].fisher.shape == (16, 64)  # stored [K, N] already


def test_the_seed_decides_the_draws() -> None:
    batches = images(2)
    one, two, other = (loss_gradients(seeded(Tiny), batches, seed=seed) for seed in (0, 0, 1))
    assert same(one, two)
    assert not same(one, other)


# Names and shapes are those of an export


def test_an_exported_encoder_has_the_same_names_and_shapes(tmp_path: Path) -> None:
    encoder("BertForSequenceClassification", num_labels=3).save_pretrained(tmp_path)
    weights = {w.name: w.shape for w in find_weights(export_huggingface(tmp_path).model)[0]}
    found = loss_gradients(tmp_path, token_batches(1))
    assert {name: part.fisher.shape for name, part in found.items()} == weights


def test_an_exported_convolution_has_the_same_names_and_shapes() -> None:
    module = seeded(Tiny).eval()
    weights = {
        w.name: w.shape for w in find_weights(export_torch(module, (torch.ones(1, 4, 5, 6),)).model)[0]
    }
    found = loss_gradients(module, images(1))
    assert {name: part.fisher.shape for name, part in found.items()} == weights


def test_gradients_follow_a_normalization_that_the_export_folds_into_a_convolution() -> None:
    """|w · ∂L/∂w| is the same for the folded weight, and so are the gradients where nothing was folded."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    with torch.no_grad():
        module[1].weight.copy_(torch.linspace(-2, 2, 8))
        module[1].weight[3] = 0.0
        module[1].running_var.uniform_(0.1, 2)
    batches = [{"input": RNG.standard_normal((1, 3, 4, 4)).astype(np.float32)}]
    model = export_torch(module, (torch.ones(1, 3, 4, 4),)).model
    plain, fitted = loss_gradients(module, batches), loss_gradients(module, batches, model=model)
    weight = next(weight for weight in find_weights(model)[0] if weight.name == "0.weight")
    before = module[0].weight.detach().numpy().reshape(8, -1).T
    assert not np.allclose(weight.matrix(), before)
    expected = np.abs(before) * plain["0.weight"].grad_abs
    expected[:, 3] = 0
    found = np.abs(weight.matrix()) * fitted["0.weight"].grad_abs
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    roots = np.abs(weight.matrix()) * np.sqrt(fitted["0.weight"].fisher)
    np.testing.assert_allclose(roots, expected, rtol=1e-4, atol=1e-7)  # one batch: both are |g|
    np.testing.assert_array_equal(fitted["4.weight"].fisher, plain["4.weight"].fisher)


def test_a_weight_that_is_no_scaled_one_is_left_out() -> None:
    module = seeded(Tiny).eval()
    model = export_torch(module, (torch.ones(1, 4, 5, 6),)).model
    other = seeded(Tiny).eval()
    nn.init.normal_(other.linear.weight)
    assert list(loss_gradients(other, images(1), model=model)) == ["conv.weight"]
    nn.init.normal_(other.conv.weight)
    with pytest.raises(UsageError, match="is it an export of the module"):
        loss_gradients(other, images(1), model=model)


# Refusals


@pytest.mark.parametrize(
    ("module", "batches", "loss", "message"),
    [
        (lambda x: x, [], None, "takes a torch.nn.Module or a folder, not function"),
        (nn.Linear(2, 2), [], None, "give at least one batch"),
        (nn.Linear(2, 2), [{"input": np.ones((1, 3), np.float32)}], None, r"fails on batch 0, input\[1, 3\]"),
        (nn.Linear(2, 2), [{"x": np.ones((1, 2), np.float32)}], None, r"fails on batch 0, x\[1, 2\]"),
        (nn.Linear(2, 2), [{"input": np.ones((1, 2), np.float32)}], lambda z, _: z, "is no finite scalar"),
        (
            nn.Linear(2, 2),
            [{"input": np.full((1, 2), np.nan, np.float32)}],
            None,
            "batch 0 is no finite scalar",
        ),
        (nn.ReLU(), [{"input": np.ones((1, 2), np.float32)}], None, "depends on no weight"),
        (
            nn.Linear(2, 2),
            [{"input": np.ones((1, 2), np.float32)}],
            lambda z, _: torch.zeros(()),
            "depends on no weight",
        ),
        ("no/such/folder", [], None, "is no Hugging Face model folder"),
    ],
)
def test_wrong_calls_say_what_is_wrong(module: object, batches: list, loss: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loss_gradients(module, batches, loss)


def test_labels_for_a_model_without_a_loss() -> None:
    class Plain(nn.Linear):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    batch = {"x": np.ones((1, 2), np.float32), "labels": np.zeros(1, np.int64)}
    with pytest.raises(UsageError, match="have no loss"):
        loss_gradients(seeded(Plain, 2, 2), [batch])
