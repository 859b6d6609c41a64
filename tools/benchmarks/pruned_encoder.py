"""How much of a sentence encoder survives one-shot pruning: methods against each other on held-out passages.

    python -m sparse_onnx.tools.benchmarks.pruned_encoder [--method auto ...] [--sparsity 0.5 0.7 0.8 2:4] [--json FILE]
        [--calibrate topics ...] [--judge topics quotations glosses]

The pretrained encoder of :mod:`.sentence_encoder` (36 linears), calibrated on the first 192 shuffled passages of the
help topics of Python; embeddings (mean over tokens, normalised) of passages 400 to 655 against the dense model's:
1 - mean cosine, its 5th percentile, and recall@10, the overlap of the ten nearest other passages. A method may be
followed by options: ``alps,calibration=asymmetric,bias_correction=true``. ``--calibrate`` and ``--judge`` take other
kinds of text: the 192 passages are shared evenly among those to calibrate on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from sparse_onnx.tools.benchmarks.encoder_trial import HEADER, EncoderTrial, add_trial_options
from sparse_onnx.tools.benchmarks.rows import pruning_from
from sparse_onnx.tools.console import table

__all__ = ["main"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", default=["magnitude", "wanda", "sparsegpt", "alps", "auto"])
    parser.add_argument("--sparsity", nargs="+", default=["0.5", "0.7", "0.8", "2:4"])
    add_trial_options(parser, judge=("topics",))
    arguments = parser.parse_args()
    trial = EncoderTrial.of(arguments)
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    rows = [["method", "zeros", *HEADER]]
    for method in arguments.method:
        for sparsity in arguments.sparsity:
            model, seconds = trial.after((pruning_from(method, sparsity, ignore=("re:.*pooler.*",)),))
            for kind, found in trial.judged(model).items():
                of_method = results.setdefault(method, {}).setdefault(sparsity, {})
                of_method[kind] = {**dataclasses.asdict(found), "seconds": seconds}
                cells = [f"{value:.4f}" for value in dataclasses.astuple(found)]
                rows.append([method, sparsity, kind, *cells, f"{seconds:.0f}"])
                print(table(rows[-1:], rows[0]), flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(results, indent=1))
    print(table(rows[1:], rows[0]))


if __name__ == "__main__":
    main()
