"""The "Compare volumes" dock widget."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
from magicgui.widgets import CheckBox, ComboBox
from napari.layers import Image
from napari.qt.threading import create_worker
from napari.utils.notifications import show_error
from qtpy.QtCore import Qt, QTimer
from qtpy.QtWidgets import QHBoxLayout, QLabel, QPushButton, QVBoxLayout, QWidget

from napari_innergs.layers.preview import LiveLayers
from napari_innergs.layers.read import LayerView
from napari_innergs.layers.resample import Comparison, compare_views
from napari_innergs.layers.write import METADATA_KEY, placement
from napari_innergs.widgets._form import MINIMUM_WIDTH, align_labels, column
from napari_innergs.widgets._qt import follow_layers
from napari_innergs.widgets._worker import attempt

BLINK_MS = 700


class CompareWidget(QWidget):
    """Look at two volumes in the same place, and measure one against the other.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        The viewer. Both volumes are shown by it, so their slices are linked.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self.setMinimumWidth(MINIMUM_WIDTH)
        self.viewer = napari_viewer
        self._live: LiveLayers | None = None
        self._before: dict[Any, Any] | None = None
        self._number = 0

        self.reference = ComboBox(
            label="Reference",
            choices=self._choices,
            tooltip="The volume that is taken to be true; the comparison is made on its voxels.",
        )
        self.other = ComboBox(
            label="Compared",
            choices=self._choices,
            tooltip="The volume that is measured against the reference.",
        )
        self.difference = CheckBox(
            text="Difference layer",
            value=True,
            tooltip="Add compared minus reference, in intensity units, on the reference's voxels.",
        )
        self.form = column([self.reference, self.other, self.difference])

        self.swap_button = QPushButton("Swap")
        self.swap_button.setToolTip("Show the one that is hidden and hide the other.")
        self.blink_button = QPushButton("Blink")
        self.blink_button.setCheckable(True)
        self.blink_button.setToolTip(f"Swap every {BLINK_MS / 1000:g} s until pressed again.")
        self.side_button = QPushButton("Side by side")
        self.side_button.setCheckable(True)
        self.side_button.setToolTip("Reference left, compared right, slices linked; press again to go back.")
        self.measure_button = QPushButton("Measure")
        self.measure_button.setToolTip("PSNR, SSIM and RMSE of the compared volume against the reference.")
        self.text = QLabel("Choose two volumes.")
        self.text.setWordWrap(True)
        self.text.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)

        row = QHBoxLayout()
        for button in (self.swap_button, self.blink_button, self.side_button):
            row.addWidget(button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(4, 4, 4, 4)
        align_labels(self.form.native)
        layout.addWidget(self.form.native)
        layout.addLayout(row)
        layout.addWidget(self.measure_button)
        layout.addWidget(self.text)
        layout.addStretch(1)

        self._timer = QTimer(self)
        self._timer.setInterval(BLINK_MS)
        self._timer.timeout.connect(self.swap)
        self.swap_button.clicked.connect(self.swap)
        self.blink_button.toggled.connect(self.blink)
        self.side_button.toggled.connect(self.side_by_side)
        self.measure_button.clicked.connect(self.measure)
        follow_layers(self, self.viewer, self._refresh)
        self._refresh()

    def _choices(self, *_: Any) -> list[tuple[str, Any]]:
        return [
            (layer.name, layer)
            for layer in self.viewer.layers
            if isinstance(layer, Image) and layer.ndim >= 2
        ]

    def _refresh(self) -> None:
        for box in (self.reference, self.other):
            box.reset_choices()
        layers = [layer for _, layer in self._choices()]
        if len(layers) > 1 and self.reference.value is self.other.value:
            others = [layer for layer in reversed(layers) if layer is not self.reference.value]
            self.other.value = next((layer for layer in others if _is_result(layer)), others[0])
        enough = len(layers) > 1
        for button in (self.swap_button, self.blink_button, self.side_button, self.measure_button):
            button.setEnabled(enough)
        if not enough:
            self.blink_button.setChecked(False)

    def pair(self) -> tuple[Any, Any]:
        """Return (reference, compared); ValueError with a sentence if these aren't two layers."""
        reference, other = self.reference.value, self.other.value
        if reference is None or other is None:
            raise ValueError("Open two volumes first.")
        if reference is other:
            raise ValueError("Choose two different layers.")
        return reference, other

    # -- looking -------------------------------------------------------------------------------------------

    def swap(self, *_: Any) -> None:
        """Show one of the two and hide the other."""
        try:
            reference, other = self.pair()
        except ValueError:
            self.blink_button.setChecked(False)
            return
        self.side_button.setChecked(False)
        for layer in self._live.layers if self._live is not None else []:
            # the difference would cover both
            layer.visible = False
        show_reference = not reference.visible
        if reference.visible == other.visible:
            show_reference = False
        reference.visible, other.visible = show_reference, not show_reference

    def blink(self, on: bool) -> None:
        """Start or stop swapping by itself."""
        if on:
            self.side_button.setChecked(False)
            self._timer.start()
        else:
            self._timer.stop()

    def side_by_side(self, on: bool) -> None:
        """Show the two next to each other in napari's grid, everything else hidden; False goes back."""
        if not on:
            self._restore()
            return
        self.blink_button.setChecked(False)
        try:
            reference, other = self.pair()
        except ValueError as error:
            show_error(str(error))
            self.side_button.setChecked(False)
            return
        layers, grid = self.viewer.layers, self.viewer.grid
        self._before = {
            "visible": {layer: layer.visible for layer in layers},
            "order": list(layers),
            "grid": (grid.enabled, grid.stride, tuple(grid.shape)),
        }
        # the grid puts `stride` neighbours of the list into one cell, the first ones left
        for layer in layers:
            layer.visible = layer in (reference, other)
        layers.move(layers.index(reference), 0)
        layers.move(layers.index(other), len(layers))
        grid.stride = (len(layers) + 1) // 2
        grid.shape = (1, 2)
        grid.enabled = True
        self.viewer.reset_view()

    def _restore(self) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        layers, grid = self.viewer.layers, self.viewer.grid
        grid.enabled, grid.stride, grid.shape = before["grid"]
        for layer, visible in before["visible"].items():
            if layer in layers:
                layer.visible = visible
        for position, layer in enumerate(one for one in before["order"] if one in layers):
            layers.move(layers.index(layer), position)
        self.viewer.reset_view()

    # -- measuring -----------------------------------------------------------------------------------------

    def measure(self, *_: Any) -> None:
        """Compute the figures and the difference in the background."""
        try:
            reference, other = (self._view(layer) for layer in self.pair())
        except (ValueError, TypeError) as error:
            self.text.setText(str(error))
            return
        self.text.setText("Measuring.")
        self.measure_button.setEnabled(False)
        self._number += 1
        create_worker(_safely, self._number, other, reference, _connect={"returned": self._show})

    def _view(self, layer: Any) -> LayerView:
        """View of a layer; of a 4D one, the volume that is shown."""
        view = LayerView.of(layer)
        if view.ndim != 4:
            return view
        index = int(
            np.clip(
                round(view.world_to_data(np.asarray(self.viewer.dims.point)[-4:])[0]), 0, view.shape[0] - 1
            )
        )
        cut = view.window([slice(index, index + 1), *[slice(None)] * 3])
        keep = [1, 2, 3, 4]
        return LayerView(
            **{
                **cut.__dict__,
                "data": cut.data[0],
                "affine": cut.affine[np.ix_(keep, keep)],
                "units": cut.units[1:],
                "axis_labels": cut.axis_labels[1:],
            }
        )

    def _show(self, answer: tuple[int, Comparison | str, LayerView, LayerView]) -> None:
        number, outcome, other, reference = answer
        self.measure_button.setEnabled(True)
        if number != self._number:
            return
        if isinstance(outcome, str):
            self.text.setText(outcome)
            show_error(outcome)
            return
        covered = "" if outcome.overlap > 0.9995 else f"<br>on {100 * outcome.overlap:.1f} % of the reference"
        self.text.setText(
            f"<b>{escape(other.name)}</b> against <b>{escape(reference.name)}</b>:<br>"
            f"PSNR <b>{outcome.psnr:.2f} dB</b> (peak: the reference's range)<br>"
            f"SSIM <b>{outcome.ssim:.4f}</b><br>RMSE {outcome.rmse:.4g}{covered}"
        )
        if not self.difference.value:
            return
        data = np.abs(outcome.difference).max(axis=-1) if reference.rgb else outcome.difference
        limit = float(np.percentile(np.abs(data), 99.5)) or 1.0
        if self._live is None:
            self._live = LiveLayers(self.viewer)
        self._live.show(
            [
                (
                    data,
                    {
                        "name": f"{other.name} - {reference.name}",
                        "colormap": "inferno" if reference.rgb else "PiYG",
                        "contrast_limits": (0.0, limit) if reference.rgb else (-limit, limit),
                        "visible": not self.side_button.isChecked(),
                        "units": reference.units,
                        "axis_labels": reference.axis_labels,
                        "metadata": {
                            METADATA_KEY: {
                                "kind": "difference",
                                "compared": other.name,
                                "reference": reference.name,
                                "psnr": outcome.psnr,
                                "ssim": outcome.ssim,
                                "rmse": outcome.rmse,
                                "overlap": outcome.overlap,
                            }
                        },
                        **placement(reference.affine),
                    },
                    "image",
                )
            ]
        )


def _is_result(layer: Any) -> bool:
    """Whether a layer is a volume that this plugin made, and no extra layer such as its uncertainty."""
    report = layer.metadata.get(METADATA_KEY)
    return isinstance(report, dict) and "kind" not in report


def _safely(
    number: int, view: LayerView, reference: LayerView
) -> tuple[int, Comparison | str, LayerView, LayerView]:
    """Run in a worker: what goes wrong comes back as a sentence."""
    return number, attempt(compare_views, view, reference), view, reference
