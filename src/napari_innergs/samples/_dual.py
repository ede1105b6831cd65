"""X-rays and photographs of a tooth; `data/NOTICE.md` says how they were made."""

from __future__ import annotations

from importlib import resources
from typing import Any

import numpy as np

LayerData = tuple[Any, dict[str, Any], str]

_SCAN: dict[str, Any] = {
    "mode": "cone",
    "DSO": 100.0,
    "DSD": 150.0,
    "dDetector": [0.75, 0.75],
    "nVoxel": [64, 64, 64],
    "dVoxel": [0.5, 0.5, 0.5],
    "units": "mm",
}
# Photographs are drawn as high as the panel, and so far beside it, in its widths.
_ASIDE = 1.06


def tooth() -> list[LayerData]:
    """Return a cone-beam scan of a tooth, 25 views, and 24 photographs of it, in a world of their own.

    The layers' metadata hold the geometry of the scan, and the cameras and sparse points of the photographs, for the
    dock widget. The photographs' fourth channel says what of each pixel is the object.
    """
    source = resources.files("napari_innergs.samples") / "data" / "tooth.npz"
    with source.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    integrals = arrays["projections"] * np.float32(arrays["step"])
    photographs = arrays["photographs"]
    views, rows, columns = integrals.shape
    angles = 2 * np.pi * np.arange(views) / views
    dv, du = _SCAN["dDetector"]
    first = -0.5 * (_SCAN["nVoxel"][0] - 1) * _SCAN["dVoxel"][0]
    # one slider steps through the views, the photographs, and the planes of the volume
    between = _SCAN["dVoxel"][0]
    common: dict[str, Any] = {"units": ("mm",) * 3}
    scan = {
        "kind": "projections",
        "geometry": {**_SCAN, "nDetector": [rows, columns], "angles_rad": angles.tolist()},
        "values": "line integrals",
    }
    pixel = rows * dv / photographs.shape[1]
    cameras = {
        "kind": "photographs",
        "names": [str(number) for number in range(len(photographs))],
        "cameras": [
            {"intrinsics": arrays["intrinsics"].tolist(), "world_to_camera": pose.tolist()}
            for pose in arrays["world_to_camera"]
        ],
        "points": arrays["points"].astype(float).tolist(),
        "point_colours": arrays["point_colours"].tolist(),
    }
    left = _ASIDE * columns * du - 0.5 * (photographs.shape[2] - 1) * pixel
    return [
        (
            integrals,
            {
                "name": "Tooth X-rays",
                "scale": (between, dv, du),
                "translate": (first, -0.5 * (rows - 1) * dv, -0.5 * (columns - 1) * du),
                "axis_labels": ("view", "v", "u"),
                "contrast_limits": (0.0, float(integrals.max())),
                "metadata": {"napari-innergs": scan},
                **common,
            },
            "image",
        ),
        (
            photographs,
            {
                "name": "Tooth photographs",
                "rgb": True,
                "scale": (between, pixel, pixel),
                "translate": (first, -0.5 * (photographs.shape[1] - 1) * pixel, left),
                "axis_labels": ("view", "row", "column"),
                "metadata": {"napari-innergs": cameras},
                **common,
            },
            "image",
        ),
    ]
