"""Losses that compare Gaussians with a conventional reconstruction: in sections, and in views between the measured.

A reference has errors of its own. Sections hold the Gaussians to it everywhere; views between the measured ones only
to what it says where nothing was measured, and each ray as far as the reference explains the measured views beside
it. Both may also be used without a reference that is better than the start: see docs/dual.md for what that costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from torch import Tensor

from napari_innergs.fit.attenuation import AttenuationField, Radiographs, ray_weights
from napari_innergs.fit.metrics import ssim_map
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.operators.voxels import voxelise

__all__ = ["ViewsBetween", "section_loss", "views_between", "zero_one"]

FloatArray = NDArray[np.float64]

# Planes of a section.
_SECTION = 4
# Views further apart than this (radians) have nothing between them that either tells about.
_FAR = 0.5 * np.pi
# Residuals are averaged over so many pixels before a ray is trusted less for them.
_SMOOTH = 3.0
# Opacities nearer to 0 or 1 than this are no longer pushed.
_SURE = 1e-3


def section_loss(
    field: AttenuationField,
    reference: np.ndarray,
    random: np.random.Generator,
    structural: float,
    backend: str = "auto",
) -> Tensor:
    """Compare a few neighbouring planes of a field with those of a reference, by L1 and D-SSIM.

    Parameters
    ----------
    field : AttenuationField
        Differentiable, in voxel indices.
    reference : ndarray (Z, Y, X)
        In units of the field's scale.
    random : numpy.random.Generator
        Chooses the axis and the planes.
    structural : float
        Share of D-SSIM, the rest being L1.
    backend : str
        Where the Gaussians are voxelised.
    """
    axis = int(random.integers(3))
    size = reference.shape[axis]
    thick = min(_SECTION, size)
    first = int(random.integers(size - thick + 1))
    order = [axis, *(i for i in range(3) if i != axis)]
    moved = field.mean[:, order] - field.mean.new_tensor([float(first), 0, 0])
    covs = field.covariances()
    full = covs[:, [[0, 1, 2], [1, 3, 4], [2, 4, 5]]][:, order][:, :, order]
    turned = torch.stack([full[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))], 1)
    target = np.ascontiguousarray(reference.transpose(order)[first : first + thick])
    shape = (target.shape[0], target.shape[1], target.shape[2])
    image = voxelise(moved.contiguous(), turned.contiguous(), field.heights(), shape, backend=backend)[0]
    truth = torch.from_numpy(target).to(image)
    loss = (1 - structural) * (image - truth).abs().mean()
    if structural > 0 and min(shape[1:]) > 1:
        loss = loss + structural * (1 - ssim_map(image[:, None], truth[:, None], 1.0).mean())
    return loss


def zero_one(opacities: Tensor) -> Tensor:
    """Return what is least when all opacities are 0 or 1: the mean of log(o) + log(1 - o).

    Parameters
    ----------
    opacities : Tensor (N,)
        0 to 1.
    """
    sure = opacities.clamp(_SURE, 1 - _SURE)
    return (sure.log() + (1 - sure).log()).mean()


def _frames(geometry: XrayGeometry) -> FloatArray:
    """Return the panel's place in each view, (n, 4, 4): its axes and centre, (x, y, z)."""
    _, centre, u, v = np.moveaxis(geometry.vectors.reshape(-1, 4, 3), 1, 0)
    out = np.tile(np.eye(4), (len(centre), 1, 1))
    out[:, :3, 0] = u / np.linalg.norm(u, axis=1, keepdims=True)
    normal = np.cross(u, v)
    out[:, :3, 2] = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    out[:, :3, 1] = np.cross(out[:, :3, 2], out[:, :3, 0])
    out[:, :3, 3] = centre
    return out


def views_between(geometry: XrayGeometry) -> tuple[XrayGeometry, NDArray[np.intp]]:
    """Return the views halfway between measured ones, and the two views that each lies between.

    A view's neighbours are the two whose panels are nearest in place and direction. Halfway is half of the motion (a
    rotation with a shift) that takes one panel to the other: on a circle or a helix this is the same circle or helix.

    Parameters
    ----------
    geometry : XrayGeometry
        The scan, its views in any order.

    Returns
    -------
    between : XrayGeometry
        The same panel, m views.
    pairs : ndarray (m, 2)
        Indices of measured views.

    Raises
    ------
    ValueError
        If no two views are less than a quarter of a turn apart.

    Examples
    --------
    >>> from napari_innergs.geometry.xray import ParallelBeam
    >>> scan = ParallelBeam.circular([0.0, 0.2, 0.4], detector_shape=(2, 3))
    >>> between, pairs = views_between(scan)
    >>> pairs.tolist()
    [[0, 1], [0, 2], [1, 2]]
    >>> np.round(between.angles, 3).tolist()
    [0.1, 0.2, 0.3]
    """
    frames = _frames(geometry)
    n = len(frames)
    away = frames[:, :3, 3] - frames[:, :3, 3].mean(0)
    reach = float(np.linalg.norm(away, axis=1).max())
    # direction and place count alike; where the panel only turns, its place tells nothing
    rays = geometry.direction
    features = np.concatenate([rays, away / reach if reach > 0 else away, frames[:, :3, 0]], 1)
    distance = np.linalg.norm(features[:, None] - features[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1, kind="stable")[:, : min(2, n - 1)]
    pairs = np.unique(np.sort(np.stack([np.repeat(np.arange(n), near.shape[1]), near.ravel()], 1), 1), axis=0)
    kept, rows = [], []
    for first, second in pairs:
        motion = frames[second] @ np.linalg.inv(frames[first])
        turned = np.arccos(np.clip((np.trace(motion[:3, :3]) - 1) / 2, -1, 1))
        if turned >= _FAR:
            continue
        half = np.real(sqrtm(motion))
        source, centre, u, v = geometry.vectors[first].reshape(4, 3)
        turn, shift = half[:3, :3], half[:3, 3]
        moved = turn @ source + (shift if geometry.kind == "cone" else 0)
        rows.append(np.concatenate([moved, turn @ centre + shift, turn @ u, turn @ v]))
        kept.append((first, second))
    if not rows:
        raise ValueError(
            f"geometry: got {n} view(s), none less than a quarter of a turn from another, need neighbours; leave "
            "out the views between them."
        )
    between = XrayGeometry(
        np.array(rows), geometry.detector_shape, geometry.kind, geometry.units, isocentre=geometry.isocentre
    )
    return between, np.array(kept, np.intp)


@dataclass(frozen=True)
class ViewsBetween:
    """Views that a reference shows where nothing was measured.

    Attributes
    ----------
    radiographs : Radiographs
        Of the views, in the frame of the grid.
    data : ndarray (m, V, U)
        What the reference shows, in units of the field's scale times `radiographs.unit`.
    trust : ndarray (m, V, U)
        Weights of the rays; their mean is 1.
    """

    radiographs: Radiographs
    data: np.ndarray
    trust: np.ndarray

    def __len__(self) -> int:
        return len(self.data)

    @classmethod
    def make(
        cls, reference: np.ndarray, data: np.ndarray, geometry: XrayGeometry, grid: Grid, scale: float
    ) -> ViewsBetween:
        """Project a reference into the views between the measured ones.

        A ray's weight is that of measured ones, times 1 / (1 + e / E): e is the squared residual of the reference
        there in the two measured views beside it, smoothed; E is the mean of e.

        Parameters
        ----------
        reference : ndarray (Z, Y, X)
            Attenuation, world units.
        data : ndarray (n, V, U)
            Measured line integrals.
        geometry : XrayGeometry
            Of the measured views.
        grid : Grid
            Where the reference is.
        scale : float
            Attenuation that is one in the field.

        Raises
        ------
        ValueError
            If the views have no neighbours.
        """
        between, pairs = views_between(geometry)
        projector = VoxelProjector(between, grid)
        volume = np.asarray(reference, np.float32)
        made = projector.apply(volume)
        residual = VoxelProjector(geometry, grid).apply(volume) - data
        squared = gaussian_filter(np.square(residual), (0, _SMOOTH, _SMOOTH))
        beside = squared[pairs].mean(1)
        weights = ray_weights(made, projector.apply(np.ones(grid.shape, np.float32)))
        weights = weights / (1 + beside / max(float(beside.mean()), 1e-30))
        radiographs = Radiographs(between, grid)
        return cls(
            radiographs,
            made / np.float32(scale * radiographs.unit),
            np.asarray(weights / max(float(weights.mean()), 1e-30), np.float32),
        )
