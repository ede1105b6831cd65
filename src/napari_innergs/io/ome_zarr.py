"""OME-Zarr images (NGFF 0.4 and 0.5), through zarr 3 (extra ``zarr``)."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.geometry.frames import check_affine, normalise_unit, unit_scale
from napari_innergs.geometry.grid import Grid
from napari_innergs.io.files import PathLike, StoredVolume, atomic_path, check_size, need_file

__all__ = ["is_zarr", "open_ome_zarr", "write_ome_zarr"]

_KEYWORD = "napari-innergs"
_LONG = {"mm": "millimeter", "um": "micrometer", "nm": "nanometer", "m": "meter", "cm": "centimeter"}
_LONG["angstrom"] = "angstrom"


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ValueError(
            "OME-Zarr images need zarr 3, which is not installed: pip install 'napari-innergs[zarr]'."
        ) from error
    return zarr


def is_zarr(path: PathLike) -> bool:
    """Say whether a folder is a Zarr group.

    Parameters
    ----------
    path : path
        A folder.

    Returns
    -------
    bool
        True if it has the metadata of one.
    """
    return any((Path(path) / name).is_file() for name in ("zarr.json", ".zgroup"))


def open_ome_zarr(path: PathLike, level: int = 0) -> StoredVolume:
    """Find out what an OME-Zarr image holds.

    Parameters
    ----------
    path : path
        The group's folder, or a folder with an image ``0`` in it (bioformats2raw).
    level : int
        Resolution level, 0 is the finest.

    Returns
    -------
    StoredVolume
        Chunks are read when asked for.

    Raises
    ------
    ValueError
        Naming the image, if zarr is missing or the metadata are damaged.
    """
    zarr = _zarr()
    folder = need_file(path)
    try:
        group = zarr.open_group(str(folder), mode="r")
        attributes = _attributes(group)
        if "multiscales" not in attributes and "0" in group and isinstance(group["0"], zarr.Group):
            group = group["0"]
            attributes = _attributes(group)
        scales = attributes["multiscales"][0]
        datasets = scales["datasets"]
    except Exception as error:
        raise ValueError(
            f"path: {str(folder)!r} is not an OME-Zarr image that can be read: {error!r}."
        ) from error
    if int(level) != level or not 0 <= level < len(datasets):
        raise ValueError(
            f"level: got {level}, but {str(folder)!r} has {len(datasets)} levels, "
            f"need 0 to {len(datasets) - 1}."
        )
    try:
        inner = str(datasets[level]["path"])
        if PurePosixPath(inner).is_absolute() or ".." in PurePosixPath(inner).parts:
            raise ValueError(f"its array path {inner!r} leads out of the image")
        array = group[inner]
        shape = tuple(int(size) for size in array.shape)
        axes = scales.get("axes") or [{"name": label} for label in "tczyx"[-len(shape) :]]
        axes = [{"name": axis} if isinstance(axis, str) else dict(axis) for axis in axes]
        names = [str(axis["name"]).lower() for axis in axes]
        if len(names) != len(shape) or len(set(names)) != len(names) or not set("zyx") <= set(names):
            raise ValueError(f"its axes are {names} for shape {shape}, need z, y and x, and at most t and c")
        if set(names) - set("tczyx"):
            raise ValueError(f"its axes are {names}, need no others than t, c, z, y, x")
        steps, start = np.ones(len(shape)), np.zeros(len(shape))
        for owner in (datasets[level], scales):
            for transform in owner.get("coordinateTransformations") or []:
                if transform["type"] == "scale":
                    factor = np.asarray(transform["scale"], dtype=float)
                    steps, start = steps * factor, start * factor
                elif transform["type"] == "translation":
                    start = start + np.asarray(transform["translation"], dtype=float)
                elif transform["type"] != "identity":
                    raise ValueError(f"its transformation {transform['type']!r} is not known")
        spatial = [names.index(label) for label in "zyx"]
        units = [axes[i].get("unit") for i in spatial]
        affine = np.eye(4)
        affine[:3, :3] = np.diag(steps[spatial])
        affine[:3, 3] = start[spatial]
        unit = None
        if all(units):
            unit = normalise_unit(units[2])
            for row, name in enumerate(units):
                affine[row] *= unit_scale(str(name), unit)
        own = attributes.get(_KEYWORD, dict(group.attrs).get(_KEYWORD))
        if isinstance(own, dict) and "affine" in own and level == 0:
            # NGFF 0.5 knows no rotation; ours is believed while the rest of the metadata agrees with it
            exact = check_affine(own["affine"])
            if np.allclose(np.linalg.norm(exact[:3, :3], axis=0), steps[spatial], rtol=1e-6):
                affine = np.array(exact)
        affine = np.array(check_affine(affine))
    except ValueError as error:
        raise ValueError(f"path: {str(folder)!r} can not be read as OME-Zarr: {error}.") from error
    except Exception as error:
        raise ValueError(f"path: {str(folder)!r} has damaged OME-Zarr metadata: {error!r}.") from error
    labels = None
    try:
        found = tuple(str(channel["label"]) for channel in attributes["omero"]["channels"])
        if "c" in names and len(found) == shape[names.index("c")]:
            labels = found
    except (KeyError, TypeError):
        pass
    times = shape[names.index("t")] if "t" in names else 1
    check_size(math.prod(shape) // max(times, 1) * np.dtype(array.dtype).itemsize, folder)

    def read(time: int) -> NDArray[Any]:
        pick = tuple(time if name == "t" else slice(None) for name in names)
        left = [name for name in names if name != "t"]
        try:
            pixels = np.asarray(array[pick])
        except Exception as error:
            raise ValueError(f"path: the pixels of {str(folder)!r} can not be read: {error!r}.") from error
        return pixels.transpose([left.index(name) for name in "zyxc" if name in left])

    return StoredVolume(read, times, affine, unit, labels)


def _attributes(group: Any) -> dict[str, Any]:
    attributes = dict(group.attrs)
    inner = attributes.get("ome")
    return {**attributes, **inner} if isinstance(inner, dict) else attributes


def write_ome_zarr(
    path: PathLike, volume: NDArray[Any], grid: Grid, channel_names: tuple[str, ...] | None = None
) -> None:
    """Write a volume as an OME-Zarr 0.5 image with one level.

    Programs see spacing, origin and unit; the whole affine is kept beside them for our own reader, because
    NGFF 0.5 knows no rotation.

    Parameters
    ----------
    path : path
        A folder; an older image of the same name is replaced.
    volume : ndarray (z, y, x) or (z, y, x, c)
        Pixels.
    grid : Grid
        Their place.
    channel_names : tuple of str, optional
        One for each channel.

    Raises
    ------
    ValueError
        If zarr is missing or the folder can not be written.
    """
    zarr = _zarr()
    unit = grid.units[2] if grid.units is not None else None
    axes: list[dict[str, str]] = [{"name": name, "type": "space"} for name in "zyx"]
    if unit in _LONG:
        for axis in axes:
            axis["unit"] = _LONG[str(unit)]
    scale, start = grid.spacing.tolist(), grid.affine[:3, 3].tolist()
    if volume.ndim == 4:
        axes.insert(0, {"name": "c", "type": "channel"})
        scale, start = [1.0, *scale], [0.0, *start]
        volume = np.moveaxis(volume, -1, 0)
    ome: dict[str, Any] = {
        "version": "0.5",
        "multiscales": [
            {
                "name": Path(path).name.split(".")[0],
                "axes": axes,
                "datasets": [
                    {
                        "path": "0",
                        "coordinateTransformations": [
                            {"type": "scale", "scale": scale},
                            {"type": "translation", "translation": start},
                        ],
                    }
                ],
            }
        ],
    }
    if channel_names is not None:
        ome["omero"] = {"channels": [{"label": name, "active": True} for name in channel_names]}
    chunks = (*(1,) * (volume.ndim - 3), *(min(64, size) for size in volume.shape[-3:]))
    with atomic_path(path) as temporary:
        group = zarr.open_group(str(temporary), mode="w", zarr_format=3)
        group.attrs.update({"ome": ome, _KEYWORD: {"affine": grid.affine.tolist(), "unit": unit}})
        array = group.create_array("0", shape=volume.shape, dtype=volume.dtype, chunks=chunks)
        array[...] = volume
