"""Grids of voxels: a shape and an affine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from napari_innergs.geometry.frames import check_affine, check_units

__all__ = ["Grid", "HasExtent", "available_memory", "format_bytes"]

FloatArray = NDArray[np.float64]


@runtime_checkable
class HasExtent(Protocol):
    """Something with a place in the world: a stack or a grid."""

    @property
    def affine(self) -> FloatArray:
        """Index to world, (4, 4)."""

    @property
    def units(self) -> tuple[str, str, str] | None:
        """Units of the world axes."""

    @property
    def pixel_size(self) -> FloatArray:
        """In-plane spacings (2,)."""

    def corners(self) -> FloatArray:
        """Centres of the outermost voxels, (8, 3)."""


def format_bytes(count: float) -> str:
    """Write a number of bytes for people.

    Parameters
    ----------
    count : float
        Bytes.

    Returns
    -------
    str
        For example ``"1.5 GiB"``.

    Examples
    --------
    >>> format_bytes(3 * 2**29)
    '1.5 GiB'
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def available_memory() -> int:
    """Bytes of main memory that this process may still use.

    Returns
    -------
    int
        The smaller of what the system reports as available and what is left of a container's limit; a
        conservative 4 GiB where neither can be read.

    Examples
    --------
    >>> available_memory() > 0
    True
    """
    found: list[int] = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    for limit, used, cache in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
        ),
    ):
        try:
            left = int(Path(limit).read_text()) - int(Path(used).read_text())
            # file cache counts as used but is given back on demand
            for line in Path(cache).read_text().splitlines():
                if line.split()[0] in ("inactive_file", "total_inactive_file"):
                    left += int(line.split()[1])
                    break
            found.append(left)
        except (OSError, ValueError, IndexError):
            continue
    if not found:
        try:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, OSError, ValueError):
            found.append(4 * 2**30)
    return max(min(found), 0)


class Grid:
    """A regular lattice of voxels in the world.

    Parameters
    ----------
    shape : sequence of 3 int
        Voxels along (z, y, x) of the array.
    affine : array_like (4, 4), optional
        Index (k, j, i) to world (z, y, x); a voxel's centre is at its integer index. Default: the identity.
    units : str or sequence of 3 str, optional
        Units of the world axes.

    Raises
    ------
    ValueError
        If the shape is not three positive integers, or the affine is singular.

    Examples
    --------
    >>> grid = Grid((10, 20, 30), np.diag([2.0, 1.0, 1.0, 1.0]), units="mm")
    >>> grid.spacing.tolist()
    [2.0, 1.0, 1.0]
    >>> grid.index_to_world([[9, 0, 0]]).tolist()
    [[18.0, 0.0, 0.0]]
    """

    __slots__ = ("_affine", "_inverse", "_shape", "_units")
    _affine: FloatArray
    _inverse: FloatArray
    _shape: tuple[int, int, int]
    _units: tuple[str, str, str] | None

    def __init__(self, shape: Iterable[int], affine: ArrayLike | None = None, units: Any = None) -> None:
        sizes = tuple(shape)
        if len(sizes) != 3:
            raise ValueError(f"shape: got {sizes}, need three integers (nz, ny, nx).")
        whole: list[int] = []
        for size in sizes:
            if isinstance(size, (bool, np.bool_)) or int(size) != size or int(size) < 1:
                raise ValueError(f"shape: got {sizes}, need three positive integers (nz, ny, nx).")
            whole.append(int(size))
        matrix = check_affine(affine)
        inverse = np.linalg.inv(matrix)
        inverse[3] = (0, 0, 0, 1)
        inverse.flags.writeable = False
        object.__setattr__(self, "_shape", (whole[0], whole[1], whole[2]))
        object.__setattr__(self, "_affine", matrix)
        object.__setattr__(self, "_inverse", inverse)
        object.__setattr__(self, "_units", check_units(units))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Grid is immutable: {name} can not be set; make a new Grid.")

    def __reduce__(self) -> tuple[Any, ...]:
        return (Grid, (self._shape, np.array(self._affine), self._units))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grid):
            return NotImplemented
        return (
            self._shape == other._shape
            and bool(np.array_equal(self._affine, other._affine))
            and self._units == other._units
        )

    def __hash__(self) -> int:
        return hash((self._shape, self._affine.tobytes(), self._units))

    def __repr__(self) -> str:
        steps = ", ".join(f"{step:.6g}" for step in self.spacing)
        unit = "" if self._units is None else f" {'/'.join(dict.fromkeys(self._units))}"
        return f"Grid(shape={self._shape}, spacing=({steps}){unit})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each array axis."""
        return self._shape

    @property
    def affine(self) -> FloatArray:
        """Index to world, (4, 4), read-only."""
        return self._affine

    @property
    def inverse_affine(self) -> FloatArray:
        """World to index, (4, 4), read-only."""
        return self._inverse

    @property
    def units(self) -> tuple[str, str, str] | None:
        """Units of the world axes (z, y, x), or None."""
        return self._units

    @property
    def spacing(self) -> FloatArray:
        """Distance between neighbouring centres along each array axis, (3,), world units."""
        return np.linalg.norm(self._affine[:3, :3], axis=0)

    @property
    def pixel_size(self) -> FloatArray:
        """Spacing of the last two axes, (2,)."""
        return self.spacing[1:]

    @property
    def size(self) -> int:
        """Number of voxels."""
        nz, ny, nx = self._shape
        return nz * ny * nx

    def nbytes(self, channels: int = 1, dtype: DTypeLike = np.float32) -> int:
        """Bytes of one volume on this grid.

        Parameters
        ----------
        channels : int
            Values per voxel.
        dtype : dtype
            Type of a value.

        Returns
        -------
        int
            Bytes.
        """
        return self.size * int(channels) * np.dtype(dtype).itemsize

    def index_to_world(self, points: ArrayLike) -> FloatArray:
        """Map indices (..., 3) to world (z, y, x).

        Parameters
        ----------
        points : array_like (..., 3)
            Indices, fractions allowed.

        Returns
        -------
        ndarray (..., 3)
            World positions.
        """
        return np.asarray(points, dtype=np.float64) @ self._affine[:3, :3].T + self._affine[:3, 3]

    def world_to_index(self, points: ArrayLike) -> FloatArray:
        """Map world positions (..., 3) to indices.

        Parameters
        ----------
        points : array_like (..., 3)
            World (z, y, x).

        Returns
        -------
        ndarray (..., 3)
            Indices with fractions.
        """
        return np.asarray(points, dtype=np.float64) @ self._inverse[:3, :3].T + self._inverse[:3, 3]

    def corners(self) -> FloatArray:
        """World positions of the centres of the eight corner voxels.

        Returns
        -------
        ndarray (8, 3)
            In the order of the binary numbers 000 ... 111 over (z, y, x).
        """
        ends = [(0, size - 1) for size in self._shape]
        return self.index_to_world(np.array(list(product(*ends)), dtype=np.float64))

    def crop(self, z: slice = slice(None), y: slice = slice(None), x: slice = slice(None)) -> Grid:
        """Cut a box out of the grid; the voxels that stay keep their places in the world.

        Parameters
        ----------
        z, y, x : slice
            Ranges of indices; steps are allowed when positive.

        Returns
        -------
        Grid
            The smaller grid.

        Raises
        ------
        ValueError
            If nothing is left or a step is not positive.
        """
        starts, steps, sizes = [], [], []
        for name, cut, size in zip("zyx", (z, y, x), self._shape, strict=True):
            start, stop, step = cut.indices(size)
            if step < 1 or stop <= start:
                raise ValueError(f"{name}: got {cut}, need a range that keeps at least one of {size} voxels.")
            starts.append(start)
            steps.append(step)
            sizes.append(len(range(start, stop, step)))
        inner = np.eye(4)
        inner[:3, :3] = np.diag(steps)
        inner[:3, 3] = starts
        return Grid(sizes, self._affine @ inner, self._units)

    @classmethod
    def isotropic(
        cls,
        spacing: float | None = None,
        around: HasExtent | Iterable[HasExtent] | None = None,
        *,
        align: str = "first",
    ) -> Grid:
        """Make a grid of cubes around one or several stacks or grids.

        Parameters
        ----------
        spacing : float, optional
            Edge of a voxel, world units. Default: the smallest in-plane pixel size of what is enclosed.
        around : stack, grid, or sequence of them
            What is enclosed. The first voxel centre lies on the corner of the enclosing box, the last one
            within half a voxel of the opposite corner.
        align : {"first", "world"}
            ``"first"``: axes along the first item's slices and normal; ``"world"``: along the world axes.

        Returns
        -------
        Grid
            The grid.

        Raises
        ------
        ValueError
            If `spacing` is not positive, nothing is given, or the units differ.

        Examples
        --------
        >>> coarse = Grid((3, 5, 5), np.diag([4.0, 1.0, 1.0, 1.0]))
        >>> Grid.isotropic(1.0, around=coarse).shape
        (9, 5, 5)
        """
        if around is None:
            raise ValueError("around: got nothing, need a stack, a grid or a list of them.")
        items: list[HasExtent] = [around] if hasattr(around, "corners") else list(around)  # type: ignore[list-item, arg-type]
        if not items:
            raise ValueError("around: got an empty list, need at least one stack or grid.")
        if align not in ("first", "world"):
            raise ValueError(f"align: got {align!r}, need 'first' or 'world'.")
        if spacing is None:
            spacing = float(min(np.min(item.pixel_size) for item in items))
        step = float(spacing)
        if not (np.isfinite(step) and step > 0):
            raise ValueError(f"spacing: got {spacing}, need a positive finite number.")
        known = {item.units for item in items if item.units is not None}
        if len(known) > 1:
            raise ValueError(f"around: got different units {sorted(known)}, need the same for all.")
        axes = np.eye(3) if align == "world" else _orthonormal_axes(items[0].affine)
        local = np.concatenate([item.corners() for item in items]) @ axes
        low, high = local.min(axis=0), local.max(axis=0)
        sizes = np.floor((high - low) / step + 0.5 + 1e-9).astype(int) + 1
        affine = np.eye(4)
        affine[:3, :3] = axes * step
        affine[:3, 3] = axes @ low
        return cls(sizes.tolist(), affine, next(iter(known), None))

    def check_memory(
        self,
        channels: int = 1,
        copies: float = 4.0,
        *,
        dtype: DTypeLike = np.float32,
        available: int | None = None,
    ) -> int:
        """Refuse a grid that does not fit in memory.

        Parameters
        ----------
        channels : int
            Values per voxel.
        copies : float
            Volumes held at the same time.
        dtype : dtype
            Type of a value.
        available : int, optional
            Bytes that may be used. Default: :func:`available_memory`.

        Returns
        -------
        int
            Bytes needed.

        Raises
        ------
        ValueError
            With the bytes needed and the largest grid over the same space that fits.

        Examples
        --------
        >>> Grid((8, 8, 8)).check_memory(copies=1, available=4096)
        2048
        """
        need = int(self.nbytes(channels, dtype) * copies)
        limit = available_memory() if available is None else int(available)
        if need <= limit:
            return need
        per_voxel = int(channels) * np.dtype(dtype).itemsize * copies
        message = (
            f"grid: {self._shape} with {channels} channel(s) needs {format_bytes(need)} ({need} bytes), "
            f"but {format_bytes(limit)} is available"
        )
        factor = (limit / need) ** (1 / 3)
        fit = [max(1, int(size * factor)) for size in self._shape]
        # axes that are already at one voxel can not shrink: take the rest from the longest
        while fit[0] * fit[1] * fit[2] * per_voxel > limit and max(fit) > 1:
            fit[int(np.argmax(fit))] -= 1
        if fit[0] * fit[1] * fit[2] * per_voxel > limit:
            raise ValueError(f"{message}; no grid fits.")
        extent = self.spacing * np.array(self._shape)
        steps = ", ".join(f"{value:.4g}" for value in extent / fit)
        raise ValueError(
            f"{message}; the largest grid over the same space that fits is "
            f"{tuple(fit)} with spacing ({steps})."
        )


def _orthonormal_axes(affine: FloatArray) -> FloatArray:
    """Columns: slice normal, row direction, column direction, orthonormal, near the affine's own columns."""
    row = affine[:3, 1] / np.linalg.norm(affine[:3, 1])
    col = affine[:3, 2] - row * (row @ affine[:3, 2])
    col /= np.linalg.norm(col)
    normal = np.cross(row, col)
    if normal @ affine[:3, 0] < 0:
        normal = -normal
    # crosses of exact axes are exact; adding 0 removes negative zeros
    return np.stack([normal, row, col], axis=1) + 0.0
