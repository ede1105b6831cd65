"""Line integrals through voxels on the CPU: Joseph's projector, its exact transpose, and FDK's backprojector.

A ray is followed along the grid axis in which it moves fastest. On each plane of voxel centres the volume is
interpolated linearly in the two other axes, and the sum is multiplied by the length of the ray between two
planes (Joseph 1982, IEEE TMI 1:192). Outside the outermost voxel centres the volume falls to zero within one
voxel. Rays start at the source.

Where the detector's columns are parallel to a grid axis, which holds for every scan around such an axis, the
rays of a column lie in one plane with it. The interpolation then separates: two lines of voxels are mixed once
and the rays of the whole column read from the result, sixteen at a time. Where a column has few rays
:mod:`napari_innergs.cpu._rows` takes sixteen columns at a time. Other views take one ray after the other. All
compute the same numbers.

The transpose gives each thread some planes of the volume: first those across one axis with all the rays that
are followed along it, then the next. No number has two writers, and the answer has the same bits every time.
"""

# Kernels are typed by numba, not by annotations.
# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from napari_innergs.cpu import _pool
from napari_innergs.cpu._gather import gather, gather_bilinear, gather_linear, vabs, vceil, vinverse
from napari_innergs.cpu._rows import Fans, adjoint_rows, forward_rows, make_fans, planes_met
from napari_innergs.cpu._simd import at, clamp, keep_from, lanes, load, put, splat, store, vsum

WIDTH = 16
NUMBERS = 12  # for each column of a view: see _columns
COLUMNS = 32  # columns of a view in a task
FEW = 24  # rows of a detector up to which neighbouring columns are taken together
# Two axes in which a ray moves equally fast, to rounding: the later one counts.
TIE = 1.0 - 1e-9

_FAST: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "arcp", "nsz", "afn"},
}


@dataclass(frozen=True)
class Rays:
    """Rays of a scan through a grid, ready for the kernels.

    The kernels' axes are two of the grid's, and the one along which lines of voxels lie: ``shape`` and
    ``strides`` are in this order. In memory the volume has the grid's axes in the order ``axes``.
    """

    shape: tuple[int, int, int]
    strides: tuple[int, int, int]
    detector_shape: tuple[int, int]
    parallel: bool
    axes: tuple[int, int, int]
    order: np.ndarray
    frames: np.ndarray
    metric: np.ndarray
    separable: np.ndarray
    columns: np.ndarray
    fans: Fans | None
    """With few rows: of the separable views."""


def prepare(
    frames: np.ndarray,
    linear: np.ndarray,
    shape: tuple[int, int, int],
    detector_shape: tuple[int, int],
    parallel: bool,
) -> Rays:
    """Return what the kernels need to know of a scan.

    Parameters
    ----------
    frames : ndarray of float64, (n, 12)
        Source (cone beam) or direction (parallel beam), centre of pixel (0, 0), step from column to column
        and from row to row; each (z, y, x) in voxel indices of the grid.
    linear : ndarray of float64, (3, 3)
        Steps of the grid in the world, as columns.
    shape : tuple of int
        Voxels (Z, Y, X).
    detector_shape : tuple of int
        Rows and columns of the detector.
    parallel : bool
        Parallel beam.
    """
    frames = np.ascontiguousarray(frames, np.float64).reshape(-1, 12)
    along = np.abs(frames[:, 9:])
    # The axis to which most views' columns are parallel; the last where none is: no copy is needed there.
    straight = along.sum(1, keepdims=True) - along <= 1e-4 / max(detector_shape[0], 1)
    line = int(np.argmax(np.append(straight.sum(0)[::-1], 0.5)))
    line = 2 - line if line < 3 else 2
    axes = (*(a for a in range(3) if a != line), line)
    inner = np.ascontiguousarray(frames.reshape(-1, 4, 3)[:, :, axes].reshape(-1, 12))
    order = np.array([axes.index(a) for a in (2, 1, 0)])
    basis = np.asarray(linear, np.float64)[:, axes]
    metric = basis.T @ basis
    columns, steep = _columns(inner, metric, detector_shape, parallel)
    separable = straight[:, line] & steep
    few = detector_shape[0] <= FEW and bool(separable.any())
    na, nb, nl = (shape[a] for a in axes)
    return Rays(
        shape=(na, nb, nl),
        strides=(nb, 1, na * nb) if few else (nb * nl, nl, 1),
        detector_shape=detector_shape,
        parallel=parallel,
        axes=(axes[2], axes[0], axes[1]) if few else (axes[0], axes[1], axes[2]),
        order=order,
        frames=inner,
        metric=np.ascontiguousarray(metric),
        separable=separable,
        columns=columns,
        fans=make_fans(inner, columns, separable, parallel) if few else None,
    )


def _columns(
    frames: np.ndarray, metric: np.ndarray, detector_shape: tuple[int, int], parallel: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of each column of each view, and the views whose rays all move least along lines.

    For a column: the axis followed (0 or 1); the position in the other one on plane k, ``n1 + k n2``;
    the position of row v on the line, ``n3 + k n4 + v (n5 + k n6)``; the squared length of its ray between
    planes, ``n7 + n8 v + n9 v^2``; and the range of planes behind the source, from n10 to n11.
    """
    rows, cols = detector_shape
    origin, corner, right, down = (frames[:, None, i : i + 3] for i in (0, 3, 6, 9))
    pixel = corner + np.arange(cols)[None, :, None] * right
    if parallel:
        direction = np.broadcast_to(origin, pixel.shape)
        start, fan = pixel, np.zeros_like(down)
    else:
        direction = pixel - origin
        start, fan = np.broadcast_to(origin, pixel.shape), down
    size = np.abs(direction)
    follow = (size[..., 1] >= TIE * size[..., 0]).astype(np.intp)
    along, beside = follow[..., None], 1 - follow[..., None]

    def pick(vectors: np.ndarray, which: np.ndarray) -> np.ndarray:
        return np.take_along_axis(np.broadcast_to(vectors, pixel.shape), which, 2)[..., 0]

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        pace = 1.0 / pick(direction, along)
        first = -pick(start, along) * pace
        numbers = np.zeros((*pixel.shape[:2], NUMBERS))
        numbers[..., 0] = follow
        numbers[..., 1] = pick(start, beside) + first * pick(direction, beside)
        numbers[..., 2] = pace * pick(direction, beside)
        numbers[..., 3] = start[..., 2] + first * direction[..., 2]
        numbers[..., 4] = pace * direction[..., 2]
        if parallel:
            numbers[..., 5] = down[..., 2]
        else:
            numbers[..., 5] = first * down[..., 2]
            numbers[..., 6] = pace * down[..., 2]
        numbers[..., 7] = np.einsum("nui,ij,nuj->nu", direction, metric, direction) * pace**2
        numbers[..., 8] = 2 * np.einsum("nui,ij,nuj->nu", direction, metric, fan) * pace**2
        numbers[..., 9] = np.einsum("nui,ij,nuj->nu", fan, metric, fan) * pace**2
        numbers[..., 10] = -np.inf
        numbers[..., 11] = np.inf
        if not parallel:
            at_source = pick(start, along)
            numbers[..., 10] = np.where(pace > 0, at_source + 1e-6, -np.inf)
            numbers[..., 11] = np.where(pace > 0, np.inf, at_source - 1e-6)
    most = np.maximum(size[..., 0], size[..., 1])
    ends = np.abs(direction[..., 2:] + fan[..., 2:] * np.array([0, rows - 1]))
    steep = (ends.max(2) < TIE * most).all(1) & np.isfinite(numbers[..., :10]).all((1, 2))
    return numbers, steep


@njit(**_FAST)
def _forward_columns(view, target, u_lo, u_hi, volume, na, nb, nl, columns, rows, cols, out):
    """Integrate along the rays of some columns of a separable view."""
    mixed = np.zeros(nl + 3 + 2 * WIDTH, np.float32)
    total = np.zeros(rows + 2 * WIDTH, np.float32)
    zero = splat(np.float32(0.0))
    last = np.float32(nl + 1)
    for u in range(u_lo, u_hi):
        c = columns[view, u]
        if c[0] == 0.0:
            planes, lateral, plane_stride, stride = na, nb, nb * nl, nl
        else:
            planes, lateral, plane_stride, stride = nb, na, nl, nb * nl
        for v in range(0, rows, WIDTH):
            store(total, v, zero)
        k_lo, k_hi = planes_met(c[1], c[2], c[10], c[11], lateral, planes)
        for k in range(k_lo, k_hi):
            x = c[1] + k * c[2]
            i = np.int64(math.floor(x))
            if i < -1 or i >= lateral:
                continue
            f = np.float32(x - i)
            top = c[3] + k * c[4]
            step = c[5] + k * c[6]
            bottom = top + (rows - 1) * step
            # the part of the line that is read, and the rows that read it
            z0 = max(math.floor(min(top, bottom)), -1.0)
            z1 = min(math.floor(max(top, bottom)) + 1.0, np.float64(nl))
            if z0 >= z1:
                continue
            v0, v1 = np.int64(0), np.int64(rows - 1)
            if top < -1.0 or bottom < -1.0 or top > nl or bottom > nl:
                r0 = (-1.0 - top) / step
                r1 = (nl - top) / step
                v0 = max(v0, np.int64(math.floor(min(r0, r1))))
                v1 = min(v1, np.int64(math.ceil(max(r0, r1))))
            lo = max(np.int64(z0), np.int64(0))
            hi = min(np.int64(z1), nl - 1)
            o = k * plane_stride + i * stride
            if i < 0:
                for z in range(lo, hi + 1):
                    mixed[z + 1] = f * volume[o + stride + z]
            elif i == lateral - 1:
                for z in range(lo, hi + 1):
                    mixed[z + 1] = (np.float32(1.0) - f) * volume[o + z]
            else:
                z = lo
                while z + WIDTH <= hi + 1:
                    low = load(volume, o + z)
                    store(mixed, z + 1, low + (load(volume, o + stride + z) - low) * f)
                    z += WIDTH
                while z <= hi:
                    low = at(volume, o + z)
                    put(mixed, z + 1, low + (at(volume, o + stride + z) - low) * f)
                    z += 1
            v = v0 // WIDTH * WIDTH
            ramp = lanes() * np.float32(step)
            while v <= v1:
                where = clamp(ramp + np.float32(top + v * step + 1.0), np.float32(0.0), last)
                store(total, v, load(total, v) + gather_linear(mixed, 0, where))
                v += WIDTH
        for v in range(rows):
            out[target, v, u] = total[v] * np.float32(math.sqrt(c[7] + v * (c[8] + v * c[9])))


@njit(**_FAST)
def _ray(view, v, u, frames, metric, order, parallel, ray):
    """Write a ray: start and pace in each axis for each plane of the axis followed; return that axis, length.

    Position on plane k: ``ray[i] + k ray[3 + i]``; planes that count: from ray[6] to ray[7].
    """
    f = frames[view]
    for i in range(3):
        ray[i] = f[3 + i] + u * f[6 + i] + v * f[9 + i]
        ray[3 + i] = f[i] if parallel else ray[i] - f[i]
        if not parallel:
            ray[i] = f[i]
    follow = order[0]
    for i in range(1, 3):
        if TIE * abs(ray[3 + order[i]]) > abs(ray[3 + follow]):
            follow = order[i]
    if ray[3 + follow] == 0.0:
        ray[6] = 0.0
        ray[7] = -1.0
        return follow, 0.0
    pace = 1.0 / ray[3 + follow]
    length = 0.0
    for i in range(3):
        for j in range(3):
            length += metric[i, j] * ray[3 + i] * ray[3 + j]
    at_source = ray[follow]
    ray[6] = -np.inf
    ray[7] = np.inf
    if not parallel:
        if pace > 0.0:
            ray[6] = at_source + 1e-6
        else:
            ray[7] = at_source - 1e-6
    for i in range(3):
        step = ray[3 + i] * pace
        ray[i] -= at_source * step
        ray[3 + i] = step
    return follow, math.sqrt(length) * abs(pace)


@njit(**_FAST)
def _inside(a, b, size, low, high):
    """Return the part of [low, high] where 0.01 <= a + k b <= size - 1.01."""
    if abs(b) < 1e-9:
        if 0.01 <= a <= size - 1.01:
            return low, high
        return 0.0, -1.0
    k0 = (0.01 - a) / b
    k1 = (size - 1.01 - a) / b
    return max(low, min(k0, k1)), min(high, max(k0, k1))


@njit(**_FAST)
def _sample(volume, o, x, nx, sx, y, ny, sy):
    """Interpolate linearly on one plane; zero outside."""
    i = np.int64(math.floor(x))
    j = np.int64(math.floor(y))
    f = np.float32(x - i)
    g = np.float32(y - j)
    one = np.float32(1.0)
    total = np.float32(0.0)
    if -1 <= i < nx and -1 <= j < ny:
        o += i * sx + j * sy
        if i >= 0 and j >= 0:
            total += (one - f) * (one - g) * volume[o]
        if i + 1 < nx and j >= 0:
            total += f * (one - g) * volume[o + sx]
        if i >= 0 and j + 1 < ny:
            total += (one - f) * g * volume[o + sy]
        if i + 1 < nx and j + 1 < ny:
            total += f * g * volume[o + sx + sy]
    return total


@njit(**_FAST)
def _forward_rays(view, target, v, volume, layout, frames, metric, order, parallel, cols, out):
    """Integrate along the rays of one row of any view."""
    ray = np.empty(8)
    shape, strides = layout
    for u in range(cols):
        d, length = _ray(view, v, u, frames, metric, order, parallel, ray)
        p, q = (d + 1) % 3, (d + 2) % 3
        np_, nq, sd, sp, sq = shape[p], shape[q], strides[d], strides[p], strides[q]
        a, da, b, db = ray[p], ray[3 + p], ray[q], ray[3 + q]
        k_lo, k_hi = planes_met(a, da, ray[6], ray[7], np_, shape[d])
        k_lo, k_hi = planes_met(b, db, np.float64(k_lo), k_hi - 1.0, nq, k_hi)
        first, last = _inside(a, da, np_, np.float64(k_lo), k_hi - 1.0)
        first, last = _inside(b, db, nq, first, last)
        total = np.float32(0.0)
        sums = splat(np.float32(0.0))
        k = k_lo
        while k < k_hi:
            if first <= k and k + WIDTH - 1 <= last:
                # from the cell of the lowest indices that sixteen planes reach: small numbers are exact
                x, y = a + k * da, b + k * db
                i = np.int64(math.floor(min(x, x + (WIDTH - 1) * da)))
                j = np.int64(math.floor(min(y, y + (WIDTH - 1) * db)))
                offset = k * sd + i * sp + j * sq
                xs = lanes() * np.float32(da) + np.float32(x - i)
                ys = lanes() * np.float32(db) + np.float32(y - j)
                low = np.float32(0.0)
                xs = clamp(xs, low, np.float32(WIDTH + 1))
                ys = clamp(ys, low, np.float32(WIDTH + 1))
                sums = sums + gather_bilinear(volume, offset, sd, xs, sp, ys, sq)
                k += WIDTH
            else:
                total += _sample(volume, k * sd, a + k * da, np_, sp, b + k * db, nq, sq)
                k += 1
        out[target, v, u] = (total + vsum(sums)) * np.float32(length)


@njit(**_FAST)
def _scale_columns(view, target, data, columns, rows, cols, line, scaled):
    """Write data times ray length, column by column, with a zero before and zeros after."""
    for u in range(cols):
        c = columns[view, u]
        o = (target * cols + u) * line + 1
        for v in range(rows):
            scaled[o + v] = data[target, v, u] * np.float32(math.sqrt(c[7] + v * (c[8] + v * c[9])))


@njit(**_FAST)
def _adjoint_columns(
    axis, k_first, k_last, views, separable, scaled, line, na, nb, nl, columns, rows, cols, out
):
    """Add to the planes ``k_first .. k_last - 1`` across an axis what the rays followed along it carry."""
    zero = np.float32(0.0)
    one = np.float32(1.0)
    if axis == 0:
        lateral, plane_stride, stride = nb, nb * nl, nl
    else:
        lateral, plane_stride, stride = na, nl, nb * nl
    rest = np.zeros(WIDTH, np.float32)
    for target in range(len(views)):
        view = views[target]
        if not separable[view]:
            continue
        for u in range(cols):
            c = columns[view, u]
            if c[0] != axis:
                continue
            base = (target * cols + u) * line
            low = max(c[10], np.float64(k_first))
            k_lo, k_hi = planes_met(c[1], c[2], low, c[11], lateral, k_last)
            for k in range(k_lo, k_hi):
                x = c[1] + k * c[2]
                i = np.int64(math.floor(x))
                if i < -1 or i >= lateral:
                    continue
                f = np.float32(x - i)
                top = c[3] + k * c[4]
                step = c[5] + k * c[6]
                bottom = top + (rows - 1) * step
                z0 = max(math.floor(min(top, bottom)), 0.0)
                z1 = min(math.floor(max(top, bottom)) + 1.0, nl - 1.0)
                if z0 > z1:
                    continue
                reach = 1.0 / abs(step)
                count = np.int64(min(math.ceil(2.0 * reach), rows + 1.0))
                size = np.float32(abs(step))
                o = k * plane_stride + i * stride
                spread = lanes() * np.float32(1.0 / step)
                z = np.int64(z0)
                while z <= z1:
                    # rows within one voxel of each: the first of them, and those after it
                    centre = spread + np.float32((z - top) / step)
                    v = clamp(vceil(centre - np.float32(reach)), np.float32(-1.0), np.float32(rows))
                    total = splat(zero)
                    for _ in range(count):
                        weight = keep_from(one - vabs(v - centre) * size, zero)
                        total = total + weight * gather(
                            scaled, base, clamp(v + one, zero, np.float32(rows + 1))
                        )
                        v = v + one
                    if z + WIDTH <= nl:
                        if i >= 0:
                            store(out, o + z, load(out, o + z) + total * (one - f))
                        if i + 1 < lateral:
                            store(out, o + stride + z, load(out, o + stride + z) + total * f)
                    else:
                        store(rest, 0, total)
                        for j in range(nl - z):
                            if i >= 0:
                                out[o + z + j] += rest[j] * (one - f)
                            if i + 1 < lateral:
                                out[o + stride + z + j] += rest[j] * f
                    z += WIDTH


@njit(**_FAST)
def _adjoint_rays(
    axis, k_first, k_last, views, separable, data, layout, frames, metric, order, parallel, rows, cols, out
):
    """Add to the planes ``k_first .. k_last - 1`` across an axis what rays followed along it carry."""
    ray = np.empty(8)
    shape, strides = layout
    p, q = (axis + 1) % 3, (axis + 2) % 3
    np_, nq, sd, sp, sq = shape[p], shape[q], strides[axis], strides[p], strides[q]
    one = np.float32(1.0)
    for target in range(len(views)):
        view = views[target]
        if separable[view]:
            continue
        for v in range(rows):
            for u in range(cols):
                d, length = _ray(view, v, u, frames, metric, order, parallel, ray)
                if d != axis:
                    continue
                value = data[target, v, u] * np.float32(length)
                if value == 0.0:
                    continue
                low = max(ray[6], np.float64(k_first))
                k_lo, k_hi = planes_met(ray[p], ray[3 + p], low, ray[7], np_, k_last)
                k_lo, k_hi = planes_met(ray[q], ray[3 + q], np.float64(k_lo), k_hi - 1.0, nq, k_hi)
                for k in range(k_lo, k_hi):
                    x = ray[p] + k * ray[3 + p]
                    y = ray[q] + k * ray[3 + q]
                    i = np.int64(math.floor(x))
                    j = np.int64(math.floor(y))
                    f = np.float32(x - i)
                    g = np.float32(y - j)
                    if not (-1 <= i < np_ and -1 <= j < nq):
                        continue
                    o = k * sd + i * sp + j * sq
                    if i >= 0 and j >= 0:
                        out[o] += (one - f) * (one - g) * value
                    if i + 1 < np_ and j >= 0:
                        out[o + sp] += f * (one - g) * value
                    if i >= 0 and j + 1 < nq:
                        out[o + sq] += (one - f) * g * value
                    if i + 1 < np_ and j + 1 < nq:
                        out[o + sp + sq] += f * g * value


def _lengths(rays: Rays, views: np.ndarray) -> np.ndarray:
    """Return the length of each ray of separable views between two planes, (m, V, U)."""
    n7, n8, n9 = rays.columns[views, None, :, 7:10].transpose(3, 0, 1, 2)
    v = np.arange(rays.detector_shape[0])[:, None]
    return np.asarray(np.sqrt(n7 + v * (n8 + v * n9)), np.float32)


def forward(volume: np.ndarray, rays: Rays, views: np.ndarray) -> np.ndarray:
    """Return the line integrals (m, V, U) of a volume (Z, Y, X) for some views; see the module.

    Parameters
    ----------
    volume : ndarray of float32, (Z, Y, X)
        Attenuation per unit of length of the world.
    rays : Rays
        From :func:`prepare`.
    views : ndarray of int64, (m,)
        Indices of views.
    """
    rows, cols = rays.detector_shape
    flat = np.ascontiguousarray(volume.transpose(rays.axes)).reshape(-1)
    out = np.empty((len(views), rows, cols), np.float32)
    layout = np.array([rays.shape, rays.strides])
    fast = np.flatnonzero(rays.separable[views])
    slow = np.flatnonzero(~rays.separable[views])

    def few_rows(*task: int) -> None:
        forward_rows(*task, flat, *rays.shape, rays.columns, rows, out)

    def separable(*task: int) -> None:
        _forward_columns(*task, flat, *rays.shape, rays.columns, rows, cols, out)

    def any_view(*task: int) -> None:
        _forward_rays(
            *task, flat, layout, rays.frames, rays.metric, rays.order, rays.parallel, cols, out
        )  # fmt: skip

    if rays.fans is not None:
        tasks = []
        for m in fast:
            for fan in range(*rays.fans.starts[views[m] : views[m] + 2]):
                view, axis, first, last = (int(x) for x in rays.fans.parts[fan])
                pieces = _pool.ranges(last - first, COLUMNS)
                tasks += [(view, int(m), axis, first + lo, first + hi) for lo, hi in pieces]
        _pool.run(few_rows, tasks)
        out[fast] *= _lengths(rays, views[fast])
    else:
        pieces = _pool.ranges(cols, COLUMNS)
        _pool.run(separable, [(int(views[m]), int(m), *u) for m in fast for u in pieces])
    _pool.run(any_view, [(int(views[m]), int(m), v) for m in slow for v in range(rows)])
    return out


def adjoint(data: np.ndarray, rays: Rays, views: np.ndarray) -> np.ndarray:
    """Return the volume (Z, Y, X) that the transpose of :func:`forward` makes of data (m, V, U)."""
    rows, cols = rays.detector_shape
    data = np.ascontiguousarray(data, np.float32)
    out = np.zeros(math.prod(rays.shape), np.float32)
    layout = np.array([rays.shape, rays.strides])
    views = np.ascontiguousarray(views, np.int64)

    def planes(axis: int) -> list[tuple[int, int, int]]:
        size = max(-(-rays.shape[axis] // (4 * _pool.get_threads())), 1)
        return [(axis, lo, hi) for lo, hi in _pool.ranges(rays.shape[axis], size)]

    fast = rays.separable[views]
    fans = rays.fans
    if fans is not None:
        na, nb, nl = rays.shape
        scaled = (data * _lengths(rays, views)).reshape(-1)
        # the lines that are written lie beside each other along the axis that is not followed
        turned = np.zeros((nl, nb, na), np.float32)

        def few_rows(axis: int, lo: int, hi: int) -> None:
            adjoint_rows(
                axis, lo, hi, views, fans.parts, fans.starts, fans.numbers, rays.columns, scaled,
                *rays.shape, rows, cols, (out, turned.reshape(-1))[axis],
            )  # fmt: skip

        for axis in range(2):
            _pool.run(few_rows, planes(axis))
        out.reshape(nl, na, nb)[:] += turned.transpose(0, 2, 1)
    elif fast.any():
        line = rows + 2
        scaled = np.zeros(len(views) * cols * line, np.float32)

        def scale(view: int, target: int) -> None:
            _scale_columns(view, target, data, rays.columns, rows, cols, line, scaled)

        def separable(axis: int, lo: int, hi: int) -> None:
            _adjoint_columns(
                axis, lo, hi, views, rays.separable, scaled, line, *rays.shape, rays.columns, rows, cols, out
            )

        _pool.run(scale, [(int(views[m]), int(m)) for m in np.flatnonzero(fast)])
        for axis in range(2):
            _pool.run(separable, planes(axis))
    if not fast.all():

        def any_view(axis: int, lo: int, hi: int) -> None:
            _adjoint_rays(
                axis, lo, hi, views, rays.separable, data, layout, rays.frames, rays.metric, rays.order,
                rays.parallel, rows, cols, out,
            )  # fmt: skip

        for axis in range(3):
            _pool.run(any_view, planes(axis))
    back = tuple(int(i) for i in np.argsort(rays.axes))
    memory = tuple(rays.shape[i] for i in ((2, 0, 1) if fans is not None else (0, 1, 2)))
    return np.ascontiguousarray(out.reshape(memory).transpose(back))


@njit(**_FAST)
def _backproject_planes(z_lo, z_hi, data, matrices, factors, parallel, rows, cols, depth, height, width, out):
    """Add up what the views' images show at each voxel of some planes."""
    # an image has a pixel of zeros before and two after its rows and columns
    line = cols + 3
    sums = np.zeros(width + WIDTH, np.float32)
    low = np.float32(0.0)
    for z in range(z_lo, z_hi):
        for y in range(height):
            for x in range(0, width, WIDTH):
                store(sums, x, splat(low))
            for view in range(len(matrices)):
                m = matrices[view]
                u = m[0, 0] * z + m[0, 1] * y + m[0, 3] + (m[2, 0] * z + m[2, 1] * y + m[2, 3])
                v = m[1, 0] * z + m[1, 1] * y + m[1, 3] + (m[2, 0] * z + m[2, 1] * y + m[2, 3])
                w = m[2, 0] * z + m[2, 1] * y + m[2, 3]
                du = m[0, 2] + m[2, 2]
                dv = m[1, 2] + m[2, 2]
                dw = m[2, 2]
                factor = np.float32(factors[view])
                offset = view * (rows + 3) * line
                for x in range(0, width, WIDTH):
                    us = lanes() * np.float32(du) + np.float32(u + x * du)
                    vs = lanes() * np.float32(dv) + np.float32(v + x * dv)
                    if parallel:
                        weight = splat(factor)
                    else:
                        inverse = vinverse(lanes() * np.float32(dw) + np.float32(w + x * dw))
                        us = us * inverse
                        vs = vs * inverse
                        # behind the source nothing is seen
                        inverse = keep_from(inverse, low)
                        weight = inverse * inverse * factor
                    us = clamp(us, low, np.float32(cols + 1))
                    vs = clamp(vs, low, np.float32(rows + 1))
                    seen = gather_bilinear(data, offset, 0, us, 1, vs, line)
                    store(sums, x, load(sums, x) + seen * weight)
            o = (z * height + y) * width
            for x in range(width):
                out[o + x] = sums[x]


def backproject(
    data: np.ndarray,
    matrices: np.ndarray,
    factors: np.ndarray,
    shape: tuple[int, int, int],
    parallel: bool,
    planes: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Return the sum over views of what is seen at each voxel, interpolated linearly, times a weight.

    Parameters
    ----------
    data : ndarray of float32, (n, V, U)
        Images; zero outside.
    matrices : ndarray of float64, (n, 3, 4)
        Index (z, y, x, 1) to (w u, w v, w) with the column u, the row v and the depth w.
    factors : ndarray of float64, (n,)
        Weights of the views. In cone beam the weight of a voxel is this over w squared, zero behind the source.
    shape : tuple of int
        Voxels (Z, Y, X).
    parallel : bool
        Parallel beam: w is 1.
    planes : tuple of int, optional
        First plane, and the one after the last, that are worked on; all by default.
    out : ndarray of float32, (Z, Y, X), optional
        Where to write.
    """
    n, rows, cols = data.shape
    padded = np.zeros((n, rows + 3, cols + 3), np.float32)
    padded[:, 1:-2, 1:-2] = data
    out = np.zeros(shape, np.float32) if out is None else out
    lo, hi = planes or (0, shape[0])
    matrices = np.ascontiguousarray(matrices, np.float64)
    size = max((hi - lo) // (4 * _pool.get_threads()), 1)

    def some(z_lo: int, z_hi: int) -> None:
        _backproject_planes(
            lo + z_lo, lo + z_hi, padded.reshape(-1), matrices, factors, parallel, rows, cols, *shape,
            out.reshape(-1),
        )  # fmt: skip

    _pool.run(some, _pool.ranges(hi - lo, size))
    return out
