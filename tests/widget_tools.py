"""What the tests of the dock widgets share; needs Qt and napari."""

import time

from napari_innergs.fit.engine import Preview, Step

#: Nothing may hold the user interface, or a press on a button, up for longer.
PROMPT_S = 0.5


def collect_dialogs(monkeypatch, *modules):
    """Return the list of what would be shown to the user."""
    shown = []
    for module in ("_run_panel", *modules):
        monkeypatch.setattr(f"napari_innergs.widgets.{module}.show_error", shown.append)
    return shown


def quiet(qtbot):
    """Wait until no worker is left."""
    from superqt.utils._qthreading import WorkerBase

    qtbot.waitUntil(lambda: not any(worker.is_running for worker in WorkerBase._worker_set), timeout=20000)
    qtbot.wait(50)


def docks(make_napari_viewer, qtbot, kind, title):
    """Yield a function that docks a widget on some layers; its workers have ended when the test ends."""
    made = []

    def make(*tuples, show=False):
        viewer = make_napari_viewer(show=show)
        viewer.window.resize(1200, 1000)
        for data, kwargs, layer in tuples:
            getattr(viewer, f"add_{layer}")(data, **kwargs)
        widget = kind(viewer)
        viewer.window.add_dock_widget(widget, name=title)
        made.append(widget)
        return widget

    yield make
    for widget in made:
        widget.panel.cancel()
    quiet(qtbot)


def run_to_end(widget, qtbot, start=None, timeout=120000):
    """Press Run, or start something else in the panel, and wait until it is done."""
    with qtbot.waitSignal(widget.panel.finished, timeout=timeout):
        (start or widget.panel.run_button.click)()


def fake_steps(volume, grid, steps, seconds=0.02):
    """Yield the events of an engine that takes its time: the volume grows to what it is."""
    for step in range(steps):
        time.sleep(seconds)
        yield Step("fitting", step / steps, step + 1, steps, 1.0)
        if step % 4 == 1:
            yield Preview(volume * (step + 1) / steps, grid, f"step {step}")
