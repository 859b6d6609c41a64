"""Every exit code is documented in one table, and provoked here: as text and as exactly one JSON document."""

import re
from pathlib import Path

import pytest

from sparse_onnx.model import model_io
from sparse_onnx.tools import cli

README = Path(__file__).parents[2] / "README.md"
QUICK = ("--input-shape", "X:1,8,64", "--threads", "1", "--no-benchmark")


def raising(error):
    def fail(*_arguments, **_options):
        raise error

    return fail


def ok(files, _monkeypatch):
    return ("inspect", files["dense"])


def internal_error(files, monkeypatch):
    monkeypatch.setattr(model_io, "load_model", raising(ZeroDivisionError("planted")))
    return ("inspect", files["dense"])


def usage(files, _monkeypatch):
    return ("inspect", files["folder"] / "none.onnx")


def verification_failed(files, _monkeypatch):
    return ("verify", files["dense"], files["compiled"])


def goal_not_met(files, _monkeypatch):
    return ("optimize", files["pruned"], "-o", files["folder"] / "out", "--target-size", "1kB", *QUICK)


def nothing_faster(files, _monkeypatch):
    return ("optimize", files["dense"], "-o", files["folder"] / "out", *QUICK)


def environment(files, monkeypatch):
    monkeypatch.setenv("SPARSE_ONNX_FORCE_ISA", "mmx")
    return ("verify", files["pruned"], files["compiled"])


def interrupted(files, monkeypatch):
    monkeypatch.setattr(model_io, "load_model", raising(KeyboardInterrupt()))
    return ("optimize", files["dense"], "-o", files["folder"] / "out")


CASES = {
    0: ok,
    1: internal_error,
    2: usage,
    3: verification_failed,
    4: goal_not_met,
    5: nothing_faster,
    6: environment,
    130: interrupted,
}


def test_every_code_is_provoked():
    assert CASES.keys() == cli.EXIT_CODES.keys()


@pytest.fixture
def files(tmp_path, dense, pruned, compiled):
    return {"folder": tmp_path, "dense": dense, "pruned": pruned, "compiled": compiled}


@pytest.mark.parametrize("code", CASES)
def test_code_and_message(run_cli, files, monkeypatch, code):
    """Quiet: what stands on stderr then is the reason for the code, and nothing else."""
    ran = run_cli(*CASES[code](files, monkeypatch), "--quiet")
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    assert (ran.err == "") == (code == 0), ran.err
    assert len(ran.err.splitlines()) <= 2
    assert (files["folder"] / "out").exists() == (code in (4, 5))


@pytest.mark.parametrize("code", CASES)
def test_one_document(run_cli, files, monkeypatch, code):
    ran = run_cli(*CASES[code](files, monkeypatch), "--format", "json")
    document = ran.json()
    assert ran.code == document["exit_code"] == code
    assert ("error" in document) == (code in (1, 2, 6, 130))


def test_readme_has_the_same_table():
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(code): meaning for code, meaning in rows} == cli.EXIT_CODES


def test_goals_in_a_report(run_cli, files):
    """What was asked, what was reached, and whether that is enough, of every goal; met ones are no error."""
    arguments = ("optimize", files["pruned"], "-o", files["folder"] / "out", *QUICK)
    goals = ("--max-drop", "0.5", "--target-size", "1kB")
    ran = run_cli(*arguments, *goals, "--format", "json")
    goal = ran.json()["goal"]
    assert ran.code == 4
    assert goal["met"] is False
    gates = {gate["name"]: gate for gate in goal["gates"]}
    assert gates["max_drop"]["asked"] == 0.5
    assert gates["max_drop"]["reached"] == pytest.approx(0, abs=1e-6)
    assert gates["max_drop"]["met"] is True
    written = sum(path.stat().st_size for path in (files["folder"] / "out").glob("model.onnx*"))
    assert gates["target_size"]["reached"] == written
    assert gates["target_size"]["asked"] == 1000
    assert gates["target_size"]["met"] is False
    said = [line for line in ran.err.splitlines() if line.startswith("Goal not met")]
    assert len(said) == 1
    assert "the size is" in said[0]
    assert "cosine" not in said[0]
    ran = run_cli(*arguments, "--max-drop", "0.5", "--target-size", "100%", "--overwrite", "--format", "json")
    assert ran.code == 0
    assert ran.json()["goal"]["met"] is True


def test_goal_of_a_plan_is_neither_met_nor_missed(run_cli, files):
    ran = run_cli("optimize", files["pruned"], "--dry-run", "--target-size", "1kB", "--format", "json")
    assert ran.code == 0
    assert ran.json()["goal"]["met"] is None
    assert "Goal not met" not in ran.err


def test_goal_that_cannot_be_measured_is_refused(run_cli, files):
    ran = run_cli("optimize", files["pruned"], "-o", files["folder"] / "out", "--target-speedup", "2", *QUICK)
    assert ran.code == 2
    assert "target_speedup needs timing: leave --no-benchmark" in ran.err


@pytest.mark.parametrize(("target", "code"), [("0.001", 0), ("1e9", 4)])
def test_gate_on_speed(run_cli, files, target, code):
    """Bounds that no noise reaches. --min-speedup keeps the layers sparse, however fast they are here."""
    ran = run_cli(
        "optimize", files["pruned"], "-o", files["folder"] / "out", "--input-shape", "X:1,8,64", "--threads", "1",
        "--min-speedup", "1e-6", "--target-speedup", target, "--format", "json",
    )  # fmt: skip
    (gate,) = ran.json()["goal"]["gates"]
    assert gate["met"] is (code == 0)
    assert ran.code in (code, 5 if code == 0 else code)
    assert (files["folder"] / "out/model.onnx").is_file()
