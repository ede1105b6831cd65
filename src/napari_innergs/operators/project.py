"""Line integrals through a voxel volume, and their exact transpose."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry

if TYPE_CHECKING:
    from napari_innergs.operators._dispatch import Backend

__all__ = ["VoxelProjector", "backproject"]


def _find(backend: str) -> Backend | None:
    """Return a backend; None for the CPU, which needs no torch. Arrays are numpy's, so "auto" is the CPU."""
    if backend in ("auto", "cpu"):
        return None
    from torch import device

    from napari_innergs.operators import _dispatch

    return _dispatch.get_backend(backend, "project", device("cpu"))


def _run(
    backend: Backend | None, function: Callable[..., Any], array: np.ndarray, *arguments: Any
) -> np.ndarray:
    """Return ``function(array, *arguments)`` as float32, computed where the backend computes."""
    array = np.ascontiguousarray(array, np.float32)
    if backend is None:
        return np.asarray(function(array, *arguments), np.float32)
    import torch

    if min(array.strides) < 0:  # along an axis of length 1, which is contiguous all the same
        array = array.copy()
    tensor = torch.from_numpy(array)
    return np.asarray(backend.leave(function(backend.enter(tensor), *arguments), tensor).numpy())


def _module_of(backend: Backend | None) -> Any:
    return importlib.import_module("napari_innergs.cpu.project") if backend is None else backend.module


class VoxelProjector:
    """Projections of a volume by Joseph's method, for any flat panel and any grid.

    A ray is followed along the grid axis in which it moves fastest; the volume is interpolated linearly in the
    two others (Joseph 1982, IEEE TMI 1:192). It is a :class:`~napari_innergs.operators.linear.LinearOperator`.

    Parameters
    ----------
    geometry : XrayGeometry
        The scan.
    grid : Grid
        Voxels in the world of the geometry.
    backend : str
        "cpu" or "auto" (numba, float32), "cuda" or "cuda:1" and so on (a GPU: float32, and the same bits every
        time; each call takes the volume or the projections there and back), or "reference" (plain torch in float64,
        slow).

    Raises
    ------
    ValueError
        If the backend is unknown, or a source lies inside the grid.
    RuntimeError
        If a GPU is asked for and can not be used.

    Examples
    --------
    >>> from napari_innergs.geometry.xray import ParallelBeam
    >>> grid = Grid((4, 4, 4), [[1, 0, 0, -1.5], [0, 1, 0, -1.5], [0, 0, 1, -1.5], [0, 0, 0, 1]])
    >>> scan = VoxelProjector(ParallelBeam.circular([0.0, 0.3], detector_shape=(4, 4)), grid)
    >>> scan.apply(np.ones(scan.domain_shape, np.float32))[0].tolist()[0]
    [4.0, 4.0, 4.0, 4.0]
    """

    def __init__(self, geometry: XrayGeometry, grid: Grid, backend: str = "auto") -> None:
        self._backend = _find(backend)
        if geometry.kind == "cone":
            source = grid.world_to_index(geometry.source)
            inside = np.flatnonzero(((source > -1) & (source < np.array(grid.shape))).all(axis=1))
            if inside.size:
                raise ValueError(
                    f"geometry: got a source inside the grid in {inside.size} view(s), the first is {inside[0]}, "
                    "need it outside; are the units of the geometry and of the grid the same?"
                )
        self._module = _module_of(self._backend)
        self._geometry = geometry
        self._grid = grid
        self._rays = self._module.prepare(
            geometry.to_index_frame(grid),
            grid.affine[:3, :3],
            grid.shape,
            geometry.detector_shape,
            geometry.kind == "parallel",
        )

    @property
    def geometry(self) -> XrayGeometry:
        """The scan."""
        return self._geometry

    @property
    def grid(self) -> Grid:
        """The voxels."""
        return self._grid

    @property
    def domain_shape(self) -> tuple[int, int, int]:
        """Shape of the volume (Z, Y, X)."""
        return self._grid.shape

    @property
    def range_shape(self) -> tuple[int, int, int]:
        """Shape of the projections (n, V, U)."""
        return (self._geometry.n_views, *self._geometry.detector_shape)

    @property
    def axes(self) -> tuple[int, int, int]:
        """Order of the grid's axes in which :meth:`apply` and :meth:`adjoint` need no copy of the volume.

        A solver that calls them often can work on a grid whose axes are in this order already.
        """
        return getattr(self._rays, "axes", (0, 1, 2))

    def _views(self, views: ArrayLike | None) -> np.ndarray:
        every = np.arange(self._geometry.n_views)
        return every if views is None else np.atleast_1d(every[np.asarray(views)])

    def apply(self, volume: np.ndarray, views: ArrayLike | None = None) -> np.ndarray:
        """Return the line integrals of a volume.

        Parameters
        ----------
        volume : ndarray, (Z, Y, X)
            Values per unit of length of the world; zero outside.
        views : array_like of int or bool, (m,), optional
            Which views; all by default.

        Returns
        -------
        ndarray of float32, (m, V, U)

        Raises
        ------
        ValueError
            If the shape is wrong.
        """
        if np.shape(volume) != self.domain_shape:
            raise ValueError(f"volume: got shape {np.shape(volume)}, need {self.domain_shape}.")
        return _run(self._backend, self._module.forward, volume, self._rays, self._views(views))

    def adjoint(self, data: np.ndarray, views: ArrayLike | None = None) -> np.ndarray:
        """Return the volume that the exact transpose of :meth:`apply` makes of projections.

        Parameters
        ----------
        data : ndarray, (m, V, U)
            Projections.
        views : array_like of int or bool, (m,), optional
            The views that they belong to; all by default.

        Returns
        -------
        ndarray of float32, (Z, Y, X)

        Raises
        ------
        ValueError
            If the shape is wrong.
        """
        chosen = self._views(views)
        need = (len(chosen), *self._geometry.detector_shape)
        if np.shape(data) != need:
            raise ValueError(f"data: got shape {np.shape(data)}, need {need}.")
        return _run(self._backend, self._module.adjoint, data, self._rays, chosen)

    def norm(self, iterations: int = 12) -> float:
        """Return an estimate of the largest singular value, from below, by the power method."""
        volume = np.ones(self.domain_shape, np.float32)
        size = 0.0
        for _ in range(iterations):
            length = float(np.linalg.norm(volume))
            if length == 0:
                return 0.0
            volume = self.adjoint(self.apply(volume / np.float32(length)))
            size = float(np.sqrt(np.linalg.norm(volume)))
        return size


def backproject(
    data: np.ndarray,
    matrices: np.ndarray,
    factors: np.ndarray,
    shape: tuple[int, int, int],
    parallel: bool,
    planes: tuple[int, int] | None = None,
    out: np.ndarray | None = None,
    *,
    backend: str = "auto",
) -> np.ndarray:
    """Return the sum over views of what is seen at each voxel, interpolated linearly, times a weight.

    The voxel-driven backprojection of FDK (Feldkamp, Davis & Kress 1984); not the transpose of the projector.

    Parameters
    ----------
    data : ndarray, (n, V, U)
        Images; zero outside.
    matrices : ndarray, (n, 3, 4)
        Index (z, y, x, 1) to (w u, w v, w) with the column u, the row v and the depth w.
    factors : ndarray, (n,)
        Weights of the views. In cone beam the weight of a voxel is this over w squared, zero behind the source.
    shape : tuple of int
        Voxels (Z, Y, X).
    parallel : bool
        Parallel beam: w is 1.
    planes : tuple of int, optional
        First plane, and the one after the last, that are worked on; all by default.
    out : ndarray of float32, (Z, Y, X), optional
        Where to write; zeros by default.
    backend : str
        As for :class:`VoxelProjector`, without "reference".

    Returns
    -------
    ndarray of float32, (Z, Y, X)

    Raises
    ------
    ValueError
        If the backend is unknown or shapes do not fit.
    RuntimeError
        If a GPU is asked for and can not be used.
    """
    views = len(data)
    if np.ndim(data) != 3 or np.shape(matrices) != (views, 3, 4) or np.shape(factors) != (views,):
        raise ValueError(
            f"data: got shape {np.shape(data)} with matrices {np.shape(matrices)} and factors {np.shape(factors)}, "
            "need (n, V, U), (n, 3, 4) and (n,)."
        )
    if backend == "reference":
        raise ValueError("backend: got 'reference', need one of auto, cpu, cuda.")
    chosen = _find(backend)
    function, out = _module_of(chosen).backproject, np.zeros(shape, np.float32) if out is None else out
    arguments = (np.asarray(matrices), np.asarray(factors), shape, parallel, planes or (0, shape[0]))
    if chosen is None:
        return np.asarray(function(np.asarray(data, np.float32), *arguments, out))
    first, last = arguments[-1]
    out[first:last] = _run(chosen, function, data, *arguments)
    return out
