"""Photographs, both worlds and colours as layers; no display is needed."""

import json
from importlib import resources
from types import SimpleNamespace

import dual_scene
import numpy as np
import pytest

from napari_innergs import samples
from napari_innergs.fit.splats import SplatModel
from napari_innergs.geometry.grid import Grid
from napari_innergs.layers.photographs import (
    camera_edges,
    colour_layers,
    dual_layers,
    landmark_layers,
    photograph_layer,
    photographs_of_layer,
    picture_layers,
    rough_transform,
    scene_layers,
    surface_layer,
)
from napari_innergs.layers.read import METADATA_KEY
from napari_innergs.layers.xray import geometry_of_layer, scan_from_layer
from napari_innergs.photographs import Photographs
from napari_innergs.result import Reconstruction

pytest.importorskip("napari")
from napari.components import ViewerModel


def as_layers(tuples):
    viewer = ViewerModel()
    return [getattr(viewer, f"add_{kind}")(data, **kwargs) for data, kwargs, kind in tuples]


@pytest.fixture(scope="module")
def scene():
    return dual_scene.photographs(count=6, size=24, points=200)


@pytest.fixture(scope="module")
def sample():
    return as_layers(samples.tooth())


def test_photographs_survive_a_layer(scene):
    (layer,) = as_layers([photograph_layer(scene, "photos", file="a.json")])
    assert layer.rgb
    assert layer.data.shape == (6, 24, 24, 4)
    assert json.loads(json.dumps(layer.metadata[METADATA_KEY]))["file"] == "a.json"
    found = photographs_of_layer(layer)
    np.testing.assert_allclose(found.masks, scene.masks, atol=1e-6)
    np.testing.assert_allclose(found.images, scene.images, atol=1e-6)
    np.testing.assert_allclose(found.points, scene.points)
    np.testing.assert_allclose(found.point_colours, scene.point_colours, atol=1 / 500)
    assert found.names == scene.names
    assert found.cameras == scene.cameras


def test_eight_bits_and_pixels_without_data_survive(scene):
    valid = np.ones((6, 24, 24), bool)
    valid[2, 3:7, 5] = False
    pixels = np.rint(255 * scene.images).astype(np.uint8)
    plain = Photographs(pixels, scene.cameras, names=list("abcdef"), valid=valid)
    (layer,) = as_layers([photograph_layer(plain, "photos")])
    found = photographs_of_layer(layer)
    assert found.masks is None
    assert found.points is None
    assert found.images.dtype == np.uint8
    np.testing.assert_array_equal(found.images, pixels)
    np.testing.assert_array_equal(found.valid, valid)


def test_what_is_no_stack_of_photographs_is_refused(scene):
    viewer = ViewerModel()
    other = viewer.add_image(np.zeros((3, 4, 5, 3), np.uint8), rgb=True, name="pictures")
    with pytest.raises(ValueError, match="'pictures' has no cameras"):
        photographs_of_layer(other)
    data, kwargs, _ = photograph_layer(scene, "photos")
    damaged = viewer.add_image(data, **kwargs)
    own = damaged.metadata[METADATA_KEY]
    damaged.metadata = {METADATA_KEY: {**own, "cameras": own["cameras"][:-1]}}
    with pytest.raises(ValueError, match="'photos' is damaged: cameras: got 5 for 6 photographs"):
        photographs_of_layer(damaged)


def test_the_sample(sample):
    xrays, photos = sample
    scan = scan_from_layer(xrays)
    assert scan.n_views == 25
    assert scan.grid.shape == (64, 64, 64)
    assert scan.geometry.check_covers(scan.grid) is None
    found = photographs_of_layer(photos)
    assert (len(found), found.size, len(found.points)) == (24, (100, 100), 750)
    # one scale bar, one height, one slider, and nothing on top of each other
    assert xrays.units == photos.units
    assert geometry_of_layer(xrays).units == ("mm",) * 3
    first, second = (np.asarray(layer.extent.world) for layer in sample)
    assert first[0, 0] == second[0, 0]
    np.testing.assert_allclose(first[:, 1], second[:, 1], atol=1)
    assert second[0, 2] > first[1, 2]
    # most points are projected onto the object, in its colours
    pixels, _ = found.cameras[5].project(found.points)
    rows, columns = np.rint(pixels).astype(int).clip(0, 99).T
    assert (found.masks[5][rows, columns] > 0.5).mean() > 0.9
    # the same object: the X-rays see something in the middle of the panel only
    assert scan.projections[:, :8].max() < 0.05
    assert scan.projections[:, 36:44, 36:44].min() > 0.2


def test_the_sample_is_small_and_licensed():
    folder = resources.files("napari_innergs.samples") / "data"
    assert len((folder / "tooth.npz").read_bytes()) < 2**19
    assert "`tooth.npz`" in (folder / "NOTICE.md").read_text()
    assert "University of Utah" in (folder / "LICENSE.tooth.txt").read_text()


def test_photographs_are_put_beside_the_projections(scene, sample):
    xrays = sample[0]
    (layer,) = as_layers([photograph_layer(scene, "photos", like=xrays)])
    assert layer.units == xrays.units
    ends, own = np.asarray(xrays.extent.world), np.asarray(layer.extent.world)
    assert own[0, 0] == ends[0, 0]
    assert own[0, 2] > ends[1, 2]
    assert np.ptp(own[:, 1]) + layer.scale[1] == pytest.approx(np.ptp(ends[:, 1]) + xrays.scale[1])


def test_cameras_and_points_in_the_other_world(scene):
    tuples = scene_layers(scene, dual_scene.TRUTH, "photos", ("mm",) * 3)
    cameras, points = as_layers(tuples)
    assert cameras.data.shape == (48, 2, 3)
    moved = scene.moved(dual_scene.TRUTH)
    centres = np.array([camera.centre for camera in moved.cameras])
    np.testing.assert_allclose(cameras.data[::8, 0], centres, atol=1e-6)
    # corners are seen at the corners of the picture
    ends = cameras.data[:4].sum(axis=1)
    pixels, depth = moved.cameras[0].project(ends)
    corners = [(-0.5, -0.5), (-0.5, 23.5), (23.5, 23.5), (23.5, -0.5)]
    np.testing.assert_allclose(pixels, corners, atol=1e-6)
    assert np.ptp(depth) < 1e-6
    np.testing.assert_allclose(points.data, moved.points, atol=1e-6)
    np.testing.assert_allclose(points.face_color[:, :3], scene.point_colours, atol=1e-6)
    assert [str(unit) for unit in points.units] == ["millimeter"] * 3
    bare = Photographs(scene.images, scene.cameras)
    assert len(scene_layers(bare, np.eye(4), "photos")) == 1
    assert len(camera_edges(bare)) == 48


def test_a_rough_transform_brings_both_to_one_place(scene):
    surface = dual_scene.surface(400)
    rough = rough_transform(scene, surface)
    points = scene.moved(rough).points
    radius = np.linalg.norm(surface - np.median(surface, axis=0), axis=1).max()
    assert np.linalg.norm(np.median(points, axis=0) - np.median(surface, axis=0)) < 0.5 * radius
    np.testing.assert_allclose(np.ptp(points, axis=0).max(), np.ptp(surface, axis=0).max(), rtol=0.4)


def test_surface_and_landmarks():
    surface = np.random.default_rng(0).normal(size=(9000, 3))
    first, (a, b) = (
        as_layers([surface_layer(surface, "scan")])[0],
        as_layers(landmark_layers(surface[:4], surface[4:8], 0.5, "scan")),
    )
    assert len(first.data) == 6000
    assert a.metadata[METADATA_KEY]["kind"] == "landmarks, photographs"
    np.testing.assert_allclose(b.data, surface[4:8])
    empty = as_layers(landmark_layers(np.zeros((0, 3)), np.zeros((0, 3)), 0.5, "scan"))
    assert [layer.ndim for layer in empty] == [3, 3]


@pytest.fixture(scope="module")
def result():
    grid = Grid((6, 7, 8), np.diag([2.0, 2.0, 2.0, 1.0]), "mm")
    colour = np.zeros((6, 7, 8, 3), np.float32)
    colour[2, 3, 4] = (0.2, 0.4, 0.6)
    splats = SplatModel(
        np.array([[4.0, 6, 8], [5, 6, 8], [6, 6, 8]]),
        np.log(np.tile([0.5, 1.0, 2.0], (3, 1))),
        np.tile([1.0, 0, 0, 0], (3, 1)),
        np.array([0.9, 0.05, 0.5]),
        np.zeros((3, 1, 3), np.float32),
    )
    return Reconstruction(
        np.ones((6, 7, 8), np.float32),
        grid,
        None,
        {"task": "dual"},
        transform=dual_scene.TRUTH,
        splats=splats,
        colour=colour,
    )


def test_layers_of_a_result(result):
    volume, colour, splats = as_layers(dual_layers(result, "tooth"))
    assert [layer.name for layer in (volume, colour, splats)] == [
        "tooth volume",
        "tooth colour",
        "tooth Gaussians with colour",
    ]
    assert volume.metadata[METADATA_KEY]["transform"] == dual_scene.TRUTH.tolist()
    np.testing.assert_allclose(volume.extent.world, colour.extent.world)
    np.testing.assert_allclose(colour.data[2, 3, 4], (0.2, 0.4, 0.6, 1))
    assert colour.data[..., 3].sum() == 1
    # the faint one is not drawn
    np.testing.assert_allclose(splats.data, result.splats.means[[0, 2]])
    np.testing.assert_allclose(splats.face_color[:, 3], [0.9, 0.5])
    np.testing.assert_allclose(splats.size, 4 * 2**0.5)
    assert volume.units == colour.units == splats.units


def test_a_result_without_colours(result):
    plain = SimpleNamespace(grid=result.grid, colour=None, splats=None)
    assert colour_layers(plain, "tooth") == []


def test_pictures_side_by_side():
    b, a = as_layers(picture_layers(np.zeros((10, 20, 3)), np.ones((10, 20, 3)), "tooth", camera=3))
    assert (a.name, b.name) == ("tooth photograph", "tooth photograph rendered")
    assert b.metadata[METADATA_KEY]["camera"] == 3
    assert (a.translate[1], b.translate[1] > 20) == (0, True)
    (alone,) = as_layers(picture_layers(None, np.ones((10, 20, 3)), "tooth"))
    assert alone.translate[1] == 0
