"""The example of a build pipeline: it parses, its commands exist with these options, and it runs on the demo model."""

import importlib
import json
import lzma
import os
import re
import shlex
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import yaml

from sparse_onnx.tools.cli import COMMANDS, _hyphens

WORKFLOW = Path(__file__).parents[2] / "examples/github-actions.yml"
DOCUMENT = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
STEPS = DOCUMENT["jobs"]["optimize"]["steps"]
SCRIPTS = {step["name"]: step["run"] for step in STEPS if "run" in step}
ENV = {name: str(value) for name, value in DOCUMENT["env"].items()}


def commands(script):
    """The words of every call of sparse-onnx in ``script``, variables put in."""
    text = re.sub(r"\$(\w+)", lambda match: ENV.get(match[1], ""), script.replace("\\\n", " "))
    for line in text.splitlines():
        words = shlex.split(re.split(r"\||>", line)[0])
        if words[:1] == ["sparse-onnx"]:
            yield words[1:]


def test_steps_of_the_workflow():
    assert list(SCRIPTS) == ["Install", "Check the machine", "Optimize", "Verify", "Show the table"]
    uploads = [step for step in STEPS if step.get("uses", "").startswith("actions/upload-artifact@")]
    assert len(uploads) == 1
    assert uploads[0]["if"] == "always()", "a missed goal is when the report is wanted most"
    assert "optimized/" in uploads[0]["with"]["path"].split()


def test_commands_and_options_exist():
    found = [words for script in SCRIPTS.values() for words in commands(script)]
    assert [words[0] for words in found] == ["doctor", "optimize", "verify"]
    for name, *arguments in found:
        assert name in COMMANDS
        command = importlib.import_module(f"sparse_onnx.tools.{name}").command
        with command.make_context(name, arguments, token_normalize_func=_hyphens) as context:
            assert context.params
    gates = next(words for words in found if words[0] == "optimize")
    assert {"--max-drop", "--target-speedup", "--target-size"} <= set(gates)


@pytest.fixture
def workspace(tmp_path):
    """The demo model and its data under the names of the workflow, and a function that runs a step there."""
    assets = resources.files("sparse_onnx.tools") / "demo_model"
    (tmp_path / ENV["MODEL"]).write_bytes(lzma.decompress((assets / "model.onnx.xz").read_bytes()))
    with resources.as_file(assets / "held_out.npz") as data, np.load(data) as arrays:
        np.savez(tmp_path / ENV["DATA"], text=arrays["text"][:32].astype(np.int64))

    def run(name, **given):
        folder = Path(sys.executable).parent  # where the console script lies
        environment = {
            **os.environ,
            **ENV,
            "SHAPE": "text:2,128",
            "THREADS": "1",
            "TARGET_SPEEDUP": "0.01",  # the machine that tests is no place for timing
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            **given,
        }
        script = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", SCRIPTS[name]]
        return subprocess.run(
            script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return tmp_path, run


def test_the_build_passes_on_the_demo_model(workspace):
    folder, run = workspace
    for name in ("Optimize", "Verify", "Show the table"):
        done = run(name)
        assert done.returncode == 0, done.stderr
    report = json.loads((folder / "optimized/report.json").read_text())
    assert report["goal"]["met"] is True
    assert {gate["name"] for gate in report["goal"]["gates"]} == {"max_drop", "target_speedup", "target_size"}
    assert json.loads((folder / "verify.json").read_text())["passed"] is True
    summary = (folder / "summary.md").read_text()
    assert "smaller" in summary
    assert len(summary.splitlines()) <= 17
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", summary)


def test_the_build_fails_on_a_missed_goal_and_keeps_the_report(workspace):
    folder, run = workspace
    done = run("Optimize", TARGET_SIZE="1kB")
    assert done.returncode == 4
    assert "Goal not met: the size is" in done.stderr
    assert (folder / "optimized/report.html").is_file()
    assert "smaller" in (folder / "table.txt").read_text()
