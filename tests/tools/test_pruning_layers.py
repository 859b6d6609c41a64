"""The benchmark of pruning methods on layers from files: what it prints, writes and refuses."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from sparse_onnx.tools.benchmarks.pruning_layers import command


@pytest.fixture
def layers(tmp_path):
    generator = np.random.default_rng(0)
    X = generator.standard_normal((64, 8))
    W = generator.standard_normal((8, 6)).astype(np.float32)
    folder = tmp_path / "layers"
    folder.mkdir()
    np.savez(folder / "first.npz", W=W, G=X.T @ X, G_held=X[:32].T @ X[:32], tokens=64)
    return folder


def test_errors_ratios_and_seconds_are_printed_and_written(layers, tmp_path):
    peers, output = tmp_path / "peers.json", tmp_path / "out.json"
    peers.write_text(json.dumps({"first": {"alps": {"0.5": {"held": 0.5, "s": 2.0}}}}), encoding="utf-8")
    arguments = [str(layers), "--peers", str(peers), "--method", "auto", "--method", "wanda"]
    result = CliRunner().invoke(
        command, [*arguments, "--budget", "0.5", "--budget", "2:4", "--json", str(output)]
    )
    assert result.exit_code == 0, result.output
    assert "mean ratio" in result.output
    rows = json.loads(output.read_text(encoding="utf-8"))[0]["rows"]
    assert [(row["method"], row["zeros"]) for row in rows] == [
        ("auto", "0.5"),
        ("auto", "2:4"),
        ("wanda", "0.5"),
        ("wanda", "2:4"),
    ]
    assert rows[0]["ratio"] == pytest.approx(rows[0]["held out"] / 0.5)
    assert rows[0]["time ratio"] == pytest.approx(rows[0]["s"] / 2)
    assert rows[1]["peer"] is None
    assert 0 < rows[0]["held out"] < rows[2]["held out"] < 1


def test_without_peers_there_are_no_ratios(layers):
    result = CliRunner().invoke(command, [str(layers), "--method", "magnitude", "--budget", "0.5"])
    assert result.exit_code == 0, result.output
    assert "mean ratio" not in result.output


def test_a_folder_without_layers_and_a_file_without_a_gram_are_refused(layers, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = CliRunner().invoke(command, [str(empty)])
    assert result.exit_code == 1
    assert "holds no .npz" in result.output
    np.savez(layers / "first.npz", W=np.ones((2, 2)))
    result = CliRunner().invoke(command, [str(layers)])
    assert result.exit_code == 1
    assert "has no G, G_held" in result.output
