"""Projection and sorted alpha compositing of Gaussians on the CPU.

The image is cut into cells of ``CELL`` by ``CELL`` pixels, each with a list of its Gaussians from front to back.
Inside a cell, sixteen lanes are a block of 4 by 4 pixels: a Gaussian of a few pixels fills such blocks better than
rows of sixteen, whatever its direction, and blocks are never read across their borders. A block's numbers lie side by
side: the light that still comes through, then each channel.

Backward goes from front to back as well. With ``v`` the gradient of a pixel's colours dotted with a Gaussian's,
and ``w = a T`` its weight, the gradient of its opacity is ``T v - rest / (1 - a)``, where ``rest`` is what all
Gaussians behind it give to the sum of ``w v``: the whole sum, known from the image, less what has been met. So T is
made by the same operations as in forward, every decision falls alike, and nothing is kept for each pair. With
``t = y + slope x``, six sums over pixels of the weights ``a dL/da`` times 1, x, t, x^2, x t, t^2 give all gradients.
Each cell writes its sums to places of its own, which are then added in a fixed order: no atomics, and the same bits
every time.

The projection (see :func:`napari_innergs.operators.rgb.project_splats`) and its derivatives in closed form are done
in float64, one Gaussian after the other.
"""

# Kernels are typed by numba, not by annotations.
# mypy: disable-error-code="no-untyped-def, call-arg, var-annotated"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from napari_innergs._constants import MIN_PIVOT, VARIANCE_RANGE
from napari_innergs.cpu import _planes, _pool
from napari_innergs.cpu._planes import _EXACT, _FAST
from napari_innergs.cpu._simd import (
    _FLAGS,
    _I32,
    _VECTOR,
    WIDTH,
    _add,
    _address,
    _call,
    _constant,
    _exp2,
    _mul,
    _store,
    _vector,
    at,
    ceil_index,
    channel_add,
    channel_dot,
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
)

EDGE = 4  # pixels in a block's row
CELL = 32  # pixels in a cell's row
BLOCKS = CELL // EDGE
FIELDS = 16  # float32 in a record: one cache line
SPLAT = 6
SUMS = 16  # float32 that a cell writes for a Gaussian: six sums, then the channels
CHUNK = 2048
LOOK = 32  # Gaussians after which a cell is looked at for pixels that light still reaches
SLACK = 1e-3  # by which the squared radius is widened; the opacity itself decides which pixels count
SMALLEST_EXPONENT = -100.0  # keeps powers of two normal
HALF_LOG2E = 0.5 / math.log(2.0)
FAINTEST = 1e-12  # least squared factor by which antialiasing weakens an opacity
SMALLEST, LARGEST = VARIANCE_RANGE
CAMERA = 17  # numbers of a camera: rotation, translation; focal length, skew, centre (columns), then rows


def _offsets(name, numbers):
    def function(typing):
        def emit(context, builder, sig, arguments):
            return ir.Constant(_VECTOR, [float(one) for one in numbers])

        return f32x16(), emit

    function.__name__ = name
    return intrinsic(function)


_columns = _offsets("_columns", [i % EDGE for i in range(WIDTH)])
_rows = _offsets("_rows", [i // EDGE for i in range(WIDTH)])


@intrinsic
def _power(typing, value):
    """Return ``2 ** max(value, SMALLEST_EXPONENT)``, for values below 100."""

    def emit(context, builder, sig, arguments):
        low = _constant(SMALLEST_EXPONENT)
        x = builder.select(builder.fcmp_ordered(">", arguments[0], low, flags=_FLAGS), arguments[0], low)
        return _exp2(builder, x, 1.0)

    return f32x16(value), emit


@intrinsic
def _any_from(typing, value, threshold):
    """Return whether any lane is at least ``threshold``."""

    def emit(context, builder, sig, arguments):
        limit = _vector(context, builder, arguments[1], sig.args[1])
        mask = builder.fcmp_ordered(">=", arguments[0], limit)
        bits = ir.IntType(WIDTH)
        return builder.icmp_unsigned("!=", builder.bitcast(mask, bits), ir.Constant(bits, 0))

    return types.boolean(value, threshold), emit


@intrinsic
def _where_from(typing, test, threshold, value):
    """Return ``value`` where ``test`` is at least ``threshold`` and zero elsewhere."""

    def emit(context, builder, sig, arguments):
        test, limit = (_vector(context, builder, arguments[i], sig.args[i]) for i in (0, 1))
        mask = builder.fcmp_ordered(">=", test, limit)
        return builder.select(mask, arguments[2], _constant(0.0))

    return f32x16(test, threshold, value), emit


def _elementwise(name):
    def function(typing, value):
        def emit(context, builder, sig, arguments):
            return _call(builder, f"llvm.{name}.v{WIDTH}f32", _VECTOR, [arguments[0]])

        return f32x16(value), emit

    function.__name__ = f"_{name}"
    return intrinsic(function)


_floor = _elementwise("floor")
_ceil = _elementwise("ceil")
_sqrt = _elementwise("sqrt")


@intrinsic
def _reciprocal(typing, value):
    """Return ``1 / value`` to 3e-7 for normal positive numbers, without a division.

    A straight line through the logarithm, which a float's bits are nearly (to 12 %), then Newton's method.
    """

    def emit(context, builder, sig, arguments):
        x = arguments[0]
        ints = ir.VectorType(_I32, WIDTH)
        bits = builder.sub(ir.Constant(ints, [0x7EF311C7] * WIDTH), builder.bitcast(x, ints))
        y = builder.bitcast(bits, _VECTOR)
        for _ in range(3):
            error = builder.fsub(_constant(2.0), _mul(builder, x, y), flags=_FLAGS)
            y = _mul(builder, y, error)
        return y

    return f32x16(value), emit


def _reduced(builder, vectors):
    """Return a vector whose lane ``i`` is the sum of the lanes of ``vectors[i]``.

    Two vectors are halved into one in each step: lanes that belong together end up closer and closer.
    """
    half = WIDTH // 2
    zeros = _constant(0.0)
    # After step k each vector holds 2**k sums in as many runs of lanes.
    while half >= 1:
        low = [i for i in range(WIDTH) if not i & half]
        pairs = []
        for i in range(0, len(vectors), 2):
            a = vectors[i]
            b = vectors[i + 1] if i + 1 < len(vectors) else None
            first = low + [i + WIDTH for i in low]
            masks = [ir.Constant(ir.VectorType(_I32, WIDTH), m) for m in (first, [i + half for i in first])]
            parts = [builder.shuffle_vector(a, zeros if b is None else b, m) for m in masks]
            pairs.append(_add(builder, *parts))
        vectors = pairs
        half //= 2
    return vectors[0]


@intrinsic
def _store_sums(typing, array, index, a, b, c, d, e, f, totals):
    """Set the sixteen numbers from ``array[index]`` to the sums of the lanes of six vectors and of ``totals``."""

    def emit(context, builder, sig, arguments):
        vectors = [*arguments[2:8]]
        vectors += [builder.extract_value(arguments[8], i) for i in range(sig.args[8].count)]
        target = _address(context, builder, sig.args[0], arguments[0], arguments[1], sig.args[1])
        _store(builder, target, _reduced(builder, vectors))
        return context.get_dummy_value()

    return types.void(array, index, a, b, c, d, e, f, totals), emit


@njit(**_EXACT)
def _usable(means, covs, opacities, i):
    """Return whether a Gaussian is finite and its covariance positive definite beyond rounding."""
    zz, zy, zx = np.float64(covs[i, 0]), np.float64(covs[i, 1]), np.float64(covs[i, 2])
    yy, yx, xx = np.float64(covs[i, 3]), np.float64(covs[i, 4]), np.float64(covs[i, 5])
    total = np.float64(means[i, 0]) + np.float64(means[i, 1]) + np.float64(means[i, 2])
    total += zz + zy + zx + yy + yx + xx + np.float64(opacities[i])
    if not (math.isfinite(total) and min(zz, yy, xx) > SMALLEST and max(zz, yy, xx) < LARGEST):
        return False
    cyy = yy - zy * zy / zz
    cyx = yx - zy * zx / zz
    det = cyy * (xx - zx * zx / zz) - cyx * cyx
    return cyy > MIN_PIVOT * yy and det > MIN_PIVOT * cyy * xx


@njit(**_FAST)
def _times(covs, i, a, b, c):
    """Return a covariance times a vector."""
    s1, s2, s4 = np.float64(covs[i, 1]), np.float64(covs[i, 2]), np.float64(covs[i, 4])
    return (
        np.float64(covs[i, 0]) * a + s1 * b + s2 * c,
        s1 * a + np.float64(covs[i, 3]) * b + s4 * c,
        s2 * a + s4 * b + np.float64(covs[i, 5]) * c,
    )


@njit(**_FAST)
def _dot(c, j, v):
    """Return the dot product of the three numbers from ``c[j]`` with a vector."""
    return c[j] * v[0] + c[j + 1] * v[1] + c[j + 2] * v[2]


@njit(**_FAST)
def _turned(x, y, z, c):
    """Return a vector times the rotation into the camera."""
    return x * c[0] + y * c[3] + z * c[6], x * c[1] + y * c[4] + z * c[7], x * c[2] + y * c[5] + z * c[8]


@njit(**_FAST)
def _camera_view(means, covs, c, i):
    """Return a mean in the camera, S R^T (three vectors) and R S R^T as xx, xy, xz, yy, yz, zz."""
    mean = np.float64(means[i, 0]), np.float64(means[i, 1]), np.float64(means[i, 2])
    s0 = _times(covs, i, c[0], c[1], c[2])
    s1 = _times(covs, i, c[3], c[4], c[5])
    s2 = _times(covs, i, c[6], c[7], c[8])
    point = _dot(c, 0, mean) + c[9], _dot(c, 3, mean) + c[10], _dot(c, 6, mean) + c[11]
    spread = _dot(c, 0, s0), _dot(c, 0, s1), _dot(c, 0, s2), _dot(c, 3, s1), _dot(c, 3, s2), _dot(c, 6, s2)
    return mean, point, (s0, s1, s2), spread


@njit(**_FAST)
def _flatten(spread, inverse, a, b):
    """Return the covariance of (x / z, y / z), with the derivative taken at (a, b)."""
    xx, xy, xz, yy, yz, zz = spread
    square = inverse * inverse
    za = xz - a * zz
    return (
        square * (xx - a * (xz + za)),
        square * (xy - a * yz - b * za),
        square * (yy - b * (2.0 * yz - b * zz)),
    )


@njit(**_EXACT)
def _project(
    start, stop, means, covs, opacities, c, edges, cut, near, dilation, antialias, splats, depths
):  # fmt: skip
    """Write what is drawn, and the depths; opacity zero where a Gaussian is left out."""
    fx, skew, cx, fy, cy = c[12], c[13], c[14], c[15], c[16]
    for i in range(start, stop):
        depths[i] = 0.0
        for n in range(SPLAT):
            splats[i, n] = 0.0
        if not _usable(means, covs, opacities, i):
            continue
        _, point, _, spread = _camera_view(means, covs, c, i)
        z = point[2]
        if not z - math.sqrt(cut * max(spread[5], 0.0)) > near * z:
            continue
        inverse = 1.0 / z
        a = point[0] * inverse
        b = point[1] * inverse
        aa, ab, bb = _flatten(
            spread, inverse, min(max(a, edges[0]), edges[1]), min(max(b, edges[2]), edges[3])
        )
        cc = fx * fx * aa + 2.0 * fx * skew * ab + skew * skew * bb
        cr = fy * (fx * ab + skew * bb)
        rr = fy * fy * bb
        before = cc * rr - cr * cr
        cc += dilation
        rr += dilation
        det = cc * rr - cr * cr
        opacity = np.float64(opacities[i])
        if antialias:
            opacity *= math.sqrt(max(before / det, FAINTEST))
        depths[i] = z
        splats[i, 0] = fx * a + skew * b + cx
        splats[i, 1] = fy * b + cy
        splats[i, 2] = 1.0 / cc
        splats[i, 3] = -cr / cc
        splats[i, 4] = cc / det
        splats[i, 5] = opacity


@njit(**_FAST)
def _pull_back(
    start, stop, means, covs, opacities, c, edges, dilation, antialias, splats, d_splats, d_depths, camera_too,
    d_means, d_covs, d_opacities, d_camera,
):  # fmt: skip
    """Write the gradients of Gaussians, and add those of the camera."""
    fx, skew, fy = c[12], c[13], c[15]
    for i in range(start, stop):
        for n in range(3):
            d_means[i, n] = 0.0
        for n in range(6):
            d_covs[i, n] = 0.0
        d_opacities[i] = 0.0
        g0, g1, g2 = np.float64(d_splats[i, 0]), np.float64(d_splats[i, 1]), np.float64(d_splats[i, 2])
        g3, g4, g5 = np.float64(d_splats[i, 3]), np.float64(d_splats[i, 4]), np.float64(d_splats[i, 5])
        gz = np.float64(d_depths[i])
        some = abs(g0) + abs(g1) + abs(g2) + abs(g3) + abs(g4) + abs(g5) + abs(gz)
        if not (some > 0.0 and splats[i, 5] > 0.0):
            continue
        mean, point, (s0, s1, s2), spread = _camera_view(means, covs, c, i)
        inverse = 1.0 / point[2]
        a = point[0] * inverse
        b = point[1] * inverse
        ac = min(max(a, edges[0]), edges[1])
        bc = min(max(b, edges[2]), edges[3])
        aa, ab, bb = _flatten(spread, inverse, ac, bc)
        cc0 = fx * fx * aa + 2.0 * fx * skew * ab + skew * skew * bb
        cr = fy * (fx * ab + skew * bb)
        rr0 = fy * fy * bb
        before = cc0 * rr0 - cr * cr
        cc = cc0 + dilation
        rr = rr0 + dilation
        det = cc * rr - cr * cr
        icc = 1.0 / cc
        idet = 1.0 / det
        d_det = -g4 * cc * idet * idet
        d_before = 0.0
        opacity = g5
        if antialias:
            share = before * idet
            factor = math.sqrt(max(share, FAINTEST))
            opacity = g5 * factor
            if share > FAINTEST:
                d_before = 0.5 * g5 * np.float64(opacities[i]) / factor * idet
                d_det -= d_before * share
        d_opacities[i] = opacity
        d_cc = icc * icc * (g3 * cr - g2) + g4 * idet + d_det * rr + d_before * rr0
        d_rr = d_det * cc + d_before * cc0
        d_cr = -g3 * icc - 2.0 * cr * (d_det + d_before)
        d_aa = fx * fx * d_cc
        d_ab = fx * (2.0 * skew * d_cc + fy * d_cr)
        d_bb = skew * (skew * d_cc + fy * d_cr) + fy * fy * d_rr
        # The spread, entries off the diagonal counted once; then, halved, as a matrix G.
        _, _, xz, _, yz, zz = spread
        square = inverse * inverse
        gxx = square * d_aa
        gxy = 0.5 * square * d_ab
        gyy = square * d_bb
        gxz = -ac * gxx - bc * gxy
        gyz = -ac * gxy - bc * gyy
        gzz = -ac * gxz - bc * gyz
        d_a = fx * g0
        d_b = skew * g0 + fy * g1
        if ac == a:
            d_a += 2.0 * (gxx * (ac * zz - xz) + gxy * (bc * zz - yz))
        if bc == b:
            d_b += 2.0 * (gxy * (ac * zz - xz) + gyy * (bc * zz - yz))
        bent = aa * d_aa + ab * d_ab + bb * d_bb
        px = d_a * inverse
        py = d_b * inverse
        pz = gz - inverse * (d_a * a + d_b * b + 2.0 * bent)
        # R^T p, and R^T G R by way of G R.
        d_means[i, 0], d_means[i, 1], d_means[i, 2] = _turned(px, py, pz, c)
        t00, t01, t02 = _turned(gxx, gxy, gxz, c)
        t10, t11, t12 = _turned(gxy, gyy, gyz, c)
        t20, t21, t22 = _turned(gxz, gyz, gzz, c)
        d_covs[i, 0] = c[0] * t00 + c[3] * t10 + c[6] * t20
        d_covs[i, 1] = 2.0 * (c[0] * t01 + c[3] * t11 + c[6] * t21)
        d_covs[i, 2] = 2.0 * (c[0] * t02 + c[3] * t12 + c[6] * t22)
        d_covs[i, 3] = c[1] * t01 + c[4] * t11 + c[7] * t21
        d_covs[i, 4] = 2.0 * (c[1] * t02 + c[4] * t12 + c[7] * t22)
        d_covs[i, 5] = c[2] * t02 + c[5] * t12 + c[8] * t22
        if camera_too:
            for n in range(3):
                d_camera[n] += px * mean[n] + 2.0 * (gxx * s0[n] + gxy * s1[n] + gxz * s2[n])
                d_camera[3 + n] += py * mean[n] + 2.0 * (gxy * s0[n] + gyy * s1[n] + gyz * s2[n])
                d_camera[6 + n] += pz * mean[n] + 2.0 * (gxz * s0[n] + gyz * s1[n] + gzz * s2[n])
            d_camera[9] += px
            d_camera[10] += py
            d_camera[11] += pz
            d_camera[12] += g0 * a + 2.0 * d_cc * (fx * aa + skew * ab) + d_cr * fy * ab
            d_camera[13] += g0 * b + 2.0 * d_cc * (fx * ab + skew * bb) + d_cr * fy * bb
            d_camera[14] += g0
            d_camera[15] += g1 * b + d_cr * (fx * ab + skew * bb) + 2.0 * d_rr * fy * bb
            d_camera[16] += g1


@njit(**_FAST)
def _polynomials(x, y, z, terms, factors, values, slopes):
    """Write the spherical harmonics of a unit vector and, unless ``slopes`` is empty, their derivatives."""
    xx, yy, zz = x * x, y * y, z * z
    values[0] = 1.0
    if terms > 1:
        values[1], values[2], values[3] = y, z, x
    if terms > 4:
        values[4], values[5], values[6], values[7], values[8] = x * y, y * z, 3.0 * zz - 1.0, x * z, xx - yy
    if terms > 9:
        values[9], values[10], values[11] = y * (3.0 * xx - yy), x * y * z, y * (5.0 * zz - 1.0)
        values[12], values[13] = z * (5.0 * zz - 3.0), x * (5.0 * zz - 1.0)
        values[14], values[15] = z * (xx - yy), x * (xx - 3.0 * yy)
    for k in range(terms):
        values[k] *= factors[k]
    if len(slopes) == 0:
        return
    if terms > 1:
        slopes[1, 1] = slopes[2, 2] = slopes[3, 0] = 1.0
    if terms > 4:
        slopes[4, 0], slopes[4, 1] = y, x
        slopes[5, 1], slopes[5, 2] = z, y
        slopes[6, 2] = 6.0 * z
        slopes[7, 0], slopes[7, 2] = z, x
        slopes[8, 0], slopes[8, 1] = 2.0 * x, -2.0 * y
    if terms > 9:
        slopes[9, 0], slopes[9, 1] = 6.0 * x * y, 3.0 * (xx - yy)
        slopes[10, 0], slopes[10, 1], slopes[10, 2] = y * z, x * z, x * y
        slopes[11, 1], slopes[11, 2] = 5.0 * zz - 1.0, 10.0 * y * z
        slopes[12, 2] = 15.0 * zz - 3.0
        slopes[13, 0], slopes[13, 2] = 5.0 * zz - 1.0, 10.0 * x * z
        slopes[14, 0], slopes[14, 1], slopes[14, 2] = 2.0 * x * z, -2.0 * y * z, xx - yy
        slopes[15, 0], slopes[15, 1] = 3.0 * (xx - yy), -6.0 * x * y
    for k in range(terms):
        for n in range(3):
            slopes[k, n] *= factors[k]


@njit(**_FAST)
def _unit(directions, i):
    """Return a direction of length one as (x, y, z), and one over its length."""
    z, y, x = np.float64(directions[i, 0]), np.float64(directions[i, 1]), np.float64(directions[i, 2])
    inverse = 1.0 / max(math.sqrt(x * x + y * y + z * z), 1e-12)
    return x * inverse, y * inverse, z * inverse, inverse


@njit(**_FAST)
def _shade(start, stop, coefficients, directions, factors, out):
    """Write half plus the sums of spherical harmonics, not below zero."""
    terms = coefficients.shape[1]
    values, none = np.empty(16), np.empty((0, 3))
    for i in range(start, stop):
        x, y, z, _ = _unit(directions, i)
        _polynomials(x, y, z, terms, factors, values, none)
        red = green = blue = 0.5
        for k in range(terms):
            red += values[k] * np.float64(coefficients[i, k, 0])
            green += values[k] * np.float64(coefficients[i, k, 1])
            blue += values[k] * np.float64(coefficients[i, k, 2])
        out[i, 0], out[i, 1], out[i, 2] = max(red, 0.0), max(green, 0.0), max(blue, 0.0)


@njit(**_FAST)
def _unshade(start, stop, coefficients, directions, factors, out, grad, d_coefficients, d_directions):
    """Write the gradients of coefficients and directions."""
    terms = coefficients.shape[1]
    values, slopes = np.empty(16), np.zeros((16, 3))
    for i in range(start, stop):
        x, y, z, inverse = _unit(directions, i)
        _polynomials(x, y, z, terms, factors, values, slopes)
        red = np.float64(grad[i, 0]) if out[i, 0] > 0.0 else 0.0
        green = np.float64(grad[i, 1]) if out[i, 1] > 0.0 else 0.0
        blue = np.float64(grad[i, 2]) if out[i, 2] > 0.0 else 0.0
        dx = dy = dz = 0.0
        for k in range(terms):
            d_coefficients[i, k, 0] = red * values[k]
            d_coefficients[i, k, 1] = green * values[k]
            d_coefficients[i, k, 2] = blue * values[k]
            weight = red * np.float64(coefficients[i, k, 0])
            weight += green * np.float64(coefficients[i, k, 1]) + blue * np.float64(coefficients[i, k, 2])
            dx += weight * slopes[k, 0]
            dy += weight * slopes[k, 1]
            dz += weight * slopes[k, 2]
        along = dx * x + dy * y + dz * z  # the length does not count
        d_directions[i, 0] = (dz - along * z) * inverse
        d_directions[i, 1] = (dy - along * y) * inverse
        d_directions[i, 2] = (dx - along * x) * inverse


@njit(**_EXACT)
def _prepare(start, stop, splats, height, width, least, records, boxes):
    """Write the record of each Gaussian, and the cells that it meets (none if it is out of sight).

    Record: column, row; ixx, slope and pyy, the first and last times -log2(e) / 2; log2 of the opacity; half
    height of the support; column of its middle for each row; half width at the centre; row of its rightmost point;
    one over the half height.
    """
    for i in range(start, stop):
        for n in range(4):
            boxes[i, n] = 0
        x, y = np.float64(splats[i, 0]), np.float64(splats[i, 1])
        ixx, slope, pyy = np.float64(splats[i, 2]), np.float64(splats[i, 3]), np.float64(splats[i, 4])
        opacity = np.float64(splats[i, 5])
        if not (opacity >= least and math.isfinite(x + y + slope + opacity)):
            continue
        if not (ixx > 1e-30 and pyy > 1e-30 and ixx < 1e30 and pyy < 1e30):
            continue
        cut = 2.0 * math.log(opacity / least) + SLACK
        cxx = 1.0 / ixx
        cyy = 1.0 / pyy + slope * slope * cxx
        hx = math.sqrt(cut * cxx)
        hy = math.sqrt(cut * cyy)
        if not (x + hx >= 0.0 and x - hx <= width - 1.0 and y + hy >= 0.0 and y - hy <= height - 1.0):
            continue
        left, right = math.ceil(max(x - hx, 0.0)), math.floor(min(x + hx, width - 1.0))
        top, bottom = math.ceil(max(y - hy, 0.0)), math.floor(min(y + hy, height - 1.0))
        if left > right or top > bottom:
            continue
        boxes[i, 0] = left // CELL
        boxes[i, 1] = right // CELL + 1
        boxes[i, 2] = top // CELL
        boxes[i, 3] = bottom // CELL + 1
        o = i * FIELDS
        tilt = -slope * cxx / cyy
        records[o] = x
        records[o + 1] = y
        records[o + 2] = -HALF_LOG2E * ixx
        records[o + 3] = slope
        records[o + 4] = -HALF_LOG2E * pyy
        records[o + 5] = math.log2(opacity)
        records[o + 6] = hy
        records[o + 7] = tilt
        records[o + 8] = math.sqrt(cut / (pyy * cyy * ixx))
        records[o + 9] = tilt * cyy * hx / cxx
        records[o + 10] = 1.0 / hy


@njit(**_EXACT)
def _count(boxes, across, slots, counts):
    """Find the first place of each Gaussian's sums, and how many Gaussians each cell has."""
    total = 0
    for i in range(len(boxes)):
        slots[i] = total
        total += (boxes[i, 1] - boxes[i, 0]) * (boxes[i, 3] - boxes[i, 2])
        for y in range(boxes[i, 2], boxes[i, 3]):
            for x in range(boxes[i, 0], boxes[i, 1]):
                counts[y * across + x] += 1
    slots[len(boxes)] = total


@njit(**_EXACT)
def _fill(order, boxes, across, slots, cursor, members, places):
    """List the Gaussians of each cell in their order, and where each cell writes its sums."""
    for j in range(len(order)):
        i = order[j]
        place = slots[i]
        for y in range(boxes[i, 2], boxes[i, 3]):
            for x in range(boxes[i, 0], boxes[i, 1]):
                at = cursor[y * across + x]
                members[at] = i
                places[at] = place
                cursor[y * across + x] = at + 1
                place += 1


@njit(**_FAST)
def _clear(scratch, stride, rows, columns):
    """Let all light come through to the pixels inside the image and none to those outside, all else being zero."""
    for o in range(0, BLOCKS * BLOCKS * stride, WIDTH):
        store(scratch, o, splat(np.float32(0.0)))
    for y in range(rows):
        for x in range(columns):
            put(scratch, _pixel(y, x, stride), np.float32(1.0))


@njit(**_FAST)
def _pixel(y, x, stride):
    return ((y // EDGE) * BLOCKS + x // EDGE) * stride + (y % EDGE) * EDGE + x % EDGE


@njit(**_FAST)
def _lit(scratch, stride, least):
    """Return whether light still reaches any pixel of the cell."""
    for o in range(0, BLOCKS * BLOCKS * stride, stride):  # noqa: SIM110
        if _any_from(load(scratch, o), least):
            return True
    return False


@njit(**_FAST)
def _spans(spans, start, mx, my, hy, tilt, half, top_x, ihy):
    """Write the first block that the support meets in each row of blocks, and behind sixteen of them the last."""
    one = np.float32(1.0)
    quarter = np.float32(1.0 / EDGE)
    low = lanes() * np.float32(EDGE) - my
    high = clamp(low + np.float32(EDGE - 1), -hy, hy)
    low = clamp(low, -hy, hy)
    a = clamp(splat(top_x), low, high)
    b = clamp(splat(-top_x), low, high)
    ra = a * ihy
    rb = b * ihy
    right = a * tilt + _sqrt(clamp(one - ra * ra, np.float32(0.0), one)) * half
    left = b * tilt - _sqrt(clamp(one - rb * rb, np.float32(0.0), one)) * half
    # the block of the first column is that of the least integer at or beyond the limit
    first = _ceil((left + (mx - np.float32(EDGE - 1))) * quarter)
    final = _floor((right + mx) * quarter)
    store(spans, start, clamp(first, np.float32(0.0), np.float32(BLOCKS)))
    store(spans, start + WIDTH, clamp(final, -one, np.float32(BLOCKS - 1)))


@njit(**_FAST)
def _forward(
    channels, start, stop, across, height, width, records, colours, begins, members, used, least, most, dark,
    scratch, out,
):  # fmt: skip
    """Draw some cells; notes for each how many Gaussians were met before no light was left."""
    count = len(channels)
    stride = WIDTH * (count + 1)
    line = BLOCKS * stride
    spans = BLOCKS * line
    zero = np.float32(0.0)
    last = np.float32(CELL - 1)
    pixels = height * width
    for cell in range(start, stop):
        cell_y = cell // across * CELL
        cell_x = cell % across * CELL
        rows = min(CELL, height - cell_y)
        columns = min(CELL, width - cell_x)
        _clear(scratch, stride, rows, columns)
        hi = begins[cell + 1]
        for j in range(begins[cell], hi):
            if (j - begins[cell]) % LOOK == LOOK - 1 and not _lit(scratch, stride, dark):
                hi = j
                break
            i = np.int64(at(members, j))
            p = i * FIELDS
            mx = at(records, p) - np.float32(cell_x)
            my = at(records, p + 1) - np.float32(cell_y)
            ax = at(records, p + 2)
            slope = at(records, p + 3)
            ay = at(records, p + 4)
            peak = at(records, p + 5)
            hy = at(records, p + 6)
            tilt = at(records, p + 7)
            half = at(records, p + 8)
            top_x = at(records, p + 9)
            ihy = at(records, p + 10)
            colour = channel_values(channels, colours, i * count)
            lanes_t = _rows() + _columns() * slope
            _spans(scratch, spans, mx, my, hy, tilt, half, top_x, ihy)
            y0 = ceil_index(min(max(my - hy, zero), last)) // EDGE
            y1 = floor_index(max(min(my + hy, last), zero)) // EDGE
            for by in range(y0, y1 + 1):
                first = at(scratch, spans + by)
                low = np.float32(by * EDGE) - my
                left = first * np.float32(EDGE) - mx
                o = by * line + np.int64(first) * stride
                end = by * line + np.int64(at(scratch, spans + WIDTH + by)) * stride
                while o <= end:
                    through = load(scratch, o)
                    if _any_from(through, dark):
                        x = _columns() + left
                        t = lanes_t + (low + slope * left)
                        a = keep_from(_power(x * (x * ax) + (t * (t * ay) + peak)), least)
                        w = _where_from(through, dark, minimum(a, most)) * through
                        store(scratch, o, through - w)
                        channel_add(scratch, o + WIDTH, WIDTH, colour, w)
                    left += np.float32(EDGE)
                    o += stride
        used[cell] = hi
        for y in range(rows):
            for x in range(columns):
                p = _pixel(y, x, stride)
                o = (cell_y + y) * width + cell_x + x
                put(out, o + count * pixels, np.float32(1.0) - at(scratch, p))
                for channel in range(count):
                    put(out, o + channel * pixels, at(scratch, p + (channel + 1) * WIDTH))


@njit(**_FAST)
def _backward(
    channels, start, stop, across, height, width, records, colours, begins, members, used, places, least, most, dark,
    out, grad, scratch, sums,
):  # fmt: skip
    """Write the sums of each Gaussian in some cells to its places.

    A block's numbers: the light that comes through; what the Gaussians further behind give to the sum of w v; the
    gradient of the opacity; the gradients of the channels.
    """
    count = len(channels)
    stride = WIDTH * (count + 3)
    line = BLOCKS * stride
    spans = BLOCKS * line
    zero = np.float32(0.0)
    one = np.float32(1.0)
    last = np.float32(CELL - 1)
    none = splat(zero)
    pixels = height * width
    for cell in range(start, stop):
        cell_y = cell // across * CELL
        cell_x = cell % across * CELL
        rows = min(CELL, height - cell_y)
        columns = min(CELL, width - cell_x)
        _clear(scratch, stride, rows, columns)
        for y in range(rows):
            for x in range(columns):
                p = _pixel(y, x, stride)
                o = (cell_y + y) * width + cell_x + x
                total = at(grad, o + count * pixels) * at(out, o + count * pixels)
                put(scratch, p + 2 * WIDTH, at(grad, o + count * pixels))
                for channel in range(count):
                    g = at(grad, o + channel * pixels)
                    put(scratch, p + (channel + 3) * WIDTH, g)
                    total += g * at(out, o + channel * pixels)
                put(scratch, p + WIDTH, total)
        for j in range(begins[cell], used[cell]):
            i = np.int64(at(members, j))
            p = i * FIELDS
            mx = at(records, p) - np.float32(cell_x)
            my = at(records, p + 1) - np.float32(cell_y)
            ax = at(records, p + 2)
            slope = at(records, p + 3)
            ay = at(records, p + 4)
            peak = at(records, p + 5)
            hy = at(records, p + 6)
            tilt = at(records, p + 7)
            half = at(records, p + 8)
            top_x = at(records, p + 9)
            ihy = at(records, p + 10)
            colour = channel_values(channels, colours, i * count)
            totals = channel_zeros(channels)
            lanes_t = _rows() + _columns() * slope
            m0 = none
            mx1 = none
            mt1 = none
            mxx = none
            mxt = none
            mtt = none
            _spans(scratch, spans, mx, my, hy, tilt, half, top_x, ihy)
            y0 = ceil_index(min(max(my - hy, zero), last)) // EDGE
            y1 = floor_index(max(min(my + hy, last), zero)) // EDGE
            for by in range(y0, y1 + 1):
                first = at(scratch, spans + by)
                low = np.float32(by * EDGE) - my
                left = first * np.float32(EDGE) - mx
                o = by * line + np.int64(first) * stride
                end = by * line + np.int64(at(scratch, spans + WIDTH + by)) * stride
                while o <= end:
                    through = load(scratch, o)
                    if _any_from(through, dark):
                        x = _columns() + left
                        t = lanes_t + (low + slope * left)
                        full = _power(x * (x * ax) + (t * (t * ay) + peak))
                        a = minimum(keep_from(full, least), most)
                        a = _where_from(through, dark, a)
                        w = a * through
                        store(scratch, o, through - w)
                        v, totals = channel_dot(scratch, o + 3 * WIDTH, WIDTH, colour, w, totals)
                        v = v + w * load(scratch, o + 2 * WIDTH)
                        rest = load(scratch, o + WIDTH) - v
                        store(scratch, o + WIDTH, rest)
                        # where the opacity is held at its limit it does not change
                        v = _where_from(most, full, v - rest * (a * _reciprocal(one - a)))
                        vx = v * x
                        vt = v * t
                        m0 = m0 + v
                        mx1 = mx1 + vx
                        mt1 = mt1 + vt
                        mxx = mxx + vx * x
                        mxt = mxt + vx * t
                        mtt = mtt + vt * t
                    left += np.float32(EDGE)
                    o += stride
            _store_sums(sums, np.int64(at(places, j)) * SUMS, m0, mx1, mt1, mxx, mxt, mtt, totals)
        for j in range(used[cell], begins[cell + 1]):
            store(sums, np.int64(at(places, j)) * SUMS, none)


@njit(**_FAST)
def _chain(start, stop, channels, splats, slots, sums, d_splats, d_colours):
    """Add up each Gaussian's sums and turn them into gradients."""
    half = np.float32(0.5)
    for i in range(start, stop):
        if slots[i] == slots[i + 1]:
            continue
        first = slots[i] * SUMS
        total = load(sums, first)
        for o in range(first + SUMS, slots[i + 1] * SUMS, SUMS):
            total = total + load(sums, o)
        store(sums, first, total)
        ixx, slope, pyy = splats[i, 2], splats[i, 3], splats[i, 4]
        across, down = ixx * at(sums, first + 1), pyy * at(sums, first + 2)
        d_splats[i, 0] = across + slope * down
        d_splats[i, 1] = down
        d_splats[i, 2] = -half * at(sums, first + 3)
        d_splats[i, 3] = -pyy * at(sums, first + 4)
        d_splats[i, 4] = -half * at(sums, first + 5)
        d_splats[i, 5] = at(sums, first) / splats[i, 5]
        for channel in range(channels):
            d_colours[i, channel] = at(sums, first + SPLAT + channel)


@dataclass(frozen=True)
class Scene:
    """The Gaussians of one image with the lists of its cells; what backward needs from forward."""

    splats: np.ndarray
    colours: np.ndarray
    size: tuple[int, int]
    limits: tuple[float, float, float]
    records: np.ndarray
    slots: np.ndarray  # (N + 1,): where each Gaussian's sums begin
    begins: np.ndarray  # (cells + 1,): where each cell's list begins
    members: np.ndarray
    places: np.ndarray
    used: np.ndarray  # (cells,): where each cell's list was left
    out: np.ndarray

    @property
    def shared(self) -> tuple:
        """What both kernels are given."""
        return (
            -(-self.size[1] // CELL), *self.size, self.records, self.colours.reshape(-1), self.begins,
            self.members, self.used,
        )  # fmt: skip

    @property
    def tasks(self) -> list[tuple[int, int]]:
        """The cells in pieces, some sixty of them at most."""
        return _pool.ranges(len(self.used), max(1, len(self.used) // 60))


def prepare(
    splats: np.ndarray,
    colours: np.ndarray,
    depths: np.ndarray,
    size: tuple[int, int],
    limits: tuple[float, float, float],
) -> Scene:
    """Make records and lists."""
    n = len(splats)
    height, width = size
    down, across = -(-height // CELL), -(-width // CELL)
    records, boxes = _aligned(np.empty(n * FIELDS + WIDTH, np.float32)), np.empty((n, 4), np.int32)
    least = float(np.float32(limits[0]))
    _pool.run(_prepare, [(*r, splats, height, width, least, records, boxes) for r in _pool.ranges(n, CHUNK)])
    slots, counts = np.empty(n + 1, np.int64), np.zeros(down * across, np.int64)
    _count(boxes, across, slots, counts)
    begins = np.zeros(down * across + 1, np.int64)
    np.cumsum(counts, out=begins[1:])
    members, places = np.empty(int(begins[-1]), np.int32), np.empty(int(begins[-1]), np.int32)
    _fill(depth_order(depths), boxes, across, slots, begins[:-1].copy(), members, places)
    out = np.empty((colours.shape[1] + 1, *size), np.float32)
    return Scene(
        splats, colours, size, limits, records, slots, begins, members, places, np.empty_like(counts), out
    )


def _aligned(memory: np.ndarray) -> np.ndarray:
    """Return float32 memory from its first cache line on, so that no block of sixteen numbers lies across two."""
    start = -memory.ctypes.data // memory.itemsize % WIDTH
    return memory[start : len(memory) - WIDTH + start]


def _scratch(numbers: int) -> np.ndarray:
    """Return this thread's memory for a cell with so many numbers for each pixel, and for the spans of a Gaussian."""
    return _aligned(_planes._scratch((BLOCKS * BLOCKS * numbers + 3) * WIDTH))


def depth_order(depths: np.ndarray) -> np.ndarray:
    """Return the order from front to back; equal depths keep theirs."""
    bits = (depths + np.float32(0.0)).view(np.uint32)  # no negative zero
    # Floats sort like their bits, once those of negative ones are turned round. With the number of the Gaussian
    # behind them no two are equal, and the fastest sort is as good as a stable one.
    bits = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint64)
    keys = bits << np.uint64(32) | np.arange(len(depths), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int32)


def forward_kernel(scene: Scene) -> None:
    """Draw all cells."""
    channels = (0,) * scene.colours.shape[1]
    limits = tuple(np.float32(x) for x in scene.limits)

    def task(start: int, stop: int) -> None:
        scratch = _scratch(len(channels) + 1)
        _forward(channels, start, stop, *scene.shared, *limits, scratch, scene.out.reshape(-1))

    _pool.run(task, scene.tasks)


def backward_kernel(scene: Scene, grad: np.ndarray, sums: np.ndarray) -> None:
    """Write the sums of all cells, for contiguous ``grad`` like ``scene.out``."""
    channels = (0,) * scene.colours.shape[1]
    limits = tuple(np.float32(x) for x in scene.limits)
    arrays = scene.out.reshape(-1), grad.reshape(-1)

    def task(start: int, stop: int) -> None:
        scratch = _scratch(len(channels) + 3)
        _backward(channels, start, stop, *scene.shared, scene.places, *limits, *arrays, scratch, sums)

    _pool.run(task, scene.tasks)


class Shaded(NamedTuple):
    """What colours were made of, and the colours; what :func:`shade_backward` needs."""

    coefficients: np.ndarray
    directions: np.ndarray
    factors: np.ndarray
    out: np.ndarray


def shade(coefficients: np.ndarray, directions: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, Shaded]:
    """Return colours from spherical harmonics; see :func:`napari_innergs.operators.rgb.evaluate_harmonics`.

    Parameters
    ----------
    coefficients, directions : ndarray of float32, (N, K, 3), (N, 3)
        Contiguous.
    factors : ndarray of float64, (16,)
        What the polynomials are multiplied by.

    Returns
    -------
    out : ndarray of float32, (N, 3)
    saved : Shaded
        What :func:`shade_backward` needs.
    """
    n = len(coefficients)
    saved = Shaded(coefficients, directions, factors, np.empty((n, 3), np.float32))
    _pool.run(_shade, [(*r, *saved) for r in _pool.ranges(n, CHUNK)])
    return saved.out, saved


def shade_backward(grad: np.ndarray, saved: Shaded) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of coefficients and directions."""
    grads = np.empty_like(saved.coefficients), np.empty_like(saved.directions)
    _pool.run(_unshade, [(*r, *saved, grad, *grads) for r in _pool.ranges(len(grad), CHUNK)])
    return grads


class Projected(NamedTuple):
    """What a projection was given and what it gave; what its backward needs."""

    means: np.ndarray
    covs: np.ndarray
    opacities: np.ndarray
    camera: np.ndarray
    edges: np.ndarray
    dilation: float
    antialias: bool
    splats: np.ndarray


def project(
    means: np.ndarray,
    covs: np.ndarray,
    opacities: np.ndarray,
    camera: np.ndarray,
    edges: np.ndarray,
    rules: tuple[float, float, float],
    antialias: bool,
) -> tuple[np.ndarray, np.ndarray, Projected]:
    """Project Gaussians; see :func:`napari_innergs.operators.rgb.project_splats` for the formula.

    Parameters
    ----------
    means, covs, opacities : ndarray of float32, (N, 3), (N, 6), (N,)
        Contiguous; covariances are [zz, zy, zx, yy, yx, xx].
    camera : ndarray of float64, (17,)
        Rotation (by rows) and translation into the camera; focal length, skew and centre of columns, focal length and
        centre of rows.
    edges : ndarray of float64, (4,)
        Least and greatest x / z, then y / z, at which the derivative of the projection is taken.
    rules : tuple of float
        Squared radius of the support; share of its depth that it must keep from the plane through the camera; what
        both variances are widened by.
    antialias : bool
        Whether opacities make up for the widening.

    Returns
    -------
    splats : ndarray of float32, (N, 6)
        As in :func:`forward`.
    depths : ndarray of float32, (N,)
    saved : Projected
        What :func:`project_backward` needs.
    """
    cut, near, dilation = rules
    n = len(means)
    splats, depths = np.empty((n, SPLAT), np.float32), np.empty(n, np.float32)
    shared = (means, covs, opacities, camera, edges, cut, near, dilation, antialias, splats, depths)
    _pool.run(_project, [(*r, *shared) for r in _pool.ranges(n, CHUNK)])
    return splats, depths, Projected(means, covs, opacities, camera, edges, dilation, antialias, splats)


def project_backward(
    d_splats: np.ndarray, d_depths: np.ndarray, saved: Projected, camera_too: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of means, covariances, opacities and camera, the last zeros unless ``camera_too``."""
    n = len(saved.means)
    d_means, d_covs = np.empty((n, 3), np.float32), np.empty((n, 6), np.float32)
    d_opacities = np.empty(n, np.float32)
    pieces = _pool.ranges(n, CHUNK)
    d_camera = np.zeros((max(len(pieces), 1), CAMERA))
    shared = (*saved, d_splats, d_depths, camera_too, d_means, d_covs, d_opacities)
    _pool.run(_pull_back, [(*r, *shared, d_camera[k]) for k, r in enumerate(pieces)])
    return d_means, d_covs, d_opacities, d_camera.sum(0)


def forward(
    splats: np.ndarray,
    colours: np.ndarray,
    depths: np.ndarray,
    size: tuple[int, int],
    limits: tuple[float, float, float],
) -> tuple[np.ndarray, Scene]:
    """Draw Gaussians; see :func:`napari_innergs.operators.rgb.render_rgb` for the formula.

    Parameters
    ----------
    splats : ndarray of float32, (N, 6)
        Contiguous: column, row, ixx, slope, pyy and opacity, as in :mod:`napari_innergs.reference.rgb`.
    colours : ndarray of float32, (N, C)
        Contiguous; at most ten channels.
    depths : ndarray of float32, (N,)
        The least is in front; equal ones keep their order.
    size : tuple of int
        Rows and columns.
    limits : tuple of float
        Opacity at a pixel below which there is none; greatest opacity; share of light below which a pixel is
        finished.

    Returns
    -------
    out : ndarray of float32, (C + 1, rows, columns)
        The channels, and the opacity of the sum.
    saved : Scene
        What :func:`backward` needs.
    """
    scene = prepare(splats, colours, depths, size, limits)
    forward_kernel(scene)
    return scene.out, scene


def backward(grad_out: np.ndarray, saved: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of splats and colours for ``grad_out`` (C + 1, rows, columns)."""
    n, channels = saved.colours.shape
    sums = _aligned(np.empty(int(saved.slots[-1]) * SUMS + WIDTH, np.float32))
    backward_kernel(saved, np.ascontiguousarray(grad_out), sums)
    d_splats, d_colours = np.zeros((n, SPLAT), np.float32), np.zeros((n, channels), np.float32)
    shared = (channels, saved.splats, saved.slots, sums, d_splats, d_colours)
    _pool.run(_chain, [(*r, *shared) for r in _pool.ranges(n, 4 * CHUNK)])
    return d_splats, d_colours
