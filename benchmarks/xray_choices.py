"""Why total variation is as it is: rays' weights, flatness, what guiding does, and passes over few views.

Five scans, four of them also at half the resolution, everything without Gaussians, so that each choice is seen by
itself. Tooth and shell are the scans of `dual`, made from volumes twice as fine.

    INNERGS_DATA=... python benchmarks/xray_choices.py
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
from common import write
from imageio.v3 import imwrite
from projections import binned
from xray_tv import load

from napari_innergs.baselines import xray_tv
from napari_innergs.baselines.xray_tv import flatness, guided_tv, reconstruct_tv
from napari_innergs.fit.metrics import psnr
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam

Cell = tuple[np.ndarray, ConeBeam, Grid, np.ndarray]
SCANS = ("body_25", "tooth", "shell", "bone_50", "body_50")
# also with pixels and voxels twice as large
COARSE = ("body_25", "body_50", "body_75", "bone_50")
ENDS = 2


def of_dual(name: str, views: int) -> Cell:
    """Noisy scan of an object of which there are photographs too."""
    folder = Path(os.environ["INNERGS_DATA"]) / "dual" / name
    about = json.loads((folder / f"xray_{views}.json").read_text())
    arrays = np.load(folder / f"xray_{views}.npz")
    truth = np.load(folder / "volume.npz")["data"].astype(np.float32)
    geometry = ConeBeam.circular(
        arrays["angles_rad"],
        source_origin=about["DSO"],
        source_detector=about["DSD"],
        detector_shape=about["nDetector"],
        pixel_size=about["dDetector"],
    )
    affine = np.diag([*about["dVoxel"], 1.0])
    affine[:3, 3] = -np.array(about["dVoxel"]) * (np.array(truth.shape) - 1) / 2
    return arrays["proj_noisy"].astype(np.float32), geometry, Grid(truth.shape, affine), truth


def few_views(name: str) -> dict[str, float]:
    """Ten views, with as many passes as many views have, and with as many steps."""
    data, geometry, grid, truth = of_dual(name, 10)
    many = reconstruct_tv(data, geometry, grid)
    usual, xray_tv.VIEWS = xray_tv.VIEWS, 1
    try:
        few = reconstruct_tv(data, geometry, grid)
    finally:
        xray_tv.VIEWS = usual
    return {
        "tv": round(psnr(many.volume, truth), 2),
        "weight": many.weight,
        "tv, few passes": round(psnr(few.volume, truth), 2),
        "weight, few passes": few.weight,
    }


def main() -> None:
    ten = {name: few_views(name) for name in ("tooth", "shell")}
    print(ten, flush=True)
    rows: dict[str, object] = {}
    cells = {name: partial(of_dual, name, 25) for name in ("tooth", "shell")}
    cells |= {name: partial(load, name, "noisy") for name in SCANS if name not in cells}
    cells |= {f"{name}, binned": lambda name=name: binned(load(name, "noisy")) for name in COARSE}
    for name, make in cells.items():
        data, geometry, grid, truth = make()
        found = reconstruct_tv(data, geometry, grid)
        plain = reconstruct_tv(data, geometry, grid, trust=0)
        guided = guided_tv(data, geometry, grid, found, found.volume)
        wrong = np.square(found.volume - truth, dtype=np.float64)
        rows[f"{name}, {geometry.n_views} views"] = row = {
            "tv": round(psnr(found.volume, truth), 2),
            "tv, rays not weighted": round(psnr(plain.volume, truth), 2),
            "guided by itself": round(psnr(guided, truth), 2),
            "flatness": round(flatness(found.volume), 3),
            "share of the error in the end slices": round(
                float((wrong[:ENDS].sum() + wrong[-ENDS:].sum()) / wrong.sum()), 3
            ),
        }
        print(name, row, flush=True)
        write("xray_choices", {"scans": rows, "ten views": ten})
        if "PICTURES" in os.environ:
            middle = [v[v.shape[0] // 2] for v in (truth.astype(np.float32), found.volume, guided)]
            top = float(np.percentile(middle[0], 99.8))
            picture = (np.hstack(middle).clip(0, top) / top * 255).astype(np.uint8)
            imwrite(Path(os.environ["PICTURES"]) / f"{name}.png", picture.repeat(3, 0).repeat(3, 1))


if __name__ == "__main__":
    main()
