"""Run sparse models on several versions of ONNX Runtime, each in a process of its own.

``python tests/compat/run_matrix.py 1.17.3 1.20.1 newest FOLDER`` takes versions, ``newest``, or folders that hold an
unpacked ``onnxruntime`` (several folders joined by the path separator, for example with an older NumPy). Wheels are
downloaded with pip and unpacked into ``--cache``. On every version: all operators with the library and on their
function bodies against NumPy, inferred shapes, double registration, and a damaged weight, which must fail with a
message that names the node. ``--model`` adds a model file of your own, compared with and without the library on
random inputs. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

VERSIONS = ("1.17.3", "1.20.1", "1.24.1", "newest")
WIDTHS = (96, 160, 45, 130, 64, 72, 33)
NODE = "encoder.layer.7"


def numpy_requirement(version: str) -> str | None:
    """An older NumPy for the versions that were compiled against NumPy 1."""
    major, minor = (int(part) for part in version.split(".")[:2]) if version != "newest" else (99, 0)
    return "numpy<2" if (major, minor) < (1, 19) else None


def download(requirement: str, cache: Path) -> Path:
    """The folder of an unpacked wheel; a pinned one is fetched only once."""
    pinned = cache / requirement.replace("==", "-")
    if "==" in requirement and pinned.is_dir():
        return pinned
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "-d", scratch, requirement], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        folder = pinned if "==" in requirement else cache / wheel.stem
        if not folder.is_dir():
            unpacked = Path(scratch) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
            unpacked.rename(folder)
    return folder


def search_path(place: str, cache: Path) -> str:
    """What PYTHONPATH must be for a version, ``newest``, or folders."""
    if all(Path(folder).is_dir() for folder in place.split(os.pathsep)):
        return place
    cache.mkdir(parents=True, exist_ok=True)
    folders = [download("onnxruntime" if place == "newest" else f"onnxruntime=={place}", cache)]
    if numpy := numpy_requirement(place):
        folders.append(download(numpy, cache))
    return os.pathsep.join(str(folder) for folder in folders)


def write_models(folder: Path) -> None:
    """``good.onnx`` with all operators in a chain and external data, ``bad.onnx``, ``x.npy``, ``expected.npy``."""
    import onnx

    from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
    from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC, PackedWeight, concatenate
    from sparse_onnx.sparse_ops.ops import sparse_feed_forward as ff
    from sparse_onnx.sparse_ops.ops import sparse_matmul as sm
    from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 37, WIDTHS[0])).astype(np.float32)
    expected = x.astype(np.float64)
    nodes, initializers = [], []

    def stored(K: int, N: int) -> tuple[PackedWeight, np.ndarray]:
        weight = np.where(rng.random((K, N)) < 0.3, rng.standard_normal((K, N)) / np.sqrt(0.3 * K), 0)
        return CHUNKED_CSC.pack(weight.astype(np.float32), block=32), rng.standard_normal(N).astype(
            np.float32
        )

    def append(op_type: str, arrays: dict[str, np.ndarray], attributes: dict[str, int | str]) -> None:
        i = len(nodes)
        named = {f"{name}{i}": array for name, array in arrays.items()}
        node = onnx.helper.make_node(op_type, [f"h{i}", *named], [f"h{i + 1}"], f"{NODE}.{i}", domain=DOMAIN)
        node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in attributes.items())
        nodes.append(node)
        initializers.extend(onnx.numpy_helper.from_array(array, name) for name, array in named.items())

    for i, (op_type, activation) in enumerate(sm.ACTIVATIONS.items()):
        packed, bias = stored(*WIDTHS[i : i + 2])
        expected = sm.reference(expected, packed, bias, activation)
        append(op_type, {**packed.arrays(), "bias": bias}, packed.attributes())
    for op_type, first in ff.OP_TYPES.items():
        hidden = 128 if first in sm.ACTIVATIONS else 45  # a gate of two linears that have no whole blocks
        linears = [stored(WIDTHS[-1], hidden) for _ in range(1 if first in sm.ACTIVATIONS else 2)]
        packed = concatenate([weight for weight, _ in linears])
        bias = np.concatenate([vector for _, vector in linears])
        down, down_bias = stored(hidden, WIDTHS[-1])
        expected = ff.reference(op_type, expected, packed, bias, down, down_bias)
        second = {f"{ff.PREFIX}{name}": array for name, array in {**down.arrays(), "bias": down_bias}.items()}
        sizes = {f"{ff.PREFIX}{name}": size for name, size in down.attributes().items() if name != "format"}
        append(op_type, {**packed.arrays(), "bias": bias, **second}, {**packed.attributes(), **sizes})
    float32 = onnx.TensorProto.FLOAT
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            "chain",
            [onnx.helper.make_tensor_value_info("h0", float32, ["batch", "tokens", WIDTHS[0]])],
            [onnx.helper.make_tensor_value_info(f"h{len(nodes)}", float32, None)],
            initializers,
        ),
        ir_version=9,
        opset_imports=[onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        functions=[
            *(OP_TYPES[op_type].function_body(17) for op_type in sm.ACTIVATIONS),
            *(OP_TYPES[op_type].function_body(17) for op_type in ff.OP_TYPES),
        ],
    )
    bad = onnx.ModelProto()
    bad.CopyFrom(model)
    rows = next(tensor for tensor in bad.graph.initializer if tensor.name == "rows2")
    rows.raw_data = b"\xff" * len(rows.raw_data)
    onnx.save_model(bad, folder / "bad.onnx")
    onnx.save_model(
        model, folder / "good.onnx", save_as_external_data=True, location="good.onnx.data", size_threshold=0
    )
    np.save(folder / "x.npy", x)
    np.save(folder / "expected.npy", expected)
    write_recurrent(folder)
    write_attention(folder)


def write_recurrent(folder: Path) -> None:
    """``recurrent.onnx``, an LSTM behind a GRU, for the same ``x.npy``, and ``recurrent.npy``. No part of the chain: on
    no tokens ONNX Runtime's own break."""
    import onnx

    from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
    from sparse_onnx.sparse_ops.formats.chunked_csc import CHUNKED_CSC
    from sparse_onnx.sparse_ops.ops import sparse_recurrent as sr
    from sparse_onnx.sparse_ops.ops.registry import OP_TYPES

    rng = np.random.default_rng(1)
    hidden, nodes, initializers = WIDTHS[0], [], []
    expected = np.load(folder / "x.npy")
    for op_type in ("SparseGRU", "SparseLSTM"):
        signature = sr.OP_TYPES[op_type]
        N = sr.CELLS[signature.cell] * hidden
        options = {"linear_before_reset": 1} if signature.cell == "GRU" else {}
        attributes: dict[str, int | str] = {"direction": "reverse", "format": CHUNKED_CSC.name, **options}
        arrays, weights = {}, []
        for prefix in ("", sr.PREFIX):
            dense = np.where(rng.random((hidden, N)) < 0.3, rng.standard_normal((hidden, N)) / 6, 0)
            packed, bias = (
                CHUNKED_CSC.pack(dense.astype(np.float32), block=32),
                rng.standard_normal(N).astype(np.float32),
            )
            weights += [packed, bias]
            arrays |= {prefix + name: array for name, array in {**packed.arrays(), "bias": bias}.items()}
            attributes |= {
                prefix + name: size for name, size in packed.attributes().items() if name != "format"
            }
        # The state behind the last step is a sequence of one step for the next cell.
        expected = sr.reference(op_type, expected, *weights, direction="reverse", **options)[1]
        names = [f"{op_type}.{name}" for name in arrays]
        made = [f"{op_type}.{name}" for name in signature.outputs]
        read = nodes[-1].output[1] if nodes else "x"
        node = onnx.helper.make_node(op_type, [read, *names], made, f"{NODE}.{op_type}", domain=DOMAIN)
        node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in attributes.items())
        nodes.append(node)
        initializers += [
            onnx.numpy_helper.from_array(a, n) for n, a in zip(names, arrays.values(), strict=True)
        ]
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "recurrent",
        [onnx.helper.make_tensor_value_info("x", float32, ["steps", "batch", hidden])],
        [onnx.helper.make_tensor_value_info(nodes[-1].output[0], float32, None)],
        initializers,
    )
    model = onnx.helper.make_model(
        graph,
        ir_version=9,
        opset_imports=[onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        functions=[OP_TYPES[node.op_type].function_body(17) for node in nodes],
    )
    onnx.save_model(model, folder / "recurrent.onnx")
    np.save(folder / "recurrent.npy", expected[:, None])


def write_attention(folder: Path) -> None:
    """``attention.onnx``, every attention of the same ``x.npy``, where one query has no key, and ``attention.npy``."""
    import onnx
    import onnx.parser

    from sparse_onnx.sparse_ops.domain import DOMAIN, VERSION
    from sparse_onnx.sparse_ops.ops import attention

    x = np.load(folder / "x.npy")
    batch, tokens, channels = x.shape
    heads, scale = 4, 0.25
    apart = x.reshape(batch, tokens, heads, -1).swapaxes(1, 2)
    mask = np.where(np.random.default_rng(2).random((batch, 1, tokens, tokens)) < 0.3, -np.inf, 0)
    mask[0, 0, 5] = -np.inf
    nodes, expected = [], []
    for op_type, signature in attention.OP_TYPES.items():
        names = ["apart" if signature.heads else "x", *["apart" if signature.split else "x"] * 2]
        names += ["mask"] if signature.masked else []
        nodes.append(f"{op_type}_y = {DOMAIN}.{op_type}<num_heads = {heads}, scale = {scale}>")
        nodes[-1] += f"({', '.join(names)})"
        given = {"x": x, "apart": apart, "mask": mask}
        q, k, v, *masks = (given[name] for name in names)
        options = {"num_heads": heads, "scale": scale, "nan_to_zero": signature.nan_to_zero}
        expected.append(attention.reference(q, k, v, masks[0] if masks else None, **options))
    outputs = ", ".join(f"float[batch, tokens, {channels}] {op_type}_y" for op_type in attention.OP_TYPES)
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 17, "{DOMAIN}" : {VERSION}]>
        attention (float[batch, tokens, {channels}] x) => ({outputs}) {{
            shape = Constant<value = int64[4] {{0, 0, {heads}, -1}}>()
            rows = Reshape(x, shape)
            apart = Transpose<perm = [0, 2, 1, 3]>(rows)
            {" ".join(nodes)}
        }}"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(mask.astype(np.float32), "mask"))
    model.functions.extend(attention.function_body(op_type, 17) for op_type in attention.OP_TYPES)
    onnx.save_model(model, folder / "attention.onnx")
    np.save(folder / "attention.npy", expected)


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    problem: str  # empty: passed


def worker(folder: Path, library: str, model: str | None) -> list[Check]:
    """All checks on the ONNX Runtime of this process, which needs NumPy only."""
    import onnxruntime

    checks = []

    def check(name: str, problem: object) -> None:
        checks.append(Check(name, "" if problem is None else str(problem)))

    def session(path: object, registrations: int) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        for _ in range(registrations):
            options.register_custom_ops_library(library)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    x, expected = np.load(folder / "x.npy"), np.load(folder / "expected.npy")
    for registrations in (0, 1, 2):
        name = ("function bodies", "library", "library registered twice")[registrations]
        opened = session(folder / "good.onnx", registrations)
        (got,) = opened.run(None, {"h0": x})
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        check(name, None if error < 1e-5 else f"relative error {error}")
        shape = opened.get_outputs()[0].shape
        check(f"{name}: shape", None if shape == ["batch", "tokens", WIDTHS[-1]] else shape)
        (empty,) = opened.run(None, {"h0": x[:, :0]})
        check(f"{name}: no tokens", None if empty.shape == (2, 0, WIDTHS[-1]) else empty.shape)
    expected, attentions = np.load(folder / "recurrent.npy"), np.load(folder / "attention.npy")
    for registrations in (0, 1):
        opened = session(folder / "recurrent.onnx", registrations)
        (got,) = opened.run(None, {"x": x})
        error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        name = ("recurrent, function bodies", "recurrent, library")[registrations]
        check(name, None if error < 1e-5 else f"relative error {error}")
        opened = session(folder / "attention.onnx", registrations)
        results = zip(opened.get_outputs(), opened.run(None, {"x": x}), attentions, strict=True)
        for output, got, wanted in results:
            close = np.allclose(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
            name = f"{output.name}, {('function body', 'library')[registrations]}"
            check(name, None if close else f"difference {np.abs(got - wanted).max()}")
    try:
        session(folder / "bad.onnx", 1)
        check("damaged weight", "was accepted")
    except Exception as error:  # the type differs between versions
        named = f"node '{NODE}.2'" in str(error) and "rows of block 0" in str(error)
        check("damaged weight", None if named else error)
    if model is not None:
        check("own model", compare(session(model, 1), session(model, 0)))
    return checks


def compare(with_library: object, without: object) -> str | None:
    rng = np.random.default_rng(0)
    feeds = {}
    for value in without.get_inputs():  # type: ignore[attr-defined]
        shape = [size if isinstance(size, int) else 8 for size in value.shape]
        is_float = value.type == "tensor(float)"
        feeds[value.name] = (
            rng.standard_normal(shape).astype(np.float32) if is_float else np.ones(shape, np.int64)
        )
    pairs = zip(with_library.run(None, feeds), without.run(None, feeds), strict=True)  # type: ignore[attr-defined]
    error = max(float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-30)) for a, b in pairs)
    return None if error < 1e-4 else f"relative difference {error}"


def run_version(place: str, cache: Path, folder: Path, library: str, model: str | None) -> bool:
    try:
        path = search_path(place, cache)
    except subprocess.CalledProcessError:
        print(f"{place}: pip found no wheel of that version for this Python and machine")
        return False
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONPATH": path}
    command = [sys.executable, __file__, "--worker", str(folder), library, *([model] if model else [])]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    if result.returncode != 0:
        print(f"{place}: exit code {result.returncode}\n{result.stderr}")
        return False
    report = json.loads(result.stdout.splitlines()[-1])
    failed = [check for check in report["checks"] if check["problem"]]
    print(f"{place}: ONNX Runtime {report['version']}, {len(report['checks'])} checks, {len(failed)} failed")
    for check in failed:
        print(f"  {check['name']}: {check['problem']}")
    return not failed


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        import onnxruntime

        checks = worker(Path(sys.argv[2]), sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else None)
        print(
            json.dumps(
                {"version": onnxruntime.__version__, "checks": [dataclasses.asdict(c) for c in checks]}
            )
        )
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog=f"without versions: {' '.join(VERSIONS)}",
    )
    parser.add_argument(
        "versions", nargs="*", default=VERSIONS, help="versions, 'newest', or unpacked folders"
    )
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "sparse-onnx" / "wheels")
    parser.add_argument("--model", help="a model file to compare with and without the library")
    arguments = parser.parse_args()
    from sparse_onnx.sparse_ops import library_path

    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        passed = [
            run_version(place, arguments.cache, Path(folder), str(library_path()), arguments.model)
            for place in arguments.versions
        ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
