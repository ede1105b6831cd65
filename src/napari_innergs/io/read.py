"""Read slices from any supported file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from napari_innergs.data import SliceStack
from napari_innergs.geometry.frames import LPS_ZYX, Frame
from napari_innergs.io.files import PathLike, StoredVolume, need_file, suffix_of, to_stack

__all__ = ["SUFFIXES", "count_times", "open_volume", "read_stack", "read_times"]

SUFFIXES = (
    ".tif",
    ".tiff",
    ".ome.tif",
    ".ome.tiff",
    ".nii",
    ".nii.gz",
    ".dcm",
    ".zarr",
    ".ome.zarr",
    ".npz",
    ".npy",
)
"""Endings that :func:`read_stack` knows; a folder is taken for a DICOM series or an OME-Zarr image."""


def open_volume(
    path: PathLike,
    *,
    key: str = "data",
    level: int = 0,
    series: str | None = None,
    world: Frame = LPS_ZYX,
) -> StoredVolume:
    """Find out what a file holds, by its content where the name does not say it.

    Parameters
    ----------
    path : path
        TIFF, NIfTI, OME-Zarr, NPZ or NPY, a DICOM file, or a folder of DICOM files.
    key : str
        Name of the array in an NPZ file.
    level : int
        Resolution level of an OME-Zarr image.
    series : str, optional
        Series of a DICOM folder (UID or number).
    world : Frame
        Orientation of the world for medical files.

    Returns
    -------
    StoredVolume
        Pixels are read when asked for.

    Raises
    ------
    ValueError
        Naming the file, if it is of no known kind or damaged.
    """
    from napari_innergs.io import dicom, nifti, npz, ome_zarr, tiff

    file = need_file(path)
    suffix = suffix_of(file)
    if file.is_dir():
        if ome_zarr.is_zarr(file) or suffix in (".zarr", ".ome.zarr"):
            return ome_zarr.open_ome_zarr(file, level)
        return dicom.open_dicom(file, series, world)
    with file.open("rb") as stream:
        start = stream.read(4)
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or suffix.endswith((".tif", ".tiff")):
        return tiff.open_tiff(file)
    if suffix in (".nii", ".nii.gz"):
        return nifti.open_nifti(file, world)
    if suffix in (".npz", ".npy"):
        return npz.open_npz(file, key)
    if suffix == ".dcm" or dicom.is_dicom(file):
        return dicom.open_dicom(file, series, world)
    raise ValueError(f"path: {str(path)!r} is of no known kind, need one of {', '.join(SUFFIXES)}.")


def read_stack(
    path: PathLike,
    *,
    axis: int | None = None,
    time_index: int | None = None,
    spacing: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    thickness: float = 0.0,
    profile: str = "gaussian",
    mask: ArrayLike | None = None,
    units: Any = None,
    channel_names: Sequence[str] | None = None,
    name: str | None = None,
    key: str = "data",
    level: int = 0,
    series: str | None = None,
    world: Frame = LPS_ZYX,
) -> SliceStack:
    """Read a stack of slices from a file.

    Parameters
    ----------
    path : path
        TIFF (OME and ImageJ metadata), NIfTI, DICOM series (folder), OME-Zarr, NPZ or NPY.
    axis : int, optional
        Array axis (0 = z, 1 = y, 2 = x) that counts the slices. Default: 0, and for NIfTI the axis with the
        largest spacing.
    time_index : int, optional
        Which time point of a series.
    spacing : float or array_like (3,), optional
        Replaces the file's spacing along the array axes (z, y, x), world units.
    positions, thickness, profile, mask, channel_names
        See :class:`napari_innergs.SliceStack`; the mask is in the order of the stack's own axes.
    units : str or sequence of 3 str, optional
        Replaces the file's units.
    name : str, optional
        Default: the file's name.
    key, level, series, world
        See :func:`open_volume`.

    Returns
    -------
    SliceStack
        The slices; medical files lie in the world (z, y, x) towards superior, posterior, left.

    Raises
    ------
    ValueError
        Naming the file or the argument.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/a.npz", data=np.zeros((3, 8, 8)), spacing=(4, 1, 1))
    ...     read_stack(f"{folder}/a.npz").spacing
    4.0
    """
    stored = open_volume(path, key=key, level=level, series=series, world=world)
    return to_stack(
        stored,
        path,
        axis=axis,
        time_index=time_index,
        spacing=spacing,
        positions=positions,
        thickness=thickness,
        profile=profile,
        mask=mask,
        units=units,
        channel_names=channel_names,
        name=name,
    )


def count_times(path: PathLike, **options: Any) -> int:
    """Count the time points of a file without reading its pixels.

    Parameters
    ----------
    path : path
        As for :func:`read_stack`.
    **options
        Keywords of :func:`open_volume`.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    ValueError
        Naming the file.
    """
    return open_volume(path, **options).n_times


def read_times(path: PathLike, **options: Any) -> Iterator[SliceStack]:
    """Read a time series, one stack for each time point, when asked for.

    Parameters
    ----------
    path : path
        As for :func:`read_stack`.
    **options
        Keywords of :func:`read_stack` except `time_index`.

    Yields
    ------
    SliceStack
        The time points in order; a file without time gives one.

    Raises
    ------
    ValueError
        Naming the file or the argument.
    """
    opening = {k: options.pop(k) for k in ("key", "level", "series", "world") if k in options}
    stored = open_volume(path, **opening)
    name = options.pop("name", None) or Path(path).name[: -len(suffix_of(path)) or None]
    for time in range(stored.n_times):
        label = name if stored.n_times == 1 else f"{name} t{time}"
        yield to_stack(stored, path, time_index=time, name=label, **options)
