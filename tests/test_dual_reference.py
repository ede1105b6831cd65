"""What a conventional reconstruction tells the joint fit: sections, views between the measured ones, opacities."""

import dual_scene
import numpy as np
import pytest
import torch

from napari_innergs.fit import photos
from napari_innergs.fit.attenuation import start_attenuation
from napari_innergs.fit.dual import fit_jointly, join
from napari_innergs.fit.xray_reference import ViewsBetween, section_loss, views_between, zero_one
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam, XrayGeometry
from napari_innergs.operators.project import VoxelProjector
from napari_innergs.tasks.dual import reconstruct_dual


@pytest.fixture(scope="module")
def scan():
    return dual_scene.scan()


@pytest.fixture(scope="module")
def framed():
    pictures = dual_scene.photographs(8, size=24)
    return pictures.moved(photos.object_frame(pictures))


def circle(angles, order=slice(None)):
    return ConeBeam.circular(
        np.asarray(angles)[order], source_origin=90, source_detector=150, detector_shape=(6, 8), pixel_size=2
    )


def test_views_lie_halfway_on_the_circle():
    angles = np.arange(12) * 2 * np.pi / 12
    between, pairs = views_between(circle(angles))
    assert len(between) == 12
    wanted = circle(angles + np.pi / 12)
    # neighbours are paired across the end, too
    assert [0, 11] in pairs.tolist()
    for row in between.vectors:
        assert np.abs(wanted.vectors - row).max(1).min() < 1e-6


def test_views_may_be_in_any_order():
    angles = np.arange(12) * 2 * np.pi / 12
    order = np.random.default_rng(0).permutation(12)
    plain, _ = views_between(circle(angles))
    mixed, _ = views_between(circle(angles, order))
    for row in mixed.vectors:
        assert np.abs(plain.vectors - row).max(1).min() < 1e-6


def test_views_of_a_helix_and_of_parallel_beams():
    turn = np.arange(9) * 0.3
    helix = circle(turn).vectors.copy()
    helix[:, [2, 5]] += 0.7 * np.arange(9)[:, None]
    wanted = circle(turn + 0.15).vectors.copy()
    wanted[:, [2, 5]] += 0.7 * (np.arange(9)[:, None] + 0.5)
    between, pairs = views_between(XrayGeometry(helix, (6, 8)))
    for row, (first, second) in zip(between.vectors, pairs, strict=True):
        if second == first + 1:
            assert np.allclose(row, wanted[first], atol=1e-6)
    flat = ParallelBeam.circular(turn, detector_shape=(4, 5))
    found, pairs = views_between(flat)
    next_to = pairs[:, 1] == pairs[:, 0] + 1
    assert next_to.sum() == 8
    assert np.allclose(found.angles[next_to], turn[:-1] + 0.15)


def test_views_without_neighbours_are_refused():
    with pytest.raises(ValueError, match="geometry: got 2"):
        views_between(circle([0.0, 2.0]))
    with pytest.raises(ValueError, match="geometry: got 1"):
        views_between(circle([0.0]))


def test_a_true_reference_shows_what_would_have_been_measured(scan):
    data, geometry, grid, volume = scan
    half = np.arange(0, 20, 2)
    made = ViewsBetween.make(volume, data[half], geometry.subset(half), grid, 2.0)
    assert len(made) == 10
    images = made.data * 2.0 * made.radiographs.unit
    for image in images:
        # one of the views that were left out
        away = np.abs(data[1::2] - image).mean((1, 2))
        assert away.min() < 0.05 * data.mean()
    assert made.trust.mean() == pytest.approx(1, abs=1e-3)


def test_rays_that_the_reference_does_not_explain_count_less(scan):
    data, geometry, grid, volume = scan
    wrong = np.array(volume)
    wrong[20:] = 0
    plain = ViewsBetween.make(volume, data, geometry, grid, 1.0)
    bad = ViewsBetween.make(wrong, data, geometry, grid, 1.0)
    ratio = bad.trust / np.maximum(plain.trust, 1e-6)
    # z is across the rows: a part of them sees only what is right
    changed = VoxelProjector(geometry, grid).apply(volume - wrong).mean((0, 2))
    right, spoilt = changed < 1e-6, changed > 0.5 * changed.max()
    assert ratio[:, right].mean() > 1.5 * ratio[:, spoilt].mean()


def test_views_between_draw_the_inside(scan, framed):
    """With one measured view only, a reference brings the Gaussians nearer to the truth."""
    data, geometry, grid, volume = scan
    scale = float(volume.max())
    between = ViewsBetween.make(volume, data, geometry, grid, scale)
    to_index = np.linalg.inv(grid.affine) @ dual_scene.TRUTH

    def away(weight):
        inside = start_attenuation(volume / scale, 12, 3000)
        inside.raw += 0.5
        field = join(inside, photos.start_splats(framed, most=100), to_index)
        steps = fit_jointly(
            field, framed, 20, between=between, between_weight=weight, rate=4.0, structural=0.0
        )
        for _ in steps:
            pass
        with torch.no_grad():
            made = field.inside.voxelise(volume.shape)[0].numpy()
        return float(np.square(made - volume / scale).mean())

    assert away(1.0) < 0.9 * away(0.0)


def test_sections_of_the_field_itself_cost_nothing():
    random = np.random.default_rng(0)
    field = start_attenuation(random.random((9, 8, 7)).astype(np.float32), 8, 60)
    own = field.voxelise((9, 8, 7))[0].numpy()
    for structural in (0.0, 0.2):
        assert float(section_loss(field, own, random, structural)) < 1e-5
        assert float(section_loss(field, own + 0.5, random, structural)) > 0.1


def test_opacities_become_zero_or_one(framed):
    assert float(zero_one(torch.tensor([1e-3, 1 - 1e-3]))) < float(zero_one(torch.tensor([0.4, 0.6])))
    inside = start_attenuation(np.ones((4, 4, 4), np.float32), 8, 8)

    def doubtful(weight):
        field = join(inside, photos.start_splats(framed, most=300), np.eye(4))
        for _ in fit_jointly(field, framed, 30, solid=weight, structural=0.0):
            pass
        solid = field.surface.opacities()
        return float(torch.minimum(solid, 1 - solid).mean())

    assert doubtful(0.2) < 0.9 * doubtful(0.0)


def test_new_gaussians_of_the_surface_hardly_change_the_volume(scan, framed):
    _, _, grid, volume = scan
    scale = float(volume.max())
    inside = start_attenuation(volume / scale, 12, 3000)
    to_index = np.linalg.inv(grid.affine) @ dual_scene.TRUTH
    field = join(inside, photos.start_splats(framed, least=1000, most=2000), to_index)
    with torch.no_grad():
        alone = inside.voxelise(grid.shape)[0]
        both = field.attenuation().voxelise(grid.shape)[0]
    assert float((both - alone).abs().max()) < 0.1


def test_a_volume_has_no_views_between():
    pictures = dual_scene.photographs(6, size=24)
    z, y, x = np.indices((12, 12, 12)) - 5.5
    ball = (z**2 + y**2 + x**2 < 16).astype(np.float32)
    settings = {"preset": "fast", "photo_steps": 5, "joint_steps": 2, "max_splats": 100, "reference_views": 1}
    found = reconstruct_dual(
        None, None, pictures, None, Grid(ball.shape), settings, volume=ball, transform=dual_scene.TRUTH
    )
    assert any("reference_views was not used" in warning for warning in found.report["warnings"])
