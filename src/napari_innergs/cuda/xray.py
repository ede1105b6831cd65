"""Line integrals of Gaussians onto flat panels on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from napari_innergs.cuda import _module
from napari_innergs.cuda._planes import MAX_ENTRIES, WARP, _groups

RECORD = 20  # float32 in a record
SUMS = 12
FRAME = 20
#: Records held at once (80 bytes each, and as much again in backward): more views are done in turns.
PAIRS = 1 << 22


@dataclass(frozen=True)
class Saved:
    """What a call was given; what backward needs from forward."""

    means: Tensor
    covs: Tensor
    amps: Tensor
    frames: Tensor  # the bits of float64 as int64, which is how the kernels take them
    cone: int
    exact: int
    size: tuple[int, int]
    cut: float
    near: float

    @property
    def turns(self) -> list[tuple[int, int]]:
        """The views, in turns whose records fit in memory: first and number."""
        views, step = len(self.frames), max(1, PAIRS // max(len(self.means), 1))
        return [(k, min(step, views - k)) for k in range(0, views, step)]


def _project(s: Saved, start: int, views: int) -> Tensor:
    """Return the records of the Gaussians in some views."""
    count = len(s.means)
    records = s.means.new_empty((views * count, RECORD))
    arguments = (
        s.means, s.covs, s.frames, start, views, s.cone, s.exact, *s.size, s.cut, s.near, count, records,
    )  # fmt: skip
    _module.launch("xray", "project", views * count, arguments, device=records.device, channels=1)
    return records


def _gather(s: Saved, records: Tensor, start: int, views: int, out: Tensor) -> None:
    """Write some views without atomic additions, from sorted lists for each tile."""
    count, device, tile = len(s.means), out.device, _module.TILE
    height, width = s.size
    tiles = views * -(-height // tile) * -(-width // tile)
    pairs = views * count
    touched = torch.zeros(pairs, dtype=torch.int64, device=device)
    _module.launch(
        "xray", "count_view_tiles", pairs, (records, *s.size, pairs, touched), device=device, channels=1
    )
    ends = touched.cumsum(0)
    entries = int(ends[-1]) if pairs else 0
    if views > 1 and (entries > MAX_ENTRIES or tiles >= 2**31):
        half = views // 2
        _gather(s, records[: half * count], start, half, out)
        _gather(s, records[half * count :], start + half, views - half, out)
        return
    keys = torch.empty(entries, dtype=torch.int32, device=device)
    owners = torch.empty_like(keys)
    arguments = (records, *s.size, pairs, count, ends, keys, owners)
    _module.launch("xray", "list_view_tiles", pairs, arguments, device=device, channels=1)
    # A stable sort keeps the Gaussians of a tile in their order, so the sum is rounded alike each time.
    keys, order = torch.sort(keys, stable=True)
    members = owners[order]
    begins = torch.searchsorted(keys, torch.arange(tiles + 1, dtype=torch.int32, device=device))
    channels = s.amps.shape[1]
    for first, last in _groups(channels):
        _module.launch(
            "xray", "gather_views", tiles * tile * tile,
            (records, s.amps, channels, first, start, *s.size, s.cut, count, begins, members, out),
            device=device, channels=last - first, block=tile * tile,
        )  # fmt: skip


@_module.guarded
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
    """Render radiographs; see :func:`napari_innergs.operators.xray.render_xray` for the formula.

    Parameters
    ----------
    means, covs, amps : Tensor of float32, (N, 3), (N, 6), (N, C)
        Contiguous, on one CUDA device; covariances are [zz, zy, zx, yy, yx, xx].
    frames : Tensor of float64, (n, 20)
        Views, from :func:`napari_innergs.operators.xray.panel_frames`.
    cone, exact : bool
        Cone or parallel beam; exact or affine.
    size : tuple of int
        Rows and columns.
    cut : float
        Squared Mahalanobis radius of the support.
    near : float
        Share of its depth that the support of a Gaussian must keep from the plane of the source.

    Returns
    -------
    out : Tensor of float32, (n, C, rows, columns)
        For an exact cone beam without the factor |D| of the pixel.
    saved : Saved
        What :func:`backward` needs.
    """
    count, channels = amps.shape
    if count >= 2**31:
        raise ValueError(f"The GPU kernels take fewer than 2**31 Gaussians, not {count}.")
    s = Saved(means, covs, amps, frames.view(torch.int64), int(cone), int(exact), size, cut, near)
    gathered = _module.is_deterministic()
    shape = (len(frames), channels, *size)
    out = means.new_empty(shape) if gathered else means.new_zeros(shape)
    for start, views in s.turns:
        records = _project(s, start, views)
        if gathered:
            _gather(s, records, start, views, out)
            continue
        for first, last in _groups(channels):
            arguments = (records, amps, channels, first, start, views, *size, cut, count, out)
            _module.launch(
                "xray", "splat_views", views * count * WARP, arguments,
                device=out.device, channels=last - first,
            )  # fmt: skip
    return out, s


@_module.guarded
def backward(grad_out: Tensor, saved: Saved, frames_too: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of means, covariances, amplitudes and views for ``grad_out`` (n, C, rows, columns).

    The gradients of the views are zeros unless ``frames_too``.
    """
    s = saved
    count, channels = s.amps.shape
    device = s.means.device
    d_means, d_covs, d_amps = (torch.zeros_like(x) for x in (s.means, s.covs, s.amps))
    d_frames = torch.zeros(s.frames.shape, dtype=torch.float64, device=device)
    for start, views in s.turns:
        records = _project(s, start, views)
        sums = s.means.new_empty((views * count, SUMS))
        totals = s.means.new_empty((views * count, channels))
        for first, last in _groups(channels):
            arguments = (
                records, s.amps, channels, first, start, views, *s.size, s.cut, count, grad_out, int(first > 0),
                sums, totals,
            )  # fmt: skip
            _module.launch(
                "xray", "sum_views", views * count * WARP, arguments, device=device, channels=last - first
            )
        inputs = (s.means, s.covs, s.frames, records, sums)
        tail = (s.cone, s.exact, count)
        _module.launch(
            "xray", "chain_covs", count, (*inputs, start, views, *tail, d_covs), device=device, channels=1
        )
        more = (*inputs, totals, start, views, channels, *tail, d_means, d_amps)
        _module.launch("xray", "chain_means", count, more, device=device, channels=1)
        if frames_too and count:
            groups = -(-count // WARP)
            parts = s.means.new_empty((views, groups, FRAME))
            _module.launch(
                "xray", "chain_frames", views * groups * WARP,
                (*inputs, start, views, *tail, parts), device=device, channels=1,
            )  # fmt: skip
            d_frames[start : start + views] = parts.double().sum(1)
    return d_means, d_covs, d_amps, d_frames
