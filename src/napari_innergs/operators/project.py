"""Line integrals through a voxel volume, and their exact transpose."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry

__all__ = ["VoxelProjector"]

BACKENDS = ("auto", "cpu", "reference")


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
        "cpu" or "auto" (numba, float32), or "reference" (plain torch in float64, slow).

    Raises
    ------
    ValueError
        If the backend is unknown, or a source lies inside the grid.

    Examples
    --------
    >>> from napari_innergs.geometry.xray import ParallelBeam
    >>> grid = Grid((4, 4, 4), [[1, 0, 0, -1.5], [0, 1, 0, -1.5], [0, 0, 1, -1.5], [0, 0, 0, 1]])
    >>> scan = VoxelProjector(ParallelBeam.circular([0.0, 0.3], detector_shape=(4, 4)), grid)
    >>> scan.apply(np.ones(scan.domain_shape, np.float32))[0].tolist()[0]
    [4.0, 4.0, 4.0, 4.0]
    """

    def __init__(self, geometry: XrayGeometry, grid: Grid, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: got {backend!r}, need one of {', '.join(BACKENDS)}.")
        if geometry.kind == "cone":
            source = grid.world_to_index(geometry.source)
            inside = np.flatnonzero(((source > -1) & (source < np.array(grid.shape))).all(axis=1))
            if inside.size:
                raise ValueError(
                    f"geometry: got a source inside the grid in {inside.size} view(s), the first is {inside[0]}, "
                    "need it outside; are the units of the geometry and of the grid the same?"
                )
        room = "reference" if backend == "reference" else "cpu"
        self._backend: Any = importlib.import_module(f"napari_innergs.{room}.project")
        self._geometry = geometry
        self._grid = grid
        self._rays = self._backend.prepare(
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
        out = self._backend.forward(np.asarray(volume, np.float32), self._rays, self._views(views))
        return np.asarray(out, np.float32)

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
        out = self._backend.adjoint(np.asarray(data, np.float32), self._rays, chosen)
        return np.asarray(out, np.float32)

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
