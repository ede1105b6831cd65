"""What dock widgets that reconstruct have in common: form, run panel, live layers, script, settings."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from magicgui.widgets import ComboBox, SpinBox
from napari.qt.threading import create_worker
from napari.utils.notifications import show_info
from qtpy.QtCore import QSize, QTimer, QUrl
from qtpy.QtGui import QDesktopServices, QGuiApplication
from qtpy.QtWidgets import QFileDialog, QHBoxLayout, QLabel, QPushButton, QSizePolicy, QVBoxLayout, QWidget

from napari_innergs.fit.engine import Event, Failed, Preview
from napari_innergs.layers.preview import LiveLayers
from napari_innergs.layers.write import METADATA_KEY, json_only
from napari_innergs.widgets._form import MINIMUM_WIDTH, ConfigForm, TallForm, align_labels, push_button
from napari_innergs.widgets._qt import follow_layers
from napari_innergs.widgets._run_panel import RunPanel, complain
from napari_innergs.widgets._worker import attempt

ESTIMATE_DELAY_MS = 250
Events = Generator[Event, None, None]


def look_at(viewer: Any, layers: list[Any]) -> None:
    """Fill the canvas with some layers, also where hidden ones reach further."""
    viewer.reset_view()
    camera = getattr(viewer, "scene", viewer).camera
    shown = -min(viewer.dims.ndisplay, min(layer.ndim for layer in layers))
    every = np.asarray(viewer.layers.extent.world)[:, shown:]
    ends = np.array([np.asarray(layer.extent.world)[:, shown:] for layer in layers])
    ends = np.stack([ends[:, 0].min(axis=0), ends[:, 1].max(axis=0)])
    camera.center = (0.0, 0.0, 0.0, *(float(x) for x in ends.mean(axis=0)))[-3:]
    if shown == -3:
        # napari shows all of the diagonal, from wherever it is looked at
        camera.zoom *= float(np.linalg.norm(np.ptp(every, axis=0)) / np.linalg.norm(np.ptp(ends, axis=0)))
    else:
        camera.zoom *= float(np.min(np.ptp(every, axis=0) / np.maximum(np.ptp(ends, axis=0), 1e-9)))


class JobWidget(QWidget):
    """Base of the docks that turn layers into a volume.

    A subclass names its page of documentation (`DOCS`), its settings' class (`CONFIG`) and the file name that is
    proposed for them (`SETTINGS`), and fills in the methods below: `_make` makes the widgets, among them `self.form`
    and what `_make_result_options` gives; `job` returns an object with the settings as `config`.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        The viewer whose layers are offered and to which the result is added.
    """

    DOCS: ClassVar[str] = ""
    CONFIG: ClassVar[Any] = None
    SETTINGS: ClassVar[str] = "settings.yaml"
    ESTIMATING: ClassVar[str] = "Estimating memory and time."

    form: ConfigForm

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.viewer = napari_viewer
        self._live: LiveLayers | None = None
        self._job: Any = None
        # what Run does instead, once, and who takes the result
        self._aside: tuple[Callable[[], Events], Callable[[Any], None]] | None = None
        self._take: Callable[[Any], None] | None = None
        self._estimate_number = 0
        self._make()
        self.panel = RunPanel(self._prepare)
        self._lay_out()

        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(ESTIMATE_DELAY_MS)
        self._timer.timeout.connect(self._start_estimate)

        follow_layers(self, self.viewer, self._refresh_layers)
        self._connect()
        self.device.changed.connect(self._show_device)
        self.form.changed.connect(self._on_change)
        self.panel.started.connect(self._on_started)
        self.panel.preview.connect(self._on_preview)
        self.panel.finished.connect(self._on_finished)
        self.panel.stopped.connect(self._on_stopped)
        self.panel.failed.connect(self._on_failed)
        self._refresh_layers()
        self._on_layer()
        self._show_device()

    # -- what a subclass says --------------------------------------------------------------------------------

    def _make(self) -> None:
        """Make the widgets of the form."""
        raise NotImplementedError

    def _sections(self) -> Iterable[tuple[str, Sequence[QWidget]]]:
        """Return titles and the widgets below them, from top to bottom."""
        raise NotImplementedError

    def _columns(self) -> Sequence[Any]:
        """Return the containers whose labels get one width, besides those of the form."""
        raise NotImplementedError

    def _connect(self) -> None:
        """Connect the widgets' signals."""
        raise NotImplementedError

    def _main_layer(self) -> Any:
        """Return the layer without which nothing can run, or None."""
        raise NotImplementedError

    def _refresh_choices(self) -> str:
        """Offer the viewer's layers; return what to do when there is none that can be used."""
        raise NotImplementedError

    def _on_layer(self, *_: Any) -> None:
        """Fill the form from the chosen layer."""
        raise NotImplementedError

    def job(self) -> Any:
        """Return what Run would do now; ValueError or TypeError with a sentence when it can't."""
        raise NotImplementedError

    def _work(self, job: Any) -> Callable[[], Events]:
        """Return what runs a job in the worker; `Done` carries what `_show_product` takes."""
        raise NotImplementedError

    def _estimator(self, job: Any) -> Callable[[], str]:
        """Return what writes the line about size, memory and time, in a worker."""
        raise NotImplementedError

    def _preview_layers(self, preview: Preview, metadata: dict[str, Any]) -> list[Any]:
        """Return the layers of a preview, with "(preview)" in their names."""
        raise NotImplementedError

    def _show_product(self, product: Any) -> str:
        """Show what a run made, and return a sentence for the status line."""
        raise NotImplementedError

    def _allow(self, allowed: bool) -> None:
        """Enable what can not be used while something runs."""

    def _facts(self) -> dict[str, Any]:
        """Return what else an unfinished result shall tell about its job."""
        return {}

    def _script(self) -> str:
        """Return Python that does what Run would do now."""
        raise NotImplementedError

    # -- making the form -------------------------------------------------------------------------------------

    def _make_result_options(self) -> list[Any]:
        """Make the choices that all results have, for the end of a column."""
        self.gaussians = ComboBox(
            label="Gaussians",
            choices=["none", "points", "axes", "ellipsoids"],
            tooltip="Also show the Gaussians: points of 2 sigma across, principal axes from -sigma to "
            "+sigma, or 1-sigma surfaces; in world units. Best seen in 3D.",
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
        self.gaussians.changed.connect(lambda kind: setattr(self.limit, "visible", kind != "none"))
        return [self.gaussians, self.limit, self.device, self.seed]

    def minimumSizeHint(self) -> QSize:
        """Room for the form, which may need more than the usual width."""
        hint = super().minimumSizeHint()
        return QSize(max(hint.width(), MINIMUM_WIDTH), hint.height())

    def _lay_out(self) -> None:
        inside = QWidget()
        rows = QVBoxLayout(inside)
        rows.setContentsMargins(4, 4, 4, 4)
        rows.setSpacing(4)
        for title, widgets in self._sections():
            heading = QLabel(f"<b>{title}</b>")
            heading.setContentsMargins(0, 4, 0, 0)
            rows.addWidget(heading)
            for widget in widgets:
                rows.addWidget(widget)
        rows.addStretch(1)
        self.limit.visible = False
        align_labels(*(part.native for part in (*self._columns(), *self.form.containers)))
        scroll = TallForm(inside)

        self.device_line, self.estimate_line = wrapped_label(), wrapped_label()
        self.script_button = push_button(
            "Copy as script", "Put a Python script that does the same on the clipboard."
        )
        self.save_button = push_button(
            "Save settings", "Write the method's settings to a YAML file, for this form and the command line."
        )
        self.load_button = push_button("Load settings", "Fill the form from a YAML file.")
        self.docs_button = push_button("Help", f"Open the documentation: {self.DOCS}")
        self.script_button.clicked.connect(self.copy_script)
        self.save_button.clicked.connect(lambda: self.save_settings())
        self.load_button.clicked.connect(lambda: self.load_settings())
        self.docs_button.clicked.connect(lambda: QDesktopServices.openUrl(QUrl(self.DOCS)))

        layout = QVBoxLayout(self)
        layout.setContentsMargins(4, 4, 4, 4)
        layout.addWidget(scroll, 1)
        layout.addWidget(self.device_line)
        layout.addWidget(self.estimate_line)
        layout.addWidget(self.panel)
        layout.addLayout(button_row(self.script_button, self.docs_button))
        layout.addLayout(button_row(self.save_button, self.load_button))

    def _refresh_layers(self) -> None:
        missing = self._refresh_choices()
        known = self._main_layer() is not None
        self.panel.run_button.setEnabled(known or self.panel.is_running)
        if not known:
            self.estimate_line.setText(missing)

    # -- the job ---------------------------------------------------------------------------------------------

    def run_aside(self, work: Callable[[], Events], take: Callable[[Any], None]) -> None:
        """Run something else than the job in the panel.

        Parameters
        ----------
        work : callable
            Called in the worker; returns a generator of events.
        take : callable
            Is given what `Done` carries, in the main thread.
        """
        if self.panel.is_running:
            return
        self._aside = work, take
        self.panel.run()

    def _prepare(self) -> Callable[[], Events]:
        aside, self._aside = self._aside, None
        if aside is not None:
            work, self._take = aside
            return work
        job = self.job()
        work = self._work(job)
        self._job, self._take = job, None
        self._live = LiveLayers(self.viewer)
        return work

    def _on_started(self) -> None:
        self._allow(False)

    def _on_preview(self, preview: Preview) -> None:
        if self._job is None or self._live is None:
            return
        self._live.show(
            self._preview_layers(preview, {METADATA_KEY: {"kind": "preview", "label": preview.label}})
        )

    def _on_finished(self, product: Any) -> None:
        before = self.panel.status.text()
        if self._take is not None:
            self._take(product)
        else:
            sentence = self._show_product(product)
            self.panel.status.setText(f"{before} {sentence}".strip())
        self._free()

    def _on_stopped(self, best: Preview | None) -> None:
        if self._take is not None:
            self.panel.status.setText("Cancelled.")
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
                **json_only(self._facts()),
            }
            for layer in self._live.layers:
                layer.name = layer.name.replace("(preview)", f"({what})")
                layer.metadata = {**layer.metadata, METADATA_KEY: report}
        self._free()

    def _free(self) -> None:
        # the job holds the pixels of a layer that may be deleted by now
        self._live = self._job = self._take = None
        self.panel.last_preview = None
        self.panel.run_button.setEnabled(self._main_layer() is not None)
        self._allow(True)
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
        if self._main_layer() is None or self.panel.is_running:
            return
        try:
            estimate = self._estimator(self.job())
        except (ValueError, TypeError) as error:
            self.estimate_line.setText(str(error))
            return
        self._estimate_number += 1
        if not self.estimate_line.text():
            self.estimate_line.setText(self.ESTIMATING)
        create_worker(
            partial(_numbered, estimate), self._estimate_number, _connect={"returned": self._show_estimate}
        )

    def _show_estimate(self, answer: tuple[int, str]) -> None:
        number, text = answer
        if number == self._estimate_number and self._main_layer() is not None:
            self.estimate_line.setText(text)

    # -- scripts and settings --------------------------------------------------------------------------------

    def copy_script(self) -> str:
        """Put the script on the clipboard and return it; an empty text if the form can't run."""
        try:
            text = self._script()
        except (ValueError, TypeError) as error:
            complain(str(error))
            return ""
        QGuiApplication.clipboard().setText(text)
        self.panel.status.setText("The script is on the clipboard.")
        return text

    def save_settings(self, path: str | Path | None = None) -> None:
        """Write the method's settings to a YAML file; asks for the name when none is given."""
        if path is None:
            path, _ = QFileDialog.getSaveFileName(self, "Save settings", self.SETTINGS, "YAML (*.yaml *.yml)")
        if not path:
            return
        try:
            self.form.config.to_yaml(path)
        except (ValueError, OSError) as error:
            complain(f"The settings were not saved: {error}")
            return
        show_info(f"Settings saved to {path}.")

    def load_settings(self, path: str | Path | None = None) -> None:
        """Fill the form from a YAML file; asks for the name when none is given."""
        if path is None:
            path, _ = QFileDialog.getOpenFileName(self, "Load settings", "", "YAML (*.yaml *.yml)")
        if not path:
            return
        try:
            self.form.config = self.CONFIG.from_yaml(path)
        except (ValueError, OSError) as error:
            complain(f"The settings were not loaded: {error}")


def _numbered(make: Callable[[], str], number: int) -> tuple[int, str]:
    """Run in a worker; an estimate that fails is a sentence in its line."""
    return number, attempt(make)


def cost_in_words(cost: dict[str, Any], times: int = 1) -> tuple[str, str]:
    """Return memory and time of an estimate, for so many runs."""
    from napari_innergs.geometry.grid import format_bytes

    seconds = float(cost["seconds"]) * times
    duration = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    return f"about {format_bytes(cost['bytes'])} of memory", duration


def wrapped_label() -> QLabel:
    """Make an empty line of text that may become several."""
    label = QLabel("")
    label.setWordWrap(True)
    label.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Minimum)
    return label


def button_row(*buttons: QPushButton) -> QHBoxLayout:
    """Put buttons side by side."""
    row = QHBoxLayout()
    row.setContentsMargins(0, 0, 0, 0)
    for button in buttons:
        row.addWidget(button)
    return row


def buttons(*made: QPushButton) -> QWidget:
    """Put buttons side by side in a widget."""
    holder = QWidget()
    holder.setLayout(button_row(*made))
    return holder
