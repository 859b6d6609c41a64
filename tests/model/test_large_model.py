"""A model of more than 2 GB: compiled in bounded memory, and right."""

import json
import subprocess
import sys

import pytest

from sparse_onnx.model import model_io
from sparse_onnx.tools.benchmarks.make_big import big_model

pytestmark = pytest.mark.slow

# A process of its own: the peak of this one says nothing about the command.
_OPTIMIZE = """
import json, sys
import sparse_onnx
from sparse_onnx.running.host import peak_rss_bytes
result = sparse_onnx.optimize(
    sys.argv[1], sys.argv[2], method="magnitude", sparsity=0.9, input_shapes={"x": (32, 4096)}, threads=2
)
print(json.dumps({"exit_code": result.exit_code, "peak": peak_rss_bytes(), "report": result.report}))
"""


def test_more_than_two_gigabytes_in_half_its_size(tmp_path):
    model = big_model(2.4)
    nbytes = model_io.weight_bytes(model)
    assert nbytes > 2**31
    (tmp_path / "in").mkdir()
    model_io.save_model(model, tmp_path / "in")
    command = [sys.executable, "-c", _OPTIMIZE, str(tmp_path / "in/model.onnx"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["exit_code"] == 0
    assert result["peak"] <= nbytes / 2
    checks = result["report"]["verification"]
    assert checks["against_pruned_dense"]["relative_error"] < 1e-5
    assert checks["without_library"]["relative_error"] < 1e-5
    assert result["report"]["summary"]["bytes_after"] < 0.2 * nbytes
    assert {row["decision"] for row in result["report"]["layers"]} == {"sparse"}
