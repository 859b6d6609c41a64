"""The registry: complete, sorted, and honest about unknown names."""

import importlib
import inspect
import pkgutil

import pytest

import sparse_onnx.passes
from sparse_onnx.errors import UsageError
from sparse_onnx.passes.base import Pass, Pipeline, Stage
from sparse_onnx.passes.registry import PASSES, pass_by_name


def test_names_are_sorted_and_unique():
    names = [cls.name for cls in PASSES]
    assert names == sorted(set(names))


@pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.name)
def test_every_pass_is_a_frozen_dataclass_found_by_its_name(cls):
    assert pass_by_name(cls.name) is cls
    assert cls.__dataclass_params__.frozen
    assert isinstance(cls.stage, Stage)
    assert cls.__doc__


def test_every_pruning_and_cleaning_pass_is_registered():
    found = set()
    for module in pkgutil.iter_modules(sparse_onnx.passes.__path__):
        for _, cls in inspect.getmembers(
            importlib.import_module(f"sparse_onnx.passes.{module.name}"), inspect.isclass
        ):
            if issubclass(cls, Pass) and not inspect.isabstract(cls) and cls is not Pipeline:
                found.add(cls)
    assert {cls for cls in found if cls.stage is not Stage.LOWER} == {
        cls for cls in PASSES if cls.stage is not Stage.LOWER
    }


def test_an_unknown_name_is_refused():
    with pytest.raises(UsageError, match=r"unknown modifier 'prune\.rnd'; the nearest is 'prune\.random'"):
        pass_by_name("prune.rnd")
