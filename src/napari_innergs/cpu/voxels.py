"""A sum of Gaussians at the centres of voxels on the CPU."""

from __future__ import annotations

import numpy as np

from napari_innergs.cpu import _planes


def forward(
    means: np.ndarray,
    covs: np.ndarray,
    amps: np.ndarray,
    shape: tuple[int, int, int],
    cut: float,
    z_start: int = 0,
) -> tuple[np.ndarray, _planes.Prepared]:
    """Voxelise; see :func:`napari_innergs.operators.voxels.voxelise`.

    Parameters
    ----------
    means, covs, amps : ndarray of float32, (N, 3), (N, 6), (N, C)
        Contiguous, in voxel indices (z, y, x); covariances are [zz, zy, zx, yy, yx, xx].
    shape : tuple of int
        Voxels (Z, Y, X) of the block to return.
    cut : float
        Squared Mahalanobis radius of the support.
    z_start : int
        Index of the first plane of the block, so that a large volume can be made in slabs.

    Returns
    -------
    out : ndarray of float32, (C, Z, Y, X)
    saved : Prepared
        What :func:`backward` needs.
    """
    depth, height, width = shape
    t = np.arange(z_start, z_start + depth, dtype=np.float32)
    prepared = _planes.prepare(means, covs, amps, t, height, width, cut)
    return _planes.forward(prepared, 0, slab=8), prepared


def backward(grad_out: np.ndarray, saved: _planes.Prepared) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gradients of means, covariances and amplitudes for ``grad_out`` (C, Z, Y, X)."""
    return _planes.backward(saved, grad_out, 0)
