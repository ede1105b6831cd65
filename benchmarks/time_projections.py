"""Projections to a volume: seconds until each preview, and peak memory of a large scan.

    INNERGS_DATA=... python benchmarks/time_projections.py          # 128^3 from 50 views of 160^2, both presets
    python benchmarks/time_projections.py large                     # 256^3 from 75 views of 512^2, memory

The large run takes few steps of each kind: they need the same memory as many.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import numpy as np
from common import write
from xray_tv import load

from napari_innergs.fit.engine import Done, Failed, Preview
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.tasks.projections import fit_projections

FEW = {"tv_weight": 2.0**-10, "tv_passes": 1, "volume_steps": 2, "view_steps": 2, "guided": "always"}


def timed(data: np.ndarray, geometry: Any, grid: Grid, config: Any) -> dict[str, Any]:
    """Wall and process seconds until each preview."""
    begin, process = time.perf_counter(), time.process_time()
    row: dict[str, Any] = {}
    for event in fit_projections(data, geometry, grid, config):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Preview):
            row[event.label] = round(time.perf_counter() - begin, 1)
        if isinstance(event, Done):
            row["n_gaussians"] = event.result.report["n_gaussians"]
    row["done"] = round(time.perf_counter() - begin, 1)
    row["process_seconds"] = round(time.process_time() - process, 1)
    return row


def main() -> None:
    content: dict[str, Any] = {}
    if sys.argv[1:] == ["large"]:
        side = 256
        affine = np.diag([1.0, 1.0, 1.0, 1.0])
        affine[:3, 3] = -(side - 1) / 2
        grid = Grid((side, side, side), affine)
        z, y, x = np.ogrid[:side, :side, :side]
        body = ((z - 127) / 100.0) ** 2 + ((y - 127) / 80.0) ** 2 + ((x - 120) / 100.0) ** 2 < 1
        volume = (0.01 * body * (1 + 0.5 * (np.sin(x / 5) * np.sin(y / 7) * np.sin(z / 6) > 0.3))).astype(
            np.float32
        )
        geometry = ConeBeam.circular(
            np.arange(75) * 2 * np.pi / 75,
            source_origin=800,
            source_detector=1200,
            detector_shape=(512, 512),
            pixel_size=0.95,
        )
        data = VoxelProjector(geometry, grid).apply(volume)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        content["balanced"] = timed(data, geometry, grid, {"preset": "balanced", **FEW})
        content["peak_gib_before"] = round(before, 2)
        content["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        write("time_projections_large", content)
    else:
        data, geometry, grid, _ = load("body_50", "noisy")
        timed(data, geometry, grid, {"preset": "fast", **FEW})  # kernels are compiled
        for preset in ("fast", "balanced"):
            content[preset] = timed(data, geometry, grid, preset)
        write("time_projections", content)
    print(content)


if __name__ == "__main__":
    main()
