"""An additive field of Gaussians in attenuation, fitted to a volume and then to its radiographs.

Frame: voxel indices of a grid; attenuation in units of a scale, so that it is about one. A start that is good
already is refined by few small steps: large ones, or many, lose what the start knew. Rays are either those of the
voxels that the start was made of (:class:`napari_innergs.operators.project.VoxelProjector`; the same errors of
discretisation as the start's, on few views at a time), or exact ones of the Gaussians
(:func:`napari_innergs.operators.xray.render_xray`, on single views).
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from napari_innergs.fit.metrics import ssim_map
from napari_innergs.fit.volume_field import VolumeField
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.model import GaussianModel
from napari_innergs.operators.acquisition import misfit
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.operators.shear import Adam
from napari_innergs.operators.slices import morton_order
from napari_innergs.operators.voxels import voxelise
from napari_innergs.operators.xray import render_xray

#: Values above this share of the largest ones count as occupied.
OCCUPIED = 0.03
# Standard deviations, voxels.
_LEAST_SIGMA, _MOST_SIGMA = 0.45, 8.0
# A new Gaussian's standard deviation over the distance to its neighbours, and its height over the value there.
_WIDTH, _HEIGHT, _NEIGHBOURS = 0.6, 0.4, 3
# How much more often Gaussians are placed where the gradient is large.
_EDGES = 2.0
_VOLUME_RATES = {"mean": 0.05, "cholesky": 0.04, "raw": 0.08}
_VIEW_RATES = {"mean": 0.01, "cholesky": 0.004, "raw": 0.008}
_VOLUME_DECAY, _VIEW_DECAY = 0.1, 0.05
# Side of the block whose total variation is taken in a step, voxels.
_BLOCK, _SMOOTH = 32, 1e-3
# What splitting does to the size of a Gaussian.
_SHRINK = 1.6


@dataclass
class AttenuationField:
    """Gaussians in voxel indices that add up.

    Attributes
    ----------
    mean : Tensor, (N, 3)
        Centres (z, y, x).
    cholesky : Tensor, (N, 6)
        Logarithms of the covariance factor's diagonal (z, y, x), then l_yz, l_xz, l_xy.
    raw : Tensor, (N, 1)
        What softplus makes the heights of, which are then positive.
    """

    mean: Tensor
    cholesky: Tensor
    raw: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def covariances(self) -> Tensor:
        """Return (N, 6): zz, zy, zx, yy, yx, xx."""
        return VolumeField(self.mean, self.cholesky, self.raw, self.raw[:, 0]).covariances()

    def heights(self) -> Tensor:
        """Return the values at the centres, (N, 1)."""
        return torch.nn.functional.softplus(self.raw)

    def to(self, device: str) -> AttenuationField:
        """Return a copy on a device."""
        return AttenuationField(*(t.to(device) for t in (self.mean, self.cholesky, self.raw)))

    def voxelise(self, shape: tuple[int, int, int], backend: str = "auto") -> Tensor:
        """Return the field at the centres of voxels, (1, Z, Y, X)."""
        return voxelise(self.mean, self.covariances(), self.heights(), shape, backend=backend)

    def model(self, grid: Grid, scale: float) -> GaussianModel:
        """Return the same field in world coordinates, times a scale."""
        linear, origin = grid.affine[:3, :3], grid.affine[:3, 3]
        six = self.covariances().detach().double().cpu().numpy()
        matrices = linear @ six[:, [[0, 1, 2], [1, 3, 4], [2, 4, 5]]] @ linear.T
        return GaussianModel.from_covariances(
            self.mean.detach().double().cpu().numpy() @ linear.T + origin,
            0.5 * (matrices + matrices.swapaxes(1, 2)),
            self.heights().detach().double().cpu().numpy() * scale,
            field="additive",
            units=grid.units,
        )


class Radiographs:
    """Line integrals of a field in the frame of a grid, in voxels.

    Parameters
    ----------
    geometry : XrayGeometry
        The scan.
    grid : Grid
        Whose voxel indices the field is in; its voxels need not be cubes.

    Attributes
    ----------
    unit : float
        Length of the world for one unit of the integrals.
    """

    def __init__(self, geometry: XrayGeometry, grid: Grid) -> None:
        self.kind, self.shape = geometry.kind, geometry.detector_shape
        linear = grid.affine[:3, :3]
        self.unit = float(abs(np.linalg.det(linear)) ** (1 / 3))
        turn = linear / self.unit
        frames = geometry.to_index_frame(grid).reshape(-1, 4, 3)
        # lengths are right already where the axes are perpendicular and their steps alike
        self._turn = None if np.allclose(turn.T @ turn, np.eye(3), atol=1e-9) else torch.from_numpy(turn)
        if self._turn is not None:
            frames = frames @ turn.T
        self.vectors = torch.from_numpy(np.ascontiguousarray(frames.reshape(-1, 12)))

    def render(self, field: AttenuationField, views: np.ndarray | list[int], backend: str = "auto") -> Tensor:
        """Return the radiographs of some views, (m, V, U); differentiable in the field."""
        mean, covs = field.mean, field.covariances()
        if self._turn is not None:
            turn = self._turn.to(mean)
            full = covs[:, [[0, 1, 2], [1, 3, 4], [2, 4, 5]]]
            full = turn @ full @ turn.T
            covs = torch.stack(
                [full[:, i, j] for i, j in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))], 1
            )
            mean = mean @ turn.T
        chosen = self.vectors[torch.as_tensor(views)]
        images = render_xray(
            mean.contiguous(),
            covs.contiguous(),
            field.heights(),
            chosen,
            self.shape,
            kind=self.kind,
            backend=backend,
        )
        return images[:, 0]


def render_radiographs(model: GaussianModel, geometry: XrayGeometry, backend: str = "auto") -> np.ndarray:
    """Return the radiographs of an additive model, exact line integrals.

    Parameters
    ----------
    model : GaussianModel
        Additive, one channel, world coordinates.
    geometry : XrayGeometry
        Any scan in the same world.
    backend : str
        "auto", "cpu", "cuda" or "reference".

    Returns
    -------
    ndarray of float32, (n, V, U)

    Raises
    ------
    ValueError
        If the model is not additive or has several channels.
    """
    if model.field != "additive" or model.n_channels != 1:
        raise ValueError(
            f"model: got a {model.field} field of {model.n_channels} channel(s), need an additive one of one "
            "channel; use the volume instead."
        )
    origin = geometry.isocentre
    order = torch.from_numpy(np.array(geometry.vectors).reshape(-1, 4, 3)[..., ::-1].copy())
    # from the panel's centre to pixel (0, 0)
    half = [(n - 1) / 2 for n in geometry.detector_shape]
    order[:, 1] -= half[1] * order[:, 2] + half[0] * order[:, 3]
    places = slice(0, 2) if geometry.kind == "cone" else slice(1, 2)
    order[:, places] -= torch.tensor(origin)
    six = model.covariances()[:, (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)]
    out = np.empty((geometry.n_views, *geometry.detector_shape), np.float32)
    means, covs, heights = (
        torch.from_numpy(np.array(a, np.float32)) for a in (model.means - origin, six, model.amplitudes)
    )
    for k in range(geometry.n_views):
        image = render_xray(
            means,
            covs,
            heights,
            order[k : k + 1].reshape(1, 12),
            geometry.detector_shape,
            kind=geometry.kind,
            backend=backend,
        )
        out[k] = image[0, 0].numpy()
    return out


def start_attenuation(
    volume: np.ndarray, voxels_per_gaussian: float, most: int, seed: int = 0
) -> AttenuationField:
    """Place round Gaussians where a volume is occupied, more of them where it is dense or changes.

    Parameters
    ----------
    volume : ndarray, (Z, Y, X), float32
        Attenuation, scaled to about one.
    voxels_per_gaussian : float
        Occupied voxels for each Gaussian.
    most : int
        Limit of their number.
    seed : int
        Of the random places.
    """
    random = np.random.default_rng(seed)
    occupied = volume > OCCUPIED
    if not occupied.any():
        occupied = np.ones(volume.shape, bool)
    count = int(np.clip(occupied.sum() / voxels_per_gaussian, 1, most))
    slope = np.zeros(volume.shape, np.float32)
    for axis, size in enumerate(volume.shape):
        if size > 1:
            slope += np.gradient(volume, axis=axis) ** 2
    np.sqrt(slope, out=slope)
    density = volume / max(float(volume[occupied].mean()), 1e-6)
    density += _EDGES * slope / max(float(slope[occupied].mean()), 1e-6)
    density[~occupied] = 0
    cumulative = np.cumsum(density.clip(1e-6 * occupied), dtype=np.float64)
    # one in each of equal shares: more even than independent draws
    where = np.searchsorted(cumulative, (np.arange(count) + random.random(count)) * cumulative[-1] / count)
    where = where.clip(0, volume.size - 1)
    place = np.stack(np.unravel_index(where, volume.shape), 1) + random.uniform(-0.3, 0.3, (count, 3))
    place = place.astype(np.float32)
    near = min(_NEIGHBOURS + 1, count)
    distance = cKDTree(place).query(place, near)[0].reshape(count, near)[:, 1:]
    away = np.sqrt(np.mean(distance**2, axis=1)) if near > 1 else np.full(count, _MOST_SIGMA)
    sigma = np.clip(_WIDTH * away, 0.5, _MOST_SIGMA / 2)
    mean = torch.from_numpy(place)
    order = morton_order(mean)
    cholesky = torch.zeros(count, 6)
    cholesky[:, :3] = torch.from_numpy(np.log(sigma).astype(np.float32))[order][:, None]
    height = torch.from_numpy((_HEIGHT * volume.ravel()[where]).clip(0.008).astype(np.float32))[order]
    return AttenuationField(mean[order].contiguous(), cholesky, torch.log(torch.expm1(height))[:, None])


def _slopes(loss: Tensor) -> float:
    """Add the gradients of a loss to those there are, and return the loss."""
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _descend(
    field: AttenuationField, optimiser: Adam, rates: dict[str, float], tensors: dict[str, Tensor]
) -> None:
    for tensor in tensors.values():
        tensor.requires_grad_(False)
    optimiser.step(tensors, rates)
    field.cholesky[:, :3].clamp_(float(np.log(_LEAST_SIGMA)), float(np.log(_MOST_SIGMA)))


def _tensors(field: AttenuationField) -> dict[str, Tensor]:
    return {name: getattr(field, name).requires_grad_(True) for name in _VIEW_RATES}


def fit_to_volume(
    field: AttenuationField, volume: np.ndarray, iterations: int, *, backend: str = "auto"
) -> Generator[tuple[int, float], None, None]:
    """Fit a field to a volume in place, yielding (iteration, mean squared error) after each step.

    Parameters
    ----------
    field : AttenuationField
        What to fit; it always holds the latest state.
    volume : ndarray, (Z, Y, X), float32
        Attenuation, scaled to about one.
    iterations : int
        Adam steps.
    backend : str
        Where the Gaussians are voxelised.
    """
    target = torch.from_numpy(np.ascontiguousarray(volume, np.float32))[None].to(field.mean.device)
    optimiser = Adam(backend=backend)
    shape = (volume.shape[0], volume.shape[1], volume.shape[2])
    for iteration in range(iterations):
        tensors = _tensors(field)
        loss = (field.voxelise(shape, backend) - target).square().mean()
        value = _slopes(loss)
        decay = _VOLUME_DECAY ** (iteration / iterations)
        _descend(field, optimiser, {n: r * decay for n, r in _VOLUME_RATES.items()}, tensors)
        yield iteration + 1, value


@dataclass(frozen=True)
class DensityControl:
    """When Gaussians are doubled, split and taken away, and which.

    As Zha et al., R2-Gaussian (NeurIPS 2024), have it. Gradients are those of the loss of :func:`fit_to_views` by
    the position, in halves of the grid's longest side.

    Attributes
    ----------
    every : int
        Steps from one time to the next.
    start, stop : float
        Span, as shares of the steps.
    gradient : float
        Gaussians with a larger mean gradient are doubled or split.
    large : float
        Standard deviations above this share of the grid's longest side are split, others doubled.
    least : float
        Gaussians of less height are taken away.
    most : int
        Limit of the number of Gaussians.
    """

    every: int
    start: float = 0.02
    stop: float = 0.5
    gradient: float = 4e-4
    large: float = 0.1
    least: float = 1e-5
    most: int = 500_000

    def due(self, step: int, steps: int) -> bool:
        """Whether it is time, after so many steps of all."""
        return step % self.every == 0 and self.start * steps < step < self.stop * steps


@torch.no_grad()
def control_density(
    field: AttenuationField,
    gradient: Tensor,
    shape: tuple[int, int, int],
    control: DensityControl,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """Take faint Gaussians away, double or split those where the loss is steep, in place.

    A doubled one becomes two of half the height at its place, a split one two of half the height and smaller by 1.6,
    placed at random as it is distributed itself. What lies outside the grid is taken away, too. Where the limit is
    near, the steepest come first.

    Parameters
    ----------
    field : AttenuationField
        What to change.
    gradient : Tensor, (N,)
        Mean length of the gradients by position, in the unit of `control`.
    shape : tuple of int
        The grid's.
    control : DensityControl
        Thresholds.
    generator : torch.Generator
        Of the places of split Gaussians.

    Returns
    -------
    kept : Tensor, (K,)
        Rows that go on, in their order, at the beginning of the field.
    added : int
        How many follow them.
    """
    device = field.mean.device
    size = field.mean.new_tensor(shape)
    inside = ((field.mean > -0.5) & (field.mean < size - 0.5)).all(1)
    keep = inside & (field.heights()[:, 0] >= control.least)
    if not bool(keep.any()):
        keep = torch.ones_like(keep)
    steep = torch.nonzero(keep & (gradient >= control.gradient))[:, 0]
    room = max(control.most - int(keep.sum()), 0)
    steep = steep[torch.argsort(gradient[steep], descending=True, stable=True)[:room]]
    factor = torch.tril(torch.ones(3, 3, device=device)).repeat(len(steep), 1, 1)
    factor[:, [0, 1, 2], [0, 1, 2]] = field.cholesky[steep, :3].exp()
    factor[:, [1, 2, 2], [0, 0, 1]] = field.cholesky[steep, 3:]
    widest = torch.linalg.matrix_norm(factor, ord=2)
    large = widest > control.large * max(shape)
    half = 0.5 * field.heights()[steep]
    # the inverse of softplus, which holds for small and large heights
    raw = half + torch.log(-torch.expm1(-half))
    noise = torch.randn(2, len(steep), 3, generator=generator).to(device)
    moves = torch.einsum("nij,knj->kni", factor, noise) * large[:, None]
    cholesky = field.cholesky[steep].clone()
    cholesky[large, :3] -= float(np.log(_SHRINK))
    cholesky[large, 3:] /= _SHRINK
    new = AttenuationField(field.mean[steep] + moves[1], cholesky, raw)
    field.mean[steep] += moves[0]
    field.cholesky[steep], field.raw[steep] = cholesky, raw
    kept = torch.nonzero(keep)[:, 0]
    for name in _VIEW_RATES:
        joined = torch.cat([getattr(field, name)[kept], getattr(new, name)])
        setattr(field, name, joined.contiguous())
    return kept, len(steep)


def fit_to_views(
    field: AttenuationField,
    radiographs: Radiographs,
    data: np.ndarray,
    iterations: int,
    shape: tuple[int, int, int],
    *,
    rate: float = 1.0,
    variation: float = 0.0,
    structural: float = 0.0,
    trust: np.ndarray | None = None,
    density: DensityControl | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> Generator[tuple[int, float], None, None]:
    """Fit a field to projections in place, a view at a time, yielding (iteration, loss) after each step.

    Parameters
    ----------
    field : AttenuationField
        What to fit; it always holds the latest state.
    radiographs : Radiographs
        The scan.
    data : ndarray, (n, V, U), float32
        Line integrals in units of the field's scale times `radiographs.unit`.
    iterations : int
        Adam steps; all views are seen before one is seen again.
    shape : tuple of int
        Voxels, for the total variation.
    rate : float
        Factor on the rates.
    variation : float
        Weight of the total variation of a block of 32 voxels a side at a random place.
    structural : float
        Share of D-SSIM, the rest being L1; 0 means a squared loss.
    trust : ndarray, (n, V, U), float32, optional
        Weights of the pixels.
    density : DensityControl, optional
        Lets the number of Gaussians change.
    seed : int
        Of the order of the views, the blocks and the places of split Gaussians.
    backend : str
        Where the Gaussians are rendered.

    Notes
    -----
    The loss takes line integrals and positions in halves of the grid's longest side, which is what the weights and
    thresholds of the published schedule are made for.
    """
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = Adam(beta2=0.999, backend=backend)
    waiting: list[int] = []
    half = 0.5 * max(shape)
    steepness = torch.zeros(2, len(field), device=field.mean.device)
    for iteration in range(iterations):
        if not waiting:
            waiting = random.permutation(len(data)).tolist()
        view = waiting.pop()
        tensors = _tensors(field)
        device = field.mean.device
        target = torch.from_numpy(np.ascontiguousarray(data[view])).to(device) / half
        image = radiographs.render(field, [view], backend)[0] / half
        error = image - target
        weight = None if trust is None else torch.from_numpy(np.ascontiguousarray(trust[view])).to(device)
        size = error.square() if structural == 0 else error.abs()
        loss = (size if weight is None else weight * size).mean()
        if structural > 0:
            alike = ssim_map(image[None, None], target[None, None], 1.0).mean()
            loss = (1 - structural) * loss + structural * (1 - alike)
        value = _slopes(loss)
        if density is not None and field.mean.grad is not None:
            length = field.mean.grad.norm(dim=1) * half
            steepness += torch.stack([length, (length > 0).to(length)])
        if variation > 0 and max(shape) > 1:
            value += _slopes(variation * _variation(_block(field, shape, random, backend)))
        decay = rate * _VIEW_DECAY ** (iteration / iterations)
        _descend(field, optimiser, {n: r * decay for n, r in _VIEW_RATES.items()}, tensors)
        if density is not None and density.due(iteration + 1, iterations):
            mean = steepness[0] / steepness[1].clamp_min(1)
            optimiser.rearrange(*control_density(field, mean, shape, density, generator))
            steepness = torch.zeros(2, len(field), device=device)
        yield iteration + 1, value


def _block(
    field: AttenuationField, shape: tuple[int, int, int], random: np.random.Generator, backend: str
) -> Tensor:
    """Return a block of the grid at a random place, (Z, Y, X)."""
    size = [min(n, _BLOCK) for n in shape]
    corner = [int(random.integers(n - m + 1)) for n, m in zip(shape, size, strict=True)]
    moved = AttenuationField(field.mean - field.mean.new_tensor(corner), field.cholesky, field.raw)
    return moved.voxelise((size[0], size[1], size[2]), backend)[0]


class _Views:
    """Some views of a projector."""

    def __init__(self, projector: VoxelProjector, views: np.ndarray) -> None:
        self.projector, self.views = projector, views
        self.domain_shape = projector.domain_shape
        self.range_shape = (len(views), *projector.range_shape[1:])

    def apply(self, volume: np.ndarray) -> np.ndarray:
        return self.projector.apply(volume, self.views)

    def adjoint(self, data: np.ndarray) -> np.ndarray:
        return self.projector.adjoint(data, self.views)


def ray_weights(data: np.ndarray, length: np.ndarray, power: float = 0.5) -> np.ndarray:
    """Return weights of rays: transmission to a power over the length in the grid; their mean is 1.

    Counts have a relative variance of one over their number, so that the full Poisson weight is the transmission
    itself (power 1); half of it in the exponent does not leave the object's core to a few rays.

    Parameters
    ----------
    data : ndarray, (n, V, U)
        Line integrals.
    length : ndarray, (n, V, U)
        Length of each ray in the grid; rays that only graze it get no weight.
    power : float
        0 for none.
    """
    weights = np.exp(-power * np.maximum(data, 0))
    weights = np.divide(weights, length, out=np.zeros_like(weights), where=length > 0.05 * length.max())
    return np.asarray(weights / max(float(weights.mean()), 1e-30), np.float32)


def fit_to_projections(
    field: AttenuationField,
    projector: VoxelProjector,
    data: np.ndarray,
    weights: np.ndarray,
    iterations: int,
    *,
    subset: int = 10,
    rate: float = 1.0,
    seed: int = 0,
    backend: str = "auto",
) -> Generator[tuple[int, float], None, None]:
    """Fit a field to projections in place through its voxels, yielding (iteration, loss) after each step.

    Parameters
    ----------
    field : AttenuationField
        What to fit; it always holds the latest state.
    projector : VoxelProjector
        The scan on the grid.
    data : ndarray, (n, V, U), float32
        Line integrals over the field's scale.
    weights : ndarray, (n, V, U), float32
        Of the rays.
    iterations : int
        Adam steps, each on a subset of evenly spread views.
    subset : int
        Views in a subset.
    rate : float
        Factor on the rates.
    seed : int
        Of the order of the subsets.
    backend : str
        Where the Gaussians are voxelised.
    """
    random = np.random.default_rng(seed)
    optimiser = Adam(beta2=0.999, backend=backend)
    parts = max(len(data) // max(subset, 1), 1)
    waiting: list[int] = []
    pixels = float(np.prod(data.shape[1:])) * float(np.median(projector.grid.spacing)) ** 2
    for iteration in range(iterations):
        if not waiting:
            waiting = random.permutation(parts).tolist()
        views = np.arange(waiting.pop(), len(data), parts)
        tensors = _tensors(field)
        volume = field.voxelise(projector.domain_shape, backend)
        loss = misfit(volume, [_Views(projector, views)], [data[views][None]], [weights[views]])
        value = _slopes(loss / (pixels * len(views)))
        decay = rate * _VIEW_DECAY ** (iteration / iterations)
        _descend(field, optimiser, {n: r * decay for n, r in _VIEW_RATES.items()}, tensors)
        yield iteration + 1, value


def _variation(volume: Tensor) -> Tensor:
    """Return the mean total variation of a volume (Z, Y, X), slightly smoothed."""
    # an axis of one voxel has no differences, and the others' are not cut there
    cut = tuple(slice(max(size - 1, 1)) for size in volume.shape)
    parts = (volume.diff(dim=axis)[cut] for axis, size in enumerate(volume.shape) if size > 1)
    return torch.sqrt(sum((p.square() for p in parts), volume.new_tensor(_SMOOTH**2))).mean()
