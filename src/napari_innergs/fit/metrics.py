"""How good a volume is: PSNR and SSIM."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor


def psnr(image: np.ndarray, truth: np.ndarray, peak: float | None = None) -> float:
    """Return the peak signal-to-noise ratio in dB.

    Parameters
    ----------
    image, truth : ndarray
        Of one shape.
    peak : float, optional
        Range of the truth by default.
    """
    peak = float(truth.max()) - float(truth.min()) if peak is None else peak
    error = float(np.mean(np.square(image.astype(np.float64) - truth.astype(np.float64))))
    return math.inf if error == 0 else 10 * math.log10(max(peak, 1e-300) ** 2 / error)


def ssim(image: np.ndarray, truth: np.ndarray, peak: float | None = None) -> float:
    """Return the mean SSIM (Wang et al. 2004) over planes (..., h, w) with a Gaussian window of 1.5 pixels."""
    peak = float(truth.max()) - float(truth.min()) if peak is None else peak
    a, b = (np.ascontiguousarray(x, np.float32).reshape(-1, *x.shape[-2:]) for x in (image, truth))
    if peak == 0 or min(a.shape[-2:]) < 2:
        return 1.0 if np.array_equal(a, b) else 0.0
    radius = min(5, a.shape[-1] - 1, a.shape[-2] - 1)
    # plane by plane in scipy: on small images a hundred times faster than convolutions in torch
    return float(np.mean([_ssim_plane(x, y, peak, radius) for x, y in zip(a, b, strict=True)]))


def _ssim_plane(a: np.ndarray, b: np.ndarray, peak: float, radius: int) -> float:
    def blur(picture: np.ndarray) -> np.ndarray:
        return gaussian_filter(picture, 1.5, radius=radius, mode="mirror")

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def ssim_map(image: Tensor, truth: Tensor, peak: float) -> Tensor:
    """Return the map of SSIM (Wang et al. 2004, eq. 13) of images (m, c, h, w); differentiable."""
    channels = image.shape[1]
    radius = min(5, image.shape[-1] - 1, image.shape[-2] - 1)
    x = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    profile = torch.exp(-0.5 * (x / 1.5) ** 2)
    profile = profile / profile.sum()

    def blur(picture: Tensor) -> Tensor:
        kernel = profile.repeat(channels, 1)
        picture = torch.nn.functional.pad(picture, (radius,) * 4, mode="reflect")
        picture = torch.nn.functional.conv2d(picture, kernel[:, None, None, :], groups=channels)
        return torch.nn.functional.conv2d(picture, kernel[:, None, :, None], groups=channels)

    mean_a, mean_b = blur(image), blur(truth)
    var_a = blur(image * image) - mean_a**2
    var_b = blur(truth * truth) - mean_b**2
    both = blur(image * truth) - mean_a * mean_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    return ((2 * mean_a * mean_b + c1) * (2 * both + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    )
