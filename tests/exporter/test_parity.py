"""The comparison with torch finds a wrong model, and only a wrong one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparse_onnx.exporter._parity import check_parity, difference

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402

from sparse_onnx.errors import VerificationError  # noqa: E402

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("expected", "actual", "distance", "scale"),
    [
        ([1.0, -4.0], [1.5, -4.0], 0.5, 4.0),
        ([0.0, 0.0], [0.0, 0.25], 0.25, 1.0),
        ([NAN, INF, 2.0], [NAN, INF, 2.0], 0.0, 2.0),
        ([INF, 2.0], [-INF, 2.0], INF, 1.0),
        ([NAN], [1.0], INF, 1.0),
        ([1.0], [NAN], NAN, 1.0),
        ([], [], 0.0, 1.0),
    ],
)
def test_difference(expected: list[float], actual: list[float], distance: float, scale: float) -> None:
    result = difference(np.array(expected, np.float32), np.array(actual, np.float32))
    np.testing.assert_array_equal(result, (distance, scale))


def test_difference_of_shapes_bools_and_integers() -> None:
    assert difference(np.zeros((2, 1)), np.zeros(2))[0] == INF
    assert difference(np.array([True]), np.array([False])) == (1.0, 1.0)
    assert difference(np.array([7, 2]), np.array([7, 3])) == (1.0, 7.0)


class Scaled(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def doubling() -> ir.Model:
    return ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["": 20]>
        double (float[n] x) => (float[n] y) { y = Add(x, x) }"""
    )


def test_an_equal_model_passes_on_every_case() -> None:
    cases = [{"x": torch.arange(3.0)}, {"x": torch.arange(5.0)}]
    assert check_parity(doubling(), Scaled(2.0), cases) == 0.0


@pytest.mark.parametrize("factor", [2.001, -2.0, NAN])
def test_a_wrong_model_is_named_with_output_and_shape(factor: float) -> None:
    with pytest.raises(VerificationError, match=r"output y .* on x\[3\]"):
        check_parity(doubling(), Scaled(factor), [{"x": torch.ones(3)}])


def test_a_model_that_does_not_load_is_a_verification_error() -> None:
    broken = doubling()
    broken.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(VerificationError, match="the exported model cannot be used"):
        check_parity(broken, Scaled(2.0), [{"x": torch.ones(3)}])


def test_a_model_that_does_not_run_names_the_shape() -> None:
    with pytest.raises(VerificationError, match=r"does not run on x\[1, 3\]"):
        check_parity(doubling(), Scaled(2.0), [{"x": torch.ones(1, 3)}])
