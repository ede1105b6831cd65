"""The "Slices to volume" dock widget."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from magicgui.widgets import CheckBox, ComboBox, FloatSpinBox, Select, SpinBox
from napari.layers import Image, Labels, Shapes
from napari.qt.threading import create_worker
from napari.utils.notifications import show_error, show_info
from qtpy.QtCore import QTimer, QUrl
from qtpy.QtGui import QDesktopServices, QGuiApplication
from qtpy.QtWidgets import (
    QFileDialog,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from napari_innergs.config import PRESETS, SliceConfig
from napari_innergs.fit.engine import Done, Event, Failed, Preview, Progress, Step, background
from napari_innergs.layers.preview import LiveLayers
from napari_innergs.layers.read import (
    LayerView,
    Region,
    Source,
    centre_region,
    custom_grid,
    guess_first_axis,
    region_from_shapes,
)
from napari_innergs.layers.write import METADATA_KEY, json_only, reconstruction_layers, volume_layers
from napari_innergs.widgets._form import MINIMUM_WIDTH, ConfigForm, TallForm, align_labels, column
from napari_innergs.widgets._qt import follow_layers
from napari_innergs.widgets._run_panel import RunPanel
from napari_innergs.widgets._script import slices_script
from napari_innergs.widgets._settings import default_preset

DOCS = "https://github.com/napari-innergs/napari-innergs/tree/main/docs"
ESTIMATE_DELAY_MS = 250

WHOLE, CENTRE = "whole layer", "block in the centre"
ISOTROPIC, SPACING = "isotropic", "custom spacing"
CURRENT, EVERY = "current one", "every one"


@dataclass(frozen=True)
class SlicesJob:
    """All that a run needs, taken from the form when Run is pressed."""

    source: Source
    config: SliceConfig
    spacing: tuple[float, float, float] | None
    device: str
    seed: int
    distance: bool
    gaussians: str
    limit: int

    def grid(self, stack: Any) -> Any:
        """Return the output grid, or None for the default one."""
        return None if self.spacing is None else custom_grid(stack, self.spacing)


def run_job(job: SlicesJob) -> Generator[Event, None, None]:
    """Reconstruct every time point; `Done` carries (results, layer tuples).

    Previews of a time series hold all time points, so that the preview layer keeps its shape.
    """
    points = job.source.time_points
    progress = Progress()
    progress.enter("reading the layer", 0.01)
    results: list[Any] = []
    series: np.ndarray | None = None
    fit: Callable[..., Any] = (yield from background([_engine], progress))[0]
    for number, point in enumerate(points):
        # in the background: a lazy layer is loaded here, and cancelling must not wait for it
        stack = (yield from background([partial(job.source.stack, point)], progress))[0]
        # a time series starts each volume from the one before
        options = {"warm_start": results[-1]} if results else {}
        with closing(
            fit(stack, job.grid(stack), job.config, device=job.device, seed=job.seed, **options)
        ) as events:
            for event in events:
                if isinstance(event, Step):
                    phase = (
                        f"time {number + 1} of {len(points)}: {event.phase}"
                        if len(points) > 1
                        else event.phase
                    )
                    share = (number + event.fraction) / len(points)
                    yield Step(phase, share, event.iteration, event.total, event.loss, event.psnr_heldout)
                elif isinstance(event, Preview):
                    volume = event.volume
                    if job.source.all_times:
                        if series is None or series.shape[1:] != volume.shape:
                            series = np.zeros((len(points), *volume.shape), np.float32)
                        series[number] = volume
                        volume = series
                    yield Preview(volume, event.grid, event.label)
                elif isinstance(event, Done):
                    results.append(event.result)
                elif isinstance(event, Failed):
                    yield event
                    return
    progress.enter("making layers", 1.0)
    make = partial(
        reconstruction_layers,
        results,
        job.source,
        distance=job.distance,
        uncertainty=job.config.uncertainty,
        gaussians=job.gaussians,
        limit=job.limit,
    )
    tuples = (yield from background([make], progress))[0]
    yield Done((results, tuples))


def _engine() -> Callable[..., Any]:
    # a function of its own because it imports torch, which takes seconds: it runs in the background
    from napari_innergs.tasks.slices import fit_slices

    return fit_slices


def _estimate(job: SlicesJob) -> str:
    """One line on the size of the result, memory and time; runs in a worker because it imports torch."""
    from napari_innergs.geometry.grid import format_bytes
    from napari_innergs.tasks.slices import estimate_slices

    stack = job.source.stack(job.source.time_points[0], blank=True)
    grid = job.grid(stack) or stack.default_grid()
    cost = estimate_slices(stack, grid, job.config)
    times = len(job.source.time_points)
    shape = " × ".join(str(size) for size in ((times,) if times > 1 else ()) + tuple(grid.shape))
    spacing = dict.fromkeys(f"{step:.4g}" for step in grid.spacing)
    steps = " × ".join(spacing if len(spacing) == 1 else (f"{step:.4g}" for step in grid.spacing))
    unit = {"um": "µm"}.get(grid.units[-1], grid.units[-1]) if grid.units else ""
    seconds = float(cost["seconds"]) * times
    duration = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    return (
        f"{stack.n_slices} slices to {shape} voxels of {steps} {unit}; "
        f"about {format_bytes(cost['bytes'])} of memory and {duration}."
    )


class SlicesWidget(QWidget):
    """Make a dense volume from the sparse slices of an Image layer.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        The viewer whose layers are offered and to which the result is added.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.setMinimumWidth(MINIMUM_WIDTH)
        self.viewer = napari_viewer
        self._live: LiveLayers | None = None
        self._job: SlicesJob | None = None
        self._estimate_number = 0

        self._make_inputs()
        self.form = ConfigForm(SliceConfig, PRESETS, default_preset())
        self._make_outputs()
        self.panel = RunPanel(self._prepare)
        self._lay_out()

        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(ESTIMATE_DELAY_MS)
        self._timer.timeout.connect(self._start_estimate)

        follow_layers(self, self.viewer, self._refresh_layers)
        self.layer.changed.connect(self._on_layer)
        self.first_axis.changed.connect(self._on_shape)
        for widget in (
            self.axis,
            self.keep_every,
            self.region,
            self.grid,
            self.times,
            self.channels,
            *self.spacing,
        ):
            widget.changed.connect(self._on_change)
        self.device.changed.connect(self._show_device)
        self.grid.changed.connect(self._on_grid)
        self.form.changed.connect(self._on_change)
        self.panel.preview.connect(self._on_preview)
        self.panel.finished.connect(self._on_finished)
        self.panel.stopped.connect(self._on_stopped)
        self.panel.failed.connect(self._on_failed)
        if self.layer.value is not None:
            self.layer.value = self._likely_layer()
        self._refresh_layers()
        self._on_layer()
        self._show_device()

    # -- making the form -----------------------------------------------------------------------------------

    def _make_inputs(self) -> None:
        self.layer = ComboBox(
            label="Layer",
            choices=self._image_choices,
            nullable=False,
            tooltip="Image layer with the slices; its full world transform is used. Labels layers are not "
            "offered: "
            "their numbers must not be blended.",
        )
        self.channels = Select(
            label="More channels",
            choices=self._channel_choices,
            tooltip="Other layers of the same shape that show the same object: they are reconstructed "
            "together. "
            "Ctrl-click to choose several or none.",
        )
        self.channels.native.setMaximumHeight(54)
        self.first_axis = ComboBox(
            label="First axis", choices=["time", "channels"], tooltip="What the first axis of a 4D layer is."
        )
        self.times = ComboBox(
            label="Time points",
            choices=[CURRENT, EVERY],
            tooltip="Only the time point that is shown, or one volume for each.",
        )
        self.axis = ComboBox(
            label="Slice axis", choices=[0, 1, 2], tooltip="The axis that counts the slices (the sparse one)."
        )
        self.keep_every = SpinBox(
            label="Keep every",
            value=1,
            min=1,
            max=64,
            tooltip="Use every k-th slice only, to see what the others would have shown; 1 uses all.",
        )
        self.region = ComboBox(
            label="Region",
            choices=self._region_choices,
            tooltip="Try the settings on a part first: a block in the centre, or the box around the "
            "selected shape of a "
            "Shapes layer.",
        )
        self.inputs = column(
            [
                self.layer,
                self.channels,
                self.first_axis,
                self.times,
                self.axis,
                self.keep_every,
                self.region,
            ]
        )
        for widget in (self.channels, self.first_axis, self.times):
            widget.visible = False

    def _make_outputs(self) -> None:
        self.grid = ComboBox(
            label="Grid",
            choices=[ISOTROPIC, SPACING],
            tooltip="isotropic: in-plane pixels as they are and about as far apart through the slices; "
            "custom: choose "
            "the spacing.",
        )
        names = ("Through slices", "Rows", "Columns")
        self.spacing = [
            FloatSpinBox(
                label=name,
                value=1.0,
                min=1e-6,
                max=1e6,
                step=0.1,
                tooltip="Distance between voxel centres in the layer's world units.",
            )
            for name in names
        ]
        self.distance = CheckBox(
            text="Distance to slice",
            value=False,
            tooltip="Also add a layer with the distance to the nearest real slice, in world units: detail "
            "far from any "
            "slice is invented.",
        )
        self.gaussians = ComboBox(
            label="Gaussians",
            choices=["none", "points", "axes", "ellipsoids"],
            tooltip="Also show the Gaussians: points of 2 sigma across, principal axes from -sigma to "
            "+sigma, or 1-sigma "
            "surfaces; in world units. Best seen in 3D.",
        )
        self.limit = SpinBox(
            label="At most", value=2000, min=1, max=200000, tooltip="Largest number of Gaussians to show."
        )
        self.device = ComboBox(
            label="Device",
            choices=["auto", "cpu", "cuda"],
            tooltip="Where to compute; the line below says why.",
        )
        self.seed = SpinBox(
            label="Seed", value=0, min=0, max=2**31 - 1, tooltip="Same seed and settings, same result."
        )
        self.outputs = column(
            [
                self.grid,
                *self.spacing,
                self.distance,
                self.gaussians,
                self.limit,
                self.device,
                self.seed,
            ]
        )
        for widget in (*self.spacing, self.limit):
            widget.visible = False
        self.gaussians.changed.connect(lambda kind: setattr(self.limit, "visible", kind != "none"))

    def _lay_out(self) -> None:
        inside = QWidget()
        rows = QVBoxLayout(inside)
        rows.setContentsMargins(4, 4, 4, 4)
        rows.setSpacing(4)
        for title, widget in (
            ("Input", self.inputs.native),
            ("Method", self.form),
            ("Output", self.outputs.native),
        ):
            rows.addWidget(_heading(title))
            rows.addWidget(widget)
        rows.addStretch(1)
        align_labels(self.inputs.native, self.outputs.native, *(part.native for part in self.form.containers))
        scroll = TallForm(inside)

        self.device_line = QLabel("")
        self.estimate_line = QLabel("")
        for label in (self.device_line, self.estimate_line):
            label.setWordWrap(True)
            label.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Minimum)

        self.script_button = QPushButton("Copy as script")
        self.script_button.setToolTip("Put a Python script that does the same on the clipboard.")
        self.save_button = QPushButton("Save settings")
        self.save_button.setToolTip(
            "Write the method's settings to a YAML file, for this form and the command line."
        )
        self.load_button = QPushButton("Load settings")
        self.load_button.setToolTip("Fill the form from a YAML file.")
        self.docs_button = QPushButton("Help")
        self.docs_button.setToolTip(f"Open the documentation: {DOCS}")
        self.script_button.clicked.connect(self.copy_script)
        self.save_button.clicked.connect(lambda: self.save_settings())
        self.load_button.clicked.connect(lambda: self.load_settings())
        self.docs_button.clicked.connect(lambda: QDesktopServices.openUrl(QUrl(DOCS)))

        layout = QVBoxLayout(self)
        layout.setContentsMargins(4, 4, 4, 4)
        layout.addWidget(scroll, 1)
        layout.addWidget(self.device_line)
        layout.addWidget(self.estimate_line)
        layout.addWidget(self.panel)
        for pair in ((self.script_button, self.docs_button), (self.save_button, self.load_button)):
            row = QHBoxLayout()
            for button in pair:
                row.addWidget(button)
            layout.addLayout(row)

    # -- choices that follow the viewer ----------------------------------------------------------------------

    def _image_choices(self, *_: Any) -> list[tuple[str, Any]]:
        return [(layer.name, layer) for layer in self.viewer.layers if isinstance(layer, Image)]

    def _channel_choices(self, *_: Any) -> list[tuple[str, Any]]:
        first = self.layer.value if hasattr(self, "layer") else None
        if first is None or first.rgb or first.ndim != 3:
            return []
        return [(layer.name, layer) for _, layer in self._image_choices() if _same_place(layer, first)]

    def _region_choices(self, *_: Any) -> list[tuple[str, Any]]:
        shapes = [
            (f"Shapes: {layer.name}", layer) for layer in self.viewer.layers if isinstance(layer, Shapes)
        ]
        return [(WHOLE, WHOLE), (CENTRE, CENTRE), *shapes]

    def _refresh_layers(self) -> None:
        before = self.layer.value
        self.layer.reset_choices()
        if self.layer.value is not None and self.layer.value is not before:
            self.layer.value = self._likely_layer()
        self.channels.reset_choices()
        self.channels.visible = bool(self.channels.choices)
        self.region.reset_choices()
        self.panel.run_button.setEnabled(self.layer.value is not None or self.panel.is_running)
        if self.layer.value is None:
            self.estimate_line.setText(
                "Labels can't be used: their numbers must not be blended. Open an image with slices."
                if any(isinstance(layer, Labels) for layer in self.viewer.layers)
                else "Open an image with slices, or a sample: File > Open Sample > InnerGS."
            )

    def _on_layer(self, *_: Any) -> None:
        layer = self.layer.value
        if layer is None:
            return
        four = layer.ndim == 4
        if four:
            self.first_axis.value = guess_first_axis(layer)
        self.first_axis.visible = four
        self.channels.reset_choices()
        self.channels.visible = bool(self.channels.choices)
        if layer.ndim >= 3:
            labels = layer.axis_labels[-3:]
            self.axis.choices = [
                (f"{number}: {label}" if not label.startswith("-") else str(number), number)
                for number, label in enumerate(labels)
            ]
            steps = np.asarray(layer.scale)[-3:]
            longest = int(np.argmax(steps))
            self.axis.value = longest if steps[longest] > 1.05 * np.median(steps) else 0
            finest = float(np.min(steps))
            for box in self.spacing:
                box.step = finest / 4
                box.value = finest
        self._on_shape()

    def _on_shape(self, *_: Any) -> None:
        layer = self.layer.value
        self.times.visible = layer is not None and layer.ndim == 4 and self.first_axis.value == "time"
        self._on_change()

    def _on_grid(self, *_: Any) -> None:
        for box in self.spacing:
            box.visible = self.grid.value == SPACING

    def _likely_layer(self) -> Any:
        """Return the active image, else the topmost visible one, else the topmost."""
        images = [layer for _, layer in self._image_choices()]
        active = self.viewer.layers.selection.active
        if active in images:
            return active
        return next((layer for layer in reversed(images) if layer.visible), images[-1])

    # -- the job ---------------------------------------------------------------------------------------------

    def job(self) -> SlicesJob:
        """Return what Run would do now; ValueError or TypeError with a sentence when it can't."""
        layer = self.layer.value
        if layer is None:
            raise ValueError("layer: there is no Image layer; open an image or a sample first.")
        more = [other for other in (self.channels.value or []) if other in self.viewer.layers]
        views = tuple(LayerView.of(one) for one in (layer, *more))
        view = views[0]
        if view.ndim not in (3, 4):
            raise ValueError(
                f"layer: {view.name!r} has {view.ndim} dimensions, need 3 (slices, rows, columns) or 4."
            )
        axis, keep = int(self.axis.value), int(self.keep_every.value)
        choice = self.region.value
        region: Region | None = None
        if choice == CENTRE:
            region = centre_region(view.shape[-3:], axis, keep)
        elif choice is not None and choice != WHOLE:
            region = region_from_shapes(choice, view)
        time_index = None
        if view.ndim == 4 and self.first_axis.value == "time" and self.times.value == CURRENT:
            point = np.asarray(self.viewer.dims.point)[-4:]
            time_index = int(np.clip(round(view.world_to_data(point)[0]), 0, view.shape[0] - 1))
        return SlicesJob(
            source=Source(views, axis, keep, region, self.first_axis.value, time_index),
            config=self.form.config,
            spacing=tuple(box.value for box in self.spacing) if self.grid.value == SPACING else None,  # type: ignore[arg-type]
            device=self.device.value,
            seed=int(self.seed.value),
            distance=bool(self.distance.value),
            gaussians=self.gaussians.value,
            limit=int(self.limit.value),
        )

    def _prepare(self) -> Callable[[], Generator[Event, None, None]]:
        self._job = job = self.job()
        self._live = LiveLayers(self.viewer)
        return partial(run_job, job)

    def _on_preview(self, preview: Preview) -> None:
        assert self._job is not None and self._live is not None
        metadata = {METADATA_KEY: {"kind": "preview", "label": preview.label}}
        self._live.show(
            volume_layers(
                preview.volume,
                preview.grid,
                self._job.source,
                name="{} volume (preview)",
                restore=False,
                metadata=metadata,
            )
        )

    def _on_finished(self, product: tuple[list[Any], list[Any]]) -> None:
        assert self._live is not None
        results, tuples = product
        layers = self._live.show(tuples)
        self.viewer.layers.selection.active = layers[0]
        self.panel.status.setText(f"{self.panel.status.text()} {_verdict(results[0].report)}")
        self._free()

    def _on_stopped(self, best: Preview | None) -> None:
        self._keep_preview("stopped early", best)

    def _on_failed(self, event: Failed) -> None:
        self._keep_preview("incomplete", self.panel.last_preview)

    def _keep_preview(self, what: str, best: Preview | None) -> None:
        """Turn the preview into the result of a run that did not finish, and say so in the layer."""
        if self._live is not None and self._job is not None and best is not None:
            report = {
                "kind": what,
                "label": best.label,
                "config": json_only(self._job.config.model_dump(mode="json")),
            }
            for layer in self._live.layers:
                layer.name = layer.name.replace("(preview)", f"({what})")
                layer.metadata = {**layer.metadata, METADATA_KEY: report}
        self._free()

    def _free(self) -> None:
        # the job holds the pixels of a layer that may be deleted by now
        self._live = self._job = None
        self.panel.last_preview = None
        self.panel.run_button.setEnabled(self.layer.value is not None)
        # the form may have changed meanwhile
        self._on_change()

    # -- lines before Run ------------------------------------------------------------------------------------

    def _on_change(self, *_: Any) -> None:
        self._timer.start()

    def _show_device(self, *_: Any) -> None:
        from napari_innergs.device import describe_device

        try:
            choice = describe_device(self.device.value)
            self.device_line.setText(f"Device: {choice.name}. {choice.reason}")
        except (ValueError, RuntimeError) as error:
            self.device_line.setText(f"Device: {error}")

    def _start_estimate(self) -> None:
        if self.layer.value is None or self.panel.is_running:
            return
        try:
            job = self.job()
        except (ValueError, TypeError) as error:
            self.estimate_line.setText(str(error))
            return
        self._estimate_number += 1
        if not self.estimate_line.text():
            self.estimate_line.setText("Estimating memory and time.")
        create_worker(
            _safely,
            partial(_estimate, job),
            self._estimate_number,
            _connect={"returned": self._show_estimate},
        )

    def _show_estimate(self, answer: tuple[int, str]) -> None:
        number, text = answer
        if number == self._estimate_number and self.layer.value is not None:
            self.estimate_line.setText(text)

    # -- scripts and settings --------------------------------------------------------------------------------

    def copy_script(self) -> str:
        """Put the script on the clipboard and return it; an empty text if the form can't run."""
        try:
            job = self.job()
            text = slices_script(job.source, job.config, job.grid, job.device, job.seed)
        except (ValueError, TypeError) as error:
            show_error(str(error))
            return ""
        QGuiApplication.clipboard().setText(text)
        self.panel.status.setText("The script is on the clipboard.")
        return text

    def save_settings(self, path: str | Path | None = None) -> None:
        """Write the method's settings to a YAML file; asks for the name when none is given."""
        if path is None:
            path, _ = QFileDialog.getSaveFileName(self, "Save settings", "slices.yaml", "YAML (*.yaml *.yml)")
        if not path:
            return
        try:
            self.form.config.to_yaml(path)
        except (ValueError, OSError) as error:
            show_error(f"The settings were not saved: {error}")
            return
        show_info(f"Settings saved to {path}.")

    def load_settings(self, path: str | Path | None = None) -> None:
        """Fill the form from a YAML file; asks for the name when none is given."""
        if path is None:
            path, _ = QFileDialog.getOpenFileName(self, "Load settings", "", "YAML (*.yaml *.yml)")
        if not path:
            return
        try:
            self.form.config = SliceConfig.from_yaml(path)
        except (ValueError, OSError) as error:
            show_error(f"The settings were not loaded: {error}")


def _safely(make: Callable[[], str], number: int) -> tuple[int, str]:
    """Run in a worker; an estimate that fails is a sentence in its line, never an exception."""
    try:
        return number, make()
    except Exception as error:
        return number, str(error).splitlines()[0] if str(error) else type(error).__name__


def _heading(text: str) -> QLabel:
    label = QLabel(f"<b>{text}</b>")
    label.setContentsMargins(0, 4, 0, 0)
    return label


def _same_place(layer: Any, first: Any) -> bool:
    """Whether a layer can be another channel of the first one."""
    if layer is first or layer.rgb or layer.multiscale or first.multiscale or layer.ndim != first.ndim:
        return False
    return (
        layer.data.shape == first.data.shape
        and layer.data.dtype == first.data.dtype
        and layer.units == first.units
        and np.allclose(layer.extent.world, first.extent.world)
        and METADATA_KEY not in layer.metadata
    )


def _verdict(report: dict[str, Any]) -> str:
    """One sentence from the report: how good, compared to what, on slices that were left out."""
    ours, theirs = report.get("psnr_heldout"), report.get("baseline_psnr_heldout")
    if ours is None:
        return ""
    text = f"On left-out slices: {ours:.2f} dB"
    if theirs is not None:
        text += f", best conventional ({report.get('baseline', '?')}) {theirs:.2f} dB"
    return text + "."
