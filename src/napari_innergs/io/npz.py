"""NPZ and NPY volumes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.geometry.frames import affine_from_spacing, check_affine
from napari_innergs.geometry.grid import Grid
from napari_innergs.io.files import PathLike, StoredVolume, atomic_path
from napari_innergs.io.ply import npz_names, read_npz_arrays

__all__ = ["open_npz", "write_npz"]


def open_npz(path: PathLike, key: str = "data") -> StoredVolume:
    """Find out what an NPZ or NPY file holds.

    Parameters
    ----------
    path : path
        With an array `key`, and optionally ``affine`` (4, 4) or ``spacing`` (3,), ``positions``, ``mask``,
        ``units``, ``channel_names`` and ``axes`` (such as ``"czyx"``). Without ``axes``, four axes are
        z, y, x, c and five t, z, y, x, c.
    key : str
        Name of the array.

    Returns
    -------
    StoredVolume
        What was found.

    Raises
    ------
    ValueError
        Naming the file, if the array is missing or the file damaged.
    """
    extras = ("affine", "spacing", "positions", "mask", "units", "channel_names", "axes")
    arrays = read_npz_arrays(path, (key, *extras))
    if key not in arrays:
        raise ValueError(f"key: {str(path)!r} has no array {key!r}, need one of {npz_names(path)}.")
    pixels = arrays[key]
    default = {3: "zyx", 4: "zyxc", 5: "tzyxc"}.get(pixels.ndim, "")
    axes = str(arrays["axes"]).lower() if "axes" in arrays else default
    if len(axes) != pixels.ndim or len(set(axes)) != len(axes) or not set("zyx") <= set(axes) <= set("tczyx"):
        raise ValueError(
            f"path: {str(path)!r} has shape {pixels.shape} with axes {axes or None!r}, need z, y and x, "
            "and at most t and c."
        )
    try:
        if "affine" in arrays:
            affine = np.array(check_affine(arrays["affine"]))
        else:
            affine = np.array(affine_from_spacing(arrays.get("spacing", np.ones(3))))
    except ValueError as error:
        raise ValueError(f"{error} (file {str(path)!r})") from error
    units: Any = arrays.get("units")
    if units is not None:
        units = str(units.flat[0]) if units.size == 1 else tuple(str(unit) for unit in units.flat)
    names = arrays.get("channel_names")

    def read(time: int) -> NDArray[Any]:
        volume = pixels.take(time, axis=axes.index("t")) if "t" in axes else pixels
        left = axes.replace("t", "")
        return volume.transpose([left.index(name) for name in "zyxc" if name in left])

    return StoredVolume(
        read,
        pixels.shape[axes.index("t")] if "t" in axes else 1,
        affine,
        units,
        None if names is None else tuple(str(name) for name in np.ravel(names)),
        positions=arrays.get("positions"),
        mask=arrays.get("mask"),
        exact="affine" in arrays or "spacing" in arrays,
    )


def write_npz(
    path: PathLike, volume: NDArray[Any], grid: Grid, channel_names: tuple[str, ...] | None = None
) -> None:
    """Write a volume as compressed NPZ: ``data``, ``affine``, and ``units`` and ``channel_names`` if known.

    Parameters
    ----------
    path : path
        Where.
    volume : ndarray (z, y, x) or (z, y, x, c)
        Pixels.
    grid : Grid
        Their place; the affine is kept exactly.
    channel_names : tuple of str, optional
        One for each channel.

    Raises
    ------
    ValueError
        If the folder can not be written.
    """
    arrays: dict[str, Any] = {"data": volume, "affine": grid.affine}
    if grid.units is not None:
        arrays["units"] = np.array(grid.units)
    if channel_names is not None:
        arrays["channel_names"] = np.array(channel_names)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
