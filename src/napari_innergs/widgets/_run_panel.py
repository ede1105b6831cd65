"""Run, pause, cancel and watch any generator of engine events.

The job runs in a napari worker thread and only *puts* events; a timer in the main thread *takes* them. So a
fast job cannot flood the window, a preview that was overtaken before it could be painted is never painted,
and nothing but the timer touches widgets.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from napari.qt.threading import GeneratorWorker, create_worker
from napari.utils.notifications import show_error
from qtpy.QtCore import Qt, QTimer, Signal
from qtpy.QtWidgets import QHBoxLayout, QLabel, QProgressBar, QPushButton, QVBoxLayout, QWidget

from napari_innergs.fit.engine import Done, Event, Failed, Preview, Step
from napari_innergs.widgets._qt import when_destroyed

POLL_MS = 50
PREVIEW_S = 0.5
CURVE_S = 0.4
WARM_UP_MS = 300

Job = Callable[[], Generator[Event, None, None]]


class _Mailbox:
    """What a job has said and nobody has looked at yet; the newest preview replaces older ones."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._steps: deque[Step] = deque()
        self._preview: Preview | None = None
        self.end: Done | Failed | None = None
        self.events: Generator[Event, None, None] | None = None

    def deliver(self) -> Generator[None, None, None]:
        """Run the job; yields after each event so that the worker can pause or quit there. Never raises."""
        try:
            self.events = self._job()
            yield
            for event in self.events:
                self.put(event)
                yield
            if self.end is None:
                self.put(Failed(RuntimeError("the job ended without a result")))
        except Exception as error:
            self.put(Failed(error))

    def put(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Step):
                self._steps.append(event)
            elif isinstance(event, Preview):
                self._preview = event
            else:
                self.end = event

    def take_steps(self) -> list[Step]:
        with self._lock:
            steps = list(self._steps)
            self._steps.clear()
        return steps

    def take_preview(self) -> Preview | None:
        with self._lock:
            preview, self._preview = self._preview, None
        return preview

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


class _Worker(GeneratorWorker):
    """Closes the job's generator in the thread that ran it, at once and not when it is collected."""

    mailbox: _Mailbox

    def work(self) -> Any:
        try:
            return super().work()
        finally:
            try:
                self.mailbox.close()
            except Exception as error:  # a generator that fails while it is being closed
                self.mailbox.put(Failed(error))


class _Running:
    """The job in progress; not a Qt object, so that it can still be stopped while its panel is destroyed."""

    def __init__(self) -> None:
        self.worker: Any = None

    def stop(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.quit()


class RunPanel(QWidget):
    """Buttons, progress, curves and status of one job at a time.

    Parameters
    ----------
    prepare : callable
        Called in the main thread when Run is pressed; returns a function that is called in the worker thread
        and returns a generator of `Step`, `Preview` and finally `Done` or `Failed`. A ValueError or TypeError
        from it is shown to the user as one sentence and nothing starts.

    Notes
    -----
    Signals: `started()`, `preview(Preview)` at most twice a second, and one of `finished(result)`,
    `stopped(last Preview or None)`, `failed(Failed)`.
    """

    started = Signal()
    preview = Signal(object)
    finished = Signal(object)
    stopped = Signal(object)
    failed = Signal(object)

    def __init__(self, prepare: Callable[[], Job], parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._prepare = prepare
        self._mailbox: _Mailbox | None = None
        self._running = _Running()
        self._paused_at: float | None = None
        self.last_preview: Preview | None = None

        self.run_button = QPushButton("Run")
        self.run_button.setToolTip("Start; while it runs: pause and resume.")
        self.cancel_button = QPushButton("Cancel")
        self.cancel_button.setToolTip("Stop and keep the best volume so far.")
        self.cancel_button.setEnabled(False)
        self.bar = QProgressBar()
        self.bar.setRange(0, 1000)
        self.bar.setTextVisible(True)
        self.bar.setFormat("")
        self.status = QLabel("Ready.")
        self.status.setWordWrap(True)
        self.status.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.rate = QLabel("")
        self.rate.setWordWrap(True)
        self.rate.setVisible(False)
        self._curves: Any = None

        buttons = QHBoxLayout()
        buttons.addWidget(self.run_button, 2)
        buttons.addWidget(self.cancel_button, 1)
        self._layout = QVBoxLayout(self)
        self._layout.setContentsMargins(0, 0, 0, 0)
        self._layout.addLayout(buttons)
        self._layout.addWidget(self.bar)
        self._layout.addWidget(self.status)
        self._layout.addWidget(self.rate)

        self._timer = QTimer(self)
        self._timer.setInterval(POLL_MS)
        self._timer.timeout.connect(self._poll)
        self._painted = self._once(0, self._preview_shown)
        self._warm_up = self._once(WARM_UP_MS, self.prepare_curves)
        self.run_button.clicked.connect(self._on_run)
        self.cancel_button.clicked.connect(self.cancel)
        # closing the dock or the viewer ends the job; `self` is gone by then, hence the helper
        when_destroyed(self, self._running.stop)

    def _once(self, milliseconds: int, slot: Callable[[], None]) -> QTimer:
        """Make a single-shot timer that dies with the panel."""
        timer = QTimer(self)
        timer.setSingleShot(True)
        timer.setInterval(milliseconds)
        timer.timeout.connect(slot)
        return timer

    def showEvent(self, event: Any) -> None:
        """Import the plotting library when the dock is on the screen: not before, and not during a job."""
        super().showEvent(event)
        if self._curves is None:
            self._warm_up.start()

    # -- state ---------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether a job is in progress (paused or not)."""
        return self._mailbox is not None

    @property
    def is_paused(self) -> bool:
        """Whether the job in progress is paused."""
        return self._paused_at is not None

    def _on_run(self) -> None:
        if not self.is_running:
            self.run()
        elif self.is_paused:
            self.resume()
        else:
            self.pause()

    def run(self) -> None:
        """Start the job that `prepare` describes; nothing happens while one is in progress."""
        if self.is_running:
            return
        try:
            job = self._prepare()
        except (ValueError, TypeError) as error:
            self.status.setText(_sentence(error))
            complain(_sentence(error))
            return
        self._mailbox = mailbox = _Mailbox(job)
        self.last_preview = None
        self._paused_at = None
        self._start = time.monotonic()
        self._paused_s = 0.0
        self._fraction = 0.0
        self._recent: deque[float] = deque(maxlen=200)
        self._loss: list[float] = []
        self._loss_phase = ""
        self._psnr: list[tuple[int, float]] = []
        self._next_preview = 0.0
        self._next_curve = 0.0
        self._show_running()
        worker = create_worker(mailbox.deliver, _start_thread=False, _worker_class=_Worker)
        worker.mailbox = mailbox
        worker.paused.connect(self._on_worker_paused)
        self._running.worker = worker
        worker.start()
        self._timer.start()
        self.started.emit()

    def pause(self) -> None:
        """Hold the job; it stops asking for work at its next event."""
        if not self.is_running or self.is_paused:
            return
        self._paused_at = time.monotonic()
        self._running.worker.pause()
        self.run_button.setText("Resume")
        self.status.setText("Paused.")
        self._show_rate("")

    def resume(self) -> None:
        """Go on with a paused job."""
        if self._paused_at is None:
            return
        self._paused_s += time.monotonic() - self._paused_at
        self._paused_at = None
        self._recent.clear()
        self._running.worker.resume()
        self.run_button.setText("Pause")
        self.status.setText("Running.")

    def _on_worker_paused(self) -> None:
        # resume() came before the worker had reached the event at which it pauses
        if self._running.worker is not None and not self.is_paused:
            self._running.worker.resume()

    def cancel(self) -> None:
        """Stop the job now; the last preview is kept."""
        if not self.is_running:
            return
        # what the job still says is not listened to, so the window is free at once
        self._running.stop()
        self._take_last_preview()
        best = self.last_preview
        self._end()
        kept = (
            f" Kept the best volume so far ({best.label or 'preview'})."
            if best
            else " There was no volume yet."
        )
        self.status.setText("Cancelled." + kept)
        self.stopped.emit(best)

    # -- the timer -----------------------------------------------------------------------------------------

    def _poll(self) -> None:
        mailbox = self._mailbox
        if mailbox is None:
            return
        end = mailbox.end  # before the steps, so that none is missed
        steps = mailbox.take_steps()
        if steps:
            self._show_steps(steps)
        now = time.monotonic()
        if end is not None:
            self._finish(end)
        elif now >= self._next_preview and not self.is_paused:
            preview = mailbox.take_preview()
            if preview is not None:
                self._show_preview(preview)

    def _show_preview(self, preview: Preview) -> None:
        begin = time.monotonic()
        self._next_preview = float("inf")
        self.last_preview = preview
        self.preview.emit(preview)
        # posted behind the paint: the next preview waits until this one is on the screen, and as long again
        self._preview_begin = begin
        self._painted.start()

    def _preview_shown(self) -> None:
        now = time.monotonic()
        self._next_preview = max(self._preview_begin + PREVIEW_S, 2 * now - self._preview_begin)

    def _take_last_preview(self) -> None:
        preview = self._mailbox.take_preview() if self._mailbox else None
        if preview is not None:
            self.last_preview = preview
            self.preview.emit(preview)

    def _finish(self, end: Done | Failed) -> None:
        seconds = self._active()
        if isinstance(end, Done):
            self._end()
            self.bar.setValue(1000)
            self.status.setText(f"Done in {_duration(seconds)}.")
            self.finished.emit(end.result)
            return
        self._take_last_preview()
        self._end()
        self.status.setText("Failed: " + _sentence(end.error))
        complain(_sentence(end.error))
        self.failed.emit(end)

    def _end(self) -> None:
        self._timer.stop()
        self._mailbox = None
        self._running.worker = None
        self._paused_at = None
        self.run_button.setText("Run")
        self.cancel_button.setEnabled(False)
        self.bar.setFormat("")
        self._show_rate("")
        self._show_curves(force=True)

    # -- what is shown -------------------------------------------------------------------------------------

    def _active(self) -> float:
        """Seconds of work, pauses left out."""
        held = time.monotonic() - self._paused_at if self._paused_at is not None else 0.0
        return time.monotonic() - self._start - self._paused_s - held

    def _show_rate(self, text: str) -> None:
        self.rate.setText(text)
        self.rate.setVisible(bool(text))

    def _show_running(self) -> None:
        self.run_button.setText("Pause")
        self.cancel_button.setEnabled(True)
        self.bar.setValue(0)
        self.bar.setFormat("starting")
        self.status.setText("Starting.")
        self._show_rate("")
        if self._curves is not None:
            self._curves.reset()
            # some jobs have no loss
            self._curves.setVisible(False)

    def _show_steps(self, steps: list[Step]) -> None:
        last = steps[-1]
        now = time.monotonic()
        for step in steps:
            if step.loss is not None:
                if step.phase != self._loss_phase and not self._psnr:
                    # losses of two phases can't be compared; what is held out is counted in steps of all
                    self._loss.clear()
                self._loss_phase = step.phase
                self._loss.append(step.loss)
                self._recent.append(now)
            if step.psnr_heldout is not None and (not self._psnr or self._psnr[-1][1] != step.psnr_heldout):
                self._psnr.append((len(self._loss), step.psnr_heldout))
        # an estimate may step back; a bar should not
        self._fraction = max(self._fraction, last.fraction)
        self.bar.setValue(round(1000 * self._fraction))
        active = self._active()
        eta = ""
        if self._fraction > 0.02 and active > 1.0:
            eta = f", {_duration(active * (1 - self._fraction) / self._fraction)} left"
        self.bar.setFormat(f"{100 * self._fraction:.0f} %{eta}")
        if self.is_paused:
            return
        text = last.phase[:1].upper() + last.phase[1:]
        if last.total:
            text += f", step {last.iteration} of {last.total}"
        self.status.setText(text + ".")
        facts = [_duration(active)]
        while self._recent and now - self._recent[0] > 3.0:
            self._recent.popleft()
        if len(self._recent) > 1 and self._recent[-1] > max(self._recent[0], now - 1.0):
            facts.append(f"{(len(self._recent) - 1) / (self._recent[-1] - self._recent[0]):.3g} steps/s")
        if last.loss is not None:
            facts.append(f"loss {last.loss:.3g}")
        if self._psnr:
            facts.append(f"held-out {self._psnr[-1][1]:.2f} dB")
        self._show_rate(" · ".join(facts))
        self._show_curves()

    def _show_curves(self, force: bool = False) -> None:
        now = time.monotonic()
        if not self._loss or (now < self._next_curve and not force):
            return
        if self._curves is None:
            self.prepare_curves()
        self._curves.setVisible(True)
        self._curves.show_values(self._loss, self._psnr)
        self._next_curve = now + CURVE_S

    def prepare_curves(self) -> None:
        """Make the plots; imports pyqtgraph, which takes about a second."""
        if self._curves is None:
            from napari_innergs.widgets._curves import Curves

            self._curves = Curves(self)
            self._curves.setVisible(False)
            self._layout.addWidget(self._curves)


def complain(text: str) -> None:
    """Show the user what is wrong, in one sentence."""
    show_error(text)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def _sentence(error: BaseException) -> str:
    """One sentence for people: the first line of the message, or the kind of error if there is none."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, MemoryError):
        text = f"not enough memory ({text}); choose a coarser grid or a region"
    return text if text.endswith((".", "!", "?")) else text + "."
