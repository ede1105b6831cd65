"""Compare the CPU kernels with a C++ bound on one core, and write ``benchmarks/results/kernels_cpu.json``.

Kernels only are compared (no preparation, no binning, no chain rule on either side; clearing the image is
included), in turns, in process CPU time; the ratio is the median over the rounds of the ratio within each
round. Our time with everything that a call does is reported beside it.

    python benchmarks/kernels/run.py            # needs g++
    python benchmarks/kernels/run.py --rounds 15 --only slices
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import llvmlite
import numba
import numpy as np
import torch

from napari_innergs.cpu import _planes, slices, voxels
from napari_innergs.device import set_threads
from napari_innergs.operators.slices import morton_order

HERE = Path(__file__).parent
CUT = 9.0
FLAGS = ["-O3", "-march=native", "-ffast-math", "-fPIC"]


def build(folder: str, name: str) -> ctypes.CDLL:
    """Compile a bound; linked without -ffast-math, so that loading it does not change the float mode."""
    path = Path(folder)
    subprocess.run(["g++", *FLAGS, "-c", str(HERE / name), "-o", str(path / "bound.o")], check=True)
    subprocess.run(["g++", "-shared", str(path / "bound.o"), "-o", str(path / "bound.so")], check=True)
    return ctypes.CDLL(str(path / "bound.so"))


def measure(name: str, cases: Iterable[Callable[[ctypes.CDLL], list[dict]]]) -> list[dict]:
    """Compile a bound, run each case against it on one core, and print and return the rows."""
    set_threads(1)
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        library = build(folder, name)
        for one in cases:
            for row in one(library):
                print(*(f"{k} {v}" for k, v in row.items()), sep="  ", flush=True)
                results.append(row)
    return results


def write_report(path: Path, problem: str | dict[str, str], rounds: int, results: list[dict]) -> None:
    """Write the rows with what they were measured on."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    report = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvm": ".".join(map(str, llvmlite.binding.llvm_version_info)),
        "bound": f"{compiler.splitlines()[0]} {' '.join(FLAGS)}",
        "threads": 1,
        "problem": problem,
        "method": "process CPU time, ours and the bound in turns, median ratio; kernels only on both sides",
        "rounds": rounds,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def rotations(quaternions: np.ndarray) -> np.ndarray:
    """Return rotation matrices of (w, x, y, z)."""
    w, x, y, z = quaternions.T / np.linalg.norm(quaternions, axis=1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def problem(kind: str, channels: int, n: int = 50_000) -> tuple[np.ndarray, ...]:
    """Return means, covs (axes t, row, column), amps and plane positions, in Morton order."""
    rng = np.random.default_rng(0)
    if kind == "slices":  # long across the slices, slightly tilted, any direction within them
        means = rng.uniform(0, 256, (n, 3))
        sigma = np.stack([rng.uniform(2, 6, n), rng.uniform(0.83, 2.5, n), rng.uniform(0.83, 2.5, n)], 1)
        angle, tilt, zero = rng.uniform(0, 2 * np.pi, n) / 2, rng.normal(0, 0.12, (n, 2)), np.zeros(n)
        turn = rotations(np.stack([np.cos(angle), np.sin(angle), zero, zero], 1))
        turn = rotations(np.stack([np.ones(n), zero, tilt[:, 0], tilt[:, 1]], 1)) @ turn
        t = 4 + 8 * np.arange(32)
    else:
        means = rng.uniform(0, 128, (n, 3))
        sigma = rng.uniform(0.83, 2.5, (n, 3))
        turn = rotations(rng.normal(size=(n, 4)))
        t = np.arange(128)
    s = np.einsum("nij,nj,nkj->nik", turn, sigma**2, turn)
    covs = s[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
    order = morton_order(torch.from_numpy(means)).numpy()
    amps = rng.uniform(0.1, 1, (n, channels))
    return (*(np.ascontiguousarray(x[order], np.float32) for x in (means, covs, amps)), t.astype(np.float32))


def clock(function) -> float:
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3


def paired(ours, bound, rounds: int) -> dict[str, float]:
    """Time both in turns and return medians (ms) and the median ratio."""
    for _ in range(2):
        ours(), bound()
    times = np.array([(clock(ours), clock(bound)) for _ in range(rounds)])
    ratios = times[:, 0] / times[:, 1]
    return {
        "ours_ms": round(float(np.median(times[:, 0])), 2),
        "bound_ms": round(float(np.median(times[:, 1])), 2),
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_low": round(float(ratios.min()), 3),
        "ratio_high": round(float(ratios.max()), 3),
    }


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def case(library: ctypes.CDLL, kind: str, channels: int, rounds: int) -> list[dict]:
    means, covs, amps, t = problem(kind, channels)
    n, planes = len(means), len(t)
    size = 256 if kind == "slices" else 128
    axis, slab = (1, 1) if kind == "slices" else (0, 8)
    lead = (planes, channels) if axis == 1 else (channels, planes)
    cut = ctypes.c_float(CUT)

    # The bound, in a layout of its own: padded rows, channels beside each other.
    line = size + 16
    shape = (planes, size, channels, line)
    to_bound = (0, 2, 1, 3) if axis == 1 else (1, 2, 0, 3)
    records, first, last = np.zeros((n, 12), np.float32), np.zeros(n, np.int32), np.zeros(n, np.int32)
    library.prepare(
        n,
        pointer(means),
        pointer(covs),
        pointer(t),
        planes,
        cut,
        pointer(records),
        pointer(first),
        pointer(last),
    )
    offsets = np.zeros(planes // slab + 1, np.int64)
    library.bin.restype = ctypes.c_long
    many = library.bin(n, pointer(first), pointer(last), planes, slab, pointer(offsets), None)
    members = np.zeros(many, np.int32)
    library.bin(n, pointer(first), pointer(last), planes, slab, pointer(offsets), pointer(members))
    bound_out, moments = np.zeros(shape, np.float32), np.zeros((10, n), np.float32)
    bound_amps = np.zeros_like(amps)
    common = (channels, planes, size, size, line, pointer(t), cut)

    def bound_forward() -> None:
        library.forward(
            *common,
            pointer(records),
            pointer(amps),
            slab,
            pointer(offsets),
            pointer(members),
            pointer(bound_out),
        )

    # Ours, in the layout that a call uses.
    prepared = _planes.prepare(means, covs, amps, t, size, size, CUT)
    cells = _planes.make_cells(prepared, slab)
    out = np.empty((*lead, size, size), np.float32)

    def our_forward() -> None:
        _planes.forward_kernel(prepared, cells, out, axis)

    results = [
        {"kernel": f"{kind} forward", "channels": channels, **paired(our_forward, bound_forward, rounds)}
    ]
    difference = np.abs(out.transpose(to_bound) - bound_out[..., :size])
    results[-1]["p9999_difference"] = float(f"{np.quantile(difference, 0.9999) / out.max():.1e}")

    grad = np.random.default_rng(1).normal(size=(*lead, size, size)).astype(np.float32)
    bound_grad = np.zeros(shape, np.float32)
    bound_grad[..., :size] = grad.transpose(to_bound)
    our_moments, our_amps = np.empty((n, 10), np.float32), np.empty_like(amps)

    def bound_backward() -> None:
        library.backward(
            *common, n, pointer(records), pointer(first), pointer(last), pointer(amps), pointer(bound_grad),
            pointer(moments), pointer(bound_amps),
        )  # fmt: skip

    def our_backward() -> None:
        _planes.backward_kernel(prepared, grad, axis, size, our_moments, our_amps)

    results.append(
        {"kernel": f"{kind} backward", "channels": channels, **paired(our_backward, bound_backward, rounds)}
    )
    difference = np.abs(our_amps - bound_amps)
    results[-1]["p9999_difference"] = float(f"{np.quantile(difference, 0.9999) / np.abs(our_amps).max():.1e}")

    # The whole call.
    if kind == "slices":
        whole = lambda: slices.forward(means, covs, amps, t, size, size, CUT)  # noqa: E731
        module = slices
    else:
        whole = lambda: voxels.forward(means, covs, amps, (size,) * 3, CUT)  # noqa: E731
        module = voxels
    saved = whole()[1]
    results[0]["whole_call_ms"] = round(float(np.median([clock(whole) for _ in range(rounds)])), 2)
    back = lambda: module.backward(grad, saved)  # noqa: E731
    results[1]["whole_call_ms"] = round(float(np.median([clock(back) for _ in range(rounds)])), 2)
    return results


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    widest = next((f for f in ("avx512f", "avx2", "asimd") if f in found.get("flags", "").split()), "")
    return f"{found.get('model name', platform.processor())} ({widest})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="paired measurements of each kernel")
    parser.add_argument("--only", choices=["slices", "voxels"])
    parser.add_argument("--channels", type=int, nargs="*", default=[1, 2, 4, 5], choices=[1, 2, 4, 5])
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "kernels_cpu.json")
    args = parser.parse_args()
    cases = [
        partial(case, kind=kind, channels=channels, rounds=args.rounds)
        for kind in ("slices", "voxels")
        for channels in args.channels
        if args.only in (None, kind)
    ]
    problems = {
        "slices": "50,000 Gaussians, 32 slices of 256 x 256, squared radius 9",
        "voxels": "50,000 Gaussians, 128 x 128 x 128 voxels, squared radius 9",
        "channels": "1 and 4: additive field; 2 and 5: the sums of a normalised field of 1 and 4 values",
    }
    write_report(args.output, problems, args.rounds, measure("bound.cpp", cases))


if __name__ == "__main__":
    main()
