"""Coordinate frames as objects, and the conversions between the conventions in use.

Inside the package, arrays and world coordinates are in (z, y, x) order. Files use other orders and other
directions (NIfTI: x, y, z towards right, anterior, superior; DICOM: x, y, z towards left, posterior,
superior). All conversions go through :class:`Frame`, so that no sign is written down twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "LPS",
    "LPS_ZYX",
    "RAS",
    "RAS_ZYX",
    "WORLD",
    "XYZ",
    "Frame",
    "affine_from_spacing",
    "check_affine",
    "check_units",
    "normalise_unit",
    "reverse_affine",
    "unit_scale",
]

FloatArray = NDArray[np.float64]

_ALIASES = {
    "nanometer": "nm",
    "nanometre": "nm",
    "angstrom": "angstrom",
    "å": "angstrom",
    "micrometer": "um",
    "micrometre": "um",
    "micron": "um",
    "microns": "um",
    "µm": "um",
    "μm": "um",
    "millimeter": "mm",
    "millimetre": "mm",
    "centimeter": "cm",
    "centimetre": "cm",
    "meter": "m",
    "metre": "m",
    "inch": "inch",
    "pixels": "pixel",
    "px": "pixel",
    "voxel": "pixel",
}
_METRES = {"angstrom": 1e-10, "nm": 1e-9, "um": 1e-6, "mm": 1e-3, "cm": 1e-2, "m": 1.0, "inch": 25.4e-3}
# letter -> (anatomical line, sign); the signs are relative to RAS, which is right-handed
_ANATOMY = {"R": (0, 1.0), "L": (0, -1.0), "A": (1, 1.0), "P": (1, -1.0), "S": (2, 1.0), "I": (2, -1.0)}


def normalise_unit(unit: Any) -> str:
    """Give the short name of a length unit.

    Parameters
    ----------
    unit : str or object with a string form
        For example ``"micrometer"``, ``"µm"`` or a pint unit.

    Returns
    -------
    str
        ``"um"``, ``"mm"``, ``"pixel"`` ...; a name that is not known is returned as it came.

    Examples
    --------
    >>> normalise_unit("millimeter")
    'mm'
    """
    name = str(unit).strip()
    lowered = name.lower()
    if lowered in _ALIASES:
        return _ALIASES[lowered]
    if lowered.endswith("s") and lowered[:-1] in _ALIASES:
        return _ALIASES[lowered[:-1]]
    return lowered if lowered in _METRES or lowered == "pixel" else name


def unit_scale(source: str, target: str) -> float:
    """Give the factor that turns a length in `source` units into `target` units.

    Parameters
    ----------
    source, target : str
        Names of length units.

    Returns
    -------
    float
        The factor.

    Raises
    ------
    ValueError
        If one of the units has no known length and they are not the same.

    Examples
    --------
    >>> round(unit_scale("um", "mm"), 12)
    0.001
    """
    first, second = normalise_unit(source), normalise_unit(target)
    if first == second:
        return 1.0
    if first not in _METRES or second not in _METRES:
        raise ValueError(f"units: no conversion from {source!r} to {target!r}; use one of {sorted(_METRES)}.")
    return _METRES[first] / _METRES[second]


def check_units(units: Any, name: str = "units") -> tuple[str, str, str] | None:
    """Bring units into the form (z, y, x), or None.

    Parameters
    ----------
    units : None, str or sequence of 3
        One unit for all axes, or one for each.
    name : str
        Name of the argument, for the error.

    Returns
    -------
    tuple of 3 str, or None
        Short names.

    Raises
    ------
    ValueError
        If there are not three.

    Examples
    --------
    >>> check_units("micrometer")
    ('um', 'um', 'um')
    """
    if units is None:
        return None
    if isinstance(units, str) or not isinstance(units, Sequence):
        short = normalise_unit(units)
        return (short, short, short)
    if len(units) != 3:
        raise ValueError(f"{name}: got {len(units)} units, need one string or three (z, y, x).")
    return (normalise_unit(units[0]), normalise_unit(units[1]), normalise_unit(units[2]))


def check_affine(affine: ArrayLike | None, name: str = "affine") -> FloatArray:
    """Validate an index-to-world affine.

    Parameters
    ----------
    affine : array_like (4, 4) or None
        None gives the identity.
    name : str
        Name of the argument, for the error.

    Returns
    -------
    ndarray (4, 4) of float64
        A read-only copy.

    Raises
    ------
    ValueError
        If it has another shape, is not finite, is singular, or its last row is not (0, 0, 0, 1).

    Examples
    --------
    >>> check_affine(None).shape
    (4, 4)
    """
    if affine is None:
        out = np.eye(4)
    else:
        try:
            out = np.array(affine, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: got something that is not a matrix of numbers, need a (4, 4) array."
            ) from error
    if out.shape != (4, 4):
        raise ValueError(f"{name}: got shape {out.shape}, need (4, 4).")
    if not np.isfinite(out).all():
        raise ValueError(f"{name}: got entries that are NaN or infinite, need finite numbers.")
    if not np.allclose(out[3], (0, 0, 0, 1), rtol=0, atol=1e-9):
        raise ValueError(f"{name}: got last row {out[3].tolist()}, need [0, 0, 0, 1].")
    lengths = np.linalg.norm(out[:3, :3], axis=0)
    for axis, length in enumerate(lengths):
        if not length > 0:
            raise ValueError(
                f"{name}: got a step of length 0 along index axis {axis}, need a positive spacing."
            )
    # relative to the spacings, so that microns beside metres are not called singular
    if abs(np.linalg.det(out[:3, :3] / lengths)) < 1e-6:
        raise ValueError(
            f"{name}: got a singular matrix (its columns lie in one plane), need an invertible one."
        )
    out[3] = (0, 0, 0, 1)
    out.flags.writeable = False
    return out


def affine_from_spacing(
    spacing: ArrayLike, origin: ArrayLike = (0.0, 0.0, 0.0), name: str = "spacing"
) -> FloatArray:
    """Make the affine of an axis-aligned lattice.

    Parameters
    ----------
    spacing : float or array_like (3,)
        Distances between centres along (z, y, x), in world units; positive.
    origin : array_like (3,)
        World position of index (0, 0, 0).
    name : str
        Name of the argument, for the error.

    Returns
    -------
    ndarray (4, 4)
        Index to world.

    Raises
    ------
    ValueError
        If a spacing is zero, negative or not finite.

    Examples
    --------
    >>> affine_from_spacing((3, 1, 1)).diagonal().tolist()
    [3.0, 1.0, 1.0, 1.0]
    """
    values = np.asarray(spacing, dtype=np.float64)
    if values.ndim == 0:
        values = np.full(3, float(values))
    if values.shape != (3,):
        raise ValueError(f"{name}: got shape {values.shape}, need one number or three (z, y, x).")
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"{name}: got {values.tolist()}, need positive finite numbers.")
    out = np.eye(4)
    out[:3, :3] = np.diag(values)
    out[:3, 3] = np.asarray(origin, dtype=np.float64)
    return check_affine(out)


def reverse_affine(affine: ArrayLike) -> FloatArray:
    """Turn an affine (i, j, k) -> (x, y, z) into (k, j, i) -> (z, y, x), or back.

    Parameters
    ----------
    affine : array_like (4, 4)
        An index-to-world matrix.

    Returns
    -------
    ndarray (4, 4)
        The same map with both sides reversed; applying it twice gives the input.

    Examples
    --------
    >>> reverse_affine(np.diag([1.0, 2.0, 3.0, 1.0])).diagonal().tolist()
    [3.0, 2.0, 1.0, 1.0]
    """
    out = np.array(affine, dtype=np.float64)
    out[:3] = out[2::-1]
    out[:, :3] = out[:, 2::-1]
    return out


@dataclass(frozen=True)
class Frame:
    """Axes of a coordinate system: their names and order, their directions, their units.

    Parameters
    ----------
    axes : tuple of 3 str
        Names in the order of the coordinates, a permutation of ``"x"``, ``"y"``, ``"z"``.
    towards : tuple of 3 str, or None
        Where each axis (in the order of `axes`) increases to, by the letters R, L, A, P, S, I; None when the
        frame has no anatomy (microscopy, world of a scanner).
    units : tuple of 3 str, or None
        Units along each axis; None when not known.

    Examples
    --------
    >>> point = LPS_ZYX.convert_points([[30.0, 20.0, 10.0]], RAS)     # z, y, x towards S, P, L
    >>> point.tolist()
    [[-10.0, -20.0, 30.0]]
    """

    axes: tuple[str, str, str] = ("z", "y", "x")
    towards: tuple[str, str, str] | None = None
    units: tuple[str, str, str] | None = None

    def __post_init__(self) -> None:
        if sorted(self.axes) != ["x", "y", "z"]:
            raise ValueError(f"axes: got {self.axes}, need a permutation of ('x', 'y', 'z').")
        object.__setattr__(self, "axes", tuple(self.axes))
        if self.towards is not None:
            letters = tuple(str(letter).upper() for letter in self.towards)
            lines = sorted(_ANATOMY[letter][0] for letter in letters if letter in _ANATOMY)
            if lines != [0, 1, 2]:
                raise ValueError(
                    f"towards: got {self.towards}, need one letter of each pair R/L, A/P, S/I, such as 'RAS'."
                )
            object.__setattr__(self, "towards", letters)
        object.__setattr__(self, "units", check_units(self.units))

    @property
    def code(self) -> str | None:
        """Orientation of the (x, y, z) axes in three letters, such as ``"RAS"``; None without anatomy."""
        if self.towards is None:
            return None
        return "".join(self.towards[self.axes.index(name)] for name in "xyz")

    @property
    def handedness(self) -> str:
        """``"right"`` or ``"left"``: the sense of the axes named x, y, z (their storage order plays no part).

        A frame without anatomy is right-handed by definition.
        """
        if self.towards is None:
            return "right"
        return (
            "right" if np.linalg.det(self._basis()[[self.axes.index(name) for name in "xyz"]]) > 0 else "left"
        )

    def _basis(self) -> FloatArray:
        """Rows: direction of each axis in reference directions (R, A, S, or x, y, z)."""
        rows = np.zeros((3, 3))
        for row, name in enumerate(self.axes):
            if self.towards is None:
                rows[row, "xyz".index(name)] = 1.0
            else:
                line, sign = _ANATOMY[self.towards[row]]
                rows[row, line] = sign
        return rows

    def to(self, other: Frame) -> FloatArray:
        """Give the matrix that maps coordinates of this frame to coordinates of another.

        Parameters
        ----------
        other : Frame
            The target. When one of the two has no anatomy, axes of the same name are the same axis.

        Returns
        -------
        ndarray (4, 4)
            ``p_other = M @ p_self`` (homogeneous).

        Raises
        ------
        ValueError
            If units can not be converted.
        """
        if self.towards is None or other.towards is None:
            plain_self, plain_other = Frame(self.axes), Frame(other.axes)
            matrix = plain_other._basis() @ plain_self._basis().T
        else:
            matrix = other._basis() @ self._basis().T
        if self.units is not None and other.units is not None:
            for row in range(3):
                column = int(np.flatnonzero(matrix[row])[0])
                matrix[row] *= unit_scale(self.units[column], other.units[row])
        out = np.eye(4)
        out[:3, :3] = matrix
        return out

    def convert_points(self, points: ArrayLike, other: Frame) -> FloatArray:
        """Convert points (..., 3) of this frame into another frame.

        Parameters
        ----------
        points : array_like (..., 3)
            Coordinates in the order of `axes`.
        other : Frame
            The target.

        Returns
        -------
        ndarray (..., 3)
            Coordinates in the order of ``other.axes``.
        """
        return np.asarray(points, dtype=np.float64) @ self.to(other)[:3, :3].T

    def convert_affine(self, affine: ArrayLike, other: Frame, *, reverse_index: bool = False) -> FloatArray:
        """Convert an index-to-world affine of this frame into another frame.

        Parameters
        ----------
        affine : array_like (4, 4)
            Index to this frame's coordinates.
        other : Frame
            The target.
        reverse_index : bool
            True when the array is transposed as well (nibabel's (i, j, k) to our (k, j, i)).

        Returns
        -------
        ndarray (4, 4)
            Index to the other frame's coordinates.
        """
        out = self.to(other) @ np.asarray(affine, dtype=np.float64)
        if reverse_index:
            out[:, :3] = out[:, 2::-1].copy()
        return out


WORLD = Frame()
"""The package's world: (z, y, x), no anatomy."""
XYZ = Frame(("x", "y", "z"))
"""The same world in the order of most files: COLMAP, transforms.json."""
RAS = Frame(("x", "y", "z"), ("R", "A", "S"))
"""NIfTI: (x, y, z) towards right, anterior, superior."""
LPS = Frame(("x", "y", "z"), ("L", "P", "S"))
"""DICOM and ITK: (x, y, z) towards left, posterior, superior."""
RAS_ZYX = Frame(("z", "y", "x"), ("S", "A", "R"))
"""(z, y, x) towards superior, anterior, right."""
LPS_ZYX = Frame(("z", "y", "x"), ("S", "P", "L"))
"""(z, y, x) towards superior, posterior, left: the world of medical files here.

On a screen whose y axis points down this is the usual radiological view, and NIfTI and DICOM files of one
scan lie on each other.
"""
