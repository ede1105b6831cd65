"""Differences between neighbouring voxels: total variation's proximal map, and the squared gradient's normal matrix.

Differences are forward ones; the one after the last plane, row or column is zero (Neumann boundary).
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from napari_innergs.cpu import _pool

_PLANES = 4


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _primal(start, stop, volume, weight, field, out, low):  # type: ignore[no-untyped-def]
    """Volume + weight times the divergence of the field, not below `low`."""
    _, height, width = volume.shape
    fz, fy, fx = field[0], field[1], field[2]
    for z in range(start, stop):
        for y in range(height):
            for x in range(width):
                out[z, y, x] = fz[z, y, x] + fy[z, y, x] + fx[z, y, x]
            if z > 0:
                for x in range(width):
                    out[z, y, x] -= fz[z - 1, y, x]
            if y > 0:
                for x in range(width):
                    out[z, y, x] -= fy[z, y - 1, x]
            for x in range(1, width):
                out[z, y, x] -= fx[z, y, x - 1]
            for x in range(width):
                value = volume[z, y, x] + weight * out[z, y, x]
                out[z, y, x] = max(value, low)


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _dual(start, stop, picture, step, momentum, dual, ahead):  # type: ignore[no-untyped-def]
    """One projected step of the dual field, and where momentum takes it."""
    depth, height, width = picture.shape
    one = np.float32(1)
    zero = np.float32(0)
    for z in range(start, stop):
        above = min(z + 1, depth - 1)
        for y in range(height):
            below = min(y + 1, height - 1)
            # the difference across the last column is zero
            for x in range(width - 1):
                here = picture[z, y, x]
                gz = ahead[0, z, y, x] + step * (picture[above, y, x] - here)
                gy = ahead[1, z, y, x] + step * (picture[z, below, x] - here)
                gx = ahead[2, z, y, x] + step * (picture[z, y, x + 1] - here)
                scale = one / max(one, math.sqrt(gz * gz + gy * gy + gx * gx))  # type: ignore[operator]
                gz *= scale
                gy *= scale
                gx *= scale
                ahead[0, z, y, x] = gz + momentum * (gz - dual[0, z, y, x])
                ahead[1, z, y, x] = gy + momentum * (gy - dual[1, z, y, x])
                ahead[2, z, y, x] = gx + momentum * (gx - dual[2, z, y, x])
                dual[0, z, y, x] = gz
                dual[1, z, y, x] = gy
                dual[2, z, y, x] = gx
            x = width - 1
            here = picture[z, y, x]
            gz = ahead[0, z, y, x] + step * (picture[above, y, x] - here)
            gy = ahead[1, z, y, x] + step * (picture[z, below, x] - here)
            scale = one / max(one, math.sqrt(gz * gz + gy * gy))  # type: ignore[operator]
            gz *= scale
            gy *= scale
            ahead[0, z, y, x] = gz + momentum * (gz - dual[0, z, y, x])
            ahead[1, z, y, x] = gy + momentum * (gy - dual[1, z, y, x])
            ahead[2, z, y, x] = zero
            dual[0, z, y, x] = gz
            dual[1, z, y, x] = gy
            dual[2, z, y, x] = zero


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _squared(start, stop, volume, out):  # type: ignore[no-untyped-def]
    depth, height, width = volume.shape
    for z in range(start, stop):
        for y in range(height):
            for x in range(width):
                out[z, y, x] = 0
            for other in (z - 1, z + 1):
                if 0 <= other < depth:
                    for x in range(width):
                        out[z, y, x] += volume[z, y, x] - volume[other, y, x]
            for other in (y - 1, y + 1):
                if 0 <= other < height:
                    for x in range(width):
                        out[z, y, x] += volume[z, y, x] - volume[z, other, x]
            for x in range(1, width):
                difference = volume[z, y, x] - volume[z, y, x - 1]
                out[z, y, x] += difference
                out[z, y, x - 1] -= difference


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _primal_varied(start, stop, volume, scale, weight, field, out, low):  # type: ignore[no-untyped-def]
    """As `_primal`, the weight multiplied by a scale of each voxel."""
    _, height, width = volume.shape
    fz, fy, fx = field[0], field[1], field[2]
    for z in range(start, stop):
        for y in range(height):
            for x in range(width):
                out[z, y, x] = fz[z, y, x] + fy[z, y, x] + fx[z, y, x]
            if z > 0:
                for x in range(width):
                    out[z, y, x] -= fz[z - 1, y, x]
            if y > 0:
                for x in range(width):
                    out[z, y, x] -= fy[z, y - 1, x]
            for x in range(1, width):
                out[z, y, x] -= fx[z, y, x - 1]
            for x in range(width):
                value = volume[z, y, x] + weight * scale[z, y, x] * out[z, y, x]
                out[z, y, x] = max(value, low)


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _dual_varied(start, stop, picture, scale, limit, step, momentum, dual, ahead):  # type: ignore[no-untyped-def]
    """As `_dual`, each step over the largest scale of the voxels it joins, each vector no longer than its limit."""
    depth, height, width = picture.shape
    tiny = np.float32(1e-30)
    zero = np.float32(0)
    for z in range(start, stop):
        above = min(z + 1, depth - 1)
        for y in range(height):
            below = min(y + 1, height - 1)
            for x in range(width):
                beside = min(x + 1, width - 1)
                here = picture[z, y, x]
                largest = max(
                    max(scale[z, y, x], scale[z, y, beside]), max(scale[above, y, x], scale[z, below, x])
                )
                pace = step / largest
                gz = ahead[0, z, y, x] + pace * (picture[above, y, x] - here)
                gy = ahead[1, z, y, x] + pace * (picture[z, below, x] - here)
                gx = ahead[2, z, y, x] + pace * (picture[z, y, beside] - here)
                # the difference across the last column is zero
                gx = gx if x < width - 1 else zero
                most = limit[z, y, x]
                shrink = most / max(max(most, math.sqrt(gz * gz + gy * gy + gx * gx)), tiny)  # type: ignore[operator]
                gz *= shrink
                gy *= shrink
                gx *= shrink
                ahead[0, z, y, x] = gz + momentum * (gz - dual[0, z, y, x])
                ahead[1, z, y, x] = gy + momentum * (gy - dual[1, z, y, x])
                ahead[2, z, y, x] = gx + momentum * (gx - dual[2, z, y, x])
                dual[0, z, y, x] = gz
                dual[1, z, y, x] = gy
                dual[2, z, y, x] = gx


def tv_steps(
    volume: np.ndarray,
    weight: float,
    iterations: int,
    dual: np.ndarray,
    low: float = -np.inf,
    scale: np.ndarray | None = None,
    limit: np.ndarray | None = None,
) -> np.ndarray:
    """Return the primal solution after `iterations` accelerated steps on `dual` (3, Z, Y, X), changed in place.

    With a scale or a limit (Z, Y, X), the data term of a voxel is divided by its scale, and its variation is
    multiplied by its limit.
    """
    pieces = _pool.ranges(len(volume), _PLANES)
    if scale is not None or limit is not None:
        ones = [np.ones_like(volume) if given is None else given for given in (scale, limit)]
        return _varied_steps(volume, weight, iterations, dual, low, *ones)
    ahead = dual.copy()
    out = np.empty_like(volume)
    bound = np.float32(low)
    factor, t = np.float32(weight), 1.0
    for _ in range(iterations):
        _pool.run(_primal, [(*part, volume, factor, ahead, out, bound) for part in pieces])
        following = (1 + math.sqrt(1 + 4 * t * t)) / 2
        momentum = np.float32((t - 1) / following)
        # the squared norm of three-dimensional differences is at most 12
        step = np.float32(1 / (12 * weight))
        _pool.run(_dual, [(*part, out, step, momentum, dual, ahead) for part in pieces])
        t = following
    _pool.run(_primal, [(*part, volume, factor, dual, out, bound) for part in pieces])
    return out


def _varied_steps(
    volume: np.ndarray,
    weight: float,
    iterations: int,
    dual: np.ndarray,
    low: float,
    scale: np.ndarray,
    limit: np.ndarray,
) -> np.ndarray:
    """As `tv_steps`, with a scale and a limit."""
    pieces = _pool.ranges(len(volume), _PLANES)
    ahead = dual.copy()
    out = np.empty_like(volume)
    factor, bound, pace = np.float32(weight), np.float32(low), np.float32(1 / (12 * weight))
    t = 1.0
    for _ in range(iterations):
        _pool.run(_primal_varied, [(*part, volume, scale, factor, ahead, out, bound) for part in pieces])
        following = (1 + math.sqrt(1 + 4 * t * t)) / 2
        momentum = np.float32((t - 1) / following)
        _pool.run(_dual_varied, [(*part, out, scale, limit, pace, momentum, dual, ahead) for part in pieces])
        t = following
    _pool.run(_primal_varied, [(*part, volume, scale, factor, dual, out, bound) for part in pieces])
    return out


def squared_gradient(volume: np.ndarray) -> np.ndarray:
    """Return D^T D of a volume (Z, Y, X), where D are the differences along the three axes."""
    out = np.empty_like(volume)
    _pool.run(_squared, [(*part, volume, out) for part in _pool.ranges(len(volume), _PLANES)])
    return out
