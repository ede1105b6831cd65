"""Cameras of photographs: where they stand, what each pixel sees, and how their lenses bend it.

World coordinates are (z, y, x). A camera's own axes are those of OpenCV: x to the right along the columns, y down
along the rows, z forward. A pixel's centre is at its integer index (COLMAP, OpenGL and their relatives put the
first centre at 0.5: the readers subtract it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_innergs.geometry.frames import WORLD, XYZ

__all__ = ["Camera", "Lens"]

FloatArray = NDArray[np.float64]
# files give rotations with six digits or more
_RIGID = 1e-4
_LARGEST = 10**6


class Camera:
    """A pinhole camera: pixels, and where they look in the world.

    Parameters
    ----------
    intrinsics : array_like (3, 3)
        ``[[fx, 0, cx], [0, fy, cy], [0, 0, 1]]`` in pixels, pixel centres at integer indices.
    world_to_camera : array_like (4, 4)
        Maps (z, y, x, 1) of the world to (x right, y down, z forward, 1) of the camera. Its lengths are the
        world's. As it reverses the order of the axes, its determinant is -1.
    size : (int, int)
        Height and width in pixels.

    Raises
    ------
    ValueError
        If a matrix is not finite or of another shape, a focal length is not positive, the pose is not rigid, or the
        axes are mirrored.

    Examples
    --------
    >>> camera = Camera.from_xyz([[100, 0, 3], [0, 100, 2], [0, 0, 1]], np.eye(4), (5, 8))
    >>> pixels, depth = camera.project([[10.0, 0.0, 0.2]])
    >>> pixels.tolist(), depth.tolist()
    ([[2.0, 5.0]], [10.0])
    """

    __slots__ = ("_intrinsics", "_size", "_world_to_camera")
    _intrinsics: FloatArray
    _size: tuple[int, int]
    _world_to_camera: FloatArray

    def __init__(self, intrinsics: ArrayLike, world_to_camera: ArrayLike, size: Sequence[int]) -> None:
        matrix = _matrix(intrinsics, (3, 3), "intrinsics")
        focal = matrix[[0, 1], [0, 1]]
        if not (focal > 0).all():
            raise ValueError(
                f"intrinsics: got focal lengths {focal.tolist()}, need positive numbers of pixels."
            )
        if matrix[0, 1] or matrix[1, 0] or not np.allclose(matrix[2], (0, 0, 1), rtol=0, atol=1e-12):
            raise ValueError(
                "intrinsics: got skew or a last row other than [0, 0, 1], "
                "need [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]."
            )
        pose = _rigid(world_to_camera, -1.0, "world_to_camera")
        for part in (matrix, pose):
            part.flags.writeable = False
        object.__setattr__(self, "_intrinsics", matrix)
        object.__setattr__(self, "_world_to_camera", pose)
        object.__setattr__(self, "_size", _check_size(size))

    @classmethod
    def from_xyz(cls, intrinsics: ArrayLike, world_to_camera: ArrayLike, size: Sequence[int]) -> Camera:
        """Make a camera whose world is given as (x, y, z), as in OpenCV and COLMAP.

        Parameters
        ----------
        intrinsics : array_like (3, 3)
            In pixels, pixel centres at integer indices.
        world_to_camera : array_like (4, 4)
            Maps (x, y, z, 1) of a right-handed world to (x right, y down, z forward, 1): a rotation and a shift.
        size : (int, int)
            Height and width.

        Returns
        -------
        Camera
            The same camera in a world (z, y, x).

        Raises
        ------
        ValueError
            As for :class:`Camera`.
        """
        pose = _rigid(world_to_camera, 1.0, "world_to_camera")
        return cls(intrinsics, pose @ WORLD.to(XYZ), size)

    @classmethod
    def looking_at(
        cls,
        eye: ArrayLike,
        target: ArrayLike,
        intrinsics: ArrayLike,
        size: Sequence[int],
        up: ArrayLike = (1.0, 0.0, 0.0),
    ) -> Camera:
        """Make a camera at one point that looks at another.

        Parameters
        ----------
        eye, target : array_like (3,)
            Where it stands, and what is seen at the principal point, world (z, y, x).
        intrinsics : array_like (3, 3)
            In pixels.
        size : (int, int)
            Height and width.
        up : array_like (3,)
            What is upward in the picture, world (z, y, x).

        Returns
        -------
        Camera
            The camera.

        Raises
        ------
        ValueError
            If `eye` and `target` are one point, or `up` is along the view.
        """
        place, aim, above = (
            _triple(value, name) for value, name in ((eye, "eye"), (target, "target"), (up, "up"))
        )
        forward = aim - place
        # the cross product of reversed triples is the reversed one with the other sign
        right = -np.cross(forward, above)
        if not np.linalg.norm(right) > 1e-9 * np.linalg.norm(forward) * np.linalg.norm(above):
            raise ValueError(
                "up: got a direction along the view, or eye and target are one point; need another."
            )
        down = -np.cross(forward, right)
        rows = np.stack([axis / np.linalg.norm(axis) for axis in (right, down, forward)])
        pose = np.eye(4)
        pose[:3, :3] = rows
        pose[:3, 3] = -rows @ place
        return cls(intrinsics, pose, size)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Camera is immutable: {name} can not be set; make a new one.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Camera is immutable: {name} can not be deleted.")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Camera, (np.array(self._intrinsics), np.array(self._world_to_camera), self._size))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Camera):
            return NotImplemented
        return (
            self._size == other._size
            and bool(np.array_equal(self._intrinsics, other._intrinsics))
            and bool(np.array_equal(self._world_to_camera, other._world_to_camera))
        )

    def __hash__(self) -> int:
        return hash((self._size, self._intrinsics.tobytes(), self._world_to_camera.tobytes()))

    def __repr__(self) -> str:
        place = ", ".join(f"{value:.4g}" for value in self.centre)
        fx, fy = self._intrinsics[[0, 1], [0, 1]]
        return f"Camera({self._size[0]} x {self._size[1]}, focal {fx:.6g} x {fy:.6g} px, at ({place}))"

    @property
    def intrinsics(self) -> FloatArray:
        """Focal lengths and principal point, (3, 3), pixels, read-only."""
        return self._intrinsics

    @property
    def world_to_camera(self) -> FloatArray:
        """World (z, y, x, 1) to camera (x, y, z, 1), (4, 4), read-only."""
        return self._world_to_camera

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self._size

    @property
    def centre(self) -> FloatArray:
        """Where the camera stands, (3,), world (z, y, x)."""
        return -self._world_to_camera[:3, :3].T @ self._world_to_camera[:3, 3]

    @property
    def direction(self) -> FloatArray:
        """Unit vector of the optical axis, (3,), world (z, y, x)."""
        return self._world_to_camera[2, :3].copy()

    def project(self, points: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Find the pixels at which points appear.

        Parameters
        ----------
        points : array_like (N, 3)
            World (z, y, x).

        Returns
        -------
        pixels : ndarray (N, 2)
            Row and column; NaN for points that are not in front of the camera.
        depth : ndarray (N,)
            Distance along the optical axis, world units; negative behind the camera.

        Raises
        ------
        ValueError
            If `points` has another shape.
        """
        places = np.asarray(points, dtype=np.float64)
        if places.ndim != 2 or places.shape[1] != 3:
            raise ValueError(f"points: got shape {places.shape}, need (N, 3) = (z, y, x).")
        seen = places @ self._world_to_camera[:3, :3].T + self._world_to_camera[:3, 3]
        depth = seen[:, 2].copy()
        front = np.where(depth > 0, depth, np.nan)
        focal, centre = self._intrinsics[[1, 0], [1, 0]], self._intrinsics[[1, 0], 2]
        return seen[:, 1::-1] / front[:, np.newaxis] * focal + centre, depth

    def rays(self, rows: ArrayLike, columns: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Give the lines of sight of pixels.

        Parameters
        ----------
        rows, columns : array_like
            Positions in pixels, of shapes that broadcast to one, called (...,).

        Returns
        -------
        origins : ndarray (..., 3)
            The camera's centre, world (z, y, x).
        directions : ndarray (..., 3)
            Unit vectors, world (z, y, x).
        """
        row, column = np.broadcast_arrays(np.asarray(rows, np.float64), np.asarray(columns, np.float64))
        (fx, _, cx), (_, fy, cy), _ = self._intrinsics
        local = np.stack([(column - cx) / fx, (row - cy) / fy, np.ones(row.shape)], axis=-1)
        local /= np.linalg.norm(local, axis=-1, keepdims=True)
        directions = local @ self._world_to_camera[:3, :3]
        return np.broadcast_to(self.centre, directions.shape).copy(), directions

    def moved(self, similarity: ArrayLike) -> Camera:
        """Give the camera after its world was moved, turned and scaled.

        Parameters
        ----------
        similarity : array_like (4, 4)
            Old world to new world, both (z, y, x): a rotation times a positive scale, and a shift.

        Returns
        -------
        Camera
            It sees ``similarity @ point`` where it saw ``point``, at depths in the new world's unit.

        Raises
        ------
        ValueError
            If the matrix is no similarity, or mirrors.
        """
        move = _matrix(similarity, (4, 4), "similarity")
        scale = float(np.cbrt(abs(np.linalg.det(move[:3, :3]))))
        if not scale > 0:
            raise ValueError("similarity: got a singular matrix, need a rotation times a positive scale.")
        turn = move / np.array([[scale], [scale], [scale], [1.0]])
        rigid = _rigid(turn, 1.0, "similarity")
        pose = self._world_to_camera.copy()
        pose[:3, 3] *= scale
        # turn = [R, t / scale]; a point at scale R x + t is seen where x was
        inverse = np.eye(4)
        inverse[:3, :3] = rigid[:3, :3].T
        inverse[:3, 3] = -rigid[:3, :3].T @ move[:3, 3]
        return Camera(self._intrinsics, pose @ inverse, self._size)

    def downsampled(self, factor: int) -> Camera:
        """Give the camera of pictures whose pixels are means of squares of pixels.

        Parameters
        ----------
        factor : int
            Pixels along one side of a square; incomplete squares at the last rows and columns are cut off.

        Returns
        -------
        Camera
            With ``size // factor`` pixels.

        Raises
        ------
        ValueError
            If `factor` is no positive integer or no pixel is left.
        """
        step = check_factor(factor, self._size)
        matrix = self._intrinsics.copy()
        matrix[:2, 2] -= 0.5 * (step - 1)
        matrix[:2] /= step
        return Camera(matrix, self._world_to_camera, (self._size[0] // step, self._size[1] // step))


@dataclass(frozen=True)
class Lens:
    """Distortion of a lens by the model of Brown and Conrady, as in OpenCV.

    With r^2 = x^2 + y^2 of the ideal picture at focal length 1, and g = 1 + k1 r^2 + k2 r^4 + ..., the lens shows
    x g + 2 p1 x y + p2 (r^2 + 2 x^2) and y g + p1 (r^2 + 2 y^2) + 2 p2 x y.

    Parameters
    ----------
    radial : tuple of float
        k1, k2, ...
    tangential : (float, float)
        p1, p2.

    Examples
    --------
    >>> Lens((0.1,)).distort([[1.0, 0.0]]).tolist()
    [[1.1, 0.0]]
    """

    radial: tuple[float, ...] = ()
    tangential: tuple[float, float] = (0.0, 0.0)

    @property
    def is_ideal(self) -> bool:
        """Whether it changes nothing."""
        return not any(self.radial) and not any(self.tangential)

    def distort(self, points: ArrayLike) -> FloatArray:
        """Give the places in the lens's picture of places in the ideal one.

        Parameters
        ----------
        points : array_like (..., 2)
            (x, y) at focal length 1.

        Returns
        -------
        ndarray (..., 2)
            The same shape.
        """
        x, y = np.moveaxis(np.asarray(points, dtype=np.float64), -1, 0)
        square = x * x + y * y
        gain = np.zeros_like(square)
        for coefficient in reversed(self.radial):
            gain = (gain + coefficient) * square
        gain = gain + 1.0
        first, second = self.tangential
        cross = 2.0 * x * y
        return np.stack(
            [
                x * gain + first * cross + second * (square + 2 * x * x),
                y * gain + first * (square + 2 * y * y) + second * cross,
            ],
            axis=-1,
        )

    @property
    def limit(self) -> float:
        """Largest r of the ideal picture at which the radial part still grows; infinite if it always does.

        Beyond it the polynomial folds the picture over itself and describes no lens.
        """
        if not any(self.radial):
            return np.inf
        slope = [(2 * power + 1) * k for power, k in enumerate(self.radial, start=1)]
        roots = np.roots([*slope[::-1], 1.0])
        squares = roots.real[(np.abs(roots.imag) < 1e-9 * (1 + np.abs(roots.real))) & (roots.real > 0)]
        return float(np.sqrt(squares.min())) if squares.size else np.inf

    def source_pixels(self, camera: Camera) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Give where each pixel of the ideal picture is found in the lens's picture of the same size.

        Parameters
        ----------
        camera : Camera
            Of both pictures.

        Returns
        -------
        pixels : ndarray (H, W, 2)
            Row and column in the lens's picture.
        valid : ndarray (H, W) of bool
            Whether that is inside the picture.
        """
        height, width = camera.size
        (fx, _, cx), (_, fy, cy), _ = camera.intrinsics
        x, y = np.meshgrid((np.arange(width) - cx) / fx, (np.arange(height) - cy) / fy)
        bent = self.distort(np.stack([x, y], axis=-1))
        pixels = np.stack([bent[..., 1] * fy + cy, bent[..., 0] * fx + cx], axis=-1)
        inside = (pixels >= -0.5) & (pixels <= np.array([height - 0.5, width - 0.5]))
        return pixels, inside.all(axis=-1) & (np.hypot(x, y) < self.limit)


def check_factor(factor: Any, size: tuple[int, int]) -> int:
    """Validate the factor by which pictures are made smaller.

    Parameters
    ----------
    factor : int
        Pixels along one side of a square.
    size : (int, int)
        Height and width before.

    Returns
    -------
    int
        The factor.

    Raises
    ------
    ValueError
        If it is no positive integer or larger than a side.
    """
    try:
        whole = int(factor)
        fits = whole == factor and 1 <= whole <= min(size)
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise ValueError(f"factor: got {factor!r}, need an integer from 1 to {min(size)}.")
    return whole


def _matrix(values: ArrayLike, shape: tuple[int, int], name: str) -> FloatArray:
    try:
        out = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: got something that is not numbers, need {shape}.") from error
    if out.shape != shape:
        raise ValueError(f"{name}: got shape {out.shape}, need {shape}.")
    if not np.isfinite(out).all():
        raise ValueError(f"{name}: got NaN or infinite numbers, need finite ones.")
    return out


def _triple(values: ArrayLike, name: str) -> FloatArray:
    out = np.asarray(values, dtype=np.float64)
    if out.shape != (3,) or not np.isfinite(out).all():
        raise ValueError(f"{name}: got {values!r}, need three finite numbers (z, y, x).")
    return out


def _rigid(values: ArrayLike, sign: float, name: str) -> FloatArray:
    """Check that a matrix is a rotation (or one that mirrors, for `sign` -1) and a shift; make it exactly so."""
    out = _matrix(values, (4, 4), name)
    if not np.allclose(out[3], (0, 0, 0, 1), rtol=0, atol=1e-9):
        raise ValueError(f"{name}: got last row {out[3].tolist()}, need [0, 0, 0, 1].")
    turn = out[:3, :3]
    if not np.allclose(turn @ turn.T, np.eye(3), rtol=0, atol=_RIGID):
        raise ValueError(
            f"{name}: got a matrix whose axes are not orthogonal with length 1, need a rotation and a shift."
        )
    if np.sign(np.linalg.det(turn)) != sign:
        raise ValueError(
            f"{name}: got mirrored axes (determinant {-sign:+.0f}, need {sign:+.0f}); reverse the sign of one axis, "
            "or see whether the world is given as (x, y, z) or (z, y, x)."
        )
    # not again, so that a copy has the same bits
    if np.abs(turn @ turn.T - np.eye(3)).max() > 1e-14:
        left, _, right = np.linalg.svd(turn)
        out[:3, :3] = left @ right
    out[3] = (0, 0, 0, 1)
    return out


def _check_size(size: Any) -> tuple[int, int]:
    try:
        height, width = (int(length) for length in size)
        whole = all(float(a) == b for a, b in zip(size, (height, width), strict=True))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"size: got {size!r}, need two integers (height, width).") from error
    if not whole or min(height, width) < 1 or max(height, width) > _LARGEST:
        raise ValueError(f"size: got {tuple(size)}, need (height, width), integers from 1 to {_LARGEST}.")
    return height, width
