"""Slices through a sum of Gaussians on the CPU."""

from __future__ import annotations

import numpy as np

from napari_innergs.cpu import _planes


def forward(
    means: np.ndarray, covs: np.ndarray, amps: np.ndarray, t: np.ndarray, height: int, width: int, cut: float
) -> tuple[np.ndarray, _planes.Prepared]:
    """Render slices; see :func:`napari_innergs.operators.slices.render_slices` for the formula.

    Parameters
    ----------
    means, covs, amps : ndarray of float32, (N, 3), (N, 6), (N, C)
        Contiguous. The frame is (t, row, column), the covariances are [tt, tr, tc, rr, rc, cc].
    t : ndarray of float32, (M,)
        Positions of the slices, ascending.
    height, width : int
        Pixels.
    cut : float
        Squared Mahalanobis radius of the support.

    Returns
    -------
    out : ndarray of float32, (M, C, H, W)
    saved : Prepared
        What :func:`backward` needs.
    """
    prepared = _planes.prepare(means, covs, amps, t, height, width, cut)
    return _planes.forward(prepared, 1, slab=1), prepared


def backward(grad_out: np.ndarray, saved: _planes.Prepared) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of means, covariances and amplitudes for ``grad_out`` (M, C, H, W)."""
    return _planes.backward(saved, grad_out, 1)
