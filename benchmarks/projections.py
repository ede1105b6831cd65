"""Projections to a volume: the product against total variation, on scans made by another projector.

PSNR (3D, peak = range of the truth), SSIM and process CPU time; controls that have no Gaussians in them; views that
were left out.

    INNERGS_DATA=... python benchmarks/projections.py
    INNERGS_DATA=... python benchmarks/projections.py --binned --scans body_50 --controls
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from common import write
from scipy.ndimage import gaussian_filter
from xray_tv import KEYS, SCANS, load

from napari_innergs.baselines.xray_tv import TvReconstruction, guided_tv, reconstruct_tv
from napari_innergs.fit.engine import Done, Failed, Preview
from napari_innergs.fit.metrics import psnr, ssim
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.result import Reconstruction
from napari_innergs.tasks.projections import fit_projections

Cell = tuple[np.ndarray, XrayGeometry, Grid, np.ndarray]


def binned(cell: Cell) -> Cell:
    """Pixels and voxels twice as large."""
    data, geometry, grid, truth = cell
    n, v, u = data.shape
    half = data.reshape(n, v // 2, 2, u // 2, 2).mean((2, 4)).astype(np.float32)
    vectors = np.array(geometry.vectors)
    vectors[:, 6:] *= 2
    shape = tuple(s // 2 for s in truth.shape)
    coarse = truth.astype(np.float32).reshape(shape[0], 2, shape[1], 2, shape[2], 2).mean((1, 3, 5))
    step = np.diag([2.0, 2.0, 2.0, 1.0])
    step[:3, 3] = 0.5
    return half, XrayGeometry(vectors, half.shape[1:], "cone"), Grid(shape, grid.affine @ step), coarse


def run(cell: Cell, preset: str) -> tuple[np.ndarray, Reconstruction, dict[str, float]]:
    """Total variation, result, and process seconds of each."""
    data, geometry, grid, _ = cell
    begin, seconds = time.process_time(), {}
    variation = None
    for event in fit_projections(data, geometry, grid, preset):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Preview):
            seconds[event.label] = round(time.process_time() - begin, 2)
            if event.label == "total variation":
                variation = event.volume.copy()
        if isinstance(event, Done):
            assert variation is not None
            return variation, event.result, seconds
    raise RuntimeError("no result")


def score(volume: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """PSNR and SSIM."""
    return {"psnr": round(psnr(volume, truth), 3), "ssim": round(ssim(volume, truth), 4)}


def controls(cell: Cell, variation: np.ndarray, weight: float) -> dict[str, dict[str, float]]:
    """What can be done to total variation without Gaussians."""
    data, geometry, grid, truth = cell
    out = {"blurred": score(gaussian_filter(variation, 0.4), truth)}
    out["SART's weights of rays"] = score(reconstruct_tv(data, geometry, grid, trust=0).volume, truth)
    others = {}
    for factor in (0.5, 2.0):
        others[factor] = reconstruct_tv(data, geometry, grid, weight * factor).volume
        out[f"weight x {factor}"] = score(others[factor], truth)
    out["mean of three weights"] = score((variation + others[0.5] + others[2.0]) / 3, truth)
    return out


def held_out(preset: str, small: bool) -> dict[str, float]:
    """RMSE of line integrals in the views of body_75 that body_25 has not."""
    cell, whole = load("body_25", "noisy"), load("body_75", "clean")
    if small:
        cell, whole = binned(cell), binned(whole)
    variation, result, _ = run(cell, preset)
    have = np.round(cell[1].angles, 4) % (2 * np.pi)
    new = np.flatnonzero([not np.isclose(a, have, atol=1e-3).any() for a in whole[1].angles % (2 * np.pi)])
    projector = VoxelProjector(whole[1].subset(new), cell[2])
    truth = whole[0][new]
    rms = {
        name: float(np.sqrt(np.mean((projector.apply(volume) - truth) ** 2)))
        for name, volume in (("tv", variation), ("ours", result.volume))
    }
    return {"views": len(new), **{name: round(value, 5) for name, value in rms.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scans", nargs="*", default=SCANS, choices=SCANS)
    parser.add_argument("--data", nargs="*", default=list(KEYS), choices=list(KEYS))
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--binned", action="store_true", help="pixels and voxels twice as large")
    parser.add_argument("--controls", action="store_true", help="also what needs no Gaussians")
    parser.add_argument("--no-views", action="store_true", help="leave out the prediction of views")
    parser.add_argument("--name", default="projections", help="name of the result file")
    options = parser.parse_args()
    cells: dict[str, dict[str, object]] = {}
    gains = []
    for name in options.scans:
        for which in options.data:
            cell = load(name, which)
            if options.binned:
                cell = binned(cell)
            variation, result, seconds = run(cell, options.preset)
            before, after = score(variation, cell[3]), score(result.volume, cell[3])
            report = result.report
            row: dict[str, object] = {
                "tv": before,
                "ours": after,
                "gain": round(after["psnr"] - before["psnr"], 3),
                "contributions": report["contributions"],
                "n_gaussians": report["n_gaussians"],
                "cpu_seconds": seconds,
                "seconds": report["seconds"],
            }
            if result.uncertainty is not None:
                within = np.abs(result.volume - cell[3]) <= result.uncertainty
                row["within_band"] = round(float(within.mean()), 3)
            if "guided" in report["contributions"]:
                found = TvReconstruction(variation, report["tv"]["weight"], (), 0, 0.0)
                row["guided by total variation itself"] = score(
                    guided_tv(*cell[:3], found, variation), cell[3]
                )
            if options.controls:
                row["controls"] = controls(cell, variation, report["tv"]["weight"])
            gains.append(after["psnr"] - before["psnr"])
            cells[f"{name} {which}"] = row
            print(name, which, json.dumps(row), flush=True)
            content: dict[str, object] = {
                "preset": options.preset,
                "binned": options.binned,
                "cells": cells,
                "least_gain": round(min(gains), 3),
                "mean_gain": round(float(np.mean(gains)), 3),
            }
            write(options.name, content)
    if not options.no_views:
        content["views_of_body_75_from_body_25"] = held_out(options.preset, options.binned)
        print(content["views_of_body_75_from_body_25"])
    write(options.name, content)


if __name__ == "__main__":
    main()
