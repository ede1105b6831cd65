"""One stack of thin slices to a dense volume: candidates between the slices, combiner, result."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from napari_innergs.baselines import denoise as noise_of
from napari_innergs.config import SliceConfig
from napari_innergs.data import SliceStack
from napari_innergs.fit import combine
from napari_innergs.fit.candidates import CandidateSet, Fields, channel_scale
from napari_innergs.fit.engine import Done, Event, Preview, Progress, Step, background
from napari_innergs.fit.field import CUT_FIT
from napari_innergs.geometry.grid import Grid
from napari_innergs.model import GaussianModel
from napari_innergs.result import Reconstruction
from napari_innergs.tasks.versions import versions

Events = Generator[Event, None, None]

# Planes of all candidates are held for this many pixels at a time.
_CHUNK_PIXELS = 2_000_000
_PREVIEW_EVERY_S = 1.0
# No longer than this is spent on showing the Gaussians half-way.
_PEEK_S = 3.0
# Gaussians that are turned into a model at a time.
_PIECE = 250_000


@dataclass
class SlicesState:
    """What a later job can start from: the fields and, on request, everything else."""

    fields: Fields
    shape: tuple[int, ...]
    candidates: CandidateSet | None = None


class ThinJob:
    """One reconstruction: a stack, a grid, and how far it has come."""

    def __init__(
        self,
        stack: SliceStack,
        grid: Grid,
        config: SliceConfig,
        device: Any,
        seed: int,
        warm: Reconstruction | None,
        keep: bool,
    ) -> None:
        self.stack, self.grid, self.config, self.device, self.seed = stack, grid, config, device, seed
        self.keep = keep
        state = getattr(warm, "_state", None)
        # another size or number of slices has nothing in common with the state
        self.warm: SlicesState | None = (
            state if state is not None and state.shape == stack.data.shape else None
        )
        self.started = time.perf_counter()
        self.progress = Progress()
        self.volume: np.ndarray | None = None
        self.band: np.ndarray | None = None
        to_frame = np.linalg.inv(stack.frame_affine) @ grid.affine
        step = to_frame[:3, :3]
        self.corner = to_frame[:3, 3]
        whole = np.rint(self.corner[1:])
        self.aligned = bool(
            np.allclose(step[1:, 1:], np.eye(2), atol=1e-6)
            and np.allclose(step[0, 1:], 0, atol=1e-6)
            and np.allclose(step[1:, 0], 0, atol=1e-6)
            and np.allclose(self.corner[1:], whole, atol=1e-3)
            and (whole >= 0).all()
            and whole[0] + grid.shape[1] <= stack.height
            and whole[1] + grid.shape[2] <= stack.width
        )
        if self.aligned:
            wanted = self.corner[0] + step[0, 0] * np.arange(grid.shape[0])
            self.positions = wanted.clip(stack.positions[0], stack.positions[-1])
            self.outside = np.abs(wanted - self.positions) > 0.501 * abs(step[0, 0])
            r, c = (int(v) for v in whole)
            self.window = (slice(r, r + grid.shape[1]), slice(c, c + grid.shape[2]))
        else:
            # dense planes of the stack itself, no coarser than the grid or the pixels, resampled at the end
            pitch = min(float(np.min(grid.spacing)), float(np.mean(stack.pixel_size)))
            extent = stack.positions[-1] - stack.positions[0]
            count = max(2, int(np.ceil(extent / pitch)) + 1)
            self.positions = np.linspace(stack.positions[0], stack.positions[-1], count)
            self.outside = np.zeros(count, bool)
            self.window = (slice(None), slice(None))
            self.to_frame = to_frame
        self.candidates: CandidateSet | None = None
        self.combiner: combine.Combiner | None = None
        self.heldout: dict[str, Any] = {}

    def run(self) -> Events:
        """Yield the events of the whole job."""
        config, stack, progress = self.config, self.stack, self.progress
        progress.enter("Reading the slices", 0.01)
        (values,) = yield from background([stack.values], progress)
        trust = None if stack.mask is None else stack.mask.astype(np.float32)
        self.offset, self.range = channel_scale(values)
        sigma = yield from self._noise(values)
        self.noisy = config.denoise == "auto" and bool((sigma > noise_of.NOISE_THRESHOLD * self.range).any())
        yield from self._first_preview(values)
        clean = values
        if self.noisy:
            progress.enter("Denoising the slices", 0.08)
            clean = yield from self._denoise(values, sigma)
        self.sigma = sigma
        combiner = yield from self._rehearse(values, trust)
        candidates = CandidateSet(
            clean, stack.positions, config, trust, (self.offset, self.range), values if self.noisy else None,
            self.device.name,
        )  # fmt: skip
        self.candidates = candidates
        yield from candidates.prepare(progress, 0.8, self.warm.fields if self.warm else None, self._peek)
        if combiner is None or combiner.names != candidates.names:
            combiner = combine.unlearned(candidates.names, stack.n_channels, config.combine)
            combiner.floor = sigma
        self.combiner = combiner
        yield from self._calibrate(candidates, combiner)
        yield from self._fill(values, candidates, combiner)
        if not self.aligned:
            yield from self._resample()
        progress.enter("Finishing", 1.0)
        if not self.keep:
            candidates.release()
        del values, clean
        (result,) = yield from background([self._result], progress)
        kept = candidates if self.keep else None
        fields = {name: field.to("cpu") for name, field in candidates.fields.items()}
        result._state = SlicesState(fields, stack.data.shape, kept)
        yield Done(result)

    def _noise(self, values: np.ndarray) -> Generator[Step, None, np.ndarray]:
        some = range(0, len(values), max(1, len(values) // 32))

        def levels(j: int) -> list[float]:
            return [noise_of.noise_level(values[j, ..., c]) for c in range(values.shape[-1])]

        made = yield from background((partial(levels, j) for j in some), self.progress)
        return np.median(made, 0).astype(np.float32)

    def _denoise(self, values: np.ndarray, sigma: np.ndarray) -> Generator[Step, None, np.ndarray]:
        def one(j: int) -> np.ndarray:
            return np.stack(
                [noise_of.denoise(values[j, ..., c], sigma[c]) for c in range(values.shape[-1])], -1
            )

        made = yield from background(
            (partial(one, j) for j in range(len(values))), self.progress, total=len(values)
        )
        return np.stack(made)

    def _first_preview(self, values: np.ndarray) -> Events:
        """Linear interpolation, at once: the volume that everything later replaces plane by plane."""
        self.progress.enter("First preview", 0.03)
        quick = CandidateSet(
            values,
            self.stack.positions,
            self.config.model_copy(update={"methods": ("linear",), "gaussians": ()}),
        )
        shape = (len(self.positions), *values[0][self.window].shape)
        self.volume = np.empty(shape, np.float32)

        def fill(m: int) -> None:
            assert self.volume is not None
            self.volume[m] = quick.planes(self.positions[m : m + 1])[0, 0][self.window]

        yield from background((partial(fill, m) for m in range(shape[0])), self.progress, total=shape[0])
        yield self._preview("linear interpolation")

    def _peek(self, candidates: CandidateSet, name: str, iteration: int, total: int) -> Events:
        """Show what the Gaussians look like half-way through their fit."""
        if iteration != total // 2:
            return
        at = candidates.relative(self.positions)

        def fill(m: int) -> None:
            assert self.volume is not None
            self.volume[m] = candidates.field_planes(name, at[m : m + 1])[0][self.window]

        phase = self.progress.phase
        started = time.monotonic()
        for m in range(len(at)):
            yield from background([partial(fill, m)], self.progress)
            if time.monotonic() - started > _PEEK_S:
                break
        self.progress.phase = phase
        yield self._preview("Gaussians, half-way")

    def _preview(self, label: str) -> Preview:
        assert self.volume is not None
        if self.aligned:
            return Preview(self._squeeze(self.volume), self.grid, label)
        return Preview(self._squeeze(self.volume), self._native_grid(), label)

    def _native_grid(self) -> Grid:
        affine = self.stack.frame_affine.copy()
        affine[:3, 3] += affine[:3, 0] * self.positions[0]
        affine[:3, 0] *= self.positions[1] - self.positions[0]
        return Grid((len(self.positions), self.stack.height, self.stack.width), affine, self.stack.units)

    def _squeeze(self, volume: np.ndarray) -> np.ndarray:
        return volume if self.stack.had_channel_axis else volume[..., 0]

    def _rehearse(
        self, values: np.ndarray, trust: np.ndarray | None
    ) -> Generator[Step, None, combine.Combiner | None]:
        """Leave every second slice out, at half the in-plane size, and learn how to combine the candidates."""
        n, h, w, _ = values.shape
        if n < 3:
            return None
        fold = 2 if min(h, w) >= 48 else 1
        kept, left = np.arange(0, n, 2), np.arange(1, n - 1, 2)
        truth = _bin(values, fold)
        small, noisy = truth, None
        if self.noisy:
            # binning averages noise away; what the job has to cope with is put back
            lost = self.sigma * np.float32(np.sqrt(1 - 1 / fold**2))
            random = np.random.default_rng(self.seed)
            noisy = truth + lost * random.standard_normal(truth.shape, np.float32)
            self.progress.enter("Rehearsal: denoising", self.progress.end + 0.01)
            small = yield from self._denoise(noisy, self.sigma)
        believe = None if trust is None else _bin(trust[..., None], fold)[..., 0]
        positions = self.stack.positions
        rehearsal = CandidateSet(
            small[kept],
            positions[kept],
            self.config,
            None if believe is None else believe[kept],
            (self.offset, self.range),
            None if noisy is None else noisy[kept],
            self.device.name,
        )
        few = left[np.unique(np.linspace(0, len(left) - 1, 4).astype(int))]

        def score(
            candidates: CandidateSet, name: str, iteration: int, total: int
        ) -> Generator[Step, None, None]:
            """Follow how well the Gaussians predict some of the slices that were left out."""
            if iteration % max(1, total // 10) and iteration != total:
                return
            at = candidates.relative(positions[few])
            (planes,) = yield from background([partial(candidates.field_planes, name, at)], self.progress)
            rms = float(np.sqrt(np.mean(np.square((planes - truth[few]) / self.range))))
            yield self.progress.step(
                iteration / total, iteration=iteration, total=total, psnr_heldout=_decibel(rms)
            )

        yield from self._named(rehearsal.prepare(self.progress, 0.25, peek=score), "Rehearsal")
        self.progress.enter("Rehearsal: predicting slices left out", 0.28)
        chunk = max(1, _CHUNK_PIXELS // (small[0].size * len(rehearsal.names)))
        parts = [left[i : i + chunk] for i in range(0, len(left), chunk)]
        made = yield from background(
            (partial(rehearsal.planes, positions[part]) for part in parts),
            self.progress,
            total=len(parts),
            workers=1,
        )
        planes = np.concatenate(made, 1)
        # binning averages noise away: the job has more of it than the rehearsal
        floor = self.sigma * np.float32(np.sqrt(1 - 1 / fold**2))
        detail = (yield from self._noise(truth)) if fold > 1 else self.sigma
        gap = float(self.stack.spacing / np.mean(self.stack.pixel_size))
        full, binned = (float(np.mean(level / self.range)) for level in (self.sigma, detail))
        scale = combine.band_scale_of(full, binned, gap) if fold > 1 else 1.0
        (combiner,) = yield from background(
            [
                partial(
                    combine.learn,
                    rehearsal.names,
                    planes,
                    truth[left],
                    self.range,
                    floor,
                    None if believe is None else believe[left],
                    self.config.combine,
                    scale,
                )
            ],
            self.progress,
        )
        self.heldout = {
            "slices": len(left),
            "binning": fold,
            "psnr": {name: _decibel(value) for name, value in combiner.rms.items()},
        }
        yield self.progress.step(1.0, psnr_heldout=self.heldout["psnr"]["combined"])
        return combiner

    def _named(self, steps: Generator[Step, None, None], prefix: str) -> Generator[Step, None, None]:
        for step in steps:
            yield replace(step, phase=f"{prefix}: {step.phase[0].lower()}{step.phase[1:]}")

    def _calibrate(self, candidates: CandidateSet, combiner: combine.Combiner) -> Events:
        """Ranks of the disagreement in the job itself, from a few mid-gap planes."""
        self.progress.enter("Calibrating", 0.82)
        middles = (self.stack.positions[1:] + self.stack.positions[:-1]) / 2
        chosen = middles[np.unique(np.linspace(0, len(middles) - 1, 8).astype(int))]

        def sample() -> np.ndarray:
            return np.concatenate([candidates.planes(chosen[i : i + 1]) for i in range(len(chosen))], 1)

        (planes,) = yield from background([sample], self.progress)
        combiner.calibrate(planes)

    def _fill(self, values: np.ndarray, candidates: CandidateSet, combiner: combine.Combiner) -> Events:
        self.progress.enter("Combining", 0.98 if self.aligned else 0.93)
        assert self.volume is not None
        want = self.config.uncertainty
        self.band = np.empty_like(self.volume) if want else None
        per_chunk = max(1, _CHUNK_PIXELS // (values[0].size * len(candidates.names)))
        observed = {}
        if not self.noisy:
            gap = np.diff(self.stack.positions).min()
            for m, position in enumerate(self.positions):
                j = int(np.argmin(np.abs(self.stack.positions - position)))
                if abs(self.stack.positions[j] - position) < 1e-4 * gap:
                    observed[m] = j

        def chunk(part: np.ndarray) -> None:
            assert self.volume is not None
            estimate, band = combiner.apply(candidates.planes(self.positions[part]), want)
            for i, m in enumerate(part):
                self.volume[m] = estimate[i][self.window]
                if band is not None and self.band is not None:
                    self.band[m] = band[i][self.window]

        mask = self.stack.mask

        def copy_measured() -> None:
            assert self.volume is not None
            for m, j in observed.items():
                here = slice(None) if mask is None else mask[j][self.window]
                self.volume[m][here] = values[j][self.window][here]
                if self.band is not None:
                    self.band[m][here] = 0

        copy_measured()
        self.volume[self.outside] = self.offset
        if self.band is not None:
            self.band[self.outside] = self.range
        missing = np.array(
            [
                m
                for m in range(len(self.positions))
                if (mask is not None or m not in observed) and not self.outside[m]
            ],
            int,
        )
        parts = [missing[i : i + per_chunk] for i in range(0, len(missing), per_chunk)]
        shown, done = time.monotonic(), 0
        for start in range(0, len(parts), 4):
            group = parts[start : start + 4]
            yield from background((partial(chunk, part) for part in group), self.progress, workers=2)
            done += len(group)
            yield self.progress.step(done / len(parts))
            if time.monotonic() - shown > _PREVIEW_EVERY_S:
                shown = time.monotonic()
                yield self._preview("combining")
        if mask is not None:
            # estimates have been written over whole planes: what was measured and is trusted stays
            copy_measured()

    def _resample(self) -> Events:
        """Carry the stack's own dense planes to a grid of any place and direction."""
        self.progress.enter("Resampling to the grid", 0.98)
        native = self._native_grid()
        matrix = np.linalg.inv(native.affine) @ self.grid.affine
        # outside: the lowest value, of which the error may be as large as the range
        volumes = [(v, f) for v, f in ((self.volume, self.offset), (self.band, self.range)) if v is not None]
        made = []
        for volume, fills in volumes:
            out = np.empty((*self.grid.shape, volume.shape[-1]), np.float32)
            slabs = [slice(z, min(z + 8, self.grid.shape[0])) for z in range(0, self.grid.shape[0], 8)]
            yield from background(
                (partial(_resample_slab, volume, matrix, slab, out, fills) for slab in slabs),
                self.progress,
                total=len(slabs),
            )
            made.append(out)
        self.volume = made[0]
        self.band = made[1] if len(made) > 1 else None

    def distance(self) -> np.ndarray:
        """Distance of the voxels to the nearest slice, along the normal, in world units: (z, y, x)."""
        to_frame = np.linalg.inv(self.stack.frame_affine) @ self.grid.affine
        cosine = abs(float(self.stack.normal @ self.stack.frame_affine[:3, 0]))
        t = np.full((1, 1, 1), to_frame[0, 3])
        for axis, index in enumerate(np.ogrid[tuple(slice(size) for size in self.grid.shape)]):
            if abs(to_frame[0, axis]) > 1e-9 * np.abs(to_frame[0, :3]).max():
                t = t + to_frame[0, axis] * index
        slices = self.stack.positions
        at = np.searchsorted(slices, t).clip(1, len(slices) - 1)
        near = np.minimum(np.abs(t - slices[at - 1]), np.abs(slices[at] - t))
        # the same for a whole plane where the grid is aligned: a view then, not a volume
        return np.broadcast_to((near * cosine).astype(np.float32), self.grid.shape)

    def model(self) -> GaussianModel | None:
        """Return the (first) field of Gaussians in world coordinates."""
        candidates = self.candidates
        if candidates is None or not candidates.fields:
            return None
        name, field = next(iter(candidates.fields.items()))
        field = field.to("cpu")
        to_world = self.stack.frame_affine.copy()
        to_world[:3, 3] += to_world[:3, 0] * candidates.origin
        to_world[:3, 0] *= candidates.gap
        linear = to_world[:3, :3]
        offset, scale = candidates.field_scale(name)
        options = {
            "field": name,
            "background": field.background.double().numpy() * scale + offset,
            "cut": CUT_FIT,
            "units": self.stack.units,
        }

        def convert(index: slice) -> GaussianModel:
            part = field.select(torch.arange(len(field))[index])
            six = part.parts()[0].double().numpy()
            matrices = six[:, [[0, 1, 2], [1, 3, 4], [2, 4, 5]]]
            return GaussianModel.from_covariances(
                part.mean.double().numpy() @ linear.T + to_world[:3, 3],
                linear @ matrices @ linear.T,
                part.amplitude.double().numpy() * scale + offset,
                part.log_weight.double().numpy(),
                **options,
            )

        # eigenvectors in double precision take ten times the memory of the model: a piece at a time
        parts = [convert(slice(k, k + _PIECE)) for k in range(0, len(field), _PIECE)]
        names = ("means", "log_scales", "quaternions", "amplitudes", "log_weights")
        joined = (np.concatenate([getattr(part, name) for part in parts]) for name in names)
        return GaussianModel(*joined, **options)

    def best(self) -> Reconstruction | None:
        """Return the state so far as a result, None before the first preview."""
        if self.volume is None:
            return None
        grid = self.grid if self.volume.shape[:3] == self.grid.shape else self._native_grid()
        return Reconstruction(self._squeeze(self.volume), grid, report=self.report())

    def report(self) -> dict[str, Any]:
        """JSON-able account of the job."""
        decibels = self.heldout.get("psnr", {})
        single = {k: v for k, v in decibels.items() if k != "combined"}
        plain = {k: v for k, v in single.items() if not k.startswith("gaussians")}
        baseline = max(plain, key=plain.__getitem__) if plain else None
        digest = hashlib.sha256(np.ascontiguousarray(self.stack.data).data).hexdigest()
        return {
            "task": "slices",
            "device": {"name": self.device.name, "reason": self.device.reason},
            "seconds": round(time.perf_counter() - self.started, 3),
            "iterations": self.config.iterations if self.config.gaussians else 0,
            "n_gaussians": self.candidates.n_gaussians if self.candidates else 0,
            "psnr_heldout": decibels.get("combined"),
            "baseline": baseline,
            "baseline_psnr_heldout": plain.get(baseline) if baseline else None,
            "chosen": self.config.combine,
            "best_single": max(single, key=single.__getitem__) if single else None,
            "heldout": self.heldout,
            "contributions": self.combiner.mean_weights() if self.combiner else {},
            "noise": {
                "sigma": [float(s) for s in getattr(self, "sigma", [])],
                "denoised": getattr(self, "noisy", False),
            },
            "input": {
                "name": self.stack.name,
                "shape": list(self.stack.data.shape),
                "dtype": str(self.stack.dtype),
                "sha256": digest,
                "positions": [float(p) for p in self.stack.positions],
            },
            "grid": {"shape": list(self.grid.shape), "affine": self.grid.affine.tolist()},
            "config": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "versions": versions(),
        }

    def _result(self) -> Reconstruction:
        assert self.volume is not None
        return Reconstruction(
            self._squeeze(self.volume),
            self.grid,
            self.model(),
            self.report(),
            None if self.band is None else self._squeeze(self.band),
            self.distance(),
        )


def _bin(values: np.ndarray, fold: int) -> np.ndarray:
    if fold == 1:
        return values
    n, h, w, c = values.shape
    h, w = h // fold * fold, w // fold * fold
    return values[:, :h, :w].reshape(n, h // fold, fold, w // fold, fold, c).mean((2, 4), dtype=np.float32)


def _decibel(rms: float) -> float:
    return float(round(-20 * np.log10(max(rms, 1e-12)), 3))


def _resample_slab(
    volume: np.ndarray, matrix: np.ndarray, slab: slice, out: np.ndarray, fills: np.ndarray
) -> None:
    from scipy.ndimage import map_coordinates

    z, y, x = np.mgrid[slab, : out.shape[1], : out.shape[2]].astype(np.float32)
    where = [matrix[i, 0] * z + matrix[i, 1] * y + matrix[i, 2] * x + matrix[i, 3] for i in range(3)]
    outside = np.zeros(z.shape, bool)
    for axis, limit in zip(where, volume.shape[:3], strict=True):
        outside |= (axis < -0.5) | (axis > limit - 0.5)
    for c in range(volume.shape[-1]):
        part = map_coordinates(volume[..., c], where, order=1, mode="nearest", prefilter=False)
        part[outside] = fills[c]
        out[slab, ..., c] = part
