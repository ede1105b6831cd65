"""Parallel beams: the product against total variation and filtered backprojection, scans made with scikit-image.

Sixteen slices from the middle of each volume are projected by `skimage.transform.radon` at twice the resolution of
the detector; noise is that of 1e5 photons in a pixel of the blank scan. Voxels are the unit of length.

    INNERGS_DATA=... python benchmarks/xray_parallel.py
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from common import write
from skimage.transform import radon
from xray_tv import load

from napari_innergs.fit.engine import Done, Failed, Preview
from napari_innergs.fit.metrics import psnr, ssim
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ParallelBeam
from napari_innergs.tasks.projections import fit_projections

CASES = (("body", 25), ("body", 50), ("bone", 50), ("tooth", 50), ("tooth", 25))
SLICES, PHOTONS = 16, 1e5


def truth_of(name: str) -> np.ndarray:
    """Slices (Z, Y, X), attenuation per voxel; nothing outside the circle that all views see."""
    if name == "tooth":
        file = np.load(Path(os.environ["INNERGS_DATA"]) / "dual" / name / "volume.npz")
        volume, spacing = file["data"].astype(np.float32), float(file["spacing_mm"][0])
    else:
        _, _, grid, volume = load(f"{name}_50", "clean")
        spacing = grid.spacing[0]
    first = (len(volume) - SLICES) // 2
    out = volume[first : first + SLICES].astype(np.float32) * np.float32(spacing)
    place = np.arange(out.shape[1]) - 0.5 * (out.shape[1] - 1)
    out[:, np.hypot(*np.meshgrid(place, place)) > 0.48 * out.shape[1]] = 0
    return out


def scan(truth: np.ndarray, views: int, photons: float | None) -> tuple[np.ndarray, ParallelBeam, Grid]:
    """Line integrals (n, V, U), geometry and grid."""
    n = truth.shape[1]
    degrees = np.arange(views) * 180.0 / views
    fine = truth.repeat(2, 1).repeat(2, 2)
    # a sum over fine pixels, each half a voxel long; two of the fine detector's pixels are one
    lines = np.stack([0.5 * radon(plane, theta=degrees, circle=True) for plane in fine])
    data = lines.reshape(SLICES, n, 2, views).mean(2).transpose(2, 0, 1)
    if photons is not None:
        counts = np.random.default_rng(0).poisson(photons * np.exp(-data))
        data = -np.log(np.maximum(counts, 1) / photons)
    # radon turns about fine pixel n, a quarter of a voxel from the middle
    angles = -np.deg2rad(degrees) - np.pi / 2
    geometry = ParallelBeam.circular(angles, detector_shape=(SLICES, n)).with_offset(0.0, -0.25)
    affine = np.eye(4)
    affine[:3, 3] = [-0.5 * (SLICES - 1), -(n - 0.5) / 2, -(n - 0.5) / 2]
    return data.astype(np.float32), geometry, Grid(truth.shape, affine)


def main() -> None:
    rows: dict[str, object] = {}
    gains = []
    for name, views in CASES:
        truth = truth_of(name)
        for which, photons in (("clean", None), ("noisy", PHOTONS)):
            row: dict[str, object] = {}
            values = {}
            for event in fit_projections(*scan(truth, views, photons)):
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Preview):
                    values[event.label] = psnr(event.volume, truth)
                    row[event.label] = [round(values[event.label], 2), round(ssim(event.volume, truth), 4)]
                if isinstance(event, Done):
                    row["contributions"] = event.result.report["contributions"]
            gains.append(values["combined"] - values["total variation"])
            row["gain"] = round(gains[-1], 3)
            rows[f"{name}, {views} views, {which}"] = row
            print(name, views, which, row, flush=True)
            write("xray_parallel", {"psnr, ssim": rows, "least_gain": round(min(gains), 3)})


if __name__ == "__main__":
    main()
