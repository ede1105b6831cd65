"""Noise of slices: its level, and total-variation denoising with one fixed rule for the weight."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import convolve
from skimage.restoration import denoise_tv_chambolle

# Below this share of the range, denoising costs more detail than it removes noise.
NOISE_THRESHOLD = 0.015
# Weight of the total variation in units of the noise's standard deviation.
TV_WEIGHT = 0.7
_MASK = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32) / 6


def noise_level(image: np.ndarray) -> float:
    """Return the standard deviation of white noise in an image (h, w), in its own units.

    The mean absolute response of a mask that is blind to planes and edges along the axes (Immerkaer 1996).
    """
    if min(image.shape) < 3:
        return 0.0
    response = convolve(image.astype(np.float32), _MASK)[1:-1, 1:-1]
    return float(np.sqrt(np.pi / 2) * np.abs(response).mean())


def denoise(image: np.ndarray, sigma: float) -> np.ndarray:
    """Return the image (h, w) denoised by total variation (Chambolle 2004) for noise of deviation `sigma`."""
    if sigma <= 0:
        return image.astype(np.float32)
    return denoise_tv_chambolle(
        image.astype(np.float32), weight=TV_WEIGHT * sigma, eps=1e-4, max_num_iter=100
    )
