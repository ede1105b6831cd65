"""Stacks and grids in parts: what a stack sees of a grid, blocks, half the resolution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import uniform_filter

from napari_innergs.data import SliceStack
from napari_innergs.fit.thick import Block
from napari_innergs.geometry.grid import Grid
from napari_innergs.operators.acquisition import SliceAcquisition

#: Larger grids are reconstructed block by block, with a margin that is thrown away.
BLOCK_VOXELS = 7_000_000


def common_grid(stacks: Sequence[SliceStack]) -> Grid:
    """Make a grid of cubes around stacks, whole slice thicknesses included.

    The axes are those of the first stack, the voxels its pixels (one stack) or the smallest pixels of all.

    Parameters
    ----------
    stacks : sequence of SliceStack
        What is enclosed.
    """
    first = stacks[0]
    step = float(min(np.min(stack.pixel_size) for stack in stacks))
    if len(stacks) == 1:
        gap = first.spacing
        parts = max(1, round(gap / float(np.sqrt(np.prod(first.pixel_size)))))
        plane = gap / parts
        extra = max(0, round(min(first.thickness, gap) / plane) - 1)
        extent = float(first.geometry.gaps.sum())
        cosine = first.geometry.cosine
        affine = np.array(first.frame_affine)
        affine[:3, 0] *= plane / cosine
        start = first.positions[0] * cosine - extra / 2 * plane
        affine[:3, 3] += first.frame_affine[:3, 0] * start / cosine
        return Grid((round(extent / plane) + 1 + extra, first.height, first.width), affine, first.units)
    base = Grid.isotropic(step, around=list(stacks))
    axes = base.affine[:3, :3] / step
    points = []
    for stack in stacks:
        margin = max(0.0, stack.thickness - step) / 2 * stack.normal
        points += [stack.corners() - margin, stack.corners() + margin]
    local = np.concatenate(points) @ axes
    low, high = local.min(0), local.max(0)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * step, axes @ low
    return Grid((np.floor((high - low) / step + 0.5 + 1e-6).astype(int) + 1).tolist(), affine, base.units)


def assemble(
    operators: Sequence[SliceAcquisition],
    data: Sequence[np.ndarray],
    trust: Sequence[np.ndarray],
    grid: Grid,
    starts: dict[str, np.ndarray],
    whole: ArrayLike,
) -> Block | None:
    """Cut out what slices say of a grid: pixels inside it, with their whole profile where that is asked for."""
    chosen: list[SliceAcquisition] = []
    parts, weights = [], []
    for one, values, believe in zip(operators, data, trust, strict=True):
        inside = everywhere(one, grid).inside(whole) & (believe > 0)
        if not inside.any():
            continue
        slices = np.flatnonzero(inside.any((1, 2)))
        rows, columns = (window(np.asarray(inside.any(axes))) for axes in ((0, 2), (0, 1)))
        chosen.append(one.part(grid, slices, rows, columns))
        index = np.ix_(slices, np.arange(rows.start, rows.stop), np.arange(columns.start, columns.stop))
        parts.append(np.stack([np.ascontiguousarray(v[index]) for v in values]).astype(np.float32))
        weights.append((believe[index] * inside[index]).astype(np.float32))
    return Block(chosen, parts, weights, starts) if chosen else None


def coarsened(grid: Grid) -> Grid:
    """Return a grid of voxels twice as large that cover pairs of the grid's."""
    inner = np.diag([2.0, 2.0, 2.0, 1.0])
    inner[:3, 3] = 0.5
    return Grid([max(n // 2, 1) for n in grid.shape], grid.affine @ inner, grid.units)


def everywhere(one: SliceAcquisition, grid: Grid) -> SliceAcquisition:
    """Return all slices, on another grid."""
    return one.part(
        grid, np.arange(len(one.world)), slice(0, one.range_shape[1]), slice(0, one.range_shape[2])
    )


def within(stack: SliceStack, t: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Whether places in a stack's frame are between its slices, half a slice included."""
    reach = max(stack.thickness, stack.spacing) / 2 / stack.geometry.cosine + 1e-6
    seen = (t >= stack.positions[0] - reach) & (t <= stack.positions[-1] + reach)
    seen &= (row > -0.501) & (row < stack.height - 0.499)
    return np.asarray(seen & (column > -0.501) & (column < stack.width - 0.499))


def covered(stacks: Sequence[SliceStack], grid: Grid) -> np.ndarray:
    """Return which voxels of a grid lie within a stack."""
    out = np.zeros(grid.shape, bool)
    frames = [np.linalg.inv(stack.frame_affine) @ grid.affine for stack in stacks]
    y, x = np.mgrid[: grid.shape[1], : grid.shape[2]].astype(np.float32)
    for z in range(grid.shape[0]):
        for stack, m in zip(stacks, frames, strict=True):
            out[z] |= within(stack, *(m[k, 0] * z + m[k, 1] * y + m[k, 2] * x + m[k, 3] for k in range(3)))
    return out


def filled(data: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Return slices (C, n, h, w) with the mean of their neighbourhood where they are hidden."""
    known = 1 - hidden
    share = uniform_filter(known, 3) + 1e-6
    return np.stack([np.where(hidden > 0, uniform_filter(v * known, 3) / share, v) for v in data])


def cut(stack: SliceStack, data: np.ndarray, grid: Grid) -> SliceStack | None:
    """Return the slices (C, n, h, w) of a stack around a grid, or None if they are fewer than two."""
    corners = np.array(np.meshgrid(*((0, n - 1) for n in grid.shape), indexing="ij")).reshape(3, -1).T
    seen = stack.geometry.from_world(grid.index_to_world(corners))
    low, high = seen.min(0), seen.max(0)
    chosen = np.flatnonzero(
        (stack.positions >= low[0] - stack.spacing) & (stack.positions <= high[0] + stack.spacing)
    )
    rows, columns = (
        slice(max(int(low[k]) - 4, 0), min(int(high[k]) + 5, size))
        for k, size in ((1, stack.height), (2, stack.width))
    )
    if len(chosen) < 2 or rows.stop - rows.start < 8 or columns.stop - columns.start < 8:
        return None
    affine = np.array(stack.frame_affine)
    affine[:3, 3] += affine[:3, 1] * rows.start + affine[:3, 2] * columns.start
    part = np.moveaxis(data[:, chosen, rows, columns], 0, -1)
    return SliceStack(part, affine, stack.positions[chosen], 0.0, stack.profile, units=stack.units)


def planes_within(stack: SliceStack, grid: Grid) -> Grid:
    """Return where a stack is interpolated: the grid's own planes between its slices, if they lie along it."""
    to_frame = np.linalg.inv(stack.frame_affine) @ grid.affine
    along = np.allclose(to_frame[0, 1:3], 0, atol=1e-6) and np.allclose(to_frame[1:3, 0], 0, atol=1e-6)
    if along and np.allclose(to_frame[1:3, 1:3], np.eye(2), atol=1e-6) and to_frame[0, 0] > 0:
        t = to_frame[0, 3] + to_frame[0, 0] * np.arange(grid.shape[0])
        inside = np.flatnonzero((t >= stack.positions[0] - 1e-6) & (t <= stack.positions[-1] + 1e-6))
        whole = np.allclose(to_frame[1:3, 3], np.rint(to_frame[1:3, 3]), atol=1e-3)
        if whole and len(inside) > 1:
            planes = grid.crop(slice(int(inside[0]), int(inside[-1]) + 1))
            affine = np.array(planes.affine)
            affine[:3, 3] -= planes.affine[:3, 1:3] @ np.rint(to_frame[1:3, 3])
            return Grid((planes.shape[0], stack.height, stack.width), affine, grid.units)
    return stack.default_grid()


def as_stack(grid: Grid) -> SliceStack:
    """Return the planes of a grid as slices without pixels of their own."""
    return SliceStack(np.broadcast_to(np.float32(0), grid.shape), grid.affine, units=grid.units)


def on_voxels(stack: SliceStack, grid: Grid) -> bool:
    """Whether the pixels of dense planes lie on voxels of a grid."""
    to_frame = np.linalg.inv(stack.geometry.index_affine) @ grid.affine
    return bool(np.allclose(to_frame, np.rint(to_frame), atol=1e-3))


def window(seen: np.ndarray) -> slice:
    """Return the range from the first to the last True."""
    at = np.flatnonzero(seen)
    return slice(int(at[0]), int(at[-1]) + 1)


def in_blocks(
    shape: tuple[int, int, int], margin: int
) -> list[tuple[tuple[slice, slice, slice], tuple[slice, slice, slice]]]:
    """Split a grid into blocks: (with margins, without)."""
    counts = [1, 1, 1]
    while (
        np.prod([min(-(-n // k) + 2 * margin, n) for n, k in zip(shape, counts, strict=True)]) > BLOCK_VOXELS
    ):
        edges = [n / k for n, k in zip(shape, counts, strict=True)]
        if max(edges) <= 2 * margin:
            break
        counts[int(np.argmax(edges))] += 1
    axes = []
    for n, k in zip(shape, counts, strict=True):
        cuts = np.linspace(0, n, k + 1).astype(int)
        axes.append(
            [
                (slice(max(a - margin, 0), min(b + margin, n)), slice(a, b))
                for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
            ]
        )
    return [((z[0], y[0], x[0]), (z[1], y[1], x[1])) for z in axes[0] for y in axes[1] for x in axes[2]]
