"""TIFF stacks: ImageJ and OME metadata, plain ones too."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from napari_innergs.data import restore_dtype
from napari_innergs.geometry.frames import affine_from_spacing, check_affine, normalise_unit, unit_scale
from napari_innergs.geometry.grid import Grid
from napari_innergs.io.files import PathLike, StoredVolume, atomic_path, check_size, need_file, suffix_of

__all__ = ["open_tiff", "write_tiff"]

_KEYWORD = "napari-innergs"
_BIG = 2**32 - 2**25
_IMAGEJ_TYPES = ("uint8", "uint16", "float32")
_OME_TYPES = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "float32", "float64")


def open_tiff(path: PathLike) -> StoredVolume:
    """Find out what a TIFF file holds.

    Parameters
    ----------
    path : path
        OME-TIFF, ImageJ hyperstack, or a plain stack. Pages without a named axis count as slices; so do time
        points when there is no z axis.

    Returns
    -------
    StoredVolume
        Pixels are read when asked for.

    Raises
    ------
    ValueError
        Naming the file, if it is damaged, truncated, or has no slices.
    """
    import tifffile

    file = need_file(path)
    try:
        with listen() as complaints, tifffile.TiffFile(file) as tiff:
            stored = _describe(tiff, file)
        if complaints:
            raise ValueError(complaints[0])
        return stored
    except ValueError as error:
        if str(error).startswith("path:"):
            raise
        raise ValueError(f"path: {str(file)!r} is a damaged TIFF file: {error}.") from error
    except Exception as error:  # tifffile raises many kinds on damaged files
        raise ValueError(f"path: {str(file)!r} is not a TIFF file that can be read: {error}.") from error


@contextmanager
def listen() -> Iterator[list[str]]:
    """Collect the errors that tifffile only logs: it goes on with the pages that it could find."""
    heard: list[str] = []

    class _Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                heard.append(record.getMessage())

    logger, ear = logging.getLogger("tifffile"), _Ear()
    propagate = logger.propagate
    logger.addHandler(ear)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.propagate = propagate
        logger.removeHandler(ear)


def _describe(tiff: Any, file: Path) -> StoredVolume:
    ome = tiff.ome_metadata if tiff.is_ome else None
    if ome is not None and ("<!DOCTYPE" in ome or "<!ENTITY" in ome):
        raise ValueError(f"path: {str(file)!r} has OME metadata with entities, which are refused.")
    series = tiff.series[0]
    check_size(math.prod(series.shape) * np.dtype(series.dtype).itemsize // max(1, _times(series)), file)
    check_complete(series, file)
    axes, shape = _squeeze_unknown(series.axes, series.shape, file)
    if "Z" not in axes:
        raise ValueError(
            f"path: {str(file)!r} holds one image (axes {series.axes}, shape {tuple(series.shape)}), "
            "need at least 2 slices."
        )
    affine, units, names = np.eye(4), None, None
    exact = False
    if ome is not None:
        affine, units, names, exact = _read_ome(ome)
    elif tiff.is_imagej:
        affine, units, exact = _read_imagej(tiff)
        names = _imagej_names(tiff, dict(zip(axes, shape, strict=True)))
    channels = math.prod(size for label, size in zip(axes, shape, strict=True) if label in "CS")
    if names is not None and len(names) != channels:
        names = None

    def read(time: int) -> NDArray[Any]:
        return _read_pixels(file, axes, shape, time)

    times = shape[axes.index("T")] if "T" in axes else 1
    return StoredVolume(read, times, affine, units, names, exact=exact)


def _times(series: Any) -> int:
    return series.shape[series.axes.index("T")] if "T" in series.axes and "Z" in series.axes else 1


def _squeeze_unknown(axes: str, shape: tuple[int, ...], file: Path) -> tuple[str, tuple[int, ...]]:
    """Name the axes T, Z, C, Y, X, S; the one that counts pages in a plain stack becomes Z."""
    if "Y" not in axes or "X" not in axes:
        raise ValueError(f"path: {str(file)!r} has axes {axes}, need images with rows and columns.")
    labels = list(axes)
    unknown = [i for i, label in enumerate(labels) if label not in "TZCYXS"]
    large = [i for i in unknown if shape[i] > 1]
    if "Z" not in labels:
        if len(large) == 1:
            labels[large[0]] = "Z"
            large = []
        elif not large and "T" in labels and shape[labels.index("T")] > 1:
            labels[labels.index("T")] = "Z"
    if large:
        raise ValueError(
            f"path: {str(file)!r} has axes {axes} with shape {tuple(shape)}, need slices, rows, columns, "
            "and at most channels and time."
        )
    # unknown axes of length 1 stay in the string and are dropped by a reshape
    keep = [i for i, label in enumerate(labels) if label in "TZCYXS"]
    return "".join(labels[i] for i in keep), tuple(int(shape[i]) for i in keep)


def check_complete(series: Any, file: Path) -> None:
    """Refuse a series whose pixels are not all in the file: tifffile would give zeros for some of them."""
    for number, page in enumerate(series.pages):
        if page is None:
            raise ValueError(f"path: {str(file)!r} lacks plane {number} of {len(series.pages)}.")
        source = Path(page.parent.filehandle.path)
        size = source.stat().st_size
        if number == 0 and series.dataoffset is not None:
            nbytes = math.prod(series.shape) * np.dtype(series.dtype).itemsize
            if series.dataoffset + nbytes > size:
                raise ValueError(
                    f"path: {str(file)!r} is truncated: it needs {series.dataoffset + nbytes} bytes "
                    f"and has {size}."
                )
            return
        ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=False)]
        if not ends or max(ends) > size:
            raise ValueError(f"path: {str(file)!r} is truncated in plane {number} of {len(series.pages)}.")


def _read_pixels(file: Path, axes: str, shape: tuple[int, ...], time: int) -> NDArray[Any]:
    """Read one time point as (z, y, x) or (z, y, x, c)."""
    import tifffile

    try:
        with listen() as complaints, tifffile.TiffFile(file) as tiff:
            series = tiff.series[0]
            if "T" in axes and shape[axes.index("T")] > 1 and axes.index("T") == 0:
                # pages are in the order of the leading axes: read those of this time point only
                per_time = len(series.pages) // shape[0]
                if per_time * shape[0] == len(series.pages) and series.dataoffset is None:
                    pixels = series.asarray(key=slice(time * per_time, (time + 1) * per_time))
                else:
                    pixels = tifffile.memmap(file, mode="r") if series.dataoffset else series.asarray()
                    pixels = np.array(pixels.reshape(shape)[time])
                pixels = pixels.reshape(shape[1:])
                axes = axes[1:]
            else:
                pixels = series.asarray().reshape(shape)
                if "T" in axes:
                    pixels = pixels.take(time, axis=axes.index("T"))
                    axes = axes.replace("T", "")
        if complaints:
            raise ValueError(complaints[0])
    except Exception as error:
        raise ValueError(f"path: the pixels of {str(file)!r} can not be read: {error}.") from error
    order = [axes.index(label) for label in "ZYX"] + [axes.index(label) for label in "CS" if label in axes]
    pixels = pixels.transpose(order)
    if pixels.ndim == 5:
        pixels = pixels.reshape(*pixels.shape[:3], -1)
    return pixels


def _read_imagej(tiff: Any) -> tuple[NDArray[np.float64], str | None, bool]:
    metadata = tiff.imagej_metadata or {}
    unit = metadata.get("unit")
    unit = None if unit is None else normalise_unit(str(unit).replace("\\u00B5", "µ"))
    own = _own_affine(metadata.get("Info"))
    if own is not None:
        return own, unit, True
    tags = tiff.pages[0].tags
    steps = [abs(float(metadata.get("spacing", 0.0) or 0.0))]
    for name in ("YResolution", "XResolution"):
        value = tags[name].value if name in tags else (0, 1)
        steps.append(value[1] / value[0] if value[0] else 0.0)
    # without a unit the resolution is a printer's, not the object's
    exact = unit is not None or steps[0] > 0
    known = [step if exact and np.isfinite(step) and step > 0 else 1.0 for step in steps]
    return affine_from_spacing(known), unit, exact


def _imagej_names(tiff: Any, sizes: dict[str, int]) -> tuple[str, ...] | None:
    """Channel names, if the labels of the planes are the same in all slices."""
    labels = (tiff.imagej_metadata or {}).get("Labels")
    count = sizes.get("C", 1)
    if count < 2 or not isinstance(labels, list) or len(labels) < 2 * count or len(labels) % count:
        return None
    names = tuple(str(label) for label in labels[:count])
    return names if all(label == names[i % count] for i, label in enumerate(labels)) else None


def _own_affine(text: Any) -> NDArray[np.float64] | None:
    """Affine from what `write_tiff` left in the file, or None."""
    if not isinstance(text, str):
        return None
    for line in text.splitlines():
        if line.startswith(_KEYWORD + " "):
            try:
                return check_affine(json.loads(line[len(_KEYWORD) :])["affine"])
            except (ValueError, KeyError, TypeError, RecursionError):
                return None
    return None


def _read_ome(
    text: str,
) -> tuple[NDArray[np.float64], str | None, tuple[str, ...] | None, bool]:
    root = ElementTree.fromstring(text)
    pixels = root.find(".//{*}Pixels")
    if pixels is None:
        return np.eye(4), None, None, False
    unit: str | None = None
    steps = []
    for label in "ZYX":
        size = pixels.get(f"PhysicalSize{label}")
        value = float(size) if size else 0.0
        name = normalise_unit(pixels.get(f"PhysicalSize{label}Unit", "um"))
        if value > 0:
            # OME allows a unit for each axis; all are brought to that of x, or of the last one known
            unit = name if unit is None else unit
            value *= unit_scale(name, unit)
        steps.append(value)
    affine = affine_from_spacing([step if np.isfinite(step) and step > 0 else 1.0 for step in steps])
    for value_element in root.iterfind(".//{*}MapAnnotation/{*}Value/{*}M"):
        if value_element.get("K") == _KEYWORD:
            own = _own_affine(f"{_KEYWORD} {value_element.text}")
            affine = affine if own is None else own
    names = tuple(channel.get("Name") or "" for channel in pixels.iterfind("{*}Channel"))
    return affine, unit, names if any(names) else None, unit is not None


def write_tiff(
    path: PathLike, volume: NDArray[Any], grid: Grid, channel_names: tuple[str, ...] | None = None
) -> None:
    """Write a volume as an ImageJ hyperstack, or as OME-TIFF.

    OME-TIFF is used for names that end in ``.ome.tif``, for files above 4 GiB, and for types that ImageJ does
    not know. Programs see spacing and unit; the whole affine is kept beside them for our own reader.

    Parameters
    ----------
    path : path
        Where.
    volume : ndarray (z, y, x) or (z, y, x, c)
        Pixels.
    grid : Grid
        Their place.
    channel_names : tuple of str, optional
        One for each channel.

    Raises
    ------
    ValueError
        If the type of the pixels can not be held, or the folder can not be written.
    """
    import tifffile

    if volume.dtype == np.float16:
        volume = restore_dtype(volume, np.float32)
    if volume.dtype.name not in _OME_TYPES:
        raise ValueError(f"volume: TIFF can not hold {volume.dtype}, need one of {', '.join(_OME_TYPES)}.")
    pixels = volume[:, np.newaxis] if volume.ndim == 3 else np.moveaxis(volume, -1, 1)
    steps = [float(step) for step in grid.spacing]
    unit = grid.units[2] if grid.units is not None else None
    own = json.dumps({"affine": grid.affine.tolist()})
    big = volume.nbytes > _BIG
    as_ome = suffix_of(path).startswith(".ome.") or big or volume.dtype.name not in _IMAGEJ_TYPES
    with atomic_path(path) as temporary:
        if not as_ome:
            imagej: dict[str, Any] = {"axes": "ZCYX", "spacing": steps[0], "Info": f"{_KEYWORD} {own}"}
            imagej["unit"] = "pixel" if unit is None else unit
            if channel_names is not None:
                imagej["Labels"] = [
                    channel_names[i % len(channel_names)] for i in range(pixels[:, :, 0, 0].size)
                ]
            if pixels.shape[1] > 1:
                imagej["mode"] = "composite"
            tifffile.imwrite(
                temporary,
                np.ascontiguousarray(pixels),
                imagej=True,
                resolution=(1 / steps[2], 1 / steps[1]),
                resolutionunit="NONE",
                metadata=imagej,
            )
            return
        ome: dict[str, Any] = {"axes": "ZCYX", "MapAnnotation": {_KEYWORD: own}}
        for label, step in zip("ZYX", steps, strict=True):
            ome[f"PhysicalSize{label}"] = step
            ome[f"PhysicalSize{label}Unit"] = {"um": "µm", None: "pixel"}.get(unit, unit)
        if channel_names is not None:
            ome["Channel"] = {"Name": list(channel_names)}
        # written plane by plane: no second copy of a large volume
        tifffile.imwrite(
            temporary,
            (np.ascontiguousarray(image) for plane in pixels for image in plane),
            shape=pixels.shape,
            dtype=pixels.dtype,
            bigtiff=big,
            ome=True,
            photometric="minisblack",
            metadata=ome,
        )
