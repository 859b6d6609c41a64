"""Reports as a compilation writes them, and a real browser without a window, spoken to in its own protocol."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SECONDS = 120
# Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
_START = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])"""


def layer(index: int, **changes: Any) -> dict[str, Any]:
    """One row of a report's layers."""
    return {
        "name": f"encoder.layer.{index}.weight",
        "module": f"encoder.layer.{index}",
        "op_type": "MatMul",
        "shape": [768, 3072],
        "rows": 128,
        "activations": ["gelu"],
        "sparsity": 0.9,
        "non_finite": 0,
        "mask_structure": "unstructured",
        "decision": "sparse",
        "reason": "4.00x dense (3.90 to 4.20)",
        "kernel": "spmm_avx2",
        "times": {"dense": 4.0 + index, "sparse": 1.0},
        "speedup_low": 3.9,
        "speedup_high": 4.2,
        "close": False,
        "cached": False,
        "quiet": True,
        "output_error": None,
        "output_error_held_out": None,
        "relative_error": 0.0,
        **changes,
    }


def prediction(**changes: Any) -> dict[str, Any]:
    """How the predictions of a language model changed."""
    return {
        "output": "logits",
        "rows": 2048,
        "kl_divergence": 0.0123,
        "top1_agreement": 0.915,
        "reference_perplexity": 18.421,
        "candidate_perplexity": 21.537,
        "tokens": 2032,
        **changes,
    }


_FIGURES = {
    "max_abs": 2e-6,
    "max_relative": 3e-7,
    "relative_error": 3.1e-7,
    "cosine": 0.99999,
    "top1_agreement": 1.0,
}
_DIFFERENCE = {
    **_FIGURES,
    "worst_output": "logits",
    "predictions": [],
    "outputs": [{"output": "logits", **_FIGURES}],
}


@pytest.fixture
def report() -> dict[str, Any]:
    """Of an ordinary compilation: two layers sparse, one dense, two places declined."""
    dense = {
        "sparsity": 0.1,
        "decision": "dense",
        "reason": "10.0% zeros: too few",
        "times": {},
    }
    times = {
        "dense_ms": 30.0,
        "optimized_ms": 12.0,
        "speedup": 2.5,
        "speedup_low": 2.41,
        "speedup_high": 2.62,
    }
    loss = {"relative_error": 0.12, "cosine": 0.98765}
    return {
        "schema_version": 2,
        "environment": {
            "cpu": "Test CPU",
            "cores": 2,
            "isa": "avx2",
            "threads": 1,
            "system": "Linux x86_64",
            "python": "3.11.2",
            "versions": {"onnxruntime": "1.31.1", "numpy": "2.1"},
            "seed": 0,
        },
        "command": "sparse-onnx optimize bert.onnx -o out",
        "recipe": {"version": 1, "stages": [], "target": {"threads": 1}},
        "source": "bert.onnx",
        "input_shapes": {"input_ids": [1, 128]},
        "targets": [{"input_shapes": {"input_ids": [1, 128]}, "weight": None, **times, "quiet": True}],
        "summary": {
            **times,
            "bytes_before": 440_000_000,
            "bytes_after": 110_000_000,
            "sparsity": 0.9,
            "sparse_flops_fraction": 0.75,
            **loss,
            "metric": None,
        },
        "goal": {"met": True, "gates": []},
        "verification": {
            "inputs": "text.npz",
            "batches": 1,
            "against_pruned_dense": dict(_DIFFERENCE),
            "without_library": dict(_DIFFERENCE),
            "against_original": {**_DIFFERENCE, **loss},
        },
        "layers": [layer(0), layer(1), layer(2, **dense)],
        "declined": [
            {"pass_name": "lower.sparse-matmul", "place": "head.weight", "reason": "also used by Gather"},
            {"pass_name": "lower.sparse-matmul", "place": "other.weight", "reason": "also used by Gather"},
        ],
        "stages": [
            {"name": "load", "seconds": 0.1, "peak_rss_mb": 90},
            {"name": "decide", "seconds": 2.0, "peak_rss_mb": 140},
        ],
    }


def _curve(name: str | None, structure: str, gain: float, chosen: float | None) -> dict[str, Any]:
    points = [
        {"sparsity": s, "speedup": gain * y, "speedup_low": gain * y * 0.95, "speedup_high": gain * y * 1.06}
        for s, y in ((0.5, 0.9), (0.7, 1.4), (0.8, 1.9), (0.9, 3.1), (0.95, 4.6))
    ]
    return {
        "layer": name,
        "form": "sparse",
        "mask_structure": structure,
        "points": points[:1] if ":" in structure and "block" not in structure else points,
        "break_even": 0.55 / gain if gain > 0.6 else None,
        "chosen": chosen,
    }


@pytest.fixture
def full_report(report: dict[str, Any]) -> dict[str, Any]:
    """A report with everything that one can hold, of a model with many layers."""
    kinds = (("attention.query", [768, 768]), ("attention.output", [768, 768]), ("intermediate", [768, 3072]))
    report["layers"] = [
        layer(
            index,
            name=f"val_{index}",
            module=f"bert.encoder.layer.{index // 3}.{kinds[index % 3][0]}.dense",
            shape=kinds[index % 3][1],
            mask_structure=("unstructured", "block:4x1")[index % 7 == 0],
            times={"dense": 1.0 + index % 3, "sparse": 1.0},
            relative_error=0.01 * (index % 11),
            output_error=0.002 * (index % 11),
            output_error_held_out=0.003 * (index % 13),
            **(
                {"decision": "dense", "reason": "0.62x dense (0.37 to 0.64), below min_speedup 1.02"}
                if index % 5 == 4
                else {}
            ),
        )
        for index in range(36)
    ]
    gates = [
        ("max_drop", 0.02, 0.01235, "1 - cosine is 0.0124, allowed are 0.02"),
        ("target_speedup", 2, 2.5, "the speedup is 2.50, asked for are 2"),
    ]
    report["goal"]["gates"] = [
        {"name": name, "asked": asked, "reached": reached, "met": True, "text": text}
        for name, asked, reached, text in gates
    ]
    report["verification"]["against_original"]["predictions"] = [prediction()]
    report["converted_from_opset"] = 11
    report["verification"]["left_out"] = {"past": "a sequence"}
    report["verification"]["optimization_levels"] = {"pruned_dense": "basic", "with_library": "basic"}
    names = [row["name"] for row in report["layers"]]
    report["curves"] = [
        *(_curve(name, "unstructured", 1.0 + 0.2 * (i % 3), 0.9) for i, name in enumerate(names)),
        *(_curve(name, "2:4", 0.5, None) for name in names),
        *(_curve(name, "block:4x1", 1.3 + 0.2 * (i % 3), None) for i, name in enumerate(names)),
    ]
    others = {"Softmax": 3.0, "Add": 2.5, "LayerNormalization": 2.0, "Gelu": 1.5}
    left = {"MultiHeadAttention": 2.5, "SkipLayerNormalization": 1.5}
    report["profile"] = {
        side: {
            "wall_ms": wall,
            "layers_ms": layers,
            "others": [{"op_type": name, "ms": ms} for name, ms in ops.items()],
        }
        for side, wall, layers, ops in (("before", 31.0, 21.0, others), ("after", 12.5, 8.0, left))
    }
    report["untouched"] = [
        {"op_type": "LSTM", "count": 2, "share": 0.2, "reason": "no sparse kernel takes the weights of LSTM"},
        {"op_type": "MatMul", "count": 3, "share": None, "reason": "multiplies computed values"},
    ]
    report["quantized"] = [
        {
            "name": "layer.0.query",
            "module": "",
            "op_type": "MatMulInteger",
            "elements": 4096,
            "bits": 8,
            "group_size": 0,
            "encoding": "INT8 with one scale",
            "bytes": 4096,
            "sparsity": 0.8,
            "rounded": False,
            "pruned": False,
            "output_error": None,
            "output_error_held_out": None,
        }
    ]
    report["targets"].append(
        {**report["targets"][0], "input_shapes": {"input_ids": [8, 128]}, "speedup": 1.9}
    )
    report["search"] = {
        "metric": "1 - cosine",
        "budget": {"target_speedup": 2.0, "max_drop": 0.02},
        "met": True,
        "evaluated": 41,
        "pareto": [
            {
                "speedup": 1.0 + 0.3 * i,
                "drop": 0.001 * 2.0**i,
                "bytes": 440_000_000 // (i + 1),
                "sparsity": 0.15 * i,
                "chosen": i == 4,
            }
            for i in range(7)
        ],
    }
    return report


class Browser:
    """A running Chromium with one tab."""

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        inherited = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (commands, answers)]
        options = [
            "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--hide-scrollbars", "--disable-dev-shm-usage", "--disable-background-networking",
            f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, inherited), program, *options],
            pass_fds=inherited, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (commands, answers, *inherited):
            os.close(fd)
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run one command of the DevTools protocol; events that come meanwhile are kept."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            ready = select.select([self._read], [], [], max(0, end - time.monotonic()))[0]
            data = os.read(self._read, 1 << 20) if ready else b""
            assert ready, f"the browser gave no answer for {_SECONDS} s"
            assert data, "the browser ended"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def open(
        self,
        page: Path,
        *,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        media: str = "",
        scripts: bool = True,
    ) -> None:
        """Load ``page`` in a window of ``width`` CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, as JSON."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """What the page wrote to the console or failed with: policy violations are among it."""
        found = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in found]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the page was opened."""
        sent = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the whole page, or of the window."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))

    def pdf(self) -> bytes:
        """The page printed on A4."""
        printed = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        return base64.b64decode(printed["data"])

    def close(self) -> None:
        """End the browser."""
        self._session = None
        self.call("Browser.close")
        self._process.wait(_SECONDS)
        os.close(self._write)
        os.close(self._read)


def _browser_program() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say once for all tests of a file what they need, instead of once for each."""
    if _browser_program() is None:
        needs = pytest.mark.skip(
            f"needs a browser: install one of {', '.join(_NAMES)} (apt-get install chromium)"
        )
        for item in items:
            if isinstance(item, pytest.Function) and "browser" in item.fixturenames:
                item.add_marker(needs)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = _browser_program()
    assert program is not None, "without one the tests are skipped"
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Callable[..., Browser]:
    """Opens a page given as text."""

    def opened(source: str, **options: Any) -> Browser:
        page = tmp_path / "page.html"
        page.write_text(source, encoding="utf-8")
        browser.open(page, **options)
        return browser

    return opened
