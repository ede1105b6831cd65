"""Numbers of an X-ray scan: checked arguments, and the vectors of a panel that turns about z.

The twelve numbers of a view are those of `napari_innergs.geometry.xray`, in (x, y, z).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
ROTATIONS = ("ccw", "cw")
# a source or ray this close to the panel's plane (sine of the angle) gives no image
_GRAZING = 1e-6


def check_angles(angles: ArrayLike, n_views: int | None = None, *, turns: bool = False) -> FloatArray:
    """Validate the angles of a scan.

    Parameters
    ----------
    angles : array_like (n,)
        Radians.
    n_views : int, optional
        How many there must be.
    turns : bool
        Whether many turns are expected (helical scans): only large steps are then taken for degrees.

    Returns
    -------
    ndarray (n,)
        A copy.

    Raises
    ------
    ValueError
        If there are none or another number of them, if one is not finite, or if they look like degrees.

    Examples
    --------
    >>> check_angles([0.0, 0.5, 1.0]).tolist()
    [0.0, 0.5, 1.0]
    """
    out = finite_angles(angles, n_views)
    if _look_like_degrees(out, 1.5 if turns else 0.2):
        raise ValueError(
            f"angles: got {out.min():g} to {out.max():g}, which look like degrees, need radians; "
            "convert them with numpy.deg2rad(angles)."
        )
    return out


def finite_angles(angles: ArrayLike, n_views: int | None) -> FloatArray:
    """Return angles as a copy that is checked for everything but their unit."""
    try:
        out = np.array(angles, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("angles: got something that is not numbers, need radians.") from error
    if out.ndim != 1 or out.size == 0:
        raise ValueError(f"angles: got shape {out.shape}, need (n,), one for each view.")
    bad = np.flatnonzero(~np.isfinite(out))
    if bad.size:
        raise ValueError(
            f"angles: got {bad.size} NaN or infinite, the first at view {bad[0]}, need finite numbers."
        )
    if n_views is not None and len(out) != n_views:
        raise ValueError(f"angles: got {len(out)}, need {n_views}, one for each view.")
    return out


def _look_like_degrees(angles: FloatArray, step_limit: float) -> bool:
    if np.abs(angles).max() <= 4 * np.pi:
        return False
    if len(angles) == 1:
        return True
    step = float(np.median(np.abs(np.diff(np.sort(angles)))))
    extent = float(np.ptp(angles))
    # whole or half turns in degrees, with or without the last view
    whole = any(
        total >= 179 and abs(total - 180 * round(total / 180)) <= 1e-3 * total
        for total in (extent, extent + step)
    )
    return step >= step_limit or whole


def as_pair(value: Any, name: str, positive: bool = False) -> tuple[float, float]:
    """Return one number or two as two (v, u)."""
    try:
        both = np.broadcast_to(np.asarray(value, dtype=np.float64), (2,))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: got {value!r}, need one number or two (v, u).") from error
    if not np.isfinite(both).all() or (positive and not (both > 0).all()):
        raise ValueError(
            f"{name}: got {value!r}, need {'positive ' if positive else ''}finite numbers (v, u)."
        )
    return float(both[0]), float(both[1])


def as_length(value: Any, name: str) -> float:
    """Return a positive length."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: got {value!r}, need a positive length.") from error
    if not (np.isfinite(number) and number > 0):
        raise ValueError(f"{name}: got {number:g}, need a positive finite length.")
    return number


def as_number(value: Any, name: str) -> float:
    """Return a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: got {value!r}, need a number.") from error
    if not np.isfinite(number):
        raise ValueError(f"{name}: got {number}, need a finite number.")
    return number


def as_heights(value: Any, n_views: int) -> FloatArray:
    """Return one height for all views, or one for each."""
    heights = np.array(value, dtype=np.float64)
    if heights.shape not in ((), (n_views,)) or not np.isfinite(heights).all():
        raise ValueError(f"heights: need one finite number or {n_views}, one for each view.")
    return heights


def as_shape(shape: Any) -> tuple[int, int]:
    """Return rows and columns of a panel."""
    try:
        sizes = tuple(int(size) for size in shape)
        whole = len(sizes) == 2 and all(float(a) == b for a, b in zip(shape, sizes, strict=True))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"detector_shape: got {shape!r}, need two integers (rows, columns).") from error
    if not whole or min(sizes) < 1:
        raise ValueError(f"detector_shape: got {tuple(shape)}, need two positive integers (rows, columns).")
    return sizes[0], sizes[1]


def _elevation(value: float) -> float:
    angle = as_number(value, "elevation")
    if abs(angle) > np.pi / 2:
        raise ValueError(f"elevation: got {angle:g}, need radians from -pi/2 to pi/2.")
    return angle


def check_panel(vectors: FloatArray, kind: str) -> None:
    """Refuse panels that no rays cross."""
    u, v = vectors[:, 6:9], vectors[:, 9:12]
    ray = vectors[:, :3] if kind == "parallel" else vectors[:, 3:6] - vectors[:, :3]
    for name, step in (("u", u), ("v", v), ("direction" if kind == "parallel" else "source to panel", ray)):
        zero = np.flatnonzero(~(np.linalg.norm(step, axis=1) > 0))
        if zero.size:
            raise ValueError(
                f"vectors: {name} has length 0 in view {zero[0]} ({zero.size} view(s)), need a direction."
            )
    unit = [step / np.linalg.norm(step, axis=1, keepdims=True) for step in (u, v, ray)]
    normal = np.cross(unit[0], unit[1])
    size = np.linalg.norm(normal, axis=1)
    flat = np.flatnonzero(size < _GRAZING)
    if flat.size:
        raise ValueError(
            f"vectors: the pixel steps u and v of view {flat[0]} are parallel ({flat.size} view(s)), "
            "need two directions that span the panel."
        )
    grazing = np.flatnonzero(np.abs(np.sum(normal / size[:, None] * unit[2], axis=1)) < _GRAZING)
    if grazing.size:
        what = "the rays run" if kind == "parallel" else "the source lies"
        raise ValueError(
            f"vectors: {what} in the panel's plane in view {grazing[0]} ({grazing.size} view(s)), "
            "need rays that cross it."
        )


def nearest_point(vectors: FloatArray, kind: str) -> FloatArray:
    """Find the point with the least sum of squared distances to the central rays, (z, y, x).

    Where the rays leave it open (one view, all parallel), it is the one nearest to the world's origin.
    """
    ray = vectors[:, :3] if kind == "parallel" else vectors[:, 3:6] - vectors[:, :3]
    ray = ray / np.linalg.norm(ray, axis=1, keepdims=True)
    across = np.eye(3) - ray[:, :, None] * ray[:, None, :]
    left, right = across.mean(axis=0), np.einsum("nij,nj->i", across, vectors[:, 3:6]) / len(vectors)
    point = np.linalg.lstsq(left, right, rcond=1e-6)[0]
    return np.array(point[::-1])


def estimate_angles(vectors: FloatArray, kind: str) -> FloatArray:
    """Angles of the panel's normal on the side of the source, unwrapped from -pi < first <= pi."""
    normal = np.cross(vectors[:, 6:9], vectors[:, 9:12])
    to_source = -vectors[:, :3] if kind == "parallel" else vectors[:, :3] - vectors[:, 3:6]
    normal *= np.sign(np.sum(normal * to_source, axis=1))[:, None]
    return np.unwrap(np.arctan2(normal[:, 1], normal[:, 0]))


def turned_panel(
    angles: FloatArray,
    heights: FloatArray | float = 0.0,
    *,
    detector_shape: Any,
    pixel_size: Any,
    detector_offset: Any,
    rotation_centre: float | None,
    detector_tilt: Any,
    elevation: float,
    source_origin: float | None = None,
    origin_detector: float = 0.0,
    source_offset: Any = 0.0,
) -> FloatArray:
    """Vectors of a source and a panel turned about z; `source_origin` None means parallel rays."""
    dv, du = as_pair(pixel_size, "pixel_size", positive=True)
    shift_v, shift_u = _offset(detector_offset, rotation_centre, as_shape(detector_shape), du)
    source_v, source_u = as_pair(source_offset, "source_offset")
    elevation = _elevation(elevation)
    zero = np.zeros_like(angles)
    cos, sin = np.cos(angles), np.sin(angles)
    ce, se = np.cos(elevation), np.sin(elevation)
    out = np.stack([ce * cos, ce * sin, zero + se], axis=1)
    along_u = np.stack([-sin, cos, zero], axis=1)
    along_v = np.stack([-se * cos, -se * sin, zero + ce], axis=1)
    lift = np.zeros((len(angles), 3))
    lift[:, 2] = heights
    centre = -origin_detector * out + shift_v * along_v + shift_u * along_u + lift
    if source_origin is None:
        first = -out
    else:
        first = source_origin * out + source_v * along_v + source_u * along_u + lift
    try:
        roll, pitch, yaw = (float(angle) for angle in np.broadcast_to(np.asarray(detector_tilt, float), (3,)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"detector_tilt: got {detector_tilt!r}, need three angles (roll, pitch, yaw) in radians."
        ) from error
    if not np.isfinite([roll, pitch, yaw]).all() or max(abs(roll), abs(pitch), abs(yaw)) > np.pi:
        raise ValueError(f"detector_tilt: got {detector_tilt!r}, need radians between -pi and pi.")
    # columns u, v, normal; right-handed: u x v = normal, towards the source
    frame = np.stack([along_u, along_v, out], axis=2) @ (_turn(1, yaw) @ _turn(0, pitch) @ _turn(2, roll))
    return np.concatenate([first, centre, frame[:, :, 0] * du, frame[:, :, 1] * dv], axis=1)


def _turn(axis: int, angle: float) -> FloatArray:
    out = np.eye(3)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    out[a, a] = out[b, b] = np.cos(angle)
    out[b, a] = np.sin(angle)
    out[a, b] = -out[b, a]
    return out


def real_angles(angles: ArrayLike, rotation: str, start_angle: float, turns: bool = False) -> FloatArray:
    """Return where the source is in each view, counter-clockwise, radians."""
    if rotation not in ROTATIONS:
        raise ValueError(f"rotation: got {rotation!r}, need 'ccw' or 'cw' (seen from +z).")
    start = as_number(start_angle, "start_angle")
    if abs(start) > 4 * np.pi:
        raise ValueError(f"start_angle: got {start:g}, need radians; numpy.deg2rad converts degrees.")
    given = check_angles(angles, turns=turns)
    return start + (given if rotation == "ccw" else -given)


def _offset(
    detector_offset: Any, rotation_centre: float | None, shape: tuple[int, int], du: float
) -> tuple[float, float]:
    dv_offset, du_offset = as_pair(detector_offset, "detector_offset")
    if rotation_centre is not None:
        column = as_number(rotation_centre, "rotation_centre")
        if du_offset:
            raise ValueError(
                "rotation_centre: got one together with a horizontal detector_offset, need one of the two."
            )
        du_offset = (0.5 * (shape[1] - 1) - column) * du
    return dv_offset, du_offset
