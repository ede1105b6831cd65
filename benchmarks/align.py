"""Alignment of photographs with X-rays: random similarities, other objects, mirror images, silhouettes.

Each trial has its own similarity (rotation uniform, scale 0.2 to 5, shift up to 2 object sizes) and its own cloud:
3000 points of the true surface with noise of 0.3 % of the radius, 3 to 6 % of them strays in a cube of 1.5 radii,
and 10 to 20 % of the object hidden from one side. The surface they are laid on comes from reconstructions (FDK and
total variation of 50 noisy views) and from the true volume. Error: root mean square displacement of the true
surface's vertices; success is below half a voxel with the scale within 1 %. Process CPU time, one thread. Other
objects and mirror images are laid on the first kind of volume only.

    INNERGS_DATA=... python benchmarks/align.py
    INNERGS_DATA=... python benchmarks/align.py --volumes fdk --trials 0 --add    # refusals only, into the same file
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import RESULTS, write

from napari_innergs.baselines.fdk import fdk
from napari_innergs.baselines.xray_tv import reconstruct_tv
from napari_innergs.fit.align import (
    Alignment,
    align_landmarks,
    align_surfaces,
    refine_on_silhouettes,
    surface_of_volume,
)
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import quaternion_to_matrix, rotation_vector_to_matrix
from napari_innergs.geometry.xray import ConeBeam
from napari_innergs.io.cameras import read_photographs

OBJECTS = ("tooth", "shell")
VOLUMES = ("fdk", "tv", "true")
POINTS, NOISE = 3000, 0.003
REVERSE = np.eye(4)[[2, 1, 0, 3]]
Surface = tuple[np.ndarray, np.ndarray]


def folder(name: str) -> Path:
    return Path(os.environ["INNERGS_DATA"]) / "dual" / name


def volume(name: str, kind: str) -> tuple[np.ndarray, Grid]:
    """The true volume, or one reconstructed from 50 noisy views."""
    file = np.load(folder(name) / "volume.npz")
    affine = np.diag([*file["spacing_mm"], 1.0])
    affine[:3, 3] = -file["spacing_mm"] * (np.array(file["data"].shape) - 1) / 2
    grid = Grid(file["data"].shape, affine)
    if kind == "true":
        return file["data"].astype(np.float32), grid
    about = json.loads((folder(name) / "xray_50.json").read_text())
    arrays = np.load(folder(name) / "xray_50.npz")
    scan = ConeBeam.circular(
        arrays["angles_rad"],
        source_origin=about["DSO"],
        source_detector=about["DSD"],
        detector_shape=about["nDetector"],
        pixel_size=about["dDetector"],
    )
    if kind == "fdk":
        return fdk(arrays["proj_noisy"], scan, grid), grid
    return reconstruct_tv(arrays["proj_noisy"], scan, grid).volume, grid


def vertices(name: str) -> np.ndarray:
    """The true surface, (z, y, x)."""
    return np.load(folder(name) / "surface_xray_world.npz")["xyz"][:, ::-1].astype(np.float64)


def apply(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ transform[:3, :3].T + transform[:3, 3]


def cloud(surface: np.ndarray, seed: int, mirror: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Points in a random photo world, and the true similarity from it."""
    random = np.random.default_rng([11, seed])
    rotation = quaternion_to_matrix(random.standard_normal(4))
    scale = np.exp(random.uniform(np.log(0.2), np.log(5)))
    middle = surface.mean(0)
    radius = np.linalg.norm(surface - middle, axis=1).max()
    way = random.standard_normal(3)
    truth = np.eye(4)
    truth[:3, :3] = scale * rotation
    truth[:3, 3] = middle + way / np.linalg.norm(way) * random.uniform(0, 2) * 2 * radius
    side = random.standard_normal(3)
    height = surface @ side
    left = surface[height < np.quantile(height, 1 - random.uniform(0.1, 0.2))]
    strays = round(POINTS * random.uniform(0.03, 0.06))
    points = left[random.choice(len(left), POINTS - strays, replace=False)]
    points = points + NOISE * radius * random.standard_normal(points.shape)
    points = np.concatenate([points, middle + random.uniform(-1.5, 1.5, (strays, 3)) * radius])
    points = apply(np.linalg.inv(truth), points)
    return points * np.array([-1.0 if mirror else 1.0, 1, 1]), truth


def errors(found: Alignment, truth: np.ndarray, surface: np.ndarray, voxel: float) -> dict[str, float]:
    """Displacement of the true vertices (voxels), errors of scale, rotation (degrees), and those stated."""
    whole = found.transform @ np.linalg.inv(truth)
    scale = float(np.cbrt(np.linalg.det(whole[:3, :3])))
    cosine = (np.trace(whole[:3, :3]) / scale - 1) / 2
    moved = apply(whole, surface) - surface
    return {
        "rms_voxel": float(np.sqrt(np.mean(np.sum(moved**2, axis=1)))),
        "scale": abs(scale - 1),
        "degrees": float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))),
        "shift_voxel": float(np.linalg.norm(moved.mean(0))),
        "stated_scale": found.scale_error,
        "stated_degrees": found.rotation_error,
        "stated_shift_voxel": found.shift_error / voxel,
    }


def in_voxels(row: dict[str, float], voxel: float) -> dict[str, float]:
    return {k: v / voxel if k in ("rms_voxel", "shift_voxel") else v for k, v in row.items()}


def rounded(row: dict[str, float]) -> dict[str, float]:
    return {k: round(float(v), 5) for k, v in row.items()}


def timed(call: Callable[[], Alignment]) -> tuple[Alignment, float]:
    begin = time.process_time()
    return call(), time.process_time() - begin


def trials(name: str, target: Surface, voxel: float, count: int) -> dict[str, object]:
    """The object against its own surface."""
    surface = vertices(name)
    rows, seconds, refused, ties, scores = [], [], 0, 0, []
    for seed in range(count):
        points, truth = cloud(surface, seed)
        found, took = timed(lambda points=points: align_surfaces(points, *target))  # type: ignore[misc]
        rows.append(in_voxels(errors(found, truth, surface, voxel), voxel))
        seconds.append(took)
        refused += not found.matched
        ties += len(found.candidates) > 1
        scores.append(found.score)
    good = [r["rms_voxel"] < 0.5 and r["scale"] < 0.01 for r in rows]
    return {
        "success": f"{sum(good)} of {count}",
        "refused": refused,
        "ties": ties,
        "least_score": round(min(scores), 3),
        "median": rounded({k: float(np.median([r[k] for r in rows])) for k in rows[0]}),
        "worst": rounded({k: float(np.max([r[k] for r in rows])) for k in rows[0]}),
        "cpu_seconds_median": round(float(np.median(seconds)), 2),
        "cpu_seconds_most": round(float(np.max(seconds)), 2),
    }


def strangers(name: str, target: Surface, count: int, mirror: bool) -> dict[str, object]:
    """Clouds that must be refused."""
    surface = vertices(name)
    seconds, false, scores, named = [], 0, [], 0
    for seed in range(count):
        points, _ = cloud(surface, 1000 + seed, mirror)
        found, took = timed(lambda points=points: align_surfaces(points, *target))  # type: ignore[misc]
        false += found.matched
        named += "mirror" in found.reason
        scores.append(found.score)
        seconds.append(took)
    return {
        "false_matches": f"{false} of {count}",
        "said_to_be_mirrored": named,
        "highest_score": round(max(scores), 3),
        "cpu_seconds_median": round(float(np.median(seconds)), 2),
        "cpu_seconds_most": round(float(np.max(seconds)), 2),
    }


def photographs(name: str, target: Surface, voxel: float) -> dict[str, object]:
    """The points and masks that come with the object: before and after the silhouettes, also from a bad start."""
    surface = vertices(name)
    truth = (
        REVERSE @ np.array(json.loads((folder(name) / "truth.json").read_text())["photo_to_xray"]) @ REVERSE
    )
    points = np.load(folder(name) / "points.npz")["xyz"][:, ::-1].astype(np.float64)
    photos = read_photographs(folder(name) / "transforms_train.json")
    assert photos.masks is not None
    out: dict[str, object] = {}

    def row(label: str, found: Alignment, seconds: float) -> None:
        about = rounded(in_voxels(errors(found, truth, surface, voxel), voxel))
        out[label] = about | {"matched": found.matched, "cpu_seconds": round(seconds, 2)}

    found, seconds = timed(lambda: align_surfaces(points, *target))
    row("surface", found, seconds)
    row("silhouettes", *timed(lambda: refine_on_silhouettes(found, photos.masks, photos.cameras, *target)))
    few = np.arange(0, len(photos.cameras), 10)
    row(
        f"silhouettes of {len(few)} photographs",
        *timed(
            lambda: refine_on_silhouettes(found, photos.masks[few], [photos.cameras[i] for i in few], *target)
        ),
    )
    random = np.random.default_rng(3)
    chosen = surface[random.choice(len(surface), 6, replace=False)]
    radius = np.linalg.norm(surface - surface.mean(0), axis=1).max()
    picked = chosen + 0.02 * radius * random.standard_normal(chosen.shape)
    marks, seconds = timed(lambda: align_landmarks(apply(np.linalg.inv(truth), chosen), picked))
    row("6 landmarks picked to 2 % of the radius", marks, seconds)
    row(
        "landmarks, silhouettes",
        *timed(lambda: refine_on_silhouettes(marks, photos.masks, photos.cameras, *target)),
    )
    turned = np.eye(4)
    way = random.standard_normal(3)
    turned[:3, :3] = 1.03 * rotation_vector_to_matrix(np.radians(5) * way / np.linalg.norm(way))
    off = replace(found, transform=turned @ found.transform)
    row("surface, spoilt by 5 degrees and 3 %", off, 0.0)
    row(
        "spoilt, silhouettes",
        *timed(lambda: refine_on_silhouettes(off, photos.masks, photos.cameras, *target)),
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", nargs="*", default=OBJECTS)
    parser.add_argument("--volumes", nargs="*", default=VOLUMES, choices=VOLUMES)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--refusals", type=int, default=50, help="trials of what must be refused")
    parser.add_argument("--add", action="store_true", help="keep what the result file has")
    parser.add_argument("--name", default="align", help="name of the result file")
    options = parser.parse_args()
    cells: dict[str, dict[str, object]] = {}
    refused: dict[str, dict[str, object]] = {}
    content: dict[str, object] = {"objects": cells, "to_be_refused": refused}
    file = RESULTS / f"{options.name}.json"
    if options.add and file.exists():
        before = json.loads(file.read_text())
        cells.update(before["objects"])
        refused.update(before["to_be_refused"])
    first: dict[str, Surface] = {}
    for kind in options.volumes:
        for name in options.objects:
            data, grid = volume(name, kind)
            begin = time.process_time()
            target, voxel = surface_of_volume(data, grid), float(grid.spacing[0])
            seconds = round(time.process_time() - begin, 2)
            first.setdefault(name, target)
            cell: dict[str, object] = {"points": len(target[0]), "surface_cpu_seconds": seconds}
            if options.trials == 0:
                continue
            cell["own"] = trials(name, target, voxel, options.trials)
            cell["photographs"] = photographs(name, target, voxel)
            cells[f"{name} {kind}"] = cell
            print(name, kind, json.dumps(cell), flush=True)
            write(options.name, content)
    for name in options.objects if options.refusals else ():
        for other in options.objects:
            if other != name:
                found = strangers(name, first[other], options.refusals, False)
                refused[f"{name} on the surface of {other}"] = found
                print(name, "on", other, found, flush=True)
        half = math.ceil(options.refusals / 2)
        refused[f"{name} mirrored"] = strangers(name, first[name], half, True)
        print(name, "mirrored", refused[f"{name} mirrored"], flush=True)
        write(options.name, content)


if __name__ == "__main__":
    main()
