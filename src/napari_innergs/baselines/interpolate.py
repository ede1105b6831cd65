"""Interpolation along the slice axis: nearest, linear, natural cubic spline and PCHIP, as Hermite cubics.

A method is a set of slopes at the slices; evaluating it anywhere is one Hermite cubic per pixel, so that planes
can be made one at a time and nothing dense is ever held. Irregular positions are used as they are.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.linalg import solve_banded

Interpolation = Literal["nearest", "linear", "cubic", "pchip"]


def slopes(values: np.ndarray, positions: np.ndarray, method: Interpolation) -> np.ndarray | None:
    """Return the derivatives along the slice axis that define a Hermite interpolant.

    Parameters
    ----------
    values : ndarray, shape (n, ...), float32
        Slices in order.
    positions : ndarray, shape (n,)
        Strictly increasing positions.
    method : {"nearest", "linear", "cubic", "pchip"}
        "cubic" is the C2 spline with not-a-knot ends; "pchip" is monotone (Fritsch and Butland 1984).

    Returns
    -------
    ndarray or None
        Slopes, same shape as `values`, intensity per position unit; None where the method needs none.
    """
    if method in ("nearest", "linear"):
        return None
    if len(values) < 3:
        return np.broadcast_to(
            (values[-1] - values[0]) / np.float32(positions[-1] - positions[0]), values.shape
        )
    return _pchip_slopes(values, positions) if method == "pchip" else _spline_slopes(values, positions)


def _pchip_slopes(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    gaps = np.diff(positions).astype(np.float32)
    out = np.zeros_like(values)
    chord = [(values[i + 1] - values[i]) / gaps[i] for i in range(2)]
    out[0] = _pchip_end(gaps[0], gaps[1], chord[0], chord[1])
    for i in range(1, len(values) - 1):
        low = (values[i] - values[i - 1]) / gaps[i - 1]
        high = (values[i + 1] - values[i]) / gaps[i]
        w1, w2 = 2 * gaps[i] + gaps[i - 1], gaps[i] + 2 * gaps[i - 1]
        same = low * high > 0
        bottom = w1 * high + w2 * low
        np.divide((w1 + w2) * low * high, bottom, out=out[i], where=same & (bottom != 0))
    last = [(values[i + 1] - values[i]) / gaps[i] for i in (len(gaps) - 1, len(gaps) - 2)]
    out[-1] = _pchip_end(gaps[-1], gaps[-2], last[0], last[1])
    return out


def _pchip_end(h0: float, h1: float, d0: np.ndarray, d1: np.ndarray) -> np.ndarray:
    # one-sided three-point estimate, limited so that the end stays monotone
    slope = ((2 * h0 + h1) * d0 - h0 * d1) / (h0 + h1)
    slope = np.where(np.sign(slope) != np.sign(d0), 0, slope)
    overshoot = (np.sign(d0) != np.sign(d1)) & (np.abs(slope) > 3 * np.abs(d0))
    return np.where(overshoot, 3 * d0, slope).astype(np.float32)


def _spline_slopes(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    n = len(values)
    x = positions.astype(np.float64)
    h = np.diff(x)
    if n == 3:
        # not-a-knot through three points is the parabola
        first, second = (values[1] - values[0]) / h[0], (values[2] - values[1]) / h[1]
        curvature = (second - first) / (h[0] + h[1])
        return np.stack(
            [first - curvature * h[0], first + curvature * h[0], second + curvature * h[1]]
        ).astype(np.float32)
    band = np.zeros((3, n))
    band[1, 1:-1] = 2 * (h[:-1] + h[1:])
    band[0, 2:] = h[:-1]
    band[2, :-2] = h[1:]
    band[1, 0], band[0, 1] = h[1], h[0] + h[1]
    band[1, -1], band[2, -2] = h[-2], h[-1] + h[-2]
    flat = values.reshape(n, -1)
    out = np.empty_like(flat)
    # blocks of columns keep the double-precision copies small
    for start in range(0, flat.shape[1], 65536):
        y = flat[:, start : start + 65536].astype(np.float64)
        chord = np.diff(y, axis=0) / h[:, None]
        right = np.empty_like(y)
        right[1:-1] = 3 * (h[1:, None] * chord[:-1] + h[:-1, None] * chord[1:])
        d = h[0] + h[1]
        right[0] = ((h[0] + 2 * d) * h[1] * chord[0] + h[0] ** 2 * chord[1]) / d
        d = h[-1] + h[-2]
        right[-1] = (h[-1] ** 2 * chord[-2] + (2 * d + h[-1]) * h[-2] * chord[-1]) / d
        out[:, start : start + 65536] = solve_banded((1, 1), band, right, check_finite=False)
    return out.reshape(values.shape)


def plane(
    values: np.ndarray,
    positions: np.ndarray,
    gap: int,
    share: float,
    method: Interpolation,
    derivative: np.ndarray | None = None,
) -> np.ndarray:
    """Return the interpolated slice at the share (0 to 1) of the gap between slices `gap` and `gap + 1`.

    Parameters
    ----------
    values : ndarray, shape (n, ...), float32
        Slices in order.
    positions : ndarray, shape (n,)
        Their positions.
    gap : int
        Index of the gap.
    share : float
        Position inside the gap, 0 at slice `gap`, 1 at slice `gap + 1`.
    method : {"nearest", "linear", "cubic", "pchip"}
        The interpolation.
    derivative : ndarray or None
        What `slopes` returned for the method.
    """
    low, high = values[gap], values[gap + 1]
    if method == "nearest":
        return (low if share < 0.5 else high).copy()
    if derivative is None:
        return (low + np.float32(share) * (high - low)).astype(np.float32)
    h = np.float32(positions[gap + 1] - positions[gap])
    u = np.float32(share)
    return (
        (1 + 2 * u) * (1 - u) ** 2 * low
        + u**2 * (3 - 2 * u) * high
        + h * (u * (1 - u) ** 2 * derivative[gap] - u**2 * (1 - u) * derivative[gap + 1])
    ).astype(np.float32)
