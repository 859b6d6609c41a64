"""Scratch files and output folders."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.errors import HostError, UsageError
from sparse_onnx.model.model_io import OutputFolder, Spool, release_mapping

# Spool

TYPES = [np.float32, np.float64, np.float16, np.int8, np.int64, np.uint8, np.bool_, np.complex64]
TYPES += [
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.int4,
    ml_dtypes.uint4,
    ml_dtypes.float4_e2m1fn,
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(TYPES), st.sampled_from([(), (0,), (1,), (3, 5), (7, 0, 2), (64,), (65, 3)])
        ),
        max_size=8,
    )
)
def test_spool_returns_what_was_put(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[type, tuple[int, ...]]]
) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("spool")
    with Spool(folder) as spool:
        arrays = [rng.integers(0, 2, shape).astype(dtype) for dtype, shape in wanted]
        tensors = [spool.put(array, f"t{index}") for index, array in enumerate(arrays)]
        for index, (array, tensor) in enumerate(zip(arrays, tensors, strict=True)):
            assert tensor.name == f"t{index}"
            assert tensor.offset is not None
            assert tensor.offset % 64 == 0
            assert tensor.numpy().dtype == array.dtype
            assert tensor.numpy().shape == array.shape
            assert tensor.numpy().tobytes() == array.tobytes()
    assert list(folder.iterdir()) == []


def test_spool_takes_strided_arrays(tmp_path: Path) -> None:
    array = np.arange(60, dtype=np.float32).reshape(5, 12)
    with Spool(tmp_path) as spool:
        np.testing.assert_array_equal(spool.put(array.T, "t").numpy(), array.T)
        np.testing.assert_array_equal(spool.put(array[::2, ::-3], "s").numpy(), array[::2, ::-3])


def test_spool_is_mapped_not_loaded(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        tensor = spool.put(np.ones(10, np.float32), "t")
        assert tensor.raw is None
        array = tensor.numpy()
        later = spool.put(np.zeros(10, np.float32), "later")
        spool.release()
        assert tensor.raw is None
        np.testing.assert_array_equal(array, np.ones(10))  # what is in use stays
        np.testing.assert_array_equal(tensor.numpy(), np.ones(10))  # and it can be mapped again
        np.testing.assert_array_equal(later.numpy(), np.zeros(10))


def test_tensors_die_with_their_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    tensor = spool.put(np.ones(10, np.float32), "t")
    spool.close()
    spool.close()
    with pytest.raises(ValueError, match="invalidated"):
        tensor.numpy()
    with pytest.raises(ValueError, match="closed"):
        spool.put(np.ones(10, np.float32), "t")
    assert list(tmp_path.iterdir()) == []


def test_spool_is_deleted_after_an_error(tmp_path: Path) -> None:
    def work() -> None:
        with Spool(tmp_path) as spool:
            spool.put(np.ones(10, np.float32), "t")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([object()]), np.array(["2020-01-01"], "M8[D]")])
def test_spool_refuses_what_is_no_number(tmp_path: Path, array: np.ndarray) -> None:
    with Spool(tmp_path) as spool, pytest.raises(TypeError):
        spool.put(array, "t")


@pytest.mark.usefixtures("small_files")
def test_spool_on_a_full_disk(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        first = spool.put(np.ones(1000, np.float32), "first")
        with pytest.raises(HostError, match=r"no space left .* 400\.0 kB are needed"):
            spool.put(np.ones(100_000, np.float32), "second")
        third = spool.put(np.full(1000, 3, np.float32), "third")
        np.testing.assert_array_equal(first.numpy(), np.ones(1000))
        np.testing.assert_array_equal(third.numpy(), np.full(1000, 3))
    assert list(tmp_path.iterdir()) == []


def test_spool_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(HostError, match="no permission to write"):
        Spool(tmp_path)


def test_release_mapping_of_other_tensors() -> None:
    tensor = ir.tensor([1.0])
    release_mapping(tensor)
    assert tensor.numpy()[0] == 1.0


# OutputFolder


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("old")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_appears_at_the_end(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path
        assert not (tmp_path / "out").exists()
        fill(folder, "model.onnx")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["model.onnx"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("older", [False, True])
def test_nothing_appears_after_an_error(tmp_path: Path, error: type[BaseException], older: bool) -> None:
    if older:
        fill(tmp_path / "out", "model.onnx")

    def work() -> None:
        with OutputFolder(tmp_path / "out", overwrite=older) as folder:
            fill(folder, "report.json")
            raise error

    with pytest.raises(error):
        work()
    assert names(tmp_path) == (["out"] if older else [])
    assert not older or names(tmp_path / "out") == ["model.onnx"]


@pytest.mark.parametrize("content", [[], ["model.onnx"], ["model.onnx", "model.onnx.data", "report.json"]])
def test_existing_folder_needs_overwrite(tmp_path: Path, content: list[str]) -> None:
    fill(tmp_path / "out", *content)
    with pytest.raises(UsageError, match="--overwrite"), OutputFolder(tmp_path / "out"):
        pytest.fail("the work began")
    assert names(tmp_path / "out") == sorted(content)
    with OutputFolder(tmp_path / "out", overwrite=True) as folder:
        fill(folder, "report.json")
        assert names(tmp_path / "out") == sorted(content), "the old result stays until the new one is whole"
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["report.json"]


def _symbolic_link(out: Path) -> None:
    fill(out.parent / "elsewhere", "model.onnx")
    out.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda out: fill(out, "thesis.txt"), "no result of this program"),
        (lambda out: fill(out, "model.onnx", ".bashrc"), r"holds '\.bashrc'"),
        (lambda out: fill(fill(out, "model.onnx") / "src", "main.py"), "holds 'src'"),
        (lambda out: (fill(out, "model.onnx") / "link").symlink_to("/"), "holds 'link'"),
        (lambda out: out.write_text("a file"), "is no folder"),
        (_symbolic_link, "is no folder"),
        (lambda out: out.symlink_to("gone"), "is no folder"),
        (lambda out: out.symlink_to("out"), "is no folder"),
    ],
)
def test_what_is_not_ours_is_never_replaced(tmp_path: Path, make: object, words: str) -> None:
    make(tmp_path / "out")  # type: ignore[operator]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=words), OutputFolder(tmp_path / "out", overwrite=True):
        pytest.fail("the work began")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("where", [".", "inner", "inner/model.onnx"])
def test_the_source_is_never_replaced(tmp_path: Path, where: str) -> None:
    fill(tmp_path / "out", "model.onnx")
    fill(tmp_path / "out" / "inner", "model.onnx")
    (tmp_path / "alias").symlink_to("out")
    for source in (tmp_path / "out" / where, tmp_path / "alias" / where):
        for overwrite in (False, True):
            folder = OutputFolder(tmp_path / "out", overwrite=overwrite, sources=[source])
            with pytest.raises(UsageError, match=r"holds .* and is not replaced"), folder:
                pytest.fail("the work began")


def test_a_folder_inside_the_source_is_fine(tmp_path: Path) -> None:
    fill(tmp_path / "source", "model.onnx")
    sources = [tmp_path / "source", tmp_path / "source" / "model.onnx", tmp_path / "not there"]
    with OutputFolder(tmp_path / "source" / "out", sources=sources) as folder:
        fill(folder, "model.onnx")
    assert names(tmp_path / "source") == ["model.onnx", "out"]


@pytest.mark.parametrize("path", ["/", "~", "."])
def test_home_and_root_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("HOME", str(fill(tmp_path / "home", "model.onnx")))
    monkeypatch.chdir(fill(tmp_path / "here", "model.onnx"))
    folder = OutputFolder(os.path.expanduser(path), overwrite=True)
    with pytest.raises(UsageError, match="is not replaced"), folder:
        pytest.fail("the work began")
    assert names(tmp_path / "home") == names(tmp_path / "here") == ["model.onnx"]


def test_parent_must_exist(tmp_path: Path) -> None:
    fill(tmp_path, "file")
    for parent in ("gone", "file"):
        with pytest.raises(UsageError, match="create it first"), OutputFolder(tmp_path / parent / "out"):
            pytest.fail("the work began")


def test_folder_that_appears_meanwhile(tmp_path: Path) -> None:
    output = OutputFolder(tmp_path / "out")
    folder = output.__enter__()
    fill(folder, "model.onnx")
    fill(tmp_path / "out", "model.onnx", "other")
    with pytest.raises(UsageError, match=r"--overwrite\. The finished result is in ") as caught:
        output.__exit__(None, None, None)
    assert str(caught.value).endswith(str(folder))
    assert names(folder) == ["model.onnx"]
    assert names(tmp_path / "out") == ["model.onnx", "other"]


def test_renaming_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "model.onnx")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with (
        pytest.raises(HostError, match="The finished result is in"),
        OutputFolder(tmp_path / "out", overwrite=True) as folder,
    ):
        fill(folder, "report.json")
    assert names(tmp_path / "out") == ["model.onnx"], "the old result is back"
    assert names(folder) == ["report.json"]
    assert len(names(tmp_path)) == 2


def test_old_result_that_cannot_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "model.onnx")

    def refuse(path: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", refuse)
    with (
        pytest.raises(HostError, match=r"written, but .*delete it by hand"),
        OutputFolder(tmp_path / "out", overwrite=True) as folder,
    ):
        fill(folder, "report.json")
    assert names(tmp_path / "out") == ["report.json"]


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EACCES, "no permission to write"), (errno.ENOSPC, "no space left")]
)
def test_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def refuse(self: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(HostError, match=words), OutputFolder(tmp_path / "out"):
        pytest.fail("the work began")


def test_real_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write everywhere; simulated above")
    with pytest.raises(HostError, match="no permission"), OutputFolder(tmp_path / "locked" / "out"):
        pytest.fail("the work began")
    with pytest.raises(HostError, match="no permission"):
        Spool(tmp_path / "locked")
