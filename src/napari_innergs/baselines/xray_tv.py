"""Reconstruction of projections with total variation, its weight chosen from the projections themselves.

Minimises ``sum w (A x - b)^2 / 2 + lambda TV(x)`` for ``x >= 0``, with SART's ray weights times the fourth root
of each ray's transmission as ``w`` (penalised weighted least squares): steps of SART over ordered subsets, each
followed by the proximal step of the total variation in the metric of the step (forward-backward splitting:
Combettes & Wajs 2005, Multiscale Model Simul 4:1168), with the momentum of Beck & Teboulle 2009 (IEEE TIP 18:2419),
held below a limit since subsets disagree (Kim, Ramani & Fessler 2015, IEEE TMI 34:167).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from napari_innergs.baselines.sart import Problem, Step, set_up
from napari_innergs.baselines.tv import tv_proximal
from napari_innergs.cpu.sweeps import ahead_of
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry

__all__ = ["TvReconstruction", "flatness", "guided_tv", "reconstruct_tv"]

#: Objects whose gradient is less even than this (:func:`flatness`) are made of flat parts with sharp borders.
FLAT = 0.21
#: Power of the transmission in the weights of rays: between none and the variance of photon counts, because with few
#: views even a noisy ray tells what no other does (measured).
TRUST = 0.25

# Limit of the momentum: errors of a subset's step grow by 1 / (1 - MOMENTUM).
MOMENTUM = 0.97
# After so many passes the subsets are made twice as large: small ones are fast first and disagree later.
OPENING = 12
# Views in a subset, and the limit of the number of subsets: more make momentum unstable.
SUBSET = 5
SUBSETS = 10
# Passes before the change counts: momentum has to build up first.
LEAST_PASSES = 24
# With fewer views than this a pass has so few steps that proportionally more passes are made.
VIEWS = 20
# Steps of the dual field after each step of SART; it starts where the last one ended.
INNER = 2
# Weights that are tried: from the first down, or up if that is too small, to these; the limit of their number; passes
# before them, and of each.
FIRST, LEAST, MOST = 2.0**-9, 2.0**-13, 2.0**-3
TRIALS = 8
OPENING_PASSES = 15
TRIAL_PASSES = 5
# Halving the weight must improve the residual on views held out by this factor to go on.
GAIN = 1.02
# Where it does not from the start on, doubling may worsen it by this factor.
LOSS = 1.01
# Guided: gradients that count half are the weight times this; passes at least and at most; voxels above this share
# of the largest are the object.
_HALF, _GUIDED_LEAST, _GUIDED_MOST, _OBJECT = 2.0**11, 20, 30, 0.03


@dataclass(frozen=True)
class TvReconstruction:
    """A volume and how its weight was found.

    Attributes
    ----------
    volume : ndarray of float32, (Z, Y, X)
        Attenuation per world unit.
    weight : float
        Weight of the total variation, as a share of the mean attenuation along the rays.
    trials : tuple of (float, float)
        Weights that were tried and the residual on the views held out, root mean square, weighted.
    passes : int
        Passes over all views in the last phase.
    change : float
        Relative change of the volume in the last pass.
    """

    volume: np.ndarray
    weight: float
    trials: tuple[tuple[float, float], ...]
    passes: int
    change: float


def _run(
    problem: Problem,
    volume: np.ndarray,
    dual: np.ndarray | None,
    threshold: float,
    passes: int,
    subsets: int | None,
    tolerance: float,
    tick: Callable[[int], None],
    limit: np.ndarray | None = None,
    least: int = LEAST_PASSES,
) -> tuple[np.ndarray, np.ndarray | None, int, float]:
    """Return volume, dual field, passes made and the last pass' relative change."""
    scale = problem.scale
    parts = problem.subsets(subsets)
    more = _more(len(problem.views))
    passes, opening, least = (math.ceil(count * more) for count in (passes, OPENING, least))
    tolerance /= more
    ahead = volume
    t = 1.0
    change = reached = math.inf
    done = 0
    while done < passes and not (change < tolerance and done >= least):
        done += 1
        begin, last = volume, change
        if done == opening + 1:
            parts = problem.subsets(len(parts) // 2)
        for part in parts:
            moved = problem.step(ahead, part)
            before = volume
            volume, dual = tv_proximal(
                moved, threshold, INNER, dual, nonnegative=True, scale=scale, limit=limit
            )
            if problem.support is not None:
                volume *= problem.support
            following = 0.5 * (1 + math.sqrt(1 + 4 * t * t))
            momentum = min((t - 1) / following, MOMENTUM)
            t = following
            # what a pass began with is still needed at its end, and by the caller
            ahead = ahead_of(volume, before, momentum, moved)
            tick(len(part))
        size = float(np.linalg.norm(volume))
        change = reached = float(np.linalg.norm(volume - begin)) / max(size, 1e-30)
        if done > 2 and change > (last if done > opening + 1 else 1.3 * last) and len(parts) > 1:
            # subsets that disagree drive the momentum: without it, and in larger ones, it dies out
            parts = problem.subsets(len(parts) // 2)
            ahead = volume
            t = 1.0
            change = math.inf
    return volume, dual, done, reached


def _more(views: int) -> float:
    """Return the factor on the passes for so many views."""
    return max(1.0, VIEWS / max(views, 1))


def reconstruct_tv(
    projections: np.ndarray,
    geometry: XrayGeometry,
    grid: Grid,
    weight: float | None = None,
    *,
    passes: int = 40,
    tolerance: float = 5e-4,
    subsets: int | None = None,
    start: np.ndarray | None = None,
    margin: int | tuple[int, int, int] = 0,
    trust: float = TRUST,
    support: np.ndarray | None = None,
    step: Step | None = None,
    backend: str = "auto",
) -> TvReconstruction:
    """Reconstruct with total variation.

    Without a weight, a tenth of the views is held out, and the weight is halved as long as the residual on these
    views falls by 2 % (if it does not at first, doubled as long as it rises by less than 1 %); each weight is tried
    from the same volume. Then all views are used, from the start again: momentum gains more than a start near by.

    Parameters
    ----------
    projections : ndarray, (n, V, U)
        Line integrals.
    geometry : XrayGeometry
        The scan.
    grid : Grid
        Where to reconstruct.
    weight : float, optional
        Weight of the total variation: what it takes away in a whole step of SART, as a share of the mean
        attenuation along the rays. Default: found by holding out views (needs at least 4).
    passes : int
        Limit of passes over all views; with fewer than 20 views there are proportionally more.
    tolerance : float
        The last phase ends when a pass changes the volume by less than this share, proportionally less with fewer
        than 20 views.
    subsets : int, optional
        Number of subsets to begin with; by default they have at least five views, and there are at most ten. There
        are half as many after the first passes, and again when they disagree so much that the steps grow.
    start : ndarray, (Z, Y, X), optional
        Volume to start from; zeros by default.
    margin : int or tuple of int
        Voxels added on each side of the grid's axes (z, y, x) while computing, for objects that go on outside.
    trust : float
        Power of the transmission in the weights of the rays; 0: SART's weights alone.
    support : ndarray of bool, (Z, Y, X), optional
        Voxels that may hold something, where that is known; the others are 0.
    step : callable, optional
        Called with what is done and the total, after each part; it may raise to stop. The total is a limit.
    backend : str
        Where rays are followed, as for :class:`~napari_innergs.operators.project.VoxelProjector`.

    Returns
    -------
    TvReconstruction
        Volume, weight and how it was found.

    Raises
    ------
    ValueError
        If shapes do not fit, a number is not finite, an argument is out of range, or there are too few views to
        hold some out.

    Examples
    --------
    >>> from napari_innergs.geometry.xray import ParallelBeam
    >>> scan = ParallelBeam.circular(np.arange(20) * np.pi / 20, detector_shape=(1, 33))
    >>> disc = 2 * np.sqrt(np.maximum(10.0**2 - (np.arange(33) - 16.0) ** 2, 0))
    >>> found = reconstruct_tv(np.broadcast_to(disc, (20, 1, 33)), scan, scan.default_grid())
    >>> round(float(found.volume[0, 12:21, 12:21].mean()), 1)
    1.0
    """
    if weight is not None and not weight >= 0:
        raise ValueError(f"weight: got {weight}, need 0 or more, or None to have it found.")
    if passes < 1:
        raise ValueError(f"passes: got {passes}, need at least 1.")
    if not 0 <= trust <= 1:
        raise ValueError(f"trust: got {trust}, need 0 to 1.")
    n = geometry.n_views
    if weight is None and n < 4:
        raise ValueError(f"projections: got {n} view(s), need at least 4 to find the weight; give a weight.")
    full = set_up(projections, geometry, grid, margin, None, trust, support, backend)
    if subsets is None:
        subsets = min(n // SUBSET, SUBSETS)
    # progress is counted in views
    total = limit = math.ceil(passes * _more(n)) * n
    count = 0

    def tick(views: int) -> None:
        nonlocal count
        count += views
        if step is not None:
            step(min(count, limit), limit)

    volume = full.enter(start)
    if full.support is not None:
        volume *= full.support
    trials: list[tuple[float, float]] = []
    if weight is None:
        every = max(min(10, n // 3), 2)
        held = np.arange(every // 2, n, every)
        others = np.setdiff1d(np.arange(n), held)
        train = set_up(projections, geometry, grid, margin, others, trust, support, backend)
        views = len(train.views)
        limit = total + math.ceil((OPENING_PASSES + TRIALS * TRIAL_PASSES) * _more(views)) * views
        weight = _find_weight(train, held, volume, subsets, trials, tick)
        count = limit - total
    threshold = weight * full.typical
    volume, _, done, change = _run(full, volume, None, threshold, passes, subsets, tolerance, tick)
    if step is not None:
        step(limit, limit)
    return TvReconstruction(full.leave(volume), weight, tuple(trials), done, change)


def _find_weight(
    problem: Problem,
    held: np.ndarray,
    volume: np.ndarray,
    subsets: int | None,
    trials: list[tuple[float, float]],
    tick: Callable[[int], None],
) -> float:
    """Return the weight by the rule of `reconstruct_tv`."""
    rays = problem.row[held]
    norm = float(rays.sum(dtype=np.float64))
    begin, dual, _, _ = _run(
        problem, volume, None, FIRST * problem.typical, OPENING_PASSES, subsets, 0.0, tick
    )

    def attempt(weight: float) -> float:
        # each from the same state: what more passes gain must not look like the weight's doing
        threshold = weight * problem.typical
        tried, *_ = _run(
            problem, begin, None if dual is None else dual.copy(), threshold, TRIAL_PASSES, subsets, 0.0, tick
        )
        residual = problem.residual(tried, held)
        trials.append((weight, math.sqrt(float(np.sum(rays * residual * residual, dtype=np.float64)) / norm)))
        return trials[-1][1]

    weight, last = FIRST, attempt(FIRST)
    while weight > LEAST:
        error = attempt(weight / 2)
        if error * GAIN > last:
            break
        weight, last = weight / 2, error
    if weight == FIRST:
        # more noise than usual
        while weight < MOST and attempt(weight * 2) <= LOSS * last:
            weight, last = weight * 2, trials[-1][1]
    return weight


def flatness(volume: np.ndarray) -> float:
    """Return how evenly the gradient of an object is spread: squared mean over mean square, 0 to 1.

    Small for objects of a few flat materials, whose gradient is concentrated on thin borders; 2 / pi for normally
    distributed differences.

    Parameters
    ----------
    volume : ndarray, (Z, Y, X)
        Attenuation; the object is what exceeds 3 % of the maximum.
    """
    slope = _slope(volume)[volume > _OBJECT * volume.max()]
    power = float(np.mean(np.square(slope, dtype=np.float64))) if slope.size else 0.0
    return float(np.mean(slope, dtype=np.float64)) ** 2 / power if power > 0 else 1.0


def _slope(volume: np.ndarray) -> np.ndarray:
    """Return the length of the forward differences."""
    out = np.zeros(volume.shape, np.float32)
    for axis in range(3):
        out += np.square(np.diff(volume, axis=axis, append=volume.take([-1], axis)))
    return np.sqrt(out)


def guided_tv(
    projections: np.ndarray,
    geometry: XrayGeometry,
    grid: Grid,
    found: TvReconstruction,
    guide: np.ndarray,
    *,
    margin: int | tuple[int, int, int] = 0,
    trust: float = TRUST,
    step: Step | None = None,
    backend: str = "auto",
) -> np.ndarray:
    """Go on with total variation, counting less where a guide has its borders.

    A voxel's variation is multiplied by ``1 / (1 + |grad guide| / h)``, over its mean in the object (Candes, Wakin
    & Boyd 2008, J Fourier Anal Appl 14:877): borders are no longer paid for by their height, flat parts become
    flatter. Only for objects with flat parts, see :func:`flatness`: others become patches.

    Parameters
    ----------
    projections : ndarray, (n, V, U)
        Line integrals.
    geometry : XrayGeometry
        The scan.
    grid : Grid
        Where to reconstruct.
    found : TvReconstruction
        The volume to start from, and the weight.
    guide : ndarray, (Z, Y, X)
        An estimate of the volume.
    margin, trust, step, backend
        As for :func:`reconstruct_tv`.

    Returns
    -------
    ndarray of float32, (Z, Y, X)
        Attenuation per world unit.

    Raises
    ------
    ValueError
        If shapes do not fit or a number is not finite.
    """
    if np.shape(guide) != tuple(grid.shape):
        raise ValueError(f"guide: got shape {np.shape(guide)}, need {tuple(grid.shape)}, the grid's.")
    problem = set_up(projections, geometry, grid, margin, trust=trust, backend=backend)
    inner = problem.enter(guide)
    half = np.float32(max(problem.typical * _HALF * found.weight, 1e-30))
    limit = half / (half + _slope(inner))
    limit /= np.float32(limit[inner > _OBJECT * inner.max()].mean()) if inner.max() > 0 else np.float32(1)
    total, count = math.ceil(_GUIDED_MOST * _more(geometry.n_views)) * geometry.n_views, 0

    def tick(views: int) -> None:
        nonlocal count
        count += views
        if step is not None:
            step(min(count, total), total)

    volume, *_ = _run(
        problem,
        problem.enter(found.volume),
        None,
        found.weight * problem.typical,
        _GUIDED_MOST,
        min(geometry.n_views // SUBSET, SUBSETS),
        5e-4,
        tick,
        limit,
        _GUIDED_LEAST,
    )
    if step is not None:
        step(total, total)
    return problem.leave(volume)
