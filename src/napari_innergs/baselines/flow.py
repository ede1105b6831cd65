"""Flow-based interpolation between neighbouring slices.

Two dense flows with independent errors: dense inverse search (Kroeger et al. 2016, from OpenCV) and TV-L1
(Zach, Pock and Bischof 2007, from scikit-image).
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from skimage.registration import optical_flow_tvl1

FlowMethod = Literal["flow-dis", "flow-tvl1"]
_MIN_SIDE = 16
# TV-L1 takes seconds for a pair of larger slices; binned 2 x 2 it takes a quarter and loses 0.03 dB at most.
_BIN_ABOVE_PIXELS = 100_000


def intensity_window(values: np.ndarray) -> tuple[float, float]:
    """Return the range (0.1 to 99.9 percentile) that flows are computed in."""
    sample = values.reshape(-1)[:: max(1, values.size // 1_000_000)]
    low, high = (float(v) for v in np.percentile(sample, (0.1, 99.9)))
    return low, high if high > low else low + max(1.0, abs(low))


def pair_flow(
    first: np.ndarray, second: np.ndarray, method: FlowMethod, window: tuple[float, float]
) -> np.ndarray:
    """Return the displacement that takes each pixel of `first` to its place in `second`.

    Parameters
    ----------
    first, second : ndarray, shape (h, w), float32
        Two slices.
    method : {"flow-dis", "flow-tvl1"}
        The estimator.
    window : (float, float)
        Intensities mapped to the estimator's range, see `intensity_window`.

    Returns
    -------
    ndarray, shape (h, w, 2), float32
        Displacement (column, row) in pixels.
    """
    low, high = window
    if min(first.shape) < _MIN_SIDE:
        return np.zeros((*first.shape, 2), np.float32)
    scaled = [np.clip((image - low) / (high - low), 0, 1) for image in (first, second)]
    if method == "flow-dis":
        estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        estimator.setFinestScale(0)
        a, b = ((image * 255).round().astype(np.uint8) for image in scaled)
        return np.asarray(estimator.calc(a, b, None), np.float32)  # type: ignore[call-overload]
    h, w = first.shape
    if h * w > _BIN_ABOVE_PIXELS:
        low_res = [
            cv2.resize(image, (w // 2, h // 2), interpolation=cv2.INTER_AREA) for image in (first, second)
        ]
        flow = cv2.resize(pair_flow(low_res[0], low_res[1], method, window), (w, h))
        return flow * np.array([w / (w // 2), h / (h // 2)], np.float32)
    rows, columns = optical_flow_tvl1(
        scaled[0].astype(np.float32), scaled[1].astype(np.float32), dtype=np.float32
    )
    return np.stack([columns, rows], -1).astype(np.float32)


def warp(image: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """Sample `image` (h, w) or (h, w, c) at each pixel plus `displacement` (h, w, 2), cubic, edges repeated."""
    h, w = image.shape[:2]
    x = np.arange(w, dtype=np.float32) + displacement[..., 0]
    y = np.arange(h, dtype=np.float32)[:, None] + displacement[..., 1]
    if image.ndim == 2 or image.shape[2] <= 4:
        return cv2.remap(image, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE).reshape(image.shape)
    # OpenCV takes four channels at most
    parts = [image[..., c : c + 4] for c in range(0, image.shape[2], 4)]
    return np.concatenate([warp(np.ascontiguousarray(part), displacement) for part in parts], -1)


def towards(forward: np.ndarray, backward: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the displacements from the plane at `share` of a gap to its two slices.

    The two-way flows are blended as the linear-motion approximation has it (Jiang et al. 2018, eq. 4).
    """
    s = np.float32(share)
    return (
        -(1 - s) * s * forward + s * s * backward,
        (1 - s) ** 2 * forward - s * (1 - s) * backward,
    )
