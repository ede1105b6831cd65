"""Thick slices of several stacks to one volume: least squares with a penalty, solved step by step.

The conventional reconstructions from slices with a profile. Each solver is a generator that changes a volume in
place and yields after every iteration, so that a caller can show, pause and stop it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from napari_innergs.baselines.tv import tv_proximal
from napari_innergs.cpu import variation
from napari_innergs.operators.linear import LinearOperator

# Steps of the proximal map in each iteration; its dual field is carried on.
_INNER = 6


class StackProblem:
    """Measurements of one volume, with a weight for each value.

    Parameters
    ----------
    operators : sequence of LinearOperator
        One for each stack, of the same volume.
    data : sequence of ndarray
        What each measured, float32.
    weights : sequence of ndarray or None
        Weight of each value, 0 to leave it out; all 1 by default.
    """

    def __init__(
        self,
        operators: Sequence[LinearOperator],
        data: Sequence[np.ndarray],
        weights: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.operators = list(operators)
        self.data = list(data)
        self.weights = (
            list(weights) if weights is not None else [np.ones(d.shape, np.float32) for d in self.data]
        )
        self._norm: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the volume."""
        return self.operators[0].domain_shape

    def transpose(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Return the sum of the weighted transposes."""
        total = np.zeros(self.shape, np.float32)
        for one, picture, weight in zip(self.operators, pictures, self.weights, strict=True):
            total += one.adjoint(weight * picture)
        return total

    def residuals(self, volume: np.ndarray) -> list[np.ndarray]:
        """Return what was measured minus what the volume predicts."""
        return [d - one.apply(volume) for one, d in zip(self.operators, self.data, strict=True)]

    def normal(self, volume: np.ndarray) -> np.ndarray:
        """Return A^T W A of a volume."""
        return self.transpose([one.apply(volume) for one in self.operators])

    def norm(self) -> float:
        """Return the largest eigenvalue of A^T W A (a bound for weights of 0 or more: its largest row sum)."""
        if self._norm is None:
            # all entries are 0 or more, so that the row sums bound the spectrum (Perron and Frobenius)
            self._norm = float(self.normal(np.ones(self.shape, np.float32)).max())
        return self._norm


def tikhonov_steps(
    problem: StackProblem,
    volume: np.ndarray,
    penalty: float,
    iterations: int,
    prior: np.ndarray | None = None,
    tolerance: float = 1e-4,
) -> Generator[int, None, None]:
    """Minimise ``sum w (A x - data)^2 + penalty |grad (x - prior)|^2`` by conjugate gradients, in place.

    Parameters
    ----------
    problem : StackProblem
        Measurements.
    volume : ndarray, (Z, Y, X), float32
        Start; holds the latest state.
    penalty : float
        Weight of the squared gradient, above 0.
    iterations : int
        At most so many steps.
    prior : ndarray, (Z, Y, X), float32, optional
        What the penalty pulls to, up to a constant; 0 by default.
    tolerance : float
        Ends when the residual's norm has fallen to this share.

    Yields
    ------
    int
        Steps done.
    """
    scale = np.float32(penalty)

    def normal(x: np.ndarray) -> np.ndarray:
        return problem.normal(x) + scale * variation.squared_gradient(x)

    residual = problem.transpose(problem.residuals(volume))
    residual -= scale * variation.squared_gradient(volume if prior is None else volume - prior)
    direction = residual.copy()
    energy = first = float(np.vdot(residual, residual))
    for iteration in range(iterations):
        if energy <= tolerance**2 * first:
            return
        image = normal(direction)
        length = np.float32(energy / max(float(np.vdot(direction, image)), 1e-30))
        volume += length * direction
        residual -= length * image
        previous, energy = energy, float(np.vdot(residual, residual))
        direction *= np.float32(energy / previous)
        direction += residual
        yield iteration + 1


def tv_steps(
    problem: StackProblem, volume: np.ndarray, weight: float, iterations: int, dual: np.ndarray | None = None
) -> Generator[int, None, None]:
    """Minimise ``sum w (A x - data)^2 / 2 + weight TV(x)``, in place.

    Accelerated proximal gradient steps (Beck & Teboulle 2009, SIAM J. Imaging Sci. 2:183), started again where
    momentum points uphill (O'Donoghue & Candes 2015).

    Parameters
    ----------
    problem : StackProblem
        Measurements.
    volume : ndarray, (Z, Y, X), float32
        Start; holds the latest state.
    weight : float
        Weight of the total variation, in intensity units.
    iterations : int
        Steps.
    dual : ndarray, (3, Z, Y, X), float32, optional
        Dual field of a similar problem; changed in place.

    Yields
    ------
    int
        Steps done.
    """
    step = np.float32(1 / max(problem.norm(), 1e-12))
    field = np.zeros((3, *volume.shape), np.float32) if dual is None else dual
    ahead = volume.copy()
    t = 1.0
    for iteration in range(iterations):
        gradient = problem.transpose(problem.residuals(ahead))
        new, field = tv_proximal(ahead + step * gradient, weight * float(step), _INNER, field)
        change = new - volume
        if float(np.vdot(ahead - new, change)) > 0:
            t = 1.0
        following = (1 + np.sqrt(1 + 4 * t * t)) / 2
        np.multiply(change, np.float32((t - 1) / following), out=ahead)
        ahead += new
        volume[...] = new
        t = following
        yield iteration + 1
