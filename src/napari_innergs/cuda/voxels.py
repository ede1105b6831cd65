"""A sum of Gaussians at the centres of voxels on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from napari_innergs.cuda import _module, _planes


@_module.guarded
def forward(
    means: Tensor, covs: Tensor, amps: Tensor, shape: tuple[int, int, int], cut: float, z_start: int = 0
) -> tuple[Tensor, _planes.Prepared]:
    """Voxelise; see :func:`napari_innergs.operators.voxels.voxelise`.

    Parameters
    ----------
    means, covs, amps : Tensor of float32, (N, 3), (N, 6), (N, C)
        Contiguous, on one CUDA device, in voxel indices (z, y, x); covariances are [zz, zy, zx, yy, yx, xx].
    shape : tuple of int
        Voxels (Z, Y, X) of the block to return.
    cut : float
        Squared Mahalanobis radius of the support.
    z_start : int
        Index of the first plane of the block, so that a large volume can be made in slabs.

    Returns
    -------
    out : Tensor of float32, (C, Z, Y, X)
    saved : Prepared
        What :func:`backward` needs.
    """
    depth, height, width = shape
    t = torch.arange(z_start, z_start + depth, dtype=torch.float32, device=means.device)
    prepared = _planes.prepare(means, covs, amps, t, height, width, cut)
    return _planes.forward(prepared, 0), prepared


@_module.guarded
def backward(grad_out: Tensor, saved: _planes.Prepared) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of means, covariances and amplitudes for ``grad_out`` (C, Z, Y, X)."""
    return _planes.backward(saved, grad_out, 0)
