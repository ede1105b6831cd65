"""Where slices lie: orientations in words, slice planes as layers, before and after motion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from napari_innergs.data import SliceStack
from napari_innergs.layers.read import METADATA_KEY, LayerView
from napari_innergs.layers.write import LayerData, out_of_slice, unit_factors

__all__ = ["STACK_COLORS", "motion_layers", "orientation", "plane_layer", "slice_corners"]

# Up to this angle from a world axis a stack is called by the axis' name.
_TILT_DEGREES = 15.0
_ORIENTATIONS = ("axial", "coronal", "sagittal")
#: A colour for each stack, in turn.
STACK_COLORS = ("#4c9be8", "#f28e2b", "#59c36a", "#e15bd0", "#e8d44d", "#3fc9c9")
_OUTLIER = (1.0, 0.0, 0.0, 1.0)


def orientation(normal: Any) -> str:
    """Name the orientation of slices.

    Parameters
    ----------
    normal : array_like (3,)
        Normal of the slices, world (z, y, x).

    Returns
    -------
    str
        "axial", "coronal" or "sagittal" for normals within 15 degrees of the z, y or x axis, else "oblique".

    Examples
    --------
    >>> orientation((0, -1, 0)), orientation((1, 1, 0))
    ('coronal', 'oblique')
    """
    direction = np.asarray(normal, np.float64)
    share = np.abs(direction) / np.linalg.norm(direction)
    axis = int(share.argmax())
    return _ORIENTATIONS[axis] if share[axis] >= np.cos(np.radians(_TILT_DEGREES)) else "oblique"


def slice_corners(stack: SliceStack, transforms: Any = None) -> np.ndarray:
    """Return the outer corners of each slice, in the order around it.

    Parameters
    ----------
    stack : SliceStack
        The slices.
    transforms : array_like (n, 4, 4), optional
        Rigid motion of each slice in the world.

    Returns
    -------
    ndarray, shape (n, 4, 3)
        World (z, y, x), at the edges of the outermost pixels.

    Raises
    ------
    ValueError
        If there is not one transform for each slice.
    """
    row, col = stack.height - 0.5, stack.width - 0.5
    around = np.array([(-0.5, -0.5), (-0.5, col), (row, col), (row, -0.5)])
    inside = np.ones((stack.n_slices, 4, 4))
    inside[..., 0] = stack.positions[:, None]
    inside[..., 1:3] = around
    world = inside @ stack.frame_affine.T
    if transforms is not None:
        moved = np.asarray(transforms, np.float64)
        if moved.shape != (stack.n_slices, 4, 4):
            raise ValueError(f"transforms: got shape {moved.shape}, need ({stack.n_slices}, 4, 4).")
        world = world @ moved.swapaxes(1, 2)
    corners: np.ndarray = world[..., :3]
    return corners


def plane_layer(
    stacks: Sequence[SliceStack], view: LayerView, transforms: Sequence[Any] | None = None, **extra: Any
) -> LayerData:
    """Draw the outline of every slice as a Vectors layer, a colour for each stack.

    Parameters
    ----------
    stacks : sequence of SliceStack
        The slices.
    view : LayerView
        The layer whose units and axis names the new one gets.
    transforms : sequence of array_like (n, 4, 4), optional
        For each stack, the motion of its slices.
    **extra
        More layer arguments.

    Returns
    -------
    LayerData
        Four vectors for each slice; the features are stack, slice, and how far motion moves and turns it:
        ``shift`` (of its centre, world units) and ``turn`` (degrees).

    Raises
    ------
    ValueError
        If units have no common measure, or the transforms don't belong to the stacks.
    """
    moves = [None] * len(stacks) if transforms is None else list(transforms)
    if len(moves) != len(stacks):
        raise ValueError(f"transforms: got them for {len(moves)} stacks, need {len(stacks)}.")
    names = _names(stacks)
    edges, colors, features = [], [], []
    for number, (stack, motion) in enumerate(zip(stacks, moves, strict=True)):
        factors = unit_factors(stack.units, view)
        told = found = slice_corners(stack) * factors
        turn = np.zeros(stack.n_slices)
        if motion is not None:
            found = slice_corners(stack, motion) * factors
            trace = np.trace(np.asarray(motion, np.float64)[:, :3, :3], axis1=1, axis2=2)
            turn = np.degrees(np.arccos(((trace - 1) / 2).clip(-1, 1)))
        shift = np.linalg.norm((found - told).mean(1), axis=1)
        edges.append(np.stack([found, np.roll(found, -1, axis=1) - found], axis=2).reshape(-1, 2, 3))
        colors.append(np.tile(_rgba(STACK_COLORS[number % len(STACK_COLORS)]), (len(edges[-1]), 1)))
        features.append(
            {
                "stack": np.full(stack.n_slices, names[number], dtype=object),
                "slice": np.arange(stack.n_slices),
                "shift": shift,
                "turn": turn,
            }
        )
    look: dict[str, Any] = {
        "name": "slice planes",
        "features": {
            key: np.concatenate([np.repeat(part[key], 4) for part in features]) for key in features[0]
        },
        "edge_color": np.concatenate(colors),
        "edge_width": 0.5 * float(min(stack.pixel_size.min() for stack in stacks)),
        "vector_style": "line",
        **out_of_slice("all"),
        "units": view.units[-3:],
        "axis_labels": view.axis_labels[-3:],
        "metadata": {METADATA_KEY: {"kind": "slice planes", "stacks": names}},
    }
    return np.concatenate(edges), {**look, **extra}, "vectors"


def motion_layers(
    stacks: Sequence[SliceStack],
    transforms: Sequence[Any],
    view: LayerView,
    outliers: Sequence[Sequence[int]] | None = None,
    **extra: Any,
) -> list[LayerData]:
    """Draw the slice planes as they were told and as motion puts them, in two hidden layers.

    Parameters
    ----------
    stacks, view
        As for `plane_layer`.
    transforms : sequence of array_like (n, 4, 4)
        For each stack, the rigid motion of its slices, world (z, y, x).
    outliers : sequence of sequence of int, optional
        For each stack, the slices that were left out; they are red, and the feature ``outlier`` tells them.
    **extra
        More layer arguments.

    Returns
    -------
    list of LayerData
        Before, in grey, and after; the second one's metadata hold the transforms.
    """
    told = plane_layer(stacks, view, name=f"{view.name} planes before motion", visible=False, **extra)
    told[1]["edge_color"] = "gray"
    kept = [
        {"stack": name, "transforms": np.asarray(motion, np.float64).tolist()}
        for name, motion in zip(_names(stacks), transforms, strict=True)
    ]
    metadata = {METADATA_KEY: {"kind": "slice planes after motion", "axes": "world z, y, x", "motion": kept}}
    found = plane_layer(
        stacks,
        view,
        transforms,
        name=f"{view.name} planes after motion",
        visible=False,
        metadata=metadata,
        **extra,
    )
    if outliers is not None:
        flags = np.concatenate(
            [
                np.repeat(np.isin(np.arange(stack.n_slices), list(left_out)), 4)
                for stack, left_out in zip(stacks, outliers, strict=True)
            ]
        )
        found[1]["features"]["outlier"] = flags
        found[1]["edge_color"][flags] = _OUTLIER
    return [told, found]


def _names(stacks: Sequence[SliceStack]) -> list[str]:
    return [stack.name or f"stack {number + 1}" for number, stack in enumerate(stacks)]


def _rgba(color: str) -> tuple[float, ...]:
    return (*(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)), 1.0)
