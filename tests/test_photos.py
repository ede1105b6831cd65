"""Gaussians fitted to photographs alone, and what is made of them."""

import dual_scene
import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from napari_innergs.fit import photos
from napari_innergs.fit.metrics import psnr
from napari_innergs.fit.splats import SplatModel, colour_volume, render_cutaway
from napari_innergs.geometry.camera import Camera
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import quaternion_to_matrix
from napari_innergs.io.ply import read_ply
from napari_innergs.model import GaussianModel
from napari_innergs.operators.rgb import evaluate_harmonics
from napari_innergs.photographs import Photographs


@pytest.fixture(scope="module")
def scene():
    pictures = dual_scene.photographs()
    frame = photos.object_frame(pictures)
    return pictures, frame, pictures.moved(frame)


@pytest.fixture(scope="module")
def fitted(scene):
    field = photos.start_splats(scene[2], degree=1, most=600)
    start = photos.copy_of(field)
    losses = [loss for _, loss in photos.fit_photographs(field, scene[2], 240, most=1500)]
    return field, start, losses


def score(field, frame):
    others = dual_scene.photographs(5, first=0.4, points=0).moved(frame)
    with torch.no_grad():
        pairs = [
            (field.render(camera)[0].numpy(), others.image(k)) for k, camera in enumerate(others.cameras)
        ]
    return float(np.mean([psnr(image, truth, 1.0) for image, truth in pairs]))


def some_model(n=7, degree=2, seed=3):
    random = np.random.default_rng(seed)
    return SplatModel(
        random.normal(size=(n, 3)),
        random.uniform(-3, -1, (n, 3)),
        random.normal(size=(n, 4)),
        random.uniform(0.1, 0.9, n),
        random.normal(0, 0.3, (n, (degree + 1) ** 2, 3)).astype(np.float32),
    )


def test_photographs_never_seen_are_predicted(scene, fitted):
    field, start, losses = fitted
    before, after = score(start, scene[1]), score(field, scene[1])
    assert after > before + 6
    assert after > 26
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


def test_number_is_bounded_and_grows(fitted):
    field, start, _ = fitted
    assert len(start) < len(field) <= 1500
    assert all(len(tensor) == len(field) for tensor in field.tensors().values())


def test_seed_decides(scene):
    def run(seed):
        field = photos.start_splats(scene[2], most=200, seed=seed)
        for _ in photos.fit_photographs(field, scene[2], 8, most=300, seed=seed):
            pass
        return field.mean.numpy()

    first, again, other = run(0), run(0), run(1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_state_is_usable_after_any_step(scene):
    field = photos.start_splats(scene[2], most=200)
    steps = photos.fit_photographs(field, scene[2], 50, most=300)
    next(steps)
    steps.close()
    assert not field.mean.requires_grad
    assert np.isfinite(score(field, scene[1]))


def test_start_without_points_lies_in_the_masks(scene):
    bare = dual_scene.photographs(points=0)
    framed = bare.moved(photos.object_frame(bare))
    field = photos.start_splats(framed, least=400)
    places = field.mean.double().numpy()
    assert len(field) == 400
    assert photos.inside_masks(framed, places).min() >= photos.IN_MASKS
    # near the surface, and of its colours
    back = np.linalg.inv(photos.object_frame(bare))
    to_xray = dual_scene.TRUTH @ back
    world = places @ to_xray[:3, :3].T + to_xray[:3, 3]
    near, index = cKDTree(dual_scene.surface(3000)).query(world)
    assert np.median(near) < 2.5
    guess = 0.5 + photos.SH0 * field.colour[:, 0].double().numpy()
    wanted = dual_scene.colour(dual_scene.surface(3000)[index])
    assert np.median(np.abs(guess - wanted)) < 0.1


def test_points_outside_the_masks_are_left_out(scene):
    pictures = scene[2]
    stray = np.array([[1.2, 1.2, 1.2], [-1.2, 1.2, -1.2]])
    both = Photographs(
        pictures.images,
        pictures.cameras,
        pictures.masks,
        points=np.concatenate([pictures.points, stray]),
    )
    field = photos.start_splats(both)
    away = torch.cdist(field.mean.double(), torch.from_numpy(stray)).min()
    assert away > 0.3


def test_masks_of_different_places_are_refused():
    empty = np.zeros((4, 16, 16), np.float32)
    lens = [[20, 0, 7.5], [0, 20, 7.5], [0, 0, 1]]
    eyes = [(0, 0, 9.0), (0, 9.0, 0), (0, 0, -9.0), (0, -9.0, 0)]
    cameras = [Camera.looking_at(eye, (0, 0, 0), lens, (16, 16)) for eye in eyes]
    empty[:2, :3], empty[2:, -3:] = 1, 1
    pictures = Photographs(np.zeros((4, 16, 16, 3), np.float32), cameras, empty)
    with pytest.raises(ValueError, match="masks: no place is inside all"):
        photos.start_splats(pictures)


@pytest.mark.parametrize("scale", [0.01, 300.0])
def test_frame_does_not_depend_on_the_unit(scene, scale):
    move = np.eye(4)
    move[:3, :3] *= scale
    move[:3, 3] = (5 * scale, -3 * scale, scale)
    pictures, frame, _ = scene
    assert np.allclose(photos.object_frame(pictures.moved(move)) @ move, frame, atol=1e-6)


def test_frame_where_points_tell_nothing(scene):
    photographs = scene[0]
    plain = photos.object_frame(Photographs(photographs.images, photographs.cameras))
    one = Photographs(photographs.images, photographs.cameras, points=np.zeros((20, 3)))
    assert np.array_equal(photos.object_frame(one), plain)
    # a tripod in the middle of a room
    still = Photographs(photographs.images, [photographs.cameras[0]] * len(photographs))
    with pytest.raises(ValueError, match="cameras: all are in one place"):
        photos.object_frame(still)


def test_surface_centres_lie_on_the_surface(scene, fitted):
    points = photos.surface_centres(fitted[0], scene[2])
    to_xray = dual_scene.TRUTH @ np.linalg.inv(scene[1])
    world = points @ to_xray[:3, :3].T + to_xray[:3, 3]
    assert len(points) > 100
    assert np.median(cKDTree(dual_scene.surface(3000)).query(world)[0]) < 2


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_harmonics_turn_with_the_world(degree):
    random = np.random.default_rng(0)
    turn = quaternion_to_matrix(np.array([0.5, 0.1, -0.7, 0.5]) / np.linalg.norm([0.5, 0.1, -0.7, 0.5]))
    coefficients = random.normal(0, 0.05, (6, (degree + 1) ** 2, 3))
    directions = random.normal(size=(6, 3))
    turned = photos.rotate_harmonics(coefficients, turn)
    seen = evaluate_harmonics(torch.from_numpy(coefficients), torch.from_numpy(directions))
    again = evaluate_harmonics(
        torch.from_numpy(turned).double(), torch.from_numpy(np.ascontiguousarray(directions @ turn.T))
    )
    assert torch.allclose(seen, again, atol=1e-5)


def test_covariances_are_those_of_the_model():
    model = some_model()
    same = GaussianModel(model.means, model.log_scales, model.quaternions, np.ones(7))
    six = same.covariances()[:, (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)]
    assert np.allclose(model.field().covariances().numpy(), six, rtol=1e-4, atol=1e-6)


def test_model_in_the_world_looks_as_the_field_does(scene):
    """Places, shapes and harmonics are turned, scaled and shifted together."""
    field = some_model(40).field()
    camera = scene[2].cameras[3]
    with torch.no_grad():
        wanted = field.render(camera, 0.2)[0].numpy().clip(0, 1)
    moved = SplatModel.from_field(field, dual_scene.TRUTH)
    image, alpha = moved.render(camera.moved(dual_scene.TRUTH), 0.2)
    assert alpha.max() > 0.3
    assert np.abs(image - wanted).max() < 2e-3


@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("name", ["a.ply", "a.npz"])
def test_files_keep_the_model(tmp_path, name, degree):
    model = some_model(degree=degree)
    model.save(tmp_path / name)
    again = SplatModel.load(tmp_path / name)
    assert np.allclose(again.means, model.means, atol=1e-6)
    assert np.allclose(again.opacities, model.opacities, atol=1e-6)
    assert np.allclose(again.harmonics, model.harmonics, atol=1e-6)
    assert np.allclose(again.field().covariances(), model.field().covariances(), atol=1e-5)


def test_ply_is_what_viewers_expect(tmp_path):
    model = some_model(degree=1)
    model.save(tmp_path / "a.ply")
    table, _ = read_ply(tmp_path / "a.ply")
    names = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2"]
    names += [f"f_rest_{i}" for i in range(9)] + ["opacity"]
    names += [f"scale_{i}" for i in range(3)] + [f"rot_{i}" for i in range(4)]
    assert list(table.dtype.names) == names
    assert {table.dtype[name].str for name in names} == {"<f4"}
    assert np.allclose(table["x"], model.means[:, 2], atol=1e-6)
    # all terms of red before those of green
    assert np.allclose(table["f_rest_4"], model.harmonics[:, 2, 1])


@pytest.mark.parametrize("name", ["a.ply", "a.npz", "a.txt"])
def test_other_files_are_refused(tmp_path, name):
    GaussianModel([[0, 0, 0]], [[0, 0, 0]], [[1, 0, 0, 0]], [1.0]).save(tmp_path / "g.npz")
    (tmp_path / "a.ply").write_bytes(b"ply\nformat binary_little_endian 1.0\nelement vertex 0\n")
    (tmp_path / "a.npz").write_bytes((tmp_path / "g.npz").read_bytes())
    if name == "a.txt":
        with pytest.raises(ValueError, match=r"need a name that ends in .ply or .npz"):
            some_model().save(tmp_path / name)
    else:
        with pytest.raises(ValueError, match=name):
            SplatModel.load(tmp_path / name)


def test_broken_models_are_refused():
    good = some_model()
    with pytest.raises(ValueError, match=r"harmonics: got shape \(7, 2, 3\)"):
        SplatModel(good.means, good.log_scales, good.quaternions, good.opacities, good.harmonics[:, :2])
    with pytest.raises(ValueError, match="opacities"):
        SplatModel(good.means, good.log_scales, good.quaternions, good.opacities * np.nan, good.harmonics)


def test_colours_are_on_the_shell_only():
    grid = Grid((20, 20, 20))
    random = np.random.default_rng(0)
    points = random.normal(size=(800, 3))
    points = 10 + 6 * points / np.linalg.norm(points, axis=1, keepdims=True)
    harmonics = np.zeros((800, 1, 3), np.float32)
    upper = points[:, 0] > 10
    harmonics[upper, 0, 0] = harmonics[~upper, 0, 1] = 0.5 / photos.SH0
    harmonics[upper, 0, 1] = harmonics[~upper, 0, 0] = -0.5 / photos.SH0
    ones = np.tile([1.0, 0, 0, 0], (800, 1))
    model = SplatModel(points, np.full((800, 3), -0.5), ones, np.full(800, 0.9), harmonics)
    colours = colour_volume(model, grid, points, shell=1.5)
    radius = np.linalg.norm(np.moveaxis(np.indices(grid.shape), 0, -1) - 10.0, axis=-1)
    assert not colours[np.abs(radius - 6) > 2.1].any()
    top, bottom = colours[16, 10, 10], colours[4, 10, 10]
    assert top[0] > 0.9 > 0.1 > top[1]
    assert bottom[1] > 0.9 > 0.1 > bottom[0]


def test_cut_shows_the_inside():
    grid = Grid((21, 21, 21))
    radius = np.linalg.norm(np.moveaxis(np.indices(grid.shape), 0, -1) - 10.0, axis=-1)
    volume = np.where(radius < 7, 1.0, 0.0) + np.where(radius < 3, 1.0, 0.0)
    random = np.random.default_rng(0)
    points = random.normal(size=(3000, 3))
    points = 10 + 7 * points / np.linalg.norm(points, axis=1, keepdims=True)
    red = np.zeros((3000, 1, 3), np.float32)
    red[:, 0, 0], red[:, 0, 1:] = 0.5 / photos.SH0, -0.5 / photos.SH0
    ones = np.tile([1.0, 0, 0, 0], (3000, 1))
    model = SplatModel(points, np.full((3000, 3), -0.9), ones, np.full(3000, 0.95), red)
    lens = [[60, 0, 20], [0, 60, 20], [0, 0, 1]]
    above = Camera.looking_at((50, 10, 10), (10, 10, 10), lens, (41, 41), up=(0, 1, 0))
    below = Camera.looking_at((-30, 10, 10), (10, 10, 10), lens, (41, 41), up=(0, 1, 0))
    options = {"point": (10, 10, 10), "normal": (1, 0, 0), "window": (0, 2)}
    cut = render_cutaway(model, volume, grid, above, **options)
    # the core is white, what is around it grey, and beside the object there is nothing
    assert np.allclose(cut[20, 20], 1, atol=0.05)
    assert np.allclose(cut[20, 27], 0.5, atol=0.1)
    assert cut[2, 2].max() < 0.05
    hidden = render_cutaway(model, volume, grid, below, **options)
    assert hidden[20, 20, 0] > 0.9
    assert hidden[20, 20, 1] < 0.1
    with pytest.raises(ValueError, match="normal"):
        render_cutaway(model, volume, grid, above, (0, 0, 0), (0, 0, 0))
