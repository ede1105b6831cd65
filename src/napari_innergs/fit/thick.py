"""Candidates from thick slices and their combination: least squares, total variation, fields of Gaussians.

A block is a part of the output grid with the pixels that see it. What has to be chosen - the weights of the
penalties, how long the Gaussians are fitted, and how much each candidate counts - is chosen once, on a block of
which some pixels were held out, and then used for all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import nnls

from napari_innergs.baselines.stacks import StackProblem, tikhonov_steps, tv_steps
from napari_innergs.config import SliceConfig
from napari_innergs.fit.engine import Progress, Step, advance, background, drive
from napari_innergs.fit.volume_field import VolumeField, fit_volume_field, start_volume_field
from napari_innergs.operators.linear import LinearOperator

Steps = Generator[Step, None, Any]

# Penalties that are tried, in units of the range: without noise, and total variation in units of the noise.
_TV_CLEAN, _TV_NOISY = (1e-4, 3e-4, 1e-3), (0.1, 0.18, 0.25, 0.35, 0.5)
_TIKHONOV_CLEAN, _TIKHONOV_NOISY = (1e-4, 1e-3, 3e-3, 1e-2), (0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.6)
# Steps: without noise the penalty is small, and far to go; with noise 80 do.
_TV_STEPS, _TIKHONOV_STEPS = {False: 160, True: 80}, 30
# What is held out is seen through the slice profile, which hides noise: of penalties that predict it almost
# as well as the best one, the largest is taken.
_TOLERANCE = 1.008
# Penalty of a residual in units of the Tikhonov one.
_RESIDUAL = 3.0
# Candidates that count for less than this are left out.
_LEAST = 0.02
# Fields are looked at each so many steps; work in a thread comes up for air after so many seconds.
_LOOK = 5
_RIDGE = 0.01
# Slices hide errors along their normal: from their band to that of voxels (measured).
_BAND_FACTOR = 1.3
# The volume that stands in for the truth is smoother than it (measured).
_BOOTSTRAP_FACTOR = 1.15


@dataclass
class Choice:
    """What a rehearsal chose.

    Attributes
    ----------
    noisy : bool
        Whether the noise matters.
    tv, tikhonov : float
        Penalties; total variation in units of the range.
    iterations : dict
        Adam steps of the field of each spacing.
    weights : dict
        Weight of each candidate; their sum is 1.
    band, floor : float
        Half-width of the 90 % band: in units of the candidates' spread, and of the range where one counts alone.
    heldout : dict
        PSNR of each candidate on what was held out, dB.
    """

    noisy: bool = False
    tv: float = 1e-4
    tikhonov: float = 1e-3
    iterations: dict[float, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    band: float = 2.5
    floor: float = 0.0
    heldout: dict[str, float] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        """Return whether a candidate counts (all do before weights are known)."""
        return not self.weights or self.weights.get(name, 0.0) > 0


@dataclass
class Block:
    """A part of the grid with what was measured of it.

    Attributes
    ----------
    operators : list of LinearOperator
        One for each stack.
    data : list of ndarray, (C, n, h, w), float32
        Slices, scaled to a range of about one.
    weights : list of ndarray, (n, h, w), float32
        Trust in each pixel.
    starts : dict of ndarray, (C, Z, Y, X)
        Candidates that others made: "cubic", and perhaps "slices".
    """

    operators: Sequence[LinearOperator]
    data: list[np.ndarray]
    weights: list[np.ndarray]
    starts: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        self.problems = [
            StackProblem(self.operators, [d[c] for d in self.data], self.weights)
            for c in range(self.data[0].shape[0])
        ]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels."""
        return self.starts["cubic"].shape[1:]  # type: ignore[return-value]

    def tikhonov(
        self, start: np.ndarray, penalty: float, progress: Progress, prior: np.ndarray | None = None
    ) -> Steps:
        """Return the minimiser of least squares with a squared gradient, (C, Z, Y, X)."""
        volume = start.copy()
        for c, problem in enumerate(self.problems):
            pull = None if prior is None else prior[c]
            steps = tikhonov_steps(problem, volume[c], penalty, _TIKHONOV_STEPS, pull)
            yield from drive(steps, progress, _TIKHONOV_STEPS)
        return volume

    def total_variation(self, start: np.ndarray, weight: float, progress: Progress, steps: int) -> Steps:
        """Return the minimiser of least squares with total variation, (C, Z, Y, X)."""
        volume = start.copy()
        for problem, one in zip(self.problems, volume, strict=True):
            yield from drive(tv_steps(problem, one, weight, steps), progress, steps)
        return volume

    def gaussians(
        self,
        start: np.ndarray,
        spacing: float,
        total: int,
        stop: int,
        backend: str,
        progress: Progress,
        look: Callable[[int, np.ndarray], None] | None = None,
    ) -> Generator[Step, None, tuple[VolumeField, np.ndarray]]:
        """Return a field fitted to the slices, and its volume."""
        shape = self.shape
        (made,) = yield from background([partial(start_volume_field, start, spacing)], progress)
        fitted = made if backend == "auto" else _moved(made, backend)
        steps = fit_volume_field(
            fitted, shape, self.operators, self.data, self.weights, total, backend=backend
        )

        def render() -> np.ndarray:
            return np.ascontiguousarray(fitted.render(shape, backend).cpu().numpy())

        done = 0
        while done < stop:
            # until the next look, or for a while
            until = min(stop, done - done % _LOOK + _LOOK) if look is not None else stop
            ((done, loss),) = yield from background([partial(advance, steps, until - done)], progress)
            yield progress.step(done / stop, iteration=done, total=stop, loss=loss)
            if look is not None and (done % _LOOK == 0 or done == stop):
                (volume,) = yield from background([render], progress)
                look(done, volume)
        (volume,) = yield from background([render], progress)
        return fitted, volume


def _moved(one: VolumeField, device: str) -> VolumeField:
    return VolumeField(*(getattr(one, n).to(device) for n in ("mean", "cholesky", "amplitude", "log_weight")))


def solve(
    block: Block,
    choice: Choice,
    config: SliceConfig,
    backend: str,
    progress: Progress,
    share: float,
    take: Callable[[str, np.ndarray], None],
) -> Generator[Step, None, VolumeField | None]:
    """Compute the candidates of a block one after another, and hand each to `take`.

    Returns
    -------
    VolumeField or None
        The finest field of Gaussians.
    """
    begin = progress.end if progress.phase else 0.0
    spacings = [s for s in choice.iterations if choice.wants(_named(s)) or choice.wants(_named(s, True))]
    parts = 2 + len(spacings) + ("slices" in block.starts)
    done = 0

    def enter(phase: str) -> None:
        nonlocal done
        done += 1
        progress.enter(phase, begin + (share - begin) * min(done / parts, 1.0))

    cubic = block.starts["cubic"]
    if choice.wants("cubic"):
        take("cubic", cubic)
    enter("Least squares (Tikhonov)")
    smooth = yield from block.tikhonov(cubic, choice.tikhonov, progress)
    if choice.wants("tikhonov"):
        take("tikhonov", smooth)
    enter("Total variation")
    variation = smooth
    if choice.wants("tv") or spacings:
        variation = yield from block.total_variation(smooth, choice.tv, progress, _TV_STEPS[choice.noisy])
        if choice.wants("tv"):
            take("tv", variation)
    if "slices" in block.starts:
        enter("Slices with the profile's residual")
        prior = block.starts["slices"]
        if choice.wants("slices+residual"):
            out = yield from block.tikhonov(prior, _RESIDUAL * choice.tikhonov, progress, prior)
            take("slices+residual", out)
    finest: VolumeField | None = None
    for spacing in spacings:
        enter(f"Gaussians ({spacing:g} voxels apart)")
        fitted, volume = yield from block.gaussians(
            variation, spacing, config.iterations, choice.iterations[spacing], backend, progress
        )
        finest = finest or fitted
        if choice.wants(_named(spacing)):
            take(_named(spacing), volume)
        if choice.wants(_named(spacing, True)):
            out = yield from block.tikhonov(volume, _RESIDUAL * choice.tikhonov, progress, volume)
            take(_named(spacing, True), out)
    return finest


def rehearse(
    block: Block,
    test: Block,
    noise: float,
    noisy: bool,
    config: SliceConfig,
    backend: str,
    progress: Progress,
    share: float,
) -> Generator[Step, None, Choice]:
    """Choose penalties, lengths and weights on a block by how well `test`, which it has not seen, is predicted.

    Parameters
    ----------
    block, test : Block
        What the candidates are made from, and what they have to predict; the same grid.
    noise : float
        Standard deviation of the slices' noise, in units of the range.
    noisy : bool
        Whether it matters.
    """
    begin = progress.end if progress.phase else 0.0
    spacings = config.volume_spacings if config.gaussians else ()
    keep = [w > 0 for w in test.weights]

    def errors(volume: np.ndarray) -> np.ndarray:
        """Return what the volume leaves unexplained of the pixels held out."""
        parts = [
            (d - one.apply(volume[c]))[seen]
            for c, problem in enumerate(test.problems)
            for one, d, seen in zip(test.operators, problem.data, keep, strict=True)
        ]
        return np.concatenate(parts)

    def rms(volume: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(errors(volume)))))

    def best(values: Sequence[float], tried: Sequence[Any]) -> int:
        """Index of the penalty to take; they rise."""
        scores = np.array(values)
        return int(np.flatnonzero(scores <= scores.min() * _TOLERANCE).max() if noisy else scores.argmin())

    made: dict[str, np.ndarray] = {"cubic": block.starts["cubic"]}
    choice = Choice(noisy)
    progress.enter("Rehearsal: least squares", begin + 0.2 * (share - begin))
    penalties = _TIKHONOV_NOISY if noisy else _TIKHONOV_CLEAN
    volumes: list[np.ndarray] = []
    scores: list[float] = []
    volume = made["cubic"]
    for penalty in penalties[::-1]:
        volume = yield from block.tikhonov(volume, penalty, progress)
        volumes.insert(0, volume)
        scores.insert(0, rms(volume))
    at = best(scores, penalties)
    choice.tikhonov, made["tikhonov"] = penalties[at], volumes[at]
    progress.enter("Rehearsal: total variation", begin + 0.45 * (share - begin))
    factors = [noise * f for f in _TV_NOISY] if noisy else list(_TV_CLEAN)
    volumes, scores, volume = [], [], made["tikhonov"]
    for factor in factors[::-1]:
        volume = yield from block.total_variation(volume, factor, progress, _TV_STEPS[True] // 2)
        volumes.insert(0, volume)
        scores.insert(0, rms(volume))
    at = best(scores, factors)
    choice.tv, made["tv"] = factors[at], volumes[at]
    if "slices" in block.starts:
        prior = block.starts["slices"]
        made["slices+residual"] = yield from block.tikhonov(
            prior, _RESIDUAL * choice.tikhonov, progress, prior
        )
    for i, spacing in enumerate(spacings):
        end = begin + (share - begin) * (0.45 + 0.4 * (i + 1) / len(spacings))
        progress.enter(f"Rehearsal: Gaussians ({spacing:g} voxels apart)", end)
        seen: list[tuple[float, int, np.ndarray]] = []

        def look(iteration: int, volume: np.ndarray, seen: list[Any] = seen) -> None:
            seen.append((rms(volume), iteration, volume))

        yield from block.gaussians(
            made["tv"], spacing, config.iterations, config.iterations, backend, progress, look
        )
        if not seen:
            continue
        _, choice.iterations[spacing], volume = min(seen, key=lambda s: s[0])
        made[_named(spacing)] = volume
        made[_named(spacing, True)] = yield from block.tikhonov(
            volume, _RESIDUAL * choice.tikhonov, progress, volume
        )
        yield progress.step(1.0, psnr_heldout=_decibel(min(seen)[0]))
    progress.enter("Rehearsal: weights", begin + 0.9 * (share - begin))
    (weighted,) = yield from background([partial(_weigh, made, errors, config)], progress)
    choice.weights, choice.heldout = weighted
    yield progress.step(1.0, psnr_heldout=choice.heldout["combined"])
    if config.uncertainty and len(choice.weights) == 1:
        # a single candidate has no spread: what it missed, less the noise of what it was compared with
        missed = float(np.quantile(np.abs(errors(made[next(iter(choice.weights))])), 0.9))
        choice.floor = float(np.sqrt(max(missed**2 - (1.645 * noise) ** 2, (0.2 * missed) ** 2)))
    elif config.uncertainty:
        if noisy and len(block.operators) > 1:
            choice.band = yield from _bootstrap(block, made, choice, noise, config, backend, progress, share)
        else:
            (choice.band,) = yield from background([partial(_band, made, choice, test, errors)], progress)
    return choice


def _weigh(
    made: dict[str, np.ndarray], errors: Callable[[np.ndarray], np.ndarray], config: SliceConfig
) -> tuple[dict[str, float], dict[str, float]]:
    names = list(made)
    table = np.stack([errors(made[name]) for name in names]).astype(np.float64)
    heldout = {
        name: _decibel(float(np.sqrt(np.mean(row**2)))) for name, row in zip(names, table, strict=True)
    }
    if config.combine == "average":
        weights = np.full(len(names), 1 / len(names))
    elif config.combine == "best":
        weights = np.eye(len(names))[int(np.argmax([heldout[name] for name in names]))]
    else:
        weights = simplex_weights(table @ table.T / table.shape[1])
    heldout["combined"] = _decibel(float(np.sqrt(np.mean((weights @ table) ** 2))))
    return {name: float(w) for name, w in zip(names, weights, strict=True) if w > 0}, heldout


def simplex_weights(covariance: np.ndarray) -> np.ndarray:
    """Return the weights, none negative and their sum one, that minimise w^T C w.

    A little of the diagonal in excess of what all errors share (the noise of the test data) is added: weights of
    candidates that are nearly alike are then shared between them. Small ones are dropped.

    Parameters
    ----------
    covariance : ndarray, (n, n)
        Mean products of the candidates' errors.
    """

    def solved(matrix: np.ndarray) -> np.ndarray:
        n = len(matrix)
        values, vectors = np.linalg.eigh(matrix)
        root = (vectors * np.sqrt(values.clip(0))).T
        heavy = 1e3 * np.sqrt(np.trace(matrix) + 1e-300)
        out, _ = nnls(np.vstack([root, np.full((1, n), heavy)]), np.append(np.zeros(n), heavy))
        return np.asarray(out / out.sum())

    weights = solved(covariance)
    excess = float(np.mean(np.diag(covariance)) - weights @ covariance @ weights)
    weights = solved(covariance + _RIDGE * max(excess, 0.0) * np.eye(len(covariance)))
    weights[weights < _LEAST] = 0
    return np.asarray(weights / weights.sum())


def spread(mean: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Return the candidates' smoothed standard deviation from their weighted mean and mean square."""
    variance = (square - mean**2).clip(0)
    return np.sqrt(np.stack([gaussian_filter(v, 1.0) for v in variance]))


def _bootstrap(
    block: Block,
    made: dict[str, np.ndarray],
    choice: Choice,
    noise: float,
    config: SliceConfig,
    backend: str,
    progress: Progress,
    share: float,
) -> Generator[Step, None, float]:
    """Measure errors in units of the spread where the truth is known: on slices of the combined volume, with noise.

    A parametric bootstrap (Efron 1979): what is reconstructed from simulated slices errs like the volume itself.
    """
    truth = sum(np.float32(w) * made[name] for name, w in choice.weights.items())
    random = np.random.default_rng(0)
    data = []
    for one, d in zip(block.operators, block.data, strict=True):
        clean = np.stack([one.apply(channel) for channel in np.asarray(truth)])
        data.append(clean + np.float32(noise) * random.standard_normal(d.shape, np.float32))
    again = Block(block.operators, data, block.weights, block.starts)
    mean = np.zeros_like(made["cubic"])
    square = np.zeros_like(mean)

    def take(name: str, volume: np.ndarray) -> None:
        weight = np.float32(choice.weights[name])
        np.add(mean, weight * volume, out=mean)
        np.add(square, weight * volume**2, out=square)

    yield from solve(again, choice, config, backend, progress, share, take)
    wide = spread(mean, square)
    inner = (slice(None), *(slice(n // 8, n - n // 8) for n in mean.shape[1:]))
    ratio = np.abs(mean - truth)[inner] / np.maximum(wide[inner], 1e-6)
    return _BOOTSTRAP_FACTOR * float(np.quantile(ratio, 0.9))


def _band(
    made: dict[str, np.ndarray],
    choice: Choice,
    test: Block,
    errors: Callable[[np.ndarray], np.ndarray],
) -> float:
    """Measure errors in units of the spread on thinner slices than those that were used."""
    mean = np.asarray(sum(np.float32(w) * made[name] for name, w in choice.weights.items()))
    square = np.asarray(sum(np.float32(w) * made[name] ** 2 for name, w in choice.weights.items()))
    wide = spread(mean, square)
    keep = [w > 0 for w in test.weights]
    seen = np.concatenate(
        [one.apply(wide[c])[k] for c in range(len(wide)) for one, k in zip(test.operators, keep, strict=True)]
    )
    return _BAND_FACTOR * float(np.quantile(np.abs(errors(mean)) / np.maximum(seen, 1e-6), 0.9))


def _named(spacing: float, residual: bool = False) -> str:
    return f"gaussians-{spacing:g}" + ("+residual" if residual else "")


def _decibel(rms: float) -> float:
    return float(round(-20 * np.log10(max(rms, 1e-12)), 3))
