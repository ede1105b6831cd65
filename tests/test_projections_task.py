"""The job from projections to a volume."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from skimage.transform import radon

from napari_innergs.config_projections import PROJECTION_PRESETS, ProjectionConfig
from napari_innergs.fit.engine import Done, Failed, Preview, Step
from napari_innergs.fit.metrics import psnr
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.result import load
from napari_innergs.scan import Scan
from napari_innergs.tasks.projections import (
    estimate_projections,
    fit_projections,
    interruptible,
    reconstruct_projections,
)

QUICK = {"preset": "fast", "volume_steps": 15, "view_steps": 10, "tv_passes": 12}


def phantom(n: int, depth: int) -> np.ndarray:
    """A body with two bones and a hole, smooth inside, attenuation up to 0.05."""
    z, y, x = (np.linspace(-1, 1, k) for k in (depth, n, n))
    z, y, x = np.meshgrid(z * 0.6, y, x, indexing="ij")
    out = 0.02 * ((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1) * (1 + 0.2 * np.sin(4 * x + 3 * z))
    out += 0.03 * ((x - 0.35) ** 2 + y**2 + z**2 < 0.15**2)
    out += 0.02 * ((x + 0.3) ** 2 + (y - 0.2) ** 2 < 0.12**2)
    out -= 0.018 * ((x + 0.1) ** 2 + (y + 0.25) ** 2 < 0.1**2)
    return out.clip(0).astype(np.float32)


def cone(n: int = 32, views: int = 24) -> tuple[np.ndarray, Scan]:
    """A volume and its scan: its values, from a grid twice as fine."""
    fine = phantom(2 * n, 2 * n)
    geometry = ConeBeam.circular(
        np.arange(views) * 2 * np.pi / views,
        source_origin=5.0 * n,
        source_detector=7.5 * n,
        detector_shape=(n + 8, n + 8),
        pixel_size=1.5,
    )
    half = np.diag([0.5, 0.5, 0.5, 1.0])
    half[:3, 3] = -0.25 * (2 * n - 1)
    grid = np.eye(4)
    grid[:3, 3] = -0.5 * (n - 1)
    data = VoxelProjector(geometry, Grid(fine.shape, half)).apply(fine)
    truth = fine.reshape(n, 2, n, 2, n, 2).mean((1, 3, 5))
    return truth, Scan(data, geometry, Grid((n, n, n), grid), name="phantom")


@pytest.fixture(scope="module")
def scanned() -> tuple[np.ndarray, Scan]:
    return cone()


def test_the_mean_is_better_than_total_variation(scanned):
    truth, scan = scanned
    counts = np.random.default_rng(0).poisson(1e4 * np.exp(-scan.projections)).clip(1)
    seen, result = {}, None
    for event in fit_projections(counts, scan.geometry, scan.grid, "best", i0=1e4):
        assert not isinstance(event, Failed), event
        if isinstance(event, Preview):
            seen[event.label] = psnr(event.volume, truth)
        if isinstance(event, Done):
            result = event.result
    assert result is not None
    assert list(seen) == ["FDK", "total variation", "combined"]
    assert seen["combined"] > seen["total variation"]
    assert seen["total variation"] > seen["FDK"] + 3
    assert result.uncertainty.shape == truth.shape
    inside = np.abs(result.volume - truth) <= result.uncertainty
    assert 0.85 < inside[truth > 0].mean() < 0.985
    # also where borders are: both estimates blur them alike
    slope = np.sqrt(sum(g**2 for g in np.gradient(truth)))
    assert inside[slope > np.quantile(slope, 0.9)].mean() > 0.75


def test_the_result_explains_itself(scanned, tmp_path):
    _, scan = scanned
    result = reconstruct_projections(scan, config=QUICK)
    report = result.report
    assert report["n_gaussians"] == len(result.model) > 100
    assert result.model.field == "additive"
    assert sum(report["contributions"].values()) == pytest.approx(1)
    assert set(report["residual_rms"]) == {"tv", "gaussians", "combined"}
    assert report["steps"] == {"volume": 15, "views": 10}
    assert report["scan"]["name"] == "phantom"
    assert report["config"]["volume_steps"] == 15
    json.dumps(report)
    again = load(result.save(tmp_path / "out"))
    np.testing.assert_array_equal(again.volume, result.volume)


def test_same_seed_same_volume(scanned):
    _, scan = scanned
    settings = {**QUICK, "tv_weight": 1e-3, "tv_passes": 4}
    one, two, other = (reconstruct_projections(scan, config=settings, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(one.volume, two.volume)
    np.testing.assert_array_equal(one.model.amplitudes, two.model.amplitudes)
    assert not np.array_equal(one.model.means, other.model.means)


@pytest.mark.parametrize("phase", ["Filtered", "Total variation", "Gaussians: volume", "Gaussians: proj"])
def test_cancelled_within_half_a_second(scanned, phase):
    _, scan = scanned
    settings = {"preset": "best", "tv_passes": 300 if phase == "Total variation" else 4, "tv_weight": 1e-3}
    if phase == "Gaussians: proj":
        settings["volume_steps"] = 1
    events = fit_projections(scan, config=settings)
    for event in events:
        if isinstance(event, Step) and event.phase.startswith(phase):
            break
    else:
        pytest.fail(f"there was no {phase}")
    begin = time.perf_counter()
    events.close()
    assert time.perf_counter() - begin < 0.5


def test_not_asking_pauses():
    count = 0

    def work(step):
        nonlocal count
        for _ in range(10_000):
            count += 1
            step(count, 10_000)
            time.sleep(1e-3)

    from napari_innergs.fit.engine import Progress

    progress = Progress()
    progress.enter("work", 1.0)
    steps = interruptible(work, progress)
    next(steps)
    time.sleep(0.02)
    before = count
    time.sleep(0.1)
    assert count <= before + 1
    next(steps)
    assert count > before
    steps.close()
    time.sleep(0.05)
    before = count
    time.sleep(0.05)
    assert count == before


def test_parallel_beam_of_another_library_is_not_worse_than_total_variation():
    n, views = 48, 40
    truth = phantom(n, 6)
    degrees = np.arange(views) * 180 / views
    # one row of the panel is one slice; radon turns the image about pixel n // 2 and sums its rows
    data = np.stack([radon(plane, theta=degrees, circle=True) for plane in truth]).transpose(2, 0, 1)
    angles = -np.deg2rad(degrees) - np.pi / 2
    geometry = ParallelBeam.circular(angles, detector_shape=(6, n)).with_offset(0.0, -0.5)
    affine = np.eye(4)
    affine[:3, 3] = [-2.5, -(n // 2), -(n // 2)]
    scores = {}
    for event in fit_projections(data, geometry, Grid(truth.shape, affine), "best"):
        assert not isinstance(event, Failed), event
        if isinstance(event, Preview):
            scores[event.label] = psnr(event.volume, truth)
    assert scores["total variation"] > scores["FBP"]
    assert scores["combined"] >= scores["total variation"] - 0.05


def test_exact_rays_and_the_published_schedule(scanned):
    _, scan = scanned
    settings = {"preset": "r2-paper", "view_steps": 30, "voxels_per_gaussian": 8.0, "volume_steps": 10}
    labels, result = [], None
    for event in fit_projections(scan, config=settings):
        assert not isinstance(event, Failed), event
        if isinstance(event, Preview):
            labels.append(event.label)
        if isinstance(event, Done):
            result = event.result
    assert labels == ["FDK", "combined"]
    assert result.report["tv"] is None and result.report["baseline"] == "fdk"
    assert result.report["contributions"] == {"gaussians": 1.0}
    assert result.uncertainty is None
    np.testing.assert_allclose(np.squeeze(result.model.voxelise(scan.grid)), result.volume, atol=1e-5)


def test_the_published_schedule_adds_gaussians_up_to_the_limit(scanned):
    _, scan = scanned
    settings = {"preset": "r2-paper", "view_steps": 40, "voxels_per_gaussian": 20.0, "densify_gradient": 1e-4}
    at_start = {**settings, "densify_every": 0, "view_steps": 1}
    few = reconstruct_projections(scan, config=at_start).report["n_gaussians"]
    many = reconstruct_projections(scan, config=settings).report["n_gaussians"]
    assert many > 1.2 * few
    bounded = {**settings, "max_gaussians": few + 7}
    assert few < reconstruct_projections(scan, config=bounded).report["n_gaussians"] <= few + 7
    never = {**settings, "densify_gradient": None, "prune_below": None, "start_gaussians": 50}
    assert reconstruct_projections(scan, config=never).report["n_gaussians"] == 50


def test_no_gaussians(scanned):
    _, scan = scanned
    result = reconstruct_projections(scan, config={"gaussians": False, "tv_weight": 1e-3, "tv_passes": 3})
    assert result.model is None and result.uncertainty is None
    assert result.report["contributions"] == {"tv": 1.0}


def test_estimates_grow(scanned):
    _, scan = scanned
    fast, best = (estimate_projections(scan, config=name) for name in ("fast", "best"))
    assert 0 < fast["seconds"] < best["seconds"]
    assert fast["bytes"] > 30 * scan.grid.size


@pytest.mark.parametrize("name", PROJECTION_PRESETS)
def test_presets_survive_yaml(name, tmp_path):
    settings = ProjectionConfig.preset(name)
    settings.to_yaml(tmp_path / "a.yaml")
    assert ProjectionConfig.from_yaml(tmp_path / "a.yaml") == settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": "quick"}, "config: there is no preset 'quick'"),
        ({"config": {"speed": 3}}, "config: there is no setting 'speed'"),
        ({"config": {"view_steps": -1}}, "config: view_steps = -1"),
        ({"config": {"combine": "gaussians", "gaussians": False}}, "needs gaussians"),
        ({"seed": -1}, "seed: got -1"),
        ({"i0": 100.0}, "i0, flat, dark: a Scan brings its own"),
        ({"grid": Grid((4, 4, 4), np.eye(4) + np.eye(4, k=3) * 1e6)}, "geometry: no ray"),
        ({"grid": Grid((4000, 4000, 4000))}, "grid|geometry"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_bad_arguments_are_named_before_work_starts(scanned, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_projections(scanned[1], **arguments)


def test_types_are_checked(scanned):
    _, scan = scanned
    with pytest.raises(TypeError, match="grid: expected a Grid"):
        fit_projections(scan, grid=(4, 4, 4))
    with pytest.raises(ValueError, match="geometry: got None"):
        fit_projections(scan.projections)
    with pytest.raises(TypeError, match="config: expected settings"):
        fit_projections(scan, config=3)


def test_a_wrong_direction_is_reported(scanned):
    _, scan = scanned
    result = reconstruct_projections(
        scan.projections[::-1], scan.geometry, scan.grid, {**QUICK, "gaussians": False, "tv_passes": 2}
    )
    assert any("wrong" in text or "opposite" in text for text in result.report["warnings"])


def test_weights_of_rays_are_a_setting(scanned):
    _, scan = scanned
    made = [
        reconstruct_projections(scan, config={**QUICK, "gaussians": False, "tv_trust": trust}).volume
        for trust in (0.0, 1.0, 0.0)
    ]
    assert np.abs(made[0] - made[1]).max() > 1e-3 * made[0].max()
    np.testing.assert_array_equal(made[0], made[2])
