"""Every public name exists, is documented, and every module says what is public."""

import importlib
import inspect
import pkgutil

import pytest

import sparse_onnx


def modules():
    found = [sparse_onnx.__name__]
    for info in pkgutil.walk_packages(sparse_onnx.__path__, "sparse_onnx."):
        if not info.name.endswith(("__main__", "libsparse_ops")):
            found.append(info.name)
    return found


@pytest.mark.parametrize("name", modules())
def test_public_names_exist_and_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__, "the module has no docstring"
    public = getattr(module, "__all__", None)
    if name.rpartition(".")[2].startswith("_") and public is None:
        return
    if public is None:
        assert not [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == name]
        return
    for entry in public:
        value = getattr(module, entry)
        documented = inspect.isfunction(value) or inspect.isclass(value)
        if documented and getattr(value, "__module__", "").startswith("sparse_onnx"):
            assert inspect.getdoc(value), f"{entry} has no docstring"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nosuch"):
        _ = sparse_onnx.nosuch


def test_everything_public_resolves():
    for name in sparse_onnx.__all__:
        assert getattr(sparse_onnx, name) is not None
