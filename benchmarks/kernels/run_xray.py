"""Compare the radiograph kernels with a C++ bound on one core.

Writes ``benchmarks/results/kernels_xray_cpu.json``. Kernels only are compared (no preparation, no lists, no chain
rule on either side; clearing the image is included), in turns, in process CPU time; the ratio is the median over
the rounds of the ratio within each round. The bound takes the same decisions (which Gaussians are stepped, which
are evaluated pixel by pixel); what it needs when it evaluates all of them pixel by pixel is reported beside it, and
our time with everything that a call does. The differences include pixels at the rim of a support.

    python benchmarks/kernels/run_xray.py            # needs g++
"""

from __future__ import annotations

import argparse
import ctypes
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from run import clock, measure, paired, pointer, rotations, write_report

from napari_innergs._constants import CUT_2D
from napari_innergs.cpu import xray
from napari_innergs.operators.slices import morton_order
from napari_innergs.operators.xray import NEAR, panel_frames

HERE = Path(__file__).parent
SIZE = (160, 160)
#: Distance of the source from the middle of a volume of 128 voxels (in voxels), or None for parallel rays.
BEAMS = {"cone, 9 degrees": 500.0, "cone, 22 degrees": 185.0, "parallel": None}


def problem(distance: float | None, n: int, views: int) -> tuple[np.ndarray, ...]:
    """Return means, covs, amps in Morton order, and the frames of the views."""
    rng = np.random.default_rng(0)
    means = rng.uniform(-55, 55, (n, 3))
    sigma = np.exp(rng.uniform(math.log(0.7), math.log(2.5), (n, 3)))
    turn = rotations(rng.normal(size=(n, 4)))
    s = (turn * sigma[:, None] ** 2) @ turn.transpose(0, 2, 1)
    covs = s[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    order = morton_order(torch.from_numpy(means)).numpy()
    amps = rng.uniform(0.1, 1, (n, 1))
    rows = []
    for a in np.arange(views) * (2 * math.pi / views) + 0.1:
        out, along = np.array([0, math.sin(a), math.cos(a)]), np.array([0, math.cos(a), -math.sin(a)])
        far = 1.0 if distance is None else 1.5
        u, v = along * far, np.array([far, 0, 0])
        corner = -out * (0 if distance is None else distance / 2) - u * 79.5 - v * 79.5
        rows.append(np.concatenate([-out if distance is None else out * distance, corner, u, v]))
    frames = panel_frames(torch.tensor(np.array(rows)), "parallel" if distance is None else "cone").numpy()
    return (*(np.ascontiguousarray(x[order], np.float32) for x in (means, covs, amps)), frames)


def case(library: ctypes.CDLL, beam: str, n: int, views: int, rounds: int) -> list[dict]:
    height, width = SIZE
    distance = BEAMS[beam]
    means, covs, amps, frames = problem(distance, n, views)
    g = xray.gather(means, covs, amps, frames, distance is not None, True, SIZE, CUT_2D, NEAR)
    ready = xray.prepare(g, 0, views)
    cells = xray.make_cells(g, ready)
    band, bands, offsets, members = cells
    out = np.empty((views, 1, *SIZE), np.float32)
    line = width + 16
    bound_out = np.zeros((views, height, line), np.float32)
    cut = ctypes.c_float(CUT_2D)
    records = ready.records.reshape(views, n, xray.FIELDS)

    def bound_forward(exact: int = 0) -> None:
        for k in range(views):
            library.forward(
                exact, height, width, line, band, pointer(offsets[k * bands :]), pointer(members),
                pointer(records[k]), pointer(amps), cut, pointer(bound_out[k]),
            )  # fmt: skip

    def our_forward() -> None:
        xray.forward_kernel(g, ready, cells, out)

    met = ready.bottom > ready.top
    area = math.pi * records[..., 13] * records[..., 16]
    pairs = float(area[met].sum())
    stepped = float(area[met & (records[..., 17] >= 0)].sum()) / pairs
    results = [{"beam": beam, "kernel": "forward", **paired(our_forward, bound_forward, rounds)}]
    results[0]["pairs"] = round(pairs)
    results[0]["share_stepped"] = round(stepped, 3)
    results[0]["ns_per_pair"] = round(1e6 * results[0]["ours_ms"] / pairs, 3)
    exact_ms = np.median([clock(lambda: bound_forward(1)) for _ in range(rounds)])
    results[0]["bound_all_exact_ms"] = round(float(exact_ms), 2)
    difference = np.abs(out[:, 0] - bound_out[..., :width]).max() / out.max()
    results[0]["largest_difference_to_all_exact"] = float(f"{difference:.1e}")

    grad = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
    behind = xray.padded(grad)
    sums, totals = np.zeros((views, n, xray.SUMS), np.float32), np.zeros((views, n), np.float32)
    bound_sums = np.zeros_like(sums)

    def bound_backward(exact: int = 0) -> None:
        for k in range(views):
            library.backward(
                exact, n, height, width, line, pointer(ready.top[k]), pointer(ready.bottom[k]),
                pointer(records[k]), cut, pointer(behind[k]), pointer(bound_sums[k]),
            )  # fmt: skip

    def our_backward() -> None:
        xray.backward_kernel(g, ready, behind, (0, 1), sums.reshape(-1), totals.reshape(-1))

    results.append({"beam": beam, "kernel": "backward", **paired(our_backward, bound_backward, rounds)})
    results[1]["ns_per_pair"] = round(1e6 * results[1]["ours_ms"] / pairs, 3)
    exact_ms = np.median([clock(lambda: bound_backward(1)) for _ in range(rounds)])
    results[1]["bound_all_exact_ms"] = round(float(exact_ms), 2)
    scale = np.abs(sums).max((0, 1))
    difference = float((np.abs(sums - bound_sums).max((0, 1)) / scale)[:6].max())
    results[1]["largest_difference_to_all_exact"] = float(f"{difference:.1e}")

    whole = lambda: xray.forward(means, covs, amps, frames, distance is not None, True, SIZE, CUT_2D, NEAR)  # noqa: E731
    saved = whole()[1]
    results[0]["whole_call_ms"] = round(float(np.median([clock(whole) for _ in range(rounds)])), 2)
    back = lambda: xray.backward(grad, saved, False)  # noqa: E731
    back()
    results[1]["whole_call_ms"] = round(float(np.median([clock(back) for _ in range(rounds)])), 2)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="paired measurements of each kernel")
    parser.add_argument("--count", type=int, default=30_000, help="Gaussians")
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "kernels_xray_cpu.json")
    args = parser.parse_args()
    text = (
        f"{args.count:,} Gaussians (standard deviations 0.7 to 2.5 voxels) in 110^3 voxels, {args.views} "
        "views of 160 x 160, one channel"
    )
    cases = [partial(case, beam=beam, n=args.count, views=args.views, rounds=args.rounds) for beam in BEAMS]
    write_report(args.output, text, args.rounds, measure("xray_bound.cpp", cases))


if __name__ == "__main__":
    main()
