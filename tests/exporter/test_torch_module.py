"""export_torch(): names, masks, dynamic axes, and what it refuses."""

from __future__ import annotations

import copy
import re
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402
import torch.nn.utils.parametrizations as parametrizations  # noqa: E402
import torch.nn.utils.prune as prune  # noqa: E402
from torch import nn  # noqa: E402

from sparse_onnx.errors import UsageError  # noqa: E402
from sparse_onnx.exporter import ExportResult, export_torch  # noqa: E402
from sparse_onnx.model.metadata_keys import MODULE_KEY  # noqa: E402

BATCH = {0: "batch"}


class Residual(nn.Module):
    """Two equal zero biases, a residual, a linear layer with its own bias."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(width, 3)
        nn.init.zeros_(self.first.bias)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x + self.dropout(self.second(torch.relu(self.first(x)))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.inner = nn.Linear(8, 8)
        self.output = nn.Linear(8, 20, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.inner(self.embedding(tokens)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.stem(image))).mean((2, 3)))


def seeded(module_type: type[nn.Module], *arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return module_type(*arguments)


def initializers(result: ExportResult) -> dict[str, np.ndarray]:
    return {name: value.const_value.numpy() for name, value in result.model.graph.initializers.items()}


def run(result: ExportResult, *inputs: torch.Tensor) -> list[np.ndarray]:
    session = ort.InferenceSession(ir.to_proto(result.model).SerializeToString())
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def test_two_dimensional_input_gives_gemm_with_named_weights() -> None:
    module = seeded(Residual).eval()
    result = export_torch(module, (torch.randn(4, 16),), dynamic_shapes={"x": BATCH})
    weights = initializers(result)
    for name in ("first", "second", "last"):
        np.testing.assert_array_equal(
            weights[f"{name}.weight"], getattr(module, name).weight.detach().numpy()
        )
    gemms = [node for node in result.model.graph if node.op_type == "Gemm"]
    assert [node.inputs[1].name for node in gemms] == ["first.weight", "second.weight", "last.weight"]
    assert [node.name for node in gemms] == ["first/Gemm", "second/Gemm", "last/Gemm"]
    assert [node.metadata_props[MODULE_KEY] for node in gemms] == ["first", "second", "last"]


def test_three_dimensional_input_gives_matmul_with_named_transposed_weights() -> None:
    module = seeded(Residual).eval()
    result = export_torch(module, (torch.randn(2, 5, 16),), dynamic_shapes={"x": {0: "batch", 1: "tokens"}})
    weights = initializers(result)
    np.testing.assert_array_equal(weights["first.weight"], module.first.weight.detach().numpy().T)
    assert not any(re.fullmatch(r"val_\d+", name) and w.ndim == 2 for name, w in weights.items())
    assert [value.shape.dims[:2] for value in result.model.graph.outputs] == [
        tuple(result.model.graph.inputs[0].shape.dims[:2])
    ]


def test_merged_biases_get_no_name_of_one_layer() -> None:
    result = export_torch(seeded(Residual).eval(), (torch.randn(2, 5, 16),))
    names = initializers(result)
    assert "shared.bias" in names
    assert "first.bias" not in names
    assert "second.bias" not in names
    assert "last.bias" in names


def test_distinct_biases_keep_their_names() -> None:
    module = seeded(Residual).eval()
    nn.init.ones_(module.second.bias)
    names = initializers(export_torch(module, (torch.randn(2, 5, 16),)))
    assert {"first.bias", "second.bias", "last.bias"} <= set(names)
    assert not any(name.startswith("shared.") for name in names)


def test_tied_weights_are_named_after_the_modules_that_use_them() -> None:
    result = export_torch(
        seeded(Tied).eval(), (torch.tensor([[1, 2, 3]]),), dynamic_shapes=({0: "b", 1: "s"},)
    )
    weights = initializers(result)
    assert weights["embedding.weight"].shape == (20, 8)
    np.testing.assert_array_equal(weights["output.weight"], weights["embedding.weight"].T)


def test_branches_are_named_too() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Linear(4, 4)
            self.right = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.left(x), lambda x: self.right(x), (x,))

    result = export_torch(seeded(Branches), (torch.ones(2, 4),))
    assert {"left.weight", "right.weight", "left.bias", "right.bias"} <= set(initializers(result))
    inner = [node.name for node in result.model.graph.all_nodes() if node.op_type == "Gemm"]
    assert len(inner) == len(set(inner)) == 2


def test_node_and_value_names_are_unique() -> None:
    graph = export_torch(seeded(Residual).eval(), (torch.randn(2, 5, 16),)).model.graph
    nodes = [node.name for node in graph]
    values = [v.name for v in (*graph.inputs, *graph.initializers.values())] + [
        v.name for node in graph for v in node.outputs
    ]
    assert len(set(nodes)) == len(nodes)
    assert len(set(values)) == len(values)


def test_a_module_called_twice_keeps_its_path_and_both_nodes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.relu(self.layer(x)))

    graph = export_torch(seeded(Twice).eval(), (torch.randn(2, 8),)).model.graph
    gemms = [node for node in graph if node.op_type == "Gemm"]
    assert [node.name for node in gemms] == ["layer/Gemm", "layer/Gemm_1"]
    assert {node.inputs[1].name for node in gemms} == {"layer.weight"}


def test_convolution_network() -> None:
    module = seeded(Convolutions)
    module(torch.randn(4, 3, 8, 8))  # moves the running statistics in training mode
    result = export_torch(module, (torch.randn(1, 3, 8, 8),), dynamic_shapes={"image": BATCH})
    assert "Conv" in {node.op_type for node in result.model.graph}
    assert result.shapes == ({"image": (1, 3, 8, 8)}, {"image": (2, 3, 8, 8)})


def test_no_local_paths_and_no_foreign_metadata() -> None:
    result = export_torch(seeded(Residual).eval(), (torch.randn(2, 5, 16),))
    text = ir.to_proto(result.model).SerializeToString()
    for forbidden in (b".py", b"stack_trace", b"pkg.", b"site-packages", __file__.encode()):
        assert forbidden not in text
    assert all(set(node.metadata_props) <= {MODULE_KEY} for node in result.model.graph.all_nodes())


def test_opset_and_names_are_as_asked() -> None:
    result = export_torch(
        seeded(Residual).eval(),
        (torch.randn(2, 16),),
        input_names=["features"],
        output_names=["linear"],
        opset=18,
    )
    assert result.model.opset_imports[""] == 18
    assert result.model.ir_version <= 10
    assert [v.name for v in result.model.graph.inputs] == ["features"]
    assert [v.name for v in result.model.graph.outputs] == ["linear"]  # torch gave it to an inner value
    x = torch.randn(2, 16)
    assert run(result, x)[0].shape == (2, 3)


@pytest.mark.parametrize("opset", [12, 17, 24])
def test_opsets_that_torch_does_not_write_are_refused(opset: int) -> None:
    with pytest.raises(UsageError, match="choose one of 18 to 23"):
        export_torch(seeded(Residual), (torch.randn(2, 16),), opset=opset)


# Pruning and parametrizations


def test_pruned_weights_are_exported_as_zeros_without_a_mask() -> None:
    module = seeded(Residual).eval()
    prune.l1_unstructured(module.first, "weight", 0.75)
    prune.random_unstructured(module.second, "weight", 0.5)
    prune.random_unstructured(module.second, "weight", 0.5)  # two methods on one weight
    masked = module.first.weight.detach().numpy().copy()
    result = export_torch(module, (torch.randn(2, 5, 16),))
    weights = initializers(result)
    np.testing.assert_array_equal(weights["first.weight"], masked.T)
    assert (weights["second.weight"] == 0).mean() == 0.75
    assert "Mul" not in {node.op_type for node in result.model.graph}
    assert not any("mask" in name or "orig" in name for name in weights)


def test_a_weight_under_a_mask_of_ones_own_keeps_its_name() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.register_buffer("mask", (torch.rand(8, 8) > 0.5).float())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.weight * self.mask)

    module = seeded(Masked)
    weights = initializers(export_torch(module, (torch.randn(2, 8),)))
    np.testing.assert_array_equal(weights["weight"], (module.weight * module.mask).detach().numpy())
    assert list(weights) == ["weight"]


def test_the_callers_module_is_not_changed() -> None:
    module = seeded(Residual)
    module.train()
    prune.l1_unstructured(module.first, "weight", 0.5)
    parametrizations.orthogonal(module.second)
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(2, 16)
    export_torch(module, (x,))
    assert module.training
    assert module.dropout.training
    assert prune.is_pruned(module)
    assert nn.utils.parametrize.is_parametrized(module.second, "weight")
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    module(x).sum().backward()
    assert module.first.weight_orig.grad is not None


def test_training_mode_is_exported_without_dropout() -> None:
    module = seeded(Residual).train()
    result = export_torch(module, (torch.randn(2, 16),))
    assert "Dropout" not in {node.op_type for node in result.model.graph}
    x = torch.randn(2, 16)
    module.eval()
    np.testing.assert_allclose(run(result, x)[0], module(x).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["orthogonal", "weight_norm", "spectral_norm"])
def test_parametrizations_are_multiplied_out(name: str) -> None:
    module = seeded(Residual).eval()
    getattr(parametrizations, name)(module.first)
    expected = module.first.weight.detach().numpy()
    weights = initializers(export_torch(module, (torch.randn(2, 16),)))
    np.testing.assert_allclose(weights["first.weight"], expected, rtol=1e-6)
    assert not any("parametrizations" in name for name in weights)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_the_old_hooks_are_multiplied_out(name: str) -> None:
    module = seeded(Residual).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        getattr(nn.utils, name)(module.first)
    x = torch.randn(2, 16)
    expected = module(x).detach().numpy()
    result = export_torch(module, (x,))
    assert "first.weight" in initializers(result)
    np.testing.assert_allclose(run(result, x)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_pruned_layer_that_shares_its_weight_leaves_the_other_unpruned() -> None:
    module = seeded(Residual).eval()
    module.second.weight = module.first.weight
    prune.l1_unstructured(module.first, "weight", 0.5)
    weights = initializers(export_torch(module, (torch.randn(2, 16),)))
    assert (weights["first.weight"] == 0).mean() == 0.5
    assert (weights["second.weight"] == 0).mean() == 0


# Inputs and dynamic axes


class Two(nn.Module):
    def forward(
        self, left: torch.Tensor, right: torch.Tensor, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        return left - right if scale is None else (left - right) * scale


def test_inputs_by_name_in_any_order() -> None:
    example = {"right": torch.ones(2, 3), "left": torch.zeros(2, 3)}
    result = export_torch(Two(), example, dynamic_shapes={"left": BATCH, "right": BATCH})
    assert [v.name for v in result.model.graph.inputs] == ["left", "right"]
    np.testing.assert_array_equal(run(result, torch.zeros(3, 3), torch.ones(3, 3))[0], -np.ones((3, 3)))
    assert [case["left"] for case in result.shapes] == [(2, 3), (4, 3)]


def test_an_input_that_forward_ignores_stays_an_input() -> None:
    class Ignores(nn.Module):
        def forward(self, x: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
            return x + 1

    result = export_torch(Ignores(), (torch.ones(2), torch.ones(3)))
    assert [v.name for v in result.model.graph.inputs] == ["x", "unused"]


def test_several_outputs() -> None:
    class Several(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sum": x.sum(-1), "positive": x > 0}

    result = export_torch(Several(), (torch.randn(2, 3),), output_names=["sum", "positive"])
    assert [v.name for v in result.model.graph.outputs] == ["sum", "positive"]


def test_a_dynamic_axis_of_example_size_one_stays_dynamic() -> None:
    result = export_torch(seeded(Residual).eval(), (torch.randn(1, 16),), dynamic_shapes={"x": BATCH})
    assert result.shapes == ({"x": (1, 16)}, {"x": (2, 16)})
    assert run(result, torch.randn(7, 16))[0].shape == (7, 3)


def test_bounds_of_a_dimension_hold_for_the_second_shape() -> None:
    batch = torch.export.Dim("batch", min=1, max=5)
    result = export_torch(seeded(Residual).eval(), (torch.randn(4, 16),), dynamic_shapes={"x": {0: batch}})
    assert result.shapes[1] == {"x": (5, 16)}


def test_where_no_larger_size_is_allowed_a_smaller_one_is_compared() -> None:
    class AtMostFour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.position[: x.shape[1]]

    tokens = torch.export.Dim("tokens", max=4)
    result = export_torch(AtMostFour(), (torch.randn(2, 4, 8),), dynamic_shapes={"x": {1: tokens}})
    assert result.shapes == ({"x": (2, 4, 8)}, {"x": (2, 2, 8)})


def test_static_shapes_are_compared_once() -> None:
    result = export_torch(seeded(Residual).eval(), (torch.randn(2, 16),))
    assert result.shapes == ({"x": (2, 16)},)
    assert 0 <= result.max_abs_difference < 1e-5


@pytest.mark.parametrize(
    ("module", "example", "options", "message"),
    [
        (lambda x: x, (torch.ones(1),), {}, "takes a torch.nn.Module, not function"),
        (nn.Linear(2, 2), (torch.ones(1, 2), torch.ones(1)), {}, "do not fit Linear.forward"),
        (nn.Linear(2, 2), {"inputs": torch.ones(1, 2)}, {}, "do not fit Linear.forward"),
        (nn.Linear(2, 2), ([torch.ones(1, 2)],), {}, "'input' is list, not one tensor"),
        (nn.Linear(2, 2), (torch.ones(1, 2),), {"dynamic_shapes": {"x": BATCH}}, r"names \['x'\]"),
        (nn.Linear(2, 2), (torch.ones(1, 2),), {"dynamic_shapes": (BATCH, BATCH)}, "2 entries for 1 inputs"),
        (nn.Linear(2, 2), (torch.ones(1, 3),), {}, "torch cannot export Linear"),
        (
            nn.Linear(2, 2),
            (torch.ones(1, 2),),
            {"output_names": ["a", "b"]},
            "2 output names .* has 1 outputs",
        ),
        (
            nn.Linear(2, 2),
            (torch.ones(1, 2),),
            {"input_names": ["a"], "output_names": ["a"]},
            "must differ: a, a",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(module: object, example: object, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_torch(module, example, **options)


def test_a_module_that_cannot_be_traced_gives_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UsageError, match="torch cannot export Branches") as caught:
        export_torch(Branches(), (torch.ones(2, 2),))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
