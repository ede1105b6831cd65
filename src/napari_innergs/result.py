"""What a reconstruction returns: a volume that explains itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from napari_innergs.geometry.grid import Grid
from napari_innergs.model import GaussianModel

_FORMAT = 1


@dataclass
class Reconstruction:
    """A dense volume with its geometry, its model and the report of how it came about.

    Attributes
    ----------
    volume : ndarray, shape (z, y, x) or (z, y, x, c), float32
        Intensities in the units of the input.
    grid : Grid
        Where the volume is: shape and affine (index to world).
    model : GaussianModel or None
        The fitted Gaussians, in world coordinates.
    report : dict
        JSON-able: device, seconds, iterations, n_gaussians, psnr_heldout, baseline, baseline_psnr_heldout,
        chosen, config, seed, versions, and what each candidate was worth.
    uncertainty : ndarray or None
        Half-width of the 90 % band of the error, same shape and unit as `volume`.
    distance : ndarray or None
        Distance of each output plane's voxels to the nearest real slice, world units, shape (z, y, x).
    transform : ndarray or None
        Similarity between two worlds (dual reconstructions only).
    """

    volume: np.ndarray
    grid: Grid
    model: GaussianModel | None = None
    report: dict[str, Any] = field(default_factory=dict)
    uncertainty: np.ndarray | None = None
    distance: np.ndarray | None = None
    transform: np.ndarray | None = None
    _state: Any = field(default=None, repr=False, compare=False)
