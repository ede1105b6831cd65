"""Make the pictures of the documentation: opens napari on the sample data, runs the widgets, saves PNGs.

    python docs/screenshots.py [--preset balanced] [--only slices|projections|dual]

Needs a display; without one: xvfb-run -a -s "-screen 0 1920x1200x24" python docs/screenshots.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import napari
from napari.settings import get_settings
from qtpy.QtWidgets import QApplication, QScrollArea

PLUGIN = "napari-innergs"
FOLDER = Path(__file__).parent / "images"


def main() -> None:
    """Write docs/images/*.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--only", choices=["slices", "projections", "dual"])
    given = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    get_settings().application.confirm_close_window = False
    for name, make in (("slices", slices), ("projections", projections), ("dual", dual)):
        if given.only in (None, name):
            make(given.preset)


def slices(preset: str) -> None:
    """Make the pictures of slices to a volume, and of comparing volumes."""
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1500, 950)
    viewer.open_sample(PLUGIN, "brain_sparse")
    complete = viewer.layers[0]
    # a coronal view shows what the missing slices cost
    viewer.dims.order = (1, 0, 2)
    viewer.scene.camera.orientation2d = ("up", "right")
    viewer.canvas.overlays.scale_bar.visible = True
    dock, widget = viewer.window.add_plugin_dock_widget(PLUGIN, "Slices to volume")
    wait(lambda: "of memory" in widget.estimate_line.text(), 60)
    viewer.dims.set_point(1, complete.data_to_world((0, 48, 0))[1])
    viewer.reset_view()

    widget.form.preset.value = preset
    ended: list[Any] = []
    for signal in (widget.panel.finished, widget.panel.failed):
        signal.connect(ended.append)
    widget.panel.run()
    wait(lambda: ended or (len(widget.panel._loss) > 20 and len(viewer.layers) > 2), 300)
    settle()
    save(viewer, "slices_running.png")
    wait(lambda: bool(ended), 600)
    settle()
    save(viewer, "slices_widget.png")

    viewer.window.remove_dock_widget(dock)
    _, compare = viewer.window.add_plugin_dock_widget(PLUGIN, "Compare volumes")
    volume = next(layer for layer in viewer.layers if layer.name.endswith("volume"))
    compare.reference.value, compare.other.value = complete, volume
    compare.measure()
    wait(lambda: "PSNR" in compare.text.text(), 60)
    compare.side_button.setChecked(True)
    viewer.layers.selection.active = volume
    settle()
    save(viewer, "compare.png")
    viewer.close()


def projections(preset: str) -> None:
    """Make the pictures of projections to a volume."""
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1500, 1150)
    viewer.open_sample(PLUGIN, "cone_scan")
    scan = viewer.layers["Phantom cone beam"]
    viewer.canvas.overlays.scale_bar.visible = True
    _, widget = viewer.window.add_plugin_dock_widget(PLUGIN, "Projections to volume")
    wait(lambda: "of memory" in widget.estimate_line.text(), 60)

    widget.show_geometry()
    viewer.scene.camera.angles = (-20, 25, -60)
    settle()
    save(viewer, "projections_geometry.png")
    for layer in [layer for layer in viewer.layers if layer.name.startswith("Phantom cone beam ")]:
        viewer.layers.remove(layer)
    viewer.dims.ndisplay = 2

    # as if nobody had measured the offset of the panel
    own = scan.metadata[PLUGIN]
    wrong = {**own["geometry"], "offDetector": [0.0, 1.5]}
    scan.metadata = {**scan.metadata, PLUGIN: {**own, "geometry": wrong}}
    widget.form.preset.value = preset
    finish(widget, widget.panel.run)
    settle()
    save(viewer, "projections_warning.png")

    finish(widget, widget.refine_geometry)
    finish(widget, widget.panel.run)
    volume = viewer.layers[-2]
    viewer.layers.selection.active = volume
    settle()
    save(viewer, "projections_refined.png")

    finish(widget, widget.radiographs.render)
    widget.findChild(QScrollArea).ensureWidgetVisible(widget.radiographs)
    settle()
    save(viewer, "projections_radiographs.png")
    for layer in viewer.layers[-3:]:
        viewer.layers.remove(layer)
    widget.radiographs.view.value = "a free view"
    widget.radiographs.azimuth.value = 40
    widget.radiographs.elevation.value = 25
    finish(widget, widget.radiographs.render)
    settle()
    widget.findChild(QScrollArea).ensureWidgetVisible(widget.radiographs)
    settle()
    save(viewer, "projections_free_view.png")
    viewer.close()


def dual(preset: str) -> None:
    """Make the pictures of photographs and X-rays."""
    viewer = napari.Viewer(show=True)
    viewer.window.resize(1500, 1150)
    viewer.open_sample(PLUGIN, "tooth")
    viewer.canvas.overlays.scale_bar.visible = True
    _, widget = viewer.window.add_plugin_dock_widget(PLUGIN, "Photos + X-rays")
    wait(lambda: "X-ray views" in widget.estimate_line.text(), 60)
    finish(widget, widget.alignment.align)
    viewer.scene.camera.angles = (-20, 25, -60)
    settle()
    save(viewer, "dual_alignment.png")

    viewer.dims.ndisplay = 2
    widget.form.preset.value = preset
    ended: list[Any] = []
    for signal in (widget.panel.finished, widget.panel.failed):
        signal.connect(ended.append)
    widget.panel.run()
    wait(lambda: ended or not widget.pictures.labels["radiograph rendered"].isHidden(), 600)
    settle()
    save(viewer, "dual_running.png")
    wait(lambda: bool(ended), 900)
    views = widget.photo_views
    views.index.value = 4
    for kind, name in (("photograph", "dual_photograph.png"), ("cut-away", "dual_cutaway_dock.png")):
        views.kind.value = kind
        finish(widget, views.render)
        widget.findChild(QScrollArea).ensureWidgetVisible(views)
        settle()
        save(viewer, name)
    viewer.close()


def finish(widget: Any, start: Any) -> None:
    """Start something in the run panel and wait for its end."""
    ended: list[Any] = []
    for signal in (widget.panel.finished, widget.panel.failed):
        signal.connect(ended.append)
    start()
    wait(lambda: bool(ended), 600)


def wait(ready: Any, seconds: float) -> None:
    """Let Qt work until something is true."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError("the widget did not answer")
        QApplication.processEvents()
        time.sleep(0.01)


def settle() -> None:
    """Let Qt paint everything."""
    until = time.monotonic() + 1.0
    wait(lambda: time.monotonic() > until, 5)


def save(viewer: Any, name: str) -> None:
    """Write a picture of the whole window."""
    viewer.screenshot(str(FOLDER / name), canvas_only=False, flash=False)
    print(FOLDER / name)


if __name__ == "__main__":
    main()
