"""Line integrals through voxels on the GPU: Joseph's projector, its exact transpose, and FDK's backprojector.

Forward takes a thread for each ray. The transpose takes one for each voxel, which gathers what the rays that pass
within one voxel carry, with the weights of forward: no atomic additions, and the same bits every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from napari_innergs.cuda import _module

TRACK = 8  # float32 for a ray
GLANCE = 16  # float32 for a view
#: Rays whose numbers are held at once (32 bytes each): more views are done in turns.
RAYS = 1 << 22


@dataclass(frozen=True)
class Rays:
    """Rays of a scan through a grid, on the CPU; they are taken to the GPU for each call.

    ``frames`` and ``squared`` hold the bits of float64 as int64, which is how the kernels take them.
    """

    shape: tuple[int, int, int]
    detector_shape: tuple[int, int]
    parallel: bool
    frames: Tensor
    squared: Tensor
    glances: Tensor


def prepare(
    frames: np.ndarray,
    linear: np.ndarray,
    shape: tuple[int, int, int],
    detector_shape: tuple[int, int],
    parallel: bool,
) -> Rays:
    """Return what :func:`forward` needs; the parameters are those of the module of the same name in ``cpu``."""
    frames = np.ascontiguousarray(frames, np.float64).reshape(-1, 4, 3)
    head, corner, right, down = frames.transpose(1, 0, 2)
    # X - source = w (corner - source) + w u right + w v down; X - corner = u right + v down + t direction
    steps = np.stack([right, down, head if parallel else corner - head], axis=2)
    size = np.linalg.norm(steps, axis=1).prod(1)
    flat = ~(np.abs(np.linalg.det(steps)) > 1e-9 * size)
    steps[flat] = np.eye(3)
    inverse = np.linalg.inv(steps)
    inverse[flat] = np.nan  # seen edge-on: the kernel tries every pixel
    middle = (np.array(shape) - 1) / 2
    glances = np.zeros((len(frames), GLANCE))
    rows = glances[:, :12].reshape(-1, 3, 4)
    rows[..., :3] = inverse
    rows[..., 3] = np.einsum("nij,nj->ni", inverse, middle - (corner if parallel else head))
    if parallel:
        rows[:, 2] = np.where(flat[:, None], np.nan, (0, 0, 0, 1))
    glances[:, 12:15] = head if parallel else head - middle
    glances[:, 15] = not parallel
    squares = (linear.T @ linear)[np.triu_indices(3)]
    return Rays(
        shape,
        detector_shape,
        parallel,
        torch.from_numpy(frames.reshape(-1, 12).view(np.int64)),
        torch.from_numpy(np.ascontiguousarray(squares, np.float64).view(np.int64)),
        torch.from_numpy(glances.astype(np.float32)),
    )


@_module.guarded
def forward(volume: Tensor, rays: Rays, views: np.ndarray) -> Tensor:
    """Return the line integrals (m, V, U) of a volume (Z, Y, X) for some views, all float32 and contiguous."""
    device = volume.device
    rows, cols = rays.detector_shape
    out = volume.new_empty((len(views), rows, cols))
    frames = rays.frames[torch.from_numpy(views)].to(device)
    arguments = (
        volume, *rays.shape, frames, rays.squared.to(device), int(not rays.parallel), rows, cols, out.numel(), out,
    )  # fmt: skip
    _module.launch("project", "integrate_rays", out.numel(), arguments, device=device)
    return out


@_module.guarded
def adjoint(data: Tensor, rays: Rays, views: np.ndarray) -> Tensor:
    """Return the volume (Z, Y, X) that the transpose of :func:`forward` makes of data (m, V, U)."""
    device = data.device
    rows, cols = rays.detector_shape
    chosen = torch.from_numpy(views)
    frames, squared = rays.frames[chosen].to(device), rays.squared.to(device)
    glances = rays.glances[chosen].to(device)
    out = data.new_zeros(rays.shape)
    step = max(RAYS // (rows * cols), 1)
    for start in range(0, len(views), step):
        count = min(step, len(views) - start)
        pixels = count * rows * cols
        tracks = data.new_empty((pixels, TRACK))
        scan = (frames, squared, int(not rays.parallel))
        _module.launch(
            "project", "trace_rays", pixels, (*rays.shape, *scan, start, rows, cols, pixels, tracks), device=device
        )  # fmt: skip
        arguments = (data, tracks, glances, start, count, rows, cols, *rays.shape, out.numel(), out)
        _module.launch("project", "collect_rays", out.numel(), arguments, device=device)
    return out


@_module.guarded
def backproject(
    data: Tensor,
    matrices: np.ndarray,
    factors: np.ndarray,
    shape: tuple[int, int, int],
    parallel: bool,
    planes: tuple[int, int],
) -> Tensor:
    """Return some planes of the sum over views of what is seen at each voxel, times a weight.

    The other parameters are those of the module of the same name in ``cpu``; ``data`` is float32 and contiguous.
    """
    views, rows, cols = data.shape
    glances = np.zeros((views, GLANCE))
    seen = glances[:, :12].reshape(-1, 3, 4)
    seen[:] = matrices
    if parallel:
        seen[:, 2] = (0, 0, 0, 1)
    # small numbers are exact: from the middle of the grid, and of the panel
    seen[..., 3] += seen[..., :3] @ ((np.array(shape) - 1) / 2)
    seen[:, :2] -= np.array([(cols - 1) / 2, (rows - 1) / 2])[:, None] * seen[:, 2:]
    glances[:, 12] = factors
    first, last = planes
    out = data.new_empty((last - first, *shape[1:]))
    arguments = (
        data, torch.from_numpy(glances.astype(np.float32)).to(data.device), views, rows, cols, first, *shape,
        math.prod(out.shape), out,
    )  # fmt: skip
    _module.launch("project", "look_back", out.numel(), arguments, device=data.device)
    return out
