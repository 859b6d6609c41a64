"""Saved statistics: whole or not at all, resumed, merged, and read without trust."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from sparse_onnx.data.inputs import input_specs, split_batches
from sparse_onnx.data.samples import Samples
from sparse_onnx.errors import DataError, HostError
from sparse_onnx.passes.calibration import Layout, StatisticsFile, merge


def _grams(statistics) -> dict[str, np.ndarray]:
    return {name: np.array(layer.gram) for name, (layer,) in statistics.items()}


def _assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


class Interrupted(Exception):
    pass


class _Counting(Samples):
    """Samples that fail when the ``stop``-th batch of the run is asked for, and count."""

    def __init__(self, samples: Samples, stop: int | None = None) -> None:
        super().__init__([lambda feeds=feeds: feeds for feeds in samples], samples.source)
        self.stop, self.given, self.armed = stop, 0, False

    def __iter__(self):
        for number, feeds in enumerate(super().__iter__()):
            if self.armed and number == self.stop:
                raise Interrupted
            yield feeds

    def digest(self) -> str:
        result = super().digest()
        self.armed = self.stop is not None
        return result


def _samples(model, tokens, batch: int = 2) -> Samples:
    specs = input_specs(model)
    return Samples.of(split_batches(tokens, specs, batch, "test"), "test")


def test_saved_statistics_are_read_instead_of_running_again(
    encoder, tokens, calibrator, tmp_path, monkeypatch
):
    path = tmp_path / "encoder.stats"
    expected = _grams(calibrator(encoder.model, tokens).oneshot(path))
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.stats"]
    monkeypatch.setattr("sparse_onnx.passes.calibration.calibrator.PartSession", None)  # a run would fail
    _assert_equal(_grams(calibrator(encoder.model, tokens).oneshot(path)), expected)


def test_saving_changes_nothing(encoder, tokens, calibrator, tmp_path):
    saved = calibrator(encoder.model, tokens).oneshot(tmp_path / "a.stats")
    _assert_equal(_grams(saved), _grams(calibrator(encoder.model, tokens).oneshot()))


@pytest.mark.parametrize(("stop", "kept"), [(1, 0), (2, 2), (5, 4)])
def test_an_interrupted_run_goes_on_where_it_was(
    encoder, tokens, calibrator, tmp_path, monkeypatch, stop, kept
):
    path = tmp_path / "encoder.stats"
    samples = _samples(encoder.model, tokens)
    expected = _grams(calibrator(encoder.model, tokens, samples=samples).oneshot())
    broken = _Counting(samples, stop)
    with pytest.raises(Interrupted):
        calibrator(encoder.model, tokens, samples=broken, checkpoint_batches=2).oneshot(path)
    assert not path.exists()
    assert (tmp_path / "encoder.stats.partial").exists() == bool(kept)
    said: list[str] = []
    tool = calibrator(encoder.model, tokens, samples=samples, checkpoint_batches=2, said=said)
    _assert_equal(_grams(tool.oneshot(path)), expected)
    assert any(f"calibration: {6 - kept}/{6 - kept}" in line for line in said)
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.stats"]


def test_a_finished_pass_is_not_computed_again(encoder, tokens, calibrator, tmp_path, monkeypatch):
    path = tmp_path / "encoder.stats"
    samples = _samples(encoder.model, tokens, 1)
    budget = {"memory_budget": 45_000}
    expected = _grams(calibrator(encoder.model, tokens, samples=samples, **budget).oneshot())
    real = StatisticsFile.moments
    tool = calibrator(encoder.model, tokens, samples=samples, **budget)
    monkeypatch.setattr("sparse_onnx.passes.calibration.record.Record.finish", _interrupt)
    with pytest.raises(Interrupted):
        tool.oneshot(path)
    monkeypatch.undo()
    assert len(list((tmp_path / "encoder.stats.partial").iterdir())) > 1
    read: list[int] = []
    monkeypatch.setattr(StatisticsFile, "moments", lambda self, i: read.append(i) or real(self, i))
    monkeypatch.setattr("sparse_onnx.passes.calibration.calibrator._add", None)  # adding would fail
    _assert_equal(
        _grams(calibrator(encoder.model, tokens, samples=samples, **budget).oneshot(path)), expected
    )
    assert read


def test_a_fuller_layout_replaces_the_file_and_serves_a_poorer_one(encoder, tokens, calibrator, tmp_path):
    path = tmp_path / "encoder.stats"
    calibrator(encoder.model, tokens, layout=Layout.DIAGONAL).oneshot(path)
    small = path.stat().st_size
    full = _grams(calibrator(encoder.model, tokens).oneshot(path))
    assert path.stat().st_size > small
    again = calibrator(encoder.model, tokens, layout=Layout.DIAGONAL).oneshot(path)
    _assert_equal(_grams(again), full)
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.stats"]


def test_parts_of_a_large_model_go_on_too(encoder, tokens, calibrator, tmp_path):
    path = tmp_path / "encoder.stats"
    samples = _samples(encoder.model, tokens, 1)
    options = {"memory_budget": 60_000, "checkpoint_batches": 4}
    expected = _grams(calibrator(encoder.model, tokens, samples=samples).oneshot())
    broken = _Counting(samples, 9)
    with pytest.raises(Interrupted):
        calibrator(encoder.model, tokens, samples=broken, **options).oneshot(path)
    assert (tmp_path / "encoder.stats.partial").is_dir()
    said: list[str] = []
    found = calibrator(encoder.model, tokens, samples=samples, said=said, **options).oneshot(path)
    assert any("calibration 2/" in line for line in said)
    for name in expected:
        np.testing.assert_allclose(found[name][0].gram, expected[name], rtol=1e-5, atol=1e-5)


def _interrupt(*_args):
    raise Interrupted


@pytest.mark.parametrize("what", ["model", "data", "mask"])
def test_statistics_of_something_else_are_refused(encoder, tokens, calibrator, tmp_path, what):
    path = tmp_path / "encoder.stats"
    calibrator(encoder.model, tokens).oneshot(path)
    options = {}
    if what == "model":
        weight = encoder.model.graph.initializers["Wq0"]
        weight.const_value = _tensor(encoder.weights["Wq0"] * 2)
    elif what == "data":
        tokens["input_ids"][0, 0] ^= 1
    else:
        options["mask"] = None
    said = {"model": "another model", "data": "other calibration data", "mask": "another mask"}[what]
    with pytest.raises(DataError, match=f"encoder.stats: holds statistics of {said}; delete it"):
        calibrator(encoder.model, tokens, **options).oneshot(path)


def _tensor(array: np.ndarray):
    import onnx_ir as ir

    return ir.tensor(array, name="Wq0")


# -- merging


@pytest.mark.parametrize("layout", [Layout.FULL, Layout.DIAGONAL])
def test_merged_statistics_equal_those_of_a_joint_run(encoder, tokens, calibrator, tmp_path, layout):
    parts = [{name: array[part] for name, array in tokens.items()} for part in (slice(0, 8), slice(8, 12))]
    for index, part in enumerate(parts):
        calibrator(encoder.model, part, layout=layout).oneshot(tmp_path / f"{index}.stats")
    joint = calibrator(encoder.model, tokens, layout=layout).oneshot()
    header = merge(tmp_path / "0.stats", tmp_path / "1.stats", tmp_path / "both.stats")
    assert len(header.data) == 2
    file = StatisticsFile(tmp_path / "both.stats")
    assert file.header == header
    by_name = {entry.name: index for index, entry in enumerate(header.entries)}
    for name, tensor in {"Wq0": "h0", "Wo0": "c0", "Wd1": "a1"}.items():
        found = file.moments(by_name[tensor])[0].statistics(name)
        expected = joint[name][0]
        assert found.count == expected.count
        np.testing.assert_allclose(found.gram, expected.gram, atol=1e-6 * np.abs(expected.gram).max())
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-7, atol=1e-8)


def test_the_same_data_is_not_merged_twice(encoder, tokens, calibrator, tmp_path):
    calibrator(encoder.model, tokens).oneshot(tmp_path / "a.stats")
    (tmp_path / "b.stats").write_bytes((tmp_path / "a.stats").read_bytes())
    with pytest.raises(DataError, match="both of the same data"):
        merge(tmp_path / "a.stats", tmp_path / "b.stats", tmp_path / "c.stats")
    assert not (tmp_path / "c.stats").exists()


def test_layouts_that_differ_are_not_merged(encoder, tokens, calibrator, tmp_path):
    half = {name: array[:6] for name, array in tokens.items()}
    calibrator(encoder.model, tokens).oneshot(tmp_path / "a.stats")
    calibrator(encoder.model, half, layout=Layout.DIAGONAL).oneshot(tmp_path / "b.stats")
    with pytest.raises(DataError, match="other tensors or layouts"):
        merge(tmp_path / "a.stats", tmp_path / "b.stats", tmp_path / "c.stats")


# -- hostile files


@pytest.fixture
def saved(encoder, tokens, calibrator, tmp_path):
    path = tmp_path / "good.stats"
    calibrator(encoder.model, tokens).oneshot(path)
    return path


def _read_all(path) -> None:
    file = StatisticsFile(path)
    for index in range(len(file.header.entries)):
        file.moments(index)


def _rewritten(path, change) -> bytes:
    """The archive with its members passed through ``change(members)``."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _header(**changes):
    def change(members):
        members["header.json"] = json.dumps(json.loads(members["header.json"]) | changes).encode()

    return change


def _entry(**changes):
    def change(members):
        header = json.loads(members["header.json"])
        header["entries"][0] |= changes
        members["header.json"] = json.dumps(header).encode()

    return change


def _array(array):
    return lambda members: members.update({"0.0.gram.0.npy": _npy(array)})


CHANGES = {
    "no header": lambda members: members.pop("header.json"),
    "header is no JSON": lambda members: members.update({"header.json": b"{"}),
    "header is nested": lambda members: members.update({"header.json": b"[" * 100_000}),
    "other format": _header(format="something"),
    "other version": _header(version=3),
    "entries missing": _header(entries=None),
    "negative size": _entry(size=-1),
    "huge size": _entry(size=1 << 23),
    "size is text": _entry(size="16"),
    "size is true": _entry(size=True),
    "other layout": _entry(layout="triangular"),
    "many groups": _entry(groups=9),
    "array missing": lambda members: members.pop("0.0.gram.0.npy"),
    "other shape": _array(np.zeros((15, 15))),
    "other shape of that size": _array(np.zeros((8, 32))),
    "other dtype": _array(np.zeros((16, 32), np.float32)),
    "NaN": _array(np.full((16, 16), np.nan)),
    "no array": lambda members: members.update({"0.0.gram.0.npy": b"x" * 2176}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_file_is_one_clear_error(saved, change):
    saved.write_bytes(_rewritten(saved, CHANGES[change]))
    with pytest.raises(DataError, match=r"good.stats: cannot be read as statistics .*calibrate again"):
        _read_all(saved)


def test_a_file_of_the_first_version_is_read(saved):
    """It has sums without a shift."""

    def without_shift(members):
        for name in [name for name in members if name.endswith("shift.npy")]:
            prefix = name.removesuffix("shift.npy")
            shift, total = (
                np.load(io.BytesIO(members[prefix + part])) for part in ("shift.npy", "total.npy")
            )
            index = int(prefix.split(".")[0])
            count = json.loads(members["header.json"])["entries"][index]["count"]
            gram = np.load(io.BytesIO(members[prefix + "gram.0.npy"]))
            moved = gram + np.outer(shift, total) + np.outer(total + count * shift, shift)
            members[prefix + "gram.0.npy"] = _npy(moved)
            members[prefix + "total.npy"] = _npy(total + count * shift)
            del members[name]
        _header(version=1)(members)

    with_shift = StatisticsFile(saved)
    want = [with_shift.moments(index)[0].statistics("x") for index in range(len(with_shift.header.entries))]
    saved.write_bytes(_rewritten(saved, without_shift))
    file = StatisticsFile(saved)
    for index, expected in enumerate(want):
        (moments,) = file.moments(index)
        found = moments.statistics("x")
        np.testing.assert_allclose(found.gram, expected.gram, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9, atol=1e-12)


def test_an_untouched_copy_is_read(saved):
    saved.write_bytes(_rewritten(saved, lambda members: None))
    _read_all(saved)


def test_no_pickle_is_run(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made-by-pickle"), "w"))

    objects = np.empty((16, 16), object)
    objects[:] = Evil()
    content = _npy(objects)
    assert pickle  # what the array was written with
    saved.write_bytes(_rewritten(saved, lambda members: members.update({"0.0.gram.0.npy": content})))
    with pytest.raises(DataError, match="cannot be read as statistics"):
        _read_all(saved)
    assert not (tmp_path / "made-by-pickle").exists()


def test_every_cut_and_flipped_bytes_are_found(saved):
    whole = saved.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        saved.write_bytes(whole[:length])
        with pytest.raises(DataError, match="cannot be read as statistics"):
            _read_all(saved)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        places = [info.header_offset + 300 for info in archive.infolist() if "gram" in info.filename]
    for place in places:
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(DataError, match="cannot be read as statistics"):
            _read_all(saved)


def test_compressed_members_are_refused(saved):
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(DataError, match="cannot be read as statistics"):
        _read_all(saved)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(DataError, match=r"none.stats: no such file"):
        StatisticsFile(tmp_path / "none.stats")


def test_a_folder_that_does_not_exist_is_one_message(encoder, tokens, calibrator, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot be written"):
        calibrator(encoder.model, tokens).oneshot(tmp_path / "file" / "a.stats")
