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
def _primal_plane(volume, scale, weight, fz, fy, fx, above, has_above, low, out):  # type: ignore[no-untyped-def]
    """Plane of `_primal`, the weight multiplied by a scale of each voxel; `above` is fz of the plane before."""
    height, width = volume.shape
    carried = np.float32(1) if has_above else np.float32(0)
    for y in range(height):
        before = max(y - 1, 0)
        first = np.float32(1) if y > 0 else np.float32(0)
        for x in range(width):
            out[y, x] = fz[y, x] - carried * above[y, x] + fy[y, x] - first * fy[before, x] + fx[y, x]
        for x in range(1, width):
            out[y, x] -= fx[y, x - 1]
        for x in range(width):
            out[y, x] = max(volume[y, x] + weight * scale[y, x] * out[y, x], low)


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _dual_plane(here, below, scale, scale_below, limit, limited, step, fz, fy, fx, gz, gy, gx):  # type: ignore[no-untyped-def]
    """One projected step of a plane of the dual field f to g, over the largest scale of the voxels it joins."""
    height, width = here.shape
    one, zero, tiny = np.float32(1), np.float32(0), np.float32(1e-30)
    for y in range(height):
        down = min(y + 1, height - 1)
        for x in range(width - 1):
            largest = max(max(scale[y, x], scale[y, x + 1]), max(scale_below[y, x], scale[down, x]))
            pace = step / largest
            vz = fz[y, x] + pace * (below[y, x] - here[y, x])
            vy = fy[y, x] + pace * (here[down, x] - here[y, x])
            vx = fx[y, x] + pace * (here[y, x + 1] - here[y, x])
            most = limit[y, x] if limited else one
            shrink = most / max(max(most, math.sqrt(vz * vz + vy * vy + vx * vx)), tiny)  # type: ignore[operator]
            gz[y, x] = vz * shrink
            gy[y, x] = vy * shrink
            gx[y, x] = vx * shrink
        # the difference across the last column is zero
        x = width - 1
        pace = step / max(scale[y, x], max(scale_below[y, x], scale[down, x]))
        vz = fz[y, x] + pace * (below[y, x] - here[y, x])
        vy = fy[y, x] + pace * (here[down, x] - here[y, x])
        most = limit[y, x] if limited else one
        shrink = most / max(max(most, math.sqrt(vz * vz + vy * vy)), tiny)  # type: ignore[operator]
        gz[y, x] = vz * shrink
        gy[y, x] = vy * shrink
        gx[y, x] = zero


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _two_steps(start, stop, volume, scale, limit, limited, weight, step, low, dual, halo, out):  # type: ignore[no-untyped-def]
    """Two steps of the dual field and the primal solution of planes [start, stop), read and written once.

    Each plane goes through all stages while it is in the cache, the later ones some planes behind the earlier. The
    field's planes of the neighbours, which may have gone on already, are in the halo: three before, two behind.
    """
    depth, height, width = volume.shape
    first, second = np.empty((2, height, width), np.float32), np.empty((2, height, width), np.float32)
    once, twice = np.zeros((2, 3, height, width), np.float32), np.zeros((2, 3, height, width), np.float32)
    begin = max(start - 2, 0)
    for t in range(begin, stop + 2):
        if t < depth:
            if t < start:
                fz, fy, fx = halo[t - start + 3, 0], halo[t - start + 3, 1], halo[t - start + 3, 2]
            elif t >= stop:
                fz, fy, fx = halo[t - stop + 3, 0], halo[t - stop + 3, 1], halo[t - stop + 3, 2]
            else:
                fz, fy, fx = dual[0, t], dual[1, t], dual[2, t]
            if t - 1 < start:
                above = halo[max(t - 1 - start + 3, 0), 0]
            elif t - 1 >= stop:
                above = halo[t - 1 - stop + 3, 0]
            else:
                above = dual[0, t - 1]
            _primal_plane(volume[t], scale[t], weight, fz, fy, fx, above, t > 0, low, first[t % 2])
        z = t - 1
        if begin <= z < depth:
            if z < start:
                fz, fy, fx = halo[z - start + 3, 0], halo[z - start + 3, 1], halo[z - start + 3, 2]
            elif z >= stop:
                fz, fy, fx = halo[z - stop + 3, 0], halo[z - stop + 3, 1], halo[z - stop + 3, 2]
            else:
                fz, fy, fx = dual[0, z], dual[1, z], dual[2, z]
            after = min(z + 1, depth - 1)
            g = once[z % 2]
            _dual_plane(
                first[z % 2], first[after % 2], scale[z], scale[after], limit[z], limited, step,
                fz, fy, fx, g[0], g[1], g[2],
            )  # fmt: skip
            _primal_plane(
                volume[z], scale[z], weight, g[0], g[1], g[2], once[(z + 1) % 2, 0], z > 0, low, second[z % 2]
            )
        z = t - 2
        if max(start - 1, 0) <= z < stop:
            after = min(z + 1, depth - 1)
            f, g = once[z % 2], twice[z % 2]
            _dual_plane(
                second[z % 2], second[after % 2], scale[z], scale[after], limit[z], limited, step,
                f[0], f[1], f[2], g[0], g[1], g[2],
            )  # fmt: skip
            if z >= start:
                for i in range(3):
                    dual[i, z] = g[i]
                _primal_plane(
                    volume[z], scale[z], weight, g[0], g[1], g[2], twice[(z + 1) % 2, 0], z > 0, low, out[z]
                )


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
    multiplied by its limit; the steps are not accelerated then, and their number is rounded up to an even one.
    """
    if scale is not None or limit is not None:
        return _varied_steps(volume, weight, iterations, dual, low, scale, limit)
    pieces = _pool.ranges(len(volume), _PLANES)
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
    scale: np.ndarray | None,
    limit: np.ndarray | None,
) -> np.ndarray:
    """As `tv_steps`, with a scale or a limit, and without momentum: steps two by two."""
    depth = len(volume)
    scale = np.ones_like(volume) if scale is None else scale
    limited = limit is not None
    limit = volume if limit is None else limit
    out = np.empty_like(volume)
    factor, bound, pace = np.float32(weight), np.float32(low), np.float32(1 / (12 * weight))
    pieces = _pool.ranges(depth, max(-(-depth // (2 * _pool.get_threads())), _PLANES))
    halos = np.zeros((len(pieces), 5, 3, *volume.shape[1:]), np.float32)
    for _ in range(-(-iterations // 2)):
        for halo, (start, stop) in zip(halos, pieces, strict=True):
            for place, z in enumerate((start - 3, start - 2, start - 1, stop, stop + 1)):
                if 0 <= z < depth:
                    halo[place] = dual[:, z]
        _pool.run(
            _two_steps,
            [
                (*part, volume, scale, limit, limited, factor, pace, bound, dual, halo, out)
                for part, halo in zip(pieces, halos, strict=True)
            ],
        )
    return out


def squared_gradient(volume: np.ndarray) -> np.ndarray:
    """Return D^T D of a volume (Z, Y, X), where D are the differences along the three axes."""
    out = np.empty_like(volume)
    _pool.run(_squared, [(*part, volume, out) for part in _pool.ranges(len(volume), _PLANES)])
    return out
