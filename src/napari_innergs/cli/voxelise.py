"""``innergs voxelise``: Gaussians of a file on a grid of voxels."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from napari_innergs.cli._options import Json, argument, numbers, open_stack, option
from napari_innergs.cli._run import print_json


def voxelise(
    model: Annotated[Path, argument("Gaussians: .ply or .npz.")],
    output: Annotated[Path, option("Volume: .tif, .nii.gz, .zarr or .npz.", "--output", "-o")],
    spacing: Annotated[str | None, option("Voxel size in the model's unit: z,y,x or one number.")] = None,
    like: Annotated[Path | None, option("Take the grid of this image instead.")] = None,
    as_json: Json = False,
) -> int:
    """Sample a file of Gaussians on a grid of voxels.

    The grid encloses the centres of a normalised field, and the support (3 standard deviations) of an additive
    one.

    \b
    Example:
      innergs voxelise out/model.npz --spacing 0.5 --output volume.tif
      innergs voxelise model.ply --like scan.nii.gz --output volume.nii.gz
    """
    from napari_innergs.io.write import check_output, write_volume
    from napari_innergs.model import GaussianModel

    if (spacing is None) == (like is None):
        raise ValueError("--spacing, --like: give one of them")
    check_output(output)
    steps = numbers(spacing)
    gaussians = GaussianModel.load(model)
    if len(gaussians) == 0:
        raise ValueError(f"model: {str(model)!r} holds no Gaussians")
    grid = _grid_like(like) if like is not None else _grid_around(gaussians, steps)
    started = time.perf_counter()
    volume = gaussians.voxelise(grid)
    write_volume(output, volume, grid)
    report = {
        "task": "voxelise",
        "n_gaussians": len(gaussians),
        "field": gaussians.field,
        "grid": {"shape": list(grid.shape), "affine": grid.affine.tolist()},
        "seconds": round(time.perf_counter() - started, 3),
        "files": {"volume": str(output)},
    }
    if as_json:
        print_json(report)
    else:
        size = " x ".join(str(n) for n in grid.shape)
        print(f"{output}\n  {size} voxels from {len(gaussians)} Gaussians, {report['seconds']:.1f} s")
    return 0


def _grid_like(path: Path) -> Any:
    from napari_innergs.geometry.grid import Grid

    stack = open_stack(path)
    return Grid((stack.n_slices, stack.height, stack.width), stack.affine, stack.units)


def _grid_around(gaussians: Any, steps: float | tuple[float, ...] | None) -> Any:
    import numpy as np

    from napari_innergs.geometry.grid import Grid

    size = np.broadcast_to(np.asarray(steps, dtype=float), 3)
    if not (np.isfinite(size).all() and (size > 0).all()):
        raise ValueError(f"--spacing: got {steps}, need positive numbers")
    if gaussians.field == "normalised":
        low, high = gaussians.means.min(axis=0), gaussians.means.max(axis=0)
    else:
        low, high = gaussians.bounds(3.0)
    affine = np.diag([*size, 1.0])
    affine[:3, 3] = low
    counts = np.floor((high - low) / size + 1e-6) + 1
    return Grid([int(n) for n in counts], affine, gaussians.units)
