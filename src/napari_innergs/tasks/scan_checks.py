"""What is done with a scan around its reconstruction: checks and corrections of its geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.baselines.preprocess import (
    CentreEstimate,
    DirectionCheck,
    check_direction,
    find_rotation_centre,
    scan_line_integrals,
)
from napari_innergs.fit.engine import Done, Preview, Progress, Step, background
from napari_innergs.fit.xray_geometry import GeometryCheck, Refinement, check_geometry, refine_geometry
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import rotation_vector_to_matrix
from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.scan import Scan
from napari_innergs.tasks.events import Events, guarded

__all__ = [
    "Checked",
    "ScanCheck",
    "check_scan",
    "describe_centre",
    "describe_refinement",
    "find_centre",
    "fit_checked",
    "geometry_description",
    "improves",
    "refine_scan",
    "refine_steps",
    "reverse_rotation",
]

_TV = "total variation"
# A refinement that lowers the residual by less follows noise: it moves views of a right geometry, too.
_WORTH = 0.98
# With fewer views a right geometry looks as if views were shifted (measured); the offset can still be told.
_ENOUGH_VIEWS, _LIMIT = 13, 0.2
# Ratio of voxels to pixels at which voxels are made anew for a check.
_UNLIKE = 1.7


@dataclass(frozen=True)
class ScanCheck:
    """What a scan says about its own geometry.

    Attributes
    ----------
    direction : DirectionCheck or None
        Sense of rotation; None where it can not be told (no circle about z).
    geometry : GeometryCheck or None
        Size of the error of the geometry; None with fewer than four views, or when the sense of rotation is wrong,
        which must be set right first.
    """

    direction: DirectionCheck | None
    geometry: GeometryCheck | None

    @property
    def reversed(self) -> bool:
        """Whether the angles seem to run the wrong way."""
        return self.direction is not None and self.direction.verdict == "wrong"

    @property
    def likely(self) -> bool:
        """Whether an error above 0.2 pixels is likely."""
        return self.geometry is not None and self.geometry.likely

    @property
    def message(self) -> str:
        """One sentence for the user."""
        if self.reversed and self.direction is not None:
            return self.direction.message
        if self.geometry is not None:
            return self.geometry.message
        return "Too few views to check the geometry."

    def summary(self) -> dict[str, Any]:
        """Return numbers for a report; None stands for what can not be told."""
        checked = None if self.geometry is None else asdict(self.geometry)
        return {"direction": None if self.direction is None else self.direction.verdict, "geometry": checked}


@dataclass(frozen=True)
class Checked:
    """A reconstruction with what was found on the way.

    Attributes
    ----------
    result : Reconstruction
        From `fit_projections`; its report says under ``geometry_check`` what the check gave.
    tv : ndarray or None
        Volume of the total variation, on the result's grid; None if the settings make none.
    check : ScanCheck or None
        What the scan says about its geometry.
    """

    result: Any
    tv: np.ndarray | None
    check: ScanCheck | None


def check_scan(scan: Scan, grid: Grid | None = None, projections: np.ndarray | None = None) -> ScanCheck:
    """Check sense of rotation and geometry of a scan against its own projections; takes about a second.

    Parameters
    ----------
    scan : Scan
        The scan.
    grid : Grid, optional
        Voxels that hold the object. Default: the scan's, or what the panel sees.
    projections : ndarray (n, v, u), optional
        The scan's line integrals, where they are there already.

    Returns
    -------
    ScanCheck
        What was found.
    """
    data = scan_line_integrals(scan).projections if projections is None else projections
    try:
        direction: DirectionCheck | None = check_direction(data, scan.geometry)
    except ValueError:
        direction = None
    if direction is not None and direction.verdict == "wrong":
        return ScanCheck(direction, None)
    try:
        found = check_geometry(data, scan.geometry, _grid(scan, grid))
    except ValueError:
        return ScanCheck(direction, None)
    offset = abs(found.offset)
    if found.likely and scan.n_views < _ENOUGH_VIEWS and offset <= _LIMIT:
        message = (
            f"The offset of the panel agrees with the projections to about {max(offset, 0.01):.2g} pixels; "
            f"{scan.n_views} views are too few to check each of them."
        )
        found = replace(found, error=offset, likely=False, message=message)
    return ScanCheck(direction, found)


def _grid(scan: Scan, grid: Grid | None) -> Grid:
    """Return the voxels for a check: in the place that is wanted, about as large as pixels at the isocentre.

    Pixels are binned as much as voxels there, so much larger or smaller ones would mislead.
    """
    wanted = grid or scan.grid or scan.geometry.default_grid()
    sizes = scan.geometry.pixel_size
    step = (sizes[1] if scan.geometry.detector_shape[0] == 1 else min(sizes)) / scan.geometry.magnification
    ratio = wanted.spacing / step
    if not step > 0 or (ratio.max() < _UNLIKE and ratio.min() > 1 / _UNLIKE):
        return wanted
    shape = np.maximum(np.round(ratio * wanted.shape), 1).astype(int)
    affine = np.array(wanted.affine)
    affine[:3, :3] /= ratio
    middle = wanted.index_to_world(0.5 * (np.array(wanted.shape) - 1))
    affine[:3, 3] = middle - affine[:3, :3] @ (0.5 * (shape - 1))
    return Grid(shape.tolist(), affine, wanted.units)


def find_centre(scan: Scan) -> CentreEstimate:
    """Find the column on which the rotation axis is seen, see :func:`find_rotation_centre`.

    Parameters
    ----------
    scan : Scan
        A circular scan about z.

    Returns
    -------
    CentreEstimate
        ``corrected(scan.geometry)`` is the geometry with the panel moved.

    Raises
    ------
    ValueError
        If the scan is not circular, or covers too little of a turn.
    """
    return find_rotation_centre(scan_line_integrals(scan).projections, scan.geometry)


def describe_centre(found: CentreEstimate) -> str:
    """Say in one sentence where the rotation axis is seen.

    Parameters
    ----------
    found : CentreEstimate
        From `find_centre`.
    """
    return (
        f"The rotation axis is seen on column {found.column:.2f}, {found.shift:+.2f} from where the geometry "
        "had it; the panel was moved by as much."
    )


def reverse_rotation(geometry: XrayGeometry) -> XrayGeometry:
    """Let a scan turn the other way about z: view by view at minus its angle, all else as it was.

    Parameters
    ----------
    geometry : XrayGeometry
        A scan about the world's z axis through its isocentre.

    Returns
    -------
    XrayGeometry
        The same as with ``rotation="cw"`` instead of ``"ccw"``, or the other way round, if the scan was made so.
    """
    pivot = geometry.isocentre[::-1]
    turns = np.zeros((geometry.n_views, 3))
    turns[:, 2] = -2 * geometry.angles
    matrix = rotation_vector_to_matrix(turns)
    first, centre, u, v = np.split(np.array(geometry.vectors), 4, axis=1)

    def turned(part: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.einsum("nij,nj->ni", matrix, part)

    first = turned(first - pivot) + pivot if geometry.kind == "cone" else turned(first)
    vectors = np.concatenate([first, turned(centre - pivot) + pivot, turned(u), turned(v)], axis=1)
    return XrayGeometry(
        vectors,
        geometry.detector_shape,
        geometry.kind,
        geometry.units,
        angles=-geometry.angles,
        isocentre=geometry.isocentre,
    )


def refine_steps(scan: Scan, grid: Grid | None = None, **options: Any) -> Events:
    """Find errors of a scan's geometry from its projections, as a generator of events.

    Closing the generator ends the work.

    Parameters
    ----------
    scan : Scan
        The scan.
    grid : Grid, optional
        Voxels that hold the object. Default: the scan's, or what the panel sees.
    **options
        ``parameters``, ``weight``, ``sizes`` and ``rounds`` of `refine_geometry`.

    Yields
    ------
    Step, and last Done with the Refinement

    Raises
    ------
    ValueError
        If there are fewer than four views or an option is unknown.
    """
    progress = Progress()
    progress.enter("Line integrals", 0.0)
    (data,) = yield from background([lambda: scan_line_integrals(scan).projections], progress)
    # never closed from here: it may be at work in the thread, and ends when nobody asks any more
    reports = refine_geometry(data, scan.geometry, _grid(scan, grid), **options)

    def advance() -> tuple[tuple[float, str] | None, Refinement | None]:
        try:
            return next(reports), None
        except StopIteration as end:
            return None, end.value

    while True:
        # a report stands before the work that it announces
        ((report, found),) = yield from background([advance], progress)
        if report is None:
            yield Done(found)
            return
        progress.phase, progress.start, progress.end = report[1], report[0], report[0]


def refine_scan(scan: Scan, grid: Grid | None = None, **options: Any) -> Refinement:
    """Find errors of a scan's geometry from its projections.

    Parameters
    ----------
    scan, grid, **options
        As for `refine_steps`.

    Returns
    -------
    Refinement
        Corrected geometry, corrections, standard errors; `improves` says whether to take it.

    Raises
    ------
    ValueError
        As `refine_steps`.
    """
    for event in refine_steps(scan, grid, **options):
        if isinstance(event, Done):
            found: Refinement = event.result
            return found
    raise RuntimeError("the refinement ended without a result")


def improves(found: Refinement) -> bool:
    """Whether a refinement explains the projections better by more than noise allows (2 % of the residual).

    Parameters
    ----------
    found : Refinement
        From `refine_scan`.
    """
    return found.residual_after < _WORTH * found.residual_before


def describe_refinement(found: Refinement) -> str:
    """Say what a refinement changed, how well it is known, and what can not be known.

    Parameters
    ----------
    found : Refinement
        From `refine_scan`.

    Returns
    -------
    str
        Sentences for the user.
    """
    change = f"residual {found.residual_before:.3g} to {found.residual_after:.3g}"
    if not improves(found):
        return f"Refining did not help ({change}): the geometry was kept."

    def with_error(values: Sequence[float], errors: Sequence[float]) -> str:
        pairs = zip(values, errors, strict=True)
        return ", ".join(f"{v:.3g} ± {e:.2g}" if np.isfinite(e) else f"{v:.3g} ± ?" for v, e in pairs)

    parts = []
    if "offset" in found.parameters:
        parts.append(f"offset of the panel (v, u) {with_error(found.offset, found.offset_error)} pixels")
    if "tilt" in found.parameters:
        roll, error = np.degrees(found.tilt[:1]), np.degrees(found.tilt_error[:1])
        parts.append(f"roll {with_error(roll.tolist(), error.tolist())}°")
    if "slant" in found.parameters:
        slant, error = np.degrees(found.tilt[1:]), np.degrees(found.tilt_error[1:])
        parts.append(f"pitch, yaw {with_error(slant.tolist(), error.tolist())}°")
    if "angles" in found.parameters:
        rms = np.degrees(np.sqrt(np.mean(found.angles**2)))
        parts.append(f"angles {rms:.2g}° RMS (each ± {np.degrees(np.median(found.angles_error)):.2g}°)")
    if "shifts" in found.parameters:
        sizes = np.sqrt(np.mean(found.shifts**2, axis=0))
        each = np.median(found.shifts_error, axis=0)
        parts.append(
            f"shifts (v, u) {sizes[0]:.2g}, {sizes[1]:.2g} pixels RMS (each ± {each[0]:.2g}, {each[1]:.2g})"
        )
    return f"Geometry refined, {change}: {'; '.join(parts)}. {found.gauge}"


def geometry_description(geometry: XrayGeometry, grid: Grid | None = None) -> dict[str, Any]:
    """Describe a geometry as the JSON form of scans does, with the twelve numbers of each view.

    Parameters
    ----------
    geometry : XrayGeometry
        The scan.
    grid : Grid, optional
        Axis-aligned voxels; others are left out.

    Returns
    -------
    dict
        JSON types; :func:`napari_innergs.io.scans.geometry_from_dict` reads it.
    """
    out: dict[str, Any] = {
        "mode": geometry.kind,
        "vectors": geometry.vectors.tolist(),
        "nDetector": list(geometry.detector_shape),
        "angles_rad": geometry.angles.tolist(),
        "isocentre": geometry.isocentre.tolist(),
        "units": None if geometry.units is None else geometry.units[0],
    }
    if grid is not None and np.allclose(grid.affine[:3, :3], np.diag(grid.spacing)):
        middle = grid.index_to_world(0.5 * (np.array(grid.shape) - 1))
        out |= {
            "nVoxel": list(grid.shape),
            "dVoxel": grid.spacing.tolist(),
            "offOrigin": middle.tolist(),
        }
    return out


def fit_checked(
    scan: Scan,
    grid: Grid | None = None,
    config: Any = None,
    *,
    device: str = "auto",
    seed: int = 0,
    fit: Callable[..., Events] | None = None,
) -> Events:
    """Reconstruct as `fit_projections` does, and check the geometry when the first preview is there.

    Parameters
    ----------
    scan, grid, config, device, seed
        As for :func:`napari_innergs.tasks.projections.fit_projections`, which raises what is wrong with them at once.
    fit : callable, optional
        Instead of `fit_projections`.

    Returns
    -------
    generator of Step, Preview, Done or Failed
        `Done` carries `Checked`. A geometry that is likely to be wrong is among the ``warnings`` of the report.
    """
    from napari_innergs.tasks.projections import as_scan, projection_job

    if fit is not None:
        return _checked(fit(scan, None, grid, config, device=device, seed=seed), scan, lambda: None)
    job = projection_job(*as_scan(scan, None, grid, None, None, None), config, device, seed)
    return _checked(guarded(job), scan, lambda: None if job.made is None else job.made.projections)


def _checked(events: Events, scan: Scan, projections: Callable[[], np.ndarray | None]) -> Events:
    check: ScanCheck | None = None
    tv: np.ndarray | None = None
    reached = 0.0
    with closing(events):
        for event in events:
            if isinstance(event, Done):
                if check is not None:
                    event.result.report["geometry_check"] = check.summary()
                    if check.likely:
                        event.result.report.setdefault("warnings", []).append(check.message)
                yield Done(Checked(event.result, tv, check))
                return
            if isinstance(event, Step):
                reached = event.fraction
            yield event
            if isinstance(event, Preview):
                if event.label == _TV:
                    tv = event.volume
                if check is None:
                    progress = Progress("Checking the geometry", reached, reached)
                    (check,) = yield from background(
                        [partial(check_scan, scan, event.grid, projections())], progress
                    )
