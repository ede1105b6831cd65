"""Write volumes to any supported file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from napari_innergs.geometry.frames import LPS_ZYX, Frame
from napari_innergs.geometry.grid import Grid
from napari_innergs.io.files import PathLike, atomic_path, ensure_writable, suffix_of

__all__ = ["WRITE_SUFFIXES", "atomic_path", "check_output", "ensure_writable", "write_volume"]

WRITE_SUFFIXES = (".tif", ".tiff", ".ome.tif", ".ome.tiff", ".nii", ".nii.gz", ".zarr", ".ome.zarr", ".npz")
"""Endings that :func:`write_volume` knows."""


def check_output(path: PathLike) -> None:
    """Find out, before long work, whether a volume can be written to a path.

    Parameters
    ----------
    path : path
        Where the result will go.

    Raises
    ------
    ValueError
        If the ending is not known, or the folder can not be written.
    """
    if suffix_of(path) not in WRITE_SUFFIXES:
        raise ValueError(
            f"path: got {str(path)!r}, need a name that ends in one of {', '.join(WRITE_SUFFIXES)}."
        )
    ensure_writable(Path(path).parent)


def write_volume(
    path: PathLike,
    volume: ArrayLike,
    grid: Grid,
    *,
    channel_names: Sequence[str] | None = None,
    world: Frame = LPS_ZYX,
) -> None:
    """Write a volume with its place in the world; the name's ending chooses the format.

    The file appears under its name only when it is complete. TIFF and OME-Zarr show other programs the
    spacing and units, and keep the whole affine for :func:`napari_innergs.io.read.read_stack`; NPZ and NIfTI
    hold the affine itself.

    Parameters
    ----------
    path : path
        ``.tif``, ``.ome.tif``, ``.nii``, ``.nii.gz``, ``.zarr``, ``.ome.zarr`` or ``.npz``.
    volume : array_like (z, y, x) or (z, y, x, c)
        Pixels, written in their own type.
    grid : Grid
        Their place.
    channel_names : sequence of str, optional
        One for each channel.
    world : Frame
        Orientation of the grid's world, for NIfTI.

    Raises
    ------
    ValueError
        If volume and grid disagree, the type can not be held by the format, or the folder can not be written.

    Examples
    --------
    >>> import tempfile
    >>> from napari_innergs.io.read import read_stack
    >>> grid = Grid((2, 3, 4), np.diag([2.0, 0.5, 0.5, 1.0]), units="um")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_volume(f"{folder}/a.tif", np.ones(grid.shape, np.uint8), grid)
    ...     bool(np.array_equal(read_stack(f"{folder}/a.tif").affine, grid.affine))
    True
    """
    check_output(path)
    pixels = np.asarray(volume)
    if pixels.ndim not in (3, 4) or pixels.shape[:3] != grid.shape:
        raise ValueError(f"volume: got shape {pixels.shape}, need {grid.shape} or {grid.shape} and channels.")
    names = None if channel_names is None else tuple(str(name) for name in channel_names)
    channels = pixels.shape[3] if pixels.ndim == 4 else 1
    if names is not None and len(names) != channels:
        raise ValueError(f"channel_names: got {len(names)} names, need {channels}.")
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"volume: got {pixels.dtype}, need integers or floating-point numbers.")
    # not all formats know both byte orders
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    suffix = suffix_of(path)
    if suffix.endswith((".tif", ".tiff")):
        from napari_innergs.io.tiff import write_tiff

        write_tiff(path, pixels, grid, names)
    elif suffix in (".nii", ".nii.gz"):
        from napari_innergs.io.nifti import write_nifti

        write_nifti(path, pixels, grid, world)
    elif suffix == ".npz":
        from napari_innergs.io.npz import write_npz

        write_npz(path, pixels, grid, names)
    else:
        from napari_innergs.io.ome_zarr import write_ome_zarr

        write_ome_zarr(path, pixels, grid, names)
