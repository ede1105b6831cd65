"""Compare the kernels for photographs with a C++ bound on one core.

Writes ``benchmarks/results/kernels_rgb_cpu.json``. Kernels only are compared (no projection, no lists, no chain rule
on either side; clearing and writing the image is included), in turns, in process CPU time; the ratio is the median
over the rounds of the ratio within each round. What a whole call of the operator needs, with all gradients, is
reported beside it. The differences include pixels at the rim of a support, where an opacity comes or goes.

    python benchmarks/kernels/run_rgb.py            # needs g++
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

from napari_innergs.cpu import rgb
from napari_innergs.operators import rgb as operator

HERE = Path(__file__).parent
SIZE = (200, 200)
#: Standard deviations of the Gaussians, least and greatest, and how deep below the surface they are, both in a ball
#: whose radius is 60 and 80 pixels.
SCENES = {"shell, fine": (0.4, 2.0, 0.1), "shell, coarse": (1.0, 4.0, 0.1), "filled": (0.4, 2.0, 1.0)}


def problem(scene: str, n: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return means, covs, opacities and colours of a ball, a camera in front of it and its lens."""
    low, high, deep = SCENES[scene]
    rng = np.random.default_rng(0)
    towards = rng.normal(size=(n, 3))
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    means = 60 * towards * (1 - deep * rng.random((n, 1)) ** 2)
    sigma = np.exp(rng.uniform(math.log(low), math.log(high), (n, 3)))
    turn = rotations(rng.normal(size=(n, 4)))
    s = (turn * sigma[:, None] ** 2) @ turn.transpose(0, 2, 1)
    covs = s[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    arrays = means, covs, rng.uniform(0.05, 1, n), rng.random((n, 3))
    pose = torch.tensor([[0.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 300], [0, 0, 0, 1]], dtype=torch.float64)
    lens = torch.tensor([[400.0, 0, 99.5], [0, 400, 99.5], [0, 0, 1]], dtype=torch.float64)
    return [torch.from_numpy(np.ascontiguousarray(x, np.float32)) for x in arrays], pose, lens


def case(library: ctypes.CDLL, name: str, n: int, rounds: int) -> list[dict]:
    tensors, pose, lens = problem(name, n)
    with torch.no_grad():
        splats, depths = operator.project_splats(*tensors[:3], pose, lens, SIZE, True)
    limits = operator.LEAST, operator.MOST, operator.STOP
    arrays = [x.float().contiguous().numpy() for x in (splats, tensors[3], depths)]
    scene = rgb.prepare(*arrays, SIZE, limits)
    out, used = np.empty_like(scene.out), np.empty_like(scene.used)
    floats = [ctypes.c_float(x) for x in limits]
    cells = len(scene.used), -(-SIZE[1] // rgb.CELL), *SIZE
    lists = [pointer(x) for x in (scene.records, scene.colours, scene.begins, scene.members)]

    def bound_forward() -> None:
        library.forward(*cells, *lists, pointer(used), *floats, pointer(out))

    results = [{"scene": name, "kernel": "forward"}]
    results[0] |= paired(lambda: rgb.forward_kernel(scene), bound_forward, rounds)
    results[0]["listed"] = len(scene.members)
    results[0]["drawn"] = int((scene.used - scene.begins[:-1]).sum())
    results[0]["mean_opacity"] = round(float(out[3].mean()), 3)
    results[0]["largest_difference"] = float(f"{np.abs(out - scene.out).max():.1e}")

    grad = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
    sums = np.zeros(len(scene.members) * rgb.SUMS, np.float32)
    bound_sums = np.zeros_like(sums)

    def bound_backward() -> None:
        library.backward(
            *cells, *lists, pointer(used), pointer(scene.places), *floats, pointer(out), pointer(grad),
            pointer(bound_sums),
        )  # fmt: skip

    results.append({"scene": name, "kernel": "backward"})
    results[1] |= paired(lambda: rgb.backward_kernel(scene, grad, sums), bound_backward, rounds)
    apart, scale = (np.abs(x).reshape(-1, rgb.SUMS)[:, :9].max(0) for x in (sums - bound_sums, bound_sums))
    results[1]["largest_difference"] = float(f"{(apart / scale).max():.1e}")

    leaves = [x.requires_grad_() for x in tensors]
    render = lambda: operator.render_rgb(*leaves, pose, lens, SIZE)[0]  # noqa: E731
    image, weights = render(), torch.from_numpy(grad[:3]).permute(1, 2, 0)
    results[0]["whole_call_ms"] = round(float(np.median([clock(render) for _ in range(rounds)])), 2)
    back = lambda: torch.autograd.grad(image, leaves, weights, retain_graph=True)  # noqa: E731
    results[1]["whole_call_ms"] = round(float(np.median([clock(back) for _ in range(rounds)])), 2)
    total = {
        key: round(sum(row[key] for row in results), 2) for key in ("ours_ms", "bound_ms", "whole_call_ms")
    }
    results.append({"scene": name, "kernel": "both", **total})
    results[2]["ratio"] = round(total["ours_ms"] / total["bound_ms"], 3)
    results[2]["whole_call_to_bound"] = round(total["whole_call_ms"] / total["bound_ms"], 3)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="paired measurements of each kernel")
    parser.add_argument("--count", type=int, default=20_000, help="Gaussians")
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "kernels_rgb_cpu.json")
    args = parser.parse_args()
    text = f"{args.count:,} Gaussians in a ball 160 pixels wide, one view of 200 x 200, three channels"
    cases = [partial(case, name=name, n=args.count, rounds=args.rounds) for name in SCENES]
    write_report(args.output, text, args.rounds, measure("rgb_bound.cpp", cases))


if __name__ == "__main__":
    main()
