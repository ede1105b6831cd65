"""Thin stacks: the product against nearest, linear, cubic, PCHIP and two flow interpolations.

Every k-th slice of a volume is kept; PSNR (peak = range of the truth on the held-out slices) and SSIM are
computed on the slices between the first and the last kept one that were left out. One rule for all volumes.

    python benchmarks/thin_stack.py                     # 4 volumes x k = 2, 4, 8
    python benchmarks/thin_stack.py --noise 0.04 --k 4  # with noise, against interpolators on denoised slices
    python benchmarks/thin_stack.py --preset innergs-paper --k 4 --no-ablation --name innergs_paper
                            # "gaussians-additive" is that recipe by itself
"""

from __future__ import annotations

import argparse

import numpy as np
from common import two_channels, volumes, write

import napari_innergs as igs
from napari_innergs.fit.metrics import psnr, ssim

CONVENTIONAL = ("nearest", "linear", "cubic", "pchip", "flow-dis", "flow-tvl1")


def reconstruct(volume: np.ndarray, k: int, config: igs.SliceConfig) -> tuple[igs.Reconstruction, np.ndarray]:
    """Reconstruct from every k-th slice; also return the indices of the held-out slices."""
    stack = igs.SliceStack(volume, affine=np.eye(4)).keep_every(k)
    planes = (stack.n_slices - 1) * k + 1
    grid = igs.Grid((planes, *volume.shape[1:3]), np.eye(4))
    return igs.reconstruct_slices(stack, grid, config, keep_candidates=True), np.array(
        [i for i in range(planes) if i % k]
    )


def singles(result: igs.Reconstruction, held: np.ndarray) -> dict[str, np.ndarray]:
    """Every candidate by itself on the held-out slices."""
    at = held.astype(float)
    return {name: result.candidate(name, at) for name in result.report["contributions"]}


def cell(
    volume: np.ndarray, k: int, config: igs.SliceConfig, noise: float, ablate: bool
) -> dict[str, object]:
    """Measure one volume at one k."""
    given = volume
    if noise:
        random = np.random.default_rng(0)
        given = volume + random.normal(0, noise * np.ptp(volume), volume.shape).astype(np.float32)
    result, held = reconstruct(given, k, config)
    truth = volume[held]
    every = singles(result, held)
    scores = {name: psnr(planes[..., 0], truth) for name, planes in every.items()}
    best = max(CONVENTIONAL, key=scores.__getitem__)
    ours = result.volume[held]
    inside = np.abs(ours - given[held]) <= result.uncertainty[held]
    row = {
        "psnr": {name: round(value, 3) for name, value in scores.items()},
        "product": round(psnr(ours, truth), 3),
        "best_conventional": best,
        "gain": round(psnr(ours, truth) - scores[best], 3),
        "ssim": round(ssim(ours, truth), 4),
        "ssim_best_conventional": round(ssim(every[best][..., 0], truth), 4),
        "coverage_90": round(float(inside.mean()), 4),
        "heldout_estimate": result.report["heldout"],
        "contributions": {name: round(value, 3) for name, value in result.report["contributions"].items()},
        "denoised": result.report["noise"]["denoised"],
        "n_gaussians": result.report["n_gaussians"],
    }
    if ablate:
        without, _ = reconstruct(given, k, config.model_copy(update={"gaussians": ()}))
        row["product_without_gaussians"] = round(psnr(without.volume[held], truth), 3)
    return row


def channels(config: igs.SliceConfig) -> dict[str, object]:
    """Two channels at once against each alone, every second slice."""
    volume = two_channels()
    both, held = reconstruct(volume, 2, config)
    out = {}
    for c in range(2):
        alone, _ = reconstruct(np.ascontiguousarray(volume[..., c]), 2, config)
        truth = volume[held][..., c]
        out[f"channel {c}"] = {
            "together": round(psnr(both.volume[held][..., c], truth), 3),
            "alone": round(psnr(alone.volume[held], truth), 3),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--k", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation as a share of the range")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--volumes", nargs="*", help="names; default all")
    parser.add_argument("--channels", action="store_true", help="two channels instead")
    parser.add_argument("--no-ablation", action="store_true")
    parser.add_argument("--name", help="name of the result file")
    options = parser.parse_args()
    config = igs.SliceConfig.preset(options.preset)
    # the conventional methods are always measured, whether or not the preset uses them
    config = config.model_copy(update={"methods": CONVENTIONAL, "uncertainty": True})
    if options.channels:
        out = channels(config)
        print(out)
        write(options.name or "two_channels", {"preset": options.preset, "cells": out})
        return
    cells = {}
    for name, volume in volumes().items():
        if options.volumes and name not in options.volumes:
            continue
        for k in options.k:
            row = cell(volume, k, config, options.noise, not options.no_ablation)
            cells[f"{name} k={k}"] = row
            print(
                f"{name:8s} k={k} product {row['product']:.2f} best {row['best_conventional']} "
                f"gain {row['gain']:+.2f} without Gaussians {row.get('product_without_gaussians')} "
                f"coverage {row['coverage_90']:.3f} "
                f"ssim {row['ssim']:.4f} against {row['ssim_best_conventional']:.4f}",
                flush=True,
            )
    gains = [row["gain"] for row in cells.values()]
    summary = {"mean_gain": round(float(np.mean(gains)), 3), "least_gain": min(gains)}
    if not options.no_ablation:
        earned = [row["product"] - row["product_without_gaussians"] for row in cells.values()]
        summary["mean_earned_by_gaussians"] = round(float(np.mean(earned)), 3)
    coverage = [row["coverage_90"] for row in cells.values()]
    summary |= {"least_coverage": min(coverage), "most_coverage": max(coverage)}
    print(summary)
    name = options.name or ("thin_stack_noise" if options.noise else "thin_stack")
    write(name, {"preset": options.preset, "noise": options.noise, "summary": summary, "cells": cells})


if __name__ == "__main__":
    main()
