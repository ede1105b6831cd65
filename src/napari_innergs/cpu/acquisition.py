"""Thick slices of a volume, and the transpose: trilinear samples on sub-slices, summed with the slice profile.

A slice is given by four vectors in voxel-index coordinates: the centre of its first pixel, the step along the
normal for one unit of depth, from row to row and from column to column. Beyond the volume its outermost voxels
go on. Slices whose columns run along an axis of the volume, voxel for voxel, are summed line by line.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from napari_innergs.cpu import _pool

# More copies of the volume than this are not made for the transpose.
_MOST_COPIES = 4
_NEAR = 1e-4


@njit(nogil=True, cache=True, error_model="numpy")
def _axis_of(column):  # type: ignore[no-untyped-def]
    """Axis along which columns run by one voxel, and the direction; -1 if there is none."""
    for axis in range(3):
        a, b = abs(column[(axis + 1) % 3]), abs(column[(axis + 2) % 3])
        if abs(abs(column[axis]) - 1) < 1e-7 and a < 1e-7 and b < 1e-7:
            return axis, 1 if column[axis] > 0 else -1
    return -1, 0


@njit(nogil=True, cache=True, error_model="numpy")
def _split(position, size):  # type: ignore[no-untyped-def]
    """Voxels on both sides of a position and the share of the second, inside the volume."""
    position = min(max(position, 0.0), size - 1.0)
    low = int(position)
    share = position - low
    if share < _NEAR:
        share = 0.0
    elif share > 1 - _NEAR:
        low, share = low + 1, 0.0
    return low, min(low + 1, size - 1), np.float32(share)


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _line(flat, picture, transpose, start, first, sign, size, stride, weight):  # type: ignore[no-untyped-def]
    """Add weight times a line of voxels to a row of pixels, or the other way round."""
    columns = len(picture)
    # columns whose voxel is inside; the others repeat the outermost one
    if sign > 0:
        low, high = -first, size - first
    else:
        low, high = first - size + 1, first + 1
    low, high = min(max(low, 0), columns), min(max(high, 0), columns)
    step = sign * stride
    origin = start + first * stride
    if transpose:
        for c in range(low, high):
            flat[origin + c * step] += weight * picture[c]
    elif step == 1:
        for c in range(low, high):
            picture[c] += weight * flat[origin + c]
    else:
        for c in range(low, high):
            picture[c] += weight * flat[origin + c * step]
    for side in range(2):
        begin, end = (0, low) if side == 0 else (max(high, low), columns)
        for c in range(begin, end):
            at = start + min(max(first + sign * c, 0), size - 1) * stride
            if transpose:
                flat[at] += weight * picture[c]
            else:
                picture[c] += weight * flat[at]


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _slices(start, stop, volume, vectors, offsets, weights, pictures, transpose):  # type: ignore[no-untyped-def]
    flat = volume.reshape(-1)
    sizes = np.array(volume.shape)
    strides = np.array([sizes[1] * sizes[2], sizes[2], 1])
    one = np.float32(1)
    for i in range(start, stop):
        origin, normal, row, column = vectors[i, 0], vectors[i, 1], vectors[i, 2], vectors[i, 3]
        axis, sign = _axis_of(column)
        for r in range(pictures.shape[1]):
            picture = pictures[i, r]
            for j in range(len(offsets)):
                s, rj, cj = offsets[j, 0], r + offsets[j, 1], offsets[j, 2]
                z = origin[0] + s * normal[0] + rj * row[0] + cj * column[0]
                y = origin[1] + s * normal[1] + rj * row[1] + cj * column[1]
                x = origin[2] + s * normal[2] + rj * row[2] + cj * column[2]
                if axis >= 0:
                    at = (z, y, x)
                    b, c = (axis + 1) % 3, (axis + 2) % 3
                    b0, b1, fb = _split(at[b], sizes[b])
                    c0, c1, fc = _split(at[c], sizes[c])
                    first = math.floor(at[axis])
                    share = at[axis] - first
                    if share < _NEAR:
                        share = 0.0
                    elif share > 1 - _NEAR:
                        first, share = first + 1, 0.0
                    fa = np.float32(share)
                    for corner in range(8):
                        k, m, n = corner & 1, (corner >> 1) & 1, corner >> 2
                        weight = weights[j] * (fa if k else one - fa) * (fb if m else one - fb)
                        weight *= fc if n else one - fc
                        if weight != 0:
                            base = (b1 if m else b0) * strides[b] + (c1 if n else c0) * strides[c]
                            _line(
                                flat,
                                picture,
                                transpose,
                                base,
                                int(first) + k,
                                sign,
                                sizes[axis],
                                strides[axis],
                                weight,
                            )
                    continue
                for c in range(len(picture)):
                    z0, z1, fz = _split(z + c * column[0], sizes[0])
                    y0, y1, fy = _split(y + c * column[1], sizes[1])
                    x0, x1, fx = _split(x + c * column[2], sizes[2])
                    z0, z1 = z0 * strides[0], z1 * strides[0]
                    y0, y1 = y0 * strides[1], y1 * strides[1]
                    gx = one - fx
                    w00 = weights[j] * (one - fz) * (one - fy)
                    w01 = weights[j] * (one - fz) * fy
                    w10 = weights[j] * fz * (one - fy)
                    w11 = weights[j] * fz * fy
                    if transpose:
                        p = picture[c]
                        flat[z0 + y0 + x0] += p * w00 * gx
                        flat[z0 + y0 + x1] += p * w00 * fx
                        flat[z0 + y1 + x0] += p * w01 * gx
                        flat[z0 + y1 + x1] += p * w01 * fx
                        flat[z1 + y0 + x0] += p * w10 * gx
                        flat[z1 + y0 + x1] += p * w10 * fx
                        flat[z1 + y1 + x0] += p * w11 * gx
                        flat[z1 + y1 + x1] += p * w11 * fx
                    else:
                        picture[c] += (
                            w00 * (gx * flat[z0 + y0 + x0] + fx * flat[z0 + y0 + x1])
                            + w01 * (gx * flat[z0 + y1 + x0] + fx * flat[z0 + y1 + x1])
                            + w10 * (gx * flat[z1 + y0 + x0] + fx * flat[z1 + y0 + x1])
                            + w11 * (gx * flat[z1 + y1 + x0] + fx * flat[z1 + y1 + x1])
                        )


def forward(
    volume: np.ndarray, vectors: np.ndarray, offsets: np.ndarray, weights: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Return the slices (n, h, w) of a volume.

    Parameters
    ----------
    volume : ndarray, (Z, Y, X), float32
        Contiguous.
    vectors : ndarray, (n, 4, 3), float64
        For each slice: first pixel, normal, row and column, in voxels.
    offsets : ndarray, (m, 3), float64
        Where a pixel is sampled: depth along the normal, and parts of a row and a column.
    weights : ndarray, (m,), float32
        Weights of the samples.
    size : tuple of int
        Rows and columns.
    """
    out = np.zeros((len(vectors), *size), np.float32)
    pieces = _pool.ranges(len(vectors), max(1, len(vectors) // (8 * _pool.get_threads())))
    _pool.run(_slices, [(*part, volume, vectors, offsets, weights, out, False) for part in pieces])
    return out


def adjoint(
    pictures: np.ndarray,
    vectors: np.ndarray,
    offsets: np.ndarray,
    weights: np.ndarray,
    shape: tuple[int, int, int],
) -> np.ndarray:
    """Return the transpose of `forward` applied to slices (n, h, w), a volume of the given shape."""
    copies = min(_pool.get_threads(), _MOST_COPIES, len(vectors))
    volumes = [np.zeros(shape, np.float32) for _ in range(copies)]
    bounds = np.linspace(0, len(vectors), copies + 1).astype(int)
    _pool.run(
        _slices,
        [
            (bounds[k], bounds[k + 1], volumes[k], vectors, offsets, weights, pictures, True)
            for k in range(copies)
        ],
    )
    for other in volumes[1:]:
        volumes[0] += other
    return volumes[0]
