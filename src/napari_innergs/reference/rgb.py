"""Sorted alpha compositing of 2D Gaussians in plain torch: slow, in float64, plainly right.

A Gaussian is six numbers: column, row, ixx, slope, pyy and opacity o. With (x, y) the offset from its centre its
opacity at a pixel is ``o exp(-q / 2)``, ``q = ixx x^2 + pyy (y + slope x)^2``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from napari_innergs.reference.slices import pixel_grid

# Numbers in the largest temporary array.
_BUDGET = 4_000_000


@dataclass(frozen=True)
class Saved:
    """The inputs of a forward call."""

    splats: Tensor
    colours: Tensor
    depths: Tensor
    size: tuple[int, int]
    limits: tuple[float, float, float]


def _draw(splats: Tensor, colours: Tensor, s: Saved, pixels: Tensor) -> Tensor:
    """Return (C + 1, K), the colours and the opacity of the sum at ``pixels`` (K, 2)."""
    least, most, stop = s.limits
    usable = torch.isfinite(splats.detach()).all(1) & (splats.detach()[:, 5] >= least)
    order = torch.argsort(s.depths.float(), stable=True)
    order = order[usable[order]]
    column, row, ixx, slope, pyy, opacity = splats[order].unbind(1)
    x, y = pixels[:, 1] - column[:, None], pixels[:, 0] - row[:, None]
    q = ixx[:, None] * x**2 + pyy[:, None] * (y + slope[:, None] * x) ** 2
    alpha = opacity[:, None] * torch.exp(-0.5 * q)
    alpha = torch.where(alpha >= least, alpha.clamp(max=most), 0.0)
    through = torch.cumprod(1 - alpha, 0)
    through = torch.cat([torch.ones_like(through[:1]), through[:-1]])
    weight = torch.where(through >= stop, alpha * through, 0.0)
    return torch.cat([colours[order].T @ weight, weight.sum(0, keepdim=True)])


def _render(splats: Tensor, colours: Tensor, s: Saved) -> Tensor:
    splats, colours = splats.double(), colours.double()
    pixels = pixel_grid(*s.size, splats)
    step = max(1, _BUDGET // max(len(splats), 1))
    parts = [_draw(splats, colours, s, pixels[i : i + step]) for i in range(0, len(pixels), step)]
    return torch.cat(parts, 1).reshape(-1, *s.size)


def forward(
    splats: Tensor, colours: Tensor, depths: Tensor, size: tuple[int, int], limits: tuple[float, float, float]
) -> tuple[Tensor, Saved]:
    """Render (C + 1, rows, columns); arguments as in :func:`napari_innergs.cpu.rgb.forward`, as tensors."""
    saved = Saved(splats, colours, depths, size, limits)
    with torch.no_grad():
        return _render(splats, colours, saved), saved


def backward(grad_out: Tensor, saved: Saved) -> tuple[Tensor, Tensor]:
    """Return the gradients of splats and colours, by automatic differentiation."""
    leaves = [x.detach().clone().requires_grad_() for x in (saved.splats, saved.colours)]
    with torch.enable_grad():
        out = _render(leaves[0], leaves[1], saved)
    parts = torch.autograd.grad(out, leaves, grad_out.double())
    return parts[0], parts[1]
