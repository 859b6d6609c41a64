"""Errors that a user can meet, and the exit code of each.

Every message says what is wrong, where, and what to do. Anything that is not a :class:`SparseOnnxError`
is a defect of this package and ends the command line with exit code 1.
"""

from __future__ import annotations

__all__ = [
    "DataError",
    "GoalNotMetError",
    "HostError",
    "ModelFileError",
    "PassError",
    "RunError",
    "SparseOnnxError",
    "UsageError",
    "VerificationError",
]


class SparseOnnxError(Exception):
    """Root of all errors of this package."""

    exit_code = 1


class UsageError(SparseOnnxError):
    """A wrong option or recipe, or what is given with it: see the classes below."""

    exit_code = 2


class ModelFileError(UsageError):
    """A model file that is missing, damaged, unsafe, or too new."""


class DataError(UsageError):
    """Samples, labels, text, gradients or statistics that are missing, damaged, or do not fit the model."""


class RunError(UsageError):
    """ONNX Runtime refuses a model, or cannot run it with the inputs that it is given."""


class VerificationError(SparseOnnxError):
    """Two models that had to agree do not."""

    exit_code = 3


class GoalNotMetError(SparseOnnxError):
    """A goal such as ``max_drop`` was missed; the best result so far was written."""

    exit_code = 4


class HostError(SparseOnnxError):
    """The machine or its software is in the way: permissions, disk space, a missing package or library."""

    exit_code = 6


class PassError(SparseOnnxError):
    """A pass failed; the message names the pass, the passes before it, and the node where known."""
