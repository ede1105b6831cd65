"""Pictures of a result as photographs see it, beside the measured ones; and what a run shows while it goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from magicgui.widgets import ComboBox, FloatSlider, FloatSpinBox, Slider
from numpy.typing import NDArray
from qtpy.QtCore import Qt, QTimer
from qtpy.QtGui import QImage, QPixmap
from qtpy.QtWidgets import QHBoxLayout, QLabel, QWidget

from napari_innergs.fit.engine import Done, Event, Progress, background
from napari_innergs.geometry.camera import Camera
from napari_innergs.layers.photographs import picture_layers
from napari_innergs.layers.preview import LiveLayers
from napari_innergs.photographs import Photographs
from napari_innergs.widgets._form import column, push_button, stack
from napari_innergs.widgets._job import JobWidget, look_at
from napari_innergs.widgets._run_panel import complain
from napari_innergs.widgets._worker import Follower

PHOTOGRAPH, CUTAWAY = "photograph", "cut-away"
TAKEN, FREE = "those of the photographs", "a free view"
LOOK_MS = 250
# Edge of the small pictures in the dock, pixels.
_SMALL = 78

Pictures = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class PhotoView:
    """A picture of a result that is asked for; angles in degrees."""

    result: Any
    photographs: Photographs
    name: str
    kind: str
    index: int
    free: tuple[float, float] | None
    cut: float

    def camera(self) -> Camera:
        """Return the camera in the result's world."""
        near = self.photographs.cameras[self.index].moved(self.result.transform)
        if self.free is None:
            return near
        middle = np.median(self.result.splats.means, axis=0)
        azimuth, elevation = np.radians(self.free)
        away = float(np.linalg.norm(near.centre - middle))
        flat = np.cos(elevation)
        eye = middle + away * np.array([np.sin(elevation), flat * np.sin(azimuth), flat * np.cos(azimuth)])
        # looking along the axis, up is somewhere else
        up = (1.0, 0.0, 0.0) if flat > 1e-3 else (0.0, 1.0, 0.0)
        return Camera.looking_at(eye, middle, near.intrinsics, near.size, up=up)

    def layers(self) -> list[Any]:
        """Render, and return layer tuples."""
        camera = self.camera()
        if self.kind == CUTAWAY:
            means = self.result.splats.means
            middle = np.median(means, axis=0)
            # from above, at half a right angle to the line of sight: both outside and cut are seen
            away = (camera.centre - middle) / np.linalg.norm(camera.centre - middle)
            up = -camera.world_to_camera[1, :3]
            away = away + up - (up @ away) * away
            away /= np.linalg.norm(away)
            reach = float(np.percentile(np.abs((means - middle) @ away), 98))
            image = self.result.render_cutaway(camera, middle + self.cut * reach * away, away)
        else:
            image = self.result.render_rgb(camera)
        taken = self.free is None
        measured = self.photographs.image(self.index) if taken else None
        facts = {"view": self.kind, "photograph": self.photographs.names[self.index] if taken else None}
        if taken and self.kind == PHOTOGRAPH and measured is not None:
            error = float(np.mean(np.square(image - measured, dtype=np.float64)))
            facts["psnr"] = float(f"{-10 * np.log10(max(error, 1e-12)):.4g}")
        grid = self.result.grid
        # as high as the volume, in its unit: napari's scale bar needs the same one everywhere
        pixel = float((np.array(grid.shape) * grid.spacing).max()) / camera.size[0]
        units = grid.units or ("pixel",) * 3
        return picture_layers(measured, image, self.name, pixel=pixel, units=units[1:], **facts)


def run_view(view: PhotoView) -> Generator[Event, None, None]:
    """Render a picture; `Done` carries layer tuples."""
    progress = Progress()
    progress.enter("rendering", 1.0)
    (made,) = yield from background([view.layers], progress)
    yield Done(made)


class PhotoViews(QWidget):
    """The choices and buttons of a dock's pictures in colour, and the export.

    Parameters
    ----------
    owner : JobWidget
        In whose run panel the first picture is made.
    """

    def __init__(self, owner: JobWidget) -> None:
        super().__init__()
        self._owner, self._viewer = owner, owner.viewer
        self._result: Any = None
        self._photographs: Photographs | None = None
        self._name = ""
        self._live = LiveLayers(self._viewer)
        self.kind = ComboBox(
            label="Show",
            choices=[PHOTOGRAPH, CUTAWAY],
            tooltip="photograph: the outside in colour; cut-away: the outside in colour, the cut by attenuation.",
        )
        self.cameras = ComboBox(
            label="From",
            choices=[TAKEN, FREE],
            tooltip="Cameras of the photographs, with the photograph beside the picture; or from anywhere.",
        )
        self.index = Slider(
            label="Camera", value=0, min=0, max=1, tooltip="Number of the photograph, from 0."
        )
        self.azimuth = FloatSpinBox(
            label="Azimuth (°)", value=0.0, min=-360.0, max=360.0, step=5.0, tooltip="Angle about the z axis."
        )
        self.elevation = FloatSpinBox(
            label="Elevation (°)",
            value=0.0,
            min=-90.0,
            max=90.0,
            step=5.0,
            tooltip="Angle above the x-y plane.",
        )
        self.cut = FloatSlider(
            label="Cut at",
            value=0.0,
            min=-1.0,
            max=1.0,
            step=0.05,
            tooltip="Where the object is cut, obliquely from above: 0 in its middle, 1 towards the camera.",
        )
        self.container = column([self.kind, self.cameras, self.index, self.azimuth, self.elevation, self.cut])
        self.button = push_button(
            "Render photograph", "What a camera would see of the last result, beside what it saw."
        )
        stack(self, self.container.native, self.button)
        self._follower = Follower(self, self._next_view, self._take_followed, complain)
        for widget in (self.kind, self.cameras):
            widget.changed.connect(self._show_fields)
        for widget in (self.kind, self.cameras, self.index, self.azimuth, self.elevation, self.cut):
            widget.changed.connect(self._follower.ask)
        self.button.clicked.connect(lambda: self.render())
        self.allow(True)
        self._show_fields()

    def offer(self, result: Any, photographs: Photographs, name: str) -> None:
        """Take the result that is looked at from now on."""
        self._result, self._photographs, self._name = result, photographs, name
        self.index.max = len(photographs) - 1

    def allow(self, allowed: bool) -> None:
        """Enable the button if there is a result."""
        self.button.setEnabled(allowed and self._result is not None)

    def _show_fields(self, *_: Any) -> None:
        free = self.cameras.value == FREE
        self.index.visible = not free
        self.azimuth.visible = self.elevation.visible = free
        self.cut.visible = self.kind.value == CUTAWAY

    def _view(self) -> PhotoView:
        assert self._photographs is not None
        free = (float(self.azimuth.value), float(self.elevation.value))
        return PhotoView(
            self._result,
            self._photographs,
            self._name,
            self.kind.value,
            int(self.index.value) if self.cameras.value == TAKEN else 0,
            free if self.cameras.value == FREE else None,
            float(self.cut.value),
        )

    def render(self) -> None:
        """Render what is chosen, in the run panel."""
        if self._result is None or self._owner.panel.is_running:
            return
        self._owner.run_aside(partial(run_view, self._view()), self._take)

    def _take(self, tuples: list[Any]) -> None:
        layers = self._show(tuples)
        for layer in self._viewer.layers:
            layer.visible = layer in layers
        self._viewer.dims.ndisplay = 2
        look_at(self._viewer, layers)
        self._viewer.layers.selection.active = layers[0]

    def _show(self, tuples: list[Any]) -> list[Any]:
        stale = self._live.layers[len(tuples) :]
        layers = self._live.show(tuples)
        for layer in stale:
            self._viewer.layers.remove(layer)
        psnr = layers[0].metadata["napari-innergs"].get("psnr")
        found = "" if psnr is None else f"Camera {self.index.value}: PSNR {psnr:.2f} dB."
        self._owner.panel.status.setText(found)
        return layers

    def _next_view(self) -> Callable[[], Any] | None:
        """Return what renders the picture that is shown, if one is."""
        if not self._live.layers or self._owner.panel.is_running:
            return None
        return self._view().layers

    def _take_followed(self, made: list[Any]) -> None:
        if self._live.layers:
            self._show(made)


class Slot:
    """The newest pictures of a run that nobody has looked at yet; may be filled from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pictures: Pictures | None = None

    def put(self, pictures: Pictures) -> None:
        """Replace what is there."""
        with self._lock:
            self._pictures = pictures

    def take(self) -> Pictures | None:
        """Return what is there, once."""
        with self._lock:
            pictures, self._pictures = self._pictures, None
        return pictures


class LivePictures(QWidget):
    """Small pictures of a run in progress, measured and rendered: a photograph and a radiograph."""

    KINDS = ("photograph", "radiograph")

    def __init__(self) -> None:
        super().__init__()
        self.slot = Slot()
        self.labels: dict[str, QLabel] = {}
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for kind in self.KINDS:
            for what in ("measured", "rendered"):
                label = self.labels[f"{kind} {what}"] = QLabel()
                label.setAlignment(Qt.AlignmentFlag.AlignCenter)
                label.setToolTip(f"{kind[:1].upper()}{kind[1:]}, {what}, at this moment of the run.")
                label.setVisible(False)
                layout.addWidget(label)
        self._timer = QTimer(self)
        self._timer.setInterval(LOOK_MS)
        self._timer.timeout.connect(self._look)

    def watch(self, running: bool) -> None:
        """Look for pictures from now on, or no more; what is shown stays."""
        if running:
            self.slot.take()
            self._timer.start()
        else:
            self._look()
            self._timer.stop()

    def clear(self) -> None:
        """Show nothing."""
        for label in self.labels.values():
            label.setVisible(False)

    def _look(self) -> None:
        pictures = self.slot.take()
        for name, picture in (pictures or {}).items():
            label = self.labels[name]
            label.setPixmap(_pixmap(picture))
            label.setVisible(True)


def _pixmap(picture: NDArray[Any]) -> QPixmap:
    """Make a small picture of values from 0 to 1, grey or in colour."""
    values = np.asarray(picture, np.float32)
    if values.ndim == 2:
        values = np.repeat(values[..., None], 3, axis=2)
    pixels = np.ascontiguousarray(np.rint(255 * values.clip(0, 1)).astype(np.uint8))
    rows, columns, _ = pixels.shape
    # the copy owns its pixels
    image = QImage(pixels.data, columns, rows, 3 * columns, QImage.Format.Format_RGB888).copy()
    return QPixmap.fromImage(image).scaled(
        _SMALL, _SMALL, Qt.AspectRatioMode.KeepAspectRatio, Qt.TransformationMode.SmoothTransformation
    )
