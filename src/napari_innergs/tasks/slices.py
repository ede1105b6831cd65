"""Slices to a dense volume: one stack of thin slices, or thick slices of one or several stacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from napari_innergs.config import SliceConfig
from napari_innergs.data import SliceStack
from napari_innergs.device import describe_device
from napari_innergs.fit.candidates import MAX_GAUSSIANS
from napari_innergs.fit.engine import Event, thread_count
from napari_innergs.geometry.grid import Grid, available_memory, format_bytes
from napari_innergs.result import Reconstruction
from napari_innergs.tasks.events import Events, guarded, to_the_end
from napari_innergs.tasks.parts import BLOCK_VOXELS, common_grid
from napari_innergs.tasks.thick import ThickJob
from napari_innergs.tasks.thin import ThinJob

# Planes of all candidates are held for this many pixels at a time.
_CHUNK_PIXELS = 2_000_000
# Bytes at the peak: for each pixel of the input, each output voxel and each Gaussian (measured, rounded up).
_BYTES_INPUT, _BYTES_OUTPUT, _BYTES_GAUSSIAN = 75, 14, 550
# Process seconds on one core of the reference machine, divided by the cores present.
_SECONDS_FLOW = {"flow-dis": 0.7e-6, "flow-tvl1": 8e-6}
_SECONDS_GAUSSIAN, _SECONDS_VOXEL = 1.1e-6, 0.6e-6
# Slices up to this thickness in pixels are thin: they are interpolated, the others deconvolved.
_THIN = 1.5
# For thick slices: bytes for each voxel of a block and of the output, for each pixel; seconds for each voxel.
_BYTES_BLOCK, _BYTES_THICK, _BYTES_PIXEL = 230, 24, 60
_SECONDS_THICK, _SECONDS_FIELD, _SECONDS_MOTION = 6e-6, 18e-6, 40e-6


def fit_slices(
    stacks: SliceStack | Sequence[SliceStack],
    grid: Grid | None = None,
    config: SliceConfig | str | dict[str, Any] | None = None,
    *,
    device: str = "auto",
    seed: int = 0,
    warm_start: Reconstruction | None = None,
    keep_candidates: bool = False,
) -> Events:
    """Reconstruct a dense volume from slices, as a generator of events.

    Everything that can be wrong with the arguments is raised here, before the generator starts. Not asking for
    the next event pauses the work; closing the generator ends it.

    Parameters
    ----------
    stacks : SliceStack or sequence of SliceStack
        Slices with their geometry. One stack of slices up to one and a half pixels thick is interpolated; thicker
        slices, or several stacks in any directions, are deconvolved together with their slice profiles.
    grid : Grid, optional
        Where the volume is wanted; default: `default_grid`.
        More than half a voxel outside thin slices, or half a slice outside thick ones, nothing is extrapolated:
        voxels there hold the lowest value, and their uncertainty is the range.
    config : SliceConfig, str or dict, optional
        Settings, or the name of a preset; default "balanced".
    device : {"auto", "cpu", "cuda"} or "cuda:1" and so on
        Where the kernels run.
    seed : int
        Of the noise that the rehearsal of noisy stacks adds; kept in the report.
    warm_start : Reconstruction, optional
        The previous time point of a series: its Gaussians are the start where they are nearer than new ones.
    keep_candidates : bool
        Keep what each candidate needs in memory, for `Reconstruction.candidate`.

    Returns
    -------
    generator of Step, Preview, Done or Failed

    Raises
    ------
    ValueError, TypeError
        If an argument does not fit; the message names it, what came and what is needed.
    """
    listed = _as_stacks(stacks)
    settings = SliceConfig.coerce(config)
    if not settings.methods and not settings.gaussians:
        raise ValueError("config: methods and gaussians are both empty; name at least one candidate")
    try:
        choice = describe_device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}; {error}") from error
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed: got {seed!r}, need an integer of 0 or more")
    if warm_start is not None and not isinstance(warm_start, Reconstruction):
        raise TypeError(f"warm_start: expected a Reconstruction, got {type(warm_start).__name__}")
    if grid is not None and not isinstance(grid, Grid):
        raise TypeError(f"grid: expected a Grid, got {type(grid).__name__}")
    thick = _is_thick(listed)
    if thick and settings.gaussians and "normalised" not in settings.gaussians:
        raise ValueError(
            f"config: gaussians = {settings.gaussians} can not be fitted to thick slices or several stacks; "
            "use 'normalised'"
        )
    if settings.motion != "off" and len(listed) == 1:
        raise ValueError(
            f"config: motion = {settings.motion!r} needs several stacks (in one stack motion can not be told "
            "from the object's shape); use 'off'"
        )
    target = default_grid(listed) if grid is None else grid
    for i, stack in enumerate(listed):
        if stack.units is not None and target.units is not None and stack.units != target.units:
            raise ValueError(
                f"grid: got units {target.units}, {_which(listed, i)} has {stack.units}; need the same"
            )
        if not thick and stack.mask is not None and not (known := stack.mask.any(axis=(1, 2))).all():
            # a slice without any trusted pixel is no slice: the gap is as wide as if it were missing
            if known.sum() < 2:
                raise ValueError("mask: only one slice has trusted pixels, need at least 2")
            listed[i] = stack.subset(known)
        _check_overlap(listed[i], target)
    _check_together(listed)
    _check_memory(listed, target, settings)
    if not thick:
        return guarded(ThinJob(listed[0], target, settings, choice, seed, warm_start, keep_candidates))
    if warm_start is not None:
        warnings.warn("warm_start: thick slices start afresh; the earlier result is not used", stacklevel=2)
    return guarded(ThickJob(listed, target, settings, choice, seed))


def reconstruct_slices(
    stacks: SliceStack | Sequence[SliceStack],
    grid: Grid | None = None,
    config: SliceConfig | str | dict[str, Any] | None = None,
    *,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[Event], None] | None = None,
    warm_start: Reconstruction | None = None,
    keep_candidates: bool = False,
) -> Reconstruction:
    """Reconstruct a dense volume from slices.

    Parameters
    ----------
    stacks : SliceStack or sequence of SliceStack
        Slices with their geometry: one stack, or several in any directions.
    grid, config, device, seed, warm_start, keep_candidates
        As for `fit_slices`.
    progress : callable, optional
        Receives each event.

    Returns
    -------
    Reconstruction
        Volume (z, y, x) or (z, y, x, c) in the input's intensity units, its grid, the Gaussians and the report.

    Raises
    ------
    ValueError, TypeError
        If an argument does not fit.
    KeyboardInterrupt
        When interrupted; its attribute `best` is the best state so far as a Reconstruction, or None.

    Examples
    --------
    >>> import numpy as np
    >>> from napari_innergs import SliceStack, reconstruct_slices
    >>> z, y, x = np.mgrid[0:5, 0:24, 0:24]
    >>> stack = SliceStack((x + 2 * z).astype(np.float32), affine=np.diag([3.0, 1, 1, 1]))
    >>> reconstruct_slices(stack, config="fast").volume.shape
    (13, 24, 24)
    """
    events = fit_slices(
        stacks, grid, config, device=device, seed=seed, warm_start=warm_start, keep_candidates=keep_candidates
    )
    return to_the_end(events, "slices", progress)


def estimate_slices(
    stacks: SliceStack | Sequence[SliceStack],
    grid: Grid | None = None,
    config: SliceConfig | str | dict[str, Any] | None = None,
) -> dict[str, float]:
    """Estimate what a reconstruction needs.

    Returns
    -------
    dict
        "bytes" (peak, beyond the program itself) and "seconds" on this machine's processors.
    """
    settings = SliceConfig.coerce(config)
    listed = _as_stacks(stacks)
    pixels = float(sum(stack.n_slices * stack.height * stack.width for stack in listed))
    channels = listed[0].n_channels
    if _is_thick(listed):
        target = common_grid(listed) if grid is None else grid
        voxels = float(target.size) * channels
        moving = _SECONDS_MOTION * float(target.size) if settings.motion != "off" else 0.0
        fields = sum((2 / s) ** 3 for s in settings.volume_spacings) if settings.gaussians else 0.0
        seconds = voxels * (_SECONDS_THICK + _SECONDS_FIELD * fields * settings.iterations / 40)
        size = _BYTES_BLOCK * min(voxels, BLOCK_VOXELS * channels) + _BYTES_THICK * voxels
        return {
            "bytes": size + _BYTES_PIXEL * pixels * channels,
            "seconds": 10 + (seconds + moving) * 2 / thread_count(),
        }
    target = listed[0].default_grid() if grid is None else grid
    voxels = float(target.size) * channels
    gaussians = 0.0
    if settings.gaussians:
        gaussians = min(pixels / settings.gaussian_spacing**2, MAX_GAUSSIANS)
    seconds = sum(_SECONDS_FLOW.get(m, 0.05e-6) for m in settings.methods) * pixels * 2 * channels
    seconds += gaussians * (settings.iterations + 5) * _SECONDS_GAUSSIAN * len(settings.gaussians) * 2
    seconds = seconds * 1.25 + voxels * _SECONDS_VOXEL
    size = _BYTES_INPUT * pixels * channels + _BYTES_OUTPUT * voxels + _BYTES_GAUSSIAN * gaussians
    return {"bytes": size, "seconds": 3 + seconds / thread_count()}


def default_grid(stacks: SliceStack | Sequence[SliceStack]) -> Grid:
    """Return the grid that is used when none is given.

    Parameters
    ----------
    stacks : SliceStack or sequence of SliceStack
        What is reconstructed.

    Returns
    -------
    Grid
        One stack of thin slices: its own (`SliceStack.default_grid`). One of thick slices: its own pixels, and as
        many planes as fill the slices. Several: cubes of the smallest pixels around all slices with their
        thickness, along the first stack.
    """
    listed = _as_stacks(stacks)
    return common_grid(listed) if _is_thick(listed) else listed[0].default_grid()


def _as_stacks(stacks: SliceStack | Sequence[SliceStack]) -> list[SliceStack]:
    if not isinstance(stacks, (SliceStack, list, tuple)):
        raise TypeError(
            f"stacks: expected a SliceStack or a list of them, got {type(stacks).__name__}; see SliceStack.from_layer"
        )
    listed = [stacks] if isinstance(stacks, SliceStack) else list(stacks)
    if not listed:
        raise ValueError("stacks: got an empty list, need at least one SliceStack")
    for i, stack in enumerate(listed):
        if not isinstance(stack, SliceStack):
            raise TypeError(
                f"stacks: expected SliceStacks, got {type(stack).__name__} at {i}; see SliceStack.from_layer"
            )
        if stack.n_channels != listed[0].n_channels:
            raise ValueError(
                f"stacks: {_which(listed, i)} has {stack.n_channels} channel(s), the first one "
                f"{listed[0].n_channels}; need the same"
            )
        if stack.units is not None and listed[0].units is not None and stack.units != listed[0].units:
            raise ValueError(
                f"stacks: {_which(listed, i)} has units {stack.units}, the first one {listed[0].units}; need the same"
            )
    return listed


def _which(stacks: Sequence[SliceStack], i: int) -> str:
    return "the stack" if len(stacks) == 1 else f"stack {stacks[i].name or i + 1}"


def _is_thick(stacks: Sequence[SliceStack]) -> bool:
    return len(stacks) > 1 or stacks[0].thickness > _THIN * float(np.mean(stacks[0].pixel_size))


def _check_overlap(stack: SliceStack, grid: Grid) -> None:
    inside = np.linalg.inv(stack.frame_affine) @ grid.affine
    corners = np.array(
        [
            [z, y, x, 1]
            for z in (0, grid.shape[0] - 1)
            for y in (0, grid.shape[1] - 1)
            for x in (0, grid.shape[2] - 1)
        ]
    )
    seen = (inside @ corners.T)[:3]
    first = np.array([stack.positions[0], -0.5, -0.5])
    last = np.array([stack.positions[-1], stack.height - 0.5, stack.width - 0.5])
    if (seen.max(1) < first).any() or (seen.min(1) > last).any():
        raise ValueError(
            "grid: it does not meet the stack anywhere; compare its affine with the stack's, or leave it out"
        )


def _check_together(stacks: Sequence[SliceStack]) -> None:
    """Raise unless each of several stacks meets another one."""
    lattice = np.stack(np.meshgrid(*[np.linspace(0, 1, 12)] * 3, indexing="ij"), -1).reshape(-1, 3)
    boxes = []
    for stack in stacks:
        reach = max(stack.thickness, stack.spacing) / 2 / stack.geometry.cosine
        low = np.array([stack.positions[0] - reach, -0.5, -0.5])
        high = np.array([stack.positions[-1] + reach, stack.height - 0.5, stack.width - 0.5])
        boxes.append((low, high))

    def meets(i: int, j: int) -> bool:
        low, high = boxes[i]
        points = stacks[i].geometry.to_world(low + lattice * (high - low))
        at = stacks[j].geometry.from_world(points)
        return bool(((at >= boxes[j][0]) & (at <= boxes[j][1])).all(1).any())

    for i in range(len(stacks)) if len(stacks) > 1 else ():
        # a small stack may lie between the points of a large one
        if not any(meets(i, j) or meets(j, i) for j in range(len(stacks)) if j != i):
            raise ValueError(
                f"stacks: {_which(stacks, i)} overlaps with no other one; check the affines and units, or "
                "reconstruct it by itself"
            )


def _check_memory(stacks: Sequence[SliceStack], grid: Grid, config: SliceConfig) -> None:
    need, free = estimate_slices(stacks, grid, config)["bytes"], available_memory()
    if need > free:
        grid.check_memory(stacks[0].n_channels, copies=_BYTES_OUTPUT / 4)
        slices = sum(stack.n_slices for stack in stacks)
        raise ValueError(
            f"grid: reconstructing {grid.shape} from {slices} slices of {stacks[0].height} x {stacks[0].width} needs "
            f"about {format_bytes(int(need))}, {format_bytes(int(free))} are free; crop the stack or coarsen the grid"
        )
