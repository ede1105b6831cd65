"""Line integrals of Gaussians onto flat panels on the CPU.

For one view a Gaussian is ``a r^(-1/2) exp(-q / 2)`` with ``q = (x, y) K (x, y)^T / r`` and ``r = 1 + 2 g.(x, y) +
(x, y) H (x, y)^T``, where (x, y) is the offset from its projected mean: eleven numbers, made in float64. The
support ``q <= cut`` is an ellipse too, ``K - cut H`` about a centre of its own.

Sixteen columns are worked on at once, down the rows that the ellipse reaches in them. Where ``g`` and ``H`` are
small over the footprint the logarithm of the value is a cubic polynomial to 1e-5, and down the rows a cubic needs
no ``exp``: ``E *= R; R *= Q; Q *= T`` with constant ``T``; rounding is kept down by starting afresh every ``ANCHOR``
rows. The quartic terms, ``(x H x - 4 (g x)^2) q / 2``, are economised: ``q`` in them is replaced by ``MIDDLE``, which
halves what leaving them out would cost. Everything else, and what is too oblique to be stepped, is evaluated pixel
by pixel. A parallel beam has ``g = H = 0``.

Backward gathers, for each Gaussian and view, twelve sums over its pixels of the weights w = value * gradient:
sum w, then sum w / r times x, y, x^2, x y, y^2, then sum w (q - 1) / (2 r) times 1, x, y, x^2, x y, y^2. Stepped
Gaussians gather the fifteen moments of w up to the fourth order instead, from which these follow to second order.
The chain rule to means, covariances and the view is in closed form. One writer for each number, so no atomics, and
the same bits every time.
"""

# Kernels are typed by numba, not by annotations.
# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic

from napari_innergs._constants import MIN_PIVOT, VARIANCE_RANGE
from napari_innergs.cpu import _planes, _pool
from napari_innergs.cpu._planes import _EXACT, _FAST
from napari_innergs.cpu._simd import (
    WIDTH,
    at,
    ceil_index,
    channel_add,
    channel_dot,
    channel_store_sums,
    channel_values,
    channel_zeros,
    clamp,
    f32x16,
    floor_index,
    keep_from,
    lanes,
    load,
    minimum,
    put,
    splat,
    store,
    vexp_minus,
    vexp_minus_half,
    vsum,
    where_equal,
)

FIELDS = 20  # float32 in a record
FRAME = 20  # float64 in a view
SUMS = 12
ANCHOR = 10  # rows between two direct evaluations
LOWEST = 75.0  # exp(-LOWEST) is a normal float32 with some room below it
# (1 + z) ** -0.5 for abs(z) < CLOSE: Chebyshev interpolation of the fifth degree.
CLOSE = 0.15
ROOT = (1.0000000827, -0.5000000768, 0.3749339038, -0.3124385932, 0.2812223128, -0.2533252597)
STEP = 3e-4  # largest 4 (g x)^2 + x H x over a footprint that is stepped: 1e-5 of the Gaussian's peak
MIDDLE = 2.4  # economises q^2 to MIDDLE q under exp(-q / 2)
PAIRS = 1 << 20  # records held at once: more views are done in turns
SCRATCH = 1 << 19  # bytes of partial sums in a cell
CHUNK = 1024
SMALLEST, LARGEST = VARIANCE_RANGE


@intrinsic
def _rsqrt(typing, value):
    """Return ``value ** -0.5`` to 7e-7 for normal positive numbers, in any instruction set.

    A straight line through the logarithm, which a float's bits are nearly, then two steps of Newton's method; the
    constants of the first make the error of both ends of the line the same (6.5e-4).
    """

    def emit(context, builder, sig, arguments):
        x = arguments[0]
        kind = x.type
        flags = ("nnan", "ninf", "nsz", "contract")
        ints = ir.VectorType(ir.IntType(32), WIDTH)

        def number(one):
            return ir.Constant(kind, [one] * WIDTH)

        def mul(a, b):
            return builder.fmul(a, b, flags=flags)

        def sub(a, b):
            return builder.fsub(a, b, flags=flags)

        half_bits = builder.lshr(builder.bitcast(x, ints), ir.Constant(ints, [1] * WIDTH))
        y = builder.bitcast(builder.sub(ir.Constant(ints, [0x5F1FFFF9] * WIDTH), half_bits), kind)
        y = mul(y, sub(number(0.703952253 * 2.38924456), mul(mul(x, number(0.703952253)), mul(y, y))))
        return mul(y, sub(number(1.5), mul(mul(x, number(0.5)), mul(y, y))))

    return f32x16(value), emit


@njit(**_FAST)
def _inverse_root(z):
    """Return ``(1 + z) ** -0.5`` to 2e-7 for ``abs(z) < CLOSE``."""
    p = z * np.float32(ROOT[5]) + np.float32(ROOT[4])
    p = p * z + np.float32(ROOT[3])
    p = p * z + np.float32(ROOT[2])
    p = p * z + np.float32(ROOT[1])
    return p * z + np.float32(ROOT[0])


@njit(**_EXACT)
def _adjugates(start, stop, means, covs, adjugates):
    """Write the adjugate of each covariance and its determinant, zero for a Gaussian that is unusable."""
    for i in range(start, stop):
        zz, zy, zx = np.float64(covs[i, 0]), np.float64(covs[i, 1]), np.float64(covs[i, 2])
        yy, yx, xx = np.float64(covs[i, 3]), np.float64(covs[i, 4]), np.float64(covs[i, 5])
        for n in range(7):
            adjugates[i, n] = 0.0
        total = (
            zz
            + zy
            + zx
            + yy
            + yx
            + xx
            + np.float64(means[i, 0])
            + np.float64(means[i, 1])
            + np.float64(means[i, 2])
        )
        if not (math.isfinite(total) and min(zz, yy, xx) > SMALLEST and max(zz, yy, xx) < LARGEST):
            continue
        ky = zy / zz
        kx = zx / zz
        cyy = yy - ky * zy
        cyx = yx - ky * zx
        det = cyy * (xx - kx * zx) - cyx * cyx
        if not (cyy > MIN_PIVOT * yy and det > MIN_PIVOT * cyy * xx):
            continue
        adjugates[i, 0] = yy * xx - yx * yx
        adjugates[i, 1] = zx * yx - zy * xx
        adjugates[i, 2] = zy * yx - zx * yy
        adjugates[i, 3] = zz * xx - zx * zx
        adjugates[i, 4] = zy * zx - zz * yx
        adjugates[i, 5] = zz * yy - zy * zy
        adjugates[i, 6] = zz * det


@njit(**_FAST)
def _times(m, i, a, b, c):
    """Return the symmetric matrix in the first six numbers of row ``i`` times a vector."""
    m1, m2, m4 = np.float64(m[i, 1]), np.float64(m[i, 2]), np.float64(m[i, 4])
    return (
        np.float64(m[i, 0]) * a + m1 * b + m2 * c,
        m1 * a + np.float64(m[i, 3]) * b + m4 * c,
        m2 * a + m4 * b + np.float64(m[i, 5]) * c,
    )


@njit(**_FAST)
def _cross(a, b):
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@njit(**_FAST)
def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit(**_FAST)
def _three(frames, k, n):
    return frames[k, n], frames[k, n + 1], frames[k, n + 2]


@njit(**_FAST)
def _prepare(
    start, stop, k, row, means, covs, adjugates, frames, cone, exact, height, width, cut, near,
    records, top, bottom,
):  # fmt: skip
    """Write the record of each Gaussian in view ``k``, and the rows that it meets (none if it is out of sight).

    Record: projected mean (x, y); K (xx, xy, yy); g; H; peak for amplitude 1; centre of the support (x, y), its half
    width and height; row of its middle for each column, half height at the centre; T, or -1 if it must not be
    stepped; the largest ``abs(r - 1)``.
    """
    p, u, v = _three(frames, k, 0), _three(frames, k, 3), _three(frames, k, 6)
    normal, to_x, to_y = _three(frames, k, 9), _three(frames, k, 12), _three(frames, k, 15)
    for i in range(start, stop):
        top[row, i] = 0
        bottom[row, i] = 0
        det = adjugates[i, 6]
        if not det > 0.0:
            continue
        ray = (np.float64(means[i, 0]), np.float64(means[i, 1]), np.float64(means[i, 2]))
        s = 1.0
        if cone:
            ray = (ray[0] - p[0], ray[1] - p[1], ray[2] - p[2])
            s = _dot(ray, normal)
            sn = _times(covs, i, normal[0], normal[1], normal[2])
            if not s - math.sqrt(cut * max(_dot(normal, sn), 0.0)) > near * s:
                continue
        inverse = 1.0 / s
        x0 = _dot(ray, to_x) * inverse - frames[k, 18]
        y0 = _dot(ray, to_y) * inverse - frames[k, 19]
        if not cone:
            ray = p
        a_ray = _times(adjugates, i, ray[0], ray[1], ray[2])
        inverse = 1.0 / _dot(ray, a_ray)
        z = s * s * inverse
        f1 = _cross(ray, u)
        f2 = _cross(ray, v)
        s1 = _times(covs, i, f1[0], f1[1], f1[2])
        s2 = _times(covs, i, f2[0], f2[1], f2[2])
        kxx = z * _dot(f1, s1)
        kxy = z * _dot(f1, s2)
        kyy = z * _dot(f2, s2)
        gx = 0.0
        gy = 0.0
        hxx = 0.0
        hxy = 0.0
        hyy = 0.0
        peak = math.sqrt(2.0 * math.pi * det * inverse)
        if cone and exact:
            peak *= s
            gx = s * inverse * _dot(a_ray, u)
            gy = s * inverse * _dot(a_ray, v)
            au = _times(adjugates, i, u[0], u[1], u[2])
            av = _times(adjugates, i, v[0], v[1], v[2])
            hxx = z * _dot(au, u)
            hxy = z * _dot(au, v)
            hyy = z * _dot(av, v)
        else:
            peak *= math.sqrt(_dot(ray, ray))
        if not (SMALLEST < kxx < LARGEST and SMALLEST < kyy < LARGEST and math.isfinite(x0 + y0)):
            continue
        # The support is (x, y) M (x, y)^T - 2 cut g.(x, y) <= cut with M = K - cut H.
        mxx = kxx - cut * hxx
        mxy = kxy - cut * hxy
        myy = kyy - cut * hyy
        mdet = mxx * myy - mxy * mxy
        if not (mxx > 0.0 and mdet > 1e-12 * mxx * myy):
            continue
        inverse = 1.0 / mdet
        ex = cut * (myy * gx - mxy * gy) * inverse
        ey = cut * (mxx * gy - mxy * gx) * inverse
        r2 = cut * (1.0 + gx * ex + gy * ey)
        cxx = r2 * myy * inverse
        cxy = -r2 * mxy * inverse
        cyy = r2 * mxx * inverse
        ex += x0
        ey += y0
        hx = math.sqrt(cxx)
        hy = math.sqrt(cyy)
        if not (ex + hx >= 0.0 and ex - hx <= width - 1.0 and ey + hy >= 0.0 and ey - hy <= height - 1.0):
            continue
        top[row, i] = int(max(ey - hy - 1.0, 0.0))
        bottom[row, i] = int(min(ey + hy + 2.0, np.float64(height)))
        o = (row * len(means) + i) * FIELDS
        records[o] = x0
        records[o + 1] = y0
        records[o + 2] = kxx
        records[o + 3] = kxy
        records[o + 4] = kyy
        records[o + 5] = gx
        records[o + 6] = gy
        records[o + 7] = hxx
        records[o + 8] = hxy
        records[o + 9] = hyy
        records[o + 10] = peak
        records[o + 11] = ex
        records[o + 12] = ey
        records[o + 13] = hx
        records[o + 14] = hy
        records[o + 15] = cxy / cxx
        records[o + 16] = math.sqrt(r2 / myy)
        slant = 4.0 * (gx * gx * cxx + 2.0 * gx * gy * cxy + gy * gy * cyy)
        slant += hxx * cxx + 2.0 * hxy * cxy + hyy * cyy
        steppable = slant < STEP and cut * hx * hy <= LOWEST * (hx * hy - abs(cxy))
        records[o + 17] = math.exp(6.0 * gy * kyy) if steppable else -1.0
        # The largest change of r in the blocks that are worked on.
        far_x = max(x0 - ex + hx, ex + hx - x0 + WIDTH)
        far_y = abs(ey - y0) + hy + 1.0
        most = 2.0 * (abs(gx) * far_x + abs(gy) * far_y)
        most += hxx * far_x * far_x + 2.0 * abs(hxy) * far_x * far_y + hyy * far_y * far_y
        records[o + 18] = most
        records[o + 19] = 0.0


@njit(**_EXACT)
def _count(start, stop, row, top, bottom, band, bands, counts):
    for i in range(start, stop):
        if bottom[row, i] > top[row, i]:
            for b in range(top[row, i] // band, (bottom[row, i] - 1) // band + 1):
                counts[row * bands + b] += 1


@njit(**_EXACT)
def _fill(start, stop, row, top, bottom, band, bands, cursor, members):
    for i in range(start, stop):
        if bottom[row, i] > top[row, i]:
            for b in range(top[row, i] // band, (bottom[row, i] - 1) // band + 1):
                members[cursor[row * bands + b]] = i
                cursor[row * bands + b] += 1


@njit(**_FAST)
def _rows(tilt, hc, ihx, top_x, left, right):
    """Return the lowest and highest row of the ellipse between two columns, about its centre."""
    one = np.float32(1.0)
    zero = np.float32(0.0)
    a = min(max(top_x, left), right)
    b = min(max(-top_x, left), right)
    ra = a * ihx
    rb = b * ihx
    high = tilt * a + hc * math.sqrt(max(one - ra * ra, zero))
    low = tilt * b - hc * math.sqrt(max(one - rb * rb, zero))
    return low, high


@njit(**_FAST)
def _forward(
    channels, records, amps, base, members, lo, hi, y_lo, y_hi, width, cut, threshold,
    scratch, line, out, out_start, channel_stride,
):  # fmt: skip
    """Sum the Gaussians of one cell, a band of rows of one view, and write it to ``out``."""
    row_stride = len(channels) * line
    for o in range(0, (y_hi - y_lo) * row_stride, WIDTH):
        store(scratch, o, splat(np.float32(0.0)))
    half = np.float32(0.5)
    one = np.float32(1.0)
    two = np.float32(2.0)
    three = np.float32(3.0)
    middle = np.float32(MIDDLE)
    for j in range(lo, hi):
        i = np.int64(at(members, j))
        p = base + i * FIELDS
        mx = at(records, p)
        my = at(records, p + 1)
        kxx = at(records, p + 2)
        kxy = at(records, p + 3)
        kyy = at(records, p + 4)
        gx = at(records, p + 5)
        gy = at(records, p + 6)
        hxx = at(records, p + 7)
        hxy = at(records, p + 8)
        hyy = at(records, p + 9)
        peak = at(records, p + 10)
        ex = at(records, p + 11)
        ey = at(records, p + 12)
        hx = at(records, p + 13)
        hy = at(records, p + 14)
        tilt = at(records, p + 15)
        hc = at(records, p + 16)
        step = at(records, p + 17)
        close = at(records, p + 18) < np.float32(CLOSE)
        amp = channel_values(channels, amps, i * len(channels))
        # Limits are applied as floats: a huge Gaussian would overflow an integer.
        x0 = ceil_index(max(ex - hx, np.float32(0)))
        x1 = floor_index(min(ex + hx, np.float32(width - 1)))
        ihx = one / hx
        top_x = tilt * hx * hx / hy
        low = -hy
        high = hy
        if step >= np.float32(0.0):
            # -log(value) = a quadratic (A) + linear (g) - cubic (c) polynomial
            axx = kxx + hxx * (one - middle) + gx * gx * (np.float32(4.0) * middle - two)
            axy = kxy + hxy * (one - middle) + gx * gy * (np.float32(4.0) * middle - two)
            ayy = kyy + hyy * (one - middle) + gy * gy * (np.float32(4.0) * middle - two)
            cxxx = gx * kxx
            cxxy = two * gx * kxy + gy * kxx
            cxyy = gx * kyy + two * gy * kxy
            cyyy = gy * kyy
        xb = x0
        while xb <= x1:
            if x1 - x0 >= WIDTH:
                left = np.float32(xb) - ex
                low, high = _rows(tilt, hc, ihx, top_x, left, min(left + np.float32(WIDTH - 1), hx))
            y0 = ceil_index(max(ey + low, np.float32(y_lo)))
            y1 = floor_index(min(ey + high, np.float32(y_hi - 1)))
            left = np.float32(xb) - mx
            x = lanes() + left
            if step >= np.float32(0.0):
                dx = minimum(x, left + np.float32(x1 - xb))
                x2 = dx * dx
                n0 = x2 * (axx * half) + dx * gx - x2 * dx * cxxx
                n1 = dx * axy + gy - x2 * cxxy
                n2 = ayy * half - dx * cxyy
                dy = np.float32(y0) - my
                # minus the second difference of the exponent
                bend = vexp_minus(n2 * two - np.float32(6.0) * cyyy * (dy + one))
                while y0 <= y1:
                    dy = np.float32(y0) - my
                    e = vexp_minus(n0 + (n1 + (n2 - cyyy * dy) * dy) * dy)
                    e = where_equal(x, dx, e) * peak
                    # the difference to the next row
                    rate = vexp_minus(n1 + n2 * (two * dy + one) - cyyy * (three * dy * (dy + one) + one))
                    o = (y0 - y_lo) * row_stride + xb
                    end = o + (min(y0 + ANCHOR - 1, y1) - y0) * row_stride
                    floor = threshold * peak
                    while o <= end:
                        channel_add(scratch, o, line, amp, keep_from(e, floor))
                        e = e * rate
                        rate = rate * bend
                        bend = bend * step
                        o += row_stride
                    y0 += ANCHOR
            else:
                r0 = x * (x * hxx + two * gx)
                r1 = x * (two * hxy) + two * gy
                q0 = x * x * kxx
                q1 = x * (two * kxy)
                o = (y0 - y_lo) * row_stride + xb
                end = (y1 - y_lo) * row_stride + xb
                dy = np.float32(y0) - my
                while o <= end:
                    z = (r1 + hyy * dy) * dy + r0
                    if close:
                        t = _inverse_root(z)
                    else:
                        t = _rsqrt(clamp(z + one, np.float32(1e-6), np.float32(1e6)))
                    q = minimum(((q1 + kyy * dy) * dy + q0) * (t * t), np.float32(160.0))
                    e = keep_from(vexp_minus_half(q), threshold)
                    channel_add(scratch, o, line, amp, e * (t * peak))
                    dy += one
                    o += row_stride
            xb += WIDTH
    full = width // WIDTH * WIDTH
    i = np.int64(0)
    for y in range(y_lo, y_hi):
        for channel in range(len(channels)):
            o = out_start + channel * channel_stride + y * width
            for x in range(0, full, WIDTH):
                store(out, o + x, load(scratch, i + x))
            for x in range(full, width):
                put(out, o + x, at(scratch, i + x))
            i += line


@njit(**_FAST)
def _backward(
    channels, start, stop, records, base, top, bottom, row, amps, height, width, threshold,
    grad, channel_stride, row_stride, sums, totals_out,
):  # fmt: skip
    """Gather the twelve sums of each Gaussian in one view, for peak 1, and its sums of each channel.

    ``grad`` has rows of ``row_stride`` with at least sixteen zeros behind each, so that a block may stick out.
    """
    half = np.float32(0.5)
    one = np.float32(1.0)
    two = np.float32(2.0)
    three = np.float32(3.0)
    middle = np.float32(MIDDLE)
    zero = splat(np.float32(0.0))
    for i in range(start, stop):
        if bottom[row, i] <= top[row, i]:
            continue
        p = base + i * FIELDS
        mx = at(records, p)
        my = at(records, p + 1)
        kxx = at(records, p + 2)
        kxy = at(records, p + 3)
        kyy = at(records, p + 4)
        gx = at(records, p + 5)
        gy = at(records, p + 6)
        hxx = at(records, p + 7)
        hxy = at(records, p + 8)
        hyy = at(records, p + 9)
        ex = at(records, p + 11)
        ey = at(records, p + 12)
        hx = at(records, p + 13)
        hy = at(records, p + 14)
        tilt = at(records, p + 15)
        hc = at(records, p + 16)
        step = at(records, p + 17)
        close = at(records, p + 18) < np.float32(CLOSE)
        amp = channel_values(channels, amps, i * len(channels))
        totals = channel_zeros(channels)
        x0 = ceil_index(max(ex - hx, np.float32(0)))
        x1 = floor_index(min(ex + hx, np.float32(width - 1)))
        ihx = one / hx
        top_x = tilt * hx * hx / hy
        low = -hy
        high = hy
        m00 = zero
        m10 = zero
        m01 = zero
        m20 = zero
        m11 = zero
        m02 = zero
        v00 = zero
        v10 = zero
        v01 = zero
        v20 = zero
        v11 = zero
        v02 = zero
        o = (row * len(top[row]) + i) * SUMS
        if step >= np.float32(0.0):
            axx = kxx + hxx * (one - middle) + gx * gx * (np.float32(4.0) * middle - two)
            axy = kxy + hxy * (one - middle) + gx * gy * (np.float32(4.0) * middle - two)
            ayy = kyy + hyy * (one - middle) + gy * gy * (np.float32(4.0) * middle - two)
            cxxx = gx * kxx
            cxxy = two * gx * kxy + gy * kxx
            cxyy = gx * kyy + two * gy * kxy
            cyyy = gy * kyy
            # Moments m_ab = sum w x^a y^b; the third and fourth orders under other names.
            m30 = zero
            m21 = zero
            m12 = zero
            m03 = zero
            m40 = zero
            m31 = zero
            m22 = zero
            m13 = zero
            m04 = zero
            xb = x0
            while xb <= x1:
                if x1 - x0 >= WIDTH:
                    left = np.float32(xb) - ex
                    low, high = _rows(tilt, hc, ihx, top_x, left, min(left + np.float32(WIDTH - 1), hx))
                y0 = ceil_index(max(ey + low, np.float32(0)))
                y1 = floor_index(min(ey + high, np.float32(height - 1)))
                left = np.float32(xb) - mx
                x = lanes() + left
                dx = minimum(x, left + np.float32(x1 - xb))
                x2 = dx * dx
                n0 = x2 * (axx * half) + dx * gx - x2 * dx * cxxx
                n1 = dx * axy + gy - x2 * cxxy
                n2 = ayy * half - dx * cxyy
                dy = np.float32(y0) - my
                bend = vexp_minus(n2 * two - np.float32(6.0) * cyyy * (dy + one))
                s0 = zero
                s1 = zero
                s2 = zero
                s3 = zero
                s4 = zero
                while y0 <= y1:
                    dy = np.float32(y0) - my
                    e = where_equal(x, dx, vexp_minus(n0 + (n1 + (n2 - cyyy * dy) * dy) * dy))
                    rate = vexp_minus(n1 + n2 * (two * dy + one) - cyyy * (three * dy * (dy + one) + one))
                    g = y0 * row_stride + xb
                    end = g + (min(y0 + ANCHOR - 1, y1) - y0) * row_stride
                    while g <= end:
                        w, totals = channel_dot(grad, g, channel_stride, amp, keep_from(e, threshold), totals)
                        y2 = dy * dy
                        s0 = s0 + w
                        s1 = s1 + w * dy
                        s2 = s2 + w * y2
                        s3 = s3 + w * (y2 * dy)
                        s4 = s4 + w * (y2 * y2)
                        e = e * rate
                        rate = rate * bend
                        bend = bend * step
                        g += row_stride
                        dy += one
                    y0 += ANCHOR
                x2 = x * x
                m00 = m00 + s0
                m01 = m01 + s1
                m02 = m02 + s2
                m03 = m03 + s3
                m04 = m04 + s4
                w = s0 * x
                m10 = m10 + w
                m20 = m20 + w * x
                m30 = m30 + w * x2
                m40 = m40 + w * x2 * x
                w = s1 * x
                m11 = m11 + w
                m21 = m21 + w * x
                m31 = m31 + w * x2
                w = s2 * x
                m12 = m12 + w
                m22 = m22 + w * x
                m13 = m13 + s3 * x
                xb += WIDTH
            total = vsum(m00)
            a10 = vsum(m10)
            a01 = vsum(m01)
            a20 = vsum(m20)
            a11 = vsum(m11)
            a02 = vsum(m02)
            a30 = vsum(m30)
            a21 = vsum(m21)
            a12 = vsum(m12)
            a03 = vsum(m03)
            ux = two * gx
            uy = two * gy
            put(sums, o, total)
            # w / r = w (1 - 2 g.(x, y))
            put(sums, o + 1, a10 - ux * a20 - uy * a11)
            put(sums, o + 2, a01 - ux * a11 - uy * a02)
            put(sums, o + 3, a20 - ux * a30 - uy * a21)
            put(sums, o + 4, a11 - ux * a21 - uy * a12)
            put(sums, o + 5, a02 - ux * a12 - uy * a03)
            # w (q - 1) / 2
            kxy2 = two * kxy
            put(sums, o + 6, half * (kxx * a20 + kxy2 * a11 + kyy * a02 - total))
            put(sums, o + 7, half * (kxx * a30 + kxy2 * a21 + kyy * a12 - a10))
            put(sums, o + 8, half * (kxx * a21 + kxy2 * a12 + kyy * a03 - a01))
            a31 = vsum(m31)
            a22 = vsum(m22)
            a13 = vsum(m13)
            put(sums, o + 9, half * (kxx * vsum(m40) + kxy2 * a31 + kyy * a22 - a20))
            put(sums, o + 10, half * (kxx * a31 + kxy2 * a22 + kyy * a13 - a11))
            put(sums, o + 11, half * (kxx * a22 + kxy2 * a13 + kyy * vsum(m04) - a02))
        else:
            m = zero
            xb = x0
            while xb <= x1:
                if x1 - x0 >= WIDTH:
                    left = np.float32(xb) - ex
                    low, high = _rows(tilt, hc, ihx, top_x, left, min(left + np.float32(WIDTH - 1), hx))
                y0 = ceil_index(max(ey + low, np.float32(0)))
                y1 = floor_index(min(ey + high, np.float32(height - 1)))
                x = lanes() + (np.float32(xb) - mx)
                r0 = x * (x * hxx + two * gx)
                r1 = x * (two * hxy) + two * gy
                q0 = x * x * kxx
                q1 = x * (two * kxy)
                s0 = zero
                s1 = zero
                s2 = zero
                t0 = zero
                t1 = zero
                t2 = zero
                g = y0 * row_stride + xb
                end = y1 * row_stride + xb
                dy = np.float32(y0) - my
                while g <= end:
                    z = (r1 + hyy * dy) * dy + r0
                    if close:
                        t = _inverse_root(z)
                    else:
                        t = _rsqrt(clamp(z + one, np.float32(1e-6), np.float32(1e6)))
                    ir = t * t
                    q = minimum(((q1 + kyy * dy) * dy + q0) * ir, np.float32(160.0))
                    e = keep_from(vexp_minus_half(q), threshold) * t
                    w, totals = channel_dot(grad, g, channel_stride, amp, e, totals)
                    m = m + w
                    wr = w * ir
                    wq = wr * (q * half - half)
                    y2 = dy * dy
                    s0 = s0 + wr
                    s1 = s1 + wr * dy
                    s2 = s2 + wr * y2
                    t0 = t0 + wq
                    t1 = t1 + wq * dy
                    t2 = t2 + wq * y2
                    dy += one
                    g += row_stride
                w = s0 * x
                m10 = m10 + w
                m01 = m01 + s1
                m20 = m20 + w * x
                m11 = m11 + s1 * x
                m02 = m02 + s2
                w = t0 * x
                v00 = v00 + t0
                v10 = v10 + w
                v01 = v01 + t1
                v20 = v20 + w * x
                v11 = v11 + t1 * x
                v02 = v02 + t2
                xb += WIDTH
            total = vsum(m)
            put(sums, o, total)
            put(sums, o + 1, vsum(m10))
            put(sums, o + 2, vsum(m01))
            put(sums, o + 3, vsum(m20))
            put(sums, o + 4, vsum(m11))
            put(sums, o + 5, vsum(m02))
            put(sums, o + 6, vsum(v00))
            put(sums, o + 7, vsum(v10))
            put(sums, o + 8, vsum(v01))
            put(sums, o + 9, vsum(v20))
            put(sums, o + 10, vsum(v11))
            put(sums, o + 11, vsum(v02))
        o = (row * len(top[row]) + i) * len(channels)
        if len(channels) == 1:
            put(totals_out, o, total)
        else:
            channel_store_sums(totals_out, o, totals)


@njit(**_FAST)
def _mix(a, x, b, y):
    """Return ``a x + b y`` for vectors x and y."""
    return a * x[0] + b * y[0], a * x[1] + b * y[1], a * x[2] + b * y[2]


@njit(**_FAST)
def _add(x, y):
    return x[0] + y[0], x[1] + y[1], x[2] + y[2]


@njit(**_FAST)
def _outer(x, a, y, b):
    """Return a symmetric sum of outer products ``x a + y b``, entries off the diagonal counted twice."""
    return (
        x[0] * a[0] + y[0] * b[0],
        2.0 * (x[0] * a[1] + y[0] * b[1]),
        2.0 * (x[0] * a[2] + y[0] * b[2]),
        x[1] * a[1] + y[1] * b[1],
        2.0 * (x[1] * a[2] + y[1] * b[2]),
        x[2] * a[2] + y[2] * b[2],
    )


@njit(**_FAST)
def _accumulate(total, i, n, x):
    total[i, n] += x[0]
    total[i, n + 1] += x[1]
    total[i, n + 2] += x[2]


@njit(**_FAST)
def _chain(
    start, stop, k_lo, k_hi, means, covs, adjugates, frames, cone, exact, records, top, bottom,
    sums, totals, amps, d_means, d_adjugates, d_amps, d_frames, frames_too,
):  # fmt: skip
    """Add the gradients of means, covariances (by way of their adjugates too), amplitudes and views.

    ``d_adjugates``: gradient of the covariance as if nothing else depended on it (6), of the adjugate (6) and of the
    logarithm of the determinant (1); :func:`_close` makes one gradient of them. Entries off the diagonal count both
    places.
    """
    count = len(means)
    channels = amps.shape[1]
    none = (0.0, 0.0, 0.0)
    for i in range(start, stop):
        mean = (np.float64(means[i, 0]), np.float64(means[i, 1]), np.float64(means[i, 2]))
        d_mean = none
        d_log = 0.0
        for k in range(k_lo, k_hi):
            row = k - k_lo
            if bottom[row, i] <= top[row, i]:
                continue
            o = (row * count + i) * FIELDS
            peak = np.float64(records[o + 10])
            kxx, kxy, kyy = np.float64(records[o + 2]), np.float64(records[o + 3]), np.float64(records[o + 4])
            gx, gy = np.float64(records[o + 5]), np.float64(records[o + 6])
            hxx, hxy, hyy = np.float64(records[o + 7]), np.float64(records[o + 8]), np.float64(records[o + 9])
            m = (row * count + i) * SUMS
            for c in range(channels):
                d_amps[i, c] += peak * totals[(row * count + i) * channels + c]
            weight = peak
            if channels == 1:
                weight *= np.float64(amps[i, 0])
            w = weight * sums[m]
            rx, ry = weight * sums[m + 1], weight * sums[m + 2]
            b_kxx = -0.5 * weight * sums[m + 3]
            b_kxy = -weight * sums[m + 4]
            b_kyy = -0.5 * weight * sums[m + 5]
            b_x = kxx * rx + kxy * ry
            b_y = kxy * rx + kyy * ry

            p, u, v = _three(frames, k, 0), _three(frames, k, 3), _three(frames, k, 6)
            normal, to_x, to_y = _three(frames, k, 9), _three(frames, k, 12), _three(frames, k, 15)
            point = mean
            ray = p
            s = 1.0
            if cone:
                point = _mix(1.0, mean, -1.0, p)
                ray = point
                s = _dot(ray, normal)
            a_ray = _times(adjugates, i, ray[0], ray[1], ray[2])
            ib = 1.0 / _dot(ray, a_ray)
            z = s * s * ib
            zs = s * ib
            f1 = _cross(ray, u)
            f2 = _cross(ray, v)
            s1 = _times(covs, i, f1[0], f1[1], f1[2])
            s2 = _times(covs, i, f2[0], f2[1], f2[2])

            # The gradient of log z, and of log s where s does not come in by z or by the projected mean.
            b_z = b_kxx * kxx + b_kxy * kxy + b_kyy * kyy
            b_s = 0.0
            direct = 0.0  # weight of the ray itself in its own gradient
            b_gx = 0.0
            b_gy = 0.0
            au = none
            av = none
            if cone and exact:
                v0, vx, vy = weight * sums[m + 6], weight * sums[m + 7], weight * sums[m + 8]
                b_hxx = weight * sums[m + 9]
                b_hxy = 2.0 * weight * sums[m + 10]
                b_hyy = weight * sums[m + 11]
                b_gx = 2.0 * vx
                b_gy = 2.0 * vy
                b_x -= 2.0 * (gx * v0 + hxx * vx + hxy * vy)
                b_y -= 2.0 * (gy * v0 + hxy * vx + hyy * vy)
                of_g = b_gx * gx + b_gy * gy
                b_z += b_hxx * hxx + b_hxy * hxy + b_hyy * hyy + of_g
                b_s = w - of_g
                au = _times(adjugates, i, u[0], u[1], u[2])
                av = _times(adjugates, i, v[0], v[1], v[2])
                h1 = _mix(z * b_hxx, u, 0.5 * z * b_hxy, v)
                h2 = _mix(0.5 * z * b_hxy, u, z * b_hyy, v)
                of_adjugate = _outer(u, h1, v, h2)
                for n in range(6):
                    d_adjugates[i, 6 + n] += of_adjugate[n]
            else:
                direct = w / _dot(ray, ray)
            b_b = -(b_z + 0.5 * w) * ib
            is_ = 1.0 / s
            b_s = (b_s + 2.0 * b_z) * is_
            if cone:
                b_s -= (b_x * _dot(ray, to_x) + b_y * _dot(ray, to_y)) * is_ * is_

            k1 = _mix(z * b_kxx, f1, 0.5 * z * b_kxy, f2)
            k2 = _mix(0.5 * z * b_kxy, f1, z * b_kyy, f2)
            of_cov = _outer(f1, k1, f2, k2)
            # The symmetric part of ray q, by which b and g depend on the adjugate.
            q = _add(_mix(zs * b_gx, u, zs * b_gy, v), _mix(b_b, ray, 0.0, ray))
            d_adjugates[i, 0] += of_cov[0]
            d_adjugates[i, 1] += of_cov[1]
            d_adjugates[i, 2] += of_cov[2]
            d_adjugates[i, 3] += of_cov[3]
            d_adjugates[i, 4] += of_cov[4]
            d_adjugates[i, 5] += of_cov[5]
            d_adjugates[i, 6] += ray[0] * q[0]
            d_adjugates[i, 7] += ray[0] * q[1] + ray[1] * q[0]
            d_adjugates[i, 8] += ray[0] * q[2] + ray[2] * q[0]
            d_adjugates[i, 9] += ray[1] * q[1]
            d_adjugates[i, 10] += ray[1] * q[2] + ray[2] * q[1]
            d_adjugates[i, 11] += ray[2] * q[2]
            d_log += 0.5 * w

            d_f1 = _mix(2.0 * z * b_kxx, s1, z * b_kxy, s2)
            d_f2 = _mix(z * b_kxy, s1, 2.0 * z * b_kyy, s2)
            d_ray = _add(_cross(u, d_f1), _cross(v, d_f2))
            d_ray = _add(d_ray, _mix(2.0 * b_b, a_ray, direct, ray))
            d_ray = _add(d_ray, _mix(zs * b_gx, au, zs * b_gy, av))
            d_point = _mix(b_x * is_, to_x, b_y * is_, to_y)
            if cone:
                d_point = _add(d_point, _mix(1.0, d_ray, b_s, normal))
            d_mean = _add(d_mean, d_point)
            if frames_too:
                if cone:
                    _accumulate(d_frames, k, 0, _mix(-1.0, d_point, 0.0, none))
                    _accumulate(d_frames, k, 9, _mix(b_s, point, 0.0, none))
                else:
                    _accumulate(d_frames, k, 0, d_ray)
                _accumulate(d_frames, k, 3, _cross(d_f1, ray))
                _accumulate(d_frames, k, 6, _cross(d_f2, ray))
                if cone and exact:
                    of_u = _mix(2.0 * z * b_hxx, au, z * b_hxy, av)
                    of_v = _mix(z * b_hxy, au, 2.0 * z * b_hyy, av)
                    _accumulate(d_frames, k, 3, _add(of_u, _mix(zs * b_gx, a_ray, 0.0, none)))
                    _accumulate(d_frames, k, 6, _add(of_v, _mix(zs * b_gy, a_ray, 0.0, none)))
                _accumulate(d_frames, k, 12, _mix(b_x * is_, point, 0.0, none))
                _accumulate(d_frames, k, 15, _mix(b_y * is_, point, 0.0, none))
                d_frames[k, 18] -= b_x
                d_frames[k, 19] -= b_y
        _accumulate(d_means, i, 0, d_mean)
        d_adjugates[i, 12] += d_log


@njit(**_EXACT)
def _close(start, stop, covs, adjugates, d_adjugates, d_covs):
    """Carry the gradients of adjugates and determinants over to the covariances."""
    for i in range(start, stop):
        det = adjugates[i, 6]
        if not det > 0.0:
            for n in range(6):
                d_covs[i, n] = 0.0
            continue
        zz, zy, zx = np.float64(covs[i, 0]), np.float64(covs[i, 1]), np.float64(covs[i, 2])
        yy, yx, xx = np.float64(covs[i, 3]), np.float64(covs[i, 4]), np.float64(covs[i, 5])
        d = d_adjugates[i]
        a0, a1, a2, a3, a4, a5 = d[6], d[7], d[8], d[9], d[10], d[11]
        log = d[12] / det  # the gradient of log det S is the inverse, adj / det
        d_covs[i, 0] = d[0] + a3 * xx - a4 * yx + a5 * yy + log * adjugates[i, 0]
        d_covs[i, 1] = d[1] - a1 * xx + a2 * yx + a4 * zx - 2.0 * a5 * zy + 2.0 * log * adjugates[i, 1]
        d_covs[i, 2] = d[2] + a1 * yx - a2 * yy - 2.0 * a3 * zx + a4 * zy + 2.0 * log * adjugates[i, 2]
        d_covs[i, 3] = d[3] + a0 * xx - a2 * zx + a5 * zz + log * adjugates[i, 3]
        d_covs[i, 4] = d[4] - 2.0 * a0 * yx + a1 * zx + a2 * zy - a4 * zz + 2.0 * log * adjugates[i, 4]
        d_covs[i, 5] = d[5] + a0 * yy - a1 * zy + a3 * zz + log * adjugates[i, 5]


@dataclass(frozen=True)
class Views:
    """The Gaussians made ready for some views."""

    first: int
    last: int
    records: np.ndarray
    top: np.ndarray
    bottom: np.ndarray


@dataclass(frozen=True)
class Gaussians:
    """What a call was given; what backward needs from forward."""

    means: np.ndarray
    covs: np.ndarray
    amps: np.ndarray
    frames: np.ndarray
    adjugates: np.ndarray  # (N, 7) float64
    cone: bool
    exact: bool
    size: tuple[int, int]
    cut: float
    near: float
    kept: list[Views]

    @property
    def turns(self) -> list[tuple[int, int]]:
        """The views, in turns whose records fit in memory."""
        return _pool.ranges(len(self.frames), max(1, PAIRS // max(len(self.means), 1)))


def gather(
    means: np.ndarray, covs: np.ndarray, amps: np.ndarray, frames: np.ndarray, *setting: Any
) -> Gaussians:
    """Check the covariances and find their adjugates."""
    adjugates = np.empty((len(means), 7))
    _pool.run(_adjugates, [(*r, means, covs, adjugates) for r in _pool.ranges(len(means), 8 * CHUNK)])
    return Gaussians(means, covs, amps, frames, adjugates, *setting, [])


def prepare(g: Gaussians, first: int, last: int) -> Views:
    """Project the Gaussians for the views ``[first, last)``."""
    n, rows = len(g.means), last - first
    views = Views(
        first,
        last,
        np.empty(rows * n * FIELDS, np.float32),
        np.empty((rows, n), np.int32),
        np.empty((rows, n), np.int32),
    )
    shared = (
        g.means, g.covs, g.adjugates, g.frames, g.cone, g.exact, *g.size, g.cut, g.near,
        views.records, views.top, views.bottom,
    )  # fmt: skip
    _pool.run(
        _prepare,
        [(*r, k, k - first, *shared) for k in range(first, last) for r in _pool.ranges(n, 4 * CHUNK)],
    )
    return views


def make_cells(g: Gaussians, views: Views) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Cut the views into bands of rows, and list the Gaussians of each: band, bands, offsets, members.

    The choice does not depend on the number of threads, so neither does the last bit of the result.
    """
    height, width = g.size
    rows, n = views.top.shape
    line = -(-width // WIDTH) * WIDTH + WIDTH
    channels = min(g.amps.shape[1], _planes.GROUP)
    # Some sixteen cells at least, so that every thread has something to do.
    fit = max(SCRATCH // (4 * line * channels), 16)
    band = min(height, fit, max(32, -(-height // -(-16 // max(rows, 1)))))
    bands = -(-height // band)
    counts = np.zeros(rows * bands, np.int64)
    shared = (views.top, views.bottom, band, bands)
    _pool.run(_count, [(0, n, k, *shared, counts) for k in range(rows)])
    offsets = np.zeros(rows * bands + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    cursor = offsets[:-1].copy()
    members = np.empty(int(offsets[-1]), np.int32)
    _pool.run(_fill, [(0, n, k, *shared, cursor, members) for k in range(rows)])
    return band, bands, offsets, members


def forward_kernel(
    g: Gaussians, views: Views, cells: tuple[int, int, np.ndarray, np.ndarray], out: np.ndarray
) -> None:
    """Write the views to ``out`` (n, C, rows, columns), which holds all views of the call."""
    height, width = g.size
    band, bands, offsets, members = cells
    line = -(-width // WIDTH) * WIDTH + WIDTH
    threshold = np.float32(math.exp(-0.5 * g.cut))
    pixels = height * width
    channels = g.amps.shape[1]
    tasks = []
    for c0, c1 in _planes._channel_groups(channels):
        amps = np.ascontiguousarray(g.amps[:, c0:c1]).reshape(-1)
        for i in range(len(offsets) - 1):
            k, y = i // bands, i % bands * band
            tasks.append(
                (
                    (0,) * (c1 - c0), views.records, amps, k * len(g.means) * FIELDS, members,
                    int(offsets[i]), int(offsets[i + 1]), y, min(y + band, height), width, np.float32(g.cut),
                    threshold, line, out.reshape(-1), ((views.first + k) * channels + c0) * pixels, pixels,
                )
            )  # fmt: skip

    def task(*arguments: Any) -> None:
        _forward(*arguments[:12], _planes._scratch(band * len(arguments[0]) * line), *arguments[12:])

    # The longest first, so that no thread is left alone with one at the end.
    tasks.sort(key=lambda arguments: arguments[5] - arguments[6])
    _pool.run(task, tasks)


def padded(grad: np.ndarray) -> np.ndarray:
    """Return a copy with sixteen zeros behind each row."""
    out = np.zeros((*grad.shape[:3], grad.shape[3] + WIDTH), np.float32)
    out[..., : grad.shape[3]] = grad
    return out


def backward_kernel(
    g: Gaussians, views: Views, grad: np.ndarray, group: tuple[int, int], sums: np.ndarray, totals: np.ndarray
) -> None:
    """Gather the sums of each Gaussian and view from padded gradients, for some channels."""
    c0, c1 = group
    height, width = g.size
    n, channels = g.amps.shape
    line = grad.shape[3]
    amps = np.ascontiguousarray(g.amps[:, c0:c1]).reshape(-1)
    threshold = np.float32(math.exp(-0.5 * g.cut))
    flat = grad.reshape(-1)
    tasks = []
    for k in range(views.last - views.first):
        start = ((views.first + k) * channels + c0) * height * line
        shared = (
            views.records, k * n * FIELDS, views.top, views.bottom, k, amps, height, width, threshold,
            flat[start:], height * line, line, sums, totals,
        )  # fmt: skip
        tasks += [((0,) * (c1 - c0), *r, *shared) for r in _pool.ranges(n, CHUNK)]
    _pool.run(_backward, tasks)


def forward(
    means: np.ndarray,
    covs: np.ndarray,
    amps: np.ndarray,
    frames: np.ndarray,
    cone: bool,
    exact: bool,
    size: tuple[int, int],
    cut: float,
    near: float,
) -> tuple[np.ndarray, Gaussians]:
    """Render radiographs; see :func:`napari_innergs.operators.xray.render_xray` for the formula.

    Parameters
    ----------
    means, covs, amps : ndarray of float32, (N, 3), (N, 6), (N, C)
        Contiguous; covariances are [zz, zy, zx, yy, yx, xx].
    frames : ndarray of float64, (n, 20)
        Views, from :func:`napari_innergs.operators.xray.panel_frames`.
    cone, exact : bool
        Cone or parallel beam; exact or affine.
    size : tuple of int
        Rows and columns.
    cut : float
        Squared Mahalanobis radius of the support.
    near : float
        Share of its depth that the support of a Gaussian must keep from the plane of the source.

    Returns
    -------
    out : ndarray of float32, (n, C, rows, columns)
        For an exact cone beam without the factor |D| of the pixel.
    saved : Gaussians
        What :func:`backward` needs.
    """
    g = gather(means, covs, amps, frames, cone, exact, size, float(cut), float(near))
    out = np.empty((len(frames), amps.shape[1], *size), np.float32)
    for turn in g.turns:
        views = prepare(g, *turn)
        forward_kernel(g, views, make_cells(g, views), out)
        if len(g.turns) == 1:
            g.kept.append(views)
    return out, g


def backward(
    grad_out: np.ndarray, saved: Gaussians, frames_too: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of means, covariances, amplitudes and views for ``grad_out`` (n, C, rows, columns).

    The gradients of the views are zeros unless ``frames_too``.
    """
    g = saved
    n, channels = g.amps.shape
    grad = padded(grad_out)
    d_means, d_covs = np.zeros((n, 3)), np.empty((n, 6), np.float32)
    d_adjugates, d_amps = np.zeros((n, 13)), np.zeros((n, channels))
    pieces = _pool.ranges(n, CHUNK)
    d_frames = np.zeros((len(pieces) if frames_too else 1, len(g.frames), FRAME))
    for first, last in g.turns:
        views = g.kept[0] if g.kept else prepare(g, first, last)
        sums = np.zeros((last - first) * n * SUMS, np.float32)
        totals = np.zeros((last - first) * n * channels, np.float32)
        groups = _planes._channel_groups(channels)
        for group in groups:
            alone = len(groups) == 1
            part = sums if alone else np.zeros_like(sums)
            total = totals if alone else np.zeros((last - first) * n * (group[1] - group[0]), np.float32)
            backward_kernel(g, views, grad, group, part, total)
            if not alone:
                sums += part
                width = group[1] - group[0]
                totals.reshape(-1, channels)[:, group[0] : group[1]] = total.reshape(-1, width)
        shared = (
            g.means, g.covs, g.adjugates, g.frames, g.cone, g.exact, views.records, views.top, views.bottom,
            sums, totals, g.amps, d_means, d_adjugates, d_amps,
        )  # fmt: skip
        _pool.run(
            _chain,
            [
                (*r, first, last, *shared, d_frames[i if frames_too else 0], frames_too)
                for i, r in enumerate(pieces)
            ],
        )
    _pool.run(_close, [(*r, g.covs, g.adjugates, d_adjugates, d_covs) for r in _pool.ranges(n, 8 * CHUNK)])
    return d_means.astype(np.float32), d_covs, d_amps.astype(np.float32), d_frames.sum(0)
