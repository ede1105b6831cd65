"""Projections together with their geometry, validated once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry

__all__ = ["Scan"]

# squares of larger values overflow in float32
_LARGEST = 1e18
# line integrals above this let nothing through: they are counts
_DENSEST = 1e3


class Scan:
    """Projections, how they were taken, and what is needed to turn counts into line integrals.

    Parameters
    ----------
    projections : array_like (n, v, u)
        Views, rows, columns, of any real type: line integrals, or raw counts when `i0` or `flat` is given.
    geometry : XrayGeometry
        Source and panel in each view.
    grid : Grid, optional
        Where to reconstruct. Default: none was given; ``geometry.default_grid()`` makes one.
    i0 : float or array_like (n,), optional
        Counts of the blank scan, for all views or each.
    flat, dark : array_like (v, u) or (k, v, u), optional
        Fields without object, and without X-rays.
    mask : array_like (v, u) or (n, v, u) of bool, optional
        Pixels to trust; NaN is allowed elsewhere.
    arrays : sequence of str
        Names of the arrays that the file holds and that could have been read as projections.
    name : str
        For reports and layers.
    metadata : mapping, optional
        What else the file says.

    Attributes
    ----------
    projections, geometry, grid, i0, flat, dark, mask, arrays, name, metadata
        As given; arrays are read-only, flat and dark are (k, v, u).

    Raises
    ------
    TypeError
        If the pixels are not real numbers, or the geometry is none.
    ValueError
        If shapes disagree, values are NaN or infinite, or integers, or line integrals above 1000, come without a
        blank scan.

    Examples
    --------
    >>> from napari_innergs.geometry.xray import ParallelBeam
    >>> scan = Scan(np.zeros((3, 2, 8)), ParallelBeam.circular([0, 1, 2], detector_shape=(2, 8)))
    >>> scan.is_counts, scan.subset([0, 2]).n_views
    (False, 2)
    """

    projections: NDArray[Any]
    geometry: XrayGeometry
    grid: Grid | None
    i0: float | NDArray[np.float64] | None
    flat: NDArray[Any] | None
    dark: NDArray[Any] | None
    mask: NDArray[np.bool_] | None
    arrays: tuple[str, ...]
    name: str
    metadata: dict[str, Any]

    def __init__(
        self,
        projections: ArrayLike,
        geometry: XrayGeometry,
        grid: Grid | None = None,
        *,
        i0: ArrayLike | None = None,
        flat: ArrayLike | None = None,
        dark: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        arrays: Sequence[str] = (),
        name: str = "",
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(geometry, XrayGeometry):
            raise TypeError(
                f"geometry: got {type(geometry).__name__}, need an XrayGeometry (ConeBeam or ParallelBeam)."
            )
        if grid is not None and not isinstance(grid, Grid):
            raise TypeError(f"grid: got {type(grid).__name__}, need a Grid or None.")
        pixels = _as_numbers(projections, "projections")
        _check_shape(pixels.shape, (geometry.n_views, *geometry.detector_shape))
        trusted = _as_mask(mask, pixels.shape)
        blank = _as_blank(i0, len(pixels))
        white = _as_field(flat, "flat", pixels.shape[1:])
        black = _as_field(dark, "dark", pixels.shape[1:])
        if blank is None and white is None:
            if pixels.dtype.kind in "iu":
                raise ValueError(
                    f"projections: got {pixels.dtype} values without a blank scan; need i0 or flat for counts, "
                    "or floating-point values for line integrals."
                )
            if black is not None:
                raise ValueError("dark: got a dark field without flat or i0, need one of them for counts.")
        _check_values(pixels, trusted, blank is not None or white is not None)
        for array in (pixels, white, black, trusted, blank):
            if isinstance(array, np.ndarray):
                array.flags.writeable = False
        self.__dict__.update(
            projections=pixels,
            geometry=geometry,
            grid=grid,
            i0=blank,
            flat=white,
            dark=black,
            mask=trusted,
            arrays=tuple(str(label) for label in arrays),
            name=str(name),
            metadata=dict(metadata or {}),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Scan is immutable: {name} can not be set; make a new Scan.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Scan is immutable: {name} can not be deleted.")

    def __len__(self) -> int:
        return self.n_views

    def __repr__(self) -> str:
        what = "counts" if self.is_counts else "line integrals"
        title = self.name + ": " if self.name else ""
        return f"Scan({title}{what}, {self.projections.dtype}, {self.geometry!r}, grid={self.grid!r})"

    @property
    def n_views(self) -> int:
        """Number of views."""
        return int(self.projections.shape[0])

    @property
    def is_counts(self) -> bool:
        """Whether the projections are raw counts."""
        return self.i0 is not None or self.flat is not None

    def _replace(self, **changes: Any) -> Scan:
        return Scan(**{**self.__dict__, **changes})

    def subset(self, indices: Any) -> Scan:
        """Keep some views.

        Parameters
        ----------
        indices : int array, slice, or bool array (n,)
            Which, in the order wanted.

        Returns
        -------
        Scan
            With the same fields and grid.

        Raises
        ------
        ValueError
            If none is left or one does not exist.
        """
        geometry = self.geometry.subset(indices)
        chosen = np.atleast_1d(np.arange(self.n_views)[indices])
        per_view = isinstance(self.i0, np.ndarray)
        return self._replace(
            projections=self.projections[chosen],
            geometry=geometry,
            i0=self.i0[chosen] if per_view else self.i0,  # type: ignore[index]
            mask=None if self.mask is None else self.mask[chosen],
        )

    def with_geometry(self, geometry: XrayGeometry) -> Scan:
        """Give the same projections another geometry.

        Parameters
        ----------
        geometry : XrayGeometry
            With as many views, rows and columns.

        Returns
        -------
        Scan
            The new scan.
        """
        return self._replace(geometry=geometry)


def _as_numbers(values: Any, name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: got values of type {array.dtype}, need integers or floating-point numbers.")
    return array.view()


def _check_shape(got: tuple[int, ...], need: tuple[int, ...]) -> None:
    if got == need:
        return
    if len(got) == 3:
        for order in permutations(range(3)):
            if tuple(got[axis] for axis in order) == need:
                names = ", ".join("nvu"[order.index(axis)] for axis in range(3))
                raise ValueError(
                    f"projections: got shape {got}, need {need} = (views, rows, columns); the axes seem to be "
                    f"[{names}]: use numpy.transpose(projections, {order})."
                )
        if got[1:] == need[1:]:
            raise ValueError(
                f"projections: got {got[0]} views, the geometry has {need[0]}; need one angle for each view."
            )
    raise ValueError(
        f"projections: got shape {got}, need {need} = (views, rows, columns) as the geometry says."
    )


def _as_mask(mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    if mask is None:
        return None
    trusted = np.asarray(mask)
    if trusted.dtype != bool or trusted.shape not in (shape, shape[1:]):
        raise ValueError(
            f"mask: got {trusted.dtype} of shape {trusted.shape}, need booleans of shape {shape[1:]} or {shape}."
        )
    if not trusted.any():
        raise ValueError("mask: no pixel is trusted, need at least one.")
    return np.broadcast_to(trusted, shape).copy()


def _as_blank(i0: Any, n_views: int) -> float | NDArray[np.float64] | None:
    if i0 is None:
        return None
    try:
        counts = np.array(i0, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"i0: got {i0!r}, need a number of counts.") from error
    if counts.shape not in ((), (n_views,)):
        raise ValueError(f"i0: got shape {counts.shape}, need one number or {n_views}, one for each view.")
    if not (np.isfinite(counts).all() and (counts > 0).all()):
        raise ValueError("i0: got values that are not positive, need positive counts.")
    return float(counts) if counts.ndim == 0 else counts


def _as_field(field: Any, name: str, shape: tuple[int, ...]) -> NDArray[Any] | None:
    if field is None:
        return None
    images = _as_numbers(field, name)
    if images.ndim == 2:
        images = images[np.newaxis]
    if images.ndim != 3 or images.shape[1:] != shape or len(images) == 0:
        raise ValueError(
            f"{name}: got shape {np.shape(field)}, need {shape} or (k, *{shape}), the size of the panel."
        )
    return images


def _check_values(pixels: NDArray[Any], mask: NDArray[np.bool_] | None, counts: bool) -> None:
    """Count what is not finite, view by view, and refuse what can be no line integral."""
    if pixels.dtype.kind != "f":
        return
    count, first, largest = 0, (0, 0, 0), 0.0
    for i, image in enumerate(pixels):
        bad = ~np.isfinite(image)
        if mask is not None:
            bad &= mask[i]
        if bad.any():
            if not count:
                row, col = np.argwhere(bad)[0]
                first = (i, int(row), int(col))
            count += int(np.count_nonzero(bad))
        else:
            largest = max(largest, float(np.abs(image if mask is None else image[mask[i]]).max(initial=0)))
    if count:
        raise ValueError(
            f"projections: {count} pixel values are NaN or infinite, the first at view {first[0]}, row {first[1]}, "
            f"column {first[2]}; need finite values, or a mask that leaves these pixels out."
        )
    if largest > _DENSEST and not counts:
        raise ValueError(
            f"projections: values reach {largest:.3g}, need line integrals (minus the logarithm of the transmission) "
            "of at most 1000; for counts give the blank scan, i0 or flat."
        )
    if largest > _LARGEST:
        raise ValueError(
            f"projections: values reach {largest:.3g}, need at most {_LARGEST:.0e} (squares in float32)."
        )
