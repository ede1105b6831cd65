"""Joseph's projector for scans of few detector rows: sixteen rays of a row, or sixteen voxels of a line, at once.

The rays of a row of a flat panel that are followed along the same axis meet each plane across it, and each line of
voxels on that plane, in places that are a quotient of two linear functions of the column. Forward reads the lines
there. Backward turns the quotient around: for each voxel it names the columns whose rays pass within one voxel, so
that a voxel gathers what its rays carry, with the weights of forward, and no number has two writers.

Axes are (a, b, line) as in :mod:`napari_innergs.cpu.project`; the volume lies in memory as (line, a, b). The views
are those whose detector columns are parallel to the lines.
"""

# Kernels are typed by numba, not by annotations.
# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from napari_innergs.cpu._gather import gather, gather_strided, vabs, vceil, vfloor, vinverse
from napari_innergs.cpu._simd import clamp, keep_from, lanes, load, minimum, splat, store, where_equal

WIDTH = 16
NUMBERS = 12  # for each fan: see _fans
# Weights below this are not looked for.
TINY = 1e-7

_FAST: dict[str, Any] = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "arcp", "nsz", "afn"},
}


@dataclass(frozen=True)
class Fans:
    """Neighbouring columns of views whose rays are followed along the same axis in the same direction.

    ``parts`` holds for each (view, axis, first column, the one after the last), in the order of views; those of
    view w are ``starts[w] .. starts[w + 1] - 1``. ``numbers`` are explained at :func:`_numbers`.
    """

    parts: np.ndarray
    starts: np.ndarray
    numbers: np.ndarray


def make_fans(frames: np.ndarray, columns: np.ndarray, separable: np.ndarray, parallel: bool) -> Fans:
    """Return the fans of the separable views; frames and columns are those of ``cpu.project``."""
    n, cols = columns.shape[:2]
    kind = columns[:, :, [0, 10, 11]]
    new = np.ones((n, cols), bool)
    new[:, 1:] = (kind[:, 1:] != kind[:, :-1]).any(2)
    new &= separable[:, None]
    view, first = np.nonzero(new)
    last = np.append(first[1:], cols)
    last[np.append(view[1:], -1) != view] = cols
    axis = columns[view, first, 0].astype(np.int64)
    return Fans(
        parts=np.stack([view, axis, first, last], 1).astype(np.int64),
        starts=np.searchsorted(view, np.arange(n + 1)).astype(np.int64),
        numbers=_numbers(frames[view].reshape(-1, 4, 3), axis, parallel),
    )


def _numbers(frames: np.ndarray, axis: np.ndarray, parallel: bool) -> np.ndarray:
    """Return twelve numbers for each fan.

    The ray of column u and row v meets plane k at ``(n0 + k n1 + u (n2 + k n3)) / (n4 + u n5)`` in the axis beside,
    and on the line at ``(n6 + k n7 + u (n8 + k n9) + v (n10 + k n11)) / (n4 + u n5)``.
    """
    each = np.arange(len(axis))
    head, corner, right, down = (
        np.stack([v[each, axis], v[each, 1 - axis], v[:, 2]], 1) for v in frames.transpose(1, 0, 2)
    )
    out = np.zeros((len(axis), NUMBERS))
    if parallel:
        pace = head[:, 1:] / head[:, :1]
        start, step = corner[:, 1:] - corner[:, :1] * pace, right[:, 1:] - right[:, :1] * pace
        out[:, 0], out[:, 1], out[:, 2] = start[:, 0], pace[:, 0], step[:, 0]
        out[:, 4] = 1.0
        out[:, 6], out[:, 7], out[:, 8] = start[:, 1], pace[:, 1], step[:, 1]
        out[:, 10] = down[:, 2]
        return out
    ray = corner - head
    across = head[:, 1:] * ray[:, :1] - head[:, :1] * ray[:, 1:]
    turn = head[:, 1:] * right[:, :1] - head[:, :1] * right[:, 1:]
    out[:, 0], out[:, 1], out[:, 2], out[:, 3] = across[:, 0], ray[:, 1], turn[:, 0], right[:, 1]
    out[:, 4], out[:, 5] = ray[:, 0], right[:, 0]
    out[:, 6], out[:, 7], out[:, 8], out[:, 9] = across[:, 1], ray[:, 2], turn[:, 1], right[:, 2]
    out[:, 10], out[:, 11] = -head[:, 0] * down[:, 2], down[:, 2]
    return out


@njit(**_FAST)
def planes_met(a, b, low, high, size, count):
    """Return the range of whole k in [low, high], [0, count) with -1 < a + k b < size, a plane too many."""
    if abs(b) > 1e-9:
        k0 = (-1.0 - a) / b
        k1 = (size - a) / b
        low = max(low, min(k0, k1))
        high = min(high, max(k0, k1))
    elif not (-1.0 < a < size):
        return np.int64(0), np.int64(0)
    low = max(low, 0.0)
    high = min(high, count - 1.0)
    if not low <= high:
        return np.int64(0), np.int64(0)
    return np.int64(math.ceil(low)), np.int64(math.floor(high)) + 1


@njit(**_FAST)
def _reached(x, y, size):
    """Return the first and the last of 0 .. size - 1 that are within one of a number from x to y."""
    low = max(math.floor(min(x, y) - 1.0 + TINY) + 1.0, 0.0)
    high = min(math.ceil(max(x, y) + 1.0 - TINY) - 1.0, size - 1.0)
    if not low <= high:
        return np.int64(0), np.int64(-1)
    return np.int64(low), np.int64(high)


@njit(**_FAST)
def forward_rows(view, target, axis, u_lo, u_hi, volume, na, nb, nl, columns, rows, out):
    """Sum the volume along the rays of some columns of a fan."""
    if axis == 0:
        planes, lateral, plane_stride, stride = na, nb, nb, np.int64(1)
    else:
        planes, lateral, plane_stride, stride = nb, na, np.int64(1), nb
    zero = np.float32(0.0)
    one = np.float32(1.0)
    values = np.zeros(nl * WIDTH, np.float32)
    totals = np.zeros(rows * WIDTH, np.float32)
    # how the lanes' numbers differ from those of the first
    tables = np.zeros(6 * WIDTH, np.float32)
    for start in range(u_lo, u_hi, WIDTH):
        count = min(WIDTH, u_hi - start)
        k_lo, k_hi = planes, np.int64(0)
        for j in range(count):
            c = columns[view, start + j]
            lo, hi = planes_met(c[1], c[2], c[10], c[11], lateral, planes)
            if lo < hi:
                k_lo, k_hi = min(k_lo, lo), max(k_hi, hi)
        c = columns[view, start]
        e = columns[view, start + count - 1]
        middle = np.float64((k_lo + k_hi) // 2)
        for j in range(WIDTH):
            d = columns[view, start + min(j, count - 1)]
            tables[j] = (d[1] + middle * d[2]) - (c[1] + middle * c[2])
            tables[WIDTH + j] = d[2] - c[2]
            tables[2 * WIDTH + j] = (d[3] + middle * d[4]) - (c[3] + middle * c[4])
            tables[3 * WIDTH + j] = d[4] - c[4]
            tables[4 * WIDTH + j] = d[5] + middle * d[6]
            tables[5 * WIDTH + j] = d[6]
        for v in range(rows):
            store(totals, v * WIDTH, splat(zero))
        for k in range(k_lo, k_hi):
            off = np.float32(k - middle)
            x = c[1] + k * c[2]
            base = np.int64(math.floor(x))
            xs = load(tables, 0) + load(tables, WIDTH) * off + np.float32(x - base)
            first = vfloor(xs)
            part = xs - first
            low, high = np.float32(-base), np.float32(lateral - 1 - base)
            left = clamp(first, low, high)
            right = clamp(first + one, low, high)
            share_left = where_equal(left, first, one - part)
            share_right = where_equal(right, first + one, part)
            top, step = c[3] + k * c[4], c[5] + k * c[6]
            end_top, end_step = e[3] + k * e[4], e[5] + k * e[6]
            ground = math.floor(top)
            tops = load(tables, 2 * WIDTH) + load(tables, 3 * WIDTH) * off + np.float32(top - ground)
            steps = load(tables, 4 * WIDTH) + load(tables, 5 * WIDTH) * off
            done = np.int64(-1)
            for n in range(rows):
                v = n if step >= 0.0 else rows - 1 - n  # from the lowest line to the highest
                lo, hi = _reached(top + v * step, end_top + v * end_step, nl)
                zs = tops + steps * np.float32(v)
                total = load(totals, v * WIDTH)
                for z in range(lo, hi + 1):
                    if z > done:
                        o = z * (na * nb) + k * plane_stride + base * stride
                        value = share_left * gather_strided(volume, o, left, stride)
                        value = value + share_right * gather_strided(volume, o, right, stride)
                        store(values, z * WIDTH, value)
                        done = z
                    weight = keep_from(one - vabs(zs - np.float32(z - ground)), zero)
                    total = total + weight * load(values, z * WIDTH)
                store(totals, v * WIDTH, total)
        for v in range(rows):
            for j in range(count):
                out[target, v, start + j] = totals[v * WIDTH + j]


@njit(**_FAST)
def adjoint_rows(
    axis, k_first, k_last, views, parts, starts, numbers, columns, data, na, nb, nl, rows, cols, out
):
    """Add to the planes ``k_first .. k_last - 1`` across an axis what the rays of the fans along it carry.

    ``out`` lies in memory as (line, plane, lateral).
    """
    planes, lateral = (na, nb) if axis == 0 else (nb, na)
    zero = np.float32(0.0)
    one = np.float32(1.0)
    sums = np.zeros(nl * WIDTH, np.float32)
    line_lo = np.zeros(rows, np.int64)
    line_hi = np.zeros(rows, np.int64)
    for target in range(len(views)):
        view = views[target]
        for one_fan in range(starts[view], starts[view + 1]):
            if parts[one_fan, 1] != axis:
                continue
            u0, u1 = parts[one_fan, 2], parts[one_fan, 3]
            c, e, f = columns[view, u0], columns[view, u1 - 1], numbers[one_fan]
            k_lo = np.int64(math.ceil(max(c[10], np.float64(k_first))))
            k_hi = np.int64(math.floor(min(c[11], k_last - 1.0))) + 1
            for k in range(k_lo, k_hi):
                i_lo, i_hi = _reached(c[1] + k * c[2], e[1] + k * e[2], lateral)
                step_x = f[2] + k * f[3]
                for i in range(i_lo, i_hi + 1, WIDTH):
                    last = min(np.int64(WIDTH - 1), i_hi - i)
                    # from the column whose ray is next to the first voxel: small numbers are exact
                    a, b = f[0] + k * f[1] - i * f[4], step_x - i * f[5]
                    near = u0
                    if b != 0.0:
                        near = np.int64(min(max(math.floor(-a / b), np.float64(u0)), u1 - 1.0))
                    scale = 1.0 / (f[4] + near * f[5])
                    a, b, bend = (a + near * b) * scale, b * scale, f[5] * scale
                    first, final = np.float64(u0 - near), np.float64(u1 - 1 - near)
                    # voxel l is met by column near - (a - l) / (b - l bend)
                    b0, b1 = b + bend, b - (last + 1) * bend
                    regular = b0 * b1 > 0.0 and min(abs(b0), abs(b1)) > 1e-6
                    side = 1.0 if b0 > 0.0 else -1.0
                    count = u1 - u0
                    low, high = first, final
                    if regular:
                        w0, w1 = (-1.0 - a) / b0, (1.0 - a) / (b - bend)
                        w2, w3 = (last - 1.0 - a) / (b - (last - 1) * bend), (last + 1.0 - a) / b1
                        most = math.ceil(max(abs(w1 - w0), abs(w3 - w2)))
                        count = np.int64(min(np.float64(count), most))
                        low = min(max(math.ceil(min(w0, w3)), first), final)
                        high = max(min(math.floor(max(w0, w3)), final), first)
                    top = (f[6] + k * f[7] + near * (f[8] + k * f[9])) * scale
                    drift = (f[8] + k * f[9]) * scale
                    step = (f[10] + k * f[11]) * scale
                    ground = math.floor(top)
                    z_lo, z_hi = nl, np.int64(-1)
                    for v in range(rows):
                        line_lo[v], line_hi[v] = _reached(
                            (top + v * step + low * drift) / (1.0 + low * bend),
                            (top + v * step + high * drift) / (1.0 + high * bend),
                            nl,
                        )
                        if line_lo[v] <= line_hi[v]:
                            z_lo, z_hi = min(z_lo, line_lo[v]), max(z_hi, line_hi[v])
                    if z_lo > z_hi:
                        continue
                    for z in range(z_lo, z_hi + 1):
                        store(sums, z * WIDTH, splat(zero))
                    lane = minimum(lanes(), np.float32(last))
                    offset = np.float32(a) - lane
                    slope = np.float32(b) - lane * np.float32(bend)
                    u = splat(np.float32(first))
                    if regular:
                        up = np.float32(side)
                        u = (np.float32(0.0) - up - offset) * vinverse(slope + np.float32(side * bend))
                        u = clamp(vceil(u), np.float32(first), np.float32(final + 1.0))
                    for _ in range(count):
                        inside = clamp(u, np.float32(first), np.float32(final))
                        inverse = vinverse(one + inside * np.float32(bend))
                        share = keep_from(one - vabs((offset + inside * slope) * inverse), zero)
                        share = where_equal(inside, u, share)
                        rise = inside * np.float32(drift - ground * bend)
                        for v in range(rows):
                            if line_lo[v] > line_hi[v]:
                                continue
                            o = (target * rows + v) * cols + near
                            value = share * gather(data, o, inside)
                            zs = (rise + np.float32(top - ground + v * step)) * inverse
                            for z in range(line_lo[v], line_hi[v] + 1):
                                weight = keep_from(one - vabs(zs - np.float32(z - ground)), zero)
                                store(sums, z * WIDTH, load(sums, z * WIDTH) + weight * value)
                        u = u + one
                    for z in range(z_lo, z_hi + 1):
                        o = (z * planes + k) * lateral + i
                        if last == WIDTH - 1:
                            store(out, o, load(out, o) + load(sums, z * WIDTH))
                        else:
                            for j in range(last + 1):
                                out[o + j] += sums[z * WIDTH + j]
