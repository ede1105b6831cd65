"""Line integrals through voxels in plain torch: Joseph's projector and its transpose, as a truth for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Two axes in which a ray moves equally fast, to rounding: the later one counts.
TIE = 1.0 - 1e-9


@dataclass(frozen=True)
class Rays:
    """Rays of a scan through a grid."""

    frames: Tensor
    linear: Tensor
    shape: tuple[int, int, int]
    detector_shape: tuple[int, int]
    parallel: bool


def prepare(
    frames: np.ndarray,
    linear: np.ndarray,
    shape: tuple[int, int, int],
    detector_shape: tuple[int, int],
    parallel: bool,
) -> Rays:
    """Return what :func:`forward` needs; the parameters are those of the module of the same name in ``cpu``."""
    return Rays(
        torch.as_tensor(np.array(frames)).double().reshape(-1, 4, 3),
        torch.as_tensor(np.array(linear)).double(),
        shape,
        detector_shape,
        parallel,
    )


def _samples(rays: Rays, view: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield indices of rays, indices of voxels and the length that the ray spends in each."""
    rows, cols = rays.detector_shape
    head, corner, right, down = rays.frames[view]
    v = torch.arange(rows, dtype=torch.float64)[:, None, None]
    u = torch.arange(cols, dtype=torch.float64)[:, None]
    pixel = (corner + v * down + u * right).reshape(-1, 3)
    start = pixel if rays.parallel else head.expand_as(pixel)
    direction = head.expand_as(pixel) if rays.parallel else pixel - head
    size = direction.abs()
    follow = torch.full((len(pixel),), 2)
    for axis in (1, 0):
        faster = TIE * size[:, axis] > size.gather(1, follow[:, None])[:, 0]
        follow[faster] = axis
    for axis in range(3):
        chosen = torch.nonzero(follow == axis)[:, 0]
        if len(chosen) == 0:
            continue
        d = direction[chosen]
        pace = d / d[:, axis : axis + 1]
        length = (pace @ rays.linear.T).norm(dim=1)
        k = torch.arange(rays.shape[axis], dtype=torch.float64)
        ahead = k - start[chosen, axis, None]
        points = start[chosen, None] + ahead[..., None] * pace[:, None]
        points[..., axis] = k
        counts = (
            torch.ones_like(ahead) if rays.parallel else (ahead * d[:, axis, None].sign() >= 1e-6).double()
        )
        others = [a for a in range(3) if a != axis]
        low = points.floor()
        for corner_ in range(4):
            index = low.long()
            weight = counts * length[:, None]
            for bit, other in enumerate(others):
                high = corner_ >> bit & 1
                part = points[..., other] - low[..., other]
                weight = weight * (part if high else 1 - part)
                index[..., other] += high
            inside = torch.ones_like(weight, dtype=torch.bool)
            for a in range(3):
                inside &= (index[..., a] >= 0) & (index[..., a] < rays.shape[a])
            flat = (index[..., 0] * rays.shape[1] + index[..., 1]) * rays.shape[2] + index[..., 2]
            yield chosen[:, None].expand_as(flat)[inside], flat[inside], weight[inside]


def forward(volume: np.ndarray, rays: Rays, views: np.ndarray) -> np.ndarray:
    """Return the line integrals (m, V, U) of a volume (Z, Y, X) for some views, float64."""
    flat = torch.as_tensor(volume).double().reshape(-1)
    out = torch.zeros(len(views), rays.detector_shape[0] * rays.detector_shape[1], dtype=torch.float64)
    for m, view in enumerate(views):
        for ray, voxel, weight in _samples(rays, int(view)):
            out[m].index_add_(0, ray, weight * flat[voxel])
    return out.reshape(-1, *rays.detector_shape).numpy()


def adjoint(data: np.ndarray, rays: Rays, views: np.ndarray) -> np.ndarray:
    """Return the volume (Z, Y, X) that the transpose makes of data (m, V, U), float64."""
    flat = torch.as_tensor(data).double().reshape(len(views), -1)
    out = torch.zeros(rays.shape[0] * rays.shape[1] * rays.shape[2], dtype=torch.float64)
    for m, view in enumerate(views):
        for ray, voxel, weight in _samples(rays, int(view)):
            out.index_add_(0, voxel, weight * flat[m, ray])
    return out.reshape(rays.shape).numpy()
