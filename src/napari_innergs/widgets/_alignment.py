"""The part of a dock that lays photographs onto X-rays: one scene, automatic alignment, landmarks, ties."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from magicgui.widgets import ComboBox
from napari.layers import Points
from numpy.typing import NDArray
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QWidget

from napari_innergs.fit.engine import Done, Event, Failed, Progress, background
from napari_innergs.layers.photographs import (
    landmark_layers,
    moved_points,
    rough_transform,
    scene_layers,
    surface_layer,
)
from napari_innergs.layers.write import METADATA_KEY
from napari_innergs.photographs import Photographs
from napari_innergs.widgets._form import column, push_button, stack
from napari_innergs.widgets._job import JobWidget, buttons, wrapped_label
from napari_innergs.widgets._run_panel import complain

FloatArray = NDArray[np.float64]

DURING_RUN, SHOWN = "found in the run", "the pose shown"
# Sparse points that are enough for the alignment; otherwise Gaussians are fitted to the photographs first.
SPARSE = 200
# Poses that fit alike and are refined on silhouettes.
_REFINED = 6
# Size of landmarks, in median distances of the surface from its middle.
_LANDMARK = 0.12


@dataclass(frozen=True)
class Worlds:
    """What is laid onto each other.

    Attributes
    ----------
    photographs : Photographs
        In their own world.
    surface, normals : ndarray (m, 3)
        Of the X-rays' volume, in its world.
    rough : ndarray (4, 4)
        A similarity for a first look.
    units : tuple of 3 str
        Of the X-rays' world.
    """

    photographs: Photographs
    surface: FloatArray
    normals: FloatArray
    rough: FloatArray
    units: tuple[str, ...]


def worlds_of(job: Any, progress: Progress) -> Generator[Event, None, Worlds]:
    """Find the surface of the X-rays, for projections in a filtered backprojection."""
    from napari_innergs.fit.align import surface_of_volume
    from napari_innergs.tasks.projections import interruptible

    progress.enter("reading the layers", 0.05)
    photographs, (scan, volume) = yield from background([job.photographs, job.xrays], progress)
    if volume is None:
        from napari_innergs.baselines.fdk import fdk
        from napari_innergs.baselines.preprocess import scan_line_integrals

        progress.enter("a first volume", 0.3)
        (integrals,) = yield from background([partial(scan_line_integrals, scan)], progress)
        volume = yield from interruptible(
            lambda step: fdk(integrals.projections, scan.geometry, job.grid, step=step), progress
        )
    progress.enter("surface of the X-rays", 0.4)
    surface, normals = yield from interruptible(
        lambda step: surface_of_volume(np.maximum(volume, 0), job.grid, step=step), progress
    )
    (rough,) = yield from background([partial(rough_transform, photographs, surface)], progress)
    return Worlds(photographs, surface, normals, rough, tuple(job.grid.units or ("pixel",) * 3))


def run_scene(job: Any) -> Generator[Event, None, None]:
    """Prepare the scene; `Done` carries `Worlds`."""
    yield Done((yield from worlds_of(job, Progress())))


def run_alignment(job: Any, worlds: Worlds | None) -> Generator[Event, None, None]:
    """Find the similarity between both worlds; `Done` carries `Worlds` and an `Alignment`."""
    from napari_innergs.fit.align import Candidate, align_surfaces, refine_on_silhouettes
    from napari_innergs.fit.photos import object_points
    from napari_innergs.tasks.projections import interruptible

    progress = Progress()
    try:
        if worlds is None:
            worlds = yield from worlds_of(job, progress)
        photographs = worlds.photographs
        points = object_points(photographs)
        if len(points) < SPARSE:
            points = yield from _fitted_points(job, photographs, progress)
        source, surface, normals = points, worlds.surface, worlds.normals
        progress.enter("alignment", 0.85)
        found = yield from interruptible(
            lambda step: align_surfaces(source, surface, normals, step=step), progress
        )
        masks = photographs.masks
        if found.matched and job.config.silhouettes and masks is not None:
            refined, best = [], found
            for number, one in enumerate(found.candidates[:_REFINED]):
                progress.enter("silhouettes", 0.85 + 0.15 * (number + 1) / _REFINED)
                before = replace(found, transform=one.transform, score=one.score)
                after = yield from interruptible(
                    lambda step, before=before: refine_on_silhouettes(  # type: ignore[misc]
                        before, masks, photographs.cameras, surface, normals, step=step
                    ),
                    progress,
                )
                refined.append(Candidate(after.transform, one.score))
                best = after if number == 0 else best
            # rms stays that of the surfaces: that of outlines is in pixels
            found = replace(best, rms=found.rms, candidates=tuple(refined))
        yield Done((worlds, found))
    except Exception as error:
        yield Failed(error)


def _fitted_points(
    job: Any, photographs: Photographs, progress: Progress
) -> Generator[Event, None, FloatArray]:
    """Fit Gaussians to photographs that came without points, and take their centres."""
    from napari_innergs.fit.photos import fit_photographs, object_frame, start_splats, surface_centres

    config = job.config

    def start() -> Any:
        frame = object_frame(photographs)
        framed = photographs.moved(frame)
        return frame, framed, start_splats(framed, 0, most=config.max_splats, seed=job.seed)

    progress.enter("points of the photographs", 0.75)
    ((frame, framed, field),) = yield from background([start], progress)
    steps = fit_photographs(field, framed, config.photo_steps, most=config.max_splats, seed=job.seed)
    for done, _ in steps:
        yield progress.step(done / config.photo_steps)
    return moved_points(surface_centres(field, framed), np.linalg.inv(frame))


class AlignmentForm(QWidget):
    """The scene of both worlds, and what turns and shifts one of them.

    Parameters
    ----------
    owner : JobWidget
        In whose run panel the work is done, and whose job says what is laid onto each other.
    """

    changed = Signal()

    def __init__(self, owner: JobWidget) -> None:
        super().__init__()
        self._owner, self._viewer = owner, owner.viewer
        self._key: Any = None
        self._worlds: Worlds | None = None
        self._name = ""
        self._drawn: list[Any] = []
        self._marked: list[Any] = []
        self.found: Any = None
        #: Photographs' world to X-rays' world, as the scene shows it; None without a scene.
        self.transform: FloatArray | None = None
        #: Pairs that the pose shown was made of, if it was.
        self.pairs: tuple[FloatArray, FloatArray] | None = None
        self.scene_button = push_button(
            "Show scene",
            "Cameras, sparse points and the surface of the X-rays in one 3D scene; before an alignment the "
            "photographs' world is only scaled and shifted.",
        )
        self.align_button = push_button(
            "Align", "Lay the photographs onto the surface of the X-rays, without a first guess."
        )
        self.pair_button = push_button(
            "Add pair",
            "Make a landmark of the points selected in the photographs' points, and its partner of those selected in "
            "the surface: in 3D, with the layers' selection tool.",
        )
        self.landmark_button = push_button(
            "Align by landmarks",
            "Lay the landmarks of the photographs onto those of the X-rays: three pairs or more.",
        )
        self.accept_button = push_button("Accept", "Run with the pose that the scene shows.")
        self.pose = ComboBox(
            label="Pose",
            choices=self._pose_choices,
            tooltip="Poses that cannot be told apart by their surfaces, with their scores; the scene follows.",
        )
        self.use = ComboBox(
            label="Run with",
            choices=[DURING_RUN, SHOWN],
            tooltip="Let the run find the pose on its own volume, or take the pose that the scene shows.",
        )
        self.of_photographs = ComboBox(
            label="Photo marks",
            choices=self._points_choices,
            nullable=True,
            tooltip="Points layer with places on the photographs' points, in the scene.",
        )
        self.of_xrays = ComboBox(
            label="X-ray marks",
            choices=self._points_choices,
            nullable=True,
            tooltip="Points layer with the same places on the X-rays, in the same order.",
        )
        self.verdict = wrapped_label()
        self.verdict.setVisible(False)
        self.container = column([self.pose, self.use])
        self.marks = column([self.of_photographs, self.of_xrays])
        stack(
            self,
            buttons(self.scene_button, self.align_button),
            self.verdict,
            self.container.native,
            self.accept_button,
            self.marks.native,
            buttons(self.pair_button, self.landmark_button),
        )
        self.scene_button.clicked.connect(lambda: self.show_scene())
        self.align_button.clicked.connect(lambda: self.align())
        self.accept_button.clicked.connect(lambda: setattr(self.use, "value", SHOWN))
        self.pair_button.clicked.connect(lambda: self.add_pair())
        self.landmark_button.clicked.connect(lambda: self.align_by_landmarks())
        self.pose.changed.connect(self._on_pose)
        self.use.changed.connect(lambda *_: self.changed.emit())
        self.pose.visible = False
        self.allow(True)

    # -- choices ---------------------------------------------------------------------------------------------

    def _pose_choices(self, *_: Any) -> list[tuple[str, int]]:
        found = self.found
        if found is None:
            return []
        return [
            (f"{number + 1}: score {one.score:.3f}", number) for number, one in enumerate(found.candidates)
        ]

    def _points_choices(self, *_: Any) -> list[tuple[str, Any]]:
        layers = [
            layer
            for layer in self._viewer.layers
            if isinstance(layer, Points) and layer.ndim == 3 and layer not in self._drawn
        ]
        return [(layer.name, layer) for layer in layers]

    def refresh(self) -> None:
        """Offer the viewer's layers of points."""
        self.of_photographs.reset_choices()
        self.of_xrays.reset_choices()

    def allow(self, allowed: bool) -> None:
        """Enable the buttons."""
        shown = self.transform is not None
        for button in (self.scene_button, self.align_button):
            button.setEnabled(allowed)
        for button in (self.pair_button, self.landmark_button):
            button.setEnabled(allowed and shown)
        # the scene alone lays one object roughly on the other
        self.accept_button.setEnabled(allowed and self.found is not None)

    def forget(self) -> None:
        """Another object: its pose is not known."""
        self._key = self._worlds = self.found = self.transform = self.pairs = None
        self.pose.reset_choices()
        self.pose.visible = False
        self.use.value = DURING_RUN
        self.say("")
        self.allow(not self._owner.panel.is_running)

    def say(self, text: str) -> None:
        """Show what was found."""
        self.verdict.setText(text)
        self.verdict.setVisible(bool(text))

    def chosen(self) -> dict[str, Any]:
        """Return what a run is told: nothing, a transform, or landmarks."""
        if self.use.value == DURING_RUN:
            return {}
        if self.transform is None:
            raise ValueError("alignment: there is no pose yet; press 'Align', or let the run find it.")
        return {"transform": self.transform} if self.pairs is None else {"landmarks": self.pairs}

    # -- the scene -------------------------------------------------------------------------------------------

    def _start(self, make: Callable[..., Any], take: Callable[..., None], *, reuse: bool) -> None:
        try:
            job = self._owner.job()
        except (ValueError, TypeError) as error:
            complain(str(error))
            return
        key = job.scene_key()
        worlds = self._worlds if key == self._key else None
        self._name = job.view.name

        def answer(product: Any) -> None:
            if key != self._key:
                self.transform = self.pairs = self.found = None
            self._key = key
            take(product)

        work = partial(make, job, worlds) if reuse else partial(make, job)
        self._owner.run_aside(work, answer)

    def show_scene(self) -> None:
        """Draw both worlds, in the run panel."""
        self._start(run_scene, self._take_scene, reuse=False)

    def align(self) -> None:
        """Find the pose, in the run panel."""
        self._start(run_alignment, self._take_alignment, reuse=True)

    def _take_scene(self, worlds: Worlds) -> None:
        self._worlds = worlds
        self._show(worlds.rough if self.transform is None else self.transform)

    def _take_alignment(self, product: tuple[Worlds, Any]) -> None:
        self._worlds, found = product
        self.pairs = None
        self._take_pose(found)

    def _take_pose(self, found: Any) -> None:
        self.found = found
        with self.pose.changed.blocked():
            self.pose.reset_choices()
        self.pose.visible = len(found.candidates) > 1
        self.say(describe_alignment(found, self._worlds))
        self._show(found.transform)
        self.use.value = DURING_RUN if not found.matched else SHOWN

    def _on_pose(self, number: int | None) -> None:
        if self.found is None or number is None:
            return
        self._show(self.found.candidates[number].transform)
        self.changed.emit()

    def _show(self, transform: FloatArray) -> None:
        """Draw the scene with a pose; landmarks of the photographs go along."""
        worlds = self._worlds
        assert worlds is not None
        before, self.transform = self.transform, np.asarray(transform, np.float64)
        fresh = not self._here(self._drawn)
        tuples = scene_layers(worlds.photographs, self.transform, self._name, worlds.units)
        tuples.insert(1, surface_layer(worlds.surface, self._name, worlds.units))
        active = self._viewer.layers.selection.active
        layers = self._drawn = self._draw(self._drawn, tuples)
        marks = self._here(self._marked)
        if before is not None and len(marks) == 2:
            marks[0].data = moved_points(marks[0].data, self.transform @ np.linalg.inv(before))
        if fresh:
            for layer in self._viewer.layers:
                layer.visible = layer in layers or layer in marks
            self._viewer.dims.ndisplay = 3
            self._viewer.reset_view()
        elif active is not None and active in self._viewer.layers:
            self._viewer.layers.selection.active = active
        self.allow(not self._owner.panel.is_running)
        self.changed.emit()

    def _here(self, layers: list[Any]) -> list[Any]:
        return [layer for layer in layers if layer in self._viewer.layers]

    def _draw(self, old: list[Any], tuples: list[Any]) -> list[Any]:
        """Give layers that are all still there new places; make them anew otherwise."""
        here = self._here(old)
        if len(here) == len(tuples) and all(
            layer.name == kwargs["name"] for layer, (_, kwargs, _) in zip(here, tuples, strict=True)
        ):
            for layer, (data, _, _) in zip(here, tuples, strict=True):
                layer.data = data
            return here
        for layer in here:
            self._viewer.layers.remove(layer)
        return [getattr(self._viewer, f"add_{kind}")(data, **kwargs) for data, kwargs, kind in tuples]

    def part(self, what: str) -> Any:
        """Return a layer of the scene by what it shows, None if it is gone or was never there."""
        kinds = {layer.metadata.get(METADATA_KEY, {}).get("kind"): layer for layer in self._here(self._drawn)}
        return kinds.get(what)

    # -- landmarks -------------------------------------------------------------------------------------------

    def add_pair(self) -> None:
        """Make a pair of landmarks of what is selected in the scene."""
        cloud, surface = self.part("photo points"), self.part("surface of the X-rays")
        try:
            places = []
            for layer, what in ((cloud, "photographs' points"), (surface, "surface of the X-rays")):
                if layer is None or not len(layer.selected_data):
                    raise ValueError(
                        f"landmarks: select a point of the {what} in the scene first, and one of the other layer."
                    )
                places.append(np.asarray(layer.data)[sorted(layer.selected_data)].mean(axis=0))
        except ValueError as error:
            complain(str(error))
            return
        marks = self._here(self._marked)
        known = [np.asarray(layer.data) for layer in marks] if len(marks) == 2 else [np.zeros((0, 3))] * 2
        pairs = [np.concatenate([old, new[None]]) for old, new in zip(known, places, strict=True)]
        assert self._worlds is not None
        middle = np.median(self._worlds.surface, axis=0)
        size = _LANDMARK * float(np.median(np.linalg.norm(self._worlds.surface - middle, axis=1)))
        active = self._viewer.layers.selection.active
        self._marked = self._draw(
            self._marked, landmark_layers(pairs[0], pairs[1], size, self._name, self._worlds.units)
        )
        self.refresh()
        self.of_photographs.value, self.of_xrays.value = self._marked
        for layer in (cloud, surface):
            layer.selected_data = set()
        self._viewer.layers.selection.active = active
        self.say(f"{len(pairs[0])} pairs of landmarks.")

    def align_by_landmarks(self) -> None:
        """Lay the landmarks onto each other."""
        from napari_innergs.fit.align import align_landmarks

        mine, theirs = self.of_photographs.value, self.of_xrays.value
        try:
            if mine is None or theirs is None:
                raise ValueError(
                    "landmarks: choose a layer of points for the photographs and one for the X-rays."
                )
            if self.transform is None:
                raise ValueError("landmarks: show the scene first; its places are told from it.")
            seen, target = (
                np.array([layer.data_to_world(point) for point in np.asarray(layer.data)])[:, -3:].reshape(
                    -1, 3
                )
                if len(layer.data)
                else np.zeros((0, 3))
                for layer in (mine, theirs)
            )
            source = moved_points(seen, np.linalg.inv(self.transform))
            found = align_landmarks(source, target)
        except ValueError as error:
            complain(str(error))
            return
        self.pairs = (source, target)
        self._take_pose(found)


def describe_alignment(found: Any, worlds: Worlds | None = None) -> str:
    """Say what an alignment found, in a few sentences."""
    unit = "" if worlds is None else {"um": "µm", "pixel": "px"}.get(worlds.units[0], worlds.units[0])

    def number(value: float) -> str:
        return f"{value:.3g}"

    reason = found.reason.rstrip(".")
    if not found.matched:
        why = reason.removeprefix("no match").lstrip(":, ") or "the surfaces differ"
        return f"No match (score {found.score:.3f}): {why}. The scene shows the best of bad poses."
    parts = [f"Score {found.score:.3f}, rms {number(found.rms)} {unit}, scale {number(found.scale)}."]
    errors = []
    for value, text in (
        (found.rotation_error, "rotation {}°"),
        (100 * found.scale_error, "scale {} %"),
        (found.shift_error, f"place {{}} {unit}"),
    ):
        if np.isfinite(value):
            errors.append(text.format(number(value)))
    if errors:
        parts.append(f"Estimated errors: {', '.join(errors)}.")
    if found.residuals is not None:
        parts.append(f"Landmarks: {', '.join(number(one) for one in found.residuals)} {unit} apart.")
    if len(found.candidates) > 1:
        parts.append(f"{len(found.candidates)} poses fit alike: look at each, and accept one.")
    if reason:
        parts.append(f"{reason[:1].upper()}{reason[1:]}.")
    return " ".join(parts)
