"""Photographs and X-rays of one object: the joint model against each alone, and what its parts are worth.

Data: `dual/tooth` and `dual/shell` of INNERGS_DATA; photographs and X-rays come from two renderers that are not ours.
With 50 X-rays, 45 are given and 5 are for the test; 60 photographs are given and 12 are for the test.

    INNERGS_DATA=... python benchmarks/dual.py --objects tooth --views 50
    INNERGS_DATA=... python benchmarks/dual.py --preset fast --seeds 0 1 2 --ablations --name dual_ablations
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write
from scipy.spatial import cKDTree

import napari_innergs as igs
from napari_innergs.config_dual import DualConfig
from napari_innergs.device import describe_device
from napari_innergs.fit import photos
from napari_innergs.fit.attenuation import AttenuationField
from napari_innergs.fit.dual import fit_jointly
from napari_innergs.fit.metrics import psnr, ssim
from napari_innergs.fit.splats import SplatModel
from napari_innergs.geometry.camera import Camera
from napari_innergs.geometry.grid import Grid
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.photographs import Photographs
from napari_innergs.scan import Scan
from napari_innergs.tasks.dual import DualJob

REVERSE = np.eye(4)[[2, 1, 0, 3]]
# what a rough placement by hand is off by: degrees, share of the size, voxels
ROUGH = (3.0, 0.03, 3.0)


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
            scores[f"{prefix}view_psnr"] = psnr(made, self.held.projections)
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


def joint(case: Case, job: DualJob, start: Any, inside: AttenuationField, **changes: Any) -> dict[str, float]:
    """Joint steps from the same two halves, with other settings."""
    base = job.config
    job.config = base.model_copy(update=changes)
    job.splats, job.job.field = photos.copy_of(start), copied(inside)
    begin = time.process_time()
    drain(job._jointly())
    seconds = time.process_time() - begin
    job.config = base
    assert job.dual is not None and job.alignment is not None and job.volume is not None
    to_world = job.alignment.transform @ np.linalg.inv(job.frame)
    scores = case.photo_scores(SplatModel.from_field(job.dual.surface, to_world), job.alignment.transform)
    scores |= case.volume_scores(job.volume)
    scores |= case.volume_scores(job.dual.model(case.grid, job.scale).voxelise(case.grid), "gaussians_")
    return {**scores, "pose_error_voxels": case.pose_error(job.alignment.transform), "joint_cpu_s": seconds}


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


def blended(case: Case, steps: int, most: int, seed: int) -> dict[str, float]:
    """X-rays by alpha blending in place of line integrals; attenuation is opacity times brightness, scaled best."""
    scan, cameras = case.scan, []
    rows, columns = scan.geometry.detector_shape
    for k in range(scan.n_views):
        g = scan.geometry
        source, centre, u, v = (np.asarray(a[k], np.float64) for a in (g.source, g.center, g.u, g.v))
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
    return case.volume_scores(made * np.float32(scale))


def run(name: str, views: int, preset: str, seed: int, ablations: bool) -> dict[str, Any]:
    """All of one object, number of views and seed."""
    case = Case(name, views)
    config = DualConfig.preset(preset)
    began, cpu = time.perf_counter(), time.process_time()
    job = DualJob(case.train, case.scan, case.grid, None, config, describe_device("cpu"), seed)
    drain(job._photographs())
    start = photos.copy_of(job.splats) if job.splats is not None else None
    drain(job._xrays_alone())
    drain(job._align())
    drain(job._xrays())
    inside = copied(job.job.field) if job.job.field is not None else None
    assert start is not None and inside is not None
    rows: dict[str, dict[str, float]] = {"joint": joint(case, job, start, inside)}
    rows["joint"] |= {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    begin = time.process_time()
    alone = igs.reconstruct_projections(case.scan, None, case.grid, config.xray, device="cpu", seed=seed)
    rows["X-rays only"] = {**case.volume_scores(alone.volume), "cpu_s": time.process_time() - begin}
    assert alone.model is not None
    rows["X-rays only"] |= case.volume_scores(alone.model.voxelise(case.grid), "gaussians_")
    # as many steps with the photographs, without X-rays
    job.dual = None
    job.splats = photos.copy_of(start)
    job.job.field = copied(inside)
    job.config = config.model_copy(update={"joint_steps": 0})
    drain(job._jointly())
    job.config = config
    assert job.dual is not None and job.alignment is not None
    drain(fit_jointly(job.dual, job.framed, config.joint_steps, structural=config.structural_loss, seed=seed))
    to_world = job.alignment.transform @ np.linalg.inv(job.frame)
    rows["photographs only"] = case.photo_scores(
        SplatModel.from_field(job.dual.surface, to_world), job.alignment.transform
    )
    if ablations:
        spacing = float(case.grid.spacing.mean())
        rows["colours of the nearest"] = {
            **copied_colours(case, job, start, alone.model, spacing),
            **case.volume_scores(alone.volume),
        }
        for reference in ("tv", "fdk"):
            rows[f"joint, reference {reference}"] = joint(
                case, job, start, inside, reference_weight=1.0, reference=reference
            )
        rows["joint, X-rays pull the surface hard"] = joint(case, job, start, inside, pull=0.5)
        rows["alpha blending in place of line integrals"] = blended(
            case, config.photo_steps, config.max_splats, seed
        )
        job.given = rough(case, seed)
        drain(job._align())
        drain(job._xrays())
        assert job.job.field is not None
        rows["joint, placed by hand"] = joint(case, job, start, copied(job.job.field))
    for scores in rows.values():
        for key, value in scores.items():
            scores[key] = float(f"{value:.5g}")
    return rows


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


def main() -> None:
    """Run what was asked for and write it after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", nargs="+", default=["tooth", "shell"])
    parser.add_argument("--views", nargs="+", type=int, default=[50, 10])
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--name", default="dual")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        for name in options.objects:
            for views in options.views:
                rows = run(name, views, options.preset, seed, options.ablations)
                given = 45 if views == 50 else views
                runs.append({"object": name, "xrays": given, "seed": seed, "rows": rows})
                print(name, given, "seed", seed, flush=True)
                for label, scores in rows.items():
                    print(f"  {label:45s}", scores, flush=True)
                write(options.name, {"preset": options.preset, "runs": runs})


if __name__ == "__main__":
    main()
