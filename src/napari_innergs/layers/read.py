"""From napari layers to slice stacks, with the full world geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from napari_innergs.data import PROFILES, SliceStack
from napari_innergs.geometry.grid import Grid

__all__ = [
    "METADATA_KEY",
    "FirstAxis",
    "LayerView",
    "Region",
    "Source",
    "centre_region",
    "custom_grid",
    "guess_first_axis",
    "layer_affine",
    "profile_of",
    "region_corners",
    "region_from_shapes",
    "region_of_points",
]

METADATA_KEY = "napari-innergs"

FirstAxis = Literal["time", "channels"]


def layer_affine(layer: Any) -> np.ndarray:
    """Return a layer's map from data to world, from public API only.

    Parameters
    ----------
    layer : napari.layers.Layer
        Any layer; scale, translation, rotation, shear and affine are all included.

    Returns
    -------
    ndarray, shape (ndim + 1, ndim + 1)
        Homogeneous matrix.
    """
    ndim = int(layer.ndim)
    origin = np.asarray(layer.data_to_world((0.0,) * ndim), dtype=np.float64)
    out = np.eye(ndim + 1)
    out[:ndim, ndim] = origin
    for axis, unit in enumerate(np.eye(ndim)):
        out[:ndim, axis] = np.asarray(layer.data_to_world(tuple(unit)), dtype=np.float64) - origin
    return out


def profile_of(layer: Any) -> tuple[float, str]:
    """Return what a layer's metadata says about its slices.

    Parameters
    ----------
    layer : napari.layers.Layer
        Its ``metadata["napari-innergs"]`` may hold ``thickness`` (world units) and ``profile``.

    Returns
    -------
    tuple of float and str
        Thickness, 0 where it is not known, and "gaussian" or "box".
    """
    own = layer.metadata.get(METADATA_KEY)
    known = own if isinstance(own, dict) else {}
    thickness, profile = known.get("thickness", 0.0), known.get("profile", "gaussian")
    valid = isinstance(thickness, (int, float)) and np.isfinite(thickness) and thickness > 0
    return (float(thickness) if valid else 0.0), (profile if profile in PROFILES else "gaussian")


@dataclass(frozen=True)
class LayerView:
    """What a job needs to know about an Image layer, as it was when the job started.

    It keeps the pixels and the geometry, not the layer: the layer can be moved, recoloured or deleted while
    the job runs. It has the attributes that `SliceStack.from_layer` reads.
    """

    data: Any
    affine: np.ndarray
    rgb: bool
    name: str
    units: tuple[Any, ...]
    axis_labels: tuple[str, ...]
    contrast_limits: tuple[float, float]
    colormap: Any
    gamma: float
    blending: str
    path: str | None = None
    sample: tuple[str, str] | None = None

    multiscale = False

    @classmethod
    def of(cls, layer: Any) -> LayerView:
        """Take the view of a napari Image layer; of a multiscale one, its finest level.

        Raises
        ------
        TypeError
            If it is not an Image layer.
        """
        kind = type(layer).__name__
        if not hasattr(layer, "rgb") or hasattr(layer, "selected_label"):
            raise TypeError(
                f"layer: {getattr(layer, 'name', kind)!r} is a {kind} layer, need an Image layer (the "
                f"numbers of "
                "labels must not be blended)."
            )
        source = layer.source
        return cls(
            data=layer.data[0] if layer.multiscale else layer.data,
            affine=layer_affine(layer),
            rgb=bool(layer.rgb),
            name=str(layer.name),
            units=tuple(layer.units),
            axis_labels=tuple(layer.axis_labels),
            contrast_limits=(float(layer.contrast_limits[0]), float(layer.contrast_limits[1])),
            colormap=layer.colormap,
            gamma=float(layer.gamma),
            blending=str(layer.blending),
            path=str(source.path) if source.path else None,
            sample=tuple(source.sample) if source.sample else None,  # type: ignore[arg-type]
        )

    @property
    def ndim(self) -> int:
        """Number of axes, colours left out."""
        return len(self.affine) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis, colours left out."""
        return tuple(int(size) for size in self.data.shape[: self.ndim])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return np.dtype(self.data.dtype)

    def data_to_world(self, position: Sequence[float]) -> np.ndarray:
        """Map data coordinates to the world."""
        point: np.ndarray = self.affine[:-1, :-1] @ np.asarray(position, np.float64) + self.affine[:-1, -1]
        return point

    def world_to_data(self, points: Any) -> np.ndarray:
        """Map world coordinates (..., ndim) to data coordinates."""
        inverse = np.linalg.inv(self.affine)
        mapped: np.ndarray = np.asarray(points, np.float64) @ inverse[:-1, :-1].T + inverse[:-1, -1]
        return mapped

    def window(self, slices: Sequence[slice]) -> LayerView:
        """Cut out a box; what is left stays where it is in the world. Nothing is loaded."""
        starts = [cut.indices(size)[0] for cut, size in zip(slices, self.shape, strict=True)]
        affine = self.affine.copy()
        affine[:-1, -1] = self.data_to_world(starts)
        return replace(self, data=self.data[tuple(slices)], affine=affine)

    def blank(self) -> LayerView:
        """Return the same layer without pixels (all zero, no memory), for estimates."""
        return replace(self, data=np.broadcast_to(np.zeros((), self.dtype), self.data.shape))


@dataclass(frozen=True)
class Region:
    """A box in data coordinates, one slice for each of the three spatial axes."""

    slices: tuple[slice, slice, slice]

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Length of each axis of the box within a volume of that shape."""
        return tuple(len(range(*cut.indices(size))) for cut, size in zip(self.slices, shape, strict=True))


@dataclass(frozen=True)
class Source:
    """One or several layers (channels) read as one stack of slices.

    Attributes
    ----------
    views : tuple of LayerView
        Several layers are channels of one object: same shape, same place.
    axis : int
        Which of the three spatial axes counts the slices.
    keep_every : int
        Keep every k-th slice.
    region : Region or None
        Only this box of the layer.
    first_axis : {"time", "channels"}
        What the first axis of a four-dimensional layer is.
    time_index : int or None
        The time point to read; None for all of them.
    thickness : float
        Width of the slice profile, in the world units of the last axis; 0 for thin slices.
    profile : {"gaussian", "box"}
        Shape of the slice profile.
    """

    views: tuple[LayerView, ...]
    axis: int = 0
    keep_every: int = 1
    region: Region | None = None
    first_axis: FirstAxis = "time"
    time_index: int | None = None
    thickness: float = 0.0
    profile: str = "gaussian"

    def __post_init__(self) -> None:
        first = self.views[0]
        for view in self.views:
            if view.ndim not in (3, 4):
                raise ValueError(
                    f"layer: {view.name!r} has {view.ndim} dimensions, need 3 (slices, rows, columns) or 4."
                )
            if view.shape != first.shape:
                raise ValueError(
                    f"layers: {view.name!r} has shape {view.shape}, {first.name!r} has {first.shape}; "
                    f"channels need "
                    "the same."
                )
        if len(self.views) > 1 and any(view.rgb for view in self.views):
            raise ValueError(
                "layers: an RGB layer can't be joined with others; its colours are the channels."
            )

    @property
    def view(self) -> LayerView:
        """The first layer."""
        return self.views[0]

    @property
    def has_time(self) -> bool:
        """Whether the layers are time series."""
        return self.view.ndim == 4 and self.first_axis == "time"

    @property
    def spatial(self) -> tuple[int, int, int]:
        """The three spatial axes of the layers' data."""
        offset = self.view.ndim - 3
        return (offset, offset + 1, offset + 2)

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Length of the three spatial axes, before `region`."""
        return self.view.shape[-3:]

    @property
    def time_points(self) -> tuple[int | None, ...]:
        """The time points to reconstruct; a single None when there is no time."""
        if not self.has_time:
            return (None,)
        return (self.time_index,) if self.time_index is not None else tuple(range(self.view.shape[0]))

    @property
    def all_times(self) -> bool:
        """Whether the result has a time axis."""
        return self.has_time and self.time_index is None

    def stack(self, time_index: int | None = None, *, blank: bool = False) -> SliceStack:
        """Read the slices.

        Parameters
        ----------
        time_index : int, optional
            Time point of a time series.
        blank : bool
            Zeros instead of pixels, without loading anything: for estimates.

        Returns
        -------
        SliceStack
            All channels, in world coordinates.
        """
        stacks = []
        for view in self.views:
            part = view.blank() if blank else view
            if self.region is not None:
                cuts = list(self.region.slices)
                start, stop, _ = cuts[self.axis].indices(self.spatial_shape[self.axis])
                # the slices that are kept are the same as without a region
                cuts[self.axis] = slice(start // self.keep_every * self.keep_every, stop)
                part = part.window([slice(None)] * (view.ndim - 3) + cuts)
            stacks.append(
                SliceStack.from_layer(
                    part,
                    axis=self.axis,
                    keep_every=self.keep_every,
                    channel_axis=0 if view.ndim == 4 and not self.has_time else None,
                    time_index=time_index if self.has_time else None,
                    thickness=self.thickness,
                    profile=self.profile,
                )
            )
        return stacks[0] if len(stacks) == 1 else SliceStack.from_channels(stacks)


def guess_first_axis(layer: Any) -> FirstAxis:
    """Guess what the first axis of a four-dimensional layer is, from its label, else its length."""
    label = str(layer.axis_labels[0]).lower()
    if label.startswith("c"):
        return "channels"
    if label.startswith("t"):
        return "time"
    data = layer.data[0] if layer.multiscale else layer.data
    return "channels" if int(data.shape[0]) <= 4 else "time"


def centre_region(shape: Sequence[int], axis: int = 0, keep_every: int = 1) -> Region:
    """Return a block in the middle that is quick to try: up to 96 pixels wide, up to 8 kept slices.

    Parameters
    ----------
    shape : sequence of 3 int
        The volume's shape.
    axis, keep_every : int
        The slice axis and the step of the slices that are kept.
    """
    slices = []
    for number, size in enumerate(shape):
        wanted = 8 * keep_every + 1 if number == axis else min(96, max(size // 2, 16))
        wanted = min(wanted, size)
        start = (size - wanted) // 2
        slices.append(slice(start, start + wanted))
    return Region((slices[0], slices[1], slices[2]))


def region_from_shapes(shapes: Any, view: LayerView) -> Region:
    """Return the box around a shape (the selected one, else the last drawn), in data coordinates of `view`.

    Parameters
    ----------
    shapes : napari.layers.Shapes
        Layer with at least one shape. Along axes in which the shape has no extent (a rectangle lies in one
        slice) everything is taken.
    view : LayerView
        The image.

    Raises
    ------
    ValueError
        If there is no shape, or it lies outside the image.
    """
    if not len(shapes.data):
        raise ValueError(f"region: the Shapes layer {shapes.name!r} is empty; draw a rectangle first.")
    chosen = sorted(shapes.selected_data)
    vertices = np.asarray(shapes.data[chosen[-1] if chosen else -1], dtype=np.float64)
    world = np.array([shapes.data_to_world(tuple(vertex)) for vertex in vertices])
    return region_of_points(world, view, f"the shape in {shapes.name!r}")


def region_corners(region: Region, view: LayerView) -> np.ndarray:
    """Return the eight outermost voxel centres of a region in the world, (8, view.ndim)."""
    ends = [
        (cut.indices(size)[0], cut.indices(size)[1] - 1)
        for cut, size in zip(region.slices, view.shape[-3:], strict=True)
    ]
    lead = (0.0,) * (view.ndim - 3)
    return np.array([view.data_to_world((*lead, *index)) for index in product(*ends)])


def region_of_points(world: np.ndarray, view: LayerView, what: str = "the box") -> Region:
    """Return the box around points, in data coordinates of `view`.

    Parameters
    ----------
    world : ndarray, shape (n, ndim)
        World coordinates; the last axes of the points and of the image are the same.
    view : LayerView
        The image.
    what : str
        What the points are, for the error.

    Returns
    -------
    Region
        At least two voxels along each axis; everything along axes in which the points have no extent.

    Raises
    ------
    ValueError
        If the box lies outside the image.
    """
    ndim = min(world.shape[1], view.ndim)
    # napari aligns the last axes of layers of different dimensions
    points = np.tile(view.data_to_world((0.0,) * view.ndim), (len(world), 1))
    points[:, view.ndim - ndim :] = world[:, world.shape[1] - ndim :]
    data = view.world_to_data(points)[:, -3:]
    slices = []
    for number, size in enumerate(view.shape[-3:]):
        low, high = data[:, number].min(), data[:, number].max()
        if high - low < 1.0:
            slices.append(slice(0, size))
            continue
        start, stop = max(0, int(np.floor(low + 0.5))), min(size, int(np.floor(high + 0.5)) + 1)
        if stop <= start:
            raise ValueError(f"region: {what} lies outside the image {view.name!r}.")
        # thick slices: the box may hold the centre of a single one
        start = min(start, max(0, size - 2))
        slices.append(slice(start, max(stop, min(size, start + 2))))
    return Region((slices[0], slices[1], slices[2]))


def custom_grid(stacks: SliceStack | Sequence[SliceStack], spacing: Sequence[float]) -> Grid:
    """Return a grid along the slices of a stack, with a spacing for each of its axes.

    Parameters
    ----------
    stacks : SliceStack or sequence of SliceStack
        What the grid encloses; its axes are those of the first.
    spacing : sequence of 3 float
        Distance of voxel centres along (slice normal, rows, columns), world units.
    """
    steps = np.asarray(spacing, dtype=np.float64)
    if steps.shape != (3,) or not (np.isfinite(steps).all() and (steps > 0).all()):
        raise ValueError(f"spacing: got {list(spacing)}, need three positive numbers.")
    listed = [stacks] if isinstance(stacks, SliceStack) else list(stacks)
    cubes = Grid.isotropic(1.0, around=listed)
    local = cubes.world_to_index(np.concatenate([stack.corners() for stack in listed]))
    sizes = np.floor((local.max(axis=0) - local.min(axis=0)) / steps + 0.5 + 1e-9).astype(int) + 1
    return Grid(sizes.tolist(), cubes.affine @ np.diag([*steps, 1.0]), cubes.units)
