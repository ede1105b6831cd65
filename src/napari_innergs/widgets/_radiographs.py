"""Radiographs of a result: the scan's own views with their residuals, or a view from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from magicgui.widgets import ComboBox, FloatSpinBox
from qtpy.QtWidgets import QWidget

from napari_innergs.fit.engine import Done, Event, Progress, background
from napari_innergs.layers.preview import LiveLayers
from napari_innergs.layers.write import METADATA_KEY
from napari_innergs.layers.xray import free_view, radiograph_layers, render_radiographs, view_layer
from napari_innergs.scan import Scan
from napari_innergs.widgets._form import OptionalNumber, column, push_button, stack
from napari_innergs.widgets._job import JobWidget, look_at
from napari_innergs.widgets._run_panel import complain
from napari_innergs.widgets._worker import Follower

VOLUME, GAUSSIANS = "volume", "Gaussians"
SCANNED, FREE = "those of the scan", "a free view"


@dataclass(frozen=True)
class RadiographJob:
    """A reconstruction to look through, as the scan's own views do."""

    result: Any
    scan: Scan
    source: str


@dataclass(frozen=True)
class FreeView:
    """A reconstruction to look through from a place of one's own; degrees, world units."""

    result: Any
    scan: Scan
    source: str
    azimuth: float
    elevation: float
    distance: float | None

    def layer(self) -> Any:
        """Render, and return a layer tuple."""
        view = free_view(
            self.scan.geometry,
            self.result.grid,
            np.radians(self.azimuth),
            np.radians(self.elevation),
            self.distance,
        )
        (image,) = render_radiographs(self.result, view, source=self.source)
        facts = {"azimuth": self.azimuth, "elevation": self.elevation, "distance": self.distance}
        return view_layer(image, view, f"{self.scan.name} free view", rays_through=self.source, **facts)


def run_radiographs(job: RadiographJob) -> Generator[Event, None, None]:
    """Render the scan's views of a reconstruction, one by one; `Done` carries layer tuples and a sentence."""
    from napari_innergs.baselines.preprocess import scan_line_integrals

    progress = Progress()
    progress.enter("reading the projections", 0.1)
    (measured,) = yield from background([partial(scan_line_integrals, job.scan)], progress)
    geometry, count = job.scan.geometry, job.scan.n_views
    progress.enter("rendering radiographs", 0.95)
    render = partial(render_radiographs, job.result, geometry, source=job.source)
    # one at a time: rendering uses all processors by itself
    images = yield from background(
        [partial(render, views=[number]) for number in range(count)], progress, total=count, workers=1
    )
    progress.enter("making layers", 1.0)
    rendered = np.concatenate(images)
    make = partial(
        radiograph_layers, measured.projections, rendered, geometry, job.scan.name, job.result.grid
    )
    tuples = (yield from background([make], progress))[0]
    rms = tuples[-1][1]["metadata"][METADATA_KEY]["rms"]
    signal = float(np.sqrt(np.mean(np.square(measured.projections, dtype=np.float64)))) or 1.0
    sentence = f"Residual {rms:.4g} RMS, {100 * rms / signal:.1f} % of the measured line integrals' RMS."
    yield Done((tuples, sentence))


def run_free_view(job: FreeView) -> Generator[Event, None, None]:
    """Render one view; `Done` carries layer tuples and a sentence."""
    progress = Progress()
    progress.enter("rendering", 1.0)
    (made,) = yield from background([job.layer], progress)
    yield Done(([made], "Other numbers are followed at once."))


class Radiographs(QWidget):
    """The choices and the button of a dock's radiographs.

    Parameters
    ----------
    owner : JobWidget
        In whose run panel the work is done.
    """

    def __init__(self, owner: JobWidget) -> None:
        super().__init__()
        self._owner = owner
        self._viewer = owner.viewer
        self._result: Any = None
        self._scan: Any = None
        self._shown = LiveLayers(self._viewer)
        self._free = LiveLayers(self._viewer)
        self.through = ComboBox(
            label="Rays through",
            choices=[VOLUME, GAUSSIANS],
            tooltip="volume: the voxels of the result; Gaussians: exact integrals of the model.",
        )
        self.view = ComboBox(
            label="Views",
            choices=[SCANNED, FREE],
            tooltip="those of the scan: measured, rendered and their difference, the slider goes through the views; "
            "a free view: one from anywhere.",
        )

        def angle(label: str, reach: float, tooltip: str) -> FloatSpinBox:
            return FloatSpinBox(label=label, value=0.0, min=-reach, max=reach, step=5.0, tooltip=tooltip)

        self.azimuth = angle("Azimuth (°)", 360.0, "Angle about the axis, as those of the scan.")
        self.elevation = angle("Elevation (°)", 90.0, "Angle above the plane of rotation.")
        self.distance = OptionalNumber(
            label="Distance",
            hint="as in the scan",
            tooltip="From the source to the middle of the volume, in the scan's unit of length.",
        )
        self.container = column([self.through, self.view, self.azimuth, self.elevation, self.distance])
        self.button = push_button(
            "Render radiographs", "What a scanner would see of the last result, beside what it saw."
        )
        self.button.setEnabled(False)
        stack(self, self.container.native, self.button)
        self._follower = Follower(self, self._next_view, self._take_followed, self._say)
        self.view.changed.connect(self._show_fields)
        for widget in (self.through, self.azimuth, self.elevation, self.distance):
            widget.changed.connect(self._follower.ask)
        self.button.clicked.connect(self.render)
        self._show_fields()

    def offer(self, result: Any, scan: Scan) -> None:
        """Take the result that is looked through from now on."""
        self._result, self._scan = result, scan

    def allow(self, allowed: bool) -> None:
        """Enable the button if there is a result."""
        self.button.setEnabled(allowed and self._result is not None)

    def _show_fields(self, *_: Any) -> None:
        for widget in (self.azimuth, self.elevation, self.distance):
            widget.visible = self.view.value == FREE

    def _source(self) -> str:
        if self.through.value == VOLUME:
            return "volume"
        if self._result.model is None:
            raise ValueError("There are no Gaussians in this result; render the volume.")
        return "model"

    def _free_view(self) -> FreeView:
        distance = self.distance.value
        if isinstance(distance, str):
            raise ValueError(f"distance: got {distance!r}, need a number, or nothing.")
        return FreeView(
            self._result,
            self._scan,
            self._source(),
            float(self.azimuth.value),
            float(self.elevation.value),
            distance,
        )

    def render(self) -> None:
        """Render what is chosen, in the run panel."""
        if self._result is None or self._owner.panel.is_running:
            return
        try:
            if self.view.value == FREE:
                work: Callable[[], Any] = partial(run_free_view, self._free_view())
                self._owner.run_aside(work, self._take_free)
            else:
                job = RadiographJob(self._result, self._scan, self._source())
                self._owner.run_aside(partial(run_radiographs, job), self._take_scanned)
        except ValueError as error:
            complain(str(error))

    def _take_scanned(self, made: tuple[list[Any], str]) -> None:
        layers = self._show(self._shown, made)
        self._viewer.dims.set_point(self._viewer.dims.ndim - 3, layers[0].translate[0])

    def _take_free(self, made: tuple[list[Any], str]) -> None:
        self._show(self._free, made)

    def _show(self, live: LiveLayers, made: tuple[list[Any], str]) -> list[Any]:
        tuples, sentence = made
        layers = live.show(tuples)
        for layer in self._viewer.layers:
            layer.visible = layer in layers
        self._viewer.dims.ndisplay = 2
        look_at(self._viewer, layers)
        self._viewer.layers.selection.active = layers[-1]
        status = self._owner.panel.status
        status.setText(f"{status.text()} {sentence}")
        return layers

    def _next_view(self) -> Callable[[], Any] | None:
        """Return what renders the free view that is shown, if one is."""
        if self.view.value != FREE or not self._free.layers or self._owner.panel.is_running:
            return None
        return self._free_view().layer

    def _say(self, text: str) -> None:
        self._owner.panel.status.setText(text)

    def _take_followed(self, made: Any) -> None:
        if self._free.layers:
            self._free.show([made])
