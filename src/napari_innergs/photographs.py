"""Photographs together with their cameras, validated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_innergs.geometry.camera import Camera, check_factor

__all__ = ["Photographs"]

# interpolation and files leave rounding errors
_TOLERANCE = 1e-4


class Photographs:
    """Photographs of one size, where they were taken, and what in them is the object.

    Parameters
    ----------
    images : array_like (n, H, W, 3)
        Display values: uint8, or floating point from 0 to 1. Where there are masks, colours are already multiplied
        by them, as if seen before black.
    cameras : sequence of Camera
        One for each photograph, of that size.
    masks : array_like (n, H, W), optional
        How much of each pixel the object covers, 0 to 1 (or boolean).
    names : sequence of str, optional
        One for each photograph. Default: their numbers.
    points : array_like (M, 3), optional
        Points on the object, world (z, y, x).
    point_colours : array_like (M, 3), optional
        Their colours: uint8, or floating point from 0 to 1.
    valid : array_like (n, H, W) of bool, optional
        Pixels that were photographed; others (beside a picture straightened after the lens) say nothing, not even
        that there is background. Default: all.

    Attributes
    ----------
    images : ndarray (n, H, W, 3) of uint8 or float32
        Read-only, as the other arrays.
    cameras : tuple of Camera
        As given.
    masks : ndarray (n, H, W) of float32, or None
        As given.
    names : tuple of str
        As given.
    points : ndarray (M, 3) of float64, or None
        As given.
    point_colours : ndarray (M, 3) of float32, or None
        From 0 to 1.
    valid : ndarray (n, H, W) of bool, or None
        As given.

    Raises
    ------
    TypeError
        If pixels are of another type, or a camera is none.
    ValueError
        If shapes or sizes disagree, values are not finite or out of range, or a mask is empty.

    Examples
    --------
    >>> camera = Camera([[9, 0, 3], [0, 9, 2], [0, 0, 1]], np.eye(4)[[2, 1, 0, 3]], (4, 6))
    >>> photographs = Photographs(np.zeros((2, 4, 6, 3), np.uint8), [camera, camera])
    >>> photographs.names, photographs.downsampled(2).size
    (('0', '1'), (2, 3))
    """

    images: NDArray[Any]
    cameras: tuple[Camera, ...]
    masks: NDArray[np.float32] | None
    names: tuple[str, ...]
    points: NDArray[np.float64] | None
    point_colours: NDArray[np.float32] | None
    valid: NDArray[np.bool_] | None

    def __init__(
        self,
        images: ArrayLike,
        cameras: Sequence[Camera],
        masks: ArrayLike | None = None,
        names: Sequence[str] | None = None,
        points: ArrayLike | None = None,
        point_colours: ArrayLike | None = None,
        *,
        valid: ArrayLike | None = None,
    ) -> None:
        try:
            pixels = np.asarray(images)
        except ValueError as error:
            raise ValueError(
                "images: got pictures of different shapes, need one (n, height, width, 3)."
            ) from error
        if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
            raise TypeError(
                f"images: got values of type {pixels.dtype}, need uint8, or floating-point numbers from 0 to 1."
            )
        if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
            cure = "; give the fourth channel as masks" if pixels.shape[3:] == (4,) else ""
            raise ValueError(f"images: got shape {pixels.shape}, need (n, height, width, 3){cure}.")
        poses = tuple(cameras)
        for camera in poses:
            if not isinstance(camera, Camera):
                raise TypeError(f"cameras: got {type(camera).__name__}, need Camera objects.")
        if len(poses) != len(pixels):
            raise ValueError(
                f"cameras: got {len(poses)} for {len(pixels)} photographs, need one for each photograph."
            )
        labels = tuple(map(str, range(len(pixels)))) if names is None else tuple(str(name) for name in names)
        if len(labels) != len(pixels):
            raise ValueError(f"names: got {len(labels)}, need {len(pixels)}, one for each photograph.")
        shape = pixels.shape[:3]
        for label, camera in zip(labels, poses, strict=True):
            if camera.size != shape[1:]:
                raise ValueError(
                    f"cameras: that of {label!r} has {_pixels(camera.size)}, the photographs {_pixels(shape[1:])}; "
                    "need one size."
                )
        if pixels.dtype != np.uint8:
            pixels = pixels.astype(np.float32, copy=False)
            for label, image in zip(labels, pixels, strict=True):
                _check_range(image, f"images: {label!r}", "; divide by the largest possible value")
        # views, so that the caller's own arrays stay writable
        parts = {
            "images": pixels.view(),
            "masks": _as_masks(masks, shape, labels),
            "valid": _as_valid(valid, shape),
            **_as_points(points, point_colours),
        }
        for array in parts.values():
            if array is not None:
                array.flags.writeable = False
        self.__dict__.update(parts, cameras=poses, names=labels)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Photographs are immutable: {name} can not be set; make new ones.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Photographs are immutable: {name} can not be deleted.")

    def __len__(self) -> int:
        return self.n_views

    def __repr__(self) -> str:
        masks = "" if self.masks is None else ", masks"
        points = "" if self.points is None else f", {len(self.points)} points"
        return f"Photographs({self.n_views} of {_pixels(self.size)}, {self.images.dtype}{masks}{points})"

    @property
    def n_views(self) -> int:
        """Number of photographs."""
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.images.shape[1]), int(self.images.shape[2])

    def image(self, index: int) -> NDArray[np.float32]:
        """Give one photograph with values from 0 to 1.

        Parameters
        ----------
        index : int
            Which.

        Returns
        -------
        ndarray (H, W, 3) of float32
            Display values.
        """
        return as_unit(self.images[index])

    def _replace(self, **changes: Any) -> Photographs:
        return Photographs(**{**self.__dict__, **changes})

    def subset(self, indices: Any) -> Photographs:
        """Keep some photographs.

        Parameters
        ----------
        indices : int array, slice, or bool array (n,)
            Which, in the order wanted.

        Returns
        -------
        Photographs
            With the same points.

        Raises
        ------
        ValueError
            If none is left or one does not exist.
        """
        try:
            chosen = np.atleast_1d(np.arange(self.n_views)[indices])
        except (IndexError, TypeError) as error:
            raise ValueError(
                f"indices: got {indices!r}, need numbers from 0 to {self.n_views - 1}, a slice, or {self.n_views} "
                "booleans."
            ) from error
        if chosen.size == 0:
            raise ValueError("indices: no photograph is left, need at least one.")
        return self._replace(
            images=self.images[chosen],
            cameras=[self.cameras[i] for i in chosen],
            masks=None if self.masks is None else self.masks[chosen],
            names=[self.names[i] for i in chosen],
            valid=None if self.valid is None else self.valid[chosen],
        )

    def downsampled(self, factor: int) -> Photographs:
        """Average squares of pixels.

        Parameters
        ----------
        factor : int
            Pixels along one side of a square; incomplete squares at the last rows and columns are cut off. A square
            is valid if all its pixels are.

        Returns
        -------
        Photographs
            In float32, with cameras to match.

        Raises
        ------
        ValueError
            If `factor` is no positive integer or no pixel is left.
        """
        step = check_factor(factor, self.size)
        if step == 1:
            return self
        return self._replace(
            images=np.stack([block_mean(self.image(i), step) for i in range(self.n_views)]),
            cameras=[camera.downsampled(step) for camera in self.cameras],
            masks=None if self.masks is None else np.stack([block_mean(mask, step) for mask in self.masks]),
            valid=None
            if self.valid is None
            else np.stack([block_mean(one, step) == 1 for one in self.valid]),
        )

    def with_cameras(self, cameras: Sequence[Camera]) -> Photographs:
        """Give the same photographs other cameras, refined ones for example.

        Parameters
        ----------
        cameras : sequence of Camera
            One for each photograph.

        Returns
        -------
        Photographs
            The new ones.
        """
        return self._replace(cameras=cameras)

    def moved(self, similarity: ArrayLike) -> Photographs:
        """Move the world: cameras and points.

        Parameters
        ----------
        similarity : array_like (4, 4)
            Old world to new world, both (z, y, x): a rotation times a positive scale, and a shift.

        Returns
        -------
        Photographs
            The same pictures in the new world.

        Raises
        ------
        ValueError
            If the matrix is no similarity, or mirrors.
        """
        cameras = [camera.moved(similarity) for camera in self.cameras]
        move = np.asarray(similarity, dtype=np.float64)
        points = None if self.points is None else self.points @ move[:3, :3].T + move[:3, 3]
        return self._replace(cameras=cameras, points=points)


def as_unit(values: NDArray[Any]) -> NDArray[np.float32]:
    """Give eight-bit values as numbers from 0 to 1; others as they are.

    Parameters
    ----------
    values : ndarray
        uint8, or floating point.

    Returns
    -------
    ndarray of float32
        The same shape.
    """
    scaled = values / np.float32(255) if values.dtype == np.uint8 else values
    return scaled.astype(np.float32, copy=False)


def block_mean(image: NDArray[Any], step: int) -> NDArray[np.float32]:
    """Average squares of pixels.

    Parameters
    ----------
    image : ndarray (H, W) or (H, W, c)
        Any real type.
    step : int
        Pixels along one side of a square.

    Returns
    -------
    ndarray of float32
        ``H // step`` by ``W // step``.
    """
    rows, columns = image.shape[0] // step, image.shape[1] // step
    cut = image[: rows * step, : columns * step]
    squares = cut.reshape(rows, step, columns, step, *image.shape[2:])
    return squares.mean(axis=(1, 3), dtype=np.float32)  # type: ignore[no-any-return]


def _pixels(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


def _check_range(values: NDArray[Any], what: str, cure: str = "") -> None:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        count = int(np.count_nonzero(~np.isfinite(values)))
        raise ValueError(f"{what} has {count} values that are NaN or infinite, need finite numbers.")
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        raise ValueError(f"{what} has values from {low:.4g} to {high:.4g}, need 0 to 1{cure}.")


def _as_masks(masks: Any, shape: tuple[int, ...], names: Sequence[str]) -> NDArray[np.float32] | None:
    if masks is None:
        return None
    found = np.asarray(masks)
    if found.dtype != bool and found.dtype.kind != "f":
        raise TypeError(f"masks: got values of type {found.dtype}, need booleans, or numbers from 0 to 1.")
    if found.shape != shape:
        raise ValueError(f"masks: got shape {found.shape}, need {shape} as the photographs.")
    covered = found.astype(np.float32, copy=False).view()
    for name, mask in zip(names, covered, strict=True):
        _check_range(mask, f"masks: that of {name!r}", "; divide by the largest possible value")
    empty = [name for name, mask in zip(names, covered, strict=True) if not mask.any()]
    if empty:
        raise ValueError(
            f"masks: {len(empty)} of {len(covered)} show no object, the first is that of {empty[0]!r}; leave these "
            "photographs out, or give better masks."
        )
    return covered


def _as_valid(valid: Any, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    if valid is None:
        return None
    found = np.asarray(valid)
    if found.dtype != bool or found.shape != shape:
        raise ValueError(f"valid: got {found.dtype} of shape {found.shape}, need booleans of shape {shape}.")
    return found.view()


def _as_points(points: Any, colours: Any) -> dict[str, NDArray[Any] | None]:
    if points is None:
        if colours is not None:
            raise ValueError("point_colours: got colours without points, need both or none.")
        return {"points": None, "point_colours": None}
    places = np.array(points, dtype=np.float64)
    if places.ndim != 2 or places.shape[1] != 3 or not np.isfinite(places).all():
        raise ValueError(f"points: got shape {places.shape}, need (M, 3) finite numbers (z, y, x).")
    if colours is None:
        return {"points": places, "point_colours": None}
    shades = np.asarray(colours)
    if shades.shape != places.shape:
        raise ValueError(f"point_colours: got shape {shades.shape}, need {places.shape}, one for each point.")
    if shades.dtype == np.uint8:
        return {"points": places, "point_colours": as_unit(shades)}
    if shades.dtype.kind != "f":
        raise TypeError(
            f"point_colours: got values of type {shades.dtype}, need uint8, or numbers from 0 to 1."
        )
    shades = shades.astype(np.float32)
    if shades.size:
        _check_range(shades, "point_colours: the array")
    return {"points": places, "point_colours": shades}
