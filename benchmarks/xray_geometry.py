"""Geometry refinement: scans made with another geometry than the one that is told, against the truth.

Each scan is reconstructed by TV (one weight for all) with the geometry as told, as refined, and with the
one that the data were made with; PSNR before and after one rigid registration of the volume to the truth. Offsets,
angles and shifts are compared with the true ones, with their gauge taken out.

    INNERGS_DATA=... python benchmarks/xray_geometry.py
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from common import write
from scipy.ndimage import affine_transform

from napari_innergs.baselines.xray_tv import reconstruct_tv
from napari_innergs.fit.metrics import psnr
from napari_innergs.fit.xray_geometry import Refinement, check_geometry, refine_geometry
from napari_innergs.geometry.rotation import rotation_vector_to_matrix
from napari_innergs.geometry.xray import ConeBeam
from napari_innergs.io.scans import read_scan

SCANS = ("body_50_offset", "body_50_jitter")
#: weight of the total variation, the one that body_50 found without the truth
WEIGHT = 2.0**-10
GOOD_ARRAYS = {"proj": "proj", "proj_noisy": "proj_noisy_I0_1e5"}
GOOD = ("body_25", "body_50", "body_75", "bone_50")


def registered(volume: np.ndarray, truth: np.ndarray, steps: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Move a volume rigidly onto the truth (least squares, Gauss-Newton); also the motion, radians and voxels."""
    middle = 0.5 * (np.array(truth.shape) - 1)
    axes = [np.arange(n) - m for n, m in zip(truth.shape, middle, strict=True)]
    place = np.stack(np.meshgrid(*axes, indexing="ij"))
    motion = np.zeros(6)
    best, moved, kept = np.inf, volume, motion
    for _ in range(steps):
        matrix = rotation_vector_to_matrix(motion[:3])
        trial = affine_transform(volume, matrix, middle - matrix @ middle + motion[3:], order=3)
        error = float(np.mean((trial - truth) ** 2))
        if error >= best * (1 - 1e-5):
            break
        best, moved, kept = error, trial, motion
        slope = np.stack(np.gradient(trial))
        columns = np.concatenate([np.cross(place, slope, axis=0), slope]).reshape(6, -1)
        motion = motion - np.linalg.solve(columns @ columns.T, columns @ (trial - truth).ravel())
    return moved, kept


def refined(data: np.ndarray, geometry: ConeBeam, grid) -> Refinement:
    steps = refine_geometry(data, geometry, grid)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def against_truth(found: Refinement, truth: dict, angles: np.ndarray) -> dict[str, object]:
    """Errors of what was found; one turn's waves of angles and shifts are a motion of the object."""
    waves = np.stack([np.ones_like(angles), np.cos(angles), np.sin(angles)], axis=1)

    def left(error: np.ndarray) -> float:
        part = np.linalg.lstsq(waves, error, rcond=None)[0]
        return float(np.sqrt(np.mean((error - waves @ part) ** 2)))

    v = np.array(truth["offset_v_px"]) - found.offset[0] - found.shifts[:, 0]
    u = np.array(truth["offset_u_px"]) - found.offset[1] - found.shifts[:, 1]
    return {
        "offset_v": [round(float(np.mean(truth["offset_v_px"])), 4), round(found.offset[0], 4)],
        "offset_v_error": round(float(-v.mean()), 4),
        "offset_v_standard_error": round(found.offset_error[0], 4),
        "offset_u": [round(float(np.mean(truth["offset_u_px"])), 4), round(found.offset[1], 4)],
        "offset_u_error": round(float(-u.mean()), 4),
        "offset_u_standard_error": round(found.offset_error[1], 4),
        "shift_v_rms_error": round(left(v), 4),
        "shift_u_rms_error": round(left(u), 4),
        "angle_rms_error_degrees": round(
            left(np.array(truth["angle_error_deg"]) - np.degrees(found.angles)), 4
        ),
    }


def true_geometry(about: dict, truth: dict) -> ConeBeam:
    geometry = ConeBeam.circular(
        np.array(truth["angles_rad_true"]),
        source_origin=about["DSO"],
        source_detector=about["DSD"],
        detector_shape=about["nDetector"],
        pixel_size=about["dDetector"],
    )
    return geometry.with_offset(np.array(truth["offset_v_px"]), np.array(truth["offset_u_px"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scans", nargs="*", default=SCANS, choices=SCANS)
    parser.add_argument("--array", default="proj_noisy", choices=["proj", "proj_noisy"])
    parser.add_argument("--name", default="xray_geometry", help="name of the result file")
    options = parser.parse_args()
    root = Path(os.environ["INNERGS_DATA"])
    checks = {}
    for name in GOOD:
        scan = read_scan(root / "proj" / f"{name}.json", GOOD_ARRAYS[options.array])
        begin = time.process_time()
        check = check_geometry(scan.projections, scan.geometry, scan.grid)
        seconds = time.process_time() - begin
        checks[name] = {
            "error": round(check.error, 3),
            "warns": check.likely,
            "cpu_seconds": round(seconds, 2),
        }
        print(name, json.dumps(checks[name]), flush=True)
    cells = {}
    for name in options.scans:
        folder = root / "proj_bad"
        scan = read_scan(folder / f"{name}.json", options.array)
        about = json.loads((folder / f"{name}.json").read_text())
        truth = json.loads((folder / f"{name}_truth.json").read_text())
        volume = np.load(folder / about["ground_truth"])["data"]
        check = check_geometry(scan.projections, scan.geometry, scan.grid)
        checks[name] = {"error": round(check.error, 3), "warns": check.likely, "message": check.message}
        begin = time.process_time()
        found = refined(scan.projections, scan.geometry, scan.grid)
        row: dict[str, object] = {"refinement_cpu_seconds": round(time.process_time() - begin, 1)}
        row["found"] = against_truth(found, truth, scan.geometry.angles)
        row["summary"] = found.summary()
        rows = {"told": scan.geometry, "refined": found.geometry, "true": true_geometry(about, truth)}
        after = check_geometry(scan.projections, found.geometry, scan.grid)
        row["check_after"] = {"error": round(after.error, 3), "warns": after.likely}
        print(name, json.dumps(row["found"]), row["refinement_cpu_seconds"], row["check_after"], flush=True)
        # the object may stand elsewhere: a margin on all sides, for all
        for label, geometry in rows.items():
            made = reconstruct_tv(scan.projections, geometry, scan.grid, WEIGHT, margin=4)
            moved, motion = registered(made.volume, volume)
            row[label] = {
                "psnr": round(psnr(made.volume, volume), 2),
                "psnr_registered": round(psnr(moved, volume), 2),
                "motion_voxels": np.round(motion[3:], 3).tolist(),
                "motion_degrees": np.round(np.degrees(motion[:3]), 3).tolist(),
            }
            print(name, label, json.dumps(row[label]), flush=True)
        score = {label: row[label]["psnr_registered"] for label in rows}
        row["below_true_geometry"] = round(score["true"] - score["refined"], 2)
        row["cost_of_ignoring"] = round(score["true"] - score["told"], 2)
        cells[name] = row
    write(options.name, {"weight": WEIGHT, "array": options.array, "checks": checks, "cells": cells})


if __name__ == "__main__":
    main()
