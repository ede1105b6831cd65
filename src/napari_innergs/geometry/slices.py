"""Geometry of a stack of slices, and oblique planes to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_innergs.geometry.frames import check_affine, check_units
from napari_innergs.geometry.grid import Grid

__all__ = ["SliceGeometry", "SlicePlane"]

FloatArray = NDArray[np.float64]


class SliceGeometry:
    """Where parallel slices lie: an affine, and a position for each.

    Parameters
    ----------
    affine : array_like (4, 4)
        Index (i, row, col) to world (z, y, x). Only the direction of column 0 is used when `positions` are
        given.
    n_slices : int
        Number of slices.
    positions : array_like (n,), optional
        Distances from the affine's origin along the direction of column 0, world units, in the order of the
        data. Default: ``i * |column 0|``.

    Raises
    ------
    ValueError
        If there are fewer than two slices, two at one position, or numbers that are not finite.

    Examples
    --------
    >>> geometry = SliceGeometry(np.diag([3.0, 1.0, 1.0, 1.0]), 3, positions=[6.0, 0.0, 3.0])
    >>> geometry.order.tolist(), geometry.positions.tolist()
    ([1, 2, 0], [0.0, 3.0, 6.0])
    """

    __slots__ = ("affine", "direction", "frame_affine", "normal", "order", "positions")
    affine: FloatArray
    direction: FloatArray
    frame_affine: FloatArray
    normal: FloatArray
    order: NDArray[np.intp]
    positions: FloatArray

    def __init__(self, affine: ArrayLike | None, n_slices: int, positions: ArrayLike | None = None) -> None:
        matrix = check_affine(affine)
        if n_slices < 2:
            raise ValueError(f"data: got {n_slices} slice(s), need at least 2 to fill the gap between them.")
        step = float(np.linalg.norm(matrix[:3, 0]))
        if positions is None:
            where = np.arange(n_slices) * step
        else:
            try:
                where = np.array(positions, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"positions: got something that is not numbers, need {n_slices} numbers."
                ) from error
            if where.shape != (n_slices,):
                raise ValueError(
                    f"positions: got shape {where.shape}, need ({n_slices},), one for each slice of data."
                )
            bad = np.flatnonzero(~np.isfinite(where))
            if bad.size:
                raise ValueError(
                    f"positions: got {bad.size} NaN or infinite, the first at slice {bad[0]}, "
                    "need finite numbers."
                )
        order = np.argsort(where, kind="stable")
        where = where[order]
        gaps = np.diff(where)
        smallest = int(np.argmin(gaps))
        # positions read from text carry rounding: closer than this is the same place
        tolerance = max(1e-6 * float(where[-1] - where[0]), 1e-12 * float(np.abs(where).max()))
        if gaps[smallest] <= tolerance:
            first, second = sorted((int(order[smallest]), int(order[smallest + 1])))
            raise ValueError(
                f"positions: slices {first} and {second} are both at {where[smallest]:.6g}, "
                "need a different position for each slice."
            )
        direction = matrix[:3, 0] / step
        normal = np.cross(matrix[:3, 1], matrix[:3, 2])
        normal /= np.linalg.norm(normal)
        if normal @ direction < 0:
            normal = -normal
        normal += 0.0
        frame = np.array(matrix)
        frame[:3, 0] = direction
        for array in (direction, normal, frame, where, order):
            array.flags.writeable = False
        for name, value in (
            ("affine", matrix),
            ("direction", direction),
            ("normal", normal),
            ("frame_affine", frame),
            ("positions", where),
            ("order", order),
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"SliceGeometry is immutable: {name} can not be set.")

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            value.flags.writeable = False
            object.__setattr__(self, name, value)

    @property
    def n_slices(self) -> int:
        """Number of slices."""
        return len(self.positions)

    @property
    def cosine(self) -> float:
        """Cosine between column 0's direction and the normal: 1 without gantry tilt."""
        return float(self.direction @ self.normal)

    @property
    def gaps(self) -> FloatArray:
        """Distances between neighbouring slices along the normal, (n - 1,), world units."""
        return np.diff(self.positions) * self.cosine

    @property
    def spacing(self) -> float:
        """Median gap along the normal, world units."""
        return float(np.median(self.gaps))

    @property
    def pixel_size(self) -> FloatArray:
        """Lengths of a step along rows and columns, (2,), world units."""
        return np.linalg.norm(self.affine[:3, 1:3], axis=0)

    @property
    def regular(self) -> bool:
        """Whether all gaps are equal (to 0.1 %)."""
        gaps = np.diff(self.positions)
        return bool(np.ptp(gaps) <= 1e-3 * np.median(gaps))

    @property
    def index_affine(self) -> FloatArray:
        """Affine of the sorted slices: index to world, with the mean gap as the step of column 0, (4, 4).

        Exact when the slices are regular.
        """
        out = np.array(self.frame_affine)
        step = float((self.positions[-1] - self.positions[0]) / (self.n_slices - 1))
        out[:3, 3] += self.direction * self.positions[0]
        out[:3, 0] *= step
        return out

    def to_world(self, points: ArrayLike) -> FloatArray:
        """Map (t, row, col) to world (z, y, x).

        Parameters
        ----------
        points : array_like (..., 3)
            t in world units along column 0's direction; row and column indices.

        Returns
        -------
        ndarray (..., 3)
            World positions.
        """
        return np.asarray(points, dtype=np.float64) @ self.frame_affine[:3, :3].T + self.frame_affine[:3, 3]

    def from_world(self, points: ArrayLike) -> FloatArray:
        """Map world (z, y, x) to (t, row, col).

        Parameters
        ----------
        points : array_like (..., 3)
            World positions.

        Returns
        -------
        ndarray (..., 3)
            t, row, col.
        """
        inverse = np.linalg.inv(self.frame_affine)
        return np.asarray(points, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3]

    def default_grid(self, height: int, width: int, units: Any = None) -> Grid:
        """Make a grid along the slices, with voxels as near to cubes as the slices allow.

        In-plane pixels are kept exactly. Along column 0 the grid runs from the first slice to the last. Its
        step is about the pixel size; where the gaps are whole multiples of it (to 1 %), every slice lies on
        a plane of the grid. Slices that are closer together than pixels are all kept.

        Parameters
        ----------
        height, width : int
            Rows and columns.
        units : str or sequence of 3 str, optional
            Units of the world axes.

        Returns
        -------
        Grid
            The grid.
        """
        wanted = float(np.sqrt(np.prod(self.pixel_size))) / self.cosine
        gaps = np.diff(self.positions)
        extent = float(self.positions[-1] - self.positions[0])
        # the mean of a regular stack's gaps is less noisy than its smallest
        base = extent / len(gaps) if self.regular else float(gaps.min())
        parts = max(1, round(base / wanted))
        step = base / parts
        planes = (self.positions - self.positions[0]) / step
        # a single close pair must not set the step of the whole grid
        finer = step < wanted and (self.regular or step > wanted / 2) and parts == 1
        fits = np.abs(planes - np.round(planes)).max() <= 1e-2
        if fits and (abs(step - wanted) <= 1e-2 * wanted or finer):
            count = round(float(planes[-1])) + 1
        else:
            count = max(1, round(extent / wanted)) + 1
        affine = np.array(self.frame_affine)
        affine[:3, 3] = self.to_world((self.positions[0], 0.0, 0.0))
        affine[:3, 0] *= extent / (count - 1)
        return Grid((count, height, width), affine, units)


class SlicePlane:
    """A flat image anywhere in the world, to be rendered.

    Parameters
    ----------
    origin : array_like (3,)
        World (z, y, x) of the centre of pixel (0, 0).
    row_axis, col_axis : array_like (3,)
        Directions in which the row and the column index grow; at right angles, of any length.
    shape : (int, int)
        Rows and columns.
    spacing : float or (float, float)
        Distance between pixel centres along rows and columns, world units.
    units : str or sequence of 3 str, optional
        Units of the world axes.

    Raises
    ------
    ValueError
        If the directions are zero or not at right angles, or shape or spacing are not positive.

    Examples
    --------
    >>> plane = SlicePlane((5, 0, 0), (0, 1, 0), (0, 0, 1), shape=(4, 6), spacing=0.5)
    >>> plane.points()[3, 0].tolist()
    [5.0, 1.5, 0.0]
    """

    __slots__ = ("_col", "_origin", "_row", "_shape", "_spacing", "_units")
    _col: FloatArray
    _origin: FloatArray
    _row: FloatArray
    _shape: tuple[int, int]
    _spacing: tuple[float, float]
    _units: tuple[str, str, str] | None

    def __init__(
        self,
        origin: ArrayLike,
        row_axis: ArrayLike,
        col_axis: ArrayLike,
        shape: Sequence[int],
        spacing: float | Sequence[float] = 1.0,
        units: Any = None,
    ) -> None:
        vectors = []
        for name, value in (("origin", origin), ("row_axis", row_axis), ("col_axis", col_axis)):
            vector = np.array(value, dtype=np.float64)
            if vector.shape != (3,) or not np.isfinite(vector).all():
                raise ValueError(f"{name}: got {value!r}, need three finite numbers (z, y, x).")
            if name != "origin":
                length = float(np.linalg.norm(vector))
                if length == 0:
                    raise ValueError(f"{name}: got a vector of length 0, need a direction.")
                vector /= length
            vector.flags.writeable = False
            vectors.append(vector)
        if abs(vectors[1] @ vectors[2]) > 1e-6:
            raise ValueError(
                "row_axis, col_axis: got directions that are not at right angles, need right angles."
            )
        sizes = tuple(int(size) for size in shape)
        if len(sizes) != 2 or min(sizes) < 1:
            raise ValueError(f"shape: got {tuple(shape)}, need two positive integers (rows, columns).")
        steps = np.broadcast_to(np.asarray(spacing, dtype=np.float64), (2,))
        if not (np.isfinite(steps).all() and (steps > 0).all()):
            raise ValueError(f"spacing: got {spacing}, need positive finite numbers.")
        object.__setattr__(self, "_origin", vectors[0])
        object.__setattr__(self, "_row", vectors[1])
        object.__setattr__(self, "_col", vectors[2])
        object.__setattr__(self, "_shape", (sizes[0], sizes[1]))
        object.__setattr__(self, "_spacing", (float(steps[0]), float(steps[1])))
        object.__setattr__(self, "_units", check_units(units))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"SlicePlane is immutable: {name} can not be set.")

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            SlicePlane,
            (self._origin, self._row, self._col, self._shape, self._spacing, self._units),
        )

    def __repr__(self) -> str:
        return (
            f"SlicePlane(origin={self._origin.tolist()}, normal={self.normal.tolist()}, shape={self._shape})"
        )

    @property
    def origin(self) -> FloatArray:
        """World position of pixel (0, 0), (3,)."""
        return self._origin

    @property
    def row_axis(self) -> FloatArray:
        """Unit vector along which the row index grows, (3,)."""
        return self._row

    @property
    def col_axis(self) -> FloatArray:
        """Unit vector along which the column index grows, (3,)."""
        return self._col

    @property
    def normal(self) -> FloatArray:
        """Unit normal (3,): row axis x column axis, in (z, y, x) components."""
        return np.cross(self._row, self._col) + 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._shape

    @property
    def spacing(self) -> tuple[float, float]:
        """Distance between centres along rows and columns, world units."""
        return self._spacing

    @property
    def units(self) -> tuple[str, str, str] | None:
        """Units of the world axes."""
        return self._units

    @property
    def affine(self) -> FloatArray:
        """(t, row, col) to world, (4, 4); t along the normal in world units, 0 on the plane."""
        out = np.eye(4)
        out[:3, 0] = self.normal
        out[:3, 1] = self._row * self._spacing[0]
        out[:3, 2] = self._col * self._spacing[1]
        out[:3, 3] = self._origin
        return out

    def grid(self) -> Grid:
        """Give the plane as a grid with one layer."""
        return Grid((1, *self._shape), self.affine, self._units)

    def points(self) -> FloatArray:
        """World positions of all pixel centres.

        Returns
        -------
        ndarray (rows, columns, 3)
            In (z, y, x).
        """
        rows = np.arange(self._shape[0]) * self._spacing[0]
        cols = np.arange(self._shape[1]) * self._spacing[1]
        out: FloatArray = self._origin + rows[:, None, None] * self._row + cols[None, :, None] * self._col
        return out

    @classmethod
    def through(
        cls,
        grid: Grid,
        normal: ArrayLike,
        centre: ArrayLike | None = None,
        *,
        spacing: float | None = None,
        up: ArrayLike | None = None,
    ) -> SlicePlane:
        """Cut a grid by a plane of any direction; the image is as large as needed to hold the cut.

        Parameters
        ----------
        grid : Grid
            What is cut.
        normal : array_like (3,)
            Direction of the plane's normal, world (z, y, x).
        centre : array_like (3,), optional
            A world point on the plane. Default: the middle of the grid.
        spacing : float, optional
            Pixel size, world units. Default: the grid's smallest spacing.
        up : array_like (3,), optional
            Direction that rows should follow. Default: the world axis nearest to the plane.

        Returns
        -------
        SlicePlane
            The plane.

        Raises
        ------
        ValueError
            If the plane misses the grid, or `up` is along the normal.

        Examples
        --------
        >>> SlicePlane.through(Grid((9, 9, 9)), normal=(1, 0, 0)).shape
        (9, 9)
        """
        axis = np.array(normal, dtype=np.float64)
        if axis.shape != (3,) or not np.isfinite(axis).all() or not np.linalg.norm(axis) > 0:
            raise ValueError(f"normal: got {normal!r}, need three finite numbers that are not all zero.")
        axis /= np.linalg.norm(axis)
        corners = grid.corners()
        middle = corners.mean(axis=0) if centre is None else np.asarray(centre, dtype=np.float64)
        step = float(grid.spacing.min()) if spacing is None else float(spacing)
        if not (np.isfinite(step) and step > 0):
            raise ValueError(f"spacing: got {spacing}, need a positive finite number.")
        if up is None:
            hint = np.zeros(3)
            hint[int(np.argmin(np.round(np.abs(axis), 9)))] = 1.0
        else:
            hint = np.array(up, dtype=np.float64)
        row = hint - axis * (axis @ hint)
        if np.linalg.norm(row) < 1e-9 * max(1.0, float(np.linalg.norm(hint))):
            raise ValueError("up: got a direction along the normal, need one that is not.")
        row /= np.linalg.norm(row)
        col = np.cross(axis, row)
        cut = _cut_of_box(corners, middle, axis)
        if not len(cut):
            raise ValueError(
                f"centre: the plane through {middle.tolist()} misses the grid, need a point inside."
            )
        inside = (cut - middle) @ np.stack([row, col], axis=1)
        low = np.floor(inside.min(axis=0) / step + 1e-6)
        high = np.ceil(inside.max(axis=0) / step - 1e-6)
        origin = middle + row * low[0] * step + col * low[1] * step
        shape = (high - low).astype(int) + 1
        return cls(origin, row, col, shape.tolist(), step, grid.units)


def _cut_of_box(corners: FloatArray, point: FloatArray, normal: FloatArray) -> FloatArray:
    """Points where a plane meets the twelve edges of a box given by its eight corners (binary order)."""
    height = (corners - point) @ normal
    # a face that lies in the plane must count, whatever the rounding
    height[np.abs(height) < 1e-9 * max(float(np.ptp(corners)), 1e-300)] = 0.0
    found = []
    for first in range(8):
        for bit in (1, 2, 4):
            second = first | bit
            if second == first:
                continue
            a, b = height[first], height[second]
            if a == 0:
                found.append(corners[first])
            if b == 0:
                found.append(corners[second])
            if a * b < 0:
                found.append(corners[first] + (corners[second] - corners[first]) * (a / (a - b)))
    return np.array(found).reshape(-1, 3)
