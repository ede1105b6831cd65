"""Bring one layer onto another's voxels, and measure how they differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from napari_innergs.layers.read import LayerView

__all__ = ["Comparison", "compare_views", "resample_onto"]


@dataclass(frozen=True)
class Comparison:
    """How a volume differs from a reference, on the reference's voxels.

    Attributes
    ----------
    difference : ndarray
        Volume minus reference, float32, zero where they don't overlap.
    psnr : float
        dB, with the reference's range within the overlap as peak; infinite for equal volumes.
    ssim : float
        Structural similarity (7-voxel window), mean over the overlap.
    rmse : float
        Root-mean-square difference, intensity units.
    overlap : float
        Share of the reference that the volume covers, 0 to 1.
    """

    difference: np.ndarray
    psnr: float
    ssim: float
    rmse: float
    overlap: float


def resample_onto(view: LayerView, reference: LayerView) -> tuple[np.ndarray, np.ndarray]:
    """Sample a layer at the voxel centres of another (linear interpolation; exact where centres coincide).

    Parameters
    ----------
    view, reference : LayerView
        Three-dimensional layers, both RGB or neither.

    Returns
    -------
    values : ndarray, shape of the reference
        float32; 0 outside.
    inside : ndarray of bool, shape (z, y, x)
        Where `view` has values.
    """
    from scipy.ndimage import affine_transform

    to_index = np.linalg.inv(view.affine) @ reference.affine
    # rounding must not turn coinciding centres into interpolation, nor push the last voxel outside
    to_index = np.where(np.abs(to_index - np.rint(to_index)) < 1e-9, np.rint(to_index), to_index)
    data = np.asarray(view.data)
    channels = [data[..., c] for c in range(data.shape[-1])] if view.rgb else [data]
    out = [
        affine_transform(
            np.asarray(channel, np.float32),
            to_index[:3, :3],
            to_index[:3, 3],
            reference.shape,
            order=1,
            mode="nearest",
        )
        for channel in channels
    ]
    inside = np.ones(reference.shape, bool)
    grids = np.ogrid[tuple(slice(0, size) for size in reference.shape)]
    for row, size in zip(to_index[:3], view.shape, strict=True):
        index = sum(factor * axis for factor, axis in zip(row[:3], grids, strict=True)) + row[3]
        # half a voxel: a voxel reaches that far from its centre
        inside &= (index >= -0.5) & (index <= size - 0.5)
    values = np.stack(out, axis=-1) if view.rgb else out[0]
    values[~inside] = 0
    return values, inside


def compare_views(view: LayerView, reference: LayerView) -> Comparison:
    """Compare a volume with a reference on the reference's voxels.

    Parameters
    ----------
    view, reference : LayerView
        Three-dimensional Image layers.

    Raises
    ------
    ValueError
        If they can't be compared: dimensions or colours differ, no overlap, a constant reference.
    """
    from skimage.metrics import structural_similarity

    for one in (view, reference):
        if one.ndim != 3:
            raise ValueError(f"{one.name!r} has {one.ndim} dimensions; volumes with 3 can be compared.")
    if view.rgb != reference.rgb or (view.rgb and view.data.shape[-1] != reference.data.shape[-1]):
        raise ValueError("An RGB layer can only be compared with another RGB layer.")
    truth = np.asarray(reference.data, np.float32)
    values, inside = resample_onto(view, reference)
    if not inside.any():
        raise ValueError(f"{view.name!r} and {reference.name!r} don't overlap in the world.")
    values[~inside] = truth[~inside]
    peak = float(np.ptp(truth[inside]))
    if peak == 0:
        raise ValueError(
            f"{reference.name!r} is constant where they overlap; there is no range to measure by."
        )
    difference = values - truth
    mse = float(np.mean(np.square(difference[inside], dtype=np.float64)))
    window = 7
    if min(truth.shape[:3]) < window:
        window = max(3, (min(truth.shape[:3]) - 1) // 2 * 2 + 1)
    ssim = np.nan
    if min(truth.shape[:3]) >= window:
        _, image = structural_similarity(
            truth, values, win_size=window, data_range=peak, channel_axis=-1 if view.rgb else None, full=True
        )
        ssim = float(np.mean(image[inside]))
    return Comparison(
        difference,
        float("inf") if mse == 0 else 10 * float(np.log10(peak**2 / mse)),
        ssim,
        float(np.sqrt(mse)),
        float(inside.mean()),
    )
