"""Versions that a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    out = {"python": platform.python_version()}
    for name in (
        "napari-innergs",
        "numpy",
        "scipy",
        "torch",
        "numba",
        "scikit-image",
        "opencv-python-headless",
    ):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "unknown"
    return out
