"""Filtered backprojection: FBP for parallel beams, FDK for cone beams.

Feldkamp, Davis & Kress 1984 (J Opt Soc Am A 1:612) with the band-limited ramp of Kak & Slaney 1988 (eq. 3.61),
Parker's weights for scans of less than a turn (Med Phys 9:254, 1982; longer than the least one: Silver 2000, Med
Phys 27:773) and Wang's for a detector that sees the object to one side only (Med Phys 29:1634, 2002).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import fft

from napari_innergs.cpu import project
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry

__all__ = ["WINDOWS", "fdk", "filter_rows"]

WINDOWS = ("hann", "ramp")
# A gap between neighbouring views this many times the usual one: the turn is not complete.
_GAP = 3.0
# A detector that reaches this much farther on one side of the axis than on the other is displaced on purpose.
_ONE_SIDED = 1.15
_CHUNKS = 8


@dataclass(frozen=True)
class _Scan:
    """A scan as filtered backprojection sees it."""

    angles: np.ndarray
    """Where the source is, about the axis, radians."""
    fan: np.ndarray
    """Angle of each column's ray to the one through the axis (n, U); zero in parallel beam."""
    across: np.ndarray
    """Distance of each column from the axis' image, scaled to the axis (n, U), world units."""
    origin: np.ndarray
    """Distance from the source to the axis along the panel's normal; 1 in parallel beam."""
    detector: np.ndarray
    """Distance from the source to the panel; 1 in parallel beam."""


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _describe(geometry: XrayGeometry) -> _Scan:
    cols = geometry.detector_shape[1]
    axis = _unit(geometry.v).mean(axis=0)
    axis = _unit(axis) if np.linalg.norm(axis) > 1e-3 else np.array([1.0, 0.0, 0.0])
    first = _unit(np.cross(axis, np.eye(3)[np.argmin(np.abs(axis))]))
    # (z, y, x) is a left-handed order: this cross product turns counter-clockwise about the axis
    second = np.cross(first, axis)
    pixel = geometry.center[:, None] + (np.arange(cols) - (cols - 1) / 2)[:, None] * geometry.u[:, None]
    if geometry.kind == "parallel":
        towards = -geometry.direction
        side = _unit(geometry.u)
        across = np.einsum("nuk,nk->nu", pixel - geometry.isocentre, side)
        ones = np.ones(geometry.n_views)
        return _Scan(np.arctan2(towards @ second, towards @ first), np.zeros_like(across), across, ones, ones)
    source = geometry.source
    towards = source - geometry.isocentre
    # for a helix the axis is taken at the source's height
    towards = towards - (towards @ axis)[:, None] * axis
    ray = pixel - source[:, None]
    turn = np.arctan2(ray @ second, ray @ first) - np.arctan2(-towards @ second, -towards @ first)[:, None]
    fan = (turn + np.pi) % (2 * np.pi) - np.pi
    return _Scan(
        np.arctan2(towards @ second, towards @ first),
        fan,
        np.linalg.norm(towards, axis=1)[:, None] * np.tan(fan),
        geometry.source_origin,
        geometry.source_detector,
    )


def _cells(angles: np.ndarray, period: float) -> tuple[np.ndarray, float, float]:
    """Return the angle that each view stands for, the first angle after the widest gap, and that gap.

    A gap that is much wider than usual is nobody's: the views beside it stand for as much as the others.
    """
    if len(angles) == 1:
        return np.array([period]), float(angles[0]), 0.0
    order = np.argsort(angles % period, kind="stable")
    places = (angles % period)[order]
    gaps = np.diff(places, append=places[0] + period)
    usual = np.median(gaps[gaps > 1e-9]) if (gaps > 1e-9).any() else period
    widest = int(np.argmax(gaps))
    after = places[(widest + 1) % len(places)]
    gap = float(gaps[widest])
    if gap > _GAP * usual:
        gaps = np.minimum(gaps, _GAP * usual)
        gaps[widest] = usual
        missing = gap - usual
    else:
        missing = 0.0
    cells = np.empty(len(angles))
    cells[order] = 0.5 * (gaps + np.roll(gaps, 1))
    return cells, float(after), missing


def _parker(beta: np.ndarray, fan: np.ndarray, extent: float) -> np.ndarray:
    """Return Parker's weights for angles from the start of the scan (n, 1) and fan angles (n, U)."""
    slack = 0.5 * (extent - np.pi)
    rise = np.maximum(2 * (slack - fan), 1e-6)
    fall = np.maximum(2 * (slack + fan), 1e-6)
    up = np.sin(0.5 * np.pi * np.clip(beta / rise, 0, 1)) ** 2
    down = np.sin(0.5 * np.pi * np.clip((extent - beta) / fall, 0, 1)) ** 2
    return np.minimum(up, down)


def _one_sided(across: np.ndarray) -> np.ndarray | None:
    """Return weights (n, U) for a detector that sees one side of the axis only in part, or None."""
    low, high = -across.min(axis=1), across.max(axis=1)
    overlap = float(np.median(np.minimum(low, high)))
    reach = float(np.median(np.maximum(low, high)))
    if overlap <= 0 or reach < _ONE_SIDED * overlap:
        return None
    # the far side is the same in all views: a displaced panel turns with the source
    sign = 1.0 if np.median(high) > np.median(low) else -1.0
    return 0.5 * (1 + np.sin(0.5 * np.pi * np.clip(sign * across / overlap, -1, 1)))


def _redundancy(scan: _Scan, parallel: bool) -> np.ndarray:
    """Return the angle times the share that each ray (n, 1 or U) contributes."""
    cells, start, missing = _cells(scan.angles, 2 * np.pi)
    one_sided = _one_sided(scan.across) if missing == 0 else None
    if one_sided is not None:
        return cells[:, None] * one_sided
    if parallel:
        return _cells(scan.angles, np.pi)[0][:, None]
    if missing == 0:
        return 0.5 * cells[:, None]
    beta = (scan.angles - start) % (2 * np.pi)
    extent = 2 * np.pi - missing
    beta = beta + 0.5 * (extent - beta.max())
    return cells[:, None] * _parker(beta[:, None], scan.fan, extent)


def filter_rows(projections: np.ndarray, spacing: np.ndarray, window: str = "hann") -> np.ndarray:
    """Return projections convolved along their rows with the band-limited ramp.

    Parameters
    ----------
    projections : ndarray, (n, V, U)
        Weighted line integrals.
    spacing : ndarray, (n,)
        Distance between columns, in the unit that the result is per.
    window : {"hann", "ramp"}
        "ramp": the ramp up to the highest frequency; "hann": it fades out there, for less noise.

    Returns
    -------
    ndarray of float32, (n, V, U)
    """
    cols = projections.shape[-1]
    size = int(fft.next_fast_len(2 * cols, real=True))
    n = fft.fftfreq(size, 1 / size)
    kernel = np.zeros(size)
    odd = n.astype(int) % 2 != 0
    kernel[odd] = -1 / (np.pi * n[odd]) ** 2
    kernel[0] = 0.25
    response = fft.rfft(kernel).real
    if window == "hann":
        response = response * 0.5 * (1 + np.cos(2 * np.pi * fft.rfftfreq(size)))
    spectrum = fft.rfft(projections.astype(np.float32, copy=False), size)
    spectrum *= (response / np.asarray(spacing)[:, None, None]).astype(np.float32)
    return np.asarray(fft.irfft(spectrum, size)[..., :cols], np.float32)


def fdk(
    projections: np.ndarray,
    geometry: XrayGeometry,
    grid: Grid,
    window: str = "hann",
    *,
    step: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Reconstruct by filtered backprojection.

    Whole turns, shorter scans, displaced detectors and unevenly spaced views are recognised and weighted; fewer
    views than half a turn and the fan leave artefacts. Rays are taken as in a scan about one axis: for others
    (helix, laminography) the result is rough.

    Parameters
    ----------
    projections : ndarray, (n, V, U)
        Line integrals.
    geometry : XrayGeometry
        Parallel beam: FBP; cone beam: FDK.
    grid : Grid
        Where to reconstruct.
    window : {"hann", "ramp"}
        Fade out high frequencies, or keep them.
    step : callable, optional
        Called with what is done and the total, after each part; it may raise to stop.

    Returns
    -------
    ndarray of float32, (Z, Y, X)
        Attenuation per world unit.

    Raises
    ------
    ValueError
        If the shape is wrong, a number is not finite or the window is unknown.

    Examples
    --------
    >>> from napari_innergs.geometry.xray import ParallelBeam
    >>> scan = ParallelBeam.circular(np.arange(32) * np.pi / 32, detector_shape=(1, 33))
    >>> disc = 2 * np.sqrt(np.maximum(10.0**2 - (np.arange(33) - 16.0) ** 2, 0))
    >>> volume = fdk(np.broadcast_to(disc, (32, 1, 33)), scan, scan.default_grid())
    >>> round(float(volume[0, 12:21, 12:21].mean()), 1)
    1.0
    """
    if window not in WINDOWS:
        raise ValueError(f"window: got {window!r}, need one of {', '.join(WINDOWS)}.")
    need = (geometry.n_views, *geometry.detector_shape)
    if np.shape(projections) != need:
        raise ValueError(
            f"projections: got shape {np.shape(projections)}, need {need} to match the geometry."
        )
    data = np.asarray(projections, np.float32)
    if not np.isfinite(data).all():
        raise ValueError(
            "projections: got NaN or infinite numbers, need finite line integrals; repair them first."
        )
    parallel = geometry.kind == "parallel"
    scan = _describe(geometry)
    scale = scan.origin / scan.detector
    weights = _redundancy(scan, parallel)[:, None, :]
    if not parallel:
        weights = weights * _cosines(geometry, scan.detector)
    columns = np.linalg.norm(geometry.u, axis=1) * scale
    data = filter_rows(data * weights.astype(np.float32), columns, window)
    frames = geometry.to_index_frame(grid).reshape(-1, 4, 3)
    origin, corner, right, down = (frames[:, i] for i in range(4))
    # X - source = w (corner - source) + w u right + w v down; X - corner = u right + v down + t direction
    base, third = (corner, origin) if parallel else (origin, corner - origin)
    inverse = np.linalg.inv(np.stack([right, down, third], axis=2))
    matrices = np.concatenate([inverse, -inverse @ base[:, :, None]], axis=2)
    if parallel:
        matrices[:, 2] = (0, 0, 0, 1)
    volume = np.zeros(grid.shape, np.float32)
    bounds = np.linspace(0, grid.shape[0], min(_CHUNKS, grid.shape[0]) + 1).astype(int)
    for part, planes in enumerate(pairwise(bounds.tolist())):
        project.backproject(data, matrices, scale**2, grid.shape, parallel, planes, volume)
        if step is not None:
            step(part + 1, len(bounds) - 1)
    return volume


def _cosines(geometry: XrayGeometry, detector: np.ndarray) -> np.ndarray:
    """Return the cosine of each ray's angle to the panel's normal, (n, V, U)."""
    rows, cols = geometry.detector_shape
    v = (np.arange(rows) - (rows - 1) / 2)[:, None]
    u = np.arange(cols) - (cols - 1) / 2
    middle = geometry.center - geometry.source

    def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sum(a * b, axis=1)[:, None, None]

    right, down = geometry.u, geometry.v
    square = dot(middle, middle) + 2 * u * dot(middle, right) + 2 * v * dot(middle, down)
    square = square + u * u * dot(right, right) + v * v * dot(down, down) + 2 * u * v * dot(right, down)
    return np.asarray(detector[:, None, None] / np.sqrt(square))
