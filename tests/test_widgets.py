"""The dock widgets in a real viewer (PyQt6, needs a display such as Xvfb)."""

import threading
import time

import numpy as np
import pytest

pytest.importorskip("qtpy")
pytest.importorskip("pytestqt")

from napari.layers import Image
from qtpy.QtGui import QGuiApplication
from widget_tools import PROMPT_S, collect_dialogs, quiet, run_to_end

from napari_innergs import samples
from napari_innergs.config import PRESETS, SliceConfig
from napari_innergs.fit.engine import Done, Failed, Preview, Step
from napari_innergs.layers.write import METADATA_KEY
from napari_innergs.model import GaussianModel
from napari_innergs.result import Reconstruction
from napari_innergs.widgets import slices as slices_module
from napari_innergs.widgets._form import CUSTOM, ConfigForm
from napari_innergs.widgets._run_panel import RunPanel
from napari_innergs.widgets.compare import CompareWidget
from napari_innergs.widgets.slices import CENTRE, EVERY, SPACING, WHOLE, SlicesWidget
from napari_innergs.widgets.voxelise import VoxeliseWidget

LANDMARKS = np.array([[3, 9, 30], [6, 30, 12], [8, 16, 20]])


@pytest.fixture(autouse=True)
def no_dialogs(monkeypatch):
    return collect_dialogs(monkeypatch, "slices", "compare")


def brain_with_landmarks():
    """A real crop of 12 slices with three bright marks, each on one known slice."""
    data = samples.volume("brain").data[2:50:4, 20:60, 10:50].copy()
    data = np.minimum(data, 150)
    for z, y, x in LANDMARKS:
        data[z, y - 1 : y + 2, x - 1 : x + 2] = 255
    return data


def in_plane_rotation(degrees=25.0):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = np.eye(4)
    affine[1:3, 1:3] = [[c, -s], [s, c]]
    affine[:3, 3] = 7, -11, 13
    return affine


def add_brain(viewer, **kwargs):
    return viewer.add_image(
        brain_with_landmarks(),
        name="T1",
        scale=(4, 1, 1),
        affine=in_plane_rotation(),
        units=("mm",) * 3,
        axis_labels=("z", "y", "x"),
        contrast_limits=(0, 255),
        **kwargs,
    )


class FakeFit:
    """Linear interpolation that takes its time, with the events of the engine; notes what becomes of it."""

    def __init__(self, steps=40, seconds=0.02, fail_at=None, model=None):
        self.steps, self.seconds, self.fail_at, self.model = steps, seconds, fail_at, model
        self.closed_at = self.done = self.calls = 0
        self.thread = None

    def __call__(self, stack, grid=None, config=None, *, device="auto", seed=0, warm_start=None):
        self.calls += 1
        self.warm = warm_start
        self.thread = threading.current_thread()
        grid = grid or stack.default_grid()
        try:
            volume = self.interpolate(stack, grid)
            for step in range(self.steps):
                time.sleep(self.seconds)
                if step == self.fail_at:
                    raise ZeroDivisionError("the fit fell over\nwith a long story")
                self.done = step + 1
                yield Step("fitting", step / self.steps, step + 1, self.steps, 1 / (step + 1), 20 + step / 10)
                if step % 4 == 1:
                    yield Preview(volume * (step + 1) / self.steps, grid, f"step {step}")
            report = {"psnr_heldout": 31.5, "baseline": "linear", "baseline_psnr_heldout": 30.25}
            yield Done(Reconstruction(volume, grid, self.model, report))
        finally:
            self.closed_at = time.monotonic()

    @staticmethod
    def interpolate(stack, grid):
        from scipy.ndimage import map_coordinates

        index = np.indices(grid.shape).reshape(3, -1).T
        inside = np.linalg.solve(stack.affine, np.c_[grid.index_to_world(index), np.ones(len(index))].T)[:3]
        values = stack.values()
        channels = [
            map_coordinates(values[..., c], inside, order=1, mode="nearest") for c in range(values.shape[-1])
        ]
        volume = np.stack(channels, axis=-1).reshape(*grid.shape, -1)
        return (volume if stack.had_channel_axis else volume[..., 0]).astype(np.float32)


@pytest.fixture
def fake(monkeypatch):
    fit = FakeFit()
    monkeypatch.setattr(slices_module, "_engine", lambda: fit)
    monkeypatch.setattr(slices_module, "_estimate", lambda job: "an estimate")
    return fit


@pytest.fixture
def widget(make_napari_viewer, qtbot):
    """The docked widget on one brain; waits for its workers at the end."""
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1200, 900)
    add_brain(viewer)
    widget = SlicesWidget(viewer)
    viewer.window.add_dock_widget(widget, name="Slices to volume")
    yield widget
    widget.panel.cancel()
    quiet(qtbot)


def previews(viewer):
    return [layer for layer in viewer.layers if "preview" in layer.name]


# -- the form -----------------------------------------------------------------------------------------------


def test_form_has_every_field_and_round_trips(qtbot):
    form = ConfigForm(SliceConfig, PRESETS)
    qtbot.addWidget(form)
    assert set(form.fields) == set(SliceConfig.model_fields)
    for preset in PRESETS:
        form.preset.value = preset
        assert form.config == SliceConfig.preset(preset)
        assert form.preset.value == preset
    for name, field in SliceConfig.model_fields.items():
        assert form.fields[name].label == field.title
        assert form.fields[name].tooltip == field.description
        assert len(field.title) <= 20, "longer titles are cut in a narrow dock"


def test_form_notices_what_is_not_a_preset(qtbot):
    form = ConfigForm(SliceConfig, PRESETS)
    qtbot.addWidget(form)
    with qtbot.waitSignal(form.changed):
        form.fields["iterations"].value = 61
    assert form.preset.value == CUSTOM
    assert form.config.iterations == 61
    form.fields["iterations"].value = SliceConfig.preset("balanced").iterations
    assert form.preset.value == "balanced"
    form.fields["methods"].value = ("linear", "flow-dis")
    assert form.config.methods == ("linear", "flow-dis")


def test_form_hides_advanced_fields_until_asked(qtbot):
    form = ConfigForm(SliceConfig, PRESETS)
    qtbot.addWidget(form)
    form.show()
    assert form.fields["combine"].native.isVisible()
    assert not form.fields["iterations"].native.isVisible()
    form.advanced.click()
    assert form.fields["iterations"].native.isVisible()


# -- the run panel, with any generator ----------------------------------------------------------------------


def panel_of(qtbot, generator):
    panel = RunPanel(lambda: generator)
    qtbot.addWidget(panel)
    return panel


def test_panel_shows_progress_and_curves(qtbot):
    seen = threading.Event()

    def job():
        for step in range(30):
            time.sleep(0.01)
            yield Step("fitting", step / 30, step + 1, 30, 1 / (step + 1), 20.0 + step // 10)
        # not over before it has been looked at, however busy the machine is
        seen.wait(10)
        yield Done("the result")

    panel = panel_of(qtbot, job)
    with qtbot.waitSignal(panel.finished, timeout=15000) as finished:
        panel.run_button.click()
        assert panel.run_button.text() == "Pause"
        qtbot.waitUntil(lambda: "step" in panel.status.text(), timeout=5000)
        assert "dB" in panel.rate.text()
        seen.set()
    assert finished.args == ["the result"]
    assert panel.bar.value() == panel.bar.maximum()
    loss, psnr = (line.getData() for line in panel._curves._lines)
    assert len(loss[0]) == 30
    assert psnr[1].tolist() == [20, 21, 22, 22]
    assert panel.run_button.text() == "Run"
    quiet(qtbot)


def test_each_phase_has_a_curve_of_its_own(qtbot):
    def job():
        for phase, scale in (("volume", 1.0), ("views", 1000.0)):
            for step in range(12):
                yield Step(phase, step / 24, step + 1, 12, scale + step)
        yield Done("the result")

    panel = panel_of(qtbot, job)
    with qtbot.waitSignal(panel.finished, timeout=15000):
        panel.run_button.click()
    loss, _ = (line.getData() for line in panel._curves._lines)
    assert loss[1].tolist() == [1000.0 + step for step in range(12)]
    quiet(qtbot)


@pytest.mark.parametrize("where", ["at once", "later", "when made", "as event"])
def test_panel_turns_failures_into_a_sentence(qtbot, no_dialogs, where):
    def job():
        if where == "at once":
            raise OSError("the disk is full\nand more")
        yield Step("fitting", 0.5)
        if where == "as event":
            yield Failed(OSError("the disk is full"))
        raise OSError("the disk is full\nand more")

    def made():
        raise OSError("the disk is full")

    panel = panel_of(qtbot, made if where == "when made" else job)
    with qtbot.waitSignal(panel.failed, timeout=5000):
        panel.run()
    assert no_dialogs == ["the disk is full."]
    assert "the disk is full." in panel.status.text()
    assert not panel.is_running
    quiet(qtbot)


def test_panel_does_not_start_what_cannot_be_prepared(qtbot, no_dialogs):
    def prepare():
        raise ValueError("layer: there is none")

    panel = RunPanel(prepare)
    qtbot.addWidget(panel)
    panel.run()
    assert not panel.is_running
    assert no_dialogs == ["layer: there is none."]


def test_panel_notices_a_job_that_just_ends(qtbot, no_dialogs):
    def job():
        yield Step("fitting", 0.5)

    panel = panel_of(qtbot, job)
    with qtbot.waitSignal(panel.failed, timeout=5000):
        panel.run()
    assert no_dialogs == ["the job ended without a result."]
    quiet(qtbot)


def test_panel_limits_previews_to_two_a_second(qtbot):
    def job():
        for step in range(150):
            time.sleep(0.01)
            yield Preview(np.full((2, 2, 2), step), None)
        yield Done(None)

    panel = panel_of(qtbot, job)
    seen = []
    panel.preview.connect(lambda preview: seen.append((time.monotonic(), preview.volume[0, 0, 0])))
    start = time.monotonic()
    with qtbot.waitSignal(panel.finished, timeout=8000):
        panel.run()
    assert 2 <= len(seen) <= 2 * (time.monotonic() - start) + 2
    assert min(np.diff([at for at, _ in seen])) >= 0.45
    # overtaken ones are dropped, not queued
    assert seen[1][1] - seen[0][1] > 20
    quiet(qtbot)


def test_panel_closed_while_running_ends_the_job(qtbot):
    closed = threading.Event()

    def job():
        try:
            while True:
                time.sleep(0.02)
                yield Step("fitting", 0.5)
        finally:
            closed.set()

    panel = RunPanel(lambda: job)
    panel.run()
    qtbot.wait(200)
    panel.deleteLater()
    del panel
    qtbot.waitUntil(closed.is_set, timeout=2000)
    quiet(qtbot)


def test_resume_before_the_job_has_noticed_the_pause(qtbot):
    def job():
        for _ in range(4):
            time.sleep(0.15)
            yield Step("fitting", 0.5)
        yield Done(None)

    panel = panel_of(qtbot, job)
    with qtbot.waitSignal(panel.finished, timeout=5000):
        panel.run()
        qtbot.wait(50)
        panel.pause()
        panel.resume()
    quiet(qtbot)


# -- slices to volume ---------------------------------------------------------------------------------------


def test_preview_pause_resume_and_completion(widget, fake, qtbot):
    viewer, panel = widget.viewer, widget.panel
    fake.steps, fake.seconds = 120, 0.015
    with qtbot.waitSignal(panel.finished, timeout=30000):
        panel.run_button.click()
        qtbot.waitUntil(lambda: len(previews(viewer)) == 1, timeout=5000)
        preview = previews(viewer)[0]
        limits, shape = tuple(preview.contrast_limits), preview.data.shape
        before = preview.data
        qtbot.waitUntil(lambda: preview.data is not before, timeout=5000)
        assert tuple(preview.contrast_limits) == limits
        assert preview.data.shape == shape

        asked = time.monotonic()
        panel.run_button.click()
        assert panel.run_button.text() == "Resume"
        qtbot.waitUntil(lambda: panel._running.worker.is_paused, timeout=2000)
        assert time.monotonic() - asked <= PROMPT_S
        done = fake.done
        qtbot.wait(300)
        assert fake.done == done, "a paused job went on"

        panel.run_button.click()
        assert panel.run_button.text() == "Pause"
        qtbot.waitUntil(lambda: fake.done > done, timeout=2000)
    result = viewer.layers[-1]
    assert result is preview, "the preview layer becomes the result"
    assert result.name == "T1 volume"
    assert "31.50 dB" in panel.status.text()
    assert result.metadata[METADATA_KEY]["psnr_heldout"] == 31.5
    assert fake.thread is not threading.main_thread()


def check_overlay(source, result):
    """The bright marks are at the same place in the world in both layers."""
    bright = np.argwhere(np.asarray(result.data) > 200)
    world = np.array([result.data_to_world(index) for index in bright])
    for landmark in LANDMARKS:
        place = np.asarray(source.data_to_world(landmark))
        near = world[np.linalg.norm(world - place, axis=1) < 3.5]
        assert len(near) >= 9, f"landmark {landmark} is missing at {place}"
        np.testing.assert_allclose(near.mean(axis=0), place, atol=0.5)
    # nothing bright anywhere else
    nearest = np.linalg.norm(world[:, None] - [source.data_to_world(mark) for mark in LANDMARKS], axis=2).min(
        axis=1
    )
    assert nearest.max() < 4.5


def test_result_overlays_the_input(widget, fake, qtbot):
    fake.steps, fake.seconds = 3, 0.01
    run_to_end(widget, qtbot)
    source, result = widget.viewer.layers["T1"], widget.viewer.layers["T1 volume"]
    check_overlay(source, result)
    assert result.scale[0] < source.scale[0]
    assert result.units == source.units
    assert result.axis_labels == source.axis_labels
    assert tuple(result.contrast_limits) == tuple(source.contrast_limits)
    assert result.data.dtype == source.data.dtype
    np.testing.assert_allclose(result.extent.world, source.extent.world, atol=4)
    # the check can fail
    result.translate = (0, 0, 3)
    with pytest.raises(AssertionError):
        check_overlay(source, result)


@pytest.mark.parametrize("paused", [False, True])
def test_cancel_is_prompt_and_keeps_the_best(widget, fake, qtbot, paused):
    viewer, panel = widget.viewer, widget.panel
    fake.steps, fake.seconds = 1000, 0.02
    panel.run_button.click()
    qtbot.waitUntil(lambda: len(previews(viewer)) == 1, timeout=5000)
    if paused:
        panel.run_button.click()
        qtbot.wait(150)
    fake.closed_at = 0
    asked = time.monotonic()
    panel.cancel_button.click()
    assert time.monotonic() - asked <= PROMPT_S
    assert not panel.is_running
    qtbot.waitUntil(lambda: fake.closed_at > 0, timeout=2000)
    assert fake.closed_at - asked <= PROMPT_S
    assert "Cancelled. Kept the best volume so far" in panel.status.text()
    kept = viewer.layers[-1]
    assert kept.name == "T1 volume (stopped early)"
    assert kept.metadata[METADATA_KEY]["kind"] == "stopped early"
    # and it can be run again
    fake.steps, fake.seconds = 3, 0.01
    run_to_end(widget, qtbot)
    assert viewer.layers[-1].name == "T1 volume"
    assert len(viewer.layers) == 3


def test_cancel_before_any_preview(widget, fake, qtbot):
    fake.seconds = 0.2
    widget.panel.run_button.click()
    qtbot.wait(100)
    widget.panel.cancel_button.click()
    assert widget.panel.status.text() == "Cancelled. There was no volume yet."
    assert len(widget.viewer.layers) == 1
    quiet(qtbot)


def test_failure_is_a_sentence_and_keeps_the_preview(widget, fake, qtbot, no_dialogs):
    fake.fail_at = 30
    with qtbot.waitSignal(widget.panel.failed, timeout=10000):
        widget.panel.run_button.click()
    assert no_dialogs == ["the fit fell over."]
    assert widget.viewer.layers[-1].name == "T1 volume (incomplete)"


def test_layers_deleted_while_running(widget, fake, qtbot):
    viewer = widget.viewer
    fake.steps, fake.seconds = 500, 0.015
    with qtbot.waitSignal(widget.panel.finished, timeout=40000):
        widget.panel.run_button.click()
        qtbot.waitUntil(lambda: len(previews(viewer)) == 1, timeout=5000)
        viewer.layers.remove("T1")
        viewer.layers.remove(previews(viewer)[0])
        assert len(viewer.layers) == 0
        qtbot.waitUntil(lambda: len(previews(viewer)) == 1, timeout=5000)
    (result,) = viewer.layers
    assert result.name == "T1 volume"
    check_overlay(Image(brain_with_landmarks(), scale=(4, 1, 1), affine=in_plane_rotation()), result)


def test_closed_dock_hears_nothing_and_stops_its_job(widget, fake, qtbot):
    fake.steps = 10000
    viewer = widget.viewer
    widget.panel.run()
    qtbot.waitUntil(lambda: fake.done > 0, timeout=5000)
    closed = []
    widget.destroyed.connect(lambda: closed.append(True))
    widget.panel, panel = RunPanel(lambda: None), widget.panel
    viewer.window.remove_dock_widget(widget)
    widget.deleteLater()
    qtbot.waitUntil(lambda: bool(closed), timeout=3000)
    viewer.add_image(np.zeros((3, 4, 5)))
    del viewer.layers[-1]
    qtbot.waitUntil(lambda: fake.closed_at > 0, timeout=3000)
    del panel


def test_layer_choice_follows_the_viewer(widget, qtbot):
    viewer = widget.viewer
    assert [layer.name for layer in widget.layer.choices] == ["T1"]
    viewer.add_labels(np.zeros((4, 5, 6), int))
    second = viewer.add_image(np.zeros((4, 5, 6)), name="second", scale=(1, 1, 7))
    assert [layer.name for layer in widget.layer.choices] == ["T1", "second"]
    widget.layer.value = second
    assert widget.axis.value == 2, "the coarsest axis is the likely one"
    viewer.layers.remove("second")
    assert widget.layer.value.name == "T1"
    viewer.layers.clear()
    assert widget.layer.value is None
    assert not widget.panel.run_button.isEnabled()
    assert "Open an image" in widget.estimate_line.text()
    viewer.add_labels(np.zeros((4, 5, 6), int))
    assert "Labels can't be used" in widget.estimate_line.text()
    quiet(qtbot)


def test_bad_input_is_a_sentence(widget, fake, qtbot, no_dialogs):
    widget.viewer.add_image(np.zeros((5, 6)), name="flat")
    widget.layer.value = widget.viewer.layers["flat"]
    widget.panel.run()
    assert not widget.panel.is_running
    assert "has 2 dimensions" in no_dialogs[-1]
    widget.viewer.layers.clear()
    widget.panel.run()
    assert "there is no Image layer" in no_dialogs[-1]


def test_region_spacing_and_keep_every(widget, fake, qtbot):
    fake.steps, fake.seconds = 2, 0.01
    widget.region.value = CENTRE
    widget.keep_every.value = 2
    widget.grid.value = SPACING
    assert widget.spacing[0].native.isVisible()
    for box, step in zip(widget.spacing, (2, 1, 2), strict=True):
        box.value = step
    job = widget.job()
    stack = job.source.stack()
    assert stack.spacing == pytest.approx(8)
    assert stack.width == 20
    run_to_end(widget, qtbot)
    result = widget.viewer.layers[-1]
    np.testing.assert_allclose(result.scale, (2, 1, 2))
    outside = widget.viewer.layers["T1"].extent.world
    assert (result.extent.world[0] > outside[0] - 1e-6)[1:].all()
    assert (result.extent.world[1] < outside[1] + 1e-6)[1:].all()


def test_region_of_a_shapes_layer(widget, fake, qtbot):
    source = widget.viewer.layers["T1"]
    corners = [[5, 10, 8], [5, 10, 27], [5, 25, 27], [5, 25, 8]]
    shapes = widget.viewer.add_shapes(
        [np.array([source.data_to_world(corner) for corner in corners])], name="box", units=("mm",) * 3
    )
    widget.region.value = shapes
    stack = widget.job().source.stack()
    assert (stack.n_slices, stack.height, stack.width) == (12, 16, 20)
    widget.viewer.layers.remove("box")
    assert widget.job().source.region is None
    quiet(qtbot)


def test_extra_channel_and_gaussians(widget, fake, qtbot):
    fake.steps, fake.seconds = 2, 0.01
    fake.model = GaussianModel([[10, 0, 0]], [[0, 0, 0]], [[1, 0, 0, 0]], [[1.0, 2.0]], units="mm")
    viewer = widget.viewer
    second = add_brain(viewer)
    second.name, second.colormap = "T2", "green"
    widget.layer.value = viewer.layers["T1"]
    assert widget.channels.native.isVisible()
    widget.channels.value = [second]
    widget.gaussians.value = "ellipsoids"
    run_to_end(widget, qtbot)
    assert [layer.name for layer in viewer.layers][2:] == ["T1 volume", "T2 volume", "T1 Gaussians"]
    assert viewer.layers["T2 volume"].colormap.name == "green"


def test_time_series(widget, fake, qtbot):
    fake.steps, fake.seconds = 2, 0.01
    viewer = widget.viewer
    data = brain_with_landmarks()
    series = viewer.add_image(
        np.stack([data, data // 2]), name="series", scale=(1, 4, 1, 1), axis_labels=("t", "z", "y", "x")
    )
    widget.layer.value = series
    assert widget.times.native.isVisible()
    viewer.dims.set_point(0, 1)
    run_to_end(widget, qtbot)
    assert fake.calls == 1
    one = viewer.layers["series volume"]
    assert one.ndim == 3
    assert abs(int(one.data.max()) - 127) <= 1
    widget.times.value = EVERY
    run_to_end(widget, qtbot)
    assert fake.calls == 3
    assert fake.warm is not None, "the second time point starts from the first"
    assert viewer.layers[-1].ndim == 4
    np.testing.assert_array_equal(viewer.layers[-1].data[1, 0], data[0] // 2)


def test_settings_round_trip(widget, qtbot, tmp_path, no_dialogs):
    widget.form.fields["iterations"].value = 77
    widget.save_settings(tmp_path / "mine.yaml")
    assert SliceConfig.from_yaml(tmp_path / "mine.yaml").iterations == 77
    widget.form.preset.value = "fast"
    widget.load_settings(tmp_path / "mine.yaml")
    assert widget.form.config.iterations == 77
    (tmp_path / "bad.yaml").write_text("iterations: -3")
    widget.load_settings(tmp_path / "bad.yaml")
    assert "iterations" in no_dialogs[-1]
    assert widget.form.config.iterations == 77
    quiet(qtbot)


def test_device_and_estimate_lines(widget, qtbot, monkeypatch):
    monkeypatch.setattr(slices_module, "_estimate", lambda job: f"{len(job.source.views)} layer(s), 1 GiB")
    widget.keep_every.value = 2
    qtbot.waitUntil(lambda: "1 GiB" in widget.estimate_line.text(), timeout=10000)
    assert widget.device_line.text().startswith("Device: cpu. ")

    def bad(job):
        raise MemoryError("too large")

    monkeypatch.setattr(slices_module, "_estimate", bad)
    widget.keep_every.value = 3
    qtbot.waitUntil(lambda: widget.estimate_line.text() == "too large", timeout=5000)


# -- several stacks -----------------------------------------------------------------------------------------


def truth_and_stacks(size=32, k=4):
    """A cube of the brain and three orthogonal stacks of slices that are means of k voxels, as layers."""
    truth = samples.volume("brain").data[16 : 16 + size, 32 : 32 + size, 24 : 24 + size].astype(np.float32)
    turned = in_plane_rotation(10)
    layers = []
    for axis, name in enumerate(("axial", "coronal", "sagittal")):
        groups = np.moveaxis(truth, axis, 0).reshape(size // k, k, size, size)
        along = np.eye(3)[axis]
        shift = np.eye(4)
        shift[:3, 3] = along * (k - 1) / 2
        data = np.ascontiguousarray(np.moveaxis(groups.mean(1), 0, axis))
        kwargs = {
            "name": name,
            "scale": 1 + (k - 1) * along,
            "affine": turned @ shift,
            "units": ("mm",) * 3,
            "axis_labels": ("z", "y", "x"),
            "contrast_limits": (0, 140),
        }
        if name == "sagittal":
            kwargs["metadata"] = {METADATA_KEY: {"thickness": float(k), "profile": "box"}}
        layers.append((data, kwargs))
    return truth, layers


@pytest.fixture
def three(make_napari_viewer, qtbot):
    """The docked widget with three rows, and the truth."""
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1200, 900)
    truth, layers = truth_and_stacks()
    for data, kwargs in layers:
        viewer.add_image(data, **kwargs)
    viewer.layers.selection.active = viewer.layers["axial"]
    widget = SlicesWidget(viewer)
    viewer.window.add_dock_widget(widget, name="Slices to volume")
    widget.stacks.add_button.click()
    widget.stacks.add_button.click()
    yield widget, truth
    widget.panel.cancel()
    quiet(qtbot)


class FakeThick(FakeFit):
    """Notes the stacks, and pretends to have found motion."""

    motion = True

    def __call__(self, stacks, grid=None, config=None, *, device="auto", seed=0, warm_start=None):
        self.stacks = list(stacks)
        self.config = config
        for event in super().__call__(self.stacks[0], grid, config, device=device, seed=seed):
            if isinstance(event, Done) and self.motion:
                moves = [np.tile(np.eye(4), (stack.n_slices, 1, 1)) for stack in self.stacks]
                moves[1][3, :3, 3] = 0, 2, 0
                transforms = [move.tolist() for move in moves]
                event.result.report |= {"motion": {"transforms": transforms}, "warnings": ["They differ."]}
            yield event


@pytest.fixture
def fake_thick(monkeypatch):
    fit = FakeThick(3, 0.01)
    monkeypatch.setattr(slices_module, "_engine", lambda: fit)
    monkeypatch.setattr(slices_module, "_estimate", lambda job: "an estimate")
    return fit


def test_rows_show_orientation_spacing_and_thickness(three, fake_thick):
    widget, _ = three
    rows = widget.stacks.rows
    assert {row.layer.value.name for row in rows} == {"axial", "coronal", "sagittal"}
    for row in rows:
        assert row.info.text() == f"{row.layer.value.name}, 8 × 4 mm"
        assert row.thickness.value == 4, "slices that touch"
        assert row.thickness.native.text().endswith(" mm")
        assert row.profile.value == ("box" if row.layer.value.name == "sagittal" else "gaussian")
        assert row.remove_button.isVisible()
    assert not widget.stacks.add_button.isEnabled(), "no layer is left"
    assert widget.axis.value == 0
    # pixels of 1 mm need no more digits
    assert rows[0].thickness.native.text() == "4.00 mm"
    rows[0].axis.value = 1
    assert rows[0].info.text() == "coronal, 32 × 1 mm"
    assert rows[0].thickness.native.text() == "thin"
    rows[0].thickness.value = 2.5
    rows[0].axis.value = 0
    assert rows[0].thickness.value == 2.5, "what the user entered stays"


def test_rows_follow_layers_that_are_scaled_and_moved(three, fake_thick, qtbot):
    widget, _ = three
    layer = widget.viewer.layers["axial"]
    layer.scale = (6, 1, 1)
    assert widget.stacks.rows[0].info.text() == "axial, 8 × 6 mm"
    assert widget.stacks.rows[0].thickness.value == 6
    tilted = np.eye(4)
    c, s = np.cos(0.5), np.sin(0.5)
    tilted[:2, :2] = [[c, -s], [s, c]]
    layer.affine = tilted @ np.asarray(layer.affine)
    assert widget.stacks.rows[0].info.text().startswith("oblique")
    widget.stacks.rows[0].remove_button.click()
    layer.scale = (5, 1, 1)
    assert all("5 mm" not in row.info.text() for row in widget.stacks.rows)
    quiet(qtbot)


def test_one_row_is_thin_until_there_are_more(three, fake_thick):
    widget, _ = three
    stacks = widget.stacks
    for name in ("sagittal", "coronal"):
        (row,) = [row for row in stacks.rows if row.layer.value.name == name]
        row.remove_button.click()
    (row,) = stacks.rows
    assert row.thickness.native.text() == "thin"
    assert not row.remove_button.isVisible()
    assert widget.job().source.thickness == 0
    row.thickness.value = 2.5
    stacks.add()
    assert row.thickness.value == 2.5, "what the user entered stays"
    assert stacks.rows[1].thickness.value == 4


def test_three_stacks_to_the_job_and_motion_to_layers(three, fake_thick, qtbot):
    widget, _ = three
    viewer = widget.viewer
    for row in widget.stacks.rows:
        row.profile.value = "box"
    widget.stacks.rows[2].thickness.value = 3
    run_to_end(widget, qtbot)
    assert [stack.name for stack in fake_thick.stacks] == [row.layer.value.name for row in widget.stacks.rows]
    assert [(stack.thickness, stack.profile) for stack in fake_thick.stacks] == [
        (4, "box"),
        (4, "box"),
        (3, "box"),
    ]
    assert [stack.n_slices for stack in fake_thick.stacks] == [8, 8, 8]
    assert "They differ." in widget.panel.status.text()
    assert viewer.layers.selection.active is viewer.layers["axial volume"]
    before, after = viewer.layers["axial planes before motion"], viewer.layers["axial planes after motion"]
    moved = np.flatnonzero(np.abs(after.data - before.data).max((1, 2)) > 1e-6)
    assert moved.tolist() == list(range(4 * 11, 4 * 12))
    np.testing.assert_allclose((after.data - before.data)[moved, 0], [[0, 2, 0]] * 4, atol=1e-9)
    kept = after.metadata[METADATA_KEY]["motion"]
    assert [one["stack"] for one in kept] == [stack.name for stack in fake_thick.stacks]
    assert kept[1]["transforms"][3][1][3] == 2
    # and again without motion: its planes are not those of the new result
    fake_thick.motion = False
    run_to_end(widget, qtbot)
    assert viewer.layers[-1].name.startswith("axial volume")


def test_planes_are_drawn_where_the_layers_are(three, fake_thick, qtbot):
    widget, _ = three
    viewer = widget.viewer
    widget.stacks.planes_button.click()
    planes = viewer.layers["axial planes"]
    assert viewer.dims.ndisplay == 3
    assert len(planes.data) == 3 * 8 * 4
    assert len(np.unique(planes.edge_color, axis=0)) == 3
    for row in widget.stacks.rows:
        layer = row.layer.value
        own = planes.data[np.asarray(planes.features["stack"] == layer.name)]
        middle = np.asarray(layer.extent.world).mean(0)
        np.testing.assert_allclose(own[:, 0].mean(0), middle, atol=0.5)
    widget.stacks.rows[2].remove_button.click()
    widget.stacks.planes_button.click()
    assert len([layer for layer in viewer.layers if "planes" in layer.name]) == 1
    assert len(viewer.layers["axial planes"].data) == 2 * 8 * 4
    assert viewer.layers.selection.active.name == "axial"


def test_rows_follow_deleted_layers(three, fake_thick, qtbot):
    widget, _ = three
    viewer = widget.viewer
    viewer.layers.remove("axial")
    assert len(widget.stacks.rows) == 2
    assert widget.layer.value is widget.stacks.rows[0].layer.value
    viewer.layers.clear()
    assert len(widget.stacks.rows) == 1
    assert widget.layer.value is None
    assert not widget.panel.run_button.isEnabled()
    viewer.add_image(np.zeros((4, 5, 6)), name="new")
    assert widget.layer.value.name == "new"
    assert widget.panel.run_button.isEnabled()
    assert widget.job().source.view.name == "new"
    quiet(qtbot)


def test_a_layer_in_two_rows_is_refused(three, fake_thick, no_dialogs):
    widget, _ = three
    widget.stacks.rows[2].layer.value = widget.layer.value
    widget.panel.run()
    assert not widget.panel.is_running
    assert no_dialogs[-1].startswith("stacks: 'axial' was chosen 2 times")
    widget.stacks.planes_button.click()
    assert len(no_dialogs) == 2


def test_the_same_region_of_all_stacks(three, fake_thick):
    widget, _ = three
    widget.region.value = CENTRE
    boxes = [source.stack().corners() for source in widget.job().sources]
    for box in boxes[1:]:
        np.testing.assert_allclose(box.mean(0), boxes[0].mean(0), atol=2.5)
        np.testing.assert_allclose(np.ptp(box, 0), np.ptp(boxes[0], 0), atol=6)
    widget.region.value = WHOLE
    assert all(source.region is None for source in widget.job().sources)
    widget.grid.value = SPACING
    for box in widget.spacing:
        box.value = 2
    job = widget.job()
    grid = job.grid([source.stack() for source in job.sources])
    np.testing.assert_allclose(grid.spacing, 2)
    assert min(grid.shape) >= 16


def test_several_time_series_at_the_time_that_is_shown(widget, fake_thick, qtbot):
    viewer = widget.viewer
    data = brain_with_landmarks()
    for name in ("first", "second"):
        place = {"scale": (1, 4, 1, 1), "units": ("s", "mm", "mm", "mm"), "axis_labels": tuple("tzyx")}
        viewer.add_image(np.stack([data, data // 2, data // 4]), name=name, **place)
    widget.layer.value = viewer.layers["first"]
    assert widget.times.native.isVisible()
    widget.times.value = EVERY
    widget.stacks.add(viewer.layers["second"])
    assert not widget.times.native.isVisible()
    viewer.dims.set_point(0, 2)
    assert [source.time_index for source in widget.job().sources] == [2, 2]
    fake_thick.motion = False
    run_to_end(widget, qtbot)
    for stack in fake_thick.stacks:
        np.testing.assert_array_equal(stack.data[..., 0], data // 4)


def test_script_of_three_stacks(three, fake_thick, monkeypatch, qtbot):
    widget, _ = three
    widget.stacks.rows[1].thickness.value = 3.5
    widget.keep_every.value = 2
    text = widget.copy_script()
    monkeypatch.setattr("napari.current_viewer", lambda: widget.viewer)
    called = []

    class Result:
        report = None

        def save(self, name):
            called.append(name)

    def reconstruct(stacks, **options):
        called.append(stacks)
        return Result()

    monkeypatch.setattr("napari_innergs.reconstruct_slices", reconstruct)
    exec(compile(text, "script", "exec"), {})
    stacks, name = called
    assert name == "axial"
    for stack, source in zip(stacks, widget.job().sources, strict=True):
        wanted = source.stack()
        np.testing.assert_array_equal(stack.data, wanted.data)
        np.testing.assert_allclose(stack.frame_affine, wanted.frame_affine)
        assert (stack.thickness, stack.profile) == (wanted.thickness, wanted.profile)
    quiet(qtbot)


# -- compare and voxelise -----------------------------------------------------------------------------------


def test_compare(make_napari_viewer, qtbot):
    viewer = make_napari_viewer()
    truth = brain_with_landmarks().astype(np.float32)
    reference = viewer.add_image(truth, name="truth", scale=(4, 1, 1), units=("mm",) * 3)
    other = viewer.add_image(truth + 5, name="ours", scale=(4, 1, 1), units=("mm",) * 3)
    hidden = viewer.add_image(truth, name="third", visible=False)
    widget = CompareWidget(viewer)
    qtbot.addWidget(widget)
    widget.reference.value, widget.other.value = reference, other
    widget.measure_button.click()
    qtbot.waitUntil(lambda: "PSNR" in widget.text.text(), timeout=10000)
    assert f"{20 * np.log10(np.ptp(truth) / 5):.2f} dB" in widget.text.text()
    difference = viewer.layers["ours - truth"]
    np.testing.assert_allclose(difference.data, 5)
    assert difference.metadata[METADATA_KEY]["rmse"] == pytest.approx(5)

    assert difference.visible
    widget.swap()
    assert not difference.visible, "it would cover both"
    assert reference.visible != other.visible
    widget.swap()
    assert reference.visible != other.visible
    reference.visible = other.visible = True
    order = list(viewer.layers)
    widget.side_button.setChecked(True)
    assert viewer.grid.enabled
    assert not hidden.visible
    cells = [viewer.grid.position(viewer.layers.index(layer), viewer.layers) for layer in (reference, other)]
    assert cells == [(0, 0), (0, 1)]
    widget.side_button.setChecked(False)
    assert not viewer.grid.enabled
    assert list(viewer.layers) == order
    widget.blink_button.setChecked(True)
    before = reference.visible, other.visible
    qtbot.waitUntil(lambda: (reference.visible, other.visible) != before, timeout=3000)
    viewer.layers.clear()
    assert not widget.blink_button.isChecked()
    quiet(qtbot)


def test_compare_says_what_is_wrong(make_napari_viewer, qtbot, no_dialogs):
    viewer = make_napari_viewer()
    first = viewer.add_image(np.ones((8, 8, 8)), name="flat")
    second = viewer.add_image(np.random.default_rng(0).random((8, 8, 8)), name="noise")
    widget = CompareWidget(viewer)
    qtbot.addWidget(widget)
    widget.reference.value, widget.other.value = first, second
    widget.measure()
    qtbot.waitUntil(lambda: "is constant" in widget.text.text(), timeout=10000)
    widget.other.value = first
    widget.measure()
    assert widget.text.text() == "Choose two different layers."
    quiet(qtbot)


@pytest.mark.parametrize("suffix", ["npz", "ply"])
def test_voxelise(make_napari_viewer, qtbot, tmp_path, suffix, no_dialogs):
    model = GaussianModel(
        [[5, 6, 7], [9, 6, 7]],
        np.log([[2, 2, 2], [1, 1, 1]]),
        [[1, 0, 0, 0], [1, 0, 0, 0]],
        [100.0, 50.0],
        field="additive",
        units="mm",
    )
    model.save(tmp_path / f"two.{suffix}")
    viewer = make_napari_viewer()
    widget = VoxeliseWidget(viewer)
    qtbot.addWidget(widget)
    widget.panel.run()
    assert "there is no file" in no_dialogs[-1]
    widget.path.value = tmp_path / f"two.{suffix}"
    widget.spacing.value = 0.5
    widget.gaussians.value = "points"
    with qtbot.waitSignal(widget.panel.finished, timeout=60000):
        widget.panel.run_button.click()
    image, points = viewer.layers
    peak = np.unravel_index(np.argmax(image.data), image.data.shape)
    np.testing.assert_allclose(image.data_to_world(peak), (5, 6, 7), atol=0.5)
    assert image.data.max() == pytest.approx(100, rel=0.1)
    assert len(points.data) == 2
    np.testing.assert_allclose(points.data, model.means, atol=1e-4)
    quiet(qtbot)


def test_voxelise_of_a_damaged_file(make_napari_viewer, qtbot, tmp_path, no_dialogs):
    (tmp_path / "bad.npz").write_bytes(b"not a zip file")
    viewer = make_napari_viewer()
    widget = VoxeliseWidget(viewer)
    qtbot.addWidget(widget)
    widget.path.value = tmp_path / "bad.npz"
    with qtbot.waitSignal(widget.panel.failed, timeout=30000):
        widget.panel.run()
    assert len(no_dialogs) == 1
    assert len(viewer.layers) == 0
    quiet(qtbot)


def test_script_is_on_the_clipboard_and_compiles(widget, qtbot):
    widget.form.fields["iterations"].value = 61
    widget.region.value = CENTRE
    widget.script_button.click()
    text = QGuiApplication.clipboard().text()
    compile(text, "script", "exec")
    for part in ("import napari_innergs as igs", "'iterations': 61", ".crop(", "layers['T1']"):
        assert part in text
    quiet(qtbot)


# -- with the real engine -----------------------------------------------------------------------------------


def test_real_engine_from_preview_to_result(widget, qtbot):
    viewer, panel = widget.viewer, widget.panel
    widget.form.preset.value = "fast"
    source = viewer.layers["T1"]
    labels = []
    panel.preview.connect(lambda preview: labels.append(preview.label))
    run_to_end(widget, qtbot, timeout=60000)
    assert labels, "no preview was shown"
    volume = viewer.layers["T1 volume"]
    check_overlay(source, volume)
    # the real slices are in the result as they were
    for z in (0, 5, 11):
        plane = round(volume.world_to_data(source.data_to_world((z, 0, 0)))[0])
        np.testing.assert_array_equal(volume.data[plane], source.data[z])
    report = volume.metadata[METADATA_KEY]
    assert report["config"] == SliceConfig.preset("fast").model_dump(mode="json")
    assert report["input"]["name"] == "T1"
    band = viewer.layers["T1 uncertainty"]
    np.testing.assert_allclose(band.extent.world, volume.extent.world)
    assert viewer.layers.selection.active is volume


def test_real_engine_with_three_stacks(three, qtbot):
    widget, truth = three
    viewer = widget.viewer
    qtbot.waitUntil(
        lambda: "8 + 8 + 8 slices to 32 × 32 × 32 voxels" in widget.estimate_line.text(), timeout=20000
    )
    widget.form.preset.value = "fast"
    for row in widget.stacks.rows:
        row.profile.value = "box"
    run_to_end(widget, qtbot, timeout=60000)
    volume = viewer.layers["axial volume"]
    np.testing.assert_allclose(volume.scale, 1)
    source = viewer.layers["axial"]
    np.testing.assert_allclose(
        volume.data_to_world((0, 0, 0)), source.data_to_world((-0.375, 0, 0)), atol=1e-6
    )
    error = (volume.data - truth)[4:-4, 4:-4, 4:-4].std()
    alone = (np.repeat(source.data, 4, axis=0) - truth)[4:-4, 4:-4, 4:-4].std()
    assert error < 0.6 * alone
    report = volume.metadata[METADATA_KEY]
    assert [one["name"] for one in report["stacks"]] == [row.layer.value.name for row in widget.stacks.rows]
    assert not [layer for layer in viewer.layers if "motion" in layer.name]


def test_real_engine_with_motion(three, qtbot):
    widget, _ = three
    viewer = widget.viewer
    widget.form.preset.value = "fast"
    widget.form.fields["motion"].value = "stack"
    viewer.layers["coronal"].translate = (0, 1.5, 0)
    run_to_end(widget, qtbot, timeout=60000)
    after = viewer.layers["axial planes after motion"]
    (moved,) = [one for one in after.metadata[METADATA_KEY]["motion"] if one["stack"] == "coronal"]
    # all slices of a stack move together, back to where they were; the mean over all stacks stays
    transforms = np.array(moved["transforms"])
    np.testing.assert_allclose(transforms, np.broadcast_to(transforms[0], transforms.shape), atol=1e-9)
    shift = after.features["shift"][after.features["stack"] == "coronal"]
    assert abs(shift.mean() - 1.0) < 0.5


def test_estimates_of_stacks_that_do_not_fit_are_sentences(three, qtbot):
    widget, _ = three
    widget.stacks.rows[1].thickness.value = 400
    qtbot.waitUntil(lambda: "larger than the whole stack" in widget.estimate_line.text(), timeout=20000)


def test_real_engine_refuses_stacks_of_other_units(three, qtbot, no_dialogs):
    widget, _ = three
    widget.viewer.layers["coronal"].units = ("um",) * 3
    with qtbot.waitSignal(widget.panel.failed, timeout=30000):
        widget.panel.run()
    assert "units" in no_dialogs[-1]


def test_real_engine_cancels_and_pauses_promptly_in_every_phase(widget, qtbot):
    panel = widget.panel
    worst = 0.0
    for moment in (0.05, 0.4, 1.0, 1.7):
        panel.run_button.click()
        worker, events = panel._running.worker, panel._mailbox
        ended = []
        worker.finished.connect(lambda ended=ended: ended.append(time.monotonic()))
        qtbot.wait(int(1000 * moment))
        if panel.is_running:
            asked = time.monotonic()
            panel.pause()
            qtbot.waitUntil(lambda worker=worker, ended=ended: worker.is_paused or bool(ended), timeout=5000)
            worst = max(worst, time.monotonic() - asked)
        asked = time.monotonic()
        panel.cancel_button.click()
        qtbot.waitUntil(lambda ended=ended: bool(ended), timeout=5000)
        worst = max(worst, ended[0] - asked)
        assert events.events is None or events.events.gi_frame is None, "the job's generator is not closed"
    assert worst <= PROMPT_S


def test_refusals_of_the_task_are_sentences(widget, qtbot, no_dialogs):
    widget.form.fields["methods"].value = ()
    widget.form.fields["gaussians"].value = ()
    with qtbot.waitSignal(widget.panel.failed, timeout=20000):
        widget.panel.run()
    assert "methods and gaussians are both empty" in no_dialogs[-1]


def test_estimate_of_the_real_task(widget, qtbot):
    qtbot.waitUntil(lambda: "of memory" in widget.estimate_line.text(), timeout=20000)
    assert "12 slices to 45 × 40 × 40 voxels of 1 mm" in widget.estimate_line.text()


def test_script_gives_the_same_volume(make_napari_viewer, qtbot, tmp_path, monkeypatch):
    """The copied script, run as it is, makes what the widget makes."""
    viewer = make_napari_viewer()
    layer = viewer.add_image(brain_with_landmarks(), name="T1", scale=(4, 1, 1), affine=in_plane_rotation())
    widget = SlicesWidget(viewer)
    qtbot.addWidget(widget)
    widget.form.preset.value = "fast"
    widget.form.fields["gaussians"].value = ()
    widget.form.fields["methods"].value = ("linear", "pchip")
    widget.region.value = CENTRE
    widget.grid.value = SPACING
    for box in widget.spacing:
        box.value = 2
    text = widget.copy_script()
    run_to_end(widget, qtbot)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(text, "script", "exec"), names)
    result = names["result"]
    assert (tmp_path / "t1").exists()
    np.testing.assert_allclose(result.grid.spacing, 2)
    ours = viewer.layers["T1 volume"].data
    np.testing.assert_array_equal(np.rint(np.clip(result.volume, 0, 255)).astype(np.uint8), ours)
    assert layer in viewer.layers
    quiet(qtbot)


def test_script_of_a_file_reads_it_again(tmp_path):
    import tifffile
    from napari.components import ViewerModel

    from napari_innergs.layers.read import LayerView, Source
    from napari_innergs.widgets._script import slices_script

    path = tmp_path / "brain.tif"
    tifffile.imwrite(path, brain_with_landmarks())
    viewer = ViewerModel()
    (layer,) = viewer.open(path, plugin="napari")
    layer.scale = (4, 1, 1)
    config = SliceConfig.coerce({"preset": "fast", "methods": ("linear",), "gaussians": ()})
    text = slices_script(Source((LayerView.of(layer),), 0, 2), config, lambda stack: None)
    names = {}
    # all but saving
    exec(compile(text.replace("result.save", "str"), "script", "exec"), names)
    assert names["stack"].spacing == 8
    np.testing.assert_array_equal(names["stack"].data[..., 0], layer.data[::2])
