"""Iterative reconstruction of projections: OS-SART and conjugate gradients.

SART (Andersen & Kak 1984, Ultrason Imaging 6:81) weights each ray by one over its length in the grid and each
voxel by one over the weights of its rays; with ordered subsets (Hudson & Larkin 1994, IEEE TMI 13:601) a pass over
the views makes as many steps as there are subsets. Both sums are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from napari_innergs.cpu.sweeps import descend
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.operators.project import VoxelProjector

__all__ = ["conjugate_gradients", "os_sart"]

Step = Callable[[int, int], None]
# Rays and voxels that meet less than this share of the most (rays) or the usual (voxels) are left at rest.
_LEAST_RAY = 1e-3
_LEAST_VOXEL = 0.05
# Voxels whose rays carry little are stepped as if they carried this share of the usual.
_LEAST_TRUST = 1e-3
# Views in a subset: fewer make steps that disagree.
SUBSET = 5


@dataclass(frozen=True)
class Problem:
    """Projections, the projector on a grid with a margin, and SART's weights.

    The grid's axes are in the order that the projector likes best.
    """

    projector: VoxelProjector
    data: np.ndarray
    length: np.ndarray
    row: np.ndarray
    column: np.ndarray
    views: np.ndarray
    axes: tuple[int, int, int]
    margin: tuple[int, int, int]
    shape: tuple[int, int, int]
    usual: float
    support: np.ndarray | None = None

    @property
    def typical(self) -> float:
        """Mean attenuation along the rays, world units; never zero."""
        used = self.row[self.views] > 0
        total = float(np.sum(self.data[self.views], where=used, dtype=np.float64))
        length = float(np.sum(self.length[self.views][used], dtype=np.float64))
        return max(total / length, 1e-30)

    @property
    def scale(self) -> np.ndarray:
        """How much further than the usual voxel each is stepped, inner grid."""
        return np.maximum(self.column / np.float32(self.usual), np.float32(1e-3))

    def enter(self, volume: np.ndarray | None) -> np.ndarray:
        """Return a start on the inner grid from a volume (Z, Y, X), or zeros."""
        if volume is None:
            return np.zeros(self.projector.domain_shape, np.float32)
        if np.shape(volume) != self.shape:
            raise ValueError(f"start: got shape {np.shape(volume)}, need {self.shape}.")
        wide = np.pad(np.asarray(volume, np.float32), [(m, m) for m in self.margin])
        return np.ascontiguousarray(wide.transpose(self.axes))

    def leave(self, volume: np.ndarray) -> np.ndarray:
        """Return the volume (Z, Y, X) without its margin."""
        back = volume.transpose([int(i) for i in np.argsort(self.axes)])
        inner = tuple(slice(m, m + s) for m, s in zip(self.margin, self.shape, strict=True))
        return np.ascontiguousarray(back[inner])

    def subsets(self, count: int | None) -> list[np.ndarray]:
        """Return the views in subsets that are evenly spread, in an order in which neighbours are far apart."""
        n = len(self.views)
        if count is None:
            count = n // SUBSET
        count = min(max(count, 1), n)
        golden = (math.sqrt(5) - 1) / 2
        order = np.argsort(np.arange(count) * golden % 1)
        return [self.views[first::count] for first in order]

    def residual(self, volume: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return projections of a volume less the measured ones (m, V, U)."""
        out = self.projector.apply(volume, views)
        out -= self.data[views]
        return out

    def step(self, volume: np.ndarray, views: np.ndarray, relaxation: float = 1.0) -> np.ndarray:
        """Return where SART's step by some views, as if they were all, takes a volume."""
        residual = self.residual(volume, views)
        residual *= self.row[views]
        slope = self.projector.adjoint(residual, views)
        return descend(volume, slope, self.column, relaxation * len(self.views) / len(views))


def set_up(
    projections: np.ndarray,
    geometry: XrayGeometry,
    grid: Grid,
    margin: int | tuple[int, int, int],
    views: np.ndarray | None = None,
    trust: float = 0.0,
    support: np.ndarray | None = None,
    backend: str = "auto",
) -> Problem:
    """Check the input and compute the weights of rays and voxels.

    Parameters
    ----------
    projections : ndarray, (n, V, U)
        Line integrals.
    geometry : XrayGeometry
        The scan.
    grid : Grid
        What is wanted.
    margin : int or tuple of int
        Voxels added on either side of the grid's axes (z, y, x).
    views : ndarray of int, optional
        Views to use; all by default.
    trust : float
        Rays are also weighted by their transmission to this power. The variance of a line integral is one over the
        number of photons that arrive, so that 1 is right for noise alone.
    support : ndarray of bool, (Z, Y, X), optional
        Voxels that may hold something; the others, but for the margin, have no step. Rays keep the weights they have
        without it.
    backend : str
        Where rays are followed, as for :class:`~napari_innergs.operators.project.VoxelProjector`.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, the margin is negative or no ray meets the grid or the support.
    """
    need = (geometry.n_views, *geometry.detector_shape)
    if np.shape(projections) != need:
        raise ValueError(
            f"projections: got shape {np.shape(projections)}, need {need} to match the geometry."
        )
    data = np.ascontiguousarray(projections, np.float32)
    if not np.isfinite(data).all():
        raise ValueError(
            "projections: got NaN or infinite numbers, need finite line integrals; repair them first."
        )
    added = (margin,) * 3 if isinstance(margin, int) else tuple(int(m) for m in margin)
    if len(added) != 3 or min(added) < 0:
        raise ValueError(f"margin: got {margin}, need a number of voxels, or three, 0 or more.")
    affine = np.array(grid.affine)
    affine[:3, 3] -= affine[:3, :3] @ np.array(added)
    wide = Grid([s + 2 * m for s, m in zip(grid.shape, added, strict=True)], affine)
    projector = VoxelProjector(geometry, wide, backend)
    axes = projector.axes
    if axes != (0, 1, 2):
        turned = Grid([wide.shape[a] for a in axes], affine[:, [*axes, 3]])
        projector = VoxelProjector(geometry, turned, backend)
    used = np.arange(geometry.n_views) if views is None else views
    length = projector.apply(np.ones(projector.domain_shape, np.float32))
    if not length.max() > 0:
        raise ValueError("geometry: got rays that all miss the grid; are positions and units the same?")
    row = np.zeros_like(length)
    np.divide(1, length, out=row, where=length > _LEAST_RAY * length.max())
    seen = projector.adjoint((row * length)[used], used)
    moving = seen > _LEAST_VOXEL * np.median(seen[seen > 0])
    if trust > 0:
        through = np.exp(-trust * np.maximum(data, 0))
        row *= through / np.float32(max(float(through.mean()), 1e-30))
        seen = projector.adjoint((row * length)[used], used)
    usual = 1 / float(np.median(seen[moving]))
    allowed = None
    if support is not None:
        if np.shape(support) != tuple(grid.shape):
            raise ValueError(f"support: got shape {np.shape(support)}, need {tuple(grid.shape)}, the grid's.")
        outer = np.pad(np.asarray(support, np.float32), [(m, m) for m in added], constant_values=1)
        allowed = np.ascontiguousarray(outer.transpose(axes))
        carried = projector.apply(allowed)
        if not carried.max() > 0:
            raise ValueError("support: got voxels that no ray meets, need some of the object.")
        # fewer voxels share what a ray lacks: longer steps
        seen = projector.adjoint((row * carried)[used], used)
        moving &= allowed > 0
    if trust > 0 or support is not None:
        np.maximum(seen, np.float32(_LEAST_TRUST * np.median(seen[moving])), out=seen)
    column = np.zeros_like(seen)
    np.divide(1, seen, out=column, where=moving)
    inner = (added[0], added[1], added[2])
    return Problem(projector, data, length, row, column, used, axes, inner, grid.shape, usual, allowed)


def os_sart(
    projections: np.ndarray,
    geometry: XrayGeometry,
    grid: Grid,
    iterations: int = 20,
    *,
    subsets: int | None = None,
    relaxation: float = 1.0,
    start: np.ndarray | None = None,
    nonnegative: bool = True,
    margin: int | tuple[int, int, int] = 0,
    step: Step | None = None,
    backend: str = "auto",
) -> np.ndarray:
    """Reconstruct by SART with ordered subsets of views.

    Parameters
    ----------
    projections : ndarray, (n, V, U)
        Line integrals.
    geometry : XrayGeometry
        The scan.
    grid : Grid
        Where to reconstruct.
    iterations : int
        Passes over all views; with noise, fewer are smoother.
    subsets : int, optional
        Number of subsets; by default they have five views or a little more.
    relaxation : float
        Share of each step that is taken, above 0 and below 2.
    start : ndarray, (Z, Y, X), optional
        Volume to start from; zeros by default.
    nonnegative : bool
        Keep the attenuation at 0 or above.
    margin : int or tuple of int
        Voxels added on each side of the grid's axes (z, y, x) while computing, for objects that go on outside.
    step : callable, optional
        Called with what is done and the total, after each part; it may raise to stop.
    backend : str
        Where rays are followed, as for :class:`~napari_innergs.operators.project.VoxelProjector`.

    Returns
    -------
    ndarray of float32, (Z, Y, X)
        Attenuation per world unit.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, or an argument is out of range.

    Examples
    --------
    >>> from napari_innergs.geometry.xray import ParallelBeam
    >>> scan = ParallelBeam.circular(np.arange(20) * np.pi / 20, detector_shape=(1, 33))
    >>> disc = 2 * np.sqrt(np.maximum(10.0**2 - (np.arange(33) - 16.0) ** 2, 0))
    >>> volume = os_sart(np.broadcast_to(disc, (20, 1, 33)), scan, scan.default_grid())
    >>> round(float(volume[0, 12:21, 12:21].mean()), 1)
    1.0
    """
    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}, need at least 1.")
    if not 0 < relaxation < 2:
        raise ValueError(f"relaxation: got {relaxation}, need a number above 0 and below 2.")
    problem = set_up(projections, geometry, grid, margin, backend=backend)
    volume = problem.enter(start)
    parts = problem.subsets(subsets)
    total = iterations * len(parts)
    for i in range(total):
        volume = problem.step(volume, parts[i % len(parts)], relaxation)
        if nonnegative:
            np.maximum(volume, 0, out=volume)
        if step is not None:
            step(i + 1, total)
    return problem.leave(volume)


def conjugate_gradients(
    projections: np.ndarray,
    geometry: XrayGeometry,
    grid: Grid,
    iterations: int = 20,
    *,
    weight: float = 3e-3,
    margin: int | tuple[int, int, int] = 0,
    step: Step | None = None,
    backend: str = "auto",
) -> np.ndarray:
    """Reconstruct by conjugate gradients on Tikhonov-regularised least squares.

    Minimises ``sum w (A x - b)^2 + weight * s^2 * sum x^2`` with SART's ray weights ``w`` and the largest singular
    value ``s`` of the weighted projector (CGLS: Paige & Saunders 1982, ACM TOMS 8:43).

    Parameters
    ----------
    projections, geometry, grid, margin, step
        As for :func:`os_sart`.
    iterations : int
        Steps; with noise, fewer are smoother.
    weight : float
        Weight of the regularisation, 0 or more, relative to the largest that matters.

    Returns
    -------
    ndarray of float32, (Z, Y, X)
        Attenuation per world unit; may be negative.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, or an argument is out of range.

    Examples
    --------
    >>> from napari_innergs.geometry.xray import ParallelBeam
    >>> scan = ParallelBeam.circular(np.arange(20) * np.pi / 20, detector_shape=(1, 33))
    >>> disc = 2 * np.sqrt(np.maximum(10.0**2 - (np.arange(33) - 16.0) ** 2, 0))
    >>> volume = conjugate_gradients(np.broadcast_to(disc, (20, 1, 33)), scan, scan.default_grid())
    >>> round(float(volume[0, 12:21, 12:21].mean()), 1)
    1.0
    """
    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}, need at least 1.")
    if not weight >= 0:
        raise ValueError(f"weight: got {weight}, need 0 or more.")
    problem = set_up(projections, geometry, grid, margin, backend=backend)
    projector = problem.projector
    root = np.sqrt(problem.row)
    # A^T W A has no negative entry and 1 is close to its leading eigenvector: its mean row sum is close to s^2
    seen = projector.adjoint((problem.row > 0).astype(np.float32))
    scale = np.float32(weight * float(np.mean(seen)))
    volume = np.zeros(projector.domain_shape, np.float32)
    left = root * problem.data
    slope = projector.adjoint(root * left)
    direction = slope.copy()
    size = float(np.vdot(slope, slope))
    for i in range(iterations):
        if size <= 0:
            break
        image = root * projector.apply(direction)
        length = size / (float(np.vdot(image, image)) + float(scale) * float(np.vdot(direction, direction)))
        volume += np.float32(length) * direction
        left -= np.float32(length) * image
        slope = projector.adjoint(root * left)
        slope -= scale * volume
        before, size = size, float(np.vdot(slope, slope))
        direction *= np.float32(size / before)
        direction += slope
        if step is not None:
            step(i + 1, iterations)
    return problem.leave(volume)
