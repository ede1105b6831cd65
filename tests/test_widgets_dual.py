"""The "Photos + X-rays" dock in a real viewer (PyQt6, needs a display such as Xvfb)."""

import json
import time
from types import SimpleNamespace

import dual_scene
import numpy as np
import pytest

pytest.importorskip("qtpy")
pytest.importorskip("pytestqt")

from imageio.v3 import imwrite
from widget_tools import PROMPT_S, collect_dialogs, docks, fake_steps, quiet, run_to_end

from napari_innergs.config_dual import DUAL_PRESETS, DualConfig
from napari_innergs.fit.engine import Done, Failed
from napari_innergs.layers.photographs import photograph_layer
from napari_innergs.layers.write import METADATA_KEY
from napari_innergs.layers.xray import projection_layers, volume_layer
from napari_innergs.result import Reconstruction, load
from napari_innergs.scan import Scan
from napari_innergs.widgets import _alignment as alignment_module
from napari_innergs.widgets import dual as module
from napari_innergs.widgets._alignment import DURING_RUN, SHOWN
from napari_innergs.widgets._photo_views import CUTAWAY, FREE
from napari_innergs.widgets._scan_form import AS_LAYER
from napari_innergs.widgets.dual import PROJECTIONS, VOLUME, DualWidget

SETTINGS = {"xray": "fast", "photo_steps": 40, "joint_steps": 8, "max_splats": 600, "harmonics": 0}


@pytest.fixture(autouse=True)
def no_dialogs(monkeypatch):
    return collect_dialogs(monkeypatch)


@pytest.fixture
def make_widget(make_napari_viewer, qtbot):
    yield from docks(make_napari_viewer, qtbot, DualWidget, "Photos + X-rays")


@pytest.fixture(scope="module")
def photos():
    return dual_scene.photographs(count=14, size=40, points=260)


@pytest.fixture(scope="module")
def xrays():
    data, geometry, grid, truth = dual_scene.scan(views=16)
    return Scan(data, geometry, grid, name="blob"), truth


@pytest.fixture
def layers(photos, xrays):
    (projections,) = projection_layers(xrays[0])
    pictures, kwargs, kind = photograph_layer(photos, "pictures")
    return projections, (pictures, {**kwargs, "units": ("mm",) * 3}, kind)


@pytest.fixture
def of_volume(photos, xrays):
    """A volume that is there already, and photographs."""
    scan, truth = xrays
    return volume_layer(truth, scan.grid, "ct"), photograph_layer(photos, "pictures")


def turned_apart(transform):
    """Largest distance (X-ray world units) by which a pose misses, over the object."""
    points = np.array([body[1] for body in dual_scene.BODIES])
    seen = points @ np.linalg.inv(dual_scene.TRUTH)[:3, :3].T + np.linalg.inv(dual_scene.TRUTH)[:3, 3]
    found = seen @ transform[:3, :3].T + transform[:3, 3]
    return np.linalg.norm(found - points, axis=1).max()


# -- the whole way, with the real engine --------------------------------------------------------------------


def test_scene_alignment_run_views_export(make_widget, qtbot, layers, xrays, tmp_path, no_dialogs):
    widget = make_widget(*layers, show=True)
    viewer, panel, alignment = widget.viewer, widget.panel, widget.alignment
    assert (widget.layer.value.name, widget.photos.value.name) == ("blob", "pictures")
    assert (widget.kind.value, widget.grid.value, widget.scan.geometry.value) == (
        PROJECTIONS,
        AS_LAYER,
        AS_LAYER,
    )
    qtbot.waitUntil(lambda: "14 photographs of 40 × 40" in widget.estimate_line.text(), timeout=30000)
    assert "16 X-ray views to 36 × 36 × 36 voxels" in widget.estimate_line.text()
    assert " of memory; about " in widget.estimate_line.text()
    assert " in all." in widget.estimate_line.text()
    for name, value in SETTINGS.items():
        widget.form.fields[name].value = value

    # both worlds in one scene, then laid onto each other
    run_to_end(widget, qtbot, alignment.scene_button.click)
    assert [layer.name for layer in viewer.layers[2:]] == ["blob cameras", "blob surface", "blob points"]
    assert viewer.dims.ndisplay == 3
    before = alignment.part("photo points").data.copy()
    assert turned_apart(alignment.transform) > 4
    run_to_end(widget, qtbot, alignment.align_button.click)
    assert "Score" in alignment.verdict.text()
    assert alignment.use.value == SHOWN
    assert turned_apart(alignment.transform) < 1.0
    assert len(viewer.layers) == 5
    moved = alignment.part("photo points").data
    assert np.abs(moved - before).max() > 4

    # the run takes the pose, and shows how far it is
    run_to_end(widget, qtbot)
    names = [layer.name for layer in viewer.layers[5:]]
    assert names[0] == "blob volume"
    assert names[-2:] == ["blob colour", "blob Gaussians with colour"]
    volume = viewer.layers["blob volume"]
    np.testing.assert_allclose(volume.metadata[METADATA_KEY]["transform"], alignment.transform)
    truth = xrays[1]
    assert np.corrcoef(volume.data.ravel(), truth.ravel())[0, 1] > 0.9
    assert not widget.pictures.labels["photograph rendered"].pixmap().isNull()
    assert not widget.pictures.labels["radiograph rendered"].pixmap().isNull()
    assert "with colour" in panel.status.text()

    # photographs of it, next to the measured ones
    run_to_end(widget, qtbot, widget.photo_views.button.click)
    rendered, photograph = viewer.layers[-2:]
    assert {layer.name for layer in viewer.layers if layer.visible} == {
        "blob photograph",
        "blob photograph rendered",
    }
    assert photograph.data.shape == rendered.data.shape == (40, 40, 3)
    assert rendered.metadata[METADATA_KEY]["psnr"] > 15
    assert "PSNR" in panel.status.text()
    first = rendered.data.copy()
    widget.photo_views.index.value = 5
    qtbot.waitUntil(lambda: rendered.metadata[METADATA_KEY]["photograph"] == "5", timeout=20000)
    assert np.abs(rendered.data - first).max() > 0.1
    widget.photo_views.kind.value = CUTAWAY
    qtbot.waitUntil(lambda: rendered.metadata[METADATA_KEY]["view"] == CUTAWAY, timeout=20000)
    widget.photo_views.cameras.value = FREE
    qtbot.waitUntil(lambda: photograph not in viewer.layers, timeout=20000)
    assert rendered in viewer.layers
    run_to_end(widget, qtbot, widget.radiographs.button.click)
    assert viewer.layers[-1].name == "blob residual"

    widget.export(tmp_path / "out")
    back = load(tmp_path / "out")
    assert len(back.splats) >= len(viewer.layers["blob Gaussians with colour"].data) > 0
    np.testing.assert_allclose(back.transform, alignment.transform)
    assert (tmp_path / "out" / "splats.ply").exists()
    assert no_dialogs == []


# -- the sample ---------------------------------------------------------------------------------------------


def test_the_sample_fills_the_form(make_widget, qtbot):
    widget = make_widget()
    assert not widget.panel.run_button.isEnabled()
    assert "Open X-ray projections" in widget.estimate_line.text()
    # what knows its geometry is taken first
    widget.viewer.add_image(np.zeros((4, 5, 6)), name="something else")
    widget.viewer.open_sample("napari-innergs", "tooth")
    assert (widget.layer.value.name, widget.photos.value.name) == ("Tooth X-rays", "Tooth photographs")
    assert widget.panel.run_button.isEnabled()
    job = widget.job()
    assert job.grid.shape == (64, 64, 64)
    assert (job.geometry.n_views, len(job.photographs())) == (25, 24)
    assert job.pose == {}
    # settings and presets
    for preset in DUAL_PRESETS:
        widget.form.preset.value = preset
        assert widget.job().config == DualConfig.preset(preset)
    text = widget.copy_script()
    compile(text, "script", "exec")
    assert "igs.reconstruct_dual(" in text
    assert "'best'" in text
    quiet(qtbot)


# -- the run ------------------------------------------------------------------------------------------------


class FakeFit:
    """Events of the engine, with a volume of ones; it takes its time."""

    def __init__(self, steps=40, error=None):
        self.steps, self.error, self.closed_at, self.given = steps, error, 0.0, {}

    def __call__(self, scan, geometry, photographs, cameras, grid, config, **given):
        self.scan, self.photographs, self.grid, self.config, self.given = (
            scan,
            photographs,
            grid,
            config,
            given,
        )
        given["watch"](SimpleNamespace(splats=None, scan=None))
        return self.events()

    def events(self):
        volume = np.ones(self.grid.shape, np.float32)
        try:
            yield from fake_steps(volume, self.grid, self.steps)
            if self.error is not None:
                yield Failed(self.error)
            else:
                yield Done(Reconstruction(volume, self.grid, None, {"task": "dual"}))
        finally:
            self.closed_at = time.monotonic()


@pytest.fixture
def fake(monkeypatch):
    fit = FakeFit()
    monkeypatch.setattr(module, "_engine", lambda: fit)
    monkeypatch.setattr(module, "_estimate", lambda job: "an estimate")
    return fit


def test_cancel_is_prompt_and_keeps_the_volume(make_widget, layers, fake, qtbot):
    widget = make_widget(*layers)
    fake.steps = 1000
    widget.panel.run_button.click()
    assert not widget.alignment.align_button.isEnabled()
    qtbot.waitUntil(lambda: widget.panel.last_preview is not None, timeout=10000)
    asked = time.monotonic()
    widget.panel.cancel_button.click()
    qtbot.waitUntil(lambda: fake.closed_at > 0, timeout=3000)
    assert fake.closed_at - asked <= PROMPT_S
    assert widget.viewer.layers[-1].name == "blob volume (stopped early)"
    assert widget.alignment.align_button.isEnabled()
    assert not widget.export_button.isEnabled()


def test_a_volume_in_place_of_projections(make_widget, of_volume, fake, qtbot, xrays):
    widget = make_widget(*of_volume)
    assert widget.kind.value == PROJECTIONS
    widget.kind.value = VOLUME
    assert not widget.scan.isVisible()
    run_to_end(widget, qtbot, timeout=30000)
    assert fake.scan is None
    np.testing.assert_array_equal(fake.given["volume"], xrays[1])
    assert fake.grid.units == xrays[0].grid.units
    np.testing.assert_allclose(fake.grid.affine, xrays[0].grid.affine)
    text = widget.copy_script()
    compile(text, "script", "exec")
    assert "volume=np.asarray(layer.data)" in text


def test_no_match_is_said(make_widget, layers, fake, qtbot, no_dialogs):
    widget = make_widget(*layers)
    fake.steps, fake.error = 6, ValueError("photographs and X-rays: no match, the surfaces differ")
    with qtbot.waitSignal(widget.panel.failed, timeout=30000):
        widget.panel.run_button.click()
    assert no_dialogs == ["photographs and X-rays: no match, the surfaces differ."]
    assert widget.viewer.layers[-1].name == "blob volume (incomplete)"


def test_estimate_of_a_volume_counts_the_photographs(make_widget, of_volume):
    widget = make_widget(*of_volume)
    widget.kind.value = VOLUME
    text = module._estimate(widget.job())
    assert text.startswith("14 photographs of 40 × 40 and a volume of 36 × 36 × 36 voxels; about ")
    assert text.endswith(" in all.")
    # more steps with photographs take longer
    widget.form.fields["photo_steps"].value = 100_000
    assert module._estimate(widget.job()) != text


def test_the_surface_of_the_scene_can_be_stopped(make_widget, of_volume, monkeypatch):
    """Nothing of it goes on when nobody asks for events any more."""
    widget = make_widget(*of_volume)
    widget.kind.value = VOLUME
    calls = []

    def surface(volume, grid, *, step):
        for done in range(1000):
            time.sleep(0.005)
            calls.append(done)
            step(done, 1000)

    monkeypatch.setattr("napari_innergs.fit.align.surface_of_volume", surface)
    events = alignment_module.run_scene(widget.job())
    for _ in events:
        if calls:
            break
    events.close()
    time.sleep(0.05)
    count = len(calls)
    time.sleep(0.1)
    assert 0 < count == len(calls) < 1000


# -- landmarks ----------------------------------------------------------------------------------------------


def test_landmarks_picked_in_the_scene(make_widget, of_volume, photos, fake, qtbot, no_dialogs):
    widget = make_widget(*of_volume)
    widget.kind.value = VOLUME
    alignment = widget.alignment
    alignment.add_pair()
    assert "select a point" in no_dialogs.pop()
    run_to_end(widget, qtbot, alignment.scene_button.click)
    cloud, surface = alignment.part("photo points"), alignment.part("surface of the X-rays")
    there = photos.points @ dual_scene.TRUTH[:3, :3].T + dual_scene.TRUTH[:3, 3]
    for number in (3, 60, 120, 180, 240):
        cloud.selected_data = {number}
        surface.selected_data = {int(np.linalg.norm(surface.data - there[number], axis=1).argmin())}
        alignment.add_pair()
    assert "5 pairs" in alignment.verdict.text()
    marks = widget.viewer.layers["ct landmarks, photographs"]
    assert (marks, len(marks.data)) == (alignment.of_photographs.value, 5)
    alignment.landmark_button.click()
    assert turned_apart(alignment.transform) < 2.0
    assert "apart" in alignment.verdict.text()
    # the picked places went along, and lie on their partners
    np.testing.assert_allclose(marks.data, alignment.of_xrays.value.data, atol=2.0)
    assert alignment.use.value == SHOWN
    run_to_end(widget, qtbot, timeout=30000)
    mine, theirs = fake.given["landmarks"]
    np.testing.assert_allclose(mine, photos.points[[3, 60, 120, 180, 240]], atol=1e-6)
    np.testing.assert_allclose(theirs, alignment.of_xrays.value.data)
    assert "landmarks=landmarks" in widget.copy_script()
    # asked to find the pose itself, the run is told nothing
    alignment.use.value = DURING_RUN
    run_to_end(widget, qtbot, timeout=30000)
    assert "landmarks" not in fake.given
    assert no_dialogs == []


def test_ties_can_be_chosen(make_widget, of_volume, fake, qtbot):
    from dataclasses import replace

    from napari_innergs.fit.align import Candidate, align_landmarks

    widget = make_widget(*of_volume)
    widget.kind.value = VOLUME
    alignment = widget.alignment
    run_to_end(widget, qtbot, alignment.scene_button.click)
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]])
    one = align_landmarks(corners, 2 * corners)
    other = np.diag([-2.0, -2.0, 2.0, 1.0])
    tie = (Candidate(one.transform, 0.99), Candidate(other, 0.98))
    alignment._take_pose(replace(one, candidates=tie))
    assert alignment.pose.choices == (0, 1)
    assert "2 poses fit alike" in alignment.verdict.text()
    alignment.pose.value = 1
    np.testing.assert_allclose(alignment.transform, other)
    alignment.accept_button.click()
    run_to_end(widget, qtbot, timeout=30000)
    np.testing.assert_allclose(fake.given["transform"], other)
    # what does not fit is shown, and not taken
    alignment._take_pose(replace(one, score=0.4, matched=False, reason="no match: too little lies on it"))
    assert alignment.verdict.text().startswith("No match (score 0.400): too little lies on it. The scene")
    assert alignment.use.value == DURING_RUN


# -- files, and what cannot be ------------------------------------------------------------------------------


def test_photographs_from_files(make_widget, layers, photos, qtbot, tmp_path, no_dialogs):
    frames = []
    for number in range(4):
        camera = photos.cameras[number]
        alpha = np.rint(255 * photos.masks[number]).astype(np.uint8)
        straight = photos.images[number] / np.maximum(photos.masks[number], 1e-3)[..., None]
        pixels = np.rint(255 * straight.clip(0, 1)).astype(np.uint8)
        imwrite(tmp_path / f"{number}.png", np.concatenate([pixels, alpha[..., None]], axis=-1))
        # (x, y, z), and OpenGL's camera: y up, looking backwards
        pose = camera.world_to_camera @ np.eye(4)[[2, 1, 0, 3]]
        back = np.linalg.inv(np.diag([1.0, -1, -1, 1]) @ pose)
        frames.append({"file_path": f"{number}.png", "transform_matrix": back.tolist()})
    lens = photos.cameras[0].intrinsics
    table = {
        "w": 40,
        "h": 40,
        "fl_x": lens[0, 0],
        "fl_y": lens[1, 1],
        "cx": lens[0, 2] + 0.5,
        "cy": lens[1, 2] + 0.5,
        "frames": frames,
    }
    (tmp_path / "transforms.json").write_text(json.dumps(table))
    widget = make_widget(layers[0])
    assert "Open photographs" in widget.estimate_line.text()
    widget.factor.value = 2
    widget.open_photographs(tmp_path / "transforms.json")
    qtbot.waitUntil(lambda: widget.photos.value is not None, timeout=20000)
    layer = widget.photos.value
    assert layer.data.shape == (4, 20, 20, 4)
    assert layer.name == "transforms"
    found = widget.job().photographs()
    np.testing.assert_allclose(found.cameras[2].centre, photos.cameras[2].centre, atol=1e-6)
    np.testing.assert_allclose(found.masks[1], photos.downsampled(2).masks[1], atol=0.01)
    np.testing.assert_allclose(found.images[1], photos.downsampled(2).images[1], atol=0.02)
    text = widget.copy_script()
    assert "igs.read_photographs(" in text
    assert "factor=2" in text
    compile(text, "script", "exec")
    widget.open_photographs(tmp_path / "missing.json")
    qtbot.waitUntil(lambda: bool(no_dialogs), timeout=20000)
    assert "missing.json" in no_dialogs[0]
    quiet(qtbot)


def test_bad_input_is_one_sentence(make_widget, layers, fake, xrays, no_dialogs):
    widget = make_widget(*layers)
    bare = widget.viewer.add_image(xrays[1], name="ct")
    widget.layer.value, widget.kind.value = bare, VOLUME
    with pytest.raises(ValueError, match="'ct' does not say how far apart its voxels are"):
        widget.job()
    widget.panel.run_button.click()
    assert not widget.panel.is_running
    assert "does not say how far apart" in no_dialogs.pop()
    counts = widget.viewer.add_image(np.ones((16, 44, 44), np.uint16), name="counts")
    widget.layer.value = counts
    widget.kind.value = PROJECTIONS
    widget.scan.views.value = 16
    with pytest.raises(ValueError, match="counts need the blank scan"):
        widget.job()
    widget.i0.value = (1000.0,)
    assert widget.job().i0 == 1000.0
    widget.alignment.use.value = SHOWN
    with pytest.raises(ValueError, match="there is no pose yet"):
        widget.job()
    widget.viewer.layers.remove("pictures")
    with pytest.raises(ValueError, match="photographs: there are none"):
        widget.job()
