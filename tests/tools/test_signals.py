"""Ctrl-C and termination: a real process that is told to stop at every stage of its work leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import psutil
import pytest

STOP_AND_WAIT = """
import sys, time
from sparse_onnx.tools import cli, live_line

class Waiting(live_line.LiveLine):
    def __call__(self, line):
        super().__call__(line)
        if line.startswith(sys.argv[1]):
            print("HERE", file=sys.stderr, flush=True)
            time.sleep(60)  # until the signal comes

from sparse_onnx.tools import console
console.LiveLine = Waiting
cli.main(sys.argv[2:])
"""
"""The command line, which waits, and says so, at the line of progress that starts with its first argument."""

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def start(tmp_path, *arguments, wait_at=None):
    """A process of its own session, so that all its children can be found, with scratch files in ``tmp_path``."""
    program = ["-m", "sparse_onnx"] if wait_at is None else ["-c", STOP_AND_WAIT, wait_at]
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(scratch)},
        start_new_session=True,
        preexec_fn=_heed_signals,
    )


def _heed_signals():
    """Signals that are ignored here, because of ``nohup`` say, would be there as well."""
    for number in CODES:
        signal.signal(number, signal.SIG_DFL)


def read_until(process, wanted):
    """What stderr holds up to the line that has ``wanted`` in it."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if wanted in line:
            return "".join(lines)
    raise AssertionError(f"never said {wanted!r}: {''.join(lines)}")


def finish(process):
    """(exit code, stdout, stderr); no process of its session is left."""
    out, err = process.communicate(timeout=60)
    left = [other for other in psutil.process_iter() if session_of(other) == process.pid]
    assert psutil.wait_procs(left, timeout=10)[1] == []  # a child may need a moment to see that it is alone
    return process.returncode, out, err


def session_of(process):
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getsid(process.pid)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def write_model(path, layers=2, width=64):
    rng = np.random.default_rng(0)
    names = [f"h{index}" for index in range(layers)]
    steps = [
        f"{name} = MatMul({x}, W{index}) "
        for index, (x, name) in enumerate(zip(["X", *names], [*names[:-1], "Y"], strict=False))
    ]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 20]>
        g (float[batch, {width}] X) => (float[batch, {width}] Y) {{ {" ".join(steps)} }}"""
    )
    for index in range(layers):
        array = (rng.standard_normal((width, width)) / width**0.5).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, f"W{index}"))
    onnx.save(proto, path)
    np.savez(path.with_suffix(".npz"), X=rng.standard_normal((256, width)).astype(np.float32))
    return path


# With every layer sparse, so that there is a whole model to time.
PRUNE = (
    "--method",
    "magnitude",
    "--sparsity",
    "0.9",
    "--min-speedup",
    "0.01",
    "--threads",
    "1",
    "--no-timing-cache",
)


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("load", signal.SIGTERM),
        ("prune", signal.SIGINT),
        ("run dense", signal.SIGTERM),
        ("decide", signal.SIGINT),
        ("lower and write", signal.SIGHUP),
        ("time the whole model", signal.SIGTERM),
        ("verify", signal.SIGINT),
    ],
)
def test_optimize_stopped_at_a_stage(tmp_path, stage, number):
    model = write_model(tmp_path / "model.onnx")
    process = start(tmp_path, "optimize", model, "-o", tmp_path / "out", *PRUNE, wait_at=stage)
    read_until(process, "HERE")
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == CODES[number]
    assert out == ""
    assert f"interrupted by {number.name}; nothing was written." in err
    assert "Run the same command again to start over." in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.npz", "model.onnx", "scratch"]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_the_old_result_survives_an_interruption(tmp_path):
    model, old = write_model(tmp_path / "model.onnx"), tmp_path / "out"
    old.mkdir()
    (old / "report.json").write_text("{}")
    process = start(tmp_path, "optimize", model, "-o", old, "--overwrite", *PRUNE, wait_at="verify")
    read_until(process, "HERE")
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143
    assert (old / "report.json").read_text() == "{}"
    assert [path.name for path in old.iterdir()] == ["report.json"]


def test_json_says_so_too(tmp_path):
    model = write_model(tmp_path / "model.onnx")
    process = start(
        tmp_path, "optimize", model, "-o", tmp_path / "out", "--format", "json", *PRUNE, wait_at="decide"
    )
    read_until(process, "HERE")
    process.send_signal(signal.SIGINT)
    code, out, _ = finish(process)
    document = json.loads(out)
    assert code == document["exit_code"] == 130
    assert document["error"].startswith("interrupted by SIGINT")


def test_dry_run_and_verify_leave_no_scratch_folder(tmp_path):
    model = write_model(tmp_path / "model.onnx")
    for arguments, line in (
        (("optimize", model, "--dry-run", *PRUNE), "prune"),
        (("verify", model, model), "running the original"),
    ):
        process = start(tmp_path, *arguments, wait_at=line)
        read_until(process, "HERE")
        process.send_signal(signal.SIGTERM)
        assert finish(process)[0] == 143
        assert list((tmp_path / "scratch").iterdir()) == []


def oneshot(tmp_path, output, *more):
    options = ("--method", "sparsegpt", "--sparsity", "0.6", "--calibration", "sequential", "--no-benchmark")
    data = ("--calibration-data", tmp_path / "model.npz", "--threads", "1")
    return ("optimize", tmp_path / "model.onnx", "-o", tmp_path / output, *options, *data, *more)


def test_oneshot_pruning_goes_on_from_its_checkpoint(tmp_path):
    write_model(tmp_path / "model.onnx", layers=12, width=192)
    keep = ("--checkpoint", tmp_path / "kept")
    process = start(tmp_path, *oneshot(tmp_path, "out", *keep), wait_at="prune: solving W7")
    read_until(process, "HERE")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert f"Run the same command again to go on: finished layers are kept in {tmp_path / 'kept'}" in err
    assert "--checkpoint" in err
    assert not (tmp_path / "out").exists()
    assert finish(start(tmp_path, *oneshot(tmp_path, "out", *keep)))[0] in (0, 5)
    assert finish(start(tmp_path, *oneshot(tmp_path, "whole")))[0] in (0, 5)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        ((), "with --checkpoint DIR a next interruption keeps finished layers"),
        (
            ("--calibration", "oneshot", "--statistics", "kept.npz"),
            "statistics are kept in kept.npz (--statistics)",
        ),
    ],
)
def test_oneshot_pruning_says_which_option_keeps_its_work(tmp_path, more, hint):
    write_model(tmp_path / "model.onnx")
    process = start(tmp_path, *oneshot(tmp_path, "out", *more), wait_at="prune")
    read_until(process, "HERE")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 143
    assert hint in err


def test_doctor_takes_its_child_along(tmp_path):
    process = start(tmp_path, "doctor")
    read_until(process, "checking self-test")
    while not psutil.Process(process.pid).children():  # the self-test has begun
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143


def test_ignored_signals_stay_ignored(tmp_path):
    """As under nohup."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from sparse_onnx.tools import cli\n"
        "with cli._interruptible():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_handlers_are_put_back(run_cli):
    before = [signal.getsignal(number) for number in CODES]
    assert run_cli("--version").code == 0
    assert [signal.getsignal(number) for number in CODES] == before


def test_a_second_signal_does_not_cut_the_cleaning_up_short():
    code = (
        "import os, signal\n"
        "from sparse_onnx.tools import cli\n"
        "with cli._interruptible():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('cleaned up', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, preexec_fn=_heed_signals
    )
    assert done.stdout == "cleaned up\n"
    assert "_Interrupted" in done.stderr
