"""Wall time, first preview, peak memory and cost per voxel of slice reconstructions, each in a process of its own.

    python benchmarks/time_memory.py            # everything
    python benchmarks/time_memory.py fast large # some parts

Parts: import, fast, balanced, first (first preview with an empty kernel cache), scaling, large (512^3).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

PARTS = ("import", "fast", "balanced", "first", "scaling", "large")


def job(shape: tuple[int, int, int], k: int, preset: str, spawned: float) -> dict[str, float]:
    """Reconstruct in this process; shape is that of the output, every k-th plane of it is given."""
    import resource

    from common import volumes

    import napari_innergs as igs
    from napari_innergs.fit.engine import Done, Preview

    data = next(iter(volumes().values()))
    if shape[0] <= 145 and all(size >= want for size, want in zip(data.shape, shape, strict=True)):
        start = [(size - want) // 2 for size, want in zip(data.shape, shape, strict=True)]
        data = data[tuple(slice(s, s + want) for s, want in zip(start, shape, strict=True))]
    else:
        # mirrored copies have the texture of real data at any size
        pad = [(0, max(0, want - size)) for size, want in zip(data.shape, shape, strict=True)]
        data = np.pad(data, pad, mode="symmetric")[tuple(slice(want) for want in shape)]
    slices = np.ascontiguousarray(data[::k]).astype(np.uint8)
    del data
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    stack = igs.SliceStack(slices, np.diag([float(k), 1, 1, 1]))
    grid = igs.Grid((shape[0] // k * k if k > 1 else shape[0], *shape[1:]), np.eye(4))
    preview = since_start = 0.0
    for event in igs.fit_slices(stack, grid, preset):
        if isinstance(event, Preview) and not preview:
            preview, since_start = time.perf_counter() - started, time.time() - spawned
        if isinstance(event, Done):
            result = event.result
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "first_preview_seconds": round(preview, 2),
        "first_preview_seconds_with_start_of_python_and_reading": round(since_start, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes_before": base * 1024,
        "estimated": igs.estimate_slices(stack, grid, preset),
        "voxels": int(np.prod(result.volume.shape)),
        "n_gaussians": result.report["n_gaussians"],
        "shape": list(result.volume.shape),
    }


def spawn(shape: tuple[int, int, int], k: int, preset: str, **environment: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--job", json.dumps([shape, k, preset, time.time()])]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def import_seconds() -> dict[str, float]:
    code = "import time; t = time.perf_counter(); import napari_innergs; print(time.perf_counter() - t)"
    runs = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    return {"seconds": round(float(np.median(runs)), 4)}


def main() -> None:
    from common import RESULTS, write

    path = RESULTS / "time_memory.json"
    out = json.loads(path.read_text()) if path.exists() else {}
    out.pop("machine", None)
    for part in sys.argv[1:] or PARTS:
        if part == "import":
            out[part] = import_seconds()
        elif part in ("fast", "balanced"):
            spawn((33, 64, 64), 4, part)  # fills the kernel cache
            out[part] = spawn((145, 194, 162), 4, part)
        elif part == "first":
            with tempfile.TemporaryDirectory() as cache:
                out[part] = spawn((145, 194, 162), 4, "balanced", NUMBA_CACHE_DIR=cache)
        elif part == "scaling":
            sizes = {n: spawn((n, n, n), 4, "fast") for n in (128, 256, 384)}
            cost = {n: row["cpu_seconds"] / row["voxels"] for n, row in sizes.items()}
            out[part] = {
                "sizes": sizes,
                "cpu_microseconds_per_voxel": {n: round(1e6 * c, 4) for n, c in cost.items()},
                "growth_128_to_384": round(cost[384] / cost[128], 3),
            }
        elif part == "large":
            out[part] = spawn((512, 512, 512), 4, "balanced")
        else:
            raise SystemExit(f"unknown part {part!r}: use {', '.join(PARTS)}")
        print(part, json.dumps(out[part]), flush=True)
        write("time_memory", out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        arguments = json.loads(sys.argv[2])
        print(json.dumps(job(tuple(arguments[0]), *arguments[1:])))
    else:
        main()
