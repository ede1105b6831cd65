"""Sorted alpha compositing of 2D Gaussians on the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from napari_innergs.cuda import _module

RECORD = 12  # float32 in a record
SUMS = 16
#: Entries in the lists of tiles; what backward writes for each takes 64 bytes.
MAX_ENTRIES = 1 << 28


@dataclass(frozen=True)
class Saved:
    """The Gaussians of one image with the lists of its tiles; what backward needs from forward."""

    splats: Tensor
    colours: Tensor
    size: tuple[int, int]
    limits: tuple[float, float, float]
    order: Tensor  # from front to back
    ends: Tensor  # where the entries of each end, in that order
    records: Tensor
    begins: Tensor  # where the list of each tile begins
    members: Tensor
    places: Tensor  # where each tile writes its sums
    used: Tensor  # where on its list each tile had no light left
    out: Tensor


@_module.guarded
def forward(
    splats: Tensor, colours: Tensor, depths: Tensor, size: tuple[int, int], limits: tuple[float, float, float]
) -> tuple[Tensor, Saved]:
    """Draw Gaussians; see :func:`napari_innergs.operators.rgb.render_rgb` for the formula.

    Parameters
    ----------
    splats : Tensor of float32, (N, 6)
        Contiguous, on a CUDA device: column, row, ixx, slope, pyy and opacity, as in
        :mod:`napari_innergs.reference.rgb`.
    colours : Tensor of float32, (N, C)
        Contiguous; at most ten channels.
    depths : Tensor of float32, (N,)
        The least is in front; equal ones keep their order.
    size : tuple of int
        Rows and columns.
    limits : tuple of float
        Opacity at a pixel below which there is none; greatest opacity; share of light below which a pixel is
        finished.

    Returns
    -------
    out : Tensor of float32, (C + 1, rows, columns)
        The channels, and the opacity of the sum.
    saved : Saved
        What :func:`backward` needs.
    """
    count, channels = colours.shape
    if count >= 2**31:
        raise ValueError(f"The GPU kernels take fewer than 2**31 Gaussians, not {count}.")
    device, tile = splats.device, _module.TILE
    tiles = -(-size[0] // tile) * -(-size[1] // tile)
    records = splats.new_empty((count, RECORD))
    options: Any = {"device": device, "channels": channels}
    _module.launch("rgb", "prepare_splats", count, (splats, *size, limits[0], count, records), **options)
    order = torch.argsort(depths, stable=True)
    touched = torch.zeros(count, dtype=torch.int64, device=device)
    _module.launch("rgb", "count_splat_tiles", count, (records, order, *size, count, touched), **options)
    ends = touched.cumsum(0)
    entries = int(ends[-1]) if count else 0
    if entries > MAX_ENTRIES:
        raise MemoryError(
            f"The Gaussians touch {entries:,} tiles in all, and the GPU kernels take {MAX_ENTRIES:,}. "
            "Choose smaller images, or fewer or smaller Gaussians."
        )
    keys = torch.empty(entries, dtype=torch.int32, device=device)
    owners = torch.empty_like(keys)
    arguments: tuple[Any, ...] = (records, order, *size, count, ends, keys, owners)
    _module.launch("rgb", "list_splat_tiles", count, arguments, **options)
    # A stable sort keeps the Gaussians of a tile in their order.
    keys, places = torch.sort(keys, stable=True)
    begins = torch.searchsorted(keys, torch.arange(tiles + 1, dtype=torch.int32, device=device))
    out = splats.new_empty((channels + 1, *size))
    used = torch.empty(tiles, dtype=torch.int64, device=device)
    saved = Saved(
        splats, colours, size, limits, order, ends, records, begins, owners[places], places, used, out
    )
    arguments = (records, colours, *size, *limits, begins, saved.members, out, used)
    _module.launch("rgb", "draw_tiles", tiles * tile * tile, arguments, block=tile * tile, **options)
    return out, saved


@_module.guarded
def backward(grad_out: Tensor, saved: Saved) -> tuple[Tensor, Tensor]:
    """Return the gradients of splats and colours for ``grad_out`` (C + 1, rows, columns)."""
    s = saved
    count, channels = s.colours.shape
    options: Any = {"device": s.splats.device, "channels": channels}
    # Zeros: what lies behind the place where a tile had no light left is not written.
    sums = s.splats.new_zeros((len(s.members), SUMS))
    arguments: tuple[Any, ...] = (
        s.records, s.colours, *s.size, *s.limits, s.begins, s.members, s.used, s.places, s.out, grad_out, sums,
    )  # fmt: skip
    threads = _module.TILE**2
    _module.launch("rgb", "sum_tiles", len(s.used) * threads, arguments, block=threads, **options)
    d_splats, d_colours = torch.empty_like(s.splats), torch.empty_like(s.colours)
    arguments = (s.splats, s.order, s.ends, sums, count, d_splats, d_colours)
    _module.launch("rgb", "chain_splats", count, arguments, **options)
    return d_splats, d_colours
