"""Tables of embeddings in few bits: what they save, and what the outputs lose, against ORT on the model itself."""

import numpy as np
import pytest

from sparse_onnx.passes.base import PassContext
from sparse_onnx.passes.quantize.embedding import QuantizeEmbeddings
from sparse_onnx.running.workbench import Workbench
from sparse_onnx.search.tables import measure_tables, rounding_of

V, D = 300, 32
RNG = np.random.default_rng(0)
IDS = {"ids": RNG.integers(0, V, (2, 7))}


@pytest.fixture
def model(from_text):
    return from_text(
        f"""<ir_version: 9, opset_import: ["" : 17]> g (int64[B, S] ids) => (float[B, S, {D}] Y)
           {{ E = Gather(words, ids) Y = MatMul(E, W) }}""",
        words=RNG.standard_normal((V, D)).astype(np.float32),
        W=RNG.standard_normal((D, D)).astype(np.float32),
    )


def test_bytes_and_losses_are_those_of_the_pass(model, tmp_path, run):
    tables = measure_tables(model, (8, 4), [IDS], Workbench(1, tmp_path))
    assert list(tables) == ["words"]
    table = tables["words"]
    assert table.length == D
    expected = run(model, IDS)["Y"].astype(np.float64)
    for bits, size in ((8, 0), (4, 32)):
        rounded = model.clone()
        (layer,) = QuantizeEmbeddings(bits=bits, group_size=size)(rounded, PassContext()).layers
        found = run(rounded, IDS)["Y"].astype(np.float64)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert table.saved[bits] == 4 * V * D - layer.nbytes
        assert table.loss[bits] == pytest.approx(error**2, rel=1e-4)
    assert table.loss[8] < table.loss[4] / 10


def test_a_table_that_is_read_otherwise_is_none(from_text, tmp_path):
    """An output head tied to it would be rounded, too."""
    tied = from_text(
        f"""<ir_version: 9, opset_import: ["" : 17]> g (int64[B, S] ids) => (float[B, S, {V}] Y)
           {{ E = Gather(words, ids) T = Transpose<perm = [1, 0]>(words) Y = MatMul(E, T) }}""",
        words=RNG.standard_normal((V, D)).astype(np.float32),
    )
    assert measure_tables(tied, (8, 4), [IDS], Workbench(1, tmp_path)) == {}


def test_a_model_without_tables(from_text, tmp_path):
    plain = from_text(
        f"""<ir_version: 9, opset_import: ["" : 17]> g (float[B, {D}] X) => (float[B, {D}] Y)
           {{ Y = MatMul(X, W) }}""",
        W=np.eye(D, dtype=np.float32),
    )
    assert measure_tables(plain, (8,), [{"X": np.ones((1, D), np.float32)}], Workbench(1, tmp_path)) == {}


@pytest.mark.parametrize(
    ("bits", "length", "size"), [(8, 64, 0), (4, 64, 64), (4, 96, 32), (4, 48, 16), (4, 20, 0)]
)
def test_how_a_table_is_rounded(bits, length, size):
    (step,) = rounding_of(bits, {"words": length})
    assert step == QuantizeEmbeddings(bits=bits, group_size=size, targets=("words",))
