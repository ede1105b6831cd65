"""Wall time, processor time and peak memory of thick-slice reconstructions, each in a process of its own.

Three orthogonal stacks of 4-voxel slices (box profile, 2 % noise) of 160 x 192 x 160 voxels: `fast`, `balanced`, and
`balanced` with the motion of every slice; and a part of 512^3 (three stacks, 8-voxel slices) on request.

    python benchmarks/time_thick.py                 # fast, balanced, motion
    python benchmarks/time_thick.py fast large
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np

PARTS: dict[str, tuple[tuple[int, int, int], int, dict[str, str]]] = {
    "fast": ((160, 192, 160), 4, {"preset": "fast"}),
    "balanced": ((160, 192, 160), 4, {"preset": "balanced"}),
    "motion": ((160, 192, 160), 4, {"preset": "balanced", "motion": "slice"}),
    "large": ((512, 512, 512), 8, {"preset": "fast"}),
}


def job(part: str) -> dict[str, object]:
    import resource

    from common import volumes
    from thick_stacks import stack_of

    import napari_innergs as igs
    from napari_innergs.fit.engine import Done, Failed, Preview
    from napari_innergs.fit.metrics import psnr

    shape, k, settings = PARTS[part]
    data = next(iter(volumes().values()))
    # mirrored copies have the texture of real data at any size
    pad = [(0, max(0, want - size)) for size, want in zip(data.shape, shape, strict=True)]
    truth = np.pad(data, pad, mode="symmetric")[tuple(slice(want) for want in shape)].astype(np.float32)
    stacks = [stack_of(truth, axis, k, "box", 0.02) for axis in range(3)]
    grid = igs.Grid(truth.shape)
    started, busy = time.perf_counter(), time.process_time()
    first = 0.0
    result = None
    for event in igs.fit_slices(stacks, grid, settings):
        if isinstance(event, Preview) and not first:
            first = time.perf_counter() - started
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            result = event.result
    assert result is not None
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - busy, 1),
        "first_preview_seconds": round(first, 2),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "estimated": igs.estimate_slices(stacks, grid, settings),
        "shape": list(shape),
        "psnr": round(psnr(result.volume, truth), 2),
    }


def main() -> None:
    from common import write

    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(job(sys.argv[2])))
        return
    rows = {}
    for part in sys.argv[1:] or ("fast", "balanced", "motion"):
        done = subprocess.run(
            [sys.executable, __file__, "--job", part], capture_output=True, text=True, check=True
        )
        rows[part] = json.loads(done.stdout.splitlines()[-1])
        print(part, rows[part], flush=True)
    write("time_thick", {"runs": rows})


if __name__ == "__main__":
    main()
