"""Calibration: run a model on real inputs and collect what pruning needs of every layer's input."""

from sparse_onnx.data.samples import Samples, open_samples
from sparse_onnx.passes.calibration.blocks import Block, Cutter
from sparse_onnx.passes.calibration.calibrator import BlockStatistics, Calibrator, Options
from sparse_onnx.passes.calibration.moments import Layout
from sparse_onnx.passes.calibration.spill import Statistics
from sparse_onnx.passes.calibration.statistics_file import StatisticsFile, merge
from sparse_onnx.passes.calibration.two_streams import Aim, Step

__all__ = [
    "Aim",
    "Block",
    "BlockStatistics",
    "Calibrator",
    "Cutter",
    "Layout",
    "Options",
    "Samples",
    "Statistics",
    "StatisticsFile",
    "Step",
    "merge",
    "open_samples",
]
