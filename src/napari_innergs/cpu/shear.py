"""Sheared Gaussians from their parameters, and Adam, each in one pass over the Gaussians."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from napari_innergs.cpu import _pool

_PIECE = 16384
Saved = tuple[np.ndarray, ...]


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _forward(start, stop, shear, log_through, cholesky, amplitude, log_weight, covs, channels):  # type: ignore[no-untyped-def]
    count = amplitude.shape[1]
    for i in range(start, stop):
        sr, sc = shear[i, 0], shear[i, 1]
        tt = math.exp(np.float32(2) * log_through[i])
        l11, l21, l22 = math.exp(cholesky[i, 0]), cholesky[i, 1], math.exp(cholesky[i, 2])
        covs[i, 0] = tt
        covs[i, 1] = sr * tt
        covs[i, 2] = sc * tt
        covs[i, 3] = l11 * l11 + sr * sr * tt
        covs[i, 4] = l11 * l21 + sr * sc * tt
        covs[i, 5] = l21 * l21 + l22 * l22 + sc * sc * tt
        weight = math.exp(log_weight[i])
        for c in range(count):
            channels[i, c] = weight * amplitude[i, c]
        channels[i, count] = weight


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _backward(start, stop, shear, log_through, cholesky, amplitude, log_weight, gc, gf, ds, dt, dl, da, dw):  # type: ignore[no-untyped-def]
    count = amplitude.shape[1]
    two = np.float32(2)
    for i in range(start, stop):
        sr, sc = shear[i, 0], shear[i, 1]
        tt = math.exp(two * log_through[i])
        l11, l21, l22 = math.exp(cholesky[i, 0]), cholesky[i, 1], math.exp(cholesky[i, 2])
        g1, g2, g3, g4, g5 = gc[i, 1], gc[i, 2], gc[i, 3], gc[i, 4], gc[i, 5]
        dt[i] = two * tt * (gc[i, 0] + sr * g1 + sc * g2 + sr * sr * g3 + sr * sc * g4 + sc * sc * g5)
        ds[i, 0] = tt * (g1 + two * sr * g3 + sc * g4)
        ds[i, 1] = tt * (g2 + sr * g4 + two * sc * g5)
        dl[i, 0] = l11 * (two * l11 * g3 + l21 * g4)
        dl[i, 1] = l11 * g4 + two * l21 * g5
        dl[i, 2] = two * l22 * l22 * g5
        weight = math.exp(log_weight[i])
        total = gf[i, count]
        for c in range(count):
            total += amplitude[i, c] * gf[i, c]
            da[i, c] = weight * gf[i, c]
        dw[i] = weight * total


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
def _adam(start, stop, value, gradient, first, second, beta1, beta2, rate, tiny):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        g = gradient[i]
        first[i] += (np.float32(1) - beta1) * (g - first[i])
        second[i] += (np.float32(1) - beta2) * (g * g - second[i])
        value[i] -= rate * first[i] / (math.sqrt(second[i]) + tiny)


def forward(
    shear: np.ndarray,
    log_through: np.ndarray,
    cholesky: np.ndarray,
    amplitude: np.ndarray,
    log_weight: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, Saved]:
    """Return covariances (N, 6), channels (N, C + 1) and what `backward` needs; all float32, contiguous."""
    n, channels = amplitude.shape
    out = np.empty((n, 6), np.float32), np.empty((n, channels + 1), np.float32)
    inputs = (shear, log_through, cholesky, amplitude, log_weight)
    _pool.run(_forward, [(*part, *inputs, *out) for part in _pool.ranges(n, _PIECE)])
    return *out, inputs


def backward(grad_covs: np.ndarray, grad_channels: np.ndarray, saved: Saved) -> tuple[np.ndarray, ...]:
    """Return the gradients of the five inputs."""
    grads = tuple(np.empty_like(x) for x in saved)
    pieces = _pool.ranges(len(grad_covs), _PIECE)
    _pool.run(_backward, [(*part, *saved, grad_covs, grad_channels, *grads) for part in pieces])
    return grads


def adam(
    value: np.ndarray,
    gradient: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    beta1: float,
    beta2: float,
    rate: float,
    tiny: float,
) -> None:
    """Update flat arrays `value`, `first` and `second` in place by one step of Adam."""
    numbers = [np.float32(x) for x in (beta1, beta2, rate, tiny)]
    pieces = _pool.ranges(len(value), 8 * _PIECE)
    _pool.run(_adam, [(*part, value, gradient, first, second, *numbers) for part in pieces])
