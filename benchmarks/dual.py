"""Photographs and X-rays of one object: the joint model against each alone, and what its parts are worth.

Data: `dual/tooth` and `dual/shell` of INNERGS_DATA; photographs and X-rays come from two renderers that are not ours.
With 50 X-rays, 45 are given and 5 are for the test; 60 photographs are given and 12 are for the test. The first fit
(photographs) and all joint steps are done for each seed, and so are the X-rays' Gaussians; the X-rays' volume and the
alignment do not depend on the seed and are made once for each object.

    INNERGS_DATA=... python benchmarks/dual.py --objects tooth --views 50
    INNERGS_DATA=... python benchmarks/dual.py --views 10 --preset fast --name dual_10_views
    INNERGS_DATA=... python benchmarks/dual.py --views 50 --preset fast --seeds 0 1 2 --only all --name dual_ablations
    INNERGS_DATA=... python benchmarks/dual.py --views 50 --preset fast --only blending --name dual_ablations

Results are added to those in the file, which must be of the same preset; `--fresh` begins anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import time
import warnings
from collections.abc import Callable, Generator
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import RESULTS, write
from scipy.spatial import cKDTree

import napari_innergs as igs
from napari_innergs.config_dual import DualConfig
from napari_innergs.device import describe_device
from napari_innergs.fit import photos
from napari_innergs.fit.attenuation import AttenuationField, Radiographs, fit_to_views
from napari_innergs.fit.dual import fit_jointly
from napari_innergs.fit.metrics import psnr, ssim
from napari_innergs.fit.splats import SplatModel
from napari_innergs.geometry.camera import Camera
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.layers.photographs import rough_transform
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.operators.rgb import render_rgb
from napari_innergs.operators.shear import Adam
from napari_innergs.operators.voxels import voxelise
from napari_innergs.photographs import Photographs
from napari_innergs.scan import Scan
from napari_innergs.tasks.dual import DualJob

REVERSE = np.eye(4)[[2, 1, 0, 3]]
# what a rough placement by hand is off by: degrees, share of the size, voxels
ROUGH = (3.0, 0.03, 3.0)
PARTS = ("main", "copied", "reference", "pull", "blending", "alignment", "control")


class Case:
    """One object with so many X-rays."""

    def __init__(self, name: str, views: int) -> None:
        root = Path(os.environ["INNERGS_DATA"]) / "dual" / name
        train = igs.read_photographs(root / "transforms_train.json")
        self.test = igs.read_photographs(root / "transforms_test.json")
        sparse = igs.read_cameras(root / "colmap")
        self.train = Photographs(
            train.images, train.cameras, train.masks, train.names, sparse.points, sparse.colours
        )
        whole = igs.read_scan(root / f"xray_{views}.json", "proj_noisy")
        assert whole.grid is not None
        self.grid: Grid = whole.grid
        self.held: Scan | None = None
        self.scan = whole
        if views == 50:
            test = np.arange(50) % 10 == 5
            self.scan, self.held = whole.subset(np.flatnonzero(~test)), whole.subset(np.flatnonzero(test))
        self.volume = np.load(root / "volume.npz")["data"].astype(np.float32)
        truth = np.array(json.loads((root / "truth.json").read_text())["photo_to_xray"])
        self.truth = REVERSE @ truth @ REVERSE
        surface = np.load(root / "surface_xray_world.npz")
        key = next(k for k in surface.files if surface[k].ndim == 2 and surface[k].shape[1] == 3)
        self.surface = surface[key][:, ::-1].astype(np.float64)

    def photo_scores(self, model: SplatModel, transform: np.ndarray | None) -> dict[str, float]:
        """PSNR and IoU of the masks on the test photographs, black background."""
        found, overlap = [], []
        for k, camera in enumerate(self.test.cameras):
            image, alpha = model.render(camera if transform is None else camera.moved(transform))
            found.append(psnr(image, self.test.image(k), 1.0))
            assert self.test.masks is not None
            mine, theirs = alpha > 0.5, self.test.masks[k] > 0.5
            overlap.append(float((mine & theirs).sum() / (mine | theirs).sum()))
        return {"photo_psnr": float(np.mean(found)), "mask_iou": float(np.mean(overlap))}

    def volume_scores(self, volume: np.ndarray, prefix: str = "") -> dict[str, float]:
        """PSNR and SSIM of sections against the truth, and PSNR of views that were not given."""
        scores = {
            f"{prefix}volume_psnr": psnr(volume, self.volume),
            f"{prefix}section_ssim": ssim(volume, self.volume),
        }
        if self.held is not None:
            made = VoxelProjector(self.held.geometry, self.grid).apply(np.asarray(volume, np.float32))
            scores[f"{prefix}{'voxels_' if prefix else ''}view_psnr"] = psnr(made, self.held.projections)
        return scores

    def gaussian_scores(self, field: AttenuationField, scale: float) -> dict[str, float]:
        """Scores of Gaussians, as voxels and by exact line integrals."""
        with torch.no_grad():
            made = field.voxelise(self.grid.shape)[0].numpy() * np.float32(scale)
            scores = self.volume_scores(made, "gaussians_")
            if self.held is not None:
                shown = Radiographs(self.held.geometry, self.grid)
                views = shown.render(field, list(range(self.held.n_views))).numpy()
                views = views * np.float32(scale * shown.unit)
                scores["gaussians_view_psnr"] = psnr(views, self.held.projections)
        return scores

    def pose_error(self, transform: np.ndarray) -> float:
        """Root mean square over the true surface, voxels."""
        back = np.linalg.inv(self.truth)
        again = (self.surface @ back[:3, :3].T + back[:3, 3]) @ transform[:3, :3].T + transform[:3, 3]
        away = ((again - self.surface) ** 2).sum(1).mean()
        return float(np.sqrt(away) / self.grid.spacing.mean())


def drain(events: Generator[Any, Any, Any]) -> None:
    """Run a stage to its end."""
    for _ in events:
        pass


def copied(field: AttenuationField) -> AttenuationField:
    """Return a field that shares nothing with another."""
    return AttenuationField(*(t.detach().clone() for t in (field.mean, field.cholesky, field.raw)))


def xray_cameras(geometry: XrayGeometry) -> list[tuple[Camera, bool]]:
    """Return the camera that each view is, and whether its pictures are read upside down."""
    cameras = []
    rows, columns = geometry.detector_shape
    for k in range(geometry.n_views):
        source, centre, u, v = (
            np.asarray(a[k], np.float64) for a in (geometry.source, geometry.center, geometry.u, geometry.v)
        )
        right, down = u / np.linalg.norm(u), v / np.linalg.norm(v)
        forward = np.cross(down, right)
        ray = centre - source
        if ray @ forward < 0:
            forward = -forward
        depth = float(ray @ forward)
        lens = np.eye(3)
        lens[0, 0], lens[1, 1] = depth / np.linalg.norm(u), depth / np.linalg.norm(v)
        lens[0, 2] = 0.5 * (columns - 1) - (ray @ right) / np.linalg.norm(u)
        lens[1, 2] = 0.5 * (rows - 1) - (ray @ down) / np.linalg.norm(v)
        pose = np.eye(4)
        pose[:3, :3] = np.stack([right, down, forward])
        flip = np.linalg.det(pose[:3, :3]) > 0
        if flip:
            # pictures are read from the other side: rows upside down
            pose[1, :3] *= -1
            lens[1, 2] = rows - 1 - lens[1, 2]
        pose[:3, 3] = -pose[:3, :3] @ source
        cameras.append((Camera(lens, pose, (rows, columns)), flip))
    return cameras


class Blended(Radiographs):
    """X-rays by sorted alpha blending of the same Gaussians, as splatting of X-ray pictures does it.

    A Gaussian's opacity is 1 - exp(-k a l), a being its attenuation and l its line integral for a of 1 through its
    centre (from the volume of its ellipsoid: opacities do not depend on the direction); its brightness, 0 to 1, is
    fitted too. k and the brightness at the start are those with which pictures of one brightness come nearest to the
    measured ones. Pictures are line integrals over the largest.
    """

    last: Blended | None = None

    def __init__(self, geometry: XrayGeometry, grid: Grid, data: np.ndarray | None = None) -> None:
        super().__init__(geometry, grid)
        self.cameras = [(c.moved(np.linalg.inv(grid.affine)), flip) for c, flip in xray_cameras(geometry)]
        self.raw: torch.Tensor | None = None
        self.optimiser = Adam(beta2=0.999)
        if data is not None:
            self.calibrate(data)
        Blended.last = self

    def calibrate(self, data: np.ndarray) -> None:
        """Choose k and the brightness at the start; data in units of the field."""
        self.peak = float(data.max())
        wanted = data[:, ::4, ::4] / self.peak
        best = np.inf
        for strength in np.arange(0.2, 6, 0.1):
            shown = 1 - np.exp(-strength * wanted)
            bright = min(float((shown * wanted).sum() / (shown * shown).sum()), 0.99)
            error = float(np.square(bright * shown - wanted).sum())
            if error < best:
                best, self.strength, self.bright = error, strength / self.peak, bright

    def brightness(self, count: int) -> torch.Tensor:
        """Return the brightness of each Gaussian."""
        if self.raw is None:
            self.raw = torch.full((count, 1), float(np.log(self.bright / (1 - self.bright))))
        return torch.sigmoid(self.raw)

    def render(self, field: AttenuationField, views: Any, backend: str = "auto") -> torch.Tensor:
        """Return pictures, in the unit of line integrals; each call with gradients is a step of the brightness."""
        if torch.is_grad_enabled():
            self.brightness(len(field))
            assert self.raw is not None
            if self.raw.grad is not None:
                self.raw.requires_grad_(False)
                self.optimiser.step({"raw": self.raw}, {"raw": 0.02})
            self.raw.requires_grad_(True)
        bright = self.brightness(len(field)).expand(-1, 3)
        covs = field.covariances()
        full = covs[:, [[0, 1, 2], [1, 3, 4], [2, 4, 5]]]
        through = np.sqrt(2 * np.pi) * torch.linalg.det(full).clamp_min(1e-9) ** (1 / 6)
        solid = 1 - torch.exp(-self.strength * field.heights()[:, 0] * through)
        images = []
        for view in views:
            camera, flip = self.cameras[view]
            image, _ = render_rgb(
                field.mean,
                covs,
                solid.clamp(max=0.99),
                bright,
                torch.tensor(camera.world_to_camera),
                torch.tensor(camera.intrinsics),
                camera.size,
                backend=backend,
            )
            images.append(self.peak * (image[..., 0].flip(0) if flip else image[..., 0]))
        return torch.stack(images)


class Run:
    """One object with so many X-rays and one seed: the stages, made when they are asked for."""

    def __init__(self, case: Case, preset: str, seed: int, first: Run | None) -> None:
        self.case, self.seed, self.first = case, seed, first
        self.config = DualConfig.preset(preset)
        self.job = DualJob(case.train, case.scan, case.grid, None, self.config, describe_device("cpu"), seed)
        self.wall, self.cpu = 0.0, 0.0

    def timed(self, stage: Generator[Any, Any, Any]) -> None:
        """Run a stage and count its time."""
        wall, cpu = time.perf_counter(), time.process_time()
        drain(stage)
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu

    @cached_property
    def start(self) -> photos.SplatField:
        """Gaussians of the photographs alone."""
        self.timed(self.job._photographs())
        assert self.job.splats is not None
        return photos.copy_of(self.job.splats)

    @cached_property
    def alone(self) -> tuple[np.ndarray, AttenuationField]:
        """Volume and Gaussians of the X-rays alone."""
        job = self.job
        if self.first is None:
            begin = self.cpu
            self.timed(job._xrays_alone())
            self.xray_cpu = self.cpu - begin
        else:
            volume, _ = self.first.alone
            theirs = self.first.job
            job.job = copy.copy(theirs.job)
            job.job.seed = self.seed
            assert job.job.tv is not None
            drain(job.job._gaussians(job.job.tv.volume))
            job.volume, job.band, job.xray = volume, theirs.band, theirs.xray
        assert job.volume is not None and job.job.field is not None
        return job.volume, copied(job.job.field)

    @cached_property
    def inside(self) -> AttenuationField:
        """Gaussians of the X-rays after the alignment, within the outline if views are few."""
        job = self.job
        # what the joint steps need of the photographs
        _ = self.start, self.alone
        if self.first is None:
            self.timed(job._align())
        else:
            _ = self.first.inside
            job.alignment, job.surface = self.first.job.alignment, self.first.job.surface
        self.timed(job._xrays())
        assert job.job.field is not None
        return copied(job.job.field)

    def joint(self, inside: AttenuationField | None = None, **changes: Any) -> dict[str, float]:
        """Joint steps from the same two halves, with other settings."""
        inside, case, job = inside or self.inside, self.case, self.job
        job.config = self.config.model_copy(update=changes)
        job.splats, job.job.field = photos.copy_of(self.start), copied(inside)
        begin = time.process_time()
        drain(job._jointly())
        seconds = time.process_time() - begin
        job.config = self.config
        assert job.dual is not None and job.alignment is not None and job.volume is not None
        to_world = job.alignment.transform @ np.linalg.inv(job.frame)
        model = SplatModel.from_field(job.dual.surface, to_world)
        scores = case.photo_scores(model, job.alignment.transform)
        # seen from where the cameras truly were in the X-rays' world
        scores |= {f"placed_{k}": v for k, v in case.photo_scores(model, case.truth).items()}
        scores |= case.volume_scores(job.volume)
        scores |= case.gaussian_scores(job.dual.attenuation(), job.scale)
        return {
            **scores,
            "pose_error_voxels": case.pose_error(job.alignment.transform),
            "joint_cpu_s": seconds,
        }

    # ------------------------------------------------------------------------------------------------------------

    def main(self) -> dict[str, dict[str, float]]:
        """Joint, and each alone."""
        case, job = self.case, self.job
        volume, field = self.alone
        scale = job.job.scale
        only = {**case.volume_scores(volume), **case.gaussian_scores(field, scale)}
        _ = self.inside
        begin = self.cpu, time.perf_counter()
        rows = {"joint": self.joint(), "X-rays only": only}
        if self.first is None:
            rows["joint"] |= {
                "wall_s": self.wall + time.perf_counter() - begin[1],
                "cpu_s": self.cpu + rows["joint"]["joint_cpu_s"],
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
            only["cpu_s"] = self.xray_cpu
        # as many steps with the photographs, without X-rays
        job.splats, job.job.field = photos.copy_of(self.start), copied(self.inside)
        job.config = self.config.model_copy(update={"joint_steps": 0})
        drain(job._jointly())
        job.config = self.config
        assert job.dual is not None and job.alignment is not None
        settings = {"structural": self.config.structural_loss, "seed": self.seed}
        drain(fit_jointly(job.dual, job.framed, self.config.joint_steps, **settings))
        to_world = job.alignment.transform @ np.linalg.inv(job.frame)
        model = SplatModel.from_field(job.dual.surface, to_world)
        rows["photographs only"] = case.photo_scores(model, job.alignment.transform)
        return rows

    def copied(self) -> dict[str, dict[str, float]]:
        """Give the X-rays' Gaussians the colours of the nearest."""
        volume, field = self.alone
        _ = self.inside
        model = field.model(self.case.grid, self.job.job.scale)
        spacing = float(self.case.grid.spacing.mean())
        scores = copied_colours(self.case, self.job, self.start, model, spacing)
        return {"colours of the nearest": {**scores, **self.case.volume_scores(volume)}}

    def reference(self) -> dict[str, dict[str, float]]:
        """Compare with a conventional reconstruction."""
        none: dict[str, Any] = {"reference_weight": 0.0, "reference_views": 0.0, "zero_one": 0.0}
        others: dict[str, dict[str, Any]] = {
            "joint, no reference": {},
            "joint, sections of fdk": {"reference_weight": 1.0, "reference": "fdk"},
            "joint, views between of tv": {"reference_views": 1.0},
            "joint, views between of fdk": {"reference_views": 1.0, "reference": "fdk"},
            "joint, sections and views between of tv": {"reference_weight": 1.0, "reference_views": 1.0},
            "joint, no reference, zero-one": {"zero_one": 0.005},
        }
        return {label: self.joint(**{**none, **changes}) for label, changes in others.items()}

    def pull(self) -> dict[str, dict[str, float]]:
        """Let the X-rays move the surface more, and not at all."""
        return {
            "joint, X-rays pull the surface hard": self.joint(pull=0.5),
            "joint, X-rays do not pull the surface": self.joint(pull=0.0),
        }

    def blending(self) -> dict[str, dict[str, float]]:
        """Alpha blending in place of line integrals: in the joint steps, and alone."""
        case, job, grid = self.case, self.job, self.case.grid

        def blended(geometry: XrayGeometry, where: Grid) -> Blended:
            unit = Radiographs(geometry, where).unit
            return Blended(geometry, where, job.job.data / np.float32(job.job.scale * unit))

        _ = self.inside
        with mock.patch("napari_innergs.tasks.dual.Radiographs", blended):
            scores = self.joint()
        last, dual = Blended.last, job.dual
        assert last is not None and dual is not None and job.volume is not None
        with torch.no_grad():
            field = dual.attenuation()
            values = field.heights() * last.brightness(len(field))
            made = voxelise(field.mean, field.covariances(), values, grid.shape)[0].numpy()
            made *= np.float32((made * case.volume).sum() / max(float((made * made).sum()), 1e-30))
            kept = {k: v for k, v in scores.items() if not k.startswith("gaussians_")}
            kept |= case.volume_scores(made, "gaussians_")
            if case.held is not None:
                other = Blended(case.held.geometry, grid)
                other.raw, other.peak, other.strength = last.raw, last.peak, last.strength
                views = other.render(field, range(case.held.n_views)).numpy() * np.float32(
                    job.scale * other.unit
                )
                kept["gaussians_view_psnr"] = psnr(views, case.held.projections)
        return {
            "joint, alpha blending": kept,
            "X-rays alone by alpha blending": blended_alone(
                case, self.config.photo_steps, self.config.max_splats, self.seed
            ),
        }

    def alignment(self) -> dict[str, dict[str, float]]:
        """Joint steps from other poses."""
        case, job = self.case, self.job
        _ = self.inside
        found = job.alignment
        assert found is not None
        rows = {}
        poses: dict[str, Callable[[], None]] = {
            "joint, alignment without silhouettes": lambda: None,
            "joint, placed by hand": lambda: setattr(job, "given", rough(case, self.seed)),
            "joint, centres and sizes only": lambda: setattr(
                job, "given", rough_transform(case.train, job.surface)
            ),
        }
        for label, choose in poses.items():
            choose()
            job.volume, field = self.alone
            job.job.field = copied(field)
            job.config = self.config.model_copy(update={"silhouettes": False})
            drain(job._align())
            job.config = self.config
            drain(job._xrays())
            assert job.job.field is not None
            rows[label] = self.joint(copied(job.job.field))
            job.volume = self.alone[0]
        job.given, job.alignment = None, found
        return rows

    def control(self) -> dict[str, dict[str, float]]:
        """X-rays alone with as many more steps on exact line integrals, and the same mean in the end."""
        volume, field = self.alone
        job, field, begin = self.job.job, copied(field), time.process_time()
        radiographs = Radiographs(job.geometry, job.grid)
        data = job.data / np.float32(job.scale * radiographs.unit)
        steps = fit_to_views(
            field,
            radiographs,
            data,
            self.config.joint_steps,
            job.grid.shape,
            trust=job._ray_weights(),
            seed=self.seed,
        )
        drain(steps)
        scores = self.case.volume_scores(0.5 * (volume + job.voxelise(field)))
        scores |= self.case.gaussian_scores(field, job.scale)
        return {"X-rays only, as much work": {**scores, "cpu_s": time.process_time() - begin}}


def copied_colours(
    case: Case, job: DualJob, start: Any, model: igs.GaussianModel, scale: float
) -> dict[str, float]:
    """Give the X-rays' own Gaussians the colour and opacity of the nearest of the photographs' Gaussians."""
    assert job.alignment is not None
    own = SplatModel.from_field(start, job.alignment.transform @ np.linalg.inv(job.frame))
    solid = own.subset(own.opacities > 0.1)
    away, index = cKDTree(solid.means).query(model.means)
    near = away < 2.0 * scale
    mixed = SplatModel(
        model.means[near],
        model.log_scales[near],
        model.quaternions[near],
        solid.opacities[index[near]],
        solid.harmonics[index[near]],
    )
    return case.photo_scores(mixed, job.alignment.transform)


def blended_alone(case: Case, steps: int, most: int, seed: int) -> dict[str, float]:
    """X-rays alone by alpha blending, from random places; attenuation is opacity times brightness, scaled best."""
    scan = case.scan
    cameras = xray_cameras(scan.geometry)
    peak = float(scan.projections.max())
    grey = np.clip(scan.projections / peak, 0, 1)
    grey = np.stack([image[::-1] if flip else image for image, (_, flip) in zip(grey, cameras, strict=True)])
    pictures = Photographs(
        np.repeat(grey[..., None], 3, axis=3).astype(np.float32), [camera for camera, _ in cameras]
    )
    radius = 0.5 * float(case.grid.spacing.mean()) * case.grid.shape[0] * 0.7
    frame = np.eye(4)
    frame[:3] /= radius
    frame[:3, 3] = 0
    framed = pictures.moved(frame)
    field = photos.start_splats(framed, 0, least=most // 2, most=most, seed=seed)
    field.opacity -= 3
    drain(photos.fit_photographs(field, framed, steps, most=most, seed=seed))
    model = SplatModel.from_field(field, np.linalg.inv(frame))
    heights = model.opacities * model.colours.mean(1)
    made = igs.GaussianModel(
        model.means, model.log_scales, model.quaternions, heights, field="additive", units=case.grid.units
    ).voxelise(case.grid)
    scale = float((made * case.volume).sum() / max(float((made * made).sum()), 1e-30))
    return case.volume_scores(made * np.float32(scale), "gaussians_")


def rough(case: Case, seed: int) -> np.ndarray:
    """Return the true pose with the errors of a placement by hand."""
    random = np.random.default_rng(seed)
    axis = random.normal(size=3)
    axis /= np.linalg.norm(axis)
    angle = np.radians(ROUGH[0])
    skew = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * skew @ skew
    shift = random.normal(size=3)
    middle = case.surface.mean(0)
    move = np.eye(4)
    move[:3, :3] = (1 + ROUGH[1]) * turn
    move[:3, 3] = middle - move[:3, :3] @ middle
    move[:3, 3] += ROUGH[2] * case.grid.spacing.mean() * shift / np.linalg.norm(shift)
    return np.asarray(move @ case.truth)


def rounded(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {label: {k: float(f"{v:.5g}") for k, v in scores.items()} for label, scores in rows.items()}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and number of seeds of everything measured."""
    found: dict[str, Any] = {}
    for run in runs:
        for label, scores in run["rows"].items():
            place = found.setdefault(f"{run['object']}, {run['xrays']} X-rays", {}).setdefault(label, {})
            for key, value in scores.items():
                place.setdefault(key, []).append(value)
    for rows in found.values():
        for label, scores in rows.items():
            rows[label] = {
                k: [float(f"{np.mean(v):.5g}"), float(f"{np.std(v, ddof=min(1, len(v) - 1)):.2g}"), len(v)]
                for k, v in scores.items()
            }
    return found


def tables(found: dict[str, Any]) -> str:
    """Return the summary in Markdown: mean and, of several seeds, standard deviation."""
    columns = {
        "photo_psnr": "photographs, dB",
        "placed_photo_psnr": "from their true places, dB",
        "mask_iou": "masks, IoU",
        "volume_psnr": "volume, dB",
        "gaussians_volume_psnr": "Gaussians, dB",
        "gaussians_section_ssim": "their sections, SSIM",
        "gaussians_view_psnr": "their X-ray views, dB",
        "pose_error_voxels": "pose, voxels",
    }
    lines = []
    for title, rows in found.items():
        lines += [
            f"**{title}**",
            "",
            "| | " + " | ".join(columns.values()) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for label, scores in rows.items():
            cells = []
            for key in columns:
                digits = 4 if key in ("mask_iou", "gaussians_section_ssim") else 2
                mean, spread, count = scores.get(key, (None, 0.0, 0))
                text = "" if mean is None else f"{mean:.{digits}f}"
                cells.append(text + (f" ± {spread:.{digits}f}" if count > 1 else ""))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for and write it after each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", nargs="+", default=["tooth", "shell"], choices=["tooth", "shell"])
    parser.add_argument("--views", nargs="+", type=int, default=[50, 10], choices=[50, 25, 10])
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=["main", "control"],
        choices=["all", *PARTS],
        help="parts to be run; the control is for fewer than 20 views",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what the result file has")
    parser.add_argument("--name", default="dual", help="name of the result file")
    parser.add_argument("--table", action="store_true", help="only print the result file's summary")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    if options.table:
        print(tables(json.loads((RESULTS / f"{options.name}.json").read_text())["summary"]))
        return
    parts = PARTS if "all" in options.only else options.only
    runs: list[dict[str, Any]] = []
    file = RESULTS / f"{options.name}.json"
    if file.exists() and not options.fresh:
        before = json.loads(file.read_text())
        if before["preset"] != options.preset:
            parser.error(f"{file.name} has the preset {before['preset']}; use --fresh or another --name")
        runs = before["runs"]
    for name in options.objects:
        for views in options.views:
            given = 45 if views == 50 else views
            case, first = Case(name, views), None
            for seed in options.seeds:
                run = Run(case, options.preset, seed, first)
                first = first or run
                about = {"object": name, "xrays": given, "seed": seed}
                entry = next((r for r in runs if about.items() <= r.items()), None)
                if entry is None:
                    entry = {**about, "rows": {}}
                    runs.append(entry)
                for part in parts:
                    if part == "control" and given >= 20:
                        continue
                    begin = time.process_time()
                    rows = rounded(getattr(run, part)())
                    entry["rows"].update(rows)
                    print(
                        name,
                        given,
                        "seed",
                        seed,
                        part,
                        round(time.process_time() - begin),
                        "cpu s",
                        flush=True,
                    )
                    for label, scores in rows.items():
                        print(f"  {label:42s}", scores, flush=True)
                    write(options.name, {"preset": options.preset, "summary": summary(runs), "runs": runs})


if __name__ == "__main__":
    main()
