"""Scans as other programs write them: RTK, Nikon, R2-Gaussian, NAF, DXchange."""

from __future__ import annotations

import configparser
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam, XrayGeometry
from napari_innergs.io._scan_pickle import as_array, load_plain
from napari_innergs.io.files import check_size, need_file
from napari_innergs.io.ply import read_npz_arrays
from napari_innergs.io.tiff import check_complete, listen, open_tiff
from napari_innergs.scan import Scan

__all__ = [
    "geometry_from_dict",
    "read_dxchange",
    "read_images",
    "read_json",
    "read_naf",
    "read_nikon",
    "read_r2",
    "read_rtk_geometry",
]

# text that describes a scan is far smaller
_LARGEST_TEXT = 2**26
_UNITS = ("mm", "cm", "um", "µm", "m", "nm")


def read_text(file: Path) -> str:
    """Read a text file of sensible size.

    Parameters
    ----------
    file : Path
        The file.

    Returns
    -------
    str
        Its text.

    Raises
    ------
    ValueError
        If it is too large or no text.
    """
    if file.stat().st_size > _LARGEST_TEXT:
        raise ValueError(f"path: {str(file)!r} is too large for a description of a scan.")
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"path: {str(file)!r} is no text file: {error}.") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Parameters
    ----------
    file : Path
        The file.

    Returns
    -------
    dict
        Its contents.

    Raises
    ------
    ValueError
        If it is damaged or no object.
    """
    text = read_text(file)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {str(file)!r} is damaged JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"path: {str(file)!r} holds a {type(found).__name__}, need a JSON object.")
    return found


def _numbers(table: Mapping[str, Any], key: str, count: int, default: Any = None) -> NDArray[np.float64]:
    """Take `count` finite numbers of a description; a single one is repeated."""
    value = table.get(key, default)
    if value is None:
        raise ValueError(f"geometry: {key!r} is missing, need {count} number(s).")
    try:
        found = np.asarray(value, dtype=np.float64).ravel()
        if found.size == 1:
            found = np.repeat(found, count)
    except OverflowError as error:
        raise ValueError(f"geometry: {key!r} is too large, need {count} finite number(s).") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"geometry: {key!r} is {value!r}, need {count} number(s).") from error
    if found.shape != (count,) or not np.isfinite(found).all():
        raise ValueError(f"geometry: {key!r} is {value!r}, need {count} finite number(s).")
    return found


def _whole(table: Mapping[str, Any], key: str, count: int) -> list[int]:
    found = _numbers(table, key, count)
    if not ((found == np.floor(found)).all() and (found >= 1).all() and (found < 2**31).all()):
        raise ValueError(f"geometry: {key!r} is {table[key]!r}, need {count} positive whole number(s).")
    return [int(size) for size in found]


def _steps(table: Mapping[str, Any], step: str, width: str, sizes: Sequence[int]) -> NDArray[np.float64]:
    if step not in table and width in table:
        return _numbers(table, width, len(sizes)) / np.asarray(sizes)
    return _numbers(table, step, len(sizes))


def geometry_from_dict(
    description: Mapping[str, Any] | Any, angles: Any = None, detector_shape: Sequence[int] | None = None
) -> tuple[XrayGeometry, Grid | None]:
    """Make a geometry of a description in the manner of TIGRE.

    Parameters
    ----------
    description : mapping or object with attributes
        ``mode`` ("cone" or "parallel"), ``DSD`` and ``DSO`` (cone), ``nDetector`` and ``dDetector`` (or
        ``sDetector``) as (v, u), and optionally ``offDetector`` (v, u), ``COR`` (shift of the axis), ``angles_rad``
        or ``angles``, ``nVoxel`` and ``dVoxel`` (or ``sVoxel``) and ``offOrigin`` as (z, y, x), ``units``,
        ``rotation``, ``start_angle``; or ``vectors`` (n, 12) in the order of ASTRA instead of distances and
        angles, and then optionally ``isocentre`` (z, y, x), which the volume is centred on without ``nVoxel``.
    angles : array_like (n,), optional
        Radians, instead of those in the description.
    detector_shape : (int, int), optional
        Rows and columns when the description has no ``nDetector``.

    Returns
    -------
    XrayGeometry
        The geometry.
    Grid or None
        Where the description places the volume.

    Raises
    ------
    ValueError
        Naming the entry that is missing or wrong.

    Examples
    --------
    >>> geometry, grid = geometry_from_dict({"DSO": 5, "DSD": 10, "nDetector": [4, 6], "dDetector": [1, 1]}, [0, 1])
    >>> geometry.detector_shape, geometry.magnification, grid
    ((4, 6), 2.0, None)
    """
    if isinstance(description, Mapping):
        table: Mapping[str, Any] = description
    elif hasattr(description, "__dict__"):
        table = vars(description)
    else:
        raise ValueError(f"geometry: got {type(description).__name__}, need a dictionary.")
    mode = str(table.get("mode") or "cone").lower()
    if mode not in ("cone", "parallel"):
        raise ValueError(f"geometry: 'mode' is {mode!r}, need 'cone' or 'parallel'.")
    if "nDetector" not in table and detector_shape is not None:
        table = {**table, "nDetector": tuple(detector_shape)}
    shape = _whole(table, "nDetector", 2)
    word = re.match(r"[\wµ]+", str(table.get("units") or ""))
    units = word.group() if word is not None and word.group() in _UNITS else None
    grid = _grid_from_dict(table, units)
    if table.get("vectors") is not None:
        middle = None if table.get("isocentre") is None else _numbers(table, "isocentre", 3)
        return XrayGeometry(table["vectors"], (shape[0], shape[1]), mode, units, isocentre=middle), grid
    turned = table.get("rotDetector")
    if turned is not None and np.any(_numbers(table, "rotDetector", np.size(turned))):
        raise ValueError(
            "geometry: 'rotDetector' is not zero, which is not understood; give vectors (n, 12)."
        )
    if angles is None:
        angles = table.get("angles_rad", table.get("angles"))
    if angles is None:
        raise ValueError("geometry: 'angles_rad' is missing, need one angle in radians for each view.")
    pixel = _steps(table, "dDetector", "sDetector", shape)
    offset = _numbers(table, "offDetector", 2, (0.0, 0.0))
    shift = float(_numbers(table, "COR", 1, 0.0)[0])
    common: dict[str, Any] = {
        "detector_shape": shape,
        "pixel_size": pixel,
        "detector_offset": (offset[0], offset[1] + shift),
        "rotation": table.get("rotation", "ccw"),
        "start_angle": table.get("start_angle", 0.0),
        "units": units,
    }
    if mode == "parallel":
        return ParallelBeam.circular(angles, **common), grid
    geometry = ConeBeam.circular(
        angles,
        source_origin=float(_numbers(table, "DSO", 1)[0]),
        source_detector=float(_numbers(table, "DSD", 1)[0]),
        source_offset=(0.0, shift),
        **common,
    )
    return geometry, grid


def _grid_from_dict(table: Mapping[str, Any], units: str | None) -> Grid | None:
    if table.get("nVoxel") is None:
        return None
    sizes = _whole(table, "nVoxel", 3)
    steps = _steps(table, "dVoxel", "sVoxel", sizes)
    if not (steps > 0).all():
        raise ValueError(f"geometry: the voxels have size {steps.tolist()}, need positive numbers.")
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = _numbers(table, "offOrigin", 3, (0.0, 0.0, 0.0)) - 0.5 * (np.array(sizes) - 1) * steps
    return Grid(sizes, affine, units)


def read_r2(file: Path, table: dict[str, Any], array: str | None) -> Scan:
    """Read a scan of R2-Gaussian: ``meta_data.json`` and one NPY file for each view.

    Rows run downwards in these files, and volumes are (x, y, z); here rows run upwards and volumes are (z, y, x).

    Parameters
    ----------
    file : Path
        The JSON file.
    table : dict
        Its contents.
    array : str, optional
        ``"proj_train"`` (default) or ``"proj_test"``.

    Returns
    -------
    Scan
        In the file's own units of length.

    Raises
    ------
    ValueError
        Naming the file.
    """
    names = tuple(key for key in ("proj_train", "proj_test") if isinstance(table.get(key), list))
    key = "proj_train" if array is None else array
    if key not in names or not table[key]:
        raise ValueError(f"array: {str(file)!r} has no views {key!r}, need one of {list(names)}.")
    scanner = table["scanner"]
    if not isinstance(scanner, dict):
        raise ValueError(f"path: {str(file)!r} has no description of the scanner.")
    folder = file.parent.resolve()
    images: list[NDArray[Any]] = []
    angles: list[float] = []
    for number, entry in enumerate(table[key]):
        where = entry.get("file_path") if isinstance(entry, dict) else None
        if not isinstance(where, str) or not isinstance(entry.get("angle"), (int, float)):
            raise ValueError(f"path: view {number} of {str(file)!r} lacks 'file_path' or 'angle'.")
        place = (folder / where).resolve()
        if not place.is_relative_to(folder) or place.suffix.lower() != ".npy":
            raise ValueError(
                f"path: view {number} of {str(file)!r} is {where!r}, need an NPY file in its folder."
            )
        image = read_npz_arrays(place)["data"]
        if image.ndim != 2 or (images and image.shape != images[0].shape):
            raise ValueError(f"path: {str(place)!r} has shape {image.shape}, need images of one size.")
        images.append(image)
        angles.append(float(entry["angle"]))
    pixels = np.stack(images)[:, ::-1]
    geometry, grid = geometry_from_dict(_reversed(scanner, pixels.shape[1:]), angles)
    return Scan(pixels, geometry, grid, arrays=names, name=file.parent.name)


def _reversed(scanner: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """Turn lists in the order (x, y, z) and (u, v) into ours; the panel's size is (v, u) already."""
    out = dict(scanner)
    for key, count in (("nVoxel", 3), ("dVoxel", 3), ("sVoxel", 3), ("offOrigin", 3), ("offDetector", 2)):
        if out.get(key) is not None:
            out[key] = _numbers(scanner, key, count)[::-1]
    out.setdefault("nDetector", shape)
    return out


def read_naf(file: Path, array: str | None) -> Scan:
    """Read a pickle of NAF; nothing in it is run.

    Parameters
    ----------
    file : Path
        The pickle.
    array : str, optional
        ``"train"`` (default) or ``"val"``.

    Returns
    -------
    Scan
        In mm: attenuations are in mm^-1, a thousandth of the numbers of the file's own volume.

    Raises
    ------
    ValueError
        Naming the file.
    """
    table = load_plain(file)
    names = tuple(key for key in ("train", "val") if isinstance(table.get(key), dict))
    key = "train" if array is None else array
    if key not in names:
        raise ValueError(f"array: {str(file)!r} has no views {key!r}, need one of {list(names)}.")
    part = table[key]
    if "projections" not in part or "angles" not in part:
        raise ValueError(f"path: {key!r} in {str(file)!r} lacks 'projections' or 'angles'.")
    pixels = as_array(part["projections"], "projections")
    angles = as_array(part["angles"], "angles")
    if pixels.ndim != 3:
        raise ValueError(f"path: {str(file)!r} has projections of shape {pixels.shape}, need three axes.")
    plain: dict[str, Any] = {}
    for name in ("DSD", "DSO", "nDetector", "dDetector", "nVoxel", "dVoxel", "offOrigin", "offDetector"):
        if name in table:
            plain[name] = as_array(table[name], name)
    plain["mode"] = table.get("mode") if isinstance(table.get("mode"), str) else "cone"
    plain["units"] = "mm"
    geometry, grid = geometry_from_dict(_reversed(plain, pixels.shape[1:]), angles)
    return Scan(pixels[:, ::-1], geometry, grid, arrays=names, name=file.stem)


def parse_xml(file: Path) -> ElementTree.Element:
    """Parse XML that declares no entities and refers to no other file.

    Parameters
    ----------
    file : Path
        The file.

    Returns
    -------
    Element
        The root.

    Raises
    ------
    ValueError
        If it is damaged or has more than a bare document type.
    """
    text = read_text(file)
    # RTK writes a bare document type; entities and references need more than a name
    text = re.sub(r"<!DOCTYPE\s+\w+\s*>", "", text, count=1)
    # from left to right, as a parser goes: an instruction may hold what looks like the beginning of a comment
    if "<!" in re.sub(r"<!--.*?-->|<\?.*?\?>", "", text, flags=re.DOTALL):
        raise ValueError(f"path: {str(file)!r} has a document type with declarations, which is refused.")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, RecursionError, ValueError) as error:
        raise ValueError(f"path: {str(file)!r} is damaged XML: {error}.") from error


def read_rtk_geometry(
    file: Path, detector_shape: Sequence[int], pixel_size: float | Sequence[float]
) -> XrayGeometry:
    """Read the geometry of a scan from RTK's XML file.

    RTK's axes (x, y, z) are our (y, z, x): its rotation axis y is our z. The panel is taken to be centred, as RTK
    does when the first pixel is at minus half its width.

    Parameters
    ----------
    file : Path
        The file.
    detector_shape : (int, int)
        Rows and columns, which the file does not have.
    pixel_size : float or (float, float)
        Distance between pixel centres (v, u).

    Returns
    -------
    XrayGeometry
        The geometry.

    Raises
    ------
    ValueError
        Naming the file, if it is damaged, hostile, or describes a curved detector.
    """
    root = parse_xml(file)
    if root.tag != "RTKThreeDCircularGeometry":
        raise ValueError(f"path: {str(file)!r} has the root {root.tag!r}, need RTKThreeDCircularGeometry.")
    names = (
        *("SourceToIsocenterDistance", "SourceToDetectorDistance", "SourceOffsetX", "SourceOffsetY"),
        *("ProjectionOffsetX", "ProjectionOffsetY", "GantryAngle", "OutOfPlaneAngle", "InPlaneAngle"),
        "RadiusCylindricalDetector",
    )
    common = _values(root, names, dict.fromkeys(names, 0.0), file)
    views = [_values(view, names, common, file) for view in root.findall("Projection")]
    if not views:
        raise ValueError(f"path: {str(file)!r} has no projections.")
    table = {name: np.array([view[name] for view in views]) for name in names}
    if table["RadiusCylindricalDetector"].any():
        raise ValueError(f"path: {str(file)!r} describes a curved detector, need a flat one.")
    distance = table["SourceToDetectorDistance"]
    parallel = not distance.any()
    if not parallel and not (distance > 0).all():
        raise ValueError(f"path: {str(file)!r} has a SourceToDetectorDistance that is not positive.")
    angles = [np.deg2rad(table[name]) for name in ("InPlaneAngle", "OutOfPlaneAngle", "GantryAngle")]
    # from the panel's frame to the fixed one: the inverse of RTK's rotation, its three turns undone in reverse
    turn = _rotation(1, angles[2]) @ _rotation(0, angles[1]) @ _rotation(2, angles[0])
    rest = table["SourceToIsocenterDistance"]
    first = np.stack([table["SourceOffsetX"], table["SourceOffsetY"], rest], axis=1)
    depth = -rest if parallel else rest - distance
    centre = np.stack([table["ProjectionOffsetX"], table["ProjectionOffsetY"], depth], axis=1)
    if parallel:
        first = np.tile([0.0, 0.0, -1.0], (len(views), 1))
    step = np.broadcast_to(np.asarray(pixel_size, dtype=np.float64), (2,))
    parts = [
        np.einsum("nij,nj->ni", turn, first),
        np.einsum("nij,nj->ni", turn, centre),
        turn[:, :, 0] * step[1],
        turn[:, :, 1] * step[0],
    ]
    vectors = np.concatenate([part[:, [2, 0, 1]] for part in parts], axis=1)
    kind: type[ConeBeam] | type[ParallelBeam] = ParallelBeam if parallel else ConeBeam
    shape = (int(detector_shape[0]), int(detector_shape[1]))
    return kind(vectors, shape, angles=np.unwrap(angles[2]), isocentre=(0.0, 0.0, 0.0))


def _values(
    element: ElementTree.Element, names: Sequence[str], default: Mapping[str, float], file: Path
) -> dict[str, float]:
    out = dict(default)
    for name in names:
        text = element.findtext(name)
        if text is None:
            continue
        try:
            out[name] = float(text)
        except ValueError as error:
            raise ValueError(f"path: {name} in {str(file)!r} is {text!r}, need a number.") from error
        if not math.isfinite(out[name]):
            raise ValueError(f"path: {name} in {str(file)!r} is {text!r}, need a finite number.")
    return out


def _rotation(axis: int, angles: NDArray[np.float64]) -> NDArray[np.float64]:
    out = np.tile(np.eye(3), (len(angles), 1, 1))
    a, b = (axis + 1) % 3, (axis + 2) % 3
    out[:, a, a] = out[:, b, b] = np.cos(angles)
    out[:, b, a] = np.sin(angles)
    out[:, a, b] = -out[:, b, a]
    return out


def read_images(path: Path, prefix: str = "") -> NDArray[Any]:
    """Read views from a TIFF stack, or from a folder with one TIFF file for each.

    Parameters
    ----------
    path : Path
        File or folder; files of a folder are taken in the order of the numbers in their names.
    prefix : str
        Only files whose names begin so.

    Returns
    -------
    ndarray (n, v, u)
        In the files' type.

    Raises
    ------
    ValueError
        Naming the file.
    """
    if path.is_file():
        pixels = open_tiff(path).read(0)
        if pixels.ndim != 3:
            raise ValueError(f"path: {str(path)!r} has shape {pixels.shape}, need grey images.")
        return pixels
    files = [
        file
        for file in path.iterdir()
        if file.suffix.lower() in (".tif", ".tiff") and file.name.startswith(prefix)
    ]
    if not files:
        raise ValueError(
            f"path: the folder {str(path)!r} has no TIFF files{f' {prefix}*' if prefix else ''}."
        )
    files.sort(
        key=lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]
    )
    stack: NDArray[Any] | None = None
    for number, file in enumerate(files):
        image = _read_image(file)
        if image.ndim != 2:
            raise ValueError(f"path: {str(file)!r} has shape {image.shape}, need one grey image.")
        if stack is None:
            check_size(image.nbytes * len(files), path)
            stack = np.empty((len(files), *image.shape), image.dtype)
        if image.shape != stack.shape[1:] or image.dtype != stack.dtype:
            raise ValueError(
                f"path: {str(file)!r} has {image.dtype} of shape {image.shape}, the first view "
                f"{stack.dtype} of {stack.shape[1:]}; need images of one kind."
            )
        stack[number] = image
    assert stack is not None
    return stack


def _read_image(file: Path) -> NDArray[Any]:
    """Read one image that is wholly there."""
    import tifffile

    try:
        with listen() as complaints, tifffile.TiffFile(file) as tiff:
            series = tiff.series[0]
            check_size(math.prod(series.shape) * np.dtype(series.dtype).itemsize, file)
            check_complete(series, file)
            image = series.asarray()
        if complaints:
            raise ValueError(complaints[0])
    except Exception as error:  # tifffile raises many kinds on damaged files
        if str(error).startswith("path:"):
            raise
        raise ValueError(f"path: {str(file)!r} is not a TIFF file that can be read: {error}.") from error
    return np.squeeze(image)


def read_nikon(file: Path) -> Scan:
    """Read a Nikon XTek scan: the ``.xtekct`` file and the TIFF images beside it.

    The images show the panel from behind with row 0 on top; here they are turned so that columns and rows run
    along our u and v, the source turning counter-clockwise for a positive step.

    Parameters
    ----------
    file : Path
        The ``.xtekct`` file.

    Returns
    -------
    Scan
        Counts with the white level as blank scan, in mm.

    Raises
    ------
    ValueError
        Naming the file.
    """
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read_string(read_text(file))
        table = dict(parser["XTekCT"])
    except (configparser.Error, KeyError) as error:
        raise ValueError(f"path: {str(file)!r} is no XTekCT file: {error}.") from error

    def number(key: str, default: float | None = None) -> float:
        if key.lower() not in table and default is not None:
            return default
        return float(_numbers(table, key.lower(), 1)[0])

    for key in ("ObjectTilt", "ObjectRoll"):
        if number(key, 0.0):
            raise ValueError(f"path: {str(file)!r} has a tilted axis ({key}), which is not understood.")
    near, far = number("SrcToObject"), number("SrcToDetector")
    if not far > 0:
        raise ValueError(f"path: SrcToDetector in {str(file)!r} is {far:g}, need a positive length.")
    shift = number(
        "ObjectOffsetX",
        0.5 * (number("CentreOfRotationTop", 0.0) + number("CentreOfRotationBottom", 0.0)) * near / far,
    )
    count = _whole(table, "projections", 1)[0]
    shape = (_whole(table, "detectorpixelsy", 1)[0], _whole(table, "detectorpixelsx", 1)[0])
    folder = file.parent.resolve()
    inner = (folder / table.get("inputfoldername", "").strip()).resolve()
    if inner.is_relative_to(folder) and inner.is_dir():
        folder = inner
    name = table.get("name", "").strip() or file.stem
    named = any(entry.name.startswith(name + "_") for entry in folder.iterdir())
    pixels = read_images(folder, name + "_" if named else "")
    if len(pixels) != count:
        raise ValueError(
            f"projections: got {len(pixels)} images, {str(file)!r} says {count}; need all views."
        )
    angles = np.deg2rad(number("InitialAngle", 0.0) + number("AngularStep") * np.arange(count))
    geometry = ConeBeam.circular(
        angles,
        source_origin=near,
        source_detector=far,
        detector_shape=shape,
        pixel_size=(number("DetectorPixelSizeY"), number("DetectorPixelSizeX")),
        # the axis is displaced, so source and panel are, relative to it
        detector_offset=(0.0, shift),
        source_offset=(0.0, shift),
        units="mm",
    )
    return Scan(
        pixels[:, ::-1, ::-1],
        geometry,
        geometry.default_grid(),
        i0=number("WhiteLevel"),
        name=name,
    )


def read_dxchange(file: Path, array: str | None) -> tuple[NDArray[Any], dict[str, Any]]:
    """Read the exchange group of a DXchange HDF5 file.

    Parameters
    ----------
    file : Path
        The file.
    array : str, optional
        Which dataset of ``/exchange`` holds the projections; default ``"data"``.

    Returns
    -------
    ndarray (n, v, u)
        Projections.
    dict
        ``flat``, ``dark``, ``theta`` (degrees) where the file has them, and ``arrays``.

    Raises
    ------
    ImportError
        If h5py is not installed.
    ValueError
        Naming the file, if it is damaged or refers to other files.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("path: HDF5 files need h5py; install it with: pip install h5py.") from error
    wanted = {"data": array or "data", "flat": "data_white", "dark": "data_dark", "theta": "theta"}
    out: dict[str, Any] = {}
    try:
        with h5py.File(file, "r") as store:
            group = _inside(h5py, store, "exchange", file)
            if not isinstance(group, h5py.Group):
                raise ValueError(f"path: {str(file)!r} has no group 'exchange', need a DXchange file.")
            out["arrays"] = tuple(sorted(str(name) for name in group))
            for key, name in wanted.items():
                if name not in group:
                    continue
                data = _inside(h5py, group, name, file)
                if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "iuf":
                    raise ValueError(f"path: {name!r} in {str(file)!r} is no array of numbers.")
                if data.external or data.is_virtual:
                    raise ValueError(
                        f"path: {name!r} in {str(file)!r} lies in another file, which is refused."
                    )
                check_size(data.size * data.dtype.itemsize, file)
                out[key] = np.asarray(data[()])
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"path: {str(file)!r} is a damaged HDF5 file: {error}.") from error
    if "data" not in out:
        raise ValueError(
            f"array: {str(file)!r} has no array {wanted['data']!r}, need one of {out['arrays']}."
        )
    return out.pop("data"), out


def _inside(h5py: Any, group: Any, name: str, file: Path) -> Any:
    """Follow a link that stays in the file."""
    link = group.get(name, getlink=True)
    if isinstance(link, (h5py.ExternalLink, h5py.SoftLink)):
        raise ValueError(f"path: {name!r} in {str(file)!r} is a link, which is refused.")
    return group.get(name)


def sibling(file: Path, suffix: str) -> Path:
    """Give the file of the same name with another ending, which must exist.

    Parameters
    ----------
    file : Path
        One of the two.
    suffix : str
        The other's ending.

    Returns
    -------
    Path
        The other.
    """
    other = file.with_suffix(suffix)
    if not other.exists():
        raise ValueError(f"path: {str(file)!r} needs {other.name!r} beside it, which is missing.")
    return need_file(other)
