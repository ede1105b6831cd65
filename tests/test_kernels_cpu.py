"""What is particular to the CPU kernels: vectors, threads, compiled code kept between processes."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from numba import njit

from napari_innergs.cpu import _pool
from napari_innergs.cpu._simd import keep_from, load, store, vexp
from napari_innergs.device import describe_device, get_threads, set_threads


@njit(error_model="numpy")
def _exp(x, out):
    for i in range(0, x.size, 16):
        store(out, i, vexp(load(x, i)))


@njit
def _keep(x, threshold, out):
    store(out, 0, keep_from(load(x, 0) * np.float32(2.0) - np.float32(1.0), threshold))


def test_vector_exp():
    x = np.linspace(-120, 87, 16 * 5000).astype(np.float32)
    out = np.empty_like(x)
    _exp(x, out)
    normal = x > -87.2
    true = np.exp(x.astype(np.float64))
    # A relative error of the argument's rounding, |x| 2**-24, on top of that of the polynomial.
    limit = 3e-7 + np.abs(x) * 1.2e-7
    assert (np.abs(out - true) / true < limit)[normal].all()
    assert not out[x < -87.4].any()
    extremes = np.array([-np.inf, -1e30, 0, 1e30, 200, 88] + [0] * 10, np.float32)
    out = np.empty_like(extremes)
    _exp(extremes, out)
    assert list(out[:3]) == [0, 0, 1] and (out[3:6] > 1e37).all() and np.isfinite(out).all()


def test_vectors_mix_with_numbers():
    x, out = np.arange(16, dtype=np.float32), np.empty(16, np.float32)
    _keep(x, np.float32(9.0), out)
    y = 2 * x - 1
    np.testing.assert_array_equal(out, np.where(y >= 9, y, 0))


def test_pool_runs_every_task_once_and_passes_errors_on():
    before = get_threads()
    try:
        set_threads(3)
        seen: list[int] = []
        _pool.run(seen.append, [(i,) for i in range(100)])
        assert sorted(seen) == list(range(100))

        def fail(i):
            if i == 17:
                raise KeyError("seventeen")

        with pytest.raises(KeyError, match="seventeen"):
            _pool.run(fail, [(i,) for i in range(100)])
        with pytest.raises(ValueError, match="at least 1"):
            set_threads(0)
    finally:
        set_threads(before)


def test_device():
    assert describe_device("cpu").name == "cpu"
    auto = describe_device()
    assert auto.name in ("cpu", "cuda") and auto.reason.endswith(".")
    with pytest.raises(ValueError, match="Unknown device"):
        describe_device("gpu")


def test_compiled_code_is_found_again(tmp_path):
    """A second process must not compile: users would wait each time they start."""
    script = textwrap.dedent(
        """
        import numpy as np
        from napari_innergs.cpu import _planes, slices

        gaussian = np.zeros((1, 3)), np.array([[1, 0, 0, 1, 0, 1]]), np.ones((1, 2)), np.zeros(1)
        out, saved = slices.forward(*(x.astype(np.float32) for x in gaussian), 20, 20, 9.0)
        slices.backward(out, saved)
        names = "_prepare", "_count", "_fill", "_forward", "_backward", "_chain"
        print(sum(sum(getattr(_planes, name).stats.cache_misses.values()) for name in names))
        """
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    misses = [
        int(
            subprocess.run(
                [sys.executable, "-c", script], env=environment, capture_output=True, check=True
            ).stdout
        )
        for _ in range(2)
    ]
    assert misses[0] > 0
    assert misses[1] == 0
