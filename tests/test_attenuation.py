"""The additive field of Gaussians in attenuation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from napari_innergs.fit.attenuation import (
    AttenuationField,
    DensityControl,
    Radiographs,
    control_density,
    fit_to_views,
    fit_to_volume,
    render_radiographs,
    start_attenuation,
)
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam
from napari_innergs.model import GaussianModel

SIGMA, HEIGHT = 2.0, 0.7


def ball(
    spacing: tuple[float, float, float], shape=(21, 19, 23)
) -> tuple[AttenuationField, Grid, np.ndarray]:
    """One Gaussian, round in the world, in a grid of turned voxels of any spacing."""
    angle = 0.3
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    grid = Grid(shape, affine)
    centre = np.array([0.4, -0.6, 0.3])
    inverse = np.linalg.inv(affine[:3, :3])
    covariance = SIGMA**2 * inverse @ inverse.T
    low = np.linalg.cholesky(covariance)
    numbers = [*np.log(np.diag(low)), low[1, 0], low[2, 0], low[2, 1]]
    field = AttenuationField(
        torch.tensor(grid.world_to_index(centre)[None], dtype=torch.float32),
        torch.tensor([numbers], dtype=torch.float32),
        torch.log(torch.expm1(torch.tensor([[HEIGHT]]))),
    )
    return field, grid, centre


def analytic(geometry, centre: np.ndarray) -> np.ndarray:
    """Line integrals of the ball through the middle of each pixel."""
    rows, cols = geometry.detector_shape
    v, u = np.arange(rows) - (rows - 1) / 2, np.arange(cols) - (cols - 1) / 2
    pixel = geometry.center[:, None, None] + v[None, :, None, None] * geometry.v[:, None, None]
    pixel = pixel + u[:, None] * geometry.u[:, None, None]
    if geometry.kind == "cone":
        ray = pixel - geometry.source[:, None, None]
    else:
        ray = np.broadcast_to(geometry.direction[:, None, None], pixel.shape)
    ray = ray / np.linalg.norm(ray, axis=-1, keepdims=True)
    off = pixel - centre
    away = np.sum(off**2, -1) - np.sum(off * ray, -1) ** 2
    return HEIGHT * SIGMA * np.sqrt(2 * np.pi) * np.exp(-away / (2 * SIGMA**2))


GEOMETRIES = [
    ConeBeam.circular(
        [0.1, 1.7, 4.0], source_origin=60.0, source_detector=90.0, detector_shape=(15, 17), pixel_size=1.5
    ),
    ParallelBeam.circular([0.2, 1.4], detector_shape=(15, 17), pixel_size=1.2),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["cone", "parallel"])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (1.5, 1.5, 1.5), (2.0, 1.0, 0.7)])
def test_radiographs_are_exact_for_any_voxels(geometry, spacing):
    field, grid, centre = ball(spacing)
    radiographs = Radiographs(geometry, grid)
    got = radiographs.render(field, np.arange(geometry.n_views)).numpy() * radiographs.unit
    truth = analytic(geometry, centre)
    # the support ends at a thousandth of the mass
    np.testing.assert_allclose(got, truth, atol=2e-3 * truth.max())
    model = field.model(grid, 3.0)
    np.testing.assert_allclose(render_radiographs(model, geometry), 3 * truth, atol=6e-3 * truth.max())


def test_the_model_is_the_field():
    field, grid, _ = ball((2.0, 1.0, 0.7))
    model = field.model(grid, 3.0)
    assert model.field == "additive"
    volume = field.voxelise(grid.shape)[0].numpy()
    np.testing.assert_allclose(np.squeeze(model.voxelise(grid)), 3 * volume, atol=1e-4)


def test_only_additive_models_have_radiographs():
    model = GaussianModel([[0.0, 0, 0]], [[0.0, 0, 0]], [[1, 0, 0, 0]], [1.0])
    with pytest.raises(ValueError, match="need an additive one"):
        render_radiographs(model, GEOMETRIES[0])


def blobs(n: int = 20) -> np.ndarray:
    z, y, x = np.mgrid[:n, :n, :n]
    out = np.exp(-((z - 9) ** 2 + (y - 8) ** 2 + (x - 11) ** 2) / 18)
    return (out + 0.5 * ((z - 10) ** 2 + (y - 13) ** 2 + (x - 8) ** 2 < 14)).astype(np.float32)


def test_gaussians_start_where_there_is_something():
    volume = blobs()
    field = start_attenuation(volume, 5.0, 100_000, seed=1)
    assert len(field) == int((volume > 0.03).sum() / 5)
    place = field.mean.round().long().clamp(0, 19).numpy()
    from scipy.ndimage import maximum_filter

    assert (maximum_filter(volume, 3)[tuple(place.T)] > 0.03).all()
    assert len(start_attenuation(volume, 5.0, 17)) == 17
    # an empty volume is no reason to fail
    assert len(start_attenuation(np.zeros((8, 8, 8), np.float32), 64.0, 100)) == 8


def test_the_fit_to_a_volume_converges():
    volume = blobs()
    field = start_attenuation(volume, 5.0, 100_000)
    losses = [loss for _, loss in fit_to_volume(field, volume, 80)]
    assert len(losses) == 80
    assert losses[-1] < 0.01 * losses[0]
    error = field.voxelise(volume.shape)[0].numpy() - volume
    assert np.sqrt(np.mean(error**2)) < 0.03
    assert float(field.cholesky[:, :3].min()) >= np.log(0.45) - 1e-6


def test_steps_on_views_mend_what_the_start_got_wrong():
    volume = blobs()
    n = len(volume)
    affine = np.eye(4)
    affine[:3, 3] = -(n - 1) / 2
    grid = Grid(volume.shape, affine)
    geometry = ConeBeam.circular(
        np.arange(16) * np.pi / 8,
        source_origin=100.0,
        source_detector=150.0,
        detector_shape=(28, 28),
        pixel_size=1.5,
    )
    truth = start_attenuation(volume, 5.0, 100_000)
    for _ in fit_to_volume(truth, volume, 40):
        pass
    radiographs = Radiographs(geometry, grid)
    data = radiographs.render(truth, np.arange(16)).detach().numpy()
    goal = truth.voxelise(volume.shape)[0].numpy()
    wrong = start_attenuation(volume, 5.0, 100_000)
    for _ in fit_to_volume(wrong, 0.8 * goal, 40):
        pass

    def rms() -> float:
        return float(np.sqrt(np.mean((wrong.voxelise(volume.shape)[0].detach().numpy() - goal) ** 2)))

    before = rms()
    trust = np.ones_like(data)
    steps = list(fit_to_views(wrong, radiographs, data, 64, volume.shape, rate=3.0, trust=trust))
    assert [step for step, _ in steps] == list(range(1, 65))
    assert rms() < 0.5 * before


def test_variation_and_structure_take_part_in_the_loss():
    volume = blobs()
    affine = np.eye(4)
    affine[:3, 3] = -9.5
    geometry = ParallelBeam.circular([0.0, 1.0], detector_shape=(24, 24))
    grid = Grid(volume.shape, affine)
    losses = []
    for options in ({}, {"variation": 0.5}, {"structural": 0.2}):
        field = start_attenuation(volume, 5.0, 100_000)
        radiographs = Radiographs(geometry, grid)
        data = radiographs.render(field, [0, 1]).detach().numpy() * 1.1
        losses.append(next(fit_to_views(field, radiographs, data, 4, volume.shape, **options))[1])
    assert losses[1] > losses[0]
    assert losses[2] != losses[0]


@pytest.mark.parametrize("shape", [(1, 20, 20), (20, 1, 1), (1, 1, 1)])
def test_variation_of_a_fan_beam_is_that_of_its_plane(shape):
    volume = blobs()[tuple(slice(10, 11) if n == 1 else slice(None) for n in shape)]
    affine = np.eye(4)
    affine[:3, 3] = -(np.array(shape) - 1) / 2
    radiographs = Radiographs(ParallelBeam.circular([0.0, 1.0], detector_shape=(1, 24)), Grid(shape, affine))
    losses = []
    for variation in (0.0, 0.5):
        field = start_attenuation(volume, 5.0, 100_000)
        data = radiographs.render(field, [0, 1]).detach().numpy() * 1.1
        losses.append(next(fit_to_views(field, radiographs, data, 4, shape, variation=variation))[1])
    assert (losses[1] > losses[0]) == (max(shape) > 1)


def spread(count: int = 40, size: float = 1.5) -> AttenuationField:
    """Turned Gaussians of several heights, well inside 20 voxels."""
    generator = torch.Generator().manual_seed(4)
    mean = 6 + 8 * torch.rand(count, 3, generator=generator)
    cholesky = 0.2 * torch.randn(count, 6, generator=generator)
    cholesky[:, :3] += np.log(size)
    heights = 0.05 + torch.rand(count, 1, generator=generator)
    return AttenuationField(mean, cholesky, torch.log(torch.expm1(heights)))


def control(field, gradient, **options):
    given = {"every": 1, "gradient": 1.0, "large": 1.0, **options}
    rule, generator = DensityControl(**given), torch.Generator().manual_seed(0)
    return control_density(field, torch.as_tensor(gradient), (20, 20, 20), rule, generator)


def mass(field: AttenuationField) -> float:
    determinant = field.cholesky[:, :3].sum(1).exp()
    return float((field.heights()[:, 0] * determinant).sum())


def test_doubling_changes_nothing_but_the_number():
    field = spread()
    before = field.voxelise((20, 20, 20))
    gradient = np.where(np.arange(40) % 4 == 0, 2.0, 0.5).astype(np.float32)
    kept, added = control(field, gradient)
    assert (len(kept), added, len(field)) == (40, 10, 50)
    torch.testing.assert_close(field.mean[40:], field.mean[:40:4])
    torch.testing.assert_close(field.voxelise((20, 20, 20)), before, atol=2e-3, rtol=0)


def test_splitting_halves_the_heights_and_shrinks():
    field = spread()
    old_mean, old_heights, old_mass = field.mean.clone(), field.heights().clone(), mass(field)
    kept, added = control(field, np.full(40, 2, np.float32), large=0.01)
    assert (len(kept), added, len(field)) == (40, 40, 80)
    torch.testing.assert_close(field.heights().sum(), old_heights.sum())
    assert mass(field) == pytest.approx(old_mass / 1.6**3, rel=1e-4)
    # where one was distributed itself
    away = torch.cat([field.mean[:40] - old_mean, field.mean[40:] - old_mean])
    assert 0.6 < float(away.std()) / 1.5 < 1.6
    assert float(away.mean(0).abs().max()) < 0.6


def test_faint_and_lost_gaussians_vanish():
    field = spread()
    field.raw[:5] = -20.0
    field.mean[5:8] = torch.tensor([10.0, 30.0, 10.0])
    last = field.mean[8:].clone()
    kept, added = control(field, np.zeros(40, np.float32))
    assert (kept.tolist(), added) == (list(range(8, 40)), 0)
    torch.testing.assert_close(field.mean, last)
    # but not the last ones
    field.raw[:] = -20.0
    assert len(control(field, np.zeros(32, np.float32))[0]) == len(field) == 32


@pytest.mark.parametrize(("most", "added"), [(43, 3), (40, 0), (10, 0)])
def test_the_limit_is_kept_and_the_steepest_come_first(most, added):
    field = spread()
    gradient = np.arange(40, dtype=np.float32) + 2
    old = field.mean.clone()
    assert control(field, gradient, most=most)[1] == added
    assert len(field) == 40 + added
    torch.testing.assert_close(field.mean[40:], old[[39, 38, 37][:added]])


def test_it_is_time_within_the_span_only():
    rule = DensityControl(10, start=0.1, stop=0.5)
    assert [step for step in range(1, 201) if rule.due(step, 200)] == [30, 40, 50, 60, 70, 80, 90]


def a_ball_in_the_wrong_place():
    """A scan of two balls, and a field with one of them in the wrong place, and one more outside the grid."""
    affine = np.eye(4)
    affine[:3, 3] = -9.5
    grid = Grid((20, 20, 20), affine)
    geometry = ConeBeam.circular(
        np.arange(8) * np.pi / 4,
        source_origin=100.0,
        source_detector=150.0,
        detector_shape=(28, 28),
        pixel_size=1.5,
    )
    radiographs = Radiographs(geometry, grid)
    mean = torch.tensor([[9.5, 9.5, 5.0], [9.5, 9.5, 14.0], [9.5, 9.5, 40.0]])
    cholesky = torch.zeros(3, 6)
    cholesky[:, :3] = np.log(1.5)
    raw = torch.log(torch.expm1(torch.tensor([[0.5], [0.5], [1e-6]])))
    truth = AttenuationField(mean, cholesky, raw)
    data = radiographs.render(truth, np.arange(8)).numpy()
    start = AttenuationField(mean.clone(), cholesky.clone(), raw.clone())
    start.mean[1, 0] += 3.0
    return radiographs, data, start


def test_the_number_grows_where_the_projections_ask_for_it():
    radiographs, data, start = a_ball_in_the_wrong_place()
    options = {"density": DensityControl(4, gradient=1e-3, most=12), "variation": 0.01, "seed": 5}
    fields = []
    for _ in range(2):
        field = AttenuationField(start.mean.clone(), start.cholesky.clone(), start.raw.clone())
        for _ in fit_to_views(field, radiographs, data, 40, (20, 20, 20), rate=0.1, **options):
            pass
        fields.append(field)
    assert 2 < len(field) <= 12
    wrong = int((field.mean[:, 2] > 9.5).sum())
    # what was right already stays one, what is outside is gone
    assert wrong == len(field) - 1 and float(field.mean[:, 2].max()) < 20
    torch.testing.assert_close(fields[0].mean, fields[1].mean, rtol=0, atol=0)
