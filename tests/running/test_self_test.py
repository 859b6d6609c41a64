"""The self-test that ``doctor`` runs: right where all is well, and an error where it is not."""

import json
import subprocess
import sys

import pytest

from sparse_onnx.errors import HostError
from sparse_onnx.running import self_test as module
from sparse_onnx.running.self_test import MAX_ERROR, self_test


@pytest.mark.parametrize("library", [True, False])
def test_all_is_well(library):
    assert 0 < self_test(library=library) <= MAX_ERROR


@pytest.mark.parametrize("library", [True, False])
def test_wrong_results_are_found(monkeypatch, library):
    reference = module.sparse_matmul.reference
    monkeypatch.setattr(module.sparse_matmul, "reference", lambda *arguments: reference(*arguments) * 1.001)
    assert self_test(library=library) > MAX_ERROR


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "sparse_onnx.running.self_test"], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["library"] for line in lines] == [False, True]
    assert all(line["relative_error"] <= MAX_ERROR for line in lines)


def test_errors_are_told_one_by_one(monkeypatch, capsys):
    def fail(*, library):
        if library:
            raise HostError("no library")
        return 1e-8

    monkeypatch.setattr(module, "self_test", fail)
    module._main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"library": False, "relative_error": 1e-8}, {"library": True, "error": "no library"}]


def test_it_does_not_outlive_who_started_it():
    """Its standard input ends with that process."""
    code = "import sys, time; from sparse_onnx.running import self_test; "
    code += "self_test.self_test = lambda **_: time.sleep(600); "
    code += "sys.argv.append('--while-stdin-is-open'); self_test._main()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert child.poll() is None
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(timeout=60) == 1
