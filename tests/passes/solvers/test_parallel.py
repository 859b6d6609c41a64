"""Parts of a layer side by side: cut evenly, one thread of BLAS each, and the same answers."""

import threading

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st

from sparse_onnx.errors import UsageError
from sparse_onnx.passes.solvers import QUANTIZERS, GridOptions
from sparse_onnx.passes.solvers.parallel import cuts, together
from sparse_onnx.passes.solvers.quantizer import Rounding, output_errors


def blas_threads():
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return max((pool["num_threads"] for pool in pools), default=1)


@given(outputs=st.integers(1, 5000), threads=st.integers(1, 64))
def test_cuts_are_even_and_none_is_small(outputs, threads):
    found = cuts(outputs, threads)
    assert np.concatenate([np.arange(outputs)[part] for part in found]).tolist() == [*range(outputs)]
    sizes = [part.stop - part.start for part in found]
    assert 1 <= len(found) <= threads
    assert max(sizes) - min(sizes) <= 1
    assert len(found) == 1 or min(sizes) >= 128


def test_parts_have_one_thread_of_blas_each_and_come_back_in_order():
    before = blas_threads()
    meet = threading.Barrier(2, timeout=30)  # passed only if both run at the same time

    def part(index):
        meet.wait()
        return index, blas_threads()

    assert together([lambda: part(0), lambda: part(1)], 2) == [(0, 1), (1, 1)]
    assert together([blas_threads], 4) == [1]
    assert blas_threads() == before


def test_what_a_part_raises_is_raised_and_blas_has_its_threads_again():
    before = blas_threads()

    def wrong():
        raise UsageError("no")

    for threads in (1, 2):
        with pytest.raises(UsageError, match="no"):
            together([wrong, blas_threads], threads)
        assert blas_threads() == before


@pytest.mark.parametrize("grid", [GridOptions(4, 32, symmetric=False), GridOptions(3, 0)], ids=str)
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
@pytest.mark.parametrize("pruned", [False, True])
def test_several_threads_find_what_one_finds(layer, name, grid, pruned):
    W, statistics = layer(64, 300)
    if pruned:
        W = np.where(np.abs(W) > np.median(np.abs(W)), W, np.float32(0))
    one, three = (QUANTIZERS[name](grid=grid, threads=threads).solve(W, statistics) for threads in (1, 3))
    problem = Rounding(W, W, None, statistics.gram)
    errors = [output_errors(problem, found.matrix()) for found in (one, three)]
    # Products of other widths are rounded differently, and a tie may fall to the other side: not in many outputs.
    assert np.mean(np.isclose(*errors, rtol=1e-4)) > 0.97
    assert errors[1].sum() == pytest.approx(errors[0].sum(), rel=1e-3)
    assert ((three.matrix() == 0) >= (W == 0)).all()
    again = QUANTIZERS[name](grid=grid, threads=3).solve(W, statistics)
    assert again.integers.tobytes() == three.integers.tobytes()
    assert again.scale.tobytes() == three.scale.tobytes()


def test_threads_are_checked():
    with pytest.raises(UsageError, match="threads"):
        QUANTIZERS["auto"](threads=0)
