"""Photographs and X-rays of one object: both alone, the similarity between them, and one set of Gaussians."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from napari_innergs.baselines.fdk import fdk
from napari_innergs.baselines.xray_tv import reconstruct_tv
from napari_innergs.config_dual import DualConfig
from napari_innergs.config_projections import ProjectionConfig
from napari_innergs.device import describe_device
from napari_innergs.fit.align import (
    Alignment,
    Candidate,
    align_landmarks,
    align_surfaces,
    refine_on_silhouettes,
    surface_of_volume,
)
from napari_innergs.fit.attenuation import AttenuationField, Radiographs, fit_to_volume, start_attenuation
from napari_innergs.fit.dual import (
    DualField,
    fit_jointly,
    hull_of_masks,
    join,
)
from napari_innergs.fit.engine import Done, Event, Preview, Progress, Step, background, drive, thread_count
from napari_innergs.fit.photos import (
    SplatField,
    fit_photographs,
    object_frame,
    object_points,
    start_splats,
    surface_centres,
)
from napari_innergs.fit.splats import SplatModel, colour_volume
from napari_innergs.fit.xray_reference import ViewsBetween, views_between
from napari_innergs.geometry.camera import Camera
from napari_innergs.geometry.grid import Grid, available_memory, format_bytes
from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.photographs import Photographs, as_unit
from napari_innergs.result import Reconstruction
from napari_innergs.scan import Scan
from napari_innergs.tasks.events import Events, guarded, to_the_end
from napari_innergs.tasks.projections import (
    SHARE,
    ProjectionJob,
    as_scan,
    estimate_projections,
    interruptible,
)
from napari_innergs.tasks.versions import versions

__all__ = ["DualJob", "NoMatch", "estimate_dual", "fit_dual", "reconstruct_dual"]

FloatArray = NDArray[np.float64]

_FEWEST = 3
# Views of which some can be held out.
_FEWEST_VIEWS = 6
# Sparse points that are enough for the alignment without those of the fit.
_SPARSE = 200
# Fewer points cannot be aligned.
_FEWEST_POINTS = 50
# A volume is not attenuation when more of it than this share lies further below zero than this share of its bright
# part.
_MUCH_BELOW, _BELOW = 0.05, 0.25
_BRIGHT = 99.5
# Bytes at the peak for each Gaussian with colour and each pixel of a photograph being fitted.
_BYTES_SPLAT, _BYTES_PHOTO = 2500, 600
# Process seconds of a step for each pixel of a photograph, Gaussian with colour and Gaussian that X-rays see; of the
# alignment; for each voxel and step of a fit to a volume; and bytes for each voxel of a volume that is given.
_SECONDS_PHOTO, _SECONDS_SPLAT, _SECONDS_GAUSSIAN = 6e-7, 9e-7, 1.5e-6
_SECONDS_ALIGNMENT, _SECONDS_VOXEL_STEP, _BYTES_GIVEN = 5.0, 1.8e-7, 60.0
# Share of the most Gaussians with colour that there are in an average step.
_GROWN = 0.75
# With fewer views than this the outline is used.
_FEW = 20
# Pixels may be brighter than their masks by so much, as interpolation makes them, or this share of them.
_BRIGHTER, _MUCH_BRIGHTER = 0.1, 0.01
# Attenuation outside the outline that shows it to be wrong.
_MOST_OUTSIDE = 0.1
# Steps that bring the Gaussians to the volume within the outline.
_OUTLINE_STEPS = 40
# Steps of the fit of Gaussians to a volume that is given in place of projections.
_VOLUME_STEPS = 120


class NoMatch(ValueError):
    """Photographs and X-rays are not of one object, or cannot be laid onto each other.

    Attributes
    ----------
    alignment : Alignment
        The best of what does not fit.
    """

    def __init__(self, alignment: Alignment) -> None:
        self.alignment = alignment
        reason = (alignment.reason or "the surfaces differ").removeprefix("no match: ").rstrip(".")
        super().__init__(
            f"photographs and X-rays: no match, {reason}; are they of one object? If so, give landmarks or the "
            "transform"
        )


class DualJob:
    """One reconstruction: photographs, a scan or a volume, and how far it has come."""

    def __init__(
        self,
        photographs: Photographs,
        scan: Scan | None,
        grid: Grid,
        volume: np.ndarray | None,
        config: DualConfig,
        device: Any,
        seed: int,
    ) -> None:
        self.photographs, self.scan, self.grid, self.config = photographs, scan, grid, config
        self.device, self.seed = device, seed
        self.landmarks: tuple[FloatArray, FloatArray] | None = None
        self.given: FloatArray | None = None
        self.started = time.perf_counter()
        self.progress = Progress()
        self.volume = volume
        self.alignment: Alignment | None = None
        self.band: np.ndarray | None = None
        self.splats: SplatField | None = None
        self.dual: DualField | None = None
        self.xray: dict[str, Any] | None = None
        self.hull: dict[str, Any] | None = None
        self.seconds: dict[str, float] = {}
        self.cameras: dict[int, torch.Tensor] | None = None
        self.losses: dict[str, float] = {}
        self.scale = 1.0
        self.warnings: list[str] = []

    # ------------------------------------------------------------------------------------------------------------
    # stages

    def run(self) -> Events:
        """Yield the events of the whole job."""
        yield from self._timed("photographs", self._photographs())
        yield from self._timed("X-rays alone", self._xrays_alone())
        yield from self._timed("alignment", self._align())
        yield from self._timed("X-rays", self._xrays())
        yield from self._timed("joint", self._jointly())
        self.progress.enter("Finishing", 1.0)
        (result,) = yield from background([self._result], self.progress)
        yield Done(result)

    def _timed(self, name: str, stage: Events) -> Events:
        begin = time.perf_counter()
        yield from stage
        self.seconds[name] = round(time.perf_counter() - begin, 2)

    def _photographs(self) -> Events:
        config, progress = self.config, self.progress
        progress.enter("Placing Gaussians on the surface", 0.01)
        frame, self.framed, field = (
            yield from background(
                [partial(_placed, self.photographs, config.harmonics, config.max_splats, self.seed)], progress
            )
        )[0]
        self.frame: FloatArray = frame
        self.splats = field if self.device.name == "cpu" else field.to(self.device.name)
        progress.enter("Photographs", 0.4)
        steps = fit_photographs(
            self.splats,
            self.framed,
            config.photo_steps,
            most=config.max_splats,
            structural=config.structural_loss,
            seed=self.seed,
            backend=self.device.name,
        )
        yield from self._watch("photographs", steps, config.photo_steps)

    def _watch(self, name: str, steps: Generator[tuple[int, float], None, None], total: int) -> Events:
        def watched() -> Generator[tuple[int, float], None, None]:
            recent: list[float] = []
            for done, loss in steps:
                recent = [*recent[-(len(self.photographs) - 1) :], loss]
                self.losses[name] = float(f"{np.mean(recent):.5g}")
                yield done, loss

        yield from drive(watched(), self.progress, total)

    def _xrays_alone(self) -> Events:
        """Run the projections task as a part of this one."""
        if self.scan is None:
            return
        settings = ProjectionConfig.preset(self.config.xray)
        job = self.job = ProjectionJob(self.scan, self.grid, settings, self.device, self.seed)
        start, end = self.progress.end, 0.75
        result = None
        for event in job.run():
            if isinstance(event, Step):
                self.progress.phase = f"X-rays: {event.phase[:1].lower()}{event.phase[1:]}"
                yield replace(
                    event, phase=self.progress.phase, fraction=start + (end - start) * event.fraction
                )
            elif isinstance(event, Preview):
                self.volume = event.volume
                yield event
            elif isinstance(event, Done):
                result = event.result
        assert result is not None
        self.progress.end = self.progress.reached = end
        self.volume, self.band, self.xray = result.volume, result.uncertainty, result.report
        self.warnings += [w for w in job.warnings if w not in self.warnings]

    def _align(self) -> Events:
        progress = self.progress
        assert self.volume is not None
        progress.enter("Surface of the X-rays", progress.end + 0.01)
        volume = self.volume
        points, normals = yield from interruptible(
            lambda step: surface_of_volume(volume, self.grid, step=step), progress
        )
        self.surface: FloatArray = points
        progress.enter("Alignment", progress.end + 0.02)
        if self.given is not None:
            found = _as_alignment(self.given)
        elif self.landmarks is not None:
            found = align_landmarks(*self.landmarks)
        else:
            source = yield from background([self._photo_points], progress)
            found = yield from interruptible(
                lambda step: align_surfaces(source[0], points, normals, step=step), progress
            )
            if not found.matched:
                raise NoMatch(found)
            if self.config.candidate:
                if self.config.candidate >= len(found.candidates):
                    raise ValueError(
                        f"config: candidate = {self.config.candidate}, but {len(found.candidates)} pose(s) were found"
                    )
                found = _take(found, self.config.candidate)
            elif len(found.candidates) > 1:
                self.warnings.append(
                    f"{len(found.candidates)} poses fit alike (alignment in the report); candidate in the settings "
                    "chooses another."
                )
        before = found
        masks = self.photographs.masks
        if self.config.silhouettes and masks is not None and self.given is None:
            progress.enter("Alignment: silhouettes", progress.end + 0.02)
            found = yield from interruptible(
                lambda step: refine_on_silhouettes(
                    before, masks, self.photographs.cameras, points, normals, step=step
                ),
                progress,
            )
            # that of the outlines is in pixels
            found = replace(found, rms=before.rms)
            if len(before.candidates) > 1:
                # the others stay to be chosen
                poses = list(before.candidates)
                poses[self.config.candidate] = Candidate(found.transform, before.score)
                found = replace(found, candidates=tuple(poses))
        if found.reason and found.reason != before.reason:
            self.warnings.append(f"Alignment: {found.reason.rstrip('.')}.")
        self.alignment = found

    def _photo_points(self) -> FloatArray:
        """Points of the object's surface in the photographs' world."""
        sparse = object_points(self.photographs)
        if len(sparse) >= _SPARSE:
            return sparse
        assert self.splats is not None
        centres = surface_centres(self.splats, self.framed)
        if len(centres) < _FEWEST_POINTS:
            raise ValueError(
                f"photographs: their fit left {len(centres)} opaque Gaussians, the alignment needs {_FEWEST_POINTS}; "
                "raise photo_steps, look at masks and cameras, or give landmarks or the transform"
            )
        back = np.linalg.inv(self.frame)
        return np.asarray(centres @ back[:3, :3].T + back[:3, 3])

    def _xrays(self) -> Events:
        """Where views are few and masks are given, look again within their outline."""
        if self.scan is None:
            yield from self._volume_alone()
            return
        few = self.scan.n_views
        masked = self.config.hull and self.photographs.masks is not None
        if not masked or not _FEWEST_VIEWS <= few < _FEW:
            return
        assert self.alignment is not None
        progress, before = self.progress, self.volume
        to_photos: FloatArray = np.linalg.inv(self.alignment.transform).astype(np.float64)
        progress.enter("Outline", progress.end + 0.01)
        support = yield from interruptible(
            lambda step: hull_of_masks(self.photographs, self.grid, to_photos, step), progress
        )
        share = _outside(before, support)
        facts: dict[str, Any] = {"share_of_grid": float(support.mean()), "attenuation_outside": share}
        self.hull = facts
        if share > _MOST_OUTSIDE:
            self.warnings.append(
                f"{100 * share:.0f} % of the attenuation lies outside the outline of the masks, so the outline was "
                "not used: the photographs show less than the X-rays."
            )
            return
        yield from self._within(support, facts)

    def _within(self, support: NDArray[np.bool_], facts: dict[str, Any]) -> Events:
        """Compute the volume again within a support, and bring the Gaussians to it."""
        job, progress = self.job, self.progress
        assert job.field is not None
        inside = job.field
        progress.enter("X-rays in the outline", progress.end + 0.03)
        found = yield from interruptible(
            lambda step: reconstruct_tv(
                job.data,
                job.geometry,
                self.grid,
                None if job.tv is None else job.tv.weight,
                passes=job.config.tv_passes,
                trust=job.config.tv_trust,
                support=support,
                step=step,
                backend=self.device.name,
            ),
            progress,
        )
        facts |= {"weight": found.weight, "passes": found.passes}
        (gaussians,) = yield from background([partial(job.voxelise, inside)], progress)
        gaussians *= support
        self.volume = found.volume + np.float32(SHARE) * (gaussians - found.volume)
        yield Preview(self.volume, self.grid, "within the outline")
        progress.enter("Gaussians: outline", progress.end + 0.02)
        scaled = np.asarray(self.volume / np.float32(job.scale))
        steps = fit_to_volume(inside, scaled, _OUTLINE_STEPS, backend=self.device.name)
        yield from drive(steps, progress, _OUTLINE_STEPS)

    def _volume_alone(self) -> Events:
        """Fit Gaussians to the volume that is given."""
        assert self.volume is not None
        volume = np.maximum(self.volume, 0).astype(np.float32)
        positive = volume[volume > 0]
        self.scale = float(np.percentile(positive, _BRIGHT)) if positive.size else 1.0
        scaled = volume / np.float32(self.scale)
        settings = ProjectionConfig.preset(self.config.xray)
        self.progress.enter("Gaussians of the volume", 0.8)
        (field,) = yield from background(
            [
                partial(
                    start_attenuation, scaled, settings.voxels_per_gaussian, settings.max_gaussians, self.seed
                )
            ],
            self.progress,
        )
        self.inside: AttenuationField = field if self.device.name == "cpu" else field.to(self.device.name)
        steps = fit_to_volume(self.inside, scaled, _VOLUME_STEPS, backend=self.device.name)
        yield from drive(steps, self.progress, _VOLUME_STEPS)

    def _jointly(self) -> Events:
        config = self.config
        assert self.alignment is not None and self.splats is not None and self.volume is not None
        if self.scan is not None:
            assert self.job.field is not None
            self.inside, self.scale = self.job.field, self.job.scale
        to_index = np.linalg.inv(self.grid.affine) @ self.alignment.transform @ np.linalg.inv(self.frame)
        self.dual = join(self.inside, self.splats, to_index)
        if not config.joint_steps:
            return
        settings: dict[str, Any] = {}
        if self.scan is not None:
            radiographs = Radiographs(self.job.geometry, self.grid)
            settings["radiographs"] = radiographs
            self.progress.enter("Weights of the rays", self.progress.end + 0.01)
            settings["data"] = self.job.data / np.float32(self.scale * radiographs.unit)
            (settings["trust"],) = yield from background([self.job._ray_weights], self.progress)
            if config.reference_weight > 0 or config.reference_views > 0:
                reference = self.volume
                if config.reference == "fdk":
                    self.progress.enter("Reference", self.progress.end + 0.01)
                    reference = yield from interruptible(
                        lambda step: fdk(self.job.data, self.job.geometry, self.grid, step=step),
                        self.progress,
                    )
                assert reference is not None
                shown = np.maximum(reference, 0)
                settings["reference"] = shown / np.float32(self.scale)
                settings["reference_weight"] = config.reference_weight
                if config.reference_views > 0:
                    settings["between_weight"] = config.reference_views
                    (settings["between"],) = yield from background(
                        [
                            partial(
                                ViewsBetween.make,
                                shown,
                                self.job.data,
                                self.job.geometry,
                                self.grid,
                                self.scale,
                            )
                        ],
                        self.progress,
                    )
        else:
            if config.reference_views > 0:
                self.warnings.append("reference_views was not used: a volume has no views, projections do.")
            settings["reference"] = np.maximum(self.volume, 0).astype(np.float32) / np.float32(self.scale)
            settings["reference_weight"] = config.reference_weight
        if config.refine_cameras:
            self.cameras = {}
        self.progress.enter("Joint fit", 0.98)
        steps = fit_jointly(
            self.dual,
            self.framed,
            config.joint_steps,
            pull=config.pull,
            solid=config.zero_one,
            structural=config.structural_loss,
            rate=config.joint_rate,
            cameras=self.cameras,
            seed=self.seed,
            backend=self.device.name,
            **settings,
        )
        yield from self._watch("joint", steps, config.joint_steps)
        if self.hull is not None and "weight" in self.hull:
            # few views: the joint Gaussians are as good as the volume, and err differently
            (made,) = yield from background(
                [partial(self.job.voxelise, self.dual.attenuation())], self.progress
            )
            self.volume = 0.5 * (self.volume + made)

    # ------------------------------------------------------------------------------------------------------------
    # what comes out

    def best(self) -> Reconstruction | None:
        """Return the state so far as a result, None before there is a volume."""
        if self.volume is None:
            return None
        transform = None if self.alignment is None else self.alignment.transform
        return Reconstruction(self.volume, self.grid, report=self.report(), transform=transform)

    def state(self) -> Reconstruction | None:
        """Return all that there is when the joint fit is interrupted, None before it."""
        if self.dual is None:
            return None
        result = self._result()
        result.report["interrupted"] = True
        return result

    def report(self) -> dict[str, Any]:
        """JSON-able account of the job."""
        photographs = self.photographs
        found: dict[str, Any] = {
            "task": "dual",
            "device": {"name": self.device.name, "reason": self.device.reason},
            "seconds": round(time.perf_counter() - self.started, 3),
            "stages": dict(self.seconds),
            "iterations": self.config.photo_steps + self.config.joint_steps,
            "n_gaussians": 0 if self.dual is None else len(self.dual),
            "n_surface": 0 if self.splats is None else len(self.splats),
            "losses": dict(self.losses),
            "alignment": None if self.alignment is None else _describe(self.alignment),
            "hull": self.hull,
            "photographs": {
                "number": photographs.n_views,
                "size": list(photographs.size),
                "masks": photographs.masks is not None,
                "points": 0 if photographs.points is None else len(photographs.points),
                "sha256": hashlib.sha256(np.ascontiguousarray(photographs.images).data).hexdigest(),
            },
            "xray": self.xray,
            "warnings": list(self.warnings),
            "grid": {"shape": list(self.grid.shape), "affine": self.grid.affine.tolist()},
            "config": self.config.model_dump(mode="json"),
            "seed": self.seed,
            "versions": versions(),
        }
        if self.cameras:
            moved = torch.stack(list(self.cameras.values())).numpy()
            found["cameras"] = {
                "rotation_degrees": float(np.degrees(np.sqrt((moved[:, :3] ** 2).sum(1).mean()))),
                "shift": float(np.sqrt((moved[:, 3:] ** 2).sum(1).mean()))
                / float(np.cbrt(np.linalg.det(self.frame[:3, :3]))),
            }
        return found

    def _result(self) -> Reconstruction:
        assert self.volume is not None and self.dual is not None and self.alignment is not None
        to_world = self.alignment.transform @ np.linalg.inv(self.frame)
        splats = SplatModel.from_field(self.dual.surface, to_world)
        colours = colour_volume(splats, self.grid, self.surface, self.config.shell)
        return Reconstruction(
            np.asarray(self.volume, np.float32),
            self.grid,
            self.dual.model(self.grid, self.scale),
            self.report(),
            self.band,
            transform=self.alignment.transform,
            splats=splats,
            colour=colours,
        )


def _placed(
    photographs: Photographs, degree: int, most: int, seed: int
) -> tuple[FloatArray, Photographs, SplatField]:
    frame = object_frame(photographs)
    framed = photographs.moved(frame)
    return frame, framed, start_splats(framed, degree, most=most, seed=seed)


def _outside(volume: np.ndarray | None, support: NDArray[np.bool_]) -> float:
    """Return which share of what is clearly attenuation lies outside a support."""
    assert volume is not None
    dense = np.where(volume > 0.25 * np.percentile(volume, 99.5), volume, 0)
    total = float(dense.sum(dtype=np.float64))
    return float(dense[~support].sum(dtype=np.float64)) / total if total > 0 else 0.0


def _share_below(volume: np.ndarray) -> float:
    """Return which share of a volume is far below zero."""
    bright = max(float(np.percentile(volume, _BRIGHT)), 0.0)
    return float((volume < -_BELOW * bright).mean()) if volume.min() < 0 else 0.0


def _as_alignment(transform: FloatArray) -> Alignment:
    """Take a transform that was given for the answer."""
    scale = float(np.cbrt(np.linalg.det(transform[:3, :3])))
    nan = math.nan
    one = (Candidate(transform, 1.0),)
    return Alignment(transform, scale, 1.0, nan, nan, nan, nan, one, True, "")


def _take(found: Alignment, index: int) -> Alignment:
    chosen = found.candidates[index]
    scale = float(np.cbrt(np.linalg.det(chosen.transform[:3, :3])))
    return replace(found, transform=chosen.transform, score=chosen.score, scale=scale)


def _describe(found: Alignment) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return float(f"{value:.5g}") if math.isfinite(value) else None

    return {
        "transform": found.transform.tolist(),
        "scale": number(found.scale),
        "score": number(found.score),
        "rms": number(found.rms),
        "rotation_error_degrees": number(found.rotation_error),
        "scale_error": number(found.scale_error),
        "shift_error": number(found.shift_error),
        "candidates": [
            {"transform": one.transform.tolist(), "score": number(one.score)} for one in found.candidates
        ],
        "reason": found.reason,
        "landmark_residuals": None if found.residuals is None else [number(r) for r in found.residuals],
    }


# ----------------------------------------------------------------------------------------------------------------


def _as_photographs(images: Any, cameras: Any, masks: Any) -> Photographs:
    if isinstance(images, Photographs):
        if masks is not None:
            raise ValueError("masks: Photographs bring their own; make the Photographs with them")
        photographs = images
        if cameras is not None:
            photographs = photographs.with_cameras(cameras)
    else:
        if images is None:
            raise ValueError("images: got None, need photographs; cameras without them say nothing")
        if cameras is None:
            raise ValueError("cameras: got None, need a Camera for each photograph; or give Photographs")
        if not isinstance(cameras, Sequence):
            raise TypeError(
                f"cameras: got {type(cameras).__name__}, need a list of Camera; read_photographs gives photographs "
                "and cameras together"
            )
        photographs = Photographs(images, list(cameras), masks)
    if photographs.n_views < _FEWEST:
        raise ValueError(f"images: got {photographs.n_views} photographs, need at least {_FEWEST}")
    if photographs.masks is not None:
        # colours are multiplied by the masks: none is brighter than its mask; some pixels of each tell
        every = 1 + max(photographs.size) // 200
        shown = photographs.images[:, ::every, ::every].max(3)
        over = float((as_unit(shown) > photographs.masks[:, ::every, ::every] + _BRIGHTER).mean())
        if over > _MUCH_BRIGHTER:
            raise ValueError(
                f"images: {100 * over:.0f} % of the pixels are brighter than their mask, need colours multiplied by "
                "the masks, as read_photographs gives them"
            )
    return photographs


def _as_volume(volume: ArrayLike, grid: Grid | None) -> tuple[np.ndarray, Grid]:
    values = np.asarray(volume)
    if values.ndim != 3 or values.dtype.kind not in "fiu":
        raise ValueError(
            f"volume: got {values.dtype} of shape {values.shape}, need numbers of shape (z, y, x)"
        )
    if grid is None:
        raise ValueError(
            "grid: got None with a volume, need a Grid that says where its voxels are and how far apart; "
            "photographs cannot tell"
        )
    if grid.shape != values.shape:
        raise ValueError(f"volume: got shape {values.shape}, need the grid's {grid.shape}")
    bad = int((~np.isfinite(values)).sum()) if values.dtype.kind == "f" else 0
    if bad:
        raise ValueError(f"volume: got {bad} NaN or infinite values, need finite ones; replace them by 0")
    if not values.max() > values.min():
        raise ValueError(f"volume: got {values.flat[0]:g} everywhere, need an object that differs from air")
    return values.astype(np.float32), grid


def fit_dual(
    projections: Scan | ArrayLike | None,
    geometry: XrayGeometry | None = None,
    images: Photographs | ArrayLike | None = None,
    cameras: Any = None,
    grid: Grid | None = None,
    config: DualConfig | str | dict[str, Any] | None = None,
    *,
    masks: ArrayLike | None = None,
    volume: ArrayLike | None = None,
    landmarks: tuple[ArrayLike, ArrayLike] | None = None,
    transform: ArrayLike | None = None,
    i0: ArrayLike | None = None,
    flat: ArrayLike | None = None,
    dark: ArrayLike | None = None,
    device: str = "auto",
    seed: int = 0,
    watch: Callable[[DualJob], None] | None = None,
) -> Events:
    """Reconstruct an object from its photographs and its X-rays, as a generator of events.

    Everything that can be wrong with the arguments is raised here, before the generator starts. Not asking for
    the next event pauses the work; closing the generator ends it.

    Parameters
    ----------
    projections : Scan, array_like (n, v, u) or None
        As for `fit_projections`; None when a volume is given.
    geometry : XrayGeometry, optional
        Source and panel in each view; replaces a Scan's own.
    images : Photographs or array_like (n, H, W, 3)
        Photographs: uint8, or 0 to 1, multiplied by the masks where there are some.
    cameras : sequence of Camera, optional
        One for each photograph; replaces those of Photographs.
    grid : Grid, optional
        Where the volume is wanted, or where the given volume is.
    config : DualConfig, str or dict, optional
        Settings, or the name of a preset; default "balanced".
    masks : array_like (n, H, W), optional
        How much of each pixel the object covers.
    volume : array_like (z, y, x), optional
        A reconstruction of the attenuation, in place of projections.
    landmarks : (array_like (n, 3), array_like (n, 3)), optional
        The same places in the photographs' world and in the X-rays', (z, y, x): instead of the automatic alignment.
    transform : array_like (4, 4), optional
        Photographs' world to X-rays' world, (z, y, x): instead of any alignment.
    i0, flat, dark : optional
        As for `fit_projections`.
    device : {"auto", "cpu", "cuda"} or "cuda:1" and so on
        Where the Gaussians are rendered.
    seed : int
        Of all random choices.
    watch : callable, optional
        Is given the job before it starts, to look at between two events.

    Returns
    -------
    generator of Step, Preview, Done or Failed

    Raises
    ------
    ValueError, TypeError
        If an argument does not fit; the message names it, what came and what is needed.
    """
    settings = DualConfig.coerce(config)
    if grid is not None and not isinstance(grid, Grid):
        raise TypeError(f"grid: expected a Grid, got {type(grid).__name__}")
    photographs = _as_photographs(images, cameras, masks)
    scan: Scan | None = None
    attenuation: np.ndarray | None = None
    if volume is not None:
        if projections is not None or geometry is not None:
            raise ValueError("volume: given together with projections, need one of both")
        attenuation, target = _as_volume(volume, grid)
    else:
        if projections is None:
            raise ValueError("projections: got None, need X-ray projections, or a volume of attenuation")
        scan, target = as_scan(projections, geometry, grid, i0, flat, dark)
    try:
        choice = describe_device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}; {error}") from error
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed: got {seed!r}, need an integer of 0 or more")
    if landmarks is not None and transform is not None:
        raise ValueError("landmarks: given together with a transform, need one of both")
    job = DualJob(photographs, scan, target, attenuation, settings, choice, int(seed))
    if landmarks is not None:
        job.landmarks = _as_landmarks(landmarks)
    if transform is not None:
        job.given = _as_similarity(transform, photographs.cameras[0])
    if attenuation is not None:
        below = _share_below(attenuation)
        if below > _MUCH_BELOW:
            job.warnings.append(
                f"{100 * below:.0f} % of the volume is far below 0, which the Gaussians take for 0: Hounsfield units "
                "are no attenuation; divide them by 1000 and add 1."
            )
    if scan is not None:
        if settings.reference_views > 0 and settings.joint_steps:
            try:
                views_between(scan.geometry)
            except ValueError as error:
                raise ValueError(f"reference_views: {error}") from None
        warning = scan.geometry.check_covers(target)
        if warning:
            job.warnings.append(warning)
    need = estimate_dual(scan, None, photographs, target, settings)["bytes"]
    free = available_memory()
    if need > free:
        raise ValueError(
            f"grid: reconstructing {target.shape} with {settings.max_splats} Gaussians of the surface needs about "
            f"{format_bytes(int(need))}, {format_bytes(int(free))} are free; coarsen the grid or use fewer"
        )
    if watch is not None:
        watch(job)
    return guarded(job)


def estimate_dual(
    projections: Scan | ArrayLike | None,
    geometry: XrayGeometry | None,
    photographs: Photographs | tuple[int, int, int],
    grid: Grid | None = None,
    config: DualConfig | str | dict[str, Any] | None = None,
) -> dict[str, float]:
    """Estimate what a reconstruction from photographs and X-rays needs.

    Parameters
    ----------
    projections : Scan, array_like (n, v, u) or None
        None when a volume is given.
    geometry : XrayGeometry, optional
        As for `fit_dual`.
    photographs : Photographs or (int, int, int)
        The photographs, or their number, rows and columns.
    grid : Grid, optional
        Where the volume is wanted, or where the given one is; needed without projections.
    config : DualConfig, str or dict, optional
        Settings, or the name of a preset.

    Returns
    -------
    dict
        "bytes" (peak, beyond the program itself) and "seconds" on this machine's processors.

    Raises
    ------
    ValueError
        If there are neither projections nor a grid.

    Examples
    --------
    >>> few, many = (estimate_dual(None, None, (n, 90, 90), Grid((64, 64, 64)), "fast") for n in (6, 60))
    >>> few["seconds"] == many["seconds"] and few["bytes"] < many["bytes"]
    True
    """
    settings = DualConfig.coerce(config)
    xray = ProjectionConfig.preset(settings.xray)
    if projections is None:
        if grid is None:
            raise ValueError("grid: got None without projections, need the grid of the volume")
        target, seconds = grid, grid.size * _VOLUME_STEPS * _SECONDS_VOXEL_STEP / thread_count()
        size = _BYTES_GIVEN * target.size
    else:
        scan, target = as_scan(projections, geometry, grid, None, None, None)
        cost = estimate_projections(scan, None, target, xray)
        size, seconds = cost["bytes"], cost["seconds"]
    shape = (len(photographs), *photographs.size) if isinstance(photographs, Photographs) else photographs
    count, pixels = float(shape[0]), float(shape[1] * shape[2])
    step = _SECONDS_PHOTO * pixels + _SECONDS_SPLAT * _GROWN * settings.max_splats
    inside = min(target.size / 2 / xray.voxels_per_gaussian, float(xray.max_gaussians))
    both = step + _SECONDS_GAUSSIAN * (inside + settings.max_splats)
    work = settings.photo_steps * step + settings.joint_steps * both + _SECONDS_ALIGNMENT
    # photographs with masks in float32, once
    size += _BYTES_SPLAT * settings.max_splats + _BYTES_PHOTO * pixels + 16 * count * pixels
    return {"bytes": size, "seconds": seconds + work / thread_count()}


def _as_similarity(transform: ArrayLike, camera: Camera) -> FloatArray:
    try:
        camera.moved(transform)
    except ValueError as error:
        raise ValueError(str(error).replace("similarity", "transform")) from None
    return np.asarray(transform, dtype=np.float64)


def _as_landmarks(landmarks: tuple[ArrayLike, ArrayLike]) -> tuple[FloatArray, FloatArray]:
    """Check pairs of landmarks: wrong ones are found here, not after the fits."""
    try:
        photo, xray = (np.asarray(one, np.float64) for one in landmarks)
    except (TypeError, ValueError):
        raise ValueError(
            "landmarks: need two arrays (n, 3) of numbers, of the photographs' world and of the X-rays'"
        ) from None
    try:
        align_landmarks(photo, xray)
    except ValueError as error:
        text = str(error).replace("source", "the photographs'").replace("target", "the X-rays'")
        raise ValueError(f"landmarks: {text}") from None
    return photo, xray


def reconstruct_dual(
    projections: Scan | ArrayLike | None,
    geometry: XrayGeometry | None = None,
    images: Photographs | ArrayLike | None = None,
    cameras: Any = None,
    grid: Grid | None = None,
    config: DualConfig | str | dict[str, Any] | None = None,
    *,
    masks: ArrayLike | None = None,
    volume: ArrayLike | None = None,
    landmarks: tuple[ArrayLike, ArrayLike] | None = None,
    transform: ArrayLike | None = None,
    i0: ArrayLike | None = None,
    flat: ArrayLike | None = None,
    dark: ArrayLike | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[Event], None] | None = None,
) -> Reconstruction:
    """Reconstruct an object from its photographs and its X-rays.

    Parameters
    ----------
    projections, geometry, images, cameras, grid, config, masks, volume, landmarks, transform
        As for `fit_dual`.
    i0, flat, dark, device, seed
        As for `fit_dual`.
    progress : callable, optional
        Receives each event.

    Returns
    -------
    Reconstruction
        Attenuation (z, y, x), `colour` (z, y, x, 3) of the surface, the Gaussians' attenuation (`model`) and colours
        (`splats`), the `transform` from the photographs' world, and the report, which holds its estimated error and
        other poses that fit alike.

    Raises
    ------
    ValueError, TypeError
        If an argument does not fit.
    NoMatch
        If the photographs cannot be laid onto the X-rays.
    KeyboardInterrupt
        When interrupted; its attribute `best` is the best state so far as a Reconstruction, or None.
    """
    jobs: list[DualJob] = []
    events = fit_dual(
        projections,
        geometry,
        images,
        cameras,
        grid,
        config,
        masks=masks,
        volume=volume,
        landmarks=landmarks,
        transform=transform,
        i0=i0,
        flat=flat,
        dark=dark,
        device=device,
        seed=seed,
        watch=jobs.append,
    )
    try:
        return to_the_end(events, "dual", progress)
    except KeyboardInterrupt as stop:
        # more than the volume, once there is more
        stop.best = jobs[0].state() or stop.best  # type: ignore[attr-defined]
        raise
