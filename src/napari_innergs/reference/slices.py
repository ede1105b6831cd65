"""Slices through a sum of Gaussians in plain torch: slow, any float type, plainly right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from napari_innergs._constants import MIN_PIVOT, VARIANCE_RANGE

# Numbers in the largest temporary array.
_BUDGET = 4_000_000


def covariance_matrices(covs: Tensor) -> Tensor:
    """Return symmetric matrices (N, 3, 3) from upper triangles (N, 6)."""
    return covs[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3)


def usable(means: Tensor, covs: Tensor) -> Tensor:
    """Return which Gaussians are finite and have a covariance that is positive definite beyond rounding."""
    tt, tr, tc, rr, rc, cc = covs.detach().double().unbind(1)
    crr = rr - tr * tr / tt
    det = crr * (cc - tc * tc / tt) - (rc - tr * tc / tt) ** 2
    finite = torch.isfinite(means.detach()).all(1) & torch.isfinite(covs.detach()).all(1)
    variances = torch.stack([tt, rr, cc])
    in_range = ((variances > VARIANCE_RANGE[0]) & (variances < VARIANCE_RANGE[1])).all(0)
    return finite & in_range & (crr > MIN_PIVOT * rr) & (det > MIN_PIVOT * crr * cc)


def sample(means: Tensor, covs: Tensor, amps: Tensor, points: Tensor, cut: float) -> Tensor:
    """Return the field (C, K) at ``points`` (K, 3): sum_i a_i exp(-d2_i / 2) over the i with d2_i <= cut."""
    keep = usable(means, covs)
    means, covs, amps = means[keep], covs[keep], amps[keep]
    out = torch.zeros(amps.shape[1], len(points), dtype=means.dtype, device=means.device)
    precision = torch.linalg.inv(covariance_matrices(covs))
    step = max(1, _BUDGET // max(3 * len(points), 1))
    for i in range(0, len(means), step):
        d = points[None] - means[i : i + step, None]
        d2 = torch.einsum("nka,nab,nkb->nk", d, precision[i : i + step], d)
        g = torch.where(d2 <= cut, torch.exp(-0.5 * d2), 0)
        out = out + torch.einsum("nc,nk->ck", amps[i : i + step], g)
    return out


def pixel_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Return the (row, column) of each pixel, (H * W, 2)."""
    rows = torch.arange(height, dtype=like.dtype, device=like.device)
    columns = torch.arange(width, dtype=like.dtype, device=like.device)
    return torch.cartesian_prod(rows, columns).reshape(-1, 2)


@dataclass(frozen=True)
class Saved:
    """The inputs of a forward call."""

    means: Tensor
    covs: Tensor
    amps: Tensor
    t: Tensor
    height: int
    width: int
    cut: float


def _plane(
    means: Tensor, covs: Tensor, amps: Tensor, t: Tensor, height: int, width: int, cut: float
) -> Tensor:
    pixels = pixel_grid(height, width, means)
    points = torch.cat([t.expand(len(pixels), 1), pixels], 1)
    return sample(means, covs, amps, points, cut).reshape(-1, height, width)


def forward(
    means: Tensor, covs: Tensor, amps: Tensor, t: Tensor, height: int, width: int, cut: float
) -> tuple[Tensor, Saved]:
    """Render slices (M, C, H, W); arguments as in :func:`napari_innergs.cpu.slices.forward`, as tensors."""
    with torch.no_grad():
        planes = [_plane(means, covs, amps, one, height, width, cut) for one in t]
        out = torch.stack(planes) if planes else means.new_zeros(0, amps.shape[1], height, width)
    return out, Saved(means, covs, amps, t, height, width, cut)


def backward(grad_out: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of means, covariances and amplitudes, by automatic differentiation."""
    leaves = [x.detach().clone().requires_grad_() for x in (saved.means, saved.covs, saved.amps)]
    totals = [torch.zeros_like(x) for x in leaves]
    for one, grad in zip(saved.t, grad_out, strict=True):
        with torch.enable_grad():
            plane = _plane(leaves[0], leaves[1], leaves[2], one, saved.height, saved.width, saved.cut)
        if plane.requires_grad:  # not so when there is nothing to sum
            parts = torch.autograd.grad(plane, leaves, grad, allow_unused=True)
            totals = [a if b is None else a + b for a, b in zip(totals, parts, strict=True)]
    return totals[0], totals[1], totals[2]
