"""Sums of volumes in one sweep and on all threads, for solvers that make hundreds of steps."""

from __future__ import annotations

import numpy as np
from numba import njit

from napari_innergs.cpu import _pool

_CHUNK = 1 << 17


@njit(nogil=True, cache=True, fastmath=True)
def _descend(start, stop, slope, volume, pace, factor):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        slope[i] = volume[i] - factor * pace[i] * slope[i]


@njit(nogil=True, cache=True, fastmath=True)
def _ahead(start, stop, volume, before, momentum, out):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        out[i] = volume[i] + momentum * (volume[i] - before[i])


def descend(volume: np.ndarray, slope: np.ndarray, pace: np.ndarray, factor: float) -> np.ndarray:
    """Return ``volume - factor * pace * slope``, in the place of the slope; contiguous arrays of float32."""
    flat = (slope.reshape(-1), volume.reshape(-1), pace.reshape(-1), np.float32(factor))
    _pool.run(_descend, [(*part, *flat) for part in _pool.ranges(volume.size, _CHUNK)])
    return slope


def ahead_of(volume: np.ndarray, before: np.ndarray, momentum: float, out: np.ndarray) -> np.ndarray:
    """Return ``volume + momentum * (volume - before)`` in `out`, which may be `before`; contiguous, float32."""
    flat = (volume.reshape(-1), before.reshape(-1), np.float32(momentum), out.reshape(-1))
    _pool.run(_ahead, [(*part, *flat) for part in _pool.ranges(volume.size, _CHUNK)])
    return out
