"""X-ray scans as layers: geometry in metadata, the scanner in 3D, radiographs."""

import json

import numpy as np
import pytest

from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam, XrayGeometry
from napari_innergs.layers.read import METADATA_KEY
from napari_innergs.layers.xray import (
    attenuation_layers,
    describe_geometry,
    free_view,
    geometry_layers,
    geometry_of_layer,
    grid_of_layer,
    make_scan,
    projection_layers,
    radiograph_layers,
    render_radiographs,
    scan_from_layer,
    to_hounsfield,
    view_layer,
    water_attenuation,
)
from napari_innergs.model import GaussianModel
from napari_innergs.result import Reconstruction
from napari_innergs.scan import Scan

layers = pytest.importorskip("napari.layers")
ANGLES = np.arange(7) * 0.9


def cone(**options):
    given = {
        "source_origin": 100,
        "source_detector": 150,
        "detector_shape": (9, 12),
        "pixel_size": (1.5, 2.0),
    }
    return ConeBeam.circular(ANGLES, **{**given, **options})


def parallel():
    return ParallelBeam.circular(ANGLES, detector_shape=(9, 12), pixel_size=(1.5, 2.0))


def centred(shape, step, units=None):
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = -0.5 * (np.array(shape) - 1) * step
    return Grid(shape, affine, units)


def as_layers(tuples):
    return [getattr(layers, kind.capitalize())(data, **kwargs) for data, kwargs, kind in tuples]


@pytest.mark.parametrize(
    "geometry",
    [
        cone(units="mm", detector_offset=(0.5, -3), detector_tilt=(0.01, 0.02, 0.03)),
        parallel(),
        ConeBeam.helical(
            ANGLES, pitch=5, source_origin=100, source_detector=150, detector_shape=(9, 12), pixel_size=1
        ),
    ],
    ids=["cone", "parallel", "helix"],
)
def test_scan_to_layer_and_back(geometry):
    pixels = np.random.default_rng(0).random((7, 9, 12)).astype(np.float32)
    scan = Scan(pixels, geometry, centred((4, 5, 6), 2.0, geometry.units), name="try")
    (layer,) = as_layers(projection_layers(scan, file="try.json"))
    # what napari or a user saves and reads again
    layer.metadata = json.loads(json.dumps(layer.metadata))
    again = scan_from_layer(layer)
    assert again.geometry == geometry
    np.testing.assert_array_equal(again.geometry.angles, geometry.angles)
    np.testing.assert_array_equal(again.geometry.isocentre, geometry.isocentre)
    assert again.grid.shape == (4, 5, 6)
    np.testing.assert_array_equal(again.grid.affine, scan.grid.affine)
    assert again.grid.units == geometry.units
    np.testing.assert_array_equal(again.projections, pixels)
    assert not again.is_counts
    # one step of napari's slider is one view and one plane of the volume
    assert layer.scale[0] == 2.0
    assert layer.translate[0] == pytest.approx(scan.grid.index_to_world(np.zeros(3))[0])


def test_counts_bring_their_fields():
    pixels = np.full((7, 9, 12), 900, np.uint16)
    flat, dark = np.full((2, 9, 12), 1000, np.uint16), np.full((9, 12), 10, np.uint16)
    scan = Scan(pixels, cone(), flat=flat, dark=dark, name="raw")
    raw, white, black = as_layers(projection_layers(scan))
    assert (raw.name, white.name, black.name) == ("raw", "raw flat", "raw dark")
    assert not white.visible
    again = scan_from_layer(raw, flat=white.data, dark=black.data)
    assert again.is_counts
    with pytest.raises(ValueError, match="need i0 or flat"):
        scan_from_layer(raw)
    (raw,) = as_layers(projection_layers(Scan(pixels, cone(), i0=np.arange(7) + 1e3)))
    np.testing.assert_array_equal(scan_from_layer(raw).i0, np.arange(7) + 1e3)


def test_description_written_by_hand():
    geometry = {
        "mode": "cone",
        "DSO": 100,
        "DSD": 150,
        "dDetector": [1.5, 2.0],
        "angles_rad": ANGLES.tolist(),
        "nVoxel": [4, 4, 4],
        "dVoxel": [1, 1, 1],
    }
    layer = layers.Image(np.zeros((7, 9, 12), np.float32), metadata={METADATA_KEY: {"geometry": geometry}})
    assert geometry_of_layer(layer) == cone()
    assert grid_of_layer(layer).shape == (4, 4, 4)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"geometry": {"vectors": [[1, 2]]}}, "geometry in the metadata of 'bad' is damaged: vectors"),
        ({"geometry": {"mode": "cone", "DSO": 1}}, "geometry in the metadata of 'bad' is damaged"),
        ({"geometry": {"vectors": "os.system"}}, "not numbers"),
        ({"geometry": {"vectors": [[10**400] * 12]}}, "damaged: int too large"),
    ],
)
def test_damaged_metadata(own, words):
    layer = layers.Image(np.zeros((7, 9, 12), np.float32), name="bad", metadata={METADATA_KEY: own})
    with pytest.raises(ValueError, match=words):
        geometry_of_layer(layer)


def test_damaged_grid_and_foreign_metadata():
    layer = layers.Image(
        np.zeros((7, 9, 12), np.float32), name="bad", metadata={METADATA_KEY: {"grid": {"shape": [1]}}}
    )
    with pytest.raises(ValueError, match="grid in the metadata of 'bad' is damaged"):
        grid_of_layer(layer)
    layer.metadata = {METADATA_KEY: {"grid": {"shape": [float("inf")] * 3, "affine": np.eye(4).tolist()}}}
    with pytest.raises(ValueError, match="grid in the metadata of 'bad' is damaged"):
        grid_of_layer(layer)
    layer.metadata = {METADATA_KEY: "text"}
    assert geometry_of_layer(layer) is None
    assert grid_of_layer(layer) is None
    with pytest.raises(ValueError, match="has none in its metadata"):
        scan_from_layer(layer)


def test_what_is_no_stack_of_projections():
    with pytest.raises(ValueError, match="'flat' has 2 dimensions, need projections"):
        make_scan(layers.Image(np.zeros((5, 6)), name="flat"), cone())
    with pytest.raises(ValueError, match=r"numpy\.transpose"):
        make_scan(layers.Image(np.zeros((9, 7, 12)), name="turned"), cone())
    with pytest.raises(ValueError, match="got 6 views, the geometry has 7"):
        make_scan(layers.Image(np.zeros((6, 9, 12))), cone(), blank=True)


def test_cone_scanner_is_drawn_where_it_is():
    geometry = cone(units="mm")
    panels, box, first, sources = as_layers(geometry_layers(geometry, centred((4, 5, 6), 2.0, "mm")))
    np.testing.assert_allclose(sources.data, geometry.source)
    assert sources.features["angle"].tolist() == pytest.approx(np.degrees(ANGLES).tolist())
    corners = panels.data[:, 0].reshape(7, 4, 3)
    np.testing.assert_allclose(corners.mean(1), geometry.center, atol=1e-4)
    # edges close, and are as long as the panel
    np.testing.assert_allclose(panels.data.reshape(7, 4, 2, 3)[:, :, 1].sum(1), 0, atol=1e-4)
    assert set(np.linalg.norm(panels.data[:, 1], axis=1).round(4)) == {9 * 1.5, 12 * 2.0}
    ends = np.concatenate([box.data[:, 0], box.data.sum(1)])
    np.testing.assert_allclose(ends.min(0), [-4, -5, -6])
    np.testing.assert_allclose(ends.max(0), [4, 5, 6])
    np.testing.assert_allclose(first.data[:, 0], np.broadcast_to(geometry.source[0], (4, 3)), atol=1e-4)
    np.testing.assert_allclose(first.data.sum(1), corners[0], atol=1e-4)
    assert {str(unit) for layer in (panels, box, sources) for unit in layer.units} == {"millimeter"}


def test_parallel_panels_are_drawn_beside_the_volume():
    grid = centred((4, 12, 12), 2.0)
    panels, _, first = as_layers(geometry_layers(parallel(), grid))
    centres = panels.data[:, 0].reshape(7, 4, 3).mean(1)
    away = np.sum(centres * parallel().direction, axis=1)
    assert (away > 0.5 * 24 * 2**0.5).all()
    along = first.data[:, 1] / np.linalg.norm(first.data[:, 1], axis=1, keepdims=True)
    np.testing.assert_allclose(along, np.broadcast_to(parallel().direction[0], (4, 3)), atol=1e-5)


def test_many_views_are_thinned():
    geometry = XrayGeometry(np.repeat(cone().vectors, 50, axis=0), (9, 12))
    panels, *_, sources = geometry_layers(geometry, centred((4, 4, 4), 1.0))
    assert len(sources[0]) == 90
    assert len(panels[0]) == 360
    assert panels[1]["features"]["view"].max() == geometry.n_views - 1


def blob(step=0.5, sigma=2.0):
    """A round Gaussian off centre: voxels, model, and its line integrals in closed form."""
    grid = centred((34, 34, 34), step, "mm")
    mean = np.array([0.4, -1.0, 1.5])
    model = GaussianModel([mean], np.log([[sigma] * 3]), [[1, 0, 0, 0]], [0.05], field="additive", units="mm")
    square = np.sum((grid.index_to_world(np.indices(grid.shape).reshape(3, -1).T) - mean) ** 2, axis=1)
    volume = (0.05 * np.exp(-square / (2 * sigma**2))).reshape(grid.shape).astype(np.float32)
    return Reconstruction(volume, grid, model, {"n": np.float32(1)}, volume / 10), mean, sigma


@pytest.mark.parametrize("geometry", [cone(units="mm"), parallel()], ids=["cone", "parallel"])
@pytest.mark.parametrize(("source", "share"), [("model", 2e-3), ("volume", 0.02)])
def test_radiographs_of_a_gaussian(geometry, source, share):
    result, mean, sigma = blob()
    images = render_radiographs(result, geometry, source=source)
    rows, cols = (np.arange(n) - 0.5 * (n - 1) for n in geometry.detector_shape)
    pixels = (
        geometry.center[:, None, None]
        + rows[:, None, None] * geometry.v[:, None, None]
        + cols[:, None] * geometry.u[:, None, None]
    )
    if geometry.kind == "cone":
        ray = pixels - geometry.source[:, None, None]
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    else:
        ray = np.broadcast_to(geometry.direction[:, None, None], pixels.shape)
    apart = np.linalg.norm(np.cross(mean - pixels, ray), axis=-1)
    known = 0.05 * sigma * np.sqrt(2 * np.pi) * np.exp(-(apart**2) / (2 * sigma**2))
    assert np.abs(images - known).max() < share * known.max()
    some = render_radiographs(result, geometry, [2, 5], source)
    np.testing.assert_allclose(some, images[[2, 5]], atol=1e-6)


def test_radiographs_that_cannot_be():
    result, _, _ = blob()
    with pytest.raises(ValueError, match="need 'volume' or 'model'"):
        render_radiographs(result, cone(), source="gaussians")
    with pytest.raises(ValueError, match="no additive Gaussians"):
        render_radiographs(Reconstruction(result.volume, result.grid), cone(), source="model")


def test_radiographs_lie_side_by_side():
    measured = np.random.default_rng(0).random((7, 9, 12)).astype(np.float32)
    one, other, left = as_layers(radiograph_layers(measured, measured - 0.5, cone(units="mm"), "try"))
    assert left.metadata[METADATA_KEY]["rms"] == pytest.approx(0.5)
    np.testing.assert_allclose(left.data, 0.5, atol=1e-6)
    assert left.contrast_limits[0] == -left.contrast_limits[1]
    assert one.contrast_limits == other.contrast_limits
    for left_one, right_one in ((one, other), (other, left)):
        assert left_one.extent.world[1, 2] < right_one.extent.world[0, 2]
        np.testing.assert_allclose(left_one.extent.world[:, :2], right_one.extent.world[:, :2])


def test_result_layers_lie_on_the_grid():
    result, _, _ = blob()
    volume, band, points = as_layers(attenuation_layers(result, "try", gaussians="points"))
    assert (volume.name, band.name, points.name) == ("try volume", "try uncertainty", "try Gaussians")
    np.testing.assert_allclose(
        volume.data_to_world((3, 4, 5)), result.grid.index_to_world(np.array([3, 4, 5]))
    )
    assert volume.metadata[METADATA_KEY] == {"n": 1.0, "unit": "1/mm"}
    assert not band.visible
    assert {str(unit) for layer in (volume, band, points) for unit in layer.units} == {"millimeter"}
    assert [kwargs["name"] for _, kwargs, _ in attenuation_layers(result, "a", uncertainty=False)] == [
        "a volume"
    ]


def test_hounsfield_and_total_variation_are_layers_of_their_own():
    result, _, _ = blob()
    made = attenuation_layers(result, "try", uncertainty=False, tv=result.volume * 2, water=0.02)
    volume, hounsfield, tv = as_layers(made)
    assert [layer.name for layer in (volume, hounsfield, tv)] == [
        "try volume",
        "try volume (HU)",
        "try total variation",
    ]
    np.testing.assert_array_equal(volume.data, result.volume)
    np.testing.assert_allclose(hounsfield.data, 1000 * (result.volume - 0.02) / 0.02, atol=1e-3)
    own = hounsfield.metadata[METADATA_KEY]
    assert (own["unit"], own["water"]) == ("HU", 0.02)
    assert volume.metadata[METADATA_KEY]["unit"] == tv.metadata[METADATA_KEY]["unit"] == "1/mm"
    assert not tv.visible
    np.testing.assert_allclose(hounsfield.extent.world, volume.extent.world)


@pytest.mark.parametrize(("unit", "water"), [("mm", 0.0206), ("cm", 0.206), ("um", 2.06e-5)])
def test_water_follows_the_unit_of_length(unit, water):
    assert water_attenuation((unit,) * 3) == pytest.approx(water)
    assert water_attenuation((unit,) * 3, 0.5) == 0.5
    np.testing.assert_allclose(to_hounsfield([0, water, 2 * water], water), [-1000, 0, 1000], atol=1e-3)


@pytest.mark.parametrize("units", [None, ("pixel",) * 3])
def test_water_without_a_unit_of_length(units):
    with pytest.raises(ValueError, match="give the attenuation of water per unit"):
        water_attenuation(units)
    for bad in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="need a positive attenuation"):
            to_hounsfield([1.0], bad)


@pytest.mark.parametrize("distance", [None, 60.0])
@pytest.mark.parametrize("geometry", [cone(units="mm"), parallel()], ids=["cone", "parallel"])
def test_a_free_view_holds_the_whole_volume(geometry, distance):
    result, mean, _ = blob()
    grid = result.grid
    view = free_view(geometry, grid, 0.7, 0.5, distance)
    assert view.n_views == 1
    assert view.kind == ("cone" if distance else geometry.kind)
    middle = grid.index_to_world(0.5 * (np.array(grid.shape) - 1))
    np.testing.assert_allclose(view.project(middle[None])[0, 0], 0.5 * (view.detector_shape[0] - 1))
    corners = grid.index_to_world(np.array(list(np.ndindex(2, 2, 2))) * (np.array(grid.shape) - 1))
    seen = view.project(corners)[0]
    assert seen.min() > -0.5
    assert seen.max() < view.detector_shape[0] - 0.5
    # the blob is seen where it is
    (image,) = render_radiographs(result, view)
    peak = np.array(np.unravel_index(image.argmax(), image.shape))
    np.testing.assert_allclose(peak, view.project(mean[None])[0, 0], atol=1.5)
    (layer,) = as_layers([view_layer(image, view, "view", azimuth=40)])
    assert layer.ndim == 2
    assert layer.metadata[METADATA_KEY]["azimuth"] == 40


def test_a_free_view_from_inside_is_refused():
    result, _, _ = blob()
    with pytest.raises(ValueError, match=r"distance: got 5, need more than 14\.72"):
        free_view(cone(units="mm"), result.grid, distance=5.0)


def test_metadata_are_json():
    own = describe_geometry(cone(), centred((2, 2, 2), 1.0), i0=np.float64(5))
    assert json.loads(json.dumps(own)) == own
