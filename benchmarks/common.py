"""Shared by the benchmark scripts: data, metrics, and where results go.

Data: the folder in INNERGS_DATA with `vol/*.npz` (key `data`), else the crops shipped as samples.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path

import numpy as np

from napari_innergs.fit.engine import thread_count
from napari_innergs.tasks.versions import versions

RESULTS = Path(__file__).parent / "results"
VOLUMES = {
    "colin27": "colin27_t1_1mm",
    "chest": "ts_chest_ct_1p5mm",
    "bone": "qim3d_bone_128",
    "nuclei": "cellseg3d_mesospim_nuclei",
}


def volumes() -> dict[str, np.ndarray]:
    """Name to volume (z, y, x), float32."""
    folder = os.environ.get("INNERGS_DATA")
    if folder:
        found = {name: Path(folder) / "vol" / f"{file}.npz" for name, file in VOLUMES.items()}
        return {
            name: np.load(path)["data"].astype(np.float32) for name, path in found.items() if path.exists()
        }
    from napari_innergs.samples import _volumes

    return {name: _volumes.volume(name).data.astype(np.float32) for name in ("brain", "bone")}


def two_channels() -> np.ndarray:
    """Two-channel volume (z, y, x, 2), float32."""
    folder = os.environ.get("INNERGS_DATA")
    if folder:
        data = np.load(Path(folder) / "vol" / "cellfinder_2ch_256.npz")["data"]
        return np.moveaxis(data, 0, -1).astype(np.float32)
    from napari_innergs.samples import _volumes

    return _volumes.volume("cells").data.astype(np.float32)


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": model,
        "cores": thread_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "data": "INNERGS_DATA" if os.environ.get("INNERGS_DATA") else "shipped samples",
    }


def write(name: str, content: dict[str, object]) -> None:
    """Write benchmarks/results/NAME.json with the machine."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), **content}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
