"""The list of stacks in the "Slices to volume" widget: a row for each layer with its slice profile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakMethod

import numpy as np
from magicgui.widgets import ComboBox, FloatSpinBox
from napari.layers import Image
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QGridLayout, QHBoxLayout, QLabel, QPushButton, QToolButton, QVBoxLayout, QWidget

from napari_innergs.data import PROFILES
from napari_innergs.layers.planes import STACK_COLORS, orientation
from napari_innergs.layers.read import METADATA_KEY, LayerView, Region, Source, guess_first_axis, profile_of
from napari_innergs.widgets._qt import when_destroyed

# What changes where a layer's slices are.
_PLACE = ("scale", "translate", "rotate", "shear", "affine", "units")
# Slices this many times as far apart as their pixels are taken to touch when several stacks are given.
_APART = 1.5


class StackRow(QWidget):
    """One stack: its layer, the axis that counts the slices, and their profile.

    Parameters
    ----------
    choices : callable
        Returns (name, layer) of the layers to choose from.

    Notes
    -----
    Signals: `changed()` after any change, `layer_changed()` before it when another layer was chosen, and
    `remove()` when the button was pressed.
    """

    changed = Signal()
    layer_changed = Signal()
    remove = Signal()

    def __init__(self, choices: Callable[..., list[tuple[str, Any]]]) -> None:
        super().__init__()
        self._alone = True
        # what the box was last filled with: a thickness that differs from it is the user's own
        self._filled = 0.0
        self._watched: list[tuple[Any, Callable[..., None]]] = []
        when_destroyed(self, partial(_unwatch, self._watched))
        self.layer = ComboBox(
            choices=choices,
            nullable=False,
            tooltip="Image layer with the slices; its full world transform is used. Labels layers are not "
            "offered: their numbers must not be blended.",
        )
        self.axis = ComboBox(choices=[0, 1, 2], tooltip="The axis that counts the slices (the sparse one).")
        self.thickness = FloatSpinBox(
            value=0.0,
            min=0.0,
            max=1e6,
            step=0.5,
            tooltip="Width of a slice in world units: full width of a box, full width at half maximum of a "
            "Gaussian. Thin: pixels are values in the plane of the slice.",
        )
        self.thickness.native.setSpecialValueText("thin")
        self.profile = ComboBox(
            choices=PROFILES,
            tooltip="How a slice weighs what lies across it. box: a plain mean over the thickness; gaussian: "
            "most in the middle, as in MRI and optical sections.",
        )
        self.info = QLabel()
        self.remove_button = QToolButton()
        self.remove_button.setText("✕")
        self.remove_button.setToolTip("Remove this stack from the list; its layer stays.")
        self.remove_button.setAccessibleName("Remove stack")
        self.labels = [QLabel(text) for text in ("Layer", "Slice axis", "Thickness")]

        grid = QGridLayout(self)
        grid.setContentsMargins(0, 0, 0, 0)
        grid.setVerticalSpacing(2)
        grid.setColumnStretch(1, 1)
        fields = (
            (self.layer.native, self.remove_button, (1, 0)),
            (self.axis.native, self.info, (2, 3)),
            (self.thickness.native, self.profile.native, (3, 2)),
        )
        for number, (label, (left, right, shares)) in enumerate(zip(self.labels, fields, strict=True)):
            pair = QHBoxLayout()
            for widget, share in zip((left, right), shares, strict=True):
                pair.addWidget(widget, share)
            grid.addWidget(label, number, 0)
            grid.addLayout(pair, number, 1)

        self.layer.changed.connect(self._on_layer)
        self.axis.changed.connect(self._on_place)
        self.thickness.changed.connect(lambda *_: self.changed.emit())
        self.profile.changed.connect(lambda *_: self.changed.emit())
        self.remove_button.clicked.connect(self.remove)

    def place(self, number: int, alone: bool, color: str) -> None:
        """Show the row as the only one or as one of several, with the colour of its planes."""
        self.labels[0].setText("Layer" if alone else f"Stack {number + 1}")
        self.labels[0].setStyleSheet("" if alone else f"color: {color}; font-weight: bold")
        self.remove_button.setVisible(not alone)
        if alone != self._alone:
            self._alone = alone
            self._fill_thickness()

    def source(self, **options: Any) -> Source:
        """Return what the row says as a source, with the options of `Source`."""
        options.setdefault("views", (LayerView.of(self.layer.value),))
        return Source(
            axis=int(self.axis.value),
            thickness=float(self.thickness.value),
            profile=str(self.profile.value),
            **options,
        )

    def refresh(self) -> None:
        """Take over names and places of layers that may have changed."""
        self.layer.reset_choices()
        self._show_info()

    def _on_layer(self, *_: Any) -> None:
        layer = self.layer.value
        if layer is not None and layer.ndim >= 3:
            labels = layer.axis_labels[-3:]
            steps = np.asarray(layer.scale)[-3:]
            longest = int(np.argmax(steps))
            with self.axis.changed.blocked():
                self.axis.choices = [
                    (f"{number}: {label}" if not label.startswith("-") else str(number), number)
                    for number, label in enumerate(labels)
                ]
                self.axis.value = longest if steps[longest] > 1.05 * np.median(steps) else 0
            with self.profile.changed.blocked():
                self.profile.value = profile_of(layer)[1]
            self._fill_thickness(anew=True)
        self._watch(layer)
        self._show_info()
        self.layer_changed.emit()
        self.changed.emit()

    def _watch(self, layer: Any) -> None:
        """Follow the layer when it is moved or scaled."""
        _unwatch(self._watched)
        method = WeakMethod(self._on_place)

        def tell(event: Any = None) -> None:
            alive = method()
            if alive is not None:
                alive()

        for name in _PLACE if layer is not None else ():
            emitter = getattr(layer.events, name)
            emitter.connect(tell)
            self._watched.append((emitter, tell))

    def _on_place(self, *_: Any) -> None:
        self._fill_thickness()
        self._show_info()
        self.changed.emit()

    def _fill_thickness(self, anew: bool = False) -> None:
        """Fill in the thickness, unless the user has changed it."""
        layer = self.layer.value
        if layer is None or not (anew or abs(self.thickness.value - self._filled) < 1e-6):
            return
        value = profile_of(layer)[0]
        facts = self._facts()
        if facts is not None:
            spacing, pixel = facts[1], facts[2]
            self.thickness.step = float(f"{pixel / 2:.1g}")
            self.thickness.native.setDecimals(max(2, 2 - int(np.floor(np.log10(pixel) + 1e-6))))
            if not value and not self._alone and spacing > _APART * pixel:
                # as in most clinical protocols: slices of a stack touch
                value = spacing
        with self.thickness.changed.blocked():
            self.thickness.value = value
        self._filled = float(self.thickness.value)

    def _facts(self) -> tuple[np.ndarray, float, float, str] | None:
        """Return normal, distance of slices, pixel size and unit; None where the layer holds no slices."""
        layer = self.layer.value
        if layer is None:
            return None
        # a corner of the layer is enough
        corner = Region((slice(0, 2), slice(0, 2), slice(0, 2)))
        try:
            source = Source((LayerView.of(layer),), int(self.axis.value), region=corner)
            if source.view.ndim == 4:
                source = Source(source.views, source.axis, 1, corner, guess_first_axis(layer), 0)
            stack = source.stack(source.time_points[0], blank=True)
        except (ValueError, TypeError):
            return None
        unit = stack.units[-1] if stack.units else ""
        return stack.normal, stack.spacing, float(np.mean(stack.pixel_size)), unit

    def _show_info(self) -> None:
        facts = self._facts()
        if facts is None:
            self.info.setText("")
            return
        normal, spacing, _, unit = facts
        unit = {"um": "µm", "pixel": "px"}.get(unit, unit)
        view = LayerView.of(self.layer.value)
        count = view.shape[-3:][int(self.axis.value)]
        self.info.setText(f"{orientation(normal)}, {count} × {spacing:.4g} {unit}")
        self.info.setToolTip(f"Orientation, number of slices and distance between them: {self.info.text()}.")
        self.thickness.native.setSuffix(f" {unit}")


class StackList(QWidget):
    """Rows of stacks with buttons to add one and to show the slice planes.

    Parameters
    ----------
    viewer : napari.Viewer
        Whose Image layers are offered.

    Notes
    -----
    Signals: `changed()` after any change, `first_changed()` before it when the first row has another layer, and
    `planes()` when planes are asked for.
    """

    changed = Signal()
    first_changed = Signal()
    planes = Signal()

    def __init__(self, viewer: Any) -> None:
        super().__init__()
        self.viewer = viewer
        self.rows: list[StackRow] = []
        self._label_width = 0
        self.add_button = QPushButton("Add stack")
        self.add_button.setToolTip(
            "Another layer that shows the same object, in any direction: all are put together in one volume."
        )
        self.planes_button = QPushButton("Show planes")
        self.planes_button.setToolTip("Draw the outlines of all slices in a layer, in 3D.")
        self.add_button.clicked.connect(lambda: self.add())
        self.planes_button.clicked.connect(self.planes)
        outer = QVBoxLayout(self)
        outer.setContentsMargins(0, 0, 0, 0)
        self._layout = QVBoxLayout()
        outer.addLayout(self._layout)
        buttons = QHBoxLayout()
        buttons.addWidget(self.add_button)
        buttons.addWidget(self.planes_button)
        outer.addLayout(buttons)
        self.add(self.likely())

    @property
    def several(self) -> bool:
        """Whether there is more than one stack."""
        return len(self.rows) > 1

    def images(self, *_: Any) -> list[tuple[str, Any]]:
        """Return names and layers of the viewer's images."""
        return [(layer.name, layer) for layer in self.viewer.layers if isinstance(layer, Image)]

    def likely(self) -> Any:
        """Return the active image, else the topmost visible one, else the topmost; None without any."""
        images = [layer for _, layer in self.images()]
        active = self.viewer.layers.selection.active
        if active in images:
            return active
        return next((layer for layer in reversed(images) if layer.visible), images[-1] if images else None)

    def add(self, layer: Any = None) -> StackRow:
        """Add a row; without a layer, with the first visible image that is in no row and no result."""
        row = StackRow(self.images)
        if layer is None and self.rows:
            free = self._free()
            layer = next((one for one in free if one.visible), free[0] if free else None)
        if layer is not None:
            row.layer.value = layer
        row.changed.connect(self.changed)
        row.layer_changed.connect(lambda: self._on_layer(row))
        row.remove.connect(lambda: self.remove(row))
        self.rows.append(row)
        self._layout.addWidget(row)
        row._on_layer()
        self._number()
        return row

    def remove(self, row: StackRow) -> None:
        """Take a row away; the last one stays."""
        if not self.several:
            return
        first = row is self.rows[0]
        self.rows.remove(row)
        self._layout.removeWidget(row)
        row.hide()
        row._watch(None)
        row.deleteLater()
        self._number()
        if first:
            self.first_changed.emit()
        self.changed.emit()

    def refresh(self) -> None:
        """Follow the viewer: rows of deleted layers go, new layers can be chosen."""
        for row in [row for row in self.rows if row.layer.value not in self.viewer.layers]:
            self.remove(row)
        for row in self.rows:
            before = row.layer.value
            row.refresh()
            if row.layer.value is not None and row.layer.value is not before:
                row.layer.value = self.likely()
        self._number()

    def align(self, width: int) -> None:
        """Give the labels of all rows a width."""
        self._label_width = width
        for row in self.rows:
            for label in row.labels:
                label.setMinimumWidth(width)

    def _free(self) -> list[Any]:
        used = [row.layer.value for row in self.rows]
        return [
            layer
            for _, layer in self.images()
            if layer not in used and not is_result(layer) and layer.ndim >= 3
        ]

    def _number(self) -> None:
        for number, row in enumerate(self.rows):
            row.place(number, not self.several, STACK_COLORS[number % len(STACK_COLORS)])
        self.align(self._label_width)
        self.add_button.setEnabled(bool(self._free()))
        self.planes_button.setEnabled(self.rows[0].layer.value is not None)

    def _on_layer(self, row: StackRow) -> None:
        self._number()
        if row is self.rows[0]:
            self.first_changed.emit()


def _unwatch(watched: list[tuple[Any, Callable[..., None]]]) -> None:
    for emitter, tell in watched:
        emitter.disconnect(tell)
    watched.clear()


def is_result(layer: Any) -> bool:
    """Whether a layer was made by a job of ours, and not only described by our metadata."""
    own = layer.metadata.get(METADATA_KEY)
    return own is not None and not (isinstance(own, dict) and "thickness" in own)
