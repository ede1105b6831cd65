import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest

from napari_innergs.data import SliceStack, restore_dtype

OBLIQUE = np.array([[2.9, 0.1, 0.2, -7.0], [0.3, 0.6, -0.4, 3.0], [-0.2, 0.3, 0.7, 11.0], [0, 0, 0, 1]])
RNG = np.random.default_rng(0)


def world_of(stack, i, row, col):
    return (stack.frame_affine @ [stack.positions[i], row, col, 1])[:3]


def test_plain_stack():
    data = RNG.integers(0, 4000, (5, 6, 7)).astype(np.uint16)
    stack = SliceStack(data, OBLIQUE, units="micron", name="thing")
    assert stack.data.shape == (5, 6, 7, 1) and stack.dtype == np.uint16 and not stack.had_channel_axis
    assert (stack.n_slices, stack.height, stack.width, stack.n_channels) == (5, 6, 7, 1)
    assert stack.units == ("um",) * 3
    assert stack.intensity_range == (data.min(), data.max())
    assert stack.values().dtype == np.float32
    np.testing.assert_array_equal(stack.values()[..., 0], data)
    np.testing.assert_allclose(world_of(stack, 3, 2, 4), (OBLIQUE @ [3, 2, 4, 1])[:3])
    np.testing.assert_allclose(stack.corners()[-1], (OBLIQUE @ [4, 5, 6, 1])[:3])
    assert "5 slices of 6 x 7" in repr(stack) and len(stack) == 5


@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "<u2", ">u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ">f4"]
)
def test_every_real_type(dtype):
    data = RNG.integers(0, 100, (3, 4, 5)).astype(dtype)
    stack = SliceStack(data)
    assert stack.dtype == np.dtype(dtype)
    assert stack.restore(stack.values()).dtype == np.dtype(dtype)
    np.testing.assert_array_equal(stack.restore(stack.values()), data)


def test_unsorted_positions_are_sorted_with_their_pixels_and_mask():
    data = np.arange(4 * 2 * 3, dtype=float).reshape(4, 2, 3)
    mask = np.ones((4, 2, 3), bool)
    mask[2, 0, 0] = False
    positions = [9.0, 0.0, 4.0, 2.0]
    stack = SliceStack(data, np.diag([5.0, 1, 1, 1]), positions, mask=mask)
    assert stack.order.tolist() == [1, 3, 2, 0] and stack.positions.tolist() == [0, 2, 4, 9]
    for i, source in enumerate(stack.order):
        np.testing.assert_array_equal(stack.data[i, ..., 0], data[source])
        np.testing.assert_allclose(world_of(stack, i, 0, 0), [positions[source], 0, 0])
    assert not stack.mask[2, 0, 0] and stack.mask.sum() == mask.sum() == 23
    assert stack.subset([1, 3]).order.tolist() == [3, 0]


def test_is_immutable_and_pickles():
    stack = SliceStack(RNG.random((3, 4, 5)))
    with pytest.raises(AttributeError, match="immutable"):
        stack.thickness = 2.0
    with pytest.raises(AttributeError, match="immutable"):
        del stack.name
    with pytest.raises(ValueError, match="read-only"):
        stack.data[0] = 0
    copy = pickle.loads(pickle.dumps(stack))
    np.testing.assert_array_equal(copy.data, stack.data)
    np.testing.assert_array_equal(copy.frame_affine, stack.frame_affine)


BASE = np.zeros((4, 5, 6), np.float32)


def spoiled(*values):
    data = np.zeros((4, 5, 6))
    for number, value in enumerate(values):
        data[1 + number, 2, 3] = value
    return data


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"data": BASE[:1]}, ValueError, "data: got 1 slice"),
        ({"data": BASE[:0]}, ValueError, "empty"),
        ({"data": []}, ValueError, "empty"),
        ({"data": np.zeros((4, 0, 6))}, ValueError, "empty"),
        ({"data": BASE[0]}, ValueError, r"data: got shape \(5, 6\)"),
        ({"data": [np.zeros((5, 6)), np.zeros((5, 7))]}, ValueError, "data: slice 1 has shape"),
        ({"data": [np.zeros((5, 6, 3)), np.zeros((5, 6, 4))]}, ValueError, "same size and channels"),
        ({"data": BASE > 0}, TypeError, "boolean.*nearest alone"),
        ({"data": BASE.astype(complex)}, TypeError, "complex"),
        ({"data": BASE.astype(object)}, TypeError, "object"),
        ({"data": BASE.astype(str)}, TypeError, "<U"),
        ({"data": spoiled(np.nan, np.inf)}, ValueError, "2 pixel values.*slice 1, row 2, column 3;"),
        ({"data": np.stack([spoiled(0, -np.inf)] * 2, -1)}, ValueError, "2 pixel.*slice 2, .*channel 0"),
        ({"data": BASE.astype(float) + 1e39}, ValueError, "float32"),
        ({"affine": np.diag([1, 1, 0, 1])}, ValueError, "affine"),
        ({"affine": np.eye(3)}, ValueError, "affine"),
        ({"positions": [0, 1, 2]}, ValueError, "positions"),
        ({"positions": [0, 1, 2, 1]}, ValueError, "slices 1 and 3 are both at 1"),
        ({"thickness": -1}, ValueError, "thickness: got -1"),
        ({"thickness": 4.5}, ValueError, "larger than the whole stack"),
        ({"thickness": np.nan}, ValueError, "thickness"),
        ({"thickness": "thin"}, ValueError, "thickness"),
        ({"profile": "sinc"}, ValueError, "profile: got 'sinc'"),
        ({"mask": np.ones((4, 5))}, ValueError, r"mask: got shape \(4, 5\)"),
        ({"mask": np.full((4, 5, 6), 0.5)}, ValueError, "mask.*booleans"),
        ({"mask": np.zeros((4, 5, 6), bool)}, ValueError, "no pixel is trusted"),
        ({"channel_names": ["a", "b"]}, ValueError, "channel_names: got 2"),
        ({"units": ("mm", "mm")}, ValueError, "units"),
    ],
)
def test_bad_input_is_named(kwargs, error, match):
    with pytest.raises(error, match=match):
        SliceStack(**{"data": BASE, **kwargs})


def test_masked_pixels_are_interpolated_between_slices_that_can_be_trusted():
    rows, cols = np.mgrid[0:5, 0:6]
    positions = np.array([0.0, 3, 5, 9])
    data = 10 + positions[:, None, None] * (1 + rows) + cols
    spoiled, mask = data.copy(), np.ones(data.shape, bool)
    mask[1, :, 2] = mask[1:3, 0, 4] = False
    mask[2] = False
    spoiled[~mask] = np.nan
    stack = SliceStack(spoiled, positions=positions, mask=mask)
    assert stack.intensity_range == (10, data.max())
    np.testing.assert_allclose(stack.values()[..., 0], data, rtol=1e-6)
    reverse = SliceStack(spoiled[::-1], positions=positions[::-1], mask=mask[::-1])
    np.testing.assert_allclose(reverse.values()[..., 0], data, rtol=1e-6)


def test_masked_pixels_without_any_slice_take_the_nearest_ones():
    data = np.tile(np.arange(6.0), (3, 5, 1))
    data[:, :, 2] = data[0, 1, 1] = np.nan
    mask = np.isfinite(data)
    mask[:, :, 3] = False
    values = SliceStack(data, np.diag([3, 1, 1, 1.0]), mask=mask).values()
    np.testing.assert_array_equal(values[..., 0], np.tile([0, 1, 1, 4, 4, 5], (3, 5, 1)))


def test_the_mask_of_a_masked_array_is_used():
    data = np.ma.masked_equal(np.arange(24).reshape(2, 3, 4), 7)
    np.testing.assert_array_equal(SliceStack(data).mask, ~data.mask)
    colours = np.ma.stack([data, data + 1], axis=-1)
    np.testing.assert_array_equal(SliceStack(colours).mask, ~data.mask)


@pytest.mark.parametrize("offset", [2**40, -(2**40), 4_000_000_000])
def test_small_contrast_on_a_large_offset_is_refused(offset):
    data = offset + np.arange(48).reshape(3, 4, 4)
    with pytest.raises(ValueError, match="subtract an offset"):
        SliceStack(data)
    SliceStack(data - offset)
    SliceStack(np.full((3, 4, 4), offset))


def test_values_whose_squares_overflow_are_refused():
    with pytest.raises(ValueError, match="divide"):
        SliceStack(np.full((3, 4, 4), 1e30, np.float32))


def test_constant_data_is_allowed():
    stack = SliceStack(np.full((3, 4, 4), 7, np.uint8))
    assert stack.intensity_range == (7, 7)


def test_crop_subset_and_keep_every_stay_in_place():
    data = RNG.random((9, 8, 7, 2))
    stack = SliceStack(data, OBLIQUE, mask=RNG.random((9, 8, 7)) > 0.2)
    part = stack.crop(slice(2, 6), slice(1, None), slice(3, 8))
    assert part.data.shape == (5, 4, 6, 2)
    np.testing.assert_array_equal(part.data[1, 2, 3], data[4, 4, 4])
    np.testing.assert_array_equal(part.mask[1, 2, 3], stack.mask[4, 4, 4])
    np.testing.assert_allclose(world_of(part, 1, 2, 3), world_of(stack, 4, 4, 4))
    np.testing.assert_allclose(part.positions, stack.positions[3:8])
    sparse = stack.keep_every(3, start=1)
    np.testing.assert_array_equal(sparse.data, data[1::3])
    np.testing.assert_allclose(world_of(sparse, 2, 0, 5), world_of(stack, 7, 0, 5))
    np.testing.assert_array_equal(sparse.frame_affine, stack.frame_affine)
    np.testing.assert_array_equal(stack.subset([-1, 0]).positions, stack.positions[[0, 8]])
    mask = np.zeros(9, bool)
    mask[[2, 5]] = True
    np.testing.assert_array_equal(stack.subset(mask).data, data[[2, 5]])
    for call in (
        lambda: stack.keep_every(9),
        lambda: stack.keep_every(0),
        lambda: stack.keep_every(2, start=-1),
        lambda: stack.subset([1]),
        lambda: stack.subset([1, 1]),
        lambda: stack.subset([1, 9]),
        lambda: stack.crop(rows=slice(0, 8, 2)),
        lambda: stack.crop(cols=slice(3, 3)),
        lambda: stack.crop(slices=slice(0, 1)),
    ):
        with pytest.raises(ValueError, match=r"got|left"):
            call()


def test_default_grid_keeps_the_affine():
    stack = SliceStack(BASE, np.diag([-4.0, 1, -1, 1]), units="mm")
    grid = stack.default_grid()
    assert grid.shape == (13, 5, 6) and grid.units == ("mm",) * 3
    np.testing.assert_array_equal(grid.affine, np.diag([-1.0, 1, -1, 1]))
    sparse = stack.keep_every(2)  # gap 8: the slices still lie on planes
    assert sparse.default_grid().shape == (9, 5, 6)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])
def test_restore_never_wraps(dtype):
    info = np.iinfo(dtype)
    values = np.array([-1e30, -0.6, 0.5, 1.5, 2.4, 1e30, np.inf, -np.inf, float(info.max), float(info.min)])
    out = restore_dtype(values, dtype)
    low = info.min
    assert out.tolist() == [low, max(-1, low), 0, 2, 2, info.max, info.max, low, info.max, low]
    assert restore_dtype(values.astype(np.float32), dtype).tolist() == out.tolist()
    with pytest.raises(ValueError, match="NaN"):
        restore_dtype(np.array([np.nan]), dtype)


def test_restore_floats_clips_and_channels():
    stack = SliceStack(np.array([[[10, 20]], [[30, 40]]], np.int16))
    volume = np.array([5.0, 15.2, 45.0]).reshape(3, 1, 1, 1)
    assert stack.restore(volume).shape == (3, 1, 1)
    assert stack.restore(volume).ravel().tolist() == [5, 15, 45]
    assert stack.restore(volume, clip="data").ravel().tolist() == [10, 15, 40]
    assert stack.restore(volume, np.float16).dtype == np.float16
    assert restore_dtype(np.array([1e9]), np.float16)[0] == np.finfo(np.float16).max
    assert SliceStack(np.zeros((2, 3, 3, 1))).restore(np.zeros((4, 3, 3, 1))).shape == (4, 3, 3, 1)
    with pytest.raises(TypeError, match="complex"):
        stack.restore(volume, complex)


def test_from_channels():
    a, b = (SliceStack(RNG.random((3, 4, 5)), OBLIQUE, name=n) for n in ("red", "green"))
    both = SliceStack.from_channels([a, b])
    assert both.channel_names == ("red", "green") and both.had_channel_axis
    np.testing.assert_array_equal(both.data[..., 1], b.data[..., 0])
    for other, word in (
        (SliceStack(RNG.random((3, 4, 6)), OBLIQUE), "shape"),
        (SliceStack(np.zeros((3, 4, 5), np.uint8), OBLIQUE), "type"),
        (SliceStack(RNG.random((3, 4, 5))), "lies elsewhere"),
    ):
        with pytest.raises(ValueError, match=f"channel 1.*{word}|{word}"):
            SliceStack.from_channels([a, other])


# ---------------------------------------------------------------- layers, without napari


class FakeLayer:
    """What from_layer uses of an Image layer: world = affine of the data index."""

    def __init__(self, data, matrix=None, offset=None, rgb=False, units=None, multiscale=False):
        self.data = data
        self.multiscale = multiscale
        self.rgb = rgb
        self.ndim = np.ndim(data[0] if multiscale else data) - rgb
        self.matrix = np.eye(self.ndim) if matrix is None else np.asarray(matrix)
        self.offset = np.zeros(self.ndim) if offset is None else np.asarray(offset)
        self.units = units
        self.name = "fake"

    def data_to_world(self, position):
        return tuple(self.matrix @ np.asarray(position) + self.offset)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_layer_axis_and_world(axis):
    data = RNG.random((5, 6, 7))
    layer = FakeLayer(data, OBLIQUE[:3, :3], OBLIQUE[:3, 3], units=("mm",) * 3)
    stack = SliceStack.from_layer(layer, axis=axis)
    index = np.array([2, 3, 4])
    i = index[axis]
    row, col = np.delete(index, axis)
    assert stack.data[i, row, col, 0] == data[2, 3, 4]
    np.testing.assert_allclose(world_of(stack, i, row, col), layer.data_to_world(index))
    assert stack.units == ("mm",) * 3 and stack.name == "fake"
    sparse = SliceStack.from_layer(layer, axis=axis, keep_every=2, start=1)
    np.testing.assert_allclose(world_of(sparse, 1, 1, 2), world_of(stack, 3, 1, 2))


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::7])
def test_layer_with_time_and_channels_on_any_axes(order):
    sizes = (2, 3, 4, 5, 6)  # t, c, z, y, x
    data = RNG.random([sizes[d] for d in order])
    time, channel = order.index(0), order.index(1)
    spatial = [d for d in range(5) if d not in (time, channel)]
    matrix = np.diag([2.0, 3, 4, 5, 6])
    matrix[spatial[0], time] = 0.5  # a drift: where the image lies depends on time
    layer = FakeLayer(data, matrix, [1, 2, 3, 4, 5])
    stack = SliceStack.from_layer(layer, time_index=1, time_axis=time, channel_axis=channel)
    pick = [0] * 5
    pick[time], pick[channel] = 1, 2
    for d, value in zip(spatial, (1, 2, 3), strict=True):
        pick[d] = value
    assert stack.data[1, 2, 3, 2] == data[tuple(pick)]
    np.testing.assert_allclose(world_of(stack, 1, 2, 3), np.array(layer.data_to_world(pick))[spatial])


def test_rgb_multiscale_and_mixed_units():
    data = RNG.integers(0, 255, (4, 5, 6, 3)).astype(np.uint8)
    stack = SliceStack.from_layer(FakeLayer(data, rgb=True))
    np.testing.assert_array_equal(stack.data, data)
    timed = FakeLayer(np.stack([data, data + 1]), rgb=True)
    np.testing.assert_array_equal(
        SliceStack.from_layer(timed, axis=1, time_index=1).data, (data + 1).swapaxes(0, 1)
    )
    levels = FakeLayer([data[..., 0], data[::2, ::2, ::2, 0]], multiscale=True)
    np.testing.assert_array_equal(SliceStack.from_layer(levels).data[..., 0], data[..., 0])
    mixed = SliceStack.from_layer(FakeLayer(data[..., 0], np.diag([0.002, 3, 4]), units=("mm", "um", "um")))
    np.testing.assert_allclose(mixed.affine.diagonal(), [2, 3, 4, 1])
    assert mixed.units == ("um",) * 3


def test_dask_layers_are_computed():
    da = pytest.importorskip("dask.array")
    data = RNG.random((4, 5, 6))
    stack = SliceStack.from_layer(FakeLayer(da.from_array(data, chunks=2)))
    assert type(stack.data) is np.ndarray
    np.testing.assert_array_equal(stack.data[..., 0], data)


class Labels(FakeLayer):
    selected_label = 1


def test_layers_that_are_refused():
    data = np.zeros((3, 4, 5, 6))
    with pytest.raises(TypeError, match="method nearest alone"):
        SliceStack.from_layer(Labels(data[0].astype(int)))
    with pytest.raises(TypeError, match="need a napari Image layer"):
        SliceStack.from_layer(data)
    for kwargs, word in (
        ({}, "time_index"),
        ({"time_index": 3}, "time_index: got 3"),
        ({"channel_axis": 7}, "channel_axis"),
        ({"channel_axis": 3, "time_index": 0}, "no time axis"),
        ({"time_index": 0, "axis": 3}, "axis: got 3"),
        ({"time_index": 0, "keep_every": 9}, "keep_every"),
    ):
        with pytest.raises(ValueError, match=word):
            SliceStack.from_layer(FakeLayer(data), **kwargs)
    with pytest.raises(ValueError, match="2 dimensions"):
        SliceStack.from_layer(FakeLayer(data[0, 0]))
    with pytest.raises(ValueError, match="no conversion"):
        SliceStack.from_layer(FakeLayer(data[0], units=("pixel", "um", "um")))


def test_real_napari_layer_with_every_transform():
    layers = pytest.importorskip("napari.layers")
    data = RNG.random((5, 6, 7))
    affine = np.eye(4)
    affine[:3] = OBLIQUE[:3]
    layer = layers.Image(
        data, scale=(3, 1, 0.5), translate=(1, 2, 3), rotate=(10, 20, 30), shear=(0.1, 0, 0.2), affine=affine,
        units=("um", "um", "um"), name="real",
    )  # fmt: skip
    stack = SliceStack.from_layer(layer, axis=2)
    np.testing.assert_allclose(world_of(stack, 6, 4, 5), layer.data_to_world((4, 5, 6)))
    assert stack.units == ("um",) * 3
    with pytest.raises(TypeError, match="Labels"):
        SliceStack.from_layer(layers.Labels(np.zeros((3, 4, 5), int)))


def test_import_is_light():
    code = (
        "import sys, napari_innergs.data, napari_innergs.model;"
        "import napari_innergs.io.read, napari_innergs.io.write;"
        "heavy = {'torch', 'cupy', 'numba', 'dask', 'napari', 'qtpy', 'nibabel', 'pydicom', 'zarr'};"
        "bad = heavy & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
