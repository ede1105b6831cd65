"""Sparse models of COLMAP, text and binary."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.geometry.camera import Camera, Lens
from napari_innergs.geometry.frames import WORLD, XYZ
from napari_innergs.geometry.rotation import quaternion_to_matrix
from napari_innergs.io._camera_set import UNSUPPORTED, CameraSet, clean_name, decode, lens_of
from napari_innergs.io.files import check_size, need_file

__all__ = ["find_model", "read_model"]

# COLMAP's numbers of camera models, with the numbers of parameters
_MODELS = (
    ("SIMPLE_PINHOLE", 3),
    ("PINHOLE", 4),
    ("SIMPLE_RADIAL", 4),
    ("RADIAL", 5),
    ("OPENCV", 8),
    ("OPENCV_FISHEYE", 8),
    ("FULL_OPENCV", 12),
    ("FOV", 5),
    ("SIMPLE_RADIAL_FISHEYE", 4),
    ("RADIAL_FISHEYE", 5),
    ("THIN_PRISM_FISHEYE", 12),
)
_LONGEST_NAME = 4096

# width, height, model, parameters
_Sensor = tuple[int, int, str, tuple[float, ...]]
# name, camera number, quaternion (w, x, y, z) and shift
_Shot = tuple[str, int, tuple[float, ...]]


def find_model(folder: Path) -> tuple[Path, str] | None:
    """Look for a model in a folder.

    Parameters
    ----------
    folder : Path
        The folder.

    Returns
    -------
    (Path, str) or None
        The folder and the ending of the files, ``".bin"`` before ``".txt"``.
    """
    for ending in (".bin", ".txt"):
        if all((folder / f"{part}{ending}").is_file() for part in ("cameras", "images")):
            return folder, ending
    return None


def read_model(folder: Path, ending: str) -> CameraSet:
    """Read cameras, poses and, when there is such a file, points.

    Parameters
    ----------
    folder : Path
        With ``cameras``, ``images`` and perhaps ``points3D``.
    ending : str
        ``".bin"`` or ``".txt"``.

    Returns
    -------
    CameraSet
        In the order of the file.

    Raises
    ------
    ValueError
        Naming the file, if it is damaged, truncated, or has a camera model that is not understood.
    """
    binary = ending == ".bin"
    place = need_file(folder / f"cameras{ending}")
    sensors = _sensors_of_bytes(place) if binary else _sensors_of_text(place)
    lenses: dict[int, tuple[NDArray[np.float64], Lens]] = {}
    for number, (_, _, model, values) in sensors.items():
        lenses[number] = lens_of(model, values, f"camera {number} in {str(place)!r}")
    place = need_file(folder / f"images{ending}")
    shots = _shots_of_bytes(place) if binary else _shots_of_text(place)
    if not shots:
        raise ValueError(f"path: {str(place)!r} holds no poses; need a model with registered photographs.")
    names = [name for name, _, _ in shots]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"path: {str(place)!r} names {twice!r} twice, need different names.")
    cameras = []
    for name, number, pose in shots:
        if number not in sensors:
            raise ValueError(
                f"path: {name!r} in {str(place)!r} has camera {number}, which is not in {'cameras' + ending!r}."
            )
        matrix = np.eye(4)
        try:
            matrix[:3, :3] = quaternion_to_matrix(pose[:4])
            matrix[:3, 3] = pose[4:]
            width, height = sensors[number][:2]
            cameras.append(Camera.from_xyz(lenses[number][0], matrix, (height, width)))
        except ValueError as error:
            raise ValueError(f"path: {name!r} in {str(place)!r} has a damaged camera: {error}") from error
    points = colours = None
    place = folder / f"points3D{ending}"
    if place.is_file() and place.stat().st_size:
        found, colours = _points_of_bytes(place) if binary else _points_of_text(place)
        if not np.isfinite(found).all():
            raise ValueError(
                f"path: {str(place)!r} has points that are NaN or infinite, need finite numbers."
            )
        points = XYZ.convert_points(found, WORLD)
    return CameraSet(
        tuple(names),
        tuple(cameras),
        tuple(lenses[number][1] for _, number, _ in shots),
        points if points is not None and len(points) else None,
        colours if points is not None and len(points) else None,
        (None,) * len(names),
        folder,
        "colmap",
    )


def _bad_line(file: Path, number: int, line: str, need: str) -> ValueError:
    return ValueError(f"path: line {number} of {str(file)!r} is {line[:60]!r}, need {need}.")


def _sensors_of_text(file: Path) -> dict[int, _Sensor]:
    out: dict[int, _Sensor] = {}
    for number, line in enumerate(decode(file).split("\n"), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            key, model = int(words[0]), words[1].upper()
            out[key] = (int(words[2]), int(words[3]), model, tuple(float(word) for word in words[4:]))
        except (ValueError, IndexError) as error:
            raise _bad_line(file, number, line, "CAMERA_ID MODEL WIDTH HEIGHT PARAMS") from error
    return out


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _shots_of_text(file: Path) -> list[_Shot]:
    """Read two lines for each picture; the second, its observations, may be empty or missing."""
    out: list[_Shot] = []
    after_pose = False
    for number, line in enumerate(decode(file).split("\n"), start=1):
        if line.lstrip().startswith("#"):
            continue
        words = line.split(maxsplit=9)
        if after_pose:
            after_pose = False
            rest = words[9].split() if len(words) == 10 else []
            count = len(words) if not rest else 9 + len(rest)
            # observations come in threes and end in a number; a name may do the first but hardly both
            if count % 3 == 0 and (count == 0 or _is_number((words[:9] + rest)[-1])):
                continue
        if not words:
            continue
        try:
            pose = tuple(float(word) for word in words[1:8])
            int(words[0])
            out.append((clean_name(words[9]), int(words[8]), pose))
        except (ValueError, IndexError) as error:
            raise _bad_line(file, number, line, "IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME") from error
        after_pose = True
    return out


def _points_of_text(file: Path) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    places: list[list[float]] = []
    shades: list[list[int]] = []
    for number, line in enumerate(decode(file).split("\n"), start=1):
        words = line.split(maxsplit=7)
        if not words or words[0].startswith("#"):
            continue
        try:
            if len(words) < 7:
                raise ValueError("too few numbers")
            places.append([float(word) for word in words[1:4]])
            shades.append([int(word) for word in words[4:7]])
            if not 0 <= min(shades[-1]) <= max(shades[-1]) <= 255:
                raise ValueError("a colour out of range")
        except ValueError as error:
            raise _bad_line(file, number, line, "POINT3D_ID X Y Z R G B ERROR") from error
    return np.array(places).reshape(-1, 3), np.array(shades, dtype=np.uint8).reshape(-1, 3)


class _Bytes:
    """A binary file, read only as far as it goes."""

    def __init__(self, file: Path) -> None:
        check_size(2 * file.stat().st_size, file)
        self.file = file
        self.raw = file.read_bytes()
        self.at = 0

    def _need(self, count: int) -> None:
        if count > len(self.raw) - self.at:
            raise ValueError(
                f"path: {str(self.file)!r} is truncated or damaged: {count} bytes are announced at byte {self.at}, "
                f"{len(self.raw) - self.at} follow."
            )

    def take(self, layout: str) -> tuple[Any, ...]:
        count = struct.calcsize(layout)
        self._need(count)
        found = struct.unpack_from(layout, self.raw, self.at)
        self.at += count
        return found

    def skip(self, count: int) -> None:
        self._need(count)
        self.at += count

    def count(self, smallest: int) -> int:
        """Read how many records follow, each of at least so many bytes."""
        (number,) = self.take("<Q")
        self._need(number * smallest)
        return int(number)

    def name(self) -> str:
        end = self.raw.find(b"\0", self.at, self.at + _LONGEST_NAME)
        if end < 0:
            raise ValueError(f"path: {str(self.file)!r} is damaged: a name at byte {self.at} does not end.")
        raw = self.raw[self.at : end]
        self.at = end + 1
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.decode("cp1252", errors="replace")


def _sensors_of_bytes(file: Path) -> dict[int, _Sensor]:
    data = _Bytes(file)
    out: dict[int, _Sensor] = {}
    for _ in range(data.count(24)):
        key, kind, width, height = data.take("<iiQQ")
        if not 0 <= kind < len(_MODELS):
            raise ValueError(
                f"path: camera {key} in {str(file)!r} has the camera model number {kind}, {UNSUPPORTED}."
            )
        model, count = _MODELS[kind]
        out[key] = (width, height, model, data.take(f"<{count}d"))
    return out


def _shots_of_bytes(file: Path) -> list[_Shot]:
    data = _Bytes(file)
    out: list[_Shot] = []
    for _ in range(data.count(73)):
        _, *pose, number = data.take("<I7dI")
        name = clean_name(data.name())
        data.skip(24 * data.take("<Q")[0])
        out.append((name, int(number), tuple(pose)))
    return out


def _points_of_bytes(file: Path) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    data = _Bytes(file)
    number = data.count(51)
    places = np.empty((number, 3))
    shades = np.empty((number, 3), dtype=np.uint8)
    for i in range(number):
        _, x, y, z, red, green, blue, _, seen = data.take("<Q3d3BdQ")
        places[i] = x, y, z
        shades[i] = red, green, blue
        data.skip(8 * seen)
    return places, shades
