"""Read scans: projections together with their geometry."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ParallelBeam, XrayGeometry
from napari_innergs.io import _scan_formats as formats
from napari_innergs.io.files import PathLike, need_file, suffix_of
from napari_innergs.io.ply import npz_names, read_npz_arrays
from napari_innergs.scan import Scan

__all__ = ["SCAN_SUFFIXES", "geometry_from_dict", "read_scan"]

SCAN_SUFFIXES = (
    ".json",
    ".npz",
    ".npy",
    ".pickle",
    ".pkl",
    ".xml",
    ".xtekct",
    ".h5",
    ".hdf5",
    ".tif",
    ".tiff",
)
"""Endings that :func:`read_scan` knows; a folder is taken for TIFF images, or for R2-Gaussian's files."""

geometry_from_dict = formats.geometry_from_dict

# names that arrays have in files of different origin, the likeliest first
_PROJECTIONS = ("proj", "projections", "data")
_FLATS = ("flat", "data_white", "white")
_DARKS = ("dark", "data_dark")
_ANGLES = ("angles_rad", "angles", "theta")


def read_scan(
    path: PathLike,
    array: str | None = None,
    *,
    geometry: XrayGeometry | Mapping[str, Any] | None = None,
    projections: ArrayLike | PathLike | None = None,
    pixel_size: float | Sequence[float] | None = None,
    i0: ArrayLike | None = None,
    flat: ArrayLike | None = None,
    dark: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Scan:
    """Read projections and their geometry.

    Parameters
    ----------
    path : path
        - JSON and NPZ files of the same name (either of the two);
        - R2-Gaussian's ``meta_data.json`` or its folder; NAF's pickle (nothing in it is run);
        - RTK's geometry XML, with `projections` and `pixel_size`;
        - Nikon's ``.xtekct`` with its images; DXchange HDF5 (needs h5py);
        - a TIFF stack, a folder of TIFF images, NPY or NPZ, with `geometry`.
    array : str, optional
        Which of the file's arrays are the projections; `Scan.arrays` names them. Default: the usual one.
    geometry : XrayGeometry or dict, optional
        Replaces the file's; a dictionary as for :func:`geometry_from_dict`.
    projections : array or path, optional
        For RTK: the views (n, v, u), or their TIFF or NPY file.
    pixel_size : float or (float, float), optional
        For RTK: distance between pixel centres (v, u).
    i0, flat, dark, mask
        As for :class:`napari_innergs.scan.Scan`; they replace the file's.

    Returns
    -------
    Scan
        The scan.

    Raises
    ------
    ValueError
        Naming the file or argument, if it is damaged, hostile, of no known kind, or incomplete.
    ImportError
        If HDF5 is asked for without h5py.

    Examples
    --------
    >>> import json, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     about = {"mode": "cone", "DSO": 5, "DSD": 10, "nDetector": [4, 6], "dDetector": [1, 1],
    ...              "angles_rad": [0, 1]}
    ...     _ = Path(f"{folder}/a.json").write_text(json.dumps(about))
    ...     np.savez(f"{folder}/a.npz", proj=np.zeros((2, 4, 6)))
    ...     read_scan(f"{folder}/a.json").geometry.magnification
    2.0
    """
    file = need_file(path)
    suffix = suffix_of(file)
    given: dict[str, Any] = {
        key: value
        for key, value in (("i0", i0), ("flat", flat), ("dark", dark), ("mask", mask))
        if value is not None
    }
    if suffix != ".xml" and (projections is not None or pixel_size is not None):
        raise ValueError(
            "projections, pixel_size: only RTK's XML files need them; the others have their own."
        )
    if file.is_dir() and (file / "meta_data.json").exists():
        file, suffix = file / "meta_data.json", ".json"
    try:
        if suffix == ".json":
            table = formats.read_json(file)
            if "scanner" in table:
                return _finish(formats.read_r2(file, table, array), geometry, given)
            return _read_pair(file, table, array, geometry, given)
        if suffix in (".pickle", ".pkl"):
            return _finish(formats.read_naf(file, array), geometry, given)
        if suffix == ".xtekct":
            return _finish(formats.read_nikon(file), geometry, given)
        if suffix == ".xml":
            return _read_rtk(file, projections, pixel_size, given)
        if suffix in (".h5", ".hdf5", ".hdf"):
            pixels, extra = formats.read_dxchange(file, array)
            return _assemble(file, pixels, {}, extra, geometry, given)
        if suffix == ".npz" and file.with_suffix(".json").exists():
            return _read_pair(file, formats.read_json(file.with_suffix(".json")), array, geometry, given)
        if suffix in (".npz", ".npy"):
            return _read_pair(file, {}, array, geometry, given)
        if file.is_dir() or suffix in (".tif", ".tiff", ".ome.tif", ".ome.tiff"):
            return _assemble(file, formats.read_images(file), {}, {}, geometry, given)
    except (ValueError, TypeError) as error:
        # name the file, unless the error does, or the caller's own argument is wrong
        own = (*given, "pixel_size") if suffix == ".xml" else tuple(given)
        named = any(place in str(error) for place in (str(file), str(file.parent.resolve())))
        if named or str(error).startswith(tuple(f"{name}:" for name in own)):
            raise
        raise type(error)(f"{error} (file {str(file)!r})") from error
    except (OSError, OverflowError) as error:
        raise ValueError(f"path: {str(file)!r} can not be read: {error}.") from error
    raise ValueError(f"path: {str(path)!r} is of no known kind, need one of {', '.join(SCAN_SUFFIXES)}.")


def _resolve(
    geometry: XrayGeometry | Mapping[str, Any], angles: Any, shape: tuple[int, ...]
) -> tuple[XrayGeometry, Grid | None]:
    if isinstance(geometry, XrayGeometry):
        return geometry, None
    return geometry_from_dict(geometry, angles, shape[1:])


def _finish(scan: Scan, geometry: Any, given: dict[str, Any]) -> Scan:
    """Put what the caller knows better in the place of what the file says."""
    if geometry is None and not given:
        return scan
    grid = scan.grid
    if geometry is not None:
        own = scan.geometry.angles if isinstance(geometry, Mapping) and "angles_rad" not in geometry else None
        geometry, other = _resolve(geometry, own, scan.projections.shape)
        grid = grid if other is None else other
    known = {"i0": scan.i0, "flat": scan.flat, "dark": scan.dark, "mask": scan.mask, **given}
    return Scan(
        scan.projections,
        scan.geometry if geometry is None else geometry,
        grid,
        arrays=scan.arrays,
        name=scan.name,
        metadata=scan.metadata,
        **known,
    )


def _first(names: tuple[str, ...], available: Sequence[str]) -> str | None:
    return next((name for name in names if name in available), None)


def _read_pair(
    file: Path, table: dict[str, Any], array: str | None, geometry: Any, given: dict[str, Any]
) -> Scan:
    """Read a JSON file and the NPZ file of the same name; or NPZ or NPY alone."""
    pixels_file = formats.sibling(file, ".npz") if file.suffix.lower() == ".json" else file
    try:
        names = npz_names(pixels_file)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"path: {str(pixels_file)!r} is damaged: {error}.") from error
    key = _first(_PROJECTIONS, names) if array is None else array
    if key is None or key not in names:
        raise ValueError(f"array: {str(pixels_file)!r} has no array {key or 'proj'!r}, need one of {names}.")
    extras = {
        label: _first(options, names)
        for label, options in (("flat", _FLATS), ("dark", _DARKS), ("angles", _ANGLES))
    }
    arrays = read_npz_arrays(pixels_file, (key, *(name for name in extras.values() if name is not None)))
    extra: dict[str, Any] = {"arrays": tuple(names)}
    for label in ("flat", "dark"):
        name = extras[label]
        if name is not None and name != key:
            extra[label] = arrays[name]
    angles = extras["angles"]
    if angles is not None:
        extra["theta" if angles == "theta" else "angles"] = arrays[angles]
    return _assemble(file, arrays[key], table, extra, geometry, given)


def _assemble(
    file: Path,
    pixels: NDArray[Any],
    table: dict[str, Any],
    extra: dict[str, Any],
    geometry: Any,
    given: dict[str, Any],
) -> Scan:
    """Make a scan of pixels, what was found beside them, and a description or a given geometry."""
    if pixels.ndim != 3:
        raise ValueError(f"projections: got shape {pixels.shape}, need (views, rows, columns).")
    angles = extra.get("angles")
    if angles is None and "theta" in extra:
        # DXchange defines theta in degrees
        angles = np.deg2rad(np.asarray(extra["theta"], dtype=np.float64))
    inner = table.get("geometry")
    metadata = {key: value for key, value in table.items() if key in ("note", "noise", "licence", "source")}
    grid = None
    if geometry is not None:
        own = geometry.get("angles_rad", angles) if isinstance(geometry, Mapping) else None
        resolved, grid = _resolve(geometry, own, pixels.shape)
    elif "nDetector" in table or "vectors" in table:
        resolved, grid = geometry_from_dict(table, angles if "angles_rad" not in table else None)
    elif _is_parallel(inner) or (not table and "theta" in extra):
        if angles is None:
            raise ValueError(f"path: {str(file)!r} has no angles, need 'theta' or 'angles_rad'.")
        # no pixel size is known: work in pixels
        resolved = ParallelBeam.circular(angles, detector_shape=pixels.shape[1:])
        metadata["geometry"] = inner
    else:
        raise ValueError(
            f"geometry: {str(file)!r} has no description of the scan; need geometry= with an XrayGeometry or a "
            "dictionary (DSO, DSD, dDetector, angles_rad)."
        )
    found: dict[str, Any] = {key: extra[key] for key in ("flat", "dark") if key in extra}
    return Scan(
        pixels,
        resolved,
        grid,
        arrays=extra.get("arrays", ()),
        name=file.stem,
        metadata=metadata,
        **{**found, **given},
    )


def _is_parallel(inner: Any) -> bool:
    return isinstance(inner, Mapping) and str(inner.get("type", "")).lower().startswith("parallel")


def _read_rtk(file: Path, projections: Any, pixel_size: Any, given: dict[str, Any]) -> Scan:
    if projections is None or pixel_size is None:
        raise ValueError(
            f"projections, pixel_size: RTK's {str(file)!r} has only the geometry; need the views (array or file) and "
            "the size of a pixel."
        )
    if isinstance(projections, (str, os.PathLike)):
        images = need_file(projections)
        if suffix_of(images) in (".npy", ".npz"):
            arrays = read_npz_arrays(images)
            pixels = arrays[_first(_PROJECTIONS, list(arrays)) or next(iter(arrays))]
        else:
            pixels = formats.read_images(images)
    else:
        pixels = np.asarray(projections)
    if pixels.ndim != 3:
        raise ValueError(f"projections: got shape {pixels.shape}, need (views, rows, columns).")
    step = np.asarray(pixel_size, dtype=np.float64)
    if step.shape not in ((), (2,)) or not (np.isfinite(step).all() and (step > 0).all()):
        raise ValueError(f"pixel_size: got {pixel_size!r}, need one positive number or two (v, u).")
    geometry = formats.read_rtk_geometry(file, pixels.shape[1:], pixel_size)
    return Scan(pixels, geometry, name=file.stem, **given)
