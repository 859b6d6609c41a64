"""The registry: complete, sorted, and honest about unknown names."""

import importlib
import inspect
import pkgutil

import pytest

import sparse_onnx.passes
from sparse_onnx.errors import UsageError
from sparse_onnx.passes.base import Pass, Pipeline, Stage
from sparse_onnx.passes.lower.candidates import LOWERINGS
from sparse_onnx.passes.presets import FUSION_PASSES, PREPARATION_PASSES
from sparse_onnx.passes.registry import PASSES, pass_by_name


def test_names_are_sorted_and_unique():
    names = [cls.name for cls in PASSES]
    assert names == sorted(set(names))


@pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.name)
def test_every_pass_is_a_frozen_dataclass(cls):
    assert cls.__dataclass_params__.frozen
    assert isinstance(cls.stage, Stage)
    assert cls.__doc__


@pytest.mark.parametrize("cls", PASSES, ids=lambda cls: cls.name)
def test_recipes_find_by_name_what_they_may_name(cls):
    assert cls.in_recipes == (cls.stage is not Stage.LOWER)
    if cls.in_recipes:
        assert pass_by_name(cls.name) is cls
    else:
        with pytest.raises(UsageError, match="unknown modifier") as caught:
            pass_by_name(cls.name)
        assert cls.name not in str(caught.value).partition("valid:")[2]


def test_every_pass_of_every_folder_is_registered():
    modules = list(pkgutil.walk_packages(sparse_onnx.passes.__path__, "sparse_onnx.passes."))
    assert {"sparse_onnx.passes.base", "sparse_onnx.passes.lower.lowering"} <= {m.name for m in modules}
    found = {
        cls
        for module in modules
        for _, cls in inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        if issubclass(cls, Pass) and not inspect.isabstract(cls) and cls is not Pipeline
    }
    assert found == set(PASSES)


def test_what_the_compiler_runs_is_registered():
    ran = {*map(type, PREPARATION_PASSES), *map(type, FUSION_PASSES), *LOWERINGS}
    assert ran <= set(PASSES)


def test_an_unknown_name_is_refused():
    with pytest.raises(UsageError, match=r"unknown modifier 'prune\.rnd'; the nearest is 'prune\.random'"):
        pass_by_name("prune.rnd")
