"""The combiner: one volume from all candidates, with weights learned from the stack itself.

Every second slice is left out, the candidates predict it from its neighbours, and the covariance of their errors
gives the weights of least expected square error (sum one, none negative; Bates and Granger 1969). Two facts make
this carry over to the real gaps:

- leaving a slice out doubles the gap, so the rehearsal is done on slices binned 2 x 2: measured in pixels, gap
  and structure then have the size they have in the job itself;
- how much the candidates disagree says how hard a place is. Weights are learned for classes of disagreement, by
  rank, and so vary in space with the content of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import gaussian_filter

_CLASSES = 6
_RIDGE = 0.02
_SHRINK = 0.3
_SMOOTH = 1.5
# Weights where nothing can be learned (two slices): what was learned on average over the benchmark stacks.
_PRIOR = {"flow": 0.4, "normalised": 0.4, "additive": 0.05, "linear": 0.15, "pchip": 0.15, "cubic": 0.05}
_BAND = 0.9
# Disagreement, in units of the range, below which candidates count as equal.
_LEAST = 1e-6
# Fine detail of binned slices relative to full ones at which the rehearsal's band needs no change, and how the
# band follows it; measured on seven volumes of four modalities (docs/decisions.md).
_DETAIL, _DETAIL_POWER, _BAND_SCALES = 2.2, 0.75, (0.7, 1.15)
# The same for the gap in pixels: over small gaps binning matters more.
_GAP, _GAP_POWER = 5.0, 0.12


def disagreement(planes: np.ndarray) -> np.ndarray:
    """Return how much candidates (K, m, h, w, c) differ: their standard deviation, smoothed in-plane."""
    spread = planes.std(0)
    return gaussian_filter(spread, (0, _SMOOTH, _SMOOTH, 0))


def least_error_weights(covariance: np.ndarray, ridge: float = _RIDGE) -> np.ndarray:
    """Return the weights of sum one, none negative, with the least expected square error.

    Parameters
    ----------
    covariance : ndarray, shape (K, K)
        Second moments of the candidates' errors.
    ridge : float
        Share of the mean variance that is added to the diagonal.
    """
    covariance = covariance + (ridge * np.mean(np.diag(covariance)) + 1e-20) * np.eye(len(covariance))
    active = np.arange(len(covariance))
    while True:
        weights = np.linalg.solve(covariance[np.ix_(active, active)], np.ones(len(active)))
        weights /= weights.sum()
        if (weights >= 0).all():
            break
        active = active[weights > 0]
    out = np.zeros(len(covariance))
    out[active] = weights
    return out


def band_scale_of(full: float, binned: float, gap: float) -> float:
    """Return the factor of the error band from binned slices to full ones.

    Where binning makes fine detail stronger (sharp structures) the candidates err more in the rehearsal than in
    the job, where it makes it weaker (noise) they err less.

    Parameters
    ----------
    full, binned : float
        Level of the finest detail (`noise_level`) of full and of binned slices.
    gap : float
        Gap between the slices in (full-size) pixels.
    """
    if full <= 0 or binned <= 0:
        return 1.0
    by_detail = np.clip((_DETAIL * full / binned) ** _DETAIL_POWER, *_BAND_SCALES)
    return float(by_detail * np.clip((gap / _GAP) ** _GAP_POWER, 0.85, 1.1))


def prior_weights(names: Sequence[str]) -> np.ndarray:
    """Return weights for candidates where the stack has too few slices to learn from."""
    kinds = [next((kind for kind in _PRIOR if kind in name), None) for name in names]
    out = np.array([_PRIOR[kind] / kinds.count(kind) if kind else 0.0 for kind in kinds])
    return out / out.sum() if out.sum() > 0 else np.full(len(names), 1 / len(names))


@dataclass
class Combiner:
    """Weights of the candidates, for classes of disagreement, and the error to be expected in each.

    Attributes
    ----------
    names : list of str
        The candidates.
    edges : ndarray, shape (B - 1, c)
        Limits of the classes of disagreement, for each channel.
    weights : ndarray, shape (B, c, K)
        Weights.
    ratio : ndarray, shape (B, c)
        Half-width of the 90 % band of the error in units of the disagreement.
    floor : ndarray, shape (c,)
        Standard deviation of noise that the band must add.
    rms : dict
        Root mean square error of each candidate and of the combination on slices left out, in units of the
        range; empty when nothing could be left out.
    least : ndarray, shape (c,), or float
        Least disagreement that `ratio` refers to: a single candidate agrees with itself, and errs nevertheless.
    """

    names: list[str]
    edges: np.ndarray
    weights: np.ndarray
    ratio: np.ndarray
    floor: np.ndarray
    rms: dict[str, float] = field(default_factory=dict)
    least: np.ndarray | float = 0.0

    def apply(self, planes: np.ndarray, want_band: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """Combine candidates (K, m, h, w, c); return the estimate and its 90 % band, (m, h, w, c)."""
        spread = disagreement(planes)
        least = np.broadcast_to(np.asarray(self.least, np.float32), planes.shape[-1:])
        out = np.zeros(planes.shape[1:], np.float32)
        band = np.zeros(planes.shape[1:], np.float32) if want_band else None
        for c in range(planes.shape[-1]):
            classes = self._position(spread[..., c], c)
            low = np.floor(classes).astype(np.intp)
            share = (classes - low).astype(np.float32)
            high = np.minimum(low + 1, len(self.weights) - 1)
            for k in range(len(planes)):
                table = self.weights[:, c, k].astype(np.float32)
                if table.any():
                    out[..., c] += ((1 - share) * table[low] + share * table[high]) * planes[k, ..., c]
            if band is not None:
                table = self.ratio[:, c].astype(np.float32)
                local = ((1 - share) * table[low] + share * table[high]) * np.maximum(
                    spread[..., c], least[c]
                )
                band[..., c] = np.sqrt(local**2 + np.float32(1.645 * self.floor[c]) ** 2)
        return out, band

    def _position(self, spread: np.ndarray, channel: int) -> np.ndarray:
        """Class of each pixel as a number that moves smoothly from one class to the next."""
        edges = self.edges[:, channel]
        if len(edges) == 0:
            return np.zeros(spread.shape)
        return np.interp(spread, edges, np.arange(len(edges)) + 0.5, left=0, right=len(edges))

    def calibrate(self, sample: np.ndarray) -> None:
        """Set the limits of the classes to the ranks of the disagreement of real planes (K, m, h, w, c)."""
        classes = len(self.weights)
        spread = disagreement(sample)
        self.edges = np.stack(
            [
                np.quantile(spread[..., c], np.linspace(0, 1, classes + 1)[1:-1])
                for c in range(spread.shape[-1])
            ],
            -1,
        )

    def mean_weights(self) -> dict[str, float]:
        """Return what each candidate contributes on average."""
        return dict(zip(self.names, (float(w) for w in self.weights.mean((0, 1))), strict=True))


def learn(
    names: Sequence[str],
    planes: np.ndarray,
    truth: np.ndarray,
    ranges: np.ndarray,
    floor: np.ndarray,
    trust: np.ndarray | None = None,
    mode: str = "learned",
    band_scale: float = 1.0,
) -> Combiner:
    """Learn a combiner from candidates for slices that were left out.

    Parameters
    ----------
    names : sequence of str
        The K candidates.
    planes : ndarray, shape (K, m, h, w, c)
        Their predictions.
    truth : ndarray, shape (m, h, w, c)
        The slices.
    ranges : ndarray, shape (c,)
        Intensity range of each channel.
    floor : ndarray, shape (c,)
        Standard deviation of noise in the job that the rehearsal did not have.
    trust : ndarray or None, shape (m, h, w)
        Pixels with 0 are not used.
    mode : {"learned", "best", "average"}
        Learned weights; all weight on the candidate with the least error; equal weights.
    band_scale : float
        Factor of the band between the rehearsal and the job, see `band_scale_of`.
    """
    count, channels = len(names), planes.shape[-1]
    usable = np.ones(truth.shape[:3], bool) if trust is None else trust > 0.5
    error = (planes - truth) / ranges
    spread = disagreement(planes)
    classes = _CLASSES if usable.sum() > 2000 else 1
    # a few planes are little evidence: lean on the prior in proportion
    lean = 0.5 / max(len(truth), 1) if mode == "learned" else 0.0
    prior = prior_weights(names)
    weights, ratio = np.zeros((classes, channels, count)), np.zeros((classes, channels))
    edges = np.zeros((classes - 1, channels))
    for c in range(channels):
        e = error[..., c][:, usable].astype(np.float64)
        d = spread[..., c][usable]
        moments = e @ e.T / e.shape[1]
        edges[:, c] = np.quantile(d, np.linspace(0, 1, classes + 1)[1:-1])
        which = np.searchsorted(edges[:, c], d)
        for b in range(classes):
            inside = which == b
            if not inside.any():
                # many equal disagreements leave classes empty: they take what holds for all
                inside = np.ones_like(inside)
            part = e[:, inside]
            local = part @ part.T / max(part.shape[1], 1)
            mixed = local / max(np.trace(local), 1e-30) + _SHRINK * moments / max(np.trace(moments), 1e-30)
            if mode == "average":
                w = np.full(count, 1 / count)
            elif mode == "best":
                w = np.eye(count)[int(np.argmin(np.diag(moments)))]
            else:
                w = (1 - lean) * least_error_weights(mixed) + lean * prior
            weights[b, c] = w
            residual = np.abs(w @ part) * ranges[c]
            size = np.maximum(d[inside], _LEAST * ranges[c])
            ratio[b, c] = band_scale * np.quantile(residual / size, _BAND)
    combiner = Combiner(list(names), edges, weights, ratio, floor, least=_LEAST * ranges)
    combined, _ = combiner.apply(planes, want_band=False)

    def rms(estimate: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.square(((estimate - truth) / ranges)[usable], dtype=np.float64))))

    combiner.rms = {name: rms(planes[k]) for k, name in enumerate(names)}
    combiner.rms["combined"] = rms(combined)
    return combiner


def unlearned(names: Sequence[str], channels: int, mode: str) -> Combiner:
    """Return a combiner for a stack from which no slice can be left out."""
    names = list(names)
    weights = prior_weights(names) if mode == "learned" else np.full(len(names), 1 / len(names))
    if mode == "best":
        weights = np.eye(len(names))[int(np.argmax(prior_weights(names)))]
    return Combiner(
        names,
        np.zeros((0, channels)),
        np.broadcast_to(weights, (1, channels, len(names))).copy(),
        np.full((1, channels), 3.0),
        np.zeros(channels),
    )
