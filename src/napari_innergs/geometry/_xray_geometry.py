"""X-ray scans with a flat panel, whatever their trajectory; `napari_innergs.geometry.xray` makes the usual ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from napari_innergs.geometry._xray_vectors import (
    FloatArray,
    as_length,
    as_shape,
    check_panel,
    estimate_angles,
    finite_angles,
    nearest_point,
)
from napari_innergs.geometry.frames import check_affine, check_units
from napari_innergs.geometry.grid import Grid

KINDS = ("cone", "parallel")


class XrayGeometry:
    """Where source and panel are in each view: any trajectory of a flat panel.

    Parameters
    ----------
    vectors : array_like (n, 12)
        For each view, in (x, y, z), world units: source position (cone) or ray direction (parallel), centre
        of the panel, step from column to column, step from row to row.
    detector_shape : (int, int)
        Rows and columns.
    kind : {"cone", "parallel"}
        What the first three numbers mean.
    units : str or sequence of 3 str, optional
        Units of the world axes.
    angles : array_like (n,), optional
        Angles of the views, radians, counter-clockwise seen from +z. Default: estimated from the panel.
    isocentre : array_like (3,), optional
        Point (z, y, x) that the scan turns around. Default: the point nearest to all central rays.

    Raises
    ------
    ValueError
        If numbers are not finite, pixel steps are zero or parallel, or rays run along the panel.

    Examples
    --------
    >>> geometry = XrayGeometry([[9, 0, 0, -9, 0, 0, 0, 1, 0, 0, 0, 1]], (4, 6))
    >>> geometry.source.tolist(), geometry.magnification
    ([[0.0, 0.0, 9.0]], 2.0)
    """

    __slots__ = ("_angles", "_isocentre", "_kind", "_shape", "_units", "_vectors")
    _angles: FloatArray
    _isocentre: FloatArray
    _kind: str
    _shape: tuple[int, int]
    _units: tuple[str, str, str] | None
    _vectors: FloatArray

    def __init__(
        self,
        vectors: ArrayLike,
        detector_shape: Sequence[int],
        kind: str = "cone",
        units: Any = None,
        *,
        angles: ArrayLike | None = None,
        isocentre: ArrayLike | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind: got {kind!r}, need 'cone' or 'parallel'.")
        try:
            array = np.array(vectors, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError("vectors: got something that is not numbers, need (n, 12).") from error
        if array.ndim != 2 or array.shape[1] != 12 or len(array) == 0:
            raise ValueError(f"vectors: got shape {array.shape}, need (n, 12), one row for each view.")
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if bad.size:
            raise ValueError(
                f"vectors: got NaN or infinite numbers in {bad.size} view(s), the first is {bad[0]}, "
                "need finite numbers."
            )
        check_panel(array, kind)
        centre = nearest_point(array, kind) if isocentre is None else np.array(isocentre, dtype=np.float64)
        if centre.shape != (3,) or not np.isfinite(centre).all():
            raise ValueError(f"isocentre: got {isocentre!r}, need three finite numbers (z, y, x).")
        if angles is None:
            turned = estimate_angles(array, kind)
        else:
            # not used for anything but display and checks: large ones are no mistake here
            turned = finite_angles(angles, len(array))
        for part in (array, centre, turned):
            part.flags.writeable = False
        object.__setattr__(self, "_vectors", array)
        object.__setattr__(self, "_shape", as_shape(detector_shape))
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_units", check_units(units))
        object.__setattr__(self, "_angles", turned)
        object.__setattr__(self, "_isocentre", centre)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: {name} can not be set; make a new one.")

    def __reduce__(self) -> tuple[Any, ...]:
        state = (self._shape, self._kind, self._units, np.array(self._angles), np.array(self._isocentre))
        return (_restore, (type(self), np.array(self._vectors), *state))

    def __len__(self) -> int:
        return len(self._vectors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, XrayGeometry):
            return NotImplemented
        return (
            self._kind == other._kind
            and self._shape == other._shape
            and self._units == other._units
            and bool(np.array_equal(self._vectors, other._vectors))
        )

    def __hash__(self) -> int:
        return hash((self._kind, self._shape, self._units, self._vectors.tobytes()))

    def __repr__(self) -> str:
        unit = "" if self._units is None else f" {'/'.join(dict.fromkeys(self._units))}"
        dv, du = self.pixel_size
        return (
            f"{type(self).__name__}({self.n_views} views, {self._kind}, panel {self._shape[0]} x {self._shape[1]}, "
            f"pixel {dv:.6g} x {du:.6g}{unit})"
        )

    def _replace(
        self, vectors: FloatArray, angles: ArrayLike | None = None, isocentre: ArrayLike | None = None
    ) -> Self:
        restored = _restore(type(self), vectors, self._shape, self._kind, self._units, angles, isocentre)
        return restored  # type: ignore[no-any-return]

    @property
    def n_views(self) -> int:
        """Number of views."""
        return len(self._vectors)

    @property
    def detector_shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self._shape

    @property
    def kind(self) -> str:
        """``"cone"`` or ``"parallel"``."""
        return self._kind

    @property
    def units(self) -> tuple[str, str, str] | None:
        """Units of the world axes (z, y, x), or None."""
        return self._units

    @property
    def vectors(self) -> FloatArray:
        """The twelve numbers of each view, in (x, y, z), (n, 12), read-only."""
        return self._vectors

    @property
    def angles(self) -> FloatArray:
        """Angles of the views, (n,), radians, counter-clockwise seen from +z; as given, or estimated."""
        return self._angles

    @property
    def isocentre(self) -> FloatArray:
        """Point (z, y, x) that the scan turns around, (3,)."""
        return self._isocentre

    @property
    def source(self) -> FloatArray:
        """Positions of the source, (n, 3), world (z, y, x).

        Raises
        ------
        AttributeError
            For parallel beams.
        """
        if self._kind != "cone":
            raise AttributeError("source: a parallel beam has none; use direction.")
        return self._vectors[:, 2::-1]

    @property
    def direction(self) -> FloatArray:
        """Unit directions of the (central) rays, (n, 3), world (z, y, x)."""
        rays = (
            self._vectors[:, :3] if self._kind == "parallel" else self._vectors[:, 3:6] - self._vectors[:, :3]
        )
        return (rays / np.linalg.norm(rays, axis=1, keepdims=True))[:, ::-1]

    @property
    def center(self) -> FloatArray:
        """Centres of the panel, (n, 3), world (z, y, x)."""
        return self._vectors[:, 5:2:-1]

    @property
    def u(self) -> FloatArray:
        """Steps from column to column, (n, 3), world (z, y, x)."""
        return self._vectors[:, 8:5:-1]

    @property
    def v(self) -> FloatArray:
        """Steps from row to row, (n, 3), world (z, y, x)."""
        return self._vectors[:, 11:8:-1]

    @property
    def pixel_size(self) -> tuple[float, float]:
        """Median lengths of a step along rows' and columns' index (v, u), world units."""
        return (
            float(np.median(np.linalg.norm(self.v, axis=1))),
            float(np.median(np.linalg.norm(self.u, axis=1))),
        )

    @property
    def source_detector(self) -> FloatArray:
        """Distances from the source to the panel's plane, (n,); infinite for parallel beams."""
        if self._kind == "parallel":
            return np.full(self.n_views, np.inf)
        return np.abs(np.sum((self.center - self.source) * self._normals(), axis=1))

    @property
    def source_origin(self) -> FloatArray:
        """Distances from the source to the isocentre along the panel's normal, (n,); infinite for parallel beams."""
        if self._kind == "parallel":
            return np.full(self.n_views, np.inf)
        return np.abs(np.sum((self._on_axis() - self.source) * self._normals(), axis=1))

    @property
    def magnification(self) -> float:
        """How much larger the image of something at the isocentre is (median of the views); 1 when parallel."""
        if self._kind == "parallel":
            return 1.0
        distance = self.source_origin
        if not (distance > 0).all():
            return float("inf")
        return float(np.median(self.source_detector / distance))

    def _normals(self) -> FloatArray:
        normals = np.cross(self.u, self.v)
        return normals / np.linalg.norm(normals, axis=1, keepdims=True)

    def _axis(self) -> FloatArray:
        """Direction that the scan turns about: the mean of the rows' direction."""
        mean = (self.v / np.linalg.norm(self.v, axis=1, keepdims=True)).mean(axis=0)
        length = float(np.linalg.norm(mean))
        return mean / length if length > 1e-3 else np.array([1.0, 0.0, 0.0])

    def _on_axis(self) -> FloatArray:
        """Points of the rotation axis that follow the rise of the source (helix), (n, 3)."""
        axis = self._axis()
        height = (self.source - self._isocentre) @ axis
        # the mean height is left out: a laminograph's source is not at the height of what it looks at
        return self._isocentre + (height - height.mean())[:, None] * axis

    def subset(self, indices: Any) -> Self:
        """Keep some views.

        Parameters
        ----------
        indices : int array, slice, or bool array (n,)
            Which, in the order wanted.

        Returns
        -------
        XrayGeometry
            With the same isocentre.

        Raises
        ------
        ValueError
            If none is left or one does not exist.
        """
        try:
            chosen = np.atleast_1d(np.arange(self.n_views)[indices])
        except IndexError as error:
            raise ValueError(f"indices: got {indices!r}, need integers below {self.n_views}.") from error
        if chosen.size == 0:
            raise ValueError("indices: no view is left, need at least one.")
        return self._replace(self._vectors[chosen], self._angles[chosen], self._isocentre)

    def with_offset(self, dv: ArrayLike, du: ArrayLike) -> Self:
        """Move the panel within its plane.

        Parameters
        ----------
        dv, du : float or array_like (n,)
            Steps along rows and columns, in pixels: the pixel (v, u) comes to where (v + dv, u + du) was, so the
            image moves by -dv, -du.

        Returns
        -------
        XrayGeometry
            The moved panel.

        Raises
        ------
        ValueError
            If the numbers are not one for all views or one for each.
        """
        moves = []
        for name, value in (("dv", dv), ("du", du)):
            try:
                moves.append(np.broadcast_to(np.asarray(value, dtype=np.float64), (self.n_views,))[:, None])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: need one number or {self.n_views}, one for each view.") from error
        vectors = np.array(self._vectors)
        vectors[:, 3:6] += moves[0] * vectors[:, 9:12] + moves[1] * vectors[:, 6:9]
        return self._replace(vectors, self._angles, self._isocentre)

    def moved(self, affine: ArrayLike) -> Self:
        """Move source and panel together.

        Parameters
        ----------
        affine : array_like (4, 4)
            Maps world (z, y, x) to world (z, y, x).

        Returns
        -------
        XrayGeometry
            The moved scan; its angles are estimated anew.
        """
        matrix = check_affine(affine)
        linear, shift = matrix[:3, :3], matrix[:3, 3]
        first = self._vectors[:, 2::-1] @ linear.T
        if self._kind == "cone":
            first = first + shift
        parts = (first, self.center @ linear.T + shift, self.u @ linear.T, self.v @ linear.T)
        vectors = np.concatenate([part[:, ::-1] for part in parts], axis=1)
        return self._replace(vectors, None, linear @ self._isocentre + shift)

    def to_index_frame(self, grid: Grid) -> FloatArray:
        """Give all views in the index coordinates of a grid.

        Parameters
        ----------
        grid : Grid
            The volume.

        Returns
        -------
        ndarray (n, 12)
            Source (or ray direction, of unit length in the world), centre of pixel (0, 0), u, v; each (z, y, x).
        """
        linear, shift = grid.inverse_affine[:3, :3], grid.inverse_affine[:3, 3]
        if self._kind == "cone":
            first = self.source @ linear.T + shift
        else:
            first = self.direction @ linear.T
        rows, cols = self._shape
        corner = self.center - 0.5 * (rows - 1) * self.v - 0.5 * (cols - 1) * self.u
        parts = (first, corner @ linear.T + shift, self.u @ linear.T, self.v @ linear.T)
        return np.ascontiguousarray(np.concatenate(parts, axis=1))

    def project(self, points: ArrayLike) -> FloatArray:
        """Find the pixel at which each view sees a world point.

        Parameters
        ----------
        points : array_like (m, 3)
            World (z, y, x).

        Returns
        -------
        ndarray (n, m, 2)
            Row and column (v, u), with fractions; they may lie outside the panel. NaN for what is not in front
            of the source.
        """
        where = np.atleast_2d(np.asarray(points, dtype=np.float64))
        normals = self._normals()
        if self._kind == "cone":
            rays = where[None] - self.source[:, None]
            depth = np.sum((self.center - self.source) * normals, axis=1)[:, None]
            along = np.einsum("nmi,ni->nm", rays, normals) / depth
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = np.where(along > 0, 1 / along, np.nan)
            hits = (self.source - self.center)[:, None] + rays * scale[..., None]
        else:
            ray = self.direction
            offset = where[None] - self.center[:, None]
            along = np.einsum("nmi,ni->nm", offset, normals) / np.sum(ray * normals, axis=1)[:, None]
            hits = offset - along[..., None] * ray[:, None]
        axes = np.stack([self.v, self.u], axis=1)
        dual = np.linalg.solve(axes @ axes.transpose(0, 2, 1), axes)
        middle = 0.5 * (np.array(self._shape) - 1)
        return np.einsum("nmi,nki->nmk", hits, dual) + middle

    def default_grid(self, shape: Sequence[int] | None = None, spacing: float | None = None) -> Grid:
        """Make a grid of cubes around what the scan sees, centred on the isocentre.

        Parameters
        ----------
        shape : sequence of 3 int, optional
            Voxels (z, y, x). Default: as many as hold all central rays of the panel's edges.
        spacing : float, optional
            Edge of a voxel, world units. Default: the smaller pixel size over the magnification or, with `shape`,
            as large as `shape` needs to hold the same space.

        Returns
        -------
        Grid
            Axis-aligned.

        Raises
        ------
        ValueError
            If `spacing` is not positive or `shape` is not three positive integers.
        """
        centre, extent = self._field_of_view()
        rows = self._shape[0]
        if shape is None:
            small = self.pixel_size[1] if rows == 1 else min(self.pixel_size)
            step = small / self.magnification if spacing is None else as_length(spacing, "spacing")
            # edges of voxels, not centres, lie on the boundary
            sizes = np.maximum(1, np.ceil(extent / step - 1e-6)).astype(int).tolist()
        else:
            sizes = list(shape)
            checked = Grid(sizes)
            step = float(np.max(extent / checked.shape)) if spacing is None else as_length(spacing, "spacing")
        affine = np.eye(4)
        affine[:3, :3] *= step
        affine[:3, 3] = centre - 0.5 * (np.array(sizes) - 1) * step
        return Grid(sizes, affine, self._units)

    def _field_of_view(self) -> tuple[FloatArray, FloatArray]:
        """Centre and widths (z, y, x) of the box around the cylinder that the panel's edges see."""
        axis = self._axis()
        rows, cols = self._shape
        low, high, radius = np.inf, -np.inf, 0.0
        for dv, du in ((0.0, -0.5), (0.0, 0.5), (-0.5, 0.0), (0.5, 0.0)):
            point = self.center + dv * rows * self.v + du * cols * self.u
            if self._kind == "cone":
                start, ray = self.source, point - self.source
            else:
                start, ray = point, self.direction
            ray = ray / np.linalg.norm(ray, axis=1, keepdims=True)
            start = start - self._isocentre
            # nearest approach of the ray and the rotation axis
            across = ray - (ray @ axis)[:, None] * axis
            from_axis = start - (start @ axis)[:, None] * axis
            along = -np.sum(from_axis * across, axis=1) / np.maximum(np.sum(across**2, axis=1), 1e-12)
            nearest = start + along[:, None] * ray
            height = nearest @ axis
            if dv:
                low, high = min(low, float(height.min())), max(high, float(height.max()))
            else:
                apart = np.linalg.norm(nearest - height[:, None] * axis, axis=1)
                radius = max(radius, float(apart.max()))
        centre = self._isocentre + 0.5 * (low + high) * axis
        widths = 2 * radius * np.sqrt(np.maximum(1 - axis**2, 0)) + (high - low) * np.abs(axis)
        return centre, widths

    def check_covers(self, grid: Grid) -> str | None:
        """Check that the rays meet a grid.

        Parameters
        ----------
        grid : Grid
            The volume.

        Returns
        -------
        str or None
            A warning in one sentence: most rays miss the grid, or its middle is outside the image in some views.

        Raises
        ------
        ValueError
            If a source is inside the grid, or no ray of a view meets it.
        """
        sizes = np.array(grid.shape)
        if self._kind == "cone":
            where = grid.world_to_index(self.source)
            inside = np.flatnonzero(((where > -0.5) & (where < sizes - 0.5)).all(axis=1))
            if inside.size:
                raise ValueError(
                    f"geometry: the source of view {inside[0]} is inside the grid ({inside.size} view(s)), "
                    "need it outside; check the distances, the grid and their units."
                )
        shares = self._shares(grid)
        missing = np.flatnonzero(shares == 0)
        if missing.size:
            raise ValueError(
                f"geometry: no ray of view {missing[0]} meets the grid ({missing.size} of {self.n_views} views), "
                "need rays through the volume; check distances, offsets, the grid's place and their units."
            )
        share = float(shares.mean())
        if share < 0.05:
            return f"Only {100 * share:.1f} % of the rays meet the grid: check its place and the geometry's units."
        middle = self.project(grid.index_to_world(0.5 * (sizes - 1)))[:, 0]
        outside = ((middle < -0.5) | (middle > np.array(self._shape) - 0.5)).any(axis=1)
        if self._shape[0] > 1 and outside.mean() > 0.5:
            return (
                f"The middle of the grid is outside the image in {int(outside.sum())} of {self.n_views} views: "
                "check the detector offset and the grid's place."
            )
        return None

    def _shares(self, grid: Grid) -> FloatArray:
        """Share of each view's rays that meet the grid, from a lattice of pixels with the panel's corners."""
        frame = self.to_index_frame(grid)
        rows = np.unique(np.linspace(0, self._shape[0] - 1, 25).round())
        cols = np.unique(np.linspace(0, self._shape[1] - 1, 25).round())
        v, u = (part.ravel()[:, None] for part in np.meshgrid(rows, cols, indexing="ij"))
        upper = np.array(grid.shape) - 0.5
        shares = np.empty(self.n_views)
        # the slab test, with lines instead of half-lines: the panel may stand inside the volume
        for i, view in enumerate(frame):
            pixel = view[3:6] + v * view[9:12] + u * view[6:9]
            ray = pixel - view[:3] if self._kind == "cone" else np.broadcast_to(view[:3], pixel.shape)
            ray = np.where(np.abs(ray) < 1e-12, 1e-12, ray)
            ends = np.stack([(-0.5 - pixel) / ray, (upper - pixel) / ray])
            enter, leave = ends.min(axis=0).max(axis=1), ends.max(axis=0).min(axis=1)
            meets = enter < leave
            if self._kind == "cone":
                # not behind the source, which lies at -1
                meets &= leave > -1
            shares[i] = np.count_nonzero(meets) / len(meets)
        return shares


def _restore(
    cls: type[XrayGeometry],
    vectors: FloatArray,
    shape: tuple[int, int],
    kind: str,
    units: Any,
    angles: ArrayLike | None,
    isocentre: ArrayLike | None,
) -> Any:
    out = object.__new__(cls)
    XrayGeometry.__init__(out, vectors, shape, kind, units, angles=angles, isocentre=isocentre)
    return out
