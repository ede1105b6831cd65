"""Reconstruction of projections with total variation, its weight chosen from the projections themselves.

Minimises ``sum w (A x - b)^2 / 2 + lambda TV(x)`` for ``x >= 0`` with SART's ray weights ``w``: steps of SART over
ordered subsets, each followed by the proximal step of the total variation, whose weight is tied to the step
(forward-backward splitting: Combettes & Wajs 2005, Multiscale Model Simul 4:1168), with the momentum of Beck &
Teboulle 2009 (IEEE TIP 18:2419), held below a limit since subsets disagree (Kim, Ramani & Fessler 2015, IEEE TMI
34:167).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from napari_innergs.baselines.sart import Problem, Step, set_up
from napari_innergs.baselines.tv import tv_proximal
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry

__all__ = ["TvReconstruction", "reconstruct_tv"]

# Limit of the momentum: errors of a subset's step grow by 1 / (1 - MOMENTUM).
MOMENTUM = 0.97
# After so many passes the subsets are made twice as large: small ones are fast first and disagree later.
OPENING = 12
# Views in a subset, and the limit of the number of subsets: more make momentum unstable.
SUBSET = 5
SUBSETS = 10
# Passes before the change counts: momentum has to build up first.
LEAST_PASSES = 24
# Steps of the dual field after each step of SART; it starts where the last one ended.
INNER = 2
# Weights that are tried: this share of the mean attenuation, and halves of it.
LARGEST = 2.0**-4
TRIALS = 12
TRIAL_PASSES = 3
# The largest weight whose residual on views held out is within this factor of the smallest is taken.
TOLERANCE = 1.05
# Halving the weight must improve the residual by this factor to go on.
GAIN = 1.01


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
) -> tuple[np.ndarray, np.ndarray | None, int, float]:
    """Return volume, dual field, passes made and the last pass' relative change."""
    parts = problem.subsets(subsets)
    ahead = volume
    t = 1.0
    change = math.inf
    done = 0
    while done < passes and not (change < tolerance and done >= LEAST_PASSES):
        done += 1
        begin, last = volume, change
        if done == OPENING + 1:
            parts = problem.subsets(len(parts) // 2)
        for part in parts:
            moved = problem.gradient(ahead, part)
            np.subtract(ahead, moved, out=moved)
            before = volume
            volume, dual = tv_proximal(moved, threshold, INNER, dual, nonnegative=True)
            following = 0.5 * (1 + math.sqrt(1 + 4 * t * t))
            momentum = min((t - 1) / following, MOMENTUM)
            t = following
            ahead = volume - before
            ahead *= np.float32(momentum)
            ahead += volume
            tick(len(part))
        size = float(np.linalg.norm(volume))
        change = float(np.linalg.norm(volume - begin)) / max(size, 1e-30)
        if done > 2 and change > (last if done > OPENING + 1 else 1.3 * last) and len(parts) > 1:
            # subsets that disagree drive the momentum: without it, and in larger ones, it dies out
            parts = problem.subsets(len(parts) // 2)
            ahead = volume
            t = 1.0
            change = math.inf
    return volume, dual, done, change


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
    step: Step | None = None,
) -> TvReconstruction:
    """Reconstruct with total variation.

    Without a weight, a tenth of the views is held out, and weights are tried from large to small, each from the
    volume of the one before. The largest whose residual on the views held out is within 5 % of the smallest is
    taken. Then all views are used, from the start again: momentum gains more than a start near by.

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
        Limit of passes over all views.
    tolerance : float
        The last phase ends when a pass changes the volume by less than this share.
    subsets : int, optional
        Number of subsets to begin with; by default they have at least five views, and there are at most ten. There
        are half as many after the first passes, and again when they disagree so much that the steps grow.
    start : ndarray, (Z, Y, X), optional
        Volume to start from; zeros by default.
    margin : int or tuple of int
        Voxels added on each side of the grid's axes (z, y, x) while computing, for objects that go on outside.
    step : callable, optional
        Called with what is done and the total, after each part; it may raise to stop. The total is a limit.

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
    n = geometry.n_views
    if weight is None and n < 4:
        raise ValueError(f"projections: got {n} view(s), need at least 4 to find the weight; give a weight.")
    full = set_up(projections, geometry, grid, margin)
    if subsets is None:
        subsets = min(n // SUBSET, SUBSETS)
    # progress is counted in views
    total = limit = passes * n
    count = 0

    def tick(views: int) -> None:
        nonlocal count
        count += views
        if step is not None:
            step(min(count, limit), limit)

    volume = full.enter(start)
    trials: list[tuple[float, float]] = []
    if weight is None:
        every = max(min(10, n // 3), 2)
        held = np.arange(every // 2, n, every)
        train = set_up(projections, geometry, grid, margin, np.setdiff1d(np.arange(n), held))
        limit = total + TRIALS * TRIAL_PASSES * len(train.views)
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
    """Return the weight by the rule above."""
    dual: np.ndarray | None = None
    rays = problem.row[held]
    norm = float(rays.sum(dtype=np.float64))
    for trial in range(TRIALS):
        weight = LARGEST / 2**trial
        threshold = weight * problem.typical
        volume, dual, _, _ = _run(problem, volume, dual, threshold, TRIAL_PASSES, subsets, 0.0, tick)
        residual = problem.residual(volume, held)
        error = math.sqrt(float(np.sum(rays * residual * residual, dtype=np.float64)) / norm)
        trials.append((weight, error))
        if len(trials) > 1 and error * GAIN > trials[-2][1]:
            break
    best = min(error for _, error in trials)
    return next(weight for weight, error in trials if error <= TOLERANCE * best)
