"""The similarity between the world of photographs and the world of X-rays.

Photographs know shape only up to rotation, shift and scale: seven numbers, found here without a starting guess from
points on the surface of the object, from landmarks, and then from the outlines in the photographs' masks. All
coordinates are (z, y, x); a transform maps column vectors, ``X_xray = S @ X_photo``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from napari_innergs.geometry.camera import Camera
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import quaternion_to_matrix, rotation_vector_to_matrix

__all__ = [
    "Alignment",
    "Candidate",
    "align_landmarks",
    "align_surfaces",
    "refine_on_silhouettes",
    "surface_of_volume",
]

FloatArray = NDArray[np.float64]
Step = Callable[[int, int], None]

# --- surface of a volume
# Noise is smoothed by so many voxels; a convex surface of radius r moves by SMOOTHING**2 / r only.
SMOOTHING = 0.7
# The level inside is taken within so many voxels of the surface.
INSIDE = 2
# Directions from which it is looked at; cells of the maps of what is nearest, in voxels; a point counts when it is
# seen from this share of the directions that it faces: walls behind small openings are not.
VIEWS = 60
VIEW_CELL = 1.5
SEEN = 0.15

# --- search; lengths in units of the root mean square radius of the target
STARTS = 200
SEARCH_POINTS = 300
REFINED = 16
REFINE_POINTS = 800
# Pairs of the search may be this much further apart than the nearest.
NEAREST = 0.2
TARGET_POINTS = 2000
# The scale is known from the extents to about this factor: a part may be hidden.
SCALE_RANGE = 1.35
# When nothing fits it is tried again with these scales.
OTHER_SCALES = (0.8, 1.0, 1.25)
# Share of the nearest pairs that count while searching.
TRIM = 0.8
# Distances at which a pair's agreement has fallen to zero: while searching and at the end.
REACH_SEARCH = 0.2
REACH = 0.1
# Poses that move points by less than this on average are one and the same.
SAME = 0.1
# The final fit; patches of it (share of the root mean square radius) whose errors are taken for independent.
FINAL_STEPS = 40
PATCH = 0.5
# What counts as lying on the other surface: within this much, or so many standard deviations of the noise, but no
# more than the last; and the shares that must: of the photographs' points, of the volume's surface, which may be
# hidden in part, and the product of both.
ON_SURFACE = 0.015
ON_NOISE = 2.5
ON_MOST = 0.05
POINTS_ON = 0.55
SURFACE_ON = 0.3
BOTH_ON = 0.38
# Scores that differ by less are a tie.
TIE = 0.03
# After so many poses that do not fit the others are not tried.
REFUSALS = 2
# What the whole surface may be off by, unseen, in spacings of its points: goes into the errors of scale and shift.
COMMON = 0.4
# Prior of the offset along the normals, in spacings of the target's points, held against so many patches.
OFFSET_PRIOR = 0.3
OFFSET_SAMPLES = 50


# --- landmarks
# A mirror image is taken for what was meant when its residual is this share of the other's, and that one is more
# than this share of the landmarks' extent.
MIRRORED = 0.3
MIRRORED_LEAST = 0.02
# Landmarks whose second extent is below this share of the first are on a line.
LINE = 1e-3

# --- silhouettes
# Level of a mask at its outline; outlines are taken from maps smoothed by so many pixels for their directions only.
OUTLINE = 0.5
OUTLINE_SMOOTHING = 1.0
# Outline points of all masks together.
OUTLINE_POINTS = 20000
# Neighbours of each surface point between which the rim is looked for.
RIM_NEIGHBOURS = 6
# Pairs of outline and rim further apart than this (pixels, at first and at last) or turned more do not count.
RIM_REACH = (12.0, 3.0)
RIM_FACING = 0.7
SILHOUETTE_STEPS = 12
# Share of the outline that must have a rim near by.
OUTLINE_ON = 0.5


@dataclass(frozen=True)
class Candidate:
    """One pose of several.

    Attributes
    ----------
    transform : ndarray (4, 4)
        Photo world to X-ray world, (z, y, x).
    score : float
        Agreement of the surfaces, 0 to 1.
    """

    transform: FloatArray
    score: float


@dataclass(frozen=True)
class Alignment:
    """A similarity between two worlds and how far it can be trusted.

    Attributes
    ----------
    transform : ndarray (4, 4)
        Photo world to X-ray world, (z, y, x), column vectors.
    scale : float
        X-ray world units in one photo world unit.
    score : float
        Agreement, 0 to 1.
    rms : float
        Root mean square residual of the pairs that count, X-ray world units (pixels for silhouettes).
    rotation_error : float
        Estimated error of the rotation, degrees (root mean square of the angle).
    scale_error : float
        Estimated relative error of the scale.
    shift_error : float
        Estimated error of the place of the object's middle, X-ray world units.
    candidates : tuple of Candidate
        Poses that can not be told apart, best first; one when the answer is unique.
    matched : bool
        False when the surfaces are not of one object; the transform is then only the best of bad ones.
    reason : str
        Why it did not match, or why to look twice; empty when there is nothing to say.
    residuals : ndarray (n,) or None
        Distance of each pair of landmarks, X-ray world units.
    """

    transform: FloatArray
    scale: float
    score: float
    rms: float
    rotation_error: float
    scale_error: float
    shift_error: float
    candidates: tuple[Candidate, ...]
    matched: bool
    reason: str
    residuals: FloatArray | None = None


def _check_points(points: ArrayLike, name: str, least: int) -> FloatArray:
    out = np.asarray(points, dtype=np.float64)
    if out.ndim != 2 or out.shape[1] != 3:
        raise ValueError(f"{name}: got shape {out.shape}, need (n, 3) in (z, y, x).")
    if len(out) < least:
        raise ValueError(f"{name}: got {len(out)}, need at least {least}.")
    bad = int((~np.isfinite(out)).any(axis=1).sum())
    if bad:
        raise ValueError(f"{name}: got {bad} NaN or infinite, need finite coordinates.")
    return out


def _once(points: FloatArray) -> NDArray[np.intp]:
    """Give indices of points that differ, in order."""
    return np.sort(np.unique(points, axis=0, return_index=True)[1])


def _matrix(scale: float, rotation: FloatArray, shift: FloatArray) -> FloatArray:
    out = np.eye(4)
    out[:3, :3] = scale * rotation
    out[:3, 3] = shift
    return out


def _apply(transform: FloatArray, points: FloatArray) -> FloatArray:
    return points @ transform[:3, :3].T + transform[:3, 3]


def _scale_of(transform: FloatArray) -> float:
    return float(np.cbrt(np.linalg.det(transform[:3, :3])))


# --------------------------------------------------------------------------------------------------------------
# surface of a volume


def surface_of_volume(
    volume: ArrayLike, grid: Grid, threshold: float | None = None, *, step: Step | None = None
) -> tuple[FloatArray, FloatArray]:
    """Outer surface of the object in an attenuation volume: where it is halfway between air and object.

    Otsu's threshold (1979, IEEE Trans SMC 9:62) separates air from object; the level is then half of what is found
    just inside, in the geometric mean with what is typical of the object: a level that follows hard and soft parts
    and thin walls is right for a blurred edge, one level for all where soft and hard share voxels. A threshold that
    is too low makes the object larger and spoils the scale. Only the largest piece counts, only what can be
    seen from outside, and not where the object leaves the volume.

    Parameters
    ----------
    volume : array_like (Z, Y, X)
        Attenuation.
    grid : Grid
        Where the voxels are.
    threshold : float, optional
        A fixed level, for volumes whose histogram misleads; default: halfway, from place to place.
    step : callable, optional
        Called with what is done and the total, often; it may raise to stop.

    Returns
    -------
    points : ndarray (n, 3)
        Points on the surface, about one for each voxel of it, world (z, y, x).
    normals : ndarray (n, 3)
        Unit vectors pointing out of the object.

    Raises
    ------
    ValueError
        If shapes do not fit, values are not finite, or nothing or everything is above the threshold.

    Examples
    --------
    >>> z, y, x = np.mgrid[:24, :24, :24] - 11.5
    >>> ball = np.clip(8.5 - np.sqrt(z**2 + y**2 + x**2), 0, 1)
    >>> points, normals = surface_of_volume(ball, Grid((24, 24, 24)))
    >>> round(float(np.linalg.norm(points - 11.5, axis=1).mean()))
    8
    """
    from skimage.filters import threshold_otsu
    from skimage.measure import marching_cubes

    # most of the work before the surface is looked at is smoothing, in this number of parts
    before = 6
    total = before + VIEWS

    def tick(done: int) -> None:
        if step is not None:
            step(done, total)

    v = np.asarray(volume, dtype=np.float32)
    if v.shape != grid.shape:
        raise ValueError(f"volume: got shape {v.shape}, need the grid's {grid.shape}.")
    if not np.isfinite(v).all():
        raise ValueError("volume: got NaN or infinite values, need finite ones; replace them by 0.")
    low, high = (float(q) for q in np.percentile(v, [0.1, 99.9]))
    if not high > low:
        high = float(v.max())
    if not high > low:
        raise ValueError(f"volume: got {low:g} everywhere, need an object that differs from air.")
    split = float(threshold_otsu(np.clip(v, low, high))) if threshold is None else float(threshold)
    tick(1)
    rough, count = ndimage.label(v > split)
    if count == 0:
        raise ValueError(
            f"threshold: got {split:g}, which no voxel exceeds; need one between air and object."
        )
    sizes = np.bincount(rough.ravel())
    sizes[0] = 0
    box = ndimage.find_objects(rough)[int(np.argmax(sizes)) - 1]
    margin = 4
    air = float(np.median(v[v <= split])) if (v <= split).any() else low
    # cut to the object with a margin
    start = [s.start - margin for s in box]
    pads = [
        (max(margin - s.start, 0), max(s.stop + margin - n, 0)) for s, n in zip(box, v.shape, strict=True)
    ]
    cut = tuple(
        slice(max(s.start - margin, 0), min(s.stop + margin, n)) for s, n in zip(box, v.shape, strict=True)
    )
    # beyond its ends the volume goes on as it is there, so that the surface meets them at its own angle
    tick(2)
    smooth = ndimage.gaussian_filter(np.pad(v[cut], pads, mode="edge"), SMOOTHING)
    tick(3)
    level: Any = split
    if threshold is None:
        inside = ndimage.maximum_filter(smooth, size=2 * INSIDE + 1)
        inside = ndimage.gaussian_filter(inside, INSIDE)
        tick(4)
        body = smooth > split
        edge = body & ~ndimage.binary_erosion(body)
        typical = float(np.median(inside[edge])) - air if edge.any() else split - air
        height = np.sqrt(np.maximum(inside - air, 0) * typical)
        level = air + np.maximum(height, split - air) / 2
    field = smooth - level
    inner = tuple(slice(a, n - b) for (a, b), n in zip(pads, field.shape, strict=True))
    within = np.zeros(field.shape, dtype=bool)
    within[inner] = True
    field[~within] = -1e-3 * (high - low)
    labels, count = ndimage.label(field > 0)
    if count == 0:
        raise ValueError(f"threshold: got {split:g}, above which nothing is left; give a lower threshold.")
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    body = labels == int(np.argmax(sizes))
    field[(labels > 0) & ~body] = -1e-3 * (high - low)
    tick(5)
    vertices = marching_cubes(field, 0.0, allow_degenerate=False)[0].astype(np.float64)
    gradient = np.stack(
        [
            ndimage.map_coordinates(ndimage.sobel(smooth, axis), vertices.T, order=1, mode="nearest")
            for axis in range(3)
        ],
        axis=1,
    ).astype(np.float64)
    steep = np.linalg.norm(gradient, axis=1) > 0
    vertices, gradient = vertices[steep], gradient[steep]
    outward = -gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
    seen = _seen_from_outside(vertices, outward, lambda done: tick(before + done))
    # where the object leaves the volume there is no surface
    index = vertices + np.array(start)
    seen &= ((index > -1e-3) & (index < np.array(v.shape) - 1 + 1e-3)).all(axis=1)
    # a gradient is a covector: it goes to the world with the inverse, transposed
    normals = -gradient[seen] @ grid.inverse_affine[:3, :3]
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return grid.index_to_world(index[seen]), normals


def _directions(count: int) -> FloatArray:
    """Give unit vectors (count, 3) spread evenly (Fibonacci sphere)."""
    i = np.arange(count) + 0.5
    height = 1 - 2 * i / count
    turn = i * math.pi * (3 - math.sqrt(5))
    across = np.sqrt(1 - height**2)
    return np.stack([height, across * np.sin(turn), across * np.cos(turn)], axis=1)


def _seen_from_outside(
    points: FloatArray, normals: FloatArray, tick: Callable[[int], None]
) -> NDArray[np.bool_]:
    """Which points of a dense surface (voxels) are not hidden from most of the directions that they face.

    Each direction has a map of the nearest surface, with cells of VIEW_CELL voxels; `tick` is told how many are done.
    """
    faced = np.zeros(len(points))
    seen = np.zeros(len(points))
    for number, direction in enumerate(_directions(VIEWS)):
        tick(number)
        across = np.cross(direction, np.eye(3)[np.argmin(np.abs(direction))])
        across /= np.linalg.norm(across)
        cells = np.stack([points @ across, points @ np.cross(direction, across)], axis=1) / VIEW_CELL
        cells = np.rint(cells - cells.min(axis=0)).astype(np.int64)
        index = cells[:, 0] * (cells[:, 1].max() + 1) + cells[:, 1]
        height = points @ direction
        order = np.argsort(height, kind="stable")
        top = np.empty(int(index.max()) + 1)
        # of several assignments to one cell the last, which is the highest, stays
        top[index[order]] = height[order]
        facing = normals @ direction > 0.3
        faced += facing
        seen += facing & (height > top[index] - 2 * VIEW_CELL)
    tick(VIEWS)
    return seen >= SEEN * np.maximum(faced, 1)


# --------------------------------------------------------------------------------------------------------------
# alignment of surfaces


def _thin(points: FloatArray, count: int) -> NDArray[np.intp]:
    """Give indices of about `count` points spread evenly over what the points cover."""
    if len(points) <= count:
        return np.arange(len(points))
    start = points.min(axis=0)
    high = float(np.ptp(points, axis=0).max())
    low = 0.0
    best = np.arange(len(points))
    for _ in range(12):
        cell = (low + high) / 2
        key = ((points - start) / cell).astype(np.int64)
        size = key.max(axis=0) + 1
        flat = (key[:, 0] * size[1] + key[:, 1]) * size[2] + key[:, 2]
        best = np.unique(flat, return_index=True)[1]
        if len(best) > count:
            low = cell
        else:
            high = cell
        if 0.9 * count <= len(best) <= count:
            break
    return best


def _without_strays(points: FloatArray) -> FloatArray:
    """Points that are not far from all others, or much farther than their neighbours are from theirs."""
    near, index = cKDTree(points).query(points, k=9)
    spacing = near[:, 1:].mean(axis=1)
    local = np.median(spacing[index[:, 1:]], axis=1)
    keep = (spacing <= 4 * np.median(spacing)) & (spacing <= 3 * local)
    return points[keep]


def _normals_of(points: FloatArray) -> tuple[FloatArray, float]:
    """Estimate normals (sign unknown) of a cloud, and the noise across its surface (standard deviation)."""
    _, index = cKDTree(points).query(points, k=min(16, len(points)))
    near = points[index]
    near = near - near.mean(axis=1, keepdims=True)
    value, vector = np.linalg.eigh(np.einsum("nka,nkb->nab", near, near))
    # three of the numbers went into the plane
    noise = np.sqrt(np.maximum(value[:, 0], 0) / max(near.shape[1] - 3, 1))
    return vector[:, :, 0], float(np.median(noise))


def _rotations(count: int) -> FloatArray:
    """Rotations spread evenly over all (super-Fibonacci spiral, Alexa 2022, CVPR, algorithm 1)."""
    s = np.arange(count) + 0.5
    t = s / count
    r, rest = np.sqrt(t), np.sqrt(1 - t)
    alpha, beta = 2 * np.pi * s / math.sqrt(2), 2 * np.pi * s / 1.533751168755204288118041
    q = np.stack([r * np.sin(alpha), r * np.cos(alpha), rest * np.sin(beta), rest * np.cos(beta)], axis=1)
    return quaternion_to_matrix(q)


def _axis_rotations(source: FloatArray, target: FloatArray) -> FloatArray:
    """Give the four rotations that lay the principal axes of one cloud on those of the other."""
    axes = []
    for points in (source, target):
        vectors = np.linalg.eigh(np.cov(points.T))[1]
        axes.append(vectors * np.sign(np.linalg.det(vectors)))
    flips = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=np.float64)
    return np.einsum("ab,nb,cb->nac", axes[1], flips, axes[0])


@dataclass
class _Surface:
    """Points with normals and their tree."""

    points: FloatArray
    normals: FloatArray

    def __post_init__(self) -> None:
        self.tree = cKDTree(self.points)
        near = self.tree.query(self.points, k=2)[0][:, 1]
        self.spacing = float(np.median(near))


@dataclass
class _Poses:
    """Similarities x -> scale * rotation @ x + shift, many at once."""

    rotation: FloatArray
    scale: FloatArray
    shift: FloatArray

    def __len__(self) -> int:
        return len(self.scale)

    def take(self, index: Any) -> _Poses:
        return _Poses(self.rotation[index], self.scale[index], self.shift[index])

    def apply(self, points: FloatArray) -> FloatArray:
        turned = np.einsum("sab,pb->spa", self.rotation, points)
        return self.scale[:, None, None] * turned + self.shift[:, None]

    def undo(self, points: FloatArray) -> FloatArray:
        back = np.einsum("sba,spb->spa", self.rotation, points[None] - self.shift[:, None])
        return back / self.scale[:, None, None]

    def moved(self, update: FloatArray, centre: FloatArray) -> _Poses:
        """Turn and scale by an update (n, 7: rotation, scale, shift) about centres (n, 3)."""
        turn = rotation_vector_to_matrix(update[:, :3])
        grow = np.exp(update[:, 3])
        shift = grow[:, None] * np.einsum("sab,sb->sa", turn, self.shift - centre) + centre + update[:, 4:]
        return _Poses(turn @ self.rotation, grow * self.scale, shift)


def _jacobian(arm: FloatArray, normal: FloatArray) -> FloatArray:
    """Give the derivative (..., 7) of the distance along the normal: rotation, scale, shift."""
    return np.concatenate(
        [np.cross(arm, normal), np.sum(arm * normal, axis=-1, keepdims=True), normal], axis=-1
    )


def _iterate(
    poses: _Poses,
    points: FloatArray,
    normals: FloatArray,
    target: _Surface,
    limits: tuple[float, float],
    iterations: int,
    along: float,
    compatible: bool,
    tick: Callable[[], None],
) -> _Poses:
    """Point-to-plane steps with scale; `along` is the weight of distances along the surface."""
    corners = np.eye(3)
    for _ in range(iterations):
        tick()
        x = poses.apply(points)
        distance, index = target.tree.query(x, eps=NEAREST)
        n = target.normals[index]
        weight = (distance <= np.quantile(distance, TRIM, axis=1, keepdims=True)).astype(np.float64)
        if compatible:
            turned = np.einsum("sab,pb->spa", poses.rotation, normals)
            weight *= np.sum(turned * n, axis=2) ** 2
        total = weight.sum(axis=1, keepdims=True)
        centre = np.einsum("sp,spa->sa", weight, x) / total
        arm = x - centre[:, None]
        miss = target.points[index] - x
        rows = _jacobian(arm, n)
        a = np.einsum("sp,spi,spj->sij", weight, rows, rows, optimize=True)
        b = np.einsum("sp,spi,spa,spa->si", weight, rows, n, miss, optimize=True)
        if along:
            for corner in corners:
                rows = _jacobian(arm, np.broadcast_to(corner, arm.shape))
                a += along * np.einsum("sp,spi,spj->sij", weight, rows, rows, optimize=True)
                b += along * np.einsum("sp,spi,sp->si", weight, rows, miss @ corner, optimize=True)
        a += (1e-4 * np.trace(a, axis1=1, axis2=2) / 7)[:, None, None] * np.eye(7)
        update = np.linalg.solve(a, b[..., None])[..., 0]
        size = np.linalg.norm(update[:, :3], axis=1, keepdims=True)
        update[:, :3] *= np.minimum(1, 0.5 / np.maximum(size, 1e-12))
        update[:, 3] = np.log(np.clip(poses.scale * np.exp(update[:, 3]), *limits) / poses.scale)
        poses = poses.moved(update, centre)
    return poses


def _gap(points: FloatArray, other: _Surface, spacing: float | FloatArray) -> tuple[FloatArray, NDArray[Any]]:
    """Distance to a surface that is known by its points only, and the nearest points."""
    distance, index = other.tree.query(points)
    miss = points - other.points[index]
    across = np.abs(np.sum(miss * other.normals[index], axis=-1))
    along = np.sqrt(np.maximum(distance**2 - across**2, 0))
    return np.hypot(across, np.maximum(along - spacing, 0)), index


def _agreement(
    poses: _Poses,
    source: _Surface,
    chosen: NDArray[np.intp],
    target: _Surface,
    back: FloatArray,
    reach: float,
) -> FloatArray:
    """Score 0 to 1 of each pose, from the source's points and the target's (`back`), in the target's units."""
    there = _gap(poses.apply(source.points[chosen]), target, 1.5 * target.spacing)[0]
    again = _gap(poses.undo(back), source, 3 * source.spacing)[0] * poses.scale[:, None]
    parts = [np.maximum(1 - (gap / reach) ** 2, 0).mean(axis=1) for gap in (there, again)]
    return (parts[0] + parts[1]) / 2


def _distinct(poses: _Poses, scores: FloatArray, points: FloatArray, limit: int) -> list[int]:
    """Give indices of poses that differ, best first."""
    moved = poses.apply(points)
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        if all(np.sqrt(np.mean(np.sum((moved[i] - moved[j]) ** 2, axis=1))) > SAME for j in kept):
            kept.append(int(i))
        if len(kept) == limit:
            break
    return kept


def _search(
    source: _Surface, target: _Surface, starts: int, scales: tuple[float, ...], tick: Callable[[], None]
) -> tuple[_Poses, FloatArray]:
    """Distinct poses, best first, and their scores; both surfaces centred, root mean square radius 1.

    The starts take the scales in turn.
    """
    few = _thin(source.points, SEARCH_POINTS)
    points, normals = source.points[few], source.normals[few]
    back = target.points[_thin(target.points, SEARCH_POINTS)]
    rotation = np.concatenate([_axis_rotations(source.points, target.points), _rotations(starts)])
    n = len(rotation)
    poses = _Poses(rotation, np.resize(scales, n).astype(np.float64), np.zeros((n, 3)))
    limits = (min(scales) / SCALE_RANGE, max(scales) * SCALE_RANGE)
    # half the points will do to turn the worst away
    poses = _iterate(poses, points[::2], normals[::2], target, limits, 5, 0.3, False, tick)
    poses = _iterate(poses, points, normals, target, limits, 6, 0.05, True, tick)
    scores = _agreement(poses, source, few, target, back, REACH_SEARCH)
    tick()
    poses = poses.take(_distinct(poses, scores, points, REFINED))
    more = _thin(source.points, REFINE_POINTS)
    points, normals = source.points[more], source.normals[more]
    poses = _iterate(poses, points, normals, target, limits, 10, 0.01, True, tick)
    back = target.points[_thin(target.points, REFINE_POINTS)]
    scores = _agreement(poses, source, more, target, back, REACH)
    tick()
    best = _distinct(poses, scores, points, REFINED)
    return poses.take(best), scores[best]


@dataclass
class _Fit:
    """The end of a fit: pose, residuals that count, and errors (rotation rad, relative scale, shift)."""

    poses: _Poses
    rms: float
    errors: tuple[float, float, float]


def _blocks(points: FloatArray) -> NDArray[np.intp]:
    """Numbers of the patches that points lie in; residuals of one patch have errors in common."""
    size = PATCH * float(np.sqrt(np.mean(np.sum((points - points.mean(axis=0)) ** 2, axis=1))))
    key = np.floor((points - points.min(axis=0)) / size).astype(np.int64)
    return np.unique(key, axis=0, return_inverse=True)[1].ravel()


def _errors(
    normal: FloatArray, weighted: FloatArray, miss: FloatArray, patch: NDArray[np.intp]
) -> tuple[float, float, float]:
    """Errors of rotation, scale and shift from residuals that are correlated within patches.

    The sandwich estimate for clusters (Liang & Zeger 1986, Biometrika 73:13).
    """
    inverse = np.linalg.inv(normal)
    count = int(patch.max()) + 1
    pull = np.zeros((count, weighted.shape[1]))
    np.add.at(pull, patch, weighted * miss[:, None])
    covariance = inverse @ (pull.T @ pull) @ inverse * (count / max(count - 1, 1))
    variance = np.maximum(np.diag(covariance), 0)
    return (
        math.sqrt(float(variance[:3].sum())),
        math.sqrt(float(variance[3])),
        math.sqrt(float(variance[4:7].sum())),
    )


def _polish(poses: _Poses, source: _Surface, target: _Surface, tick: Callable[[], None]) -> _Fit:
    """Fit one pose to the full surface: robust point-to-plane, with one offset along all normals.

    The offset takes up a threshold that is a little off or a blurred volume, which would spoil the scale; a prior
    keeps it small where the shape (a ball) can not tell it from scale.
    """
    anchor = np.zeros((1, 3))
    offset = 0.0
    for _ in range(FINAL_STEPS):
        tick()
        x = poses.apply(source.points)[0]
        distance, index = target.tree.query(x)
        n = target.normals[index]
        miss = np.sum((target.points[index] - x) * n, axis=1) + offset
        turned = source.normals @ poses.rotation[0].T
        facing = np.abs(np.sum(turned * n, axis=1))
        near = distance < REACH
        spread = 1.4826 * float(np.median(np.abs(miss[near]))) if near.any() else REACH
        spread = max(spread, 1e-6)
        # Tukey's biweight
        weight = near * facing * np.maximum(1 - (miss / (4.685 * spread)) ** 2, 0) ** 2
        total = max(float(weight.sum()), 1e-9)
        anchor = (weight @ x / total)[None]
        rows = np.concatenate([_jacobian(x - anchor, n), -np.ones((len(x), 1))], axis=1)
        weighted = rows * weight[:, None]
        prior = np.zeros(8)
        prior[7] = total * (spread / OFFSET_PRIOR / target.spacing) ** 2 / OFFSET_SAMPLES
        a = weighted.T @ rows + np.diag(prior) + 1e-9 * total * np.eye(8)
        update = np.linalg.solve(a, weighted.T @ miss - prior * np.array([0.0] * 7 + [offset]))
        poses = poses.moved(update[None, :7], anchor)
        offset += float(update[7])
        if float(np.abs(update).max()) < 1e-6:
            break
    rms = math.sqrt(float(weight @ miss**2) / total)
    turn, grow, move = _errors(a, weighted, miss, _blocks(x))
    common = COMMON * target.spacing
    return _Fit(poses, rms, (turn, math.hypot(grow, common), math.hypot(move, common)))


@dataclass
class _Found:
    """An attempt: poses that fit best and as well, and what says whether they fit."""

    fits: list[_Fit]
    scores: list[float]
    points_on: float
    surface_on: float

    @property
    def matched(self) -> bool:
        both = self.points_on * self.surface_on
        return self.points_on >= POINTS_ON and self.surface_on >= SURFACE_ON and both >= BOTH_ON


def _attempt(
    source: _Surface,
    noise: float,
    coarse: _Surface,
    full: _Surface,
    starts: int,
    scales: tuple[float, ...],
    tick: Callable[[], None],
) -> _Found:
    poses, scores = _search(source, coarse, starts, scales, tick)
    few = _thin(source.points, REFINE_POINTS)
    back = coarse.points[_thin(coarse.points, REFINE_POINTS)]
    near = min(max(ON_SURFACE, ON_NOISE * noise), ON_MOST)
    found: list[_Found] = []
    for i in np.flatnonzero(scores > scores[0] - 2 * TIE):
        fit = _polish(poses.take([i]), source, full, tick)
        there = _gap(fit.poses.apply(source.points[few]), full, 1.5 * full.spacing)[0]
        again = _gap(fit.poses.undo(back), source, 3 * source.spacing)[0] * fit.poses.scale[0]
        score = float(_agreement(fit.poses, source, few, coarse, back, REACH)[0])
        found.append(_Found([fit], [score], float((there < near).mean()), float((again < near).mean())))
        if len(found) == REFUSALS and not any(f.matched for f in found):
            break
    found.sort(key=lambda f: (not f.matched, -f.scores[0]))
    best = found[0]
    tied = [f for f in found if f.matched == best.matched and f.scores[0] > best.scores[0] - TIE]
    return replace(best, fits=[f.fits[0] for f in tied], scores=[f.scores[0] for f in tied])


def _centred(points: FloatArray, name: str) -> tuple[FloatArray, float]:
    """Middle and root mean square radius of what the points cover, however dense they are where."""
    even = points[_thin(points, REFINE_POINTS)]
    middle = even.mean(axis=0)
    radius = math.sqrt(float(np.mean(np.sum((even - middle) ** 2, axis=1))))
    if not radius > 1e-9 * (1 + float(np.abs(middle).max())):
        raise ValueError(f"{name}: got points that are all in one place, need points on a surface.")
    return middle, radius


def align_surfaces(
    points: ArrayLike,
    target_points: ArrayLike,
    target_normals: ArrayLike,
    *,
    starts: int = STARTS,
    step: Step | None = None,
) -> Alignment:
    """Find the similarity that lays points on a surface, without a starting guess.

    Rotations spread over all of them and the principal axes start point-to-plane fits with scale (Chen & Medioni
    1992, Image Vis Comput 10:145) on few points; the best that differ are refined on more; the best and those that
    tie with it are fitted robustly to the whole surface. Strays, missing parts and points of uneven density do no
    harm. Deterministic.

    Parameters
    ----------
    points : array_like (n, 3)
        Points on the object's outside in the photo world (z, y, x), such as the sparse points of COLMAP.
    target_points, target_normals : array_like (m, 3)
        From :func:`surface_of_volume`: X-ray world (z, y, x).
    starts : int
        Rotations to start from.
    step : callable, optional
        Called with what is done and the total; it may raise to stop.

    Returns
    -------
    Alignment
        With ``matched`` False, and the reason, when this is another object.

    Raises
    ------
    ValueError
        If there are too few points, shapes do not fit, or coordinates are not finite.

    Examples
    --------
    >>> z, y, x = np.mgrid[:40, :40, :40] - 19.5
    >>> body = (z / 15) ** 2 + (y / 9) ** 2 + (x / 6) ** 2 < 1
    >>> horn = (z - 8) ** 2 + (y - 7) ** 2 + (x - 2) ** 2 < 25
    >>> points, normals = surface_of_volume(body | horn, Grid((40, 40, 40)))
    >>> found = align_surfaces(0.5 * points[::3, [1, 2, 0]] + 5, points, normals)
    >>> found.matched, round(found.scale, 2)
    (True, 2.0)
    """
    cloud = _check_points(points, "points", 50)
    goal = _check_points(target_points, "target_points", 50)
    normals = _check_points(target_normals, "target_normals", 50)
    if normals.shape != goal.shape:
        raise ValueError(
            f"target_normals: got shape {normals.shape}, need that of target_points, {goal.shape}."
        )
    cloud, once = cloud[_once(cloud)], _once(goal)
    goal, normals = goal[once], normals[once]
    if starts < 1:
        raise ValueError(f"starts: got {starts}, need at least 1.")
    _centred(cloud, "points")
    if len(cloud) < 50:
        raise ValueError(f"points: got {len(cloud)} that differ, need at least 50.")
    kept = _without_strays(cloud)
    if len(kept) < 50:
        raise ValueError(f"points: got {len(kept)} that are not strays, need at least 50 on the surface.")
    middle, radius = _centred(kept, "points")
    few = _thin(goal, TARGET_POINTS)
    goal_middle, goal_radius = _centred(goal, "target_points")
    goal = (goal - goal_middle) / goal_radius
    coarse, full = _Surface(goal[few], normals[few]), _Surface(goal, normals)
    unit = (kept - middle) / radius
    directions, noise = _normals_of(unit)
    source = _Surface(unit, directions)

    flip = np.array([-1.0, 1.0, 1.0])
    mirror = _Surface(unit * flip, directions * flip)

    # what a search and a final fit take
    part = 23 + FINAL_STEPS
    count, total = 0, 2 * part

    def tick() -> None:
        nonlocal count
        count = min(count + 1, total)
        if step is not None:
            step(count, total)

    found = _attempt(source, noise, coarse, full, starts, (1.0,), tick)
    # a body that is nearly symmetric fits its mirror image well: only the comparison tells
    other = _attempt(mirror, noise, coarse, full, math.ceil(starts / 2), (1.0,), tick)
    mirrored = other.matched and other.scores[0] > found.scores[0] + TIE
    if not (found.matched or mirrored):
        total += part
        second = _attempt(source, noise, coarse, full, starts, OTHER_SCALES, tick)
        if second.matched or second.scores[0] > found.scores[0]:
            found = second
    reason = ""
    if mirrored:
        reason = (
            f"no match: the points' mirror image fits better (score {other.scores[0]:.2f}, not "
            f"{found.scores[0]:.2f}); the coordinates of one side are mirrored: check the axes and their directions."
        )
    elif not found.matched:
        reason = (
            f"no match: {found.points_on:.0%} of the points lie on the volume's surface and {found.surface_on:.0%} "
            f"of that surface has points (need {POINTS_ON:.0%} and {SURFACE_ON:.0%}, and {BOTH_ON:.0%} for their "
            "product); this looks like another object, or the surface's threshold is wrong."
        )
    elif len(found.fits) > 1:
        reason = f"{len(found.fits)} poses fit about equally well; compare them and choose one."
    if step is not None:
        step(total, total)

    def world(poses: _Poses) -> FloatArray:
        scale = float(poses.scale[0]) * goal_radius / radius
        shift = poses.shift[0] * goal_radius + goal_middle - scale * poses.rotation[0] @ middle
        return _matrix(scale, poses.rotation[0], shift)

    candidates = tuple(
        Candidate(world(f.poses), round(s, 4)) for f, s in zip(found.fits, found.scores, strict=True)
    )
    best = found.fits[0]
    return Alignment(
        transform=candidates[0].transform,
        scale=_scale_of(candidates[0].transform),
        score=candidates[0].score,
        rms=best.rms * goal_radius,
        rotation_error=math.degrees(best.errors[0]),
        scale_error=best.errors[1],
        shift_error=best.errors[2] * goal_radius,
        candidates=candidates,
        matched=found.matched and not mirrored,
        reason=reason,
    )


# --------------------------------------------------------------------------------------------------------------
# landmarks


def _umeyama(source: FloatArray, target: FloatArray, mirror: bool) -> tuple[FloatArray, float]:
    """Give the similarity of least squares, with determinant < 0 for `mirror`, and its residual."""
    a, b = source - source.mean(axis=0), target - target.mean(axis=0)
    u, d, vt = np.linalg.svd(b.T @ a)
    sign = np.ones(3)
    if (np.linalg.det(u @ vt) < 0) != mirror:
        sign[2] = -1
    rotation = (u * sign) @ vt
    scale = float(d @ sign) / float(np.sum(a * a))
    transform = _matrix(scale, rotation, target.mean(axis=0) - scale * rotation @ source.mean(axis=0))
    return transform, math.sqrt(float(np.mean(np.sum((_apply(transform, source) - target) ** 2, axis=1))))


def align_landmarks(source: ArrayLike, target: ArrayLike) -> Alignment:
    """Find the similarity of least squares between pairs of landmarks (Umeyama 1991, IEEE TPAMI 13:376).

    Parameters
    ----------
    source : array_like (n, 3)
        Landmarks in the photo world, (z, y, x); at least three that are not on a line.
    target : array_like (n, 3)
        The same landmarks in the X-ray world, in the same order.

    Returns
    -------
    Alignment
        With the distance of each pair in ``residuals``; the error is unknown (NaN) for three pairs.

    Raises
    ------
    ValueError
        If there are too few, they are on a line, or their mirror image fits where they do not.

    Examples
    --------
    >>> source = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3.0]])
    >>> found = align_landmarks(source, 2 * source + 1)
    >>> round(found.scale, 6), bool(found.residuals.max() < 1e-9)
    (2.0, True)
    """
    a = _check_points(source, "source", 3)
    b = _check_points(target, "target", 3)
    if a.shape != b.shape:
        raise ValueError(f"target: got {len(b)} landmarks, need {len(a)}, one for each of source.")
    for name, points in (("source", a), ("target", b)):
        extent = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
        if not extent[1] > LINE * extent[0]:
            raise ValueError(
                f"{name}: got landmarks on a line or in one place, need three that span a triangle."
            )
    transform, rms = _umeyama(a, b, False)
    scale = _scale_of(transform)
    radius = math.sqrt(float(np.mean(np.sum((b - b.mean(axis=0)) ** 2, axis=1))))
    other = _umeyama(a, b, True)[1]
    if len(a) > 3 and rms > MIRRORED_LEAST * radius and other < MIRRORED * rms:
        raise ValueError(
            f"source: got landmarks whose mirror image fits to {other:.3g} and they themselves to {rms:.3g}; the "
            "coordinates of one side are mirrored: check the axes and their directions."
        )
    moved = _apply(transform, a)
    miss = b - moved
    arm = moved - moved.mean(axis=0)
    rows = np.concatenate([_jacobian(arm, np.broadcast_to(axis, arm.shape)) for axis in np.eye(3)])
    free = rows.shape[0] - 7
    errors = [math.nan] * 3
    if len(a) > 3:
        variance = np.diag(np.linalg.pinv(rows.T @ rows, hermitian=True)) * float(np.sum(miss**2)) / free
        errors = [math.sqrt(float(v)) for v in (variance[:3].sum(), variance[3], variance[4:].sum())]
    score = max(1 - rms / radius, 0.0)
    return Alignment(
        transform=transform,
        scale=scale,
        score=score,
        rms=rms,
        rotation_error=math.degrees(errors[0]),
        scale_error=errors[1],
        shift_error=errors[2],
        candidates=(Candidate(transform, score),),
        matched=True,
        reason="",
        residuals=np.linalg.norm(miss, axis=1),
    )


# --------------------------------------------------------------------------------------------------------------
# silhouettes


def _check_masks(masks: ArrayLike, cameras: Sequence[Camera]) -> NDArray[np.float32]:
    out = np.asarray(masks, dtype=np.float32)
    if out.ndim != 3 or len(out) != len(cameras):
        raise ValueError(f"masks: got shape {out.shape}, need ({len(cameras)}, H, W), one for each camera.")
    for i, camera in enumerate(cameras):
        if camera.size != out.shape[1:]:
            raise ValueError(
                f"cameras: got size {camera.size} for view {i}, need the masks' {out.shape[1:]}."
            )
    if not (np.isfinite(out).all() and out.min() >= 0 and out.max() <= 1):
        raise ValueError(
            "masks: got values outside 0 to 1, need 1 inside the object; divide 8-bit masks by 255."
        )
    return out


def _outline(mask: NDArray[np.float32]) -> tuple[FloatArray, FloatArray]:
    """Points (row, column) of a mask's outline and unit vectors pointing out of it."""
    from skimage.measure import find_contours

    parts = [part[:-1] if (part[0] == part[-1]).all() else part for part in find_contours(mask, OUTLINE)]
    if not parts:
        return np.zeros((0, 2)), np.zeros((0, 2))
    points = np.concatenate(parts)
    slope = np.stack(
        [
            ndimage.map_coordinates(
                ndimage.gaussian_filter(mask, OUTLINE_SMOOTHING, order=order),
                points.T,
                order=1,
                mode="nearest",
            )
            for order in ((1, 0), (0, 1))
        ],
        axis=1,
    ).astype(np.float64)
    length = np.linalg.norm(slope, axis=1)
    good = length > 1e-6
    return points[good], -slope[good] / length[good, None]


def _pairs_near(points: FloatArray) -> NDArray[np.intp]:
    """Pairs (n, 2) of neighbours."""
    count = min(RIM_NEIGHBOURS + 1, len(points))
    index = cKDTree(points).query(points, k=count)[1][:, 1:]
    pairs = np.stack([np.repeat(np.arange(len(points)), count - 1), index.ravel()], axis=1)
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _rim(
    points: FloatArray, normals: FloatArray, pairs: NDArray[np.intp], camera: Camera
) -> tuple[FloatArray, FloatArray]:
    """Where the surface turns away from the camera, between neighbours, and its normals there."""
    side = np.einsum("na,na->n", normals, points - camera.centre)
    first, second = pairs.T
    cross = (side[first] > 0) != (side[second] > 0)
    first, second = first[cross], second[cross]
    part = (side[first] / (side[first] - side[second]))[:, None]
    normal = normals[first] + part * (normals[second] - normals[first])
    length = np.linalg.norm(normal, axis=1)
    good = length > 0.5
    place = points[first] + part * (points[second] - points[first])
    return place[good], normal[good] / length[good, None]


def _pixel_gradient(places: FloatArray, across: FloatArray, camera: Camera) -> FloatArray:
    """Give the derivative (n, 3) by the place in the world of the pixel (row, column) along `across` (n, 2)."""
    seen = places @ camera.world_to_camera[:3, :3].T + camera.world_to_camera[:3, 3]
    depth = seen[:, 2]
    by_x = across[:, 1] * camera.intrinsics[0, 0] / depth
    by_y = across[:, 0] * camera.intrinsics[1, 1] / depth
    by_z = -(by_x * seen[:, 0] + by_y * seen[:, 1]) / depth
    return np.stack([by_x, by_y, by_z], axis=1) @ camera.world_to_camera[:3, :3]


@dataclass
class _Outlines:
    """Pairs of outline and rim over all views at one pose: what a step needs."""

    places: FloatArray
    gradients: FloatArray
    sides: FloatArray
    miss: FloatArray
    share: float


def _pair_outlines(
    surface: tuple[FloatArray, FloatArray],
    pairs: NDArray[np.intp],
    outlines: Sequence[tuple[FloatArray, FloatArray]],
    cameras: Sequence[Camera],
    reach: float,
) -> _Outlines:
    """Pair each outline point with the nearest rim that faces its way; `surface` is in the photo world."""
    places, gradients, misses, sides = [], [], [], []
    count = sum(len(points) for points, _ in outlines)
    for (points, out), camera in zip(outlines, cameras, strict=True):
        if not len(points):
            continue
        rim, normal = _rim(*surface, pairs, camera)
        pixels, depth = camera.project(rim)
        front = depth > 0
        rim, normal, pixels = rim[front], normal[front], pixels[front]
        if not len(rim):
            continue
        distance, index = cKDTree(pixels).query(points, distance_upper_bound=reach)
        near = np.isfinite(distance)
        points, out, index = points[near], out[near], index[near]
        # the picture of the normal at the rim is the picture's normal
        turned = normal[index] @ camera.world_to_camera[:2, :3].T
        length = np.maximum(np.linalg.norm(turned, axis=1), 1e-12)
        facing = np.sum(turned[:, ::-1] * out, axis=1) > RIM_FACING * length
        points, out, index = points[facing], out[facing], index[facing]
        places.append(rim[index])
        gradients.append(_pixel_gradient(rim[index], out, camera))
        misses.append(np.sum((points - pixels[index]) * out, axis=1))
        sides.append(np.sum(gradients[-1] * normal[index], axis=1))
    if not places:
        return _Outlines(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros(0), 0.0)
    paired = [np.concatenate(part) for part in (places, gradients, sides, misses)]
    return _Outlines(paired[0], paired[1], paired[2], paired[3], len(paired[0]) / count)


def refine_on_silhouettes(
    alignment: Alignment,
    masks: ArrayLike,
    cameras: Sequence[Camera],
    points: ArrayLike,
    normals: ArrayLike,
    *,
    step: Step | None = None,
) -> Alignment:
    """Refine an alignment on the outlines of the object in the photographs.

    The rim of the surface, where it turns away from a camera, is projected into each photograph and drawn to the
    outline of the mask, along the outline's normal, by robust Gauss-Newton steps over all views at once: rotation,
    scale, shift, and one offset along the surface's normals.

    Parameters
    ----------
    alignment : Alignment
        From :func:`align_surfaces` or :func:`align_landmarks`; outlines should lie within some ten pixels.
    masks : array_like (n, H, W)
        1 inside the object, 0 outside, between at its edge. Empty ones are passed over.
    cameras : sequence of Camera
        In the photo world, one for each mask.
    points, normals : array_like (m, 3)
        The dense surface from :func:`surface_of_volume`, X-ray world.
    step : callable, optional
        Called with what is done and the total; it may raise to stop.

    Returns
    -------
    Alignment
        The same with a better transform; ``rms`` is in pixels. When the outlines do not fit, the one that was given,
        with the reason.

    Raises
    ------
    ValueError
        If shapes do not fit, values are out of range, or all masks are empty.
    """
    values = _check_masks(masks, cameras)
    goal = _check_points(points, "points", 50)
    directions = _check_points(normals, "normals", 50)
    if directions.shape != goal.shape:
        raise ValueError(f"normals: got shape {directions.shape}, need that of points, {goal.shape}.")
    once = _once(goal)
    goal, directions = goal[once], directions[once]
    outlines = [_outline(mask) for mask in values]
    count = sum(len(places) for places, _ in outlines)
    if count == 0:
        raise ValueError("masks: got none with an outline, need 1 inside the object and 0 outside.")
    every = max(1, math.ceil(count / OUTLINE_POINTS))
    outlines = [(places[::every], out[::every]) for places, out in outlines]
    pairs = _pairs_near(goal)
    radius = _centred(goal, "points")[1]
    spacing = _Surface(goal, directions).spacing
    inverse: FloatArray = np.linalg.inv(alignment.transform).astype(np.float64)
    scale = _scale_of(inverse)
    # X-ray world to photo world
    pose = _Poses(inverse[None, :3, :3] / scale, np.array([scale]), inverse[None, :3, 3])
    offset = 0.0
    for i in range(SILHOUETTE_STEPS):
        if step is not None:
            step(i, SILHOUETTE_STEPS)
        scale = float(pose.scale[0])
        turned = directions @ pose.rotation[0].T
        surface = (pose.apply(goal)[0] + scale * offset * turned, turned)
        reach = max(RIM_REACH[0] / 2**i, RIM_REACH[1])
        paired = _pair_outlines(surface, pairs, outlines, cameras, reach)
        if paired.share < OUTLINE_ON:
            return replace(
                alignment,
                reason=f"outlines: {paired.share:.0%} of them have the volume's rim within {reach:.0f} pixels (need "
                f"{OUTLINE_ON:.0%}); the alignment is not refined.",
            )
        miss = paired.miss
        spread = max(1.4826 * float(np.median(np.abs(miss))), 1e-3)
        # Tukey's biweight
        weight = np.maximum(1 - (miss / (4.685 * spread)) ** 2, 0) ** 2
        total = float(weight.sum())
        anchor = pose.apply(goal.mean(axis=0, keepdims=True))[0]
        arm = paired.places - anchor
        rows = np.concatenate([_jacobian(arm, paired.gradients), scale * paired.sides[:, None]], axis=1)
        weighted = rows * weight[:, None]
        prior = np.zeros(8)
        prior[7] = total * (spread / (OFFSET_PRIOR * spacing)) ** 2 / OFFSET_SAMPLES
        normal = weighted.T @ rows + np.diag(prior)
        normal += np.diag(1e-9 * np.diag(normal))
        update = np.linalg.solve(normal, weighted.T @ miss - prior * offset)
        pose = pose.moved(update[None, :7], anchor)
        offset += float(update[7])
    if step is not None:
        step(SILHOUETTE_STEPS, SILHOUETTE_STEPS)
    scale = float(pose.scale[0])
    transform: FloatArray = np.linalg.inv(_matrix(scale, pose.rotation[0], pose.shift[0])).astype(np.float64)
    turn, grow, move = _errors(normal, weighted, miss, _blocks(paired.places))
    common = COMMON * spacing
    return replace(
        alignment,
        transform=transform,
        scale=1 / scale,
        rms=math.sqrt(float(weight @ miss**2) / total),
        rotation_error=math.degrees(turn),
        scale_error=math.hypot(grow, common / radius),
        shift_error=math.hypot(move / scale, common),
        candidates=(Candidate(transform, alignment.score),),
        reason="",
    )
