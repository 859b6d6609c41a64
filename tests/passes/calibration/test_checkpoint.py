"""Layers kept between runs: found again, of this job only, never half of one."""

import numpy as np
import pytest

from sparse_onnx.errors import HostError, UsageError
from sparse_onnx.passes.calibration.checkpoint import Checkpoint

W = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_what_was_kept_is_found_again(tmp_path):
    Checkpoint(tmp_path / "c", "a").put("../layer/1", W)
    again = Checkpoint(tmp_path / "c", "a")
    np.testing.assert_array_equal(again.get("../layer/1", (2, 3)), W)
    assert again.get("other", (2, 3)) is None
    assert again.get("../layer/1", (3, 2)) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_another_job_begins_anew(tmp_path):
    Checkpoint(tmp_path, "a").put("w", W)
    assert Checkpoint(tmp_path, "b").get("w", (2, 3)) is None
    assert Checkpoint(tmp_path, "a").get("w", (2, 3)) is None


def test_a_damaged_file_counts_as_none(tmp_path):
    kept = Checkpoint(tmp_path, "a")
    kept.put("w", W)
    (file,) = tmp_path.glob("*.npy")
    file.write_bytes(file.read_bytes()[:-5])
    assert kept.get("w", (2, 3)) is None
    file.write_bytes(b"\x80\x04pickle")
    assert kept.get("w", (2, 3)) is None


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and no checkpoint"):
        Checkpoint(tmp_path, "a")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_its_place_is_the_hosts_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot be used"):
        Checkpoint(tmp_path / "file", "a")
