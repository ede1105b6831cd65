"""A sum of Gaussians at the centres of voxels in plain torch: the slices' field on every plane."""

from __future__ import annotations

import torch
from torch import Tensor

from napari_innergs.reference import slices


def forward(
    means: Tensor, covs: Tensor, amps: Tensor, shape: tuple[int, int, int], cut: float, z_start: int = 0
) -> tuple[Tensor, slices.Saved]:
    """Voxelise to (C, Z, Y, X); arguments as in :func:`napari_innergs.cpu.voxels.forward`, as tensors."""
    depth, height, width = shape
    t = torch.arange(z_start, z_start + depth, dtype=means.dtype, device=means.device)
    out, saved = slices.forward(means, covs, amps, t, height, width, cut)
    return out.transpose(0, 1).contiguous(), saved


def backward(grad_out: Tensor, saved: slices.Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of means, covariances and amplitudes."""
    return slices.backward(grad_out.transpose(0, 1), saved)
