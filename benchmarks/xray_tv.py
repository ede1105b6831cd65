"""Conventional reconstructions of cone-beam scans: FDK, OS-SART, CG and TV against the truth.

PSNR (3D, peak = range of the truth), SSIM, and process CPU time, on scans made by another projector. One rule for
all scans; TV's weight is found without the truth.

    INNERGS_DATA=... python benchmarks/xray_tv.py
    INNERGS_DATA=... python benchmarks/xray_tv.py --scans body_50 --data noisy --sweep
                            # also other weights than the one found, against the truth
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from common import write

from napari_innergs.baselines.fdk import fdk
from napari_innergs.baselines.sart import conjugate_gradients, os_sart
from napari_innergs.baselines.xray_tv import reconstruct_tv
from napari_innergs.fit.metrics import psnr, ssim
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam

SCANS = ("body_25", "body_50", "body_75", "bone_50")
KEYS = {"clean": "proj", "noisy": "proj_noisy_I0_1e5"}
#: PSNR that TV must reach: SART+TV of an independent engine on the same files, not converged
BARS = {
    ("body_25", "noisy"): 29.6,
    ("body_50", "noisy"): 31.4,
    ("body_75", "noisy"): 32.4,
    ("bone_50", "noisy"): 23.1,
    ("body_25", "clean"): 30.3,
    ("body_50", "clean"): 32.3,
    ("body_75", "clean"): 33.4,
    ("bone_50", "clean"): 25.7,
}


def load(name: str, which: str) -> tuple[np.ndarray, ConeBeam, Grid, np.ndarray]:
    """Projections, geometry, grid and truth of a scan."""
    folder = Path(os.environ["INNERGS_DATA"]) / "proj"
    about = json.loads((folder / f"{name}.json").read_text())
    arrays = np.load(folder / f"{name}.npz")
    truth = np.load(folder / about["ground_truth"])["data"]
    geometry = ConeBeam.circular(
        arrays["angles_rad"],
        source_origin=about["DSO"],
        source_detector=about["DSD"],
        detector_shape=about["nDetector"],
        pixel_size=about["dDetector"],
    )
    affine = np.diag([*about["dVoxel"], 1.0])
    affine[:3, 3] = -np.array(about["dVoxel"]) * (np.array(truth.shape) - 1) / 2
    return arrays[KEYS[which]], geometry, Grid(truth.shape, affine), truth


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scans", nargs="*", default=SCANS, choices=SCANS)
    parser.add_argument("--data", nargs="*", default=list(KEYS), choices=list(KEYS))
    parser.add_argument(
        "--sweep", action="store_true", help="TV with half and twice the weight that was found"
    )
    parser.add_argument("--name", default="xray_tv", help="name of the result file")
    options = parser.parse_args()
    # compile before the clock runs
    data, geometry, grid, _ = load("body_25", "clean")
    small = grid.crop(*[slice(0, None, 8)] * 3)
    for method in (fdk, os_sart, conjugate_gradients):
        method(data, geometry, small)
    reconstruct_tv(data, geometry, small, passes=1)
    cells = {}
    for name in options.scans:
        for which in options.data:
            data, geometry, grid, truth = load(name, which)
            row: dict[str, object] = {}

            def score(label: str, volume: np.ndarray, begin: float, row=row, truth=truth) -> None:
                row[label] = {
                    "psnr": round(psnr(volume, truth), 2),
                    "ssim": round(ssim(volume, truth), 4),
                    "cpu_seconds": round(time.process_time() - begin, 2),
                }

            begin = time.process_time()
            score("fdk", fdk(data, geometry, grid), begin)
            begin = time.process_time()
            score("sart", os_sart(data, geometry, grid, 10), begin)
            begin = time.process_time()
            score("cg", conjugate_gradients(data, geometry, grid), begin)
            begin = time.process_time()
            found = reconstruct_tv(data, geometry, grid)
            score("tv", found.volume, begin)
            row["tv"] |= {
                "weight": found.weight,
                "trials": [[weight, round(error, 6)] for weight, error in found.trials],
                "passes": found.passes,
                "change": round(found.change, 6),
            }
            if options.sweep:
                for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
                    again = reconstruct_tv(data, geometry, grid, found.weight * factor, start=found.volume)
                    row[f"tv, weight x {factor}"] = round(psnr(again.volume, truth), 2)
            bar = BARS[name, which]
            row["bar"] = bar
            row["above_bar"] = round(row["tv"]["psnr"] - bar, 2)
            cells[f"{name} {which}"] = row
            print(name, which, json.dumps(row), flush=True)
    write(options.name, {"cells": cells, "least_above_bar": min(row["above_bar"] for row in cells.values())})


if __name__ == "__main__":
    main()
