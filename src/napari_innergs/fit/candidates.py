"""The candidates: conventional and Gaussian estimates of the planes between the slices, made on demand.

Everything a candidate needs is prepared once (slopes, flows, fitted Gaussians); planes are then made a few at a
time, so that a large volume never has to be held once for each candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from napari_innergs.baselines import flow as flows_of
from napari_innergs.baselines import interpolate
from napari_innergs.config import SliceConfig
from napari_innergs.fit import field as fields
from napari_innergs.fit.engine import Progress, Step, background

# More Gaussians than this and the spacing grows: 3 million take about 1.5 GiB while they are fitted.
MAX_GAUSSIANS = 3_000_000
# The normalised field that is fitted to slices with their noise, measured best at 4 % of the range.
_RAW, _RAW_SPACING, _RAW_ITERATIONS = "normalised-raw", 1.5, 15

Steps = Generator[Step, None, None]
Fields = dict[str, fields.SliceField]
# Called after each step of a fit with the field's name, the step and their number; what it yields is passed on.
Peek = Callable[["CandidateSet", str, int, int], Generator[Any, None, None]]


class CandidateSet:
    """Estimates of planes from the slices of one stack.

    Parameters
    ----------
    values : ndarray, shape (n, h, w, c), float32
        Slices in order of position.
    positions : ndarray, shape (n,)
        Positions, any unit.
    config : SliceConfig
        Which candidates, and how the Gaussians are fitted.
    weights : ndarray or None, shape (n, h, w), float32
        Trust in each pixel, used by the Gaussian fits.
    scale : (ndarray, ndarray) or None
        Offset and range of each channel; measured when None.
    noisy : ndarray or None, shape (n, h, w, c), float32
        The slices before they were denoised: one more field is fitted to them. It averages the noise itself, so
        its errors are largely independent of what total variation leaves.
    """

    def __init__(
        self,
        values: np.ndarray,
        positions: np.ndarray,
        config: SliceConfig,
        weights: np.ndarray | None = None,
        scale: tuple[np.ndarray, np.ndarray] | None = None,
        noisy: np.ndarray | None = None,
        backend: str = "auto",
    ) -> None:
        self.values, self.config, self.weights, self.backend = values, config, weights, backend
        self.noisy = noisy
        self.gap = float(np.median(np.diff(positions)))
        self.origin = float(positions[0])
        self.positions = (positions - self.origin) / self.gap
        self.offset, self.range = scale if scale is not None else channel_scale(values)
        self.slopes: dict[str, np.ndarray | None] = {}
        self.flows: dict[str, list[np.ndarray]] = {}
        self.mean_flow: list[tuple[np.ndarray, np.ndarray]] | None = None
        self.fields: dict[str, fields.SliceField] = {}
        self.residuals: dict[str, np.ndarray] = {}

    @property
    def names(self) -> list[str]:
        """Names of the candidates, in the order of `planes`."""
        out: list[str] = [*self.config.methods]
        for name in self.fields:
            out.append(f"gaussians-{name}")
            if name in self.residuals:
                out.append(f"gaussians-{name}+residual")
        return out

    def release(self) -> None:
        """Forget what is only needed to make planes: slopes, flows and residuals."""
        self.slopes, self.flows, self.mean_flow, self.residuals = {}, {}, None, {}

    @property
    def n_gaussians(self) -> int:
        """Number of Gaussians over all fields."""
        return sum(len(one) for one in self.fields.values())

    def prepare(
        self, progress: Progress, share: float, warm: Fields | None = None, peek: Peek | None = None
    ) -> Generator[Any, None, None]:
        """Compute slopes, flows and fields; takes the job to `share` of its whole."""
        start = progress.end if progress.phase else 0.0
        span = share - start
        flowing = [m for m in self.config.methods if m.startswith("flow")]
        progress.enter("Interpolating", start + 0.05 * span)
        splines = [m for m in self.config.methods if m in ("cubic", "pchip")]
        made = yield from background(
            (partial(interpolate.slopes, self.values, self.positions, m) for m in splines),  # type: ignore[arg-type]
            progress,
            total=max(len(splines), 1),
        )
        self.slopes = dict(zip(splines, made, strict=True))
        needs_shear = bool(self.config.gaussians) and self.config.shear_from_flow
        for i, method in enumerate(flowing or (["flow-dis"] if needs_shear else [])):
            progress.enter(
                f"Flow between slices ({method[5:]})",
                start + span * (0.05 + 0.4 * (i + 1) / max(len(flowing), 1)),
            )
            yield from self._flow(method, progress)
        if self.flows:
            progress.enter("Merging flows", progress.end)
            self.mean_flow = yield from background(
                (partial(self._merge, j) for j in range(len(self.values) - 1)),
                progress,
                total=len(self.values) - 1,
            )
        names: list[str] = [*self.config.gaussians]
        if self.noisy is not None and "normalised" in names:
            names.append(_RAW)
        for i, name in enumerate(names):
            progress.enter(f"Fitting Gaussians ({name})", start + span * (0.45 + 0.55 * (i + 1) / len(names)))
            yield from self._fit(name, progress, warm, peek)
        progress.enter("Gaussians ready", share)

    def _flow(self, method: str, progress: Progress) -> Steps:
        window = [flows_of.intensity_window(self.values[..., c]) for c in range(self.values.shape[-1])]

        def pair(j: int, c: int, way: int) -> np.ndarray:
            first, second = (self.values[j, ..., c], self.values[j + 1, ..., c])[:: 1 if way == 0 else -1]
            # half precision keeps 1/64 pixel up to displacements of 16, below the warp's own resolution
            return flows_of.pair_flow(first, second, method, window[c]).astype(np.float16)  # type: ignore[arg-type]

        n, channels = len(self.values) - 1, self.values.shape[-1]
        tasks: list[Callable[[], Any]] = [
            partial(pair, j, c, way) for j in range(n) for c in range(channels) for way in (0, 1)
        ]
        made = yield from background(tasks, progress, total=len(tasks))
        # (gap, channel, way) -> one array (2, c, h, w, 2) for each gap
        self.flows[method] = [
            np.stack(made[j * 2 * channels : (j + 1) * 2 * channels])
            .reshape(channels, 2, *made[0].shape)
            .swapaxes(0, 1)
            for j in range(n)
        ]

    def _merge(self, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean of the flows over methods, and over channels by local detail."""
        mean = np.asarray(np.mean([flow[j] for flow in self.flows.values()], 0, dtype=np.float32))
        channels = self.values.shape[-1]
        if channels == 1:
            return mean[0, 0], mean[1, 0]
        detail = []
        for c in range(channels):
            image = (self.values[j, ..., c] + self.values[j + 1, ..., c]) / (2 * self.range[c])
            detail.append(gaussian_filter(np.square(np.gradient(image)).sum(0), 4) + 1e-8)
        share = np.stack(detail) / np.sum(detail, 0)
        merged = (mean * share[None, ..., None]).sum(1)
        return merged[0], merged[1]

    def _fit(
        self, name: str, progress: Progress, warm: Fields | None, peek: Peek | None
    ) -> Generator[Any, None, None]:
        n, h, w, _ = self.values.shape
        offset, scale = self.field_scale(name)
        source = self.noisy if name == _RAW and self.noisy is not None else self.values
        scaled = (source - offset) / scale
        spacing = max(self.config.gaussian_spacing, float(np.sqrt(n * h * w / MAX_GAUSSIANS)))
        iterations = self.config.iterations
        if name == _RAW:
            # fewer Gaussians and steps: what cannot follow the noise averages it
            spacing, iterations = _RAW_SPACING * spacing, min(iterations, _RAW_ITERATIONS)
        flows = self.mean_flow if self.config.shear_from_flow else None
        cold = partial(
            fields.start_field,
            scaled,
            self.positions,
            flows,
            spacing=spacing,
            through=self.config.through_sigma,
            normalised=name != "additive",
        )
        starts: list[Callable[[], fields.SliceField]] = [cold]
        if warm is not None and name in warm:
            starts.append(partial(fields.carried_over, warm[name], self.positions, flows))
        made = yield from background(starts, progress)
        ready = [one.to(self.backend) for one in made]
        field = ready[0]
        if len(ready) > 1:
            measure = (partial(fields.misfit, one, scaled, self.positions, self.backend) for one in ready)
            misfits = yield from background(measure, progress, workers=1)
            if misfits[1] < misfits[0]:
                # the Gaussians of the previous time point are near: half the steps do
                field, iterations = ready[1], (iterations + 1) // 2
        self.fields[name] = field
        steps = fields.fit_field(
            field,
            scaled,
            self.positions,
            iterations,
            weights=self.weights,
            densify=self.config.densify and name != _RAW,
            free_shape=not self.config.shear_from_flow,
            structural=self.config.structural_loss,
            backend=self.backend,
        )
        for _ in range(iterations):
            # an iteration on a large stack takes seconds: it runs in a thread so that cancelling does not wait
            ((iteration, loss),) = yield from background([partial(next, steps)], progress)
            yield progress.step(iteration / iterations, iteration=iteration, total=iterations, loss=loss)
            if peek is not None:
                yield from peek(self, name, iteration, iterations)
        if self.mean_flow is not None and name != _RAW:
            made = yield from background(
                (partial(self._residual, name, j) for j in range(n)), progress, workers=1
            )
            self.residuals[name] = np.stack(made)

    def _residual(self, name: str, j: int) -> np.ndarray:
        return self.values[j] - self.field_planes(name, self.positions[j : j + 1])[0]

    def relative(self, positions: np.ndarray) -> np.ndarray:
        """Return positions in median gaps from the first slice."""
        return (np.asarray(positions, np.float64) - self.origin) / self.gap

    def field_planes(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Return a field by itself at positions in median gaps, (m, h, w, c)."""
        picture = self.fields[name].render(positions, self.values.shape[1:3], self.backend)
        offset, scale = self.field_scale(name)
        return np.moveaxis(picture.cpu().numpy(), 1, -1) * scale + offset

    def field_scale(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return offset and range that take a field's values to intensities; an additive field has no offset."""
        return (self.offset if name != "additive" else np.zeros_like(self.offset)), self.range

    def locate(self, position: float) -> tuple[int, float]:
        """Return the gap that holds a position (in median gaps) and the share of it."""
        gap = int(
            np.clip(np.searchsorted(self.positions, position, side="right") - 1, 0, len(self.positions) - 2)
        )
        return gap, float((position - self.positions[gap]) / (self.positions[gap + 1] - self.positions[gap]))

    def planes(self, positions: np.ndarray) -> np.ndarray:
        """Return all candidates at positions (world units): (K, m, h, w, c) float32."""
        at = self.relative(positions)
        gaussian = {name: self.field_planes(name, at) for name in self.fields}
        out = np.empty((len(self.names), len(at), *self.values.shape[1:]), np.float32)
        for m, position in enumerate(at):
            gap, share = self.locate(position)
            for k, method in enumerate(self.config.methods):
                if method.startswith("flow"):
                    out[k, m] = self._flow_plane(self.flows[method][gap], gap, share)
                else:
                    out[k, m] = interpolate.plane(
                        self.values,
                        self.positions,
                        gap,
                        share,
                        method,  # type: ignore[arg-type]
                        self.slopes.get(method),
                    )
            k = len(self.config.methods)
            for name, field_planes in gaussian.items():
                out[k, m] = field_planes[m]
                k += 1
                if name in self.residuals:
                    out[k, m] = field_planes[m] + self._residual_plane(name, gap, share)
                    k += 1
        return out

    def _flow_plane(self, pair: np.ndarray, gap: int, share: float) -> np.ndarray:
        out = np.empty(self.values.shape[1:], np.float32)
        for c in range(self.values.shape[-1]):
            to_low, to_high = flows_of.towards(
                pair[0, c].astype(np.float32), pair[1, c].astype(np.float32), share
            )
            low = flows_of.warp(np.ascontiguousarray(self.values[gap, ..., c]), to_low)
            high = flows_of.warp(np.ascontiguousarray(self.values[gap + 1, ..., c]), to_high)
            out[..., c] = (1 - share) * low + share * high
        return out

    def _residual_plane(self, name: str, gap: int, share: float) -> np.ndarray:
        assert self.mean_flow is not None
        to_low, to_high = flows_of.towards(*self.mean_flow[gap], share)
        residual = self.residuals[name]
        low, high = flows_of.warp(residual[gap], to_low), flows_of.warp(residual[gap + 1], to_high)
        return ((1 - share) * low + share * high).reshape(self.values.shape[1:])


def channel_scale(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return offset and range of each channel (range 1 for a constant one)."""
    flat = values.reshape(-1, values.shape[-1])
    low, high = flat.min(0), flat.max(0)
    return low.astype(np.float32), np.where(high > low, high - low, 1).astype(np.float32)
