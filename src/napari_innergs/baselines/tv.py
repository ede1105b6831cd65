"""Total variation of a volume: its proximal map."""

from __future__ import annotations

import numpy as np

from napari_innergs.cpu import variation

_LEAST = 1e-37


def tv_proximal(
    volume: np.ndarray,
    weight: float,
    iterations: int,
    dual: np.ndarray | None = None,
    nonnegative: bool = False,
    scale: np.ndarray | None = None,
    limit: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Denoise a volume by isotropic total variation.

    Minimises ``sum (x - volume)^2 / (2 scale) + weight * sum limit |grad x|`` by accelerated projected steps on
    the dual field (Beck & Teboulle 2009, IEEE TIP 18:2419), scale and limit being 1 unless given.

    Parameters
    ----------
    volume : ndarray, (Z, Y, X), float32
        What to denoise.
    weight : float
        Weight of the total variation, in intensity units; 0 changes nothing.
    iterations : int
        Steps. With the dual field of a similar problem a few do.
    dual : ndarray, (3, Z, Y, X), float32, optional
        Start of the dual field; changed in place.
    nonnegative : bool
        Also keep the result at 0 or above.
    scale : ndarray, (Z, Y, X), float32, optional
        Positive: how little a voxel is held. It should vary smoothly.
    limit : ndarray, (Z, Y, X), float32, optional
        0 or more: how much a voxel's variation counts.

    Returns
    -------
    volume : ndarray, (Z, Y, X), float32
        The minimiser.
    dual : ndarray, (3, Z, Y, X), float32
        Its dual field, to start from next time.

    Raises
    ------
    ValueError
        If the volume has not three axes or the weight is negative.

    Examples
    --------
    >>> noisy = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32)
    >>> smooth, _ = tv_proximal(noisy, 1.0, 50)
    >>> bool(smooth.std() < 0.3 * noisy.std())
    True
    """
    if np.ndim(volume) != 3:
        raise ValueError(f"volume: got {np.ndim(volume)} axes, need 3 (z, y, x).")
    if not weight >= 0:
        raise ValueError(f"weight: got {weight}, need 0 or more.")
    start = np.ascontiguousarray(volume, np.float32)
    field = np.zeros((3, *start.shape), np.float32) if dual is None else dual
    low = 0.0 if nonnegative else -np.inf
    # less is lost in float32, and so would be its inverse
    if weight < _LEAST:
        return np.maximum(start, np.float32(low)), field
    return variation.tv_steps(start, weight, iterations, field, low, scale, limit), field
