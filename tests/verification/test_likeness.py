"""Data like the calibration data and data unlike it: a number with a scale, said by optimize and verify."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest

import sparse_onnx
from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import UsageError
from sparse_onnx.model import model_io
from sparse_onnx.passes.calibration import Options
from sparse_onnx.verification.likeness import PROFILE_FILE, UNLIKE, Profile, profile_of, unlikeness
from sparse_onnx.verification.verify import verify

D = 32
_TEXT = f"""<ir_version: 9, opset_import: ["" : 17]>
block (float[batch, tokens, {D}] X) => (float[batch, tokens, {D}] Y) {{
  h = MatMul(X, W1) hb = Add(h, b1) a = Relu(hb) o = MatMul(a, W2) Y = Add(o, X)
}}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    rng = np.random.default_rng(0)
    arrays = {
        "W1": rng.standard_normal((D, 2 * D)) / np.sqrt(D),
        "b1": rng.standard_normal(2 * D),
        "W2": rng.standard_normal((2 * D, D)) / np.sqrt(2 * D),
    }
    proto = onnx.parser.parse_model(_TEXT)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()
    )
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(proto, path)
    return path


def rows(seed, kind="narrow", count=64):
    """Inputs [count, 16, D]: most of their energy in a few directions, the same for every seed of a kind."""
    directions = np.random.default_rng({"narrow": 10, "other": 11}[kind]).standard_normal((D, D))
    mixed = np.random.default_rng(seed).standard_normal((count, 16, D)) * np.logspace(0, -1.5, D)
    return (mixed @ directions).astype(np.float32)


def samples(*arrays):
    return Samples.of([{"X": part} for array in arrays for part in np.split(array, 16)], "data")


def profile(model, data, tmp_path, **options):
    return profile_of(model_io.load_model(model), data, Options(threads=1), work=tmp_path, **options)


LIKE = {"another draw": rows(2), "a few samples": rows(3, count=16), "scaled a little": 1.05 * rows(4)}
OTHER = {
    "other directions": rows(2, "other"),
    "noise": np.random.default_rng(5).standard_normal((64, 16, D)).astype(np.float32),
    "half of other directions": np.concatenate([rows(6, count=32), rows(7, "other", count=32)]),
    "louder": 1.5 * rows(8),
}


@pytest.mark.parametrize("name", LIKE)
def test_like_data_is_near_one(model, tmp_path, name):
    known = profile(model, samples(rows(1)), tmp_path)
    found = unlikeness(known, profile(model, samples(LIKE[name]), tmp_path, like=known))
    assert 0.8 < found < 0.9 * UNLIKE


@pytest.mark.parametrize("name", OTHER)
def test_other_data_is_unlike(model, tmp_path, name):
    known = profile(model, samples(rows(1)), tmp_path)
    found = unlikeness(known, profile(model, samples(OTHER[name]), tmp_path, like=known))
    assert found > 1.3 * UNLIKE


def test_of_what_is_seen_the_unlike_part_counts_by_its_share(model, tmp_path):
    known = profile(model, samples(rows(1)), tmp_path)
    whole, half = (
        unlikeness(known, profile(model, samples(OTHER[name]), tmp_path, like=known))
        for name in ("other directions", "half of other directions")
    )
    assert half - 1 == pytest.approx((whole - 1) / 2, rel=0.1)


def test_moments_against_numpy(model, tmp_path):
    data = rows(1)
    found = profile(model, samples(data), tmp_path).moments
    x = data.reshape(-1, D).astype(np.float64)
    assert set(found) == {"W1", "W2"}
    channels = np.linspace(0, D - 1, D).astype(int)  # 1024 rows: as many channels as there are
    np.testing.assert_allclose(
        found["W1"], (x.T @ x / len(x))[np.ix_(channels, channels)], rtol=1e-4, atol=1e-4
    )
    assert found["W2"].shape == (51, 51)  # 20 rows a channel


def test_too_few_tokens_say_nothing(model, tmp_path):
    known = profile(model, samples(rows(1)[:, :1, :]), tmp_path)  # 64 rows: 3 channels
    assert [len(moments) for moments in known.moments.values()] == [3, 3]
    one = Samples.of([{"X": rows(1, count=1)[:, :8]}], "data")
    none = profile(model, one, tmp_path)
    assert none.moments == {}
    assert unlikeness(none, none) is None


def test_a_layer_that_sees_far_fewer_rows_is_left_out(tmp_path):
    text = _TEXT.replace("Y)", f"Y, float[batch, {D}] P)").replace(
        "Y = Add(o, X)", "Y = Add(o, X) first = Gather<axis = 1>(Y, zero) P = MatMul(first, W3)"
    )
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays = {"W1": (D, 2 * D), "b1": (2 * D,), "W2": (2 * D, D), "W3": (D, D)}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in arrays.items()
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0), "zero"))
    onnx.save(proto, tmp_path / "pooled.onnx")
    assert set(profile(tmp_path / "pooled.onnx", samples(rows(1)), tmp_path).moments) == {"W1", "W2"}


def test_a_profile_is_read_as_it_was_written(model, tmp_path):
    known = profile(model, samples(rows(1)), tmp_path)
    known.save(tmp_path / "a.npz")
    again = Profile.load(tmp_path / "a.npz")
    assert again.within == known.within
    for name, moments in known.moments.items():
        np.testing.assert_allclose(again.moments[name], moments, rtol=1e-6)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"within": np.float64(1), "moments.W": np.ones((2, 3))},
        {"within": np.float64(1), "moments.W": np.full((2, 2), np.nan)},
        {"within": np.float64(0), "moments.W": np.ones((2, 2))},
        {"within": np.array(["a"]), "moments.W": np.ones((2, 2))},
        {"within": np.float64(1), "moments.W": np.array([["a", "b"], ["c", "d"]])},
        {"within": np.float64(1), "moments.W": np.array([[None]], dtype=object)},
    ],
)
def test_a_damaged_profile_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=r"a\.npz: .*profile of .*delete it"):
        Profile.load(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"text"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.npz: no profile of calibration data .*delete it"):
        Profile.load(tmp_path / "a.npz")


@pytest.fixture
def compiled(model, tmp_path):
    """Compiled with two eighths of unlike data at the end, or none."""

    def compile(name, data):
        np.savez(tmp_path / f"{name}.npz", X=data)
        said = []
        result = sparse_onnx.optimize(
            model,
            tmp_path / name,
            method="wanda",
            sparsity=0.5,
            calibration_data=tmp_path / f"{name}.npz",
            input_shapes={"X": (1, 16, D)},
            threads=1,
            benchmark=False,
            keep_pruned=True,
            progress=said.append,
        )
        return result, said

    return compile


WARNING = "looks unlike the calibration data"


def test_optimize_warns_of_held_out_data_of_another_kind(compiled, tmp_path):
    result, said = compiled("sorted", np.concatenate([rows(1, count=56), rows(2, "other", count=8)]))
    assert result.report["verification"]["unlikeness"] > UNLIKE
    assert [line for line in said if WARNING in line]
    assert WARNING in (tmp_path / "sorted" / "report.html").read_text(encoding="utf-8")


def test_optimize_does_not_warn_of_like_data(compiled, tmp_path):
    result, said = compiled("even", rows(1))
    assert result.report["verification"]["unlikeness"] < UNLIKE
    assert not [line for line in said if WARNING in line]
    assert WARNING not in (tmp_path / "even" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "even" / "report.json").read_text())["verification"]["unlikeness"] > 0.5


@pytest.mark.parametrize(("kind", "fires"), [("narrow", False), ("other", True)])
def test_verify_warns_of_other_data_only(compiled, model, tmp_path, kind, fires):
    compiled("even", rows(1))
    np.savez(tmp_path / "seen.npz", X=rows(9, kind))
    said = []
    options = {"max_relative_error": 2.0, "threads": 1, "layers": False, "progress": said.append}
    result = verify(model, tmp_path / "even" / "model.onnx", data=tmp_path / "seen.npz", **options)
    assert (result.unlikeness > UNLIKE) is fires
    assert bool([line for line in said if WARNING in line and "seen.npz" in line]) is fires
    assert result.to_dict()["unlikeness"] == result.unlikeness


@pytest.mark.parametrize("without", ["data", "profile"])
def test_verify_says_nothing_where_nothing_is_known(compiled, model, tmp_path, without):
    compiled("even", rows(1))
    if without == "profile":
        (tmp_path / "even" / PROFILE_FILE).unlink()
    np.savez(tmp_path / "seen.npz", X=rows(9, "other"))
    given = {} if without == "data" else {"data": tmp_path / "seen.npz"}
    result = verify(
        model, tmp_path / "even" / "model.onnx", max_relative_error=2.0, threads=1, layers=False, **given
    )
    assert result.unlikeness is None
