"""Layers to stacks and results to layers; no display needed."""

import json

import numpy as np
import pytest
from napari.components import ViewerModel
from napari.layers import Image, Labels, Shapes

from napari_innergs import samples
from napari_innergs.data import SliceStack
from napari_innergs.geometry.grid import Grid
from napari_innergs.layers.planes import motion_layers, orientation, plane_layer, slice_corners
from napari_innergs.layers.preview import LiveLayers
from napari_innergs.layers.read import (
    LayerView,
    Region,
    Source,
    centre_region,
    custom_grid,
    guess_first_axis,
    layer_affine,
    profile_of,
    region_corners,
    region_from_shapes,
    region_of_points,
)
from napari_innergs.layers.resample import compare_views, resample_onto
from napari_innergs.layers.write import (
    METADATA_KEY,
    gaussian_layers,
    json_only,
    placement,
    reconstruction_layers,
    volume_layers,
)
from napari_innergs.model import GaussianModel
from napari_innergs.result import Reconstruction

ROTATION = np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])


def brain(shape=(12, 20, 24)):
    return samples.volume("brain").data[tuple(slice(4, 4 + size) for size in shape)]


def rotated(data, **kwargs):
    """A layer with an anisotropic scale, a translation and a rotation within the slices."""
    return Image(
        data,
        scale=(4, 1, 1),
        translate=(10, -20, 5),
        rotate=ROTATION,
        units=("mm",) * 3,
        axis_labels=("z", "y", "x"),
        name="T1",
        **kwargs,
    )


def interpolate(stack):
    """The stack on its default grid, linearly between slices: the simplest reconstruction."""
    grid = stack.default_grid()
    values = stack.values()
    planes = np.linalg.norm(grid.affine[:3, 0]) * np.arange(grid.shape[0])
    at = np.clip(planes - 0.0, 0, stack.positions[-1] - stack.positions[0])
    index = np.interp(at, stack.positions - stack.positions[0], np.arange(len(stack.positions)))
    low = np.minimum(index.astype(int), len(stack.positions) - 2)
    part = (index - low)[:, None, None, None]
    volume = (1 - part) * values[low] + part * values[low + 1]
    return Reconstruction(
        (volume if stack.had_channel_axis else volume[..., 0]).astype(np.float32),
        grid,
        report={"psnr_heldout": np.float32(30.5), "shape": np.array([1, 2])},
    )


def same_place(result, layer, index, result_index):
    """Whether two voxels are at the same place and hold the same value."""
    np.testing.assert_allclose(result.data_to_world(result_index), layer.data_to_world(index), atol=1e-6)
    assert abs(float(result.data[tuple(result_index)]) - float(layer.data[tuple(index)])) <= 1


# -- reading ------------------------------------------------------------------------------------------------


def test_affine_of_a_layer_is_its_data_to_world():
    layer = rotated(brain())
    affine = layer_affine(layer)
    point = np.array([3.0, 7.0, 11.0])
    np.testing.assert_allclose(affine[:3, :3] @ point + affine[:3, 3], layer.data_to_world(point))
    assert not np.allclose(affine[1, 2], 0)


def test_view_outlives_its_layer():
    layer = rotated(brain())
    view = LayerView.of(layer)
    before = view.data_to_world((1, 2, 3))
    layer.translate = (0, 0, 0)
    layer.data = np.zeros((2, 2, 2))
    np.testing.assert_array_equal(view.data_to_world((1, 2, 3)), before)
    assert view.shape == (12, 20, 24)


def test_labels_are_refused_in_a_sentence():
    with pytest.raises(TypeError, match="Labels layer, need an Image layer"):
        LayerView.of(Labels(np.zeros((3, 4, 5), int)))


def test_multiscale_uses_the_finest_level():
    data = brain()
    view = LayerView.of(Image([data, data[:, ::2, ::2]], multiscale=True))
    assert view.shape == data.shape


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("keep", [1, 3])
def test_stack_has_the_layers_geometry(axis, keep):
    layer = rotated(brain())
    stack = Source((LayerView.of(layer),), axis, keep).stack()
    index = [4, 5, 6]
    index[axis] = 2 * keep
    others = [index[d] for d in range(3) if d != axis]
    assert stack.data[2, others[0], others[1], 0] == layer.data[tuple(index)]
    place = stack.frame_affine @ [stack.positions[2], *others, 1]
    np.testing.assert_allclose(place[:3], layer.data_to_world(index), atol=1e-9)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_region_keeps_place_and_the_same_slices(axis):
    layer = rotated(brain())
    region = Region((slice(3, 12), slice(5, 16), slice(7, 20)))
    whole = Source((LayerView.of(layer),), axis, 2).stack()
    part = Source((LayerView.of(layer),), axis, 2, region).stack()
    # every slice of the part is one of the whole, at the same place
    first = part.frame_affine @ [part.positions[0], 0, 0, 1]
    inside = np.linalg.solve(whole.frame_affine, first)
    assert np.min(np.abs(whole.positions - inside[0])) < 1e-9
    number = int(np.argmin(np.abs(whole.positions - inside[0])))
    row, col = np.rint(inside[1:3]).astype(int)
    window = whole.data[number, row : row + part.height, col : col + part.width]
    np.testing.assert_array_equal(part.data[0], window)
    assert part.data.shape[1:3] == tuple(np.delete([9, 11, 13], axis))


def test_time_and_channels():
    data = np.stack([brain(), brain()[::-1]])
    layer = Image(data, axis_labels=("t", "z", "y", "x"), scale=(5, 4, 1, 1))
    assert guess_first_axis(layer) == "time"
    series = Source((LayerView.of(layer),), first_axis="time")
    assert series.time_points == (0, 1)
    np.testing.assert_array_equal(series.stack(1).data[..., 0], data[1])
    channels = Source((LayerView.of(layer),), first_axis="channels")
    assert channels.time_points == (None,)
    np.testing.assert_array_equal(channels.stack().data[..., 1], data[1])


def test_several_layers_are_channels():
    first, second = rotated(brain()), rotated(brain()[::-1])
    stack = Source((LayerView.of(first), LayerView.of(second))).stack()
    np.testing.assert_array_equal(stack.data[..., 1], second.data)
    with pytest.raises(ValueError, match="need the same"):
        Source((LayerView.of(first), LayerView.of(rotated(brain((6, 20, 24))))))


def test_five_dimensions_are_refused():
    with pytest.raises(ValueError, match="has 5 dimensions"):
        Source((LayerView.of(Image(np.zeros((2, 2, 2, 4, 4)))),))


def test_blank_stack_loads_nothing():
    class Lazy:
        shape, ndim, dtype = (50, 4000, 4000), 3, np.dtype(np.uint16)

        def __array__(self, *_, **__):
            raise AssertionError("the pixels were read")

        def __getitem__(self, _):
            raise AssertionError("the pixels were read")

    view = LayerView(
        Lazy(), np.eye(4), False, "lazy", ("mm",) * 3, ("z", "y", "x"), (0, 1), "gray", 1.0, "opaque"
    )
    assert Source((view,)).stack(blank=True).data.shape == (50, 4000, 4000, 1)


def test_region_around_a_rectangle():
    layer = rotated(brain())
    view = LayerView.of(layer)
    corners = np.array([[5, 4, 6], [5, 4, 17], [5, 15, 17], [5, 15, 6]], float)
    shapes = Shapes([np.array([layer.data_to_world(corner) for corner in corners])], name="box")
    region = region_from_shapes(shapes, view)
    assert region.slices == (slice(0, 12), slice(4, 16), slice(6, 18))
    flat = Shapes([corners[:, 1:]])
    assert region_from_shapes(flat, LayerView.of(Image(brain()))).slices == region.slices
    with pytest.raises(ValueError, match="is empty"):
        region_from_shapes(Shapes(name="none"), view)
    with pytest.raises(ValueError, match="outside the image"):
        region_from_shapes(Shapes([corners[:, 1:] + 500]), LayerView.of(Image(brain())))


def test_centre_region_is_inside_and_small():
    region = centre_region((60, 400, 300), axis=0, keep_every=4)
    assert region.shape((60, 400, 300)) == (33, 96, 96)
    assert centre_region((3, 10, 10)).shape((3, 10, 10)) == (3, 10, 10)


def test_custom_grid_has_the_spacing_and_covers_the_stack():
    stack = Source((LayerView.of(rotated(brain())),)).stack()
    grid = custom_grid(stack, (2.0, 1.0, 3.0))
    np.testing.assert_allclose(grid.spacing, (2, 1, 3))
    reach = grid.world_to_index(stack.corners())
    assert reach.min() > -1e-9
    assert (reach.max(axis=0) <= np.array(grid.shape) - 0.5 + 1e-9).all()
    with pytest.raises(ValueError, match="three positive numbers"):
        custom_grid(stack, (0, 1, 1))


# -- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_result_lies_on_its_input(axis):
    data = brain((12, 20, 24))
    layer = Image(
        data, scale=(4, 1, 1), translate=(10, -20, 5), units=("mm",) * 3, axis_labels=("z", "y", "x")
    )
    source = Source((LayerView.of(layer),), axis, 2)
    tuples = reconstruction_layers([interpolate(source.stack())], source)
    result = Image(*[tuples[0][0]], **tuples[0][1])
    assert result.data.dtype == data.dtype
    index = np.array([4, 6, 8])
    same_place(result, layer, index, np.rint(result.world_to_data(layer.data_to_world(index))).astype(int))
    # napari slices along data axes: they must run along the world's
    matrix = layer_affine(result)[:3, :3]
    assert np.argmax(np.abs(matrix), axis=0).tolist() == [0, 1, 2]


def test_result_of_a_rotated_layer_and_its_looks():
    layer = rotated(brain(), colormap="magma", contrast_limits=(3, 99), gamma=0.7)
    source = Source((LayerView.of(layer),))
    data, kwargs, kind = reconstruction_layers([interpolate(source.stack())], source)[0]
    result = Image(data, **kwargs)
    assert kind == "image"
    # slices 0 and 4 mm lie 4 mm apart, in planes of the grid
    step = result.scale[0]
    assert step == pytest.approx(4 / round(4 / step))
    for index in ([0, 3, 5], [7, 19, 0], [11, 0, 23]):
        at = np.rint(result.world_to_data(layer.data_to_world(index))).astype(int)
        same_place(result, layer, index, at)
    assert result.colormap.name == "magma"
    assert tuple(result.contrast_limits) == (3, 99)
    assert result.gamma == 0.7
    assert result.units == layer.units
    assert result.axis_labels == layer.axis_labels
    assert json.loads(json.dumps(result.metadata))[METADATA_KEY]["psnr_heldout"] == pytest.approx(30.5)


def test_units_that_differ_between_axes():
    layer = Image(brain(), scale=(4, 0.001, 0.001), units=("um", "mm", "mm"), axis_labels=("z", "y", "x"))
    source = Source((LayerView.of(layer),))
    stack = source.stack()
    result = interpolate(stack)
    result.model = GaussianModel([[0.02, 0.01, 0.01]], [[-5, -5, -5]], [[1, 0, 0, 0]], [1.0], units="mm")
    image, points = reconstruction_layers([result], source, gaussians="points")
    volume = Image(image[0], **image[1])
    assert volume.units == layer.units
    index = np.array([5, 3, 2])
    same_place(volume, layer, index, np.rint(volume.world_to_data(layer.data_to_world(index))).astype(int))
    placed = ViewerModel().add_points(points[0], **points[1])
    np.testing.assert_allclose(placed.data_to_world(placed.data[0]), (20, 0.01, 0.01))


def test_values_are_clipped_to_the_type_not_wrapped():
    layer = Image(brain())
    source = Source((LayerView.of(layer),))
    volume = np.full((12, 20, 24), 300, np.float32)
    volume[0] = -7
    data, _, _ = volume_layers(volume, Grid((12, 20, 24)), source)[0]
    assert data.dtype == np.uint8
    assert data[0].max() == 0
    assert data[1:].min() == 255


def test_channels_come_back_as_they_were():
    first = rotated(brain(), colormap="green")
    second = rotated(brain()[::-1], colormap="magenta")
    source = Source((LayerView.of(first), LayerView.of(second)))
    tuples = reconstruction_layers([interpolate(source.stack())], source)
    assert [kwargs["colormap"].name for _, kwargs, _ in tuples] == ["green", "magenta"]
    np.testing.assert_array_equal(tuples[1][0][0], second.data[0])

    colour = Image(np.stack([brain(), brain()[::-1], brain()], axis=-1), rgb=True, scale=(3, 1, 1))
    source = Source((LayerView.of(colour),))
    ((data, kwargs, _),) = reconstruction_layers([interpolate(source.stack())], source)
    assert kwargs["rgb"]
    assert data.dtype == np.uint8
    np.testing.assert_array_equal(Image(data, **kwargs).data[0], colour.data[0])

    stacked = Image(np.stack([brain(), brain()[::-1]]), scale=(1, 3, 1, 1), translate=(0, 5, 0, 0))
    source = Source((LayerView.of(stacked),), first_axis="channels")
    ((data, kwargs, _),) = reconstruction_layers([interpolate(source.stack())], source)
    result = Image(data, **kwargs)
    assert result.ndim == 4
    np.testing.assert_array_equal(result.data[1, 0], stacked.data[1, 0])
    np.testing.assert_allclose(result.data_to_world((1, 3, 0, 0)), stacked.data_to_world((1, 1, 0, 0)))


def test_time_series_comes_back_with_its_time_axis():
    layer = Image(np.stack([brain(), brain()[::-1], brain()]), scale=(30, 3, 1, 1), translate=(7, 0, 0, 0))
    source = Source((LayerView.of(layer),))
    results = [interpolate(source.stack(point)) for point in source.time_points]
    ((data, kwargs, _),) = reconstruction_layers(results, source)
    result = Image(data, **kwargs)
    np.testing.assert_allclose(result.data_to_world((2, 0, 0, 0)), layer.data_to_world((2, 0, 0, 0)))
    np.testing.assert_array_equal(result.data[1, 0], layer.data[1, 0])
    assert len(kwargs["metadata"][METADATA_KEY]["time_points"]) == 3
    # one time point only: a 3D layer
    source = Source((LayerView.of(layer),), time_index=1)
    ((data, kwargs, _),) = reconstruction_layers([interpolate(source.stack(1))], source)
    assert Image(data, **kwargs).ndim == 3


def test_extra_layers():
    layer = rotated(brain())
    source = Source((LayerView.of(layer),))
    result = interpolate(source.stack())
    result.uncertainty = np.ones_like(result.volume)
    result.distance = np.ones_like(result.volume)
    result.model = gaussians()
    tuples = reconstruction_layers(
        [result], source, uncertainty=True, distance=True, gaussians="points", limit=2
    )
    assert [kind for _, _, kind in tuples] == ["image", "image", "image", "points"]
    viewer = ViewerModel()
    for data, kwargs, kind in tuples:
        added = getattr(viewer, f"add_{kind}")(data, **kwargs)
        # one layer without units turns the scale bar off
        assert {str(unit) for unit in added.units} == {"millimeter"}
        json.dumps(added.metadata)
    np.testing.assert_allclose(viewer.layers[1].extent.world, viewer.layers[0].extent.world)


def gaussians():
    return GaussianModel(
        means=[[0, 0, 0], [10, 0, 0], [0, 20, 5]],
        log_scales=np.log([[1, 1, 1], [1, 2, 4], [3, 3, 3]]),
        quaternions=[[1, 0, 0, 0], [0.9, 0.3, 0.2, 0.1], [1, 0, 0, 0]],
        amplitudes=[1.0, 2.0, 3.0],
        units="mm",
    )


def test_gaussians_as_points():
    ((means, kwargs, kind),) = gaussian_layers(gaussians(), kind="points", limit=10)
    viewer = ViewerModel()
    points = viewer.add_points(means, **kwargs)
    assert kind == "points"
    np.testing.assert_allclose(points.size, [2, 4, 6])
    ((means, kwargs, _),) = gaussian_layers(gaussians(), kind="points", limit=2)
    assert len(means) == 2
    assert kwargs["metadata"][METADATA_KEY]["of"] == 3


def test_gaussians_as_axes_and_ellipsoids():
    model = gaussians()
    ((vectors, kwargs, _),) = gaussian_layers(model, kind="axes", limit=2)
    ViewerModel().add_vectors(vectors, **kwargs)
    assert vectors.shape == (6, 2, 3)
    # the largest first; the middle of each axis is the mean, its half length a sigma
    np.testing.assert_allclose(vectors[:3, 0] + vectors[:3, 1] / 2, np.tile(model.means[2], (3, 1)))
    np.testing.assert_allclose(np.linalg.norm(vectors[3:, 1], axis=1) / 2, [1, 2, 4])
    ((mesh, kwargs, _),) = gaussian_layers(model, kind="ellipsoids", limit=3)
    ViewerModel().add_surface(mesh, **kwargs)
    inverse = np.linalg.inv(model.covariances()[1])
    order = np.argsort(-np.prod(model.scales, axis=1), kind="stable")
    at = 12 * int(np.flatnonzero(order == 1)[0])
    away = mesh[0][at : at + 12] - model.means[1]
    np.testing.assert_allclose(np.einsum("vi,ij,vj->v", away, inverse, away), 1.0)
    with pytest.raises(ValueError, match="need 'points'"):
        gaussian_layers(model, kind="clouds")


def test_placement_keeps_any_affine():
    generator = np.random.default_rng(0)
    affine = np.eye(4)
    affine[:3, :3] = generator.normal(size=(3, 3))
    affine[:3, 3] = 1, 2, 3
    np.testing.assert_allclose(
        layer_affine(Image(np.zeros((2, 2, 2)), **placement(affine))), affine, atol=1e-12
    )
    assert "affine" not in placement(np.diag([4.0, 1, 1, 1]))


def test_json_only():
    text = json.dumps(json_only({"a": np.float32(1), "b": np.arange(2), "c": {"d": (1, None)}, "e": 1 + 2j}))
    assert json.loads(text) == {"a": 1.0, "b": [0, 1], "c": {"d": [1, None]}, "e": "(1+2j)"}


# -- live layers --------------------------------------------------------------------------------------------


def one_volume(value, name="live", shape=(3, 4, 5)):
    return [(np.full(shape, value, np.float32), {"name": name, "contrast_limits": (0, 10)}, "image")]


def test_live_layer_is_updated_in_place_and_keeps_what_the_user_changed():
    viewer = ViewerModel()
    live = LiveLayers(viewer)
    (first,) = live.show(one_volume(1))
    first.contrast_limits = (2, 3)
    first.colormap = "magma"
    (second,) = live.show(one_volume(5))
    assert second is first
    assert len(viewer.layers) == 1
    assert first.data.max() == 5
    assert tuple(first.contrast_limits) == (2, 3)
    assert first.colormap.name == "magma"


def test_live_layer_is_found_by_object_not_by_name():
    viewer = ViewerModel()
    viewer.add_image(np.zeros((2, 2, 2)), name="live")
    live = LiveLayers(viewer)
    (ours,) = live.show(one_volume(1))
    ours.name = "renamed"
    live.show(one_volume(2))
    assert len(viewer.layers) == 2
    assert viewer.layers["live"].data.max() == 0
    assert ours.name == "renamed"


def test_deleted_live_layer_comes_back():
    viewer = ViewerModel()
    live = LiveLayers(viewer)
    live.show(one_volume(1))
    viewer.layers.clear()
    live.show(one_volume(2))
    assert len(viewer.layers) == 1
    assert viewer.layers[0].data.max() == 2


def test_live_layer_becomes_the_result():
    viewer = ViewerModel()
    live = LiveLayers(viewer)
    (preview,) = live.show(one_volume(1, "T1 (preview)"))
    final = one_volume(3, "T1 volume")
    final[0][1].update(metadata={"k": 1}, scale=(2, 1, 1), units=("mm",) * 3)
    (result,) = live.show(final)
    assert result is preview
    assert result.name == "T1 volume"
    assert result.metadata["k"] == 1
    np.testing.assert_allclose(result.scale, (2, 1, 1))


def test_live_layer_of_another_kind_is_replaced():
    viewer = ViewerModel()
    live = LiveLayers(viewer)
    live.show(one_volume(1))
    live.show([(np.zeros((3, 4, 5, 6), np.float32), {"name": "4D"}, "image")])
    assert [layer.name for layer in viewer.layers] == ["4D"]


# -- comparing ----------------------------------------------------------------------------------------------


def test_resampling_on_itself_is_exact():
    view = LayerView.of(rotated(brain()))
    values, inside = resample_onto(view, view)
    np.testing.assert_array_equal(values, view.data)
    assert inside.all()


def test_comparison_figures():
    truth = brain().astype(np.float32)
    noisy = truth + np.where(np.indices(truth.shape).sum(axis=0) % 2, 2, -2)
    reference = LayerView.of(Image(truth))
    outcome = compare_views(LayerView.of(Image(noisy)), reference)
    assert outcome.rmse == pytest.approx(2)
    assert outcome.psnr == pytest.approx(20 * np.log10(np.ptp(truth) / 2), abs=1e-4)
    assert 0.5 < outcome.ssim < 1
    np.testing.assert_allclose(outcome.difference, noisy - truth)
    same = compare_views(reference, reference)
    assert same.psnr == np.inf
    assert same.ssim == pytest.approx(1)


def test_comparison_on_different_grids_uses_the_world():
    # a linear ramp survives linear interpolation exactly, wherever it is sampled
    fine = np.add.outer(np.arange(24.0), np.arange(20.0))[:, :, None] + np.zeros(16)
    coarse = fine[::3, ::2, ::2]
    reference = LayerView.of(Image(fine, translate=(1, 2, 3)))
    outcome = compare_views(LayerView.of(Image(coarse, scale=(3, 2, 2), translate=(1, 2, 3))), reference)
    inner = outcome.difference[:20, :18, :14]
    np.testing.assert_allclose(inner, 0, atol=1e-4)
    shifted = compare_views(LayerView.of(Image(coarse, scale=(3, 2, 2), translate=(4, 2, 3))), reference)
    assert abs(shifted.difference[6, 6, 6] + 3) < 1e-4


def test_comparison_of_colours():
    colours = np.stack([brain(), brain()[::-1], brain()], axis=-1)
    reference = LayerView.of(Image(colours, rgb=True))
    other = LayerView.of(Image(np.clip(colours.astype(int) + 3, 0, 255).astype(np.uint8), rgb=True))
    outcome = compare_views(other, reference)
    assert outcome.rmse == pytest.approx(3)
    with pytest.raises(ValueError, match="another RGB layer"):
        compare_views(LayerView.of(Image(brain())), reference)


def test_comparison_refuses_what_it_cannot_do():
    here, away = Image(brain()), Image(brain(), translate=(900, 0, 0))
    with pytest.raises(ValueError, match="don't overlap"):
        compare_views(LayerView.of(away), LayerView.of(here))
    with pytest.raises(ValueError, match="is constant"):
        compare_views(LayerView.of(here), LayerView.of(Image(np.ones((12, 20, 24)))))
    with pytest.raises(ValueError, match="has 2 dimensions"):
        compare_views(LayerView.of(Image(brain()[0])), LayerView.of(here))


def test_stack_from_view_equals_stack_from_layer():
    layer = rotated(brain())
    ours = Source((LayerView.of(layer),), 1, 2).stack()
    theirs = SliceStack.from_layer(layer, axis=1, keep_every=2)
    np.testing.assert_array_equal(ours.data, theirs.data)
    np.testing.assert_allclose(ours.affine, theirs.affine)
    assert ours.units == theirs.units


# -- slice planes and several stacks ------------------------------------------------------------------------


def turned(degrees, shift):
    """A rotation about the z axis followed by a shift, 4 x 4."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    out = np.eye(4)
    out[1:3, 1:3] = [[c, -s], [s, c]]
    out[:3, 3] = shift
    return out


@pytest.mark.parametrize(
    ("normal", "name"),
    [
        ((1, 0, 0), "axial"),
        ((0, -2, 0), "coronal"),
        ((0.1, 0, 1), "sagittal"),
        ((1, 0, 0.5), "oblique"),
        ((1, 1, 1), "oblique"),
    ],
)
def test_orientation(normal, name):
    assert orientation(normal) == name


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_are_the_outlines_of_the_slices(axis):
    layer = rotated(brain())
    source = Source((LayerView.of(layer),), axis)
    stack = source.stack()
    data, kwargs, kind = plane_layer([stack], source.view)
    assert kind == "vectors"
    assert data.shape == (4 * stack.n_slices, 2, 3)
    index = np.full((4, 3), 3.0)
    index[:, np.arange(3) != axis] = [
        (a, b) for a in (-0.5, stack.height - 0.5) for b in (-0.5, stack.width - 0.5)
    ]
    wanted = np.array([layer.data_to_world(one) for one in index])
    starts = data[4 * 3 : 4 * 4, 0]
    assert np.abs(wanted[:, None] - starts).sum(-1).min(1).max() < 1e-9
    # the four edges close
    np.testing.assert_allclose(starts + data[12:16, 1], np.roll(starts, -1, axis=0), atol=1e-9)
    viewer = ViewerModel()
    added = viewer.add_vectors(data, **kwargs)
    assert added.units == layer.units
    assert added.axis_labels == layer.axis_labels
    assert set(added.features["stack"]) == {"T1"}


def test_motion_moves_the_planes_and_is_kept():
    layer = rotated(brain())
    source = Source((LayerView.of(layer),), 0)
    stack = source.stack()
    transforms = [turned(0.1 * i, (0, 0, 0.5 * i)) for i in range(stack.n_slices)]
    before, after = motion_layers([stack, stack], [transforms, [np.eye(4)] * stack.n_slices], source.view)
    assert not before[1]["visible"]
    assert not after[1]["visible"]
    half = len(before[0]) // 2
    np.testing.assert_array_equal(after[0][half:], before[0][half:])
    corners = slice_corners(stack)
    moved = np.c_[corners[5], np.ones(4)] @ transforms[5].T
    np.testing.assert_allclose(after[0][20:24, 0], moved[:, :3])
    features = after[1]["features"]
    assert features["turn"][20] == pytest.approx(0.5)
    assert features["turn"][half:].max() == 0
    assert features["shift"][20] == pytest.approx(np.linalg.norm((moved[:, :3] - corners[5]).mean(0)))
    kept = json.loads(json.dumps(after[1]["metadata"]))[METADATA_KEY]["motion"]
    np.testing.assert_array_equal(kept[0]["transforms"], transforms)
    _, marked = motion_layers([stack], [transforms], source.view, [[2, 5]])
    assert np.unique(np.flatnonzero(marked[1]["features"]["outlier"]) // 4).tolist() == [2, 5]
    assert np.ptp(marked[1]["edge_color"][:20], axis=0).max() > 0.5
    with pytest.raises(ValueError, match="need \\(12, 4, 4\\)"):
        slice_corners(stack, transforms[1:])
    with pytest.raises(ValueError, match="for 1 stacks, need 2"):
        plane_layer([stack, stack], source.view, [transforms])


def test_planes_in_the_units_of_the_layer():
    data = brain()
    mixed = Image(data, scale=(4000, 1, 1), units=("um", "mm", "mm"))
    view = LayerView.of(mixed)
    planes, kwargs, _ = plane_layer([Source((view,), 0).stack()], view)
    np.testing.assert_allclose(planes[-4:, 0, 0], 11 * 4000)
    assert kwargs["units"] == mixed.units


def test_thickness_and_profile_of_a_layer():
    layer = rotated(brain())
    assert profile_of(layer) == (0.0, "gaussian")
    layer.metadata = {METADATA_KEY: {"thickness": 4, "profile": "box"}}
    assert profile_of(layer) == (4.0, "box")
    layer.metadata = {METADATA_KEY: {"thickness": -1, "profile": "triangle"}}
    assert profile_of(layer) == (0.0, "gaussian")
    stack = Source((LayerView.of(layer),), 0, thickness=3.5, profile="box").stack()
    assert (stack.thickness, stack.profile) == (3.5, "box")


def test_a_region_is_found_again_in_another_stack():
    stacks = [Image(data, **kwargs) for data, kwargs, _ in samples.brain_stacks()[1:]]
    first = LayerView.of(stacks[0])
    corners = region_corners(centre_region(first.shape), first)
    low, high = corners.min(0), corners.max(0)
    for layer in stacks[1:]:
        view = LayerView.of(layer)
        region = region_of_points(corners, view)
        seen = region_corners(region, view)
        np.testing.assert_allclose(seen.min(0), low, atol=2.01)
        np.testing.assert_allclose(seen.max(0), high, atol=2.01)
    with pytest.raises(ValueError, match="the box lies outside the image 'T1 brain coronal'"):
        region_of_points(corners + 300, LayerView.of(stacks[1]))


def test_custom_grid_covers_all_stacks():
    stacks = [
        Source((LayerView.of(Image(data, **kwargs)),), axis).stack()
        for axis, (data, kwargs, _) in enumerate(samples.brain_stacks()[1:])
    ]
    grid = custom_grid(stacks, (2.0, 1.0, 1.0))
    assert grid.shape == (33, 96, 80)
    assert grid.units == ("mm",) * 3
