"""A real scan, from all views and from every fourth: the centre, and the views left out, product against TV.

Parallel beam, no pixel size: lengths are pixels. There is no truth but the views that were left out.

    INNERGS_DATA=... python benchmarks/xray_real.py
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from common import write
from imageio.v3 import imwrite

import napari_innergs as igs
from napari_innergs.baselines.preprocess import scan_line_integrals
from napari_innergs.fit.engine import Done, Failed, Preview
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.tasks.projections import fit_projections
from napari_innergs.tasks.scan_checks import describe_centre, find_centre

EVERY = 4


def main() -> None:
    path = Path(os.environ["INNERGS_DATA"]) / "proj_real" / "tomopy_tooth_parallel.json"
    whole = igs.read_scan(path)
    found = find_centre(whole)
    whole = whole.with_geometry(found.corrected(whole.geometry))
    n = whole.geometry.n_views
    content: dict[str, object] = {"views": n, "centre": describe_centre(found)}
    lines = scan_line_integrals(whole).projections
    geometry = whole.geometry
    side = lines.shape[2]
    affine = np.eye(4)
    affine[:3, 3] = -(np.array([lines.shape[1], side, side]) - 1) / 2
    grid = igs.Grid((lines.shape[1], side, side), affine)
    content["grid"] = list(grid.shape)
    for every in (1, EVERY):
        views = np.arange(0, n, every)
        begin = time.process_time()
        variation = None
        for event in fit_projections(lines[views], geometry.subset(views), grid, "balanced"):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Preview) and event.label == "total variation":
                variation = event.volume.copy()
            if isinstance(event, Done):
                result = event.result
        row: dict[str, object] = {
            "views": len(views),
            "cpu_seconds": round(time.process_time() - begin, 1),
            "contributions": result.report["contributions"],
            "tv": result.report["tv"],
        }
        left = np.setdiff1d(np.arange(n), views)
        if len(left):
            projector = VoxelProjector(geometry.subset(left), grid)
            row["rms_of_views_left_out"] = {
                name: round(float(np.sqrt(np.mean((projector.apply(v) - lines[left]) ** 2))), 5)
                for name, v in (("tv", variation), ("ours", result.volume))
            }
            row["rms_of_their_line_integrals"] = round(float(np.sqrt(np.mean(lines[left] ** 2))), 5)
        content[f"every {every}"] = row
        print(row, flush=True)
        middle = result.volume[result.volume.shape[0] // 2]
        top = float(np.percentile(middle, 99.8))
        if "PICTURES" in os.environ:
            picture = (middle.clip(0, top) / top * 255).astype(np.uint8)
            imwrite(Path(os.environ["PICTURES"]) / f"tooth_{len(views)}.png", picture)
    write("xray_real", content)


if __name__ == "__main__":
    main()
