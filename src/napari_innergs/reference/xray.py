"""Line integrals of Gaussians onto flat panels in plain torch: slow, in float64, plainly right.

A view is a row of 20 numbers, all in the frame of the Gaussians (see
:func:`napari_innergs.operators.xray.panel_frames`): the source or the ray direction, u, v, the normal that gives
1 on the panel, the two vectors that give columns and rows, and the column and row to take off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from napari_innergs._constants import VARIANCE_RANGE
from napari_innergs.reference.slices import covariance_matrices, pixel_grid, usable

# Numbers in the largest temporary array.
_BUDGET = 4_000_000


@dataclass(frozen=True)
class Setting:
    """What all views have in common."""

    cone: bool
    exact: bool
    rows: int
    columns: int
    cut: float
    near: float


def _view(means: Tensor, covs: Tensor, amps: Tensor, frame: Tensor, setting: Setting) -> Tensor:
    """Return (C, rows, columns): see :func:`napari_innergs.operators.xray.render_xray` for the formula.

    For an exact cone beam the length of the vector from the source to the pixel is left out.
    """
    dtype, keep = means.dtype, usable(means, covs)
    means, covs, amps = means.double(), covs.double(), amps.double()
    p, u, v, normal, to_column, to_row, shift = frame.split([3, 3, 3, 3, 3, 3, 2])
    s = covariance_matrices(covs)
    if setting.cone:
        depth = (means - p) @ normal
        reach = torch.sqrt(setting.cut * torch.einsum("a,nab,b->n", normal, s, normal).clamp_min(0))
        keep = keep & (depth - reach > setting.near * depth)
    means, amps, s = means[keep], amps[keep], s[keep]
    if setting.cone:
        delta = means - p
        scale = delta @ normal
        ray = delta / scale[:, None]
        x0, y0 = ray @ to_column - shift[0], ray @ to_row - shift[1]
    else:
        ray = p.expand_as(means)
        scale = torch.ones_like(means[:, 0])
        x0, y0 = means @ to_column - shift[0], means @ to_row - shift[1]
    # P d, P u and P v, with P = S^-1.
    along = torch.linalg.solve(s, torch.stack([ray, u.expand_as(ray), v.expand_as(ray)], 2)).unbind(2)
    a0 = (ray * along[0]).sum(1)
    crosses = [torch.linalg.cross(ray, one.expand_as(ray)) for one in (u, v)]
    # |W d x W u|^2 = det P (d x u)^T S (d x u) for P = W^T W
    det = torch.linalg.det(s)
    factor = scale**2 / (a0 * det)
    kxx, kxy, kyy = (
        factor * torch.einsum("na,nab,nb->n", crosses[i], s, crosses[j]) for i, j in ((0, 0), (0, 1), (1, 1))
    )
    least, most = torch.minimum(kxx, kyy), torch.maximum(kxx, kyy)
    fits = (least > VARIANCE_RANGE[0]) & (most < VARIANCE_RANGE[1]) & torch.isfinite(x0 + y0)
    pixels = pixel_grid(setting.rows, setting.columns, means)
    out = torch.zeros(amps.shape[1], len(pixels), dtype=means.dtype, device=means.device)
    step = max(1, _BUDGET // max(len(pixels), 1))
    peak = torch.sqrt(2 * math.pi / a0)
    if not (setting.cone and setting.exact):
        peak = peak * torch.linalg.norm(ray, dim=1)
    for i in range(0, len(means), step):
        part = slice(i, i + step)
        column = lambda values, part=part: values[part, None]  # noqa: E731
        x, y = pixels[:, 1] - column(x0), pixels[:, 0] - column(y0)
        q = column(kxx) * x * x + 2 * column(kxy) * x * y + column(kyy) * y * y
        r = torch.ones_like(q)
        if setting.cone and setting.exact:
            ray_u, ray_v = column(along[0] @ u), column(along[0] @ v)
            uu, uv, vv = column(along[1] @ u), column(along[1] @ v), column(along[2] @ v)
            more = 2 * (ray_u * x + ray_v * y) + uu * x * x + 2 * uv * x * y + vv * y * y
            r = 1 + more / column(a0)
        inside = (q <= setting.cut * r) & column(fits)
        r = torch.where(inside, r, 1)
        g = torch.where(inside, torch.exp(-0.5 * q / r) / torch.sqrt(r), 0)
        out = out + torch.einsum("nc,nk->ck", amps[part] * column(peak), g)
    return out.reshape(-1, setting.rows, setting.columns).to(dtype)


@dataclass(frozen=True)
class Saved:
    """The inputs of a forward call."""

    means: Tensor
    covs: Tensor
    amps: Tensor
    frames: Tensor
    setting: Setting


def forward(
    means: Tensor,
    covs: Tensor,
    amps: Tensor,
    frames: Tensor,
    cone: bool,
    exact: bool,
    size: tuple[int, int],
    cut: float,
    near: float,
) -> tuple[Tensor, Saved]:
    """Render (n, C, rows, columns); arguments as in :func:`napari_innergs.cpu.xray.forward`, as tensors."""
    frames = frames.double()
    setting = Setting(cone, exact, *size, cut, near)
    with torch.no_grad():
        views = [_view(means, covs, amps, one, setting) for one in frames]
        out = torch.stack(views) if views else means.new_zeros(0, amps.shape[1], *size)
    return out, Saved(means, covs, amps, frames, setting)


def backward(grad_out: Tensor, saved: Saved, frames_too: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of means, covariances, amplitudes and views, by automatic differentiation."""
    leaves = [
        x.detach().clone().requires_grad_() for x in (saved.means, saved.covs, saved.amps, saved.frames)
    ]
    totals = [torch.zeros_like(x) for x in leaves]
    for k, grad in enumerate(grad_out):
        with torch.enable_grad():
            view = _view(leaves[0], leaves[1], leaves[2], leaves[3][k], saved.setting)
        if view.requires_grad:  # not so when there is nothing to sum
            parts = torch.autograd.grad(view, leaves, grad, allow_unused=True)
            totals = [a if b is None else a + b for a, b in zip(totals, parts, strict=True)]
    return totals[0], totals[1], totals[2], totals[3]
