"""Thick slices: the product against the mean of cubic splines, least squares (Tikhonov) and total variation.

Three orthogonal stacks (box and Gaussian profile, noise 0, 2, 5 %), a single stack (box mean of 2, 4, 8), two and
partly overlapping stacks, and wrong profiles, on crops of real volumes. Slices are made with NumPy and SciPy
alone. PSNR over the whole crop, peak = range of the truth. The penalties of least squares and total variation are
the ones that the run chose without the truth; both are run to convergence. One rule for all cells.

    python benchmarks/thick_stacks.py
    python benchmarks/thick_stacks.py --only single --size 64
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from common import volumes, write
from scipy.ndimage import gaussian_filter1d, map_coordinates

import napari_innergs as igs
from napari_innergs.baselines.stacks import StackProblem, tikhonov_steps, tv_steps
from napari_innergs.fit.metrics import psnr, ssim
from napari_innergs.operators.acquisition import SliceAcquisition

NAMES = ("colin27", "bone", "chest")


def crop(volume: np.ndarray, size: int) -> np.ndarray:
    """Return the middle, a multiple of 8 in each direction."""
    counts = [min(n, size) // 8 * 8 for n in volume.shape]
    starts = [(n - c) // 2 for n, c in zip(volume.shape, counts, strict=True)]
    return np.ascontiguousarray(volume[tuple(slice(s, s + c) for s, c in zip(starts, counts, strict=True))])


def stack_of(
    volume: np.ndarray,
    axis: int,
    k: int,
    profile: str = "box",
    noise: float = 0.0,
    told: tuple[float, str] | None = None,
) -> igs.SliceStack:
    """Return slices k voxels apart across an axis, with what the reconstruction is told of their profile."""
    turned = np.moveaxis(volume, axis, 0)
    if profile == "box":
        slices, first = turned.reshape(-1, k, *turned.shape[1:]).mean(1), (k - 1) / 2
    else:
        slices, first = (
            gaussian_filter1d(turned, k / 2.3548, axis=0, mode="nearest", truncate=5)[k // 2 :: k],
            k // 2,
        )
    random = np.random.default_rng(axis)
    slices = slices + noise * np.ptp(volume) * random.standard_normal(slices.shape)
    affine = np.zeros((4, 4))
    affine[axis, 0], affine[axis, 3], affine[3, 3] = k, first, 1
    for column, other in enumerate([a for a in range(3) if a != axis], 1):
        affine[other, column] = 1
    thickness, shape = told or (float(k), profile)
    return igs.SliceStack(slices.astype(np.float32), affine, thickness=thickness, profile=shape)


def cubic(stacks: list[igs.SliceStack], grid: igs.Grid) -> np.ndarray:
    """Return the mean of the stacks' cubic splines, each where it has slices."""
    index = np.indices(grid.shape).reshape(3, -1)
    total, count = np.zeros(index.shape[1]), np.zeros(index.shape[1])
    for stack in stacks:
        frame = np.linalg.inv(stack.frame_affine) @ grid.affine
        at = frame[:3, :3] @ index + frame[:3, 3:]
        at[0] = (at[0] - stack.positions[0]) / np.mean(np.diff(stack.positions))
        sizes = np.reshape(stack.data.shape[:3], (3, 1))
        seen = ((at > -0.51) & (at < sizes - 0.49)).all(0)
        total += seen * map_coordinates(stack.data[..., 0], at, order=3, mode="nearest")
        count += seen
    return (total / np.maximum(count, 1)).reshape(grid.shape).astype(np.float32)


def conventional(
    stacks: list[igs.SliceStack], grid: igs.Grid, report: dict, steps: int = 150
) -> dict[str, np.ndarray]:
    """Return cubic splines, least squares and total variation, converged."""
    span = max(float(np.ptp(s.data)) for s in stacks)
    problem = StackProblem([SliceAcquisition(s, grid) for s in stacks], [s.data[..., 0] for s in stacks])
    out = {"cubic": cubic(stacks, grid)}
    out["tikhonov"] = out["cubic"].copy()
    for _ in tikhonov_steps(problem, out["tikhonov"], report["penalties"]["tikhonov"], 100):
        pass
    out["tv"] = out["tikhonov"].copy()
    for _ in tv_steps(problem, out["tv"], report["penalties"]["tv"] * span, steps):
        pass
    return out


def cell(
    truth: np.ndarray, stacks: list[igs.SliceStack], preset: str, seen: np.ndarray | None = None
) -> dict:
    """Measure one reconstruction; `seen` limits where."""
    grid = igs.Grid(truth.shape)
    started, busy = time.perf_counter(), time.process_time()
    result = igs.reconstruct_slices(stacks, grid, preset)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    where = np.ones(truth.shape, bool) if seen is None else seen
    made = conventional(stacks, grid, result.report)
    scores = {name: psnr(v[where], truth[where]) for name, v in made.items()}
    best = max(scores, key=scores.__getitem__)
    ours = psnr(result.volume[where], truth[where])
    # what the Gaussians add: the best that the conventional ones give in any convex combination
    mixed = max(
        psnr((w * made["tv"] + (1 - w) * made["tikhonov"])[where], truth[where])
        for w in np.linspace(0, 1, 11)
    )
    return {
        "product": round(ours, 3),
        **{name: round(score, 3) for name, score in scores.items()},
        "best_mixture_of_tikhonov_and_tv": round(float(mixed), 3),
        "best_conventional": best,
        "gain": round(ours - scores[best], 3),
        "gain_over_cubic": round(ours - scores["cubic"], 3),
        "ssim": round(ssim(result.volume, truth), 4),
        "ssim_best_conventional": round(ssim(made[best], truth), 4),
        "band_holds": round(float((np.abs(result.volume - truth) <= result.uncertainty)[where].mean()), 4),
        "contributions": result.report["contributions"],
        "penalties": result.report["penalties"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
    }


def cases(
    name: str, truth: np.ndarray, only: str
) -> list[tuple[str, list[igs.SliceStack], np.ndarray | None]]:
    """Name, stacks and region of each case of a volume."""
    out: list[tuple[str, list[igs.SliceStack], np.ndarray | None]] = []
    if only in ("all", "three"):
        for profile in ("box", "gaussian"):
            for noise in (0.0, 0.02, 0.05):
                stacks = [stack_of(truth, axis, 4, profile, noise) for axis in range(3)]
                out.append((f"three/{profile}/{noise:g}", stacks, None))
    if only in ("all", "single"):
        out += [(f"single/box/{k}", [stack_of(truth, 0, k)], None) for k in (2, 4, 8)]
    if only in ("all", "other"):
        for noise in (0.0, 0.02):
            two = [stack_of(truth, axis, 4, "box", noise) for axis in (0, 1)]
            out.append((f"two/box/{noise:g}", two, None))
            # the coronal stack sees the middle half of the columns, the sagittal one the upper half
            part = stack_of(truth, 1, 4, "box", noise)
            quarter = part.width // 4
            upper = stack_of(truth, 2, 4, "box", noise)
            partly = [
                two[0],
                part.crop(cols=slice(quarter, 3 * quarter)),
                upper.crop(rows=slice(0, upper.height // 2)),
            ]
            out.append((f"partly/box/{noise:g}", partly, None))
        if name == "colin27":
            for noise in (0.0, 0.02):
                wrong = [stack_of(truth, axis, 4, "box", noise, (4.0, "gaussian")) for axis in range(3)]
                out.append((f"told gaussian, was box/{noise:g}", wrong, None))
                thin = [stack_of(truth, axis, 4, "box", noise, (3.0, "box")) for axis in range(3)]
                out.append((f"told 3, was 4/{noise:g}", thin, None))
                thick = [stack_of(truth, axis, 4, "box", noise, (5.0, "box")) for axis in range(3)]
                out.append((f"told 5, was 4/{noise:g}", thick, None))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=96, help="edge of the crops")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--only", choices=("all", "three", "single", "other"), default="all")
    parser.add_argument("--name", default="thick_stacks")
    args = parser.parse_args()
    rows: dict[str, dict] = {}
    for name, volume in volumes().items():
        if name not in NAMES:
            continue
        truth = crop(volume, args.size)
        for case, stacks, seen in cases(name, truth, args.only):
            row = cell(truth, stacks, args.preset, seen)
            rows[f"{name}/{case}"] = row
            print(
                name,
                case,
                *(f"{k} {v}" for k, v in row.items() if not isinstance(v, dict)),
                sep="  ",
                flush=True,
            )
    three = [r["gain"] for k, r in rows.items() if "/three/" in k]
    noisy = [r["gain"] for k, r in rows.items() if "/three/" in k and not k.endswith("/0")]
    single = [r["gain"] for k, r in rows.items() if "/single/" in k]
    summary = {
        "three_least_gain": min(three, default=None),
        "three_noisy_mean_gain": round(float(np.mean(noisy)), 3) if noisy else None,
        "single_least_gain": min(single, default=None),
        "single_mean_gain": round(float(np.mean(single)), 3) if single else None,
    }
    print(summary)
    write(args.name, {"size": args.size, "preset": args.preset, "summary": summary, "cells": rows})


if __name__ == "__main__":
    main()
