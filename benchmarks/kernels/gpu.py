"""Time the CUDA kernels on a GPU against the CPU backend, and write ``benchmarks/results/kernels_gpu.json``.

Whole calls of the backends, forward and backward, as medians of CUDA events, tensors on the GPU beforehand. The
bound is what the GPU would need if it did nothing but issue the instructions of the inner loops: pairs of a
Gaussian and a pixel inside its support, times instructions for a pair, over lanes, multiprocessors and clock.
Photographs have none, since what is hidden is not drawn. The CPU backend is timed on two threads. Then the projector
of voxels: its kernels with everything on the GPU, and its calls, which take arrays there and back. At the end a whole
slice reconstruction, 64 slices of 256 x 256 to 256 planes.

    python benchmarks/kernels/gpu.py                   # needs an NVIDIA GPU, see docs/gpu.md
    python benchmarks/kernels/gpu.py --most 200000 --skip-cpu
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from napari_innergs.device import describe_device, find_cuda, set_deterministic, set_threads
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.operators.rgb import render_rgb
from napari_innergs.operators.slices import morton_order, render_slices
from napari_innergs.operators.voxels import voxelise
from napari_innergs.operators.xray import render_xray

RESULT = Path(__file__).parents[1] / "results" / "kernels_gpu.json"
CUT = 9.0
STEP = 8  # pixels between slices
COUNTS = (50_000, 200_000, 1_000_000)
SIZES: dict[str, list[tuple[int, int, int]]] = {
    "slices": [(32, 256, 256), (64, 512, 512)],
    "voxels": [(128, 128, 128), (256, 256, 256), (512, 512, 512)],
    "xray": [(32, 256, 256), (8, 512, 512)],  # views, rows, columns
    "rgb": [(1, 200, 200), (1, 800, 800)],
}
VOXELS = (128, 256, 512)  # edges of cubes that are projected onto panels as large, in VIEWS views
VIEWS = 8
# Instructions of the inner loop for a pair, counted in the text: the distance, the limit, exp2, loop and
# address, and then what each channel takes.
INSTRUCTIONS = {
    "slices": {"forward": (9, 3), "backward": (12, 4)},
    "voxels": {"forward": (9, 3), "backward": (12, 4)},
    "xray": {"forward": (15, 3), "backward": (30, 4)},
}
LANES = 128  # of a multiprocessor, on all architectures since sm_70 in single precision except sm_80 (64)


def problem(
    kind: str, shape: tuple[int, int, int], n: int, channels: int
) -> tuple[list[torch.Tensor], float | None]:
    """Return means, covs, amps in Morton order, and the expected number of pairs (None: not known)."""
    rng = torch.Generator().manual_seed(0)
    if kind == "rgb":  # the surface of a ball that fills most of the image
        channels = 3
        means = torch.nn.functional.normalize(torch.randn(n, 3, generator=rng), dim=1) * (0.4 * shape[1])
    else:
        depth = {"slices": shape[0] * STEP, "xray": shape[1]}.get(kind, shape[0])
        means = torch.rand(n, 3, generator=rng) * torch.tensor([depth, *shape[1:]])
    low, high = torch.tensor([0.83] * 3), torch.tensor([2.5] * 3)
    if kind == "slices":  # long across the slices
        low[0], high[0] = 2.0, 6.0
    sigma = low + (high - low) * torch.rand(n, 3, generator=rng)
    turn = torch.linalg.qr(
        torch.randn(n, 3, 3, generator=rng) * (0.12 if kind == "slices" else 1) + torch.eye(3)
    )[0]
    s = turn @ torch.diag_embed(sigma**2) @ turn.transpose(1, 2)
    covs = s[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]].contiguous()
    amps = torch.rand(n, channels, generator=rng)
    order = morton_order(means)
    tensors = [x[order].contiguous() for x in (means, covs, amps)]
    if kind == "rgb":
        return tensors, None
    if kind == "xray":  # an ellipse in each view, one pixel to a voxel
        return tensors, shape[0] * math.pi * CUT * float((sigma * sigma.roll(1, 1)).double().mean(1).sum())
    pairs = 4 / 3 * math.pi * CUT**1.5 * float(sigma.prod(1).double().sum())
    return tensors, pairs / (STEP if kind == "slices" else 1)


def radiographs(shape: tuple[int, int, int]) -> torch.Tensor:
    """Return views from all around of a cube of as many voxels as a view has rows; one pixel to a voxel."""
    edge = float(shape[1])
    middle, distance, rows = (edge - 1) / 2, 2 * edge, []
    for k in range(shape[0]):
        a = 2 * math.pi * k / shape[0] + 0.1
        out, along = np.array([0, math.sin(a), math.cos(a)]), np.array([0, math.cos(a), -math.sin(a)])
        u, v = 1.5 * along, np.array([1.5, 0, 0])
        corner = middle - out * distance / 2 - (shape[2] - 1) / 2 * u - (shape[1] - 1) / 2 * v
        rows.append(np.concatenate([middle + out * distance, corner, u, v]))
    return torch.tensor(np.array(rows))


def operator(kind: str, shape: tuple[int, int, int], backend: str) -> Callable[..., torch.Tensor]:
    if kind == "voxels":
        return lambda *x: voxelise(*x, shape, cut=CUT, backend=backend)
    if kind == "xray":
        vectors = radiographs(shape).to(backend)
        return lambda *x: render_xray(*x, vectors, shape[1:], cut=CUT, backend=backend)
    if kind == "rgb":
        size = float(shape[1])
        pose = torch.tensor([[0.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 2 * size], [0, 0, 0, 1]]).double()
        lens = torch.tensor([[2 * size, 0, size / 2], [0, 2 * size, size / 2], [0, 0, 1]]).double()
        pose, lens = pose.to(backend), lens.to(backend)
        return lambda *x: render_rgb(*x[:2], x[2][:, 0], x[2], pose, lens, shape[1:], backend=backend)[0]
    positions = STEP * torch.arange(float(shape[0]), device=backend)
    return lambda *x: render_slices(*x, positions, shape[1:], cut=CUT, backend=backend)


def clock_gpu(function: Callable[[], Any], rounds: int) -> float:
    """Return the median in milliseconds between CUDA events around a call."""
    times = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def clock_cpu(function: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def passes(tensors: list[torch.Tensor], run: Callable[..., torch.Tensor]) -> dict[str, Callable[[], Any]]:
    leaves = [x.requires_grad_() for x in tensors]
    out = run(*leaves)
    grad = torch.ones_like(out)

    def forward() -> None:
        with torch.no_grad():
            run(*leaves)

    return {"forward": forward, "backward": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)}


def issue_rate(device: torch.device) -> float:
    """Return how many instructions of single lanes the GPU issues in a millisecond."""
    import cupy

    about = torch.cuda.get_device_properties(device)
    lanes = 64 if (about.major, about.minor) in ((7, 0), (7, 5), (8, 0)) else LANES
    return about.multi_processor_count * lanes * cupy.cuda.Device(device.index).attributes["ClockRate"]


def case(
    kind: str, shape: tuple[int, int, int], n: int, args: argparse.Namespace, where: str
) -> list[dict[str, Any]]:
    rows = []
    tensors, pairs = problem(kind, shape, n, args.channels)
    gpu = passes([x.to(where) for x in tensors], operator(kind, shape, where))
    cpu = None if args.skip_cpu or n > args.most_cpu else passes(tensors, operator(kind, shape, "cpu"))
    for name in gpu:
        ms = clock_gpu(gpu[name], args.rounds)
        channels = tensors[2].shape[1]
        row = {"operator": kind, "shape": shape, "gaussians": n, "channels": channels, "pass": name}
        row["ms"] = round(ms, 4)
        if pairs is not None:
            fixed, each = INSTRUCTIONS[kind][name]
            bound = pairs * (fixed + each * channels) / issue_rate(torch.device(where))
            row |= {"bound_ms": round(bound, 4), "share_of_bound": round(bound / ms, 3)}
        if name == "forward":
            set_deterministic(True)
            row["deterministic_ms"] = round(clock_gpu(gpu[name], args.rounds), 4)
            set_deterministic(False)
        if cpu is not None:
            row["cpu_ms"] = round(clock_cpu(cpu[name], 3), 2)
            row["times_the_cpu"] = round(row["cpu_ms"] / ms, 1)
        rows.append(row)
    return rows


def projector(n: int, args: argparse.Namespace, where: str) -> list[dict[str, Any]]:
    """Time the projector of voxels: a cone beam around a cube."""
    from napari_innergs.cuda import project

    angles = 0.1 + np.arange(VIEWS) * 2 * math.pi / VIEWS
    geometry = ConeBeam.circular(
        angles, source_origin=3.0 * n, source_detector=4.5 * n, detector_shape=(n, n), pixel_size=1.5
    )
    affine = np.eye(4)
    affine[:3, 3] = -(n - 1) / 2
    grid = Grid((n, n, n), affine)
    frames, linear = geometry.to_index_frame(grid), grid.affine[:3, :3]
    rays, views = project.prepare(frames, linear, grid.shape, (n, n), False), np.arange(VIEWS)
    arrays = [np.random.default_rng(0).random(s, np.float32) for s in (grid.shape, (VIEWS, n, n))]
    volume, data = (torch.from_numpy(x).to(where) for x in arrays)
    scans = {name: VoxelProjector(geometry, grid, name) for name in (where, "cpu")}
    rows = []
    for name, kernels, array, call in (
        ("forward", lambda: project.forward(volume, rays, views), arrays[0], "apply"),
        ("transpose", lambda: project.adjoint(data, rays, views), arrays[1], "adjoint"),
    ):
        row: dict[str, Any] = {"operator": "project", "shape": (VIEWS, n, n), "voxels": n**3, "pass": name}
        row["ms"] = round(clock_gpu(kernels, args.rounds), 4)
        row["call_ms"] = round(clock_cpu(lambda c=call, a=array: getattr(scans[where], c)(a), args.rounds), 3)
        if not args.skip_cpu:
            row["cpu_ms"] = round(clock_cpu(lambda c=call, a=array: getattr(scans["cpu"], c)(a), 3), 2)
            row["times_the_cpu"] = round(row["cpu_ms"] / row["call_ms"], 1)
        rows.append(row)
    return rows


def reconstruction(where: str) -> dict[str, Any]:
    """Time a reconstruction of 256 planes of 256 x 256 from every fourth one."""
    import napari_innergs as igs

    z, y, x = np.mgrid[0:256:4, 0:256, 0:256].astype(np.float32)
    values = np.sin((x + 0.5 * z) / 9) * np.cos(y / 11) + np.exp(
        -((x - 128) ** 2 + (y - 100 - z / 4) ** 2) / 900
    )
    stack = igs.SliceStack(values.astype(np.float32), affine=np.diag([4.0, 1, 1, 1]), units="mm")
    out = {}
    for name in (where, "cpu"):
        start = time.perf_counter()
        igs.reconstruct_slices(stack, device=name)
        out[name] = round(time.perf_counter() - start, 2)
    return {"slices": values.shape, "preset": "balanced", "seconds": out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--most", type=int, default=max(COUNTS), help="largest number of Gaussians")
    parser.add_argument("--most-cpu", type=int, default=200_000, help="the same for the CPU")
    parser.add_argument("--skip-cpu", action="store_true")
    parser.add_argument("--skip-reconstruction", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    try:
        where = describe_device(args.device).name
    except RuntimeError as error:
        sys.exit(str(error))
    set_threads(2)
    torch.cuda.set_device(where)
    results = []
    for kind, shapes in SIZES.items():
        for shape in shapes:
            for n in COUNTS:
                if n > args.most:
                    continue
                for row in case(kind, shape, n, args, where):
                    print(*(f"{k} {v}" for k, v in row.items()), sep="  ", flush=True)
                    results.append(row)
                torch.cuda.empty_cache()
    for n in VOXELS:
        for row in projector(n, args, where):
            print(*(f"{k} {v}" for k, v in row.items()), sep="  ", flush=True)
            results.append(row)
        torch.cuda.empty_cache()
    found = find_cuda()
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "gpu": found.gpus[int(where[5:])],
        "driver_cuda": found.driver_cuda,
        "torch": found.torch,
        "cupy": found.cupy,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_threads": 2,
        "method": "whole calls; median of CUDA events on the GPU, of wall-clock time on the CPU; squared radius 9",
        "results": results,
    }
    if not args.skip_reconstruction:
        report["reconstruction"] = reconstruction(where)
        print(report["reconstruction"])
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
