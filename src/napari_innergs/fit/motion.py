"""Motion, contrast and outliers of slices, found together with the volume they show.

A volume is reconstructed from all slices where they are believed to be; each slice (or stack) is then moved by a
Gauss-Newton step to where the volume explains it best; and again, from a coarse grid to a fine one. What no volume
explains loses weight. The slices alone can not say where the object as a whole is: the mean motion is set to none.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from napari_innergs.baselines.stacks import StackProblem, tikhonov_steps
from napari_innergs.data import SliceStack
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import (
    matrix_to_quaternion,
    normalise_quaternion,
    quaternion_to_matrix,
    rotation_vector_to_matrix,
)
from napari_innergs.operators.acquisition import SliceAcquisition

__all__ = ["Motion", "consistency", "estimate_motion", "estimate_thickness", "match_intensities"]

Report = tuple[float, str]
LEVELS = ("off", "stack", "slice")
GAUGE = "The mean rotation and the mean displacement of the slices' centres are set to none."
_FORMAT = "innergs-motion-1"
# Weight of the squared gradient: little, because a smooth volume pulls slices to where it is flat.
_PENALTY = 0.03
_CG_STEPS = 10
# The motion is found on at most so many voxels.
_MOST_VOXELS = 8_000_000
# Smallest number of voxels along an axis of a coarse grid.
_LEAST_SIZE = 10
# A slice is expected within so many voxels of the mean of its neighbours, its gain within this share of 1.
_NEIGHBOUR = 3.0
_GAIN = 0.15
# Longest step of a round in voxels of its grid.
_STEP = 1.5
# Residuals up to so many standard deviations count in full, above twice as many nothing.
_TRUSTED = 5.0
# An outlier: its squared residual exceeds this multiple of the stack's median, and explains less than this share.
_OUTLIER_RATIO = 2.5
_OUTLIER_SHARE = 0.6
# Or the median of its squared residuals, in units of their variance, exceeds this multiple of the usual one.
_EXCESS = 6.0
# A slice with less than this share of the contrast, or more than its inverse, is one too.
_FAINT = 0.5
# Errors of the volume add to those of the slice that it is compared with (measured).
_ERROR_FACTOR = 2.5
_CHUNK = 2_000_000


@dataclass
class Motion:
    """Where slices were taken, how bright they are, and how far they can be trusted.

    Attributes
    ----------
    level : str
        ``"off"``, ``"stack"`` or ``"slice"``.
    transforms : list of ndarray (n, 4, 4), float64
        For each stack the rigid motion of its slices, world (z, y, x): a slice was taken where the transform
        puts its place in the stack, as `SliceAcquisition` takes it.
    scales : list of ndarray (n,)
        What was measured is the scale times what the volume shows (after gains and offsets of the stacks).
    gains, offsets : ndarray (number of stacks,)
        ``values = gain * values of the first stack's contrast + offset``.
    weights : list of ndarray (n, h, w), float32
        Trust in each pixel, 0 to 1.
    outliers : list of ndarray (n,) of bool
        Slices that no volume explains; their weights are 0.
    error : list of ndarray (n, 2)
        Standard error of each slice's translation (root mean squared length, world units) and rotation (degrees).
    centers : list of ndarray (n, 3)
        Centres of the slices as they were told, world.
    """

    level: str
    transforms: list[np.ndarray]
    scales: list[np.ndarray]
    gains: np.ndarray
    offsets: np.ndarray
    weights: list[np.ndarray] = field(repr=False)
    outliers: list[np.ndarray]
    error: list[np.ndarray]
    centers: list[np.ndarray] = field(repr=False)

    def displacements(self) -> list[np.ndarray]:
        """Return how far each slice moved at its centre (n,), world units."""
        return [
            np.linalg.norm(_parameters(t, c)[:, 3:], axis=1)
            for t, c in zip(self.transforms, self.centers, strict=True)
        ]

    def rotations(self) -> list[np.ndarray]:
        """Return how far each slice turned (n,), degrees."""
        return [
            np.degrees(np.linalg.norm(_parameters(t, c)[:, :3], axis=1))
            for t, c in zip(self.transforms, self.centers, strict=True)
        ]

    def summary(self) -> dict[str, Any]:
        """Return numbers for a report: median and largest motion, outliers, errors and the gauge in words."""
        moved, turned = np.concatenate(self.displacements()), np.concatenate(self.rotations())
        error, bad = np.concatenate(self.error), np.concatenate(self.outliers)
        good = ~bad if not bad.all() else np.ones_like(bad)
        return {
            "level": self.level,
            "translation_median": float(np.median(moved[good])),
            "translation_max": float(moved[good].max()),
            "rotation_median_degrees": float(np.median(turned[good])),
            "rotation_max_degrees": float(turned[good].max()),
            "translation_error_median": float(np.median(error[good, 0])),
            "rotation_error_median_degrees": float(np.median(error[good, 1])),
            "outlier_fraction": float(bad.mean()),
            "outliers": [np.flatnonzero(one).tolist() for one in self.outliers],
            "scales_range": [
                float(min(s.min() for s in self.scales)),
                float(max(s.max() for s in self.scales)),
            ],
            "gauge": GAUGE if self.level != "off" else "Slices were not moved.",
        }

    def to_json(self) -> str:
        """Write everything but the weights of single pixels; a slice keeps its mean weight."""
        return json.dumps(
            {
                "format": _FORMAT,
                "axes": "zyx",
                "level": self.level,
                "gauge": self.summary()["gauge"],
                "stacks": [
                    {
                        "gain": float(self.gains[i]),
                        "offset": float(self.offsets[i]),
                        "slice_shape": list(self.weights[i].shape[1:]),
                        "transforms": self.transforms[i].tolist(),
                        "scales": self.scales[i].tolist(),
                        "weights": self.weights[i].mean((1, 2)).tolist(),
                        "outliers": self.outliers[i].tolist(),
                        "error": self.error[i].tolist(),
                        "centers": self.centers[i].tolist(),
                    }
                    for i in range(len(self.transforms))
                ],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Motion:
        """Read what `to_json` wrote.

        Raises
        ------
        ValueError
            If it is something else.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"text: not JSON ({error}); need what Motion.to_json writes.") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"text: no motion of slices; need JSON with format {_FORMAT!r}.")
        stacks = content["stacks"]

        def arrays(name: str, kind: type = float) -> list[np.ndarray]:
            return [np.array(one[name], kind) for one in stacks]

        weights = [
            np.tile(w.astype(np.float32)[:, None, None], (1, *one["slice_shape"]))
            for w, one in zip(arrays("weights"), stacks, strict=True)
        ]
        return cls(
            content["level"],
            arrays("transforms"),
            arrays("scales"),
            np.array([one["gain"] for one in stacks]),
            np.array([one["offset"] for one in stacks]),
            weights,
            arrays("outliers", bool),
            arrays("error"),
            arrays("centers"),
        )


@dataclass
class _Level:
    """Stacks and grid with large pixels and voxels, and what is believed on them."""

    grid: Grid
    stacks: list[SliceStack]
    data: list[np.ndarray]
    trust: list[np.ndarray]
    factors: list[tuple[int, ...]]
    voxel: float


@dataclass
class _Belief:
    """What is believed so far."""

    transforms: list[np.ndarray]
    scales: list[np.ndarray]
    robust: list[np.ndarray]
    outliers: list[np.ndarray]
    information: list[np.ndarray]
    volume: np.ndarray | None = None
    grid: Grid | None = None


def estimate_motion(
    stacks: Sequence[SliceStack],
    grid: Grid,
    *,
    level: str = "slice",
    intensity: bool = True,
    robust: bool = True,
    iterations: int = 4,
    seed: int = 0,
) -> Generator[Report, None, Motion]:
    """Find the rigid motion and the brightness of each slice or stack, and what can not be trusted.

    Motion shows where stacks of different orientation cross. In a single stack it can not be told from the shape of
    the object: nothing is moved, and the level of the result is ``"off"``.

    Parameters
    ----------
    stacks : sequence of SliceStack
        Slices with thickness and profile. Channels are averaged.
    grid : Grid
        Where the volume is; should hold the object.
    level : {"off", "stack", "slice"}
        What moves as one piece.
    intensity : bool
        Also find a gain for each slice (and gain and offset of each stack).
    robust : bool
        Give little weight to pixels and slices that no volume explains.
    iterations : int
        Rounds on each grid.
    seed : int
        Has no effect: nothing is drawn.

    Yields
    ------
    fraction : float
        Share of the work that is done.
    text : str
        What is being done.

    Returns
    -------
    Motion
        With the mean motion set to none.

    Raises
    ------
    ValueError
        If the level is unknown or there are no stacks.
    """
    if level not in LEVELS:
        raise ValueError(f"level: got {level!r}, need one of {LEVELS}.")
    listed = list(stacks)
    if not listed:
        raise ValueError("stacks: got none, need at least one.")
    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}, need 1 or more.")
    gains, offsets = np.ones(len(listed)), np.zeros(len(listed))
    if intensity and len(listed) > 1:
        yield 0.0, "Comparing the contrast of the stacks"
        gains, offsets = match_intensities(listed, grid)
    values = []
    for stack, gain, offset in zip(listed, gains, offsets, strict=True):
        values.append((stack.values().mean(3) - np.float32(offset)) / np.float32(gain))
        yield 0.0, "Reading the slices"
    wide = max(float(np.subtract(*np.percentile(v[:, ::3, ::3], (99.5, 0.5)))) for v in values)
    values = [v / np.float32(wide if wide > 0 else 1.0) for v in values]
    centers = [_centers(one) for one in listed]
    belief = _Belief(
        [np.tile(np.eye(4), (s.n_slices, 1, 1)) for s in listed],
        [np.ones(s.n_slices) for s in listed],
        [np.ones(v.shape, np.float32) for v in values],
        [np.zeros(s.n_slices, bool) for s in listed],
        [np.zeros(s.n_slices) for s in listed],
    )
    solver = _Solver(listed, values, grid, belief, centers, intensity, robust)
    moving = level if len(listed) > 1 else "off"
    if moving == "off":
        error = [np.zeros((s.n_slices, 2)) for s in listed]
    else:
        yield from solver.run(moving, iterations)
        error = solver.errors
        offsets = offsets + gains * solver.offsets * (wide if wide > 0 else 1.0)
        gains = gains * solver.gains
    _fix_gauge(belief.transforms, centers, belief.outliers)
    return Motion(
        moving,
        belief.transforms,
        belief.scales,
        gains,
        offsets,
        belief.robust,
        belief.outliers,
        error,
        centers,
    )


class _Solver:
    """Rounds of reconstruction and registration on grids from coarse to fine."""

    def __init__(
        self,
        stacks: list[SliceStack],
        values: list[np.ndarray],
        grid: Grid,
        belief: _Belief,
        centers: list[np.ndarray],
        intensity: bool,
        robust: bool,
    ) -> None:
        self.stacks, self.values, self.grid, self.belief = stacks, values, grid, belief
        self.centers, self.intensity, self.robust = centers, intensity, robust
        self.errors = [np.zeros((s.n_slices, 2)) for s in stacks]
        self.gains, self.offsets = np.ones(len(stacks)), np.zeros(len(stacks))
        self.done, self.total = 0.0, 1.0

    def run(self, moving: str, rounds: int) -> Generator[Report, None, None]:
        """Yield progress until the belief is final."""
        finest = (
            int(np.ceil((self.grid.size / _MOST_VOXELS) ** (1 / 3))) if self.grid.size > _MOST_VOXELS else 1
        )
        factors = [f for f in (4 * finest, 2 * finest) if min(self.grid.shape) >= _LEAST_SIZE * f] + [finest]
        plan: list[tuple[int, bool, int]] = []
        for factor in factors:
            last = factor == finest
            if moving == "stack" or not last:
                plan.append((factor, False, max(2, rounds // 2) if last else 2 * rounds))
            if moving == "slice":
                plan.append((factor, True, rounds))
        # work goes with the number of voxels
        self.total = sum(n / f**2.5 for f, _, n in plan) + 1.5 / finest**2.5
        made: _Level | None = None
        for factor, single, count in plan:
            if made is None or made.voxel != factor:
                made = self._level(factor)
            text = (
                f"Moving {'slices' if single else 'stacks'}, voxels of {factor}"
                if factor > 1
                else "Moving slices"
            )
            for turn in range(count):
                cost = 1 / factor**2.5
                yield from self._reconstruct(made, cost / 2, text, first=turn == 0)
                if turn == 0 or not single:
                    yield from self._contrast(made, text)
                yield from self._register(made, single, cost / 2, text, last=False)
        assert made is not None
        yield from self._contrast(made, "Final motion")
        yield from self._reconstruct(made, 0.75 / finest**2.5, "Final motion", first=False)
        yield from self._register(made, moving == "slice", 0.75 / finest**2.5, "Final motion", last=True)

    def _report(self, work: float, text: str) -> Report:
        self.done += work
        return min(self.done / self.total, 1.0), text

    def _level(self, factor: int) -> _Level:
        grid = _binned_grid(self.grid, factor)
        stacks, data, trust, factors = [], [], [], []
        for stack, values in zip(self.stacks, self.values, strict=True):
            # by whole pixels, to at most the size of a voxel
            size = tuple(
                int(max(1, min(np.floor(grid.spacing.min() / p + 0.05), n // 4)))
                for p, n in zip(stack.pixel_size, values.shape[1:], strict=True)
            )
            known = np.ones(values.shape, np.float32) if stack.mask is None else stack.mask.astype(np.float32)
            share = _binned(known, size)
            data.append(_binned(values * known, size) / np.maximum(share, 1e-6))
            trust.append(share)
            factors.append(size)
            frame = stack.frame_affine.copy()
            frame[:3, 3] += sum(frame[:3, 1 + k] * (size[k] - 1) / 2 for k in range(2))
            frame[:3, 1:3] *= size
            stacks.append(SliceStack(data[-1], frame, stack.positions, stack.thickness, stack.profile))
        made = _Level(grid, stacks, data, trust, factors, factor)
        belief = self.belief
        if belief.volume is None or belief.grid is None:
            belief.volume = np.full(grid.shape, np.mean([d.mean() for d in data]), np.float32)
        elif belief.grid != grid:
            belief.volume = _resampled(belief.volume, belief.grid, grid)
        belief.grid = grid
        return made

    def _operators(self, made: _Level) -> list[SliceAcquisition]:
        return [
            SliceAcquisition(s, made.grid, t)
            for s, t in zip(made.stacks, self.belief.transforms, strict=True)
        ]

    def _reconstruct(
        self, made: _Level, work: float, text: str, first: bool
    ) -> Generator[Report, None, None]:
        """Bring the volume to the slices where they are believed to be."""
        belief, operators = self.belief, self._operators(made)
        weights = []
        for i, one in enumerate(operators):
            trust = made.trust[i] * _binned(belief.robust[i], made.factors[i]) * one.inside()
            trust *= (belief.scales[i] ** 2 * ~belief.outliers[i])[:, None, None]
            weights.append(trust.astype(np.float32))
        data = [
            self._measured(made, i) / s[:, None, None].astype(np.float32) for i, s in enumerate(belief.scales)
        ]
        problem = StackProblem(operators, data, weights)
        assert belief.volume is not None
        count = 2 * _CG_STEPS if first else _CG_STEPS
        yield self._report(0, text)
        for _ in tikhonov_steps(problem, belief.volume, _PENALTY, count, tolerance=1e-3):
            yield self._report(0, text)
        yield self._report(work, text)

    def _measured(self, made: _Level, i: int) -> np.ndarray:
        return (made.data[i] - np.float32(self.offsets[i])) / np.float32(self.gains[i])

    def _contrast(self, made: _Level, text: str) -> Generator[Report, None, None]:
        """Find again gain and offset of each stack relative to the first."""
        if not self.intensity or len(self.stacks) < 2:
            return
        belief = self.belief
        lines: list[tuple[float, float] | None] = []
        assert belief.volume is not None
        for i, one in enumerate(self._operators(made)):
            use = (made.trust[i] * one.inside() > 0.5) & ~belief.outliers[i][:, None, None]
            step = max(1, int(use.sum()) // 50_000)
            scale = belief.scales[i].astype(np.float32)[:, None, None]
            predicted = (one.apply(belief.volume) * scale)[use][::step].astype(np.float64)
            lines.append(
                _line(predicted, self._measured(made, i)[use][::step]) if len(predicted) > 26 else None
            )
            yield self._report(0, text)
        if lines[0] is None:
            return
        gain, offset = lines[0]
        for i, line in enumerate(lines):
            if i and line is not None:
                # the volume in the first stack's contrast
                a = line[0] / gain
                self.offsets[i] += self.gains[i] * (line[1] - a * offset)
                self.gains[i] *= a

    def _register(
        self, made: _Level, single: bool, work: float, text: str, last: bool
    ) -> Generator[Report, None, None]:
        """Move every slice or stack once; weigh pixels and slices by what is left."""
        belief, volume = self.belief, self.belief.volume
        assert volume is not None
        gradient = _world_gradient(volume, made.grid)
        for i, one in enumerate(self._operators(made)):
            inside = made.trust[i] * one.inside()
            scale = belief.scales[i].astype(np.float32)[:, None, None]
            predicted = one.apply(volume)
            slopes = []
            for part in gradient:
                slopes.append(one.apply(part))
                yield self._report(0, text)
            residual = self._measured(made, i) / scale - predicted
            steep = np.sqrt(slopes[0] ** 2 + slopes[1] ** 2 + slopes[2] ** 2)
            spread, excess = _relative(residual, steep, inside)
            if self.robust:
                belief.outliers[i] = _outlying(self._measured(made, i), predicted * scale, excess, inside)
            trust = inside * ((2 - np.sqrt(excess) / _TRUSTED).clip(0, 1) if self.robust else 1)
            yield self._report(0, text)
            # an outlier is moved too, by the pixels usual for it: it may only be far off
            usual = np.array(
                [np.median(e[k > 0.5]) if (k > 0.5).any() else 1 for e, k in zip(excess, inside, strict=True)]
            )
            far = np.sqrt(excess / np.maximum(usual / 0.45, 1).astype(np.float32)[:, None, None])
            own = inside * (2 - far / _TRUSTED).clip(0, 1)
            whole = np.where(belief.outliers[i][:, None, None], own, trust)
            centers = self._moved_centers(i)
            about = centers if single else np.tile(centers.mean(0), (len(centers), 1))
            hessian, slope = _normal_equations(one, slopes, predicted, residual, whole, about)
            yield self._report(0, text)
            if last:
                self._finish(i, made, hessian, residual, whole, trust, inside, spread, single)
            else:
                self._step(i, made, hessian, slope, spread, about, whole.sum((1, 2)), single)
            yield self._report(work / len(self.stacks), text)

    def _moved_centers(self, i: int) -> np.ndarray:
        t = self.belief.transforms[i]
        return np.einsum("nab,nb->na", t[:, :3, :3], self.centers[i]) + t[:, :3, 3]

    def _step(
        self,
        i: int,
        made: _Level,
        hessian: np.ndarray,
        slope: np.ndarray,
        spread: float,
        about: np.ndarray,
        count: np.ndarray,
        single: bool,
    ) -> None:
        belief, stack = self.belief, self.stacks[i]
        voxel = float(made.grid.spacing.mean())
        radius = 0.25 * float(np.hypot(stack.height * stack.pixel_size[0], stack.width * stack.pixel_size[1]))
        belief.information[i] = np.where(
            belief.outliers[i], 0.0, np.trace(hessian[:, :3, :3], axis1=1, axis2=2)
        )
        prior = np.array([1 / (_NEIGHBOUR * voxel) ** 2] * 3 + [(radius / (_NEIGHBOUR * voxel)) ** 2] * 3)
        prior *= spread**2
        n = len(hessian)
        if single:
            target = self._towards_neighbours(i)
            # brightness: each slice towards 1
            # brightness: each slice towards 1; where there is only noise, noise is no evidence
            pull = spread**2 * (4 / _GAIN**2 + count)
            full = hessian.copy()
            full[:, range(6), range(6)] += prior
            full[:, 6, 6] += pull
            right = slope.copy()
            right[:, :6] += prior * target
            right[:, 6] -= pull * np.log(belief.scales[i])
            size = 7 if self.intensity else 6
            delta = np.zeros((n, 7))
            delta[:, :size] = np.linalg.solve(full[:, :size, :size], right[:, :size, None])[..., 0]
        else:
            full, right = hessian.sum(0)[:6, :6] + np.diag(prior), slope.sum(0)[:6]
            delta = np.tile(np.append(np.linalg.solve(full, right), 0.0), (n, 1))
        reach = np.maximum(
            np.linalg.norm(delta[:, :3], axis=1), radius * np.linalg.norm(delta[:, 3:6], axis=1)
        )
        delta[:, :6] *= np.minimum(1, _STEP * voxel / np.maximum(reach, 1e-9))[:, None]
        belief.transforms[i] = _move(delta, about) @ belief.transforms[i]
        scales = belief.scales[i] * np.exp(delta[:, 6].clip(-0.3, 0.3))
        belief.scales[i] = np.where(belief.outliers[i], 1.0, scales.clip(_FAINT, 1 / _FAINT))
        good = ~belief.outliers[i]
        if single and good.any():
            every = np.concatenate([s[~o] for s, o in zip(belief.scales, belief.outliers, strict=True)])
            belief.scales[i] = belief.scales[i] / np.median(every)

    def _towards_neighbours(self, i: int) -> np.ndarray:
        """Return the step (n, 6), translation first, that takes each slice to the mean of its neighbours' motion."""
        own = _parameters(self.belief.transforms[i], self.centers[i])[:, [3, 4, 5, 0, 1, 2]]
        weight = self.belief.information[i] + 1e-6 * (self.belief.information[i].max() + 1e-30)
        place = np.arange(len(own))
        near = np.exp(-np.abs(place[:, None] - place) / 1.5) * (place[:, None] != place) * weight
        total = near.sum(1, keepdims=True)
        if len(own) < 2:
            return np.zeros((len(own), 6))
        return (near / np.maximum(total, 1e-300)) @ own - own

    def _finish(
        self,
        i: int,
        made: _Level,
        hessian: np.ndarray,
        residual: np.ndarray,
        whole: np.ndarray,
        trust: np.ndarray,
        inside: np.ndarray,
        spread: float,
        single: bool,
    ) -> None:
        belief, stack = self.belief, self.stacks[i]
        if single and belief.outliers[i].any():
            # the motion of what shows nothing is that of its neighbours
            belief.information[i][belief.outliers[i]] = 0
            target = self._towards_neighbours(i) * belief.outliers[i][:, None]
            belief.transforms[i] = _move(target, self._moved_centers(i)) @ belief.transforms[i]
            belief.scales[i] = np.where(belief.outliers[i], 1.0, belief.scales[i])
        voxel = float(made.grid.spacing.mean())
        radius = 0.25 * float(np.hypot(stack.height * stack.pixel_size[0], stack.width * stack.pixel_size[1]))
        prior = np.array([(_NEIGHBOUR * voxel) ** -2] * 3 + [(radius / (_NEIGHBOUR * voxel)) ** 2] * 3)
        level = (whole * residual**2).sum((1, 2)) / np.maximum(whole.sum((1, 2)), 1e-6)
        level = np.where(belief.outliers[i], np.inf, np.maximum(level, 0.25 * spread**2))
        information = hessian[:, :6, :6] / level[:, None, None]
        if not single:
            information = np.tile(information.sum(0), (len(level), 1, 1))
        covariance = np.linalg.inv(information + np.diag(prior))
        self.errors[i] = _ERROR_FACTOR * np.stack(
            [
                np.sqrt(np.trace(covariance[:, :3, :3], axis1=1, axis2=2)),
                np.degrees(np.sqrt(np.trace(covariance[:, 3:, 3:], axis1=1, axis2=2))),
            ],
            1,
        )
        if self.robust:
            seen = np.where(made.trust[i] > 0, trust / np.maximum(made.trust[i], 1e-6), 1.0)
            # pixels outside the grid say nothing about it, and nothing against them
            seen = np.where(inside > 0, seen, 1.0) * ~belief.outliers[i][:, None, None]
            belief.robust[i] = _spread_out(seen.astype(np.float32), made.factors[i], belief.robust[i].shape)


def match_intensities(stacks: Sequence[SliceStack], grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Find gain and offset of each stack relative to the first, where they overlap.

    Stacks are compared after smoothing to a common resolution, by an orthogonal robust line (both are noisy);
    a stack that overlaps with no other is left as it is.

    Parameters
    ----------
    stacks : sequence of SliceStack
        Any orientations; channels are averaged.
    grid : Grid
        Where they are compared.

    Returns
    -------
    gains, offsets : ndarray (number of stacks,)
        ``values = gain * first stack's contrast + offset``; 1 and 0 for the first.
    """
    gains, offsets = np.ones(len(stacks)), np.zeros(len(stacks))
    if len(stacks) < 2:
        return gains, offsets
    means, seen = _smooth_means(stacks, grid)
    total, count = means[0] * seen[0], seen[0].astype(np.float64)
    left = set(range(1, len(stacks)))
    while left:
        overlap = {i: int((seen[i] & (count > 0)).sum()) for i in left}
        best = max(left, key=overlap.__getitem__)
        left.remove(best)
        both = seen[best] & (count > 0)
        if overlap[best] >= 27:
            gains[best], offsets[best] = _line(total[both] / count[both], means[best][both])
        total += np.where(seen[best], (means[best] - offsets[best]) / gains[best], 0)
        count += seen[best]
    return gains, offsets


def consistency(stacks: Sequence[SliceStack], grid: Grid) -> tuple[float, float]:
    """Say whether stacks show the same object.

    The correlation of details (from about 1 to 4 slice distances) between each stack and the others, where they
    overlap; the worst stack counts.

    Parameters
    ----------
    stacks : sequence of SliceStack
        Any orientations and contrasts of the same sign.
    grid : Grid
        Where they are compared.

    Returns
    -------
    score : float
        0 (different objects, or no overlap) to 1.
    overlap : float
        Share of the voxels of a stack that another stack sees too; of the worst stack.
    """
    if len(stacks) < 2:
        return 1.0, 1.0
    gains, offsets = match_intensities(stacks, grid)
    means, seen = _smooth_means(stacks, grid)
    means = [(m - o) / g for m, g, o in zip(means, gains, offsets, strict=True)]
    scores, shares = [], []
    for i, own in enumerate(means):
        count = np.sum([s for j, s in enumerate(seen) if j != i], 0)
        both = seen[i] & (count > 0)
        shares.append(float(both.sum() / max(seen[i].sum(), 1)))
        if both.sum() < 27:
            scores.append(0.0)
            continue
        other = np.sum([m * s for j, (m, s) in enumerate(zip(means, seen, strict=True)) if j != i], 0)
        a, b = (_details(v, both) for v in (own, other / np.maximum(count, 1)))
        power = float(np.sqrt((a**2).sum() * (b**2).sum()))
        scores.append(float((a * b).sum()) / power if power > 0 else 0.0)
    return float(np.clip(min(scores), 0, 1)), min(shares)


def estimate_thickness(stacks: Sequence[SliceStack], grid: Grid, index: int) -> tuple[float, float] | None:
    """Find the slice thickness of a stack from what the other stacks show.

    A volume is reconstructed from the others; the thickness is the one whose slices of it agree best with those
    that were measured.

    Parameters
    ----------
    stacks : sequence of SliceStack
        All stacks, without motion (or moved already).
    grid : Grid
        Where the volume is.
    index : int
        The stack whose thickness is wanted; its own value plays no part, its profile does.

    Returns
    -------
    (thickness, error) or None
        World units, with its standard error (from leaving out groups of slices); None where the data can not
        tell: a single stack, hardly any overlap, too few slices, or no clear minimum.

    Raises
    ------
    ValueError
        If there is no such stack.
    """
    if not 0 <= index < len(stacks):
        raise ValueError(f"index: got {index}, need 0 to {len(stacks) - 1}.")
    stack = stacks[index]
    others = [s for i, s in enumerate(stacks) if i != index]
    if not others:
        return None
    data = [s.values().mean(3) for s in others]
    operators = [SliceAcquisition(s, grid) for s in others]
    known = [np.ones(d.shape, bool) if s.mask is None else s.mask for d, s in zip(data, others, strict=True)]
    weights = [(o.inside() & k).astype(np.float32) for o, k in zip(operators, known, strict=True)]
    problem = StackProblem(operators, data, weights)
    volume = np.full(grid.shape, np.mean([d.mean() for d in data]), np.float32)
    for _ in tikhonov_steps(problem, volume, _PENALTY, 3 * _CG_STEPS):
        pass
    cover = problem.transpose([np.ones_like(d) for d in data]) > 0.05
    measured = stack.values().mean(3)
    here = SliceAcquisition(stack, grid)
    inside = here.inside() & (SliceAcquisition(stack, grid, thickness=0.0).apply(cover) > 0.99)
    if stack.mask is not None:
        inside &= stack.mask
    use = np.flatnonzero(inside.sum((1, 2)) >= 25)
    if len(use) < 4:
        return None
    longest = float(stack.geometry.gaps.sum()) + stack.spacing
    step = float(grid.spacing.min())
    tried = np.geomspace(0.5 * step, min(max(4 * stack.spacing, 4 * step), longest), 17)
    sums = np.stack(
        [
            _moments(SliceAcquisition(stack, grid, thickness=t).apply(volume), measured, inside)[use]
            for t in tried
        ]
    )
    best = _best_thickness(tried, sums.sum(1))
    groups = np.arange(len(use)) * 8 // len(use) if len(use) >= 8 else np.arange(len(use))
    parts = [_best_thickness(tried, sums[:, groups != g].sum(1)) for g in np.unique(groups)]
    if best is None or any(p is None for p in parts):
        return None
    found = np.array(parts, float)
    count = len(found)
    error = float(np.sqrt((count - 1) / count * ((found - found.mean()) ** 2).sum()))
    # one step of the search is known no better than a part of it
    error = float(np.hypot(error, 0.05 * best))
    return None if error > 0.5 * best else (best, error)


def _best_thickness(tried: np.ndarray, sums: np.ndarray) -> float | None:
    """Return the thickness with the smallest unexplained share, None at an end of the range."""
    count, x, y, xx, yy, xy = sums.T
    covariance = xy - x * y / count
    left = 1 - covariance**2 / np.maximum((xx - x * x / count) * (yy - y * y / count), 1e-30)
    at = int(left.argmin())
    if at in (0, len(tried) - 1):
        return None
    low, here, high = left[at - 1 : at + 2]
    shift = 0.5 * (low - high) / max(low - 2 * here + high, 1e-30)
    return float(tried[at] * (tried[1] / tried[0]) ** np.clip(shift, -0.5, 0.5))


def _moments(predicted: np.ndarray, measured: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return sums over each slice (n, 6): 1, p, m, p^2, m^2 and p m."""
    p, m = predicted.astype(np.float64), measured.astype(np.float64)
    return np.stack([(part * inside).sum((1, 2)) for part in (np.ones_like(p), p, m, p * p, m * m, p * m)], 1)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return gain and offset of ``y = gain x + offset``, both noisy, with Tukey's weights."""
    weight = np.ones(len(x))
    gain, offset = 1.0, 0.0
    for _ in range(15):
        total = weight.sum()
        mx, my = (weight * x).sum() / total, (weight * y).sum() / total
        xx, yy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
        if not (xx > 0 and yy > 0):
            return 1.0, float(my - mx)
        # reduced major axis: the noise of both is alike in units of their spread
        gain = float(np.sqrt(yy / xx))
        offset = float(my - gain * mx)
        residual = y - gain * x - offset
        scale = 1.4826 * np.median(np.abs(residual)) + 1e-12 * np.sqrt(yy / total)
        weight = (1 - np.minimum((residual / (3 * scale)) ** 2, 1)) ** 2
    return gain, offset


def _smooth_means(stacks: Sequence[SliceStack], grid: Grid) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return each stack on a common coarse grid, with the resolution of the thickest, and where it was seen."""
    coarse = max(max(s.spacing, s.thickness) for s in stacks)
    factor = max(1, round(coarse / float(grid.spacing.mean())))
    factor = max(factor, int(np.ceil((grid.size / 1e6) ** (1 / 3))))
    factor = max(1, min(factor, min(grid.shape) // 4))
    small = _binned_grid(grid, factor)
    means, seen = [], []
    for stack in stacks:
        values = stack.values().mean(3)
        one = SliceAcquisition(stack, small)
        known = one.inside() if stack.mask is None else one.inside() & stack.mask
        level = float(values[known].mean()) if known.any() else 0.0
        top = one.adjoint((values - np.float32(level)) * known)
        bottom = one.adjoint(known.astype(np.float32))
        seen.append(bottom > 0.3 * np.median(bottom[bottom > 0]) if (bottom > 0).any() else bottom > 0)
        top, bottom = gaussian_filter(top, 1.0), gaussian_filter(bottom, 1.0)
        means.append(np.where(seen[-1], top / np.maximum(bottom, 1e-6) + level, 0).astype(np.float64))
    return means, seen


def _details(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return the values minus their local mean, where seen."""
    share = seen.astype(np.float64)
    mean = gaussian_filter(values * share, 2.0) / np.maximum(gaussian_filter(share, 2.0), 1e-6)
    return (values - mean)[seen]


def _centers(stack: SliceStack) -> np.ndarray:
    middle = np.array([[t, (stack.height - 1) / 2, (stack.width - 1) / 2] for t in stack.positions])
    return np.asarray(stack.geometry.to_world(middle), np.float64)


def _parameters(transforms: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return rotation vectors and the centres' displacements, (n, 6)."""
    q = matrix_to_quaternion(transforms[:, :3, :3])
    sine = np.linalg.norm(q[:, 1:], axis=1, keepdims=True)
    turn = np.where(sine > 1e-12, 2 * np.arctan2(sine, q[:, :1]) / np.maximum(sine, 1e-300), 2.0) * q[:, 1:]
    moved = np.einsum("nab,nb->na", transforms[:, :3, :3], centers) + transforms[:, :3, 3]
    return np.concatenate([turn, moved - centers], 1)


def _move(delta: np.ndarray, about: np.ndarray) -> np.ndarray:
    """Return rigid transforms (n, 4, 4): a translation, and a rotation vector about a place."""
    out = np.tile(np.eye(4), (len(delta), 1, 1))
    out[:, :3, :3] = rotation_vector_to_matrix(delta[:, 3:6])
    out[:, :3, 3] = about - np.einsum("nab,nb->na", out[:, :3, :3], about) + delta[:, :3]
    return out


def _fix_gauge(transforms: list[np.ndarray], centers: list[np.ndarray], outliers: list[np.ndarray]) -> None:
    """Make the mean rotation and the mean displacement of the centres vanish, in place.

    The mean rotation is the eigenvector of the summed quaternion products (Markley et al. 2007), for small motion
    the Karcher mean.
    """
    good = ~np.concatenate(outliers)
    if not good.any():
        return
    every, middle = np.concatenate(transforms)[good], np.concatenate(centers)[good]
    if np.array_equal(every, np.broadcast_to(np.eye(4), every.shape)):
        return
    total = np.eye(4)
    for _ in range(3):
        q = matrix_to_quaternion(every[:, :3, :3])
        mean = np.linalg.eigh(q.T @ q)[1][:, -1]
        back = np.eye(4)
        back[:3, :3] = quaternion_to_matrix(normalise_quaternion(mean)).T
        every = back @ every
        moved = np.einsum("nab,nb->na", every[:, :3, :3], middle) + every[:, :3, 3]
        shift = np.eye(4)
        shift[:3, 3] = (middle - moved).mean(0)
        every = shift @ every
        total = shift @ back @ total
    for i, one in enumerate(transforms):
        transforms[i] = total @ one


def _binned_grid(grid: Grid, factor: int) -> Grid:
    if factor == 1:
        return grid
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3].sum(1) * (factor - 1) / 2
    affine[:3, :3] *= factor
    return Grid([-(-n // factor) for n in grid.shape], affine, grid.units)


def _binned(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    if size == (1, 1):
        return values
    a, b = size
    n, h, w = values.shape
    cut = values[:, : h // a * a, : w // b * b]
    return np.ascontiguousarray(cut.reshape(n, h // a, a, w // b, b).mean((2, 4)))


def _spread_out(values: np.ndarray, size: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Give large pixels back to the small ones they were made of; the outermost go on."""
    rows = np.minimum(np.arange(shape[1]) // size[0], values.shape[1] - 1)
    columns = np.minimum(np.arange(shape[2]) // size[1], values.shape[2] - 1)
    return np.ascontiguousarray(values[:, rows][:, :, columns])


def _resampled(volume: np.ndarray, grid: Grid, target: Grid) -> np.ndarray:
    """Return a volume on another grid with the same axes, trilinear."""
    map_ = grid.inverse_affine @ target.affine
    out = volume
    for axis in range(3):
        at = map_[axis, axis] * np.arange(target.shape[axis]) + map_[axis, 3]
        at = at.clip(0, volume.shape[axis] - 1)
        low = np.minimum(at.astype(int), max(volume.shape[axis] - 2, 0))
        share = np.expand_dims((at - low).astype(np.float32), tuple(k for k in range(3) if k != axis))
        high = np.minimum(low + 1, volume.shape[axis] - 1)
        out = np.take(out, low, axis) * (1 - share) + np.take(out, high, axis) * share
    return np.ascontiguousarray(out)


def _world_gradient(volume: np.ndarray, grid: Grid) -> list[np.ndarray]:
    """Return the derivatives of a volume along the world axes."""
    parts = np.gradient(volume) if min(volume.shape) > 1 else [np.zeros_like(volume)] * 3
    inverse = grid.inverse_affine[:3, :3].astype(np.float32)
    return [
        np.ascontiguousarray(sum(inverse[k, axis] * parts[k] for k in range(3)), np.float32)
        for axis in range(3)
    ]


def _relative(residual: np.ndarray, steep: np.ndarray, inside: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the residuals' standard deviation in flat places, and their squares over their variance.

    Where the picture is steep, residuals are larger for small errors of motion and of the interpolation, so that
    the scale grows with the slope.
    """
    some = (slice(None), slice(None, None, 2), slice(None, None, 2))
    seen = inside[some] > 0.5
    if seen.sum() < 32:
        return 1e-3, np.zeros_like(residual)
    r, g = np.abs(residual[some][seen]), steep[some][seen]
    middle, edge = np.quantile(g, (0.5, 0.9))
    flat = max(1.4826 * float(np.median(r[g <= middle])), 1e-4)
    at = g >= max(edge, 1e-9)
    beyond = np.median(r[at] ** 2) * 2.2 - flat**2 if at.any() else 0.0
    slope = max(float(beyond), 0.0) / max(float(np.median(g[at] ** 2)) if at.any() else 1.0, 1e-12)
    variance = flat**2 + np.float32(slope) * np.minimum(steep, np.float32(edge)) ** 2
    return flat, residual**2 / variance


def _outlying(
    measured: np.ndarray, predicted: np.ndarray, excess: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """Return which slices have large residuals that are not a small part of what they show."""
    count = np.maximum(inside.sum((1, 2)), 1e-6)
    seen = inside.sum((1, 2)) > 16

    def mean(values: np.ndarray) -> np.ndarray:
        return (inside * values).sum((1, 2)) / count

    # a few wild pixels do not make a slice an outlier: they lose their own weight
    left = measured - predicted
    limit = np.array(
        [np.quantile(np.abs(e[k > 0.5]), 0.9) if s else 0 for e, k, s in zip(left, inside, seen, strict=True)]
    )[:, None, None].astype(np.float32)
    left = left.clip(-limit, limit)
    measured = predicted + left
    left = mean(left**2)
    power = np.maximum(mean(measured**2) - mean(measured) ** 2, mean(predicted**2) - mean(predicted) ** 2)
    share = left / np.maximum(power, 1e-12)
    if seen.sum() < 3:
        return np.zeros(len(measured), bool)
    usual, ordinary = np.median(left[seen]), np.median(share[seen])
    strange = (left > _OUTLIER_RATIO * usual) & (share > 1 - _OUTLIER_SHARE)
    strange &= share > ordinary + 0.3 * max(1 - ordinary, 0)
    # the usual residual is that of noise and of small errors at edges
    relative = np.array(
        [np.median(e[k > 0.5]) if s else 0 for e, k, s in zip(excess, inside, seen, strict=True)]
    )
    strange |= relative > _EXCESS * np.median(relative[seen])
    # faint or glaring slices: the contrast of what is there, where something should be
    shown = mean(predicted**2) - mean(predicted) ** 2
    gain = (mean(predicted * measured) - mean(predicted) * mean(measured)) / np.maximum(shown, 1e-12)
    full = seen & (shown > 10 * usual)
    if full.any():
        typical = np.median(gain[full])
        strange |= full & ((gain < _FAINT * typical) | (gain > typical / _FAINT))
    return seen & strange


def _normal_equations(
    one: SliceAcquisition,
    slopes: list[np.ndarray],
    predicted: np.ndarray,
    residual: np.ndarray,
    weight: np.ndarray,
    about: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return J^T W J (n, 7, 7) and J^T W r (n, 7): translation, rotation about a place, gain."""
    n, h, w = predicted.shape
    world = one.vectors @ one.grid.affine[:3, :3].T
    world[:, 0] += one.grid.affine[:3, 3] - about
    row, column = np.mgrid[:h, :w].astype(np.float32)
    hessian, slope = np.empty((n, 7, 7)), np.empty((n, 7))
    size = max(1, _CHUNK // (7 * h * w))
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        v = world[part].astype(np.float32)
        z, y, x = (
            v[:, 0, k, None, None] + v[:, 2, k, None, None] * row + v[:, 3, k, None, None] * column
            for k in range(3)
        )
        gz, gy, gx = (g[part] for g in slopes)
        jacobian = np.stack(
            [gz, gy, gx, y * gx - x * gy, x * gz - z * gx, z * gy - y * gz, predicted[part]], 1
        ).reshape(len(v), 7, -1)
        weighted = jacobian * weight[part].reshape(len(v), 1, -1)
        hessian[part] = weighted @ jacobian.swapaxes(1, 2)
        slope[part] = (weighted @ residual[part].reshape(len(v), -1, 1))[..., 0]
    return hessian, slope
