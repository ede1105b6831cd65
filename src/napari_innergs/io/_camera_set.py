"""What the readers of camera files share."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from napari_innergs.geometry.camera import Camera, Lens
from napari_innergs.io.files import check_size

__all__ = ["CameraSet", "clean_name", "decode", "lens_of", "named"]

UNSUPPORTED = (
    "need one of SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, RADIAL, OPENCV; straighten the photographs first"
)


@dataclass(frozen=True)
class CameraSet:
    """Cameras of a COLMAP model or a transforms.json, without their photographs.

    Parameters
    ----------
    names : tuple of str
        Names of the photographs as the file gives them, with forward slashes.
    cameras : tuple of Camera
        Pinhole cameras: those of photographs from which the lens's distortion was taken out.
    lenses : tuple of Lens
        The distortion in each photograph's file.
    points : ndarray (M, 3) of float64, or None
        Sparse points, world (z, y, x).
    colours : ndarray (M, 3) of uint8, or None
        Their colours.
    mask_names : tuple of (str or None)
        Files with masks, where the file names them.
    folder : Path
        Where the file is.
    kind : str
        ``"colmap"`` or ``"transforms"``.

    Examples
    --------
    >>> len(CameraSet((), (), ()))
    0
    """

    names: tuple[str, ...]
    cameras: tuple[Camera, ...]
    lenses: tuple[Lens, ...]
    points: NDArray[np.float64] | None = None
    colours: NDArray[np.uint8] | None = None
    mask_names: tuple[str | None, ...] = ()
    folder: Path = field(default=Path())
    kind: str = "colmap"

    def __len__(self) -> int:
        return len(self.cameras)


def named(names: Sequence[Any], most: int = 3) -> str:
    """Name the first few of many.

    Parameters
    ----------
    names : sequence
        All.
    most : int
        How many to name.

    Returns
    -------
    str
        For messages.
    """
    listed = ", ".join(repr(str(name)) for name in names[:most])
    return listed + (", ..." if len(names) > most else "")


def clean_name(name: str) -> str:
    """Give a file's name with forward slashes and without a leading ``./``.

    Parameters
    ----------
    name : str
        As Windows or POSIX write it.

    Returns
    -------
    str
        The name.
    """
    slashed = name.strip().replace("\\", "/")
    while slashed.startswith("./"):
        slashed = slashed[2:]
    return slashed


def decode(file: Path) -> str:
    """Read a text file in the encodings that occur: UTF-8 and UTF-16 with or without a mark, else Windows-1252.

    Parameters
    ----------
    file : Path
        The file.

    Returns
    -------
    str
        Its text, lines ended by line feeds.

    Raises
    ------
    ValueError
        If it is too large, empty or no text.
    """
    # text, its lines and the words of one line are in memory together
    check_size(4 * file.stat().st_size, file)
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ValueError(f"path: can not read {str(file)!r} ({error.strerror or error}).") from error
    candidates: tuple[str, ...]
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        candidates = ("utf-16",)
    elif raw[1:2] == b"\0":
        candidates = ("utf-16-le",)
    else:
        candidates = ("utf-8-sig", "cp1252", "latin-1")
    for encoding in candidates:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text.replace("\r\n", "\n").replace("\r", "\n")
    raise ValueError(f"path: {str(file)!r} is no text file.")


def lens_of(model: str, values: Sequence[float], where: str) -> tuple[NDArray[np.float64], Lens]:
    """Turn the parameters of one of COLMAP's camera models into intrinsics and a lens.

    Parameters
    ----------
    model : str
        SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, RADIAL or OPENCV.
    values : sequence of float
        In COLMAP's order, first pixel centre at 0.5.
    where : str
        For errors.

    Returns
    -------
    intrinsics : ndarray (3, 3)
        Pixel centres at integer indices.
    lens : Lens
        The distortion.

    Raises
    ------
    ValueError
        Naming the model, if it is not known or has another number of parameters.
    """
    need = PARAMETERS.get(model)
    if need is None:
        raise ValueError(f"path: {where} has the camera model {model}, {UNSUPPORTED}.")
    if len(values) != need:
        raise ValueError(f"path: {where} has {len(values)} parameters, {model} needs {need}.")
    given = [float(value) for value in values]
    if not np.isfinite(given).all():
        raise ValueError(f"path: {where} has parameters that are NaN or infinite, need finite numbers.")
    if model in ("PINHOLE", "OPENCV"):
        fx, fy, cx, cy, *rest = given
    else:
        fx, cx, cy, *rest = given
        fy = fx
    lens = Lens(tuple(rest[:2]), (rest[2], rest[3]) if model == "OPENCV" else (0.0, 0.0))
    return np.array([[fx, 0.0, cx - 0.5], [0.0, fy, cy - 0.5], [0.0, 0.0, 1.0]]), lens


PARAMETERS = {"SIMPLE_PINHOLE": 3, "PINHOLE": 4, "SIMPLE_RADIAL": 4, "RADIAL": 5, "OPENCV": 8}
"""Number of parameters of each of COLMAP's camera models that are understood."""
