"""``innergs projections``: attenuation from X-ray projections."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from napari_innergs.cli._options import (
    Config,
    Device,
    FileFormat,
    Format,
    Json,
    Output,
    Settings,
    VolumeOnly,
    argument,
    check_format,
    check_keep_every,
    merged,
    option,
    read_json,
)
from napari_innergs.cli._results import Results, attenuation_unit, keep_input
from napari_innergs.cli._run import Progress, Run, print_lines, print_result

if TYPE_CHECKING:
    from napari_innergs.config_projections import ProjectionConfig
    from napari_innergs.result import Reconstruction
    from napari_innergs.scan import Scan


@dataclass
class _Extra:
    """What is written beside a reconstruction on request."""

    suffix: str
    volume_only: bool
    water: float | None
    tv: Any = None
    # corrections of the geometry, and what they made of it
    corrections: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    geometry: dict[str, Any] | None = None


def projections(
    scan: Annotated[
        Path,
        argument(
            "Scan: JSON + NPZ, R2-Gaussian or NAF, Nikon .xtekct, DXchange HDF5, RTK XML; or TIFF images, NPY "
            "or NPZ with --geometry."
        ),
    ],
    output: Output,
    array: Annotated[
        str | None, option("Which of the file's arrays are the projections. Default: the usual one.")
    ] = None,
    geometry: Annotated[
        Path | None,
        option(
            "JSON file that describes the scan, instead of what the scan file says: DSO, DSD, dDetector, "
            "angles_rad and so on, or vectors."
        ),
    ] = None,
    images: Annotated[
        Path | None, option("For RTK XML: the projections, TIFF or NPY.", "--projections")
    ] = None,
    pixel_size: Annotated[float | None, option("For RTK XML: distance between pixel centres.")] = None,
    i0: Annotated[
        float | None,
        option(
            "Counts of the blank scan: the projections are counts. Default: line integrals, or as the file "
            "says."
        ),
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Let the angles run the other way, before all else.")
    ] = False,
    centre: Annotated[
        bool,
        typer.Option(
            "--find-centre", help="Find the column on which the rotation axis is seen, and move the panel."
        ),
    ] = False,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Find offset and roll of the panel, and angle and shift of each view, from all projections first.",
        ),
    ] = False,
    keep_every: Annotated[int, typer.Option(help="Keep every k-th view only, and predict the others.")] = 1,
    voxel: Annotated[
        float | None,
        option(
            "Edge of the cubic voxels. Default: the file's grid, or the pixel size over the magnification."
        ),
    ] = None,
    preset: Annotated[str | None, option("fast, balanced (default), best or r2-paper.")] = None,
    config: Config = None,
    settings: Settings = None,
    hounsfield: Annotated[
        bool, typer.Option("--hu", help="Also write the volume in Hounsfield units (hu).")
    ] = False,
    water: Annotated[
        float | None,
        option(
            "For --hu: attenuation of water per unit of length. Default: 0.0206 per mm, right for about 60 keV."
        ),
    ] = None,
    tv: Annotated[
        bool, typer.Option("--tv", help="Also write the volume of the total variation alone (tv).")
    ] = False,
    file_format: FileFormat = Format.tif,
    volume_only: VolumeOnly = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the places of the Gaussians and the order of the views.")] = 0,
    as_json: Json = False,
) -> int:
    """Reconstruct a volume of attenuation from X-ray projections.

    Values are attenuation per unit of length (1/mm where the scan is in mm). The geometry is checked on every
    run; --reverse, --find-centre and --refine correct it, in this order, and write geometry.json for --geometry.

    \b
    Example:
      innergs projections scan.json --output out
      innergs projections scan.json --output out --find-centre --refine --hu
      innergs projections scan.json -o out --array counts --i0 100000 --preset fast
      innergs projections images/ -o out --geometry scan.json --keep-every 2 --json
    """
    from napari_innergs.io.write import ensure_writable

    chosen = _read_settings(preset, config, settings)
    check_keep_every(keep_every)
    check_format(file_format.value)
    keep_input(scan, output)
    whole = read_projections(scan, array, geometry, images, pixel_size, i0)
    if water is not None and not hounsfield:
        raise ValueError(f"--water: got {water:g} without --hu; give both")
    if hounsfield:
        from napari_innergs.layers.xray import water_attenuation

        water = water_attenuation(whole.geometry.units, water)
    if keep_every > 1 and len(range(0, whole.n_views, keep_every)) == whole.n_views:
        raise ValueError(
            f"--keep-every: got {keep_every} for {whole.n_views} view(s), no view would be left out"
        )
    grid = grid_of(whole, voxel)
    ensure_writable(output)
    # imports torch: not before the input is known to be good
    from napari_innergs.tasks.scan_checks import fit_checked

    extra = _Extra(file_format.value, volume_only, water)
    facts = {"task": "projections", "config": chosen.model_dump(mode="json"), "seed": seed}
    run = Run(Progress(sys.stderr, scan.name), partial(_save, folder=output, extra=extra), facts)
    with run.guarded(as_json=as_json):
        whole = _corrected(whole, grid, reverse, centre, refine, extra, run)
        kept = whole if keep_every == 1 else whole.subset(slice(None, None, keep_every))
        if voxel is not None:
            grid = grid_of(kept, voxel)
        outcome = run.follow(fit_checked(kept, grid, chosen, device=device, seed=seed))
        result = run.result = outcome.result
        extra.tv = outcome.tv if tv else None
        if tv and extra.tv is None:
            result.report["warnings"].append("These settings make no volume of total variation (--tv).")
        if keep_every > 1:
            result.report["views_left_out"] = _left_out(result, whole, keep_every)
    return run.finish(as_json, _say)


def _read_settings(preset: str | None, path: Path | None, pairs: Sequence[str] | None) -> ProjectionConfig:
    """Merge a preset, a YAML file and single settings; nothing after the equals sign is None."""
    from napari_innergs.config_projections import ProjectionConfig

    values = merged(ProjectionConfig, preset, path, pairs)
    for name, value in values.items():
        field = ProjectionConfig.model_fields.get(name)
        if value == "" and field is not None and type(None) in get_args(field.annotation):
            values[name] = None
    return ProjectionConfig.coerce(values)


def _corrected(
    scan: Scan, grid: Any, reverse: bool, centre: bool, refine: bool, extra: _Extra, run: Run
) -> Scan:
    """Correct the geometry of a scan as asked, and note what was done."""
    from napari_innergs.tasks import scan_checks

    if not (reverse or centre or refine):
        return scan
    if reverse:
        scan = scan.with_geometry(scan_checks.reverse_rotation(scan.geometry))
        extra.corrections.append({"kind": "reversed rotation"})
        extra.said.append("The rotation was reversed.")
    if centre:
        found = scan_checks.find_centre(scan)
        scan = scan.with_geometry(found.corrected(scan.geometry))
        fact = {"kind": "rotation centre", "column": found.column, "shift": found.shift}
        extra.corrections.append(fact)
        extra.said.append(scan_checks.describe_centre(found))
    if refine:
        # the geometry of a view is its own, so those that are left out later need it too
        refined = run.follow(scan_checks.refine_steps(scan, grid))
        extra.said.append(scan_checks.describe_refinement(refined))
        if scan_checks.improves(refined):
            scan = scan.with_geometry(refined.geometry)
            extra.corrections.append({"kind": "refined geometry", **refined.summary()})
    extra.geometry = scan_checks.geometry_description(scan.geometry, scan.grid)
    return scan


def read_projections(
    path: Path,
    array: str | None,
    geometry: Path | None,
    images: Path | None = None,
    pixel_size: float | None = None,
    i0: float | None = None,
) -> Scan:
    """Read a scan; a description in another file replaces its own."""
    from napari_innergs.io.scans import read_scan

    description: Any = None
    if geometry is not None:
        description = read_json(geometry, "--geometry")
        if not isinstance(description, dict):
            raise ValueError(f"--geometry: {str(geometry)!r} holds no JSON object that describes a scan")
    return read_scan(path, array, geometry=description, projections=images, pixel_size=pixel_size, i0=i0)


def grid_of(scan: Scan, voxel: float | None) -> Any:
    """Return the grid of a scan, or one with other voxels in the same place: the scan's, or what the panel sees."""
    import numpy as np

    from napari_innergs.geometry.grid import Grid

    own = scan.grid
    if voxel is None:
        return own
    if not (np.isfinite(voxel) and voxel > 0):
        raise ValueError(f"--voxel: got {voxel}, need a positive length")
    coarse = scan.geometry.default_grid() if own is None else own
    extent = coarse.spacing * coarse.shape
    if not 0.5 * voxel < extent.max() < 1e6 * voxel:
        raise ValueError(f"--voxel: got {voxel:g}, need a length that suits a volume of {extent.max():.4g}")
    if own is None:
        return scan.geometry.default_grid(spacing=voxel)
    shape = np.maximum(np.round(extent / voxel), 1).astype(int)
    affine = np.array(own.affine)
    affine[:3, :3] *= voxel / own.spacing
    middle = own.index_to_world(0.5 * (np.array(own.shape) - 1))
    affine[:3, 3] = middle - affine[:3, :3] @ (0.5 * (shape - 1))
    return Grid(shape.tolist(), affine, own.units)


def _left_out(result: Reconstruction, whole: Scan, keep_every: int) -> dict[str, Any]:
    """Compare the views that were not given with those the volume predicts."""
    import numpy as np

    from napari_innergs.baselines.preprocess import scan_line_integrals
    from napari_innergs.operators.project import VoxelProjector

    others = whole.subset(np.arange(whole.n_views) % keep_every != 0)
    measured = scan_line_integrals(others).projections
    error = VoxelProjector(others.geometry, result.grid).apply(result.volume) - measured
    rms, signal = (float(np.sqrt(np.mean(np.square(part, dtype=np.float64)))) for part in (error, measured))
    return {"views": others.n_views, "rms": float(f"{rms:.6g}"), "signal_rms": float(f"{signal:.6g}")}


def _save(result: Reconstruction, folder: Path, extra: _Extra) -> dict[str, Any]:
    """Write a result and return its report."""
    from napari_innergs.layers.xray import to_hounsfield

    facts: dict[str, Any] = {"unit": attenuation_unit(result.grid)}
    if extra.water is not None:
        facts["hounsfield"] = {"water": extra.water}
    if extra.said:
        facts |= {"corrections": extra.corrections, "said": extra.said}
    out = Results(folder, extra.suffix, result, **facts)
    out.volume("volume", result.volume)
    if not extra.volume_only:
        out.volume("uncertainty", result.uncertainty)
    if extra.water is not None:
        out.volume("hu", to_hounsfield(result.volume, extra.water))
    out.volume("tv", extra.tv)
    if not extra.volume_only:
        out.gaussians("model.npz", result.model)
    if extra.geometry is not None:
        out.json("geometry.json", extra.geometry)
    return out.finish()


def _say(report: dict[str, Any]) -> None:
    """Print what a person wants to know of a result."""
    views = report["scan"]["shape"][0]
    print_result(report, f" from {views} views, {report['n_gaussians']} Gaussians")
    print_lines(report.get("said"))
    print_lines(report.get("warnings"))
    residuals = report.get("residual_rms") or {}
    if residuals:
        print(
            "  weighted residuals of the line integrals: "
            + ", ".join(f"{k} {v:.4g}" for k, v in residuals.items())
        )
    if "views_left_out" in report:
        found = report["views_left_out"]
        share = 100 * found["rms"] / (found["signal_rms"] or 1)
        print(
            f"  {found['views']} views not given: predicted to {found['rms']:.4g} RMS, {share:.1f} % of theirs"
        )
