"""Make the pictures of the documentation: opens napari on the sample data, runs the widgets, saves PNGs.

    python docs/screenshots.py [--preset balanced]

Needs a display; without one: xvfb-run -a -s "-screen 0 1920x1200x24" python docs/screenshots.py
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import napari
from napari.settings import get_settings
from qtpy.QtWidgets import QApplication

PLUGIN = "napari-innergs"
FOLDER = Path(__file__).parent / "images"


def main() -> None:
    """Write docs/images/*.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="balanced")
    preset = parser.parse_args().preset
    FOLDER.mkdir(exist_ok=True)
    get_settings().application.confirm_close_window = False
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
