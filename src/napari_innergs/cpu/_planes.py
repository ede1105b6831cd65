"""Sums of 3D Gaussians on parallel planes, and their adjoint: the kernels behind slices and voxels.

A Gaussian with mean m and covariance S, cut by the plane at ``t``, is a 2D Gaussian (Schur complement): its
centre moves by ``S_un / S_nn`` for each unit of ``t`` and its peak is ``exp(-(t - m_n)^2 / (2 S_nn))``.
Sixteen columns are worked on at once. Down the rows the exponent is quadratic, so the value needs no ``exp``:
``E *= R; R *= Q`` with the constant ``Q = exp(-P_rr)``. Two rules keep this sound in float32: a Gaussian is
stepped only if its correlation is small enough for every value in its bounding box to be a normal number, and
stepping starts afresh every ``ANCHOR`` rows. The others (thin and oblique) take one ``exp`` for each pixel,
over the narrow span that each row needs.

The loops over rows count in memory offsets: LLVM then leaves them alone instead of unrolling them, which
costs more than it gains for the ten rows of a typical Gaussian.

Backward gathers, for one Gaussian after the other, ten moments of the weights about its mean (0: sum w, 1-3:
sum w d, 4-9: sum w d d^T), from which all gradients follow: dm = P sum w d and dS = P (sum w d d^T) P / 2.
One writer for each number, so no atomics, and the same bits every time.
"""

# Kernels are typed by numba, not by annotations.
# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated"

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from napari_innergs._constants import MIN_PIVOT, VARIANCE_RANGE
from napari_innergs.cpu import _pool
from napari_innergs.cpu._simd import (
    at,
    ceil_index,
    channel_add,
    channel_dot,
    channel_store_sums,
    channel_values,
    channel_zeros,
    clamp,
    floor_index,
    keep_from,
    lanes,
    load,
    minimum,
    put,
    splat,
    store,
    vexp,
    vexp_minus,
    vexp_minus_half,
    vsum,
    where_equal,
)

WIDTH = 16  # lanes
FIELDS = 16  # float32 in a record: one cache line
ANCHOR = 16  # rows between two direct evaluations
LOWEST = 80.0  # exp(-LOWEST) is a normal float32 with some room below it: unchecked exp may be used
SCRATCH = 3 << 19  # bytes of partial sums in a cell: about a second-level cache
GROUP = 6  # channels handled at once; more are split, since their sums would no longer fit in registers
SMALLEST, LARGEST = VARIANCE_RANGE
CHUNK = 1024  # Gaussians in a task

_EXACT: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
_FAST = {**_EXACT, "fastmath": {"contract", "arcp", "nsz", "afn"}}


@njit(**_EXACT)
def _prepare(start, stop, means, covs, t, height, width, cut, records, first, last, top, bottom):
    """Write the record and the range of planes and rows of each Gaussian.

    One that is unusable or out of sight gets an empty range of planes.

    Record: mean (t, row, col); shear (row, col) for each unit of t; 1 / S_tt; in-plane precision (cc, cr,
    rr); reach in columns and rows for each unit of Mahalanobis radius; Q, or -1 if it must not be stepped;
    first plane and the one after the last.
    """
    for i in range(start, stop):
        tt, tr, tc = float(covs[i, 0]), float(covs[i, 1]), float(covs[i, 2])
        rr, rc, cc = float(covs[i, 3]), float(covs[i, 4]), float(covs[i, 5])
        mt = float(means[i, 0])
        first[i] = 0
        last[i] = 0
        total = tt + tr + tc + rr + rc + cc + mt + float(means[i, 1]) + float(means[i, 2])
        if not (math.isfinite(total) and min(tt, rr, cc) > SMALLEST and max(tt, rr, cc) < LARGEST):
            continue
        kr = tr / tt
        kc = tc / tt
        crr = rr - kr * tr
        crc = rc - kr * tc
        ccc = cc - kc * tc
        det = crr * ccc - crc * crc
        if not (crr > MIN_PIVOT * rr and det > MIN_PIVOT * crr * cc):
            continue
        reach = math.sqrt(cut * tt)
        lo = np.searchsorted(t, np.float32(mt - reach))
        hi = np.searchsorted(t, np.float32(mt + reach), side="right")
        reach = math.sqrt(cut * rr)
        above, below = float(means[i, 1]) - reach, float(means[i, 1]) + reach
        reach = math.sqrt(cut * cc)
        left, right = float(means[i, 2]) - reach, float(means[i, 2]) + reach
        if lo >= hi or below < 0.0 or above > height - 1.0 or right < 0.0 or left > width - 1.0:
            continue
        first[i] = lo
        last[i] = hi
        # A row more on either side: the kernels round differently.
        top[i] = int(max(above - 1.0, 0.0))
        bottom[i] = int(min(below + 2.0, float(height)))
        prr = ccc / det
        records[i, 0] = means[i, 0]
        records[i, 1] = means[i, 1]
        records[i, 2] = means[i, 2]
        records[i, 3] = kr
        records[i, 4] = kc
        records[i, 5] = 1.0 / tt
        records[i, 6] = crr / det
        records[i, 7] = -crc / det
        records[i, 8] = prr
        records[i, 9] = math.sqrt(ccc)
        records[i, 10] = math.sqrt(crr)
        # At the corner of the bounding box the squared Mahalanobis distance is 2 cut / (1 - correlation).
        correlation = abs(crc) / math.sqrt(crr * ccc)
        records[i, 11] = math.exp(-prr) if cut <= LOWEST * (1.0 - correlation) else -1.0
        records[i, 12] = lo  # exact: there are fewer than 2**24 planes
        records[i, 13] = hi
        records[i, 14] = 0.0
        records[i, 15] = 0.0


@njit(**_EXACT)
def _count(start, stop, first, last, top, bottom, slab, band, bands, counts):
    for i in range(start, stop):
        if last[i] > first[i]:
            for s in range(first[i] // slab, (last[i] - 1) // slab + 1):
                for b in range(top[i] // band, (bottom[i] - 1) // band + 1):
                    counts[s * bands + b] += 1


@njit(**_EXACT)
def _fill(start, stop, first, last, top, bottom, slab, band, bands, cursor, members):
    for i in range(start, stop):
        if last[i] > first[i]:
            for s in range(first[i] // slab, (last[i] - 1) // slab + 1):
                for b in range(top[i] // band, (bottom[i] - 1) // band + 1):
                    members[cursor[s * bands + b]] = i
                    cursor[s * bands + b] += 1


@njit(**_FAST)
def _forward(
    channels, records, amps, t, members, lo, hi, k_lo, k_hi, y_lo, y_hi, width, cut, threshold,
    scratch, line, out, channel_offset, plane_stride, channel_stride,
):  # fmt: skip
    """Sum the Gaussians of one cell, a few planes by a band of rows, and write it to ``out``.

    The sums are collected in ``scratch``, which stays in the cache: (plane, row, channel, column) with
    ``line`` columns, sixteen more than are needed, so that a block may stick out.
    """
    row_stride = len(channels) * line
    for o in range(0, (k_hi - k_lo) * (y_hi - y_lo) * row_stride, WIDTH):
        store(scratch, o, splat(np.float32(0.0)))
    half = np.float32(0.5)
    one = np.float32(1.0)
    for j in range(lo, hi):
        i = np.int64(at(members, j))
        p = i * FIELDS
        mt = at(records, p)
        my = at(records, p + 1)
        mx = at(records, p + 2)
        ky = at(records, p + 3)
        kx = at(records, p + 4)
        it = at(records, p + 5)
        a = at(records, p + 6)
        b = at(records, p + 7)
        c = at(records, p + 8)
        hx = at(records, p + 9)
        hy = at(records, p + 10)
        step = at(records, p + 11)
        amp = channel_values(channels, amps, i * len(channels))
        k_first = max(k_lo, np.int64(at(records, p + 12)))
        for k in range(k_first, min(k_hi, np.int64(at(records, p + 13)))):
            dt = at(t, k) - mt
            q = dt * dt * it
            r2 = cut - q
            if r2 <= np.float32(0.0):
                continue
            r = math.sqrt(r2)
            cx = mx + kx * dt
            cy = my + ky * dt
            # Limits are applied as floats: a huge Gaussian would overflow an integer.
            y0 = ceil_index(max(cy - r * hy, np.float32(y_lo)))
            y1 = floor_index(min(cy + r * hy, np.float32(y_hi - 1)))
            x0 = ceil_index(max(cx - r * hx, np.float32(0)))
            x1 = floor_index(min(cx + r * hx, np.float32(width - 1)))
            if y0 > y1 or x0 > x1:
                continue
            base = ((k - k_lo) * (y_hi - y_lo) - y_lo) * row_stride
            if step >= np.float32(0.0):
                xb = x0
                while xb <= x1:
                    # The last column by the same sums as its lane, or rounding would drop it.
                    left = np.float32(xb) - cx
                    d = lanes() + left
                    dx = minimum(d, left + np.float32(x1 - xb))
                    yb = y0
                    while yb <= y1:
                        dy = np.float32(yb) - cy
                        e = vexp_minus_half(dx * (dx * a + np.float32(2.0) * b * dy) + (c * dy * dy + q))
                        e = where_equal(d, dx, e)
                        rate = vexp_minus(dx * b + c * (dy + half))
                        o = base + yb * row_stride + xb
                        end = o + (min(yb + ANCHOR - 1, y1) - yb) * row_stride
                        while o <= end:
                            channel_add(scratch, o, line, amp, keep_from(e, threshold))
                            e = e * rate
                            rate = rate * step
                            o += row_stride
                        yb += ANCHOR
                    xb += WIDTH
            else:
                slope = b / a
                ia = one / a
                icrr = one / (hy * hy)
                for y in range(y0, y1 + 1):
                    dy = np.float32(y) - cy
                    qy = dy * dy * icrr
                    w2 = r2 - qy
                    if w2 < np.float32(0.0):
                        continue
                    w = math.sqrt(w2 * ia)
                    ox = cx - slope * dy
                    x1 = floor_index(min(ox + w, np.float32(width - 1)))
                    xb = ceil_index(max(ox - w, np.float32(0)))
                    while xb <= x1:
                        left = np.float32(xb) - ox
                        d = lanes() + left
                        dx = minimum(d, left + np.float32(x1 - xb))
                        e = where_equal(d, dx, vexp((dx * dx * a + (q + qy)) * -half))
                        channel_add(scratch, base + y * row_stride + xb, line, amp, keep_from(e, threshold))
                        xb += WIDTH
    full = width // WIDTH * WIDTH
    i = np.int64(0)
    for k in range(k_lo, k_hi):
        for y in range(y_lo, y_hi):
            for channel in range(len(channels)):
                o = k * plane_stride + (channel_offset + channel) * channel_stride + y * width
                for x in range(0, full, WIDTH):
                    store(out, o + x, load(scratch, i + x))
                for x in range(full, width):
                    put(out, o + x, at(scratch, i + x))
                i += line


@njit(**_FAST)
def _backward(
    channels, start, stop, records, first, last, amps, t, height, width, cut, threshold,
    grad, plane_stride, channel_stride, row_stride, moments, d_amps,
):  # fmt: skip
    half = np.float32(0.5)
    one = np.float32(1.0)
    zero = splat(np.float32(0.0))
    for i in range(start, stop):
        p = i * FIELDS
        mt = at(records, p)
        my = at(records, p + 1)
        mx = at(records, p + 2)
        ky = at(records, p + 3)
        kx = at(records, p + 4)
        it = at(records, p + 5)
        a = at(records, p + 6)
        b = at(records, p + 7)
        c = at(records, p + 8)
        hx = at(records, p + 9)
        hy = at(records, p + 10)
        step = at(records, p + 11)
        amp = channel_values(channels, amps, i * len(channels))
        totals = channel_zeros(channels)
        m0 = zero
        mt_ = zero
        my_ = zero
        mx_ = zero
        mtt = zero
        mty = zero
        mtx = zero
        myy = zero
        myx = zero
        mxx = zero
        for k in range(np.int64(at(first, i)), np.int64(at(last, i))):
            dt = at(t, k) - mt
            q = dt * dt * it
            r2 = cut - q
            if r2 <= np.float32(0.0):
                continue
            r = math.sqrt(r2)
            ux = kx * dt
            uy = ky * dt
            cx = mx + ux
            cy = my + uy
            y0 = ceil_index(max(cy - r * hy, np.float32(0)))
            y1 = floor_index(min(cy + r * hy, np.float32(height - 1)))
            x0 = ceil_index(max(cx - r * hx, np.float32(0)))
            x1 = floor_index(min(cx + r * hx, np.float32(width - 1)))
            if y0 > y1 or x0 > x1:
                continue
            base = k * plane_stride
            if step >= np.float32(0.0):
                xb = x0
                while xb <= x1:
                    xs = min(xb, width - WIDTH)
                    left = np.float32(xs) - cx
                    d = lanes() + left
                    dx = clamp(d, left + np.float32(xb - xs), left + np.float32(x1 - xs))
                    s0 = zero
                    s1 = zero
                    s2 = zero
                    yb = y0
                    while yb <= y1:
                        dy = np.float32(yb) - cy
                        e = vexp_minus_half(dx * (dx * a + np.float32(2.0) * b * dy) + (c * dy * dy + q))
                        e = where_equal(d, dx, e)
                        rate = vexp_minus(dx * b + c * (dy + half))
                        o = base + yb * row_stride + xs
                        y = dy + uy
                        end = o + (min(yb + ANCHOR - 1, y1) - yb) * row_stride
                        while o <= end:
                            w, totals = channel_dot(
                                grad, o, channel_stride, amp, keep_from(e, threshold), totals
                            )
                            s0 = s0 + w
                            wy = w * y
                            s1 = s1 + wy
                            s2 = s2 + wy * y
                            e = e * rate
                            rate = rate * step
                            o += row_stride
                            y += one
                        yb += ANCHOR
                    x = d + ux
                    wx = s0 * x
                    m0 = m0 + s0
                    mx_ = mx_ + wx
                    my_ = my_ + s1
                    mt_ = mt_ + s0 * dt
                    mxx = mxx + wx * x
                    myx = myx + s1 * x
                    mtx = mtx + wx * dt
                    myy = myy + s2
                    mty = mty + s1 * dt
                    mtt = mtt + s0 * (dt * dt)
                    xb += WIDTH
            else:
                slope = b / a
                ia = one / a
                icrr = one / (hy * hy)
                for row in range(y0, y1 + 1):
                    dy = np.float32(row) - cy
                    qy = dy * dy * icrr
                    w2 = r2 - qy
                    if w2 < np.float32(0.0):
                        continue
                    reach = math.sqrt(w2 * ia)
                    ox = cx - slope * dy
                    x1 = floor_index(min(ox + reach, np.float32(width - 1)))
                    y = dy + uy
                    xb = ceil_index(max(ox - reach, np.float32(0)))
                    while xb <= x1:
                        xs = min(xb, width - WIDTH)
                        left = np.float32(xs) - ox
                        d = lanes() + left
                        dx = clamp(d, left + np.float32(xb - xs), left + np.float32(x1 - xs))
                        e = where_equal(d, dx, vexp((dx * dx * a + (q + qy)) * -half))
                        w, totals = channel_dot(
                            grad,
                            base + row * row_stride + xs,
                            channel_stride,
                            amp,
                            keep_from(e, threshold),
                            totals,
                        )
                        x = d + (ox - mx)
                        wx = w * x
                        wy = w * y
                        m0 = m0 + w
                        mx_ = mx_ + wx
                        my_ = my_ + wy
                        mt_ = mt_ + w * dt
                        mxx = mxx + wx * x
                        myx = myx + wx * y
                        mtx = mtx + wx * dt
                        myy = myy + wy * y
                        mty = mty + wy * dt
                        mtt = mtt + w * (dt * dt)
                        xb += WIDTH
        scale = one
        total = vsum(m0)
        if len(channels) == 1:
            scale = at(amps, i)
            put(d_amps, i, total)
        else:
            channel_store_sums(d_amps, i * len(channels), totals)
        o = i * 10
        put(moments, o, total * scale)
        put(moments, o + 1, vsum(mt_) * scale)
        put(moments, o + 2, vsum(my_) * scale)
        put(moments, o + 3, vsum(mx_) * scale)
        put(moments, o + 4, vsum(mtt) * scale)
        put(moments, o + 5, vsum(mty) * scale)
        put(moments, o + 6, vsum(mtx) * scale)
        put(moments, o + 7, vsum(myy) * scale)
        put(moments, o + 8, vsum(myx) * scale)
        put(moments, o + 9, vsum(mxx) * scale)


@njit(**_EXACT)
def _chain(start, stop, first, last, covs, moments, d_means, d_covs):
    """Turn moments into gradients: dm = P v, dS = P M P / 2; off-diagonal entries count both places."""
    for i in range(start, stop):
        if last[i] <= first[i]:
            for n in range(3):
                d_means[i, n] = 0.0
            for n in range(6):
                d_covs[i, n] = 0.0
            continue
        tt, tr, tc = float(covs[i, 0]), float(covs[i, 1]), float(covs[i, 2])
        rr, rc, cc = float(covs[i, 3]), float(covs[i, 4]), float(covs[i, 5])
        # Solve with the same factors as _prepare: u = (t, r - kr t, c - kc t) has a block-diagonal
        # covariance.
        kr = tr / tt
        kc = tc / tt
        crr = rr - kr * tr
        crc = rc - kr * tc
        ccc = cc - kc * tc
        idet = 1.0 / (crr * ccc - crc * crc)
        prr = ccc * idet
        prc = -crc * idet
        pcc = crr * idet
        ptr = -(kr * prr + kc * prc)
        ptc = -(kr * prc + kc * pcc)
        ptt = 1.0 / tt - kr * ptr - kc * ptc
        vt, vr, vc = float(moments[i, 1]), float(moments[i, 2]), float(moments[i, 3])
        mtt, mtr, mtc = float(moments[i, 4]), float(moments[i, 5]), float(moments[i, 6])
        mrr, mrc, mcc = float(moments[i, 7]), float(moments[i, 8]), float(moments[i, 9])
        d_means[i, 0] = ptt * vt + ptr * vr + ptc * vc
        d_means[i, 1] = ptr * vt + prr * vr + prc * vc
        d_means[i, 2] = ptc * vt + prc * vr + pcc * vc
        # X = M P, then P X.
        xtt = mtt * ptt + mtr * ptr + mtc * ptc
        xtr = mtt * ptr + mtr * prr + mtc * prc
        xtc = mtt * ptc + mtr * prc + mtc * pcc
        xrt = mtr * ptt + mrr * ptr + mrc * ptc
        xrr = mtr * ptr + mrr * prr + mrc * prc
        xrc = mtr * ptc + mrr * prc + mrc * pcc
        xct = mtc * ptt + mrc * ptr + mcc * ptc
        xcr = mtc * ptr + mrc * prr + mcc * prc
        xcc = mtc * ptc + mrc * prc + mcc * pcc
        d_covs[i, 0] = 0.5 * (ptt * xtt + ptr * xrt + ptc * xct)
        d_covs[i, 1] = ptt * xtr + ptr * xrr + ptc * xcr
        d_covs[i, 2] = ptt * xtc + ptr * xrc + ptc * xcc
        d_covs[i, 3] = 0.5 * (ptr * xtr + prr * xrr + prc * xcr)
        d_covs[i, 4] = ptr * xtc + prr * xrc + prc * xcc
        d_covs[i, 5] = 0.5 * (ptc * xtc + prc * xrc + pcc * xcc)


@dataclass(frozen=True)
class Prepared:
    """Gaussians made ready for the kernels; what backward needs from forward."""

    covs: np.ndarray
    amps: np.ndarray
    t: np.ndarray
    height: int
    width: int
    cut: float
    records: np.ndarray
    first: np.ndarray  # planes
    last: np.ndarray
    top: np.ndarray  # rows
    bottom: np.ndarray


def prepare(
    means: np.ndarray, covs: np.ndarray, amps: np.ndarray, t: np.ndarray, height: int, width: int, cut: float
) -> Prepared:
    """Invert the covariances and find the planes and rows that each Gaussian meets."""
    n = len(means)
    records = np.empty((n, FIELDS), np.float32)
    ranges = [np.empty(n, np.int32) for _ in range(4)]
    shared = (means, covs, t, height, width, float(cut), records, *ranges)
    _pool.run(_prepare, [(*r, *shared) for r in _pool.ranges(n, 8 * CHUNK)])
    return Prepared(covs, amps, t, height, width, float(cut), records, *ranges)


@dataclass(frozen=True)
class Cells:
    """The planes and rows cut into cells, and the Gaussians that touch each."""

    slab: int  # planes in a cell
    band: int  # rows in a cell
    bands: int
    line: int  # columns of the scratch memory
    offsets: np.ndarray  # int64
    members: np.ndarray  # int32


def make_cells(prepared: Prepared, slab: int) -> Cells:
    """Choose cells of at most ``slab`` planes that fit in the cache, and list the Gaussians of each.

    The choice does not depend on the number of threads, so neither does the last bit of the result.
    """
    planes, height = len(prepared.t), prepared.height
    line = -(-prepared.width // WIDTH) * WIDTH + WIDTH
    row_bytes = 4 * line * min(prepared.amps.shape[1], GROUP)
    while slab > 2 and slab * height * row_bytes > SCRATCH:
        slab //= 2
    slabs = max(-(-planes // slab), 1)
    # Some thirty cells at least, so that every thread has something to do.
    band = min(height, max(32, min(SCRATCH // (slab * row_bytes), -(-height // -(-32 // slabs)))))
    bands = -(-height // band)
    pieces = _pool.ranges(len(prepared.first), 16 * CHUNK)
    counts = np.zeros((len(pieces), slabs * bands), np.int64)
    shared = (prepared.first, prepared.last, prepared.top, prepared.bottom, slab, band, bands)
    _pool.run(_count, [(*r, *shared, counts[i]) for i, r in enumerate(pieces)])
    offsets = np.zeros(slabs * bands + 1, np.int64)
    np.cumsum(counts.sum(0), out=offsets[1:])
    # Each piece of Gaussians writes behind the pieces before it, whichever thread has it.
    cursor = offsets[:-1] + np.cumsum(counts, 0) - counts
    members = np.empty(int(offsets[-1]), np.int32)
    _pool.run(_fill, [(*r, *shared, cursor[i], members) for i, r in enumerate(pieces)])
    return Cells(slab, band, bands, line, offsets, members)


_local = threading.local()


def _scratch(size: int) -> np.ndarray:
    """Return memory of this thread's own, kept from call to call."""
    memory = getattr(_local, "memory", None)
    if memory is None or memory.size < size:
        memory = _local.memory = np.empty(size, np.float32)
    return memory


def _channel_groups(count: int) -> list[tuple[int, int]]:
    """Split channels into groups of nearly equal size that the kernels can hold in registers."""
    pieces = -(-count // GROUP)
    edges = [count * i // pieces for i in range(pieces + 1)] if pieces else [0]
    return list(itertools.pairwise(edges))


def _threshold(cut: float) -> np.float32:
    return np.float32(math.exp(-0.5 * cut))


def _strides(shape: tuple[int, ...], channel_axis: int) -> tuple[int, int]:
    """Return how far apart planes and channels lie in (planes, C, H, W) or, axis 0, (C, planes, H, W)."""
    pixels = shape[2] * shape[3]
    return (pixels * shape[1], pixels) if channel_axis == 1 else (pixels, pixels * shape[1])


def forward_kernel(prepared: Prepared, cells: Cells, out: np.ndarray, channel_axis: int) -> None:
    """Write the sums of all Gaussians to ``out``: (planes, C, H, W) or, axis 0, (C, planes, H, W)."""
    planes, height = len(prepared.t), prepared.height
    offsets, slab, band = cells.offsets, cells.slab, cells.band
    tasks = []
    for c0, c1 in _channel_groups(prepared.amps.shape[1]):
        amps = np.ascontiguousarray(prepared.amps[:, c0:c1]).reshape(-1)
        head = (
            (0,) * (c1 - c0),
            prepared.records.reshape(-1),
            amps,
            prepared.t,
        )
        tail = (prepared.width, np.float32(prepared.cut), _threshold(prepared.cut))
        target = (cells.line, out.reshape(-1), c0, *_strides(out.shape, channel_axis))
        for i in range(len(offsets) - 1):
            k, y = i // cells.bands * slab, i % cells.bands * band
            box = (k, min(k + slab, planes), y, min(y + band, height))
            tasks.append((*head, cells.members, int(offsets[i]), int(offsets[i + 1]), *box, *tail, *target))

    def task(*arguments: Any) -> None:
        size = slab * band * len(arguments[0]) * cells.line
        _forward(*arguments[:14], _scratch(size), *arguments[14:])

    # The longest first, so that no thread is left alone with one at the end.
    tasks.sort(key=lambda arguments: arguments[5] - arguments[6])
    if planes:
        _pool.run(task, tasks)


def backward_kernel(
    prepared: Prepared,
    grad: np.ndarray,
    channel_axis: int,
    width: int,
    moments: np.ndarray,
    d_amps: np.ndarray,
) -> None:
    """Gather the ten moments of each Gaussian and the gradient of its amplitudes."""
    n, height, row = len(prepared.first), grad.shape[2], grad.shape[3]
    plane_stride, channel_stride = _strides(grad.shape, channel_axis)
    threshold = _threshold(prepared.cut)
    flat = grad.reshape(-1)
    groups = _channel_groups(prepared.amps.shape[1])
    for c0, c1 in groups:
        amps = np.ascontiguousarray(prepared.amps[:, c0:c1]).reshape(-1)
        part = moments if len(groups) == 1 else np.empty_like(moments)
        d_part = d_amps if len(groups) == 1 else np.empty((n, c1 - c0), np.float32)
        shared = (
            prepared.records.reshape(-1), prepared.first, prepared.last, amps, prepared.t, height, width,
            np.float32(prepared.cut), threshold, flat[c0 * channel_stride :], plane_stride, channel_stride,
            row, part.reshape(-1), d_part.reshape(-1),
        )  # fmt: skip
        _pool.run(_backward, [((0,) * (c1 - c0), *r, *shared) for r in _pool.ranges(n, CHUNK)])
        if len(groups) > 1:
            moments[...] = part if c0 == 0 else moments + part
            d_amps[:, c0:c1] = d_part


def chain(prepared: Prepared, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of means and covariances from the moments."""
    n = len(prepared.first)
    d_means = np.empty((n, 3), np.float32)
    d_covs = np.empty((n, 6), np.float32)
    shared = (prepared.first, prepared.last, prepared.covs, moments, d_means, d_covs)
    _pool.run(_chain, [(*r, *shared) for r in _pool.ranges(n, 8 * CHUNK)])
    return d_means, d_covs


def forward(prepared: Prepared, channel_axis: int, slab: int) -> np.ndarray:
    """Return the sums of all Gaussians on the planes, as (planes, C, H, W) or (C, planes, H, W)."""
    planes, channels = len(prepared.t), prepared.amps.shape[1]
    lead = (planes, channels) if channel_axis == 1 else (channels, planes)
    out = np.empty((*lead, prepared.height, prepared.width), np.float32)
    forward_kernel(prepared, make_cells(prepared, slab), out, channel_axis)
    return out


def backward(
    prepared: Prepared, grad: np.ndarray, channel_axis: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of means, covariances and amplitudes."""
    narrow = WIDTH - grad.shape[3]
    if narrow > 0:
        grad = np.pad(grad, ((0, 0), (0, 0), (0, 0), (0, narrow)))
    moments = np.empty((len(prepared.first), 10), np.float32)
    d_amps = np.empty_like(prepared.amps)
    backward_kernel(prepared, grad, channel_axis, grad.shape[3], moments, d_amps)
    d_means, d_covs = chain(prepared, moments)
    return d_means, d_covs, d_amps
