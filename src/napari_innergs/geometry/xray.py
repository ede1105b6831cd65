"""X-ray scans with a flat panel: where the source, the panel and its pixels are in each view.

World coordinates are right-handed x, y, z, kept in the order (z, y, x). Twelve numbers describe a view, in the
order of the ASTRA toolbox and in (x, y, z): source (cone) or ray direction (parallel), centre of the panel, step
from column to column (u), step from row to row (v). Projections are [n, v, u].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_innergs.geometry.frames import check_affine, check_units
from napari_innergs.geometry.grid import Grid

__all__ = ["ConeBeam", "ParallelBeam", "XrayGeometry", "check_angles"]

FloatArray = NDArray[np.float64]
KINDS = ("cone", "parallel")
ROTATIONS = ("ccw", "cw")
# a source or ray this close to the panel's plane (sine of the angle) gives no image
_GRAZING = 1e-6


def check_angles(angles: ArrayLike, n_views: int | None = None, *, turns: bool = False) -> FloatArray:
    """Validate the angles of a scan.

    Parameters
    ----------
    angles : array_like (n,)
        Radians.
    n_views : int, optional
        How many there must be.
    turns : bool
        Whether many turns are expected (helical scans): only large steps are then taken for degrees.

    Returns
    -------
    ndarray (n,)
        A copy.

    Raises
    ------
    ValueError
        If there are none or another number of them, if one is not finite, or if they look like degrees.

    Examples
    --------
    >>> check_angles([0.0, 0.5, 1.0]).tolist()
    [0.0, 0.5, 1.0]
    """
    out = _finite_angles(angles, n_views)
    if _look_like_degrees(out, 1.5 if turns else 0.2):
        raise ValueError(
            f"angles: got {out.min():g} to {out.max():g}, which look like degrees, need radians; "
            "convert them with numpy.deg2rad(angles)."
        )
    return out


def _finite_angles(angles: ArrayLike, n_views: int | None) -> FloatArray:
    try:
        out = np.array(angles, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("angles: got something that is not numbers, need radians.") from error
    if out.ndim != 1 or out.size == 0:
        raise ValueError(f"angles: got shape {out.shape}, need (n,), one for each view.")
    bad = np.flatnonzero(~np.isfinite(out))
    if bad.size:
        raise ValueError(
            f"angles: got {bad.size} NaN or infinite, the first at view {bad[0]}, need finite numbers."
        )
    if n_views is not None and len(out) != n_views:
        raise ValueError(f"angles: got {len(out)}, need {n_views}, one for each view.")
    return out


def _look_like_degrees(angles: FloatArray, step_limit: float) -> bool:
    if np.abs(angles).max() <= 4 * np.pi:
        return False
    if len(angles) == 1:
        return True
    step = float(np.median(np.abs(np.diff(np.sort(angles)))))
    extent = float(np.ptp(angles))
    # whole or half turns in degrees, with or without the last view
    whole = any(
        total >= 179 and abs(total - 180 * round(total / 180)) <= 1e-3 * total
        for total in (extent, extent + step)
    )
    return step >= step_limit or whole


def _pair(value: Any, name: str, positive: bool = False) -> tuple[float, float]:
    try:
        both = np.broadcast_to(np.asarray(value, dtype=np.float64), (2,))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: got {value!r}, need one number or two (v, u).") from error
    if not np.isfinite(both).all() or (positive and not (both > 0).all()):
        raise ValueError(
            f"{name}: got {value!r}, need {'positive ' if positive else ''}finite numbers (v, u)."
        )
    return float(both[0]), float(both[1])


def _length(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: got {value!r}, need a positive length.") from error
    if not (np.isfinite(number) and number > 0):
        raise ValueError(f"{name}: got {number:g}, need a positive finite length.")
    return number


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: got {value!r}, need a number.") from error
    if not np.isfinite(number):
        raise ValueError(f"{name}: got {number}, need a finite number.")
    return number


def _check_shape(shape: Any) -> tuple[int, int]:
    try:
        sizes = tuple(int(size) for size in shape)
        whole = len(sizes) == 2 and all(float(a) == b for a, b in zip(shape, sizes, strict=True))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"detector_shape: got {shape!r}, need two integers (rows, columns).") from error
    if not whole or min(sizes) < 1:
        raise ValueError(f"detector_shape: got {tuple(shape)}, need two positive integers (rows, columns).")
    return sizes[0], sizes[1]


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
        _check_panel(array, kind)
        centre = _nearest_point(array, kind) if isocentre is None else np.array(isocentre, dtype=np.float64)
        if centre.shape != (3,) or not np.isfinite(centre).all():
            raise ValueError(f"isocentre: got {isocentre!r}, need three finite numbers (z, y, x).")
        if angles is None:
            turned = _estimate_angles(array, kind)
        else:
            # not used for anything but display and checks: large ones are no mistake here
            turned = _finite_angles(angles, len(array))
        for part in (array, centre, turned):
            part.flags.writeable = False
        object.__setattr__(self, "_vectors", array)
        object.__setattr__(self, "_shape", _check_shape(detector_shape))
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
            step = small / self.magnification if spacing is None else _length(spacing, "spacing")
            # edges of voxels, not centres, lie on the boundary
            sizes = np.maximum(1, np.ceil(extent / step - 1e-6)).astype(int).tolist()
        else:
            sizes = list(shape)
            checked = Grid(sizes)
            step = float(np.max(extent / checked.shape)) if spacing is None else _length(spacing, "spacing")
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


def _check_panel(vectors: FloatArray, kind: str) -> None:
    u, v = vectors[:, 6:9], vectors[:, 9:12]
    ray = vectors[:, :3] if kind == "parallel" else vectors[:, 3:6] - vectors[:, :3]
    for name, step in (("u", u), ("v", v), ("direction" if kind == "parallel" else "source to panel", ray)):
        zero = np.flatnonzero(~(np.linalg.norm(step, axis=1) > 0))
        if zero.size:
            raise ValueError(
                f"vectors: {name} has length 0 in view {zero[0]} ({zero.size} view(s)), need a direction."
            )
    unit = [step / np.linalg.norm(step, axis=1, keepdims=True) for step in (u, v, ray)]
    normal = np.cross(unit[0], unit[1])
    size = np.linalg.norm(normal, axis=1)
    flat = np.flatnonzero(size < _GRAZING)
    if flat.size:
        raise ValueError(
            f"vectors: the pixel steps u and v of view {flat[0]} are parallel ({flat.size} view(s)), "
            "need two directions that span the panel."
        )
    grazing = np.flatnonzero(np.abs(np.sum(normal / size[:, None] * unit[2], axis=1)) < _GRAZING)
    if grazing.size:
        what = "the rays run" if kind == "parallel" else "the source lies"
        raise ValueError(
            f"vectors: {what} in the panel's plane in view {grazing[0]} ({grazing.size} view(s)), "
            "need rays that cross it."
        )


def _nearest_point(vectors: FloatArray, kind: str) -> FloatArray:
    """Find the point with the least sum of squared distances to the central rays, (z, y, x).

    Where the rays leave it open (one view, all parallel), it is the one nearest to the world's origin.
    """
    ray = vectors[:, :3] if kind == "parallel" else vectors[:, 3:6] - vectors[:, :3]
    ray = ray / np.linalg.norm(ray, axis=1, keepdims=True)
    across = np.eye(3) - ray[:, :, None] * ray[:, None, :]
    left, right = across.mean(axis=0), np.einsum("nij,nj->i", across, vectors[:, 3:6]) / len(vectors)
    point = np.linalg.lstsq(left, right, rcond=1e-6)[0]
    return np.array(point[::-1])


def _estimate_angles(vectors: FloatArray, kind: str) -> FloatArray:
    """Angles of the panel's normal on the side of the source, unwrapped from -pi < first <= pi."""
    normal = np.cross(vectors[:, 6:9], vectors[:, 9:12])
    to_source = -vectors[:, :3] if kind == "parallel" else vectors[:, :3] - vectors[:, 3:6]
    normal *= np.sign(np.sum(normal * to_source, axis=1))[:, None]
    return np.unwrap(np.arctan2(normal[:, 1], normal[:, 0]))


def _panel(
    angles: FloatArray,
    *,
    elevation: float,
    source_offset: tuple[float, float],
    detector_offset: tuple[float, float],
    pixel_size: tuple[float, float],
    detector_tilt: Any,
    source_origin: float | None,
    origin_detector: float,
    heights: FloatArray | float = 0.0,
) -> FloatArray:
    """Vectors of a source and a panel turned about z; `source_origin` None means parallel rays."""
    zero = np.zeros_like(angles)
    cos, sin = np.cos(angles), np.sin(angles)
    ce, se = np.cos(elevation), np.sin(elevation)
    out = np.stack([ce * cos, ce * sin, zero + se], axis=1)
    along_u = np.stack([-sin, cos, zero], axis=1)
    along_v = np.stack([-se * cos, -se * sin, zero + ce], axis=1)
    lift = np.zeros((len(angles), 3))
    lift[:, 2] = heights
    shift = detector_offset[0] * along_v + detector_offset[1] * along_u
    centre = -origin_detector * out + shift + lift
    if source_origin is None:
        first = -out
    else:
        first = source_origin * out + source_offset[0] * along_v + source_offset[1] * along_u + lift
    try:
        roll, pitch, yaw = (float(angle) for angle in np.broadcast_to(np.asarray(detector_tilt, float), (3,)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"detector_tilt: got {detector_tilt!r}, need three angles (roll, pitch, yaw) in radians."
        ) from error
    if not np.isfinite([roll, pitch, yaw]).all() or max(abs(roll), abs(pitch), abs(yaw)) > np.pi:
        raise ValueError(f"detector_tilt: got {detector_tilt!r}, need radians between -pi and pi.")
    # columns u, v, normal; right-handed: u x v = normal, towards the source
    frame = np.stack([along_u, along_v, out], axis=2) @ (_turn(1, yaw) @ _turn(0, pitch) @ _turn(2, roll))
    return np.concatenate(
        [first, centre, frame[:, :, 0] * pixel_size[1], frame[:, :, 1] * pixel_size[0]], axis=1
    )


def _turn(axis: int, angle: float) -> FloatArray:
    out = np.eye(3)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    out[a, a] = out[b, b] = np.cos(angle)
    out[b, a] = np.sin(angle)
    out[a, b] = -out[b, a]
    return out


def _real_angles(angles: ArrayLike, rotation: str, start_angle: float, turns: bool = False) -> FloatArray:
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation: got {rotation!r}, need 'ccw' or 'cw' (seen from +z).")
    start = _number(start_angle, "start_angle")
    if abs(start) > 4 * np.pi:
        raise ValueError(f"start_angle: got {start:g}, need radians; numpy.deg2rad converts degrees.")
    given = check_angles(angles, turns=turns)
    return start + (given if rotation == "ccw" else -given)


def _offset(
    detector_offset: Any, rotation_centre: float | None, shape: tuple[int, int], du: float
) -> tuple[float, float]:
    dv_offset, du_offset = _pair(detector_offset, "detector_offset")
    if rotation_centre is not None:
        column = _number(rotation_centre, "rotation_centre")
        if du_offset:
            raise ValueError(
                "rotation_centre: got one together with a horizontal detector_offset, need one of the two."
            )
        du_offset = (0.5 * (shape[1] - 1) - column) * du
    return dv_offset, du_offset


class ConeBeam(XrayGeometry):
    """A point source and a flat panel; see :class:`XrayGeometry` for the parameters.

    Examples
    --------
    >>> geometry = ConeBeam.circular([0.0, 1.0], source_origin=500, source_detector=1000,
    ...                              detector_shape=(32, 48), pixel_size=0.8)
    >>> geometry.magnification, geometry.default_grid().spacing.tolist()
    (2.0, [0.4, 0.4, 0.4])
    """

    __slots__ = ()

    def __init__(
        self,
        vectors: ArrayLike,
        detector_shape: Sequence[int],
        units: Any = None,
        *,
        angles: ArrayLike | None = None,
        isocentre: ArrayLike | None = None,
    ) -> None:
        super().__init__(vectors, detector_shape, "cone", units, angles=angles, isocentre=isocentre)

    @classmethod
    def circular(
        cls,
        angles: ArrayLike,
        *,
        source_origin: float,
        source_detector: float,
        detector_shape: Sequence[int],
        pixel_size: float | Sequence[float],
        detector_offset: float | Sequence[float] = (0.0, 0.0),
        source_offset: float | Sequence[float] = (0.0, 0.0),
        rotation_centre: float | None = None,
        detector_tilt: float | Sequence[float] = (0.0, 0.0, 0.0),
        elevation: float = 0.0,
        start_angle: float = 0.0,
        rotation: str = "ccw",
        units: Any = None,
    ) -> ConeBeam:
        """Make a scan on a circle about the world's z axis.

        Parameters
        ----------
        angles : array_like (n,)
            Radians.
        source_origin, source_detector : float
            Distances from the source to the axis and to the panel.
        detector_shape : (int, int)
            Rows and columns.
        pixel_size : float or (float, float)
            Distance between pixel centres (v, u), world units.
        detector_offset : (float, float)
            Place of the panel's centre relative to the line from the source through the axis (v, u), world units.
        source_offset : (float, float)
            The same for the source. Both offsets equal: the rotation axis is displaced.
        rotation_centre : float, optional
            Column (with fractions, counted from 0) on which the axis is seen when only the panel is displaced;
            instead of a horizontal `detector_offset`.
        detector_tilt : (float, float, float)
            Roll about the panel's normal (u towards v), pitch about u (v towards the normal, which points to the
            source), yaw about v (normal towards u), radians.
        elevation : float
            Angle of the source above the plane of rotation (laminography), radians.
        start_angle : float
            Added to all angles.
        rotation : {"ccw", "cw"}
            Sense in which the source turns about the object, seen from +z. An object on a turntable that turns
            clockwise is the same as a source that turns counter-clockwise.
        units : str or sequence of 3 str, optional
            Units of the world axes.

        Returns
        -------
        ConeBeam
            The geometry.

        Raises
        ------
        ValueError
            If the angles look like degrees, a length is not positive, or the panel is nearer than the axis.
        """
        real = _real_angles(angles, rotation, start_angle)
        return cls._make(
            real,
            0.0,
            source_origin,
            source_detector,
            detector_shape,
            pixel_size,
            detector_offset,
            source_offset,
            rotation_centre,
            detector_tilt,
            elevation,
            units,
        )

    @classmethod
    def _make(
        cls,
        real: FloatArray,
        heights: FloatArray | float,
        source_origin: float,
        source_detector: float,
        detector_shape: Any,
        pixel_size: Any,
        detector_offset: Any,
        source_offset: Any,
        rotation_centre: float | None,
        detector_tilt: Any,
        elevation: float,
        units: Any,
    ) -> ConeBeam:
        near, far = _length(source_origin, "source_origin"), _length(source_detector, "source_detector")
        if far < near:
            raise ValueError(
                f"source_detector: got {far:g}, shorter than source_origin ({near:g}), need the panel behind the "
                "axis; are the two exchanged?"
            )
        shape = _check_shape(detector_shape)
        size = _pair(pixel_size, "pixel_size", positive=True)
        vectors = _panel(
            real,
            elevation=_elevation(elevation),
            source_offset=_pair(source_offset, "source_offset"),
            detector_offset=_offset(detector_offset, rotation_centre, shape, size[1]),
            pixel_size=size,
            detector_tilt=detector_tilt,
            source_origin=near,
            origin_detector=far - near,
            heights=heights,
        )
        middle = (float(np.mean(heights)), 0.0, 0.0)
        return cls(vectors, shape, units, angles=real, isocentre=middle)

    @classmethod
    def fan(
        cls,
        angles: ArrayLike,
        *,
        source_origin: float,
        source_detector: float,
        n_columns: int,
        pixel_size: float,
        **options: Any,
    ) -> ConeBeam:
        """Make a scan with a single row of pixels.

        Parameters
        ----------
        angles, source_origin, source_detector
            As for :meth:`circular`.
        n_columns : int
            Pixels in the row.
        pixel_size : float
            Distance between them; also the height of the row.
        **options
            Further arguments of :meth:`circular`.

        Returns
        -------
        ConeBeam
            The geometry, with ``detector_shape`` (1, n_columns).
        """
        return cls.circular(
            angles,
            source_origin=source_origin,
            source_detector=source_detector,
            detector_shape=(1, n_columns),
            pixel_size=pixel_size,
            **options,
        )

    @classmethod
    def helical(
        cls,
        angles: ArrayLike,
        *,
        pitch: float,
        source_origin: float,
        source_detector: float,
        detector_shape: Sequence[int],
        pixel_size: float | Sequence[float],
        detector_offset: float | Sequence[float] = (0.0, 0.0),
        source_offset: float | Sequence[float] = (0.0, 0.0),
        rotation_centre: float | None = None,
        detector_tilt: float | Sequence[float] = (0.0, 0.0, 0.0),
        start_angle: float = 0.0,
        rotation: str = "ccw",
        start_height: float | None = None,
        units: Any = None,
    ) -> ConeBeam:
        """Make a scan on a helix about the world's z axis.

        Parameters
        ----------
        angles : array_like (n,)
            Radians, over as many turns as wanted.
        pitch : float
            Rise of source and panel for one whole turn of the given angles, world units; negative to sink.
        source_origin, source_detector, detector_shape, pixel_size, detector_offset, source_offset
            As for :meth:`circular`.
        rotation_centre, detector_tilt, start_angle, rotation, units
            As for :meth:`circular`.
        start_height : float, optional
            World z of the first view. Default: the helix is centred on 0.

        Returns
        -------
        ConeBeam
            The geometry.
        """
        real = _real_angles(angles, rotation, start_angle, turns=True)
        rise = np.asarray(angles, dtype=np.float64) * (_number(pitch, "pitch") / (2 * np.pi))
        if start_height is None:
            rise = rise - 0.5 * (rise.min() + rise.max())
        else:
            rise = rise - rise[0] + _number(start_height, "start_height")
        return cls._make(
            real,
            rise,
            source_origin,
            source_detector,
            detector_shape,
            pixel_size,
            detector_offset,
            source_offset,
            rotation_centre,
            detector_tilt,
            0.0,
            units,
        )

    @classmethod
    def laminography(cls, angles: ArrayLike, *, tilt: float, **options: Any) -> ConeBeam:
        """Make a scan whose rotation axis is not at right angles to the beam.

        Parameters
        ----------
        angles : array_like (n,)
            Radians.
        tilt : float
            Angle of the source above the plane of rotation, radians: 0 is an ordinary scan.
        **options
            Further arguments of :meth:`circular`.

        Returns
        -------
        ConeBeam
            The geometry.
        """
        return cls.circular(angles, elevation=tilt, **options)


def _elevation(value: float) -> float:
    angle = _number(value, "elevation")
    if abs(angle) > np.pi / 2:
        raise ValueError(f"elevation: got {angle:g}, need radians from -pi/2 to pi/2.")
    return angle


class ParallelBeam(XrayGeometry):
    """Parallel rays and a flat panel; see :class:`XrayGeometry` for the parameters.

    Examples
    --------
    >>> ParallelBeam.circular([0.0, 0.1], detector_shape=(2, 64)).default_grid().shape
    (2, 64, 64)
    """

    __slots__ = ()

    def __init__(
        self,
        vectors: ArrayLike,
        detector_shape: Sequence[int],
        units: Any = None,
        *,
        angles: ArrayLike | None = None,
        isocentre: ArrayLike | None = None,
    ) -> None:
        super().__init__(vectors, detector_shape, "parallel", units, angles=angles, isocentre=isocentre)

    @classmethod
    def circular(
        cls,
        angles: ArrayLike,
        *,
        detector_shape: Sequence[int],
        pixel_size: float | Sequence[float] = 1.0,
        detector_offset: float | Sequence[float] = (0.0, 0.0),
        rotation_centre: float | None = None,
        detector_tilt: float | Sequence[float] = (0.0, 0.0, 0.0),
        elevation: float = 0.0,
        start_angle: float = 0.0,
        rotation: str = "ccw",
        units: Any = None,
    ) -> ParallelBeam:
        """Make a scan that turns about the world's z axis.

        Parameters
        ----------
        angles : array_like (n,)
            Radians.
        detector_shape : (int, int)
            Rows and columns.
        pixel_size : float or (float, float)
            Distance between pixel centres (v, u), world units.
        detector_offset, rotation_centre, detector_tilt, elevation, start_angle, rotation, units
            As for :meth:`ConeBeam.circular`; the panel's centre is on the plane through the axis.

        Returns
        -------
        ParallelBeam
            The geometry: rays run along (-cos a, -sin a, 0) in (x, y, z).

        Raises
        ------
        ValueError
            If the angles look like degrees or a length is not positive.
        """
        real = _real_angles(angles, rotation, start_angle)
        shape = _check_shape(detector_shape)
        size = _pair(pixel_size, "pixel_size", positive=True)
        vectors = _panel(
            real,
            elevation=_elevation(elevation),
            source_offset=(0.0, 0.0),
            detector_offset=_offset(detector_offset, rotation_centre, shape, size[1]),
            pixel_size=size,
            detector_tilt=detector_tilt,
            source_origin=None,
            origin_detector=0.0,
        )
        return cls(vectors, shape, units, angles=real, isocentre=(0.0, 0.0, 0.0))

    @classmethod
    def laminography(cls, angles: ArrayLike, *, tilt: float, **options: Any) -> ParallelBeam:
        """Make a scan whose rotation axis is not at right angles to the beam.

        Parameters
        ----------
        angles : array_like (n,)
            Radians.
        tilt : float
            Angle of the rays above the plane of rotation, radians: 0 is an ordinary scan.
        **options
            Further arguments of :meth:`circular`.

        Returns
        -------
        ParallelBeam
            The geometry.
        """
        return cls.circular(angles, elevation=tilt, **options)
