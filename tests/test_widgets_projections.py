"""The "Projections to volume" dock in a real viewer (PyQt6, needs a display such as Xvfb)."""

import threading
import time

import numpy as np
import pytest

pytest.importorskip("qtpy")
pytest.importorskip("pytestqt")

from qtpy.QtGui import QGuiApplication
from widget_tools import PROMPT_S, collect_dialogs, docks, fake_steps, quiet, run_to_end

from napari_innergs import samples
from napari_innergs.config_projections import PROJECTION_PRESETS, ProjectionConfig
from napari_innergs.fit.engine import Done
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam
from napari_innergs.layers.write import METADATA_KEY
from napari_innergs.layers.xray import describe_geometry, geometry_of_layer
from napari_innergs.result import Reconstruction
from napari_innergs.tasks.scan_checks import Checked, reverse_rotation
from napari_innergs.widgets import projections as module
from napari_innergs.widgets._radiographs import FREE, GAUSSIANS, VOLUME
from napari_innergs.widgets._scan_form import (
    AS_LAYER,
    CONE,
    CORRECTED,
    EVENLY,
    FAN,
    FROM_FILE,
    HELIX,
    PARALLEL,
    RADIANS,
)
from napari_innergs.widgets._xrays import SEEN
from napari_innergs.widgets.projections import (
    COUNTS,
    HOUNSFIELD,
    INTEGRALS,
    SPACING,
    ProjectionsWidget,
)

SETTINGS = {
    "tv_weight": 2.0**-11,
    "tv_passes": 3,
    "volume_steps": 3,
    "view_steps": 3,
    "voxels_per_gaussian": 40.0,
}


@pytest.fixture(autouse=True)
def no_dialogs(monkeypatch):
    return collect_dialogs(monkeypatch)


@pytest.fixture
def make_widget(make_napari_viewer, qtbot):
    yield from docks(make_napari_viewer, qtbot, ProjectionsWidget, "Projections to volume")


@pytest.fixture(scope="module")
def sample():
    return samples.cone_scan()


def plain(shape=(12, 9, 10), value=0.5, name="views", dtype=np.float32):
    return np.full(shape, value, dtype), {"name": name}, "image"


class FakeFit:
    """The mean of the projections, everywhere, with the events of the engine; it takes its time."""

    def __init__(self, steps=40, seconds=0.02):
        self.steps, self.seconds = steps, seconds
        self.closed_at = 0.0
        self.thread = None

    def __call__(self, scan, grid, config, *, device, seed):
        self.scan, self.grid, self.config = scan, grid, config
        self.thread = threading.current_thread()
        volume = np.full(grid.shape, float(np.mean(scan.projections)), np.float32)
        try:
            yield from fake_steps(volume, grid, self.steps, self.seconds)
            report = {"warnings": ["The object seems to turn the other way."], "n_gaussians": 0}
            yield Done(Checked(Reconstruction(volume, grid, None, report, volume / 10), None, None))
        finally:
            self.closed_at = time.monotonic()


@pytest.fixture
def fake(monkeypatch):
    fit = FakeFit()
    monkeypatch.setattr(module, "_engine", lambda: fit)
    monkeypatch.setattr(module, "_estimate", lambda job: "an estimate")
    return fit


# -- the whole way, with the real engine --------------------------------------------------------------------


def test_sample_scan_cancel_run_radiographs_compare(make_widget, qtbot, no_dialogs):
    widget = make_widget(show=True)
    viewer, panel = widget.viewer, widget.panel
    assert not panel.run_button.isEnabled()
    viewer.open_sample("napari-innergs", "cone_scan")
    complete, scan = viewer.layers
    assert widget.layer.value is scan
    assert (widget.scan.geometry.value, widget.grid.value) == (AS_LAYER, AS_LAYER)
    assert (widget.values.value, widget.i0.value) == (COUNTS, (20000.0,))
    qtbot.waitUntil(lambda: "40 views" in widget.estimate_line.text(), timeout=30000)
    assert "40 × 48 × 48 voxels of 1 mm" in widget.estimate_line.text()
    for name, value in SETTINGS.items():
        widget.form.fields[name].value = value

    # cancelled: the volume so far is kept
    panel.run_button.click()
    qtbot.waitUntil(lambda: panel.last_preview is not None, timeout=60000)
    asked = time.monotonic()
    panel.cancel_button.click()
    assert time.monotonic() - asked <= PROMPT_S
    assert not panel.is_running
    kept = viewer.layers[-1]
    assert kept.name == "Phantom cone beam volume (stopped early)"
    assert not widget.radiographs.button.isEnabled()
    quiet(qtbot)
    viewer.layers.remove(kept)

    # to the end
    run_to_end(widget, qtbot)
    volume, band = viewer.layers[-2:]
    assert (volume.name, band.name) == ("Phantom cone beam volume", "Phantom cone beam uncertainty")
    assert not scan.visible
    truth = complete.data
    np.testing.assert_allclose(volume.extent.world, complete.extent.world)
    assert volume.units == complete.units
    assert np.corrcoef(volume.data.ravel(), truth.ravel())[0, 1] > 0.95
    # in 1/mm: not mirrored, not scaled
    assert volume.data[truth > 0.019].mean() == pytest.approx(truth[truth > 0.019].mean(), rel=0.05)
    assert volume.metadata[METADATA_KEY]["scan"]["counts"]
    assert "Weighted residuals" in panel.status.text()
    assert volume.metadata[METADATA_KEY]["geometry_check"]["direction"] == "right"
    assert "projections agree with the geometry" in widget.scan.verdict.text()
    assert widget.scan.refine_button.styleSheet() == widget.scan.reverse_button.styleSheet() == ""

    # what the scanner would see of it, next to what it saw
    residuals = {}
    names = {f"Phantom cone beam {what}" for what in ("measured", "rendered", "residual")}
    for source in (VOLUME, GAUSSIANS):
        widget.radiographs.through.value = source
        run_to_end(widget, qtbot, widget.radiographs.button.click)
        measured, rendered, left = viewer.layers[-3:]
        assert len(viewer.layers) == 7
        assert rendered.data.shape == measured.data.shape == scan.data.shape
        np.testing.assert_allclose(measured.data, -np.log(scan.data / 20000), atol=1e-3)
        np.testing.assert_allclose(left.data, measured.data - rendered.data, atol=1e-6)
        residuals[source] = left.metadata[METADATA_KEY]["rms"]
        assert f"Residual {residuals[source]:.4g} RMS" in panel.status.text()
    assert residuals[VOLUME] < 0.1 * measured.data.max()
    assert {layer.name for layer in viewer.layers if layer.visible} == names
    # the slider reaches every view
    axis = viewer.dims.ndim - 3
    views = set()
    for step in range(viewer.dims.nsteps[axis]):
        viewer.dims.set_current_step(axis, step)
        views.add(round(left.world_to_data(viewer.dims.point)[0]))
    assert views >= set(range(40))
    # from anywhere, and followed at once
    widget.radiographs.view.value = FREE
    widget.radiographs.azimuth.value = 30
    run_to_end(widget, qtbot, widget.radiographs.button.click)
    free = viewer.layers[-1]
    assert (free.name, free.ndim, free.visible) == ("Phantom cone beam free view", 2, True)
    seen = free.data.copy()
    widget.radiographs.elevation.value = 40
    qtbot.waitUntil(lambda: free.metadata[METADATA_KEY]["elevation"] == 40, timeout=20000)
    assert viewer.layers[-1] is free
    assert free.data.shape == seen.shape
    assert np.abs(free.data - seen).max() > 0.1 * seen.max()
    widget.radiographs.distance.value = 10
    qtbot.waitUntil(lambda: "must be outside the volume" in panel.status.text(), timeout=20000)
    viewer.layers.remove(free)
    # radiographs and results are not offered as projections
    assert {layer.name for layer in widget.layer.choices} == {"Phantom cone beam", "Phantom complete"}
    assert no_dialogs == []


# -- the run ------------------------------------------------------------------------------------------------


def test_preview_pause_and_result(make_widget, sample, fake, qtbot):
    widget = make_widget(*sample, show=True)
    viewer, panel = widget.viewer, widget.panel
    fake.steps = 80
    with qtbot.waitSignal(panel.finished, timeout=30000):
        panel.run_button.click()
        qtbot.waitUntil(lambda: any("preview" in layer.name for layer in viewer.layers), timeout=5000)
        preview = viewer.layers[-1]
        assert preview.metadata[METADATA_KEY]["kind"] == "preview"
        panel.run_button.click()
        assert panel.run_button.text() == "Resume"
        qtbot.wait(100)
        panel.run_button.click()
    assert viewer.layers[2] is preview, "the preview layer becomes the result"
    assert preview.name == "Phantom cone beam volume"
    assert "turn the other way" in panel.status.text()
    assert fake.thread is not threading.main_thread()
    assert fake.scan.geometry == geometry_of_layer(viewer.layers["Phantom cone beam"])


def test_previews_stay_in_their_layer_in_the_dock_that_napari_makes(make_napari_viewer, sample, fake, qtbot):
    viewer = make_napari_viewer()
    for data, kwargs, kind in sample:
        getattr(viewer, f"add_{kind}")(data, **kwargs)
    # plugins get proxies of viewer and layers there
    _, widget = viewer.window.add_plugin_dock_widget("napari-innergs", "Projections to volume")
    fake.steps = 80
    with qtbot.waitSignal(widget.panel.finished, timeout=30000):
        widget.panel.run_button.click()
        qtbot.waitUntil(lambda: len(viewer.layers) == 3, timeout=5000)
        preview = viewer.layers[2]
        qtbot.waitUntil(lambda: float(preview.data.max()) > 1000, timeout=10000)
    assert viewer.layers[2] is preview
    assert [layer.name for layer in viewer.layers[2:]] == [
        "Phantom cone beam volume",
        "Phantom cone beam uncertainty",
    ]
    assert widget.scan.geometry.value == AS_LAYER
    quiet(qtbot)


def test_cancel_is_prompt(make_widget, sample, fake, qtbot):
    widget = make_widget(*sample)
    fake.steps = 1000
    widget.scan.reverse_button.click()
    widget.panel.run_button.click()
    qtbot.waitUntil(lambda: widget.panel.last_preview is not None, timeout=5000)
    asked = time.monotonic()
    widget.panel.cancel_button.click()
    qtbot.waitUntil(lambda: fake.closed_at > 0, timeout=2000)
    assert fake.closed_at - asked <= PROMPT_S
    kept = widget.viewer.layers[-1]
    assert kept.name == "Phantom cone beam volume (stopped early)"
    assert kept.metadata[METADATA_KEY]["kind"] == "stopped early"
    assert kept.metadata[METADATA_KEY]["corrections"] == [{"kind": "reversed rotation"}]


def test_layer_deleted_while_running(make_widget, sample, fake, qtbot):
    widget = make_widget(*sample)
    with qtbot.waitSignal(widget.panel.finished, timeout=30000):
        widget.panel.run_button.click()
        qtbot.waitUntil(lambda: widget.panel.last_preview is not None, timeout=5000)
        widget.viewer.layers.clear()
    assert [layer.name for layer in widget.viewer.layers][:1] == ["Phantom cone beam volume"]
    # the pixels are still there for radiographs
    run_to_end(widget, qtbot, widget.radiographs.button.click)
    assert widget.viewer.layers[-1].name == "Phantom cone beam residual"


# -- what the scan says about its geometry ---------------------------------------------------------------


@pytest.fixture
def small():
    """A scan of three balls, 2 columns off and turning the wrong way."""
    angles = np.arange(24) * np.pi / 12
    claimed = ConeBeam.circular(
        angles,
        source_origin=100,
        source_detector=150,
        detector_shape=(20, 28),
        pixel_size=1.0,
        units="mm",
    )
    truth = claimed.with_offset(0, -2)
    rows, cols = (np.arange(n) - 0.5 * (n - 1) for n in truth.detector_shape)
    pixels = truth.center[:, None, None] + rows[:, None, None] * truth.v[:, None, None]
    pixels = pixels + cols[:, None] * truth.u[:, None, None]
    ray = pixels - truth.source[:, None, None]
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    data = np.zeros(pixels.shape[:-1], np.float32)
    for centre, radius, value in (((0, 0, 0), 6, 0.02), ((1, -2, 3), 2.5, 0.03), ((-2, 3, -1), 2, -0.015)):
        apart = np.linalg.norm(np.cross(pixels - np.array(centre), ray), axis=-1)
        data += 2 * value * np.sqrt(np.maximum(radius**2 - apart**2, 0))
    return data, claimed, truth


def layer_of(data, geometry):
    return data, {"name": "balls", "metadata": describe_geometry(geometry)}, "image"


def test_every_run_warns_and_one_click_mends(make_widget, qtbot, small, no_dialogs):
    data, claimed, truth = small
    widget = make_widget(layer_of(data, claimed))
    layer = widget.layer.value
    for name, value in {**SETTINGS, "gaussians": False, "combine": "tv", "uncertainty": False}.items():
        widget.form.fields[name].value = value
    widget.tv.value = True
    widget.unit.value = HOUNSFIELD
    run_to_end(widget, qtbot)
    volume, hounsfield, tv = widget.viewer.layers[1:]
    assert [one.name for one in (volume, hounsfield, tv)] == [
        "balls volume",
        "balls volume (HU)",
        "balls total variation",
    ]
    np.testing.assert_allclose(hounsfield.data, 1000 * (volume.data - 0.0206) / 0.0206, atol=0.01)
    np.testing.assert_allclose(tv.data, volume.data, atol=1e-6)
    report = volume.metadata[METADATA_KEY]
    assert report["hounsfield"] == {"water": 0.0206}
    assert report["geometry_check"]["geometry"]["likely"]
    assert any("refine it" in warning for warning in report["warnings"])
    assert "refine it" in widget.scan.verdict.text()
    assert widget.scan.refine_button.styleSheet()

    before = widget.panel.status.text()
    with qtbot.waitSignal(widget.panel.finished, timeout=120000):
        widget.scan.refine_button.click()
        assert widget.panel.is_running
        assert not widget.scan.centre_button.isEnabled()
        qtbot.waitUntil(lambda: "Geometry" in widget.panel.status.text(), timeout=60000)
    assert widget.panel.status.text() != before
    assert widget.scan.geometry.value == CORRECTED
    assert {CORRECTED, AS_LAYER} < set(widget.scan.geometry.choices)
    text = widget.scan.verdict.text()
    assert "offset of the panel (v, u)" in text
    assert "±" in text
    assert "lifting the object" in text
    job = widget.job()
    # the axis is seen where it is
    axis = np.zeros((1, 3))
    columns = job.geometry.project(axis)[..., 1] - truth.project(axis)[..., 1]
    assert abs(columns.mean()) < 0.05
    assert job.corrections[0]["kind"] == "refined geometry"
    assert not widget.scan.refine_button.styleSheet()
    run_to_end(widget, qtbot, widget.scan.check_button.click)
    assert "projections agree" in widget.scan.verdict.text()
    script = widget.copy_script()
    assert "import refine_scan" in script
    assert "scan = scan.with_geometry(refine_scan(scan, scan.geometry.default_grid()).geometry)" in script
    # the way back
    assert widget.scan.centre_button.isEnabled()
    widget.scan.geometry.value = AS_LAYER
    assert widget.scan.verdict.text() == ""
    assert widget.job().geometry == geometry_of_layer(layer)
    assert widget.job().corrections == ()
    assert no_dialogs == []


def test_refining_can_be_cancelled(make_widget, qtbot, small):
    data, claimed, _ = small
    widget = make_widget(layer_of(data, claimed))
    widget.scan.refine_button.click()
    qtbot.waitUntil(lambda: "rotation axis" in widget.panel.status.text(), timeout=30000)
    asked = time.monotonic()
    widget.panel.cancel_button.click()
    assert time.monotonic() - asked <= PROMPT_S
    assert widget.panel.status.text() == "Cancelled."
    assert widget.scan.geometry.value == AS_LAYER
    assert len(widget.viewer.layers) == 1


def test_centre_and_direction_with_one_click_each(make_widget, qtbot, small):
    data, claimed, truth = small
    wrong = reverse_rotation(claimed)
    widget = make_widget(layer_of(data, wrong))
    run_to_end(widget, qtbot, widget.scan.check_button.click)
    assert "turn the other way" in widget.scan.verdict.text()
    assert widget.scan.reverse_button.styleSheet()
    assert not widget.scan.refine_button.styleSheet()
    widget.scan.reverse_button.click()
    assert not widget.scan.reverse_button.styleSheet()
    np.testing.assert_allclose(widget.job().geometry.vectors, claimed.vectors, atol=1e-9)
    run_to_end(widget, qtbot, widget.scan.centre_button.click)
    assert "column 15.5" in widget.scan.verdict.text()
    job = widget.job()
    np.testing.assert_allclose(job.geometry.center, truth.center, atol=0.1)
    assert [fact["kind"] for fact in job.corrections] == ["reversed rotation", "rotation centre"]
    # the script makes the same corrections
    text = widget.copy_script()
    names = {"napari_layer": widget.layer.value}
    start, end = text.index("geometry = "), text.index("config = ")
    code = text[:start].split("# this layer")[0] + "layer = napari_layer\n" + text[start:end]
    exec(compile(code, "script", "exec"), names)
    assert names["scan"].geometry == job.geometry
    assert names["grid"].shape == job.grid.shape


def test_centre_and_direction_of_a_described_scan(make_widget, qtbot, small):
    data, _, truth = small
    widget = make_widget((data, {"name": "balls"}, "image"))
    widget.scan.geometry.value = CONE
    for name, value in {"source_origin": 100.0, "source_detector": 150.0, "rotation": "cw"}.items():
        getattr(widget.scan, name).value = value
    widget.scan.reverse_button.click()
    assert widget.scan.rotation.value == "ccw"
    run_to_end(widget, qtbot, widget.scan.centre_button.click)
    assert widget.scan.offset_u.value == pytest.approx(-2, abs=0.1)
    assert widget.scan.geometry.value == CONE
    np.testing.assert_allclose(widget.job().geometry.center, truth.center, atol=0.1)


def test_questions_that_have_no_answer(make_widget, qtbot, no_dialogs):
    geometry = ConeBeam.helical(
        np.arange(12.0),
        pitch=40,
        source_origin=100,
        source_detector=150,
        detector_shape=(20, 28),
        pixel_size=1.0,
    )
    widget = make_widget()
    for button in (widget.scan.centre_button, widget.scan.reverse_button, widget.scan.draw_button):
        button.click()
        assert "there are no projections" in no_dialogs[-1]
    widget.viewer.add_image(np.ones((12, 20, 28)), metadata=describe_geometry(geometry))
    with qtbot.waitSignal(widget.panel.failed, timeout=20000):
        widget.scan.centre_button.click()
    assert "leaves the plane of rotation" in no_dialogs[-1]


# -- the form -----------------------------------------------------------------------------------------------


def test_hounsfield_needs_water_where_lengths_have_no_unit(make_widget, no_dialogs):
    widget = make_widget(plain())
    describe(widget)
    widget.unit.value = HOUNSFIELD
    assert widget.job().water == pytest.approx(0.0206)
    widget.scan.units.value = "pixel"
    with pytest.raises(ValueError, match="give the attenuation of water"):
        widget.job()
    widget.water.value = 0.1
    assert widget.job().water == 0.1
    assert "to_hounsfield(result.volume, 0.1)" in widget.copy_script()
    widget.water._widget._mgui_set_value("wet")
    with pytest.raises(ValueError, match="water: got 'wet'"):
        widget.job()


def test_optional_numbers_of_the_form(make_widget):
    form = make_widget().form
    field = form.fields["tv_weight"]
    assert field.value is None
    assert field.hint == "automatic"
    for preset in PROJECTION_PRESETS:
        form.preset.value = preset
        assert form.preset.value == preset
    field.value = 0.5
    assert form.preset.value == "custom"
    field._widget._mgui_set_value("heavy")
    with pytest.raises(ValueError, match="tv_weight = 'heavy'"):
        form.config  # noqa: B018


def test_form_round_trips_the_settings(make_widget, tmp_path, no_dialogs):
    widget = make_widget()
    assert set(widget.form.fields) == set(ProjectionConfig.model_fields)
    for preset in PROJECTION_PRESETS:
        widget.form.preset.value = preset
        assert widget.form.config == ProjectionConfig.preset(preset)
    widget.form.fields["tv_weight"].value = 0.25
    assert widget.form.config.tv_weight == 0.25
    widget.save_settings(tmp_path / "a.yaml")
    widget.form.preset.value = "fast"
    widget.load_settings(tmp_path / "a.yaml")
    assert widget.form.config.tv_weight == 0.25
    (tmp_path / "b.yaml").write_text("tv_wait: 1")
    widget.load_settings(tmp_path / "b.yaml")
    assert "there is no setting 'tv_wait'" in no_dialogs[-1]


def describe(widget, kind=CONE):
    widget.scan.geometry.value = kind
    for name, value in {
        "source_origin": 100.0,
        "source_detector": 150.0,
        "pixel_v": 0.00125,
        "pixel_u": 2.0,
        "offset_u": -3.0,
        "first": 10.0,
        "range": 180.0,
    }.items():
        getattr(widget.scan, name).value = value
    widget.scan.closed.value = True
    widget.scan.rotation.value = "cw"


@pytest.mark.parametrize("kind", [CONE, PARALLEL])
def test_geometry_from_the_form(make_widget, qtbot, kind):
    widget = make_widget(plain(), show=True)
    assert widget.scan.geometry.choices == (CONE, FAN, HELIX, PARALLEL)
    assert widget.values.value == INTEGRALS
    assert widget.scan.views.value == 12
    describe(widget, kind)
    qtbot.waitUntil(lambda: widget.scan.pixel_v.visible, timeout=5000)
    assert widget.scan.source_origin.visible == (kind == CONE)
    assert not widget.scan.angle_file.visible
    common = {
        "detector_shape": (9, 10),
        "pixel_size": (0.00125, 2.0),
        "detector_offset": (0, -3),
        "rotation": "cw",
        "units": "mm",
    }
    angles = np.deg2rad(np.linspace(10, 190, 12))
    if kind == CONE:
        known = ConeBeam.circular(angles, source_origin=100, source_detector=150, **common)
    else:
        known = ParallelBeam.circular(angles, **common)
    job = widget.job()
    assert job.geometry == known
    assert job.grid.shape == known.default_grid().shape
    assert not job.scan().is_counts
    widget.grid.value = SPACING
    widget.spacing.value = 0.5
    np.testing.assert_allclose(widget.job().grid.spacing, 0.5)


def test_more_kinds_of_scans(make_widget, qtbot, no_dialogs):
    widget = make_widget(plain(), plain((12, 1, 10), name="sinogram"), show=True)
    form = widget.scan
    common = {"source_origin": 100.0, "source_detector": 150.0, "rotation": "cw", "units": "mm"}
    angles = np.deg2rad(np.linspace(10, 190, 12))
    panel = {"detector_shape": (9, 10), "pixel_size": (0.00125, 2.0), "detector_offset": (0, -3)}
    widget.layer.value = widget.viewer.layers["views"]
    describe(widget, HELIX)
    form.pitch.value = -7.5
    qtbot.waitUntil(lambda: form.pitch.visible and not form.tilt.visible, timeout=5000)
    assert widget.job().geometry == ConeBeam.helical(angles, pitch=-7.5, **common, **panel)
    describe(widget, CONE)
    form.tilt.value = 30.0
    assert form.tilt.visible
    assert widget.job().geometry == ConeBeam.laminography(angles, tilt=np.pi / 6, **common, **panel)
    assert "igs.ConeBeam.laminography(" in widget.copy_script()
    describe(widget, PARALLEL)
    known = ParallelBeam.laminography(angles, tilt=np.pi / 6, rotation="cw", units="mm", **panel)
    assert widget.job().geometry == known
    describe(widget, FAN)
    assert not form.pixel_v.visible
    with pytest.raises(ValueError, match="a fan beam has one row of pixels, the layer 'views' has 9"):
        widget.job()
    widget.layer.value = widget.viewer.layers["sinogram"]
    describe(widget, FAN)
    job = widget.job()
    assert job.geometry == ConeBeam.fan(
        angles, n_columns=10, pixel_size=2.0, detector_offset=(0, -3), **common
    )
    assert job.grid.shape[0] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: setattr(w.scan.views, "value", 11), "angles: got 11, the layer 'views' has 12 views"),
        (lambda w: setattr(w.scan.source_detector, "value", 50), "are the two exchanged"),
        (lambda w: setattr(w.scan.pixel_u, "value", 0), "pixel_size: got"),
        (lambda w: setattr(w.values, "value", COUNTS), "i0: counts need the blank scan"),
    ],
    ids=["views", "exchanged", "pixel", "blank"],
)
def test_what_is_wrong_is_said_before_run(make_widget, qtbot, no_dialogs, fake, change, words):
    widget = make_widget(plain())
    describe(widget)
    widget.scan.pixel_v.value = 2.0
    change(widget)
    widget.panel.run_button.click()
    assert not widget.panel.is_running
    assert words in no_dialogs[-1]
    assert fake.thread is None


def test_rays_that_miss_the_grid_are_said_before_run(make_widget, no_dialogs, fake):
    near = ConeBeam.circular(
        np.arange(12) / 2, source_origin=100, source_detector=150, detector_shape=(9, 10), pixel_size=2
    )
    metadata = describe_geometry(near.with_offset(0, 500), near.default_grid())
    data, kwargs, kind = plain()
    widget = make_widget((data, {**kwargs, "metadata": metadata}, kind))
    widget.panel.run_button.click()
    assert not widget.panel.is_running
    assert "no ray of view 0 meets the grid" in no_dialogs[-1]


def test_angles_from_a_file(make_widget, tmp_path):
    widget = make_widget(plain())
    describe(widget)
    widget.scan.angles.value = FROM_FILE
    degrees = np.arange(12) * 30.0
    with pytest.raises(ValueError, match="there is no file"):
        widget.job()
    (tmp_path / "a.txt").write_text("\n".join(f"{angle}" for angle in degrees))
    widget.scan.angle_file.value = tmp_path / "a.txt"
    known = widget.job().geometry
    np.testing.assert_allclose(known.angles, -np.deg2rad(degrees))
    # degrees for radians
    widget.scan.angle_unit.value = RADIANS
    with pytest.raises(ValueError, match="look like degrees; choose 'degrees'"):
        widget.job()
    np.save(tmp_path / "a.npy", np.deg2rad(degrees))
    widget.scan.angle_file.value = tmp_path / "a.npy"
    assert widget.job().geometry == known
    (tmp_path / "a.txt").write_text("one, two")
    widget.scan.angle_file.value = tmp_path / "a.txt"
    with pytest.raises(ValueError, match="does not hold numbers"):
        widget.job()
    (tmp_path / "b.npy").write_bytes(b"")
    np.save(tmp_path / "c.npy", np.array(["x"] * 12))
    for name in ("b.npy", "c.npy"):
        widget.scan.angle_file.value = tmp_path / name
        with pytest.raises(ValueError, match="does not hold numbers"):
            widget.job()
    # the script's angles are the form's
    widget.scan.angles.value = EVENLY
    widget.scan.first.value = 123.4567
    assert "linspace(123.4567, " in widget.copy_script()


def test_counts_with_fields(make_widget):
    counts = plain(value=500, dtype=np.uint16)
    flat = plain((9, 10), 1000.0, "white")
    widget = make_widget(flat, counts)
    describe(widget)
    assert widget.layer.value.name == "views"
    assert widget.values.value == COUNTS
    widget.flat.value = widget.viewer.layers["white"]
    scan = widget.job().scan()
    assert scan.is_counts
    assert scan.flat.shape == (1, 9, 10)
    widget.flat.value = None
    widget.i0.value = (1000.0,)
    assert widget.job().scan().i0 == 1000.0


def test_open_scan_files(make_widget, qtbot, tmp_path, no_dialogs):
    import json

    about = {
        "mode": "cone",
        "DSO": 100,
        "DSD": 150,
        "nDetector": [9, 10],
        "dDetector": [2, 2],
        "angles_rad": (np.arange(12) / 2).tolist(),
    }
    (tmp_path / "a.json").write_text(json.dumps(about))
    np.savez(tmp_path / "a.npz", proj=np.ones((12, 9, 10)), proj_clean=np.zeros((12, 9, 10)))
    widget = make_widget(plain())
    widget.open_scan(tmp_path / "a.json")
    qtbot.waitUntil(lambda: len(widget.viewer.layers) == 2, timeout=10000)
    layer = widget.layer.value
    assert layer is widget.viewer.layers[-1]
    assert layer.data.max() == 1
    assert widget.scan.geometry.value == AS_LAYER
    assert widget.grid.choices == (SEEN, SPACING)
    assert widget.array.value == "proj"
    widget.array.value = "proj_clean"
    qtbot.waitUntil(lambda: len(widget.viewer.layers) == 3, timeout=10000)
    assert widget.layer.value.data.max() == 0
    assert widget.array.value == "proj_clean"
    assert "igs.read_scan(" in widget.copy_script()
    (tmp_path / "a.json").write_text("{")
    widget.open_scan(tmp_path / "a.json")
    qtbot.waitUntil(lambda: bool(no_dialogs), timeout=10000)
    assert "damaged JSON" in no_dialogs[-1]
    assert len(widget.viewer.layers) == 3


def test_show_geometry(make_widget, sample):
    widget = make_widget(*sample)
    viewer = widget.viewer
    for _ in range(2):
        widget.scan.draw_button.click()
        names = [layer.name for layer in viewer.layers[2:]]
        assert names == [
            f"Phantom cone beam {what}" for what in ("panels", "volume box", "first view", "sources")
        ]
    assert viewer.dims.ndisplay == 3
    assert len(viewer.layers[-1].data) == 40


def test_script_does_what_the_form_does(make_widget, qtbot, monkeypatch):
    import napari_innergs.tasks.projections as tasks

    widget = make_widget()
    widget.viewer.open_sample("napari-innergs", "parallel_scan")
    widget.form.preset.value = "fast"
    widget.form.fields["view_steps"].value = 7
    made = []

    class Result:
        report = "the report"

        def save(self, folder):
            made.append(folder)

    def reconstruct(scan, **options):
        made.append((scan, options))
        return Result()

    monkeypatch.setattr(tasks, "reconstruct_projections", reconstruct)
    for kind in (AS_LAYER, CONE):
        widget.scan.geometry.value = kind
        widget.grid.value = AS_LAYER if kind == AS_LAYER else SEEN
        text = widget.copy_script()
        assert QGuiApplication.clipboard().text() == text
        made.clear()
        exec(compile(text, "script", "exec"), {})
        (scan, options), folder = made
        job = widget.job()
        assert scan.geometry == job.geometry
        assert options["grid"].shape == job.grid.shape
        np.testing.assert_array_equal(options["grid"].affine, job.grid.affine)
        np.testing.assert_array_equal(scan.projections, job.scan().projections)
        assert ProjectionConfig.coerce(options["config"]) == job.config
        assert folder == "bone-parallel-beam"
