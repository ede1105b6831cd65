"""Geometry of a scan, found together with the volume it shows.

What errors of the geometry do to the projections differs from what any volume does, save for motions of the object
as a whole. Two kinds of step take turns, from coarse pixels to fine ones. A view's own errors (angle, shift): a
Gauss-Newton step to where the view agrees best with the projection of a volume made from all. Errors common to all
views (offset and tilt of the panel): a volume follows these so closely that it hides them; so the residual is
differentiated as a whole, with a reconstruction for each of them (variable projection: Golub & Pereyra 1973, SIAM J
Numer Anal 10:413, with differences for derivatives).
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_innergs.baselines.preprocess import find_rotation_centre
from napari_innergs.baselines.xray_tv import reconstruct_tv
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import rotation_vector_to_matrix
from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.operators.project import VoxelProjector

__all__ = ["GeometryCheck", "Refinement", "check_geometry", "refine_geometry"]

FloatArray = NDArray[np.float64]
Report = tuple[float, str]
PARAMETERS = ("offset", "angles", "shifts", "tilt", "slant")
_USUAL = PARAMETERS[:4]
_FORMAT = "innergs-xray-geometry-1"
# Columns of the table of errors, one row for each view: radians, and pixels (v, u) of the whole panel.
_ANGLE, _DV, _DU, _ROLL, _PITCH, _YAW = range(6)
# Voxels along the longest axis of the grids that are used, and the rounds on each.
_SIZES = (32, 64)
_ROUNDS = (2, 1)
# Steps of the views in each round.
_VIEW_STEPS = 3
_PASSES = 8
# Errors expected: they only hold back what the data can not tell (standard deviations).
_EXPECTED_SHIFT = 5.0
_EXPECTED_TILT = 0.03
# Longest step: pixels of the panel as it is used.
_LONGEST = 2.0
# Errors below this do not show (pixels at the panel).
_LIMIT = 0.2
# A quantity known worse than this is no measurement (pixels).
_UNKNOWN = 0.5
# A check looks at no more views than this.
_CHECKED_VIEWS = 60


@dataclass(frozen=True)
class Refinement:
    """Corrections of a geometry and how well they are known.

    The geometry is made from the one given: the panel moves by offset and shifts in its plane (pixels; the image
    moves the other way), turns about its centre by the tilt, and each view turns about the rotation axis.

    Attributes
    ----------
    geometry : XrayGeometry
        The corrected geometry.
    parameters : tuple of str
        What was sought.
    offset, offset_error : (float, float)
        Displacement of the panel in all views (v, u), pixels, and its standard errors; infinite where the data do
        not tell.
    angles, angles_error : ndarray (n,)
        Corrections of the angles, radians, counter-clockwise seen from where the rows' index rises (for
        a scan about z: as `angles` of the geometry); standard errors.
    shifts, shifts_error : ndarray (n, 2)
        Displacements of the panel in each view (v, u), pixels, besides the offset; standard errors.
    tilt, tilt_error : (float, float, float)
        Roll, pitch and yaw of the panel, radians, and standard errors; infinite where the data do not tell.
    residual_before, residual_after : float
        Root mean square of projections of a volume less the measured ones, relative to these, coarse pixels.
    gauge : str
        What can not be measured, and what was done about it.
    """

    geometry: XrayGeometry = field(repr=False)
    parameters: tuple[str, ...]
    offset: tuple[float, float]
    offset_error: tuple[float, float]
    angles: FloatArray = field(repr=False)
    angles_error: FloatArray = field(repr=False)
    shifts: FloatArray = field(repr=False)
    shifts_error: FloatArray = field(repr=False)
    tilt: tuple[float, float, float]
    tilt_error: tuple[float, float, float]
    residual_before: float
    residual_after: float
    gauge: str

    def summary(self) -> dict[str, Any]:
        """Return numbers for a report; None stands for what is not known."""

        def known(values: Sequence[float] | FloatArray) -> list[float | None]:
            return [float(v) if np.isfinite(v) else None for v in values]

        return {
            "parameters": list(self.parameters),
            "offset_pixels": list(self.offset),
            "offset_error_pixels": known(self.offset_error),
            "angle_rms_degrees": float(np.degrees(np.sqrt(np.mean(self.angles**2)))),
            "angle_max_degrees": float(np.degrees(np.abs(self.angles).max())),
            "angle_error_median_degrees": float(np.degrees(np.median(self.angles_error))),
            "shift_rms_pixels": np.sqrt(np.mean(self.shifts**2, axis=0)).tolist(),
            "shift_max_pixels": np.abs(self.shifts).max(axis=0).tolist(),
            "shift_error_median_pixels": np.median(self.shifts_error, axis=0).tolist(),
            "tilt_degrees": np.degrees(self.tilt).tolist(),
            "tilt_error_degrees": known(np.degrees(self.tilt_error)),
            "residual_before": self.residual_before,
            "residual_after": self.residual_after,
            "gauge": self.gauge,
        }

    def to_json(self) -> str:
        """Return everything as JSON: the summary, the corrections of each view and the corrected vectors."""
        content = {
            "format": _FORMAT,
            **self.summary(),
            "angles_radians": self.angles.tolist(),
            "angles_error_radians": self.angles_error.tolist(),
            "shifts_pixels": self.shifts.tolist(),
            "shifts_error_pixels": self.shifts_error.tolist(),
            "kind": self.geometry.kind,
            "detector_shape": list(self.geometry.detector_shape),
            "vectors_xyz": self.geometry.vectors.tolist(),
        }
        return json.dumps(content, allow_nan=False)


@dataclass(frozen=True)
class GeometryCheck:
    """Whether a geometry is likely to be wrong.

    Attributes
    ----------
    error : float
        Estimated error of the geometry, root mean square over views, pixels at the panel.
    offset : float
        The part that is a horizontal offset of the panel, pixels.
    views : float
        The part that differs from view to view, pixels.
    likely : bool
        Whether an error above 0.2 pixels is likely.
    message : str
        A sentence for the user.
    """

    error: float
    offset: float
    views: float
    likely: bool
    message: str


def refine_geometry(
    projections: ArrayLike,
    geometry: XrayGeometry,
    grid: Grid,
    *,
    parameters: Sequence[str] = _USUAL,
    weight: float = 1e-3,
    sizes: Sequence[int] = _SIZES,
    rounds: Sequence[int] = _ROUNDS,
) -> Generator[Report, None, Refinement]:
    """Find errors of a geometry from the projections themselves.

    Parameters
    ----------
    projections : array_like (n, v, u)
        Line integrals.
    geometry : XrayGeometry
        The geometry to be corrected.
    grid : Grid
        Voxels that hold the object.
    parameters : sequence of str
        What may be wrong: "offset" of the panel, "angles" of the views, "shifts" of the panel from view to view,
        "tilt" of the panel in its plane (roll); and, not by default, its "slant" (pitch and yaw): a slant is nearly
        the same as another shape of the object, and costs the others their accuracy.
    weight : float
        Weight of the total variation, as in :func:`napari_innergs.baselines.xray_tv.reconstruct_tv`.
    sizes : sequence of int
        Voxels along the longest axis of the grids on which errors are sought, rising. Pixels are binned as much as
        voxels.
    rounds : sequence of int
        Rounds on each.

    Yields
    ------
    fraction : float
        Share of the work that is done.
    text : str
        What is being done.

    Returns
    -------
    Refinement
        The corrected geometry, corrections, their errors, and the gauge.

    Raises
    ------
    ValueError
        If shapes do not fit, numbers are not finite, there are fewer than four views, or an argument is unknown.

    Notes
    -----
    A right geometry is moved, too, even without noise: voxels are no object, and what they can not show of a view
    looks like a small turn or shift of it (about 0.05 pixels with 44 voxels, some times the standard errors, which
    know of noise only). That does not show in the volume; but only take a refinement that lowers the residual.
    """
    wanted = tuple(dict.fromkeys(parameters))
    if not wanted or not set(wanted) <= set(PARAMETERS):
        raise ValueError(f"parameters: got {tuple(parameters)}, need some of {', '.join(PARAMETERS)}.")
    if len(sizes) != len(rounds) or not len(sizes) or min(*sizes, *rounds) < 1:
        raise ValueError(
            f"sizes, rounds: got {tuple(sizes)} and {tuple(rounds)}, need as many of both, 1 or more."
        )
    if not weight > 0:
        raise ValueError(f"weight: got {weight}, need a number above 0.")
    data = _checked(projections, geometry)
    factors = [max(round(max(grid.shape) / size), 1) for size in sizes]
    # a grid that is small already is used once
    levels = [i for i, factor in enumerate(factors) if factor not in factors[i + 1 :]]
    solver = _Solver(data, geometry, grid, wanted, weight)
    total = float(sum(rounds[i] * factors[i] ** -3.0 for i in levels)) + factors[-1] ** -3.0
    done = 0.0
    yield 0.0, "Looking for the rotation axis"
    solver.enter(factors[levels[0]])
    solver.start()
    for i in levels:
        solver.enter(factors[i])
        for number in range(rounds[i]):
            text = f"Geometry on {solver.size}: round {number + 1} of {rounds[i]}"
            yield done / total, text
            for _ in solver.round():
                yield done / total, text
            done += factors[i] ** -3.0
    yield done / total, "Geometry: errors of the result"
    before, after = solver.residuals()
    yield 1.0, "Geometry refined"
    return solver.result(before, after)


def check_geometry(
    projections: ArrayLike,
    geometry: XrayGeometry,
    grid: Grid,
    *,
    weight: float = 1e-3,
) -> GeometryCheck:
    """Estimate quickly whether a geometry is wrong by more than 0.2 pixels.

    Views are aligned with projections of a volume made from all of them on a coarse grid, and one horizontal offset
    of the panel is sought by reconstructing with others.

    Parameters
    ----------
    projections : array_like (n, v, u)
        Line integrals.
    geometry : XrayGeometry
        The scan.
    grid : Grid
        Voxels that hold the object.
    weight : float
        Weight of the total variation of the coarse reconstruction.

    Returns
    -------
    GeometryCheck
        The estimate and a sentence. Offsets along the rotation axis are left out: they hardly matter, being nearly
        the same as a motion of the object.

    Raises
    ------
    ValueError
        If shapes do not fit, numbers are not finite or there are fewer than four views.
    """
    data = _checked(projections, geometry)
    chosen = np.unique(np.linspace(0, geometry.n_views - 1, _CHECKED_VIEWS).round().astype(int))
    solver = _Solver(
        np.ascontiguousarray(data[chosen]),
        geometry.subset(chosen),
        grid,
        ("offset", "angles", "shifts"),
        weight,
    )
    solver.enter(max(round(max(grid.shape) / 48), 1))
    shift = solver.sideways()
    # views are compared where the offset does not blur the volume, with one of their own: a volume that was made
    # with care has adapted to the errors, and looks wrong where it is not
    solver.table[:, _DU] += shift
    step, error = solver.view_step()
    # what is common to all views is the offset, or the place of the volume
    step[:, 1:] -= step[:, 1:].mean(axis=0)
    step = np.column_stack([step[:, 0] * solver.reach, step[:, 1:]])
    error = np.column_stack([error[:, 0] * solver.reach, error[:, 1:]])
    # noise alone moves views by its standard error
    spread = float(np.sqrt(max(float(np.mean(np.sum(step**2 - error**2, axis=1))), 0.0)))
    size = float(np.hypot(shift, spread))
    likely = size > _LIMIT
    if likely:
        cause = "an offset of the panel" if abs(shift) > spread else "angles or shifts of single views"
        message = (
            f"The geometry is likely to be wrong by {size:.2g} pixels (mostly {cause}; {_LIMIT:g} would not show): "
            "refine it."
        )
    else:
        message = f"The projections agree with the geometry to about {max(size, 0.01):.2g} pixels."
    return GeometryCheck(size, shift, spread, likely, message)


def _checked(projections: ArrayLike, geometry: XrayGeometry) -> np.ndarray:
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
    if geometry.n_views < 4:
        raise ValueError(f"projections: got {geometry.n_views} view(s), need at least 4 to check a geometry.")
    return data


def _moved(geometry: XrayGeometry, table: FloatArray) -> XrayGeometry:
    """Apply a table of errors (n, 6) to a geometry."""
    first, centre, u, v = np.split(np.array(geometry.vectors), 4, axis=1)
    centre = centre + table[:, _DU, None] * u + table[:, _DV, None] * v
    along_u = u / np.linalg.norm(u, axis=1, keepdims=True)
    along_v = v / np.linalg.norm(v, axis=1, keepdims=True)
    normal = np.cross(along_u, along_v)
    for column, about in ((_YAW, along_v), (_PITCH, along_u), (_ROLL, normal)):
        matrix = rotation_vector_to_matrix(table[:, column, None] * about)
        u, v = (np.einsum("nij,nj->ni", matrix, part) for part in (u, v))
    axis = along_v.mean(axis=0)
    length = float(np.linalg.norm(axis))
    axis = axis / length if length > 1e-3 else np.array([0.0, 0.0, 1.0])
    pivot = geometry.isocentre[::-1]
    matrix = rotation_vector_to_matrix(table[:, _ANGLE, None] * axis)

    def turned(part: FloatArray) -> FloatArray:
        return np.einsum("nij,nj->ni", matrix, part)

    first = turned(first - pivot) + pivot if geometry.kind == "cone" else turned(first)
    vectors = np.concatenate([first, turned(centre - pivot) + pivot, turned(u), turned(v)], axis=1)
    return geometry._replace(vectors, geometry.angles + table[:, _ANGLE], geometry.isocentre)


def _bins(shape: Sequence[int], factor: int) -> list[int]:
    """How many samples are taken together along each axis: as many as leave two."""
    return [factor if size >= 2 * factor else 1 for size in shape]


def _mean_of_bins(data: np.ndarray, bins: Sequence[int]) -> np.ndarray:
    """Average blocks of the last axes; what is left over at the end is cut off."""
    for axis, count in zip(range(-len(bins), 0), bins, strict=True):
        whole = data.shape[axis] // count
        data = np.moveaxis(data, axis, -1)[..., : whole * count]
        data = np.moveaxis(data.reshape(*data.shape[:-1], whole, count).mean(axis=-1), -1, axis)
    return np.ascontiguousarray(data, np.float32)


def _binned_panel(geometry: XrayGeometry, bins: Sequence[int]) -> XrayGeometry:
    shape = [size // count for size, count in zip(geometry.detector_shape, bins, strict=True)]
    vectors = np.array(geometry.vectors)
    for part, axis in ((slice(9, 12), 0), (slice(6, 9), 1)):
        lost = geometry.detector_shape[axis] - shape[axis] * bins[axis]
        vectors[:, 3:6] -= 0.5 * lost * vectors[:, part]
    vectors[:, 9:12] *= bins[0]
    vectors[:, 6:9] *= bins[1]
    return XrayGeometry(
        vectors, shape, geometry.kind, geometry.units, angles=geometry.angles, isocentre=geometry.isocentre
    )


class _Solver:
    """Errors of a geometry and the steps that find them."""

    def __init__(
        self, data: np.ndarray, geometry: XrayGeometry, grid: Grid, wanted: tuple[str, ...], weight: float
    ) -> None:
        self.all, self.geometry, self.grid, self.weight, self.wanted = data, geometry, grid, weight, wanted
        self.n = geometry.n_views
        self.table = np.zeros((self.n, 6))
        self.parallel = geometry.kind == "parallel"
        # pixels by which an angle of 1 moves what is far from the axis
        width = 0.25 * float(np.linalg.norm(grid.spacing * grid.shape))
        self.reach = width * geometry.magnification / geometry.pixel_size[1]
        flat = geometry.detector_shape[0] == 1
        self.own = [_ANGLE] if "angles" in wanted else []
        if "shifts" in wanted:
            self.own += [_DU] if flat else [_DV, _DU]
        harmonics = np.stack([np.cos(geometry.angles), np.sin(geometry.angles)], axis=1)
        self.harmonics = np.linalg.qr(harmonics)[0] * np.sqrt(self.n)
        # directions common to all views: tables of their unit
        self.common: list[tuple[str, FloatArray, float]] = []
        if "offset" in wanted:
            # parallel rays: the same as lifting the object
            if not flat and not self.parallel:
                self._add("dv", _DV, np.ones(self.n), _EXPECTED_SHIFT)
            self._add("du", _DU, np.ones(self.n), _EXPECTED_SHIFT)
        if "shifts" in wanted and not self.parallel:
            for k in range(2):
                self._add(f"harmonic{k}", _DU, self.harmonics[:, k], _EXPECTED_SHIFT)
        if "tilt" in wanted and not flat:
            self._add("roll", _ROLL, np.ones(self.n), _EXPECTED_TILT)
        # parallel rays: a turn about an axis of the panel changes its scale only, in second order
        if "slant" in wanted and not self.parallel:
            if not flat:
                self._add("pitch", _PITCH, np.ones(self.n), _EXPECTED_TILT)
            self._add("yaw", _YAW, np.ones(self.n), _EXPECTED_TILT)
        self.errors = {name: np.inf for name, _, _ in self.common}
        self.own_error = np.full((self.n, 3), np.inf)

    def _add(self, name: str, column: int, values: FloatArray, expected: float) -> None:
        table = np.zeros((self.n, 6))
        table[:, column] = values
        self.common.append((name, table, expected))

    def enter(self, factor: int) -> None:
        """Go to pixels and voxels `factor` times as large."""
        self.factor = factor
        self.bins = _bins(self.geometry.detector_shape, factor)
        self.data = _mean_of_bins(self.all, self.bins)
        self.voxel_bins = _bins(self.grid.shape, factor)
        shape = [-(-size // count) for size, count in zip(self.grid.shape, self.voxel_bins, strict=True)]
        # an object that reaches the border must be free to move
        self.margin = [max(2, -(-size // 16)) if size > 1 else 0 for size in shape]
        shape = [size + 2 * more for size, more in zip(shape, self.margin, strict=True)]
        affine = np.array(self.grid.affine)
        affine[:3, :3] *= self.voxel_bins
        middle = self.grid.index_to_world(0.5 * (np.array(self.grid.shape) - 1))
        affine[:3, 3] = middle - affine[:3, :3] @ (0.5 * (np.array(shape) - 1))
        self.level = Grid(shape, affine, self.grid.units)
        self.size = " x ".join(str(size) for size in shape)
        self.volume: np.ndarray | None = None

    def at(self, table: FloatArray) -> XrayGeometry:
        return _binned_panel(_moved(self.geometry, table), self.bins)

    def reconstruct(self, table: FloatArray, start: np.ndarray | None = None) -> np.ndarray:
        found = reconstruct_tv(
            self.data, self.at(table), self.level, self.weight, passes=_PASSES, start=start
        )
        return found.volume

    def project(self, table: FloatArray, volume: np.ndarray) -> np.ndarray:
        return VoxelProjector(self.at(table), self.level).apply(volume)

    def residual(self, table: FloatArray) -> np.ndarray:
        """Projections of a volume made with a table, less the data."""
        out = self.project(table, self.reconstruct(table))
        out -= self.data
        return out

    def _probe(self, column: int) -> float:
        """Size of a difference: half a pixel of the panel as it is used."""
        if column in (_DV, _DU):
            return 0.5 * self.factor
        half = 0.5 * float(np.hypot(*self.geometry.detector_shape))
        if column == _ANGLE:
            return 0.5 * self.factor / self.reach
        # pitch and yaw act through the magnification
        return (0.5 if column == _ROLL else 1.5) * self.factor / half

    def start(self) -> None:
        """Take the axis that opposite rays show if it fits better."""
        if "offset" not in self.wanted:
            return
        try:
            found = find_rotation_centre(self.all, self.geometry)
        except ValueError:
            # no circular scan, or too little of a turn
            return
        table = np.array(self.table)
        table[:, _DU] -= found.shift
        if np.linalg.norm(self.residual(table)) < np.linalg.norm(self.residual(self.table)):
            self.table = table

    def round(self) -> Generator[None, None, None]:
        """Make a step of what is common, then some of the views."""
        if self.common:
            yield from self.common_step()
        if self.own:
            for _ in range(_VIEW_STEPS):
                step, self.own_error = self.view_step()
                self.table[:, :3] += step
                self._fix()
                yield

    def _fix(self) -> None:
        """Take out what is a motion of the object, or not asked for."""
        if "angles" in self.wanted:
            self.table[:, _ANGLE] -= self.table[:, _ANGLE].mean()
        if "shifts" in self.wanted:
            if "offset" not in self.wanted:
                self.table[:, _DV : _DU + 1] -= self.table[:, _DV : _DU + 1].mean(axis=0)
            if self.parallel:
                self.table[:, _DV] -= self.table[:, _DV].mean()
                # a harmonic of half a turn is not at right angles to a mean
                basis = np.column_stack([self.harmonics, np.ones(self.n)])
                part = np.linalg.lstsq(basis, self.table[:, _DU], rcond=None)[0]
                self.table[:, _DU] -= self.harmonics @ part[:2]

    def common_step(self) -> Generator[None, None, None]:
        """Gauss-Newton step of what is common to all views, each with its own reconstruction."""
        here = self.residual(self.table)
        yield
        slopes = []
        for _, unit, _ in self.common:
            size = self._probe(int(np.flatnonzero(unit.any(axis=0))[0]))
            # differences to one side only would be drawn by the curvature
            slope = self.residual(self.table + size * unit)
            yield
            slope -= self.residual(self.table - size * unit)
            slope /= np.float32(2 * size)
            slopes.append(slope.reshape(self.n, -1))
            yield
        stack = np.stack(slopes, axis=1)
        part = np.einsum("nkp,np->nk", stack, here.reshape(self.n, -1)).astype(np.float64)
        normal = np.einsum("nkp,nlp->kl", stack, stack).astype(np.float64)
        noise = float(np.mean(np.square(here, dtype=np.float64)))
        held = normal + noise * np.diag([expected**-2.0 for _, _, expected in self.common])
        step = -np.linalg.solve(held, part.sum(axis=0))
        longest = 0.0
        for (_, unit, _), value in zip(self.common, step, strict=True):
            probe = self._probe(int(np.flatnonzero(unit.any(axis=0))[0]))
            longest = max(longest, abs(float(value)) * float(np.abs(unit).max()) / (2 * probe * _LONGEST))
        step /= max(longest, 1.0)
        for (_, unit, _), value in zip(self.common, step, strict=True):
            self.table += value * unit
        # errors of neighbouring pixels go together, those of views hardly: the spread of the views' slopes counts
        part = part + np.einsum("nkp,nlp,l->nk", stack, stack, step)
        inverse = np.linalg.pinv(normal, hermitian=True)
        views = part.T @ part + noise * normal
        spread = np.sqrt(np.diag(inverse @ views @ inverse))
        self.errors = {name: float(s) for (name, _, _), s in zip(self.common, spread, strict=True)}

    def view_step(self) -> tuple[FloatArray, FloatArray]:
        """Gauss-Newton step of each view towards the volume of all (n, 3), and its standard errors."""
        volume = self.volume = self.reconstruct(self.table, self.volume)
        here = (self.project(self.table, volume) - self.data).reshape(self.n, -1)
        slopes = []
        for column in self.own:
            change = np.zeros((self.n, 6))
            change[:, column] = self._probe(column)
            ahead, behind = (self.project(self.table + sign * change, volume) for sign in (1, -1))
            slopes.append((ahead - behind).reshape(self.n, -1) / np.float32(2 * self._probe(column)))
        stack = np.stack(slopes, axis=1)
        part = np.einsum("nkp,np->nk", stack, here).astype(np.float64)
        normal = np.einsum("nkp,nlp->nkl", stack, stack).astype(np.float64)
        noise = np.mean(np.square(here, dtype=np.float64), axis=1)[:, None, None]
        expected = [_EXPECTED_SHIFT / (self.reach if column == _ANGLE else 1.0) for column in self.own]
        held = normal + np.maximum(noise, 1e-30) * np.diag(np.power(expected, -2.0))
        step = -np.linalg.solve(held, part[..., None])[..., 0]
        longest = [2 * self._probe(column) * _LONGEST for column in self.own]
        step = np.clip(step, np.negative(longest), longest)
        spread = np.sqrt(np.diagonal(np.linalg.inv(held) * noise, axis1=1, axis2=2))
        steps, errors = np.zeros((self.n, 3)), np.zeros((self.n, 3))
        steps[:, self.own], errors[:, self.own] = step, spread
        return steps, errors

    def sideways(self) -> float:
        """One step of a horizontal offset alone, pixels."""
        probe = self._probe(_DU)
        change = np.zeros((self.n, 6))
        change[:, _DU] = probe
        here, ahead, behind = (self.residual(sign * change) for sign in (0, 1, -1))
        slope = (ahead - behind).ravel() / np.float32(2 * probe)
        size = float(np.vdot(slope, slope))
        return -float(np.vdot(slope, here)) / size if size > 0 else 0.0

    def residuals(self) -> tuple[float, float]:
        """Relative residual with the geometry as given and as found."""
        scale = max(float(np.linalg.norm(self.data)), 1e-30)
        tables = (np.zeros_like(self.table), self.table)
        before, after = (float(np.linalg.norm(self.residual(table))) / scale for table in tables)
        return before, after

    def result(self, before: float, after: float) -> Refinement:
        """Gather what was found."""
        mean = self.table[:, _DV : _DU + 1].mean(axis=0)
        offset = mean if "offset" in self.wanted else np.zeros(2)
        errors = {"dv": np.inf, "roll": np.inf, "pitch": np.inf, "yaw": np.inf, **self.errors}
        tilt = self.table[0, _ROLL:]
        return Refinement(
            geometry=_moved(self.geometry, self.table),
            parameters=self.wanted,
            offset=(float(offset[0]), float(offset[1])),
            offset_error=(errors["dv"], errors["du"]) if "offset" in self.wanted else (np.inf, np.inf),
            angles=self.table[:, _ANGLE].copy(),
            angles_error=self.own_error[:, 0].copy(),
            shifts=self.table[:, _DV : _DU + 1] - offset,
            shifts_error=self.own_error[:, 1:].copy(),
            tilt=(float(tilt[0]), float(tilt[1]), float(tilt[2])),
            tilt_error=(errors["roll"], errors["pitch"], errors["yaw"]),
            residual_before=before,
            residual_after=after,
            gauge=self._gauge(),
        )

    def _gauge(self) -> str:
        """Say in words what the data leave open."""
        said = []
        if "angles" in self.wanted:
            said.append(
                "Turning all views by one angle is the same as turning the object: the mean correction of the angles "
                "is zero."
            )
        if self.parallel:
            if {"offset", "shifts"} & set(self.wanted):
                said.append(
                    "With parallel rays a vertical offset, and horizontal shifts that follow one wave a turn, are "
                    "the same as moving the object: both are zero."
                )
        else:
            vertical = self.errors.get("dv", np.inf)
            if "offset" in self.wanted and np.isfinite(vertical):
                trust = (
                    "it is known badly, and leaving it out would hardly change the volume but for its place"
                    if vertical > _UNKNOWN
                    else "only the small distortion that is left was measured"
                )
                said.append(
                    "A vertical offset of the panel is nearly the same as lifting the object "
                    f"(found to {vertical:.2g} pixels): {trust}."
                )
            if "shifts" in self.wanted:
                waves = max(self.errors.get(f"harmonic{k}", np.inf) for k in range(2))
                said.append(
                    "Horizontal shifts that follow one wave a turn are nearly the same as moving the object sideways "
                    f"(found to {waves:.2g} pixels): the volume's place is free by as much."
                )
        return " ".join(said) or "Nothing that was sought is the same as a motion of the object."
