"""Sums of 3D Gaussians on parallel planes, and their adjoint: what slices and voxels share on the GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from napari_innergs.cuda import _module

#: Channels that the kernels handle at once; more are split, since their sums would no longer fit in registers.
GROUP = 4
RECORD = 12  # float32 in a record: three loads of 16 bytes
MOMENTS = 9
WARP = 32
#: Entries in the lists of tiles (24 bytes each while they are sorted); with more, planes are done in parts.
MAX_ENTRIES = 1 << 26


@dataclass(frozen=True)
class Prepared:
    """Gaussians made ready for the kernels; what backward needs from forward."""

    records: Tensor
    amps: Tensor
    t: Tensor
    height: int
    width: int
    cut: float


def prepare(
    means: Tensor, covs: Tensor, amps: Tensor, t: Tensor, height: int, width: int, cut: float
) -> Prepared:
    """Invert the covariances and find the planes that each Gaussian meets."""
    count = len(means)
    if count >= 2**31:
        raise ValueError(f"The GPU kernels take fewer than 2**31 Gaussians, not {count}.")
    records = means.new_empty((count, RECORD))
    arguments = (means, covs, t, len(t), height, width, cut, count, records)
    _module.launch("prepare", "prepare", count, arguments, device=means.device)
    return Prepared(records, amps, t, height, width, cut)


def _groups(channels: int) -> list[tuple[int, int]]:
    """Split channels into groups of nearly equal size."""
    pieces = -(-channels // GROUP)
    return list(itertools.pairwise(channels * i // pieces for i in range(pieces + 1)))


def _strides(shape: tuple[int, ...], channel_axis: int) -> tuple[int, int]:
    """Return how far apart planes and channels lie in (planes, C, H, W) or, axis 0, (C, planes, H, W)."""
    pixels = shape[2] * shape[3]
    return (pixels * shape[1], pixels) if channel_axis == 1 else (pixels, pixels * shape[1])


def forward(prepared: Prepared, channel_axis: int) -> Tensor:
    """Return the sums of all Gaussians on the planes, as (planes, C, H, W) or (C, planes, H, W)."""
    planes, channels = len(prepared.t), prepared.amps.shape[1]
    shape = (planes, channels) if channel_axis == 1 else (channels, planes)
    shape += (prepared.height, prepared.width)  # type: ignore[assignment]
    if _module.is_deterministic():
        out = prepared.records.new_empty(shape)
        _gather(prepared, out, channel_axis, 0, planes)
        return out
    out = prepared.records.new_zeros(shape)
    count = len(prepared.records) if planes else 0
    for start, stop in _groups(channels):
        arguments = (
            prepared.records, prepared.amps, channels, start, prepared.t, prepared.height, prepared.width,
            prepared.cut, count, out, *_strides(out.shape, channel_axis),
        )  # fmt: skip
        _module.launch("planes", "splat", count * WARP, arguments, device=out.device, channels=stop - start)
    return out


def _gather(prepared: Prepared, out: Tensor, channel_axis: int, first: int, last: int) -> None:
    """Write the planes [first, last) of ``out`` without atomic additions, from sorted lists for each tile."""
    count, device = len(prepared.records), out.device
    height, width = prepared.height, prepared.width
    tile = _module.TILE
    tiles = (last - first) * -(-height // tile) * -(-width // tile)
    if tiles == 0:
        return
    touched = torch.zeros(count, dtype=torch.int64, device=device)
    box = (prepared.records, prepared.t, first, last, height, width, prepared.cut, count)
    _module.launch("prepare", "count_tiles", count, (*box, touched), device=device)
    ends = touched.cumsum(0)
    entries = int(ends[-1]) if count else 0
    if last - first > 1 and (entries > MAX_ENTRIES or tiles >= 2**31):
        middle = (first + last) // 2
        _gather(prepared, out, channel_axis, first, middle)
        _gather(prepared, out, channel_axis, middle, last)
        return
    keys = torch.empty(entries, dtype=torch.int32, device=device)
    owners = torch.empty_like(keys)
    _module.launch("prepare", "list_tiles", count, (*box, ends, keys, owners), device=device)
    # A stable sort keeps the Gaussians of a tile in their order, so the sum is rounded alike each time.
    keys, order = torch.sort(keys, stable=True)
    members = owners[order]
    edges = torch.arange(tiles + 1, dtype=torch.int32, device=device)
    begins = torch.searchsorted(keys, edges)
    channels = prepared.amps.shape[1]
    for start, stop in _groups(channels):
        arguments = (
            prepared.records, prepared.amps, channels, start, prepared.t, first, height, width, prepared.cut,
            begins, members, out, *_strides(out.shape, channel_axis),
        )  # fmt: skip
        _module.launch(
            "planes", "gather", tiles * tile * tile, arguments,
            device=device, channels=stop - start, block=tile * tile,
        )  # fmt: skip


def backward(prepared: Prepared, grad: Tensor, channel_axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of means, covariances and amplitudes."""
    count, channels = prepared.amps.shape
    new = prepared.records.new_empty
    if len(prepared.t) == 0:
        return new((count, 3)).zero_(), new((count, 6)).zero_(), torch.zeros_like(prepared.amps)
    sums, d_means, d_covs = new((count, MOMENTS)), new((count, 3)), new((count, 6))
    d_amps = torch.empty_like(prepared.amps)
    for start, stop in _groups(channels):
        arguments = (
            prepared.records, prepared.amps, channels, start, prepared.t, prepared.height, prepared.width,
            prepared.cut, count, grad, *_strides(grad.shape, channel_axis), int(start > 0), sums, d_amps,
        )  # fmt: skip
        _module.launch(
            "planes", "moments", count * WARP, arguments, device=grad.device, channels=stop - start
        )
    _module.launch(
        "prepare", "chain", count, (prepared.records, sums, count, d_means, d_covs), device=grad.device
    )
    return d_means, d_covs, d_amps
