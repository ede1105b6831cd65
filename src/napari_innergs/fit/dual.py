"""The dual model: Gaussians of the inside, which X-rays see, and of the surface, which photographs see too.

Both kinds are one set. Those of the inside have attenuation and no opacity: photographs neither show nor move them.
Those of the surface have opacity and colour, and an attenuation that starts near nothing and grows where the X-rays
ask for it. The photographs move and shape the surface; the X-rays may do so with a bounded share of the photographs'
own pull, and act on every attenuation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter
from torch import Tensor

from napari_innergs.fit.attenuation import AttenuationField, Radiographs
from napari_innergs.fit.photos import STRUCTURAL, PhotoTargets, SplatField, photo_loss, splat_rates
from napari_innergs.fit.xray_reference import ViewsBetween, section_loss, zero_one
from napari_innergs.geometry.grid import Grid
from napari_innergs.model import GaussianModel
from napari_innergs.operators.shear import Adam
from napari_innergs.photographs import Photographs

__all__ = ["DualField", "fit_jointly", "hull_of_masks", "join"]

FloatArray = NDArray[np.float64]

# A voxel is outside when more masks than this share say so: one may be wrong.
_MISSES = 0.02
# Mask values that count as object, and how far the outlines are moved outward, voxels.
_MASK, _DILATION = 0.1, 2.0
# Attenuation of a new Gaussian of the surface, in units of the field's scale: there are many, one above the other,
# and what they add to a volume that is fitted already has to be unlearnt.
_NEW_HEIGHT = 0.001
# Rates of the inside, voxels and logarithms, and of the attenuation of both; they fall to this share.
_INSIDE_RATES = {"mean": 0.008, "cholesky": 0.003, "raw": 0.006}
_HEIGHT_RATE, _DECAY = 0.02, 0.1
# The surface has been fitted before: the rates begin where this share of the photographs' steps ends.
_BEGUN = 0.5
# Sections are compared in each second step, views between the measured ones in the others.
_EVERY = 2
# Rates of cameras: radians and radii of the object.
_CAMERA_RATE = 2e-4
_LEAST_SIGMA, _MOST_SIGMA = 0.45, 8.0


def hull_of_masks(
    photographs: Photographs,
    grid: Grid,
    to_photos: FloatArray,
    step: Callable[[int, int], None] | None = None,
) -> NDArray[np.bool_]:
    """Return the voxels in which there can be anything, by the masks: the visual hull, a little enlarged.

    Parameters
    ----------
    photographs : Photographs
        With masks.
    grid : Grid
        Of the X-rays.
    to_photos : ndarray (4, 4)
        X-ray world to the photographs' world.
    step : callable, optional
        Called with what is done and the total; it may raise to stop.

    Returns
    -------
    ndarray of bool (Z, Y, X)
        Voxels that no photograph shows are in it.
    """
    assert photographs.masks is not None
    index = np.indices(grid.shape, dtype=np.float32).reshape(3, -1).T
    alive = np.arange(len(index))
    missed = np.zeros(len(index), np.int16)
    allowed = int(_MISSES * len(photographs))
    pose_of_index = to_photos @ grid.affine
    spacing = float(np.cbrt(abs(np.linalg.det(pose_of_index[:3, :3]))))
    height, width = photographs.size
    corners = np.array([[0, 0, 0], np.array(grid.shape) - 1.0])
    middle = pose_of_index[:3, :3] @ corners.mean(0) + pose_of_index[:3, 3]
    for k, camera in enumerate(photographs.cameras):
        matrix = camera.intrinsics @ (camera.world_to_camera @ pose_of_index)[:3]
        depth = float((camera.world_to_camera[:3] @ np.append(middle, 1))[2])
        reach = _DILATION * spacing * float(camera.intrinsics[0, 0]) / max(abs(depth), 1e-9)
        size = 2 * math.ceil(reach) + 1
        mask = maximum_filter(photographs.masks[k] > _MASK, size=size)
        if photographs.valid is not None:
            mask = mask | ~photographs.valid[k]
        seen = index[alive] @ matrix[:, :3].T.astype(np.float32) + matrix[:, 3].astype(np.float32)
        front = seen[:, 2] > 0
        z = np.where(front, seen[:, 2], 1)
        column, row = (np.rint(np.clip(seen[:, i] / z, -9, 1e6)).astype(np.int32) for i in (0, 1))
        shown = front & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        out = np.zeros(len(alive), bool)
        out[shown] = ~mask[row[shown], column[shown]]
        missed[alive[out]] += 1
        alive = alive[missed[alive] <= allowed]
        if step is not None:
            step(k + 1, len(photographs))
    hull = np.zeros(len(index), bool)
    hull[alive] = True
    return hull.reshape(grid.shape)


@dataclass
class _Drawn(AttenuationField):
    """Gaussians whose covariances and heights are at hand, so that gradients reach what made them."""

    covs: Tensor
    values: Tensor

    def covariances(self) -> Tensor:
        return self.covs

    def heights(self) -> Tensor:
        return self.values


@dataclass
class DualField:
    """One set of Gaussians in two parts.

    Attributes
    ----------
    inside : AttenuationField
        Seen by X-rays only; voxel indices.
    surface : SplatField
        Seen by photographs, and by X-rays through `raw`; in the photographs' frame of the object.
    raw : Tensor, (M, 1)
        What softplus makes the surface's attenuation of.
    to_index : ndarray (4, 4)
        Frame of the object to voxel indices.
    """

    inside: AttenuationField
    surface: SplatField
    raw: Tensor
    to_index: FloatArray

    def __len__(self) -> int:
        return len(self.inside) + len(self.surface)

    def attenuation(self) -> AttenuationField:
        """Return all Gaussians as the X-rays see them, in voxel indices; differentiable in both parts."""
        matrix = torch.from_numpy(self.to_index).to(self.surface.mean)
        linear = matrix[:3, :3]
        mean = self.surface.mean @ linear.T + matrix[:3, 3]
        six = self.surface.covariances()
        full = linear @ six[:, [[0, 1, 2], [1, 3, 4], [2, 4, 5]]] @ linear.T
        covs = torch.stack([full[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))], 1)
        # voxels do not show what is finer than they are: fine detail of the colour is widened
        covs = covs + covs.new_tensor([1.0, 0, 0, 1, 0, 1]) * _LEAST_SIGMA**2
        heights = torch.nn.functional.softplus(self.raw)
        inside = self.inside
        both = torch.cat([inside.mean, mean])
        return _Drawn(
            both,
            inside.cholesky,
            inside.raw,
            torch.cat([inside.covariances(), covs]),
            torch.cat([inside.heights(), heights]),
        )

    def model(self, grid: Grid, scale: float) -> GaussianModel:
        """Return the attenuation of all Gaussians in world coordinates, times a scale."""
        with torch.no_grad():
            return self.attenuation().model(grid, scale)


def join(inside: AttenuationField, surface: SplatField, to_index: FloatArray) -> DualField:
    """Make one set of the Gaussians of a volume and those of photographs."""
    start = math.log(math.expm1(_NEW_HEIGHT))
    raw = torch.full((len(surface), 1), start, device=surface.mean.device)
    return DualField(inside, surface, raw, to_index)


def _view_loss(
    radiographs: Radiographs,
    field: AttenuationField,
    view: int,
    data: np.ndarray,
    trust: np.ndarray | None,
    backend: str,
) -> Tensor:
    """Return the mean squared error of one radiograph."""
    image = radiographs.render(field, [view], backend)[0]
    error = (image - torch.from_numpy(np.ascontiguousarray(data)).to(image)).square()
    if trust is not None:
        error = error * torch.from_numpy(np.ascontiguousarray(trust)).to(error)
    return error.mean()


def _turned(pose: Tensor, change: Tensor) -> Tensor:
    """Return a camera's pose after a small rotation and shift (6 numbers) of the camera."""
    a, b, c = change[:3].unbind()
    zero = torch.zeros_like(a)
    skew = torch.stack([zero, -c, b, c, zero, -a, -b, a, zero]).reshape(3, 3)
    turn = torch.linalg.matrix_exp(skew)
    top = torch.cat([turn @ pose[:3, :3], (turn @ pose[:3, 3] + change[3:])[:, None]], 1)
    return torch.cat([top, pose[3:]])


def fit_jointly(
    field: DualField,
    photographs: Photographs,
    steps: int,
    *,
    radiographs: Radiographs | None = None,
    data: np.ndarray | None = None,
    trust: np.ndarray | None = None,
    reference: np.ndarray | None = None,
    reference_weight: float = 0.0,
    between: ViewsBetween | None = None,
    between_weight: float = 0.0,
    solid: float = 0.0,
    pull: float = 0.05,
    structural: float = STRUCTURAL,
    rate: float = 1.0,
    cameras: dict[int, Tensor] | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> Generator[tuple[int, float], None, None]:
    """Fit a dual field to photographs and X-rays in place, one of each in a step, yielding (step, photo loss).

    Parameters
    ----------
    field : DualField
        What to fit; it always holds the latest state.
    photographs : Photographs
        In the frame of the field's surface.
    steps : int
        Adam steps.
    radiographs : Radiographs, optional
        The scan; without one, sections are compared with the reference only.
    data : ndarray (n, V, U), optional
        Line integrals in units of the field's scale times `radiographs.unit`.
    trust : ndarray (n, V, U), optional
        Weights of the rays.
    reference : ndarray (Z, Y, X), optional
        A reconstruction in units of the field's scale.
    reference_weight : float
        Weight of the comparison of sections with it.
    between : ViewsBetween, optional
        What a reconstruction shows between the measured views.
    between_weight : float
        Weight of the comparison with it; 1 is that of a measured view.
    solid : float
        Weight of what makes opacities 0 or 1.
    pull : float
        How strongly X-rays move the surface, as a share of the photographs' own pull.
    structural : float
        Share of D-SSIM in the loss of photographs.
    rate : float
        Factor on the rates.
    cameras : dict, optional
        Changes of the cameras (6 numbers each), refined in place where given.
    seed : int
        Of all orders and backgrounds.
    backend : str
        Where the Gaussians are rendered.
    """
    # the order of the photographs does not depend on what else there is
    random, other_random = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    surface, inside = field.surface, field.inside
    outer, inner, heights = (Adam(beta2=0.999, backend=backend) for _ in range(3))
    targets = PhotoTargets(photographs, surface.mean.device)
    turning: dict[int, Adam] = {}
    photos: list[int] = []
    views: list[int] = []
    others: list[int] = []
    low, high = math.log(_LEAST_SIGMA), math.log(_MOST_SIGMA)
    for step in range(steps):
        if not photos:
            photos = random.permutation(len(targets)).tolist()
        k = photos.pop()
        background = targets.background(random)
        target, valid = targets.get(k, background)
        camera = photographs.cameras[k]
        outside = surface.tensors()
        if not surface.harmonics.shape[1]:
            del outside["harmonics"]
        interior = {"mean": inside.mean, "cholesky": inside.cholesky, "raw": inside.raw}
        fitted = [*outside.values(), *interior.values(), field.raw]
        for tensor in fitted:
            tensor.requires_grad_(True)
        pose = None
        if cameras is not None:
            change = cameras.setdefault(k, torch.zeros(6, dtype=torch.float64)).requires_grad_(True)
            pose = _turned(torch.tensor(camera.world_to_camera), change)
        image, _ = surface.render(camera, background, pose=pose, backend=backend)
        loss = photo_loss(image, target, valid, structural)
        whole = loss + solid * zero_one(surface.opacities()) if solid > 0 else loss
        whole.backward()  # type: ignore[no-untyped-call]
        own = {name: tensor.grad for name, tensor in outside.items()}
        for tensor in outside.values():
            tensor.grad = None
        other = surface.mean.new_zeros(())
        drawn = field.attenuation()
        if radiographs is not None and data is not None:
            if not views:
                views = other_random.permutation(len(data)).tolist()
            view = views.pop()
            weights = None if trust is None else trust[view]
            other = other + _view_loss(radiographs, drawn, view, data[view], weights, backend)
        if reference is not None and reference_weight > 0 and step % _EVERY == 0:
            parts = section_loss(drawn, reference, other_random, STRUCTURAL, backend)
            other = other + reference_weight * parts
        if between is not None and between_weight > 0 and step % _EVERY == 1:
            if not others:
                others = other_random.permutation(len(between)).tolist()
            view = others.pop()
            apart = _view_loss(
                between.radiographs, drawn, view, between.data[view], between.trust[view], backend
            )
            other = other + between_weight * apart
        if other.requires_grad:
            other.backward()  # type: ignore[no-untyped-call]
        for tensor in fitted:
            tensor.requires_grad_(False)
        for name, tensor in outside.items():
            mine, theirs = own[name], tensor.grad
            if mine is not None and theirs is not None:
                size = float(theirs.norm())
                share = pull * float(mine.norm()) / size if size > 0 else 0.0
                mine = mine + share * theirs
            tensor.grad = mine
        done = step / steps
        decay = rate * _DECAY**done
        outer.step(outside, splat_rates(_BEGUN + (1 - _BEGUN) * done, rate))
        inner.step(interior, {name: decay * value for name, value in _INSIDE_RATES.items()})
        heights.step({"raw": field.raw}, {"raw": decay * _HEIGHT_RATE})
        inside.cholesky[:, :3].clamp_(low, high)
        if cameras is not None:
            change = cameras[k]
            optimiser = turning.setdefault(k, Adam(beta2=0.99, backend="reference"))
            change.requires_grad_(False)
            optimiser.step({"change": change}, {"change": decay * _CAMERA_RATE})
        yield step + 1, float(loss.detach())
