"""Sample scans, made when they are opened: nothing here uses the package's own projectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import affine_transform

from napari_innergs.samples._volumes import LayerData, volume

# (centre, semi-axes, turn about z in degrees, added attenuation in 1/mm); lengths in mm, (z, y, x). Lopsided, so
# that a mirrored or reversed volume is told from the right one.
_PHANTOM = (
    ((0.0, 0.0, 0.0), (17.0, 19.0, 22.0), 0.0, 0.020),
    ((0.0, 1.0, -9.0), (14.0, 5.0, 4.5), 20.0, 0.028),
    ((0.0, 1.0, -9.0), (13.0, 2.6, 2.2), 20.0, -0.022),
    ((1.0, -5.0, 10.0), (13.0, 4.0, 6.0), -35.0, 0.026),
    ((1.0, -5.0, 10.0), (12.0, 2.2, 3.8), -35.0, -0.020),
    ((4.0, 11.0, 4.0), (4.0, 3.0, 5.0), 10.0, -0.016),
    ((-6.0, 10.0, -4.0), (3.0, 3.0, 3.0), 0.0, 0.012),
    ((7.0, -11.0, -3.0), (2.2, 2.2, 2.2), 0.0, 0.030),
    ((-9.0, -12.0, 1.0), (1.6, 1.6, 1.6), 0.0, 0.030),
    ((-8.0, 5.0, 14.0), (1.2, 1.2, 1.2), 0.0, 0.040),
)
_CONE: dict[str, Any] = {
    "mode": "cone",
    "DSO": 500.0,
    "DSD": 750.0,
    "nDetector": [48, 64],
    "dDetector": [1.5, 1.5],
    "nVoxel": [40, 48, 48],
    "dVoxel": [1.0, 1.0, 1.0],
    "units": "mm",
}
_CONE_VIEWS, _CONE_COUNTS = 40, 20_000
_BONE_VIEWS, _BONE_ROWS, _BONE_ATTENUATION = 45, slice(20, 44), 0.04


def _inverse(semi: tuple[float, ...], degrees: float) -> NDArray[np.float64]:
    """Map (z, y, x) to the frame in which an ellipsoid is the unit sphere."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    return np.asarray(turned.T / np.array(semi)[:, None])


def _chords(source: NDArray[np.float64], pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Line integrals of the phantom from a source to pixels (..., 3): chords of ellipsoids, in closed form."""
    ray = pixels - source
    length = np.linalg.norm(ray, axis=-1)
    total = np.zeros(length.shape)
    for centre, semi, degrees, value in _PHANTOM:
        to_sphere = _inverse(semi, degrees)
        start, along = (source - centre) @ to_sphere.T, ray @ to_sphere.T
        a = np.sum(along**2, axis=-1)
        b = along @ start
        root = b * b - a * (start @ start - 1)
        total += value * length * 2 * np.sqrt(np.maximum(root, 0)) / a
    return total


def _phantom(shape: tuple[int, ...], spacing: float, fine: int = 3) -> NDArray[np.float32]:
    """Mean attenuation in each voxel, from fine^3 points."""
    steps = [(np.arange(fine * n) - 0.5 * (fine * n - 1)) * spacing / fine for n in shape]
    points = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1).astype(np.float32)
    total = np.zeros(points.shape[:3], np.float32)
    for centre, semi, degrees, value in _PHANTOM:
        there = (points - np.array(centre, np.float32)) @ _inverse(semi, degrees).T.astype(np.float32)
        total += np.float32(value) * (np.sum(there**2, axis=-1) <= 1)
    return total.reshape(shape[0], fine, shape[1], fine, shape[2], fine).mean((1, 3, 5))


def cone_scan() -> list[LayerData]:
    """Return a cone-beam scan of a phantom: 40 views, photon counts; and the phantom, hidden below.

    Sums of ellipsoids, integrated exactly along each ray; counts with the noise of 20 000 photons per pixel. The
    layers' metadata hold the geometry and the blank scan, for the dock widget.
    """
    angles = 2 * np.pi * np.arange(_CONE_VIEWS) / _CONE_VIEWS
    rows, cols = _CONE["nDetector"]
    dv, du = _CONE["dDetector"]
    v, u = (np.arange(n) - 0.5 * (n - 1) for n in (rows, cols))
    integrals = np.empty((_CONE_VIEWS, rows, cols))
    for i, (c, s) in enumerate(zip(np.cos(angles), np.sin(angles), strict=True)):
        pixels = np.zeros((rows, cols, 3))
        behind = _CONE["DSD"] - _CONE["DSO"]
        pixels[..., 0] = (v * dv)[:, None]
        pixels[..., 1] = -behind * s + u * du * c
        pixels[..., 2] = -behind * c - u * du * s
        integrals[i] = _chords(_CONE["DSO"] * np.array([0.0, s, c]), pixels)
    counts = np.random.default_rng(7).poisson(_CONE_COUNTS * np.exp(-integrals)).astype(np.uint16)
    shape = tuple(_CONE["nVoxel"])
    metadata = {
        "kind": "projections",
        "geometry": {**_CONE, "angles_rad": angles.tolist()},
        "values": "counts",
        "i0": float(_CONE_COUNTS),
    }
    return [
        _truth(_phantom(shape, 1.0), "Phantom complete", "mm", (-19.5, -23.5, -23.5), 0.05),
        _projections(
            counts, "Phantom cone beam", metadata, (dv, du), "mm", -19.5, (0.0, 1.05 * _CONE_COUNTS)
        ),
    ]


def parallel_scan() -> list[LayerData]:
    """Return a parallel-beam scan of trabecular bone: 45 views, line integrals; and the bone, hidden below.

    A cylinder of the shipped volume, turned and summed with linear interpolation; lengths in pixels.
    """
    bone = volume("bone").data[_BONE_ROWS].astype(np.float32) * np.float32(_BONE_ATTENUATION / 255)
    rows, size, _ = bone.shape
    middle = 0.5 * (size - 1)
    y, x = np.mgrid[:size, :size] - middle
    bone[:, np.hypot(y, x) > middle - 2] = 0
    angles = np.pi * np.arange(_BONE_VIEWS) / _BONE_VIEWS
    integrals = np.empty((_BONE_VIEWS, rows, size), np.float32)
    for i, (c, s) in enumerate(zip(np.cos(angles), np.sin(angles), strict=True)):
        # (along the ray, u) to (y, x): x = t cos - u sin, y = t sin + u cos
        turn = np.array([[s, c], [c, -s]])
        shift = middle - turn @ (middle, middle)
        for row in range(rows):
            integrals[i, row] = affine_transform(bone[row], turn, shift, order=1).sum(0)
    metadata = {
        "kind": "projections",
        "geometry": {
            "mode": "parallel",
            "nDetector": [rows, size],
            "dDetector": [1.0, 1.0],
            "nVoxel": list(bone.shape),
            "dVoxel": [1.0, 1.0, 1.0],
            "angles_rad": angles.tolist(),
        },
        "values": "line integrals",
    }
    corner = (-0.5 * (rows - 1), -middle, -middle)
    top = float(integrals.max())
    return [
        _truth(bone, "Bone complete", "pixel", corner, _BONE_ATTENUATION),
        _projections(integrals, "Bone parallel beam", metadata, (1.0, 1.0), "pixel", corner[0], (0.0, top)),
    ]


def _truth(
    data: NDArray[np.float32], name: str, unit: str, corner: tuple[float, ...], top: float
) -> LayerData:
    kwargs = {
        "name": name,
        "visible": False,
        "scale": (1.0, 1.0, 1.0),
        "translate": corner,
        "units": (unit,) * 3,
        "axis_labels": ("z", "y", "x"),
        "contrast_limits": (0.0, top),
    }
    return data, kwargs, "image"


def _projections(
    data: NDArray[Any],
    name: str,
    metadata: dict[str, Any],
    step: tuple[float, float],
    unit: str,
    first: float,
    limits: tuple[float, float],
) -> LayerData:
    """Put views on the first axis, where the planes of the volume are: the slider steps through both."""
    kwargs = {
        "name": name,
        "scale": (1.0, *step),
        "translate": (first, *(-0.5 * (n - 1) * d for n, d in zip(data.shape[1:], step, strict=True))),
        "units": (unit,) * 3,
        "axis_labels": ("view", "v", "u"),
        "contrast_limits": limits,
        "metadata": {"napari-innergs": metadata},
    }
    return data, kwargs, "image"
