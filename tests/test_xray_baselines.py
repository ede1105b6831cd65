"""FDK, FBP, OS-SART, CG and TV on analytic ellipsoids: scale, weights, margins, the choice of the weight."""

from itertools import pairwise

import numpy as np
import pytest

from napari_innergs.baselines.fdk import fdk, filter_rows
from napari_innergs.baselines.sart import conjugate_gradients, os_sart, set_up
from napari_innergs.baselines.xray_tv import FLAT as FLATNESS
from napari_innergs.baselines.xray_tv import TRIALS, flatness, guided_tv, reconstruct_tv
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam, XrayGeometry
from napari_innergs.operators.project import VoxelProjector

#: Centre and half axes (z, y, x) and attenuation of ellipsoids, without any symmetry
BODIES = [((0.5, -2.0, 1.0), (7.0, 8.0, 10.0), 0.02), ((-1.0, 1.0, 4.0), (3.0, 4.0, 3.0), 0.03)]
#: A slab of about constant value inside the large one, outside the small one
FLAT = (slice(13, 17), slice(8, 13), slice(10, 15))
PLACE = {"source_origin": 70.0, "source_detector": 105.0}
PANEL = {"detector_shape": (36, 44), "pixel_size": 1.2}


def whole_turn(n):
    return np.arange(n) * 2 * np.pi / n


def lines(geometry):
    """Return exact line integrals through the ellipsoids, float32."""
    rows, cols = geometry.detector_shape
    v, u = np.arange(rows) - (rows - 1) / 2, np.arange(cols) - (cols - 1) / 2
    pixel = geometry.center[:, None, None] + v[:, None, None] * geometry.v[:, None, None]
    pixel = pixel + u[:, None] * geometry.u[:, None, None]
    if geometry.kind == "cone":
        start = geometry.source[:, None, None]
        ray = pixel - start
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    else:
        start, ray = pixel, np.broadcast_to(geometry.direction[:, None, None], pixel.shape)
    total = np.zeros(pixel.shape[:-1])
    for centre, half, value in BODIES:
        a, b = (start - np.array(centre)) / half, ray / half
        square, mixed, rest = (b * b).sum(-1), (a * b).sum(-1), (a * a).sum(-1) - 1
        total += value * 2 * np.sqrt(np.maximum(mixed**2 - square * rest, 0)) / square
    return total.astype(np.float32)


def grid(n=28, spacing=1.0, nz=None):
    shape = (nz or n, n, n)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    return Grid(shape, affine)


def truth(voxels, fine=4):
    index = np.stack(np.meshgrid(*[np.arange(s) for s in voxels.shape], indexing="ij"), -1).astype(float)
    at = (np.arange(fine) + 0.5) / fine - 0.5
    volume = np.zeros(voxels.shape)
    for offset in np.stack(np.meshgrid(at, at, at, indexing="ij"), -1).reshape(-1, 3):
        points = voxels.index_to_world(index + offset)
        for centre, half, value in BODIES:
            volume += value * ((((points - centre) / half) ** 2).sum(-1) < 1)
    return (volume / fine**3).astype(np.float32)


TRUTH = truth(grid())


def error(volume, want=TRUTH):
    """Root mean square error as a share of the range."""
    return float(np.sqrt(np.mean((volume - want) ** 2)) / want.max())


SCANS = {
    "cone": ConeBeam.circular(whole_turn(90), **PLACE, **PANEL),
    "cone, clockwise": ConeBeam.circular(whole_turn(90), rotation="cw", start_angle=1.0, **PLACE, **PANEL),
    "cone, half scan": ConeBeam.circular(np.arange(70) * (np.pi + 0.85) / 70, **PLACE, **PANEL),
    "cone, half scan, clockwise": ConeBeam.circular(
        np.arange(70) * (np.pi + 0.85) / 70, rotation="cw", start_angle=2.0, **PLACE, **PANEL
    ),
    "cone, three quarters": ConeBeam.circular(np.arange(80) * 1.5 * np.pi / 80, **PLACE, **PANEL),
    "cone, uneven": ConeBeam.circular(
        np.sort(whole_turn(90) + 0.02 * np.sin(np.arange(90) * 2.0)), **PLACE, **PANEL
    ),
    "cone, displaced panel": ConeBeam.circular(
        whole_turn(120), **PLACE, detector_shape=(36, 34), pixel_size=1.2, detector_offset=(0.0, 9.0)
    ),
    "cone, displaced the other way": ConeBeam.circular(
        whole_turn(120), **PLACE, detector_shape=(36, 34), pixel_size=1.2, detector_offset=(1.0, -9.0)
    ),
    "parallel, half turn": ParallelBeam.circular(np.arange(60) * np.pi / 60, detector_shape=(36, 36)),
    "parallel, whole turn": ParallelBeam.circular(whole_turn(61), detector_shape=(36, 36)),
    "parallel, displaced panel": ParallelBeam.circular(
        whole_turn(120), detector_shape=(36, 26), detector_offset=(0.0, 7.0)
    ),
}


@pytest.mark.parametrize("scan", SCANS)
def test_fdk_scale_and_weights(scan):
    geometry = SCANS[scan]
    volume = fdk(lines(geometry), geometry, grid(), "ramp")
    assert volume.shape == TRUTH.shape and volume.dtype == np.float32
    inside = np.isclose(TRUTH, TRUTH.max())
    assert inside.sum() > 30
    assert abs(volume[inside].mean() / TRUTH[inside].mean() - 1) < 0.02
    assert abs(volume[FLAT].mean() / TRUTH[FLAT].mean() - 1) < 0.02
    assert error(volume) < 0.06


def test_fdk_is_the_same_in_any_frame_and_unit():
    geometry = SCANS["cone"]
    data = lines(geometry)
    before = fdk(data, geometry, grid())
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    move = np.eye(4)
    move[:3, :3] = turn
    move[:3, 3] = (4.0, -50.0, 30.0)
    moved = fdk(data, geometry.moved(move), Grid(grid().shape, move @ grid().affine))
    np.testing.assert_allclose(moved, before, atol=1e-3 * before.max())
    tenth = XrayGeometry(geometry.vectors / 10, geometry.detector_shape)
    small = fdk(data, tenth, grid(spacing=0.1))
    np.testing.assert_allclose(small, 10 * before, atol=1e-2 * before.max())


def test_short_scan_needs_its_weights():
    """Without them, rays that are measured twice would count twice."""
    geometry = SCANS["cone, half scan"]
    right = fdk(lines(geometry), geometry, grid())
    every = SCANS["cone"]
    assert error(right, fdk(lines(every), every, grid())) < 0.03


def test_windows():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, 3, 64)).astype(np.float32)
    ones = np.ones(4)
    sharp, smooth = (filter_rows(noise, ones, window) for window in ("ramp", "hann"))
    assert smooth.std() < 0.75 * sharp.std()
    # the kernel itself: 1/4, then -1/(pi n)^2 at odd n and nothing at even n
    spike = np.zeros((1, 1, 64), np.float32)
    spike[0, 0, 20] = 1
    kernel = filter_rows(spike, ones[:1], "ramp")[0, 0, 20:25]
    np.testing.assert_allclose(kernel, [0.25, -1 / np.pi**2, 0, -1 / (9 * np.pi**2), 0], atol=1e-6)
    np.testing.assert_allclose(filter_rows(noise, 2 * ones, "ramp"), sharp / 2, atol=1e-5)


def few(n=24, noise=0.0):
    geometry = ConeBeam.circular(whole_turn(n), **PLACE, **PANEL)
    data = lines(geometry)
    data += noise * np.random.default_rng(0).standard_normal(data.shape).astype(np.float32)
    return geometry, data


def test_iterations_beat_fdk_with_few_views():
    geometry, data = few(noise=0.01)
    first = error(fdk(data, geometry, grid()))
    sart = error(os_sart(data, geometry, grid(), 10))
    _, clean = few()
    gradients = error(conjugate_gradients(clean, geometry, grid(), weight=0.01))
    found = reconstruct_tv(data, geometry, grid())
    assert sart < 0.75 * first
    assert gradients < error(fdk(clean, geometry, grid()))
    assert error(found.volume) < sart
    assert found.volume.min() >= 0
    assert abs(found.volume[FLAT].mean() / TRUTH[FLAT].mean() - 1) < 0.02


def test_sart_starts_relaxes_and_keeps_sign():
    geometry, data = few()
    once = os_sart(data, geometry, grid(), 6)
    twice = os_sart(data, geometry, grid(), 3, start=os_sart(data, geometry, grid(), 3))
    np.testing.assert_allclose(twice, once, atol=1e-5)
    assert once.min() >= 0
    assert os_sart(data, geometry, grid(), 6, nonnegative=False).min() < 0
    assert error(os_sart(data, geometry, grid(), 1, relaxation=0.3), once) > error(
        os_sart(data, geometry, grid(), 1), once
    )


def test_cg_solves_the_normal_equations():
    geometry = ConeBeam.fan(whole_turn(12), **PLACE, n_columns=20, pixel_size=2.5)
    voxels = grid(8, 3.0, 1)
    data = lines(geometry)
    problem = set_up(data, geometry, voxels, 0)
    matrix = np.stack(
        [
            problem.projector.apply(e.reshape(problem.projector.domain_shape)).ravel()
            for e in np.eye(64, dtype="f4")
        ],
        1,
    )
    rays = problem.row.ravel()
    scale = 0.01 * float(np.mean(matrix[rays > 0].sum(0)))
    left = matrix.T @ (rays[:, None] * matrix) + scale * np.eye(64)
    want = np.linalg.solve(left, matrix.T @ (rays * data.ravel())).reshape(problem.projector.domain_shape)
    got = conjugate_gradients(data, geometry, voxels, 60, weight=0.01)
    np.testing.assert_allclose(got, problem.leave(want), atol=2e-4 * np.abs(want).max())


def test_weight_grows_with_noise():
    """And what is chosen is about the best that the truth would choose."""
    geometry, clean = few(32)
    _, noisy = few(32, noise=0.01)
    low, high = (reconstruct_tv(data, geometry, grid()) for data in (clean, noisy))
    assert high.weight >= 4 * low.weight
    assert 2 <= len(high.trials) <= TRIALS
    residuals = dict(high.trials)
    assert residuals[high.weight] <= 1.06 * min(residuals.values())
    scores = {
        factor: error(reconstruct_tv(noisy, geometry, grid(), high.weight * factor).volume)
        for factor in (1 / 8, 1, 8)
    }
    assert scores[1] < scores[8] and scores[1] < scores[1 / 8]
    given = reconstruct_tv(noisy, geometry, grid(), high.weight)
    assert given.trials == ()
    assert error(given.volume, high.volume) < 0.01


def test_weight_does_not_depend_on_units():
    geometry, data = few(24, noise=0.01)
    small = XrayGeometry(geometry.vectors / 10, geometry.detector_shape)
    a, b = reconstruct_tv(data, geometry, grid()), reconstruct_tv(data, small, grid(spacing=0.1))
    assert a.weight == b.weight
    np.testing.assert_allclose(b.volume, 10 * a.volume, atol=0.01 * b.volume.max())


def test_margin_takes_up_what_lies_outside():
    """The object goes on above and below the grid."""
    geometry, data = few(40)
    flat = Grid((8, 28, 28), grid().crop(z=slice(10, 18)).affine)
    want = TRUTH[10:18]
    without = os_sart(data, geometry, flat, 10)
    within = os_sart(data, geometry, flat, 10, margin=(10, 0, 0))
    assert within.shape == flat.shape
    assert error(within, want) < 0.5 * error(without, want)


@pytest.mark.parametrize("method", [os_sart, conjugate_gradients, fdk, reconstruct_tv])
def test_progress_can_stop(method):
    geometry, data = few(12)
    seen = []

    def step(done, total):
        seen.append((done, total))
        if done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method(data, geometry, grid(), step=step)
    assert all(0 < done < total for done, total in seen)
    assert [done >= 3 for done, _ in seen] == [False] * (len(seen) - 1) + [True]


def test_progress_reaches_its_total():
    geometry, data = few(12)
    seen = []
    reconstruct_tv(data, geometry, grid(), passes=5, step=lambda *a: seen.append(a))
    assert seen[-1][0] == seen[-1][1]
    assert all(a[0] <= b[0] for a, b in pairwise(seen))


def test_the_change_is_told_when_the_last_pass_took_larger_subsets():
    geometry = ConeBeam.circular(
        np.arange(12) * np.pi / 6,
        source_origin=100,
        source_detector=150,
        detector_shape=(8, 20),
        pixel_size=1.5,
    )
    chord = 2 * np.sqrt(np.maximum((20 / 3) ** 2 - (np.arange(20) - 9.5) ** 2, 0))
    line = Grid((1, 1, 12), [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, -5.5], [0, 0, 0, 1]])
    for passes in (5, 6, 7):
        found = reconstruct_tv(np.tile(0.02 * chord, (12, 8, 1)), geometry, line, 2**-9, passes=passes)
        assert found.change < 0.1


def test_bad_input():
    geometry, data = few(12)
    broken = data.copy()
    broken[3, 2, 1] = np.nan
    for method in (fdk, os_sart, conjugate_gradients, reconstruct_tv):
        with pytest.raises(ValueError, match=r"projections: got shape \(11, 36, 44\), need \(12, 36, 44\)"):
            method(data[:11], geometry, grid())
        with pytest.raises(ValueError, match="NaN"):
            method(broken, geometry, grid())
    away = np.eye(4)
    away[:3, 3] = 400.0
    with pytest.raises(ValueError, match="all miss the grid"):
        os_sart(data, geometry, Grid((4, 4, 4), away))
    with pytest.raises(ValueError, match="window"):
        fdk(data, geometry, grid(), "cosine")
    with pytest.raises(ValueError, match="margin"):
        os_sart(data, geometry, grid(), margin=-1)
    with pytest.raises(ValueError, match="relaxation"):
        os_sart(data, geometry, grid(), relaxation=2.5)
    with pytest.raises(ValueError, match="start"):
        os_sart(data, geometry, grid(), start=np.zeros((3, 3, 3)))
    with pytest.raises(ValueError, match="iterations"):
        conjugate_gradients(data, geometry, grid(), 0)
    with pytest.raises(ValueError, match="weight"):
        reconstruct_tv(data, geometry, grid(), -1.0)
    with pytest.raises(ValueError, match="at least 4"):
        reconstruct_tv(data[:3], geometry.subset([0, 1, 2]), grid())


def blocks(seed=None, photons=1e5, dense=1.0, views=24):
    """Return a scan of boxes, counts if there is a seed, with its grid and truth."""
    want = np.zeros((12, 20, 36), np.float32)
    want[2:10, 3:17, 2:34] = 0.02
    want[3:9, 5:12, 20:30] = 0.035
    want[4:8, 8:15, 5:13] = 0.01
    want *= dense
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = -(np.array(want.shape) - 1) / 2
    voxels = Grid(want.shape, affine)
    geometry = ConeBeam.circular(whole_turn(views), **PLACE, detector_shape=(24, 56), pixel_size=1.2)
    data = VoxelProjector(geometry, voxels).apply(want)
    if seed is not None:
        counts = np.random.default_rng(seed).poisson(photons * np.exp(-data)).clip(1)
        data = (-np.log(counts / photons)).astype(np.float32)
    return data, geometry, voxels, want


def test_flat_parts_are_told_from_texture():
    volume = np.zeros((30, 30, 30), np.float32)
    volume[3:27, 3:27, 3:27] = 1
    volume[8:20, 8:20, 8:20] = 2
    texture = volume * (1 + np.random.default_rng(0).random(volume.shape).astype(np.float32))
    assert flatness(volume) < FLATNESS < 0.5 < flatness(texture)
    assert flatness(np.ones((4, 4, 4), np.float32)) == 1


def test_a_guide_sharpens_flat_objects():
    data, geometry, voxels, want = blocks(0)
    found = reconstruct_tv(data, geometry, voxels)
    better = guided_tv(data, geometry, voxels, found, found.volume)
    assert error(better, want) < 0.85 * error(found.volume, want)
    # and one that knows the borders more
    assert error(guided_tv(data, geometry, voxels, found, want), want) < error(better, want)
    with pytest.raises(ValueError, match=r"guide: got shape"):
        guided_tv(data, geometry, voxels, found, want[1:])


def test_a_support_keeps_the_rest_empty():
    data, geometry, voxels, want = blocks(views=5)
    plain = reconstruct_tv(data, geometry, voxels, 2.0**-9)
    known = reconstruct_tv(data, geometry, voxels, 2.0**-9, support=want > 0)
    assert known.volume[want == 0].max() == 0
    assert error(known.volume, want) < 0.5 * error(plain.volume, want)
    with pytest.raises(ValueError, match=r"support: got shape"):
        reconstruct_tv(data, geometry, voxels, 0.01, support=want[1:] > 0)
    with pytest.raises(ValueError, match=r"support: got voxels that no ray meets"):
        reconstruct_tv(data, geometry, voxels, 0.01, support=np.zeros(want.shape, bool))


def test_noisy_rays_count_less():
    """Where hardly a photon arrives: the weights gain, each with its best total variation."""
    data, geometry, voxels, want = blocks(0, 1000, 8.0)
    plain, trusted = (
        min(error(reconstruct_tv(data, geometry, voxels, 2.0**-k, trust=t).volume, want) for k in (6, 7))
        for t in (0.0, 0.25)
    )
    assert trusted < 0.9 * plain
    with pytest.raises(ValueError, match=r"trust: got 2"):
        reconstruct_tv(data, geometry, voxels, 0.01, trust=2)
