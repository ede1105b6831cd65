"""Cameras in transforms.json: nerfstudio, instant-ngp, Blender."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.geometry.camera import Camera, Lens
from napari_innergs.geometry.frames import WORLD, XYZ
from napari_innergs.io._camera_set import UNSUPPORTED, CameraSet, clean_name, decode
from napari_innergs.io.ply import read_ply

__all__ = ["read_json", "read_transforms"]

_KNOWN = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "PERSPECTIVE")
_COLOURS = ("red", "green", "blue")
# from OpenGL's camera (x right, y up, z backward) to OpenCV's
_FLIP = np.array([1.0, -1.0, -1.0])
# exporters of Blender leave the object's scale in the matrix
_EVEN = 1e-3

SizeOf = Callable[[str], tuple[int, int]]


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
    try:
        found = json.loads(decode(file))
    except (ValueError, RecursionError) as error:
        if str(error).startswith("path:"):
            raise
        raise ValueError(f"path: {str(file)!r} is damaged JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"path: {str(file)!r} holds a {type(found).__name__}, need a JSON object.")
    return found


def read_transforms(file: Path, size_of: SizeOf) -> CameraSet:
    """Read cameras.

    Parameters
    ----------
    file : Path
        The JSON file.
    size_of : callable
        Gives height and width of a photograph by its name, for files that do not say them (Blender).

    Returns
    -------
    CameraSet
        In the order of the file.

    Raises
    ------
    ValueError
        Naming the file and the entry that is missing, wrong, or not understood.
    """
    table = read_json(file)
    frames = table.get("frames")
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"path: {str(file)!r} has no list 'frames', need one entry for each photograph.")
    names: list[str] = []
    masks: list[str | None] = []
    cameras: list[Camera] = []
    lenses: list[Lens] = []
    sizes: dict[str, tuple[int, int]] = {}

    def measured(name: str) -> tuple[int, int]:
        if name not in sizes:
            sizes[name] = size_of(name)
        return sizes[name]

    for number, frame in enumerate(frames):
        where = f"frame {number} of {str(file)!r}"
        if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
            raise ValueError(f"path: {where} lacks 'file_path'.")
        name = clean_name(frame["file_path"])
        both = {**table, **frame}
        _check_kind(both, where)
        camera, lens = _camera(both, frame, where, partial(measured, name))
        names.append(name)
        cameras.append(camera)
        lenses.append(lens)
        mask = frame.get("mask_path")
        masks.append(clean_name(mask) if isinstance(mask, str) and mask.strip() else None)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"path: {str(file)!r} names {twice!r} twice, need different names.")
    points, colours = _points(file, table)
    return CameraSet(
        tuple(names), tuple(cameras), tuple(lenses), points, colours, tuple(masks), file.parent, "transforms"
    )


def _check_kind(table: Mapping[str, Any], where: str) -> None:
    model = str(table.get("camera_model") or "OPENCV").upper()
    if model not in _KNOWN:
        raise ValueError(f"path: {where} has the camera model {model}, {UNSUPPORTED}.")
    if table.get("is_fisheye") is True:
        raise ValueError(f"path: {where} is a fisheye picture ('is_fisheye'), {UNSUPPORTED}.")


def _number(table: Mapping[str, Any], key: str, where: str) -> float | None:
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"path: {where} has {key!r} = {value!r}, need a finite number.")
    return float(value)


def _camera(
    table: Mapping[str, Any], frame: Mapping[str, Any], where: str, measure: Callable[[], tuple[int, int]]
) -> tuple[Camera, Lens]:
    def take(key: str) -> float | None:
        return _number(table, key, where)

    width, height = take("w"), take("h")
    if width is None or height is None:
        height, width = measure()
    fx = take("fl_x") or _focal(take("camera_angle_x"), width, where)
    fy = take("fl_y") or _focal(take("camera_angle_y"), height, where)
    # pixels are square unless the file says otherwise
    fx, fy = fx or fy, fy or fx
    if fx is None or fy is None:
        raise ValueError(f"path: {where} has no focal length, need 'fl_x' or 'camera_angle_x'.")
    cx, cy = take("cx"), take("cy")
    matrix = np.array(
        [
            [fx, 0.0, (0.5 * width if cx is None else cx) - 0.5],
            [0.0, fy, (0.5 * height if cy is None else cy) - 0.5],
            [0.0, 0.0, 1.0],
        ]
    )
    radial = [take(key) or 0.0 for key in ("k1", "k2", "k3", "k4")]
    while radial and not radial[-1]:
        radial.pop()
    lens = Lens(tuple(radial), (take("p1") or 0.0, take("p2") or 0.0))
    pose = _pose(frame.get("transform_matrix"), where)
    try:
        return Camera.from_xyz(matrix, pose, (height, width)), lens  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"path: {where} has a damaged camera: {error}") from error


def _focal(angle: float | None, length: float, where: str) -> float | None:
    if angle is None:
        return None
    if not 0 < angle < math.pi:
        raise ValueError(f"path: {where} has a camera angle of {angle:g}, need radians between 0 and pi.")
    return 0.5 * length / math.tan(0.5 * angle)


def _pose(values: Any, where: str) -> NDArray[np.float64]:
    """Turn camera-to-world with OpenGL's axes into world-to-camera with OpenCV's, both (x, y, z)."""
    try:
        given = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"path: {where} has a 'transform_matrix' that is not numbers, need (4, 4)."
        ) from error
    if given.shape not in ((3, 4), (4, 4)) or not np.isfinite(given).all():
        raise ValueError(
            f"path: {where} has a 'transform_matrix' of shape {given.shape}, need (4, 4) finite numbers."
        )
    if given.shape == (4, 4) and not np.allclose(given[3], (0, 0, 0, 1), rtol=0, atol=1e-6):
        raise ValueError(f"path: {where} has a 'transform_matrix' with last row {given[3].tolist()}.")
    turn = given[:3, :3]
    lengths = np.linalg.norm(turn, axis=0)
    if not (lengths > 0).all() or np.ptp(lengths) > _EVEN * lengths.max():
        raise ValueError(
            f"path: {where} has axes of lengths {lengths.tolist()}, need a rotation and a shift."
        )
    turn = turn / lengths
    if np.linalg.det(turn) < 0:
        raise ValueError(
            f"path: {where} has mirrored axes (negative determinant), need right-handed coordinates; reverse the "
            "sign of one axis of the world in all frames."
        )
    if not np.allclose(turn.T @ turn, np.eye(3), rtol=0, atol=_EVEN):
        raise ValueError(f"path: {where} has axes that are not orthogonal, need a rotation and a shift.")
    left, _, right = np.linalg.svd(turn)
    pose = np.eye(4)
    pose[:3, :3] = (left @ right * _FLIP).T
    pose[:3, 3] = -pose[:3, :3] @ given[:3, 3]
    return pose


def _points(
    file: Path, table: Mapping[str, Any]
) -> tuple[NDArray[np.float64] | None, NDArray[np.uint8] | None]:
    """Read the sparse points that nerfstudio names, in the world of the cameras."""
    name = table.get("ply_file_path")
    if not isinstance(name, str):
        return None, None
    place = file.parent / clean_name(name)
    if not place.is_file():
        return None, None
    with place.open("rb") as stream:
        head = stream.read(64)
    columns = _ascii_ply(place) if b"format ascii" in head else read_ply(place)[0]
    fields = (columns.dtype.names or ()) if isinstance(columns, np.ndarray) else tuple(columns)
    if not {"x", "y", "z"} <= set(fields):
        raise ValueError(f"path: {str(place)!r} has no x, y, z, need points.")
    found = np.stack([columns[key] for key in "xyz"], axis=1).astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"path: {str(place)!r} has points that are NaN or infinite, need finite numbers.")
    shades = None
    if set(_COLOURS) <= set(fields):
        shades = np.stack([columns[key] for key in _COLOURS], axis=1)
        if shades.size and not 0 <= shades.min() <= shades.max() <= 255:
            raise ValueError(f"path: {str(place)!r} has colours out of range, need 0 to 255.")
    return XYZ.convert_points(found, WORLD), None if shades is None else shades.astype(np.uint8)


def _ascii_ply(file: Path) -> dict[str, NDArray[np.float64]]:
    """Read the vertices of a PLY written as text, as nerfstudio does."""
    header, end, body = decode(file).partition("end_header\n")
    words = [line.split() for line in header.split("\n")]
    names = [line[-1] for line in words if line[:1] == ["property"]]
    elements = [line[1:] for line in words if line[:1] == ["element"]]
    try:
        # other elements would have properties of their own
        ((kind, announced),) = elements
        table = np.array(body.split(), dtype=np.float64).reshape(int(announced), len(names))
        if kind != "vertex" or not end or len(set(names)) != len(names):
            raise ValueError("its header is damaged")
    except ValueError as error:
        raise ValueError(
            f"path: {str(file)!r} is not a PLY file of points that can be read: {error}."
        ) from error
    return dict(zip(names, table.T, strict=True))
