"""X-ray projections to a volume of attenuation: filtered backprojection, total variation, Gaussians, result."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_filter

from napari_innergs.baselines.fdk import fdk
from napari_innergs.baselines.preprocess import LineIntegrals, check_direction, scan_line_integrals
from napari_innergs.baselines.xray_tv import FLAT, TvReconstruction, flatness, guided_tv, reconstruct_tv
from napari_innergs.config_projections import ProjectionConfig
from napari_innergs.device import describe_device
from napari_innergs.fit.attenuation import (
    AttenuationField,
    DensityControl,
    Radiographs,
    fit_to_projections,
    fit_to_views,
    fit_to_volume,
    ray_weights,
    start_attenuation,
)
from napari_innergs.fit.engine import (
    HEARTBEAT_S,
    Done,
    Event,
    Preview,
    Progress,
    Step,
    background,
    drive,
    thread_count,
)
from napari_innergs.geometry.grid import Grid, available_memory, format_bytes
from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.result import Reconstruction
from napari_innergs.scan import Scan
from napari_innergs.tasks.events import Events, guarded, to_the_end
from napari_innergs.tasks.versions import versions

# The total variation needs views to hold out; with fewer, this weight.
_FEW_VIEWS, _PLAIN_WEIGHT = 4, 2.0**-11
# The range that scales attenuation to about one.
_BRIGHT = 99.5
#: Share of the Gaussians in the mean with the total variation, where noise hides their difference.
SHARE = 0.25
# How fast it falls with the difference.
_STRICT = 1.5
# Without a guide: flatness up to which there is no share, and from which it is whole. Objects of flat parts lose by
# the smoother Gaussians, others gain (measured).
_NONE, _WHOLE = 0.25, 0.32
# The 90 % band: a factor on the difference of the two, to which a share of its mean is added, and the change that
# borders displaced by a share of a voxel would make (measured).
_BAND, _EVERYWHERE, _DISPLACED = 1.2, 0.25, 0.25
# Bytes at the peak: for each voxel, pixel and Gaussian; process seconds for each voxel or pixel and pass or step.
_BYTES_VOXEL, _BYTES_PIXEL, _BYTES_GAUSSIAN = 60, 24, 900
_SECONDS_RAY, _SECONDS_VOXEL_STEP = 2.2e-9, 1.8e-7


class _Stopped(Exception):
    """Ends work in a thread whose consumer has gone."""


def interruptible(
    work: Callable[[Callable[[int, int], None]], Any], progress: Progress
) -> Generator[Step, None, Any]:
    """Run work that reports its steps in a thread; it waits while nobody asks, and ends when nobody will.

    Parameters
    ----------
    work : callable
        Is given a callable that takes what is done and the total, and calls it often.
    progress : Progress
        Of the present phase.

    Returns
    -------
    Whatever `work` returns.
    """
    asked, gone = threading.Event(), threading.Event()
    state = [0.0]

    def step(done: int, total: int) -> None:
        state[0] = done / max(total, 1)
        asked.wait()
        if gone.is_set():
            raise _Stopped

    pool = ThreadPoolExecutor(1)
    asked.set()
    future = pool.submit(work, step)
    try:
        while not future.done():
            wait([future], timeout=HEARTBEAT_S)
            event = progress.step(state[0])
            asked.clear()
            yield event
            asked.set()
        return future.result()
    finally:
        gone.set()
        asked.set()
        pool.shutdown(wait=False, cancel_futures=True)


class ProjectionJob:
    """One reconstruction: a scan, a grid, and how far it has come."""

    def __init__(self, scan: Scan, grid: Grid, config: ProjectionConfig, device: Any, seed: int) -> None:
        self.scan, self.grid, self.config, self.device, self.seed = scan, grid, config, device, seed
        self.geometry = scan.geometry
        self.started = time.perf_counter()
        self.progress = Progress()
        self.volume: np.ndarray | None = None
        self.band: np.ndarray | None = None
        self.field: AttenuationField | None = None
        self.scale = 1.0
        self.made: LineIntegrals | None = None
        self.tv: TvReconstruction | None = None
        self.flatness: float | None = None
        self.weights: dict[str, float] = {}
        self.residuals: dict[str, float] = {}
        self.steps = {"volume": 0, "views": 0}
        self.warnings: list[str] = []

    def run(self) -> Events:
        """Yield the events of the whole job."""
        progress, config = self.progress, self.config
        progress.enter("Line integrals", 0.01)
        (self.made,) = yield from background([partial(scan_line_integrals, self.scan)], progress)
        self.data = self.made.projections
        self.warnings += self.made.warnings
        progress.enter("Filtered backprojection", 0.03)
        first = yield from interruptible(
            lambda step: fdk(self.data, self.geometry, self.grid, step=step), progress
        )
        self.volume = first
        yield Preview(first, self.grid, "FDK" if self.geometry.kind == "cone" else "FBP")
        progress.enter("Checking the direction", 0.04)
        (check,) = yield from background([partial(_direction, self.data, self.geometry)], progress)
        if check:
            self.warnings.append(check)
        start = np.maximum(first, 0)
        variation: np.ndarray | None = None
        if config.start == "tv" or config.combine != "gaussians":
            progress.enter("Total variation", 0.45 if config.gaussians else 0.95)
            self.tv = yield from interruptible(self._total_variation, progress)
            start = variation = self.volume = self.tv.volume
            yield Preview(variation, self.grid, "total variation")
        gaussians: np.ndarray | None = None
        if config.gaussians:
            gaussians = yield from self._gaussians(start)
        guided = None
        if self.tv is not None and config.combine == "average":
            self.flatness = flatness(self.tv.volume)
            if config.guided == "always" or (config.guided == "auto" and self.flatness < FLAT):
                progress.enter("Guided total variation", 0.97)
                guided = yield from interruptible(partial(self._guided, gaussians), progress)
        progress.enter("Combining", 0.99)
        (self.volume,) = yield from background(
            [partial(self._combine, variation, gaussians, guided)], progress
        )
        yield Preview(self.volume, self.grid, "combined")
        progress.enter("Finishing", 1.0)
        (result,) = yield from background([self._result], progress)
        yield Done(result)

    def _total_variation(self, step: Callable[[int, int], None]) -> TvReconstruction:
        weight = self.config.tv_weight
        if weight is None and self.geometry.n_views < _FEW_VIEWS:
            weight = _PLAIN_WEIGHT
        return reconstruct_tv(
            self.data,
            self.geometry,
            self.grid,
            weight,
            passes=self.config.tv_passes,
            margin=self.config.margin,
            trust=self.config.tv_trust,
            step=step,
            backend=self.device.name,
        )

    def _guided(self, gaussians: np.ndarray | None, step: Callable[[int, int], None]) -> np.ndarray:
        assert self.tv is not None
        guide = self.tv.volume
        if gaussians is not None:
            guide = 0.5 * (guide + gaussians)
        return guided_tv(
            self.data,
            self.geometry,
            self.grid,
            self.tv,
            guide,
            margin=self.config.margin,
            trust=self.config.tv_trust,
            step=step,
            backend=self.device.name,
        )

    def _gaussians(self, start: np.ndarray) -> Generator[Event, None, np.ndarray]:
        """Fit the Gaussians to a volume and to the projections, and return them voxelised."""
        config, progress, shape = self.config, self.progress, self.grid.shape
        self.scale = float(np.percentile(start[start > 0], _BRIGHT)) if (start > 0).any() else 1.0
        scaled = np.asarray(start / np.float32(self.scale))
        backend = self.device.name
        most = min(config.start_gaussians, config.max_gaussians)
        progress.enter("Placing Gaussians", progress.end + 0.01)
        (made,) = yield from background(
            [partial(start_attenuation, scaled, config.voxels_per_gaussian, most, self.seed)], progress
        )
        field: AttenuationField = made if backend == "cpu" else made.to(backend)
        self.field = field
        middle = 0.7 if config.view_steps else 0.88
        progress.enter("Gaussians: volume", middle)
        steps = fit_to_volume(field, scaled, config.volume_steps, backend=backend)
        self.steps["volume"] = yield from drive(steps, progress, config.volume_steps)
        if config.view_steps:
            progress.enter("Gaussians: projections", 0.88)
            if config.rays == "voxels":
                (weights,) = yield from background([self._ray_weights], progress)
                data = self.data / np.float32(self.scale)
                steps = fit_to_projections(
                    field,
                    self._projector(),
                    data,
                    weights,
                    config.view_steps,
                    rate=config.rate,
                    seed=self.seed,
                    backend=backend,
                )
            else:
                radiographs = Radiographs(self.geometry, self.grid)
                steps = fit_to_views(
                    field,
                    radiographs,
                    self.data / np.float32(self.scale * radiographs.unit),
                    config.view_steps,
                    shape,
                    rate=config.rate,
                    variation=config.variation,
                    structural=config.structural_loss,
                    density=_density(config),
                    seed=self.seed,
                    backend=backend,
                )
            self.steps["views"] = yield from drive(steps, progress, config.view_steps)
        (volume,) = yield from background([partial(self.voxelise, field)], progress)
        return np.asarray(volume)

    def _projector(self) -> VoxelProjector:
        return VoxelProjector(self.geometry, self.grid, self.device.name)

    def _ray_weights(self) -> np.ndarray:
        return ray_weights(self.data, self._projector().apply(np.ones(self.grid.shape, np.float32)))

    def voxelise(self, field: AttenuationField) -> np.ndarray:
        """Return the volume of a field in units of the attenuation."""
        volume = field.voxelise(self.grid.shape, self.device.name)[0].detach().cpu().numpy()
        return np.asarray(volume * np.float32(self.scale))

    def _combine(
        self, variation: np.ndarray | None, gaussians: np.ndarray | None, guided: np.ndarray | None
    ) -> np.ndarray:
        """Return the volume that is the product, with its band, and compare the candidates with the data.

        The product is the mean of total variation, guided if it is, and Gaussians, with a share of the Gaussians that
        falls as the two differ more in the projections than total variation leaves unexplained: then noise is no
        excuse, and the Gaussians are too few for what the data show. Without a guide it also falls for objects of
        flat parts.
        """
        assert self.volume is not None
        candidates = {
            name: volume
            for name, volume in (("tv", variation), ("gaussians", gaussians), ("guided", guided))
            if volume is not None
        } or {"fdk": self.volume}
        projector = self._projector()
        weights = self._ray_weights()
        errors = {name: projector.apply(volume) - self.data for name, volume in candidates.items()}
        mean, last = list(candidates.values())[-1], list(candidates)[-1]
        self.weights = {last: 1.0}
        base, basis = ("tv", variation) if guided is None else ("guided", guided)
        if basis is not None and gaussians is not None and self.config.combine != "gaussians":
            share = 0.0
            # in parallel beam the Gaussians were not always better for having seen the projections (measured)
            cone = self.geometry.kind == "cone"
            if self.config.combine == "average" and self.steps["views"] and cone:
                apart = float(np.mean(weights * np.square(errors["gaussians"] - errors[base])))
                noise = float(np.mean(weights * np.square(errors[base])))
                share = SHARE / (1 + (_STRICT * apart / max(noise, 1e-30)) ** 2)
                if guided is None and self.flatness is not None:
                    share *= float(np.clip((self.flatness - _NONE) / (_WHOLE - _NONE), 0, 1))
            mean = basis + np.float32(share) * (gaussians - basis)
            self.weights = {base: 1 - share, "gaussians": share}
            errors["combined"] = errors[base] + np.float32(share) * (errors["gaussians"] - errors[base])
        if self.config.uncertainty and variation is not None and gaussians is not None:
            self.band = _error_band(mean, variation - gaussians)
        for name, error in errors.items():
            self.residuals[name] = float(np.sqrt(np.mean(weights * np.square(error, dtype=np.float64))))
        return mean

    def best(self) -> Reconstruction | None:
        """Return the state so far as a result, None before the first preview."""
        if self.volume is None:
            return None
        return Reconstruction(self.volume, self.grid, report=self.report())

    def report(self) -> dict[str, Any]:
        """JSON-able account of the job."""
        tv = self.tv
        made = self.made
        return {
            "task": "projections",
            "device": {"name": self.device.name, "reason": self.device.reason},
            "seconds": round(time.perf_counter() - self.started, 3),
            "iterations": sum(self.steps.values()),
            "steps": dict(self.steps),
            "n_gaussians": 0 if self.field is None else len(self.field),
            "baseline": "tv" if tv is not None else "fdk",
            "chosen": self.config.combine,
            "contributions": {name: round(w, 4) for name, w in self.weights.items()},
            "residual_rms": {name: float(f"{rms:.6g}") for name, rms in self.residuals.items()},
            "tv": None
            if tv is None
            else {
                "weight": tv.weight,
                "flatness": None if self.flatness is None else float(f"{self.flatness:.4g}"),
                "heldout_trials": [[w, float(f"{error:.6g}")] for w, error in tv.trials],
                "passes": tv.passes,
                "change": float(f"{tv.change:.4g}"),
            },
            "scan": {
                "name": self.scan.name,
                "kind": self.geometry.kind,
                "shape": list(self.scan.projections.shape),
                "dtype": str(self.scan.projections.dtype),
                "counts": self.scan.is_counts,
                "n_dark": 0 if made is None else made.n_dark,
                "n_bright": 0 if made is None else made.n_bright,
                "n_repaired": 0 if made is None else made.n_repaired,
                "sha256": hashlib.sha256(np.ascontiguousarray(self.scan.projections).data).hexdigest(),
            },
            "warnings": list(self.warnings),
            "grid": {"shape": list(self.grid.shape), "affine": self.grid.affine.tolist()},
            "config": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "versions": versions(),
        }

    def _result(self) -> Reconstruction:
        assert self.volume is not None
        model = None if self.field is None else self.field.model(self.grid, self.scale)
        return Reconstruction(self.volume, self.grid, model, self.report(), self.band)


def _error_band(volume: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """Return the half-width of the 90 % band of the error.

    Two estimates differ where data and noise leave room, and less than they err at borders, which both blur: there
    the error grows with the gradient.
    """
    band = gaussian_filter(np.abs(difference), 1.5)
    band += np.float32(_EVERYWHERE * float(band.mean()))
    slope = np.zeros_like(band)
    for axis, size in enumerate(volume.shape):
        if size > 1:
            slope += np.square(np.gradient(volume, axis=axis))
    band += np.float32(_DISPLACED) * gaussian_filter(np.sqrt(slope), 1.0)
    return np.asarray(np.float32(_BAND) * band)


def _density(config: ProjectionConfig) -> DensityControl | None:
    if config.densify_every == 0:
        return None
    return DensityControl(
        config.densify_every,
        config.densify_from,
        config.densify_until,
        gradient=np.inf if config.densify_gradient is None else config.densify_gradient,
        least=config.prune_below or 0.0,
        most=config.max_gaussians,
    )


def _direction(data: np.ndarray, geometry: XrayGeometry) -> str | None:
    """Return a warning if the rotation seems to run the wrong way; nothing where that cannot be told."""
    try:
        check = check_direction(data, geometry)
    except ValueError:
        return None
    return check.message if check.verdict == "wrong" else None


def as_scan(projections: Any, geometry: Any, grid: Any, i0: Any, flat: Any, dark: Any) -> tuple[Scan, Grid]:
    """Return the scan that the arguments of a reconstruction make, and the grid to reconstruct on."""
    if grid is not None and not isinstance(grid, Grid):
        raise TypeError(f"grid: expected a Grid, got {type(grid).__name__}")
    if isinstance(projections, Scan):
        if any(value is not None for value in (i0, flat, dark)):
            raise ValueError(
                "i0, flat, dark: a Scan brings its own; make the Scan with them, or give projections and a geometry"
            )
        scan = projections if geometry is None else projections.with_geometry(geometry)
    else:
        if geometry is None:
            raise ValueError("geometry: got None, need an XrayGeometry; or give a Scan, which has one")
        scan = Scan(projections, geometry, i0=i0, flat=flat, dark=dark)
    target = grid or scan.grid or scan.geometry.default_grid()
    return scan, target


def projection_job(
    scan: Scan, target: Grid, config: ProjectionConfig | str | dict[str, Any] | None, device: str, seed: int
) -> ProjectionJob:
    """Return the job of a reconstruction, see `fit_projections`, which raises what this does."""
    settings = ProjectionConfig.coerce(config)
    try:
        choice = describe_device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}; {error}") from error
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed: got {seed!r}, need an integer of 0 or more")
    if not settings.gaussians and settings.combine == "gaussians":
        raise ValueError("config: combine = 'gaussians' needs gaussians = true")
    warning = scan.geometry.check_covers(target)
    need, free = _estimate(scan, target, settings)["bytes"], available_memory()
    if need > free:
        target.check_memory(copies=_BYTES_VOXEL / 4)
        raise ValueError(
            f"grid: reconstructing {target.shape} from {scan.n_views} views of "
            f"{scan.geometry.detector_shape[0]} x {scan.geometry.detector_shape[1]} needs about "
            f"{format_bytes(int(need))}, {format_bytes(int(free))} are free; coarsen the grid or use fewer Gaussians"
        )
    job = ProjectionJob(scan, target, settings, choice, int(seed))
    if warning:
        job.warnings.append(warning)
    return job


def fit_projections(
    projections: Scan | ArrayLike,
    geometry: XrayGeometry | None = None,
    grid: Grid | None = None,
    config: ProjectionConfig | str | dict[str, Any] | None = None,
    *,
    i0: ArrayLike | None = None,
    flat: ArrayLike | None = None,
    dark: ArrayLike | None = None,
    device: str = "auto",
    seed: int = 0,
) -> Events:
    """Reconstruct a volume of attenuation from X-ray projections, as a generator of events.

    Everything that can be wrong with the arguments is raised here, before the generator starts. Not asking for
    the next event pauses the work; closing the generator ends it.

    Parameters
    ----------
    projections : Scan or array_like (n, v, u)
        A scan with its geometry; or views, rows, columns: line integrals, or counts when `i0` or `flat` is given.
    geometry : XrayGeometry, optional
        Source and panel in each view; replaces a Scan's own.
    grid : Grid, optional
        Where the volume is wanted; default: the Scan's, or what the panel sees.
    config : ProjectionConfig, str or dict, optional
        Settings, or the name of a preset; default "balanced".
    i0, flat, dark : optional
        Counts of the blank scan, fields without object and without X-rays, as for `Scan`.
    device : {"auto", "cpu", "cuda"} or "cuda:1" and so on
        Where the Gaussians are rendered.
    seed : int
        Of the places of new Gaussians and of the order of the views.

    Returns
    -------
    generator of Step, Preview, Done or Failed

    Raises
    ------
    ValueError, TypeError
        If an argument does not fit; the message names it, what came and what is needed.
    """
    scan, target = as_scan(projections, geometry, grid, i0, flat, dark)
    return guarded(projection_job(scan, target, config, device, seed))


def reconstruct_projections(
    projections: Scan | ArrayLike,
    geometry: XrayGeometry | None = None,
    grid: Grid | None = None,
    config: ProjectionConfig | str | dict[str, Any] | None = None,
    *,
    i0: ArrayLike | None = None,
    flat: ArrayLike | None = None,
    dark: ArrayLike | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[Event], None] | None = None,
) -> Reconstruction:
    """Reconstruct a volume of attenuation from X-ray projections.

    Parameters
    ----------
    projections, geometry, grid, config, i0, flat, dark, device, seed
        As for `fit_projections`.
    progress : callable, optional
        Receives each event.

    Returns
    -------
    Reconstruction
        Volume (z, y, x) in attenuation per world unit, its grid, the Gaussians (additive) and the report.

    Raises
    ------
    ValueError, TypeError
        If an argument does not fit.
    KeyboardInterrupt
        When interrupted; its attribute `best` is the best state so far as a Reconstruction, or None.

    Examples
    --------
    >>> from napari_innergs.geometry.xray import ParallelBeam
    >>> scan = ParallelBeam.circular(np.arange(20) * np.pi / 20, detector_shape=(4, 33))
    >>> disc = 2 * np.sqrt(np.maximum(10.0**2 - (np.arange(33) - 16.0) ** 2, 0))
    >>> result = reconstruct_projections(np.broadcast_to(disc, (20, 4, 33)), scan, config="fast")
    >>> round(float(result.volume[1:3, 12:21, 12:21].mean()), 1)
    1.0
    """
    events = fit_projections(
        projections, geometry, grid, config, i0=i0, flat=flat, dark=dark, device=device, seed=seed
    )
    return to_the_end(events, "projections", progress)


def estimate_projections(
    projections: Scan | ArrayLike,
    geometry: XrayGeometry | None = None,
    grid: Grid | None = None,
    config: ProjectionConfig | str | dict[str, Any] | None = None,
    *,
    i0: ArrayLike | None = None,
    flat: ArrayLike | None = None,
    dark: ArrayLike | None = None,
) -> dict[str, float]:
    """Estimate what a reconstruction needs.

    Parameters
    ----------
    projections, geometry, grid, config, i0, flat, dark
        As for `fit_projections`.

    Returns
    -------
    dict
        "bytes" (peak, beyond the program itself) and "seconds" on this machine's processors.
    """
    scan, target = as_scan(projections, geometry, grid, i0, flat, dark)
    return _estimate(scan, target, ProjectionConfig.coerce(config))


def _estimate(scan: Scan, grid: Grid, config: ProjectionConfig) -> dict[str, float]:
    pixels, voxels = float(np.prod(scan.projections.shape, dtype=np.float64)), float(grid.size)
    samples = pixels * float(max(grid.shape))
    seconds = 0.2e-9 * voxels * scan.n_views
    if config.start == "tv" or config.combine != "gaussians":
        # the search for the weight takes about as long as half the passes
        seconds += samples * config.tv_passes * (1.5 if config.tv_weight is None else 1.0) * _SECONDS_RAY
    gaussians = 0.0
    if config.gaussians:
        most = min(config.start_gaussians, config.max_gaussians)
        gaussians = min(voxels / 2 / config.voxels_per_gaussian, float(most))
        if config.densify_every:
            # their number at the end is not known before (measured)
            gaussians = min(2 * gaussians, float(config.max_gaussians))
        views = config.view_steps
        seconds += voxels * config.volume_steps * _SECONDS_VOXEL_STEP
        one = voxels * _SECONDS_VOXEL_STEP if config.rays == "voxels" else 0.0
        seconds += views * (one + min(10, scan.n_views) * samples / scan.n_views * _SECONDS_RAY)
    size = _BYTES_VOXEL * voxels + _BYTES_PIXEL * pixels + _BYTES_GAUSSIAN * gaussians
    return {"bytes": size, "seconds": 3 + seconds / thread_count()}
