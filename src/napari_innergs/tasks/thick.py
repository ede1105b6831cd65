"""Thick slices of one or several stacks to a dense volume: motion, candidates on blocks, combination, result."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.ndimage import map_coordinates, spline_filter, uniform_filter

from napari_innergs.baselines.denoise import NOISE_THRESHOLD, noise_level
from napari_innergs.config import SliceConfig
from napari_innergs.data import SliceStack
from napari_innergs.fit import motion as motions
from napari_innergs.fit.candidates import channel_scale
from napari_innergs.fit.engine import Done, Event, Preview, Progress, Step, background
from napari_innergs.fit.thick import Block, Choice, rehearse, solve, spread
from napari_innergs.fit.volume_field import CUT_VOLUME, VolumeField
from napari_innergs.geometry.grid import Grid
from napari_innergs.model import GaussianModel
from napari_innergs.operators.acquisition import FWHM, SliceAcquisition
from napari_innergs.result import Reconstruction
from napari_innergs.tasks.parts import (
    as_stack,
    assemble,
    coarsened,
    covered,
    cut,
    filled,
    in_blocks,
    on_voxels,
    planes_within,
    within,
)
from napari_innergs.tasks.thin import ThinJob
from napari_innergs.tasks.versions import versions

Events = Generator[Event, None, None]

# Edge of the block on which settings are chosen, voxels.
_REHEARSAL = {True: 48, False: 72}
# Beyond two stacks nothing is gained from interpolation between the slices of one.
_MOST_INTERPOLATED = 2
# Share of the pixels that are held out.
_HOLD_PIXELS = 0.1
# Below this agreement in their overlap, stacks are probably of different objects.
_CONSISTENT = 0.5
# Voxels larger than this in pixels are warned of, and motion with a larger median error.
_COARSE, _UNSURE_DEGREES = 1.5, 2.0


@dataclass
class _Half:
    """A stack at half the resolution, with what goes with its slices."""

    stack: SliceStack
    trust: np.ndarray
    transforms: np.ndarray | None


class ThickJob:
    """One reconstruction: stacks, a grid, and how far it has come."""

    def __init__(
        self, stacks: Sequence[SliceStack], grid: Grid, config: SliceConfig, device: Any, seed: int
    ) -> None:
        self.stacks, self.grid, self.config, self.device, self.seed = list(stacks), grid, config, device, seed
        self.started = time.perf_counter()
        self.progress = Progress()
        self.channels = stacks[0].n_channels
        self.volume: np.ndarray | None = None
        self.band: np.ndarray | None = None
        self.choice = Choice()
        self.motion: motions.Motion | None = None
        self.consistency: float | None = None
        self.rehearsed = True
        self.gains = np.ones(len(stacks))
        self.offsets = np.zeros(len(stacks))
        self.fields: list[tuple[VolumeField, np.ndarray, np.ndarray]] = []

    def run(self) -> Events:
        """Yield the events of the whole job."""
        progress = self.progress
        progress.enter("Reading the slices", 0.01)
        made = yield from background((stack.values for stack in self.stacks), progress)
        self.trust = [
            np.ones(v.shape[:3], np.float32) if s.mask is None else s.mask.astype(np.float32)
            for s, v in zip(self.stacks, made, strict=True)
        ]
        self.values = [np.ascontiguousarray(np.moveaxis(v, -1, 0)) for v in made]
        if len(self.stacks) > 1:
            yield from self._match()
        scales = [channel_scale(np.moveaxis(v, 0, -1)) for v in self.values]
        self.offset = np.min([low for low, _ in scales], 0)
        self.range = np.max([low + wide for low, wide in scales], 0) - self.offset
        yield from self._first_preview()
        sigma = yield from self._noise()
        self.noisy = self.config.denoise == "auto" and self.sigma > NOISE_THRESHOLD
        # quiet stacks count more, within reason
        trust = np.clip((np.median(sigma) / np.maximum(sigma, 1e-6)) ** 2, 0.25, 4.0)
        self.trust = [
            t * np.float32(w) for t, w in zip(self.trust, trust if self.noisy else 1 + 0 * trust, strict=True)
        ]
        self.transforms: list[np.ndarray | None] = [None] * len(self.stacks)
        if self.config.motion != "off":
            yield from self._move()
        self.data = [
            (v - self.offset[:, None, None, None]) / self.range[:, None, None, None] for v in self.values
        ]
        self.values = []
        self.operators = [
            SliceAcquisition(s, self.grid, t) for s, t in zip(self.stacks, self.transforms, strict=True)
        ]
        yield from self._rehearse()
        starts = yield from self._starts(0.45)
        yield from self._fill(starts)
        progress.enter("Finishing", 1.0)
        (result,) = yield from background([self._result], progress)
        yield Done(result)

    def _match(self) -> Generator[Step, None, None]:
        """Bring the stacks to the first one's contrast, and say how well they agree."""
        self.progress.enter("Comparing the stacks", 0.04)
        (agreement,) = yield from background(
            [partial(motions.consistency, self.stacks, self.grid)], self.progress
        )
        self.consistency = float(agreement[0])
        if not self.config.match_intensity:
            return
        (matched,) = yield from background(
            [partial(motions.match_intensities, self.stacks, self.grid)], self.progress
        )
        self.gains, self.offsets = (np.asarray(m, float) for m in matched)
        self.values = [
            (v - np.float32(o)) / np.float32(g)
            for v, g, o in zip(self.values, self.gains, self.offsets, strict=True)
        ]

    def _noise(self) -> Generator[Step, None, np.ndarray]:
        """Estimate the noise of each stack, in units of the range."""
        self.progress.enter("Estimating the noise", 0.06)

        def level(values: np.ndarray) -> float:
            some = range(0, values.shape[1], max(1, values.shape[1] // 32))
            found = [[noise_level(v[j]) for j in some] for v in values]
            return float(np.mean(np.median(found, 1) / self.range))

        made = yield from background((partial(level, v) for v in self.values), self.progress)
        self.sigma = float(np.sqrt(np.mean(np.square(made))))
        return np.array(made)

    def _move(self) -> Generator[Step, None, None]:
        """Find the motion of slices or stacks, and which of their pixels can be trusted."""
        self.progress.enter("Motion", 0.3)
        stacks = [
            SliceStack(
                np.moveaxis(v, 0, -1),
                s.frame_affine,
                s.positions,
                s.thickness,
                s.profile,
                t > 0,
                units=s.units,
            )
            for v, s, t in zip(self.values, self.stacks, self.trust, strict=True)
        ]
        steps = motions.estimate_motion(
            stacks,
            self.grid,
            level=self.config.motion,
            intensity=self.config.match_intensity,
            robust=self.config.robust,
            seed=self.seed,
        )

        def advance() -> Any:
            try:
                return next(steps)
            except StopIteration as stop:
                return stop.value

        while True:
            (out,) = yield from background([advance], self.progress)
            if isinstance(out, motions.Motion):
                break
            yield self.progress.step(out[0])
        self.motion = out
        self.transforms = list(out.transforms)
        # relative to the contrast that was matched before
        self.offsets = self.offsets + self.gains * out.offsets
        self.gains = self.gains * out.gains
        for i, weights in enumerate(out.weights):
            scale = (out.gains[i] * out.scales[i]).astype(np.float32)[None, :, None, None]
            self.values[i] = (self.values[i] - np.float32(out.offsets[i])) / scale
            self.trust[i] = self.trust[i] * weights

    def _resampled(
        self,
        volumes: Sequence[np.ndarray],
        stacks: Sequence[SliceStack],
        grid: Grid,
        order: int,
        name: str,
        end: float,
    ) -> Generator[Step, None, np.ndarray]:
        """Return the mean of the stacks' own values on a grid, by splines, over those that see a voxel."""
        self.progress.enter(name, end)
        tasks = [partial(spline_filter, v[c], order, mode="nearest") for v in volumes for c in range(len(v))]
        if order > 1:
            made = yield from background(tasks, self.progress, total=2 * len(tasks))
        else:
            made = [v[c] for v in volumes for c in range(len(v))]
        out = np.empty((self.channels, *grid.shape), np.float32)
        frames = [np.linalg.inv(s.frame_affine) @ grid.affine for s in stacks]

        def slab(start: int, stop: int) -> None:
            z, y, x = np.mgrid[start:stop, : grid.shape[1], : grid.shape[2]].astype(np.float32)
            total = np.zeros((self.channels, *z.shape), np.float32)
            count = np.zeros(z.shape, np.float32)
            for i, (stack, m) in enumerate(zip(stacks, frames, strict=True)):
                t, r, c = (m[k, 0] * z + m[k, 1] * y + m[k, 2] * x + m[k, 3] for k in range(3))
                seen = within(stack, t, r, c)
                # a stack that does not see a voxel still says something where no other does
                weight = np.where(seen, np.float32(1), np.float32(1e-6))
                at = np.interp(t, stack.positions, np.arange(stack.n_slices))
                for channel in range(self.channels):
                    part = made[i * self.channels + channel]
                    total[channel] += weight * map_coordinates(
                        part, (at, r, c), order=order, mode="nearest", prefilter=False
                    )
                count += weight
            out[:, start:stop] = total / count

        pieces = [(z, min(z + 4, grid.shape[0])) for z in range(0, grid.shape[0], 4)]
        yield from background((partial(slab, *piece) for piece in pieces), self.progress, total=len(pieces))
        return out

    def _first_preview(self) -> Events:
        """Show the mean of the stacks' linear interpolations."""
        quick = yield from self._resampled(self.values, self.stacks, self.grid, 1, "First preview", 0.05)
        self.volume = np.ascontiguousarray(np.moveaxis(quick, 0, -1))
        yield Preview(self._squeeze(self.volume), self.grid, "mean of linear interpolations")

    def _interpolates(self) -> bool:
        """Whether what thin slices would give is a candidate."""
        return len(self.stacks) <= _MOST_INTERPOLATED and self.motion is None

    def _interpolated(
        self, stacks: Sequence[SliceStack], grid: Grid, end: float, phase: str
    ) -> Generator[Step, None, np.ndarray]:
        """Return the mean of each stack's reconstruction as if its slices were thin, scaled."""
        begin = self.progress.end
        dense, native = [], []
        for i, stack in enumerate(stacks):
            target = planes_within(stack, grid)
            job = ThinJob(
                stack,
                target,
                self.config.model_copy(update={"uncertainty": False}),
                self.device,
                self.seed,
                None,
                False,
            )
            share = (end - begin) * 0.9 / len(stacks)
            for event in job.run():
                if isinstance(event, Step):
                    fraction = begin + share * (i + event.fraction)
                    inner = event.phase.removeprefix("Rehearsal: ")
                    yield Step(
                        f"{phase}: {inner[0].lower()}{inner[1:]}",
                        fraction,
                        event.iteration,
                        event.total,
                    )
                if isinstance(event, Done):
                    volume = event.result.volume.reshape(*target.shape, -1)
                    dense.append(np.ascontiguousarray(np.moveaxis(volume, -1, 0)))
            native.append(as_stack(target))
            self.progress.enter(phase, begin + share * (i + 1))
        aligned = all(on_voxels(s, grid) for s in native)
        made = yield from self._resampled(
            dense, native, grid, 1 if aligned else 3, f"{phase}: resampling", end
        )
        return made

    def _starts(self, end: float) -> Generator[Step, None, dict[str, np.ndarray]]:
        starts = {}
        halfway = self.progress.end + 0.3 * (end - self.progress.end)
        starts["cubic"] = yield from self._resampled(
            self.data, self.stacks, self.grid, 3, "Cubic interpolation", halfway
        )
        if self._interpolates() and self.choice.wants("slices+residual"):
            scaled = [self._scaled(i) for i in range(len(self.stacks))]
            starts["slices"] = yield from self._interpolated(scaled, self.grid, end, "Between the slices")
        return starts

    def _scaled(self, i: int) -> SliceStack:
        """Return a stack with its data scaled to a range of about one."""
        s = self.stacks[i]
        return SliceStack(
            np.moveaxis(self.data[i], 0, -1),
            s.frame_affine,
            s.positions,
            s.thickness,
            s.profile,
            self.trust[i] > 0 if not (self.trust[i] > 0).all() else None,
            units=s.units,
        )

    def _rehearse(self) -> Generator[Step, None, None]:
        config = self.config
        default = Choice(self.noisy, 0.25 * self.sigma if self.noisy else 1e-4, 0.1 if self.noisy else 1e-3)
        default.iterations = {
            s: config.iterations for s in (config.volume_spacings if config.gaussians else ())
        }
        # with noise, what matters is how much is smoothed; without, how well the directions fill each other in
        pair = yield from (self._held_out() if self.noisy and len(self.stacks) > 1 else self._merged())
        if pair is None:
            names = ["tv", *(f"gaussians-{s:g}+residual" for s in default.iterations)]
            if self._interpolates():
                names.append("slices+residual")
            self.rehearsed = False
            default.weights = {name: 1 / len(names) for name in names}
            self.choice = default
            return
        self.choice = yield from rehearse(
            *pair, self.sigma, self.noisy, config, self.device.name, self.progress, 0.42
        )

    def _region(self, edge: int) -> tuple[slice, slice, slice]:
        """Return a part of the grid that many slices see and that has much detail; it starts at even voxels."""
        assert self.volume is not None
        sizes = [min(edge, n) for n in self.grid.shape]
        picture = self.volume[..., 0]
        detail = np.zeros(picture.shape, np.float32)
        for axis in range(3):
            detail += np.abs(np.diff(picture, axis=axis, append=picture.take([-1], axis)))
        for one in self.operators:
            detail *= 0.25 + (one.adjoint(np.ones(one.range_shape, np.float32)) > 1e-3)
        score = uniform_filter(detail, sizes, mode="constant")
        at = np.unravel_index(int(score.argmax()), score.shape)
        starts = [
            int(np.clip(a - s // 2, 0, n - s)) // 2 * 2
            for a, s, n in zip(at, sizes, self.grid.shape, strict=True)
        ]
        z, y, x = (slice(a, a + s) for a, s in zip(starts, sizes, strict=True))
        return z, y, x

    def _held_out(self) -> Generator[Step, None, tuple[Block, Block] | None]:
        """Hold out some pixels, in a part of the grid: what is predicted worse then is the noise that was fitted."""
        self.progress.enter("Rehearsal: choosing a region", self.progress.end + 0.01)
        edge = _REHEARSAL[self.config.iterations < 20]
        (box,) = yield from background([partial(self._region, edge)], self.progress)
        region = self.grid.crop(*box)
        random = np.random.default_rng(self.seed)
        hidden = [(random.random(trust.shape) < _HOLD_PIXELS).astype(np.float32) for trust in self.trust]
        self.progress.enter("Rehearsal: interpolating", self.progress.end + 0.02)
        tasks = (partial(filled, d, h) for d, h in zip(self.data, hidden, strict=True))
        blind = yield from background(tasks, self.progress, total=len(self.data))
        stacks = [cut(s, d, region) for s, d in zip(self.stacks, blind, strict=True)]
        starts = yield from self._rehearsal_starts(
            blind, self.stacks, region, [s for s in stacks if s is not None]
        )
        shown = [t * (1 - h) for t, h in zip(self.trust, hidden, strict=True)]
        tested = [t * h for t, h in zip(self.trust, hidden, strict=True)]
        train, test = (assemble(self.operators, self.data, w, region, starts, True) for w in (shown, tested))
        return (train, test) if train is not None and test is not None else None

    def _rehearsal_starts(
        self, data: Sequence[np.ndarray], stacks: Sequence[SliceStack], grid: Grid, thin: Sequence[SliceStack]
    ) -> Generator[Step, None, dict[str, np.ndarray]]:
        end = self.progress.end
        cubic = yield from self._resampled(data, stacks, grid, 3, "Rehearsal: interpolating", end + 0.01)
        starts = {"cubic": cubic}
        # the job itself interpolates only where it has few stacks, and none that move
        if thin and self._interpolates():
            starts["slices"] = yield from self._interpolated(thin, grid, end + 0.08, "Rehearsal")
        return starts

    def _merged(self) -> Generator[Step, None, tuple[Block, Block] | None]:
        """Make slices twice as thick, of pixels and for voxels twice as large: the same task with a known answer."""
        self.progress.enter("Rehearsal: merging slices", self.progress.end + 0.01)
        edge = 2 * _REHEARSAL[self.config.iterations < 20]
        (box,) = yield from background([partial(self._region, edge)], self.progress)
        pairs = [self._halved(i) for i in range(len(self.stacks))]
        if any(pair is None for pair in pairs):
            return None
        region = coarsened(self.grid.crop(*box))
        coarse, fine = zip(*(pair for pair in pairs if pair is not None), strict=True)
        data = [np.ascontiguousarray(np.moveaxis(one.stack.data, -1, 0)) for one in coarse]
        stacks = [one.stack for one in coarse]
        near = [cut(s, d, region) for s, d in zip(stacks, data, strict=True)]
        starts = yield from self._rehearsal_starts(data, stacks, region, [s for s in near if s is not None])
        blocks = []
        for halves in (coarse, fine):
            operators = [SliceAcquisition(one.stack, region, one.transforms) for one in halves]
            values = [np.ascontiguousarray(np.moveaxis(one.stack.data, -1, 0)) for one in halves]
            blocks.append(assemble(operators, values, [one.trust for one in halves], region, starts, True))
        train, test = blocks
        return (train, test) if train is not None and test is not None else None

    def _halved(self, i: int) -> tuple[_Half, _Half] | None:
        """Return a stack with pairs of slices merged, and as it is; both with pixels twice as large."""
        stack, transforms = self.stacks[i], self.transforms[i]
        n, h, w = (size // 2 * 2 for size in (stack.n_slices, stack.height, stack.width))
        if n < 6 or min(h, w) < 16:
            return None

        def binned(values: np.ndarray) -> np.ndarray:
            part = values[..., :n, :h, :w]
            *lead, depth, height, width = part.shape
            return part.reshape(*lead, depth, height // 2, 2, width // 2, 2).mean((-3, -1))

        random = np.random.default_rng(self.seed + i)

        def noisier(values: np.ndarray, share: float) -> np.ndarray:
            # averaging takes noise away; what the job has to cope with is put back
            if not self.noisy:
                return values
            lost = np.float32(self.sigma * np.sqrt(1 - share))
            return np.asarray(values + lost * random.standard_normal(values.shape, np.float32))

        values, trust = binned(self.data[i]), binned(self.trust[i])
        affine = np.array(stack.frame_affine)
        affine[:3, 3] += (affine[:3, 1] + affine[:3, 2]) / 2
        affine[:3, 1:3] *= 2
        positions = stack.positions[:n]
        moved = None if transforms is None else transforms[:n]

        def half(data: np.ndarray, at: np.ndarray, thickness: float, weight: np.ndarray, move: Any) -> _Half:
            made = SliceStack(
                np.moveaxis(data, 0, -1), affine, at, thickness, stack.profile, units=stack.units
            )
            return _Half(made, np.ascontiguousarray(weight, np.float32), move)

        tested = np.array(trust)
        tested[[0, -1]] = 0
        if stack.thickness > 0.75 * stack.spacing:
            step = stack.spacing
            thick = (
                stack.thickness + step
                if stack.profile == "box"
                else np.hypot(stack.thickness, FWHM * step / 2)
            )
            merged = noisier((values[:, 0::2] + values[:, 1::2]) / 2, 1 / 8)
            at = (positions[0::2] + positions[1::2]) / 2
            weight = np.minimum(trust[0::2], trust[1::2])
        else:
            # with gaps between them, slices are left out instead
            merged, at, thick, weight = (
                noisier(values[:, 0::2], 1 / 4),
                positions[0::2],
                stack.thickness,
                trust[0::2],
            )
            tested[0::2] = 0
        coarse = half(merged, at, float(thick), weight, None if moved is None else moved[0::2])
        return coarse, half(values, positions, stack.thickness, tested, moved)

    def _fill(self, starts: dict[str, np.ndarray]) -> Events:
        """Solve block by block, and put the parts together."""
        assert self.volume is not None
        blocks = in_blocks(self.grid.shape, self._margin())
        begin = self.progress.end
        want = self.config.uncertainty
        self.band = np.zeros_like(self.volume) if want else None
        total = sum(float(np.prod([s.stop - s.start for s in outer])) for outer, _ in blocks)
        for outer, core in blocks:
            share = begin + (0.97 - begin) * float(np.prod([s.stop - s.start for s in outer])) / total
            begin = share
            grid = self.grid if len(blocks) == 1 else self.grid.crop(*outer)
            part = {name: np.ascontiguousarray(v[(slice(None), *outer)]) for name, v in starts.items()}
            # the profile has to be inside at faces that cut the volume; beyond the volume its border goes on
            cut_faces = [(o.start > 0, o.stop < n) for o, n in zip(outer, self.grid.shape, strict=True)]
            block = assemble(self.operators, self.data, self.trust, grid, part, cut_faces)
            inner = tuple(
                slice(c.start - o.start, c.stop - o.start) for c, o in zip(core, outer, strict=True)
            )
            mean = np.zeros_like(part["cubic"])
            square = np.zeros_like(mean) if want else None
            if block is None:
                mean += part["cubic"]
            else:

                def take(
                    name: str, volume: np.ndarray, mean: np.ndarray = mean, square: Any = square
                ) -> None:
                    weight = np.float32(self.choice.weights[name])
                    mean += weight * volume
                    if square is not None:
                        square += weight * volume**2

                field = yield from solve(
                    block, self.choice, self.config, self.device.name, self.progress, share, take
                )
                if field is not None:
                    self._keep(field, outer, core)
            self.progress.enter("Combining", share)
            yield from background([partial(self._store, mean, square, inner, core, grid)], self.progress)
            yield Preview(self._squeeze(self.volume), self.grid, "combined")

    def _store(self, mean: np.ndarray, square: np.ndarray | None, inner: Any, core: Any, grid: Grid) -> None:
        assert self.volume is not None
        scale = self.range[:, None, None, None]
        if square is not None and self.band is not None:
            wide = np.hypot(self.choice.band * spread(mean, square), self.choice.floor) * scale
            self.band[core] = np.moveaxis(wide[(slice(None), *inner)], 0, -1)
        values = mean[(slice(None), *inner)] * scale + self.offset[:, None, None, None]
        # outside all slices nothing is known
        hidden = ~covered(self.stacks, grid)[inner]
        values[:, hidden] = self.offset[:, None]
        self.volume[core] = np.moveaxis(values, 0, -1)
        if self.band is not None:
            self.band[core][hidden] = self.range

    def _margin(self) -> int:
        """Voxels around a block that are thrown away: two slices' thickness."""
        widest = max(max(s.thickness, s.spacing) for s in self.stacks)
        return int(np.ceil(2 * widest / float(np.min(self.grid.spacing)))) + 4

    def _keep(self, field: VolumeField, outer: Any, core: Any) -> None:
        """Keep the Gaussians whose centre is in the core of a block."""
        start = np.array([s.start for s in outer], np.float32)
        place = field.mean.cpu().numpy() + start
        low, high = (np.array([getattr(s, end) for s in core]) - 0.5 for end in ("start", "stop"))
        self.fields.append((field, place, np.asarray(((place >= low) & (place < high)).all(1))))

    def model(self) -> GaussianModel | None:
        """Return the finest field of Gaussians in world coordinates."""
        if not self.fields:
            return None
        linear, origin = self.grid.affine[:3, :3], self.grid.affine[:3, 3]
        parts: dict[str, list[np.ndarray]] = {}
        for field, place, keep in self.fields:
            six = field.covariances().double().cpu().numpy()[keep]
            matrices = six[:, [[0, 1, 2], [1, 3, 4], [2, 4, 5]]]
            piece = GaussianModel.from_covariances(
                place[keep].astype(np.float64) @ linear.T + origin,
                linear @ matrices @ linear.T,
                field.amplitude.double().cpu().numpy()[keep] * self.range + self.offset,
                field.log_weight.double().cpu().numpy()[keep],
            )
            for name in ("means", "log_scales", "quaternions", "amplitudes", "log_weights"):
                parts.setdefault(name, []).append(getattr(piece, name))
        return GaussianModel(
            *(np.concatenate(p) for p in parts.values()),
            field="normalised",
            background=np.asarray(self.offset, np.float64),
            cut=CUT_VOLUME,
            units=self.grid.units,
        )

    def best(self) -> Reconstruction | None:
        """Return the state so far as a result, None before the first preview."""
        if self.volume is None:
            return None
        return Reconstruction(self._squeeze(self.volume), self.grid, report=self.report())

    def _squeeze(self, volume: np.ndarray) -> np.ndarray:
        return volume if self.stacks[0].had_channel_axis else volume[..., 0]

    def report(self) -> dict[str, Any]:
        """JSON-able account of the job."""
        choice = self.choice
        single = {k: v for k, v in choice.heldout.items() if k != "combined"}
        plain = {k: v for k, v in single.items() if k in ("cubic", "tikhonov", "tv")}
        baseline = max(plain, key=plain.__getitem__) if plain else None
        motion = None
        if self.motion is not None:
            motion = {**self.motion.summary(), "transforms": [t.tolist() for t in self.motion.transforms]}
        return {
            "task": "slices",
            "device": {"name": self.device.name, "reason": self.device.reason},
            "seconds": round(time.perf_counter() - self.started, 3),
            "iterations": self.config.iterations if self.config.gaussians else 0,
            "n_gaussians": int(sum(keep.sum() for *_, keep in self.fields)),
            "psnr_heldout": choice.heldout.get("combined"),
            "baseline": baseline,
            "baseline_psnr_heldout": plain.get(baseline) if baseline else None,
            "chosen": self.config.combine if self.rehearsed else "fixed weights",
            "best_single": max(single, key=single.__getitem__) if single else None,
            "heldout": {"psnr": choice.heldout},
            "contributions": {k: round(v, 4) for k, v in choice.weights.items()},
            "penalties": {"tv": choice.tv, "tikhonov": choice.tikhonov},
            "band": choice.band,
            "noise": {"sigma": [float(getattr(self, "sigma", 0.0))], "denoised": choice.noisy},
            "stacks": [
                {
                    "name": s.name,
                    "shape": list(s.data.shape),
                    "dtype": str(s.dtype),
                    "thickness": s.thickness,
                    "profile": s.profile,
                    "gain": float(g),
                    "offset": float(o),
                    "sha256": hashlib.sha256(np.ascontiguousarray(s.data).data).hexdigest(),
                }
                for s, g, o in zip(self.stacks, self.gains, self.offsets, strict=True)
            ],
            "consistency": self.consistency,
            "warnings": self._warnings(),
            "motion": motion,
            "grid": {"shape": list(self.grid.shape), "affine": self.grid.affine.tolist()},
            "config": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "versions": versions(),
        }

    def _warnings(self) -> list[str]:
        said = []
        if self.consistency is not None and self.consistency < _CONSISTENT:
            said.append(
                f"The stacks agree poorly where they overlap ({self.consistency:.2f}, 1 is perfect): check that they "
                "are of the same object, their positions and directions, or estimate motion."
            )
        if not self.rehearsed:
            said.append(
                "There were too few or too thick slices to hold some out: fixed weights were used, and the band is a "
                "rule of thumb."
            )
        pixel = float(min(np.min(s.pixel_size) for s in self.stacks))
        if float(np.max(self.grid.spacing)) > _COARSE * pixel:
            said.append(
                f"The grid's voxels ({np.max(self.grid.spacing):g}) are larger than the pixels ({pixel:g}): "
                "detail is lost to aliasing; reconstruct at the size of the pixels, then average."
            )
        if self.motion is not None:
            errors = np.concatenate(self.motion.error)
            shift, turn = np.median(errors, 0)
            if shift > pixel or turn > _UNSURE_DEGREES:
                said.append(
                    f"The motion is poorly determined (standard error {shift:.2g} and {turn:.2g} degrees): compare "
                    "with the result without motion."
                )
        return said

    def _result(self) -> Reconstruction:
        assert self.volume is not None
        return Reconstruction(
            self._squeeze(self.volume),
            self.grid,
            self.model(),
            self.report(),
            None if self.band is None else self._squeeze(self.band),
        )
