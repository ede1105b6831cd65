"""``innergs dual``: photographs and X-rays of one object."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from napari_innergs.cli._options import (
    Config,
    Device,
    FileFormat,
    Format,
    Json,
    Output,
    Settings,
    argument,
    check_format,
    merged,
    open_stack,
    option,
    read_json,
)
from napari_innergs.cli._results import Results, attenuation_unit, keep_input
from napari_innergs.cli._run import Progress, Run, print_lines, print_result
from napari_innergs.cli.projections import grid_of, read_projections

if TYPE_CHECKING:
    from napari_innergs.result import Reconstruction
    from napari_innergs.scan import Scan


def dual(
    xrays: Annotated[
        Path,
        argument("Scan, as for projections; with --volume a volume: TIFF, NIfTI, DICOM, OME-Zarr, NPZ."),
    ],
    photographs: Annotated[
        Path,
        argument("Cameras: folder of a COLMAP model, or transforms.json; photographs beside it."),
    ],
    output: Output,
    is_volume: Annotated[
        bool, typer.Option("--volume", help="The X-rays are a volume already, not projections.")
    ] = False,
    array: Annotated[
        str | None,
        option("Which of the scan file's arrays are the projections. Default: the usual one."),
    ] = None,
    geometry: Annotated[Path | None, option("JSON file that describes the scan, as for projections.")] = None,
    images: Annotated[Path | None, option("Folder of the photographs, if elsewhere.")] = None,
    masks: Annotated[Path | None, option("Folder of their masks. Default: alpha, if there is any.")] = None,
    factor: Annotated[int, typer.Option(help="Make the photographs smaller by so much along a side.")] = 1,
    voxel: Annotated[float | None, option("Edge of the cubic voxels. Default: as for projections.")] = None,
    landmarks: Annotated[
        Path | None,
        option(
            'JSON file with "photo" and "xray": the same places in both worlds, [z, y, x] each; instead of the '
            "automatic alignment."
        ),
    ] = None,
    transform: Annotated[
        Path | None,
        option(
            'JSON file with the 4x4 "transform" from the photographs to the X-rays, (z, y, x), such as the '
            "report.json of an earlier result: no alignment is made."
        ),
    ] = None,
    preset: Annotated[str | None, option("fast, balanced (default) or best.")] = None,
    config: Config = None,
    settings: Settings = None,
    file_format: FileFormat = Format.tif,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = 0,
    as_json: Json = False,
) -> int:
    """Join photographs and X-rays of one object: attenuation inside, colour outside, one set of Gaussians.

    The photographs' world may be any: the similarity between both worlds is found from the surfaces. splats.ply
    opens in ordinary viewers of Gaussian splats.

    \b
    Example:
      innergs dual scan.json photos/ --output out
      innergs dual scan.json transforms.json -o out --preset fast --set refine_cameras=true
      innergs dual ct.nii.gz photos/ -o out --volume --landmarks landmarks.json
    """
    from napari_innergs.config_dual import DualConfig
    from napari_innergs.io.cameras import read_photographs
    from napari_innergs.io.write import ensure_writable

    chosen = DualConfig.coerce(merged(DualConfig, preset, config, settings))
    check_format(file_format.value)
    keep_input(xrays, output)
    options: dict[str, Any] = {"device": device, "seed": seed}
    if landmarks is not None:
        pairs = _read_entries(landmarks, "--landmarks", ("photo", "xray"))
        options["landmarks"] = (pairs["photo"], pairs["xray"])
    if transform is not None:
        options["transform"] = _read_entries(transform, "--transform", ("transform",))["transform"]
    scan: Scan | None = None
    if is_volume:
        for name, value in (("--array", array), ("--geometry", geometry), ("--voxel", voxel)):
            if value is not None:
                raise ValueError(
                    f"{name}: got it with --volume, which has its own voxels; leave one of both out"
                )
        options["volume"], grid = _attenuation(xrays)
    else:
        scan = read_projections(xrays, array, geometry)
        grid = grid_of(scan, voxel)
    pictures = read_photographs(photographs, images, masks, factor=factor)
    ensure_writable(output)
    from napari_innergs.tasks.dual import fit_dual

    facts = {"task": "dual", "config": chosen.model_dump(mode="json"), "seed": seed}
    save = partial(_save, folder=output, suffix=file_format.value)
    run = _DualRun(Progress(sys.stderr, xrays.name), save, facts)
    with run.guarded("the best state so far", as_json):
        events = fit_dual(scan, None, pictures, None, grid, chosen, watch=run.jobs.append, **options)
        try:
            run.result = run.follow(events)
        except KeyboardInterrupt:
            events.close()
            run.result = run.jobs[0].state()
            raise
    return run.finish(as_json, _say)


class _DualRun(Run):
    """A run that leaves Gaussians and pose too when its joint fit is interrupted."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.jobs: list[Any] = []

    def _best(self) -> Reconstruction:
        early = self.result is not None and self.result.report.get("interrupted")
        result = super()._best()
        if early:
            result.report["state"] = "joint fit"
        return result


def _read_entries(path: Path, name: str, keys: Sequence[str]) -> dict[str, Any]:
    content = read_json(path, name)
    missing = [key for key in keys if not isinstance(content, dict) or content.get(key) is None]
    if missing:
        raise ValueError(f"{name}: {str(path)!r} has no {missing[0]!r}; need {', '.join(keys)}")
    return dict(content)


def _attenuation(path: Path) -> tuple[Any, Any]:
    """Read a volume that says how large its voxels are."""
    import numpy as np

    from napari_innergs.geometry.grid import Grid

    stack = open_stack(path)
    if stack.units is None:
        raise ValueError(
            f"XRAYS: {str(path)!r} does not say how far apart its voxels are; need a file with spacing and unit"
        )
    if stack.n_channels != 1:
        raise ValueError(f"XRAYS: {str(path)!r} has {stack.n_channels} channels, need one")
    values = np.asarray(stack.data[..., 0])
    return values, Grid(values.shape, stack.affine, stack.units)


def _save(result: Reconstruction, folder: Path, suffix: str) -> dict[str, Any]:
    """Write a result and return its report."""
    out = Results(folder, suffix, result, unit=attenuation_unit(result.grid))
    out.volume("volume", result.volume)
    out.volume("uncertainty", result.uncertainty)
    out.volume("colour", result.colour, ("red", "green", "blue"))
    out.gaussians("model.npz", result.model)
    out.gaussians("splats.ply", result.splats)
    return out.finish()


def _say(report: dict[str, Any]) -> None:
    """Print what a person wants to know of a result."""
    print_result(report, f", {report['n_gaussians']} Gaussians, {report['n_surface']} of them on the surface")
    found = report["alignment"]
    errors = [
        f"{label} {found[key]:.2g}{unit}"
        for label, key, unit in (
            ("rotation", "rotation_error_degrees", " degrees"),
            ("scale", "scale_error", ""),
            ("shift", "shift_error", ""),
        )
        if found[key] is not None
    ]
    known = f", errors: {', '.join(errors)}" if errors else ""
    score = "as given" if found["rms"] is None else f"score {found['score']:.3f}"
    print(f"  alignment: {score}, scale {found['scale']:.5g}{known}")
    print_lines(report.get("warnings"))
